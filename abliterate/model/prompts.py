"""Prompt sets: bundled ones, files, and data sets on the Hub.

A source is written as

- ``bundled:NAME`` - a set that ships with the package,
- a path to a ``.txt`` (one prompt per line), ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file,
- ``hf:OWNER/NAME[:COLUMN][@SPLIT]`` - a data set on the Hub (needs the ``datasets`` extra).
"""

import csv
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.errors import PromptError

COLUMNS = ("prompt", "instruction", "goal", "Goal", "question", "text", "behavior", "Behavior")
"""Names under which prompts are looked for in tables, in this order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One request.  ``answer`` is the fact a right reply holds, where one is known; ``held_out`` marks prompts of a
    kind that the model's refusal training did not see."""

    text: str
    answer: str | None = None
    held_out: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """Some prompts and where they came from."""

    source: str
    prompts: tuple[Prompt, ...]

    @property
    def texts(self) -> list[str]:
        """The requests alone."""
        return [prompt.text for prompt in self.prompts]

    @property
    def sha256(self) -> str:
        """Hash of the texts, in order."""
        return hashlib.sha256(json.dumps(self.texts, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastSet:
    """Harmful and harmless prompts, split three ways without overlap."""

    harmful_train: PromptSet
    harmless_train: PromptSet
    harmful_val: PromptSet
    harmless_val: PromptSet
    harmful_test: PromptSet
    harmless_test: PromptSet

    def hashes(self) -> dict[str, dict[str, Any]]:
        """Source, size and hash of each part, for the manifest."""
        parts = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            name: {"source": part.source, "count": len(part.prompts), "sha256": part.sha256}
            for name, part in parts.items()
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSizes:
    """How many prompts of each class go where; the paper's numbers."""

    train: int = 128
    val: int = 32
    test: int = 100


def contrast_set(harmful: str, harmless: str, *, sizes: SplitSizes, seed: int = 42) -> ContrastSet:
    """Load two sources and split each into train, validation and test.

    A bundled source comes with its own splits.  Others are shuffled with ``seed`` and cut to ``sizes``; when a source
    is too small for them, in the same proportions.

    Raises:
        PromptError: a source is missing, empty, too small, or shares prompts with the other one.
    """
    parts = {}
    for kind, source in (("harmful", harmful), ("harmless", harmless)):
        if source.startswith("bundled:"):
            for split in ("train", "val", "test"):
                part = load_bundled(source.removeprefix("bundled:"), kind, split)
                parts[f"{kind}_{split}"] = _cut(part, getattr(sizes, split))
        else:
            for split, part in split_three_ways(load_prompts(source), sizes, seed).items():
                parts[f"{kind}_{split}"] = part
    shared = {p for s in ("train", "val", "test") for p in parts[f"harmful_{s}"].texts} & {
        p for s in ("train", "val", "test") for p in parts[f"harmless_{s}"].texts
    }
    if shared:
        raise PromptError(
            f"{len(shared)} prompts are in both sets, for example {min(shared)[:60]!r}",
            "harmful and harmless prompts must differ",
        )
    return ContrastSet(**parts)


def load_prompts(source: str) -> PromptSet:
    """Load every prompt of ``source``, without exact duplicates.

    Raises:
        PromptError: the source cannot be read, or holds no prompt.
    """
    prompts = _from_hub(source) if source.startswith("hf:") else _from_file(Path(source).expanduser())
    unique = list({prompt.text: prompt for prompt in prompts if prompt.text.strip()}.values())
    if not unique:
        raise PromptError(f"{source}: holds no prompt", "give one prompt per line, or a table with a 'prompt' column")
    return PromptSet(source=source, prompts=tuple(unique))


def load_bundled(name: str, kind: str, split: str) -> PromptSet:
    """One part of a prompt set that ships with the package.

    Raises:
        PromptError: there is no such set.
    """
    folder = bundled_sets().get(name)
    if folder is None:
        raise PromptError(f"bundled:{name}: no such prompt set", f"there are: {', '.join(sorted(bundled_sets()))}")
    loaded = load_prompts(str(folder / f"{kind}.{split}.jsonl"))
    return PromptSet(source=f"bundled:{name}/{kind}.{split}", prompts=loaded.prompts)


def bundled_sets() -> Mapping[str, Path]:
    """The prompt sets that ship with the package, by name."""
    from abliterate.tiny_chat import prompts_path

    return {"tiny-chat": prompts_path()}


def split_three_ways(prompts: PromptSet, sizes: SplitSizes, seed: int) -> dict[str, PromptSet]:
    """Shuffle and cut into train, val and test.

    Raises:
        PromptError: fewer than six prompts.
    """
    order = list(prompts.prompts)
    random.Random(seed).shuffle(order)
    wanted = sizes.train + sizes.val + sizes.test
    scale = min(1.0, len(order) / wanted)
    if len(order) < 6:
        raise PromptError(f"{prompts.source}: holds {len(order)} prompts", "give at least 6; 260 or more are good")
    n_val = max(1, min(int(sizes.val * scale), len(order) - 2))
    n_test = max(1, min(int(sizes.test * scale), len(order) - n_val - 1))
    n_train = min(sizes.train, len(order) - n_val - n_test)
    cuts = {
        "train": (0, n_train),
        "val": (n_train, n_train + n_val),
        "test": (n_train + n_val, n_train + n_val + n_test),
    }
    return {
        split: PromptSet(source=f"{prompts.source}#{split}", prompts=tuple(order[first:last]))
        for split, (first, last) in cuts.items()
    }


def _cut(prompts: PromptSet, size: int) -> PromptSet:
    return PromptSet(source=prompts.source, prompts=prompts.prompts[:size])


def _from_file(path: Path) -> list[Prompt]:
    if not path.is_file():
        raise PromptError(f"{path}: no such prompt file", "give a file, bundled:NAME, or hf:OWNER/NAME")
    readers = {".txt": _lines, ".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise PromptError(f"{path}: unknown kind of prompt file", f"use one of {', '.join(readers)}")
    try:
        return reader(path)
    except (OSError, ValueError, UnicodeError, csv.Error) as error:
        raise PromptError(f"{path}: cannot be read ({error})", "check the file's format") from error


ENCODING = "utf-8-sig"
"""UTF-8, without the byte order mark that spreadsheets and some editors put first."""


def _lines(path: Path) -> list[Prompt]:
    return [Prompt(text=line.strip()) for line in _text_lines(path)]


def _json_lines(path: Path) -> list[Prompt]:
    return [_row(json.loads(line), str(path)) for line in _text_lines(path)]


def _text_lines(path: Path) -> list[str]:
    """Lines that hold something; ``str.splitlines`` would also cut at characters that JSON allows inside a string."""
    return [line for line in path.read_text(ENCODING).split("\n") if line.strip()]


def _json(path: Path) -> list[Prompt]:
    document = json.loads(path.read_text(ENCODING))
    if not isinstance(document, list):
        raise PromptError(f"{path}: must hold a JSON list", "use a list of strings or of objects with a 'prompt'")
    return [_row(row, str(path)) for row in document]


def _csv(path: Path) -> list[Prompt]:
    with path.open(encoding=ENCODING, newline="") as file:
        return [_row(row, str(path)) for row in csv.DictReader(file)]


def _parquet(path: Path) -> list[Prompt]:
    try:
        from pyarrow import parquet  # type: ignore[import-not-found]
    except ImportError as error:
        raise PromptError(f"{path}: reading Parquet needs pyarrow", "pip install 'abliterate[datasets]'") from error
    return [_row(row, str(path)) for row in parquet.read_table(path).to_pylist()]


def _from_hub(source: str) -> list[Prompt]:
    name, _, split = source.removeprefix("hf:").partition("@")
    name, _, column = name.partition(":")
    try:
        from datasets import load_dataset  # type: ignore[import-not-found]
    except ImportError as error:
        raise PromptError(
            f"{source}: data sets from the Hub need an extra", "pip install 'abliterate[datasets]'"
        ) from error
    from abliterate.checkpoint.hub import plain_errors

    with plain_errors(name):
        rows = load_dataset(name, split=split or "train")
    return [_row(row, source, column or None) for row in rows]


def _row(row: Any, source: str, column: str | None = None) -> Prompt:  # noqa: ANN401 - parsed data
    if isinstance(row, str):
        return Prompt(text=row)
    if not isinstance(row, Mapping):
        raise PromptError(f"{source}: a row is neither text nor an object", "give strings or objects with a 'prompt'")
    names: Sequence[str] = (column,) if column else COLUMNS
    for name in names:
        if isinstance(row.get(name), str):
            answer = row.get("answer")
            held_out = str(row.get("held_out")).lower() in ("true", "1")  # text in a CSV file
            return Prompt(text=row[name], answer=None if answer is None else str(answer), held_out=held_out)
    raise PromptError(f"{source}: a row has none of the columns {', '.join(names)}", "name the prompt column 'prompt'")
