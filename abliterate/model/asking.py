"""The scores of candidates as a table whose entries are run when they are asked for (see ``method.few_scores``)."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.method.directions import Candidate
from abliterate.method.few_scores import Figure, Question, Seen
from abliterate.method.statistics import LEAST_REFUSAL, least_kl_nats
from abliterate.model.jobs import Job
from abliterate.model.scores import Scores
from abliterate.model.scoring import CandidateScorer

STOPPING: Mapping[Figure, Sequence[float]] = {
    "bypass": (3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8, 1.0),
    "kl_nats": (1 / 8, 1 / 4, 1 / 2, 1.0),
    "induce": (1.0,),
}
"""Where a score may be stopped.  A bypass is rarely out before half of it is known, a bad KL at once."""
AT_ONCE: Mapping[Figure, Sequence[float]] = {"bypass": (1.0,), "kl_nats": (1.0,), "induce": (1.0,)}
ROUNDING = 1e-9
"""Sums in another order differ by less, relative to what is summed."""
UNUSABLE = Seen(mean=math.nan, least=math.nan, whole=True)
"""A candidate that cannot be scored is not run."""


def can_be_scored(candidate: Candidate) -> bool:
    """Whether it can be ablated, and added at its layer."""
    return candidate.at(candidate.layer) is not None and all(subspace.usable for subspace in candidate.subspaces)


class Asked:
    """A ``Table`` of scores; ``parts`` says up to which shares of its prompts a score is run, one after the other.

    ``done`` is called with the number of prompts after each forward pass or, out of core, weight pass.
    """

    def __init__(
        self,
        scorer: CandidateScorer,
        candidates: Sequence[Candidate],
        scores: Scores,
        *,
        parts: Mapping[Figure, Sequence[float]],
        done: Callable[[Job, int], None],
    ) -> None:
        self.scorer, self.candidates, self.scores, self.parts, self.done = scorer, candidates, scores, parts, done
        self._usable = [can_be_scored(one) for one in candidates]
        self._known: dict[Question, Seen] = {}

    def seen(self, figure: Figure, candidate: int) -> Seen:
        """What is known of a score."""
        if not self._usable[candidate]:
            return UNUSABLE
        if (figure, candidate) not in self._known:
            self._known[figure, candidate] = self._seen(figure, candidate)
        return self._known[figure, candidate]

    def ask(self, questions: Sequence[Question]) -> None:
        """Run each score on the next part of its prompts.  Candidates share forward passes, all share weight passes."""

        def finished(job: Job, values: Tensor) -> None:
            prompts = self.scorer.prompts_of(job)
            for candidate, its in zip(job.candidates, values, strict=True):
                self.scores.put(job.kind, candidate, prompts, its)
                for figure in ("induce",) if job.kind == "added" else ("bypass", "kl_nats"):
                    self._known.pop((figure, candidate), None)
            self.done(job, values.numel())

        self.scorer.run(self.scorer.split(list(self._jobs(questions))), finished)

    def _seen(self, figure: Figure, candidate: int) -> Seen:
        values, done = self.scores.values(figure, candidate), self.scores.done(figure, candidate)
        if done.all():
            mean = float(values.mean())
            return Seen(mean=mean, least=mean, whole=True, error=self.scores.error(figure, candidate))
        known = float(values[done].sum())
        least = (known + float(self.least[figure][~done].sum())) / len(values)
        if math.isfinite(least):
            least -= ROUNDING * (1 + abs(least))
        return Seen(mean=known / int(done.sum()) if done.any() else math.nan, least=least, whole=False)

    @cached_property
    def least(self) -> dict[Figure, Float[Tensor, " prompts"]]:
        """The least that each prompt can give."""
        refusal = torch.tensor(LEAST_REFUSAL, dtype=torch.float64)
        log_probs = self.scorer.base.log_probs
        return {
            "bypass": refusal.expand(self.scorer.n_harmful),
            "kl_nats": torch.cat([least_kl_nats(one) for one in log_probs.split(8)]),
            "induce": refusal.expand(len(log_probs)),
        }

    def _jobs(self, questions: Sequence[Question]) -> Iterator[Job]:
        """The work of ``questions``: candidates that are ablated on the same prompts, and those added at one layer.

        A candidate that has another subspace in each layer, or is read along other vectors, is ablated by itself.
        """
        ablated: dict[int, tuple[int, ...]] = {}
        added: dict[int, list[int]] = {}
        for figure, n in questions:
            if figure == "induce":
                added.setdefault(self.candidates[n].layer, []).append(n)
            else:
                ablated[n] = tuple(sorted({*ablated.get(n, ()), *self._next(figure, n)}))
        for prompts in sorted(set(ablated.values())):
            some = [n for n, its in ablated.items() if its == prompts]
            layered = [n for n in some if not self.candidates[n].is_orthogonal]
            if alike := [n for n in some if n not in layered]:
                yield self._job(alike, Job(kind="ablated", prompts=prompts))
            for n in layered:
                yield Job(kind="ablated", candidates=(n,), prompts=prompts, alone=self.candidates[n])
        for layer, some in sorted(added.items()):
            yield self._job(some, Job(kind="added", layer=layer))

    def _job(self, some: Sequence[int], job: Job) -> Job:
        """``job`` with the subspaces that ``some`` have at their own layers: those that are added."""
        subspaces = (self.candidates[n].at(self.candidates[n].layer) for n in some)
        return job.of(tuple(some), tuple(its for its in subspaces if its is not None))

    def _next(self, figure: Figure, candidate: int) -> list[int]:
        """The prompts of the first part of which some are missing: places among all prompts."""
        done = self.scores.done(figure, candidate)
        missing = (~done).nonzero().flatten().tolist()
        ends = (math.ceil(share * len(done)) for share in self.parts[figure])
        end = next(end for end in ends if end > missing[0])
        offset = 0 if figure == "bypass" else self.scores.harmful
        return [offset + place for place in missing if place < end]
