"""``abliterate run``: the whole job."""

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from abliterate.cli import options as opt
from abliterate.cli.console import err, guarded, out, progress, show_json
from abliterate.cli.evaluate import ReportFile, check_report
from abliterate.cli.publish import check_push_options, show_published, stop_on_sigterm, stream_through
from abliterate.errors import UsageError

if TYPE_CHECKING:
    from abliterate.recipe import Recipe


@guarded
def run(
    model: opt.OptionalModel = None,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Output folder. Default: NAME-abliterated in the current folder.")
    ] = None,
    recipe: opt.RecipeFile = None,
    direction: Annotated[
        Path | None, typer.Option(help="Use the direction of this file: skips measuring and selecting.")
    ] = None,
    position: opt.Position = None,
    layer: opt.Layer = None,
    harmful: opt.Harmful = None,
    harmless: opt.Harmless = None,
    tied: opt.Tied = None,
    rounding: opt.Rounding = None,
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
    refusal_token: opt.RefusalToken = None,
    revision: opt.Revision = None,
    mtp: opt.Mtp = None,
    allow_partial: opt.AllowPartial = None,
    trust_remote_code: opt.TrustRemoteCode = None,
    evaluate: Annotated[bool, typer.Option("--eval/--no-eval", help="Measure replies before and after.")] = True,
    report: ReportFile = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan, check prompts and output, write nothing.")
    ] = False,
    push: opt.Push = None,
    branch: opt.Branch = None,
    private: opt.Private = False,
    stream: opt.Stream = False,
    json: opt.Json = False,
) -> None:
    """Find the refusal direction, remove it from every writer, prove the result and report it.

    Example: abliterate run Qwen/Qwen2.5-7B-Instruct --out qwen-abl
    """
    settings = opt.make_recipe(
        recipe, harmful=harmful, harmless=harmless, tied=tied, rounding=rounding, device=device, dtype=dtype,
        batch_size=batch_size, memory=memory, device_memory=device_memory, max_new_tokens=max_new_tokens,
        backend=backend, thinking=thinking, scorer=scorer,
        look_alike=look_alike, text=text, judge=judge, judge_format=judge_format, controls=controls, system=system,
        tasks=tasks, task_limit=task_limit, task_path=task_path, task_shots=task_shots, task_chat=task_chat,
        refusal_token=refusal_token, mtp=mtp, allow_partial=allow_partial, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    target = out_folder or opt.default_out(model)
    from abliterate.cli import tables
    from abliterate.cli.stages import read_direction

    check_report(report)
    given = read_direction(direction, position, layer)
    check_push_options(push, branch, private=private)
    if dry_run and stream:
        raise UsageError("--dry-run shows nothing of a stream", "`abliterate plan MODEL` does")
    if dry_run:
        _dry_run(model, target, settings, revision=revision, as_json=json)
        return
    if stream:
        stream_through(
            model, given, push, target, settings, revision=revision, branch=branch, private=private, as_json=json
        )
        return
    from abliterate import api
    from abliterate.model.load import quiet_transformers
    from abliterate.publishing import manifest
    from abliterate.publishing import push as publishing
    from abliterate.workflow import pipeline

    quiet_transformers()
    stop_on_sigterm()
    err.print("$ abliterate " + shlex.join(sys.argv[1:]), style="dim", markup=False)
    with progress() as listen:
        if push:
            publishing.refuse_base(str(model), push, branch)
            publishing.check_target(push, branch=branch, private=private, on_event=listen)
        result = pipeline.run(
            model, target, settings, revision=revision, direction=given, with_evaluation=evaluate, on_event=listen
        )
        document = manifest.read(result.out)
        if report is not None and result.evaluation is not None:
            from abliterate.evaluate.page import write_report

            title = f"{document['source']['name']}, abliterated"
            write_report(report, title, result.evaluation, directions=result.directions, manifest=document)
        how = {"private": private, "branch": branch, "verify": False, "on_event": listen}
        done = api.push(result.out, push, **how) if push else None
    if json:
        sent = {"published": asdict(done)} if done else {}
        show_json({"out": str(result.out), **sent, **document})
        return
    tables.show_plan(result.plan)
    out.print()
    tables.show_selection(result.directions)
    out.print()
    tables.show_verification(result.verification)
    out.print()
    if result.evaluation is not None:
        tables.show_evaluation(result.evaluation)
        out.print()
    if report is not None and result.evaluation is not None:
        out.print(f"report: {report}", markup=False, soft_wrap=True)
    out.print(f"[bold green]done and verified:[/bold green] {escape(str(result.out))}", soft_wrap=True)
    if done is not None:
        show_published(done)


def _dry_run(model: str | None, target: Path, settings: "Recipe", *, revision: str | None, as_json: bool) -> None:
    from abliterate.checkpoint.output import check_place, check_space
    from abliterate.cli import tables
    from abliterate.data.bundled import open_model
    from abliterate.editing.planning import plan
    from abliterate.workflow.session import prompts_of, with_default_prompts

    checkpoint = open_model(model, revision=revision)
    made = plan(checkpoint, **settings.plan_options)
    if checkpoint.root is not None:
        check_place(target, checkpoint.root)
    check_space(target.absolute(), made.output_bytes)
    contrast = prompts_of(with_default_prompts(model, settings))
    if as_json:
        show_json({**made.to_json(), "out": str(target), "prompts": contrast.hashes()})
        return
    tables.show_plan(made)
    for name, part in contrast.hashes().items():
        near = f", {part['near_duplicates']} near-duplicates left out" if part["near_duplicates"] else ""
        out.print(f"{name.replace('_', ' ')}: {part['count']} prompts from {part['source']}{near}", markup=False)
    out.print(f"would write {target}; nothing was written", markup=False, soft_wrap=True)
