"""The export of a patch: base and edited checkpoint read side by side, once and a half, in file order."""

import hashlib
import lzma
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.arch.codecs import Plain, as_rows
from abliterate.arch.edit_plan import EditPlan
from abliterate.arch.formats import DTYPES
from abliterate.arch.model_map import Writer
from abliterate.checkpoint import direction_file
from abliterate.checkpoint.budget import COPY_BYTES
from abliterate.checkpoint.directio import Slab, SourceFile, view_of
from abliterate.checkpoint.hashes import sha256_file
from abliterate.checkpoint.header import Shard, read_header
from abliterate.checkpoint.output import PRIVATE_FOLDER
from abliterate.checkpoint.pairs import same_content
from abliterate.checkpoint.source import INDEX_NAME, Checkpoint, open_folder
from abliterate.editing.reading import READ_BYTES, read_along, rows_of_block
from abliterate.errors import OutputError, PlanRefusedError, VerificationError
from abliterate.events import Advanced, Finished, OnEvent, Started, ignore
from abliterate.exports.patches.bitstreams import PRESET
from abliterate.exports.patches.file import CHOSEN, EDIT_PARTS, FORMAT, FORMAT_NUMBER, PatchFile, PatchWriter
from abliterate.exports.patches.replay import Recorder, StoredEdit, TensorReplay
from abliterate.method.directions import DirectionSet
from abliterate.method.edits import column_scale
from abliterate.publishing import manifest
from abliterate.publishing.finished import FinishedEdit
from abliterate.recipe import Recipe
from abliterate.verification.checkpoint_proof import compare_headers

Purpose = Literal["apply", "revert"]
TASK = "export"
DIRECTION_FILE = f"{PRIVATE_FOLDER}/direction.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchReport:
    """A patch that was written.

    ``missed`` counts the edited elements that the arithmetic does not predict, ``lost`` the elements of the base that
    the edited ones do not determine, of ``elements`` in plain writers; ``parts`` are bytes in the file.
    """

    file: Path
    size_bytes: int
    tensors: int
    elements: int
    missed: int
    lost: int
    parts: Mapping[str, int]


@dataclass(slots=True)
class Counts:
    """What the export saw."""

    elements: int = 0
    missed: int = 0
    lost: int = 0


def export(
    edited: Path,
    base: str | Path,
    out: Path,
    *,
    purposes: Sequence[Purpose] = ("apply", "revert"),
    on_event: OnEvent = ignore,
) -> PatchReport:
    """Write what turns ``base`` into ``edited``, or back, to ``out``.

    Raises:
        OutputError: ``out`` exists.
        VerificationError: ``edited`` differs from ``base`` in more than its plan says.
        SourceError: one of them cannot be read.
    """
    if out.exists():
        raise OutputError(f"{out}: exists already", "choose another --out, or move it away")
    finished = FinishedEdit.open(edited)
    made = finished.plan(finished.open_base(base))
    _check_expressible(made, edited)
    result = open_folder(edited, name=str(edited))
    writer, counts = PatchWriter(out), Counts()
    exporter = Exporter(
        plan=made,
        result=result,
        writer=writer,
        purposes=tuple(purposes),
        counts=counts,
        on_event=on_event,
    )
    try:
        writer.add(*_chosen(finished.directions))
        document = exporter.run(finished.recipe)
    except BaseException:
        writer.discard()
        raise
    written = PatchFile(writer.finish(document))
    parts = {
        "coefficients": written.size_of(".c"),
        "apply": written.size_of(".forward"),
        "revert": written.size_of(".bits", ".outside"),
        "codes": written.size_of(".codes"),
    }
    return PatchReport(
        file=out,
        size_bytes=out.stat().st_size,
        tensors=len(document["tensors"]),
        elements=counts.elements,
        missed=counts.missed,
        lost=counts.lost,
        parts=parts,
    )


def _check_expressible(made: EditPlan, edited: Path) -> None:
    """Check that a patch can hold the edit.

    Raises:
        PlanRefusedError: rows keep their lengths, or it was healed.
    """
    if any(edit.keeps_rows for edit in made.distinct_edits):
        raise PlanRefusedError(
            f"{edited}: rows of its writers keep their lengths, and a patch holds no such edit",
            "hand on the checkpoint itself, or its direction and recipe",
        )
    if made.healed:
        raise PlanRefusedError(
            f"{edited}: was healed, and a patch holds the edit alone",
            "hand on the checkpoint itself, or its adapter (abliterate lora export), or patch the edit before healing",
        )


@dataclass(kw_only=True)
class Exporter:
    """Reads base and result side by side, in file order."""

    plan: EditPlan
    result: Checkpoint
    writer: PatchWriter
    purposes: tuple[Purpose, ...]
    counts: Counts
    on_event: OnEvent
    stored: dict[int, StoredEdit] = field(default_factory=dict)

    def run(self, recipe: Recipe) -> dict[str, Any]:
        """Everything goes to ``writer``; gives back the document."""
        numbers = self._add_edits(recipe)
        base, result = self.plan.checkpoint, self.result
        ours = {shard.name: shard for shard in result.shards}
        self.on_event(Started(task=TASK, total=base.size_bytes, unit="bytes"))
        tensors: list[dict[str, Any]] = []
        shards: dict[str, dict[str, Any]] = {}
        for shard in base.shards:
            problems = compare_headers(shard, ours[shard.name], self.plan) if shard.name in ours else ["is missing"]
            if problems:
                raise VerificationError(f"{result.folder}: {problems[0]}", "this is not an edit of that base")
            shards[shard.name] = self._shard(shard, ours[shard.name], tensors, numbers)
        self.on_event(Finished(task=TASK))
        return {
            "format": f"{FORMAT}{FORMAT_NUMBER}",
            "for": list(self.purposes),
            "versions": manifest.versions(),
            "base": {"name": base.name, "revision": base.revision},
            "recipe": recipe.model_dump(mode="json"),
            "shards": shards,
            "tensors": tensors,
            "files": self._files(),
        }

    def _add_edits(self, recipe: Recipe) -> dict[str, int]:
        """Write every different edit once; gives back the number of each writer's."""
        numbers = {id(edit): number for number, edit in enumerate(self.plan.distinct_edits)}
        for number, edit in enumerate(self.plan.distinct_edits):
            stored = StoredEdit.of(edit, feedback=recipe.edit.rounding == "direction")
            self.stored[number] = stored
            for part in EDIT_PARTS:
                self.writer.add(f"projector.{number}.{part}", getattr(stored, part))
            if stored.constant is not None:
                self.writer.add(f"projector.{number}.constant", stored.constant)
        return {name: numbers[id(edit)] for name, edit in self.plan.edits.items()}

    def _shard(
        self, shard: Shard, ours: Shard, tensors: list[dict[str, Any]], numbers: Mapping[str, int]
    ) -> dict[str, Any]:
        paths = self.plan.checkpoint.folder / shard.name, self.result.folder / shard.name
        headers = read_header(paths[0], shard), read_header(paths[1], ours)
        writers = {writer.tensor.name: writer for writer in self.plan.writers}
        with SourceFile(paths[0]) as first, SourceFile(paths[1]) as second:
            pair = Pair(first, second, moved=len(headers[1]) - len(headers[0]))
            position = shard.data_start
            for tensor in shard.tensors:
                writer = writers.get(tensor.name)
                if writer is None or tensor.numel == 0:
                    continue
                self._same(pair, position, tensor.start, shard.name)
                number = len(tensors)
                before, after = self._writer(pair, writer, number, numbers[tensor.name])
                tensors.append(
                    {
                        "name": tensor.name,
                        "shard": shard.name,
                        "axis": writer.axis,
                        "role": writer.role,
                        "format": writer.format,
                        "coded": "codes" if writer.packed else "replay",
                        "projector": numbers[tensor.name],
                        "sha256_before": before,
                        "sha256_after": after,
                    }
                )
                position = tensor.end
                self.on_event(Advanced(task=TASK, amount=tensor.size_bytes))
            self._same(pair, position, shard.size_bytes, shard.name)
        if headers[0] != headers[1]:
            self.writer.add(f"header.{shard.name}", lzma.compress(headers[0]))
        return {
            "size": shard.size_bytes,
            "sha256": sha256_file(paths[0]),
            "edited_size": ours.size_bytes,
            "edited_sha256": sha256_file(paths[1]),
        }

    def _same(self, pair: "Pair", start: int, end: int, shard: str) -> None:
        for place in range(start, end, COPY_BYTES):
            old, new = pair.read(place, min(COPY_BYTES, end - place))
            if not same_content(old, new):
                raise VerificationError(
                    f"{self.result.folder}: {shard} differs from the base in more than its writers",
                    "`abliterate diff` says where; a patch holds an edit, and nothing else",
                )
        self.on_event(Advanced(task=TASK, amount=end - start))

    def _writer(self, pair: "Pair", writer: Writer, number: int, edit: int) -> tuple[str, str]:
        """Hashes before and after."""
        digests = hashlib.sha256(), hashlib.sha256()

        def read(start: int, size: int) -> tuple[Tensor, Tensor]:
            both = pair.read(writer.tensor.start + start, size)
            for digest, part in zip(digests, both, strict=True):
                digest.update(view_of(part))
            return both

        if writer.packed is not None:
            self._codes(writer, number, read)
        else:
            self._replay(writer, number, self.stored[edit], read, pair)
        return digests[0].hexdigest(), digests[1].hexdigest()

    def _codes(self, writer: Writer, number: int, read: "Read") -> None:
        compressor = lzma.LZMACompressor(preset=PRESET)
        parts = []
        for start in range(0, writer.tensor.size_bytes, READ_BYTES):
            old, new = read(start, min(READ_BYTES, writer.tensor.size_bytes - start))
            parts.append(compressor.compress(view_of(new - old)))
        self.writer.add(f"tensor.{number}.codes", b"".join([*parts, compressor.flush()]))

    def _replay(self, writer: Writer, number: int, edit: StoredEdit, read: "Read", pair: "Pair") -> None:
        settle, tail = Recorder(), Recorder()
        stored = DTYPES[writer.tensor.dtype]
        compute = Plain(stored, writer.row_elements).compute
        scales = self.plan.edits[writer.tensor.name].scales
        coefficients, scale = self._coefficients(writer, edit, pair, scales=scales)
        coefficients = coefficients.to(compute)
        self.writer.add(f"tensor.{number}.c", coefficients)
        if scale is not None:
            self.writer.add(f"tensor.{number}.scale", scale)
        replay = TensorReplay(edit=edit, coefficients=coefficients, settle=settle, tail=tail, scale=scale)
        width, d = writer.row_elements, len(edit.read)
        step = rows_of_block(width)
        matrix_rows = writer.tensor.numel // width if writer.in_rows else d
        row_bytes = width * stored.itemsize
        for first in range(0, writer.tensor.numel // width, matrix_rows):
            walk = None if writer.in_rows else replay.walk(slice(first // d * width, first // d * width + width))
            for row, both in _blocks(read, first, matrix_rows, step, row_bytes, stored):
                if walk is not None:
                    walk.block(both, row)
                    continue
                vectors = replay.walk(slice(row, row + both.shape[1]))
                vectors.block(both.transpose(1, 2), 0)
                vectors.finish()
            if walk is not None:
                walk.finish()
        self._keep(number, settle, tail, writer.tensor.numel)

    def _keep(self, number: int, settle: Recorder, tail: Recorder, elements: int) -> None:
        self.counts.elements += elements
        for recorder, stem in ((settle, f"tensor.{number}"), (tail, f"tensor.{number}.tail")):
            self.counts.missed += recorder.forward.count
            self.counts.lost += recorder.backward.ambiguous + recorder.backward.outside.count
            if "apply" in self.purposes:
                self.writer.add(f"{stem}.forward", recorder.forward.to_bytes())
            if "revert" in self.purposes:
                bits, outside = recorder.backward.to_bytes()
                self.writer.add(f"{stem}.bits", bits)
                self.writer.add(f"{stem}.outside", outside)

    def _coefficients(
        self, writer: Writer, edit: StoredEdit, pair: "Pair", *, scales: bool
    ) -> tuple[Float[Tensor, "k columns"], Float[Tensor, " columns"] | None]:
        """``read^T W`` in float64 and, where columns keep their lengths, what each is multiplied by."""
        if not scales:
            return read_along(pair.first, writer, edit.read)[0], None
        found, squares = read_along(pair.first, writer, torch.cat((edit.read, edit.write), dim=1))
        c, along = found.chunk(2)
        after = squares - ((2 * along - (edit.write.T @ edit.write) @ c) * c).sum(0)
        return c.contiguous(), column_scale(squares, after)

    def _files(self) -> list[dict[str, Any]]:
        """What becomes of every file that is not a shard; the text of those that differ goes to ``writer``."""
        base, edited = self.plan.checkpoint.folder, self.result.folder
        old = {*self.plan.checkpoint.other_files, *([INDEX_NAME] if self.plan.checkpoint.index else [])}
        new = {*_files_of(edited)} - {shard.name for shard in self.result.shards}
        entries = []
        for name in sorted(old | new):
            entry: dict[str, Any] = {"name": name}
            for key, folder, names in (("base", base, old), ("edited", edited, new)):
                entry[key] = sha256_file(folder / name) if name in names else None
            private = name.removeprefix(f"{PRIVATE_FOLDER}/base-")
            if entry["base"] is None and private in old and entry["edited"] == sha256_file(base / private):
                entry["copy_of"] = private
            elif entry["base"] != entry["edited"] and name != DIRECTION_FILE:
                for key, folder, purpose in (("base", base, "revert"), ("edited", edited, "apply")):
                    if entry[key] is not None and purpose in self.purposes:
                        self.writer.add(f"{key}.{name}", lzma.compress((folder / name).read_bytes()))
            entries.append(entry)
        return entries


Read = Callable[[int, int], tuple[Tensor, Tensor]]


class Pair:
    """Both files of a shard; the data of the second lies ``moved`` bytes further on."""

    def __init__(self, first: SourceFile, second: SourceFile, moved: int) -> None:
        self.first, self.second, self.moved = first, second, moved
        self.slabs = Slab(COPY_BYTES), Slab(COPY_BYTES)

    def read(self, start: int, size: int) -> tuple[Tensor, Tensor]:
        """The same byte range of both."""
        return self.first.read(self.slabs[0], start, size), self.second.read(self.slabs[1], start + self.moved, size)


def _blocks(
    read: Read, first: int, rows: int, step: int, row_bytes: int, stored: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """Blocks ``[2, rows, n]`` of a matrix that begins at row ``first``, with the row of the matrix they begin at."""
    at_once = max(1, READ_BYTES // (step * row_bytes)) * step
    for start in range(0, rows, at_once):
        count = min(at_once, rows - start)
        parts = [
            as_rows(part, stored, row_bytes // stored.itemsize)
            for part in read((first + start) * row_bytes, count * row_bytes)
        ]
        for row in range(0, count, step):
            yield start + row, torch.stack([part[row : row + step] for part in parts])


def _chosen(directions: DirectionSet) -> tuple[str, Tensor | bytes]:
    """What was chosen, under its name in the patch: a vector, or else a direction file that holds nothing more."""
    chosen = directions.chosen
    if chosen.is_vector:
        return "direction", directions.direction.to(torch.float32)
    return CHOSEN, direction_file.to_bytes(DirectionSet(candidates=(chosen,), choice=directions.choice))


def _files_of(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix()
