"""Models tried on the test prompts, one after the other, never two in memory: the base, controls, and others."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from abliterate.arch.edit_plan import EditPlan
from abliterate.checkpoint.source import Checkpoint
from abliterate.errors import PromptError
from abliterate.evaluate.benchmarks import Benchmarks, published_for, scores_of
from abliterate.evaluate.evaluation import EvalReport
from abliterate.evaluate.evaluation import report as put_together
from abliterate.evaluate.observing import HARMFUL, HARMLESS, LOOK_ALIKE, Material, Observations, observe
from abliterate.evaluate.replies import SCORERS
from abliterate.evaluate.reply_text import said
from abliterate.events import OnEvent, working
from abliterate.method.directions import Candidate, DirectionSet, Subspace
from abliterate.method.linalg import project_out
from abliterate.method.statistics import Rate
from abliterate.model import equivalence
from abliterate.model.chat import ChatFormat
from abliterate.model.harness import TaskRequest, run_tasks, version
from abliterate.model.interventions import without
from abliterate.model.judges import load_judge
from abliterate.model.prompts import load_prompts
from abliterate.model.thinking import Mode
from abliterate.model.vllm_backend import replies_of
from abliterate.recipe import Recipe
from abliterate.verification.behaviour import Behaviour
from abliterate.workflow.session import Session

HELD_OUT_PROMPTS = 32
BASE, EDITED = "base", "edited"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    """Models as they are tried, one after the other, and what was seen of them; ``tasks`` as lm-eval gives it back."""

    recipe: Recipe
    material: Material
    directions: DirectionSet | None
    on_event: OnEvent
    observed: list[Observations] = field(default_factory=list)
    of_controls: list[Observations] = field(default_factory=list)
    tasks: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def look(self, name: str, its: Session) -> None:
        """Try one model on everything in every mode, the base first."""
        request, written = task_request(self.recipe), self._written(name, its)
        for mode in its.modes:
            self._see(self.observed, name, its, mode, written.get(mode.name))
            if request.names:
                self.tasks[_label(name, mode, its)] = run_tasks(
                    its.loaded, its.chat_in(mode), request, name=_label(name, mode, its),
                    batch_size=self.recipe.model.batch_size, on_event=self.on_event,
                )  # fmt: skip

    def look_at_control(self, name: str, its: Session) -> None:
        """Try a control, on the prompts alone."""
        for mode in its.modes:
            self._see(self.of_controls, name, its, mode)

    def report(self, session: Session) -> EvalReport:
        """Score everything that was tried, one mode after the other."""
        recipe, every = self.recipe, [*self.observed, *self.of_controls]
        models = [model for mode in session.modes for model in every if model.mode == mode.name]
        judge, judged = judged_replies(session, self.material, models) if recipe.evaluate.judge else ("", {})
        against = {model.name: base.name for model in self.observed if (base := self._base(model.mode)) is not model}
        return put_together(
            self.material,
            models,
            max_new_tokens=recipe.evaluate.max_new_tokens,
            scorer=SCORERS[recipe.evaluate.scorer],
            judge=judge,
            judged=judged,
            tasks={
                name: scores_of(found, self.tasks.get(against.get(name, "")), recipe.evaluate.tasks)
                for name, found in self.tasks.items()
            },
            benchmarks=_how(task_request(recipe), session.checkpoint.name) if self.tasks else None,
            modes={mode.name: mode.text for mode in session.modes if mode.name},
        )

    def _base(self, mode: str) -> Observations:
        return next(model for model in self.observed if model.mode == mode)

    def _written(self, name: str, its: Session) -> dict[str, dict[str, tuple[str, ...]]]:
        """Replies that another backend writes, by mode and kind; it needs the memory of the model for itself."""
        if self.recipe.evaluate.backend != "vllm":
            return {}
        its.release()
        asked = {
            (mode.name, kind): (its.encoder_in(mode), prompts.texts)
            for mode in its.modes
            for kind, prompts in self.material.prompts.items()
        }
        found = replies_of(
            its.checkpoint, asked, name=name, max_new_tokens=self.recipe.evaluate.max_new_tokens,
            dtype=self.recipe.model.dtype, trust_remote_code=self.recipe.model.trust_remote_code,
            on_event=self.on_event,
        )  # fmt: skip
        return {mode.name: {kind: found[mode.name, kind] for kind in self.material.prompts} for mode in its.modes}

    def _see(
        self,
        where: list[Observations],
        name: str,
        its: Session,
        mode: Mode,
        replies: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        chat, base = its.chat_in(mode), [model for model in self.observed if model.mode == mode.name]
        where.append(
            observe(
                its.loaded, chat, self.material, name=_label(name, mode, its), base=base[0] if base else None,
                directions=self.directions if _same_ending(its.chat, chat, self.directions) else None,
                max_new_tokens=self.recipe.evaluate.max_new_tokens, batch_size=self.recipe.model.batch_size,
                mode=mode.name, replies=replies, on_event=self.on_event,
            )
        )  # fmt: skip


def _label(name: str, mode: Mode, its: Session) -> str:
    """The name of a model; with its mode where there are several."""
    return f"{name}, {mode.name}" if len(its.modes) > 1 else name


def _same_ending(measured: ChatFormat, chat: ChatFormat, directions: DirectionSet | None) -> bool:
    """Whether the position of the chosen direction holds the same tokens in both."""
    choice = None if directions is None else directions.choice
    return choice is None or measured.suffix[choice.position :] == chat.suffix[choice.position :]


def side_by_side(
    session: Session,
    others: Sequence[tuple[str, Checkpoint]],
    *,
    proof: EditPlan | None = None,
    directions: DirectionSet | None = None,
    controls: bool = False,
    with_replies: bool = True,
) -> tuple[Behaviour | None, EvalReport | None]:
    """Run the base and then each of ``others`` (name, checkpoint) on the test prompts, and on the recipe's tasks.

    With ``proof``, the plan it came from, the first of them is compared with the base under hooks; ``with_replies``
    evaluates replies. ``directions`` tells how far prompts reach along the chosen one; ``controls`` adds the base with
    others ablated that should change nothing (``control_candidates``); these are spared the tasks.
    """
    recipe, prompts = session.recipe, held_out_prompts(session)
    bench = None
    if with_replies:
        bench = _Bench(recipe=recipe, material=material_of(session), directions=directions, on_event=session.on_event)
    hooked = compared = None
    if proof is not None and proof.stream is not None:
        hooked = equivalence.hooked_base(
            session.loaded, session.chat, proof.stream, prompts, batch_size=recipe.model.batch_size,
            on_event=session.on_event,
        )  # fmt: skip
    if bench is not None:
        bench.look(BASE, session)
        for name, control in control_candidates(directions if controls else None, seed=recipe.find.seed):
            with without(session.loaded, control):
                bench.look_at_control(name, session)
    session.release()
    for place, (name, checkpoint) in enumerate(others):
        result = Session(checkpoint=checkpoint, recipe=recipe, on_event=session.on_event)
        if proof is not None and hooked is not None and place == 0:
            compared = _compared(result, proof, hooked, prompts)
        if bench is not None:
            bench.look(name, result)
        result.release()
    return compared, None if bench is None else bench.report(session)


def task_request(recipe: Recipe) -> TaskRequest:
    """What a recipe asks of lm-eval."""
    asked = recipe.evaluate
    return TaskRequest(
        names=asked.tasks, limit=asked.task_limit, path=asked.task_path, shots=asked.task_shots, chat=asked.task_chat
    )


def _how(request: TaskRequest, base: str) -> Benchmarks:
    put = "through the chat template, examples as turns" if request.chat else "as plain text, without the chat template"
    some = f", the first {request.limit} documents of each" if request.limit else ""
    return Benchmarks(about=f"lm-eval {version()}, {put}{some}", published=published_for(base, request.names))


def judged_replies(session: Session, material: Material, models: Sequence[Observations]) -> tuple[str, dict[str, Rate]]:
    """The name of the recipe's guard model, and how many replies to harmful prompts it says yes to, by model.

    It is shown replies without their thinking.  Replies on which it gives no answer are not counted.

    Raises:
        UsageError, CheckpointError: there is no such judge, or it cannot be loaded.
    """
    recipe = session.recipe
    name, _, place = recipe.evaluate.judge.partition("@")
    asked = read_text(recipe.evaluate.judge_format) if recipe.evaluate.judge_format else None
    with working(session.on_event, f"load the judge {name}", 1, "model"):
        judge = load_judge(name, place=place or None, format=asked, device=recipe.model.device)
    texts = material.prompts[HARMFUL].texts
    found = {}
    for model in models:
        replies = [said(model.opening + reply) for reply in model.replies[HARMFUL]]
        with working(session.on_event, f"judge replies of {model.name}", len(replies), "replies"):
            verdicts = judge.judge(list(zip(texts, replies, strict=True)))
        answers = [verdict.positive for verdict in verdicts if verdict.positive is not None]
        found[model.name] = Rate(hits=sum(answers), count=len(answers))
    return f"{name}: {judge.spec.about or judge.spec.repo}", found


def read_text(path: str) -> str:
    """The text in a file.

    Raises:
        PromptError: it cannot be read.
    """
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path}: cannot be read as text ({error})", "give a UTF-8 text file") from error


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
