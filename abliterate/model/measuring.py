"""Measuring candidate directions and scoring them on a model (Arditi et al. 2024, section 2.3 and appendix C)."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.errors import PromptError
from abliterate.events import Advanced, Finished, OnEvent, Started, ignore
from abliterate.method.directions import CandidateScore, DirectionSet
from abliterate.method.moments import Moments, RunningCovariance, RunningMoments
from abliterate.method.statistics import refusal_metric
from abliterate.model.chat import ChatFormat
from abliterate.model.forward import check_finite, of_last_log_probs, see_residuals
from abliterate.model.load import LoadedModel
from abliterate.model.scores import ScoreFile, Scores
from abliterate.model.scoring import Figures, Job, scorer


@dataclass(frozen=True, slots=True, kw_only=True)
class Filtered:
    """Prompts on which the model behaves as their class says, and how many there were before."""

    harmful: tuple[str, ...]
    harmless: tuple[str, ...]
    harmful_before: int
    harmless_before: int


def keep_typical(
    loaded: LoadedModel,
    chat: ChatFormat,
    harmful: Sequence[str],
    harmless: Sequence[str],
    refusal_ids: Sequence[int],
    *,
    batch_size: int,
    on_event: OnEvent = ignore,
) -> Filtered:
    """Keep harmful prompts with refusal metric > 0 and harmless ones with < 0, as the paper does.

    Raises:
        PromptError: a class is left empty.
        NonFiniteError: the model's logits are not finite.
    """
    task = "filter prompts"
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


def mean_residual(
    loaded: LoadedModel,
    chat: ChatFormat,
    prompts: Sequence[str],
    *,
    batch_size: int,
    task: str,
    spread: Sequence[RunningCovariance] | None = None,
    on_event: OnEvent = ignore,
) -> Moments:
    """Mean residual entering each block at each post-instruction position, ``[positions, layers, d]`` in float64.

    ``spread``, one for each layer, takes in those at the last position.

    Raises:
        NonFiniteError: an activation is NaN or infinite; names the block and the prompt.
    """
    n_positions = len(chat.positions)
    layers = [RunningMoments((n_positions, loaded.d_model)) for _ in range(loaded.n_layers)]

    def see(rows: tuple[int, ...], layer: int, values: Tensor) -> None:
        check_finite(values, [prompts[row] for row in rows], f"activations entering block {layer}")
        layers[layer].update(values)
        if spread is not None:
            spread[layer].update(values[:, -1])

    on_event(Started(task=task, total=len(prompts), unit="prompts"))
    see_residuals(
        loaded, chat, prompts, n_positions, see, batch_size=batch_size,
        advance=lambda n: on_event(Advanced(task=task, amount=n)),
    )  # fmt: skip
    on_event(Finished(task=task))
    return Moments(count=len(prompts), mean=torch.stack([layer.finish().mean for layer in layers], dim=1))


def difference_of_means(chat: ChatFormat, harmful: Moments, harmless: Moments) -> DirectionSet:
    """The candidates ``r[i, l] = mean_harmful - mean_harmless`` (eq. 1 to 3 of the paper), raw."""
    return DirectionSet(
        candidates=(harmful.mean - harmless.mean).to(torch.float32),
        harmful_mean=harmful.mean.to(torch.float32),
        harmless_mean=harmless.mean.to(torch.float32),
        positions=chat.positions,
    )


def score_candidates(
    loaded: LoadedModel,
    chat: ChatFormat,
    directions: DirectionSet,
    prompts: Filtered,
    refusal_ids: Sequence[int],
    *,
    batch_size: int,
    max_tokens: int | None = None,
    store: ScoreFile | None = None,
    on_event: OnEvent = ignore,
) -> list[CandidateScore]:
    """Bypass, induce and KL of every candidate on the validation prompts.

    A candidate that breaks the model gets NaN scores and is dropped by the selection.  ``max_tokens`` bounds a forward
    pass (None: found from the free memory).  ``store`` keeps what is finished: the same work, begun again, goes on.
    """
    task = "score candidates"
    grid = [(position, layer) for position in directions.positions for layer in range(directions.n_layers)]
    vectors = [directions.candidate(position, layer) for position, layer in grid]
    usable = [c for c, r in enumerate(vectors) if torch.isfinite(r).all() and torch.any(r != 0)]
    key = _work_key(loaded, chat, directions, prompts, refusal_ids)
    scores = store.load(key, len(grid)) if store else Scores.none_of(len(grid))
    on_event(Started(task=task, total=len(grid), unit="candidates"))
    on_event(Advanced(task=task, amount=len(grid) - sum(not scores.complete(candidate) for candidate in usable)))
    jobs = list(_jobs(grid, vectors, [c for c in usable if not scores.complete(c)], scores))

    def done(job: Job, figures: Figures) -> None:
        for figure, values in figures.items():
            for candidate, value in zip(job.candidates, values.tolist(), strict=True):
                scores.put(figure, candidate, value)
        on_event(Advanced(task=task, amount=sum(map(scores.complete, job.candidates))))
        if store:
            store.save(key, scores)

    if jobs:
        harmful, harmless = ([chat.encode(prompt) for prompt in some] for some in (prompts.harmful, prompts.harmless))
        with scorer(loaded, harmful, harmless, refusal_ids, batch_size=batch_size, max_tokens=max_tokens) as scoring:
            scoring.run(scoring.split(jobs), done)
    on_event(Finished(task=task))
    return [
        CandidateScore(
            position=position,
            layer=layer,
            bypass=scores.get("bypass", candidate),
            induce=scores.get("induce", candidate),
            kl_nats=scores.get("kl_nats", candidate),
        )
        for candidate, (position, layer) in enumerate(grid)
    ]


def _jobs(
    grid: Sequence[tuple[int, int]], vectors: Sequence[Tensor], open_ones: Sequence[int], scores: Scores
) -> Iterator[Job]:
    """What is to be run for the candidates that are not finished: their ablations, and their additions by layer."""
    todo = [c for c in open_ones if not (scores.has("bypass", c) and scores.has("kl_nats", c))]
    if todo:
        yield Job(kind="ablated", candidates=tuple(todo), vectors=torch.stack([vectors[c] for c in todo]))
    for layer in sorted({layer for _, layer in grid}):
        todo = [c for c in open_ones if grid[c][1] == layer and not scores.has("induce", c)]
        if todo:
            yield Job(
                kind="added", candidates=tuple(todo), vectors=torch.stack([vectors[c] for c in todo]), layer=layer
            )


def _work_key(
    loaded: LoadedModel, chat: ChatFormat, directions: DirectionSet, prompts: Filtered, refusal_ids: Sequence[int]
) -> str:
    """What tells this work from any other."""
    parts = [loaded.name, chat.template_sha256, chat.system, directions.positions, prompts.harmful, prompts.harmless]
    digest = hashlib.sha256(json.dumps([*parts, list(refusal_ids)]).encode())
    digest.update(directions.candidates.contiguous().numpy().tobytes())
    return digest.hexdigest()
