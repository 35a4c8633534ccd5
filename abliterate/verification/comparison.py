"""What differs between two checkpoints: which tensors, by how much, along what; everything else proven identical."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.arch.codecs import HeldScales, packed_codec, read_plain
from abliterate.arch.formats import DTYPES
from abliterate.arch.model_map import Writer, map_model
from abliterate.checkpoint.directio import read_stretch
from abliterate.checkpoint.hashes import same_bytes
from abliterate.checkpoint.header import TensorInfo
from abliterate.checkpoint.hub import fetch
from abliterate.checkpoint.source import HUBS_OWN, INDEX_NAME, Checkpoint
from abliterate.data.bundled import open_model
from abliterate.errors import PlanRefusedError
from abliterate.events import Advanced, Finished, OnEvent, Started, ignore
from abliterate.method.linalg import orthonormal_basis, unit
from abliterate.method.weight_edit import WeightEdit

POWER_ITERATIONS = 8
RANK_ONE, LEFT = 0.95, 0.05
"""From here on a change is called the removal of one direction: rounding to bfloat16 alone takes 2 % of either."""
TASK = "compare"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangedTensor:
    """One tensor that differs.

    ``change`` is ``|W' - W| / |W|`` (Frobenius).  ``rank_one`` is the share of the squared change along its leading
    direction of the residual axis (1: exactly one direction; None where the axis is unknown), and ``cosine`` the
    |cosine| of that direction with the one they share.  ``left`` is how much of what was there along
    its own direction ``v`` is there still, ``|v^T W'| / |v^T W|``: 0 where it was projected out, 1 where it was not.
    ``planned`` is the share of the squared change that lies along what the plan of the edit takes out or adds; None
    where there is no plan, or columns were scaled.  ``layer`` is the block it lies in.
    """

    name: str
    role: str
    change: float
    rank_one: float | None
    cosine: float | None
    left: float | None
    planned: float | None = None
    layer: int | None = None

    @property
    def projected(self) -> bool:
        """Whether the change is the removal of one direction, to what rounding in half precision leaves."""
        return _is_projected(self.rank_one, self.left)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleGroup:
    """The changed tensors of one role: least and largest change, least cosine with the direction they share.

    ``projected`` counts those of which one direction was removed.
    """

    role: str
    count: int
    projected: int
    least_change: float
    largest_change: float
    least_cosine: float | None
    largest_left: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Diff:
    """Two checkpoints compared byte by byte.

    ``head`` names the one tensor that an edit may add.  ``direction`` is what the changes of writers share, those of
    which one direction was removed where there are any: a unit vector of the stream; empty where there is none.
    """

    changed: tuple[ChangedTensor, ...]
    identical: int
    added: tuple[str, ...]
    removed: tuple[str, ...]
    reshaped: tuple[str, ...]
    changed_files: tuple[str, ...]
    identical_files: int
    writers: int
    head: str | None
    direction: tuple[float, ...] = ()

    @property
    def groups(self) -> tuple[RoleGroup, ...]:
        """The changed tensors by role, in order of appearance."""
        roles: dict[str, list[ChangedTensor]] = {}
        for tensor in self.changed:
            roles.setdefault(tensor.role, []).append(tensor)
        return tuple(_group(role, tensors) for role, tensors in roles.items())

    @property
    def only_writers(self) -> bool:
        """Whether exactly the writers of the residual stream changed, and nothing else but an added head."""
        roles_known = self.writers > 0 and all(tensor.role != "not a writer" for tensor in self.changed)
        same_names = set(self.added) <= {self.head} and not self.removed and not self.reshaped
        return roles_known and len(self.changed) == self.writers and same_names


def diff(
    base: str | Path,
    edited: str | Path,
    *,
    revision: str | None = None,
    planned: Mapping[str, WeightEdit] | None = None,
    on_event: OnEvent = ignore,
) -> Diff:
    """Compare two checkpoints, tensor by tensor and file by file; those on the Hub are fetched.

    ``revision`` is that of ``edited`` there; ``planned`` are the edits of its plan by tensor, where it has one.

    Raises:
        SourceError: one of them cannot be read.
    """
    old, new = fetch(open_model(base)), fetch(open_model(edited, revision=revision))
    writers, head = _writers(old)
    shared = [tensor for name, tensor in old.tensors.items() if name in new.tensors]
    on_event(Started(task=TASK, total=sum(tensor.size_bytes for tensor in shared), unit="bytes"))
    identical = 0
    reshaped, differing = [], []
    for tensor in shared:
        ours = new.tensors[tensor.name]
        if (tensor.dtype, tensor.shape) != (ours.dtype, ours.shape):
            reshaped.append(tensor.name)
        elif same_bytes(old.folder, tensor, new.folder, ours):
            identical += 1
        else:
            differing.append((tensor, ours))
        on_event(Advanced(task=TASK, amount=tensor.size_bytes))
    on_event(Finished(task=TASK))
    changed_files, identical_files = _compare_files(old, new)
    changed, direction = _describe(old, new, differing, writers, planned or {})
    return Diff(
        changed=tuple(changed),
        direction=direction,
        identical=identical,
        added=tuple(name for name in new.tensors if name not in old.tensors),
        removed=tuple(name for name in old.tensors if name not in new.tensors),
        reshaped=tuple(reshaped),
        changed_files=tuple(changed_files),
        identical_files=identical_files,
        writers=len(writers),
        head=head,
    )


def leading_direction(change: Float[Tensor, "d n"]) -> tuple[Float[Tensor, " d"], float]:
    """Leading left singular vector of ``change`` by power iteration, and its share of the squared norm."""
    total = float(change.square().sum())
    v = change[:, int(change.square().sum(0).argmax())]
    for _ in range(POWER_ITERATIONS):
        v = change @ (change.T @ unit(v).to(change.dtype))
    v = unit(v)
    return v, float((change.T @ v.to(change.dtype)).square().sum()) / total


def _writers(checkpoint: Checkpoint) -> tuple[Mapping[str, Writer], str | None]:
    """The writers by tensor name, and the name of the head; nothing where the architecture is unknown."""
    try:
        model_map = map_model(checkpoint, allow_partial=True)
    except PlanRefusedError:
        return {}, None
    return {writer.tensor.name: writer for writer in model_map.writers}, model_map.head_name


def _describe(
    old: Checkpoint,
    new: Checkpoint,
    differing: list[tuple[TensorInfo, TensorInfo]],
    writers: Mapping[str, Writer],
    planned: Mapping[str, WeightEdit],
) -> tuple[list[ChangedTensor], tuple[float, ...]]:
    found: list[tuple[TensorInfo, float, float | None, Tensor | None, float | None]] = []
    explained: dict[str, float] = {}
    for tensor, ours in differing:
        writer = writers.get(tensor.name)
        if writer is None and tensor.dtype not in DTYPES:
            found.append((tensor, float("nan"), None, None, None))
            continue
        before = _values(old, tensor, writer)
        change = _values(new, ours, writer) - before
        size = float(change.norm() / before.norm().clamp_min(1e-30))
        if writer is None or not 0 < size < math.inf:  # NaN, or -0 for 0: there is no direction in that
            found.append((tensor, size, None, None, None))
            continue
        columns = _as_columns(change, writer)
        direction, share = leading_direction(columns)
        edit = planned.get(tensor.name)
        if edit is not None and not edit.scales and not edit.keeps_rows:
            explained[tensor.name] = _share_along(columns, edit)
        along = _as_columns(before, writer).T @ direction.to(torch.float32)
        left = float((along + columns.T @ direction.to(torch.float32)).norm() / along.norm().clamp_min(1e-30))
        found.append((tensor, size, share, direction, left))
    removed = [its for *_, share, its, left in found if its is not None and _is_projected(share, left)]
    shared = _shared_direction(removed or [its for *_, its, _ in found if its is not None])
    changed = [
        ChangedTensor(
            name=tensor.name,
            layer=writers[tensor.name].layer if tensor.name in writers else None,
            role=writers[tensor.name].role if tensor.name in writers else "not a writer",
            change=size,
            rank_one=share,
            cosine=None if direction is None or shared is None else float((direction @ shared).abs()),
            left=left,
            planned=explained.get(tensor.name),
        )
        for tensor, size, share, direction, left in found
    ]
    return changed, () if shared is None else tuple(shared.tolist())


def _share_along(change: Float[Tensor, "d n"], edit: WeightEdit) -> float:
    """Share of the squared ``change`` in the span of what the edit takes out and adds."""
    parts = [edit.write] if edit.constant is None else [edit.write, edit.constant[:, None]]
    parts += [] if edit.added is None else [edit.added.b]
    basis = orthonormal_basis(torch.cat(parts, dim=1)).to(change.dtype)
    return float((basis.T @ change).square().sum() / change.square().sum())


def _as_columns(values: Tensor, writer: Writer) -> Float[Tensor, "d n"]:
    axis = min(writer.axis, values.ndim - 1)
    return values.movedim(axis, 0).reshape(values.shape[axis], -1)


def _group(role: str, tensors: list[ChangedTensor]) -> RoleGroup:
    cosines = [tensor.cosine for tensor in tensors if tensor.cosine is not None]
    left = [tensor.left for tensor in tensors if tensor.left is not None]
    changes = [tensor.change for tensor in tensors]
    return RoleGroup(
        role=role,
        count=len(tensors),
        projected=sum(tensor.projected for tensor in tensors),
        least_change=min(changes),
        largest_change=max(changes),
        least_cosine=min(cosines, default=None),
        largest_left=max(left, default=None),
    )


def _values(checkpoint: Checkpoint, tensor: TensorInfo, writer: Writer | None) -> Tensor:
    """One tensor in float32; a quantised one by the scales of the same checkpoint."""
    if writer is None or writer.packed is None:
        return read_plain(checkpoint.folder, tensor).to(torch.float32)
    packed = replace(writer.packed, values=tensor, scales=checkpoint.tensors[writer.packed.scales.name])
    codec = packed_codec(checkpoint.folder, packed, HeldScales())
    raw = read_stretch(checkpoint.folder / tensor.shard, tensor.start, tensor.size_bytes)
    rows = raw.view(codec.stored).view(-1, writer.row_elements)
    return codec.decode(rows, 0, torch.float32).view(*tensor.shape[: writer.axis + 1], -1)


def _is_projected(share: float | None, left: float | None) -> bool:
    return share is not None and left is not None and share > RANK_ONE and left < LEFT


def _shared_direction(directions: list[Tensor]) -> Tensor | None:
    if not directions or len({direction.shape for direction in directions}) > 1:
        return None
    stacked = torch.stack(directions, dim=1)
    return leading_direction(stacked)[0]


def _compare_files(old: Checkpoint, new: Checkpoint) -> tuple[list[str], int]:
    names = set(old.other_files) | {INDEX_NAME} if old.index is not None else set(old.other_files)
    changed, identical = [], 0
    for name in sorted(names):
        a, b = old.folder / name, new.folder / name
        if b.is_file() and a.read_bytes() == b.read_bytes():
            identical += 1
        else:
            changed.append(name)
    known = {*names, *HUBS_OWN}
    ours = [name for name in new.other_files if name not in known and not name.startswith("abliterate")]
    return changed + ours, identical
