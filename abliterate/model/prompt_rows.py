"""Rows of prompts, from files and from data sets on the Hub, and what is a prompt in them."""

import codecs
import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from abliterate.checkpoint.amounts import size
from abliterate.errors import PromptError

COLUMNS = ("prompt", "instruction", "goal", "question", "text", "behavior", "messages", "conversations")
"""Names under which prompts are looked for in tables, in this order, whatever their case."""

CATEGORY = "category"
"""The name under which the category of a prompt is looked for, whatever its case."""

LISTS = ("prompts", "data", "rows", "examples", "instructions")
"""Names under which a JSON object may hold the list of its prompts."""

MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
         codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip
"""Byte order marks and what they begin; longer ones first.  UTF-8 may have one as well."""

DELIMITERS = ",;\t"
"""Of these a table has the one that is most frequent in its first line."""

GZIP = ".gz"
MOST_UNPACKED = 2**28
"""Bytes that a packed file may come to: a megabyte of them can hold a gigabyte of nothing."""

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
    """The rows of a ``.txt`` (one prompt per line), ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file.

    All but Parquet may be compressed (``.gz``).  Text is UTF-8, or what its byte order mark says.

    Raises:
        PromptError: there is no such file, it is of another kind, or it cannot be read.
    """
    if os.path.isdir(path):  # noqa: PTH112 - of pathlib, it raises where the text is no path at all
        raise PromptError(f"{path}: is a folder", f"give one of its files, as {_first_of(path)}")
    if not os.path.isfile(path):  # noqa: PTH113
        raise PromptError(f"{path}: no such prompt file", "give a file, bundled:NAME, set:NAME, or hf:OWNER/NAME")
    readers = {
        ".txt": _lines, ".jsonl": _json_lines, ".json": _json, ".csv": _table, ".tsv": _table, ".parquet": _parquet,
    }  # fmt: skip
    kinds = [suffix.lower() for suffix in path.suffixes if suffix.lower() != GZIP]
    reader = readers.get(kinds[-1] if kinds else "")
    if reader is None:
        raise PromptError(f"{path}: unknown kind of prompt file", f"use one of {', '.join(readers)}")
    try:
        rows = reader(path)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise PromptError(f"{path}: line {line} is not {error.encoding}", "save the file as UTF-8") from error
    except (OSError, EOFError, ValueError, UnicodeError, RecursionError, csv.Error, zlib.error) as error:
        raise PromptError(f"{path}: cannot be read ({error})", "check the file's format") from error
    return _checked(rows, str(path))


def _first_of(folder: Path) -> str:
    return next((str(path) for path in sorted(folder.rglob("*")) if path.is_file()), "prompts.txt")


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


def prompts_of_rows(rows: Iterable[Row], source: str, column: str | None = None) -> list[Prompt]:
    """The prompt of each row: the text itself, or what stands in ``column`` (None: in the first of ``COLUMNS``).

    A column that holds a list gives its first text, or its first turn of a user.

    Raises:
        PromptError: a row has no such column; says which row, and what columns there are.  Or it holds half a
            character, as text that was cut in the middle of an emoji does, which no tokenizer takes.
    """
    names: Sequence[str] = (column,) if column else COLUMNS
    prompts = [_prompt_of(row, number, source, names) for number, row in enumerate(rows, start=1)]
    for number, prompt in enumerate(prompts, start=1):
        try:
            f"{prompt.text}{prompt.answer}{prompt.category}".encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"{source}: row {number} holds half a character ({error.object[error.start]!r})", "mend that row"
            ) from error
    return prompts


def _prompt_of(row: Row, number: int, source: str, names: Sequence[str]) -> Prompt:
    if isinstance(row, str):
        return Prompt(text=row)
    by_name = {str(name).strip().casefold(): value for name, value in row.items()}
    for name in names:
        text = _text_in(row.get(name, by_name.get(name.casefold())))
        if text is not None:
            answer = row.get("answer")
            held_out = str(row.get("held_out")).lower() in ("true", "1")  # text in a CSV file
            category = by_name.get(CATEGORY)
            return Prompt(
                text=text,
                answer=None if answer is None else str(answer),
                held_out=held_out,
                category="" if category is None else str(category).strip(),
            )
    seen = ", ".join(repr(str(name)[:40]) for name in list(row)[:12])
    raise PromptError(
        f"{source}: row {number} has a text in none of the columns {', '.join(names)}; "
        f"its columns are {seen or 'none'}",
        "name the prompt column 'prompt'",
    )


def _text_in(value: object) -> str | None:
    """A text, the first of several, or the first turn of a user in a conversation."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        return None
    if isinstance(value[0], str):
        return value[0]
    turns = (turn for turn in value if isinstance(turn, Mapping))
    asked = (turn for turn in turns if turn.get("role", turn.get("from")) in ("user", "human"))
    said = next((turn.get("content", turn.get("value")) for turn in asked), None)
    return said if isinstance(said, str) else None


def _checked(rows: Iterable[object], source: str) -> list[Row]:
    checked: list[Row] = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, str | Mapping):
            raise PromptError(
                f"{source}: row {number} is neither text nor an object", "give strings or objects with a 'prompt'"
            )
        checked.append(row)
    return checked


def _lines(path: Path) -> list[object]:
    return [line.strip() for line in _text_lines(path)]


def _json_lines(path: Path) -> list[object]:
    rows: list[object] = []
    for number, line in enumerate(_text_lines(path), start=1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{path}: cannot be read: row {number} is no JSON ({error})", "mend that row") from error
    return rows


def _text_lines(path: Path) -> list[str]:
    """Lines that hold something; ``str.splitlines`` would also cut at characters that JSON allows inside a string."""
    text = _text(path).replace("\r\n", "\n").replace("\r", "\n")
    return [line for line in text.split("\n") if line.strip()]


def _text(path: Path) -> str:
    """The text of a file, unpacked."""
    if path.suffix.lower() == GZIP:
        with gzip.open(path) as file:
            data = file.read(MOST_UNPACKED + 1)
        if len(data) > MOST_UNPACKED:
            raise PromptError(f"{path}: unpacks to more than {size(MOST_UNPACKED)}", "cut it into smaller files")
    else:
        data = path.read_bytes()
    encoding = next((its for mark, its in MARKS.items() if data.startswith(mark)), "utf-8-sig")
    return data.decode(encoding)


def _json(path: Path) -> list[object]:
    """A list, or the one that an object holds."""
    document = json.loads(_text(path))
    if isinstance(document, Mapping):
        held = {name: its for name, its in document.items() if isinstance(its, list)}
        named = [name for name in LISTS if name in held] or list(held)
        if len(named) != 1:
            seen = ", ".join(map(repr, list(document)[:12]))
            raise PromptError(
                f"{path}: must hold a JSON list, and holds an object with {seen or 'nothing'}",
                "use a list of strings or of objects with a 'prompt', or an object with one such list as 'prompts'",
            )
        document = held[named[0]]
    if not isinstance(document, list):
        raise PromptError(f"{path}: must hold a JSON list", "use a list of strings or of objects with a 'prompt'")
    return document


def _table(path: Path) -> list[object]:
    text = _text(path)
    header = text.partition("\n")[0]
    return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=max(DELIMITERS, key=header.count)))


def _parquet(path: Path) -> list[object]:
    try:
        from pyarrow import parquet  # type: ignore[import-not-found]
    except ImportError as error:
        raise PromptError(f"{path}: reading Parquet needs pyarrow", "pip install 'abliterate[datasets]'") from error
    return parquet.read_table(path).to_pylist()
