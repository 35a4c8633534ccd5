"""Proof on the written bytes, from the equation and not from the code that made the edit.

Base and result are read side by side, once.  Every edited tensor is held against the equation (``proofs``), every other
byte of every shard against the base's, every other file as well, and the hashes of all shards go into the report.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abliterate.arch.codecs import HeldScales, as_rows, codec_of
from abliterate.arch.edit_plan import EditPlan
from abliterate.checkpoint.budget import COPY_BYTES, DEFAULT_BYTES, RESERVED_BYTES, SMALLEST_PIECE
from abliterate.checkpoint.hashes import sha256_file
from abliterate.checkpoint.header import Shard, TensorInfo, read_header
from abliterate.checkpoint.hub import check_cached
from abliterate.checkpoint.output import Spread, alone
from abliterate.checkpoint.pairs import PAIRS, PairedRange, read_pairs, same_content
from abliterate.checkpoint.source import Checkpoint, open_folder
from abliterate.checkpoint.transfer import one_core
from abliterate.checkpoint.values import FLOATS, is_finite
from abliterate.events import Advanced, Finished, OnEvent, Started, ignore
from abliterate.verification.declared import check_declared
from abliterate.verification.file_checks import compare_files, compare_head, strange_files
from abliterate.verification.row_proof import RowSquares, check_rows
from abliterate.verification.tensor_proof import ColumnProver, Prover, TensorProof

TASK = "verify"


@dataclass(frozen=True, slots=True, kw_only=True)
class BytesReport:
    """Verification of a written checkpoint against its base.

    ``failures`` are sentences; the checkpoint is what was planned exactly when there are none.  ``not_finite`` are
    tensors outside the plan that hold NaN or infinity, as they do in the base.
    """

    edited: tuple[TensorProof, ...]
    identical_tensors: int
    identical_files: int
    failures: tuple[str, ...]
    sha256_files: Mapping[str, str]
    sha256_source_files: Mapping[str, str]
    not_finite: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Nothing failed."""
        return not self.failures

    @property
    def worst_left(self) -> float:
        """Largest share of the direction left in any writer, ``|u^T W'| / |W'|``."""
        return max((proof.left for proof in self.edited), default=0.0)


def verify_bytes(
    plan: EditPlan,
    written: Path,
    *,
    memory_bytes: int = DEFAULT_BYTES,
    spread: Spread = alone,
    on_event: OnEvent = ignore,
) -> BytesReport:
    """Compare the checkpoint in ``written`` with ``plan``, with its edits, applied to its base.

    ``spread`` deals the shards out to several processes, all of which call this.

    Raises:
        SourceError: one of the two cannot be read, or changed meanwhile.
    """
    result = open_folder(written, name=str(written))
    shards = plan.checkpoint.shards
    on_event(Started(task=TASK, total=plan.checkpoint.size_bytes, unit="bytes"))

    def advance(amount: int) -> None:
        on_event(Advanced(task=TASK, amount=amount))

    def run(mine: Sequence[Shard]) -> Iterator[dict[str, Any]]:
        for shard in mine:
            check = ShardCheck.of(plan, result, shard, memory_bytes)
            check.run(advance)
            yield check.report().to_plain()

    with one_core(needed=not plan.packed):
        found = spread(shards, run, by_others=lambda place: advance(shards[place].size_bytes))
        reports = [ShardReport.of_plain(its) for its in found]
    plan.checkpoint.check_unchanged()
    result.check_unchanged()
    for report in reports:
        if report.source_sha256:
            check_cached(plan.checkpoint.folder / report.name, report.source_sha256)
    on_event(Finished(task=TASK))
    return gather(plan, result, reports)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardReport:
    """Verification of one shard."""

    name: str
    proofs: tuple[TensorProof, ...]
    failures: tuple[str, ...]
    identical: int
    sha256: str
    source_sha256: str
    rows: Mapping[str, RowSquares] = field(default_factory=dict)
    not_finite: tuple[str, ...] = ()

    def to_plain(self) -> dict[str, Any]:
        """As JSON can hold it, so that another process can have it."""
        return {**asdict(self), "rows": {name: its.tolist() for name, its in self.rows.items()}}

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> "ShardReport":
        """From what ``to_plain`` gives."""
        read = {
            "proofs": tuple(TensorProof(**its) for its in plain["proofs"]),
            "failures": tuple(plain["failures"]),
            "rows": {name: torch.tensor(its, dtype=torch.float64) for name, its in plain["rows"].items()},
            "not_finite": tuple(plain["not_finite"]),
        }
        return cls(**{**plain, **read})


def gather(plan: EditPlan, result: Checkpoint, shards: Sequence[ShardReport]) -> BytesReport:
    """The reports of all shards, and whether everything else is as it must be."""
    proofs = [proof for shard in shards for proof in shard.proofs]
    unchecked = {writer.tensor.name for writer in plan.writers} - {proof.name for proof in proofs}
    same_files, file_failures = compare_files(plan, result.folder)
    known = {shard.name for shard in plan.checkpoint.shards}
    return BytesReport(
        edited=tuple(proofs),
        identical_tensors=sum(shard.identical for shard in shards),
        identical_files=same_files,
        failures=(
            *(failure for shard in shards for failure in shard.failures),
            *check_declared(plan),
            *check_rows(plan, {name: its for shard in shards for name, its in shard.rows.items()}),
            *file_failures,
            *(f"writer '{name}' was not checked" for name in sorted(unchecked)),
            *(f"shard {shard.name} is not in the base" for shard in result.shards if shard.name not in known),
            *(f"file {name} is not in the base" for name in strange_files(plan, result)),
        ),
        sha256_files={shard.name: shard.sha256 for shard in shards},
        sha256_source_files={shard.name: shard.source_sha256 for shard in shards},
        not_finite=tuple(name for shard in shards for name in shard.not_finite),
    )


@dataclass(kw_only=True)
class ShardCheck:
    """One shard of the base against its written counterpart."""

    plan: EditPlan
    result: Checkpoint
    shard: Shard
    slab_bytes: int
    held: HeldScales = field(default_factory=HeldScales)
    proofs: list[TensorProof] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    rows: dict[str, RowSquares] = field(default_factory=dict)
    identical: int = 0
    digests: tuple[str, str] = ("", "")
    not_finite: dict[str, None] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: EditPlan, result: Checkpoint, shard: Shard, memory_bytes: int) -> "ShardCheck":
        """A check of ``shard`` within a memory budget."""
        slab_bytes = max(SMALLEST_PIECE, (memory_bytes - RESERVED_BYTES) // (2 * PAIRS))
        return cls(plan=plan, result=result, shard=shard, slab_bytes=slab_bytes)

    def report(self) -> ShardReport:
        """What ``run`` found."""
        return ShardReport(
            name=self.shard.name,
            proofs=tuple(self.proofs),
            failures=tuple(self.failures),
            identical=self.identical,
            sha256=self.digests[1],
            source_sha256=self.digests[0],
            rows=self.rows,
            not_finite=tuple(self.not_finite),
        )

    def run(self, advance: Callable[[int], None]) -> None:
        """Compare; findings go to ``proofs``, ``failures`` and ``identical``."""
        ours = {shard.name: shard for shard in self.result.shards}.get(self.shard.name)
        if ours is None:
            self.failures.append(f"{self.shard.name} is missing")
            return
        self.failures += compare_headers(self.shard, ours, self.plan)
        if self.failures:
            return
        old, new = self.plan.checkpoint.folder / self.shard.name, self.result.folder / self.shard.name
        headers = read_header(old, self.shard), read_header(new, ours)
        if headers[0] != headers[1] and not self._adds_head:
            self.failures.append(f"{self.shard.name}: the text of the header changed")
        provers: list[Prover] = []
        changed: set[str] = set()
        byte_ranges = list(self._byte_ranges(provers, changed))
        found = read_pairs(old, new, byte_ranges, first_header=headers[0], second_header=headers[1], advance=advance)
        self.digests = (found.first, found.second if not self._adds_head else sha256_file(new))
        self.proofs = [prover.finish() for prover in provers]
        self.rows = {prover.writer.tensor.name: prover.row_squares for prover in provers if prover.edit.keeps_rows}
        for proof in self.proofs:
            self.failures += judge(proof)
        self.failures += [f"{what} changed, but is not in the plan" for what in sorted(changed)]
        if self._adds_head:
            self.failures += compare_head(self.plan, self.result)
        edited = {proof.name for proof in self.proofs}
        untouched = [tensor.name for tensor in self.shard.tensors if tensor.name not in edited]
        self.identical = sum(f"tensor '{name}'" not in changed for name in untouched)

    @property
    def _adds_head(self) -> bool:
        return bool(self.plan.added_head) and self.plan.model_map.embedding.tensor.shard == self.shard.name

    def _byte_ranges(self, provers: list[Prover], changed: set[str]) -> Iterator[PairedRange]:
        writers = {writer.tensor.name: writer for writer in self.plan.writers}
        position = self.shard.data_start
        for tensor in self.shard.tensors:
            yield from self._identical(
                position, tensor.start, f"{self.shard.name}: the gap before '{tensor.name}'", changed
            )
            position = tensor.end
            if tensor.name not in writers or tensor.numel == 0:
                yield from self._identical(tensor.start, tensor.end, f"tensor '{tensor.name}'", changed, tensor)
                continue
            writer = writers[tensor.name]
            codec = codec_of(self.plan.checkpoint.folder, writer, self.held)
            prover = Prover(writer, codec, self.plan.edits[writer.tensor.name])
            provers.append(prover)
            yield from self._rows(prover) if writer.in_rows else self._columns(prover)
        yield from self._identical(position, self.shard.size_bytes, f"{self.shard.name}: the end of the file", changed)

    def _identical(
        self, start: int, end: int, what: str, changed: set[str], tensor: TensorInfo | None = None
    ) -> Iterator[PairedRange]:
        dtype = None if tensor is None else FLOATS.get(tensor.dtype)

        def see(old: Tensor, new: Tensor) -> None:
            if not same_content(old, new):
                changed.add(what)
            if tensor is not None and dtype is not None and not is_finite(old, dtype):
                self.not_finite[tensor.name] = None

        size = max(8, min(COPY_BYTES, self.slab_bytes) // 8 * 8)  # whole elements
        for place in range(start, end, size):
            yield PairedRange(start=place, size=min(size, end - place), see=see)

    def _rows(self, prover: Prover) -> Iterator[PairedRange]:
        tensor, width, stored = prover.writer.tensor, prover.writer.row_elements, prover.codec.stored

        def see(first: int, old: Tensor, new: Tensor) -> None:
            prover.hash(old, new)
            prover.rows(as_rows(old, stored, width), as_rows(new, stored, width), first)

        row_bytes = width * stored.itemsize
        size = max(1, min(COPY_BYTES, self.slab_bytes) // row_bytes) * row_bytes
        for start in range(tensor.start, tensor.end, size):
            first = (start - tensor.start) // row_bytes
            yield PairedRange(start=start, size=min(size, tensor.end - start), see=partial(see, first))

    def _columns(self, prover: Prover) -> Iterator[PairedRange]:
        """Each matrix in one byte range where it fits into a buffer, else read twice."""
        writer, stored = prover.writer, prover.codec.stored
        tensor, width, d = writer.tensor, writer.row_elements, writer.tensor.shape[writer.axis]
        matrix_bytes = d * width * stored.itemsize

        def whole(first: int, old: Tensor, new: Tensor) -> None:
            prover.hash(old, new)
            prover.columns(as_rows(old, stored, width), as_rows(new, stored, width), first)

        for place, start in enumerate(range(tensor.start, tensor.end, matrix_bytes)):
            if matrix_bytes <= self.slab_bytes:
                yield PairedRange(start=start, size=matrix_bytes, see=partial(whole, place * d))
            else:
                yield from self._two_passes(start, d, prover, ColumnProver(prover, place * d))

    def _two_passes(self, start: int, d: int, prover: Prover, columns: ColumnProver) -> Iterator[PairedRange]:
        width, stored = prover.writer.row_elements, prover.codec.stored
        row_bytes = width * stored.itemsize

        def gather(row: int, old: Tensor, new: Tensor) -> None:
            prover.hash(old, new)
            columns.gather(as_rows(old, stored, width), row)

        def compare(row: int, old: Tensor, new: Tensor) -> None:
            columns.compare(as_rows(old, stored, width), as_rows(new, stored, width), row)
            if row + old.numel() // row_bytes == d:
                columns.finish()

        rows = max(1, min(COPY_BYTES, self.slab_bytes) // row_bytes)
        for step in (gather, compare):
            for row in range(0, d, rows):
                yield PairedRange(
                    start=start + row * row_bytes,
                    size=min(rows, d - row) * row_bytes,
                    see=partial(step, row),
                    hashed=step is gather,
                )


def judge(proof: TensorProof) -> list[str]:
    """What is wrong with one edited tensor, as sentences."""
    if proof.ok:
        return []
    if not proof.worst_left <= 1.0:
        what = "still writes the direction" if proof.removes else "holds another share of the direction than planned"
        return [f"'{proof.name}' {what}: {proof.left:.1e} of its norm, {_times(proof.worst_left)}"]
    return [f"'{proof.name}' differs from the equation, {_times(proof.worst_error)}"]


def _times(ratio: float) -> str:
    return f"{ratio:,.1f} times what rounding explains"


def compare_headers(old: Shard, new: Shard, plan: EditPlan) -> list[str]:
    """What differs between two headers beyond an added head, as sentences."""

    def layout(shard: Shard) -> list[tuple[object, ...]]:
        return [
            (t.name, t.dtype, t.shape, t.start - shard.data_start) for t in shard.tensors if t.name != plan.added_head
        ]

    failures = []
    if layout(old) != layout(new):
        failures.append(f"{old.name}: names, order, dtypes, shapes or offsets changed")
    if old.metadata != new.metadata:
        failures.append(f"{old.name}: __metadata__ changed")
    return failures
