"""From prompts to token ids: through the tokenizer's own chat template, padded on the left, with one BOS.

Three traps are closed here by assertion, not by hope: right padding (``logits[:, -1]`` would read padding), a second
BOS (template and tokenizer each add one), and positions taken from a per-family table (they are derived from the
template: the tokens that every prompt ends with).
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from abliterate.errors import CheckpointError, PromptError
from abliterate.model.rendering import SHOWN, render

PROBES = ("What is a lake?", "Count to 7", "tell me about Zürich!", "a b c 9", "(why)")
"""User texts that end in different characters; what their renderings share at the end is the template's."""

CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")
"""Keys of ``config.json`` for the number of positions."""

NO_LIMIT = 10**9
"""transformers gives a tokenizer that states no ``model_max_length`` a number of thirty digits."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Left-padded token ids and their mask, with the place of each row in the original list.

    The mask covers more where the ids continue what is in a cache.
    """

    rows: tuple[int, ...]
    input_ids: Int[Tensor, "batch tokens"]
    attention_mask: Int[Tensor, "batch seen"]

    @property
    def position_ids(self) -> Int[Tensor, "batch seen"]:
        """Positions counted from the first real token of each row."""
        return (self.attention_mask.cumsum(-1) - 1).clamp_min(0)


class ChatFormat:
    """A tokenizer's chat template, checked once.

    ``pads`` says that prompts of different lengths may share a batch; see ``forward.padding_is_harmless``.  ``options``
    are variables given to the template; see ``thinking``.  The model has room for ids below ``rows``, those of its
    embedding, and for ``context`` tokens (None: not known).

    Raises:
        PromptError: the tokenizer has no chat template, or rendering it fails.
        CheckpointError: the template's own tokens have no row in the embedding, or the tokenizer drops all text.
    """

    def __init__(
        self,
        tokenizer: Any,  # noqa: ANN401
        *,
        system: str | None = None,
        name: str = "the model",
        options: Mapping[str, Any] = MappingProxyType({}),
        rows: int | None = None,
        context: int | None = None,
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise PromptError(
                f"{name}: its tokenizer has no chat template",
                "use the chat (instruct) version of this model, or put a chat_template.jinja into its folder",
            )
        self.tokenizer = tokenizer
        self.system = system
        self.name = name
        self.options = dict(options)
        self.rows = rows
        self.context = context
        self.pads = True
        self.suffix = self._common_suffix()

    @property
    def positions(self) -> tuple[int, ...]:
        """The post-instruction positions, as negative offsets: every template token after the user's text."""
        return tuple(range(-len(self.suffix), 0))

    @property
    def position_tokens(self) -> tuple[str, ...]:
        """The token at each position, readable."""
        return tuple(self.tokenizer.convert_ids_to_tokens(list(self.suffix)))

    @property
    def template_sha256(self) -> str:
        """SHA-256 of the template's text."""
        return hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()

    @property
    def pad_id(self) -> int:
        """The padding token, or the end-of-text token where there is none, or no row of the embedding is its."""
        for candidate in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if candidate is not None and (self.rows is None or candidate < self.rows):
                return int(candidate)
        return 0

    def encode(self, prompt: str) -> list[int]:
        """Token ids of one user turn, up to where the assistant begins.

        Raises:
            PromptError: the template fails or alters what it is given (``rendering``), the BOS is not single, or the
                prompt is longer than the context.
            CheckpointError: a token has no row in the embedding.
        """
        return self.encode_messages(self._asking(prompt))

    def encode_messages(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant begins.

        Raises:
            PromptError, CheckpointError: as for ``encode``.
        """
        ids = self._ids(messages)
        if self.context is not None and len(ids) > self.context:
            raise PromptError(
                f"{self.name}: a prompt takes {len(ids):,} tokens, and the context holds {self.context:,}: "
                f"{messages[-1]['content'][:SHOWN]!r}…",
                "shorten it, or leave it out",
            )
        return ids

    def length(self, prompt: str) -> int:
        """Tokens of one user turn with all of the template, however many the model has room for."""
        return len(self._ids(self._asking(prompt)))

    def _asking(self, prompt: str) -> list[dict[str, str]]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": prompt}]

    def _ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        given, _ = render(self.tokenizer, messages, self.options, name=self.name)
        try:
            rendered = self.tokenizer.apply_chat_template(
                given, tokenize=True, add_generation_prompt=True, return_dict=True, **self.options
            )
        except Exception as error:  # the library behind it raises nothing more special
            raise PromptError(
                f"{self.name}: its tokenizer fails ({error}) on {messages[-1]['content'][:SHOWN]!r}",
                "mend its tokenizer.json, or leave such prompts out",
            ) from error
        ids = [int(token) for token in rendered["input_ids"]]
        self._check_bos(ids)
        self._check_rows(ids)
        return ids

    def text(self, tokens: Sequence[int] | Tensor) -> str:
        """A reply as text, special tokens removed."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def batches(self, prompts: Sequence[str], batch_size: int, most_tokens: int | None = None) -> Iterator[Batch]:
        """Encode ``prompts`` and pad them on the left, in batches of similar length, as ``pack`` does."""
        yield from self.pack([self.encode(prompt) for prompt in prompts], batch_size, most_tokens)

    def pack(self, encoded: Sequence[list[int]], batch_size: int, most_tokens: int | None = None) -> Iterator[Batch]:
        """Batches of token ids: padded on the left or, for a model that sees the padding, of equal length.

        A batch has ``batch_size`` rows at most, and ``most_tokens`` with its padding, but for a row that has more.
        """
        if self.pads:
            yield from left_padded(encoded, batch_size, self.pad_id, most_tokens)
        else:
            yield from of_equal_length(encoded, batch_size, most_tokens)

    def _check_bos(self, ids: list[int]) -> None:
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return
        leading = 0
        while leading < len(ids) and ids[leading] == bos:
            leading += 1
        if leading > 1:
            raise PromptError(
                f"{self.name}: its chat template gives {leading} BOS tokens",
                "a model must see exactly one: mend the template in tokenizer_config.json",
            )

    def _check_rows(self, ids: list[int]) -> None:
        strange = [token for token in ids if self.rows is not None and token >= self.rows]
        if strange:
            token = self.tokenizer.convert_ids_to_tokens(strange[0])
            raise CheckpointError(
                f"{self.name}: token {token!r} has the id {strange[0]}, and the embedding has {self.rows} rows",
                "tokenizer and weights do not belong together: fetch both again, or resize the embedding and train it",
            )

    def _common_suffix(self) -> tuple[int, ...]:
        encoded = [self.encode(probe) for probe in PROBES]
        if len(set(map(tuple, encoded))) == 1:
            raise CheckpointError(
                f"{self.name}: its tokenizer makes the same of every prompt, {len(encoded[0])} tokens",
                "its files are damaged, or those of another model: fetch them again",
            )
        shared = 0
        while all(len(ids) > shared for ids in encoded) and len({ids[-1 - shared] for ids in encoded}) == 1:
            shared += 1
        if shared == 0:
            raise PromptError(
                f"{self.name}: its chat template adds nothing after the user's text",
                "such a template has no post-instruction position: use the chat version of this model",
            )
        return tuple(encoded[0][-shared:])


def context_of(config: Mapping[str, Any], tokenizer: Any) -> int | None:  # noqa: ANN401 - a tokenizer of transformers
    """How many tokens a model takes, by the ``config`` of its decoder and its tokenizer; None where neither says."""
    stated = [*(config.get(name) for name in CONTEXT), getattr(tokenizer, "model_max_length", None)]
    return min((size for size in stated if isinstance(size, int) and 0 < size < NO_LIMIT), default=None)


def of_equal_length(encoded: Sequence[list[int]], batch_size: int, most_tokens: int | None = None) -> Iterator[Batch]:
    """Batches of token ids without padding: the rows of a batch have the same length."""
    for length in sorted({len(ids) for ids in encoded}):
        rows = [row for row, ids in enumerate(encoded) if len(ids) == length]
        for batch in left_padded([encoded[row] for row in rows], batch_size, 0, most_tokens):
            yield replace(batch, rows=tuple(rows[place] for place in batch.rows))


def _cut(encoded: Sequence[list[int]], batch_size: int, most_tokens: int | None) -> Iterator[list[int]]:
    """The rows of each batch, the shortest first."""
    rows: list[int] = []
    for row in sorted(range(len(encoded)), key=lambda row: (len(encoded[row]), row)):
        too_many = most_tokens is not None and (len(rows) + 1) * len(encoded[row]) > most_tokens
        if rows and (len(rows) == batch_size or too_many):
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


def left_padded(
    encoded: Sequence[list[int]], batch_size: int, pad_id: int, most_tokens: int | None = None
) -> Iterator[Batch]:
    """Batches of token ids, sorted by length so that little is padding, padded on the left."""
    for rows in _cut(encoded, batch_size, most_tokens):
        width = max(len(encoded[row]) for row in rows)
        ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for place, row in enumerate(rows):
            ids[place, width - len(encoded[row]) :] = torch.tensor(encoded[row])
            mask[place, width - len(encoded[row]) :] = 1
        if not bool(mask[:, -1].all()):
            raise AssertionError("a row ends in padding: positions counted from the end would be wrong")
        yield Batch(rows=tuple(rows), input_ids=ids, attention_mask=mask)
