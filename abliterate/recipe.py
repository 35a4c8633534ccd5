"""Recipes: every option of ``run`` in a TOML file, in one table per stage.  Flags of the command line win over it."""

import json
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from abliterate.errors import RecipeError
from abliterate.events import Noted, OnEvent, ignore
from abliterate.options import EditOptions, EvaluateOptions, FindOptions, ModelOptions, PublishOptions, Section, Trait

DEFAULT_EDIT_BYTES = 512 * 2**20
MOST_EDIT_BYTES = 2**30


class Recipe(BaseModel):
    """One reproducible run.  ``recipes/default.toml`` says why each default is what it is.

    A flat document, as version 1 wrote them, is read as well; so are flat keywords, ``Recipe(n_train=64)``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: Annotated[str, Trait.NO_NUMBER, Trait.FILE_ONLY] = Field(
        default="", description="What the recipe is, in the list of recipes."
    )
    find: FindOptions = Field(default=FindOptions(), description="Finding the direction.")
    edit: EditOptions = Field(default=EditOptions(), description="Editing the checkpoint.")
    model: ModelOptions = Field(default=ModelOptions(), description="Running the model.")
    evaluate: EvaluateOptions = Field(default=EvaluateOptions(), description="Measuring before and after.")
    publish: PublishOptions = Field(default=PublishOptions(), description="Uploading.")

    @model_validator(mode="before")
    @classmethod
    def _in_tables(cls, document: Any) -> Any:  # noqa: ANN401 - whatever was given
        return in_tables(document) if isinstance(document, Mapping) else document

    @property
    def edit_memory_bytes(self) -> int:
        """Memory for the edit, which streams: without a wish the default, and never more than makes it faster."""
        return min(self.model.memory_bytes or DEFAULT_EDIT_BYTES, MOST_EDIT_BYTES)

    @property
    def plan_options(self) -> dict[str, Any]:
        """What ``planning.plan`` takes of a recipe."""
        return {"tied": self.edit.tied, "mtp": self.edit.mtp, "allow_partial": self.edit.allow_partial}

    def flat(self, *, without: Collection[str] = ()) -> dict[str, Any]:
        """Every option under its own name, without tables, but those called ``without``."""
        values = {"title": self.title}
        for section in SECTIONS:
            values |= getattr(self, section).model_dump()
        return {name: value for name, value in values.items() if name not in without}

    def to_toml(self) -> str:
        """The text of a recipe file with every value; what is None is left out, as TOML has no such thing."""
        lines = [f"title = {_toml(self.title)}\n"]
        for section in SECTIONS:
            lines.append(f"\n[{section}]\n")
            values = getattr(self, section).model_dump()
            lines += [f"{name} = {_toml(value)}\n" for name, value in values.items() if value is not None]
        return "".join(lines)

    def with_changes(self, changes: Mapping[str, Any]) -> "Recipe":
        """A copy with the values of ``changes`` that are not None; the names of options need no table.

        Raises:
            RecipeError: a value is not allowed.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        return _validate({**self.flat(), **given}, "command line")


SECTIONS: Mapping[str, type[Section]] = {
    name: field.annotation
    for name, field in Recipe.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}
"""The tables of a recipe."""
SECTION_OF = {name: section for section, options in SECTIONS.items() for name in options.model_fields}
"""Which table an option stands in: no two have one name."""


def option(name: str) -> FieldInfo:
    """The field of the option ``name``."""
    return SECTIONS[SECTION_OF[name]].model_fields[name] if name in SECTION_OF else Recipe.model_fields[name]


def options_with(trait: Trait) -> frozenset[str]:
    """The names of all options of which ``trait`` is true."""
    return frozenset(name for name in ("title", *SECTION_OF) if trait in option(name).metadata)


NOT_IN_NUMBERS = options_with(Trait.NO_NUMBER)
"""Options that no number depends on, beyond rounding."""
NOT_IN_WORK = NOT_IN_NUMBERS | options_with(Trait.SAME_WORK)
"""Options in which two runs may differ and still be the same work."""
OF_A_MACHINE = options_with(Trait.OF_A_MACHINE)
"""Options of a recipe that whoever uses a manifest decides."""


def is_flat(document: Mapping[str, Any]) -> bool:
    """Whether ``document`` is a recipe without tables, as version 1 wrote them."""
    return SECTIONS.keys().isdisjoint(document) and not SECTION_OF.keys().isdisjoint(document)


def in_tables(document: Mapping[str, Any], *, without: Collection[str] = ()) -> dict[str, Any]:
    """``document``, flat or not, with every option in its table, but those called ``without``."""
    nested: dict[str, Any] = {}
    for name, value in document.items():
        if name in SECTION_OF and is_flat(document):
            nested.setdefault(SECTION_OF[name], {})[name] = value
        else:
            nested[name] = value
    for section in SECTIONS.keys() & nested.keys():
        if isinstance(nested[section], Mapping):
            nested[section] = {name: value for name, value in nested[section].items() if name not in without}
    return nested


def load_recipe(name: str, *, on_event: OnEvent = ignore) -> Recipe:
    """The recipe of a bundled name (``arditi-2024``) or a TOML file; notes when the file has no tables yet.

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
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not valid TOML ({error})", "mend that line") from error
    recipe = _validate(document, str(path))
    if is_flat(document):
        tables = {section: names for section, names in in_tables(document).items() if section in SECTIONS}
        where = "; ".join(f"[{section}] {', '.join(names)}" for section, names in tables.items())
        on_event(Noted(text=f"{path} has the old form, and is read all the same; options now stand in tables: {where}"))
    return recipe


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
    # Strings, integers and truth values are written as in JSON, whose escapes of an emoji, two halves, TOML has not.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _validate(document: Mapping[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = [str(part) for part in first["loc"]]
        if is_flat(document) and path[0] in SECTIONS:
            del path[0]
        key = ".".join(path)
        if first["type"] == "extra_forbidden":
            raise RecipeError(f"{where}: {key}: no such option here", _allowed(path)) from error
        hint = f"write its options under [{key}]" if key in SECTIONS else f"change {key}"
        raise RecipeError(f"{where}: {key}: {first['msg']}", hint) from error


def _allowed(path: list[str]) -> str:
    """What to write instead of the unknown option at ``path``."""
    section, name = path[0] if len(path) > 1 else "", path[-1]
    if name in SECTION_OF:
        return f"{name} stands in the table [{SECTION_OF[name]}]"
    if name == "title":
        return "title stands above the tables"
    if section:
        return f"options of [{section}] are: {', '.join(SECTIONS[section].model_fields)}"
    tables = (f"[{its}] {', '.join(options.model_fields)}" for its, options in SECTIONS.items())
    return f"options are: title; {'; '.join(tables)}"
