"""One command for each stage, on the files that the stages before wrote."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from abliterate.cli import options as opt
from abliterate.cli.console import guarded, out, progress, show_json
from abliterate.cli.publish import Upload, check_push_options, stream_through
from abliterate.cli.recipe_options import Given, takes
from abliterate.errors import OutputError, UsageError
from abliterate.recipe import Recipe

if TYPE_CHECKING:
    from abliterate.events import OnEvent
    from abliterate.method.directions import DirectionSet
    from abliterate.workflow.session import Session
    from abliterate.workflow.steps import Steps


@guarded
@takes("find", "model", file=True, method=True)
def measure(
    model: opt.Model,
    *,
    out_file: Annotated[Path, typer.Option("--out", help="Where to write the candidates.")] = Path(
        "candidates.safetensors"
    ),
    recipe: Recipe,
    covariance: Annotated[
        Path | None, typer.Option(help="Also write the covariances of both classes at the last position to this file.")
    ] = None,
    revision: opt.Revision = None,
    json: opt.Json = False,
) -> None:
    """Measure the difference of means at every layer and post-instruction position.

    Example: abliterate measure tiny-chat --out candidates.safetensors
    """
    from abliterate.checkpoint.direction_file import save
    from abliterate.cli.tables import show_measured
    from abliterate.workflow import pipeline

    pipeline.check_names(recipe)
    with progress() as listen:
        session = _session(model, recipe, revision, listen)
        pipeline.say_cost(session, ["measure"])
        with _steps(out_file, session) as steps:
            measured = pipeline.measure(session, steps=steps, covariance=covariance)
            save(measured, out_file)
    if json:
        show_json({"file": str(out_file), "positions": measured.positions, **dict(measured.metadata)})
        return
    tokens = measured.metadata["refusal_tokens"]["texts"]
    out.print(f"{len(measured.positions)} positions x {measured.n_layers} layers, width {measured.d_model}")
    show_measured(measured.metadata)
    out.print(f"refusals begin with: {', '.join(map(repr, tokens))}", markup=False)
    out.print(f"written: {out_file}", markup=False, soft_wrap=True)


@guarded
@takes("find", "change", "roles", "exclude_layers", "strength", "model", file=True, method=True)
def select(
    model: opt.Model,
    candidates: opt.DirectionFile,
    *,
    out_file: Annotated[Path, typer.Option("--out", help="Where to write the chosen direction.")] = Path(
        "direction.safetensors"
    ),
    recipe: Recipe,
    revision: opt.Revision = None,
    json: opt.Json = False,
) -> None:
    """Score every candidate by bypass, induce and KL, and choose one; or search weight kernels (--method search).

    Example: abliterate select tiny-chat candidates.safetensors --out direction.safetensors
    """
    from dataclasses import asdict

    from abliterate.checkpoint.direction_file import load, save
    from abliterate.cli.search import show_search
    from abliterate.cli.tables import show_selection
    from abliterate.workflow import pipeline

    pipeline.check_names(recipe)
    measured = load(candidates)
    with progress() as listen:
        session = _session(model, recipe, revision, listen)
        pipeline.say_cost(session, ["select"])
        with _steps(out_file, session) as steps:
            chosen = pipeline.select(session, measured, steps=steps)
            save(chosen, out_file)
    if json:
        choice = asdict(chosen.choice) if chosen.choice else None
        scores = [asdict(score) for score in chosen.scores]
        found = {"search": chosen.metadata["search"]} if recipe.find.trials else {}
        show_json({"file": str(out_file), "choice": choice, "scores": scores, **found})
        return
    show_selection(chosen)
    show_search(chosen)
    out.print(f"written: {out_file}", markup=False, soft_wrap=True)


@guarded
@takes("edit", "memory_bytes", "publish", file=True, method=True, add=True)
def edit(
    model: opt.Model,
    direction: opt.DirectionFile,
    *,
    out_folder: Annotated[Path | None, typer.Option("--out", help="Output folder. Default: NAME-abliterated.")] = None,
    position: opt.Position = None,
    layer: opt.Layer = None,
    candidate: opt.CandidateId = None,
    trial: opt.Trial = None,
    category: opt.Category = None,
    revision: opt.Revision = None,
    recipe: Recipe,
    push: opt.Push = None,
    branch: opt.Branch = None,
    stream: opt.Stream = False,
    json: opt.Json = False,
) -> None:
    """Remove a direction from every writer of a checkpoint, shard by shard; the model is never loaded.

    Example: abliterate edit tiny-chat direction.safetensors --out tiny-chat-abl
    """
    from abliterate import api

    target = out_folder or opt.default_out(model, suffix=opt.suffix_of(recipe))
    chosen = read_direction(direction, position, layer, trial, category, candidate)
    assert chosen is not None
    if push is not None and not stream:
        raise UsageError("an edit is not verified, so it is not pushed", "add --stream, or verify and push afterwards")
    if stream:
        upload = Upload(name=push, branch=branch, private=recipe.publish.private)
        stream_through(model, chosen, target, recipe, upload, revision=revision, as_json=json)
        return
    check_push_options(push, branch, private=recipe.publish.private)
    with progress() as listen:
        edited = api.edit(model, chosen, target, recipe=recipe, revision=revision, on_event=listen)
    if json:
        show_json({"out": str(edited.out), **edited.plan.to_json()})
        return
    from abliterate.cli.tables import show_plan

    show_plan(edited.plan)
    out.print(f"written: {edited.out}", markup=False, soft_wrap=True)
    said = f"not verified yet, nor looked through for NaN and infinity: abliterate verify {edited.out}"
    out.print(said, style="dim", markup=False, soft_wrap=True)


@guarded
def dequantize(
    model: opt.Model,
    out_folder: Annotated[Path | None, typer.Option("--out", help="Output folder. Default: NAME-bf16.")] = None,
    revision: opt.Revision = None,
    json: opt.Json = False,
) -> None:
    """Write an FP8 or MXFP4 checkpoint as bfloat16, shard by shard, so that it can be edited.

    Example: abliterate dequantize openai/gpt-oss-20b --out gpt-oss-20b-bf16
    """
    from abliterate import api

    target = out_folder or opt.default_out(model, suffix="bf16")
    with progress() as listen:
        written = api.dequantize(model, target, revision=revision, on_event=listen)
    if json:
        show_json({"out": str(written)})
        return
    out.print(f"written: {written}", markup=False, soft_wrap=True)


@guarded
@takes("harmful", "harmless", "model", leaving_out=["batch_size", "system"])
def verify(
    folder: opt.Finished,
    *,
    base: opt.Base = None,
    bytes_only: Annotated[bool, typer.Option("--bytes-only", help="Do not load the models.")] = False,
    given: Given,
    revision: opt.Revision = None,
    json: opt.Json = False,
) -> None:
    """Prove an edited checkpoint against its base: on its bytes, and against inference-time ablation.

    Prompts are those of the edit. Where it names none, give them: there is no default here.

    Example: abliterate verify tiny-chat-abl
    """
    from abliterate import api
    from abliterate.cli.tables import show_verification
    from abliterate.errors import VerificationError
    from abliterate.publishing import manifest

    _quiet()
    with progress() as listen:
        report = api.verify(
            folder, revision=revision, base=base, changes=given, behaviour=not bytes_only, on_event=listen
        )
    if json:
        show_json(manifest.verification_json(report))
    else:
        show_verification(report)
    if not report.ok:
        raise VerificationError(f"{folder}: {report.failures[0]}", "do not use this checkpoint: edit the base again")


def read_direction(
    path: Path | None,
    position: int | None,
    layer: int | None,
    trial: int | None = None,
    category: str | None = None,
    candidate: str | None = None,
) -> "DirectionSet | None":
    """The direction of a file, or another candidate in it: at ``position`` and ``layer``, of ``trial``, or by its id.

    Of that a ``category``.
    """
    if path is None:
        if any(its is not None for its in (position, layer, category, candidate)):
            raise UsageError("--position, --layer, --candidate and --category choose in a file", "add --direction FILE")
        if trial is not None:
            raise UsageError("--trial takes a trial of a file that a search wrote", "add --direction FILE")
        return None
    from abliterate.checkpoint.direction_file import load
    from abliterate.method.search import take, unsearched

    directions = load(path)
    if (position is None) != (layer is None):
        raise UsageError("--position and --layer belong together", "give both, or neither")
    if sum(its is not None for its in (position, trial, candidate)) > 1:
        raise UsageError("--trial, --candidate and --position each take a candidate", "give one of them")
    if position is not None and layer is not None:
        directions = unsearched(directions).choose(position, layer)
    if candidate is not None:
        directions = unsearched(directions).choose_candidate(candidate)
    if trial is not None:
        directions = take(directions, trial)
    _ = directions.chosen  # fails here, before any work, when nothing is chosen
    return directions if category is None else directions.of_category(category)


def _session(model: str, recipe: Recipe, revision: str | None, listen: "OnEvent") -> "Session":
    from abliterate.workflow.session import open_session

    _quiet()
    return open_session(model, recipe, revision=revision, on_event=listen)


def _steps(out_file: Path, session: "Session") -> "Steps":
    """What is finished is kept beside the file that is to be written."""
    from abliterate.checkpoint.locking import Lock
    from abliterate.workflow.pipeline import work_fingerprint
    from abliterate.workflow.steps import Steps

    if out_file.is_dir():
        raise OutputError(f"{out_file}: is a folder", "name a file in it")
    lock = Lock(out_file)
    return Steps(out_file.with_name(out_file.name + ".partial"), work_fingerprint(session), lock=lock)


def _quiet() -> None:
    from abliterate.model.load import quiet_transformers

    quiet_transformers()
