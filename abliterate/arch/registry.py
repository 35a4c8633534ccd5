"""The registry: all family files, found by ``model_type``."""

import difflib
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from abliterate.arch.spec import Family
from abliterate.errors import UnknownArchitectureError


@cache
def families() -> tuple[Family, ...]:
    """Every registry entry, in the order of its file name."""
    folder = files("abliterate.arch") / "families"
    paths = sorted((path for path in folder.iterdir() if path.name.endswith(".toml")), key=lambda path: path.name)
    return tuple(Family.model_validate(tomllib.loads(path.read_text("utf-8"))) for path in paths)


def family_of(config: Mapping[str, Any], *, where: str) -> Family:
    """The registry entry for a configuration.

    Raises:
        UnknownArchitectureError: its ``model_type`` is not in the registry.
    """
    model_type = config.get("model_type")
    for family in families():
        if model_type in family.model_types:
            return family
    known = [name for family in families() for name in family.model_types]
    close = difflib.get_close_matches(str(model_type), known, n=3)
    like = f" (like {', '.join(close)}?)" if close else ""
    raise UnknownArchitectureError(
        f"{where}: model_type {model_type!r} is not in the registry{like}",
        "nothing was changed; see abliterate architectures for those known, abliterate plan --guess for a first look",
    )
