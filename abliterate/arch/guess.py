"""What the tensors of an unknown model look like.  A guess to start a registry entry from; nothing ever applies it."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product

from abliterate.arch.packed import text_config
from abliterate.arch.registry import families
from abliterate.arch.sizes import config_size
from abliterate.arch.spec import RESIDUAL_AXIS
from abliterate.checkpoint.source import Checkpoint

EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "tok_embeddings", "word_embeddings", "embeddings")
TOWERS = re.compile(r"(^|\.)(vision|visual|audio|vit)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """Tensors whose names differ in numbers only.

    ``role`` is None for what looks like a reader.  ``axes`` is what the role means for the axes on disk.
    """

    pattern: str
    count: int
    shape: tuple[int, ...]
    role: str | None
    axes: str
    evidence: str


def guess(checkpoint: Checkpoint) -> list[Guess]:
    """One guess for each pattern of names, writers first.

    Raises:
        UnknownTensorError: the configuration gives no width.
    """
    width = config_size(text_config(checkpoint.config), "hidden_size|n_embd|d_model|dim", checkpoint.name)
    groups: dict[tuple[str, tuple[int, ...]], int] = {}
    for tensor in checkpoint.tensors.values():
        key = (_pattern(tensor.name), tensor.shape)
        groups[key] = groups.get(key, 0) + 1
    guesses = [_guess(pattern, shape, count, width) for (pattern, shape), count in groups.items()]
    return sorted(guesses, key=lambda one: (one.role is None, one.pattern))


def draft(checkpoint: Checkpoint, guesses: Iterable[Guess]) -> str:
    """A registry entry to start from, as TOML."""
    found = list(guesses)
    writers = [
        f'  {{ name = "{one.pattern}", axes = "{one.axes}", role = "{one.role}" }},' for one in found if one.role
    ]
    readers = [f'  "{one.pattern}",' for one in found if not one.role and not TOWERS.search(one.pattern)]
    towers = sorted({one.pattern.split(".")[0] for one in found if TOWERS.search(one.pattern)})
    lines = [
        f'family = "{checkpoint.model_type}"', f'title = "{checkpoint.model_type}"',
        f'model_types = ["{checkpoint.model_type}"]', 'exactness = "A"  # "B" if a norm stands behind a writer',
        'prefixes = [""]', 'head = "lm_head.weight"', "writer = [", *writers, "]", "", "[sizes]",
        'd_model = "hidden_size"', 'n_layers = "num_hidden_layers"', "", "[readers]", "names = [", *readers, "]",
    ]  # fmt: skip
    return "\n".join([*lines, *([f"towers = {[f'{name}.**' for name in towers]}".replace("'", '"')] if towers else [])])


def _pattern(name: str) -> str:
    parts = re.split(r"\.(\d+)(?=\.)", name)
    kinds = iter(("{layer}", "{expert}", "{n}", "{n}"))
    return "".join(part if place % 2 == 0 else "." + next(kinds, "{n}") for place, part in enumerate(parts))


@cache
def _known_modules() -> tuple[Mapping[str, tuple[str, int]], Mapping[str, int]]:
    """By the last part of a module's name: what it writes as and in how many families, and in how many it reads."""
    writing: dict[str, tuple[str, int]] = {}
    reading: dict[str, int] = {}
    for family in families():
        specs = [spec for spec in family.writer if spec.per_layer and not spec.name.endswith("bias")]
        for module, role in {
            _last(name): spec.role for spec in reversed(specs) for name in _spelled_out(spec.name)
        }.items():
            known, count = writing.get(module, (role, 0))
            writing[module] = (known, count + 1)
        for module in {_last(name) for pattern in family.readers.names for name in _spelled_out(pattern)}:
            reading[module] = reading.get(module, 0) + 1
    return writing, reading


def _spelled_out(pattern: str) -> Iterator[str]:
    """Every name that the alternatives of a pattern stand for."""
    parts = [part.split("|") for part in re.split(r"[{}]", pattern)]
    return ("".join(choice) for choice in product(*parts))


def _last(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias").rsplit(".", 1)[-1]


def _guess(pattern: str, shape: tuple[int, ...], count: int, width: int) -> Guess:
    role, evidence, axis = _look(pattern, shape, width)
    axes = " ".join(RESIDUAL_AXIS if place == axis else f"axis{place}" for place in range(len(shape)))
    return Guess(pattern=pattern, count=count, shape=shape, role=role, axes=axes, evidence=evidence)


def _look(pattern: str, shape: tuple[int, ...], width: int) -> tuple[str | None, str, int | None]:
    """Role, evidence, and residual axis."""
    last = _last(pattern)
    writing, reading = _known_modules()
    places = [place for place, extent in enumerate(shape) if extent == width]
    if TOWERS.search(pattern):
        return None, "an encoder of another kind of input", None
    if not places:
        return None, "no axis has the width of the stream", None
    if "norm" in last or last.startswith("ln_"):
        behind = ": CHECK whether it stands behind a writer (class B)" if "post" in last else ""
        return None, f"a norm{behind}", None
    if last in EMBEDDINGS:
        return "embedding", f"named {last}, last axis is the stream", len(shape) - 1
    if last in writing and writing[last][1] > reading.get(last, 0):
        return _like_a_known_writer(last, shape, places, bias=pattern.endswith(".bias"))
    if last in reading:
        return None, f"{last} reads in {reading[last]} known families", None
    if len(shape) == 1:
        return None, "a vector of the width of the stream: CHECK whether it is added to it", None
    if "embed" in last or "pos" in last or last == "wpe":
        return None, "an embedding of the width of the stream: CHECK whether it is added to it", None
    if places == [len(shape) - 1]:
        return None, "last axis is the stream: looks like a reader ([out, in])", None
    return None, "first axis has the width of the stream: CHECK whether it writes", None


def _like_a_known_writer(last: str, shape: tuple[int, ...], places: list[int], *, bias: bool) -> tuple[str, str, int]:
    role, count = _known_modules()[0][last]
    known = f"{last} writes in {count} known families"
    if bias:
        return f"{role} bias", f"the bias of a writer: {known}", len(shape) - 1
    if len(places) == 1:
        return role, f"{known}; one axis has the width of the stream", places[0]
    return role, f"{known}; SEVERAL axes have that width: read the code", len(shape) - 2
