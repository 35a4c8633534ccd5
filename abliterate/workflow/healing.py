"""Healing an edited checkpoint: taught by its base, merged shard by shard from the base's bytes, and proven again."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from abliterate.arch.edit_plan import EditPlan
from abliterate.checkpoint import healing_file
from abliterate.checkpoint.output import OutputFolder, check_place, fingerprint, prepare
from abliterate.checkpoint.source import Checkpoint, open_folder
from abliterate.editing.healing import healable, healed
from abliterate.errors import AbliterateError, PlanRefusedError, TooFewPromptsError, UsageError, VerificationError
from abliterate.evaluate.evaluation import EvalReport
from abliterate.evaluate.replies import SCORERS, is_refusal
from abliterate.events import Noted, OnEvent, ignore, working
from abliterate.method.statistics import Difference, paired_difference
from abliterate.model.healing import Adapter, Classroom, Healed, Lesson, Lessons, Schedule, lessons, peft_library, train
from abliterate.model.healing_dpo import pairs_of, train_by_preference, trl_library
from abliterate.model.prompts import PromptSet
from abliterate.model.room import check_held, out_of_memory_is
from abliterate.publishing import manifest
from abliterate.publishing.finished import FinishedEdit
from abliterate.publishing.keeping import require_verified
from abliterate.verification.report import VerifyReport
from abliterate.workflow import pipeline
from abliterate.workflow.session import Session, open_session
from abliterate.workflow.trials import EDITED, side_by_side

Method = Literal["kl", "dpo"]
METHODS: Mapping[Method, str] = {
    "kl": "KL to the base's distributions along its own replies, and to the edited model's where it is to stay",
    "dpo": "direct preference optimisation (trl): the base's reply is preferred to the edited model's",
}
HEALED = "healed"
FEWEST_TRAINING, FEWEST_VALIDATION = 8, 4
TOKENS = 48
"""Of a reply, unless said otherwise."""
KEPT_TOKENS = 16
"""Of a reply of the edited model that is to stay as it is: whether a model refuses shows in these."""


@dataclass(frozen=True, kw_only=True)
class HealingOptions:
    """How an edited checkpoint is healed; ``most_prompts`` of every part of the prompts are used."""

    method: Method = "kl"
    rank: int = 8
    most_prompts: int = 128
    schedule: Schedule = field(default_factory=Schedule)


@dataclass(frozen=True, kw_only=True)
class HealResult:
    """A healed checkpoint; ``about`` is the section of its manifest that says how it was healed and what that gave."""

    out: Path
    plan: EditPlan
    about: Mapping[str, Any]
    verification: VerifyReport
    evaluation: EvalReport


def heal(
    edited: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    changes: Mapping[str, Any] | None = None,
    options: HealingOptions | None = None,
    on_event: OnEvent = ignore,
) -> HealResult:
    """Heal ``edited``, a folder that abliterate finished (or its name on the Hub), and write the result to ``out``.

    ``changes`` are options of a recipe: prompts, length of replies, device, memory.  A run that was stopped continues:
    what was trained, and the finished shards, are kept in ``out.partial``.

    Raises:
        CheckpointError: not a folder that abliterate finished.
        UsageError: a library is missing, memory does not suffice, or ``base`` is of another family.
        TooFewPromptsError: there are too few prompts to learn from, or to say when to stop.
        PlanRefusedError: such an edit cannot be healed, or training made nothing better.
        VerificationError: ``edited`` is not ``base`` with its edit, or the result is not what was planned.
    """
    options, changes = options or HealingOptions(), {"max_new_tokens": TOKENS, **(changes or {})}
    (trl_library if options.method == "dpo" else peft_library)()
    finished = FinishedEdit.open(edited, revision=revision)
    source = open_folder(finished.folder, name=str(edited))
    session = _session(finished, source, base, changes, options, on_event)
    made = finished.plan(session.checkpoint)
    healable(made)
    check_place(Path(out).absolute(), finished.folder)
    _check_prompts(session)
    pipeline.check_evaluation(session.recipe)
    on_bytes = pipeline.verify(session, made, finished.folder, behaviour=False)
    if not on_bytes.ok:
        raise VerificationError(
            f"{edited}: is not {session.checkpoint.name} with its edit: {on_bytes.failures[0]}",
            "give the base that it was made from, or edit the base again",
        )
    output = prepare(
        Path(out),
        source=session.checkpoint.folder,
        fingerprint=_fingerprint(session, made, options),
        needed_bytes=made.output_bytes,
    )
    about = _trained(session, source, made, options, output)
    return _merged(session, source, finished, made, about, output)


def _session(
    finished: FinishedEdit,
    source: Checkpoint,
    base: str | Path | None,
    changes: Mapping[str, Any],
    options: HealingOptions,
    on_event: OnEvent,
) -> Session:
    """The base, under the recipe of the edit with ``changes``."""
    name, recipe = base or finished.base_name, finished.recipe.with_changes(changes)
    opened = open_session(name, recipe, revision=finished.revision_of(base), on_event=on_event)
    if opened.checkpoint.model_type != source.model_type:
        raise UsageError(
            f"{opened.checkpoint.name} is of the family {opened.checkpoint.model_type}, {source.name} of "
            f"{source.model_type}",
            "give the base that it was made from",
        )
    return Session(
        checkpoint=opened.checkpoint, recipe=opened.recipe, on_event=on_event, most_prompts=options.most_prompts
    )


def _check_prompts(session: Session) -> None:
    """Check that there are prompts to learn from, and to stop by.

    Raises:
        TooFewPromptsError: there are not.
    """
    for _, what, part, fewest in _parts(session):
        if len(part.prompts) < fewest:
            raise TooFewPromptsError(
                f"{part.source}: {len(part.prompts)} harmless prompts {what}, and it takes {fewest}",
                "give more by --harmless, or a larger --prompts",
            )


def _parts(session: Session) -> tuple[tuple[str, str, PromptSet, int], ...]:
    """The name of each part of the harmless prompts, what it is for, its prompts, and how many it takes."""
    contrast = session.contrast
    return (
        ("training", "to learn from", contrast.harmless_train, FEWEST_TRAINING),
        ("validation", "to say when to stop", contrast.harmless_val, FEWEST_VALIDATION),
    )


def _harmful(session: Session, method: Method) -> dict[str, PromptSet]:
    """The harmful prompts of each part that are replied to as before; by preferences nothing is trained on them."""
    contrast = session.contrast
    training = {"training": contrast.harmful_train} if method == "kl" else {}
    return {**training, "validation": contrast.harmful_val}


def _fingerprint(session: Session, made: EditPlan, options: HealingOptions) -> str:
    recipe = pipeline.fingerprint_of(made, session.recipe, None)
    aim = METHODS[options.method], KEPT_TOKENS
    prompts = {name: part["sha256"] for name, part in session.contrast.hashes().items()}
    return fingerprint({"heal": asdict(options), "aim": aim, "edit": recipe, "prompts": prompts})


def _trained(
    session: Session, source: Checkpoint, made: EditPlan, options: HealingOptions, output: OutputFolder
) -> dict[str, Any]:
    """What training came to lies in ``output`` afterwards, or lay there; gives what is to be said of it."""
    file = output.private / healing_file.NAME
    if (known := healing_file.about(file)) is not None:
        session.on_event(Noted(text="continued: the adapter was trained before"))
        return known
    try:
        found, counts = _train(session, source, made, options)
        if not found.best:
            raise PlanRefusedError(
                f"{source.name}: none of {found.steps} steps brought it closer to its base on the validation prompts "
                f"(KL {found.before.learned:.4f} nats per token) without moving what is to stay: nothing is written",
                "the edit leaves little to heal, or try more --prompts, another --rank or a smaller --rate",
            )
    except AbliterateError:
        output.discard()
        raise
    session.on_event(
        Noted(
            text=f"trained: on validation prompts KL to the base from {found.before.learned:.4f} to "
            f"{found.after.learned:.4f} nats per token, to the edited model where it is to stay "
            f"{found.after.kept:.4f}; step {found.best} of {found.steps} was best"
        )
    )
    about = _about(session, found, options, counts)
    healing_file.save(found.added, file, about)
    return about


def _train(
    session: Session, source: Checkpoint, made: EditPlan, options: HealingOptions
) -> tuple[Healed, Mapping[str, int]]:
    """What training gives, and counts of prompts: of pairs, with preferences, and by part.

    The base, and then the edited model is in memory.

    Raises:
        UsageError: memory does not suffice.
        TooFewPromptsError: the base answers too few prompts.
    """
    recipe, on_event = session.recipe, session.on_event
    settings = {"batch_size": recipe.model.batch_size, "on_event": on_event}
    tokens = recipe.evaluate.max_new_tokens
    learned, refused = _answers(session)
    stay = {name: [*refused[name], *its.texts] for name, its in _harmful(session, options.method).items()}
    pads = session.chat.pads
    session.release()
    edited = _held(Session(checkpoint=source, recipe=recipe, on_event=on_event, pads=pads))
    said = UsageError(
        f"{source.name}: memory ran out while it was healed",
        "give a smaller --max-new-tokens, --dtype bfloat16, or take a machine with more memory",
    )
    with out_of_memory_is(said), ExitStack() as afterwards:
        afterwards.callback(edited.release)
        loaded, chat, schedule = edited.loaded, edited.chat, options.schedule
        settings_of_kept = {"max_new_tokens": _kept_tokens(session), "task": "replies of the edited model to stay"}
        kept = {name: lessons(loaded, chat, its, **settings_of_kept, **settings) for name, its in stay.items()}
        training, validation = (Lessons(its, kept.get(name, [])) for name, its in zip(refused, learned, strict=True))
        pairs = None
        if options.method == "dpo":
            pairs = pairs_of(loaded, chat, training.learned, max_new_tokens=tokens, **settings)
            dropped = len(training.learned) - len(pairs)
            on_event(Noted(text=f"{dropped} of {len(training.learned)} pairs are dropped: both models reply the same"))
        adapter = Adapter(loaded, made, healable(made), rank=options.rank, seed=recipe.find.seed)
        room = Classroom.of(loaded, chat, training, validation, schedule.batch)
        with working(on_event, "heal", schedule.most_steps, "steps") as advance:
            if pairs is None:
                found = train(room, adapter, schedule, seed=recipe.find.seed, advance=advance)
            else:
                found = train_by_preference(room, adapter, pairs, schedule, seed=recipe.find.seed, advance=advance)
            advance(schedule.most_steps - found.steps)
    return found, {
        **{name: len(its) for name, its in refused.items()},
        **({} if pairs is None else {"pairs": len(pairs)}),
    }


def _kept_tokens(session: Session) -> int:
    """Of a reply that is to stay, how many tokens count."""
    return min(session.recipe.evaluate.max_new_tokens, KEPT_TOKENS)


def _answers(session: Session) -> tuple[list[list[Lesson]], dict[str, list[str]]]:
    """What the base teaches on the harmless prompts of each part that it answers, and those that it refuses.

    Its refusals of harmless prompts went with the others, and are not to be taught.

    Raises:
        UsageError: memory does not suffice.
        TooFewPromptsError: too few are left.
    """
    recipe, found, every = session.recipe, [], {}
    scorer, loaded = SCORERS[recipe.evaluate.scorer], _held(session).loaded
    for name, _, part, fewest in _parts(session):
        refusing: list[str] = []

        def answers(prompt: str, reply: str, refusing: list[str] = refusing) -> bool:
            refusing += [prompt] if is_refusal(prompt, reply, scorer) else []
            return prompt not in refusing

        taught = lessons(
            loaded, session.chat, part.texts, teaches=answers, max_new_tokens=recipe.evaluate.max_new_tokens,
            batch_size=recipe.model.batch_size, task="replies of the base to learn from", on_event=session.on_event,
        )  # fmt: skip
        found.append(taught)
        every[name] = refusing
        if refusing:
            said = f"the base refuses {len(refusing)} of {len(part.prompts)} harmless {name} prompts: these are not"
            session.on_event(Noted(text=f"{said} learned from it, and replied to as before"))
        if len(taught) < fewest:
            raise TooFewPromptsError(
                f"{part.source}: the base answers {len(taught)} of {len(part.prompts)} {name} prompts, and it takes "
                f"{fewest}",
                "give prompts that it answers by --harmless, or a larger --prompts",
            )
    return found, every


def _held(session: Session) -> Session:
    """``session``, once its model is known to be held in memory.

    Raises:
        UsageError: it runs out of core, where gradients cannot flow.
    """
    hint = "give it more --memory or --device-memory, or take a machine with more"
    check_held(session.loaded, "healing trains", hint)
    return session


def _about(session: Session, found: Healed, options: HealingOptions, counts: Mapping[str, int]) -> dict[str, Any]:
    """What is to be said of training; ``counts`` as ``_train`` gives them."""
    libraries = ("peft", "trl") if options.method == "dpo" else ("peft",)
    return {
        "method": options.method,
        "objective": METHODS[options.method],
        "rank": options.rank,
        "writers": len(found.added),
        "parameters": sum(its.a.numel() + its.b.numel() for its in found.added.values()),
        "prompts": {
            name: {"source": its.source, "count": len(its.prompts), "sha256": its.sha256, "refused": counts[name]}
            for name, _, its, _ in _parts(session)
        },
        "kept": {
            name: {
                "source": its.source,
                "count": len(its.prompts),
                "sha256": its.sha256,
                "tokens": _kept_tokens(session),
            }
            for name, its in _harmful(session, options.method).items()
        },
        **({"pairs": counts["pairs"]} if "pairs" in counts else {}),
        "reply_tokens": session.recipe.evaluate.max_new_tokens,
        "schedule": asdict(options.schedule),
        "seed": session.recipe.find.seed,
        "steps": found.steps,
        "kept_step": found.best,
        "validation_kl_nats": {
            "before": found.before.learned,
            "after": found.after.learned,
            "to_edited": found.after.kept,
        },
        "versions": {name: version(name) for name in libraries},
    }


def _merged(
    session: Session,
    source: Checkpoint,
    finished: FinishedEdit,
    made: EditPlan,
    about: Mapping[str, Any],
    output: OutputFolder,
) -> HealResult:
    """The healed checkpoint, written, proven and measured beside its base and the edited one."""
    plan = healed(made, healing_file.load(output.private / healing_file.NAME))
    recipe = finished.recipe.with_changes({"memory_bytes": session.recipe.model.memory_bytes})
    pipeline.edit(plan, finished.directions, output, recipe, on_event=session.on_event)
    on_bytes = pipeline.verify(session, plan, output.path, behaviour=False)
    require_verified(on_bytes, output)
    behaviour, evaluation = side_by_side(
        session,
        [(EDITED, source), (HEALED, open_folder(output.path, name=str(output.final)))],
        proof=plan,
        proven=1,
        directions=finished.directions,
    )
    verification = VerifyReport(bytes=on_bytes.bytes, behaviour=behaviour)
    require_verified(verification, output)
    if evaluation is None:
        raise AssertionError("replies were asked for")
    for kind, change in _changes(evaluation).items():
        if change.low > 0:
            said = f"refusals of {kind} prompts came back, {100 * change.value:+.0f} points against the edited model"
            session.on_event(Noted(text=f"{said}, by other ways than what was edited: that one may be the better"))
    about = {**about, "refusal_change": {kind: asdict(its) for kind, its in _changes(evaluation).items()}}
    document = manifest.build(
        plan,
        finished.directions,
        recipe,
        prompts=finished.document["prompts"],
        verification=verification,
        evaluation=evaluation,
        healing=about,
    )
    if finished.document["edit"].get("given"):
        document["edit"]["given"] = True
    manifest.finish(output, plan, document)
    return HealResult(out=output.finish(), plan=plan, about=about, verification=verification, evaluation=evaluation)


def _changes(evaluation: EvalReport) -> dict[str, Difference]:
    """By kind of prompt, refusals of the healed model against those of the edited one, on the same prompts."""
    names = [model.name for model in evaluation.models]
    before, after = (next(n for n, name in enumerate(names) if name.startswith(one)) for one in (EDITED, HEALED))
    found = {}
    for kind in evaluation.kinds:
        refused = [sample.refused for sample in evaluation.samples if sample.kind == kind]
        each = ([float(its[place]) for its in refused] for place in (before, after))
        found[kind] = paired_difference(*each)
    return found
