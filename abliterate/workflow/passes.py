"""What running a model takes, from its headers: memory, and how often weights that stay on disk are read.

The readings are what makes the time of a model larger than memory.
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import torch

from abliterate.arch.spec import Family
from abliterate.checkpoint.source import Checkpoint
from abliterate.evaluate.refusal_tokens import PROBE_TOKENS
from abliterate.model.memory import least_bytes, sizes_of, whole_bytes, working_bytes
from abliterate.recipe import Recipe

MEASURING = 4
"""Filtering the training prompts, the means of both classes, and filtering the validation prompts."""
SELECTING = 2
"""The base, and all candidates together; more where their states do not fit beside the weights."""
VERIFYING = 4
"""The base as it is and under hooks; the result's distributions, and its stream."""
SCORING = 3
"""Of each model: distributions, likelihood of the base's replies, components along the direction."""
STAGES = ("measure", "select", "verify", "replies")


def passes_of(recipe: Recipe, stages: Collection[str] = STAGES, *, models: int = 2) -> dict[str, int]:
    """Readings of the weights by stage, at least; replies are those of ``models`` checkpoints and the controls.

    They cost one for each token, whatever the number of prompts.
    """
    kinds = 3 if recipe.evaluate.look_alike else 2
    models = (models + (2 if recipe.evaluate.controls else 0)) * (2 if recipe.evaluate.thinking == "both" else 1)
    probing = 0 if recipe.find.refusal_tokens else PROBE_TOKENS
    written = 0 if recipe.evaluate.backend == "vllm" else kinds * recipe.evaluate.max_new_tokens
    every = {
        "measure": probing + MEASURING,
        "select": SELECTING,
        "verify": VERIFYING,
        "replies": models * (written + SCORING),
    }
    return {stage: count for stage, count in every.items() if stage in stages}


def cost(size_bytes: int, passes: dict[str, int]) -> str:
    """The cost in a sentence."""
    total = sum(passes.values())
    parts = ", ".join(f"{stage} {count}" for stage, count in passes.items())
    advice = "; fewer --max-new-tokens or --no-eval save the most" if passes.get("replies", 0) > total / 2 else ""
    return (
        f"the weights ({size_bytes / 1e9:,.1f} GB) will be read about {total} times ({parts}), "
        f"{total * size_bytes / 1e12:,.2f} TB in all{advice}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """What it takes to run a model in one dtype: ``whole_bytes`` with its weights in memory, or out of core at least
    ``least_bytes``, where a whole run reads the stored weights ``readings`` times."""

    dtype: str
    whole_bytes: int
    least_bytes: int
    readings: int

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def running(checkpoint: Checkpoint, family: Family, recipe: Recipe) -> tuple[Running, ...]:
    """What a whole run needs in float32, which a CPU takes by default, and in the stored dtype, which a GPU takes."""
    readings = sum(passes_of(recipe).values())
    found = []
    for name, dtype in (("in float32", torch.float32), ("in the stored dtype", "auto")):
        sizes, embedding = sizes_of(checkpoint, family, dtype=dtype)
        whole = whole_bytes(sizes, embedding)
        found.append(
            Running(
                dtype=name, whole_bytes=whole + working_bytes(whole), least_bytes=least_bytes(sizes), readings=readings
            )
        )
    return tuple(found)
