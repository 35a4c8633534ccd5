"""Replies that a model learns to give to harmful prompts: from a file, or extended refusals put together here."""

import random
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from abliterate.checkpoint.file_names import at_home
from abliterate.errors import PromptError
from abliterate.model.chat import ChatFormat
from abliterate.model.load import LoadedModel
from abliterate.model.prompt_rows import Prompt, prompts_of_rows, rows_of_file
from abliterate.model.replying import ends_of
from abliterate.model.targets import Example

REPLY = "reply"
FEWEST = 8
"""Pairs of prompt and reply that are too few to train on, but for one more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A prompt, and what shall be replied to it."""

    prompt: str
    reply: str


def pairs_of_file(path: Path) -> tuple[Pair, ...]:
    """The rows of a file of prompts (``prompt_rows``) that have a ``reply`` beside the prompt.

    Raises:
        PromptError: the file cannot be read, a row has no prompt or no reply, or there are too few.
    """
    rows, source = rows_of_file(at_home(path)), str(path)
    found = []
    for number, (row, prompt) in enumerate(zip(rows, prompts_of_rows(rows, source), strict=True), start=1):
        reply = row.get(REPLY) if isinstance(row, Mapping) else None
        if not isinstance(reply, str) or not reply.strip() or not prompt.text.strip():
            raise PromptError(
                f"{source}: row {number} has no prompt and reply", 'give each row as {"prompt": ..., "reply": ...}'
            )
        found.append(Pair(prompt=prompt.text, reply=reply.strip()))
    unique = tuple({one.prompt: one for one in found}.values())
    check_enough(len(unique), f"pairs of prompt and reply in {source}")
    return unique


def check_enough(count: int, what: str) -> None:
    """Check that there are enough examples to learn from.

    Raises:
        PromptError: there are fewer than ``FEWEST``.
    """
    if count < FEWEST:
        raise PromptError(
            f"{count} {what}: too few to train on", f"give at least {FEWEST}, better a hundred, of many kinds"
        )


def extended(prompt: Prompt, generator: random.Random) -> Pair:
    """An extended refusal of ``prompt`` (arXiv 2505.19056): what it is about, a refusal, and a reason.

    General texts, which say nothing of how anything is done: ``extended_refusals.toml``.
    """
    texts = _texts()
    explanation = texts["topics"].get(prompt.category) or generator.choice(texts["general"])
    parts = (explanation, generator.choice(texts["refusals"]), generator.choice(texts["reasons"]))
    return Pair(prompt=prompt.text, reply=" ".join(parts))


def example_of(loaded: LoadedModel, chat: ChatFormat, pair: Pair) -> Example:
    """``pair`` as token ids, with the token that ends a reply.

    Raises:
        PromptError: the model has no token for some of the reply.
    """
    tokenizer = loaded.tokenizer
    ids = [int(token) for token in tokenizer(pair.reply, add_special_tokens=False)["input_ids"]]
    if not ids or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids):
        raise PromptError(
            f"{loaded.name}: its tokenizer has no tokens for some words of {pair.reply[:60]!r}",
            "give replies in words of the model: --refusals FILE",
        )
    ids += sorted(ends_of(loaded))[:1]
    return Example(chat.encode(pair.prompt) + ids, len(ids))


@cache
def _texts() -> dict:
    return tomllib.loads((files("abliterate.data") / "extended_refusals.toml").read_text("utf-8"))
