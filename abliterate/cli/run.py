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
from abliterate.cli.evaluate import check_report
from abliterate.cli.process import processes
from abliterate.cli.publish import Upload, check_push_options, show_published, stream_through
from abliterate.cli.recipe_options import Given, takes
from abliterate.cli.stages import read_direction
from abliterate.errors import UsageError
from abliterate.recipe import Recipe

if TYPE_CHECKING:
    from abliterate.events import OnEvent
    from abliterate.publishing.push import Published
    from abliterate.workflow.pipeline import RunResult

OutFolder = Annotated[
    Path | None, typer.Option("--out", help="Output folder. Default: NAME-abliterated in the current folder.")
]
Direction = Annotated[Path | None, typer.Option(help="Use the direction of this file: skips measuring and selecting.")]
Evaluate = Annotated[bool, typer.Option("--eval/--no-eval", help="Measure replies before and after.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan, check prompts and output, write nothing.")]


@guarded
@takes("find", "edit", "model", "tensor_parallel", "evaluate", "publish", file=True, method=True, quick=True, add=True)
def run(
    model: opt.OptionalModel = None,
    *,
    out_folder: OutFolder = None,
    direction: Direction = None,
    position: opt.Position = None,
    layer: opt.Layer = None,
    candidate: opt.CandidateId = None,
    trial: opt.Trial = None,
    category: opt.Category = None,
    revision: opt.Revision = None,
    evaluate: Evaluate = True,
    report: opt.ReportFile = None,
    show_replies: opt.ShowReplies = False,
    dry_run: DryRun = False,
    recipe: Recipe,
    given: Given,
    push: opt.Push = None,
    branch: opt.Branch = None,
    stream: opt.Stream = False,
    json: opt.Json = False,
) -> None:
    """Find the refusal direction, remove it from every writer, prove the result and report it.

    Example: abliterate run Qwen/Qwen2.5-7B-Instruct --out qwen-abl
    """
    target = out_folder or opt.default_out(model, suffix=opt.suffix_of(recipe))
    check_report(report)
    chosen = read_direction(direction, position, layer, trial, category, candidate)
    check_push_options(push, branch, private="private" in given)
    upload = Upload(name=push, branch=branch, private=recipe.publish.private)
    if dry_run and stream:
        raise UsageError("--dry-run shows nothing of a stream", "`abliterate plan MODEL` does")
    rank, count = processes()
    if count > 1 and (dry_run or stream):
        raise UsageError("--dry-run and --stream are work for one process", "start one process")
    if dry_run:
        _dry_run(model, target, recipe, revision=revision, as_json=json)
        return
    if stream:
        stream_through(model, chosen, target, recipe, upload, revision=revision, as_json=json)
        return
    from abliterate.model.load import quiet_transformers
    from abliterate.workflow import pipeline

    quiet_transformers()
    err.print("$ abliterate " + shlex.join(sys.argv[1:]), style="dim", markup=False)
    with progress() as listen:
        upload.check(str(model), listen)
        result = pipeline.run(
            model, target, recipe, revision=revision, direction=chosen, with_evaluation=evaluate, on_event=listen
        )
        if rank > 0:
            return  # the first process tells and publishes
        _write_report(report, result)
        published = _push(result.out, upload, listen)
    _show(result, report, published, show_replies=show_replies, as_json=json)


def _write_report(file: Path | None, result: "RunResult") -> None:
    if file is None or result.evaluation is None:
        return
    from abliterate.evaluate.page import write_report
    from abliterate.publishing import manifest, wording

    document = manifest.read(result.out)
    title = f"{document['source']['name']}, {wording.title(document['edit'])}"
    write_report(file, title, result.evaluation, directions=result.directions, manifest=document)


def _push(folder: Path, upload: Upload, listen: "OnEvent") -> "Published | None":
    """Upload what was verified just now, where a repository is named."""
    if upload.name is None:
        return None
    from abliterate import api

    return api.push(folder, upload.name, private=upload.private, branch=upload.branch, verify=False, on_event=listen)


def _show(
    result: "RunResult", report: Path | None, published: "Published | None", *, show_replies: bool, as_json: bool
) -> None:
    from abliterate.cli import tables
    from abliterate.cli.search import show_search
    from abliterate.publishing import manifest

    if as_json:
        sent = {"published": asdict(published)} if published else {}
        show_json({"out": str(result.out), **sent, **manifest.read(result.out)})
        return
    tables.show_plan(result.plan)
    out.print()
    tables.show_selection(result.directions)
    show_search(result.directions)
    out.print()
    tables.show_verification(result.verification)
    out.print()
    if result.evaluation is not None:
        tables.show_evaluation(result.evaluation, show_replies=show_replies)
        out.print()
    if report is not None and result.evaluation is not None:
        out.print(f"report: {report}", markup=False, soft_wrap=True)
    out.print(f"[bold green]done and verified:[/bold green] {escape(str(result.out))}", soft_wrap=True)
    if published is not None:
        show_published(published)


def _dry_run(model: str | None, target: Path, recipe: Recipe, *, revision: str | None, as_json: bool) -> None:
    from abliterate.checkpoint.output import check_place, check_space
    from abliterate.cli import tables
    from abliterate.data.bundled import open_model
    from abliterate.editing.asked import check_room
    from abliterate.editing.planning import plan
    from abliterate.workflow.session import prompts_of, with_default_prompts

    checkpoint = open_model(model, revision=revision)
    made = plan(checkpoint, **recipe.plan_options)
    check_room(made, recipe.edit)
    if checkpoint.root is not None:
        check_place(target, checkpoint.root)
    check_space(target.absolute(), made.output_bytes)
    contrast = prompts_of(with_default_prompts(model, recipe))
    if as_json:
        show_json({**made.to_json(), "out": str(target), "prompts": contrast.hashes()})
        return
    tables.show_plan(made)
    for name, part in contrast.hashes().items():
        near = f", {part['near_duplicates']} near-duplicates left out" if part["near_duplicates"] else ""
        out.print(f"{name.replace('_', ' ')}: {part['count']} prompts from {part['source']}{near}", markup=False)
    out.print(f"would write {target}; nothing was written", markup=False, soft_wrap=True)
