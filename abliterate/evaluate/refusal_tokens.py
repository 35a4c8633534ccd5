"""The refusal tokens of a model: the tokens its refusals begin with, found by letting it refuse.

Published tables hold one or two token ids per family ("I", "As").  Here they come from the model itself, so a new
family, language or tokenizer needs no entry.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from abliterate.errors import PromptError, UsageError
from abliterate.evaluate.replies import is_refusal
from abliterate.events import Advanced, Finished, OnEvent, Started, ignore
from abliterate.model.chat import ChatFormat
from abliterate.model.forward import each_batch
from abliterate.model.load import LoadedModel
from abliterate.model.replying import generate_ids

PROBE_PROMPTS = 64
PROBE_TOKENS = 24
MIN_SHARE = 0.05
"""A first token counts when it begins this share of the refusals."""
Reply = tuple[int, bool]
"""The first token of a reply, and whether it refuses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusalTokens:
    """Token ids that refusals begin with, and how they were found.

    ``refused_share`` is the share of probed harmful prompts whose reply is a refusal; NaN when the ids were given.
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    refused_share: float

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "RefusalTokens":
        """From plain data."""
        return cls(
            ids=tuple(document["ids"]), texts=tuple(document["texts"]), refused_share=float(document["refused_share"])
        )


def given_refusal_tokens(chat: ChatFormat, words: Sequence[str]) -> RefusalTokens:
    """The first token of each of ``words``, or the ids themselves where they are numbers.

    Raises:
        UsageError: a word has no token.
    """
    ids = []
    for word in words:
        if word.isdigit():
            ids.append(int(word))
            continue
        tokens = chat.tokenizer(word, add_special_tokens=False)["input_ids"]
        if not tokens:
            raise UsageError(f"refusal token {word!r} is empty", "give words such as 'I', or token ids")
        ids.append(int(tokens[0]))
    return RefusalTokens(ids=tuple(ids), texts=_texts(chat, ids), refused_share=float("nan"))


def find_refusal_tokens(
    loaded: LoadedModel,
    chat: ChatFormat,
    harmful: Sequence[str],
    harmless: Sequence[str],
    *,
    batch_size: int,
    on_event: OnEvent = ignore,
) -> RefusalTokens:
    """Derive the refusal tokens: first tokens of refusals that begin other replies less often.

    Raises:
        PromptError: the model refuses nothing, or its refusals begin like its other replies.
    """
    task = "find refusal tokens"
    harmful, harmless = harmful[:PROBE_PROMPTS], harmless[:PROBE_PROMPTS]
    prompts = [*harmful, *harmless]
    on_event(Started(task=task, total=len(prompts), unit="prompts"))
    refused: list[Reply | None] = [None] * len(prompts)
    replies = each_batch(
        loaded,
        chat.batches(prompts, batch_size),
        lambda batch, _: generate_ids(loaded, chat, batch, PROBE_TOKENS),
        new_tokens=PROBE_TOKENS,
    )
    for batch, tokens in replies:
        for row, ids in zip(batch.rows, tokens.tolist(), strict=True):
            reply = str(chat.tokenizer.decode(ids, skip_special_tokens=True))
            refused[row] = (ids[0], is_refusal(prompts[row], reply))
        on_event(Advanced(task=task, amount=len(batch.rows)))
    on_event(Finished(task=task))
    found = [reply for reply in refused if reply is not None]
    return refusal_tokens_of(loaded.name, chat, found[: len(harmful)], found[len(harmful) :])


def refusal_tokens_of(
    name: str, chat: ChatFormat, harmful: Sequence[Reply], harmless: Sequence[Reply]
) -> RefusalTokens:
    """The first tokens of refusals that begin other replies less often, in replies to prompts of both classes.

    Raises:
        PromptError: no harmful prompt was refused, or refusals begin like other replies.
    """
    refusing: Counter[int] = Counter()
    complying: Counter[int] = Counter()
    for first, refused in (*harmful, *harmless):
        (refusing if refused else complying)[first] += 1
    refused_harmful = sum(refused for _, refused in harmful)
    if not refused_harmful:
        raise PromptError(
            f"{name} refuses none of the {len(harmful)} harmful prompts tried",
            "there is no refusal to find: use prompts that this model declines, or name its --refusal-token",
        )
    total, other = sum(refusing.values()), sum(complying.values())
    kept = [
        token
        for token, count in refusing.most_common()
        if count / total >= MIN_SHARE and count / total > complying[token] / max(1, other)
    ]
    if not kept:
        raise PromptError(
            f"{name}: refusals and other replies begin with the same token",
            "name the tokens that only refusals begin with: --refusal-token",
        )
    return RefusalTokens(ids=tuple(kept), texts=_texts(chat, kept), refused_share=refused_harmful / len(harmful))


def _texts(chat: ChatFormat, ids: Sequence[int]) -> tuple[str, ...]:
    return tuple(str(text) for text in chat.tokenizer.convert_ids_to_tokens(list(ids)))
