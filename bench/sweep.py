"""The straightforward way to score candidates, as the paper's code does it: what ours is compared with.

For each candidate three sweeps over the prompts, in batches of 32 padded to their longest, under hooks made for the
candidate; logits of all positions.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from abliterate.method.directions import Candidate, CandidateScore
from abliterate.method.statistics import kl_nats, refusal_metric
from abliterate.model.chat import Batch, ChatFormat, left_padded
from abliterate.model.forward import run_batch
from abliterate.model.interventions import ablated, added
from abliterate.model.load import LoadedModel
from abliterate.model.measuring import Filtered

BATCH = 32
NAN = float("nan")


def sweep(
    loaded: LoadedModel,
    chat: ChatFormat,
    candidates: Sequence[Candidate],
    prompts: Filtered,
    refusal_ids: Sequence[int],
    *,
    lean: bool = False,
) -> list[CandidateScore]:
    """The scores of every candidate; ``lean``: sorted by length, and logits at the last position only."""
    run = partial(last_log_probs, lean=lean)
    base = run(loaded, chat, prompts.harmless)
    scores = []
    for candidate in candidates:
        subspace = candidate.everywhere
        means = {"bypass": NAN, "kl_nats": NAN, "induce": NAN}
        if subspace.usable:
            with ablated(loaded, subspace.vectors):
                bypass = refusal_metric(run(loaded, chat, prompts.harmful), list(refusal_ids))
                kl = kl_nats(base, run(loaded, chat, prompts.harmless))
            with added(loaded, subspace.added, candidate.layer):
                induce = refusal_metric(run(loaded, chat, prompts.harmless), list(refusal_ids))
            figures = {"bypass": bypass, "kl_nats": kl, "induce": induce}
            means = {name: float(values.mean()) for name, values in figures.items()}
        place = {"candidate": candidate.id, "layer": candidate.layer, "position": candidate.position}
        scores.append(CandidateScore(**place, **means))
    return scores


def last_log_probs(loaded: LoadedModel, chat: ChatFormat, prompts: Sequence[str], *, lean: bool = False) -> Tensor:
    """Log-probabilities of the next token after each prompt, in float64, unless ``lean`` from all logits."""
    found: dict[int, Tensor] = {}
    for batch in _batches(chat, prompts, lean=lean):
        logits = run_batch(loaded, batch, keep=int(lean))[:, -1]
        found |= dict(zip(batch.rows, logits.to(device="cpu", dtype=torch.float64).log_softmax(-1), strict=True))
    return torch.stack([found[place] for place in range(len(prompts))])


def _batches(chat: ChatFormat, prompts: Sequence[str], *, lean: bool) -> Iterator[Batch]:
    """In the order of the prompts; a model that sees padding gets rows of one length."""
    if lean or not chat.pads:
        yield from chat.batches(prompts, BATCH)
        return
    for first in range(0, len(prompts), BATCH):
        encoded = [chat.encode(prompt) for prompt in prompts[first : first + BATCH]]
        (batch,) = left_padded(encoded, BATCH, chat.pad_id)
        yield Batch(
            rows=tuple(first + row for row in batch.rows),
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
        )


def largest_difference(ones: Sequence[CandidateScore], others: Sequence[CandidateScore]) -> float:
    """The largest difference of a figure between two scorings; infinite where one of them is NaN alone."""
    worst = 0.0
    for one, other in zip(ones, others, strict=True):
        for figure in ("bypass", "kl_nats", "induce"):
            a, b = getattr(one, figure), getattr(other, figure)
            if (a != a) != (b != b):
                return float("inf")
            if a == a:
                worst = max(worst, abs(a - b))
    return worst
