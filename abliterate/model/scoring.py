"""Many candidates in one forward pass: the figures by which directions are chosen, with nothing computed twice.

The rows of a pass are prompts times candidates, each row under the intervention of its candidate.  Prompts of one
length go together, so nothing is padded, and there are logits at the last position only.  Besides:

* An addition changes nothing below its layer: those passes begin there, with what entered it in the base run.
* All prompts begin with the same tokens of the chat template (the head).  Per candidate they are run once, and their
  keys and values go to all prompts.  Out of core they are not: it would take passes of their own.

Both are tried on the base run first, and left alone where they do not reproduce it.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from abliterate.method.statistics import kl_nats, refusal_metric
from abliterate.model.chat import Batch
from abliterate.model.footprint import waiting_bytes
from abliterate.model.forward import last_of_batch
from abliterate.model.heads import empty_cache, is_plain, repeated, shared_tokens
from abliterate.model.interventions import ablated, ablated_each, added_each, observed, plus_each, rows_apart
from abliterate.model.load import LoadedModel
from abliterate.model.lockstep import groups, run_together
from abliterate.model.room import free_bytes, is_out_of_memory, pass_tokens
from abliterate.model.shortened import Shortened, shortened

ROUNDING_NATS = {2: 3e-2, 4: 3e-6, 8: 3e-6}
"""Mean difference of log-probabilities below which two ways are the same, by the bytes of an activation."""
CANNOT = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError)
"""What the code of a model raises that is used in a way it does not know."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """Prompts of one length: their places among all, harmful ones first, and their ids."""

    places: tuple[int, ...]
    ids: Int[Tensor, "prompts tokens"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """One intervention for each of some candidates, on all prompts it is for.  ``layer`` is that of an addition."""

    kind: Literal["ablated", "added"]
    candidates: tuple[int, ...]
    vectors: Float[Tensor, "k d"]
    layer: int = 0

    def split(self, most: int) -> "Iterator[Job]":
        """The same work in jobs of at most ``most`` candidates."""
        for first in range(0, len(self.candidates), most):
            part = slice(first, first + most)
            yield replace(self, candidates=self.candidates[part], vectors=self.vectors[part])


@dataclass(slots=True, kw_only=True, eq=False)
class Base:
    """The base run: log-probabilities of the harmless prompts and, per group and layer, what entered the block."""

    log_probs: Float[Tensor, "harmless vocab"]
    states: list[list[Tensor]]
    apart: bool
    head: Any = None
    starts: set[int] = field(default_factory=set)


Figures = dict[str, Float[Tensor, " k"]]


class Scorer:
    """Runs jobs on one model and its validation prompts; see ``scorer``.

    ``batch_size`` bounds the prompts of a group, ``max_tokens`` the tokens of a pass.  ``room`` is what passes that
    wait may take up out of core; as much again is for the one that runs (see ``pass_tokens``).
    """

    def __init__(
        self,
        loaded: LoadedModel,
        short: Shortened,
        harmful: Sequence[list[int]],
        harmless: Sequence[list[int]],
        refusal_ids: Sequence[int],
        *,
        batch_size: int,
        max_tokens: int | None,
    ) -> None:
        self.loaded = loaded
        self.short = short
        self.refusal_ids = list(refusal_ids)
        self.n_harmful = len(harmful)
        encoded = [*harmful, *harmless]
        self.groups = list(_groups(encoded, range(len(encoded)), batch_size))
        self.harmless = list(_groups(encoded, range(len(harmful), len(encoded)), batch_size))
        self.n_prompts = len(encoded)
        self.room = loaded.offload.working_bytes // 2 if loaded.offload else 0
        self.head = 0
        self.base = self._base_run()
        self._share_head(shared_tokens(encoded))
        self._check_starts()
        self.max_tokens = max_tokens or pass_tokens(loaded, self.head, min(map(len, encoded)))

    def split(self, jobs: Sequence[Job]) -> list[Job]:
        """``jobs`` in the sizes in which they fit."""
        return [part for job in jobs for part in job.split(self._most(job))]

    def run(self, jobs: Sequence[Job], done: Callable[[Job, Figures], None]) -> None:
        """Run ``jobs``, out of core as many at once as fit, and tell of each that is done.

        Where memory runs out, what was going on is begun again in halves; nothing that is done is lost.
        """
        waiting = list(jobs)
        limit = self.room
        while waiting:
            first = next(groups([self._bytes(job) for job in waiting], limit))
            chosen = waiting[: first.stop]
            results = self._try(chosen)
            if results is None:
                most = math.ceil(max(len(job.candidates) for job in chosen) / 2)
                waiting = [part for job in waiting for part in job.split(most)]
                limit //= 2
                continue
            waiting = waiting[first.stop :]
            for job, figures in zip(chosen, results, strict=True):
                done(job, figures)

    def _try(self, jobs: list[Job]) -> list[Figures] | None:
        """What comes of ``jobs``, or None where they are too much for the memory and can be fewer."""
        thunks = [self._thunks(job) for job in jobs]
        try:
            found = iter(run_together(self.loaded, [thunk for some in thunks for thunk in some]))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or (len(jobs) == 1 and len(jobs[0].candidates) == 1):
                raise
            return None
        return [self._gather(job, [next(found) for _ in some]) for job, some in zip(jobs, thunks, strict=True)]

    # --- one job ------------------------------------------------------------------------------------------------------

    def _groups_of(self, job: Job) -> list[Group]:
        return self.groups if job.kind == "ablated" else self.harmless

    def _thunks(self, job: Job) -> list[Callable[[], Tensor]]:
        """A pass for each group of prompts; the first one runs the head as well."""
        head = cache(partial(self._head_of, job))
        return [partial(self._figures, job, place, head) for place in range(len(self._groups_of(job)))]

    def _figures(self, job: Job, place: int, head: Callable[[], Any]) -> Tensor:
        """The figure of each candidate on each prompt of a group, ``[k, prompts]``."""
        group, k = self._groups_of(job)[place], len(job.candidates)
        n = len(group.places)
        past = repeated(head(), n) if self.head else None
        with self._intervening(job, partial(self._state, place, job.layer)):
            log_probs = self._last(group.ids[:, self.head :].repeat(k, 1), past)
        found = refusal_metric(log_probs, self.refusal_ids).view(k, n)
        if job.kind == "added":
            return found
        harmless = [row for row, prompt in enumerate(group.places) if prompt >= self.n_harmful]
        base = self.base.log_probs[[group.places[row] - self.n_harmful for row in harmless]]
        found[:, harmless] = kl_nats(base.expand(k, -1, -1), log_probs.view(k, n, -1)[:, harmless])
        return found

    def _gather(self, job: Job, found: list[Tensor]) -> Figures:
        values = torch.empty(len(job.candidates), self.n_prompts, dtype=torch.float64)
        for group, figures in zip(self._groups_of(job), found, strict=True):
            values[:, list(group.places)] = figures
        harmful, harmless = values[:, : self.n_harmful].mean(1), values[:, self.n_harmful :].mean(1)
        return {"induce": harmless} if job.kind == "added" else {"bypass": harmful, "kl_nats": harmless}

    def _head_of(self, job: Job) -> Any:  # noqa: ANN401 - a cache of transformers
        """Keys and values of the head under each candidate of ``job``."""
        past = empty_cache(self.loaded)
        ids = self.groups[0].ids[:1, : self.head]
        with self._intervening(job, lambda: self.base.states[0][job.layer][:1, : self.head]):
            self._last(ids.repeat(len(job.candidates), 1), past, begin=True)
        if self._begins_late(job):
            past.layers[: job.layer] = self.base.head.layers[: job.layer]
        return past

    def _intervening(self, job: Job, state: Callable[[], Tensor]) -> AbstractContextManager[None]:
        if job.kind == "ablated":
            one = len(job.candidates) == 1
            return ablated(self.loaded, job.vectors.T) if one else ablated_each(self.loaded, job.vectors)
        if not self._begins_late(job):
            return added_each(self.loaded, job.vectors, job.layer)
        k = len(job.candidates)
        return self.short.starting_at(job.layer, plus_each(state().repeat(k, 1, 1), job.vectors))

    def _begins_late(self, job: Job) -> bool:
        return job.kind == "added" and job.layer in self.base.starts

    def _state(self, place: int, layer: int) -> Tensor:
        return self.base.states[place][layer][:, self.head :]

    def _last(
        self,
        ids: Tensor,
        past: Any = None,  # noqa: ANN401 - a cache of transformers
        *,
        begin: bool = False,
    ) -> Tensor:
        """Log-probabilities ``[rows, vocab]`` after each row, behind ``past``; that is empty where ``begin`` is set."""
        rows, width = ids.shape
        behind = 0 if past is None or begin else self.head
        mask = torch.ones(rows, behind + width, dtype=torch.long)
        return last_of_batch(
            self.loaded, Batch(rows=tuple(range(rows)), input_ids=ids, attention_mask=mask), cache=past
        )

    # --- sizes --------------------------------------------------------------------------------------------------------

    def _most(self, job: Job) -> int:
        """How many candidates fit into a pass."""
        if not self.base.apart:
            return 1
        most = self.max_tokens // max(group.ids[:, self.head :].numel() for group in self._groups_of(job))
        if self.loaded.offload:
            one = replace(job, candidates=job.candidates[:1])
            most = min(most, self.room // self._bytes(one))
        return max(1, most)

    def _bytes(self, job: Job) -> int:
        """What a job takes up that waits, with all its passes."""
        sizes = [len(group.ids) * waiting_bytes(self.loaded, group.ids.shape[1]) for group in self._groups_of(job)]
        return len(job.candidates) * sum(sizes)

    # --- the base run, and what may be taken from it ------------------------------------------------------------------

    def _base_run(self) -> Base:
        offload = self.loaded.offload
        tokens = sum(group.ids.numel() for group in self.harmless)
        states = tokens * self.loaded.n_layers * self.loaded.d_model * 4
        keeps = states <= (self.room if offload else free_bytes(torch.device("cpu"))) // 4
        if keeps:
            self.room -= states
        turned = self.harmless[0].ids[:1].flip(1)  # another run in between, so that nothing is left of the first one
        thunks = [partial(self._plain, group, keeps=keeps) for group in self.harmless]
        sizes = [len(group.ids) * waiting_bytes(self.loaded, group.ids.shape[1]) for group in self.harmless]
        found: list[tuple[Tensor, list[Tensor], bool]] = []
        for span in groups(sizes, self.room if offload else sum(sizes)):
            chosen: list[Callable[[], Any]] = [*thunks[span.start : span.stop], partial(self._last, turned)]
            found += run_together(self.loaded, chosen)[:-1]
        log_probs = torch.empty(sum(map(len, (one for one, _, _ in found))), found[0][0].shape[1], dtype=torch.float64)
        for group, (values, _, _) in zip(self.harmless, found, strict=True):
            log_probs[[place - self.n_harmful for place in group.places]] = values
        apart = all(one for _, _, one in found)
        return Base(
            log_probs=log_probs, states=[states for _, states, _ in found] if keeps and apart else [], apart=apart
        )

    def _plain(self, group: Group, *, keeps: bool) -> tuple[Tensor, list[Tensor], bool]:
        seen: list[Tensor] = []

        def see(_: int, x: Tensor) -> None:
            if keeps:
                seen.append(x.detach().to(device="cpu", copy=True))

        with observed(self.loaded, see), rows_apart(self.loaded, *group.ids.shape) as apart:
            log_probs = self._last(group.ids)
        return log_probs, seen, all(apart)

    def _same(self, group: Group, log_probs: Tensor) -> bool:
        """Whether ``log_probs`` are those of the base run, of the first rows of ``group``."""
        base = self.base.log_probs[[place - self.n_harmful for place in group.places[: len(log_probs)]]]
        size = next(self.loaded.model.parameters()).dtype.itemsize
        return bool((base.exp() * (base - log_probs).abs()).sum(-1).max() < ROUNDING_NATS[size])

    def _share_head(self, tokens: int) -> None:
        """Take the first ``tokens`` of all prompts for their head, if the base run comes out the same that way."""
        accepts = "past_key_values" in inspect.signature(self.loaded.model.forward).parameters
        if (
            not tokens
            or not accepts
            or self.loaded.offload
            or not self.base.apart
            or not is_plain(empty_cache(self.loaded))
        ):
            return
        self.head = tokens
        try:
            self.base.head = empty_cache(self.loaded)
            self._last(self.groups[0].ids[:1, :tokens], self.base.head, begin=True)
            same = all(
                self._same(group, self._last(group.ids[:, tokens:], repeated(self.base.head, len(group.ids))))
                for group in self.harmless
            )
        except CANNOT:
            same = False
        if not same:
            self.head = 0

    def _check_starts(self) -> None:
        """Find the layers at which a run may begin: where that gives the base run's figures."""
        if not self.base.states:
            return
        group = self.harmless[0]
        one = replace(group, places=group.places[:1], ids=group.ids[:1])
        layers = range(1, self.loaded.n_layers)
        same = run_together(self.loaded, [partial(self._starts, one, layer) for layer in layers])
        self.base.starts = {layer for layer, good in zip(layers, same, strict=True) if good}

    def _starts(self, one: Group, layer: int) -> bool:
        past = repeated(self.base.head, 1) if self.head else None
        try:
            with self.short.starting_at(layer, self._state(0, layer)[:1]):
                return self._same(one, self._last(one.ids[:, self.head :], past))
        except CANNOT:
            return False


@contextmanager
def scorer(
    loaded: LoadedModel,
    harmful: Sequence[list[int]],
    harmless: Sequence[list[int]],
    refusal_ids: Sequence[int],
    *,
    batch_size: int,
    max_tokens: int | None = None,
) -> Iterator[Scorer]:
    """A ``Scorer`` of encoded prompts, its base run done."""
    with shortened(loaded) as short:
        yield Scorer(loaded, short, harmful, harmless, refusal_ids, batch_size=batch_size, max_tokens=max_tokens)


def _groups(encoded: Sequence[list[int]], places: Sequence[int], most: int) -> Iterator[Group]:
    """Prompts of one length together, longest first, at most ``most``."""
    for length in sorted({len(encoded[place]) for place in places}, reverse=True):
        same = [place for place in places if len(encoded[place]) == length]
        for first in range(0, len(same), most):
            some = tuple(same[first : first + most])
            yield Group(places=some, ids=torch.tensor([encoded[place] for place in some]))
