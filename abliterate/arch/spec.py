"""The data of one model family: which tensors write to the residual stream, and along which axis.

A family file names tensors by pattern.  ``{layer}`` and ``{expert}`` stand for a block's and an expert's number,
``{n}`` and ``{mtp}`` for any number, ``{a|b}`` for one of some words, and a trailing ``**`` for anything.  Patterns are
relative to one of the family's ``prefixes`` unless they are declared absolute.  Axes carry names, because a shape
cannot tell the two sides of a square matrix apart: the axis called ``d_model`` is the residual stream.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from abliterate.errors import UnknownTensorError
from abliterate.method.places import Kind

RESIDUAL_AXIS = "d_model"

MOST_SCALE = 1e30
"""What no factor of an embedding reaches."""

DRAFTS = "next-token block"
"""The role of all writers in blocks that only draft tokens for the main model (MTP)."""

KINDS: Mapping[str, Kind] = {
    "embedding": "embedding", "position embedding": "embedding", "projector": "embedding",
    "stored copy of the tied head": "embedding", DRAFTS: "next-token block",
    "attention out": "attention", "linear attention out": "attention", "state-space out": "attention",
    "convolution out": "attention", "MLP out": "MLP", "expert out": "MLP", "shared expert out": "MLP",
    "experts' latent out": "MLP", "per-layer input": "MLP", "LAuReL": "MLP", "alternating updates": "MLP",
}  # fmt: skip
"""Every role there is, by the kind of place where its writers write."""


def kind_of(role: str) -> Kind:
    """The kind of place where writers of a role, or their biases, write."""
    return KINDS[role.removesuffix(" bias")]


class WriterSpec(BaseModel):
    """A tensor whose output is added to the residual stream.

    ``axes`` are those on disk; where the same name is stored in two layouts they are all given, and the sizes decide.
    ``bias`` says that a bias of the same module may stand beside it.  ``norms`` names the norm weights that stand
    between the writer and the add, inner ones first (with a question mark where some models have it), and ``gain`` says
    how such a norm turns its weight into a gain ("w" or "1+w").
    ``optional`` tensors need not exist; the others must, in every block.

    Where blocks differ (mixtures of experts, hybrids), writers name the ``slot`` they fill instead: every block must
    have a writer for every slot of its family.  Of ``{expert}`` writers a block must have all or none.  ``site`` is the
    module whose output is added to the stream, where it is not the norm's or the writer's own.  ``only_with`` names a
    configuration key without which (or, behind "not", with which) the tensor is no writer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    axes: str | tuple[str, ...]
    role: str
    norms: tuple[str, ...] = ()
    gain: Literal["w", "1+w"] = "w"
    absolute: bool = False
    optional: bool = False
    bias: bool = False
    slot: str | None = None
    site: str | None = None
    only_with: str | None = None

    def applies(self, config: Mapping[str, Any]) -> bool:
        """Whether it writes in a model of this configuration."""
        if self.only_with is None:
            return True
        return bool(config.get(self.only_with.removeprefix("not "))) != self.only_with.startswith("not ")

    @field_validator("role")
    @classmethod
    def _known_role(cls, role: str) -> str:
        if role.removesuffix(" bias") not in KINDS:
            raise ValueError(f"there is no role {role!r}; there are {', '.join(KINDS)}")
        return role

    @property
    def layouts(self) -> tuple[tuple[str, ...], ...]:
        """The axes of every layout this tensor is stored in."""
        given = (self.axes,) if isinstance(self.axes, str) else self.axes
        return tuple(tuple(axes.split()) for axes in given)

    @property
    def per_layer(self) -> bool:
        """Whether blocks have it."""
        return "{layer}" in self.name

    @property
    def per_expert(self) -> bool:
        """Whether each expert has one."""
        return "{expert}" in self.name

    @property
    def site_name(self) -> str:
        """The module whose output is added to the stream: the last norm behind the writer, or the writer itself."""
        return self.site or (self.norms[-1].removesuffix("?") if self.norms else self.name).removesuffix(".weight")

    def with_bias(self) -> tuple["WriterSpec", ...]:
        """This writer and, if it may have one, its bias."""
        if not self.bias:
            return (self,)
        stem = self.name.removesuffix(".weight")
        bias = self.model_copy(
            update={
                "name": f"{stem}.bias", "axes": RESIDUAL_AXIS, "role": f"{self.role} bias", "bias": False,
                "optional": True, "slot": None, "site": self.site_name,
            }
        )  # fmt: skip
        return self.model_copy(update={"bias": False}), bias


class ReaderSpec(BaseModel):
    """Tensors known not to write to the residual stream.

    ``towers`` are whole encoders that meet the stream at a projector only: their bytes are kept, and the plan says so.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    names: tuple[str, ...]
    absolute: tuple[str, ...] = ()
    towers: tuple[str, ...] = ()


class Condition(BaseModel):
    """A configuration under which the family is of class C, and the reason in words."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    equals: bool | int | str | None = None
    differs_from: str | None = None
    reason: str

    def holds(self, config: Mapping[str, Any]) -> bool:
        """Whether ``config`` is such a configuration; an absent key is none."""
        if self.key not in config:
            return False
        if self.differs_from is not None:
            return config[self.key] != config.get(self.differs_from, config[self.key])
        return bool(config[self.key] == self.equals)


class Family(BaseModel):
    """One registry entry.

    ``exactness`` is "A" (the edited checkpoint equals inference-time ablation), "B" (the stream holds no r, but a norm
    behind the writers keeps the logits from being equal), or "C" (no edit of writers can remove r; ``reason`` says
    why).  ``inexact`` lists configurations that make a family class C.  ``tied_by_default`` lists the model types whose
    head is tied when ``tie_word_embeddings`` is absent from the configuration.  ``sizes`` maps axis names to its keys
    (alternatives separated by bars; with a question mark where it may be absent).  ``scalars`` are configuration keys
    of factors between a writer and the add: they change nothing.  ``embedding_scale`` says by what the embedding is
    multiplied on its way into the stream: a key of config.json (where it is absent, by 1), "sqrt KEY" or "sqrt KEY if
    KEY", without the position embedding;
    ``embedding_scales_itself`` that its module does so, and not the model behind it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: str
    title: str
    model_types: tuple[str, ...]
    exactness: Literal["A", "B", "C"]
    reason: str = ""
    inexact: tuple[Condition, ...] = ()
    prefixes: tuple[str, ...]
    head: str
    tied_by_default: tuple[str, ...] = ()
    scalars: tuple[str, ...] = ()
    embedding_scale: str = ""
    embedding_scales_itself: bool = False
    sizes: dict[str, str]
    writer: tuple[WriterSpec, ...] = Field(min_length=1)
    readers: ReaderSpec

    @field_validator("writer")
    @classmethod
    def _spell_out_biases(cls, writers: tuple[WriterSpec, ...]) -> tuple[WriterSpec, ...]:
        return tuple(spec for writer in writers for spec in writer.with_bias())

    @property
    def slots(self) -> tuple[str, ...]:
        """What every block must have a writer for."""
        return tuple(dict.fromkeys(spec.slot for spec in self.writer if spec.slot))

    @cached_property
    def matchers(self) -> tuple["Matcher", ...]:
        """All patterns of the family, compiled."""
        writers = [Matcher.of(spec.name, self._prefixes(absolute=spec.absolute), spec) for spec in self.writer]
        readers = [Matcher.of(name, self.prefixes, None) for name in self.readers.names]
        absolute = [Matcher.of(name, ("",), None) for name in self.readers.absolute]
        towers = [Matcher.of(name, ("",), None, tower=name.removesuffix("**")) for name in self.readers.towers]
        return (*writers, *readers, *absolute, *towers)

    def with_writers(self, writers: Iterable[WriterSpec], readers: ReaderSpec | None = None) -> "Family":
        """This entry with other writers (and readers)."""
        fields = {name: getattr(self, name) for name in Family.model_fields}
        return Family.model_validate({**fields, "writer": tuple(writers), "readers": readers or self.readers})

    def for_config(self, config: Mapping[str, Any]) -> "Family":
        """This entry for one configuration: writers that do not write in such a model are readers."""
        idle = tuple(spec.name for spec in self.writer if not spec.applies(config))
        if not idle:
            return self
        readers = self.readers.model_copy(update={"names": (*self.readers.names, *idle)})
        return self.with_writers((spec for spec in self.writer if spec.applies(config)), readers)

    def scale_of_embedding(self, config: Mapping[str, Any]) -> float:
        """By what the embedding is multiplied on its way into the stream of a model of this configuration.

        Raises:
            UnknownTensorError: the configuration gives no number for it.
        """
        expression, _, condition = self.embedding_scale.partition(" if ")
        if not expression or (condition and not config.get(condition)):
            return 1.0
        key = expression.removeprefix("sqrt ")
        value = config.get(key, 1.0)
        if not isinstance(value, int | float) or not 0 < value < MOST_SCALE:
            raise UnknownTensorError(f"config.json: {key} is {value!r}", "the configuration must give this number")
        value = float(value)
        return value**0.5 if expression.startswith("sqrt ") else value

    def class_c_reason(self, config: Mapping[str, Any]) -> str:
        """Why no edit of the writers of this model can be exact; empty where one can."""
        return self.reason or next((condition.reason for condition in self.inexact if condition.holds(config)), "")

    def _prefixes(self, *, absolute: bool) -> tuple[str, ...]:
        return ("",) if absolute else self.prefixes


@dataclass(frozen=True, slots=True, kw_only=True)
class Matcher:
    """A compiled pattern; ``writer`` is None for readers, ``tower`` names the encoder that a reader belongs to."""

    regex: re.Pattern[str]
    writer: WriterSpec | None
    tower: str | None = None

    @classmethod
    def of(
        cls, pattern: str, prefixes: tuple[str, ...], writer: WriterSpec | None, tower: str | None = None
    ) -> "Matcher":
        """Compile ``pattern`` behind any of ``prefixes``."""
        start = "|".join(re.escape(prefix) for prefix in prefixes)
        return cls(regex=re.compile(f"(?P<prefix>{start}){_translate(pattern)}"), writer=writer, tower=tower)


def _translate(pattern: str) -> str:
    anything = pattern.endswith("**")
    parts = re.split(r"\{([^}]*)\}", pattern.removesuffix("**"))
    regex = ""
    for position, part in enumerate(parts):
        if position % 2 == 0:
            regex += re.escape(part)
        elif part in ("layer", "expert"):
            regex += rf"(?P<{part}>\d+)"
        elif part in ("n", "mtp"):
            regex += r"\d+"
        else:
            regex += "(?:" + "|".join(re.escape(word) for word in part.split("|")) + ")"
    return regex + (".*" if anything else "")
