"""Forward passes over lists of prompts: log-probabilities of the next token, residuals, replies."""

import inspect
import math
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.errors import NonFiniteError
from abliterate.model.chat import Batch, ChatFormat, left_padded
from abliterate.model.footprint import cache_bytes, guess_bytes, logit_bytes, running_bytes, waiting_bytes
from abliterate.model.guessing import MOST_GUESSES
from abliterate.model.interventions import observed
from abliterate.model.load import LoadedModel
from abliterate.model.lockstep import room_for, run_together, wait_on_disk
from abliterate.model.ranks import count, spread
from abliterate.model.room import least_guesses, most_guesses

Tell = Callable[[str, Tensor], None]
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
    work: Callable[[Batch, Tell], Tensor],
    *,
    told: Callable[[Batch, str, Tensor], None] = lambda *_: None,
    result_bytes: int = 0,
    logits_bytes: int = 0,
    new_tokens: int = 0,
    guessed: Callable[[int], bool] = lambda _: False,
    advance: Callable[[int], None] = lambda _: None,
) -> Iterator[tuple[Batch, Tensor]]:
    """Each batch with the result of ``work`` on it; out of core, as many batches in lockstep as memory allows.

    What ``work`` tells of what it sees, in tensors with names, comes to ``told``: at once or, where there are other
    processes, with the results, which all of them get (``ranks.spread``).  ``result_bytes`` is the size of one row's
    result, ``logits_bytes`` that of its logits, where they are more than those of its last token, and go when the pass
    ends.  ``new_tokens`` is how many tokens a batch adds to an attention cache, 0 if it keeps none; ``guessed`` says
    whether rows of so many tokens are written by guessing: then their caches may lie on disk.  ``advance`` is called
    with the rows of each batch that is done.
    """
    every = list(batches)
    alone = count() == 1

    def job(batch: Batch, tell: Tell) -> Tensor:
        found = work(batch, tell)
        advance(len(batch.rows))
        return found

    def run(some: Sequence[Batch]) -> Iterator[Mapping[str, Tensor]]:
        kept: list[list[tuple[str, Tensor]]] = [[] for _ in some]
        jobs = [
            partial(job, batch, partial(told, batch) if alone else lambda *its, to=its_own: to.append(its))
            for batch, its_own in zip(some, kept, strict=True)
        ]
        shapes = [(*batch.input_ids.shape, new_tokens) for batch in some]
        sizes = {"result_bytes": result_bytes, "logits_bytes": logits_bytes}
        results = _each(loaded, shapes, jobs, **sizes, guessed=guessed)
        for result, its in zip(results, kept, strict=True):
            yield {"": result, **{f"{number} {name}": value for number, (name, value) in enumerate(its)}}
            its.clear()

    found = run(every) if alone else spread(every, run, by_others=lambda place: advance(len(every[place].rows)))
    for batch, its in zip(every, found, strict=True):
        for key in sorted((key for key in its if key), key=lambda key: int(key.partition(" ")[0])):
            told(batch, key.partition(" ")[2], its[key])
        yield batch, its[""]


def _each(
    loaded: LoadedModel,
    shapes: Sequence[tuple[int, ...]],
    jobs: Sequence[Callable[[], Tensor]],
    **options: Any,  # noqa: ANN401 - of ``fitting``
) -> Iterator[Tensor]:
    """The result of each job, one for each batch; ``shapes`` and ``options`` as for ``fitting``."""
    if loaded.offload is None:
        yield from (job() for job in jobs)
        return
    with closing(fitting(loaded, shapes, **options)) as spans:
        for span in spans:
            yield from run_together(loaded, jobs[span.start : span.stop])


def fitting(
    loaded: LoadedModel,
    shapes: Sequence[tuple[int, ...]],
    *,
    result_bytes: int = 0,
    logits_bytes: int = 0,
    guessed: Callable[[int], bool] = lambda _: False,
) -> Generator[range, None, None]:
    """Cut batches of ``shapes`` (rows, tokens, new tokens) into ranges that fit into memory beside the weights.

    All batches of a range wait, with their states in memory, while one of them runs.  That memory is reserved until
    the next range is asked for; in a task, a range may wait until others have done with theirs.  ``guessed``: whether
    rows of so many tokens are written by guessing (``replying.is_guessed``), and their caches may lie on disk.

    Raises:
        NotEnoughDiskError: they do, and there is no room for these any more.
    """
    if loaded.offload is None:
        raise AssertionError("the weights are in memory")
    cached = [rows * (width + new + MOST_GUESSES) * cache_bytes(loaded) if new else 0 for rows, width, new in shapes]
    longest = max((width + new for _, width, new in shapes), default=0)
    guessing = any(new for *_, new in shapes) and guessed(longest)
    sizes, most = [], 0
    for rows, whole, _ in shapes:
        width = 1 + most_guesses(rows) if guessing else whole  # prompts find room by themselves (``room_for_prompts``)
        sizes.append(rows * (waiting_bytes(loaded, width, behind=longest if guessing else 0) + result_bytes))
        logits = guess_bytes(loaded, 1 + least_guesses(loaded, rows)) if guessing else logit_bytes(loaded)
        most = max(most, rows * max(max(whole, width) * running_bytes(loaded), logits, logits_bytes))
    waits = guessing and wait_on_disk(loaded.offload, sum(sizes) + sum(cached) + most, sum(cached))
    share = 1 / loaded.n_layers if waits else 1.0  # of a cache on disk the layer that was used last is in memory
    sizes = [size + math.ceil(share * its) for size, its in zip(sizes, cached, strict=True)]
    first = 0
    try:
        while first < len(sizes):
            with room_for(loaded.offload, sizes[first:], most, lasting=guessing) as count:
                yield range(first, first + count)
            first += count
    finally:
        loaded.offload.mapped_bytes -= sum(cached) if waits else 0


def padding_is_harmless(loaded: LoadedModel, ids: list[int], pad_id: int) -> bool:
    """Whether padding before a prompt leaves the distribution of its next token as it is.

    In some models it does not: a short convolution with a bias sees the padding that the attention mask hides.
    """
    (alone,) = left_padded([ids], 1, pad_id)
    (beside,) = left_padded([ids, ids + ids], 2, pad_id)
    by_itself, padded = run_together(loaded, [partial(run_batch, loaded, alone), partial(run_batch, loaded, beside)])
    logits = by_itself[0, -1]
    one = logits.double().log_softmax(-1)
    other = padded[beside.rows.index(0), -1].double().log_softmax(-1)
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

    def last(batch: Batch, _: Tell) -> Tensor:
        return figure(last_of_batch(loaded, batch))

    rows: list[Tensor | None] = [None] * len(prompts)
    for batch, found in each_batch(loaded, chat.batches(prompts, batch_size), last, advance=advance):
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

    def run(batch: Batch, tell: Tell) -> Tensor:
        def show(layer: int, x: Tensor) -> None:
            # A copy: what is seen must not keep the whole state alive.
            tell(str(layer), x[:, -n_positions:].detach().to(device="cpu", dtype=torch.float32, copy=True))

        with observed(loaded, show):
            run_batch(loaded, batch, keep=n_positions)  # Gemma 4 runs its last blocks on these tokens only
        return torch.empty(0)

    def told(batch: Batch, layer: str, values: Tensor) -> None:
        see(batch.rows, int(layer), values)

    # with other processes what was seen waits for the results
    waiting = loaded.n_layers * n_positions * loaded.d_model * torch.float32.itemsize if count() > 1 else 0
    options = {"told": told, "advance": advance, "result_bytes": waiting}
    for _ in each_batch(loaded, chat.batches(prompts, batch_size), run, **options):
        pass
