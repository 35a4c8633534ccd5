"""The Python interface: one function for each command, returning values and printing nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.arch.edit_plan import EditPlan
from abliterate.checkpoint.file_names import at_home
from abliterate.checkpoint.finished import finished_folder
from abliterate.checkpoint.hub import fetch
from abliterate.checkpoint.output import prepare
from abliterate.data.bundled import is_bundled, open_model
from abliterate.editing.asked import plan_asked, stream_asked
from abliterate.editing.planning import along, plan
from abliterate.errors import UsageError
from abliterate.evaluate.evaluation import EvalReport
from abliterate.evaluate.inspection import Inspection
from abliterate.events import Noted, OnEvent, ignore
from abliterate.exports import control_vector, projection
from abliterate.exports.dequantising import dequantise
from abliterate.exports.importing import Half, ImportReport
from abliterate.exports.importing import import_gguf as _import_gguf
from abliterate.exports.lora import AdapterReport
from abliterate.exports.lora import export as _export_lora
from abliterate.exports.patches import export as patch_writing
from abliterate.exports.patches import use as patches
from abliterate.exports.patches.export import PatchReport, Purpose
from abliterate.exports.projection import Projection
from abliterate.method.directions import DirectionSet
from abliterate.method.hardening import Hardening
from abliterate.method.stream_edit import StreamEdit
from abliterate.model.words import load_words
from abliterate.publishing import manifest, relay
from abliterate.publishing import push as publishing
from abliterate.publishing.finished import FinishedEdit, planned_edits
from abliterate.publishing.hardened import Hardened
from abliterate.publishing.push import Published
from abliterate.recipe import Recipe, load_recipe
from abliterate.verification.comparison import Diff
from abliterate.verification.comparison import diff as _diff
from abliterate.verification.report import VerifyReport
from abliterate.workflow import hardening, inspecting, pipeline, reproducing
from abliterate.workflow.auditing import audit
from abliterate.workflow.chatting import chat, reply
from abliterate.workflow.healing import HealingOptions, heal
from abliterate.workflow.pipeline import RunResult
from abliterate.workflow.reproducing import Reproduction
from abliterate.workflow.session import open_session
from abliterate.workflow.trials import EDITED
from abliterate.workflow.trying_categories import try_categories as categories
from abliterate.workflow.words import ask_words

__all__ = [
    "HealingOptions", "Recipe", "apply_patch", "ask_words", "audit", "categories", "chat", "compare", "dequantize",
    "diff", "edit", "eval", "export_control_vector", "export_lora", "export_patch", "export_projection", "harden",
    "heal", "import_gguf", "inspect", "load_recipe", "measure", "open_session", "plan", "push", "reply", "reproduce",
    "revert_patch", "run", "select", "stream", "verify",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EditResult:
    """A finished folder and the plan it came from."""

    out: Path
    plan: EditPlan


def measure(
    model: str | Path | None = None,
    recipe: Recipe | None = None,
    *,
    covariance: str | Path | None = None,
    on_event: OnEvent = ignore,
) -> DirectionSet:
    """Measure candidate directions of ``model`` (None: the bundled one); see ``finding.measure``."""
    recipe = recipe or Recipe()
    pipeline.check_names(recipe)
    session = open_session(model, recipe, on_event=on_event)
    return pipeline.measure(session, covariance=Path(covariance) if covariance else None)


def select(
    model: str | Path | None,
    directions: DirectionSet,
    recipe: Recipe | None = None,
    *,
    on_event: OnEvent = ignore,
) -> DirectionSet:
    """Score and choose among measured candidates; see ``pipeline.select``."""
    return pipeline.select(open_session(model, recipe or Recipe(), on_event=on_event), directions)


def inspect(
    model: str | Path | None,
    directions: DirectionSet,
    recipe: Recipe | None = None,
    *,
    suffix: str = "",
    on_event: OnEvent = ignore,
) -> Inspection:
    """What writes a direction, and how much of it prompts carry; see ``inspecting.inspect``."""
    return inspecting.inspect(open_session(model, recipe or Recipe(), on_event=on_event), directions, suffix=suffix)


def edit(
    model: str | Path | None,
    direction: DirectionSet,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    revision: str | None = None,
    change: StreamEdit | None = None,
    on_event: OnEvent = ignore,
) -> EditResult:
    """Write ``model`` without ``direction`` to ``out``, with a manifest; unverified.

    ``change`` is what else than removing it shall happen to the residual stream; ``direction`` then says where that
    came from, and the manifest that the edit was given.

    Raises:
        AbliterateError: the plan refuses, or reading or writing fails.
    """
    recipe = recipe or Recipe()
    pipeline.check_names(recipe)
    checkpoint = fetch(open_model(model, revision=revision))
    made = plan(checkpoint, **recipe.plan_options)
    made = along(made, change) if change else plan_asked(made, recipe.edit, direction)
    fingerprint = pipeline.fingerprint_of(made, recipe, direction)
    output = prepare(Path(out), source=checkpoint.folder, fingerprint=fingerprint, needed_bytes=made.output_bytes)
    pipeline.edit(made, direction, output, recipe, on_event=on_event)
    document = manifest.build(made, direction, recipe)
    if change is not None:
        document["edit"]["given"] = True  # no recipe makes it again
    manifest.finish(output, made, document)
    return EditResult(out=output.finish(), plan=made)


def diff(base: str | Path, edited: str | Path, *, revision: str | None = None, on_event: OnEvent = ignore) -> Diff:
    """Compare two checkpoints; see ``verification.comparison.diff``.

    Where ``edited`` is a folder that abliterate finished, its changes are held against its own plan as well.

    Raises:
        SourceError: one of them cannot be read, or the manifest of ``edited``.
    """
    return _diff(
        base, edited, revision=revision, planned=planned_edits(edited, base, on_event=on_event), on_event=on_event
    )


def dequantize(model: str | Path, out: str | Path, *, revision: str | None = None, on_event: OnEvent = ignore) -> Path:
    """Write an FP8 or MXFP4 checkpoint as bfloat16 to ``out``; gives back the folder.

    Raises:
        AbliterateError: it is not quantised in a format known here, or reading or writing fails.
    """
    checkpoint = fetch(open_model(model, revision=revision))
    return dequantise(checkpoint, Path(out), on_event=on_event)


def harden(
    model: str | Path | None,
    out: str | Path,
    options: Hardening | None = None,
    *,
    recipe: Recipe | None = None,
    refusals: str | Path | None = None,
    n_prompts: int = 32,
    revision: str | None = None,
    on_event: OnEvent = ignore,
) -> Hardened:
    """Train ``model`` to refuse where its refusal direction is gone, and write it to ``out``; see ``hardening``."""
    recipe = recipe or Recipe()
    pipeline.check_names(recipe)
    session, given = open_session(model, recipe, revision=revision, on_event=on_event), refusals and Path(refusals)
    return hardening.harden(session, Path(out), options or Hardening(), refusals=given or None, n_prompts=n_prompts)


def import_gguf(
    gguf: str | Path, out: str | Path, *, dtype: Half | None = None, on_event: OnEvent = ignore
) -> ImportReport:
    """Write a GGUF file as a checkpoint to ``out``; see ``importing.import_gguf``."""
    return _import_gguf(at_home(gguf), Path(out), dtype=dtype, on_event=on_event)


def export_lora(
    base: str | Path,
    out: str | Path,
    *,
    edited: str | Path | None = None,
    revision: str | None = None,
    direction: DirectionSet | None = None,
    gguf: str | Path | None = None,
    on_event: OnEvent = ignore,
) -> AdapterReport:
    """The edit as a PEFT adapter: along ``direction``, or with direction and options of an ``edited`` checkpoint.

    ``edited`` is a folder that abliterate wrote, or its name on the Hub, at ``revision``.  ``gguf`` names a file that
    is to hold the same for llama.cpp.

    Raises:
        UsageError: neither is given, or the ``gguf`` library is missing.
        PlanRefusedError: an adapter cannot express any of it.
    """
    recipe = Recipe()
    finished = None if edited is None else FinishedEdit.open(edited, revision=revision)
    checkpoint, beside = fetch(open_model(base)), None if gguf is None else Path(gguf)
    if direction is None:
        if finished is None:
            raise UsageError("an adapter needs a direction", "give one, or an edited folder")
        return _export_lora(finished.plan(checkpoint), Path(out), gguf=beside, on_event=on_event)
    made = plan(checkpoint, **(recipe if finished is None else finished.recipe).plan_options)
    made = along(made, stream_asked(recipe.edit, direction, made.model_map.n_layers))
    return _export_lora(made, Path(out), gguf=beside, on_event=on_event)


def export_control_vector(direction: DirectionSet, out: str | Path) -> list[int]:
    """The direction as a control vector of llama.cpp; gives the blocks that add: see ``control_vector``."""
    return control_vector.export(direction, Path(out))


def export_projection(direction: DirectionSet, out: str | Path, *, blocks: int | None = None) -> Projection:
    """The direction as a projection file (GLP), for a model of ``blocks`` blocks; see ``projection``."""
    return projection.export(direction, Path(out), n_blocks=blocks)


def export_patch(
    edited: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    purposes: Sequence[Purpose] = ("apply", "revert"),
    on_event: OnEvent = ignore,
) -> PatchReport:
    """The edit as one file, to be applied to a base, or taken back; see ``patches.export``.

    ``edited`` is a folder that abliterate wrote, or its name on the Hub, at ``revision``.
    """
    folder = finished_folder(edited, revision=revision).path
    return patch_writing.export(folder, base, Path(out), purposes=purposes, on_event=on_event)


def apply_patch(base: str | Path, patch: str | Path, out: str | Path, *, on_event: OnEvent = ignore) -> Path:
    """Write ``base`` with the edit of a patch to ``out``; see ``patches.use``."""
    return patches.apply(base, Path(patch), Path(out), on_event=on_event)


def revert_patch(
    edited: str | Path,
    patch: str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    on_event: OnEvent = ignore,
) -> Path:
    """Write the base of ``edited`` to ``out``; see ``patches.use``."""
    return patches.revert(edited, Path(patch), Path(out), revision=revision, on_event=on_event)


def reproduce(
    folder: str | Path,
    *,
    revision: str | None = None,
    base: str | Path | None = None,
    measure: bool = False,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> Reproduction:
    """Make a finished folder again from its manifest, and compare the bytes; see ``reproducing``.

    ``folder`` may be a name on the Hub, at ``revision``: then the copy is made in the current folder.
    """
    place = finished_folder(folder, revision=revision)
    beside = Path.cwd() if place.from_hub else None
    return reproducing.reproduce(
        place.path, base=base, measure=measure, beside=beside, trust_remote_code=trust_remote_code, on_event=on_event
    )


def verify(
    folder: str | Path,
    *,
    revision: str | None = None,
    base: str | Path | None = None,
    changes: Mapping[str, Any] | None = None,
    behaviour: bool = True,
    on_event: OnEvent = ignore,
) -> VerifyReport:
    """Prove a finished folder against its base; prompts and options come from its manifest unless ``changes`` says.

    ``folder`` may be a name on the Hub, at ``revision``.  Without prompts (an ``edit`` with a given direction) the
    behaviour is not compared.  What was proven goes into the manifest and the card of a folder (not of the Hub cache)
    that was not verified before.

    Raises:
        CheckpointError: not a folder that abliterate finished, or a file is damaged.
    """
    finished = FinishedEdit.open(folder, revision=revision).with_changes(changes or {})
    recipe, name = finished.recipe, base or finished.base_name
    session = open_session(name, recipe, revision=finished.revision_of(base), on_event=on_event)
    made = finished.plan(session.checkpoint)
    has_prompts = bool(recipe.find.harmful and recipe.find.harmless) or is_bundled(name)
    if behaviour and not has_prompts:
        on_event(Noted(text=pipeline.NOT_COMPARED))
    report = pipeline.verify(session, made, finished.folder, behaviour=behaviour and has_prompts)
    if report.ok and finished.document["verification"] is None and not finished.from_hub:
        manifest.record(finished.folder, session.checkpoint, report)
    return report


def push(
    folder: str | Path,
    name: str,
    *,
    private: bool = False,
    branch: str | None = None,
    message: str | None = None,
    base: str | Path | None = None,
    verify: bool = True,
    on_event: OnEvent = ignore,
) -> Published:
    """Upload a finished and verified folder to the Hub; see ``publishing.push``."""
    return publishing.push(
        Path(folder), name, private=private, branch=branch, message=message, base=base, verify=verify,
        on_event=on_event,
    )  # fmt: skip


def stream(
    model: str,
    direction: DirectionSet,
    name: str,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    revision: str | None = None,
    branch: str | None = None,
    private: bool | None = None,
    message: str | None = None,
    on_event: OnEvent = ignore,
) -> Published:
    """Edit a model of the Hub and upload the result, shard by shard; see ``relay.stream``.

    ``private`` is what the recipe says, unless given.
    """
    recipe = recipe or Recipe()
    pipeline.check_names(recipe)
    private = recipe.publish.private if private is None else private
    return relay.stream(
        model, direction, name, Path(out), recipe, revision=revision, branch=branch, private=private, message=message,
        on_event=on_event,
    )  # fmt: skip


def eval(
    base: str | Path | None,
    edited: str | Path,
    recipe: Recipe | None = None,
    *,
    directions: DirectionSet | None = None,
    words: str | Path | None = None,
    third: str | Path | None = None,
    on_event: OnEvent = ignore,
) -> EvalReport:
    """Compare replies of ``base`` and ``edited``; see ``pipeline.evaluate``.

    ``words`` is a file of words, whose likelihood is compared as well (``ask_words``: alone), also a ``third`` model's.
    """
    listed = None if words is None else load_words(str(words))
    session = open_session(base, recipe or Recipe(), on_event=on_event)
    opened, other = fetch(open_model(edited)), None if third is None else fetch(open_model(third))
    return pipeline.evaluate(session, [(EDITED, opened)], directions=directions, words=listed, third=other)


def compare(
    base: str | Path | None,
    others: Sequence[str | Path],
    recipe: Recipe | None = None,
    *,
    on_event: OnEvent = ignore,
) -> EvalReport:
    """Hold any checkpoints against ``base`` on the same prompts; see ``pipeline.evaluate``."""
    session = open_session(base, recipe or Recipe(), on_event=on_event)
    opened = [(str(other), fetch(open_model(other))) for other in others]
    return pipeline.evaluate(session, opened)


def run(
    model: str | Path | None = None,
    out: str | Path = "abliterated",
    recipe: Recipe | None = None,
    *,
    direction: DirectionSet | None = None,
    on_event: OnEvent = ignore,
) -> RunResult:
    """The whole job; see ``pipeline.run``."""
    return pipeline.run(model, Path(out), recipe or Recipe(), direction=direction, on_event=on_event)
