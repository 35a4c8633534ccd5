"""Finding a direction: candidates measured on prompts of two classes, and one of them chosen.

Both stages keep what is finished in ``Steps``, so that a stopped one continues.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abliterate.checkpoint import direction_file as direction_files
from abliterate.checkpoint.output import fingerprint
from abliterate.errors import PromptError, UsageError
from abliterate.evaluate.refusal_tokens import RefusalTokens, find_refusal_tokens, given_refusal_tokens
from abliterate.events import Noted
from abliterate.method.directions import DirectionSet
from abliterate.method.moments import Moments, RunningCovariance
from abliterate.method.selection import SelectionRule, choose
from abliterate.model import measuring
from abliterate.model.memory import available_bytes
from abliterate.model.scores import ScoreFile
from abliterate.publishing import manifest
from abliterate.recipe import NOT_IN_NUMBERS
from abliterate.workflow.session import Session
from abliterate.workflow.steps import Steps


def measure(session: Session, *, steps: Steps | None = None, covariance: Path | None = None) -> DirectionSet:
    """Measure candidate directions: refusal tokens, filtered prompts, difference of means.

    ``steps`` keeps what is finished, so that the same call continues where it was stopped.  ``covariance`` is where to
    write the covariances of both classes at the last position.

    Raises:
        UsageError: there is no memory for the covariances.
        PromptError: the prompts or the chat template are unusable, or the model refuses nothing.
        NonFiniteError: an activation is NaN or infinite.
    """
    contrast, recipe, steps = session.contrast, session.recipe, steps or Steps()
    options = {"batch_size": recipe.model.batch_size, "on_event": session.on_event}
    tokens = RefusalTokens.of(steps.document("refusal-tokens", lambda: asdict(_refusal_tokens(session, options))))
    harmful, harmless = contrast.harmful_train.texts, contrast.harmless_train.texts
    kept = measuring.Filtered(
        harmful=tuple(harmful), harmless=tuple(harmless), harmful_before=len(harmful), harmless_before=len(harmless)
    )
    if recipe.find.filter_prompts:
        kept = _typical(session, harmful, harmless, tokens.ids, steps, "typical-train", options)

    def moments(kind: str, prompts: Sequence[str]) -> dict[str, Tensor]:
        spread = None
        if covariance is not None:
            spread = [RunningCovariance((loaded.d_model,)) for _ in range(loaded.n_layers)]
        if spread is not None and len(prompts) < 2:
            raise PromptError(
                f"{loaded.name}: one {kind} prompt is left, and a covariance takes two", "give more prompts"
            )
        task = f"measure {kind} prompts"
        found = {"mean": measuring.mean_residual(loaded, chat, prompts, task=task, spread=spread, **options).mean}
        if spread is None:
            return found
        covariances = torch.empty(loaded.n_layers, loaded.d_model, loaded.d_model)
        for layer in range(loaded.n_layers):
            covariances[layer] = spread.pop(0).finish().covariance
        return {**found, "covariance": covariances}

    loaded, chat = session.loaded, session.chat
    if covariance is not None:
        _check_room_for_covariances(session)
    step = "mean" if covariance is None else "mean-and-covariance"
    found = {}
    for kind, prompts in (("harmful", kept.harmful), ("harmless", kept.harmless)):
        stored = steps.tensors(f"{step}-{kind}", lambda kind=kind, prompts=prompts: moments(kind, prompts))
        found[kind] = Moments(count=len(prompts), mean=stored["mean"], covariance=stored.get("covariance"))
    measured = measuring.difference_of_means(chat, found["harmful"], found["harmless"])
    if covariance is not None:
        direction_files.save_covariances(covariance, found)
    metadata = {
        "model": session.checkpoint.name,
        "revision": session.checkpoint.revision,
        "position_tokens": list(chat.position_tokens),
        "template_sha256": chat.template_sha256,
        "system": recipe.model.system,
        "prompts": contrast.hashes(),
        "kept": {"harmful_train": len(kept.harmful), "harmless_train": len(kept.harmless)},
        "refusal_tokens": {"ids": list(tokens.ids), "texts": list(tokens.texts)},
        "versions": manifest.versions(),
        "device": f"{loaded.device.type} ({platform.machine()})",
    }
    return replace(measured, metadata=metadata)


def select(session: Session, directions: DirectionSet, *, steps: Steps | None = None) -> DirectionSet:
    """Score every candidate on the validation prompts and choose one by the paper's rule.

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
    scores = measuring.score_candidates(loaded, chat, directions, prompts, ids, store=store, **options)
    rule = SelectionRule(
        max_kl_nats=recipe.find.max_kl_nats, min_induce=recipe.find.min_induce, prune_layers=recipe.find.prune_layers
    )
    choice, judged = choose(scores, directions.n_layers, rule)
    if choice.rule == "pareto-fallback":
        session.on_event(
            Noted(text="no candidate passes the paper's rule: took the knee of the Pareto front of bypass and KL")
        )
    return replace(directions, scores=judged, choice=choice)


def _check_room_for_covariances(session: Session) -> None:
    """Check that the covariances fit into memory: one class in float64 while it is summed, and both in float32.

    Raises:
        UsageError: they do not.
    """
    loaded = session.loaded
    needed = 2 * loaded.n_layers * loaded.d_model**2 * torch.float64.itemsize
    free = session.recipe.model.memory_bytes or available_bytes()
    if needed > free:
        raise UsageError(
            f"covariances of {loaded.n_layers} layers of width {loaded.d_model} take {needed / 2**30:,.2f} GiB of "
            f"memory, and there are {free / 2**30:,.2f}",
            "give more --memory, or leave out --covariance",
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
