"""Measuring and planning with models that do not fit, and the memory they take."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from abliterate.arch.registry import family_of
from abliterate.checkpoint.opening import open_checkpoint
from abliterate.checkpoint.source import open_folder
from abliterate.data.bundled import model_path
from abliterate.data.rehearsal import KNOWN, make
from abliterate.errors import UnsupportedFormatError, UsageError
from abliterate.method.estimators import difference_of_means
from abliterate.method.moments import ActivationStats, Moments
from abliterate.model.chat import ChatFormat
from abliterate.model.forward import last_log_probs, see_residuals
from abliterate.model.load import _placement, _rooms, load_model
from abliterate.model.lockstep import groups
from abliterate.model.measuring import Filtered, Validation, measure_class, score_candidates
from abliterate.model.memory import Sizes, can_prefetch, plan_memory, sizes_of
from abliterate.model.replying import generate
from abliterate.recipe import Recipe
from abliterate.workflow.passes import running
from bench.lockstep import SHAPES, Experts, in_a_process, make_model
from bench.sweep import largest_difference
from tests import factories
from tests.offloading import CPU, all_equal, block_loads, load, offloaded


@pytest.fixture(scope="module")
def pair():
    """The bundled model whole, and on disk."""
    checkpoint = open_checkpoint(model_path())
    notes = []
    ours = load_model(checkpoint, device="cpu", memory_bytes=2**25 + 2**22, on_event=notes.append)
    assert ours.offload is not None
    assert "each block is read once" in notes[0].text
    whole = load_model(checkpoint, device="cpu")
    assert whole.offload is None
    return whole, ours


class TestBundledModel:
    """Everything that measuring does, on a model that speaks."""

    PROMPTS = ("Where does Ann live?", "Hello", "Tell me the secret of the tower, please!", "What is a lake?", "Hi you")

    def test_log_probs(self, pair):
        results = []
        for loaded in pair:
            done = []
            chat = ChatFormat(loaded.tokenizer)
            results.append(last_log_probs(loaded, chat, self.PROMPTS, batch_size=2, advance=done.append))
            assert sum(done) == 5
        assert torch.equal(*results)
        assert not results[1].is_inference()

    def test_residuals(self, pair):
        whole, ours = {}, {}
        for loaded, seen in zip(pair, (whole, ours), strict=True):
            chat = ChatFormat(loaded.tokenizer)
            see_residuals(
                loaded, chat, self.PROMPTS, 3, lambda *its, seen=seen: seen.update({its[:2]: its[2]}), batch_size=2
            )
        assert len(whole) == 3 * pair[0].n_layers
        assert whole.keys() == ours.keys()
        assert all_equal([ours[key] for key in whole], [*whole.values()])

    def test_it_tells_how_far_the_weights_have_passed(self, pair):
        _, ours = pair
        heard = []
        ours.offload.on_event = heard.append
        see_residuals(ours, ChatFormat(ours.tokenizer), self.PROMPTS, 3, lambda *_: None, batch_size=2)
        last_log_probs(ours, ChatFormat(ours.tokenizer), self.PROMPTS, batch_size=2)
        ours.offload.on_event = lambda _: None
        first, second = ([each for each in heard if each.reading == n] for n in sorted({one.reading for one in heard}))
        assert [each.part for each in first][:2] == ["model.layers.0", "model.layers.1"]
        assert [each.part for each in first] == [each.part for each in second]
        assert [each.done for each in first] == sorted({each.done for each in first})
        assert {each.done == each.total for each in (first[-1], second[-1])} == {True}

    def test_replies(self, pair):
        whole, ours = (
            generate(m, ChatFormat(m.tokenizer), self.PROMPTS, max_new_tokens=12, batch_size=2) for m in pair
        )
        assert ours == whole
        assert len(set(ours)) > 1

    def test_all_candidates_share_a_few_passes(self, pair):
        """Their scores are the same; the layers are read for the base, for a trial, and for all of them."""
        scores = []
        for loaded in pair:
            chat = ChatFormat(loaded.tokenizer)
            harmful, harmless = self.PROMPTS[:2], self.PROMPTS[3:]
            means = [
                Moments(count=2, mean=measure_class(loaded, chat, prompts, batch_size=2, task="mean")["mean"])
                for prompts in (harmful, harmless)
            ]
            moments = dict(zip(("harmful", "harmless"), means, strict=True))
            candidates = difference_of_means(ActivationStats(positions=chat.positions, moments=moments))
            filtered = Filtered(harmful=harmful, harmless=harmless, harmful_before=2, harmless_before=2)
            before = block_loads(loaded)[0] if loaded.offload else 0
            scores.append(
                score_candidates(
                    loaded, chat, candidates, Validation(prompts=filtered, refusal_ids=[5, 6]), batch_size=2
                )
            )
        assert max(block_loads(loaded)) <= before + 3
        assert largest_difference(*scores) < 1e-5
        assert len({score.kl_nats for score in scores[0] if score.kl_nats > 0}) > 8

    def test_one_pass_where_all_batches_fit_and_more_where_not(self, pair):
        _, ours = pair
        chat = ChatFormat(ours.tokenizer)
        before = block_loads(ours)[0]
        last_log_probs(ours, chat, self.PROMPTS, batch_size=1)
        assert block_loads(ours)[0] == before + 1
        ours.offload.working_bytes = 1
        last_log_probs(ours, chat, self.PROMPTS, batch_size=1)
        assert block_loads(ours)[0] == before + 6


class TestPlanning:
    def plan(self, folder, memory, **options):
        checkpoint = open_folder(folder, name="tiny")
        family = family_of(checkpoint.config, where="tiny")
        return plan_memory(checkpoint, family, dtype=torch.float32, memory_bytes=memory, **options)

    def test_resident_where_it_fits(self, saved):
        assert self.plan(saved("llama"), None).mode == "held"
        assert self.plan(saved("llama"), 2**30).mode == "held"
        assert self.plan(saved("llama"), 2**25).mode == "lockstep"
        assert self.plan(saved("llama"), 2**20, device_bytes=2**30).mode == "held"
        assert self.plan(saved("llama"), 2**30, device_bytes=2**20).mode == "lockstep"

    @pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3-moe", "gemma3-vision", "nemotron-h"])
    def test_headers_tell_the_sizes(self, name, saved):
        plan = self.plan(saved(name), 2**25)
        whole = load(saved(name))
        bytes_of = sum(p.nbytes for p in whole.parameters())
        tied = whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
        again = whole.get_input_embeddings().weight.nbytes if tied else 0
        assert plan.held_bytes - again == pytest.approx(bytes_of, rel=0.02)
        exact = offloaded(saved(name)).offload.sizes().passing_bytes(prefetch=True)
        assert exact * 0.98 <= plan.lockstep_bytes - 2**25

    @pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3-moe", "gemma3-vision", "nemotron-h"])
    def test_the_plan_tells_the_least_memory(self, name, saved):
        """A model runs in as much as ``plan`` says, and says itself that it does not in a little less."""
        checkpoint = open_folder(saved(name), name="tiny")
        first, _ = running(checkpoint, family_of(checkpoint.config, where="tiny"), Recipe())
        offloaded(saved(name), memory_bytes=first.least_bytes)
        with pytest.raises(UsageError, match="one block of this model needs"):
            offloaded(saved(name), memory_bytes=first.least_bytes * 99 // 100)

    def test_what_may_be_used_of_each_gpu(self, monkeypatch):
        free = {0: 30 * 2**30, 1: 10 * 2**30}
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (free[number] - 2**30, 2**40))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 2**30 + 2**20)  # kept by torch, and free
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2**20)
        gpu = torch.device("cuda")
        assert _rooms("auto", gpu, None) == free
        assert _rooms("auto", gpu, 20 * 2**30) == {0: 20 * 2**30, 1: 10 * 2**30}
        assert _rooms("cuda:1", torch.device("cuda:1"), None) == {1: free[1]}
        assert _rooms("auto", CPU, 2**30) == {}

    def test_the_first_gpu_that_holds_all_or_several_or_out_of_core(self, tmp_path):
        checkpoint = open_folder(
            make(replace(KNOWN["llama-3-70b"], layers=8, shards=1), tmp_path / "base"), name="base"
        )
        family = family_of(checkpoint.config, where="base")
        plan = plan_memory(checkpoint, family, dtype=torch.bfloat16, memory_bytes=None)
        whole, block = plan.held_bytes, sizes_of(checkpoint, family, dtype=torch.bfloat16)[0].blocks[0]

        def placed(*rooms, memory=2**20):
            rooms = dict(enumerate(rooms))
            return _placement(checkpoint, family, torch.bfloat16, rooms, memory, lambda _: None)

        assert placed(whole // 4, 2 * whole).device_map == {"": 1}
        assert placed(2 * whole).room_bytes == whole
        several = placed(*[whole // 2] * 4)
        assert several.device_map == "sequential"
        assert sum(several.max_memory.values()) >= whole + 4 * block
        assert all(size + several.room_bytes <= whole // 2 for size in several.max_memory.values())
        assert placed(2 * whole // 3, whole // 3).budget_bytes == 2 * whole // 3
        assert placed(memory=whole // 2).budget_bytes == whole // 2
        assert placed(memory=3 * whole).room_bytes == 2 * whole
        assert placed(memory=None).budget_bytes is None
        assert placed(memory=None).device_map is None
        assert placed(whole, memory=None).device_map == {"": 0}  # the one that was named
        assert placed(whole, whole, memory=None).device_map == "auto"

    def test_too_little_memory_says_how_much_it_takes(self):
        sizes = Sizes(blocks=(100 * 2**20,) * 4, others=(2**20,))
        with pytest.raises(UsageError, match="needs 132 MiB"):
            can_prefetch(sizes, 120 * 2**20)
        assert not can_prefetch(sizes, 132 * 2**20)
        assert not can_prefetch(sizes, 231 * 2**20)
        assert can_prefetch(sizes, 232 * 2**20)

    @pytest.mark.parametrize("method", ["gptq", "fp8"])
    def test_what_cannot_be_decoded_is_run_whole(self, method, tmp_path):
        """The second one has no tensor in FP8."""
        folder = factories.save(factories.build("llama"), tmp_path / "base", dtype=torch.bfloat16)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
        with pytest.raises(UnsupportedFormatError, match="quantised, and such a model is only run whole"):
            load_model(open_folder(folder, name="tiny"), device="cpu", memory_bytes=2**25)

    def test_what_nobody_can_decode_is_not_loaded_without_its_scales(self, tmp_path):
        folder = factories.save(factories.build("llama"), tmp_path / "base", dtype=torch.bfloat16)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "own"}}))
        with pytest.raises(UnsupportedFormatError, match="transformers does not know weights quantised by own"):
            load_model(open_folder(folder, name="tiny"), device="cpu")

    def test_groups(self):
        assert list(groups([3, 3, 3, 9, 1], 6)) == [range(2), range(2, 3), range(3, 4), range(4, 5)]
        assert list(groups([], 6)) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("shapes", [SHAPES, Experts()], ids=["dense", "experts"])
def test_peak_memory_is_within_the_budget(shapes, tmp_path, record_property):
    """A model in a quarter of its size (the dense one has 1.2 GB): weights, hidden states and all."""
    base = make_model(shapes, tmp_path / "base")
    size = open_folder(base, name="base").size_bytes
    found = in_a_process("lockstep", base, batches=3, memory=size // 4)
    record_property("peak_bytes", found["peak"])
    assert size > 4e8
    assert size / 16 < found["peak"] <= size // 4
    assert found["read"] <= 1.05 * size
