"""The plan of an edit as a value: which tensors of a checkpoint change, and what the result is worth."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from abliterate.arch.model_map import ModelMap, Writer
from abliterate.checkpoint.source import Checkpoint
from abliterate.method.places import Place, in_words
from abliterate.method.stream_edit import StreamEdit
from abliterate.method.weight_edit import WeightEdit

TiedPolicy = Literal["untie", "shared", "keep"]

Claim = Literal["equal to hooks", "removes the direction", "bytes only"]
"""What an edited checkpoint is: equal to its base under hooks at the writers' outputs, to rounding; free of the
direction, but with logits that differ from the hooks' by an amount that is stated; or what the equation says of its
bytes, and no more.  Of a healed one, the base has what healing added beside its writers."""

ASSUMED_BYTES_PER_SECOND = 150e6
"""Throughput of edit + verify used for the estimate of the plan; the progress bar shows the real one."""


@dataclass(frozen=True, kw_only=True)
class EditPlan:
    """What will be done to a checkpoint.

    ``writers`` are the tensors to edit, and ``edits`` what happens to each, by its name; the same value stands for all
    that are edited alike.  ``edits`` is empty, and ``stream`` None, in a plan that was made before a direction was
    known: it covers what an edit of everything would touch.  ``stream`` is what the edit does to the residual stream,
    ``mtp`` says whether next-token blocks are edited.
    ``added_head`` is the name of the head tensor that untying adds (a byte copy of the unedited embedding), or None.
    ``sets_untied`` says that ``tie_word_embeddings`` becomes false. ``exactness``: "A", "B" (see ``arch.spec``), or "C"
    when the edit is inexact by request: a shared or kept head, or a partial edit.
    """

    checkpoint: Checkpoint
    model_map: ModelMap
    tied: TiedPolicy
    writers: tuple[Writer, ...]
    added_head: str | None
    sets_untied: bool
    exactness: Literal["A", "B", "C"]
    notes: tuple[str, ...]
    edits: Mapping[str, WeightEdit] = field(default_factory=dict)
    stream: StreamEdit | None = None
    mtp: bool = True

    @property
    def claim(self) -> Claim:
        """What the result is worth, by family and edit together."""
        edits = self.distinct_edits
        if self.exactness == "C" or any(edit.scales for edit in edits):
            return "bytes only"
        if self.exactness == "A":
            return "equal to hooks"
        return "removes the direction" if all(edit.removes for edit in edits) else "bytes only"

    @property
    def distinct_edits(self) -> tuple[WeightEdit, ...]:
        """Every edit of ``edits`` once, in the order of the writers."""
        return tuple({id(edit): edit for edit in self.edits.values()}.values())

    @property
    def healed(self) -> int:
        """How many writers get what healing adds."""
        return sum(edit.added is not None for edit in self.edits.values())

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

    def _edits_json(self) -> list[dict[str, Any]]:
        """The edits of the stream that writers get, in its order."""
        if self.stream is None:
            return []
        places: dict[int, list[Place]] = {}
        for writer in self.writers:
            places.setdefault(id(self.stream.at(*writer.place)), []).append(writer.place)
        return [self._edit_json(edit, places[id(edit)]) for edit in self.stream.edits() if id(edit) in places]

    def _edit_json(self, edit: WeightEdit, places: Sequence[Place]) -> dict[str, Any]:
        """One edit of the stream as plain data, its vectors by their hash; ``places`` has one for each writer."""
        vectors = (edit.read, edit.write, *(its for its in (edit.constant, edit.row_scale) if its is not None))
        along = (edit.read.T @ edit.constant)[0].item() if edit.adds and edit.constant is not None else None
        return {
            **({} if along is None else {"added": along}),
            "directions": edit.rank,
            "strength": edit.strength,
            "column_scale": edit.column_scale,
            "constant": edit.constant is not None,
            "keeps_rows": edit.keeps_rows,
            "oblique": edit.is_oblique,
            "removes": edit.removes,
            "writers": len(places),
            "places": in_words(places),
            "sha256": hashlib.sha256(b"".join(v.contiguous().numpy().tobytes() for v in vectors)).hexdigest(),
        }

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
            "claim": self.claim,
            "edits": self._edits_json(),
            **({"healed": self.healed} if self.healed else {}),
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
