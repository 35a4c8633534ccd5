"""Candidates that are trained by gradients (``method.refusal_cone``), from the best of those that were measured.

Training prompts train, validation prompts say which step was best; what was trained is kept in ``Steps``.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abliterate.checkpoint import direction_file
from abliterate.editing.asked import scope_asked
from abliterate.errors import UsageError
from abliterate.evaluate.labels import reader
from abliterate.evaluate.replies import SCORERS
from abliterate.events import Noted, working
from abliterate.method.directions import Candidate, DirectionSet, Subspace
from abliterate.method.linalg import unit
from abliterate.method.refusal_cone import (
    CONE,
    INDEPENDENCE,
    RDO,
    TARGET_TOKENS,
    WEIGHTS,
    WEIGHTS_INDEPENDENT,
    Schedule,
    grown,
)
from abliterate.method.scope import Scope
from abliterate.model.direction_losses import Losses
from abliterate.model.direction_training import Examples, Objective, Trained, train
from abliterate.model.measuring import Filtered
from abliterate.model.room import check_held, gradient_rows
from abliterate.model.targets import Writing, targets_of
from abliterate.recipe import Recipe
from abliterate.workflow.session import Session
from abliterate.workflow.steps import Steps

START = "start"
"""Stands for a direction file: the direction that training begins from."""
NOT_TRAINED = "take a method that is not trained, such as --method default"


def check_trained(recipe: Recipe) -> None:
    """Find out before hours of work that what a recipe trains can be.

    Raises:
        UsageError: independence is asked of something that is not one trained direction.
        SourceError: a direction file cannot be read.
    """
    find = recipe.find
    if find.independent_of and find.trained != RDO:
        raise UsageError(
            "only one direction that is trained can be made independent of others",
            "give --trained rdo (or --method rdo)",
        )
    for name in find.independent_of:
        if name != START:
            _ = direction_file.load(Path(name)).chosen.everywhere


def check_trainable(session: Session) -> None:
    """Check that the model of ``session`` can be trained on, and has room for a cone of that size.

    Raises:
        UsageError: it runs out of core, where gradients cannot flow; or the cone has more directions than the stream.
    """
    loaded, find = session.loaded, session.recipe.find
    check_held(loaded, "a direction is trained through", f"give it more --memory or --device-memory, or {NOT_TRAINED}")
    if find.trained == CONE and find.cone_size > loaded.d_model:
        raise UsageError(
            f"a cone of {find.cone_size} directions does not fit into a residual stream of width {loaded.d_model}",
            "give a smaller --cone-size",
        )


def trained(
    session: Session, directions: DirectionSet, training: Filtered, validation: Filtered, steps: Steps
) -> tuple[Candidate, ...]:
    """Candidates that are trained from the chosen one of ``directions``: one by RDO, or a cone of each size from two.

    Their vectors are as long as what addition should add: the start's length, also in the middle of a cone.

    Raises:
        PromptError: there are no answers or no refusals to learn from.
        NonFiniteError: a gradient is NaN or infinite.
        UsageError: the start, or what a direction shall be independent of, does not fit.
    """
    work = _Training(session=session, start=directions.chosen, training=training, validation=validation, steps=steps)
    session.on_event(Noted(text=f"training begins from {work.start.id}, and learns from what the model itself replies"))
    if session.recipe.find.trained == CONE:
        return work.cones()
    return (work.independent() if session.recipe.find.independent_of else work.direction(),)


@dataclass(frozen=True, kw_only=True)
class _Training:
    """Training from ``start``.  Targets are written when something is trained that was not kept."""

    session: Session
    start: Candidate
    training: Filtered
    validation: Filtered
    steps: Steps

    def direction(self) -> Candidate:
        """The one that RDO gives."""
        return self._candidate(self._alone, {})

    def cones(self) -> tuple[Candidate, ...]:
        """A cone of each size from two, each grown from the one before."""
        generator = torch.Generator().manual_seed(self._seed)
        last, found = self._alone, []
        for k in range(2, self.session.recipe.find.cone_size + 1):
            last = self._kept(f"cone of {k}", f"{CONE}-{k}", grown(last.trained.basis, generator))
            found.append(self._candidate(last, {}))
        return tuple(found)

    def independent(self) -> Candidate:
        """One that is independent of those that the recipe names, from a random start, as published."""
        given = self._given()
        digest = hashlib.sha256(given.numpy().tobytes()).hexdigest()
        drawn = torch.randn(len(given), generator=torch.Generator().manual_seed(self._seed), dtype=torch.float64)
        found = self._kept(
            "independent direction", f"independent-{digest[:16]}", unit(drawn)[:, None].float(), given=given
        )
        names = self.session.recipe.find.independent_of
        condition = {"without": found.without, "with": found.trained.after[INDEPENDENCE]}
        self._say(
            f"independence of {', '.join(names)}: the cosine condition is {condition['without']:.2g} of a direction "
            f"that is trained without it, and {condition['with']:.2g} of this one (0: independent)"
        )
        cosines = (given.T @ found.trained.basis.double())[:, 0].tolist()
        return self._candidate(
            found,
            {"independent_of": list(names), "cosine_condition": condition, "cosines": [round(x, 6) for x in cosines]},
        )

    @cached_property
    def _alone(self) -> "_Kept":
        return self._kept("direction", f"{RDO}-1", unit(self._vector)[:, None].float())

    @property
    def _vector(self) -> Tensor:
        return self.start.everywhere.added

    @property
    def _length(self) -> float:
        return float(self._vector.double().norm())

    @property
    def _seed(self) -> int:
        return self.session.recipe.find.seed

    @property
    def _scope(self) -> Scope:
        return scope_asked(self.session.recipe.edit, self.session.loaded.n_layers)

    @cached_property
    def _schedule(self) -> Schedule:
        return Schedule(most_steps=self.session.recipe.find.train_steps)

    @cached_property
    def _targets(self) -> tuple[Examples, Examples]:
        """Examples to train on, and to validate on."""
        session = self.session
        writing = Writing(
            loaded=session.loaded,
            chat=session.chat,
            start=self.start,
            scope=self._scope,
            read=reader(SCORERS[session.recipe.evaluate.scorer], session.chat),
            batch_size=session.recipe.model.batch_size,
            note=self._say,
        )
        prompts = self.training, self.validation
        total = sum(len(its.harmful) + 2 * len(its.harmless) for its in prompts)
        with working(session.on_event, "write replies to learn from", total, "prompts") as advance:
            training, validation = (targets_of(writing, its, advance) for its in prompts)
        return training, validation

    def _given(self) -> Tensor:
        """What the direction shall be independent of, unit vectors ``[d, m]`` in float64."""
        found = []
        for name in self.session.recipe.find.independent_of:
            its = (self.start if name == START else direction_file.load(Path(name)).chosen).everywhere
            if len(its.vectors) != len(self._vector):
                raise UsageError(
                    f"{name} is of width {len(its.vectors)}, and the model of width {len(self._vector)}",
                    "give a direction of this model",
                )
            found.append(its.basis)
        return torch.cat(found, dim=1)

    def _kept(self, what: str, name: str, start: Tensor, *, given: Tensor | None = None) -> "_Kept":
        """What training from ``start`` gives: the first time, or as it was kept as ``name``."""
        found = _Kept.of(self.steps.tensors(f"trained-{name}", partial(self._train, what, start, given)))
        before, after = found.total(found.trained.before), found.total(found.trained.after)
        best = f"step {found.trained.kept} of {found.trained.steps} was best"
        parts = ", ".join(
            f"{part} {found.trained.before[part]:.3f} to {its:.3f}" for part, its in found.trained.after.items()
        )
        self._say(
            f"{what}: trained from {before:.3f} to {after:.3f} on the validation prompts ({parts}); "
            + (best if found.trained.kept else "no step made it better, and it stays as it began")
        )
        return found

    def _train(self, what: str, start: Tensor, given: Tensor | None) -> Mapping[str, Tensor]:
        loaded, find = self.session.loaded, self.session.recipe.find
        training, validation = self._targets
        longest = max(len(one.ids) for examples in (training, validation) for its in examples.values() for one in its)
        rows = gradient_rows(loaded, self._schedule.batch, longest, TARGET_TOKENS + 1)
        losses = Losses(
            loaded=loaded, chat=self.session.chat, length=self._length, layer=self.start.layer, scope=self._scope,
            given=given,
        )  # fmt: skip
        if given is not None:
            training = {**training, INDEPENDENCE: losses.watched(self.training.harmful, rows)}
            validation = {**validation, INDEPENDENCE: losses.watched(self.validation.harmful, rows)}
        objective = Objective(parts=losses.by_name, weights=_weights(losses.by_name), rows=rows)
        with working(self.session.on_event, f"train {what}", find.train_steps, "steps") as advance:
            found = train(
                objective, start, training, validation, schedule=self._schedule, seed=find.seed, advance=advance
            )
            advance(find.train_steps - found.steps)
        without = None
        if given is not None:
            itself = (torch.eye(1, dtype=torch.float64),)
            without = objective.measured(self._alone.trained.basis, itself, validation)[INDEPENDENCE]
        examples = {part: len(its) for part, its in training.items()}
        return _Kept(trained=found, examples=examples, without=without).tensors()

    def _candidate(self, kept: "_Kept", more: Mapping[str, Any]) -> Candidate:
        """What was trained, as a candidate whose ``added`` is as long as the start."""
        found, name = kept.trained, self.session.recipe.find.trained
        k = found.basis.shape[1]
        provenance = {
            "estimator": name,
            **({} if self.start.position is None else {"position": self.start.position}),
            "k": k,
            "start": self.start.id,
            "length": round(self._length, 6),
            "loss": {
                when: {part: round(value, 6) for part, value in (its | {"total": kept.total(its)}).items()}
                for when, its in (("before", dict(found.before)), ("after", dict(found.after)))
            },
            "steps": found.steps,
            "kept_step": found.kept,
            "examples": dict(kept.examples),
            **more,
        }
        vectors = found.basis.double() * (self._length * math.sqrt(k))  # their mean is as long as the start
        subspace = Subspace(vectors=vectors.to(torch.float32))
        return Candidate(id=f"{name}/{k}", subspace=subspace, layer=self.start.layer, provenance=provenance)

    def _say(self, text: str) -> None:
        self.session.on_event(Noted(text=text))


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """What was trained, as a step keeps it: tensors.

    ``examples``: how many each part of the loss was trained on.  ``without``: the cosine condition of the direction
    that was trained without it.
    """

    trained: Trained
    examples: Mapping[str, int]
    without: float | None = None

    def total(self, figures: Mapping[str, float]) -> float:
        """The loss of its parts."""
        weights = _weights(figures)
        return sum(weights[part] * value for part, value in figures.items())

    def tensors(self) -> dict[str, Tensor]:
        """What a step keeps."""
        made, parts = self.trained, list(self.examples)
        floats = torch.tensor([[its[part] for part in parts] for its in (made.before, made.after)], dtype=torch.float64)
        found = {"basis": made.basis, "figures": floats}
        found["counts"] = torch.tensor([made.steps, made.kept, *self.examples.values()])
        return found if self.without is None else {**found, "without": torch.tensor(self.without, dtype=torch.float64)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "_Kept":
        """From ``tensors``."""
        steps, kept, *examples = tensors["counts"].tolist()
        parts = list(WEIGHTS_INDEPENDENT)[: len(examples)]
        before, after = (dict(zip(parts, its, strict=True)) for its in tensors["figures"].tolist())
        return cls(
            trained=Trained(basis=tensors["basis"], before=before, after=after, steps=steps, kept=kept),
            examples=dict(zip(parts, examples, strict=True)),
            without=float(tensors["without"]) if "without" in tensors else None,
        )


def _weights(parts: Mapping[str, Any]) -> Mapping[str, float]:
    """The weights of a loss with these parts."""
    return WEIGHTS_INDEPENDENT if INDEPENDENCE in parts else WEIGHTS
