"""Measuring activations, and scoring candidates, on a model (Arditi et al. 2024, section 2.3 and appendix C)."""

import hashlib
import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from abliterate.errors import PromptError
from abliterate.events import Advanced, Finished, Noted, OnEvent, Started, ignore
from abliterate.method.class_sums import ClassSums
from abliterate.method.directions import Candidate, CandidateScore, Choice, Subspace
from abliterate.method.estimators import Need
from abliterate.method.few_scores import FIGURES, Pace, choose_from_few
from abliterate.method.scope import WHOLE, Scope
from abliterate.method.selection import SelectionRule, choose, is_late
from abliterate.method.selection_metrics import Cosmic
from abliterate.method.statistics import refusal_metric
from abliterate.model.asking import AT_ONCE, STOPPING, Asked, can_be_scored
from abliterate.model.chat import ChatFormat
from abliterate.model.forward import check_finite, of_last_log_probs, see_residuals
from abliterate.model.jobs import Job
from abliterate.model.load import LoadedModel
from abliterate.model.ranks import is_first, meet
from abliterate.model.scores import ScoreFile, Scores
from abliterate.model.scoring import candidate_scorer

TASK = "score candidates"
OUT_OF_CORE = Pace(first=8, together=True)
"""Each round takes a weight pass: few of them, with whole scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filtered:
    """Prompts on which the model behaves as their class says, and how many there were before."""

    harmful: tuple[str, ...]
    harmless: tuple[str, ...]
    harmful_before: int
    harmless_before: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """What candidates are scored on: prompts, the tokens that refusals begin with, and where candidates are ablated.

    ``cosmic``: what they are scored by in place of these tokens.
    """

    prompts: Filtered
    refusal_ids: Sequence[int]
    scope: Scope = WHOLE
    cosmic: Cosmic | None = None


def keep_typical(
    loaded: LoadedModel,
    chat: ChatFormat,
    harmful: Sequence[str],
    harmless: Sequence[str],
    refusal_ids: Sequence[int],
    *,
    batch_size: int,
    task: str = "filter prompts",
    on_event: OnEvent = ignore,
) -> Filtered:
    """Keep harmful prompts with refusal metric > 0 and harmless ones with < 0, as the paper does.

    Raises:
        PromptError: a class is left empty.
        NonFiniteError: the model's logits are not finite.
    """
    prompts = [*harmful, *harmless]
    on_event(Started(task=task, total=len(prompts), unit="prompts"))
    found = of_last_log_probs(
        loaded,
        chat,
        prompts,
        lambda log_probs: refusal_metric(log_probs, list(refusal_ids)),
        batch_size=batch_size,
        advance=lambda n: on_event(Advanced(task=task, amount=n)),
    )
    on_event(Finished(task=task))
    check_finite(found[:, None], prompts, "logits")
    metric = found.tolist()
    refused = tuple(prompt for prompt, value in zip(harmful, metric, strict=False) if value > 0)
    answered = tuple(prompt for prompt, value in zip(harmless, metric[len(harmful) :], strict=True) if value < 0)
    if not refused:
        raise PromptError(
            f"{loaded.name} refuses none of the {len(harmful)} harmful prompts",
            "use prompts that this model declines, or check --refusal-token",
        )
    if not answered:
        raise PromptError(
            f"{loaded.name} refuses all of the {len(harmless)} harmless prompts",
            "use prompts that this model answers, or check --refusal-token",
        )
    return Filtered(harmful=refused, harmless=answered, harmful_before=len(harmful), harmless_before=len(harmless))


def measure_class(
    loaded: LoadedModel,
    chat: ChatFormat,
    prompts: Sequence[str],
    needs: Collection[Need] = ("means",),
    *,
    half: Collection[int] = (),
    categories: Sequence[str] = (),
    batch_size: int,
    task: str,
    on_event: OnEvent = ignore,
) -> dict[str, Tensor]:
    """What ``needs`` names, of the residual that enters each block after the prompts of one class (see ``ClassSums``).

    ``half`` are numbers of prompts over which the mean is taken once more, ``categories`` those of all prompts.

    Raises:
        PromptError: one prompt is too few for a covariance.
        NonFiniteError: an activation is NaN or infinite; names the block and the prompt.
    """
    if "covariance" in needs and len(prompts) < 2:
        raise PromptError(f"{loaded.name}: {task}: one is left, and a covariance takes two", "give more prompts")
    shape = loaded.n_layers, len(chat.positions), loaded.d_model
    sums = ClassSums(*shape, needs, rows=len(prompts), halved=bool(half), categories=categories)

    def see(rows: tuple[int, ...], layer: int, values: Tensor) -> None:
        check_finite(values, [prompts[row] for row in rows], f"activations entering block {layer}")
        sums.add(layer, rows, values, [row in half for row in rows])

    on_event(Started(task=task, total=len(prompts), unit="prompts"))
    see_residuals(
        loaded, chat, prompts, len(chat.positions), see, batch_size=batch_size,
        advance=lambda n: on_event(Advanced(task=task, amount=n)),
    )  # fmt: skip
    on_event(Finished(task=task))
    return sums.finish()


def score_candidates(
    loaded: LoadedModel,
    chat: ChatFormat,
    candidates: Sequence[Candidate],
    on: Validation,
    *,
    batch_size: int,
    max_tokens: int | None = None,
    store: ScoreFile | None = None,
    on_event: OnEvent = ignore,
) -> list[CandidateScore]:
    """Bypass, induce and KL of every candidate on the validation prompts, in the order of ``candidates``.

    A candidate that breaks the model gets NaN scores and is dropped by the selection.  ``max_tokens`` bounds a forward
    pass (None: found from the free memory).  ``store`` keeps what is finished: the same work, begun again, goes on.
    Where a candidate has another subspace in each layer, that of its own layer is the one that is added.
    With COSMIC, ``bypass`` is the sum that it takes the highest of, negated.
    """
    usable = _usable(candidates, on_event)
    scores, save = _kept(loaded, chat, candidates, on, store)
    todo = [place for place in usable if not scores.complete(place)]
    on_event(Started(task=TASK, total=len(candidates), unit="candidates"))
    on_event(Advanced(task=TASK, amount=len(candidates) - len(todo)))

    def done(job: Job, _: int) -> None:
        on_event(Advanced(task=TASK, amount=sum(map(scores.complete, job.candidates))))
        save()

    if todo:
        options = {"batch_size": batch_size, "max_tokens": max_tokens, "scope": on.scope, "cosmic": on.cosmic}
        with candidate_scorer(loaded, *_encoded(chat, on.prompts), on.refusal_ids, **options) as scorer:
            table = Asked(scorer, candidates, scores, parts=AT_ONCE, done=done)
            table.ask([(figure, n) for figure in FIGURES for n in todo if not table.seen(figure, n).whole])
    on_event(Finished(task=TASK))
    return [
        CandidateScore(
            candidate=candidate.id,
            layer=candidate.layer,
            position=candidate.position,
            bypass=scores.get("bypass", place) - (0.0 if on.cosmic is None else scores.get("induce", place)),
            induce=scores.get("induce", place),
            kl_nats=scores.get("kl_nats", place),
            kl_error_nats=scores.error("kl_nats", place),
        )
        for place, candidate in enumerate(candidates)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The choice of a rule, what is known of each candidate, and what it took.

    ``prompt_passes``: prompts that were run for candidates, each counted for each candidate and intervention.  ``of``:
    how many scoring every candidate takes.
    """

    choice: Choice
    scores: tuple[CandidateScore, ...]
    prompt_passes: int
    of: int

    @property
    def scored(self) -> dict[str, int]:
        """How much was scored, as plain data."""
        whole = sum(not math.isnan(one.bypass + one.induce + one.kl_nats) for one in self.scores)
        return {"in_full": whole, "candidates": len(self.scores), "prompt_passes": self.prompt_passes, "of": self.of}


def choose_candidate(
    loaded: LoadedModel,
    chat: ChatFormat,
    candidates: Sequence[Candidate],
    on: Validation,
    rule: SelectionRule,
    *,
    batch_size: int,
    store: ScoreFile | None = None,
    on_event: OnEvent = ignore,
) -> Chosen:
    """What ``rule`` takes among ``candidates``, from no more scores than that depends on (``method.few_scores``).

    It is what ``score_candidates`` and ``choose`` give, up to the rounding of forward passes of another size.

    Raises:
        PromptError: every candidate has a NaN score or lies in a pruned layer.
    """
    scores, save = _kept(loaded, chat, candidates, on, store)
    each = _each(on.prompts)
    usable = [candidates[place] for place in _usable(candidates, on_event)]
    most = each * sum(not is_late(one.layer, loaded.n_layers, rule) for one in usable)
    advance = partial(Advanced, task=TASK)
    on_event(Started(task=TASK, total=most, unit="prompt passes"))
    before = min(most, scores.prompt_passes)
    on_event(advance(amount=before))

    def done(_: Job, amount: int) -> None:
        on_event(advance(amount=amount))
        save()

    options = {"batch_size": batch_size, "scope": on.scope}
    with candidate_scorer(loaded, *_encoded(chat, on.prompts), on.refusal_ids, **options) as scorer:
        pace, parts = (Pace(), STOPPING) if loaded.offload is None else (OUT_OF_CORE, AT_ONCE)
        table = Asked(scorer, candidates, scores, parts=parts, done=done)
        choice, judged = choose_from_few(candidates, table, loaded.n_layers, rule, pace)
    on_event(advance(amount=max(0, most - scores.prompt_passes)))
    on_event(Finished(task=TASK))
    return Chosen(choice=choice, scores=judged, prompt_passes=scores.prompt_passes, of=each * len(usable))


def choose_from_all(
    loaded: LoadedModel,
    chat: ChatFormat,
    candidates: Sequence[Candidate],
    on: Validation,
    rule: SelectionRule,
    *,
    batch_size: int,
    store: ScoreFile | None = None,
    on_event: OnEvent = ignore,
) -> Chosen:
    """The same from the scores of every candidate (``score_candidates``).

    Raises:
        PromptError: every candidate has a NaN score or lies in a pruned layer.
    """
    options = {"batch_size": batch_size, "store": store, "on_event": on_event}
    scores = score_candidates(loaded, chat, candidates, on, **options)
    choice, judged = choose(scores, loaded.n_layers, rule)
    passes = _each(on.prompts) * sum(map(can_be_scored, candidates))
    return Chosen(choice=choice, scores=judged, prompt_passes=passes, of=passes)


def _usable(candidates: Sequence[Candidate], on_event: OnEvent) -> list[int]:
    """The places of those that can be scored; says which layer by layer ones cannot."""
    layered = (one for one in candidates if not isinstance(one.subspace, Subspace) and not can_be_scored(one))
    if odd := [candidate.id for candidate in layered]:
        what = "have a zero vector in some layer, or nothing at their own"
        on_event(Noted(text=f"not scored, as they {what}: {len(odd)} candidates, {odd[0]} the first"))
    return [place for place, candidate in enumerate(candidates) if can_be_scored(candidate)]


def _each(prompts: Filtered) -> int:
    """Prompt passes that all scores of a candidate take."""
    return len(prompts.harmful) + 2 * len(prompts.harmless)


def _encoded(chat: ChatFormat, prompts: Filtered) -> tuple[list[list[int]], list[list[int]]]:
    return [chat.encode(prompt) for prompt in prompts.harmful], [chat.encode(prompt) for prompt in prompts.harmless]


def _kept(
    loaded: LoadedModel,
    chat: ChatFormat,
    candidates: Sequence[Candidate],
    on: Validation,
    store: ScoreFile | None,
) -> tuple[Scores, Callable[[], None]]:
    """What is known of this work already, and how to keep what follows."""
    shape = len(candidates), len(on.prompts.harmful), len(on.prompts.harmless)
    key = _work_key(loaded, chat, candidates, on)
    if store is None:
        return Scores.none_of(*shape), lambda: None
    scores = store.load(key, *shape)
    meet()  # nobody reads what the first process has written since
    return scores, partial(store.save, key, scores) if is_first() else lambda: None


def _work_key(
    loaded: LoadedModel,
    chat: ChatFormat,
    candidates: Sequence[Candidate],
    on: Validation,
) -> str:
    """What tells this work from any other."""
    places = [(candidate.id, candidate.layer, _shape(candidate)) for candidate in candidates]
    parts = [loaded.name, chat.template_sha256, chat.system, places, on.prompts.harmful, on.prompts.harmless]
    digest = hashlib.sha256(json.dumps([*parts, list(on.refusal_ids), *on.scope.as_plain]).encode())
    if on.cosmic is not None:
        digest.update(repr(on.cosmic.layers).encode())
        for mean in (on.cosmic.harmful, on.cosmic.harmless):
            digest.update(mean.contiguous().numpy().tobytes())
    for candidate in candidates:
        for tensor in (tensor for subspace in candidate.subspaces for tensor in subspace.tensors):
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _shape(candidate: Candidate) -> int | list[tuple[int, int]]:
    """How many vectors it has: the same in all layers, or layer by layer."""
    its = candidate.subspace
    return its.k if isinstance(its, Subspace) else [(layer, its[layer].k) for layer in sorted(its)]
