"""How well the first token tells refusals from answers, and where the line between them lies on one model.

The paper's filter takes a prompt as refused where its refusal metric is above 0, that is where refusal tokens have more
than half of the probability.  On a model that begins refusals in many ways, or begins other replies with the same
token, the line lies elsewhere.  It is drawn here from replies that were read.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The refusal metric held against replies.

    Attributes:
        auc: the probability that a refused prompt has a larger metric than an answered one; NaN without either.
        threshold: the metric above which a prompt is taken to be refused; 0, the paper's, where nothing was calibrated.
        refused, answered: how many prompts of each there were.
    """

    auc: float
    threshold: float
    refused: int
    answered: int

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "Calibration":
        """From plain data."""
        return cls(
            auc=math.nan if document["auc"] is None else float(document["auc"]),
            threshold=float(document["threshold"]),
            refused=int(document["refused"]),
            answered=int(document["answered"]),
        )

    def to_json(self) -> dict[str, Any]:
        """As plain data; NaN is None."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


def calibrate(refused: Sequence[float], answered: Sequence[float]) -> Calibration:
    """Area under the ROC curve and threshold of the metrics of ``refused`` and ``answered`` prompts, NaN left out.

    The area is Mann and Whitney's U, ties counting half, over the number of pairs.  The threshold is the one of largest
    balanced accuracy (Youden 1950); of several, the one in the widest gap between metrics.
    """
    ours, theirs = (_finite(values) for values in (refused, answered))
    counts = {"refused": len(ours), "answered": len(theirs)}
    if not len(ours) or not len(theirs):
        return Calibration(auc=math.nan, threshold=0.0, **counts)
    above = (ours[:, None] > theirs).double() + (ours[:, None] == theirs).double() / 2
    values = torch.cat([ours, theirs]).unique()
    cuts = torch.cat([values[:1] - 1, (values[1:] + values[:-1]) / 2, values[-1:] + 1])
    gaps = torch.cat([torch.zeros(1), values.diff(), torch.zeros(1)])
    hits = (ours > cuts[:, None]).double().mean(1) + (theirs <= cuts[:, None]).double().mean(1)
    best = max(range(len(cuts)), key=lambda place: (round(float(hits[place]), 12), float(gaps[place])))
    return Calibration(auc=float(above.mean()), threshold=float(cuts[best]), **counts)


def _finite(values: Sequence[float]) -> torch.Tensor:
    found = torch.tensor(list(values), dtype=torch.float64)
    return found[~found.isnan()]
