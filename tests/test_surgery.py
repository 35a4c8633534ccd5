"""Streaming in blocks is the same edit as the whole matrix at once."""

import dataclasses
import shutil

import pytest
import torch

from abliterate.arch.codecs import Plain
from abliterate.arch.formats import DTYPES
from abliterate.arch.model_map import Writer
from abliterate.checkpoint.budget import RESERVED_BYTES
from abliterate.checkpoint.output import prepare
from abliterate.editing.planning import plan
from abliterate.editing.writing import edit_checkpoint
from abliterate.errors import CheckpointError, PlanRefusedError
from abliterate.method import edits
from abliterate.method.edits import behind_norm, orthogonal
from abliterate.method.linalg import orthonormal_basis
from abliterate.method.rounding import round_keeping
from tests import checkpoints
from tests.checkpoints import without

D = 256
CASES = {
    "vector": ((D,), 0),
    "rows": ((90, D), 1),
    "columns": ((D, 90), 0),
    "square, rows": ((D, D), 1),
    "square, columns": ((D, D), 0),
    "stacked rows": ((3, 30, D), 2),
    "stacked columns": ((3, D, 30), 1),
    "wide": ((D, 1100), 0),  # more than one block of arithmetic
}
MEMORY = {"smallest": 1, "some matrices in two passes": RESERVED_BYTES + 3 * 50_000, "whole": 2**30}
CLOSE = {torch.bfloat16: 5e-4, torch.float16: 2e-4, torch.float32: 1e-8, torch.float64: 1e-14}
"""Relative difference: where float sums in another order end on the other side of a rounding boundary."""
LEFT = {torch.bfloat16: 1e-5, torch.float16: 1e-5, torch.float32: 1e-9, torch.float64: 1e-15}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """One folder per dtype, holding every layout under names that no family knows."""
    folder = tmp_path_factory.mktemp("surgery")
    config = checkpoints.llama_config(hidden_size=D)
    shapes = checkpoints.llama_shapes(config) | {name: shape for name, (shape, _) in CASES.items()}
    return {
        dtype: checkpoints.write(folder / name, config, checkpoints.random_tensors(shapes, dtype), shards=2)
        for name, dtype in DTYPES.items()
    }


def plan_of_all_layouts(source):
    made = plan(source, allow_partial=True)
    writers = [
        Writer(tensor=made.checkpoint.tensors[name], axis=axis, role="embedding", layer=None, norms=(), gain="w")
        for name, (_, axis) in CASES.items()
    ]
    return dataclasses.replace(made, writers=tuple(writers))


def as_columns(tensor, axis):
    """The tensor as matrices ``(d, n)``."""
    if tensor.ndim == 1:
        return [tensor[:, None]]
    stacked = tensor.reshape(-1, *tensor.shape[-2:])
    return [matrix.T if axis == tensor.ndim - 1 else matrix for matrix in stacked]


def relative(a, b):
    return float(torch.linalg.vector_norm(a.double() - b.double()) / torch.linalg.vector_norm(b.double()))


@pytest.mark.parametrize("memory", MEMORY.values(), ids=MEMORY)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_blocks_equal_the_whole_matrix(sources, dtype, k, memory, tmp_path):
    edited = checkpoints.edit(plan_of_all_layouts(sources[dtype]), tmp_path / "out", k=k, memory_bytes=memory)
    basis = orthonormal_basis(checkpoints.directions(D, k))
    for name, (_, axis) in CASES.items():
        before, after = (as_columns(checkpoints.read(folder, name), axis) for folder in (sources[dtype], edited))
        for w, ours in zip(before, after, strict=True):
            exact = edits.apply(w.to(Plain(dtype, 0).compute), orthogonal(basis))
            whole = round_keeping(exact, dtype, orthogonal(basis))
            assert relative(ours, whole) < CLOSE[dtype], name
            assert torch.linalg.vector_norm(basis.T @ ours.double()) < LEFT[dtype] * w.double().norm(), name


@pytest.mark.parametrize("memory", MEMORY.values(), ids=MEMORY)
def test_behind_a_gain_blocks_equal_the_whole_matrix(sources, memory, tmp_path):
    """The gain is ``1 + w``, read from the checkpoint itself."""
    made = plan_of_all_layouts(sources[torch.float64])
    norm = made.checkpoint.tensors["vector"]
    writers = [dataclasses.replace(writer, norms=(norm,), gain="1+w") for writer in made.writers[1:]]
    edited = checkpoints.edit(dataclasses.replace(made, writers=tuple(writers)), tmp_path / "out", memory_bytes=memory)
    basis = orthonormal_basis(checkpoints.directions(D))
    gain = 1 + checkpoints.read(sources[torch.float64], "vector")
    projector = behind_norm(orthogonal(basis), gain)
    for writer in writers:
        name = writer.tensor.name
        before, after = (checkpoints.read(folder, name) for folder in (sources[torch.float64], edited))
        for w, ours in zip(as_columns(before, writer.axis), as_columns(after, writer.axis), strict=True):
            assert relative(ours, edits.apply(w, projector)) < 1e-12, name
            assert (basis.T @ (gain[:, None] * ours)).abs().max() < 1e-10, name


@pytest.mark.parametrize("direct", [True, False])
def test_the_way_of_reading_does_not_change_a_byte(sources, direct, tmp_path):
    made = plan_of_all_layouts(sources[torch.bfloat16])
    for name, options in {"one": {"direct": direct}, "two": {"direct": not direct}}.items():
        checkpoints.edit(made, tmp_path / name, memory_bytes=1, **options)
    assert checkpoints.tree(tmp_path / "one") == checkpoints.tree(tmp_path / "two")


def test_the_edit_is_deterministic(sources, tmp_path):
    made = plan_of_all_layouts(sources[torch.float16])
    trees = [checkpoints.tree(checkpoints.edit(made, tmp_path / name)) for name in ("one", "two")]
    assert trees[0] == trees[1]


def test_progress_adds_up_to_the_output(sources, tmp_path):
    made = plan(sources[torch.bfloat16], allow_partial=True)
    events = []
    checkpoints.edit(made, tmp_path / "out", on_event=events.append)
    assert events[0].total == made.output_bytes
    moved = sum(getattr(event, "amount", 0) for event in events)
    headers = sum(shard.data_start for shard in made.checkpoint.shards)
    assert made.output_bytes - headers <= moved <= made.output_bytes


def test_a_direction_of_another_width_is_refused(sources, tmp_path):
    made = plan(sources[torch.bfloat16], allow_partial=True)
    output = prepare(tmp_path / "out", source=made.checkpoint.folder, fingerprint="", needed_bytes=0)
    with pytest.raises(CheckpointError, match=f"100 components.*{D}"):
        edit_checkpoint(without(made, checkpoints.directions(100)), output)


def test_a_writer_behind_a_gain_of_zero_is_refused_by_name(sources, tmp_path):
    """``1 + w = 0`` in every channel, as in a pruned layer."""
    source = shutil.copytree(sources[torch.float32], tmp_path / "base")
    checkpoints.overwrite(source, "vector", -torch.ones(D))
    made = plan_of_all_layouts(source)
    norm = made.checkpoint.tensors["vector"]
    writers = [dataclasses.replace(made.writers[2], norms=(norm,), gain="1+w")]
    with pytest.raises(PlanRefusedError, match="cannot be edited"):
        checkpoints.edit(dataclasses.replace(made, writers=tuple(writers)), tmp_path / "out")
