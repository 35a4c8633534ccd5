"""Figures of candidates while they are being worked out, and the file that keeps them when the work is stopped."""

from pathlib import Path

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FIGURES = ("bypass", "kl_nats", "induce")


class Scores:
    """Three figures of each candidate, in float64; NaN is a figure too, so what is done is noted beside them."""

    def __init__(self, values: Float[Tensor, "3 candidates"], done: Bool[Tensor, "3 candidates"]) -> None:
        self._values = values
        self._done = done

    @classmethod
    def none_of(cls, count: int) -> "Scores":
        """Nothing is known of ``count`` candidates."""
        return cls(torch.full((3, count), torch.nan, dtype=torch.float64), torch.zeros(3, count, dtype=torch.bool))

    def put(self, figure: str, candidate: int, value: float) -> None:
        """Note a figure."""
        place = FIGURES.index(figure), candidate
        self._values[place], self._done[place] = value, True

    def get(self, figure: str, candidate: int) -> float:
        """A figure; NaN where it is not known."""
        return float(self._values[FIGURES.index(figure), candidate])

    def has(self, figure: str, candidate: int) -> bool:
        """Whether a figure is known."""
        return bool(self._done[FIGURES.index(figure), candidate])

    def complete(self, candidate: int) -> bool:
        """Whether all figures of ``candidate`` are known."""
        return bool(self._done[:, candidate].all())

    def tensors(self) -> dict[str, Tensor]:
        """What is written."""
        return {"values": self._values, "done": self._done}


class ScoreFile:
    """Keeps ``Scores`` in a safetensors file.  What was written for other work, or is damaged, is as if not there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self, key: str, count: int) -> Scores:
        """The scores of ``count`` candidates that were saved under ``key``, as far as there are any."""
        try:
            with safe_open(self.path, "pt") as handle:
                if (handle.metadata() or {}).get("key") == key:
                    values, done = handle.get_tensor("values"), handle.get_tensor("done")
                    if values.shape == done.shape == (3, count):
                        return Scores(values, done)
        except (OSError, SafetensorError):
            pass
        return Scores.none_of(count)

    def save(self, key: str, scores: Scores) -> None:
        """Write ``scores`` in place of what was there; a stop in the middle leaves the file before."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        save_file(scores.tensors(), partial, metadata={"key": key})
        partial.replace(self.path)
