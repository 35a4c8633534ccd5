"""The data of one model family: which tensors write to the residual stream, and along which axis.

A family file names tensors by pattern.  ``{layer}`` stands for a block number, ``{a|b}`` for one of some words, and a
trailing ``**`` for anything.  Patterns are relative to one of the family's ``prefixes`` unless they are declared
absolute.  Axes carry names, because a shape cannot tell the two sides of a square matrix apart: the axis called
``d_model`` is the residual stream.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

RESIDUAL_AXIS = "d_model"


class WriterSpec(BaseModel):
    """A tensor whose output is added to the residual stream.

    ``norm`` names the norm weight that stands between the writer and the add, and ``gain`` says how that norm turns
    its weight into a gain ("w" or "1+w").  ``optional`` tensors need not exist; the others must, in every block.

    Where blocks differ (mixtures of experts, hybrids), writers name the ``slot`` they fill instead: every block must
    have a writer for every slot of its family.  Of ``{expert}`` writers a block must have all or none.  ``site`` is the
    module whose output is added to the stream, where it is not the norm's or the writer's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    axes: str
    role: str
    norm: str | None = None
    gain: Literal["w", "1+w"] = "w"
    absolute: bool = False
    optional: bool = False
    slot: str | None = None
    site: str | None = None

    @property
    def axis(self) -> int:
        """Index of the residual axis."""
        return self.axes.split().index(RESIDUAL_AXIS)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.axes.split())

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
        """The module whose output is added to the stream: the norm behind the writer, or the writer itself."""
        return self.site or (self.norm or self.name).removesuffix(".weight")


class ReaderSpec(BaseModel):
    """Tensors known not to write to the residual stream."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    names: tuple[str, ...]
    absolute: tuple[str, ...] = ()


class Family(BaseModel):
    """One registry entry.

    ``exactness`` is "A" (the edited checkpoint equals inference-time ablation) or "B" (the stream holds no r, but a
    norm behind the writers keeps the logits from being equal).  ``tied_by_default`` lists the model types whose head is
    tied when ``tie_word_embeddings`` is absent from the configuration.  ``sizes`` maps axis names to its keys.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: str
    title: str
    model_types: tuple[str, ...]
    exactness: Literal["A", "B"]
    prefixes: tuple[str, ...]
    head: str
    tied_by_default: tuple[str, ...]
    sizes: dict[str, str]
    writer: tuple[WriterSpec, ...] = Field(min_length=1)
    readers: ReaderSpec

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
        return (*writers, *readers, *absolute)

    def _prefixes(self, *, absolute: bool) -> tuple[str, ...]:
        return ("",) if absolute else self.prefixes


@dataclass(frozen=True, slots=True, kw_only=True)
class Matcher:
    """A compiled pattern; ``writer`` is None for readers."""

    regex: re.Pattern[str]
    writer: WriterSpec | None

    @classmethod
    def of(cls, pattern: str, prefixes: tuple[str, ...], writer: WriterSpec | None) -> "Matcher":
        """Compile ``pattern`` behind any of ``prefixes``."""
        start = "|".join(re.escape(prefix) for prefix in prefixes)
        return cls(regex=re.compile(f"(?P<prefix>{start}){_translate(pattern)}"), writer=writer)


def _translate(pattern: str) -> str:
    anything = pattern.endswith("**")
    parts = re.split(r"\{([^}]*)\}", pattern.removesuffix("**"))
    regex = ""
    for position, part in enumerate(parts):
        if position % 2 == 0:
            regex += re.escape(part)
        elif part in ("layer", "expert"):
            regex += rf"(?P<{part}>\d+)"
        else:
            regex += "(?:" + "|".join(re.escape(word) for word in part.split("|")) + ")"
    return regex + (".*" if anything else "")
