"""What a model shall learn to say with a direction ablated or added: its own replies, written when they are needed.

They are kept in memory, as token ids, and nowhere else.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from abliterate.errors import PromptError
from abliterate.method.directions import Candidate
from abliterate.method.refusal_cone import ABLATION, ADDITION, RETAIN, TARGET_TOKENS
from abliterate.method.scope import Scope
from abliterate.model.chat import ChatFormat
from abliterate.model.interventions import added, without
from abliterate.model.labelling import Label
from abliterate.model.load import LoadedModel
from abliterate.model.measuring import Filtered
from abliterate.model.replying import generate_ids, rows_of_replies

SENTENCE_END = "."


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and a reply to it, as token ids; the last ``length`` of them are the reply."""

    ids: list[int]
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """What writes and reads targets: a model, with ``start`` ablated where ``scope`` holds, or added at its layer.

    ``read(prompt, reply)`` says what a reply is; ``note`` is told where other replies than the published are taken.
    """

    loaded: LoadedModel
    chat: ChatFormat
    start: Candidate
    scope: Scope
    read: Callable[[str, str], Label]
    batch_size: int
    note: Callable[[str], None] = lambda _: None


def targets_of(
    writing: Writing, prompts: Filtered, advance: Callable[[int], None] = lambda _: None
) -> Mapping[str, tuple[Example, ...]]:
    """The examples of each loss but that of independence: greedy replies of at most ``TARGET_TOKENS``.

    "ablation": harmful prompts, and what is said with the start ablated, where that is no refusal.  "addition":
    harmless prompts, and what is said with it added, cut at the first period, where that is a refusal; where none is,
    the model's own refusals of harmful prompts take turns.  "retain": harmless prompts, and what the model says anyway.

    Raises:
        PromptError: with the start ablated all harmful prompts are refused, or nothing that was said is a refusal.
    """
    loaded, start = writing.loaded, writing.start
    harmful, harmless = prompts.harmful, prompts.harmless
    with without(loaded, start, writing.scope):
        answers = [its for its in _replies(writing, harmful, advance) if its.label != "refused"]
    with added(loaded, start.everywhere.added, start.layer):
        refusals = [its for its in _replies(writing, harmless, advance) if its.label == "refused"]
    kept = _replies(writing, harmless, advance, TARGET_TOKENS - 1)
    if not answers:
        raise PromptError(
            f"{loaded.name} refuses all {len(harmful)} harmful prompts even with {start.id} ablated, so there are no "
            "answers to learn from",
            "choose another estimator, or take a method that is not trained",
        )
    if not refusals:
        own = [its for its in _replies(writing, harmful) if its.label == "refused"]
        refusals = [_Reply(prompt, its.ids, its.label) for prompt, its in zip(harmless, _in_turn(own), strict=False)]
        if refusals:
            writing.note(
                f"with {start.id} added none of {len(harmless)} harmless prompts is refused: refusals are learned from "
                f"{len(own)} of the model's own, of harmful prompts"
            )
    if not refusals:
        raise PromptError(
            f"{loaded.name} refuses none of {len(harmless)} harmless prompts with {start.id} added, nor any of "
            f"{len(harmful)} harmful ones, so there are no refusals to learn from",
            "use prompts that this model declines, or take a method that is not trained",
        )
    return {
        ABLATION: _examples(writing.chat, answers),
        ADDITION: _examples(writing.chat, [_first_sentence(writing.chat, its) for its in refusals]),
        RETAIN: _examples(writing.chat, kept),
    }


@dataclass(frozen=True, slots=True)
class _Reply:
    prompt: str
    ids: list[int]
    label: Label


def _replies(
    writing: Writing,
    prompts: Sequence[str],
    advance: Callable[[int], None] = lambda _: None,
    most: int = TARGET_TOKENS,
) -> list[_Reply]:
    """Greedy replies in the order of ``prompts``, with what stands after their end taken off; no empty ones."""
    chat, found = writing.chat, dict[int, _Reply]()
    rows = rows_of_replies(writing.loaded, chat, prompts, writing.batch_size, most)
    for batch in chat.batches(prompts, rows):
        for row, tokens in zip(batch.rows, generate_ids(writing.loaded, chat, batch, most), strict=True):
            ids = _ended(tokens, chat.pad_id)
            text = chat.text(ids)
            if text:
                found[row] = _Reply(prompts[row], ids, writing.read(prompts[row], text))
        advance(len(batch.rows))
    return [found[row] for row in sorted(found)]


def _ended(tokens: Tensor, pad_id: int) -> list[int]:
    ids = [int(token) for token in tokens]
    while ids and ids[-1] == pad_id:
        ids.pop()
    return ids


def _first_sentence(chat: ChatFormat, reply: _Reply) -> _Reply:
    for n in range(1, len(reply.ids)):
        if SENTENCE_END in chat.tokenizer.decode(reply.ids[:n], skip_special_tokens=True):
            return _Reply(reply.prompt, reply.ids[:n], reply.label)
    return reply


def _in_turn(replies: Sequence[_Reply]) -> Iterable[_Reply]:
    while replies:
        yield from replies


def _examples(chat: ChatFormat, replies: Iterable[_Reply]) -> tuple[Example, ...]:
    return tuple(Example(chat.encode(its.prompt) + its.ids, len(its.ids)) for its in replies)
