"""Forward passes over lists of prompts: log-probabilities of the next token, residuals, replies."""

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from abliterate.errors import NonFiniteError
from abliterate.events import Advanced, Finished, OnEvent, Started, ignore
from abliterate.model.chat import Batch, ChatFormat, left_padded
from abliterate.model.footprint import cache_bytes, logit_bytes, running_bytes, waiting_bytes
from abliterate.model.interventions import observed
from abliterate.model.load import LoadedModel
from abliterate.model.lockstep import groups, run_together
from abliterate.model.room import reply_rows

DEFAULT_BATCH_SIZE = 32
PADDING_NATS = {2: 1e-2, 4: 1e-6, 8: 1e-6}
"""KL divergence that rounding explains, by the bytes of a logit: batches of another size are rounded otherwise."""


def run_batch(
    loaded: LoadedModel,
    batch: Batch,
    *,
    keep: int = 1,
    cache: Any = None,  # noqa: ANN401 - a cache of transformers
    gradients: bool = False,
) -> Tensor:
    """Run a batch and return its logits ``[batch, tokens, vocab]``.

    A model that can be asked for it gives only those of the last ``keep`` tokens.  ``cache`` is an attention cache; it
    may hold earlier tokens, which the mask of ``batch`` covers as well.  With ``gradients`` they flow, where autograd
    is on.
    """
    accepted = inspect.signature(loaded.model.forward).parameters
    options: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
    if "position_ids" in accepted:
        options["position_ids"] = batch.position_ids[:, -batch.input_ids.shape[1] :].to(loaded.device)
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = keep

    def run() -> Tensor:
        with torch.inference_mode(not gradients):
            return loaded.model(
                input_ids=batch.input_ids.to(loaded.device),
                attention_mask=batch.attention_mask.to(loaded.device),
                use_cache=cache is not None,
                **options,
            ).logits

    return run_together(loaded, [run])[0]


def each_batch(
    loaded: LoadedModel,
    batches: Iterable[Batch],
    work: Callable[[Batch], Tensor],
    *,
    result_bytes: int = 0,
    new_tokens: int = 0,
) -> Iterator[tuple[Batch, Tensor]]:
    """Each batch with the result of ``work`` on it; see ``each_job``."""
    jobs = ((batch, partial(work, batch)) for batch in batches)
    yield from each_job(loaded, jobs, result_bytes=result_bytes, new_tokens=new_tokens)


def each_job(
    loaded: LoadedModel,
    jobs: Iterable[tuple[Batch, Callable[[], Tensor]]],
    *,
    result_bytes: int = 0,
    new_tokens: int = 0,
) -> Iterator[tuple[Batch, Tensor]]:
    """Call each job and give its batch and its result; out of core, as many jobs in lockstep as memory allows.

    ``result_bytes`` is the size of one row's result.  ``new_tokens`` is how many tokens a job adds to an attention
    cache, 0 if it keeps none.
    """
    if loaded.offload is None:
        yield from ((batch, job()) for batch, job in jobs)
        return
    waiting = list(jobs)
    sizes = (batch.input_ids.shape for batch, _ in waiting)
    shapes = [(rows, width, new_tokens) for rows, width in sizes]
    for group in fitting(loaded, shapes, result_bytes=result_bytes):
        chosen = waiting[group.start : group.stop]
        results = run_together(loaded, [job for _, job in chosen])
        yield from ((batch, result) for (batch, _), result in zip(chosen, results, strict=True))


def fitting(loaded: LoadedModel, shapes: Sequence[tuple[int, int, int]], *, result_bytes: int = 0) -> Iterator[range]:
    """Cut batches of ``shapes`` (rows, tokens, new tokens) into ranges that fit into memory beside the weights.

    All batches of a range wait, with their states in memory, while one of them runs.
    """
    if loaded.offload is None:
        raise AssertionError("the weights are in memory")
    cache, most, sizes = cache_bytes(loaded), 0, []
    for rows, width, new in shapes:
        cached = (width + new) * cache if new else 0
        sizes.append(rows * (waiting_bytes(loaded, width) + cached + result_bytes))
        most = max(most, rows * max(width * running_bytes(loaded), logit_bytes(loaded)))
    yield from groups(sizes, loaded.offload.working_bytes - most)


def padding_is_harmless(loaded: LoadedModel, ids: list[int], pad_id: int) -> bool:
    """Whether padding before a prompt leaves the distribution of its next token as it is.

    In some models it does not: a short convolution with a bias sees the padding that the attention mask hides.
    """
    (alone,) = left_padded([ids], 1, pad_id)
    (beside,) = left_padded([ids, ids + ids], 2, pad_id)
    logits = run_batch(loaded, alone)[0, -1]
    one = logits.double().log_softmax(-1)
    other = run_batch(loaded, beside)[beside.rows.index(0), -1].double().log_softmax(-1)
    divergence = float((one.exp() * (one - other)).sum())
    return divergence < PADDING_NATS[logits.dtype.itemsize]


def last_log_probs(
    loaded: LoadedModel,
    chat: ChatFormat,
    prompts: Sequence[str],
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    advance: Callable[[int], None] = lambda _: None,
) -> Float[Tensor, "prompts vocab"]:
    """Log-probabilities of the next token after each prompt, in float64, in the order of ``prompts``."""
    return of_last_log_probs(loaded, chat, prompts, lambda found: found, batch_size=batch_size, advance=advance)


def of_last_log_probs(
    loaded: LoadedModel,
    chat: ChatFormat,
    prompts: Sequence[str],
    figure: Callable[[Tensor], Tensor],
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    advance: Callable[[int], None] = lambda _: None,
) -> Float[Tensor, "prompts *rest"]:
    """``figure`` of the log-probabilities ``[batch, vocab]`` of the next token, one row for each prompt.

    Only the figures are kept: distributions over a large vocabulary would take more memory than the states.
    """

    def last(batch: Batch) -> Tensor:
        found = figure(last_of_batch(loaded, batch))
        advance(len(batch.rows))
        return found

    rows: list[Tensor | None] = [None] * len(prompts)
    for batch, found in each_batch(loaded, chat.batches(prompts, batch_size), last):
        for row, values in zip(batch.rows, found, strict=True):
            rows[row] = values
    return torch.stack([row for row in rows if row is not None])


def last_of_batch(
    loaded: LoadedModel,
    batch: Batch,
    *,
    cache: Any = None,  # noqa: ANN401 - a cache of transformers
) -> Tensor:
    """Log-probabilities ``[batch, vocab]`` of the next token, in float64; ``cache`` as for ``run_batch``.

    The signature has no shapes: this function may pause, and jaxtyping expects that the last call ends first.
    """
    return log_probs_of(run_batch(loaded, batch, cache=cache)[:, -1])


def log_probs_of(logits: Tensor) -> Tensor:
    """Log-probabilities of ``logits``, in float64, on the host."""
    return logits.to(device="cpu", dtype=torch.float64).log_softmax(-1)


@contextmanager
def last_states(loaded: LoadedModel, layers: Collection[int], states: dict[int, Tensor]) -> Iterator[None]:
    """Run while what enters blocks of ``layers`` at the last token, ``[rows, d]`` in float32, goes to ``states``."""

    def see(layer: int, x: Tensor) -> None:
        if layer in layers:
            states[layer] = x[:, -1].detach().to(device="cpu", dtype=torch.float32, copy=True)

    with observed(loaded, see):
        yield


def check_finite(values: Float[Tensor, "prompts *rest"], prompts: Sequence[str], what: str) -> None:
    """Check that no prompt gave NaN or infinity.

    Raises:
        NonFiniteError: names the first prompt that did.
    """
    bad = (~torch.isfinite(values)).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteError(
            f"{what} are NaN or infinite for prompt {bad[0]} ({prompts[bad[0]][:40]!r}) and {len(bad) - 1} more",
            "try --dtype float32 (float16 overflows on some models), or check the weights",
        )


def see_residuals(
    loaded: LoadedModel,
    chat: ChatFormat,
    prompts: Sequence[str],
    n_positions: int,
    see: Callable[[tuple[int, ...], int, Tensor], None],
    *,
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Call ``see(rows, l, values)`` for each block ``l`` with what enters it at the last tokens of some prompts.

    ``rows`` are places in ``prompts``.  ``values`` is ``[rows, n_positions, d]`` in float32, on the host.  Nothing is
    kept here, so all prompts can share a weight pass.
    """

    def run(batch: Batch) -> Tensor:
        def show(layer: int, x: Tensor) -> None:
            # A copy: what is seen must not keep the whole state alive.
            values = x[:, -n_positions:].detach().to(device="cpu", dtype=torch.float32, copy=True)
            see(batch.rows, layer, values)

        with observed(loaded, show):
            run_batch(loaded, batch, keep=n_positions)  # Gemma 4 runs its last blocks on these tokens only
        advance(len(batch.rows))
        return torch.empty(0)

    for _ in each_batch(loaded, chat.batches(prompts, batch_size), run):
        pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Watching:
    """Who is shown what of the pass over prompts that begins replies to them.

    ``first(rows, logits)``: the logits of the first new token after some prompts.  ``see(rows, l, values)``: what
    enters each block of ``layers`` at their last ``n_positions`` tokens.
    """

    first: Callable[[Sequence[int], Tensor], None] | None = None
    see: Callable[[Sequence[int], int, Tensor], None] = lambda *_: None
    layers: Collection[int] = ()
    n_positions: int = 1


def generate(
    loaded: LoadedModel,
    chat: ChatFormat,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = DEFAULT_BATCH_SIZE,
    task: str = "generate",
    watching: Watching | None = None,
    on_event: OnEvent = ignore,
) -> list[str]:
    """Greedy replies, special tokens removed, in the order of ``prompts``; ``watching`` is shown what begins them."""
    on_event(Started(task=task, total=len(prompts), unit="prompts"))

    def reply(batch: Batch) -> Tensor:
        its = watching or Watching()
        told = None if its.first is None else partial(its.first, batch.rows)
        tokens, residuals = reply_and_see(
            loaded, chat, batch, max_new_tokens, layers=its.layers, n_positions=its.n_positions, first=told
        )
        for layer, values in residuals.items():
            its.see(batch.rows, layer, values)
        on_event(Advanced(task=task, amount=len(batch.rows)))
        return tokens

    replies: list[str] = [""] * len(prompts)
    batches = chat.batches(prompts, rows_of_replies(loaded, chat, prompts, batch_size, max_new_tokens))
    for batch, rows in each_batch(loaded, batches, reply, new_tokens=max_new_tokens):
        for row, tokens in zip(batch.rows, rows, strict=True):
            replies[row] = str(chat.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
    on_event(Finished(task=task))
    return replies


def rows_of_replies(
    loaded: LoadedModel, chat: ChatFormat, prompts: Sequence[str], batch_size: int, max_new_tokens: int
) -> int:
    """Rows of a batch in which replies to ``prompts`` are written; see ``reply_rows``."""
    longest = max((len(chat.encode(prompt)) for prompt in prompts), default=0)
    return reply_rows(loaded, batch_size, longest + max_new_tokens)


def generate_ids(
    loaded: LoadedModel,
    chat: ChatFormat,
    batch: Batch,
    max_new_tokens: int,
    *,
    first: Callable[[Tensor], None] | None = None,
) -> Int[Tensor, "batch new_tokens"]:
    """Greedy continuation of a batch: only the new tokens, padded on the right once a row has ended.

    ``first`` is called with the logits ``[batch, vocab]`` of the first new token.  A model that learned its positions
    stops where they end.
    """
    from transformers import LogitsProcessor, LogitsProcessorList

    class Show(LogitsProcessor):
        waiting = first

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
            if self.waiting is not None:
                self.waiting(scores)
                self.waiting = None
            return scores

    if loaded.other_embeddings and chat.context is not None:  # there is no position to go on at
        max_new_tokens = max(1, min(max_new_tokens, chat.context - batch.input_ids.shape[1] + 1))

    def run() -> Tensor:
        with torch.inference_mode():
            return loaded.model.generate(
                input_ids=batch.input_ids.to(loaded.device),
                attention_mask=batch.attention_mask.to(loaded.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=1.0,  # what is likeliest, whatever the repository would rather have sampled
                logits_processor=LogitsProcessorList([Show()]),
                pad_token_id=chat.pad_id,
            )

    (out,) = run_together(loaded, [run])
    return out[:, batch.input_ids.shape[1] :].cpu()


def reply_and_see(
    loaded: LoadedModel,
    chat: ChatFormat,
    batch: Batch,
    max_new_tokens: int,
    *,
    layers: Collection[int],
    n_positions: int,
    first: Callable[[Tensor], None] | None,
) -> tuple[Tensor, dict[int, Tensor]]:
    """The greedy continuation of a batch, and what entered each block of ``layers`` at the last tokens of its prompts.

    One forward pass over the prompts serves both.  Residuals are ``[rows, n_positions, d]`` in float32, on the host.
    """
    seen: dict[int, Tensor] = {}
    if not layers:
        return generate_ids(loaded, chat, batch, max_new_tokens, first=first), seen

    def show(layer: int, x: Tensor) -> None:
        if (
            layer in layers and layer not in seen
        ):  # the first forward pass has the prompts, the others one new token each
            seen[layer] = x[:, -n_positions:].detach().to(device="cpu", dtype=torch.float32, copy=True)

    with observed(loaded, show):
        tokens = generate_ids(loaded, chat, batch, max_new_tokens, first=first)
    if any(values.shape[1] < n_positions for values in seen.values()):  # as in see_residuals
        seen.clear()
        with observed(loaded, show):
            run_batch(loaded, batch, keep=n_positions)
    return tokens, seen
