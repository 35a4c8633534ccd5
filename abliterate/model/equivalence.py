"""Does the written checkpoint behave as the base does under inference-time ablation?

Two measurements on held-out prompts (``verification.behaviour`` has their bounds): the next-token distributions of the
written checkpoint against those of the base under hooks, as KL in nats; and the share of the direction in the stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.method.linalg import orthonormal_basis
from abliterate.method.statistics import exact_kl_nats
from abliterate.model.chat import Batch, ChatFormat
from abliterate.model.forward import each_batch, last_log_probs, run_batch
from abliterate.model.interventions import ablated, observed
from abliterate.model.load import LoadedModel
from abliterate.verification.behaviour import Behaviour, kl_bound_nats, share_bound


@dataclass(frozen=True, slots=True, kw_only=True)
class HookedBase:
    """What the base says: as it is, and under ablation hooks."""

    plain: Float[Tensor, "prompts vocab"]
    hooked: Float[Tensor, "prompts vocab"]


def hooked_base(
    loaded: LoadedModel,
    chat: ChatFormat,
    directions: Float[Tensor, "d k"],
    prompts: Sequence[str],
    *,
    batch_size: int,
) -> HookedBase:
    """Next-token log-probabilities of the base, with and without ablation hooks."""
    plain = last_log_probs(loaded, chat, prompts, batch_size=batch_size)
    with ablated(loaded, directions):
        hooked = last_log_probs(loaded, chat, prompts, batch_size=batch_size)
    return HookedBase(plain=plain, hooked=hooked)


def compare(
    written: LoadedModel,
    chat: ChatFormat,
    base: HookedBase,
    directions: Float[Tensor, "d k"],
    prompts: Sequence[str],
    *,
    stored: str,
    exact_family: bool,
    expect_removed: bool,
    batch_size: int,
) -> Behaviour:
    """Measure the written checkpoint against the hooked base."""
    ours = last_log_probs(written, chat, prompts, batch_size=batch_size)
    kl = exact_kl_nats(base.hooked, ours)
    computing = next(written.model.parameters()).dtype
    return Behaviour(
        prompts=len(prompts),
        kl_nats=float(kl.mean()),
        worst_kl_nats=float(kl.max()),
        ablation_kl_nats=float(exact_kl_nats(base.hooked, base.plain).mean()),
        same_top=float((ours.argmax(-1) == base.hooked.argmax(-1)).double().mean()),
        stream_share=stream_share(written, chat, directions, prompts, batch_size=batch_size),
        kl_bound_nats=kl_bound_nats(stored, computing),
        share_bound=share_bound(stored, computing),
        exact_family=exact_family,
        expect_removed=expect_removed,
    )


def stream_share(
    loaded: LoadedModel,
    chat: ChatFormat,
    directions: Float[Tensor, "d k"],
    prompts: Sequence[str],
    *,
    batch_size: int,
) -> float:
    """Largest ``|Q^T h| / |h|`` over blocks and real tokens."""
    basis = orthonormal_basis(directions)

    def worst_share(batch: Batch) -> Tensor:
        real = batch.attention_mask.bool()
        worst = torch.zeros((), dtype=torch.float64)

        def see(_: int, x: Tensor) -> None:
            nonlocal worst
            seen = real[:, -x.shape[-2] :].to(x.device)  # Gemma 4 runs its last blocks on the last position only
            h = x[..., seen, :].to(device="cpu", dtype=torch.float64)
            share = torch.linalg.vector_norm(h @ basis, dim=-1) / torch.linalg.vector_norm(h, dim=-1)
            worst = torch.maximum(worst, share.nan_to_num(nan=float("inf")).max())

        with observed(loaded, see, leaving_last=True):
            run_batch(loaded, batch)
        return worst

    shares = each_batch(loaded, chat.batches(prompts, batch_size), worst_share)
    return max((float(share) for _, share in shares), default=0.0)
