"""Finding a direction: candidates measured on prompts of two classes, and one of them chosen.

Both stages keep what is finished in ``Steps``, so that a stopped one continues.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abliterate.checkpoint import direction_file as direction_files
from abliterate.checkpoint.output import fingerprint
from abliterate.errors import NonFiniteError, TooFewPromptsError, UsageError
from abliterate.evaluate.refusal_tokens import RefusalTokens, find_refusal_tokens, given_refusal_tokens
from abliterate.events import Noted
from abliterate.method.directions import Candidate, DirectionSet
from abliterate.method.estimators import Need, estimate, needs_of, stability
from abliterate.method.moments import ActivationStats, Moments
from abliterate.method.selection import PARETO_FALLBACK, SelectionRule
from abliterate.model import measuring
from abliterate.model.memory import available_bytes
from abliterate.model.scores import ScoreFile
from abliterate.publishing import manifest
from abliterate.recipe import NOT_IN_NUMBERS
from abliterate.workflow.session import Session
from abliterate.workflow.steps import Steps

FEW, HANDFUL = 32, 8
"""Of a class: below the first the user is warned, below the second a direction is not measured unless asked for."""


def measure(
    session: Session,
    *,
    steps: Steps | None = None,
    covariance: Path | None = None,
) -> DirectionSet:
    """Refusal tokens, filtered prompts, statistics, and the candidates that the recipe's estimators make of them.

    ``steps`` keeps what is finished, so that the same call continues where it was stopped.  ``covariance`` is where to
    write the covariances of both classes at the last position.

    Raises:
        UsageError: there is no such estimator, or no memory for the statistics that are needed.
        PromptError: the prompts or the chat template are unusable, or the model refuses nothing.
        NonFiniteError: an activation, or every candidate, is NaN or infinite.
    """
    contrast, recipe, steps = session.contrast, session.recipe, steps or Steps()
    needs = needs_of(recipe.find.estimators) | (
        frozenset[Need]() if covariance is None else frozenset[Need](["covariance"])
    )
    options = {"batch_size": recipe.model.batch_size, "on_event": session.on_event}
    tokens = RefusalTokens.of(steps.document("refusal-tokens", lambda: asdict(_refusal_tokens(session, options))))
    harmful, harmless = contrast.harmful_train.texts, contrast.harmless_train.texts
    kept = measuring.Filtered(
        harmful=tuple(harmful), harmless=tuple(harmless), harmful_before=len(harmful), harmless_before=len(harmless)
    )
    if recipe.find.filter_prompts:
        kept = _typical(session, harmful, harmless, tokens.ids, steps, "typical-train", options)
    warning = few_kept(session.loaded.name, kept, allow_few=recipe.find.allow_few)
    if warning:
        session.on_event(Noted(text=warning))
    statistics = _statistics(session, kept, needs, steps, options)
    if covariance is not None:
        direction_files.save_covariances(covariance, statistics.moments)
    metadata = {
        "model": session.checkpoint.name,
        "revision": session.checkpoint.revision,
        "position_tokens": list(session.chat.position_tokens),
        "template_sha256": session.chat.template_sha256,
        "system": recipe.model.system,
        "prompts": contrast.hashes(),
        "kept": {"harmful_train": len(kept.harmful), "harmless_train": len(kept.harmless)},
        "of": {"harmful_train": kept.harmful_before, "harmless_train": kept.harmless_before},
        "stability": {name: round(its, 4) for name, its in stability(statistics, recipe.find.estimators).items()},
        "refusal_tokens": {"ids": list(tokens.ids), "texts": list(tokens.texts)},
        "versions": manifest.versions(),
        "device": f"{session.loaded.device.type} ({platform.machine()})",
    }
    candidates = _finite(session, estimate(statistics, recipe.find.estimators))
    return DirectionSet(candidates=candidates, statistics=statistics.means_alone(), metadata=metadata)


def _finite(session: Session, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """``candidates`` without those that hold NaN or infinity, which no file of directions takes.

    Raises:
        NonFiniteError: none is left.
    """
    broken = [one.id for one in candidates if not all(bool(its.vectors.isfinite().all()) for its in one.subspaces)]
    left_out = frozenset(broken)
    finite = tuple(one for one in candidates if one.id not in left_out)
    if not finite:
        made = "all candidates hold NaN or infinity" if broken else "the estimators made no candidate"
        raise NonFiniteError(f"{session.checkpoint.name}: {made}", "choose another estimator, or give more prompts")
    if broken:
        text = f"left out, as they hold NaN or infinity: {len(broken)} candidates, {broken[0]} the first"
        session.on_event(Noted(text=text))
    return finite


def _statistics(
    session: Session, kept: measuring.Filtered, needs: frozenset[Need], steps: Steps, options: Mapping[str, Any]
) -> ActivationStats:
    """What ``needs`` names, of both classes."""
    _check_room(session, kept, needs)
    step = "-and-".join(["mean", *sorted(needs - {"means"})])
    found: dict[str, dict[str, Tensor]] = {}
    drawn = {}
    for kind, prompts in (("harmful", kept.harmful), ("harmless", kept.harmless)):
        drawn[kind] = half_of(len(prompts), seed=session.recipe.find.seed)
        work = partial(
            measuring.measure_class, session.loaded, session.chat, prompts, needs, half=drawn[kind],
            task=f"measure {kind} prompts", **options,
        )  # fmt: skip
        found[kind] = steps.tensors(f"{step}-{kind}", work)
    counts = {"harmful": len(kept.harmful), "harmless": len(kept.harmless)}
    return ActivationStats(
        positions=session.chat.positions,
        moments={
            kind: Moments(count=counts[kind], mean=its["mean"], covariance=its.get("covariance"))
            for kind, its in found.items()
        },
        samples={kind: its["samples"] for kind, its in found.items() if "samples" in its},
        halves={
            kind: halves_of(its["mean"], its["half"], counts[kind], len(drawn[kind]))
            for kind, its in found.items()
            if "half" in its
        },
    )


def half_of(count: int, *, seed: int) -> frozenset[int]:
    """A random half of the numbers below ``count``; none where there are fewer than two."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return frozenset(order[: count // 2].tolist())


def halves_of(mean: Tensor, half: Tensor, count: int, drawn: int) -> tuple[Moments, Moments]:
    """The means over ``drawn`` of ``count`` prompts and over the others, given those over the first and over all."""
    other = (count * mean - drawn * half) / (count - drawn)
    return Moments(count=drawn, mean=half), Moments(count=count - drawn, mean=other)


def few_kept(model: str, kept: measuring.Filtered, *, allow_few: bool) -> str:
    """What to say where few prompts were left to measure on; empty where they are enough.

    Whoever brings fewer than ``HANDFUL`` prompts has asked for few.

    Raises:
        TooFewPromptsError: fewer than ``HANDFUL`` of a class are left, of more; and the recipe does not allow few.
    """
    classes = {
        "harmful": (len(kept.harmful), kept.harmful_before), "harmless": (len(kept.harmless), kept.harmless_before)
    }  # fmt: skip
    counts = " and ".join(f"{left} of {before} {kind}" for kind, (left, before) in classes.items())
    hint = "give more prompts, or a set that this model declines (harmful) and answers (harmless)"
    if any(left < min(HANDFUL, before) for left, before in classes.values()) and not allow_few:
        raise TooFewPromptsError(
            f"{model}: behaves as their class says on {counts} prompts only", f"{hint}, or --allow-few"
        )
    few = any(left < FEW for left, _ in classes.values())
    return f"the direction is measured on few prompts: {counts}; {hint}" if few else ""


def select(session: Session, directions: DirectionSet, *, steps: Steps | None = None) -> DirectionSet:
    """Choose a candidate by the paper's rule, from its scores on the validation prompts.

    Only what the choice depends on is scored, or every candidate where the recipe says ``all_scores``.
    ``steps`` keeps what is finished, so that the same call continues where it was stopped.

    Raises:
        PromptError: the validation prompts are unusable.
        UsageError: the directions were not measured on this model.
    """
    loaded, chat, recipe = session.loaded, session.chat, session.recipe
    if (directions.n_layers, directions.d_model) != (loaded.n_layers, loaded.d_model):
        raise UsageError(
            f"the directions are for {directions.n_layers} layers of width {directions.d_model}, "
            f"{loaded.name} has {loaded.n_layers} of width {loaded.d_model}",
            "measure them on this model",
        )
    options = {"batch_size": recipe.model.batch_size, "on_event": session.on_event}
    stored = directions.metadata.get("refusal_tokens", {}).get("ids")
    ids = tuple(stored) if stored else _refusal_tokens(session, options).ids
    harmful, harmless = session.contrast.harmful_val.texts, session.contrast.harmless_val.texts
    steps = steps or Steps()
    step = f"typical-val-{'-'.join(map(str, ids))}"  # candidates measured again may name other tokens
    prompts = _typical(session, harmful, harmless, ids, steps, step, options)
    kept = steps.path("scores.safetensors")
    store = ScoreFile(kept) if kept else None
    rule = SelectionRule(
        max_kl_nats=recipe.find.max_kl_nats, min_induce=recipe.find.min_induce, prune_layers=recipe.find.prune_layers
    )
    choosing = measuring.choose_from_all if recipe.find.all_scores else measuring.choose_candidate
    chosen = choosing(loaded, chat, directions.candidates, prompts, ids, rule, store=store, **options)
    if chosen.choice.rule == PARETO_FALLBACK:
        session.on_event(
            Noted(text="no candidate passes the paper's rule: took the knee of the Pareto front of bypass and KL")
        )
    if chosen.prompt_passes < chosen.of:
        text = (
            f"candidates took {chosen.prompt_passes:,} prompt passes, {chosen.of / chosen.prompt_passes:.1f} x fewer "
            f"than the {chosen.of:,} of scoring each in full (--all-scores), which gives the same choice"
        )
        session.on_event(Noted(text=text))
    metadata = {**directions.metadata, "scored": chosen.scored}
    return replace(directions, scores=chosen.scores, choice=chosen.choice, metadata=metadata)


def _check_room(session: Session, kept: measuring.Filtered, needs: frozenset[Need]) -> None:
    """Check that covariances and samples fit into memory.

    Covariances take one class in float64 while they are summed up, and both in float32; samples both in float32.

    Raises:
        UsageError: they do not.
    """
    loaded = session.loaded
    n, d, floats = loaded.n_layers, loaded.d_model, torch.float32.itemsize
    sizes = {
        "covariances": 2 * n * d**2 * torch.float64.itemsize if "covariance" in needs else 0,
        "samples": (len(kept.harmful) + len(kept.harmless)) * n * d * floats if "samples" in needs else 0,
    }
    needed, free = sum(sizes.values()), session.recipe.model.memory_bytes or available_bytes()
    if needed > free:
        what = " and ".join(name for name, size in sizes.items() if size)
        raise UsageError(
            f"{what} of {n} layers of width {d} take {needed / 2**30:,.2f} GiB of memory, and there are "
            f"{free / 2**30:,.2f}",
            "give more --memory, leave out --covariance, or choose an estimator that needs the means alone",
        )


def _typical(
    session: Session,
    harmful: Sequence[str],
    harmless: Sequence[str],
    refusal_ids: Sequence[int],
    steps: Steps,
    name: str,
    options: Mapping[str, Any],
) -> measuring.Filtered:
    """Prompts on which the model behaves as their class says."""

    def find() -> dict[str, Any]:
        return asdict(measuring.keep_typical(session.loaded, session.chat, harmful, harmless, refusal_ids, **options))

    found = steps.document(name, find)
    return measuring.Filtered(
        harmful=tuple(found["harmful"]),
        harmless=tuple(found["harmless"]),
        harmful_before=found["harmful_before"],
        harmless_before=found["harmless_before"],
    )


def work_fingerprint(session: Session) -> str:
    """What makes two measurements the same: tool, source files, and every option that touches the numbers."""
    recipe = session.recipe.flat(without=NOT_IN_NUMBERS)
    return fingerprint({**session.checkpoint.identity(), "recipe": recipe})


def _refusal_tokens(session: Session, options: Mapping[str, Any]) -> RefusalTokens:
    if session.recipe.find.refusal_tokens:
        return given_refusal_tokens(session.chat, session.recipe.find.refusal_tokens)
    contrast = session.contrast
    return find_refusal_tokens(
        session.loaded, session.chat, contrast.harmful_train.texts, contrast.harmless_train.texts, **options
    )
