"""The stages, in order: measure, select, edit, verify, evaluate.  Each takes values and returns one.

Nothing here prints; the ``on_event`` of the session hears what happens.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from abliterate.arch.edit_plan import EditPlan
from abliterate.checkpoint import direction_file as direction_files
from abliterate.checkpoint.output import PRIVATE_FOLDER, OutputFolder, fingerprint, prepare, unfinished, writing_speed
from abliterate.checkpoint.source import Checkpoint, open_folder
from abliterate.editing.asked import check_room, plan_asked, scope_asked, stream_asked
from abliterate.editing.planning import plan, within
from abliterate.editing.writing import edit_checkpoint
from abliterate.errors import AbliterateError, OutputError, SourceError, UsageError
from abliterate.evaluate.evaluation import EvalReport
from abliterate.events import Noted, OnEvent, ignore
from abliterate.method.directions import DirectionSet
from abliterate.method.edits import check_edit
from abliterate.method.estimators import needs_of
from abliterate.model import harness, ranks, vllm_backend
from abliterate.model.parallel import check_parallel
from abliterate.model.words import WordList
from abliterate.publishing import manifest
from abliterate.publishing.keeping import DIRECTION_FILE, keep_origin, require_verified
from abliterate.recipe import NOT_IN_WORK, Recipe
from abliterate.verification.checkpoint_proof import verify_bytes
from abliterate.verification.report import VerifyReport
from abliterate.workflow.estimate import counts_of, not_counted, reading_speed, sentence, speed_of, whole_seconds
from abliterate.workflow.finding import measure, select, work_fingerprint
from abliterate.workflow.passes import cost, passes_of
from abliterate.workflow.search import check_search
from abliterate.workflow.session import Session, open_session
from abliterate.workflow.steps import Steps
from abliterate.workflow.training import check_trained
from abliterate.workflow.trials import EDITED, side_by_side
from abliterate.workflow.views import task_request

STEPS = "steps"
SHARED = partial(ranks.spread, codec=ranks.PLAIN)
"""Shards are dealt out to the processes that work together; alone, one process does them all."""

NOT_COMPARED = (
    "proven on the bytes only: the edit was given its direction and names no prompts, so its behaviour is not compared "
    "with hooks; give --harmful and --harmless (bundled:contrast for both, say)"
)


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a whole run did.  ``evaluation`` is None when the run was asked to skip it."""

    out: Path
    plan: EditPlan
    directions: DirectionSet
    verification: VerifyReport
    evaluation: EvalReport | None


def edit(
    edit_plan: EditPlan,
    directions: DirectionSet,
    output: OutputFolder,
    recipe: Recipe,
    *,
    on_event: OnEvent = ignore,
) -> None:
    """Write the edited checkpoint into ``output``, with ``directions`` and recipe, without manifest and card."""
    edit_checkpoint(
        edit_plan,
        output,
        rounding=recipe.edit.rounding,
        memory_bytes=recipe.edit_memory_bytes,
        spread=SHARED,
        on_event=on_event,
    )
    if output.keeps:
        keep_origin(edit_plan, directions, recipe, output)
    ranks.meet()


def verify(
    session: Session,
    edit_plan: EditPlan,
    written: Path,
    *,
    behaviour: bool = True,
) -> VerifyReport:
    """Prove the checkpoint in ``written`` on its bytes and, with ``behaviour``, against hooks on the base.

    Raises:
        SourceError: something cannot be read.
    """
    on_bytes = verify_bytes(
        edit_plan, written, memory_bytes=session.recipe.edit_memory_bytes, spread=SHARED, on_event=session.on_event
    )
    if not behaviour or not on_bytes.ok:
        return VerifyReport(bytes=on_bytes, behaviour=None)
    say_cost(session, ["verify"])
    edited = open_folder(written, name=str(written))
    compared, _ = side_by_side(session, [(EDITED, edited)], proof=edit_plan, with_replies=False)
    return VerifyReport(bytes=on_bytes, behaviour=compared)


def check_names(recipe: Recipe) -> None:
    """Find out before hours of work that all that a recipe names can be had, and together.

    Raises:
        UsageError: there is no such estimator or edit, an estimator is named twice, or see ``check_trained`` and
            ``check_search``.
        SourceError: a direction file that the recipe names cannot be read.
    """
    needs_of(recipe.find.estimators)
    check_trained(recipe)
    check_edit(recipe.edit.change)
    check_search(recipe)


def check_evaluation(recipe: Recipe) -> None:
    """Find out before hours of work what an evaluation would stop at after them.

    Raises:
        UsageError: a task cannot be had, or vLLM not be used; see ``harness.check_tasks``, ``vllm_backend.check_vllm``.
    """
    if recipe.evaluate.backend == "vllm":
        if recipe.model.tensor_parallel:
            raise UsageError(
                "--backend vllm: spreads a model by itself, beside --tensor-parallel", "leave one of them out"
            )
        vllm_backend.check_vllm(dtype=recipe.model.dtype, controls=recipe.evaluate.controls)
    harness.check_tasks(task_request(recipe))


def evaluate(
    session: Session,
    others: Sequence[tuple[str, Checkpoint]],
    *,
    directions: DirectionSet | None = None,
    words: WordList | None = None,
    third: Checkpoint | None = None,
) -> EvalReport:
    """Compare replies and distributions of the base and other checkpoints (name, checkpoint) on the test prompts.

    ``directions``, where known, are what the controls of the recipe and the components of prompts refer to.  ``words``,
    if any, are asked of all, and of a ``third`` model, which may be one without a chat template.

    Raises:
        SourceError: one of them cannot be loaded.
    """
    check_evaluation(session.recipe)
    for checkpoint in [session.checkpoint, *(other for _, other in others)]:
        replace(session, checkpoint=checkpoint).check_modes()
    for checkpoint in [session.checkpoint, *(other for _, other in others), *([third] if third else [])]:
        if words is not None:
            replace(session, checkpoint=checkpoint).check_words(words)
    controls = session.recipe.evaluate.controls and directions is not None
    say_cost(session, ["replies"], models=1 + len(others))
    _, evaluated = side_by_side(session, others, directions=directions, controls=controls, words=words, third=third)
    if evaluated is None:
        raise AssertionError("replies were asked for")
    return evaluated


def run(
    model: str | Path | None,
    out: Path,
    recipe: Recipe,
    *,
    revision: str | None = None,
    direction: DirectionSet | None = None,
    with_evaluation: bool = True,
    on_event: OnEvent = ignore,
) -> RunResult:
    """The whole job: plan, measure, select, edit, verify, evaluate, card, manifest; then, and only then, ``out``.

    A run that was stopped continues where it was: the direction and the finished shards are kept in ``out.partial``.
    Several processes that call this, under a launcher, share the work (``model.ranks``).

    Raises:
        AbliterateError: see ``errors`` for everything that can go wrong.
    """
    check_names(recipe)
    if with_evaluation:
        check_evaluation(recipe)
    with ranks.together(one_model=recipe.model.tensor_parallel):
        return _run(
            model, out, recipe, revision=revision, direction=direction, with_evaluation=with_evaluation,
            on_event=on_event,
        )  # fmt: skip


def _run(
    model: str | Path | None,
    out: Path,
    recipe: Recipe,
    *,
    revision: str | None,
    direction: DirectionSet | None,
    with_evaluation: bool,
    on_event: OnEvent,
) -> RunResult:
    scratch = unfinished(out) / PRIVATE_FOLDER
    session = open_session(model, recipe, revision=revision, scratch=scratch, on_event=on_event)
    if recipe.model.tensor_parallel:
        check_parallel(session.checkpoint, recipe.model.device)
    if (processes := ranks.processes()) > 1:
        shared = "prompts, candidates and shards" if ranks.count() > 1 else "one model, a part of which each holds"
        on_event(Noted(text=f"{processes} processes share {shared}; the first one tells"))
    edit_plan = plan(session.checkpoint, **recipe.plan_options)
    edit_plan = within(edit_plan, scope_asked(session.recipe.edit, edit_plan.model_map.n_layers).holds)
    if direction is None:
        check_room(edit_plan, session.recipe.edit)
    else:
        stream_asked(session.recipe.edit, direction, edit_plan.model_map.n_layers)  # or it cannot be made of that
    check_prompts(session, with_evaluation=with_evaluation)
    output = _prepared(out, session, edit_plan, direction)
    known = direction or _resume_direction(output)
    last = ("verify", "replies") if with_evaluation else ("verify",)
    directions = known or find(session, output, ("edit", *last), output_bytes=edit_plan.output_bytes)
    edit_plan = plan_asked(edit_plan, session.recipe.edit, directions)
    edit(edit_plan, directions, output, session.recipe, on_event=on_event)
    on_bytes = verify(session, edit_plan, output.path, behaviour=False)
    require_verified(on_bytes, output)
    if known is not None:
        say_cost(session, last)  # only here: the edit and its proof on the bytes need no model in memory
    behaviour, evaluation = side_by_side(
        session,
        [(EDITED, open_folder(output.path, name=str(out)))],
        proof=edit_plan,
        directions=directions,
        controls=session.recipe.evaluate.controls,
        with_replies=with_evaluation,
    )
    verification = VerifyReport(bytes=on_bytes.bytes, behaviour=behaviour)
    require_verified(verification, output)
    ranks.meet()  # nobody reads the folder under its unfinished name any more
    if output.keeps:
        document = manifest.build(
            edit_plan,
            directions,
            session.recipe,
            prompts=session.contrast.hashes(),
            verification=verification,
            evaluation=evaluation,
        )
        manifest.finish(output, edit_plan, document)
        output.finish()
    return RunResult(
        out=output.final, plan=edit_plan, directions=directions, verification=verification, evaluation=evaluation
    )


def check_prompts(session: Session, *, with_evaluation: bool) -> None:
    """Check before minutes of work that the prompts can be had and, for an evaluation, that thinking can be switched.

    Raises:
        PromptError: a source is missing or unusable.
        UsageError: thinking cannot be switched.
    """
    _ = session.contrast
    if with_evaluation:
        session.check_modes()


def find(session: Session, output: OutputFolder, following: Sequence[str], *, output_bytes: int) -> DirectionSet:
    """Measure and select, and keep the direction in ``output``.

    What the whole run will cost is said first: ``following`` are the stages after these two.

    Raises:
        AbliterateError: no direction was found; an ``output`` with nothing in it is removed, as another try may differ.
    """
    load_s = _load(session)  # if that fails, what was measured before is kept
    try:
        stages = ("measure", "select", *following)
        say_cost(session, stages, load_s=load_s, output=output, output_bytes=output_bytes)
        with Steps(output.private / STEPS, work_fingerprint(session)) as steps:
            chosen = select(session, measure(session, steps=steps, ahead=True), steps=steps)
            file = output.private / DIRECTION_FILE
            if output.keeps:
                direction_files.save(chosen, file)
            ranks.meet()
    except AbliterateError:
        output.discard()
        raise
    return direction_files.load(file)  # what a run that is stopped after this goes on with


def say_cost(
    session: Session,
    stages: Sequence[str],
    *,
    models: int = 2,
    load_s: float | None = None,
    output: OutputFolder | None = None,
    output_bytes: int = 0,
) -> None:
    """Load the model, and say about how long ``stages`` will take: out of core, by the weight passes.

    ``models`` write replies.  ``load_s`` is how long loading took, where that is done.  ``output_bytes`` are written to
    ``output``, where the edit is one of the stages.

    Raises:
        AbliterateError: the model cannot be loaded, or prompts that the stages need cannot be had.
    """
    load_s = _load(session) if load_s is None else load_s
    weights = session.loaded.offload
    if weights is not None:
        passes, pace = passes_of(session.recipe, stages, models=models), reading_speed(session)
        counts = counts_of(session, stages, models=models, output_bytes=0)
        arithmetic_s = whole_seconds(counts, stages, speed_of(session)) if pace else None
        staying = sum(unit.stored_bytes for unit in weights.units if unit.is_block and weights.stays(unit))
        text = cost(
            weights.size_bytes - staying, passes, staying_bytes=staying, bytes_per_s=pace, arithmetic_s=arithmetic_s
        )
        session.on_event(Noted(text=text))
        return
    written = None if output is None else writing_speed(output.path, output_bytes)
    if written:
        load_s = min(load_s, output_bytes / written)  # the first time, libraries were imported meanwhile
    counts = counts_of(session, stages, models=models, output_bytes=output_bytes)
    speed = speed_of(session, load_s=load_s, bytes_per_s=written)
    session.on_event(Noted(text=sentence(counts, stages, speed, left_out=not_counted(session.recipe, stages))))


def _load(session: Session) -> float:
    """Load the model, unless it is there; gives the seconds that took."""
    begun = time.perf_counter()
    _ = session.loaded
    return time.perf_counter() - begun


def fingerprint_of(edit_plan: EditPlan, recipe: Recipe, direction: DirectionSet | None) -> str:
    """What makes two runs the same: tool, source files, recipe, direction, edit.  Memory and device may differ."""
    options = recipe.flat(without=NOT_IN_WORK)
    given = None if direction is None else direction.sha256
    edit = None if edit_plan.stream is None else edit_plan.stream.sha256
    return fingerprint({**edit_plan.checkpoint.identity(), "recipe": options, "direction": given, "edit": edit})


def _prepared(out: Path, session: Session, edit_plan: EditPlan, direction: DirectionSet | None) -> OutputFolder:
    """The output folder; of several processes the first prepares it, and the others write shards into it."""
    work = fingerprint_of(edit_plan, session.recipe, direction)
    folder = None
    if ranks.is_first():
        options = {"fingerprint": work, "needed_bytes": edit_plan.output_bytes}
        folder = prepare(out, source=session.checkpoint.folder, **options)
    told: list[Any] = ranks.first(lambda: [str(folder.final), str(folder.path), folder.done] if folder else [])
    if folder is not None:
        return folder
    final, path, done = told
    if not Path(path).is_dir():
        raise OutputError(f"{path}: not seen by all processes", "choose an --out on a file system that they share")
    return OutputFolder(final=Path(final), path=Path(path), fingerprint=work, done=done, keeps=False)


def _resume_direction(output: OutputFolder) -> DirectionSet | None:
    path = output.private / DIRECTION_FILE
    if not ranks.first(path.is_file):
        return None
    try:
        return direction_files.load(path)
    except SourceError:
        return None  # cut off while it was written: measure again
