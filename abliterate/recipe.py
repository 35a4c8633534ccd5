"""Recipes: every option of ``run`` in a TOML file, in one table per stage.  Flags of the command line win over it.

An option is one field here: its type, default and bounds, its help text, and, beside the type, what else is true of it
(``Trait``) and how the command line spells it (``Flag``).
"""

import json
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from abliterate.errors import RecipeError
from abliterate.events import Noted, OnEvent, ignore
from abliterate.method.places import Role

DEFAULT_EDIT_BYTES = 512 * 2**20
MOST_EDIT_BYTES = 2**30


class Trait(Enum):
    """What is true of an option, besides its value."""

    NO_NUMBER = "no number depends on it, beyond rounding"
    SAME_WORK = "two runs may differ in it and still be the same work"
    OF_A_MACHINE = "whoever uses a manifest decides it"
    FILE_ONLY = "it stands in recipe files, and the command line does not offer it"


@dataclass(frozen=True, slots=True)
class Flag:
    """How the command line spells an option, where that is not ``--its-name VALUE``."""

    name: str = ""
    """The flag; none: made of the field's name."""
    written: Literal["", "size", "list"] = ""
    """"size": 8GiB for bytes; "list": a,b,c."""


class Section(BaseModel):
    """The options of one stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FindOptions(Section):
    """Which prompts the direction is measured on, and the rule that chooses it."""

    harmful: str = Field(
        default="",
        description="Prompts the model declines: a file, bundled:NAME, set:NAME, or hf:OWNER/NAME[:COLUMN][@SPLIT]. "
        "Default: bundled:contrast, with its harmless half.",
    )
    harmless: str = Field(default="", description="Prompts the model answers, in the same forms.")
    n_train: Annotated[int, Trait.FILE_ONLY] = Field(
        default=128, ge=1, description="Prompts of each class to measure on."
    )
    n_val: Annotated[int, Trait.FILE_ONLY] = Field(
        default=32, ge=1, description="Prompts of each class to score candidates on."
    )
    n_test: Annotated[int, Trait.FILE_ONLY] = Field(
        default=100, ge=1, description="Prompts of each class to evaluate on."
    )
    seed: Annotated[int, Trait.FILE_ONLY] = Field(default=42, description="For whatever is drawn: splits, controls.")
    filter_prompts: Annotated[bool, Trait.FILE_ONLY] = Field(
        default=True, description="Keep harmful prompts that are refused, and harmless ones that are answered."
    )
    labels: Literal["replies", "first-token"] = Field(
        default="replies",
        description="What says that a prompt is refused: replies (each is read), or first-token (the paper's metric).",
    )
    reply_tokens: Annotated[int, Trait.FILE_ONLY] = Field(
        default=32, ge=1, description="Length of the replies that say it, in tokens."
    )
    allow_few: bool = Field(default=False, description="Measure even where fewer than 8 prompts of a class are left.")
    estimators: Annotated[tuple[str, ...], Flag("--estimator")] = Field(
        default=("difference-of-means", "projected-difference"),
        description="What makes candidates of the measured residuals; repeatable.",
    )
    trained: Literal["", "rdo", "cone"] = Field(
        default="",
        description="Train by gradients, from the best of these candidates: rdo (one direction) or cone (several).",
    )
    train_steps: Annotated[int, Trait.FILE_ONLY] = Field(
        default=24, ge=1, description="Steps of the optimiser at most, for each size of a cone."
    )
    cone_size: int = Field(
        default=3, ge=2, description="Directions of the largest cone that is trained; the smaller ones compete with it."
    )
    independent_of: Annotated[tuple[str, ...], Flag("--independent-of")] = Field(
        default=(),
        description="A direction file of which a direction that is trained shall be independent, or start: the one "
        "that training begins from; repeatable.",
    )
    refusal_tokens: Annotated[tuple[str, ...], Flag("--refusal-token")] = Field(
        default=(), description="A word or token id refusals begin with; repeatable. Default: found out."
    )
    all_scores: bool = Field(
        default=False,
        description="Score every candidate in full, for the landscape in the report; the choice is the same without.",
    )
    choose_by: Literal["first-token", "cosmic"] = Field(
        default="first-token",
        description="What scores candidates: first-token (the paper's metric), or cosmic (residuals, no tokens; every "
        "candidate in full).",
    )
    trials: int = Field(
        default=0,
        ge=0,
        description="Trials of a search over weight kernels, in place of the rule; 0: none. Needs the extra: "
        "abliterate[search].",
    )
    startup_trials: Annotated[int, Trait.FILE_ONLY] = Field(
        default=60, ge=1, description="Of these, so many are drawn at random before others follow from them."
    )
    max_kl_nats: Annotated[float, Trait.FILE_ONLY] = Field(
        default=0.1, gt=0, description="The most that ablating a candidate may change harmless prompts."
    )
    kl_margin: Annotated[float, Trait.FILE_ONLY] = Field(
        default=1.645, ge=0, description="Standard errors of its mean that this KL must stay below that (the paper: 0)."
    )
    min_induce: Annotated[float, Trait.FILE_ONLY] = Field(
        default=0.0, ge=float("-inf"), description="The least that adding a candidate must induce refusal; not NaN."
    )
    prune_layers: Annotated[float, Trait.FILE_ONLY] = Field(
        default=0.2, ge=0, lt=1, description="The share of the layers, the last ones, that gives no candidates."
    )

    @property
    def scores_all(self) -> bool:
        """Whether every candidate is scored in full."""
        return self.all_scores or self.choose_by == "cosmic"


class EditOptions(Section):
    """What is edited, and how."""

    tied: Literal["untie", "shared", "keep"] = Field(
        default="untie", description="What to do with a tied head: untie, shared or keep."
    )
    rounding: Literal["direction", "nearest"] = Field(
        default="direction", description="direction: leave nothing along it; nearest: each element alone."
    )
    mtp: bool = Field(default=True, description="Edit next-token blocks (MTP) as well. Default: yes.")
    allow_partial: bool = Field(
        default=False, description="Edit what is known of an incomplete map, and brand the result."
    )
    change: str = Field(default="removal", description="What is done along the chosen direction: removal.")
    roles: Annotated[tuple[Role, ...], Flag(written="list")] = Field(
        default=("embedding", "attention", "mlp"), description="Writers to edit, e.g. attention,mlp. Default: all."
    )
    exclude_layers: str = Field(
        default="", description='Layers to leave alone: "0-7,20", or by depth "0%-33%". Default: none.'
    )
    strength: float = Field(
        default=1.0, ge=-2, le=2, description="How much of it: 1 all, 0.5 half; below 0 the opposite."
    )


class ModelOptions(Section):
    """How and where the model runs."""

    device: Annotated[str, Trait.SAME_WORK, Trait.OF_A_MACHINE] = Field(
        default="auto", description="auto, cpu, cuda, cuda:N or mps."
    )
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16", "float64"], Trait.SAME_WORK] = Field(
        default="auto", description="auto, float32, bfloat16, float16 or float64, to run the model in."
    )
    batch_size: Annotated[int, Trait.NO_NUMBER] = Field(default=32, ge=1, description="Prompts per forward pass.")
    memory_bytes: Annotated[int | None, Trait.NO_NUMBER, Trait.OF_A_MACHINE, Flag("--memory", "size")] = Field(
        default=None,
        ge=2**20,
        description="Memory to stay within, e.g. 8GiB: a larger model is run out of core. Default: what is free.",
    )
    device_memory_bytes: Annotated[int | None, Trait.NO_NUMBER, Trait.OF_A_MACHINE, Flag("--device-memory", "size")] = (
        Field(
            default=None,
            ge=2**20,
            description="Memory of each GPU to stay within, e.g. 20GiB. Default: what is free.",
        )
    )
    system: str | None = Field(
        default=None, description="System prompt. Default: none (the template's own, if it has one)."
    )
    trust_remote_code: Annotated[bool, Trait.OF_A_MACHINE] = Field(
        default=False, description="Run the model's own code from its repository."
    )


class EvaluateOptions(Section):
    """What is measured of replies, and who reads them."""

    max_new_tokens: int = Field(default=128, ge=1, description="Longest reply, in tokens.")
    backend: Literal["transformers", "vllm"] = Field(
        default="transformers",
        description="What writes the replies: transformers, or vllm (needs a GPU and the extra: abliterate[vllm]).",
    )
    thinking: Literal["", "on", "off", "both"] = Field(
        default="",
        description="Evaluate with thinking on, off or both, by the chat template's own switch. Default: neither.",
    )
    scorer: Literal["rules", "substrings"] = Field(
        default="rules", description="Who tells refusals from answers: rules, or substrings (the paper's)."
    )
    look_alike: str = Field(
        default="",
        description="Harmless prompts that look harmful, as --harmful. Default: bundled:over_refusal.",
    )
    text: str = Field(default="", description="A UTF-8 text file whose cross-entropy is measured as well.")
    judge: str = Field(
        default="",
        description="A guard model that judges replies: llama-guard-3, ..., or NAME@FOLDER-OR-HUB-NAME.",
    )
    judge_format: str = Field(
        default="", description="A file with the judge's own text, with {prompt} and {reply} in it."
    )
    tasks: Annotated[tuple[str, ...], Flag(written="list")] = Field(
        default=(),
        description="Tasks of lm-eval to score the models on, e.g. mmlu,gsm8k. Needs the extra: abliterate[eval].",
    )
    task_limit: int | None = Field(default=None, ge=1, description="At most so many documents of each task.")
    task_path: str = Field(default="", description="A folder with lm-eval tasks of your own (YAML).")
    task_shots: int | None = Field(
        default=None, ge=0, description="Examples before each question. Default: as the task says."
    )
    task_chat: bool = Field(default=True, description="Put tasks through the chat template. Default: yes.")
    controls: bool = Field(
        default=False, description="Also try directions that should change nothing: random, orthogonal."
    )


class PublishOptions(Section):
    """How the result is uploaded; where to, only the command line says."""

    private: Annotated[bool, Trait.NO_NUMBER, Trait.OF_A_MACHINE] = Field(
        default=False, description="Make the repository a private one."
    )


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
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
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
    return json.dumps(value).replace("\x7f", "\\u007f")  # strings, integers and truth values are written as in JSON


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
