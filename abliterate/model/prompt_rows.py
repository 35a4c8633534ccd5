"""Rows of prompts, from files and from data sets on the Hub, and what is a prompt in them."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from abliterate.errors import PromptError

COLUMNS = ("prompt", "instruction", "goal", "Goal", "question", "text", "behavior", "Behavior")
"""Names under which prompts are looked for in tables, in this order."""

CATEGORY_COLUMNS = ("category", "Category")
"""Names under which the category of a prompt is looked for."""

ENCODING = "utf-8-sig"
"""UTF-8, without the byte order mark that spreadsheets and some editors put first."""

Row = str | Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One request.

    ``answer`` is the fact that a right reply holds, where one is known.  ``held_out`` marks prompts of a kind that the
    model's refusal training did not see.  ``category`` is what kind of request it is; empty where nobody says.
    """

    text: str
    answer: str | None = None
    held_out: bool = False
    category: str = ""


def rows_of_file(path: Path) -> list[Row]:
    """The rows of a ``.txt`` (one prompt per line), ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file.

    Raises:
        PromptError: there is no such file, it is of another kind, or it cannot be read.
    """
    if not path.is_file():
        raise PromptError(f"{path}: no such prompt file", "give a file, bundled:NAME, set:NAME, or hf:OWNER/NAME")
    readers = {".txt": _lines, ".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise PromptError(f"{path}: unknown kind of prompt file", f"use one of {', '.join(readers)}")
    try:
        rows = reader(path)
    except (OSError, ValueError, UnicodeError, csv.Error) as error:
        raise PromptError(f"{path}: cannot be read ({error})", "check the file's format") from error
    return _checked(rows, str(path))


def rows_of_hub(repo: str, *, split: str, source: str, config: str | None = None) -> list[Row]:
    """The rows of one split of a data set on the Hub, through the ``datasets`` package.

    Raises:
        PromptError: ``datasets`` is not installed, or the set has no such configuration or split.
        HubError: the Hub does not give it out.
    """
    try:
        from datasets import load_dataset  # type: ignore[import-not-found]
    except ImportError as error:
        raise PromptError(
            f"{source}: data sets from the Hub need an extra", "pip install 'abliterate[datasets]'"
        ) from error
    from abliterate.checkpoint.hub import plain_errors

    with plain_errors(repo):
        try:
            rows = list(load_dataset(repo, config, split=split))
        except ValueError as error:
            raise PromptError(
                f"{source}: {str(error).splitlines()[0]}", "name a split, and a configuration where there are several"
            ) from error
    return _checked(rows, source)


def prompt_of(row: Row, source: str, column: str | None = None) -> Prompt:
    """The prompt in ``row``: the text itself, or what stands in ``column`` (None: in the first of ``COLUMNS``).

    A column that holds a list of turns gives its first one.

    Raises:
        PromptError: the row has no such column.
    """
    if isinstance(row, str):
        return Prompt(text=row)
    names: Sequence[str] = (column,) if column else COLUMNS
    for name in names:
        text = row.get(name)
        if isinstance(text, list) and text:
            text = text[0]
        if isinstance(text, str):
            answer = row.get("answer")
            held_out = str(row.get("held_out")).lower() in ("true", "1")  # text in a CSV file
            category = next((str(row[its]).strip() for its in CATEGORY_COLUMNS if row.get(its) is not None), "")
            return Prompt(
                text=text, answer=None if answer is None else str(answer), held_out=held_out, category=category
            )
    raise PromptError(f"{source}: a row has none of the columns {', '.join(names)}", "name the prompt column 'prompt'")


def _checked(rows: Iterable[object], source: str) -> list[Row]:
    checked: list[Row] = []
    for row in rows:
        if not isinstance(row, str | Mapping):
            raise PromptError(
                f"{source}: a row is neither text nor an object", "give strings or objects with a 'prompt'"
            )
        checked.append(row)
    return checked


def _lines(path: Path) -> list[object]:
    return [line.strip() for line in _text_lines(path)]


def _json_lines(path: Path) -> list[object]:
    return [json.loads(line) for line in _text_lines(path)]


def _text_lines(path: Path) -> list[str]:
    """Lines that hold something; ``str.splitlines`` would also cut at characters that JSON allows inside a string."""
    return [line for line in path.read_text(ENCODING).split("\n") if line.strip()]


def _json(path: Path) -> list[object]:
    document = json.loads(path.read_text(ENCODING))
    if not isinstance(document, list):
        raise PromptError(f"{path}: must hold a JSON list", "use a list of strings or of objects with a 'prompt'")
    return document


def _csv(path: Path) -> list[object]:
    with path.open(encoding=ENCODING, newline="") as file:
        return list(csv.DictReader(file))


def _parquet(path: Path) -> list[object]:
    try:
        from pyarrow import parquet  # type: ignore[import-not-found]
    except ImportError as error:
        raise PromptError(f"{path}: reading Parquet needs pyarrow", "pip install 'abliterate[datasets]'") from error
    return parquet.read_table(path).to_pylist()
