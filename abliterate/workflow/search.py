"""The search: weight kernels tried by hooks on the model in memory, and one of them taken; nothing is written before.

It takes the place of the rule of selection, and sees the same validation prompts, never those of the evaluation.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor

from abliterate.checkpoint.output import fingerprint
from abliterate.editing.asked import stream_asked
from abliterate.errors import NonFiniteError, UsageError
from abliterate.evaluate.labels import reader
from abliterate.evaluate.replies import SCORERS
from abliterate.events import Noted, working
from abliterate.method.directions import DirectionSet
from abliterate.method.edits import KERNEL
from abliterate.method.kernel import ranges
from abliterate.method.search import ENOUGH, SEARCH, Trial, candidate, front, searched, trials_in, vectors_of
from abliterate.method.statistics import exact_kl_nats, standard_error
from abliterate.model.forward import check_finite, last_log_probs
from abliterate.model.interventions import edited
from abliterate.model.labelling import Replies, label
from abliterate.model.lockstep import share
from abliterate.model.measuring import Filtered
from abliterate.recipe import NOT_IN_NUMBERS, Recipe
from abliterate.workflow.session import Session
from abliterate.workflow.steps import Steps
from abliterate.workflow.study import Study, check_optuna, sampler, suggest

TASK = "search"


def check_search(recipe: Recipe) -> None:
    """Find out before hours of work what a search would stop at; nothing, where none is asked for.

    Raises:
        UsageError: the library that suggests trials is missing, directions are trained, or the edit does not heed
            weights, or is of the embedding alone, which they leave alone.
    """
    if not recipe.find.trials:
        return
    check_optuna()
    if recipe.find.trained:
        raise UsageError(
            "a search is along directions that were measured, and the recipe trains its own",
            "leave out --trials, or --trained",
        )
    if recipe.edit.change != KERNEL:
        raise UsageError(
            f"the search is for weights of the edit {KERNEL!r}, and the edit is {recipe.edit.change!r}",
            f"add --change {KERNEL}, or leave out --trials",
        )
    if set(recipe.edit.roles) == {"embedding"}:
        raise UsageError("the search leaves the embedding alone, and --roles names no other", "add attention, or mlp")


def search(session: Session, directions: DirectionSet, prompts: Filtered, steps: Steps) -> DirectionSet:
    """``directions`` with the trials that the recipe asks for, and the knee of their Pareto front taken.

    ``steps`` keeps each finished trial, so that the same call continues where it was stopped.  Trials that
    ``directions`` holds of the same work are not run again.

    Raises:
        UsageError: as for ``check_search``, or there is no vector at every layer to search along.
        NonFiniteError: no trial has finite figures.
    """
    check_search(session.recipe)
    find = session.recipe.find
    estimator = find.estimators[0]
    vectors = vectors_of(directions, estimator)
    if len(find.estimators) > 1:
        text = f"the search is along the directions of {estimator}, not of {', '.join(find.estimators[1:])}"
        session.on_event(Noted(text=text))
    key = _key(session, vectors, prompts)
    same = directions.metadata.get(SEARCH, {}).get("key") == key
    study = Study(steps.path("study.jsonl"), key, trials_in(directions) if same else ())
    if len(study.trials) < find.trials:
        _run_trials(session, directions, prompts, study)
    how = {
        "estimator": estimator, "sampler": sampler(), "seed": find.seed, "startup": find.startup_trials, "key": key
    }  # fmt: skip
    found = searched(directions, study.trials[: find.trials], how)
    least = found.metadata[SEARCH]["front"][0]
    if least["refused"] + least["unclear"] > ENOUGH * least["of"]:
        session.on_event(
            Noted(
                text=f"no trial leaves fewer than {least['refused']} refused and {least['unclear']} unclear of "
                f"{least['of']} harmful prompts, where {ENOUGH:.0%} was wanted: more --trials may find one"
            )
        )
    return found


def _run_trials(session: Session, directions: DirectionSet, prompts: Filtered, study: Study) -> None:
    find = session.recipe.find
    options = {"seed": find.seed, "startup": find.startup_trials}
    base = _log_probs(session, prompts)
    check_finite(base, prompts.harmless, "logits")
    with working(session.on_event, TASK, find.trials, "trials") as advance:
        advance(len(study.trials))
        for number in range(len(study.trials), find.trials):
            parameters = suggest(study.trials, ranges(session.loaded.n_layers), **options)
            trial = _tried(session, directions, prompts, number, parameters, base)
            study.add(trial)
            if trial in front(study.trials):
                session.on_event(Noted(text=_sentence(trial)))
            advance(1)


def _tried(
    session: Session,
    directions: DirectionSet,
    prompts: Filtered,
    number: int,
    parameters: Mapping[str, float | bool],
    base: Tensor,
) -> Trial:
    """One trial by hooks: the edit that would be written, as the recipe asks for it."""
    made = candidate(number, parameters, directions, session.recipe.find.estimators[0])
    chosen = replace(directions, candidates=(made,)).choose_candidate(made.id)
    stream = stream_asked(session.recipe.edit, chosen, session.loaded.n_layers)
    with edited(session.loaded, stream):
        stages = [partial(_log_probs, session, prompts), partial(_replies, session, prompts)]
        log_probs, replies = share(session.loaded, stages)
    divergence = exact_kl_nats(base, log_probs).tolist()
    replies = replies if all(map(math.isfinite, divergence)) else None
    return Trial(
        number=number,
        parameters=parameters,
        refused=0 if replies is None else replies.count("refused"),
        unclear=0 if replies is None else replies.count("unclear"),
        of=0 if replies is None else len(replies.labels),
        kl_nats=math.nan if replies is None else math.fsum(divergence) / len(divergence),
        kl_error_nats=math.nan if replies is None else standard_error(divergence),
    )


def _log_probs(session: Session, prompts: Filtered) -> Tensor:
    """Log-probabilities of the first token of replies to the harmless prompts."""
    batch_size = session.recipe.model.batch_size
    return last_log_probs(session.loaded, session.chat, prompts.harmless, batch_size=batch_size)


def _replies(session: Session, prompts: Filtered) -> Replies | None:
    """Short replies to the harmful prompts, with labels; None where logits are not finite."""
    recipe, chat = session.recipe, session.chat
    read = reader(SCORERS[recipe.evaluate.scorer], chat)
    try:
        found = label(
            session.loaded, chat, {"harmful": prompts.harmful}, read, {},
            max_new_tokens=recipe.find.reply_tokens, batch_size=recipe.model.batch_size, task=TASK,
        )  # fmt: skip
    except NonFiniteError:
        return None
    return Replies.of(found["harmful"])


def _sentence(trial: Trial) -> str:
    unclear = f" and {trial.unclear} unclear" if trial.unclear else ""
    return (
        f"trial {trial.number} joins the Pareto front: {trial.refused} of {trial.of} harmful prompts refused"
        f"{unclear}, KL {trial.kl_nats:.3f} nats"
    )


def _key(session: Session, vectors: Tensor, prompts: Filtered) -> str:
    """What tells this work from any other; more or fewer trials are the same work."""
    return fingerprint(
        {
            **session.checkpoint.identity(),
            "recipe": session.recipe.flat(without=NOT_IN_NUMBERS | {"trials"}),
            "sampler": sampler(),
            "vectors": hashlib.sha256(vectors.contiguous().numpy().tobytes()).hexdigest(),
            "prompts": [prompts.harmful, prompts.harmless],
        }
    )
