"""Finding a direction: candidates measured on prompts of two classes, and one of them chosen.

Both stages keep what is finished in ``Steps``, so that a stopped one continues.
"""

import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from abliterate.checkpoint import direction_file as direction_files
from abliterate.checkpoint.output import fingerprint
from abliterate.editing.asked import scope_asked
from abliterate.errors import NonFiniteError, PromptError, TooFewPromptsError, UsageError
from abliterate.events import Noted
from abliterate.method.calibration import Calibration
from abliterate.method.directions import Candidate, DirectionSet
from abliterate.method.estimators import Need, estimate, needs_of, stability
from abliterate.method.search import unsearched
from abliterate.method.selection import COSMIC, WHY, SelectionRule
from abliterate.method.selection_metrics import Cosmic
from abliterate.model.measuring import Filtered, Validation, choose_candidate, choose_from_all
from abliterate.model.scores import ScoreFile
from abliterate.options import FindOptions
from abliterate.publishing import manifest
from abliterate.recipe import NOT_IN_NUMBERS
from abliterate.workflow.reading import Read, read_training, read_validation, refusal_tokens
from abliterate.workflow.search import search
from abliterate.workflow.session import Session
from abliterate.workflow.steps import Steps
from abliterate.workflow.training import check_trainable, check_trained, trained

FEW, HANDFUL = 32, 8
"""Of a class: below the first the user is warned, below the second a direction is not measured unless asked for."""


def measure(
    session: Session,
    *,
    steps: Steps | None = None,
    covariance: Path | None = None,
    ahead: bool = False,
) -> DirectionSet:
    """Which prompts count, statistics of them, and the candidates that the recipe's estimators make of those.

    Where the recipe has directions ``trained``, these take the place of the candidates, the best of which they begin
    from (``training``).
    ``steps`` keeps what is finished, so that the same call continues where it was stopped.  ``covariance`` is where to
    write the covariances of both classes at the last position.  ``ahead``: ``select`` follows with the same steps.

    Raises:
        UsageError: there is no such estimator, no memory for the statistics that are needed, or nothing can be trained.
        PromptError: the prompts or the chat template are unusable, or the model refuses nothing.
        NonFiniteError: an activation, or every candidate, is NaN or infinite.
    """
    recipe, steps = session.recipe, steps or Steps()
    check_trained(recipe)
    if recipe.find.trained:
        check_trainable(session)
    needs = needs_of(recipe.find.estimators) | (
        frozenset[Need]() if covariance is None else frozenset[Need](["covariance"])
    )
    read, measured = read_and_measure(session, needs, steps, ahead=ahead)
    if covariance is not None:
        direction_files.save_covariances(covariance, read.stats.moments)
    if not recipe.find.trained:
        return measured
    start = select(session, measured, steps=steps, scores="start.safetensors")
    validation = read_validation(session, read.tokens.ids, steps)
    return replace(measured, candidates=trained(session, start, read.kept, validation, steps))


def read_and_measure(
    session: Session, needs: frozenset[Need], steps: Steps, *, ahead: bool = False
) -> tuple[Read, DirectionSet]:
    """What was found out on the training prompts, with what ``needs`` names, and the candidates made of it.

    Warns of few prompts.

    Raises:
        TooFewPromptsError: too few are left, and the recipe does not allow few.
        PromptError: the prompts are unusable, or the estimators made no candidate.
        NonFiniteError: an activation, or every candidate, is NaN or infinite.
    """
    recipe = session.recipe
    read = read_training(session, needs, steps, ahead=ahead)
    categories = _of_categories(session, read) if "categories" in needs else {}
    warning = few_kept(session.loaded.name, read.kept, categories, allow_few=recipe.find.allow_few)
    if warning:
        session.on_event(Noted(text=warning))
    candidates = _finite(session, estimate(read.stats, recipe.find.estimators))
    metadata = {
        "model": session.checkpoint.name,
        "revision": session.checkpoint.revision,
        "position_tokens": list(session.chat.position_tokens),
        "template_sha256": session.chat.template_sha256,
        "system": recipe.model.system,
        "prompts": session.contrast.hashes(),
        **_counts(read),
        **({"categories": {name: list(its) for name, its in categories.items()}} if categories else {}),
        "stability": {name: round(its, 4) for name, its in stability(read.stats, recipe.find.estimators).items()},
        "refusal_tokens": {"ids": list(read.tokens.ids), "texts": list(read.tokens.texts)},
        "versions": manifest.versions(),
        "device": f"{session.loaded.device.type} ({platform.machine()})",
    }
    return read, DirectionSet(candidates=candidates, statistics=read.stats.means_alone(), metadata=metadata)


def _of_categories(session: Session, read: Read) -> dict[str, tuple[int, int]]:
    """Of each category, how many training prompts count, and of how many."""
    before = Counter(prompt.category for prompt in session.contrast.harmful_train.prompts)
    its = read.stats.categories
    return {name: (its[name].count if name in its else 0, before[name]) for name in sorted(before)}


def _counts(read: Read) -> dict[str, Any]:
    """How many prompts there were of each kind, as plain data."""
    kept = read.kept
    found: dict[str, Any] = {
        "kept": {"harmful_train": len(kept.harmful), "harmless_train": len(kept.harmless)},
        "of": {"harmful_train": kept.harmful_before, "harmless_train": kept.harmless_before},
    }
    if read.labels:
        found["labels"] = {f"{kind}_train": dict(its) for kind, its in read.labels.items()}
    if read.calibration is not None:
        found["calibration"] = read.calibration.to_json()
    return found


def _finite(session: Session, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """``candidates`` without those that hold NaN or infinity, which no file of directions takes.

    Raises:
        NonFiniteError: none is left of them.
        PromptError: there was none.
    """
    broken = [
        one.id
        for one in candidates
        if not all(bool(tensor.isfinite().all()) for its in one.subspaces for tensor in its.tensors)
    ]
    left_out = frozenset(broken)
    finite = tuple(one for one in candidates if one.id not in left_out)
    if not finite and broken:
        raise NonFiniteError(
            f"{session.checkpoint.name}: all candidates hold NaN or infinity",
            "choose another estimator, or more prompts",
        )
    if not finite:
        raise PromptError(
            f"{session.checkpoint.name}: the estimators made no candidate: the prompts are too few, or too much alike",
            "give more and other prompts, or choose another estimator",
        )
    if broken:
        text = f"left out, as they hold NaN or infinity: {len(broken)} candidates, {broken[0]} the first"
        session.on_event(Noted(text=text))
    return finite


def few_kept(
    model: str, kept: Filtered, categories: Mapping[str, tuple[int, int]] | None = None, *, allow_few: bool
) -> str:
    """What to say where few prompts were left to measure on; empty where they are enough.

    Whoever brings fewer than ``HANDFUL`` prompts has asked for few.  ``categories`` say of each how many are left, and
    of how many; the same holds of them.

    Raises:
        TooFewPromptsError: fewer than ``HANDFUL`` of a class or category are left, of more, and the recipe does not
            allow few; or none of a category.
    """
    classes = {
        "harmful": (len(kept.harmful), kept.harmful_before), "harmless": (len(kept.harmless), kept.harmless_before)
    }  # fmt: skip
    classes |= {f"{name!r}": its for name, its in (categories or {}).items() if its[0] < FEW}
    counts = " and ".join(f"{left} of {before} {kind}" for kind, (left, before) in classes.items())
    hint = "give more prompts, or a set that this model declines (harmful) and answers (harmless)"
    if empty := [name for name, (left, _) in classes.items() if not left]:
        raise TooFewPromptsError(f"{model}: no prompt of {empty[0]} behaves as its class says", hint)
    if any(left < min(HANDFUL, before) for left, before in classes.values()) and not allow_few:
        raise TooFewPromptsError(
            f"{model}: behaves as their class says on {counts} prompts only", f"{hint}, or --allow-few"
        )
    few = any(left < FEW for left, _ in classes.values())
    return f"the direction is measured on few prompts: {counts}; {hint}" if few else ""


def few_to_score(prompts: Filtered) -> str:
    """What to say where candidates are scored on less than ``HANDFUL`` prompts of a class; else empty."""
    left = {"harmful": len(prompts.harmful), "harmless": len(prompts.harmless)}
    if min(left.values()) >= HANDFUL:
        return ""
    counts = " and ".join(f"{count} {kind}" for kind, count in left.items())
    return f"candidates are scored on few validation prompts: {counts}; more prompts make the choice surer (n_val)"


def select(
    session: Session, directions: DirectionSet, *, steps: Steps | None = None, scores: str = "scores.safetensors"
) -> DirectionSet:
    """Choose a candidate by the paper's rule, from its scores on the validation prompts, or by a search (``search``).

    By the rule, only what the choice depends on is scored, or every candidate where the recipe says ``all_scores`` or
    scores them by COSMIC, which has no bound on induce.  Candidates are ablated where the recipe edits.
    ``steps`` keeps what is finished, so that the same call continues where it was stopped; ``scores`` names their file.

    Raises:
        PromptError: the validation prompts are unusable.
        UsageError: the directions were not measured on this model, COSMIC lacks the means they were made of, or a
            search cannot be made.
        NonFiniteError: no trial of a search has finite figures.
    """
    loaded, chat, recipe = session.loaded, session.chat, session.recipe
    if (directions.n_layers, directions.d_model) != (loaded.n_layers, loaded.d_model):
        raise UsageError(
            f"the directions are for {directions.n_layers} layers of width {directions.d_model}, "
            f"{loaded.name} has {loaded.n_layers} of width {loaded.d_model}",
            "measure them on this model",
        )
    options = {"batch_size": recipe.model.batch_size, "on_event": session.on_event}
    stored = directions.metadata.get("refusal_tokens", {}).get("ids")
    ids = tuple(stored) if stored else refusal_tokens(session).ids
    cosmic = _cosmic(session, directions)
    steps = steps or Steps()
    prompts = read_validation(session, ids, steps)
    if scarce := few_to_score(prompts):
        session.on_event(Noted(text=scarce))
    counts = _with_validation(directions.metadata, prompts)
    if recipe.find.trials:
        return search(session, replace(directions, metadata={**directions.metadata, **counts}), prompts, steps)
    directions = unsearched(directions)
    kept = steps.path(scores)
    store = ScoreFile(kept) if kept else None
    rule = _rule(recipe.find, directions.metadata.get("calibration"))
    on = Validation(prompts=prompts, refusal_ids=ids, scope=scope_asked(recipe.edit, loaded.n_layers), cosmic=cosmic)
    choosing = choose_from_all if recipe.find.scores_all else choose_candidate
    chosen = choosing(loaded, chat, directions.candidates, on, rule, store=store, **options)
    if chosen.choice.rule in WHY:
        session.on_event(Noted(text=WHY[chosen.choice.rule]))
    if chosen.prompt_passes < chosen.of:
        text = (
            f"candidates took {chosen.prompt_passes:,} prompt passes, {chosen.of / chosen.prompt_passes:.1f} x fewer "
            f"than the {chosen.of:,} of scoring each in full (--all-scores), which gives the same choice"
        )
        session.on_event(Noted(text=text))
    metadata = {**directions.metadata, **counts, "scored": chosen.scored}
    metadata |= {"choose_by": recipe.find.choose_by, "cosmic_layers": [] if cosmic is None else list(cosmic.layers)}
    return replace(directions, scores=chosen.scores, choice=chosen.choice, metadata=metadata)


def _rule(find: FindOptions, calibration: Mapping[str, Any] | None) -> SelectionRule:
    """The rule that a recipe asks for; COSMIC has no bound on induce."""
    rule = SelectionRule(
        max_kl_nats=find.max_kl_nats,
        kl_margin=find.kl_margin,
        min_induce=find.min_induce + (Calibration.of(calibration).threshold if calibration else 0.0),
        prune_layers=find.prune_layers,
    )
    return replace(rule, min_induce=-math.inf, name=COSMIC) if find.choose_by == COSMIC else rule


def _cosmic(session: Session, directions: DirectionSet) -> Cosmic | None:
    """What COSMIC compares with, where the recipe chooses by it.

    Raises:
        UsageError: the means that the directions were made of are not known.
    """
    if session.recipe.find.choose_by != COSMIC:
        return None
    if directions.statistics is None:
        raise UsageError(
            "cosmic holds residuals against the means of both classes, and these directions come without them",
            "measure them on this model, or choose by first-token",
        )
    return Cosmic.of(directions.statistics)


def _with_validation(metadata: Mapping[str, Any], prompts: Filtered) -> dict[str, Any]:
    """The counts of ``metadata`` with those of the validation prompts beside them."""
    kept = {"harmful_val": len(prompts.harmful), "harmless_val": len(prompts.harmless)}
    before = {"harmful_val": prompts.harmful_before, "harmless_val": prompts.harmless_before}
    return {"kept": {**metadata.get("kept", {}), **kept}, "of": {**metadata.get("of", {}), **before}}


def work_fingerprint(session: Session) -> str:
    """What makes two measurements the same: tool, source files, and every option that touches the numbers."""
    recipe = session.recipe.flat(without=NOT_IN_NUMBERS)
    return fingerprint({**session.checkpoint.identity(), "recipe": recipe})
