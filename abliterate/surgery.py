"""The streaming edit: shard by shard, block by block, never a whole model and never a whole tensor in memory.

Bytes that are not edited are copied as they are, in file order, so names, order, offsets, alignment and metadata stay.
An edited tensor goes through one reused buffer.  Where the residual axis is the last one (embeddings, biases) each row
is edited on its own, in one pass.  Where it is the one before (output projections ``[d, in]``), a first pass over the
rows gathers ``c = read^T W`` and a second one writes ``W - write c``; the few rows that absorb the rounding
(``edits.feedback_rows``) are held back and written last.
"""

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate import edits
from abliterate.arch.model_map import Writer
from abliterate.checkpoint.header import Shard, TensorInfo
from abliterate.checkpoint.output import OutputFolder, copy_file, write_json
from abliterate.checkpoint.source import INDEX_NAME
from abliterate.edits import Projector
from abliterate.errors import CheckpointError, NonFiniteError, NotEnoughDiskError
from abliterate.events import Advanced, Finished, OnEvent, Started, ignore
from abliterate.linalg import orthonormal_basis
from abliterate.planning import EditPlan

DEFAULT_MEMORY_BYTES = 512 * 2**20
TASK = "edit"

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def compute_dtype(stored: torch.dtype) -> torch.dtype:
    """Arithmetic is float32 for half-precision storage and float64 for float32 and wider."""
    return torch.float32 if stored.itemsize == 2 else torch.float64


@dataclass(frozen=True, slots=True, kw_only=True)
class EditedTensor:
    """What was done to one tensor: the relative size of what was removed, ``|read^T W| / |W|`` per Frobenius norm,
    and the predicted relative distance to hook ablation (0 for class A)."""

    name: str
    removed_share: float
    predicted_error: float


class Buffers:
    """Reused block buffers: one of raw bytes in, one of raw bytes out, one of arithmetic."""

    def __init__(self, memory_bytes: int) -> None:
        # Per element of a bf16 block: 2 bytes in, 2 out, 4 to 8 of arithmetic, as much again for temporaries.
        self.block_bytes = max(2**12, min(memory_bytes // 12, 32 * 2**20))
        self._raw = torch.empty(self.block_bytes, dtype=torch.uint8)

    def raw(self, size: int) -> Tensor:
        """``size`` bytes of the raw buffer, grown when one row of a tensor is larger than a block."""
        if size > self._raw.numel():
            self._raw = torch.empty(size, dtype=torch.uint8)
        return self._raw[:size]

    def rows_per_block(self, row_bytes: int) -> int:
        """How many rows of ``row_bytes`` fit into a block; at least one."""
        return max(1, self.block_bytes // max(1, row_bytes))


def projectors(plan: EditPlan, directions: Float[Tensor, "d k"]) -> dict[str, Projector]:
    """The projector of every writer of the plan, by tensor name; reads the norm gains of class B writers.

    Raises:
        CheckpointError: a direction has the wrong width.
        NonFiniteError: a norm weight is not finite.
    """
    if directions.shape[0] != plan.model_map.d_model:
        raise CheckpointError(
            f"the direction has {directions.shape[0]} components, {plan.checkpoint.name} has {plan.model_map.d_model}",
            "use a direction measured on this model",
        )
    basis = orthonormal_basis(directions)
    plain = edits.orthogonal(basis)
    return {
        writer.tensor.name: plain if writer.norm is None else edits.oblique(basis, read_gain(plan, writer))
        for writer in plan.writers
    }


def read_gain(plan: EditPlan, writer: Writer) -> Float[Tensor, " d"]:
    """The per-channel gain of the norm behind ``writer``, in float64."""
    if writer.norm is None:
        raise ValueError(f"{writer.tensor.name} has no norm behind it")
    weight = read_tensor(plan.checkpoint.folder, writer.norm).to(torch.float64)
    if not torch.isfinite(weight).all():
        raise NonFiniteError(f"{writer.norm.shard}: '{writer.norm.name}' holds NaN or infinity", _NAN_HINT)
    return weight + 1 if writer.gain == "1+w" else weight


def read_tensor(root: Path, info: TensorInfo) -> Tensor:
    """One small tensor, whole."""
    raw = torch.empty(info.size_bytes, dtype=torch.uint8)
    with (root / info.shard).open("rb", buffering=0) as file:
        read_exactly(file, info.start, raw, where=f"{info.shard}: '{info.name}'")
    return raw.view(DTYPES[info.dtype]).reshape(info.shape)


def edit_checkpoint(
    plan: EditPlan,
    directions: Float[Tensor, "d k"],
    output: OutputFolder,
    *,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    on_event: OnEvent = ignore,
) -> list[EditedTensor]:
    """Write the edited checkpoint into ``output``: shards, index, configuration and every other file.

    Files that an earlier run of the same plan completed are kept.  Returns the tensors edited in this run.

    Raises:
        SourceError: the source is corrupt or not finite.
        NotEnoughDiskError: the disk filled up; what is complete stays, and the same command continues.
    """
    source = plan.checkpoint
    matrices = projectors(plan, directions)
    buffers = Buffers(memory_bytes)
    edited: list[EditedTensor] = []
    on_event(Started(task=TASK, total=plan.output_bytes, unit="bytes"))
    try:
        for shard in source.shards:
            if output.is_done(shard.name):
                on_event(Advanced(task=TASK, amount=shard.size_bytes))
                continue
            job = ShardJob(plan=plan, shard=shard, projectors=matrices, buffers=buffers, on_event=on_event)
            edited += job.write(output.path / shard.name)
            output.mark_done(shard.name)
        _write_index(plan, output)
        _write_config(plan, output)
        for name in source.other_files:
            if name != "config.json" and not output.is_done(name):
                copy_file(source.folder / name, output.path / name)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NotEnoughDiskError(
                f"{output.path}: the disk is full", "free some space and run the same command: it continues"
            ) from error
        raise CheckpointError(f"{error.filename or source.folder}: {error.strerror}", "check the file") from error
    on_event(Finished(task=TASK))
    return edited


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """The edit of one shard."""

    plan: EditPlan
    shard: Shard
    projectors: Mapping[str, Projector]
    buffers: Buffers
    on_event: OnEvent

    def write(self, target: Path) -> list[EditedTensor]:
        """Write the shard to ``target`` and flush it to disk."""
        writers = {writer.tensor.name: writer for writer in self.plan.writers}
        edited = []
        added = self._added_head()
        path = self.plan.checkpoint.folder / self.shard.name
        with path.open("rb", buffering=0) as source, target.open("wb", buffering=0) as out:
            position = self._write_header(source, out, added)
            for tensor in self.shard.tensors:
                if tensor.name not in writers:
                    continue
                self._copy(source, out, position, tensor.start)
                edited.append(self._edit(source, out, tensor, writers[tensor.name]))
                position = tensor.end
            self._copy(source, out, position, self.shard.size_bytes)
            if added is not None:
                self._copy(source, out, added.start, added.end)
            os.fsync(out.fileno())
        return edited

    def _added_head(self) -> TensorInfo | None:
        embedding = self.plan.model_map.embedding.tensor
        return embedding if self.plan.added_head and embedding.shard == self.shard.name else None

    def _write_header(self, source: BinaryIO, out: BinaryIO, added: TensorInfo | None) -> int:
        """Write the header, with the added head as its last entry, and return where the data starts in the source."""
        raw = torch.empty(self.shard.data_start, dtype=torch.uint8)
        read_exactly(source, 0, raw, where=self.shard.name)
        header = bytes(view_of(raw))
        if added is not None:
            data_bytes = self.shard.size_bytes - self.shard.data_start
            header = header_with(header, self.plan.added_head or "", added, data_bytes)
        write_all(out, header)
        return self.shard.data_start

    def _copy(self, source: BinaryIO, out: BinaryIO, start: int, end: int) -> None:
        while start < end:
            chunk = self.buffers.raw(min(end - start, self.buffers.block_bytes))
            read_exactly(source, start, chunk, where=self.shard.name)
            write_all(out, view_of(chunk))
            start += chunk.numel()
            self.on_event(Advanced(task=TASK, amount=chunk.numel()))

    def _edit(self, source: BinaryIO, out: BinaryIO, tensor: TensorInfo, writer: Writer) -> EditedTensor:
        projector = self.projectors[tensor.name]
        edit = _edit_rows if writer.axis == len(tensor.shape) - 1 else _edit_columns
        removed, total = edit(_TensorIO(source, out, tensor, self.buffers, self.on_event), projector)
        return EditedTensor(
            name=tensor.name,
            removed_share=(removed / total) ** 0.5 if total else 0.0,
            predicted_error=projector.predicted_error,
        )


@dataclass(frozen=True, slots=True)
class _TensorIO:
    """Reads a tensor of the source by rows of its last axis, and writes rows at the same place of the output."""

    source: BinaryIO
    out: BinaryIO
    tensor: TensorInfo
    buffers: Buffers
    on_event: OnEvent

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.tensor.dtype]

    @property
    def row_bytes(self) -> int:
        return self.tensor.shape[-1] * self.dtype.itemsize

    def read(self, first: int, count: int) -> Float[Tensor, "rows n"]:
        """Rows ``first`` to ``first + count`` (all axes but the last flattened), in the dtype of the arithmetic."""
        raw = self.buffers.raw(count * self.row_bytes)
        read_exactly(
            self.source,
            self.tensor.start + first * self.row_bytes,
            raw,
            where=f"{self.tensor.shard}: '{self.tensor.name}'",
        )
        return raw.view(self.dtype).reshape(count, self.tensor.shape[-1]).to(compute_dtype(self.dtype))

    def write(self, rows: Tensor) -> None:
        """Append rows, already rounded to the stored dtype."""
        write_all(self.out, view_of(rows.contiguous()))

    def check(self, coefficients: Tensor, what: str) -> None:
        """``c = read^T W`` is finite exactly when every element of ``W`` is, so this checks the whole block."""
        if not torch.isfinite(coefficients).all():
            raise NonFiniteError(f"{self.tensor.shard}: '{self.tensor.name}' {what}", _NAN_HINT)


def _edit_rows(io: _TensorIO, projector: Projector) -> tuple[float, float]:
    """Residual axis last: every row is a vector of the stream."""
    n_rows = io.tensor.numel // io.tensor.shape[-1]
    step = io.buffers.rows_per_block(io.row_bytes)
    removed = total = 0.0
    for first in range(0, n_rows, step):
        block = io.read(first, min(step, n_rows - first))
        coefficients = block @ projector.read.to(block.dtype)
        io.check(coefficients, "holds NaN or infinity")
        removed += float(coefficients.double().square().sum())
        total += _square_sum(block)
        edited = edits.apply(block.T, projector)
        rounded = edits.round_keeping_zero(edited, io.dtype, projector).T
        io.check(rounded @ projector.read.to(rounded.dtype), "overflows its dtype when edited")
        io.write(rounded)
        io.on_event(Advanced(task=TASK, amount=block.shape[0] * io.row_bytes))
    return removed, total


def _edit_columns(io: _TensorIO, projector: Projector) -> tuple[float, float]:
    """Residual axis before the last: matrices ``[d, n]``, one after the other for stacked experts ``[E, d, n]``."""
    d, n = io.tensor.shape[-2:]
    removed = total = 0.0
    for matrix in range(io.tensor.numel // (d * n)):
        part_removed, part_total = _edit_matrix(io, projector, matrix * d, d, n)
        removed, total = removed + part_removed, total + part_total
    return removed, total


def _edit_matrix(io: _TensorIO, projector: Projector, first_row: int, d: int, n: int) -> tuple[float, float]:
    dtype = compute_dtype(io.dtype)
    read, write = projector.read.to(dtype), projector.write.to(dtype)
    step = io.buffers.rows_per_block(io.row_bytes)
    coefficients = torch.zeros(read.shape[1], n, dtype=torch.float64)
    total = 0.0
    blocks = [(start, min(step, d - start)) for start in range(0, d, step)]
    block = torch.empty(0)
    for start, count in blocks:
        block = io.read(first_row + start, count)
        coefficients += (read[start : start + count].T @ block).double()
        total += _square_sum(block)
    io.check(coefficients, "holds NaN or infinity")
    taken = coefficients.to(dtype)
    feedback = _Feedback(projector, io.dtype, n)
    place = io.out.tell()
    for start, count in blocks:
        if len(blocks) > 1:
            block = io.read(first_row + start, count)
        edited = block - write[start : start + count] @ taken
        io.write(feedback.round(edited, start))
        io.on_event(Advanced(task=TASK, amount=count * io.row_bytes))
    for row, rounded in feedback.finish().items():
        io.check(rounded, "overflows its dtype when edited")
        io.out.seek(place + row * io.row_bytes)
        io.write(rounded)
    io.out.seek(place + d * io.row_bytes)
    return float(coefficients.square().sum()), total


class _Feedback:
    """``edits.round_keeping_zero`` for a matrix that arrives in blocks of rows: the feedback rows wait for the rest."""

    def __init__(self, projector: Projector, dtype: torch.dtype, n: int) -> None:
        self._projector = projector
        self._dtype = dtype
        self._rows = edits.feedback_rows(projector.read)
        self._held = torch.zeros(len(self._rows), n, dtype=compute_dtype(dtype))
        self._leak = torch.zeros(projector.read.shape[1], n, dtype=compute_dtype(dtype))

    def round(self, block: Float[Tensor, "rows n"], start: int) -> Float[Tensor, "rows n"]:
        """Round rows ``start`` and following to nearest; remember the feedback rows among them, and the leak."""
        rounded = block.to(self._dtype)
        read = self._projector.read[start : start + len(block)].to(block.dtype, copy=True)
        for position, row in enumerate(self._rows):
            if start <= row < start + len(block):
                self._held[position] = block[row - start]
                read[row - start] = 0
        self._leak += read.T @ rounded.to(block.dtype)
        return rounded

    def finish(self) -> dict[int, Float[Tensor, " n"]]:
        """The feedback rows, rounded so that the leak of all rows cancels."""
        # The held rows are exact multiples of what they stand for: their share of read^T W' is still to be added.
        read = self._projector.read[self._rows].to(self._held.dtype)
        leak = self._leak + read.T @ self._held
        return dict(
            zip(
                self._rows,
                edits.round_tail(self._held, self._dtype, self._projector.read[self._rows], leak),
                strict=True,
            )
        )


def _square_sum(block: Tensor) -> float:
    return float(torch.linalg.vector_norm(block).double().square())


_NAN_HINT = "the checkpoint is damaged: fetch it again, or repair that tensor before editing"


# --- bytes --------------------------------------------------------------------------------------------------------


def view_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    return memoryview(tensor.view(torch.uint8).reshape(-1).numpy())  # type: ignore[arg-type] - arrays are buffers


def read_exactly(file: BinaryIO, start: int, target: Tensor, *, where: str) -> None:
    """Fill ``target`` (uint8) with the bytes of ``file`` from ``start`` on.

    Raises:
        CheckpointError: the file ends before that.
    """
    view = view_of(target)
    file.seek(start)
    while len(view):
        count = file.readinto(view)  # type: ignore[attr-defined] - unbuffered files have it
        if not count:
            raise CheckpointError(f"{where}: the file ends too early", "fetch this file again")
        view = view[count:]


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write all of ``data``, however many calls it takes."""
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]


def header_with(header: bytes, name: str, like: TensorInfo, data_bytes: int) -> bytes:
    """``header`` with one more entry at its end, for a tensor of the size of ``like`` appended to the data.

    The text of all other entries stays as it is; the padding follows the format (8 bytes).
    """
    entry = json.dumps(
        {
            name: {
                "dtype": like.dtype,
                "shape": list(like.shape),
                "data_offsets": [data_bytes, data_bytes + like.size_bytes],
            }
        },
        separators=(",", ":"),
    )
    text = header[8:].decode("utf-8").rstrip()
    body = (text[:-1] + "," + entry[1:]).encode("utf-8")
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(8, "little") + body


# --- the small files ----------------------------------------------------------------------------------------------


def _write_index(plan: EditPlan, output: OutputFolder) -> None:
    if plan.checkpoint.index is None:
        return
    if plan.added_head is None:
        copy_file(plan.checkpoint.folder / INDEX_NAME, output.path / INDEX_NAME)
        return
    embedding = plan.model_map.embedding.tensor
    metadata = dict(plan.checkpoint.index.get("metadata") or {})
    for key, amount in (("total_size", embedding.size_bytes), ("total_parameters", embedding.numel)):
        if key in metadata:
            metadata[key] += amount
    weight_map = dict(plan.checkpoint.index["weight_map"])
    weight_map[plan.added_head] = embedding.shard
    write_json(output.path / INDEX_NAME, {**plan.checkpoint.index, "metadata": metadata, "weight_map": weight_map})


def _write_config(plan: EditPlan, output: OutputFolder) -> None:
    if not plan.sets_untied:
        copy_file(plan.checkpoint.folder / "config.json", output.path / "config.json")
        return
    write_json(output.path / "config.json", untied_config(plan.checkpoint.config))


def untied_config(config: Mapping[str, object]) -> dict[str, object]:
    """``config`` with ``tie_word_embeddings: false`` at the top and in ``text_config``: absent is not false."""
    untied: dict[str, object] = {**config, "tie_word_embeddings": False}
    text = config.get("text_config")
    if isinstance(text, dict):
        untied["text_config"] = {**text, "tie_word_embeddings": False}
    return untied
