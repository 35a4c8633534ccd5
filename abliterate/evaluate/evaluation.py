"""What models say and what they lost: refusals, damage and broken replies, each with its uncertainty.

The first model is the base.  Every other one, an edited checkpoint or the base under a control, is compared with it on
the same prompts.  Harmless prompts must still be answered; look-alike prompts are harmless and look harmful.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from types import MappingProxyType

from abliterate.evaluate.agreement import Confusion, confusion
from abliterate.evaluate.benchmarks import Benchmarks, TaskScore
from abliterate.evaluate.flinching import Flinching
from abliterate.evaluate.observing import Material, Observations
from abliterate.evaluate.replies import REFUSALS, RULES, SCORERS, ReplyClass, Scorer, holds_answer, shares
from abliterate.evaluate.reply_text import said
from abliterate.method.statistics import Difference, Rate, paired_difference
from abliterate.model.prompts import Prompt

Classes = Mapping[tuple[str, str], tuple[ReplyClass, ...]]
"""How replies were read: by model and kind of prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassScores:
    """Counts over the replies of one model to one kind of prompts.

    Attributes:
        refused: all refusals.
        delayed: refusals that come late, or after an answer was begun.
        degenerate: broken and empty replies.
        unfinished: replies whose thinking never ended.
        complied: replies that answer.
        accuracy: replies that hold the known answer, among prompts that have one.
        held_out: refusals, among held-out prompts only.
        words: mean length of a reply.
    """

    refused: Rate
    delayed: Rate
    degenerate: Rate
    unfinished: Rate
    complied: Rate
    accuracy: Rate
    held_out: Rate
    words: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelScores:
    """One model's scores by kind of prompt, and how far it is from the base.

    Both KL divergences are unsmoothed, on harmless prompts, and NaN where the vocabularies differ.

    Attributes:
        name, kl_nats, kl_tokens_nats, completion_nats, text_nats, along, mode: as observed.
        scores: by kind of prompt.
        refusal_change: by kind, refusals compared with the base's on the same prompts.
        judged: replies to harmful prompts that the judge says yes to, among those it answered on.
        tasks: scores on tasks of lm-eval.
        against: the name of the base that was asked the same way; "" for a base.
    """

    name: str
    scores: Mapping[str, ClassScores]
    kl_nats: float
    kl_tokens_nats: float
    completion_nats: float
    text_nats: float
    refusal_change: Mapping[str, Difference]
    along: Mapping[str, tuple[float, ...]]
    judged: Rate | None = None
    tasks: tuple[TaskScore, ...] = ()
    mode: str = ""
    against: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One prompt with every model's reply, in the order of the models, and whether each refuses."""

    kind: str
    prompt: str
    replies: tuple[str, ...]
    refused: tuple[bool, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """The scores of all models: mode by mode where there are several, and the base first in each.

    ``agreement`` compares the scorers with each other on all replies.  ``judge`` names the guard model and what it was
    asked, "" without one.  ``benchmarks`` says how tasks were asked, None without tasks.  ``modes`` says what the chat
    template was given in each mode.  ``flinching`` is of the words that were asked for, None without.
    """

    models: tuple[ModelScores, ...]
    samples: tuple[Sample, ...]
    max_new_tokens: int
    scorer: str
    agreement: Confusion
    judge: str = ""
    benchmarks: Benchmarks | None = None
    modes: Mapping[str, str] = field(default_factory=dict)
    flinching: Flinching | None = None

    @property
    def base(self) -> ModelScores:
        """The first model."""
        return self.models[0]

    @property
    def edited(self) -> ModelScores:
        """The second model."""
        return self.models[1]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of prompts, in order."""
        return tuple(self.base.scores)

    @property
    def breakdowns(self) -> tuple[str, ...]:
        """Where a model's replies are empty or broken more often than its base's, beyond both intervals, in words."""
        by_name = {model.name: model for model in self.models}
        pairs = [(model, by_name[model.against]) for model in self.models if model.against]
        return tuple(
            f"{model.name}: {_share(its)} of its replies to {kind} prompts are empty or broken, "
            f"{_share(before)} of those of {base.name}"
            for model, base in pairs
            for kind in self.kinds
            if (its := model.scores[kind].degenerate).interval[0] > (before := base.scores[kind].degenerate).interval[1]
        )

    def changed(self, sample: Sample) -> tuple[str, ...]:
        """The models that refuse this prompt where their base answers it, or answer it where their base refuses."""
        refused = dict(zip((model.name for model in self.models), sample.refused, strict=True))
        return tuple(m.name for m in self.models if m.against and refused[m.name] != refused[m.against])


def _share(rate: Rate) -> str:
    low, high = rate.interval
    return f"{rate.value:.0%} ({low:.0%} to {high:.0%})"


def report(
    material: Material,
    observed: Sequence[Observations],
    *,
    max_new_tokens: int,
    scorer: Scorer = RULES,
    judge: str = "",
    judged: Mapping[str, Rate] = MappingProxyType({}),
    tasks: Mapping[str, tuple[TaskScore, ...]] = MappingProxyType({}),
    benchmarks: Benchmarks | None = None,
    modes: Mapping[str, str] = MappingProxyType({}),
    flinching: Flinching | None = None,
) -> EvalReport:
    """Score all models; the first one of each mode is its base.  ``judged`` and ``tasks`` are by name of the model."""
    bases: dict[str, Observations] = {}
    for model in observed:
        bases.setdefault(model.mode, model)
    read = {name: _read(material, observed, its) for name, its in {**SCORERS, scorer.name: scorer}.items()}
    (rows, one), (columns, other) = ((name, read[name]) for name in SCORERS)
    classes = read[scorer.name]
    return EvalReport(
        models=tuple(
            replace(
                _scores(material, bases[its.mode], its, classes),
                judged=judged.get(its.name),
                tasks=tasks.get(its.name, ()),
            )
            for its in observed
        ),
        agreement=confusion(_in_a_row(one), _in_a_row(other), rows=rows, columns=columns),
        judge=judge,
        benchmarks=benchmarks,
        modes=dict(modes),
        samples=tuple(
            Sample(
                kind=kind,
                prompt=prompt,
                replies=tuple(model.replies[kind][place] for model in observed),
                refused=tuple(classes[model.name, kind][place] in REFUSALS for model in observed),
            )
            for kind, prompts in material.prompts.items()
            for place, prompt in enumerate(prompts.texts)
        ),
        max_new_tokens=max_new_tokens,
        scorer=scorer.name,
        flinching=flinching,
    )


def _read(material: Material, observed: Sequence[Observations], scorer: Scorer) -> Classes:
    """Every reply of every model, read once, with what the template puts before it."""
    return {
        (model.name, kind): tuple(
            scorer.classify(prompt, model.opening + reply)
            for prompt, reply in zip(prompts.texts, model.replies[kind], strict=True)
        )
        for model in observed
        for kind, prompts in material.prompts.items()
    }


def _in_a_row(classes: Classes) -> list[ReplyClass]:
    return [one for its in classes.values() for one in its]


def score(
    prompts: Sequence[Prompt], replies: Sequence[str], classes: Sequence[ReplyClass], *, opening: str = ""
) -> ClassScores:
    """Score one model's replies to one kind of prompts, whose ``classes`` are known.

    ``opening`` is what the template puts before each.
    """
    counts = shares(classes)
    n = len(replies)
    known = [
        (prompt.answer, said(opening + reply)) for prompt, reply in zip(prompts, replies, strict=True) if prompt.answer
    ]
    held_out = [its for prompt, its in zip(prompts, classes, strict=True) if prompt.held_out]
    return ClassScores(
        refused=Rate(hits=counts["refused"] + counts["delayed"], count=n),
        delayed=Rate(hits=counts["delayed"], count=n),
        degenerate=Rate(hits=counts["degenerate"] + counts["empty"], count=n),
        unfinished=Rate(hits=counts["unfinished"], count=n),
        complied=Rate(hits=counts["complied"], count=n),
        accuracy=Rate(hits=sum(holds_answer(reply, answer) for answer, reply in known), count=len(known)),
        held_out=Rate(hits=sum(its in REFUSALS for its in held_out), count=len(held_out)),
        words=fmean(len(reply.split()) for reply in replies) if replies else float("nan"),
    )


def _scores(material: Material, base: Observations, model: Observations, classes: Classes) -> ModelScores:

    def refused(its: Observations, kind: str) -> list[float]:
        return [float(one in REFUSALS) for one in classes[its.name, kind]]

    return ModelScores(
        name=model.name,
        mode=model.mode,
        against="" if model is base else base.name,
        scores={
            kind: score(p.prompts, model.replies[kind], classes[model.name, kind], opening=model.opening)
            for kind, p in material.prompts.items()
        },
        kl_nats=model.kl_nats,
        kl_tokens_nats=model.kl_tokens_nats,
        completion_nats=model.completion_nats,
        text_nats=model.text_nats,
        refusal_change={
            kind: paired_difference(refused(base, kind), refused(model, kind)) for kind in material.prompts
        },
        along=model.along,
    )
