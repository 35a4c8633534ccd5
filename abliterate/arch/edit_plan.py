"""The plan of an edit as a value: which tensors of a checkpoint change, and what the result is worth."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from abliterate.arch.model_map import ModelMap, Writer
from abliterate.checkpoint.source import Checkpoint

TiedPolicy = Literal["untie", "shared", "keep"]

ASSUMED_BYTES_PER_SECOND = 150e6
"""Throughput of edit + verify used for the estimate of the plan; the progress bar shows the real one."""


@dataclass(frozen=True, kw_only=True)
class EditPlan:
    """What will be done to a checkpoint, without a direction yet.

    ``writers`` are the tensors to edit.  ``added_head`` is the name of the head tensor that untying adds (a byte copy
    of the unedited embedding), or None.  ``sets_untied`` says that ``tie_word_embeddings`` becomes false.
    ``exactness``: "A", "B" (see ``arch.spec``), or "C" when the edit is inexact by request: a shared or kept head,
    or a partial edit.
    """

    checkpoint: Checkpoint
    model_map: ModelMap
    tied: TiedPolicy
    writers: tuple[Writer, ...]
    added_head: str | None
    sets_untied: bool
    exactness: Literal["A", "B", "C"]
    notes: tuple[str, ...]

    @property
    def output_bytes(self) -> int:
        """Bytes of the shards that will be written."""
        added = self.model_map.embedding.tensor.size_bytes if self.added_head else 0
        return self.checkpoint.size_bytes + added

    @property
    def edited_parameters(self) -> int:
        """Number of parameters in the tensors to edit."""
        return sum(writer.tensor.numel for writer in self.writers)

    @property
    def packed(self) -> bool:
        """Whether any writer is quantised."""
        return any(writer.packed for writer in self.writers)

    @property
    def coverage(self) -> str:
        """Writers to be edited against writers that exist, e.g. "57 of 57"."""
        return f"{len(self.writers)} of {self.model_map.expected}"

    def by_role(self) -> Mapping[str, list[Writer]]:
        """Writers grouped by role, in order of appearance."""
        roles: dict[str, list[Writer]] = {}
        for writer in self.writers:
            roles.setdefault(writer.role, []).append(writer)
        return roles

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data, for ``plan --json`` and the manifest."""
        return {
            "model": self.checkpoint.name,
            "revision": self.checkpoint.revision,
            "model_type": self.model_map.model_type,
            "family": self.model_map.family.family,
            "exactness": self.exactness,
            "d_model": self.model_map.d_model,
            "n_layers": self.model_map.n_layers,
            "coverage": self.coverage,
            "complete": self.model_map.complete,
            "tied": self.model_map.tied,
            "tied_policy": self.tied if self.model_map.tied else None,
            "added_head": self.added_head,
            "input_bytes": self.checkpoint.size_bytes,
            "output_bytes": self.output_bytes,
            "edited_parameters": self.edited_parameters,
            "estimated_seconds": round(self.output_bytes / ASSUMED_BYTES_PER_SECOND, 1),
            "notes": list(self.notes),
            "left_out": list(self.checkpoint.left_out),
            "unknown": list(self.model_map.unknown),
            "missing": list(self.model_map.missing),
            "writers": [
                {
                    "name": writer.tensor.name,
                    "shard": writer.tensor.shard,
                    "role": writer.role,
                    "shape": list(writer.tensor.shape),
                    "dtype": writer.format,
                    "residual_axis": writer.axis,
                    "norms": [norm.name for norm in writer.norms],
                }
                for writer in self.writers
            ],
        }


def untied_config(config: Mapping[str, object]) -> dict[str, object]:
    """``config`` with ``tie_word_embeddings: false`` at the top and in ``text_config``: absent is not false."""
    untied: dict[str, object] = {**config, "tie_word_embeddings": False}
    text = config.get("text_config")
    if isinstance(text, dict):
        untied["text_config"] = {**text, "tie_word_embeddings": False}
    return untied
