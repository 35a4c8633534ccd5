"""What running a model takes: memory, and the number of weight passes.

A weight pass reads all weights once.  Out of core the number of passes decides how long a run takes.
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import torch

from abliterate.arch.spec import Family
from abliterate.checkpoint.source import Checkpoint
from abliterate.evaluate.refusal_tokens import PROBE_TOKENS
from abliterate.events import duration
from abliterate.method.estimators import needs_of
from abliterate.model.memory import least_bytes, sizes_of, whole_bytes, working_bytes
from abliterate.recipe import Recipe
from abliterate.workflow.reading import reads_replies

MEASURING = 2
"""Passes by the paper's way: one filters the prompts, one gives the means of the classes.  Where replies say which
prompts count, it is one for each token of them, and nothing else."""
SELECTING = 3
"""Passes: the base, the bypass of all candidates together, KL and induce of the best; with all scores they share one.
More where the candidates' states do not fit into memory at once, and where the best ones are not kept."""
VERIFYING = 2
"""Passes: the base, as it is and under hooks, and the written checkpoint.  Replies are written in the same ones."""
SCORING = 1
"""Passes of the base: the likelihood of its own replies.  Others are asked for it while they reply."""
STAGES = ("measure", "select", "verify", "replies")


def passes_of(recipe: Recipe, stages: Collection[str] = STAGES, *, models: int = 2) -> dict[str, int]:
    """The number of weight passes of each stage, where memory holds what has to wait between two blocks.

    A search takes one for the base and, for each trial, one for each token of the replies.
    Replies are written by ``models`` checkpoints.  They take one pass for each token, however many prompts, controls
    and modes there are; fewer as far as tokens are guessed right (``model.guessing``).  What hooks make of the base is
    tried in its passes: where the edit is proven as well, the edited checkpoint only has to agree with the replies of
    that, in one pass.
    """
    probing = 0 if recipe.find.refusal_tokens else PROBE_TOKENS
    elsewhere = recipe.evaluate.backend == "vllm"
    replying = 1 if elsewhere else recipe.evaluate.max_new_tokens
    edited = 1 if "verify" in stages else replying
    outputs = "outputs" in needs_of(recipe.find.estimators)
    tried = reads_replies(recipe) * recipe.find.reply_tokens or int(recipe.find.filter_prompts)
    apart = 0 if "measure" in stages else tried  # the validation prompts, which measuring reads with its own
    searching = 1 + recipe.find.trials * recipe.find.reply_tokens
    every = {
        "measure": (recipe.find.reply_tokens if reads_replies(recipe) else probing + MEASURING) + outputs,
        "select": apart + (searching if recipe.find.trials else SELECTING - recipe.find.scores_all),
        "verify": 0 if "replies" in stages else VERIFYING,
        "replies": replying + SCORING + edited + (models - 2) * replying,
    }
    return {stage: count for stage, count in every.items() if stage in stages}


def cost(
    size_bytes: int,
    passes: dict[str, int],
    *,
    staying_bytes: int = 0,
    bytes_per_s: float | None = None,
    arithmetic_s: float | None = None,
) -> str:
    """A sentence that says how often weights of ``size_bytes`` will be read in ``passes``, by stage.

    ``staying_bytes`` of the model are beside these, and read once.
    With ``bytes_per_s``, at which they were read so far, it says how long that takes, and that it takes no less than
    ``arithmetic_s``, where these are known: the next block is read while one runs.
    """
    total = sum(passes.values())
    parts = ", ".join(f"{stage} {count}" for stage, count in passes.items())
    more = ", replies of the edited model that rounding changes take more" if passes.get("select") else ""
    advice = f"; right guesses of tokens save some{more}; fewer --max-new-tokens or --no-eval save the most"
    advice = advice if passes.get("replies", 0) > total / 2 else ""
    pace = ""
    if bytes_per_s:
        reading_s = total * size_bytes / bytes_per_s
        pace = f", which takes about {duration(reading_s)} at the {bytes_per_s / 1e6:,.0f} MB/s of the first reading"
        if arithmetic_s is None:
            pace += ", if not longer"
        else:
            whole = duration(max(reading_s, arithmetic_s))
            pace += f"; meanwhile the blocks run for {duration(arithmetic_s)}, as one of them did: about {whole} in all"
    which = (
        f"{staying_bytes / 1e9:,.1f} GB of the weights stay in memory; the others" if staying_bytes else "the weights"
    )
    return (
        f"{which} ({size_bytes / 1e9:,.1f} GB) will be read about {total} times ({parts}), "
        f"{total * size_bytes / 1e12:,.2f} TB in all{pace}{advice}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """What it takes to run a model in one dtype.

    ``whole_bytes`` is the memory for a model that is held, ``least_bytes`` the least memory out of core.  A whole run
    then takes ``weight_passes``.
    """

    dtype: str
    whole_bytes: int
    least_bytes: int
    weight_passes: int

    def to_json(self) -> dict[str, Any]:
        """As plain data; the number of weight passes keeps its old key."""
        found = asdict(self)
        return found | {"readings": found.pop("weight_passes")}


def running(checkpoint: Checkpoint, family: Family, recipe: Recipe) -> tuple[Running, ...]:
    """What a whole run needs in float32 (a CPU's default) and in the stored dtype (a GPU's default)."""
    passes = sum(passes_of(recipe).values())
    found = []
    for name, dtype in (("in float32", torch.float32), ("in the stored dtype", "auto")):
        sizes, embedding = sizes_of(checkpoint, family, dtype=dtype)
        held, least = whole_bytes(sizes, embedding), least_bytes(sizes)
        found.append(
            Running(dtype=name, whole_bytes=held + working_bytes(held), least_bytes=least, weight_passes=passes)
        )
    return tuple(found)
