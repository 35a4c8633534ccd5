"""Searching weight kernels: what a trial is, which trials no other beats, and which one is taken.

Two figures are to be low: the share of harmful prompts that get no answer, and the KL on harmless ones.  A reply that
is broken or empty is no answer: a model that was ruined shall not look like one that complies.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from abliterate.errors import NonFiniteError, PromptError, UsageError
from abliterate.method.directions import GIVEN, Candidate, DirectionSet, Subspace
from abliterate.method.kernel import LAYER, PER_LAYER, between, kernels_of
from abliterate.method.linalg import unit

SEARCH, KNEE = "search", "knee"
"""What a trial's candidate is called after, and the rule that takes one."""
LAST = -1
"""The position whose directions are searched."""
ENOUGH = 0.05
"""A share of unanswered harmful prompts that is low enough, however low others are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What one set of parameters (``kernel.Parameters``) does to the model.

    ``refused`` and ``unclear`` count replies to ``of`` harmful prompts.  ``kl_nats`` is the mean KL(base || edited) of
    the first token on harmless prompts, ``kl_error_nats`` its standard error.  Where the edit breaks the model, so that
    a figure is not finite, the KL is NaN and no reply is counted.
    """

    number: int
    parameters: Mapping[str, bool | float]
    refused: int
    unclear: int
    of: int
    kl_nats: float
    kl_error_nats: float

    @property
    def is_finite(self) -> bool:
        """Whether both figures are known."""
        return self.of > 0 and math.isfinite(self.kl_nats)

    @property
    def unanswered(self) -> float:
        """Share of the harmful prompts that get no answer; NaN where that is not known."""
        return (self.refused + self.unclear) / self.of if self.is_finite else math.nan

    def to_json(self) -> dict[str, Any]:
        """As plain data, null for NaN."""
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in asdict(self).items()
        }


def trial_of(document: object) -> Trial:
    """The trial that ``to_json`` gave.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(document, dict):
        raise ValueError("a trial is an object")  # noqa: TRY004 - of a file, as all that is wrong with it
    return _TRIAL.validate_python({name: math.nan if its is None else its for name, its in document.items()})


_TRIAL = TypeAdapter(Trial)


def front(trials: Sequence[Trial]) -> list[Trial]:
    """The Pareto front: trials that no other beats in both figures, by rising share of unanswered prompts.

    Of trials that are equal in both, the first.
    """
    found: list[Trial] = []
    finite = (trial for trial in trials if trial.is_finite)
    for trial in sorted(finite, key=lambda its: (its.unanswered, its.kl_nats, its.number)):
        if not found or trial.kl_nats < found[-1].kl_nats:
            found.append(trial)
    return found


def bound(trials: Sequence[Trial]) -> float:
    """The most prompts, as a share, that the knee may leave unanswered: the least of all by one standard error.

    As shares are counted over few prompts, what lies within a standard error of the best (Breiman et al. 1984) is as
    good.  ``ENOUGH`` is always good enough.

    Raises:
        NonFiniteError: no trial has finite figures.
    """
    found = front(trials)
    if not found:
        raise NonFiniteError(
            f"none of the {len(trials)} trials of the search has finite figures",
            "try --dtype float32 (float16 overflows on some models), other estimators, or more --trials",
        )
    best = found[0]
    return max(ENOUGH, best.unanswered + math.sqrt(best.unanswered * (1 - best.unanswered) / best.of))


def knee(trials: Sequence[Trial]) -> Trial:
    """Of the trials within ``bound``, the one with the least KL; it lies on the front.

    Raises:
        NonFiniteError: no trial has finite figures.
    """
    most = bound(trials)
    return [trial for trial in front(trials) if trial.unanswered <= most][-1]


def vectors_of(directions: DirectionSet, estimator: str) -> Float[Tensor, "layers d"]:
    """The vectors of an estimator at the last position, layer by layer.

    Raises:
        UsageError: it made none for each layer.
        PromptError: one that is searched is zero.
    """
    by_id = {one.id: one for one in directions.candidates if one.is_vector}
    wanted = [f"{estimator}/{LAST}/{layer}" for layer in range(directions.n_layers)]
    if not all(name in by_id for name in wanted):
        raise UsageError(
            f"the search takes a vector at every layer, and {estimator!r} made none there",
            "measure with --estimator difference-of-means or projected-difference",
        )
    vectors = torch.stack([by_id[name].vector for name in wanted])
    if not vectors[1:].any(1).all() or len(vectors) == 1:
        raise PromptError(
            f"there is no candidate direction of {estimator!r} where the search looks: the classes do not differ there",
            "measure on prompts of two kinds",
        )
    return vectors


def candidate(
    trial: int, parameters: Mapping[str, float | bool], directions: DirectionSet, estimator: str
) -> Candidate:
    """What a trial takes out, as a candidate: "search/N".

    Its direction is one at a real layer, or each block has its own.  With what weights it is taken out stands in its
    provenance (``kernel.kernels_in``), for the edit "kernel".

    Raises:
        UsageError, PromptError: as for ``vectors_of``.
    """
    vectors = vectors_of(directions, estimator)
    last, kernels = len(vectors) - 1, kernels_of(parameters)
    if parameters[PER_LAYER]:
        blocks = [block for block in range(last + 1) if any(its.weight(block) for its in kernels.values())]
        subspace = {block: _span(unit(vectors[min(block + 1, last)])) for block in blocks}
    else:
        blocks, subspace = range(last + 1), _span(between(vectors, parameters[LAYER]))
    return Candidate(
        id=f"{SEARCH}/{trial}",
        subspace=subspace,
        layer=min(blocks, key=lambda block: abs(block - parameters[LAYER])),
        provenance={
            "estimator": SEARCH,
            "position": LAST,
            "of": estimator,
            "kernels": {kind: asdict(kernel) for kind, kernel in kernels.items()},
        },
    )


def _span(vector: Float[Tensor, " d"]) -> Subspace:
    return Subspace(vectors=vector.to(torch.float32)[:, None])


def searched(directions: DirectionSet, trials: Sequence[Trial], how: Mapping[str, Any]) -> DirectionSet:
    """``directions`` with all ``trials`` in its metadata, and the knee taken.

    ``how`` is plain data on the search; it names the "estimator".

    Raises:
        NonFiniteError: no trial has finite figures.
    """
    about = {
        **how,
        "trials": len(trials),
        "finite": sum(trial.is_finite for trial in trials),
        "bound": bound(trials),
        "front": [trial.to_json() for trial in front(trials)],
    }
    metadata = {**directions.metadata, SEARCH: about, "trials": [trial.to_json() for trial in trials]}
    why = (
        f"of the trials that leave at most {about['bound']:.1%} of the harmful prompts unanswered (one standard error "
        f"above the least, or {ENOUGH:.0%}), the one with the least KL"
    )
    return _taken(replace(directions, metadata=metadata), knee(trials), KNEE, why)


def trials_in(directions: DirectionSet) -> list[Trial]:
    """The trials of a finished search; none where there was none.

    Raises:
        UsageError: they cannot be read.
    """
    try:
        return [trial_of(its) for its in directions.metadata.get("trials", ())]
    except (ValidationError, ValueError) as error:
        raise UsageError("the trials of this direction file cannot be read", "search again") from error


def take(directions: DirectionSet, number: int) -> DirectionSet:
    """A copy with another trial of a finished search taken.

    Raises:
        UsageError: nothing was searched, or there is no such trial, or it broke the model.
    """
    trials = {trial.number: trial for trial in trials_in(directions)}
    if not trials or SEARCH not in directions.metadata:
        raise UsageError("no search chose this direction, so it has no trials", "leave out --trial")
    if number not in trials or not trials[number].is_finite:
        what = "broke the model" if number in trials else "is none of them"
        on_front = ", ".join(str(its["number"]) for its in directions.metadata[SEARCH]["front"])
        raise UsageError(f"trial {number} {what}", f"on the Pareto front are trials {on_front}")
    return _taken(directions, trials[number], GIVEN, "it was asked for")


def unsearched(directions: DirectionSet) -> DirectionSet:
    """A copy with nothing of a search in it, and nothing chosen where it was chosen by one."""
    if SEARCH not in directions.metadata:
        return directions
    measured = tuple(one for one in directions.candidates if one.estimator != SEARCH)
    metadata = {name: its for name, its in directions.metadata.items() if name not in (SEARCH, "trials")}
    return replace(directions, candidates=measured, metadata=metadata, choice=None)


def _taken(directions: DirectionSet, trial: Trial, rule: str, why: str) -> DirectionSet:
    about = directions.metadata[SEARCH]
    made = candidate(trial.number, trial.parameters, directions, about["estimator"])
    measured = tuple(one for one in directions.candidates if one.estimator != SEARCH)
    metadata = {**directions.metadata, SEARCH: {**about, "taken": trial.to_json(), "why": why}}
    return replace(directions, candidates=(*measured, made), metadata=metadata, scores=()).choose_candidate(
        made.id, rule
    )
