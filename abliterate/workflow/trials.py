"""Models tried on the test prompts, one after the other, never two in memory: the base, controls, and others."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from abliterate.arch.edit_plan import EditPlan
from abliterate.checkpoint.source import Checkpoint
from abliterate.evaluate.evaluation import EvalReport
from abliterate.evaluate.observing import HARMFUL, HARMLESS, LOOK_ALIKE, Material
from abliterate.events import Noted
from abliterate.method.directions import Candidate, DirectionSet, Subspace
from abliterate.method.linalg import project_out
from abliterate.model import equivalence
from abliterate.model.edited_weights import EditedWeights
from abliterate.model.interventions import as_planned, without
from abliterate.model.lockstep import share
from abliterate.model.prompts import load_prompts
from abliterate.model.words import WordList
from abliterate.verification.behaviour import Behaviour
from abliterate.workflow.session import Session
from abliterate.workflow.views import Bench, View, read_text

HELD_OUT_PROMPTS = 32
BASE, EDITED, THIRD = "base", "edited", "third"


def side_by_side(
    session: Session,
    others: Sequence[tuple[str, Checkpoint]],
    *,
    proof: EditPlan | None = None,
    directions: DirectionSet | None = None,
    controls: bool = False,
    with_replies: bool = True,
    words: WordList | None = None,
    third: Checkpoint | None = None,
    proven: int = 0,
) -> tuple[Behaviour | None, EvalReport | None]:
    """Run the base and then each of ``others`` (name, checkpoint) on the test prompts, and on the recipe's tasks.

    With ``proof``, the plan it came from, number ``proven`` of them is compared with the base under hooks;
    ``with_replies`` evaluates replies. ``directions`` tells how far prompts reach along the chosen one; ``controls``
    adds the base with others ablated that should change nothing (``control_candidates``); these are spared the tasks.
    ``words`` are asked of all models, and of ``third``, which is asked nothing else.
    """
    recipe, prompts = session.recipe, held_out_prompts(session)
    bench = None
    if with_replies:
        bench = Bench(
            recipe=recipe, material=material_of(session), directions=directions, on_event=session.on_event, listed=words
        )
    base = View(name=BASE, its=session)
    controls_of = [
        View(name=name, its=session, hooks=partial(without, session.loaded, control), is_control=True)
        for name, control in control_candidates(directions if controls else None, seed=recipe.find.seed)
    ]
    draft = _draft(session, bench, proof, others[proven:])
    hooked, spoken = _try_base(session, bench, [base, *controls_of], draft, proof, prompts)
    pads = session.chat.pads if proof is not None else None  # an edit leaves that as it is
    session.release()
    compared = None
    for place, (name, checkpoint) in enumerate(others):
        same = pads if place == proven else None
        result = Session(
            checkpoint=checkpoint, recipe=recipe, on_event=session.on_event, pads=same, scratch=session.scratch
        )  # fmt: skip
        view = View(name=name, its=result, drafts=_drafts_of(draft) if place == proven else {})
        its = _try_other(view, bench, spoken, proof if place == proven else None, hooked, prompts)
        compared = compared or its
        result.release()
    if bench is not None and third is not None:
        result = Session(checkpoint=third, recipe=recipe, on_event=session.on_event)
        share(result.loaded, [partial(bench.ask_words, THIRD, result)])
        result.release()
    return compared, None if bench is None else bench.report(session, third=third.name if third else "")


def _draft(
    session: Session, bench: Bench | None, proof: EditPlan | None, others: Sequence[tuple[str, Checkpoint]]
) -> View | None:
    """The edited model as it is made of the base, where that spares weight passes: its replies are drafts.

    By its edited weights, or by hooks where these cannot be made on the way.
    """
    weights = session.loaded.offload if session.recipe.evaluate.backend != "vllm" else None
    if proof is None or proof.stream is None or bench is None or not others or weights is None:
        return None
    name = others[0][0]
    edited = EditedWeights.of(weights, proof, session.recipe.edit.rounding)
    if not isinstance(edited, str):
        hooks, ready = edited.applied, edited.ready
        return View(name=f"{name}, made of the base", its=session, hooks=hooks, ready=ready, is_control=True)
    said = f"{name}: its replies are drafted by hooks, as {edited}; what rounding makes it say otherwise it writes by"
    session.on_event(Noted(text=f"{said} itself, in passes of its own"))
    hooks = partial(as_planned, session.loaded, proof)
    return View(name=f"{name}, by hooks", its=session, hooks=hooks, is_control=True)


def _drafts_of(draft: View | None) -> dict[str, Mapping[str, Sequence[list[int]]]]:
    return {} if draft is None else {mode: written.tokens for mode, written in draft.written.items()}


def _try_base(
    session: Session,
    bench: Bench | None,
    views: Sequence[View],
    draft: View | None,
    proof: EditPlan | None,
    prompts: Sequence[str],
) -> tuple[equivalence.HookedBase | None, Mapping[str, Sequence[str]]]:
    """The base as ``views`` have it, itself the first; gives what the proof compares with, and its replies by mode.

    Out of core all views, and the proof's passes, share the weight passes; so do the replies of ``draft``.
    """
    found: dict[str, equivalence.HookedBase] = {}

    def under_hooks(plan: EditPlan) -> None:
        found["hooked"] = equivalence.hooked_base(
            session.loaded, session.chat, plan, prompts, batch_size=session.recipe.model.batch_size,
            on_event=session.on_event,
        )  # fmt: skip

    stages = [partial(under_hooks, proof)] if proof is not None and proof.stream is not None else []
    every = views if draft is None else [*views, draft]
    stages += [stage for view in every if bench is not None for stage in bench.writing(view)]
    if stages:
        _ = session.chat  # made before stages take turns, as other processes are asked for it
        with nullcontext() if draft is None else draft.ready():
            share(session.loaded, stages)
    if bench is None:
        return found.get("hooked"), {}
    spoken = {mode: its.replies[HARMLESS] for mode, its in views[0].written.items()}
    share(session.loaded, [stage for view in views for stage in bench.predicting(view, spoken)])
    for view in views:
        bench.note(view)
    bench.run_tasks(views[0])
    return found.get("hooked"), spoken


def _try_other(
    view: View,
    bench: Bench | None,
    spoken: Mapping[str, Sequence[str]],
    proof: EditPlan | None,
    hooked: equivalence.HookedBase | None,
    prompts: Sequence[str],
) -> Behaviour | None:
    """Another checkpoint: what it does, and how it compares with the base under the hooks of ``proof``."""
    compared: list[Behaviour] = []
    stages: list[Callable[[], Any]] = []
    if proof is not None and hooked is not None:
        stages.append(lambda: compared.append(_compared(view.its, proof, hooked, prompts)))
    if bench is not None:
        stages += [*bench.writing(view), *bench.predicting(view, spoken)]
    if stages:
        _ = view.its.chat
        share(view.its.loaded, stages)
    if bench is not None:
        _tell_of_drafts(view)
        bench.note(view)
        bench.run_tasks(view)
    return compared[0] if compared else None


def _tell_of_drafts(view: View) -> None:
    """Say how many replies are those that the base gave as its edit."""
    pairs = [
        (draft, own)
        for mode, of_mode in view.drafts.items()
        for kind, drafts in of_mode.items()
        for draft, own in zip(drafts, view.written[mode].tokens[kind], strict=True)
    ]
    if pairs:
        same = sum(draft == own for draft, own in pairs)
        text = (
            f"{view.name}: {same} of {len(pairs)} replies are, token for token, those that were written in the base's "
            "passes, as one pass shows; the others it wrote by itself from where they part"
        )
        view.its.on_event(Noted(text=text))


def material_of(session: Session) -> Material:
    """The test prompts and the text of a session's recipe.

    Raises:
        PromptError: the text cannot be read.
    """
    recipe, contrast = session.recipe, session.contrast
    prompts = {HARMFUL: contrast.harmful_test, HARMLESS: contrast.harmless_test}
    if recipe.evaluate.look_alike:
        prompts[LOOK_ALIKE] = session.fitting(load_prompts(recipe.evaluate.look_alike))
    return Material(prompts=prompts, text=read_text(recipe.evaluate.text) if recipe.evaluate.text else "")


def control_candidates(directions: DirectionSet | None, *, seed: int) -> Iterator[tuple[str, Candidate]]:
    """Candidates that should do nothing: random vectors, and random ones orthogonal to the chosen.

    They have as many vectors as the chosen candidate, of the same lengths, in the same layers.
    """
    if directions is None:
        return
    for kind in ("random", "orthogonal"):
        generator = torch.Generator().manual_seed(seed)
        made = directions.chosen.with_subspaces(partial(_random_like, generator, orthogonal=kind == "orthogonal"))
        yield f"control: {kind}", replace(made, id=f"control: {kind}")


def _random_like(generator: torch.Generator, subspace: Subspace, *, orthogonal: bool) -> Subspace:
    """Random vectors as long as those of ``subspace``, or others that are orthogonal to it."""
    shape = subspace.vectors.T.shape
    drawn, other = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    rows = project_out(other, subspace.basis) if orthogonal else drawn
    lengths = torch.linalg.vector_norm(subspace.vectors.double(), dim=0)
    return Subspace(vectors=(rows.T / torch.linalg.vector_norm(rows, dim=1) * lengths).float())


def held_out_prompts(session: Session) -> list[str]:
    """Test prompts of both classes, which neither measuring nor selecting saw."""
    contrast, half = session.contrast, HELD_OUT_PROMPTS // 2
    return [*contrast.harmful_test.texts[:half], *contrast.harmless_test.texts[:half]]


def _compared(result: Session, proof: EditPlan, hooked: equivalence.HookedBase, prompts: Sequence[str]) -> Behaviour:
    return equivalence.compare(
        result.loaded, result.chat, hooked, proof, prompts, batch_size=result.recipe.model.batch_size,
        on_event=result.on_event,
    )  # fmt: skip
