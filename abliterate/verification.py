"""Proof on the written bytes, from the equation and not from the code that made the edit.

For every edited tensor, in float64 and block by block:

- *removal*: no column keeps more of ``read`` than rounding to nearest would leave, ``|u^T w'| <= eps |w'|``
  (``eps``: unit roundoff of the stored dtype; ``u``: unit ``read``);
- *nothing else*: the written columns are the equation's, ``|w' - (w - a (u^T w) / (u^T a))| <= eps |w|`` per column.

Every other byte of every shard is compared with the base's, and every other file as well.  Hashes of what was compared
go into the report.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.arch.model_map import Writer
from abliterate.blocks import DTYPES
from abliterate.checkpoint.directio import view_of
from abliterate.checkpoint.header import Shard, TensorInfo, read_shard
from abliterate.checkpoint.source import INDEX_NAME, open_folder
from abliterate.edits import oblique
from abliterate.errors import CheckpointError
from abliterate.events import Advanced, Finished, OnEvent, Started, ignore
from abliterate.planning import EditPlan
from abliterate.surgery import read_gain, untied_config

UNIT_ROUNDOFF = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24, "F64": 2.0**-53}
"""Largest relative error of rounding to nearest."""

SMALLEST_STEP = {"BF16": 2.0**-133, "F16": 2.0**-24, "F32": 2.0**-149, "F64": 2.0**-1074}
"""Spacing of the subnormal numbers: below it, rounding has an absolute error."""

ARITHMETIC_ROUNDOFF = {"BF16": 2.0**-20, "F16": 2.0**-20, "F32": 2.0**-46, "F64": 2.0**-46}
"""Allowance for the arithmetic before rounding, relative to the column: float32 for halves, float64 for the rest."""

BLOCK_BYTES = 32 * 2**20
TASK = "verify"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Equation:
    """What every writer must satisfy: ``W' = W - a (u^T a)^-1 u^T W``, with ``u = r`` for a plain writer.

    Behind a norm with gain ``g``, ``u = g * r``.  There the choice of ``a`` is free (any ``a`` removes ``r``); the
    one the edit declares is taken.
    """

    plan: EditPlan
    basis: Float[Tensor, "d k"]

    @classmethod
    def of(cls, plan: EditPlan, directions: Float[Tensor, "d k"]) -> "Equation":
        """Orthonormalise ``directions`` by singular values, a route of its own."""
        u, s, _ = torch.linalg.svd(directions.double() / directions.double().norm(dim=0), full_matrices=False)
        return cls(plan=plan, basis=u[:, s > 1e-6 * s[0]])

    def vectors(self, writer: Writer) -> tuple[Float[Tensor, "d k"], Float[Tensor, "d k"]]:
        """``(u, a)`` of one writer, in float64."""
        if writer.norm is None:
            return self.basis, self.basis
        gain = read_gain(self.plan, writer)
        return gain[:, None] * self.basis, oblique(self.basis, gain).write


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorProof:
    """One edited tensor, as measured on the written bytes.

    ``left`` is ``|u^T W'| / |W'|`` and ``before`` is ``|u^T W| / |W|`` (Frobenius); ``worst_left`` and ``worst_error``
    are the largest removal and equation residuals over its columns, as fractions of their bounds: above 1 is a failure.
    """

    name: str
    role: str
    before: float
    left: float
    worst_left: float
    worst_error: float
    sha256_before: str
    sha256_after: str

    @property
    def ok(self) -> bool:
        """Both residuals are within their bounds (NaN is not)."""
        return self.worst_left <= 1.0 and self.worst_error <= 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BytesReport:
    """Verification of a written checkpoint against its base.

    ``failures`` are sentences; the checkpoint is what was planned exactly when there are none.
    """

    edited: tuple[TensorProof, ...]
    identical_tensors: int
    identical_files: int
    failures: tuple[str, ...]
    sha256_files: Mapping[str, str]
    sha256_source_files: Mapping[str, str]

    @property
    def ok(self) -> bool:
        """Nothing failed."""
        return not self.failures

    @property
    def worst_left(self) -> float:
        """Largest share of the direction left in any writer, ``|u^T W'| / |W'|``."""
        return max((proof.left for proof in self.edited), default=0.0)


def verify_bytes(
    plan: EditPlan, directions: Float[Tensor, "d k"], written: Path, *, on_event: OnEvent = ignore
) -> BytesReport:
    """Compare the checkpoint in ``written`` with ``plan`` applied to its base.

    Raises:
        SourceError: one of the two cannot be read.
    """
    result = open_folder(written, name=str(written))
    source = plan.checkpoint
    writers = {writer.tensor.name: writer for writer in plan.writers}
    equation = Equation.of(plan, directions)
    failures: list[str] = []
    proofs: list[TensorProof] = []
    hashes: dict[str, str] = {}
    source_hashes: dict[str, str] = {}
    identical = 0
    on_event(Started(task=TASK, total=source.size_bytes, unit="bytes"))
    for shard in source.shards:
        try:
            new_shard = read_shard(written, shard.name)
        except OSError:
            failures.append(f"{shard.name} is missing")
            continue
        failures += _compare_headers(shard, new_shard, plan)
        ours = {tensor.name: tensor for tensor in new_shard.tensors}
        with (
            (source.folder / shard.name).open("rb", buffering=0) as old,
            (written / shard.name).open("rb", buffering=0) as new,
        ):
            for tensor in shard.tensors:
                if tensor.name not in ours:
                    failures.append(f"tensor '{tensor.name}' is missing")
                    continue
                if tensor.name in writers:
                    proof = _prove(old, new, tensor, ours[tensor.name], writers[tensor.name], equation)
                    proofs.append(proof)
                    failures += _judge(proof)
                elif _same(old, new, tensor, ours[tensor.name]):
                    identical += 1
                else:
                    failures.append(f"tensor '{tensor.name}' changed, but is not in the plan")
                on_event(Advanced(task=TASK, amount=tensor.size_bytes))
        hashes[shard.name] = sha256_file(written / shard.name)
        source_hashes[shard.name] = sha256_file(source.folder / shard.name)
    failures += _compare_head(plan, written, result.tensors)
    same_files, other_failures = _compare_files(plan, written)
    missing = set(writers) - {proof.name for proof in proofs}
    failures += other_failures + [f"writer '{name}' was not checked" for name in sorted(missing)]
    on_event(Finished(task=TASK))
    return BytesReport(
        edited=tuple(proofs),
        identical_tensors=identical,
        identical_files=same_files,
        failures=tuple(failures),
        sha256_files=hashes,
        sha256_source_files=source_hashes,
    )


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _judge(proof: TensorProof) -> list[str]:
    if proof.ok:
        return []
    if not proof.worst_left <= 1.0:
        return [f"'{proof.name}' still writes the direction: {proof.left:.1e} of its norm, {_times(proof.worst_left)}"]
    return [f"'{proof.name}' differs from the equation, {_times(proof.worst_error)}"]


def _times(ratio: float) -> str:
    return f"{ratio:,.1f} times what rounding explains"


def _compare_headers(old: Shard, new: Shard, plan: EditPlan) -> list[str]:
    def layout(shard: Shard) -> list[tuple]:
        return [
            (t.name, t.dtype, t.shape, t.start - shard.data_start) for t in shard.tensors if t.name != plan.added_head
        ]

    failures = []
    if layout(old) != layout(new):
        failures.append(f"{old.name}: names, order, dtypes, shapes or offsets changed")
    if old.metadata != new.metadata:
        failures.append(f"{old.name}: __metadata__ changed")
    return failures


def _compare_head(plan: EditPlan, written: Path, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """The added head must be the base's embedding, byte for byte."""
    if plan.added_head is None:
        return []
    if plan.added_head not in tensors:
        return [f"the untied head '{plan.added_head}' is missing"]
    embedding, head = plan.model_map.embedding.tensor, tensors[plan.added_head]
    with (
        (plan.checkpoint.folder / embedding.shard).open("rb", buffering=0) as old,
        (written / head.shard).open("rb", buffering=0) as new,
    ):
        return [] if _same(old, new, embedding, head) else [f"'{plan.added_head}' is not the unedited embedding"]


def _compare_files(plan: EditPlan, written: Path) -> tuple[int, list[str]]:
    source = plan.checkpoint
    same, failures = 0, []
    expected = [name for name in source.other_files if name not in ("README.md", "abliterate.json")]
    if source.index is not None and plan.added_head is None:
        expected.append(INDEX_NAME)
    for name in expected:
        path = written / name
        if not path.is_file():
            failures.append(f"file {name} is missing")
        elif name == "config.json" and plan.sets_untied:
            from abliterate.checkpoint.source import read_json

            if read_json(path) != untied_config(source.config):
                failures.append("config.json differs in more than tie_word_embeddings")
        elif path.read_bytes() != (source.folder / name).read_bytes():
            failures.append(f"file {name} changed")
        else:
            same += 1
    return same, failures


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


def _chunks(tensor: TensorInfo, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, tensor.size_bytes, size):
        yield start, min(size, tensor.size_bytes - start)


def _same(old: BinaryIO, new: BinaryIO, tensor: TensorInfo, ours: TensorInfo) -> bool:
    if tensor.size_bytes != ours.size_bytes:
        return False
    for start, count in _chunks(tensor, BLOCK_BYTES):
        a, b = (torch.empty(count, dtype=torch.uint8) for _ in range(2))
        read_exactly(old, tensor.start + start, a, where=tensor.name)
        read_exactly(new, ours.start + start, b, where=tensor.name)
        if not torch.equal(a, b):
            return False
    return True


def _prove(
    old: BinaryIO, new: BinaryIO, tensor: TensorInfo, ours: TensorInfo, writer: Writer, equation: Equation
) -> TensorProof:
    """Measure one edited tensor: blocks of whole stream vectors, laid out as columns ``(d, n)``."""
    read, write = equation.vectors(writer)
    hash_old, hash_new = hashlib.sha256(), hashlib.sha256()
    removed = total = left = total_new = 0.0
    worst_left = worst_error = 0.0
    unit_read = read / torch.linalg.vector_norm(read, dim=0)
    eps, step = UNIT_ROUNDOFF[tensor.dtype], SMALLEST_STEP[tensor.dtype]
    slack = step * unit_read.shape[0] ** 0.5
    for before, after in zip(
        _columns(old, tensor, writer, hash_old), _columns(new, ours, writer, hash_new), strict=True
    ):
        size = torch.linalg.vector_norm(before, dim=0)
        size_new = torch.linalg.vector_norm(after, dim=0)
        c, c_new = unit_read.T @ before, unit_read.T @ after
        expected = before - write @ torch.linalg.solve(read.T @ write, read.T @ before)
        error = torch.linalg.vector_norm(after - expected, dim=0)
        size_expected = torch.linalg.vector_norm(expected, dim=0)
        allowed = ARITHMETIC_ROUNDOFF[tensor.dtype] * (size + size_expected)
        worst_left = _worst(worst_left, c_new.abs().amax(0), eps * size_new + allowed + slack)
        worst_error = _worst(worst_error, error, eps * size_expected + allowed + slack)
        removed, total = removed + float(c.square().sum()), total + float(size.square().sum())
        left, total_new = left + float(c_new.square().sum()), total_new + float(size_new.square().sum())
    return TensorProof(
        name=tensor.name,
        role=writer.role,
        before=(removed / total) ** 0.5 if total else 0.0,
        left=(left / total_new) ** 0.5 if total_new else 0.0,
        worst_left=worst_left,
        worst_error=worst_error,
        sha256_before=hash_old.hexdigest(),
        sha256_after=hash_new.hexdigest(),
    )


def _worst(so_far: float, values: Tensor, bounds: Tensor) -> float:
    ratio = float((values / bounds.clamp_min(1e-300)).amax()) if values.numel() else 0.0
    return max(so_far, ratio) if ratio == ratio else float("inf")  # NaN is the worst of all


def _columns(
    file: BinaryIO, tensor: TensorInfo, writer: Writer, digest: "hashlib._Hash"
) -> Iterator[Float[Tensor, "d n"]]:
    """The tensor as blocks of columns of the stream, in float64; the digest sees all bytes in file order."""
    dtype = DTYPES[tensor.dtype]
    if writer.axis == len(tensor.shape) - 1:
        row_bytes = tensor.shape[-1] * dtype.itemsize
        for start, count in _chunks(tensor, max(1, BLOCK_BYTES // row_bytes) * row_bytes):
            raw = torch.empty(count, dtype=torch.uint8)
            read_exactly(file, tensor.start + start, raw, where=tensor.name)
            digest.update(view_of(raw))
            yield raw.view(dtype).reshape(-1, tensor.shape[-1]).double().T
        return
    d, n = tensor.shape[-2:]
    for start, count in _chunks(tensor, d * n * dtype.itemsize):
        raw = torch.empty(count, dtype=torch.uint8)
        read_exactly(file, tensor.start + start, raw, where=tensor.name)
        digest.update(view_of(raw))
        matrix = raw.view(dtype).reshape(d, n)
        width = max(1, BLOCK_BYTES // (8 * d))
        for column in range(0, n, width):
            yield matrix[:, column : column + width].double()
