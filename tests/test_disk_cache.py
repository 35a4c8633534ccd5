"""Keys and values on disk are those in memory; with them all batches share their passes in little memory."""

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from abliterate.cli.failures import explain
from abliterate.errors import NotEnoughDiskError
from abliterate.model import disk_cache, forward, lockstep, replying
from abliterate.model.chat import Batch
from abliterate.model.disk_cache import MappedLayer, cache_on_disk, parked
from abliterate.model.forward import each_batch
from abliterate.model.guessing import Guesses, _rearrange
from abliterate.model.prefix import empty_cache
from abliterate.model.replying import generate_ids
from tests.offloading import block_loads, offloaded
from tests.test_drafts import stub
from tests.test_guessing import batch

NEW = 12

pytestmark = pytest.mark.skipif(not lockstep.CAN_MAP, reason="files cannot be reserved and mapped here")


def states(rows, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 2, tokens, 4, generator=generator, dtype=torch.bfloat16) for _ in range(2)]


def same(one, other):
    return torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)


@pytest.mark.parametrize("there", ["host", "card"])
def test_a_layer_on_disk_holds_what_one_in_memory_holds(tmp_path, there, monkeypatch):
    """A stand-in for a card gets copies, through which nothing can be written."""
    if there == "card":
        monkeypatch.setattr(MappedLayer, "_there", lambda its, name: its._files[name].held.clone())
    plain, left = DynamicLayer(), []
    ours = MappedLayer(tmp_path, 12, lambda: left.append(1))
    assert ours.get_seq_length() == 0
    for layer in (plain, ours):
        layer.update(*states(4, 5, 0))
        found = layer.update(*states(4, 3, 1))
    assert all(torch.equal(one, other) for one, other in zip(found, (plain.keys, plain.values), strict=True))
    assert same(plain, ours)
    ours.leave_memory()
    assert same(plain, ours)
    for layer in (plain, ours):
        layer.batch_select_indices(torch.tensor([3, 1]))
    assert same(plain, ours)
    order = torch.tensor([[0, 1, 4, 5, 6], [2, 3, 4, 6, 7]])
    for layer in (plain, ours):
        _rearrange(layer, order)
        layer.crop(-1)
        layer.update(*states(2, 7, 2))
    assert same(plain, ours)
    assert ours.get_seq_length() == 11
    assert len(left) == 3  # the layer before leaves memory whenever this one is used
    assert list(tmp_path.iterdir()) == []  # the files have no names: nothing stays behind


def test_more_tokens_than_thought_take_a_larger_file(tmp_path):
    plain, ours = DynamicLayer(), MappedLayer(tmp_path, 3, lambda: None)
    for layer in (plain, ours):
        layer.update(*states(2, 3, 0))
        layer.update(*states(2, 5, 1))
    assert same(plain, ours)


def test_values_wait_on_disk_and_leave_nothing(tmp_path):
    values = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    kept = parked(values, tmp_path)
    assert kept.data_ptr() != values.data_ptr()
    assert torch.equal(kept, values)
    assert parked(values[:0], tmp_path).shape == (0, 5, 7)
    assert list(tmp_path.iterdir()) == []


def replies(ours, batches):
    def work(one, _):
        return generate_ids(ours, stub(), one, NEW)

    before = max(block_loads(ours))
    found = [tokens.tolist() for _, tokens in each_batch(ours, batches, work, new_tokens=NEW, guessed=lambda _: True)]
    return found, max(block_loads(ours)) - before


@pytest.mark.parametrize(("room", "logits"), [("ample", 0), ("none", 0), ("on disk", 0), ("on disk", 1 << 40)])
def test_batches_without_room_wait_on_disk(room, logits, saved, tmp_path, monkeypatch):
    """Without a folder they take turns, with passes for each; but not because the logits of a single one are large."""
    monkeypatch.setattr(replying, "guess_bytes", lambda *_: logits)
    monkeypatch.setattr(forward, "guess_bytes", lambda *_: logits)
    monkeypatch.setattr(forward, "running_bytes", lambda _: 0)
    monkeypatch.setattr(forward, "waiting_bytes", lambda *_, **__: 1)
    ours, said = offloaded(saved("llama")), []
    ours.offload.on_event = said.append
    ours.model.generation_config.eos_token_id = 10**6
    whole = batch()
    batches = [
        Batch(rows=(row,), input_ids=whole.input_ids[row : row + 1], attention_mask=whole.attention_mask[row : row + 1])
        for row in range(5)
    ]
    one = (whole.input_ids.shape[1] + NEW + forward.MOST_GUESSES) * forward.cache_bytes(ours)
    ours.offload.working_bytes = 10**9 if room == "ample" else 10 * one if logits else 2 * one
    ours.offload.scratch = tmp_path if room == "on disk" else None
    mapped = []
    plain = disk_cache.Mapped.__init__
    monkeypatch.setattr(disk_cache.Mapped, "__init__", lambda its, *args: (mapped.append(1), plain(its, *args))[0])
    found, passes = replies(ours, batches)
    assert found == [generate_ids(offloaded_alone(ours), stub(), its, NEW).tolist() for its in batches]
    told = [event.text for event in said if "wait on disk" in getattr(event, "text", "")]
    if room == "none":
        assert passes > NEW
        assert not mapped
    else:
        assert passes <= NEW
        assert bool(mapped) == bool(told) == (room == "on disk")


def offloaded_alone(ours):
    ours.offload.caches_on_disk = False
    return ours


def test_a_disk_without_room_is_said(saved, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_cache.os, "posix_fallocate", full)
    cache = cache_on_disk(empty_cache(offloaded(saved("llama"))), tmp_path, 20)
    with pytest.raises(OSError, match="No space") as caught:
        cache.layers[0].update(*states(1, 2, 0))
    assert isinstance(explain(caught.value), NotEnoughDiskError)


def test_caches_stay_in_memory_where_the_disk_is_small(saved, tmp_path, monkeypatch):
    ours = offloaded(saved("llama"))
    ours.offload.scratch, ours.offload.working_bytes = tmp_path, 10
    monkeypatch.setattr(lockstep.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 150}))
    assert not lockstep.wait_on_disk(ours.offload, 100, 80)
    assert lockstep.wait_on_disk(ours.offload, 100, 70)
    with pytest.raises(NotEnoughDiskError, match=r"take 0\.0 GB more there"):
        lockstep.wait_on_disk(ours.offload, 100, 90)


def test_prompts_take_turns_and_what_follows_does_not(saved, monkeypatch):
    """States of prompts are wide: batches begin one after the other, and then share all passes."""
    ours, wide = offloaded(saved("llama")), 10**6
    ours.model.generation_config.eos_token_id = 10**6
    monkeypatch.setattr(forward, "guess_bytes", lambda *_: 0)
    monkeypatch.setattr(forward, "running_bytes", lambda _: 0)
    monkeypatch.setattr(forward, "waiting_bytes", lambda *_, **__: 0)
    monkeypatch.setattr(replying, "waiting_bytes", lambda *_, **__: wide)
    ours.offload.working_bytes = lockstep.PROMPTS_SHARE * (2 * wide + wide // 2)
    whole = batch()
    batches = [
        Batch(rows=(row,), input_ids=whole.input_ids[row : row + 1], attention_mask=whole.attention_mask[row : row + 1])
        for row in range(5)
    ]
    monkeypatch.setattr(Guesses, "after", lambda *_: [])
    at_once, plain = [], replying.run_batch
    monkeypatch.setattr(
        replying, "run_batch",
        lambda *args, **how: at_once.append(len(ours.offload.with_prompts)) or plain(*args, **how),
    )  # fmt: skip
    found, passes = replies(ours, batches)
    assert max(at_once) == 2
    assert passes == NEW + 2
    assert ours.offload.with_prompts == []
    assert found == [generate_ids(ours, stub(), its, NEW).tolist() for its in batches]
