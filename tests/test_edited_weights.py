"""The edit made of the weights at hand is, bit for bit, the checkpoint that the edit writes."""

from functools import partial

import pytest
import torch

from abliterate.arch.codecs import Plain
from abliterate.editing.blocks import TensorEdit, Workspace
from abliterate.editing.planning import plan
from abliterate.errors import NonFiniteError
from abliterate.method.edits import removing
from abliterate.model import edited_weights
from abliterate.model.edited_weights import EditedWeights, edit_some
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
    weights = EditedWeights.of(loaded.offload, made, "direction")
    assert isinstance(weights, EditedWeights), weights
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
    weights = EditedWeights.of(loaded.offload, made, "direction")
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
    weights = EditedWeights.of(loaded.offload, made, "direction")
    with weights.ready():
        _, edited = side_by_side(loaded, weights)
    assert not any(torch.equal(ours, theirs) for ours, theirs in zip(edited, written, strict=True))


def test_each_block_is_edited_once_in_a_weight_pass(tmp_path, monkeypatch):
    base, made = base_and_plan("llama", tmp_path)
    loaded, asked = offloaded(base), []
    whole = edited_weights.edit_whole
    monkeypatch.setattr(edited_weights, "edit_whole", lambda *its: (asked.append(its[1].name), whole(*its)))
    weights = EditedWeights.of(loaded.offload, made, "direction")
    with weights.ready():
        side_by_side(loaded, weights)
    assert sorted(asked) == sorted(w.name for w in made.writers if w.layer is not None)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_converted_experts_are_left_to_hooks(name, tmp_path):
    base, made = base_and_plan(name, tmp_path)
    assert "converted" in why_not(offloaded(base), made)


def test_little_memory_leaves_it_to_hooks(tmp_path):
    base, made = base_and_plan("llama", tmp_path)
    loaded = offloaded(base)
    loaded.offload.working_bytes = 2**20
    assert "MiB of the working memory" in why_not(loaded, made)


def test_what_is_not_the_stored_value_is_left_to_hooks(tmp_path):
    base, made = base_and_plan("llama", tmp_path, torch.float32)
    assert "narrower" in why_not(offloaded(base, torch.bfloat16), made)


def test_a_head_that_is_edited_with_the_embedding_is_left_to_hooks(tmp_path):
    base, made = base_and_plan("qwen2-tied", tmp_path, tied="shared")
    assert "head" in why_not(offloaded(base), made)


def why_not(loaded, made):
    return EditedWeights.of(loaded.offload, made, "direction")


def test_in_the_stored_dtype_too(tmp_path):
    base, made = base_and_plan("llama", tmp_path)
    loaded = offloaded(base, torch.bfloat16)
    weights = EditedWeights.of(loaded.offload, made, "direction")
    with weights.ready():
        _, edited = side_by_side(loaded, weights)
    written = offloaded(edit(made, None, tmp_path / "edited"), torch.bfloat16)
    found = run_together(written, [partial(logits, written.model, *batch) for batch in batches()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(edited, found, strict=True))


@pytest.mark.parametrize("k", [1, 2])
def test_rows_by_themselves_are_edited_as_in_the_whole_matrix(k):
    """At a width at which a row alone takes another kernel than a block, and two threads add otherwise than one."""
    width, count = 2048, 300
    stored = (torch.randn(count, width, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    of = removing(factories.random_directions(width, k)).everywhere
    made = TensorEdit.of("w", of, Plain(torch.bfloat16, width), Workspace())
    whole, threads = stored.clone(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        made.edit_rows(whole, 0)
        torch.set_num_threads(2)
        some, bare = stored.clone(), stored.clone()
        for first, end in ((0, 1), (1, 3), (3, 130), (130, 131), (131, 299), (299, 300)):
            edit_some(made, count, some[first:end], first)
            made.edit_rows(bare[first:end], first)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(some, whole)
    assert not torch.equal(bare, whole)  # else this says nothing


def test_a_writer_that_cannot_be_edited_leaves_the_base_as_it_was(tmp_path, monkeypatch):
    base, made = base_and_plan("llama-biases", tmp_path)
    loaded = offloaded(base, memory_bytes=2**28)
    weights = EditedWeights.of(loaded.offload, made, "direction")
    whole = edited_weights.edit_whole

    def fail_at_biases(rows, writer, its):
        if writer.name.endswith("bias"):
            raise NonFiniteError("as asked")
        whole(rows, writer, its)

    monkeypatch.setattr(edited_weights, "edit_whole", fail_at_biases)
    with weights.ready(), pytest.raises(NonFiniteError, match="as asked"):
        side_by_side(loaded, weights)
    again = run_together(loaded, [partial(logits, loaded.model, *batch) for batch in batches()])
    assert all(torch.equal(one, two) for one, two in zip(again, alone(base), strict=True))
