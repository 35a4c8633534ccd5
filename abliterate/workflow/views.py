"""Models as they are tried on the test prompts: what each is asked, in stages that may share weight passes."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from abliterate.errors import PromptError
from abliterate.evaluate.benchmarks import Benchmarks, published_for, scores_of
from abliterate.evaluate.evaluation import EvalReport
from abliterate.evaluate.evaluation import report as put_together
from abliterate.evaluate.flinching import Flinching
from abliterate.evaluate.observing import (
    HARMFUL,
    Material,
    Observations,
    Predicted,
    Written,
    observations,
    predict,
    write,
)
from abliterate.evaluate.replies import SCORERS
from abliterate.evaluate.reply_text import said
from abliterate.events import OnEvent, working
from abliterate.method.directions import DirectionSet
from abliterate.method.statistics import Rate
from abliterate.model.chat import ChatFormat
from abliterate.model.harness import TaskRequest, run_tasks, version
from abliterate.model.judges import load_judge
from abliterate.model.thinking import Mode
from abliterate.model.vllm_backend import replies_of
from abliterate.model.words import WordList, WordScores, score_words
from abliterate.recipe import Recipe
from abliterate.workflow.session import Session


@dataclass(slots=True, kw_only=True, eq=False)
class View:
    """A model as it is tried: loaded as ``its``, under ``hooks``; a control is spared the tasks.

    ``ready`` is entered before it and others take turns.  ``drafts``: by mode and kind, what it will probably reply.
    """

    name: str
    its: Session
    hooks: Callable[[], AbstractContextManager[None]] = nullcontext
    ready: Callable[[], AbstractContextManager[None]] = nullcontext
    is_control: bool = False
    drafts: Mapping[str, Mapping[str, Sequence[list[int]]]] = field(default_factory=dict)
    written: dict[str, Written] = field(default_factory=dict)
    predicted: dict[str, Predicted] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Models as they are tried, one after the other, and what was seen of them; ``tasks`` as lm-eval gives it back.

    ``listed``, if any, are words whose likelihood is asked of all but controls.
    """

    recipe: Recipe
    material: Material
    directions: DirectionSet | None
    on_event: OnEvent
    listed: WordList | None = None
    observed: list[Observations] = field(default_factory=list)
    of_controls: list[Observations] = field(default_factory=list)
    tasks: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    words: dict[str, WordScores] = field(default_factory=dict)

    def writing(self, view: View) -> list[Callable[[], None]]:
        """What has a view reply, one stage for each mode; another backend does it at once."""
        elsewhere = self._elsewhere(view)
        return [partial(self._write, view, mode, elsewhere.get(mode.name)) for mode in view.its.modes]

    def predicting(self, view: View, spoken: Mapping[str, Sequence[str]]) -> list[Callable[[], None]]:
        """What asks a view how likely it finds words, and what the base has ``spoken``, one stage for each mode."""
        of_words = [] if self.listed is None or view.is_control else [partial(self.ask_words, view.name, view.its)]
        return [*of_words, *(partial(self._predict, view, mode, spoken[mode.name]) for mode in view.its.modes)]

    def ask_words(self, name: str, its: Session) -> None:
        """Ask a model how likely it finds the words."""
        assert self.listed is not None, "there are words"
        self.words[name] = score_words(
            its.loaded, self.listed, name=name, batch_size=self.recipe.model.batch_size, on_event=self.on_event
        )

    def note(self, view: View) -> None:
        """Compare what a view did with what the base did in the same mode; the base is the first."""
        where = self.of_controls if view.is_control else self.observed
        for mode in view.its.modes:
            base = next((model for model in self.observed if model.mode == mode.name), None)
            seen = view.written[mode.name], view.predicted[mode.name]
            where.append(observations(label_of(view.name, mode, view.its), *seen, base=base, mode=mode.name))

    def run_tasks(self, view: View) -> None:
        """Try a model on the tasks of the recipe, if any."""
        request = task_request(self.recipe)
        for mode in view.its.modes if request.names else ():
            label = label_of(view.name, mode, view.its)
            self.tasks[label] = run_tasks(
                view.its.loaded, view.its.chat_in(mode), request, name=label,
                batch_size=self.recipe.model.batch_size, on_event=self.on_event,
            )  # fmt: skip

    def report(self, session: Session, *, third: str = "") -> EvalReport:
        """Score everything that was tried, one mode after the other; ``third`` names the model asked for words only."""
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
            flinching=None if self.listed is None else Flinching(self.listed, dict(self.words), third),
        )

    def _base(self, mode: str) -> Observations:
        return next(model for model in self.observed if model.mode == mode)

    def _elsewhere(self, view: View) -> dict[str, dict[str, tuple[str, ...]]]:
        """Replies that another backend writes, by mode and kind; it needs the memory of the model for itself."""
        if self.recipe.evaluate.backend != "vllm" or view.is_control:
            return {}
        its = view.its
        its.release()
        asked = {
            (mode.name, kind): (its.encoder_in(mode), prompts.texts)
            for mode in its.modes
            for kind, prompts in self.material.prompts.items()
        }
        found = replies_of(
            its.checkpoint, asked, name=view.name, max_new_tokens=self.recipe.evaluate.max_new_tokens,
            dtype=self.recipe.model.dtype, trust_remote_code=self.recipe.model.trust_remote_code,
            on_event=self.on_event,
        )  # fmt: skip
        return {mode.name: {kind: found[mode.name, kind] for kind in self.material.prompts} for mode in its.modes}

    def _write(self, view: View, mode: Mode, replies: Mapping[str, tuple[str, ...]] | None) -> None:
        its, chat = view.its, view.its.chat_in(mode)
        with view.hooks():
            view.written[mode.name] = write(
                its.loaded, chat, self.material, name=label_of(view.name, mode, its),
                directions=self.directions if same_ending(its.chat, chat, self.directions) else None,
                max_new_tokens=self.recipe.evaluate.max_new_tokens, batch_size=self.recipe.model.batch_size,
                replies=replies, drafts=view.drafts.get(mode.name), on_event=self.on_event,
            )  # fmt: skip

    def _predict(self, view: View, mode: Mode, spoken: Sequence[str]) -> None:
        with view.hooks():
            view.predicted[mode.name] = predict(
                view.its.loaded, view.its.chat_in(mode), self.material, spoken,
                name=label_of(view.name, mode, view.its), batch_size=self.recipe.model.batch_size,
                on_event=self.on_event,
            )  # fmt: skip


def label_of(name: str, mode: Mode, its: Session) -> str:
    """The name of a model; with its mode where there are several."""
    return f"{name}, {mode.name}" if len(its.modes) > 1 else name


def same_ending(measured: ChatFormat, chat: ChatFormat, directions: DirectionSet | None) -> bool:
    """Whether the position of the chosen direction holds the same tokens in both."""
    choice = None if directions is None else directions.choice
    return choice is None or measured.suffix[choice.position :] == chat.suffix[choice.position :]


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
        found[model.name] = Rate.of(verdict.positive for verdict in verdicts if verdict.positive is not None)
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
