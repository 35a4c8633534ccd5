"""The scores of many candidates in one forward pass.

The rows of a forward pass are prompts times candidates: each row is run under the intervention of its candidate.
Prompts of one length go together, so that nothing is padded, and logits are computed at the last position only.
Two kinds of work are not done twice:

* An addition changes nothing below its layer.  Its forward passes begin at that layer, with the residual that entered
  it when the model ran without intervention (the *base run*).
* All prompts begin with the same tokens of the chat template (the *prefix*).  They are run once for each candidate, and
  the attention cache they leave serves all prompts.  Out of core this is left out: it would take a weight pass of its
  own.

Whether a model allows this is found out by trying: what does not give the numbers of the base run is not used.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from abliterate.method.scope import WHOLE, Scope
from abliterate.method.selection_metrics import Cosmic
from abliterate.method.statistics import kl_nats, refusal_metric
from abliterate.model.chat import Batch
from abliterate.model.footprint import logit_bytes, running_bytes, waiting_bytes
from abliterate.model.forward import last_of_batch, last_states
from abliterate.model.interventions import added_each, observed, plus_each, removed, rows_apart, without
from abliterate.model.jobs import Base, Figures, Group, Job, prompt_groups
from abliterate.model.load import LoadedModel
from abliterate.model.lockstep import groups, run_together
from abliterate.model.prefix import empty_cache, is_plain, repeated, shared_tokens
from abliterate.model.ranks import count, least, processes, spread
from abliterate.model.room import free_bytes, is_out_of_memory, pass_tokens
from abliterate.model.rowwise import subspaces_ablated
from abliterate.model.shortened import Shortened, shortened

ROUNDING_NATS = {2: 3e-2, 4: 3e-6, 8: 3e-6}
"""Two ways to run a prompt are the same where the mean difference of log-probabilities is below this.  By the bytes of
an activation; in nats."""
WAITING = 0.75
"""The share of the working memory for forward passes that wait: more of these share a weight pass, of fewer rows."""
CANNOT = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError)
"""What a model's own code may raise when it is run from the middle, or behind an attention cache."""


class CandidateScorer:
    """Runs jobs on one model and its validation prompts; made by ``candidate_scorer``.

    ``batch_size`` is the most prompts of a group, ``max_tokens`` the most tokens of a forward pass.  Out of core many
    forward passes share a weight pass, each waiting in turn for the next block; ``room`` is the bytes those that wait
    may take, ``WAITING`` of the memory budget's working share.  The rest is for the one that runs (``pass_tokens``).
    With ``cosmic``, residuals tell how far the model refuses, and the refusal tokens are not looked at.
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
        scope: Scope,
        cosmic: Cosmic | None = None,
    ) -> None:
        self.loaded = loaded
        self.short = short
        self.scope = scope
        self.cosmic = cosmic
        self.refusal_ids = list(refusal_ids)
        self.n_harmful = len(harmful)
        self.n_prompts = len(harmful) + len(harmless)
        encoded = [*harmful, *harmless]
        self._cut = cache(lambda prompts: list(prompt_groups(encoded, prompts, batch_size)))
        self.groups = self._cut(tuple(range(self.n_prompts)))
        self.harmless = self._cut(tuple(range(self.n_harmful, self.n_prompts)))
        self.room = self._room(loaded.offload.working_bytes) if loaded.offload else 0
        self.prefix = 0
        self.base = self._base_run()
        self._share_prefix(shared_tokens(encoded))
        self._check_starts()
        share = 1 - WAITING if loaded.offload else 0.5
        self.max_tokens = max_tokens or pass_tokens(loaded, self.prefix, min(map(len, encoded)), share=share)

    def prompts_of(self, job: Job) -> tuple[int, ...]:
        """The prompts that a job is run on: places among all, where harmful ones come first."""
        if job.kind == "added":
            return tuple(range(self.n_harmful, self.n_prompts))
        return job.prompts or tuple(range(self.n_prompts))

    def split(self, jobs: Sequence[Job]) -> list[Job]:
        """``jobs`` cut into parts that each fit into one forward pass for each group, of whatever process."""
        return [part for job in jobs for part in job.split(least(self._most(job)))]

    def run(self, jobs: Sequence[Job], done: Callable[[Job, Figures], None]) -> None:
        """Run ``jobs`` and call ``done`` after each.  Out of core, as many as fit share a weight pass.

        Where memory runs out, the jobs that were running are cut in half and begun again.
        """
        if count() == 1:
            self._run(jobs, done)
            return

        def whole(mine: Sequence[Job]) -> list[dict[str, Tensor]]:
            parts: list[Tensor] = []
            self._run(mine, lambda _, figures: parts.append(figures))
            rows = iter([row for part in parts for row in part])
            return [{"": torch.stack([next(rows) for _ in job.candidates])} for job in mine]

        for job, its in zip(jobs, spread(jobs, whole), strict=True):
            done(job, its[""])

    def _run(self, jobs: Sequence[Job], done: Callable[[Job, Figures], None]) -> None:
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
        """The figures of ``jobs``; None where memory ran out and there is something left to cut in half."""
        thunks = [self._thunks(job) for job in jobs]
        try:
            found = iter(run_together(self.loaded, [thunk for some in thunks for thunk in some]))
        except (RuntimeError, MemoryError) as error:
            whole = len(jobs) == 1 and len(jobs[0].candidates) == 1
            if whole or processes() > count() or not is_out_of_memory(error):  # others of one model go on as they are
                raise
            return None
        return [self._gather(job, [next(found) for _ in some]) for job, some in zip(jobs, thunks, strict=True)]

    # --- one job ------------------------------------------------------------------------------------------------------

    def _groups_of(self, job: Job) -> list[Group]:
        return self._cut(self.prompts_of(job))

    def _thunks(self, job: Job) -> list[Callable[[], Tensor]]:
        """A forward pass for each group of prompts; the first one runs the prefix as well."""
        prefix = cache(partial(self._prefix_of, job))
        return [partial(self._figures, job, place, prefix) for place in range(len(self._groups_of(job)))]

    def _figures(self, job: Job, place: int, prefix: Callable[[], Any]) -> Figures:
        """The figure of each candidate on each prompt of a group."""
        group, k = self._groups_of(job)[place], len(job.candidates)
        n = len(group.places)
        past = repeated(prefix(), n) if self.prefix else None
        states: dict[int, Tensor] = {}
        seeing = nullcontext() if self.cosmic is None else last_states(self.loaded, self.cosmic.layers, states)
        with self._intervening(job, partial(self._state, place, job.layer)), seeing:
            log_probs = self._last(group.ids[:, self.prefix :].repeat(k, 1), past)
        found = self._refusing(job, log_probs, states).view(k, n)
        harmless = [row for row, prompt in enumerate(group.places) if prompt >= self.n_harmful]
        if job.kind == "added" or not harmless:
            return found
        base = self.base.log_probs[[group.places[row] - self.n_harmful for row in harmless]]
        found[:, harmless] = kl_nats(base.expand(k, -1, -1), log_probs.view(k, n, -1)[:, harmless])
        return found

    def _refusing(self, job: Job, log_probs: Tensor, states: dict[int, Tensor]) -> Tensor:
        """How far each row refuses: by the first token, or by what entered the layers of ``cosmic``."""
        if self.cosmic is None:
            return refusal_metric(log_probs, self.refusal_ids)
        seen = torch.stack([states[layer] for layer in self.cosmic.layers], dim=1)
        return self.cosmic.refusing(seen) if job.kind == "added" else -self.cosmic.complying(seen)

    def _gather(self, job: Job, found: list[Tensor]) -> Figures:
        """The figures of every group, in the order of the prompts."""
        values = torch.empty(len(job.candidates), self.n_prompts, dtype=torch.float64)
        for group, figures in zip(self._groups_of(job), found, strict=True):
            values[:, list(group.places)] = figures
        return values[:, list(self.prompts_of(job))]

    def _prefix_of(self, job: Job) -> Any:  # noqa: ANN401 - a cache of transformers
        """The attention cache of the prefix under each candidate of ``job``."""
        past = empty_cache(self.loaded)
        ids = self.groups[0].ids[:1, : self.prefix]
        with self._intervening(job, lambda: self.base.states[0][job.layer][:1, : self.prefix]):
            self._last(ids.repeat(len(job.candidates), 1), past, begin=True)
        if self._begins_late(job):
            past.layers[: job.layer] = self.base.cache.layers[: job.layer]
        return past

    def _intervening(self, job: Job, state: Callable[[], Tensor]) -> AbstractContextManager[None]:
        """The hooks of a job.  ``state`` gives what enters its layer in the base run, where the pass begins there."""
        if job.alone is not None:
            return without(self.loaded, job.alone, self.scope)
        if job.kind == "ablated":
            if len(job.candidates) == 1:  # for models whose rows cannot be told apart as well
                return removed(self.loaded, job.subspaces[0].vectors, self.scope)
            return subspaces_ablated(self.loaded, job.subspaces, self.scope)
        vectors = torch.stack([subspace.added for subspace in job.subspaces])
        if not self._begins_late(job):
            return added_each(self.loaded, vectors, job.layer)
        return self.short.starting_at(job.layer, plus_each(state().repeat(len(vectors), 1, 1), vectors))

    def _begins_late(self, job: Job) -> bool:
        """Whether the blocks below the job's layer are left out; not where what enters them is looked at."""
        return job.kind == "added" and job.layer in self.base.starts and self.cosmic is None

    def _state(self, place: int, layer: int) -> Tensor:
        """What enters a block in the base run for a group, behind the prefix."""
        return self.base.states[place][layer][:, self.prefix :]

    def _last(
        self,
        ids: Tensor,
        past: Any = None,  # noqa: ANN401 - a cache of transformers
        *,
        begin: bool = False,
    ) -> Tensor:
        """Log-probabilities ``[rows, vocab]`` of the token after each row.

        ``past`` is the attention cache of the prefix; with ``begin`` it is empty, and ``ids`` are the prefix.
        """
        rows, width = ids.shape
        behind = 0 if past is None or begin else self.prefix
        mask = torch.ones(rows, behind + width, dtype=torch.long)
        return last_of_batch(
            self.loaded, Batch(rows=tuple(range(rows)), input_ids=ids, attention_mask=mask), cache=past
        )

    # --- sizes --------------------------------------------------------------------------------------------------------

    def _most(self, job: Job) -> int:
        """How many candidates of ``job`` fit into a forward pass."""
        if not self.base.apart:
            return 1
        most = self.max_tokens // max(group.ids[:, self.prefix :].numel() for group in self._groups_of(job))
        if self.loaded.offload:
            one = replace(job, candidates=job.candidates[:1])
            most = min(most, self.room // self._bytes(one))
        return max(1, most)

    def _bytes(self, job: Job) -> int:
        """What a job takes that waits for the next block, with the forward passes of all its groups."""
        changed = job.kind == "ablated"
        shapes = [group.ids.shape for group in self._groups_of(job)]
        sizes = [rows * waiting_bytes(self.loaded, width, changed=changed) for rows, width in shapes]
        return len(job.candidates) * sum(sizes)

    def _room(self, working_bytes: int) -> int:
        """Bytes for passes that wait: ``WAITING`` of all, or what the smallest that must run beside them leaves."""
        shapes = [group.ids.shape for group in self.groups]
        one = max(n * (width * running_bytes(self.loaded) + logit_bytes(self.loaded)) for n, width in shapes)
        return min(int(WAITING * working_bytes), max(working_bytes - one, working_bytes // 4))

    # --- the base run, and what may be taken from it ------------------------------------------------------------------

    def _base_run(self) -> Base:
        """Run the harmless prompts.  What enters each block is kept where it takes at most a quarter of the memory."""
        offload = self.loaded.offload
        tokens = sum(group.ids.numel() for group in self.harmless)
        states = tokens * self.loaded.n_layers * self.loaded.d_model * 4
        keeps = states <= (self.room if offload else free_bytes(torch.device("cpu"))) // 4
        if keeps:
            self.room -= states
        turned = self.harmless[0].ids[:1].flip(1)  # other tokens last: a model that keeps a state keeps none of these
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
        """Run a group without intervention.

        Gives its log-probabilities, what entered each block (if ``keeps``), and whether its rows can be told apart.
        """
        seen: list[Tensor] = []

        def see(_: int, x: Tensor) -> None:
            if keeps:
                seen.append(x.detach().to(device="cpu", copy=True))

        with observed(self.loaded, see), rows_apart(self.loaded, *group.ids.shape) as apart:
            log_probs = self._last(group.ids)
        return log_probs, seen, all(apart)

    def _same(self, group: Group, log_probs: Tensor) -> bool:
        """Whether ``log_probs``, of the first prompts of ``group``, are those of the base run."""
        base = self.base.log_probs[[place - self.n_harmful for place in group.places[: len(log_probs)]]]
        size = next(self.loaded.model.parameters()).dtype.itemsize
        return bool((base.exp() * (base - log_probs).abs()).sum(-1).max() < ROUNDING_NATS[size])

    def _share_prefix(self, tokens: int) -> None:
        """Take the first ``tokens`` of all prompts as their prefix, if the base run gives the same numbers that way."""
        accepts = "past_key_values" in inspect.signature(self.loaded.model.forward).parameters
        if (
            not tokens
            or not accepts
            or self.loaded.offload
            or not self.base.apart
            or not is_plain(empty_cache(self.loaded))
        ):
            return
        self.prefix = tokens
        try:
            self.base.cache = empty_cache(self.loaded)
            self._last(self.groups[0].ids[:1, :tokens], self.base.cache, begin=True)
            same = all(
                self._same(group, self._last(group.ids[:, tokens:], repeated(self.base.cache, len(group.ids))))
                for group in self.harmless
            )
        except CANNOT:
            same = False
        if not same:
            self.prefix = 0

    def _check_starts(self) -> None:
        """Find the layers at which a forward pass may begin: where one prompt gets the numbers of the base run."""
        if not self.base.states:
            return
        group = self.harmless[0]
        one = replace(group, places=group.places[:1], ids=group.ids[:1])
        layers = range(1, self.loaded.n_layers)
        same = run_together(self.loaded, [partial(self._starts, one, layer) for layer in layers])
        self.base.starts = {layer for layer, good in zip(layers, same, strict=True) if good}

    def _starts(self, one: Group, layer: int) -> bool:
        past = repeated(self.base.cache, 1) if self.prefix else None
        try:
            with self.short.starting_at(layer, self._state(0, layer)[:1]):
                return self._same(one, self._last(one.ids[:, self.prefix :], past))
        except CANNOT:
            return False


@contextmanager
def candidate_scorer(
    loaded: LoadedModel,
    harmful: Sequence[list[int]],
    harmless: Sequence[list[int]],
    refusal_ids: Sequence[int],
    *,
    batch_size: int,
    max_tokens: int | None = None,
    scope: Scope = WHOLE,
    cosmic: Cosmic | None = None,
) -> Iterator[CandidateScorer]:
    """A ``CandidateScorer`` for encoded prompts, its base run done; candidates are ablated where ``scope`` holds."""
    options = {"batch_size": batch_size, "max_tokens": max_tokens, "scope": scope, "cosmic": cosmic}
    with shortened(loaded) as short:
        yield CandidateScorer(loaded, short, harmful, harmless, refusal_ids, **options)
