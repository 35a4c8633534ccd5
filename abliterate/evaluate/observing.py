"""What a model says and does on test prompts, seen in as few forward passes as it takes.

The pass over the prompts that begins a reply shows the distribution of its first token, and how far the prompt reaches
along the direction, as well.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.evaluate.reply_text import open_thinking
from abliterate.events import OnEvent, ignore, working
from abliterate.method.directions import Candidate, DirectionSet
from abliterate.method.statistics import exact_kl_nats
from abliterate.model.chat import ChatFormat
from abliterate.model.drafts import follow
from abliterate.model.forward import last_log_probs, log_probs_of, see_residuals
from abliterate.model.likelihood import on_completions, on_text
from abliterate.model.load import LoadedModel
from abliterate.model.lockstep import share
from abliterate.model.prompts import PromptSet
from abliterate.model.replying import Watching, generate_tokens
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


@dataclass(slots=True, eq=False)
class _Along:
    """How far prompts reach along a candidate, at its layer and position (the last one, if none)."""

    candidate: Candidate
    basis: Float[Tensor, "d rank"]
    found: dict[int, float] = field(default_factory=dict)

    @property
    def positions(self) -> int:
        """How many of the last tokens have to be seen."""
        return 1 if self.candidate.position is None else -self.candidate.position

    def see(self, rows: Sequence[int], layer: int, values: Tensor) -> None:
        """What enters a block at the last tokens of some prompts."""
        if layer == self.candidate.layer:
            along = values[:, 0].double() @ self.basis
            reach = along[:, 0] if self.basis.shape[1] == 1 else torch.linalg.vector_norm(along, dim=1)
            self.found.update(zip(rows, reach.tolist(), strict=True))

    def of(self, count: int) -> tuple[float, ...]:
        """In the order of the prompts."""
        return tuple(self.found[row] for row in range(count))


@dataclass(slots=True, eq=False)
class _First:
    """The distributions of first tokens, in float64."""

    found: dict[int, Tensor] = field(default_factory=dict)

    def see(self, rows: Sequence[int], logits: Tensor) -> None:
        """The logits of the first token after some prompts; in float64 one row at a time, for a vocabulary is wide."""
        self.found.update((row, log_probs_of(its)) for row, its in zip(rows, logits, strict=True))

    def of(self, count: int) -> Float[Tensor, "prompts vocab"]:
        """In the order of the prompts."""
        return torch.stack([self.found.pop(row) for row in range(count)])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Written:
    """What was seen of one model while it replied: what ``Observations`` has under the same names.

    ``tokens``: the replies by kind as token ids, where the model wrote them here.
    """

    replies: Mapping[str, tuple[str, ...]]
    first: Float[Tensor, "prompts vocab"]
    along: Mapping[str, tuple[float, ...]]
    opening: str
    tokens: Mapping[str, Sequence[list[int]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Predicted:
    """How likely a model finds the base's replies and the text, as in ``Observations``."""

    completion_nats: float
    tokens: Float[Tensor, "tokens vocab"]
    text_nats: float


def write(
    loaded: LoadedModel,
    chat: ChatFormat,
    material: Material,
    *,
    name: str,
    directions: DirectionSet | None = None,
    max_new_tokens: int,
    batch_size: int,
    replies: Mapping[str, tuple[str, ...]] | None = None,
    drafts: Mapping[str, Sequence[list[int]]] | None = None,
    on_event: OnEvent = ignore,
) -> Written:
    """Have a model reply to every prompt; out of core, all kinds of prompts share the weight passes.

    With ``directions``, how far prompts reach along the chosen candidate is measured as well.  ``replies``, by kind
    of prompt, are taken as they are where another backend wrote them.  ``drafts`` are what the model is likely to
    reply: where it does, a pass over a whole draft takes the place of one for each token.
    """
    chosen = directions.chosen if directions is not None and directions.choice is not None else None
    basis = None if chosen is None else _read_along(chosen)
    along = {} if chosen is None or basis is None else {kind: _Along(chosen, basis) for kind in material.prompts}
    firsts = _First()
    options = {"batch_size": batch_size, "on_event": on_event}

    def reply_to(kind: str) -> list[list[int]]:
        watching = _watching(along.get(kind), firsts.see if kind == HARMLESS else None)
        asked = {"max_new_tokens": max_new_tokens, "watching": watching, **options}
        texts, task = material.prompts[kind].texts, f"{name}: reply to {kind} prompts"
        if drafts is None:
            return generate_tokens(loaded, chat, texts, task=task, **asked)
        return follow(loaded, chat, texts, drafts[kind], task=task, **asked)

    apart, tokens = None, {}
    if replies is None:
        stages = [partial(reply_to, kind) for kind in material.prompts]
        tokens = dict(zip(material.prompts, share(loaded, stages), strict=True))
        replies = {kind: tuple(map(chat.text, its)) for kind, its in tokens.items()}
    else:
        apart = _without_replies(loaded, chat, material, along, name=name, **options)
    return Written(
        replies=replies,
        first=firsts.of(len(material.prompts[HARMLESS].texts)) if apart is None else apart,
        along={kind: its.of(len(material.prompts[kind].prompts)) for kind, its in along.items()},
        opening=open_thinking(prompt_ending(chat.tokenizer, chat.options)),
        tokens=tokens,
    )


def predict(
    loaded: LoadedModel,
    chat: ChatFormat,
    material: Material,
    spoken: Sequence[str],
    *,
    name: str,
    batch_size: int,
    on_event: OnEvent = ignore,
) -> Predicted:
    """How likely a model finds the base's replies ``spoken`` to harmless prompts, and the text."""
    harmless = material.prompts[HARMLESS].texts

    def completions() -> tuple[float, Tensor]:
        with working(on_event, f"{name}: likelihood of the base's replies", len(harmless), "prompts") as advance:
            return on_completions(loaded, chat, harmless, spoken, batch_size=batch_size, advance=advance)

    def text() -> float:
        task = f"{name}: likelihood of the text"
        return on_text(loaded, chat, material.text, task=task, batch_size=batch_size, on_event=on_event)

    (completion_nats, tokens), text_nats = share(loaded, [completions, text])
    return Predicted(completion_nats=completion_nats, tokens=tokens, text_nats=text_nats)


def observations(
    name: str, written: Written, predicted: Predicted, *, base: Observations | None, mode: str = ""
) -> Observations:
    """What was observed of a model, its distributions compared with those of ``base`` (None: it is the base)."""
    return Observations(
        name=name,
        mode=mode,
        opening=written.opening,
        replies=written.replies,
        first=None if base else written.first,
        tokens=None if base else predicted.tokens,
        kl_nats=divergence_nats(base.first if base else written.first, written.first),
        kl_tokens_nats=divergence_nats(base.tokens if base else predicted.tokens, predicted.tokens),
        completion_nats=predicted.completion_nats,
        text_nats=predicted.text_nats,
        along=written.along,
    )


def _watching(along: _Along | None, first: Callable[[Sequence[int], Tensor], None] | None) -> Watching:
    if along is None:
        return Watching(first=first)
    return Watching(first=first, see=along.see, layers=(along.candidate.layer,), n_positions=along.positions)


def _without_replies(
    loaded: LoadedModel,
    chat: ChatFormat,
    material: Material,
    along: Mapping[str, _Along],
    *,
    name: str,
    batch_size: int,
    on_event: OnEvent,
) -> Float[Tensor, "prompts vocab"]:
    """Distributions on harmless prompts, and the reach of all along the direction, in passes of their own."""
    harmless = material.prompts[HARMLESS].texts

    def distributions() -> Tensor:
        with working(on_event, f"{name}: distributions on harmless prompts", len(harmless), "prompts") as advance:
            return last_log_probs(loaded, chat, harmless, batch_size=batch_size, advance=advance)

    def reach(kind: str, its: _Along) -> None:
        texts = material.prompts[kind].texts
        with working(on_event, f"{name}: {kind} prompts along the direction", len(texts), "prompts") as advance:
            see_residuals(loaded, chat, texts, its.positions, its.see, batch_size=batch_size, advance=advance)

    first, *_ = share(loaded, [distributions, *(partial(reach, kind, its) for kind, its in along.items())])
    return first


def components(
    loaded: LoadedModel, chat: ChatFormat, prompts: Sequence[str], candidate: Candidate, *, batch_size: int
) -> tuple[float, ...]:
    """How far every prompt reaches along ``candidate``, at its layer and position (the last one, if none).

    Along a single vector that is the component, with its sign; of several, the length of the projection on their span.
    """
    basis = _read_along(candidate)
    if basis is None:
        raise AssertionError("the candidate has a subspace at its layer")
    along = _Along(candidate, basis)
    see_residuals(loaded, chat, prompts, along.positions, along.see, batch_size=batch_size)
    return along.of(len(prompts))


def _read_along(candidate: Candidate) -> Float[Tensor, "d rank"] | None:
    """An orthonormal basis of what is removed where the candidate was read; None where it has nothing at that layer."""
    subspace = candidate.at(candidate.layer)
    return None if subspace is None or not subspace.usable else subspace.basis


def divergence_nats(base: Float[Tensor, "n vocab"] | None, other: Float[Tensor, "m other"]) -> float:
    """Mean KL(base || other) in nats; NaN where the shapes differ or there is nothing to compare."""
    if base is None or base.shape != other.shape or not len(base):
        return float("nan")
    return float(torch.stack([exact_kl_nats(p.double(), q.double()) for p, q in zip(base, other, strict=True)]).mean())
