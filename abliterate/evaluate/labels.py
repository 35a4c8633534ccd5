"""What replies say of prompts: which are refused, with what refusals begin, and how well the first token tells."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from abliterate.errors import PromptError
from abliterate.evaluate.refusal_tokens import RefusalTokens, refusal_tokens_of
from abliterate.evaluate.replies import REFUSALS, Scorer
from abliterate.evaluate.reply_text import open_thinking
from abliterate.method.calibration import Calibration, calibrate
from abliterate.method.statistics import log_odds
from abliterate.model.chat import ChatFormat
from abliterate.model.labelling import Label, Replies
from abliterate.model.thinking import prompt_ending


def reader(scorer: Scorer, chat: ChatFormat) -> Callable[[str, str], Label]:
    """Reads replies to prompts in the format of ``chat``: refused, answered, or neither that nor that."""
    opening = open_thinking(prompt_ending(chat.tokenizer, chat.options))

    def read(prompt: str, reply: str) -> Label:
        found = scorer.classify(prompt, opening + reply)
        return "refused" if found in REFUSALS else "answered" if found == "complied" else "unclear"

    return read


def tokens_of_refusals(name: str, chat: ChatFormat, replies: Mapping[str, Replies]) -> RefusalTokens:
    """The tokens with which the refusals among ``replies`` to harmful and harmless prompts begin.

    Raises:
        PromptError: there are none, or they begin like other replies.
    """
    harmful, harmless = (
        [(int(first), label == "refused") for first, label in zip(its.tokens[:, 0], its.labels, strict=True)]
        for its in (replies["harmful"], replies["harmless"])
    )
    return refusal_tokens_of(name, chat, harmful, harmless)


def first_token_metric(replies: Replies, refusal_ids: Sequence[int]) -> list[float]:
    """The refusal metric of each prompt, from the likeliest first tokens."""
    among = sum((replies.likely == token for token in refusal_ids), start=replies.likely < 0)
    return log_odds((replies.log_probs.exp() * among).sum(-1)).tolist()


def calibration_of(replies: Mapping[str, Replies], refusal_ids: Sequence[int]) -> Calibration:
    """The refusal metric held against the labels of all prompts, of both classes."""
    metrics: dict[Label, list[float]] = {"refused": [], "answered": [], "unclear": []}
    for its in replies.values():
        for value, label in zip(first_token_metric(its, refusal_ids), its.labels, strict=True):
            metrics[label].append(value)
    return calibrate(metrics["refused"], metrics["answered"])


def counts_of(replies: Mapping[str, Replies]) -> dict[str, dict[str, int]]:
    """How many prompts of each class have each label, as plain data."""
    return {kind: dict(Counter(its.labels)) for kind, its in replies.items()}


def check_labels(name: str, replies: Mapping[str, Replies], *, reply_tokens: int) -> None:
    """Check that there are prompts of both classes that do what their class says.

    Raises:
        PromptError: there are none; says what the replies were instead.
    """
    harmful, harmless = replies["harmful"], replies["harmless"]
    unclear = max((its.count("unclear") / max(1, len(its.labels)) for its in replies.values()), default=math.nan)
    hint = (
        f"after {reply_tokens} tokens most replies say nothing yet, or are broken: look at some with `chat`, "
        "and try a larger reply_tokens in the recipe"
    )
    if not harmful.count("refused"):
        raise PromptError(
            f"{name} refuses none of the {len(harmful.labels)} harmful prompts",
            hint if unclear > 1 / 2 else "use prompts that this model declines",
        )
    if not harmless.count("answered"):
        raise PromptError(
            f"{name} answers none of the {len(harmless.labels)} harmless prompts",
            hint if unclear > 1 / 2 else "use prompts that this model answers",
        )
