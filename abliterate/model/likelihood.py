"""How likely a model finds given tokens: replies of another model, a text, or what may follow a text."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean

import torch
from jaxtyping import Float, Int
from torch import Tensor

from abliterate.events import OnEvent, ignore, working
from abliterate.model.chat import Batch, ChatFormat
from abliterate.model.forward import Tell, each_batch, run_batch
from abliterate.model.load import LoadedModel
from abliterate.model.room import logits_room

LOSS, DISTRIBUTIONS = "loss", "distributions"
KL_TOKENS = 16
"""Tokens of a reply whose whole distributions are kept: where a refusal or an answer is decided."""
KL_PROMPTS = 32
LOGIT_BYTES = 512 * 2**20
"""Logits of a batch: fewer rows are run together where the vocabulary is large."""
WINDOW = 256
"""Tokens of a text that are predicted together, each from those before it in the window."""
Pack = Callable[[Sequence[list[int]], int], Iterable[Batch]]
"""Makes batches of token ids, of so many rows at most."""


def on_completions(
    loaded: LoadedModel,
    chat: ChatFormat,
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[float, Float[Tensor, "tokens vocab"]]:
    """Mean negative log-likelihood per token of the completions in nats, over prompts that have one.

    The second value returned are the log-probabilities at the first ``KL_TOKENS`` tokens of the first ``KL_PROMPTS``
    completions, in float32.
    """
    encoded, lengths = [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        tail = _tokens(chat, completion)
        if tail:
            encoded.append(chat.encode(prompt) + tail)
            lengths.append(len(tail))
    advance(len(prompts) - len(encoded))  # nothing is to be predicted of these
    losses: dict[int, float] = {}
    kept: dict[int, Tensor] = {}

    def figures(row: int, log_probs: Float[Tensor, "n vocab"], ids: Int[Tensor, " n"]) -> Iterator[tuple[str, Tensor]]:
        yield LOSS, -log_probs.gather(1, ids[:, None]).to(torch.float64).mean()
        if row < KL_PROMPTS:
            yield DISTRIBUTIONS, log_probs[:KL_TOKENS].float()

    def see(row: int, name: str, values: Tensor) -> None:
        if name == LOSS:
            losses[row] = float(values)
        else:
            kept[row] = values

    predict(loaded, chat.pack, encoded, lengths, figures, see, batch_size=batch_size, advance=advance)
    found = torch.cat([kept[row] for row in sorted(kept)]) if kept else torch.empty(0, 0)
    return (fmean(losses.values()) if losses else float("nan")), found


def on_text(
    loaded: LoadedModel, chat: ChatFormat, text: str, *, batch_size: int, on_event: OnEvent = ignore, task: str = "text"
) -> float:
    """Mean negative log-likelihood per token of ``text``, in nats, read in windows; NaN of nothing."""
    ids = _tokens(chat, text)
    start = [] if chat.tokenizer.bos_token_id is None else [int(chat.tokenizer.bos_token_id)]
    windows = [start + ids[first : first + WINDOW] for first in range(0, len(ids), WINDOW)]
    windows = [window for window in windows if len(window) > 1]
    losses: list[Tensor] = []

    def figures(_: int, log_probs: Float[Tensor, "n vocab"], ids: Int[Tensor, " n"]) -> Iterator[tuple[str, Tensor]]:
        yield LOSS, -log_probs.gather(1, ids[:, None]).flatten().to(torch.float64)

    def see(_: int, __: str, values: Tensor) -> None:
        losses.append(values)

    if windows:
        lengths = [len(window) - 1 for window in windows]
        with working(on_event, task, len(windows), "windows") as advance:
            predict(loaded, chat.pack, windows, lengths, figures, see, batch_size=batch_size, advance=advance)
    return float(torch.cat(losses).mean()) if losses else float("nan")


def on_continuations(
    loaded: LoadedModel,
    pack: Pack,
    asked: Sequence[tuple[list[int], list[int]]],
    *,
    longest: int | None = None,
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
) -> list[tuple[float, bool]]:
    """The log-likelihood of each continuation in nats, and whether it is the greedy one.

    ``asked`` are (context, continuation), whose last ``longest`` tokens are run.  Those that differ in their last token
    only (A, B, C, D) share a row.
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    for place, (context, continuation) in enumerate(asked):
        rows.setdefault((len(continuation), *context, *continuation[:-1]), []).append(place)
    members = list(rows.values())
    firsts = [asked[places[0]] for places in members]
    encoded = [(context + continuation)[-(longest or 0) :] for context, continuation in firsts]
    lengths = [len(continuation) for _, continuation in firsts]
    found: list[tuple[float, bool]] = [(float("nan"), False)] * len(asked)

    def figures(row: int, log_probs: Tensor, _: Tensor) -> Iterator[tuple[str, Tensor]]:
        greedy = log_probs.argmax(-1)
        for place in members[row]:
            ids = torch.tensor(asked[place][1])
            score, same = log_probs.gather(1, ids[:, None]).sum(), (greedy == ids).all()
            yield str(place), torch.stack([score, same.to(score.dtype)])

    def see(_: int, place: str, values: Tensor) -> None:
        score, same = values.tolist()
        found[int(place)] = (score, bool(same))
        advance(1)

    predict(loaded, pack, encoded, lengths, figures, see, batch_size=batch_size)
    return found


def predict(
    loaded: LoadedModel,
    pack: Pack,
    encoded: Sequence[list[int]],
    lengths: Sequence[int],
    figures: Callable[[int, Tensor, Tensor], Iterable[tuple[str, Tensor]]],
    see: Callable[[int, str, Tensor], None],
    *,
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Show ``see(row, name, values)`` what ``figures(row, log_probs, ids)`` makes of each row's log-probabilities.

    These are those at its last ``lengths[row]`` tokens ``ids``, in float32 or wider: float64 would be most of the time,
    where the vocabulary is large.  Batches are small enough for the memory of their logits; ``pack`` makes them.
    """
    longest = max(lengths, default=0) + 1
    row_bytes = logit_row_bytes(loaded, longest)
    rows = max(1, min(batch_size, logits_room(loaded, LOGIT_BYTES) // row_bytes))

    def work(batch: Batch, tell: Tell) -> Tensor:
        logits = run_batch(loaded, batch, keep=1 + max(lengths[row] for row in batch.rows))
        for place, row in enumerate(batch.rows):
            n = lengths[row]
            log_probs = logits[place, -n - 1 : -1].to(device="cpu", dtype=wide(logits.dtype)).log_softmax(-1)
            for name, values in figures(row, log_probs, batch.input_ids[place, -n:]):
                tell(f"{row} {name}", values)
        return torch.empty(0)

    def told(_: Batch, name: str, values: Tensor) -> None:
        row, what = name.split(" ")
        see(int(row), what, values)

    options = {"told": told, "logits_bytes": row_bytes, "advance": advance}
    for _ in each_batch(loaded, pack(encoded, rows), work, **options):
        pass


def logit_row_bytes(loaded: LoadedModel, tokens: int) -> int:
    """Bytes of the logits of a row of which ``tokens`` tokens are kept."""
    return tokens * loaded.model.config.get_text_config().vocab_size * 4


def wide(dtype: torch.dtype) -> torch.dtype:
    """``dtype``, or float32 where that is wider."""
    return torch.promote_types(dtype, torch.float32)


def _tokens(chat: ChatFormat, text: str) -> list[int]:
    return [int(token) for token in chat.tokenizer(text, add_special_tokens=False)["input_ids"]] if text else []
