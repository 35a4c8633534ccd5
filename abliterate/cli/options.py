"""Options that several commands share, and how they become a recipe."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abliterate.errors import UsageError

if TYPE_CHECKING:
    from abliterate.recipe import Recipe

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Model = Annotated[str, typer.Argument(help="A checkpoint folder, a Hub name (owner/model), or tiny-chat.")]
OptionalModel = Annotated[
    str | None,
    typer.Argument(help="A checkpoint folder or a Hub name (owner/model). Default: the bundled tiny chat model."),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")]
Finished = Annotated[str, typer.Argument(help="A folder that abliterate wrote, or its name on the Hub (owner/model).")]
RecipeFile = Annotated[str | None, typer.Option("--recipe", help="Recipe: a .toml file or a bundled name.")]
Harmful = Annotated[
    str | None,
    typer.Option(
        help="Prompts the model declines: a file, bundled:NAME, set:NAME, or hf:OWNER/NAME[:COLUMN][@SPLIT]. "
        "Default: bundled:contrast, with its harmless half."
    ),
]
Harmless = Annotated[str | None, typer.Option(help="Prompts the model answers, in the same forms.")]
System = Annotated[str | None, typer.Option(help="System prompt. Default: none (the template's own, if it has one).")]
RefusalToken = Annotated[
    list[str] | None,
    typer.Option("--refusal-token", help="A word or token id refusals begin with; repeatable. Default: found out."),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16 or float64, to run the model in.")]
BatchSize = Annotated[int | None, typer.Option(help="Prompts per forward pass.")]
Memory = Annotated[
    str | None,
    typer.Option(help="Memory to stay within, e.g. 8GiB: a larger model is run out of core. Default: what is free."),
]
DeviceMemory = Annotated[
    str | None, typer.Option(help="Memory of each GPU to stay within, e.g. 20GiB. Default: what is free.")
]
Tied = Annotated[str | None, typer.Option(help="What to do with a tied head: untie, shared or keep.")]
Rounding = Annotated[str | None, typer.Option(help="direction: leave nothing along it; nearest: each element alone.")]
AllowPartial = Annotated[
    bool | None, typer.Option("--allow-partial", help="Edit what is known of an incomplete map, and brand the result.")
]
Mtp = Annotated[bool | None, typer.Option("--mtp/--no-mtp", help="Edit next-token blocks (MTP) as well. Default: yes.")]
TrustRemoteCode = Annotated[
    bool | None, typer.Option("--trust-remote-code", help="Run the model's own code from its repository.")
]
MaxNewTokens = Annotated[int | None, typer.Option(help="Longest reply, in tokens.")]
Backend = Annotated[
    str | None,
    typer.Option(help="What writes the replies: transformers, or vllm (needs a GPU and the extra: abliterate[vllm])."),
]
Thinking = Annotated[
    str | None,
    typer.Option(help="Evaluate with thinking on, off or both, by the chat template's own switch. Default: neither."),
]
Scorer = Annotated[
    str | None, typer.Option(help="Who tells refusals from answers: rules, or substrings (the paper's).")
]
LookAlike = Annotated[
    str | None,
    typer.Option(help="Harmless prompts that look harmful, as --harmful. Default: bundled:over_refusal."),
]
Text = Annotated[str | None, typer.Option(help="A UTF-8 text file whose cross-entropy is measured as well.")]
Controls = Annotated[
    bool | None, typer.Option("--controls", help="Also try directions that should change nothing: random, orthogonal.")
]
Judge = Annotated[
    str | None, typer.Option(help="A guard model that judges replies: llama-guard-3, ..., or NAME@FOLDER-OR-HUB-NAME.")
]
JudgeFormat = Annotated[
    str | None, typer.Option(help="A file with the judge's own text, with {prompt} and {reply} in it.")
]
Tasks = Annotated[
    str | None,
    typer.Option(help="Tasks of lm-eval to score the models on, e.g. mmlu,gsm8k. Needs the extra: abliterate[eval]."),
]
TaskLimit = Annotated[int | None, typer.Option(help="At most so many documents of each task.")]
TaskPath = Annotated[str | None, typer.Option(help="A folder with lm-eval tasks of your own (YAML).")]
TaskShots = Annotated[int | None, typer.Option(help="Examples before each question. Default: as the task says.")]
TaskChat = Annotated[
    bool | None,
    typer.Option("--task-chat/--no-task-chat", help="Put tasks through the chat template. Default: yes."),
]
Position = Annotated[int | None, typer.Option(help="Take the candidate at this position (negative), with --layer.")]
Layer = Annotated[int | None, typer.Option(help="Take the candidate entering this block, with --position.")]
Push = Annotated[str | None, typer.Option(help="Upload the result to this repository of the Hub, OWNER/NAME.")]
Branch = Annotated[
    str | None, typer.Option(help="Branch of the repository to upload to; made if it is not there. Default: main.")
]
Private = Annotated[bool, typer.Option("--private", help="Make the repository a private one.")]
Stream = Annotated[
    bool, typer.Option("--stream", help="With --push: from Hub to Hub, shard by shard; the disk holds about two.")
]

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes from "512MiB", "2GB" or "1000000".

    Raises:
        UsageError: not a size.
    """
    match = SIZE.fullmatch(text.strip())
    if not match:
        raise UsageError(f"{text!r} is not a size", "write it as 512MiB, 2GiB or a number of bytes")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " kmgt".index(match[2].lower() or " "))


def make_recipe(name: str | None, **changes: Any) -> "Recipe":  # noqa: ANN401 - recipe values
    """The recipe ``name`` (or the default one) with the given options, None meaning not given."""
    from abliterate.recipe import Recipe, load_recipe

    recipe = load_recipe(name) if name else Recipe()
    for option in ("memory", "device_memory"):
        size = changes.pop(option, None)
        if size is not None:
            changes[f"{option}_bytes"] = parse_size(size)
    tasks = changes.pop("tasks", None)
    if tasks is not None:
        changes["tasks"] = tuple(dict.fromkeys(name for name in (part.strip() for part in tasks.split(",")) if name))
    tokens = changes.pop("refusal_token", None)
    if tokens:
        changes["refusal_tokens"] = tuple(tokens)
    return recipe.with_changes(changes)


def default_out(model: str | None, *, suffix: str = "abliterated") -> Path:
    """``NAME-abliterated`` (or another suffix) in the current folder."""
    name = (model or "tiny-chat").rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]
    return Path(f"{name}-{suffix}")
