"""Measuring candidate directions and scoring them on a model (Arditi et al. 2024, section 2.3 and appendix C)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.directions import CandidateScore, DirectionSet
from abliterate.errors import PromptError
from abliterate.evaluate.statistics import kl_nats, refusal_metric
from abliterate.events import Advanced, Finished, OnEvent, Started, ignore
from abliterate.model.chat import ChatFormat
from abliterate.model.forward import check_finite, last_log_probs, residuals
from abliterate.model.interventions import ablated, added
from abliterate.model.load import LoadedModel
from abliterate.moments import Moments, RunningMoments


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
    log_probs = last_log_probs(
        loaded, chat, prompts, batch_size=batch_size, advance=lambda n: on_event(Advanced(task=task, amount=n))
    )
    on_event(Finished(task=task))
    check_finite(log_probs, prompts, "logits")
    metric = refusal_metric(log_probs, list(refusal_ids)).tolist()
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
    on_event: OnEvent = ignore,
) -> Moments:
    """Mean residual entering each block at each post-instruction position, ``[positions, layers, d]`` in float64.

    Raises:
        NonFiniteError: an activation is NaN or infinite; names the prompt.
    """
    n_positions = len(chat.positions)
    moments = RunningMoments((n_positions, loaded.n_layers, loaded.d_model))
    on_event(Started(task=task, total=len(prompts), unit="prompts"))
    for batch in residuals(loaded, chat, prompts, n_positions, batch_size=batch_size):
        check_finite(batch.values, [prompts[row] for row in batch.rows], "activations")
        moments.update(batch.values)
        on_event(Advanced(task=task, amount=len(batch.rows)))
    on_event(Finished(task=task))
    return moments.finish()


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
    on_event: OnEvent = ignore,
) -> list[CandidateScore]:
    """Bypass, induce and KL of every candidate on the validation prompts.

    A candidate that breaks the model gets NaN scores and is dropped by the selection.
    """
    ids = list(refusal_ids)
    task = "score candidates"
    n_candidates = len(directions.positions) * directions.n_layers
    on_event(Started(task=task, total=n_candidates, unit="candidates"))
    base = last_log_probs(loaded, chat, prompts.harmless, batch_size=batch_size)
    scores = []
    for position in directions.positions:
        for layer in range(directions.n_layers):
            r = directions.candidate(position, layer)
            score = CandidateScore(
                position=position, layer=layer, bypass=float("nan"), induce=float("nan"), kl_nats=float("nan")
            )
            if torch.isfinite(r).all() and torch.any(r != 0):
                score = _score(loaded, chat, r, score, prompts, base, ids, batch_size)
            scores.append(score)
            on_event(Advanced(task=task, amount=1))
    on_event(Finished(task=task))
    return scores


def _score(
    loaded: LoadedModel,
    chat: ChatFormat,
    r: Float[Tensor, " d"],
    score: CandidateScore,
    prompts: Filtered,
    base: Float[Tensor, "prompts vocab"],
    ids: list[int],
    batch_size: int,
) -> CandidateScore:
    with ablated(loaded, r[:, None]):
        on_harmful = last_log_probs(loaded, chat, prompts.harmful, batch_size=batch_size)
        on_harmless = last_log_probs(loaded, chat, prompts.harmless, batch_size=batch_size)
    with added(loaded, r, score.layer):
        induced = last_log_probs(loaded, chat, prompts.harmless, batch_size=batch_size)
    return replace(
        score,
        bypass=float(refusal_metric(on_harmful, ids).mean()),
        induce=float(refusal_metric(induced, ids).mean()),
        kl_nats=float(kl_nats(base, on_harmless).mean()),
    )
