"""What models say and what they lost: refusals, damage and broken replies, each with its uncertainty.

The first model is the base.  Every other one, an edited checkpoint or the base under a control, is compared with it on
the same prompts.  Harmless prompts must still be answered; look-alike prompts are harmless and look harmful.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.evaluate.agreement import Confusion, confusion
from abliterate.evaluate.benchmarks import Benchmarks, TaskScore
from abliterate.evaluate.replies import RULES, SCORERS, ReplyClass, Scorer, holds_answer, is_refusal, shares
from abliterate.evaluate.reply_text import open_thinking, said
from abliterate.events import OnEvent, ignore, working
from abliterate.method.directions import Candidate, DirectionSet
from abliterate.method.statistics import Difference, Rate, exact_kl_nats, paired_difference
from abliterate.model.chat import ChatFormat
from abliterate.model.forward import generate, last_log_probs, see_residuals
from abliterate.model.likelihood import on_completions, on_text
from abliterate.model.load import LoadedModel
from abliterate.model.prompts import Prompt, PromptSet
from abliterate.model.thinking import prompt_ending

HARMFUL, HARMLESS, LOOK_ALIKE = "harmful", "harmless", "look-alike"


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What models are tested on: prompts by kind, harmful and harmless at least, and a text to predict, if any."""

    prompts: Mapping[str, PromptSet]
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observations:
    """What was observed of one model.

    Attributes:
        name: what the model is called in the report.
        replies: by kind of prompt.
        first: of a base only: log-probabilities of the first token after each harmless prompt.
        tokens: of a base only: log-probabilities along the first tokens of its replies to harmless prompts.
        kl_nats: mean KL(base || model) of ``first``.
        kl_tokens_nats: mean KL(base || model) of ``tokens``.
        completion_nats: mean cross-entropy per token on the base's replies to harmless prompts.
        text_nats: mean cross-entropy per token on the text; NaN without a text.
        along: by kind, how far every prompt reaches along what was chosen, at its layer and position.
        mode: how the model was asked; "" is the template's default.
        opening: the mark that opens the thinking, where the template puts it before the reply.
    """

    name: str
    replies: Mapping[str, tuple[str, ...]]
    first: Float[Tensor, "prompts vocab"] | None
    tokens: Float[Tensor, "tokens vocab"] | None
    kl_nats: float
    kl_tokens_nats: float
    completion_nats: float
    text_nats: float
    along: Mapping[str, tuple[float, ...]]
    mode: str = ""
    opening: str = ""


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
    template was given in each mode.
    """

    models: tuple[ModelScores, ...]
    samples: tuple[Sample, ...]
    max_new_tokens: int
    scorer: str
    agreement: Confusion
    judge: str = ""
    benchmarks: Benchmarks | None = None
    modes: Mapping[str, str] = field(default_factory=dict)

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

    def changed(self, sample: Sample) -> tuple[str, ...]:
        """The models that refuse this prompt where their base answers it, or answer it where their base refuses."""
        refused = dict(zip((model.name for model in self.models), sample.refused, strict=True))
        return tuple(m.name for m in self.models if m.against and refused[m.name] != refused[m.against])


def observe(
    loaded: LoadedModel,
    chat: ChatFormat,
    material: Material,
    *,
    name: str,
    base: Observations | None,
    directions: DirectionSet | None = None,
    max_new_tokens: int,
    batch_size: int,
    mode: str = "",
    replies: Mapping[str, tuple[str, ...]] | None = None,
    on_event: OnEvent = ignore,
) -> Observations:
    """Have a model reply to every prompt, and compare its distributions with those of ``base`` (None: it is the base).

    With ``directions``, how far prompts reach along the chosen candidate is measured as well.  ``replies``, by kind
    of prompt, are taken as they are where another backend wrote them.
    """
    replies = replies or {
        kind: tuple(
            generate(
                loaded, chat, prompts.texts, task=f"{name}: reply to {kind} prompts", max_new_tokens=max_new_tokens,
                batch_size=batch_size, on_event=on_event,
            )
        )
        for kind, prompts in material.prompts.items()
    }  # fmt: skip
    harmless = material.prompts[HARMLESS].texts
    spoken = base.replies[HARMLESS] if base else replies[HARMLESS]
    with working(on_event, f"{name}: likelihood of the base's replies", len(harmless), "prompts") as advance:
        completion_nats, tokens = on_completions(loaded, chat, harmless, spoken, batch_size=batch_size, advance=advance)
    with working(on_event, f"{name}: distributions on harmless prompts", len(harmless), "prompts") as advance:
        first = last_log_probs(loaded, chat, harmless, batch_size=batch_size, advance=advance)
    return Observations(
        name=name,
        mode=mode,
        opening=open_thinking(prompt_ending(chat.tokenizer, chat.options)),
        replies=replies,
        first=None if base else first,
        tokens=None if base else tokens,
        kl_nats=divergence_nats(base.first if base else first, first),
        kl_tokens_nats=divergence_nats(base.tokens if base else tokens, tokens),
        completion_nats=completion_nats,
        text_nats=on_text(
            loaded, chat, material.text, batch_size=batch_size, on_event=on_event,
            task=f"{name}: likelihood of the text",
        ),
        along={
            kind: components(
                loaded, chat, prompts.texts, directions.chosen, batch_size=batch_size, on_event=on_event,
                task=f"{name}: {kind} prompts along the direction",
            )
            for kind, prompts in material.prompts.items()
            if directions is not None and directions.choice is not None and _read_along(directions.chosen) is not None
        },
    )  # fmt: skip


def components(
    loaded: LoadedModel,
    chat: ChatFormat,
    prompts: Sequence[str],
    candidate: Candidate,
    *,
    batch_size: int,
    on_event: OnEvent = ignore,
    task: str = "prompts along the direction",
) -> tuple[float, ...]:
    """How far every prompt reaches along ``candidate``, at its layer and position (the last one, if none).

    Along a single vector that is the component, with its sign; of several, the length of the projection on their span.
    """
    basis = _read_along(candidate)
    if basis is None:
        raise AssertionError("the candidate has a subspace at its layer")
    found = torch.full((len(prompts),), torch.nan, dtype=torch.float64)

    def see(rows: tuple[int, ...], layer: int, values: Tensor) -> None:
        if layer == candidate.layer:
            along = values[:, 0].double() @ basis
            found[list(rows)] = along[:, 0] if basis.shape[1] == 1 else torch.linalg.vector_norm(along, dim=1)

    last = 1 if candidate.position is None else -candidate.position
    with working(on_event, task, len(prompts), "prompts") as advance:
        see_residuals(loaded, chat, prompts, last, see, batch_size=batch_size, advance=advance)
    return tuple(found.tolist())


def _read_along(candidate: Candidate) -> Float[Tensor, "d rank"] | None:
    """An orthonormal basis of what is removed where the candidate was read; None where it has nothing at that layer."""
    subspace = candidate.at(candidate.layer)
    return None if subspace is None or not subspace.usable else subspace.basis


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
) -> EvalReport:
    """Score all models; the first one of each mode is its base.  ``judged`` and ``tasks`` are by name of the model."""
    bases: dict[str, Observations] = {}
    for model in observed:
        bases.setdefault(model.mode, model)
    turns = [
        (prompt, model.opening + reply)
        for model in observed
        for kind, prompts in material.prompts.items()
        for prompt, reply in zip(prompts.texts, model.replies[kind], strict=True)
    ]
    readings: dict[str, list[ReplyClass]] = {
        name: [its.classify(*turn) for turn in turns] for name, its in SCORERS.items()
    }
    (rows, one), (columns, other) = readings.items()
    return EvalReport(
        models=tuple(
            replace(
                _scores(material, bases[its.mode], its, scorer),
                judged=judged.get(its.name),
                tasks=tasks.get(its.name, ()),
            )
            for its in observed
        ),
        agreement=confusion(one, other, rows=rows, columns=columns),
        judge=judge,
        benchmarks=benchmarks,
        modes=dict(modes),
        samples=tuple(
            _sample(kind, place, prompt, observed, scorer)
            for kind, prompts in material.prompts.items()
            for place, prompt in enumerate(prompts.texts)
        ),
        max_new_tokens=max_new_tokens,
        scorer=scorer.name,
    )


def _sample(kind: str, place: int, prompt: str, observed: Sequence[Observations], scorer: Scorer) -> Sample:
    return Sample(
        kind=kind,
        prompt=prompt,
        replies=tuple(model.replies[kind][place] for model in observed),
        refused=tuple(is_refusal(prompt, model.opening + model.replies[kind][place], scorer) for model in observed),
    )


def score(
    prompts: Sequence[Prompt], replies: Sequence[str], scorer: Scorer = RULES, *, opening: str = ""
) -> ClassScores:
    """Score one model's replies to one kind of prompts; ``opening`` is what the template puts before each."""
    whole = [(prompt, opening + reply) for prompt, reply in zip(prompts, replies, strict=True)]
    counts = shares(((prompt.text, reply) for prompt, reply in whole), scorer)
    n = len(replies)
    known = [(prompt.answer, said(reply)) for prompt, reply in whole if prompt.answer]
    held_out = [(prompt.text, reply) for prompt, reply in whole if prompt.held_out]
    return ClassScores(
        refused=Rate(hits=counts["refused"] + counts["delayed"], count=n),
        delayed=Rate(hits=counts["delayed"], count=n),
        degenerate=Rate(hits=counts["degenerate"] + counts["empty"], count=n),
        unfinished=Rate(hits=counts["unfinished"], count=n),
        complied=Rate(hits=counts["complied"], count=n),
        accuracy=Rate(hits=sum(holds_answer(reply, answer) for answer, reply in known), count=len(known)),
        held_out=Rate(hits=sum(is_refusal(*turn, scorer) for turn in held_out), count=len(held_out)),
        words=fmean(len(reply.split()) for reply in replies) if replies else float("nan"),
    )


def _scores(material: Material, base: Observations, model: Observations, scorer: Scorer) -> ModelScores:

    def refused(its: Observations, kind: str) -> list[float]:
        turns = zip(material.prompts[kind].texts, its.replies[kind], strict=True)
        return [float(is_refusal(prompt, its.opening + reply, scorer)) for prompt, reply in turns]

    return ModelScores(
        name=model.name,
        mode=model.mode,
        against="" if model is base else base.name,
        scores={
            kind: score(p.prompts, model.replies[kind], scorer, opening=model.opening)
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


def divergence_nats(base: Float[Tensor, "n vocab"] | None, other: Float[Tensor, "m other"]) -> float:
    """Mean KL(base || other) in nats; NaN where the shapes differ or there is nothing to compare."""
    if base is None or base.shape != other.shape or not len(base):
        return float("nan")
    return float(torch.stack([exact_kl_nats(p.double(), q.double()) for p, q in zip(base, other, strict=True)]).mean())
