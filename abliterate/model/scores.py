"""Figures of candidates while they are being worked out, and the file that keeps them when the work is stopped."""

from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from abliterate.method.few_scores import Figure
from abliterate.method.statistics import standard_error

Kind = Literal["ablated", "added"]


class Scores:
    """What each candidate gave on each prompt, in float64; NaN is a figure too, so what is done is noted beside them.

    A row has the bypass of each harmful prompt, the KL of each harmless one, and the induce of each harmless one.
    """

    def __init__(
        self, values: Float[Tensor, "candidates columns"], done: Bool[Tensor, "candidates columns"], harmful: int
    ) -> None:
        self._values, self._done, self.harmful = values, done, harmful
        self.harmless = (values.shape[1] - harmful) // 2

    @classmethod
    def none_of(cls, count: int, harmful: int, harmless: int) -> "Scores":
        """Nothing is known of ``count`` candidates on so many prompts of each class."""
        shape = count, harmful + 2 * harmless
        values = torch.full(shape, torch.nan, dtype=torch.float64)
        return cls(values, torch.zeros(shape, dtype=torch.bool), harmful)

    def put(self, kind: Kind, candidate: int, prompts: tuple[int, ...], values: Float[Tensor, " prompts"]) -> None:
        """Note what ``candidate`` gave, ablated or added, on ``prompts``, places among all of them."""
        columns = torch.tensor(prompts) + (self.harmless if kind == "added" else 0)
        self._values[candidate, columns], self._done[candidate, columns] = values, True

    def values(self, figure: Figure, candidate: int) -> Float[Tensor, " prompts"]:
        """What is known of a score, prompt by prompt; NaN where nothing is."""
        return self._values[candidate, self._columns(figure)]

    def done(self, figure: Figure, candidate: int) -> Bool[Tensor, " prompts"]:
        """Of which prompts it is known."""
        return self._done[candidate, self._columns(figure)]

    def get(self, figure: Figure, candidate: int) -> float:
        """A score, the mean over its prompts; NaN where it is not known."""
        return float(self.values(figure, candidate).mean())

    def error(self, figure: Figure, candidate: int) -> float:
        """The standard error of a score that is known."""
        return standard_error(self.values(figure, candidate).tolist())

    def has(self, figure: Figure, candidate: int) -> bool:
        """Whether a score is known."""
        return bool(self.done(figure, candidate).all())

    def complete(self, candidate: int) -> bool:
        """Whether all scores of ``candidate`` are known."""
        return bool(self._done[candidate].all())

    @property
    def prompt_passes(self) -> int:
        """How many prompts were run for it, over all candidates."""
        return int(self._done.sum())

    def tensors(self) -> dict[str, Tensor]:
        """What is written."""
        return {"values": self._values, "done": self._done}

    def _columns(self, figure: Figure) -> slice:
        if figure == "bypass":
            return slice(0, self.harmful)
        first = self.harmful + (self.harmless if figure == "induce" else 0)
        return slice(first, first + self.harmless)


class ScoreFile:
    """Keeps ``Scores`` in a safetensors file.  What was written for other work, or is damaged, is as if not there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self, key: str, count: int, harmful: int, harmless: int) -> Scores:
        """The scores of ``count`` candidates that were saved under ``key``, as far as there are any."""
        try:
            with safe_open(self.path, "pt") as handle:
                if (handle.metadata() or {}).get("key") == key:
                    values, done = handle.get_tensor("values"), handle.get_tensor("done")
                    if values.shape == done.shape == (count, harmful + 2 * harmless):
                        return Scores(values, done, harmful)
        except (OSError, SafetensorError):
            pass
        return Scores.none_of(count, harmful, harmless)

    def save(self, key: str, scores: Scores) -> None:
        """Write ``scores`` in place of what was there; a stop in the middle leaves the file before."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        save_file(scores.tensors(), partial, metadata={"key": key})
        partial.replace(self.path)
