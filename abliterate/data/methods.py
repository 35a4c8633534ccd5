"""The published methods: what each does, where it was published, and what its result is worth.  Data: ``methods.toml``.

Each is the bundled recipe of its name; how to add one stands in ``docs/design.md``.
"""

import tomllib
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

from abliterate.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """``claim`` is what its result is worth in a family of exactness class A, ``behind_norms`` in one of class B."""

    name: str
    what: str
    source: str
    equation: str
    claim: str = "equal to hooks"
    behind_norms: str = "removes the direction"

    def worth(self, exactness: Literal["A", "B", "C"]) -> str:
        """What its result is worth in a family of a class."""
        return {"A": self.claim, "B": self.behind_norms, "C": "bytes only"}[exactness]


def methods() -> dict[str, Method]:
    """All of them, by name."""
    found = tomllib.loads((files("abliterate.data") / "methods.toml").read_text("utf-8"))
    return {name: Method(name=name, **its) for name, its in found.items()}


def check_method(name: str) -> None:
    """Check that there is a method of this name.

    Raises:
        UsageError: there is none.
    """
    if name not in methods():
        raise UsageError(f"there is no method {name!r}", f"methods are: {', '.join(methods())}")
