"""What a batch holds while it waits for a block is no more than was counted, nor much less."""

import gc

import pytest
import torch

from abliterate.model import footprint
from abliterate.model.chat import Batch
from abliterate.model.footprint import waiting_bytes
from abliterate.model.forward import run_batch
from abliterate.model.interventions import ablated
from abliterate.model.lockstep import run_together
from abliterate.model.offload import Offloaded
from tests import factories
from tests.offloading import offloaded

ROWS, WIDTH = 8, 24
CASES = ("llama", "gpt2", "opt", "gemma2", "gpt-oss", "gemma3n", "gemma4-text", "qwen3-vl", "falcon-h1", "deepseek-v3")
"""Learned positions, two masks, masks as numbers, several streams, inputs for each block, three tables of positions."""
LEAST = 0.5


def held_bytes(loaded, count, monkeypatch, run):
    """Bytes of all tensors where ``count`` batches wait for the second block."""
    found, plain = [], Offloaded.load

    def load(weights, unit, fetched=None):
        plain(weights, unit, fetched)
        if unit.module is loaded.blocks[1]:
            gc.collect()
            tensors = [its for its in gc.get_objects() if type(its) in (torch.Tensor, torch.nn.Parameter)]
            storages = [its.untyped_storage() for its in tensors if its.device.type == "cpu"]
            found.append(sum({its.data_ptr(): its.nbytes() for its in storages}.values()))

    ids = factories.token_ids(batch=ROWS, length=WIDTH)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    batch = Batch(rows=tuple(range(ROWS)), input_ids=ids, attention_mask=mask)
    with monkeypatch.context() as patching:
        patching.setattr(Offloaded, "load", load)
        run_together(loaded, [lambda: run(loaded, batch)] * count)
    return found[0]


def under_ablation(loaded, batch):
    with ablated(loaded, factories.random_directions(48)):
        return run_batch(loaded, batch)


def share(name, folder, monkeypatch, run=run_batch, **options):
    base = factories.save(factories.build(name), folder / "base", dtype=torch.float32)
    loaded = offloaded(base)
    _, one, five = (held_bytes(loaded, count, monkeypatch, run) for count in (1, 1, 5))  # the first makes what stays
    return (five - one) / 4 / ROWS / waiting_bytes(loaded, WIDTH, **options)


@pytest.mark.parametrize("name", CASES)
def test_what_waits_is_counted(name, tmp_path, monkeypatch):
    assert LEAST < share(name, tmp_path, monkeypatch) <= 1


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_what_waits_under_hooks_is_counted(name, tmp_path, monkeypatch):
    """What entered a block, and what was made of it."""
    plain = share(name, tmp_path / "plain", monkeypatch, changed=False)
    found = share(name, tmp_path, monkeypatch, under_ablation, changed=True)
    assert plain < found <= 1


def test_blocks_with_hooks_are_counted_as_changed(tmp_path):
    loaded = offloaded(factories.save(factories.build("llama"), tmp_path / "base", dtype=torch.float32))
    before = waiting_bytes(loaded, WIDTH)
    with ablated(loaded, factories.random_directions(48)):
        assert waiting_bytes(loaded, WIDTH) == before + WIDTH * 48 * 4
    assert waiting_bytes(loaded, WIDTH) == before


def test_a_state_that_is_not_counted_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(footprint, "STATES", 1)
    assert share("llama", tmp_path, monkeypatch) > 1
