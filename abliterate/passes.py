"""How often a model larger than memory is read for a run: what makes the time there."""

from abliterate.model.refusal import PROBE_TOKENS
from abliterate.recipe import Recipe

MEASURING = 4
"""Filtering the training prompts, the means of both classes, and filtering the validation prompts."""
SELECTING = 2
"""The base, and all candidates together; more where their states do not fit beside the weights."""
VERIFYING = 4
"""The base as it is and under hooks; the result's distributions, and its stream."""
SCORING = 3
"""Of each model: distributions, likelihood of the base's replies, components along the direction."""


def passes_of(recipe: Recipe, *, with_evaluation: bool, direction_given: bool) -> dict[str, int]:
    """Readings of the weights by stage, at least.  Replies cost one for each token, whatever the number of prompts."""
    kinds = 3 if recipe.look_alike else 2
    models = (2 + (2 if recipe.controls else 0)) * (2 if recipe.thinking == "both" else 1)
    found = {"verify": VERIFYING}
    if not direction_given:
        probing = 0 if recipe.refusal_tokens else PROBE_TOKENS
        found = {"measure": probing + MEASURING, "select": SELECTING, **found}
    if with_evaluation:
        found["replies"] = models * (kinds * recipe.max_new_tokens + SCORING)
    return found


def cost(size_bytes: int, passes: dict[str, int]) -> str:
    """The cost in a sentence."""
    total = sum(passes.values())
    parts = ", ".join(f"{stage} {count}" for stage, count in passes.items())
    advice = "; fewer --max-new-tokens or --no-eval save the most" if passes.get("replies", 0) > total / 2 else ""
    return (
        f"the weights ({size_bytes / 1e9:,.1f} GB) will be read about {total} times ({parts}), "
        f"{total * size_bytes / 1e12:,.2f} TB in all{advice}"
    )
