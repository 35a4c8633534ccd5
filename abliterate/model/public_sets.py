"""Public prompt sets by name (``set:NAME``), as a table: where each is, and which of its rows count.

``set:NAME@PATH`` reads a local copy instead: a file, or a folder that holds ``NAME.jsonl`` (``.json``, ``.csv``,
``.parquet``, ``.txt``).  Column and filter are the same.
"""

import random
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from abliterate.checkpoint.file_names import at_home
from abliterate.errors import PromptError
from abliterate.model.prompt_rows import Prompt, Row, prompts_of_rows, rows_of_file, rows_of_hub

PREFIX = "set:"
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """Which rows count: those whose ``column`` is ``equals``, or does not begin with ``begins_not``."""

    column: str
    equals: str | None = None
    begins_not: str | None = None

    def holds(self, row: Row, source: str) -> bool:
        """Whether ``row`` counts.

        Raises:
            PromptError: the row has no such column.
        """
        if isinstance(row, str) or self.column not in row:
            raise PromptError(
                f"{source}: a row has no column {self.column!r}", "use a copy of the set with all of its columns"
            )
        value = str(row[self.column] or "")
        return value == self.equals if self.begins_not is None else not value.startswith(self.begins_not)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicSet:
    """One row of the table; see ``public_sets.toml``."""

    about: str
    declined: bool
    repo: str
    split: str
    column: str
    config: str | None = None
    where: Where | None = None
    gated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolPart:
    """A set in a pool, all of it or ``at_most`` so many prompts drawn from it."""

    set: str
    at_most: int | None = None


@cache
def public_sets() -> Mapping[str, PublicSet]:
    """The table, by name."""
    return {
        name: PublicSet(**{**entry, "where": Where(**entry["where"]) if "where" in entry else None})
        for name, entry in _document()["sets"].items()
    }


@cache
def public_pools() -> Mapping[str, Mapping[str, tuple[PoolPart, ...]]]:
    """Sets put together for train, val and test, by name."""
    return {
        name: {split: tuple(PoolPart(**part) for part in parts) for split, parts in pools.items()}
        for name, pools in _document()["pools"].items()
    }


def load_public(source: str) -> list[Prompt]:
    """The prompts of ``set:NAME`` or ``set:NAME@PATH``, in the set's own order.

    Raises:
        PromptError: there is no such set, its local copy is missing or unusable, or no row of it counts.
        HubError: the Hub does not give it out.
    """
    name, _, place = source.removeprefix(PREFIX).partition("@")
    if name in public_pools():
        raise PromptError(f"{source}: names pools for train, val and test, not one list", "give it as --harmful")
    if name not in public_sets():
        known = ", ".join([*public_sets(), *public_pools()])
        raise PromptError(f"{source}: no such public set", f"there are: {known}")
    found = public_sets()[name]
    if place:
        rows = rows_of_file(_local_copy(at_home(place), name))
    else:
        rows = rows_of_hub(found.repo, config=found.config, split=found.split, source=source)
    wanted = (row for row in rows if found.where is None or found.where.holds(row, source))
    return prompts_of_rows(wanted, source, found.column)


def load_pools(source: str, seed: int) -> dict[str, list[Prompt]] | None:
    """The pools for train, val and test that ``set:NAME`` or ``set:NAME@FOLDER`` names; None where it names no pools.

    Raises:
        PromptError, HubError: as ``load_public``.
    """
    name, _, place = source.removeprefix(PREFIX).partition("@")
    if not source.startswith(PREFIX) or name not in public_pools():
        return None
    pools: dict[str, list[Prompt]] = {}
    for split, parts in public_pools()[name].items():
        pools[split] = []
        for part in parts:
            prompts = load_public(f"{PREFIX}{part.set}{'@' if place else ''}{place}")
            if part.at_most is not None and part.at_most < len(prompts):
                prompts = random.Random(seed).sample(prompts, part.at_most)
            pools[split] += prompts
    return pools


def _document() -> dict[str, dict]:
    return tomllib.loads((files("abliterate.model") / "public_sets.toml").read_text("utf-8"))


def _local_copy(path: Path, name: str) -> Path:
    if not path.is_dir():
        return path
    for suffix in SUFFIXES:
        if (path / f"{name}{suffix}").is_file():
            return path / f"{name}{suffix}"
    raise PromptError(f"{path}: holds no copy of {name}", f"call it {name} and one of {', '.join(SUFFIXES)}")
