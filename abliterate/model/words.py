"""How likely a model finds given words in sentences that speak neither for nor against them.

A *carrier* is a sentence with ``{word}`` in it.  Carrier and word are tokenised together, up to the end of the word, as
plain text without a chat template.  Scored are the tokens that cover the word and the space before it, which most
tokenizers make a part of its first token, each given all tokens before it.  What follows the word in the carrier is not
looked at, so longer words that begin with the same tokens count for it.

What was never learnt is told by *made-up words*, which nobody can have learnt: they are scored in the same carriers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from statistics import fmean, stdev
from typing import Any

from abliterate.checkpoint.file_names import at_home
from abliterate.errors import CheckpointError, NonFiniteError, PromptError
from abliterate.events import OnEvent, ignore, working
from abliterate.method.statistics import Z95
from abliterate.model.chat import of_equal_length
from abliterate.model.likelihood import on_continuations
from abliterate.model.load import LoadedModel
from abliterate.model.prompt_rows import prompts_of_rows, rows_of_file

MARK = "{word}"
FEWEST_CARRIERS = 6
"""Of fewer, all may change alike by chance in more than one word of twenty: 2 / 2^n."""
MADE_UP = "made-up:"
FEWEST_MADE_UP = 8
Spelling = list[tuple[list[int], list[int]]]
"""For each carrier, the token ids before the word, and its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WordList:
    """A user's words or phrases, each once, and the carriers they are put into; ``own``: the carriers are theirs."""

    source: str
    words: tuple[str, ...]
    carriers: tuple[str, ...]
    made_up: tuple[str, ...]
    own: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class WordScores:
    """What a model makes of the words of a list.

    Attributes:
        nats: log-probability of each word in each carrier, summed over its tokens; words unknown to the tokenizer have
            none.
        tokens: how many tokens each takes in the first carrier.
        limit: the mean log-probability that 97.5 % of made-up words stay below, by their mean and standard deviation;
            None where the tokenizer can spell too few of them.
        strange: how many carriers hold something that the tokenizer does not know.
    """

    nats: Mapping[str, tuple[float, ...]]
    tokens: Mapping[str, int]
    limit: float | None
    strange: int

    def learnt(self, word: str) -> bool | None:
        """Whether a word gets more than a made-up one does (a phrase: than as many); None where nobody can tell."""
        return None if self.limit is None else fmean(self.nats[word]) > len(word.split()) * self.limit


def load_words(source: str) -> WordList:
    """Words, one on each line of a file; lines with ``{word}`` are carriers, in place of the bundled ones.

    So are lines ``made-up: WORD`` made-up words, for tokenizers that cannot spell the bundled ones.  Other kinds of
    files that hold prompts are read as well.

    Raises:
        PromptError: the file cannot be read, or holds no words, too few carriers or made-up words, or a carrier that is
            none.
    """
    rows = prompts_of_rows(rows_of_file(at_home(source)), source)
    lines = list(dict.fromkeys(line for row in rows if (line := " ".join(row.text.split()))))
    made_up = tuple(word for line in lines if line.startswith(MADE_UP) and (word := line.removeprefix(MADE_UP).strip()))
    words = tuple(line for line in lines if MARK not in line and not line.startswith(MADE_UP))
    if not words:
        raise PromptError(f"{source}: holds no word", f"write one word on each line that has no {MARK} in it")
    own = tuple(line for line in lines if MARK in line)
    for carrier in own:
        if carrier.count(MARK) > 1 or not carrier.partition(MARK)[0].strip():
            raise PromptError(
                f"{source}: {carrier[:60]!r} is no carrier: {MARK} must stand in it once, with text before it",
                f'write it like "The next word on the list is {MARK}."',
            )
    if own and len(own) < FEWEST_CARRIERS:
        raise PromptError(
            f"{source}: holds {len(own)} sentences with {MARK}, from which no interval can be had",
            f"give at least {FEWEST_CARRIERS}, or none: then the bundled ones are taken",
        )
    if made_up and len(made_up) < FEWEST_MADE_UP:
        raise PromptError(
            f"{source}: holds {len(made_up)} made-up words, too few to tell how likely others would be",
            f"give at least {FEWEST_MADE_UP}, or none: then the bundled ones are taken",
        )
    return WordList(
        source=source, words=words, carriers=own or _bundled("carriers"), made_up=made_up or _bundled("made_up"),
        own=bool(own),
    )  # fmt: skip


def score_words(
    loaded: LoadedModel,
    listed: WordList,
    *,
    name: str,
    batch_size: int,
    on_event: OnEvent = ignore,
) -> WordScores:
    """Score every word of a list, and made-up ones, in every carrier; out of core all share a weight pass.

    The figures do not depend on the order of the words.

    Raises:
        PromptError: as for ``spelled``.
        CheckpointError: a token has no row in the embedding.
        NonFiniteError: a figure is NaN or infinite.
    """
    asked = spelled(loaded.tokenizer, listed, name=name)
    every = [pair for pairs in asked.values() for pair in pairs]
    _check_rows(loaded, every, name)
    with working(on_event, f"{name}: likelihood of words", len(every), "sentences") as advance:
        found = on_continuations(loaded, of_equal_length, every, batch_size=batch_size, advance=advance)
    values = iter(value for value, _ in found)
    nats = {word: tuple(next(values) for _ in pairs) for word, pairs in asked.items()}
    _check_finite(nats, name)
    known, unknown = [word for word in listed.words if word in asked], loaded.tokenizer.unk_token_id
    return WordScores(
        nats={word: nats[word] for word in known},
        tokens={word: len(asked[word][0][1]) for word in known},
        limit=_upper([fmean(nats[word]) for word in listed.made_up if word in asked]),
        strange=sum(unknown is not None and unknown in before for before, _ in asked[known[0]]),
    )


def spelled(tokenizer: Any, listed: WordList, *, name: str, context: int | None = None) -> Mapping[str, Spelling]:  # noqa: ANN401
    """The words and made-up words that a tokenizer knows, in alphabetical order: of each, token ids for every carrier.

    ``context`` is how many tokens the model takes.  No model is needed, so this can be asked before one is loaded.

    Raises:
        PromptError: the tokenizer knows none of the words, or a carrier is too long.
    """
    tokenize = _tokenizing(tokenizer)
    prefixes = [carrier.partition(MARK)[0] for carrier in listed.carriers]
    unknown, asked = tokenizer.unk_token_id, dict[str, Spelling]()
    for word in sorted({*listed.words, *listed.made_up}):
        pairs = [tokenize(prefix, word) for prefix in prefixes]
        if not any(unknown in tail for _, tail in pairs):
            asked[word] = pairs
    if not any(word in asked for word in listed.words):
        raise PromptError(
            f"{listed.source}: the tokenizer of {name} knows none of the words", "give words that it has tokens for"
        )
    for pairs in asked.values():
        for before, tail in pairs:
            text, length = tokenizer.decode(before + tail)[:60], len(before) + len(tail)
            if not before or not tail:
                raise PromptError(f"{name}: its tokenizer makes no word after other text of {text!r}", "leave it out")
            if context is not None and length > context:
                raise PromptError(
                    f"{name}: {text!r}… takes {length:,} tokens, and the context holds {context:,}",
                    "shorten the sentence",
                )
    return asked


def _tokenizing(tokenizer: Any) -> Callable[[str, str], tuple[list[int], list[int]]]:  # noqa: ANN401
    """What makes token ids of a prefix and a word: those before the word, with one BOS where there is one, and its."""
    bos = tokenizer.bos_token_id
    begins = [int(bos)] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []

    def tokenize(prefix: str, word: str) -> tuple[list[int], list[int]]:
        if tokenizer.is_fast:
            encoded = tokenizer(prefix + word, add_special_tokens=False, return_offsets_mapping=True)
            ids = encoded["input_ids"]
            ends = [end for _, end in encoded["offset_mapping"]]
            first = next((place for place, end in enumerate(ends) if end > len(prefix.rstrip())), len(ids))
        else:  # it does not say which characters a token covers: the first token that the prefix alone does not have
            ids = tokenizer(prefix + word, add_special_tokens=False)["input_ids"]
            alone = tokenizer(prefix.rstrip(), add_special_tokens=False)["input_ids"]
            first = next((place for place, (a, b) in enumerate(zip(ids, alone, strict=False)) if a != b), len(alone))
        before = [int(token) for token in ids[:first]]
        return ([] if before[:1] == begins else begins) + before, [int(token) for token in ids[first:]]

    return tokenize


def _check_rows(loaded: LoadedModel, pairs: Spelling, name: str) -> None:
    rows = int(loaded.embedding.weight.shape[0])  # type: ignore[union-attr]
    largest = max(max(before + tail) for before, tail in pairs)
    if largest >= rows:
        token = loaded.tokenizer.convert_ids_to_tokens(largest)
        raise CheckpointError(
            f"{name}: token {token!r} has the id {largest}, and the embedding has {rows} rows",
            "tokenizer and weights do not belong together: fetch both again",
        )


def _check_finite(nats: Mapping[str, Sequence[float]], name: str) -> None:
    bad = next((word for word, values in nats.items() if not all(map(math.isfinite, values))), None)
    if bad is not None:
        raise NonFiniteError(
            f"{name}: the log-probability of {bad!r} is NaN or infinite", "try --dtype float32, or check the weights"
        )


def _upper(of_made_up: Sequence[float]) -> float | None:
    """What 97.5 % of such values stay below, were they normally distributed; None of too few."""
    return fmean(of_made_up) + Z95 * stdev(of_made_up) if len(of_made_up) >= FEWEST_MADE_UP else None


def _bundled(name: str) -> tuple[str, ...]:
    """The lines of a bundled list."""
    return tuple((files("abliterate.data") / "words" / f"{name}.txt").read_text("utf-8").splitlines())
