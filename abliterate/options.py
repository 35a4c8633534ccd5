"""The options of a recipe, one class for each of its tables.

An option is one field: its type, default and bounds, its help text, and, beside the type, what else is true of it
(``Trait``) and how the command line spells it (``Flag``).
"""

from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from abliterate.method.places import Role


class Trait(Enum):
    """What is true of an option, besides its value."""

    NO_NUMBER = "no number depends on it, beyond rounding"
    SAME_WORK = "two runs may differ in it and still be the same work"
    OF_A_MACHINE = "whoever uses a manifest decides it"
    FILE_ONLY = "it stands in recipe files, and the command line does not offer it"
    OF_PROCESSES = "only a command that several processes can share offers it"


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


REMOVAL, ADDITION = "removal", "addition"
"""Edits by name: what is done along a direction where nothing else is asked for, and the opposite."""


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
    change: str = Field(default=REMOVAL, description="What is done along the chosen direction: removal.")
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
    tensor_parallel: Annotated[bool, Trait.SAME_WORK, Trait.OF_A_MACHINE, Trait.OF_PROCESSES] = Field(
        default=False,
        description="Have the processes that torchrun started on a machine hold one model together, a part each.",
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
