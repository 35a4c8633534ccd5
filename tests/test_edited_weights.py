"""The edit made of the weights at hand is, bit for bit, the checkpoint that the edit writes."""

from functools import partial

import pytest
import torch

from abliterate.editing.blocks import TensorEdit
from abliterate.editing.planning import plan
from abliterate.model import edited_weights
from abliterate.model.edited_weights import EditedWeights
from abliterate.model.lockstep import run_together
from tests import factories
from tests.checkpoints import without
from tests.equivalence import edit
from tests.offloading import batches, block_loads, logits, offloaded

CASES = (
    "llama",
    "llama-biases",
    "qwen2-tied",
    "gemma2",
    "gpt2",
    "opt",
    "cohere2",
    "olmo2",
    "stablelm-parallel",
    "gpt-oss",
)
"""Biases, tied embeddings and scaled ones, stream vectors in rows, norms behind writers, learned positions."""


def base_and_plan(name, folder, dtype=torch.bfloat16, **options):
    base = factories.save(factories.build(name), folder / "base", dtype=dtype)
    return base, without(plan(base, **options), factories.random_directions(48, 2))


def side_by_side(loaded, made):
    """Logits of the base and of its edit, in the same weight passes."""

    def as_edited(batch):
        with made.applied():
            return logits(loaded.model, *batch)

    thunks = [partial(logits, loaded.model, *batch) for batch in batches()]
    found = run_together(loaded, [*thunks, *(partial(as_edited, batch) for batch in batches())])
    return found[: len(thunks)], found[len(thunks) :]


def alone(folder):
    loaded = offloaded(folder)
    return run_together(loaded, [partial(logits, loaded.model, *batch) for batch in batches()])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_it_is_the_written_checkpoint_and_the_base_is_as_it_was(name, stored, tmp_path):
    base, made = base_and_plan(name, tmp_path, stored)
    loaded = offloaded(base, memory_bytes=2**28 if name in ("gpt2", "opt") else None)  # two embeddings
    before = loaded.offload.working_bytes
    weights = EditedWeights.of(loaded, made, "direction")
    assert weights is not None
    with weights.ready():
        assert loaded.offload.working_bytes == before - weights.size_bytes
        plain, edited = side_by_side(loaded, weights)
        assert set(block_loads(loaded)) == {1}
    assert loaded.offload.working_bytes == before
    written = alone(edit(made, None, tmp_path / "edited"))
    for ours, theirs, as_it_was, of_base in zip(edited, written, plain, alone(base), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(as_it_was, of_base)
        assert not torch.equal(ours, as_it_was)
    again = run_together(loaded, [partial(logits, loaded.model, *batch) for batch in batches()])
    assert all(torch.equal(one, two) for one, two in zip(again, plain, strict=True))


def test_blocks_that_stay_loaded_are_edited_too(tmp_path):
    base, made = base_and_plan("llama", tmp_path)
    loaded = offloaded(base, memory_bytes=2**28)
    weights = EditedWeights.of(loaded, made, "direction")
    assert any(loaded.offload.stays(unit) for unit in loaded.offload.units if unit.is_block)
    written = alone(edit(made, None, tmp_path / "edited"))
    with weights.ready():
        for _ in range(2):
            _, edited = side_by_side(loaded, weights)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(edited, written, strict=True))


def test_a_broken_edit_is_another_model(tmp_path, monkeypatch):
    base, made = base_and_plan("llama", tmp_path)
    written = alone(edit(made, None, tmp_path / "edited"))
    monkeypatch.setattr(TensorEdit, "edit_columns", lambda *_: None)
    loaded = offloaded(base)
    weights = EditedWeights.of(loaded, made, "direction")
    with weights.ready():
        _, edited = side_by_side(loaded, weights)
    assert not any(torch.equal(ours, theirs) for ours, theirs in zip(edited, written, strict=True))


def test_each_block_is_edited_once_in_a_weight_pass(tmp_path, monkeypatch):
    base, made = base_and_plan("llama", tmp_path)
    loaded, asked = offloaded(base), []
    whole = edited_weights.edit_whole
    monkeypatch.setattr(edited_weights, "edit_whole", lambda *its: (asked.append(its[1].name), whole(*its)))
    weights = EditedWeights.of(loaded, made, "direction")
    with weights.ready():
        side_by_side(loaded, weights)
    assert sorted(asked) == sorted(w.name for w in made.writers if w.layer is not None)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_converted_experts_are_left_to_hooks(name, tmp_path):
    base, made = base_and_plan(name, tmp_path)
    assert EditedWeights.of(offloaded(base), made, "direction") is None


def test_little_memory_leaves_it_to_hooks(tmp_path):
    base, made = base_and_plan("llama", tmp_path)
    loaded = offloaded(base)
    loaded.offload.working_bytes = 2**20
    assert EditedWeights.of(loaded, made, "direction") is None
