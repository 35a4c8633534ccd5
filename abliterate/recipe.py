"""Recipes: every option of ``run`` in a TOML file.  Flags of the command line win over it."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from abliterate.errors import RecipeError

DEFAULT_EDIT_BYTES = 512 * 2**20
MOST_EDIT_BYTES = 2**30
NOT_IN_NUMBERS = {"memory_bytes", "device_memory_bytes", "batch_size", "title"}
"""Options that no number depends on, beyond rounding."""
NOT_IN_WORK = NOT_IN_NUMBERS | {"device", "dtype"}
"""Options in which two runs may differ and still be the same work."""


class Recipe(BaseModel):
    """One reproducible run.  ``recipes/arditi-2024.toml`` says why each default is what it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = ""
    # prompts
    harmful: str = ""
    harmless: str = ""
    n_train: int = Field(default=128, ge=1)
    n_val: int = Field(default=32, ge=1)
    n_test: int = Field(default=100, ge=1)
    seed: int = 42
    system: str | None = None
    filter_prompts: bool = True
    refusal_tokens: tuple[str, ...] = ()
    # selection
    max_kl_nats: float = Field(default=0.1, gt=0)
    min_induce: float = Field(default=0.0, ge=float("-inf"))  # any number, but not NaN
    prune_layers: float = Field(default=0.2, ge=0, lt=1)
    # edit
    tied: Literal["untie", "shared", "keep"] = "untie"
    rounding: Literal["direction", "nearest"] = "direction"
    mtp: bool = True
    allow_partial: bool = False
    # memory of the edit and, where the weights need more, of running the model out of core; None: see `memory.py`
    memory_bytes: int | None = Field(default=None, ge=2**20)
    device_memory_bytes: int | None = Field(default=None, ge=2**20)  # of each accelerator; None: what is free
    # running the model
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    batch_size: int = Field(default=32, ge=1)
    trust_remote_code: bool = False
    # evaluation
    backend: Literal["transformers", "vllm"] = "transformers"  # of the replies
    max_new_tokens: int = Field(default=128, ge=1)
    thinking: Literal["", "on", "off", "both"] = ""  # "": as the chat template has it
    scorer: Literal["rules", "substrings"] = "rules"
    look_alike: str = ""
    text: str = ""
    controls: bool = False
    judge: str = ""
    judge_format: str = ""
    # tasks of lm-eval; None: all documents, and as many examples as the task says
    tasks: tuple[str, ...] = ()
    task_limit: int | None = Field(default=None, ge=1)
    task_path: str = ""
    task_shots: int | None = Field(default=None, ge=0)
    task_chat: bool = True

    @property
    def edit_memory_bytes(self) -> int:
        """Memory for the edit, which streams: without a wish the default, and never more than makes it faster."""
        return min(self.memory_bytes or DEFAULT_EDIT_BYTES, MOST_EDIT_BYTES)

    @property
    def plan_options(self) -> dict[str, Any]:
        """What ``planning.plan`` takes of a recipe."""
        return {"tied": self.tied, "mtp": self.mtp, "allow_partial": self.allow_partial}

    def to_toml(self) -> str:
        """The text of a recipe file with every value; what is None is left out, as TOML has no such thing."""
        values = {key: value for key, value in self.model_dump().items() if value is not None}
        return "".join(f"{key} = {_toml(value)}\n" for key, value in values.items())

    def with_changes(self, changes: Mapping[str, Any]) -> "Recipe":
        """A copy with the values of ``changes`` that are not None.

        Raises:
            RecipeError: a value is not allowed.
        """
        given = {key: value for key, value in changes.items() if value is not None}
        return _validate({**self.model_dump(), **given}, "command line")


def load_recipe(name: str) -> Recipe:
    """The recipe of a bundled name (``arditi-2024``) or a TOML file.

    Raises:
        RecipeError: missing, malformed, or a value is not allowed; names file, key and what is allowed.
    """
    path = Path(name)
    if not name.endswith(".toml"):
        path = bundled_recipes().get(name, path)
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RecipeError(
            f"{name}: no such recipe", f"give a .toml file, or one of: {', '.join(sorted(bundled_recipes()))}"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid TOML ({error})", "mend that line") from error
    return _validate(document, str(path))


def bundled_recipes() -> dict[str, Path]:
    """The recipes that ship with the package, by name."""
    package = Path(__file__).parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.toml"))}
    return {}


def _toml(value: Any) -> str:  # noqa: ANN401 - recipe values
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value).replace("\x7f", "\\u007f")  # strings, integers and truth values are written as in JSON


def _validate(document: Mapping[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        allowed = f"options are: {', '.join(Recipe.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise RecipeError(f"{where}: {key}: {first['msg']}", allowed or f"change {key}") from error
