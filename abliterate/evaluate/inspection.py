"""What an inspection found: see ``workflow.inspecting``."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from abliterate.model.attribution import Attribution

SPANS = ("instruction", "suffix", "template")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inspected:
    """One set of prompts.  ``attention[h, s]``: mean attention of top head ``h`` to span ``s`` of ``SPANS``."""

    name: str
    prompts: int
    attribution: Attribution
    attention: Float[Tensor, "heads spans"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """The sets, and the heads that write most along the direction on the first one, as (layer, head)."""

    sets: tuple[Inspected, ...]
    heads: tuple[tuple[int, int], ...]
