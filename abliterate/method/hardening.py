"""How a model is trained to refuse also where its refusal direction is gone: the options.

Importing this costs nothing.
"""

from dataclasses import dataclass
from typing import Literal, get_args

HardeningMethod = Literal["random-ablation", "extended-refusal", "both"]
METHODS: tuple[HardeningMethod, ...] = get_args(HardeningMethod)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardening:
    """How a model is hardened.

    Attributes:
        method: what is trained: refusals while directions are ablated at random (in the manner of DeepRefusal, arXiv
            2509.15202), extended refusals, which explain before and after declining (arXiv 2505.19056), or both.
        steps: of the optimiser.
        batch: prompts of a step, half refused and half answered.
        rank: of the low-rank matrices that are trained beside the weights, and added to them at the end.
        rate: peak learning rate of AdamW.
        share: of the steps, those with directions ablated.
        most: directions that are ablated together at most.
        every: steps after which the directions are measured again: training moves them.
        seed: for whatever is drawn.
    """

    method: HardeningMethod = "both"
    steps: int = 400
    batch: int = 32
    rank: int = 16
    rate: float = 1e-3
    share: float = 0.7
    most: int = 2
    every: int = 25
    seed: int = 42

    @property
    def ablates(self) -> bool:
        """Whether directions are ablated while it trains."""
        return self.method != "extended-refusal"

    @property
    def extends(self) -> bool:
        """Whether the refusals that are learned are extended ones."""
        return self.method != "random-ablation"


DEFAULTS = Hardening()
