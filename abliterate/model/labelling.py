"""One pass over prompts: each gets a short greedy reply, which says how the model takes the prompt.

The residuals of a prompt wait until its reply was read, and are summed up where it does what its class says: harmful
prompts that are refused, harmless ones that are answered.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from abliterate.errors import PromptError
from abliterate.events import Advanced, Finished, OnEvent, Started, ignore
from abliterate.method.class_sums import ClassSums
from abliterate.method.estimators import Need
from abliterate.model.chat import Batch, ChatFormat
from abliterate.model.forward import Tell, check_finite, each_batch, log_probs_of
from abliterate.model.load import LoadedModel
from abliterate.model.lockstep import scratch_of
from abliterate.model.ranks import count
from abliterate.model.replying import Watching, is_guessed, reply_and_see

Label = Literal["refused", "answered", "unclear"]
LABELS: tuple[Label, ...] = ("refused", "answered", "unclear")
WANTED: Mapping[str, Label] = {"harmful": "refused", "harmless": "answered"}
"""What the prompts of a class must be to count."""
LIKELY = 256
"""How many of the likeliest first tokens of each prompt are kept; what is less likely counts as impossible."""
MISSING = -1
"""In place of the tokens of a reply that has ended."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replies:
    """What a model replied to the prompts of one class.

    Attributes:
        tokens: ``[prompts, new tokens]``, ``MISSING`` behind the end.
        labels: of each prompt.
        likely: the likeliest first tokens, ``[prompts, k]``.
        log_probs: their log-probabilities.
    """

    tokens: Tensor
    labels: tuple[Label, ...]
    likely: Tensor
    log_probs: Tensor

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Replies":
        """From what ``label`` gives for a class."""
        labels = tuple(LABELS[place] for place in tensors["labels"].tolist())
        return cls(tokens=tensors["tokens"], labels=labels, likely=tensors["likely"], log_probs=tensors["log_probs"])

    def count(self, label: Label) -> int:
        """How many prompts have ``label``."""
        return self.labels.count(label)

    def where(self, label: Label) -> list[int]:
        """The prompts that have it."""
        return [row for row, its in enumerate(self.labels) if its == label]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What is measured of a group of prompts: ``needs`` of those with the label ``wanted``.

    ``half`` are numbers of prompts over which means are taken once more; ``categories`` those of all prompts, where
    means over each are taken.
    """

    wanted: Label
    needs: Collection[Need]
    half: Collection[int] = ()
    categories: Sequence[str] = ()


def label(
    loaded: LoadedModel,
    chat: ChatFormat,
    prompts: Mapping[str, Sequence[str]],
    read: Callable[[str, str], Label],
    measured: Mapping[str, Measured],
    *,
    max_new_tokens: int,
    batch_size: int,
    task: str,
    on_event: OnEvent = ignore,
) -> dict[str, dict[str, Tensor]]:
    """Replies to each group of ``prompts`` with their labels and, of groups that are ``measured``, sums of residuals.

    ``read(prompt, reply)`` gives the label.  What stands before a slash in the name of a group is its split: groups of
    one split share batches.  For each group: "tokens", "labels", "likely" and "log_probs" as in
    ``Replies``, and what ``ClassSums.finish`` gives, if any prompt counts.

    Raises:
        PromptError: one prompt is left, and a covariance takes two.
        NonFiniteError: an activation, or the logits of a first token, are NaN or infinite.
    """
    flat = [(group, place) for group, its in prompts.items() for place in range(len(its))]
    texts = [prompt for its in prompts.values() for prompt in its]
    shape = loaded.n_layers, len(chat.positions), loaded.d_model
    sums = {
        group: ClassSums(*shape, its.needs, rows=len(prompts[group]), halved=bool(its.half), categories=its.categories)
        for group, its in measured.items()
    }
    found = _Found(len(texts), max_new_tokens)

    def add(batch: Batch, residuals: Mapping[int, Tensor]) -> None:
        for layer, values in residuals.items():
            check_finite(values, [texts[row] for row in batch.rows], f"activations entering block {layer}")
            for group, its in measured.items():
                here = [p for p, row in enumerate(batch.rows) if flat[row][0] == group and found.is_(its.wanted, row)]
                rows = [flat[batch.rows[p]][1] for p in here]
                if rows:
                    sums[group].add(layer, rows, values[here], [row in its.half for row in rows])

    on_event(Started(task=task, total=len(texts), unit="prompts"))
    layers = range(loaded.n_layers if measured else 0)
    # not in larger batches where the model is held: out of core the direction is the same to the last bit
    batches = _batches(chat, [group.partition("/")[0] for group, _ in flat], texts, batch_size)
    for batch, tokens, residuals in _each(loaded, chat, texts, batches, found, layers, max_new_tokens):
        for row, its in zip(batch.rows, tokens, strict=True):
            reply = chat.text(its)
            found.put(row, its, read(texts[row], reply), chat.pad_id)
        add(batch, residuals)
        on_event(Advanced(task=task, amount=len(batch.rows)))
    on_event(Finished(task=task))
    return {
        group: {
            **found.of([row for row, (its, _) in enumerate(flat) if its == group]),
            **_finished(loaded, sums, group),
        }
        for group in prompts
    }


def _batches(chat: ChatFormat, splits: Sequence[str], texts: Sequence[str], batch_size: int) -> Iterator[Batch]:
    """Batches of the prompts of each split: nothing depends on which other splits share the pass."""
    for split in dict.fromkeys(splits):
        rows = [row for row, its in enumerate(splits) if its == split]
        for batch in chat.batches([texts[row] for row in rows], batch_size):
            yield replace(batch, rows=tuple(rows[place] for place in batch.rows))


def _finished(loaded: LoadedModel, sums: Mapping[str, ClassSums], group: str) -> dict[str, Tensor]:
    its = sums.get(group)
    if its is None or not its.count:
        return {}
    if its.needs_two and its.count < 2:
        raise PromptError(
            f"{loaded.name}: {group}: one prompt is left, and a covariance takes two", "give more prompts"
        )
    return its.finish()


class _Found:
    """Tokens, labels and first tokens of all prompts, as they come in."""

    def __init__(self, count: int, max_new_tokens: int) -> None:
        self.tokens = torch.full((count, max_new_tokens), MISSING, dtype=torch.long)
        self.labels = torch.full((count,), LABELS.index("unclear"), dtype=torch.long)
        self.likely = torch.empty(count, 0, dtype=torch.long)
        self.log_probs = torch.empty(count, 0, dtype=torch.float64)

    def first(self, rows: Sequence[int], prompts: Sequence[str], logits: Tensor) -> None:
        """Keep the likeliest first tokens of some prompts."""
        if not self.likely.shape[1]:
            shape = len(self.likely), min(LIKELY, logits.shape[-1])
            self.likely, self.log_probs = self.likely.new_zeros(shape), self.log_probs.new_zeros(shape)
        for row, prompt, its in zip(rows, prompts, logits, strict=True):  # in float64 one at a time
            log_probs = log_probs_of(its)
            check_finite(log_probs.amax(-1, keepdim=True)[None], [prompt], "logits")
            kept = log_probs.topk(self.likely.shape[1])
            self.likely[row], self.log_probs[row] = kept.indices, kept.values

    def put(self, row: int, tokens: Tensor, label: Label, pad_id: int) -> None:
        """Keep the reply of one prompt."""
        kept = tokens.clone()
        ended = (tokens != pad_id).nonzero()
        kept[int(ended[-1]) + 1 if len(ended) else 0 :] = MISSING
        self.tokens[row, : len(kept)] = kept
        self.labels[row] = LABELS.index(label)

    def is_(self, wanted: Label, row: int) -> bool:
        """Whether a prompt has the label ``wanted``."""
        return LABELS[int(self.labels[row])] == wanted

    def of(self, rows: list[int]) -> dict[str, Tensor]:
        """What is known of some prompts."""
        return {name: getattr(self, name)[rows] for name in ("tokens", "labels", "likely", "log_probs")}


def _each(
    loaded: LoadedModel,
    chat: ChatFormat,
    texts: Sequence[str],
    batches: Iterable[Batch],
    found: _Found,
    layers: Collection[int],
    max_new_tokens: int,
) -> Iterator[tuple[Batch, Tensor, Mapping[int, Tensor]]]:
    """Each batch of prompts with the tokens of its replies and what entered each block of ``layers``."""
    kept: dict[tuple[int, ...], dict[int, Tensor]] = {}
    positions = len(chat.positions)
    folder = scratch_of(loaded)

    def see(rows: Sequence[int], layer: int, values: Tensor) -> None:
        if folder is not None:
            from abliterate.model.disk_cache import parked

            values = parked(values, folder)
        kept.setdefault(tuple(rows), {})[layer] = values

    def work(batch: Batch, tell: Tell) -> Tensor:
        return reply_and_see(
            loaded, chat, batch, max_new_tokens, tell, layers=layers, n_positions=positions, first=True
        )

    watching = Watching(
        first=lambda rows, logits: found.first(rows, [texts[row] for row in rows], logits),
        see=see,
    )
    # what is seen waits for the replies: here, or in what goes to other processes
    waiting = positions * len(layers) * loaded.d_model * torch.float32.itemsize
    waiting = waiting if folder is None or count() > 1 else 0
    options: dict[str, Any] = {"told": watching.told, "result_bytes": waiting, "new_tokens": max_new_tokens}
    options["guessed"] = partial(is_guessed, loaded, chat)
    for batch, tokens in each_batch(loaded, batches, work, **options):
        yield batch, tokens, kept.pop(batch.rows, {})
