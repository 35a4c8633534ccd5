"""The stages, in order: measure, select, edit, verify, evaluate.  Each takes values and returns one.

Nothing here prints; ``on_event`` hears what happens.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abliterate import directions as direction_files
from abliterate import manifest
from abliterate.checkpoint.output import OutputFolder, copy_file, fingerprint, prepare, write_atomically
from abliterate.checkpoint.source import Checkpoint, open_folder
from abliterate.directions import DirectionSet
from abliterate.errors import AbliterateError, SourceError, UsageError, VerificationError
from abliterate.evaluate.evaluation import EvalReport
from abliterate.events import Noted, OnEvent, ignore
from abliterate.model import harness, measuring, vllm_backend
from abliterate.model.equivalence import Equivalence
from abliterate.model.memory import available_bytes
from abliterate.model.refusal import RefusalTokens, find_refusal_tokens, given_refusal_tokens
from abliterate.moments import Moments, RunningCovariance
from abliterate.passes import cost, passes_of
from abliterate.planning import EditPlan, plan
from abliterate.recipe import Recipe
from abliterate.scores import ScoreFile
from abliterate.selection import SelectionRule, choose
from abliterate.session import Session, open_session
from abliterate.steps import Steps
from abliterate.surgery import edit_checkpoint
from abliterate.trials import EDITED, Proof, side_by_side, task_request
from abliterate.verification import BytesReport, verify_bytes

DIRECTION_FILE = "direction.safetensors"
STEPS = "steps"
RECIPE_FILE = "recipe.toml"


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Proof on the bytes and, unless it was skipped, on the behaviour."""

    bytes: BytesReport
    behaviour: Equivalence | None

    @property
    def failures(self) -> tuple[str, ...]:
        """Everything that is not as it must be."""
        return (*self.bytes.failures, *(self.behaviour.failures if self.behaviour else ()))

    @property
    def ok(self) -> bool:
        """Verified."""
        return not self.failures


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a whole run did.  ``evaluation`` is None when the run was asked to skip it."""

    out: Path
    plan: EditPlan
    directions: DirectionSet
    verification: VerifyReport
    evaluation: EvalReport | None


def measure(
    session: Session, *, steps: Steps | None = None, covariance: Path | None = None, on_event: OnEvent = ignore
) -> DirectionSet:
    """Measure candidate directions: refusal tokens, filtered prompts, difference of means.

    ``steps`` keeps what is finished, so that the same call continues where it was stopped.  ``covariance`` is where to
    write the covariances of both classes at the last position.

    Raises:
        UsageError: there is no memory for the covariances.
        PromptError: the prompts or the chat template are unusable, or the model refuses nothing.
        NonFiniteError: an activation is NaN or infinite.
    """
    contrast, recipe, steps = session.contrast, session.recipe, steps or Steps()
    options = {"batch_size": recipe.batch_size, "on_event": on_event}
    tokens = RefusalTokens.of(steps.document("refusal-tokens", lambda: asdict(_refusal_tokens(session, options))))
    harmful, harmless = contrast.harmful_train.texts, contrast.harmless_train.texts
    kept = measuring.Filtered(
        harmful=tuple(harmful), harmless=tuple(harmless), harmful_before=len(harmful), harmless_before=len(harmless)
    )
    if recipe.filter_prompts:
        kept = _typical(session, harmful, harmless, tokens.ids, steps, "typical-train", options)

    def moments(kind: str, prompts: Sequence[str]) -> dict[str, Tensor]:
        wanted = loaded.n_layers if covariance is not None else 0
        spread = [RunningCovariance((loaded.d_model,)) for _ in range(wanted)] or None
        task = f"measure {kind} prompts"
        found = {"mean": measuring.mean_residual(loaded, chat, prompts, task=task, spread=spread, **options).mean}
        return {**found, "covariance": torch.stack([its.finish().covariance for its in spread])} if spread else found

    loaded, chat = session.loaded, session.chat
    if covariance is not None:
        _check_room_for_covariances(session)
    step = "mean" if covariance is None else "mean-and-covariance"
    stored = {
        kind: steps.tensors(f"{step}-{kind}", lambda kind=kind, prompts=prompts: moments(kind, prompts))
        for kind, prompts in (("harmful", kept.harmful), ("harmless", kept.harmless))
    }
    means = {
        kind: Moments(count=len(prompts), mean=stored[kind]["mean"])
        for kind, prompts in (("harmful", kept.harmful), ("harmless", kept.harmless))
    }
    measured = measuring.difference_of_means(chat, means["harmful"], means["harmless"])
    if covariance is not None:
        direction_files.save_covariances(
            covariance, {kind: replace(means[kind], covariance=its["covariance"]) for kind, its in stored.items()}
        )
    metadata = {
        "model": session.checkpoint.name,
        "revision": session.checkpoint.revision,
        "position_tokens": list(chat.position_tokens),
        "template_sha256": chat.template_sha256,
        "system": recipe.system,
        "prompts": contrast.hashes(),
        "kept": {"harmful_train": len(kept.harmful), "harmless_train": len(kept.harmless)},
        "refusal_tokens": {"ids": list(tokens.ids), "texts": list(tokens.texts)},
        "versions": manifest.versions(),
        "device": f"{loaded.device.type} ({platform.machine()})",
    }
    return replace(measured, metadata=metadata)


def select(
    session: Session, directions: DirectionSet, *, steps: Steps | None = None, on_event: OnEvent = ignore
) -> DirectionSet:
    """Score every candidate on the validation prompts and choose one by the paper's rule.

    ``steps`` keeps what is finished, so that the same call continues where it was stopped.

    Raises:
        PromptError: the validation prompts are unusable.
        UsageError: the directions were not measured on this model.
    """
    loaded, chat, recipe = session.loaded, session.chat, session.recipe
    if (directions.n_layers, directions.d_model) != (loaded.n_layers, loaded.d_model):
        raise UsageError(
            f"the directions are for {directions.n_layers} layers of width {directions.d_model}, "
            f"{loaded.name} has {loaded.n_layers} of width {loaded.d_model}",
            "measure them on this model",
        )
    options = {"batch_size": recipe.batch_size, "on_event": on_event}
    stored = directions.metadata.get("refusal_tokens", {}).get("ids")
    ids = tuple(stored) if stored else _refusal_tokens(session, options).ids
    harmful, harmless = session.contrast.harmful_val.texts, session.contrast.harmless_val.texts
    steps = steps or Steps()
    prompts = _typical(session, harmful, harmless, ids, steps, "typical-val", options)
    kept = steps.path("scores.safetensors")
    store = ScoreFile(kept) if kept else None
    scores = measuring.score_candidates(loaded, chat, directions, prompts, ids, store=store, **options)
    rule = SelectionRule(max_kl_nats=recipe.max_kl_nats, min_induce=recipe.min_induce, prune_layers=recipe.prune_layers)
    choice, judged = choose(scores, directions.n_layers, rule)
    if choice.rule == "pareto-fallback":
        on_event(Noted(text="no candidate passes the paper's rule: took the knee of the Pareto front of bypass and KL"))
    return replace(directions, scores=judged, choice=choice)


def _check_room_for_covariances(session: Session) -> None:
    """Check that the covariances of both classes fit into memory, in float64.

    Raises:
        UsageError: they do not.
    """
    loaded = session.loaded
    needed = 2 * loaded.n_layers * loaded.d_model**2 * torch.float64.itemsize
    free = session.recipe.memory_bytes or available_bytes()
    if needed > free:
        raise UsageError(
            f"covariances of {loaded.n_layers} layers of width {loaded.d_model} take {needed / 2**30:,.2f} GiB of "
            f"memory, and there are {free / 2**30:,.2f}",
            "give more --memory, or leave out --covariance",
        )


def _typical(
    session: Session,
    harmful: Sequence[str],
    harmless: Sequence[str],
    refusal_ids: Sequence[int],
    steps: Steps,
    name: str,
    options: Mapping[str, Any],
) -> measuring.Filtered:
    """Prompts on which the model behaves as their class says."""

    def find() -> dict[str, Any]:
        return asdict(measuring.keep_typical(session.loaded, session.chat, harmful, harmless, refusal_ids, **options))

    found = steps.document(name, find)
    return measuring.Filtered(
        harmful=tuple(found["harmful"]),
        harmless=tuple(found["harmless"]),
        harmful_before=found["harmful_before"],
        harmless_before=found["harmless_before"],
    )


def edit(
    edit_plan: EditPlan,
    directions: DirectionSet,
    output: OutputFolder,
    recipe: Recipe,
    *,
    on_event: OnEvent = ignore,
) -> None:
    """Write the edited checkpoint, without manifest and card, into ``output``."""
    base = edit_plan.checkpoint
    edit_checkpoint(
        edit_plan,
        directions.direction[:, None],
        output,
        rounding=recipe.rounding,
        memory_bytes=recipe.edit_memory_bytes,
        on_event=on_event,
    )
    keep_origin(base, directions, recipe, output)


def keep_origin(base: Checkpoint, directions: DirectionSet, recipe: Recipe, output: OutputFolder) -> None:
    """Put the direction, the recipe, and what the base says of itself, into the private folder of ``output``."""
    direction_files.save(directions, output.private / DIRECTION_FILE)
    write_atomically(output.private / RECIPE_FILE, recipe.to_toml().encode())
    for name in ("README.md", manifest.FILE_NAME):
        if (base.folder / name).is_file():
            copy_file(base.folder / name, output.private / f"base-{name}")


def verify(
    session: Session,
    edit_plan: EditPlan,
    directions: DirectionSet,
    written: Path,
    *,
    behaviour: bool = True,
    on_event: OnEvent = ignore,
) -> VerifyReport:
    """Prove the checkpoint in ``written`` on its bytes and, with ``behaviour``, against hooks on the base.

    Raises:
        SourceError: something cannot be read.
    """
    on_bytes = verify_bytes(edit_plan, directions.direction[:, None], written, on_event=on_event)
    if not behaviour or not on_bytes.ok:
        return VerifyReport(bytes=on_bytes, behaviour=None)
    say_cost(session, passes_of(session.recipe, ["verify"]))
    edited = open_folder(written, name=str(written))
    proof = Proof(plan=edit_plan, directions=directions)
    compared, _ = side_by_side(session, [(EDITED, edited)], proof=proof, with_replies=False, on_event=on_event)
    return VerifyReport(bytes=on_bytes, behaviour=compared)


def check_evaluation(recipe: Recipe) -> None:
    """Find out before hours of work what an evaluation would stop at after them.

    Raises:
        UsageError: a task cannot be had, or vLLM not be used; see ``harness.check_tasks``, ``vllm_backend.check_vllm``.
    """
    if recipe.backend == "vllm":
        vllm_backend.check_vllm(dtype=recipe.dtype, controls=recipe.controls)
    harness.check_tasks(task_request(recipe))


def evaluate(
    session: Session,
    others: Sequence[tuple[str, Checkpoint]],
    *,
    directions: DirectionSet | None = None,
    on_event: OnEvent = ignore,
) -> EvalReport:
    """Compare replies and distributions of the base and other checkpoints (name, checkpoint) on the test prompts.

    ``directions``, where known, are what the controls of the recipe and the components of prompts refer to.

    Raises:
        SourceError: one of them cannot be loaded.
    """
    check_evaluation(session.recipe)
    for checkpoint in [session.checkpoint, *(other for _, other in others)]:
        replace(session, checkpoint=checkpoint).modes  # noqa: B018 - refused before long work
    controls = session.recipe.controls and directions is not None
    say_cost(session, passes_of(session.recipe, ["replies"], models=1 + len(others)))
    _, evaluated = side_by_side(session, others, directions=directions, controls=controls, on_event=on_event)
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

    Raises:
        AbliterateError: see ``errors`` for everything that can go wrong.
    """
    if with_evaluation:
        check_evaluation(recipe)
    session = open_session(model, recipe, revision=revision, on_event=on_event)
    edit_plan = plan(session.checkpoint, **recipe.plan_options)
    recipe = session.recipe
    contrast = session.contrast  # bad prompts fail here, before minutes of work
    if with_evaluation:
        session.modes  # noqa: B018 - and a template without a switch for thinking
    output = prepare(
        out,
        source=session.checkpoint.folder,
        fingerprint=fingerprint_of(edit_plan, recipe, direction),
        needed_bytes=edit_plan.output_bytes,
    )
    directions = direction or _resume_direction(output)
    measuring_first = directions is None
    stages = [*(("measure", "select") if measuring_first else ()), "verify", *(("replies",) if with_evaluation else ())]
    passes = passes_of(recipe, stages)
    if directions is None:
        say_cost(session, passes)
        try:
            with Steps(output.private / STEPS, work_fingerprint(session)) as steps:
                measured = measure(session, steps=steps, on_event=on_event)
                directions = select(session, measured, steps=steps, on_event=on_event)
                direction_files.save(directions, output.private / DIRECTION_FILE)
        except AbliterateError:
            output.discard()  # there is nothing in it yet, and another try may differ
            raise
    edit(edit_plan, directions, output, recipe, on_event=on_event)
    verification = verify(session, edit_plan, directions, output.path, behaviour=False, on_event=on_event)
    require_verified(verification, output)
    if not measuring_first:
        say_cost(session, passes)  # only here: the edit and its proof need no model in memory
    edited = open_folder(output.path, name=str(out))
    behaviour, evaluated = side_by_side(
        session,
        [(EDITED, edited)],
        proof=Proof(plan=edit_plan, directions=directions),
        directions=directions,
        controls=recipe.controls,
        with_replies=with_evaluation,
        on_event=on_event,
    )
    verification = VerifyReport(bytes=verification.bytes, behaviour=behaviour)
    require_verified(verification, output)
    document = manifest.build(
        edit_plan, directions, recipe, prompts=contrast.hashes(), verification=verification, evaluation=evaluated
    )
    manifest.finish(output, edit_plan, document)
    return RunResult(
        out=output.finish(), plan=edit_plan, directions=directions, verification=verification, evaluation=evaluated
    )


def say_cost(session: Session, passes: dict[str, int]) -> None:
    """Load the model and, where it runs out of core, say what that will cost."""
    if session.loaded.offload is not None:
        session.on_event(Noted(text=cost(session.loaded.offload.size_bytes, passes)))


def require_verified(report: VerifyReport, output: OutputFolder) -> None:
    """Stop unless everything was proven; the unfinished output keeps its ``.partial`` name.

    Raises:
        VerificationError: names the first failure.
    """
    if report.ok:
        return
    failures = list(report.failures)
    more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    raise VerificationError(
        f"verification failed: {failures[0]}{more}",
        f"nothing was written under {output.final}; look at {output.path}, and delete it before trying again",
    )


def fingerprint_of(edit_plan: EditPlan, recipe: Recipe, direction: DirectionSet | None) -> str:
    """What makes two runs the same: tool, source files, recipe, direction.  Memory and device may differ."""
    free = {"memory_bytes", "device_memory_bytes", "device", "dtype", "batch_size", "title"}
    options = recipe.model_dump(exclude=free)
    given = None if direction is None else direction.sha256
    return fingerprint({**edit_plan.checkpoint.identity(), "recipe": options, "direction": given})


def work_fingerprint(session: Session) -> str:
    """What makes two measurements the same: tool, source files, and every option that touches the numbers."""
    free = {"memory_bytes", "device_memory_bytes", "batch_size", "title"}
    return fingerprint({**session.checkpoint.identity(), "recipe": session.recipe.model_dump(exclude=free)})


def _resume_direction(output: OutputFolder) -> DirectionSet | None:
    path = output.private / DIRECTION_FILE
    if not path.is_file():
        return None
    try:
        return direction_files.load(path)
    except SourceError:
        return None  # cut off while it was written: measure again


def _refusal_tokens(session: Session, options: Mapping[str, Any]) -> RefusalTokens:
    if session.recipe.refusal_tokens:
        return given_refusal_tokens(session.chat, session.recipe.refusal_tokens)
    contrast = session.contrast
    return find_refusal_tokens(
        session.loaded, session.chat, contrast.harmful_train.texts, contrast.harmless_train.texts, **options
    )
