"""Batches in lockstep: the same bits as in memory, and each layer read once for all of them."""

import os
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch

from abliterate.checkpoint.source import open_folder
from abliterate.errors import CheckpointError
from abliterate.model import stored
from abliterate.model.interventions import ablated, added, observed
from abliterate.model.load import empty_model
from abliterate.model.lockstep import run_together
from abliterate.model.memory import WORKING_BYTES, is_beyond_cache
from abliterate.model.offload import Offloaded
from abliterate.model.tasks import current
from tests import factories
from tests.offloading import CPU, all_equal, attached, batches, block_loads, load, logits, offloaded, resident, together
from tests.zoo import BUILDERS, CLASS_C

CASES = (
    "llama", "llama-tied", "qwen2", "gpt2", "opt", "phi3", "mixtral", "qwen3-moe", "gpt-oss", "granite-moe",
    "gemma2", "gemma3-text", "gemma3n", "gemma4-text", "qwen3-next", "falcon-h1", "jamba", "nemotron-h",
    "gemma3-vision", "gemma4", "qwen3-vl-moe",
)  # fmt: skip
ACCELERATE_DIFFERS = {
    "jamba": "rounding: torch.matmul",
    "gemma4": "fails: indexes the embedding's weight",
}
SOAK = bool(os.environ.get("ABLITERATE_SOAK"))
ALL = tuple(name for name in {**BUILDERS, **CLASS_C} if name not in CASES and name != "qwen") if SOAK else ("mistral",)
"""With ABLITERATE_SOAK all of them, which takes minutes.  The first Qwen has code of its own, which no auto class
loads."""


@pytest.mark.parametrize("name", CASES)
def test_same_bits_as_in_memory_and_as_accelerates_offload(name, saved, tmp_path):
    folder = saved(name)
    whole = load(folder)
    expected = [logits(whole, *batch) for batch in batches()]
    assert all(torch.isfinite(part).all() for part in expected)
    ours = together(offloaded(folder))
    assert all_equal(ours, expected)
    if name not in ACCELERATE_DIFFERS:
        plain = load(folder, device_map={"": "disk"}, offload_folder=tmp_path)
        assert all_equal(ours, [logits(plain, *batch) for batch in batches()])


@pytest.mark.parametrize("name", ALL)
def test_same_bits_for_all_families(name, saved):
    whole = load(saved(name))
    assert all_equal(together(offloaded(saved(name))), [logits(whole, *batch) for batch in batches()])


@pytest.mark.parametrize("name", CASES)
def test_each_layer_is_read_once_for_all_batches(name, saved):
    loaded = offloaded(saved(name))
    passes = []
    together(loaded, on_pass=passes.append)
    assert block_loads(loaded) == [1] * loaded.n_layers
    assert len(passes) == 1
    assert passes[0].bytes_read == loaded.offload.bytes_read <= 1.05 * loaded.offload.size_bytes
    assert loaded.offload.loaded == ()
    together(loaded, on_pass=passes.append)
    assert block_loads(loaded) == [2] * loaded.n_layers
    assert passes[1].bytes_read <= 1.05 * loaded.offload.size_bytes


def test_in_the_stored_dtype_too(saved):
    whole = load(saved("qwen3-moe"), torch.bfloat16)
    ours = together(offloaded(saved("qwen3-moe"), torch.bfloat16))
    assert all_equal(ours, [logits(whole, *batch) for batch in batches()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_same_bits_past_the_page_cache(name, dtype, saved, monkeypatch):
    """As a model is read that is larger than it; in pieces that end within a tensor."""
    expected, past = together(offloaded(saved(name), dtype)), []
    plain = stored.read_pieces
    monkeypatch.setattr(stored, "read_pieces", lambda *args, **how: past.append(how) or plain(*args, **how))
    monkeypatch.setattr(stored, "PIECE_BYTES", 1000)
    monkeypatch.setattr("abliterate.model.offload.is_beyond_cache", lambda *_: True)
    assert all_equal(together(offloaded(saved(name), dtype)), expected)
    assert past
    assert all(how == {"past_cache": True} for how in past)


def test_a_tensor_that_cannot_be_read_is_said_by_whichever_thread(saved, monkeypatch):
    def read(*_, **__):
        raise CheckpointError("model.safetensors: the file ends too early", "fetch this file again")

    monkeypatch.setattr(stored, "read_into", read)
    monkeypatch.setattr(stored, "read_pieces", read)
    with pytest.raises(CheckpointError, match="ends too early"):
        together(offloaded(saved("llama")))


def test_a_model_larger_than_the_cache_is_read_past_it(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert not is_beyond_cache(900, None)
    assert not is_beyond_cache(900, 100)
    assert is_beyond_cache(901, 100)
    assert is_beyond_cache(1001, None)


def test_weights_of_another_layer_would_be_noticed(saved, monkeypatch):
    expected = together(resident(saved("llama")))
    plain = Offloaded._read

    def swapped(self, unit):
        blocks = [one for one in self.units if one.is_block]
        if not unit.is_block:
            return plain(self, unit)
        other = blocks[(blocks.index(unit) + 1) % len(blocks)]
        return dict(zip(unit.places, plain(self, other).values(), strict=True))

    monkeypatch.setattr(Offloaded, "_read", swapped)
    ours = together(offloaded(saved("llama")))
    assert not any(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))


def test_a_unit_that_is_not_loaded_cannot_run(saved, monkeypatch):
    monkeypatch.setattr(Offloaded, "load", lambda *_: None)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        together(offloaded(saved("llama")))


def test_every_thunk_has_its_own_interventions(saved):
    whole, ours = resident(saved("gemma2")), offloaded(saved("gemma2"))
    first, second = factories.random_directions(48, seed=1).float(), factories.random_directions(48, 2, seed=2).float()
    vector = factories.random_directions(48, seed=3).float()[:, 0]
    inputs = list(batches())

    def work(loaded, place):
        with {
            0: lambda: ablated(loaded, first),
            1: lambda: ablated(loaded, second),
            2: lambda: added(loaded, vector, 1, scale=2.0),
            3: lambda: observed(loaded, lambda *_: None),
        }[place]():
            return logits(loaded.model, *inputs[place])

    expected = [work(whole, place) for place in range(4)]
    found = run_together(ours, [lambda place=place: work(ours, place) for place in range(4)])
    assert all_equal(found, expected)
    assert not torch.equal(found[0], logits(whole.model, *inputs[0]))
    with ablated(whole, first), ablated(ours, first):  # outside of all thunks: for all of them
        assert all_equal(together(ours), [logits(whole.model, *batch) for batch in inputs])


def test_what_is_observed_belongs_to_the_thunk(saved):
    whole, ours = resident(saved("qwen3-next")), offloaded(saved("qwen3-next"))

    def work(loaded, batch):
        seen = []
        with observed(loaded, lambda layer, x: seen.append((layer, x.clone())), leaving_last=True):
            logits(loaded.model, *batch)
        assert [layer for layer, _ in seen] == list(range(loaded.n_layers + 1))
        return torch.stack([x for _, x in seen])

    found = run_together(ours, [lambda b=b: work(ours, b) for b in batches()])
    assert all_equal(found, [work(whole, batch) for batch in batches()])


@pytest.mark.parametrize("name", ["llama", "gemma3n", "qwen3-next", "falcon-h1", "gemma3-vision", "mixtral"])
def test_generation_is_the_same_token_for_token(name, saved):
    """With replies of different lengths: who is done is not waited for."""
    whole, ours = load(saved(name)), offloaded(saved(name))
    inputs = list(batches())

    def reply(model, place):
        ids, mask = inputs[place]
        return model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=(2, 6, 4, 1)[place], do_sample=False, pad_token_id=0
        )

    found = run_together(ours, [lambda place=place: reply(ours.model, place) for place in range(4)])
    assert all_equal(found, [reply(whole, place) for place in range(4)])
    longest = max(tokens.shape[1] - inputs[place][0].shape[1] for place, tokens in enumerate(found))
    assert block_loads(ours) == [longest] * ours.n_layers


def test_thunks_that_are_apart_meet_again(saved):
    whole, ours = load(saved("llama")), offloaded(saved("llama"))
    inputs = list(batches())

    def passes(model, count):
        return torch.stack([logits(model, *inputs[0])[0, -1] for _ in range(count)])

    found = run_together(ours, [lambda count=count: passes(ours.model, count) for count in (1, 3, 2)])
    assert all_equal(found, [passes(whole, count) for count in (1, 3, 2)])
    assert block_loads(ours) == [3] * 3


def test_who_begins_anew_waits_for_the_next_round(saved):
    """A pass that is broken off and made again does not drag the others' layers in twice."""
    ours = offloaded(saved("llama"))
    inputs = list(batches())

    def broken_off():
        def stop(layer, _):
            if layer == 2:
                raise ArithmeticError

        with pytest.raises(ArithmeticError), observed(ours, stop):
            logits(ours.model, *inputs[0])
        return logits(ours.model, *inputs[0])

    def twice():
        return [logits(ours.model, *inputs[1]) for _ in range(2)][1]

    whole = load(saved("llama"))
    assert all_equal(run_together(ours, [broken_off, twice]), [logits(whole, *inputs[0]), logits(whole, *inputs[1])])
    assert block_loads(ours) == [2] * 3


def test_one_block_is_loaded_at_a_time(saved, monkeypatch):
    monkeypatch.setattr("abliterate.model.offload.ALWAYS_KEPT_BYTES", 0)
    ours = offloaded(saved("gemma2"))
    most = []
    with observed(ours, lambda *_: most.append(len(ours.offload.loaded))):
        together(ours)
    assert max(most) == 1


@pytest.mark.parametrize("where", ["before", "inside", "after"])
def test_an_exception_in_one_batch(where, saved):
    ours = offloaded(saved("llama"))
    inputs = list(batches())
    cleaned = []

    def hooks():
        return [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in ours.model.modules()]

    def fail(layer, _):
        if layer == 1:
            raise ArithmeticError("inside")

    def work(place):
        if place == 1 and where == "before":
            raise ArithmeticError(where)
        try:
            with observed(ours, fail if place == 1 and where == "inside" else lambda *_: None):
                found = logits(ours.model, *inputs[place])
        finally:
            cleaned.append(place)
        if place == 1:
            raise ArithmeticError(where)
        return found

    before = hooks()
    with pytest.raises(ArithmeticError, match=where):
        run_together(ours, [lambda place=place: work(place) for place in range(3)])
    assert set(cleaned) >= ({0} if where == "before" else {0, 1, 2})
    assert hooks() == before
    assert ours.offload.loaded == ()
    assert current() is None
    assert not torch.is_inference_mode_enabled()
    assert all_equal(together(ours), together(resident(saved("llama"))))


def test_a_shard_that_ends_too_early(saved, tmp_path):
    folder = factories.save(factories.build("llama"), tmp_path / "base", dtype=torch.bfloat16)
    ours = offloaded(folder)
    last = sorted(folder.glob("*.safetensors"))[-1]
    os.truncate(last, last.stat().st_size - 1000)
    with pytest.raises(CheckpointError, match="ends too early"):
        together(ours)
    assert ours.offload.loaded == ()


def test_without_lockstep_it_is_a_plain_offload(saved):
    whole, ours = load(saved("gemma4")), offloaded(saved("gemma4"))
    for count, batch in enumerate(batches(), 1):
        assert torch.equal(logits(ours.model, *batch), logits(whole, *batch))
        assert block_loads(ours) == [count] * 3
        assert ours.offload.loaded == ()


def test_one_model_inside_a_thunk_of_another(saved):
    ours, other = offloaded(saved("llama")), offloaded(saved("qwen2"))

    def work(batch):
        return logits(ours.model, *batch) + run_together(other, [lambda: logits(other.model, *batch)])[0]

    found = run_together(ours, [lambda b=b: work(b) for b in batches()])
    first, second = load(saved("llama")), load(saved("qwen2"))
    assert all_equal(found, [logits(first, *b) + logits(second, *b) for b in batches()])


def test_the_head_stays_where_there_is_room(saved, monkeypatch):
    monkeypatch.setattr("abliterate.model.offload.ALWAYS_KEPT_BYTES", 0)
    tight, roomy = offloaded(saved("llama-tied")), offloaded(saved("llama-tied"), memory_bytes=2**30)
    for loaded, times in ((tight, 2), (roomy, 1)):
        assert all_equal(together(loaded), together(loaded))
        assert loaded.offload.loads["lm_head"] == loaded.offload.loads["model.norm"] == times
        assert block_loads(loaded) == [2, times, 2]


def test_blocks_stay_as_far_as_half_of_the_memory_that_is_left(saved):
    """What is computed is the same; what stays is read once, and its bytes are within the budget."""
    folder = saved("llama")
    whole = together(resident(folder))
    bare = offloaded(folder).offload
    others = [unit for unit in bare.units if not unit.is_block and not isinstance(unit.module, torch.nn.Embedding)]
    block = next(unit.size_bytes for unit in bare.units if unit.is_block)
    taken = 2 * block + sum(unit.size_bytes for unit in others)
    for spare, stays in ((1, 0), (2, 1), (9, 1)):
        ours = offloaded(folder, memory_bytes=WORKING_BYTES + taken + spare * block)
        for _ in range(3):
            assert all_equal(together(ours), whole)
        assert [ours.offload.stays(unit) for unit in ours.offload.units if unit.is_block] == [False, bool(stays), False]
        assert block_loads(ours) == [3, 1 if stays else 3, 3]


def test_without_room_to_read_ahead(saved):
    ours = offloaded(saved("llama"))
    ours.offload.prefetch = False
    assert all_equal(together(ours), together(resident(saved("llama"))))
    assert block_loads(ours) == [1] * 3


def test_embeddings_are_read_by_row(saved):
    ours = offloaded(saved("llama"))
    weight = ours.embedding.weight
    plain = load(saved("llama")).model.embed_tokens.weight
    ids = torch.tensor([[3, 4, 90], [4, 3, 7]])
    assert torch.equal(ours.embedding(ids), plain[ids])
    (rows,) = ours.offload.rows
    assert rows.bytes_read == 4 * 48 * 2
    assert torch.equal(weight[5], plain[5])
    assert torch.equal(weight[-1, :], plain[-1])
    assert weight.shape == plain.shape
    with pytest.raises(NotImplementedError, match="row by row"):
        torch.nn.functional.linear(torch.zeros(48), weight)
    with pytest.raises(IndexError):
        ours.embedding(torch.tensor([96]))


def test_a_checkpoint_without_a_weight(saved, tmp_path):
    folder = saved("llama")
    checkpoint = open_folder(folder, name="tiny")
    shards = tuple(
        replace(shard, tensors=tuple(t for t in shard.tensors if "layers.1.mlp.up" not in t.name))
        for shard in checkpoint.shards
    )
    loaded = attached(folder, empty_model(checkpoint, torch.float32))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        Offloaded(loaded.model, replace(checkpoint, shards=shards), loaded.blocks, device=CPU)
