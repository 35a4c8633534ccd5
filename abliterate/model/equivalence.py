"""Does the written checkpoint behave as the base does under inference-time ablation?

Two measurements on held-out prompts (``verification.behaviour`` has their bounds): the next-token distributions of the
written checkpoint against those of the base under hooks, as KL in nats; and the share of the direction in the stream.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.arch.edit_plan import EditPlan
from abliterate.arch.formats import FORMATS
from abliterate.events import OnEvent, ignore, working
from abliterate.method.linalg import orthonormal_basis
from abliterate.method.statistics import exact_kl_nats
from abliterate.model.chat import Batch, ChatFormat
from abliterate.model.forward import Tell, each_batch, last_log_probs, last_of_batch
from abliterate.model.interventions import as_planned, observed
from abliterate.model.load import LoadedModel
from abliterate.model.lockstep import share
from abliterate.verification.behaviour import Behaviour, kl_bound_nats, share_bound

OF_BASE = "verify: the base, as it is and under hooks"
OF_WRITTEN = "verify: the written checkpoint against the hooked base"


@dataclass(frozen=True, slots=True, kw_only=True)
class HookedBase:
    """What the base says: as it is, and under ablation hooks."""

    plain: Float[Tensor, "prompts vocab"]
    hooked: Float[Tensor, "prompts vocab"]


def hooked_base(
    loaded: LoadedModel,
    chat: ChatFormat,
    plan: EditPlan,
    prompts: Sequence[str],
    *,
    batch_size: int,
    on_event: OnEvent = ignore,
) -> HookedBase:
    """Next-token log-probabilities of the base, as it is and with the edit as hooks; out of core in one weight pass.

    Where the plan was healed, the hooked base has what healing adds beside its writers.
    """
    with working(on_event, OF_BASE, 2 * len(prompts), "prompt passes") as advance:
        as_it_is = partial(last_log_probs, loaded, chat, prompts, batch_size=batch_size, advance=advance)

        def under_hooks() -> Tensor:
            with as_planned(loaded, plan):
                return as_it_is()

        plain, hooked = share(loaded, [as_it_is, under_hooks])
    return HookedBase(plain=plain, hooked=hooked)


def compare(
    written: LoadedModel,
    chat: ChatFormat,
    base: HookedBase,
    plan: EditPlan,
    prompts: Sequence[str],
    *,
    batch_size: int,
    on_event: OnEvent = ignore,
) -> Behaviour:
    """Measure the written checkpoint against the hooked base, and by what its plan claims.

    How much of the direction is in the stream is asked where one subspace is removed at every place.
    """
    removed = None if plan.stream is None else plan.stream.removed
    stored = coarsest_format(plan)
    with working(on_event, OF_WRITTEN, len(prompts), "prompts") as advance:
        ours, stream_share = seen(written, chat, removed, prompts, batch_size=batch_size, advance=advance)
    kl = exact_kl_nats(base.hooked, ours)
    computing = next(written.model.parameters()).dtype
    return Behaviour(
        prompts=len(prompts),
        kl_nats=float(kl.mean()),
        worst_kl_nats=float(kl.max()),
        ablation_kl_nats=float(exact_kl_nats(base.hooked, base.plain).mean()),
        same_top=float((ours.argmax(-1) == base.hooked.argmax(-1)).double().mean()),
        stream_share=stream_share,
        kl_bound_nats=kl_bound_nats(stored, computing),
        share_bound=share_bound(stored, computing),
        exact_family=plan.claim == "equal to hooks",
        expect_removed=removed is not None and plan.exactness != "C",
    )


def coarsest_format(plan: EditPlan) -> str:
    """The stored format of the writers that rounds most."""
    return max((writer.format for writer in plan.writers), key=lambda name: FORMATS[name].unit_roundoff)


def seen(
    loaded: LoadedModel,
    chat: ChatFormat,
    directions: Float[Tensor, "d k"] | None,
    prompts: Sequence[str],
    *,
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[Tensor, float | None]:
    """Log-probabilities ``[prompts, vocab]`` of the next token, and the largest ``|Q^T h| / |h|`` in the stream.

    The latter is over blocks and real tokens; None without ``directions``.
    """
    basis = None if directions is None else orthonormal_basis(directions)
    worst = [torch.zeros((), dtype=torch.float64)]

    def see(real: Tensor, tell: Tell, _: int, x: Tensor) -> None:
        if basis is None:
            return
        rows = real[:, -x.shape[-2] :].to(x.device)  # Gemma 4 runs its last blocks on the last position only
        h = x[..., rows, :].to(device="cpu", dtype=torch.float64)
        share = torch.linalg.vector_norm(h @ basis, dim=-1) / torch.linalg.vector_norm(h, dim=-1)
        tell("share", share.nan_to_num(nan=float("inf")).max())

    def run(batch: Batch, tell: Tell) -> Tensor:
        with observed(loaded, partial(see, batch.attention_mask.bool(), tell), leaving_last=True):
            return last_of_batch(loaded, batch)

    def told(_: Batch, __: str, share: Tensor) -> None:
        worst.append(torch.maximum(worst.pop(), share))

    log_probs: dict[int, Tensor] = {}
    for batch, found in each_batch(loaded, chat.batches(prompts, batch_size), run, told=told, advance=advance):
        log_probs.update(zip(batch.rows, found, strict=True))
    return torch.stack([log_probs[row] for row in range(len(prompts))]), None if basis is None else float(worst[0])
