"""``abliterate eval`` and ``compare``: models side by side on the test prompts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from abliterate.cli import options as opt
from abliterate.cli.console import guarded, progress, show_json
from abliterate.errors import UsageError

if TYPE_CHECKING:
    from abliterate.method.directions import DirectionSet
    from abliterate.recipe import Recipe

Samples = Annotated[int, typer.Option(help="How many replies to harmful prompts to show.")]
ReportFile = Annotated[
    Path | None, typer.Option("--report", help="Write a report for a browser to this .html file, with all replies.")
]


@guarded
def evaluate(
    base: opt.Model,
    edited: Annotated[str, typer.Argument(help="The checkpoint to compare with BASE.")],
    recipe: opt.RecipeFile = None,
    harmful: opt.Harmful = None,
    harmless: opt.Harmless = None,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    batch_size: opt.BatchSize = None,
    memory: opt.Memory = None,
    device_memory: opt.DeviceMemory = None,
    max_new_tokens: opt.MaxNewTokens = None,
    backend: opt.Backend = None,
    thinking: opt.Thinking = None,
    scorer: opt.Scorer = None,
    look_alike: opt.LookAlike = None,
    text: opt.Text = None,
    judge: opt.Judge = None,
    judge_format: opt.JudgeFormat = None,
    tasks: opt.Tasks = None,
    task_limit: opt.TaskLimit = None,
    task_path: opt.TaskPath = None,
    task_shots: opt.TaskShots = None,
    task_chat: opt.TaskChat = None,
    controls: opt.Controls = None,
    system: opt.System = None,
    samples: Samples = 3,
    report: ReportFile = None,
    trust_remote_code: opt.TrustRemoteCode = None,
    json: opt.Json = False,
) -> None:
    """Compare two checkpoints: refusal, broken replies, and what changed on harmless prompts.

    Example: abliterate eval tiny-chat tiny-chat-abl --report report.html
    """
    settings = opt.make_recipe(
        recipe, harmful=harmful, harmless=harmless, device=device, dtype=dtype, batch_size=batch_size, memory=memory,
        device_memory=device_memory,
        max_new_tokens=max_new_tokens, backend=backend,
        thinking=thinking, scorer=scorer, look_alike=look_alike, text=text,
        judge=judge, judge_format=judge_format, controls=controls, tasks=tasks, task_limit=task_limit,
        task_path=task_path, task_shots=task_shots, task_chat=task_chat,
        system=system, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    _evaluate(base, [("edited", edited)], settings, samples=samples, report_file=report, as_json=json)


@guarded
def compare(
    base: opt.Model,
    others: Annotated[list[str], typer.Argument(help="Checkpoints to hold against BASE: anyone's.")],
    recipe: opt.RecipeFile = None,
    harmful: opt.Harmful = None,
    harmless: opt.Harmless = None,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    batch_size: opt.BatchSize = None,
    memory: opt.Memory = None,
    device_memory: opt.DeviceMemory = None,
    max_new_tokens: opt.MaxNewTokens = None,
    backend: opt.Backend = None,
    thinking: opt.Thinking = None,
    scorer: opt.Scorer = None,
    look_alike: opt.LookAlike = None,
    text: opt.Text = None,
    judge: opt.Judge = None,
    judge_format: opt.JudgeFormat = None,
    tasks: opt.Tasks = None,
    task_limit: opt.TaskLimit = None,
    task_path: opt.TaskPath = None,
    task_shots: opt.TaskShots = None,
    task_chat: opt.TaskChat = None,
    system: opt.System = None,
    samples: Samples = 3,
    report: ReportFile = None,
    trust_remote_code: opt.TrustRemoteCode = None,
    json: opt.Json = False,
) -> None:
    """Hold several checkpoints against one base, on the same prompts.

    Example: abliterate compare Qwen/Qwen2.5-7B-Instruct qwen-abl somebody/Qwen2.5-7B-abliterated
    """
    settings = opt.make_recipe(
        recipe, harmful=harmful, harmless=harmless, device=device, dtype=dtype, batch_size=batch_size, memory=memory,
        device_memory=device_memory,
        max_new_tokens=max_new_tokens, backend=backend,
        thinking=thinking, scorer=scorer, look_alike=look_alike, text=text,
        judge=judge, judge_format=judge_format, tasks=tasks, task_limit=task_limit, task_path=task_path,
        task_shots=task_shots, task_chat=task_chat, system=system, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if len({"base", *others}) <= len(others):
        raise UsageError("two of the models have one name", "name each once, and none of them base")
    named = [(other, other) for other in others]
    _evaluate(base, named, settings, samples=samples, report_file=report, as_json=json)


def _evaluate(
    base: str,
    others: list[tuple[str, str]],
    settings: "Recipe",
    *,
    samples: int,
    report_file: Path | None,
    as_json: bool,
) -> None:
    from abliterate.checkpoint.hub import fetch
    from abliterate.cli.tables import show_evaluation
    from abliterate.data.bundled import open_model
    from abliterate.model.load import quiet_transformers
    from abliterate.publishing import manifest
    from abliterate.workflow import pipeline
    from abliterate.workflow.session import open_session

    check_report(report_file)
    pipeline.check_evaluation(settings)
    opened = [(name, fetch(open_model(other))) for name, other in others]
    direction = _direction_of(opened[0][1].folder)
    if settings.evaluate.controls and direction is None:
        raise UsageError(
            f"{others[0][1]}: --controls needs the direction that was removed, and none is with it",
            "give a folder that abliterate wrote, or leave out --controls",
        )
    quiet_transformers()
    with progress() as listen:
        session = open_session(base, settings, on_event=listen)
        found = pipeline.evaluate(session, opened, directions=direction, on_event=listen)
    if report_file is not None:
        from abliterate.evaluate.page import write_report

        document = manifest.read(opened[0][1].folder) if direction is not None else None
        title = " and ".join([session.checkpoint.name, *(name for _, name in others)])
        write_report(report_file, title, found, directions=direction, manifest=document)
    if as_json:
        show_json(manifest.evaluation_json(found))
    else:
        show_evaluation(found, samples=samples)


def check_report(path: Path | None) -> None:
    """Check, before minutes of work, that a report can be written there.

    Raises:
        UsageError: it is no .html file, or its folder is missing.
    """
    if path is not None and (path.suffix.lower() not in (".html", ".htm") or not path.absolute().parent.is_dir()):
        raise UsageError(f"--report {path}: not an .html file in a folder that exists", "name one, e.g. report.html")


def _direction_of(folder: Path) -> "DirectionSet | None":
    """The direction that lies in a folder that abliterate wrote."""
    from abliterate.checkpoint.direction_file import load
    from abliterate.checkpoint.output import PRIVATE_FOLDER
    from abliterate.workflow.pipeline import DIRECTION_FILE

    path = folder / PRIVATE_FOLDER / DIRECTION_FILE
    return load(path) if path.is_file() else None
