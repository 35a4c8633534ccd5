"""The optimiser of ``method.refusal_cone``: a direction, or the basis of a cone, that makes given losses small.

It knows nothing of models: losses are functions of a direction and examples.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.errors import NonFiniteError
from abliterate.method.refusal_cone import SAMPLES, Schedule, cone_samples, orthonormal, tangent
from abliterate.model.direction_losses import Loss

Examples = Mapping[str, Sequence[Any]]
"""The examples of each part of the loss, by its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The parts of a loss with their ``weights``; at most ``rows`` examples go through a part together."""

    parts: Mapping[str, Loss]
    weights: Mapping[str, float]
    rows: int

    def measured(self, basis: Float[Tensor, "d k"], coefficients: Sequence[Tensor], on: Examples) -> dict[str, float]:
        """Each part, without its weight: the mean over examples, summed over the groups of ``coefficients``."""
        found = dict.fromkeys(self.parts, 0.0)
        with torch.no_grad():
            for name, share, value in self._each(basis, coefficients, on):
                found[name] += share * float(value)
        return found

    def total(self, figures: Mapping[str, float]) -> float:
        """The loss."""
        return sum(self.weights[name] * value for name, value in figures.items())

    def backward(self, basis: Float[Tensor, "d k"], coefficients: Sequence[Tensor], on: Examples) -> None:
        """Add the gradient of the loss to that of ``basis``, piece by piece, so that few examples are in memory."""
        for name, share, value in self._each(basis, coefficients, on):
            (self.weights[name] * share * value).backward()

    def _each(self, basis: Tensor, coefficients: Sequence[Tensor], on: Examples) -> Iterator[tuple[str, float, Tensor]]:
        """Part, share and sum of every piece of the examples, which are dealt out to the directions of each group."""
        for group in coefficients:
            for name, loss in self.parts.items():
                examples, count = on[name], group.shape[1]
                for j in range(min(count, len(examples))):
                    its = examples[j::count]
                    for first in range(0, len(its), self.rows):
                        v = basis @ group[:, j].to(basis)
                        yield name, 1 / len(examples), loss(v, its[first : first + self.rows])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trained:
    """A basis with orthonormal columns, and the parts of its validation loss ``before`` and ``after`` training.

    ``steps`` were taken; after step ``kept`` the basis was best (0: before the first).
    """

    basis: Float[Tensor, "d k"]
    before: Mapping[str, float]
    after: Mapping[str, float]
    steps: int
    kept: int


@dataclass(slots=True)
class _Best:
    """The best basis that was looked at, and how many looks ago that was."""

    loss: float
    basis: Tensor
    figures: Mapping[str, float]
    step: int = 0
    looks: int = 0
    falls: int = field(default=0)


def train(
    objective: Objective,
    start: Float[Tensor, "d k"],
    training: Examples,
    validation: Examples,
    *,
    schedule: Schedule,
    seed: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Trained:
    """The basis of least loss on ``validation`` that training from ``start``, orthonormal, comes by.

    A cone's loss is that of ``SAMPLES`` directions drawn from it and that of its basis; the prompts of a step are dealt
    out to the directions (published: every prompt goes through all of them; the mean is the same).  Those that
    validation takes are drawn once.  The same seed gives the same result.

    Raises:
        NonFiniteError: a gradient is NaN or infinite.
    """
    generator = torch.Generator().manual_seed(seed)
    basis = start.detach().clone().requires_grad_()
    looked_at = _drawn(basis.shape[1], generator)

    def look() -> tuple[float, Mapping[str, float]]:
        figures = objective.measured(basis, looked_at, validation)
        return objective.total(figures), figures

    optimizer = torch.optim.AdamW(
        [basis], lr=schedule.rate, betas=schedule.betas, weight_decay=0.0, amsgrad=True, foreach=False
    )
    loss, before = look()
    best, step = _Best(loss, start.detach().clone(), before), 0
    dealt = _batches(training, schedule.batch, generator)
    while step < schedule.most_steps and best.falls <= schedule.falls:
        step += 1
        optimizer.zero_grad()
        objective.backward(basis, _drawn(basis.shape[1], generator), next(dealt))
        _step(optimizer, basis, schedule.clip)
        advance(1)
        if step % schedule.checked_every and step < schedule.most_steps:
            continue
        loss, figures = look()
        if loss < best.loss:
            best = _Best(loss, basis.detach().clone(), figures, step, falls=best.falls)
            continue
        best.looks += 1
        if best.looks == schedule.patience:
            best.looks, best.falls = 0, best.falls + 1
            optimizer.param_groups[0]["lr"] /= 10
    return Trained(basis=best.basis, before=before, after=best.figures, steps=step, kept=best.step)


def _step(optimizer: torch.optim.Optimizer, basis: Tensor, clip: float) -> None:
    """Along the sphere, and back to it.

    Raises:
        NonFiniteError: the gradient is NaN or infinite.
    """
    if basis.grad is None or not basis.grad.isfinite().all():
        raise NonFiniteError(
            "the gradient of the direction that is trained is NaN or infinite",
            "try --dtype float32, or take a method that is not trained",
        )
    basis.grad.copy_(tangent(basis.grad, basis.detach()))
    torch.nn.utils.clip_grad_norm_([basis], clip)
    optimizer.step()
    with torch.no_grad():
        basis.copy_(orthonormal(basis.detach()))


def _drawn(k: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """The coefficients of the directions that stand for a basis: itself and, of a cone, samples."""
    itself = torch.eye(k, dtype=torch.float64)
    return (itself,) if k == 1 else (cone_samples(k, SAMPLES, generator), itself)


def _batches(examples: Examples, size: int, generator: torch.Generator) -> Iterator[dict[str, list[Any]]]:
    """``size`` examples of each part at a time, each part in an order of its own, shuffled whenever it is through."""
    orders: dict[str, list[int]] = {name: [] for name in examples}
    while True:
        found: dict[str, list[Any]] = {}
        for name, its in examples.items():
            wanted = min(size, len(its))
            while len(orders[name]) < wanted:
                orders[name] += torch.randperm(len(its), generator=generator).tolist()
            found[name] = [its[place] for place in orders[name][:wanted]]
            del orders[name][:wanted]
        yield found
