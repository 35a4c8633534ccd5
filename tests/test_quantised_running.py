"""FP8 and MXFP4 models out of core and in memory: decoded as they are read, to the bits that they stand for."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from abliterate import api
from abliterate.arch.codecs import Fp8, Mxfp4
from abliterate.arch.packed import INPUT_SCALES
from abliterate.arch.registry import family_of
from abliterate.checkpoint.source import open_folder
from abliterate.data.tiny_chat import model_path
from abliterate.model.load import empty_model, load_model
from abliterate.model.memory import plan_memory, sizes_of
from abliterate.model.stored import decoding_bytes, stored_tensors
from abliterate.model.units import hold
from abliterate.recipe import Recipe
from abliterate.workflow import pipeline
from bench.lockstep import SHAPES, Experts, in_a_process, make_model
from tests import factories
from tests.checkpoints import write
from tests.offloading import CPU, all_equal, attached, batches, block_loads, load, logits, offloaded, together
from tests.quantising import (
    GRID,
    in_fp8,
    quantised_gpt_oss,
    quantised_llama,
    quantised_tiny_chat,
    quantised_zoo,
    to_blocks,
    values,
    with_files_of,
)

WHOLE_BLOCKS = {"head_dim": 16, "vocab_size": 96}
KNOWN_TO_TRANSFORMERS = ("blocks", "mxfp4", "mixtral")
SPELLED_OUT = ("beyond", "rows", "tensor")
"""Those that transformers refuses or reads without their scales; their values are known from making them."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function: kind -> its folder and, of a Llama, the float32 values that its weights stand for."""
    done = {}

    def make(kind):
        if kind not in done:
            folder = tmp_path_factory.mktemp(kind) / "base"
            if kind == "mxfp4":
                done[kind] = quantised_gpt_oss(folder), {}
            elif kind in ("mixtral", "qwen3-moe", "deepseek-v3"):
                done[kind] = quantised_zoo(kind, folder), {}
            elif kind == "beyond":
                done[kind] = quantised_llama(folder, "blocks", vocab_size=96, intermediate_size=88)
            else:
                done[kind] = quantised_llama(folder, kind, **WHOLE_BLOCKS)
        return done[kind]

    return make


def held(folder, dtype=torch.float32):
    """The model in memory, as it is loaded on a CPU."""
    checkpoint = open_folder(folder, name="tiny")
    loaded = attached(folder, empty_model(checkpoint, dtype).eval())
    hold(loaded.model, checkpoint, loaded.blocks, device=CPU)
    return loaded.model


def spelled_out(folder, meant, out):
    """The same checkpoint with what it stands for, unquantised, in float32."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    kept = {
        name: w.float()
        for name, w in values(folder).items()
        if not name.endswith(("_scale", "_scale_inv", *INPUT_SCALES))
    }
    return write(out, {**config, "dtype": "float32"}, kept | meant, files={})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [*KNOWN_TO_TRANSFORMERS, *SPELLED_OUT])
def test_the_logits_are_those_of_what_is_stored(kind, dtype, made, tmp_path):
    folder, meant = made(kind)
    oracle = folder if kind in KNOWN_TO_TRANSFORMERS else spelled_out(folder, meant, tmp_path / "plain")
    theirs = load(oracle, dtype)
    for parameter in theirs.parameters():
        parameter.data = parameter.data.to(dtype)  # transformers leaves as they are stored those not quantised
    expected = [logits(theirs, *batch) for batch in batches()]
    assert all(torch.isfinite(part).all() for part in expected)
    assert all_equal(together(offloaded(folder, dtype)), expected)
    assert all_equal([logits(held(folder, dtype), *batch) for batch in batches()], expected)


@pytest.mark.parametrize("kind", SPELLED_OUT)
def test_a_model_that_a_cpu_holds_has_its_scales(kind, made, tmp_path):
    """Of formats that transformers does not know, in float32 and without rounding to bfloat16 on the way."""
    folder, meant = made(kind)
    folder = with_files_of(model_path(), shutil.copytree(folder, tmp_path / "base"))
    loaded = load_model(open_folder(folder, name="tiny"), device="cpu")
    assert loaded.offload is None
    found = dict(loaded.model.named_parameters())
    assert len(meant) == 14
    for name, w in meant.items():
        assert torch.equal(found[name], w), name
    assert not torch.equal(found[name], w.to(torch.bfloat16).float())


@pytest.mark.parametrize("kind", ["qwen3-moe", "deepseek-v3", "beyond", "mxfp4"])
def test_in_bfloat16_it_is_the_dequantised_checkpoint(kind, made, tmp_path):
    """The experts of the first two end in the middle of a block; transformers would take the blocks to be smaller."""
    folder, _ = made(kind)
    plain = load(api.dequantize(folder, tmp_path / "plain"), torch.bfloat16)
    expected = [logits(plain, *batch) for batch in batches()]
    assert all_equal(together(offloaded(folder, torch.bfloat16)), expected)


@pytest.mark.parametrize("kind", [*KNOWN_TO_TRANSFORMERS, *SPELLED_OUT])
def test_the_stored_bytes_are_read_once(kind, made):
    folder, _ = made(kind)
    ours, passes = offloaded(folder), []
    together(ours, on_pass=passes.append)
    assert block_loads(ours) == [1] * ours.n_layers
    stored = sum(t.size_bytes for t in open_folder(folder, name="tiny").tensors.values() if "input_scale" not in t.name)
    assert ours.offload.size_bytes == stored
    assert passes[0].bytes_read == ours.offload.bytes_read <= 1.05 * stored
    together(ours, on_pass=passes.append)
    assert passes[1].bytes_read <= 1.05 * stored


@pytest.mark.parametrize("kind", ["blocks", "rows", "tensor", "mxfp4", "mixtral"])
def test_scales_that_are_left_out_would_be_noticed(kind, made, monkeypatch):
    folder, _ = made(kind)
    expected = together(offloaded(folder))
    if kind == "mxfp4":
        monkeypatch.setattr(Mxfp4, "_scales", lambda self, rows: torch.ones(len(rows), self.values // 32))
    else:
        monkeypatch.setattr(Fp8, "_scales", lambda _, rows: torch.ones(len(rows), 1))
    found = together(offloaded(folder))
    assert not any(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["blocks", "beyond", "rows", "tensor", "mxfp4", "mixtral"])
def test_a_scale_that_is_off_would_be_noticed(kind, made, tmp_path):
    """The last one of a matrix in the first block, doubled."""
    folder = shutil.copytree(made(kind)[0], tmp_path / "off")
    expected = together(offloaded(folder))
    packed = next(t for t in stored_tensors(open_folder(folder, name="tiny")).values() if hasattr(t, "scales"))
    path = folder / packed.scales.shard
    scales = load_file(path)[packed.scales.name].flatten()
    scales[-1] = scales[-1] + 1 if packed.kind == "mxfp4" else 2 * scales[-1]
    data = bytearray(path.read_bytes())
    data[packed.scales.start : packed.scales.end] = scales.view(torch.uint8).numpy().tobytes()
    path.write_bytes(data)
    assert not all_equal(together(offloaded(folder)), expected)


def test_experts_are_decoded_one_by_one(made):
    """No more than one of them lies in memory beside the stack."""
    ours = offloaded(made("mixtral")[0]).offload
    fused = [conversion for unit in ours.units for conversion in unit.conversions if conversion.transform is not None]
    assert fused
    for conversion in fused:
        assert len(conversion.parts) == conversion.shape[0] == 4
        assert sorted(t.name for part in conversion.parts for _, t in part) == sorted(
            t.name for _, t in conversion.sources
        )
        one = 4 * conversion.shape[1:].numel()
        assert conversion.extra_bytes == 2 * one + max(decoding_bytes(tensor) for _, tensor in conversion.sources)


def test_a_quantised_embedding_is_decoded_by_row(tmp_path):
    base, _ = quantised_llama(tmp_path / "first", "blocks", **WHOLE_BLOCKS)
    config, tensors = json.loads((base / "config.json").read_text()), values(base)
    q, scales = to_blocks(tensors["model.embed_tokens.weight"].float(), GRID)
    tensors |= {"model.embed_tokens.weight": q, "model.embed_tokens.weight_scale_inv": scales}
    folder = write(tmp_path / "base", config, tensors)
    ours = offloaded(folder)
    ids = torch.tensor([[3, 4, 90], [4, 3, 7]])
    assert torch.equal(ours.embedding(ids), held(folder).model.embed_tokens.weight[ids])
    (rows,) = ours.offload.rows
    assert rows.bytes_read == 4 * 32 + scales.nbytes


@pytest.mark.parametrize("kind", ["blocks", "rows", "mxfp4", "mixtral", "qwen3-moe", "deepseek-v3"])
def test_headers_tell_the_sizes(kind, made):
    folder, _ = made(kind)
    checkpoint = open_folder(folder, name="tiny")
    family = family_of(checkpoint.config, where="tiny")
    plan = plan_memory(checkpoint, family, dtype=torch.float32, memory_bytes=2**25)
    assert plan.held_bytes == pytest.approx(sum(p.nbytes for p in held(folder).parameters()), rel=0.02)
    exact = offloaded(folder).offload.sizes().passing_bytes(prefetch=True)
    assert exact * 0.98 <= plan.lockstep_bytes - 2**25
    card = plan_memory(checkpoint, family, dtype="auto", memory_bytes=2**25, device_bytes=2**30)
    assert card.held_bytes < plan.held_bytes / 2 + 2**12  # an accelerator holds what is stored


def test_a_whole_run_is_the_same_out_of_core(tmp_path):
    base = quantised_tiny_chat(tmp_path / "base")
    source = "bundled:tiny-chat"
    recipe = Recipe(harmful=source, harmless=source, n_train=16, n_val=4, n_test=20, reply_tokens=8, max_new_tokens=16)
    results = []
    for name, budget in (("whole", None), ("parts", 36 * 2**20)):
        its = recipe if budget is None else recipe.with_changes({"memory_bytes": budget})
        notes = []
        results.append(pipeline.run(base, tmp_path / name, its, with_evaluation=False, on_event=notes.append))
        assert any("each block is read once" in getattr(note, "text", "") for note in notes) == (budget is not None)
    whole, parts = (result.directions for result in results)
    assert torch.equal(factories.vectors_of(whole), factories.vectors_of(parts))
    assert whole.choice == parts.choice
    assert all(result.verification.ok for result in results)
    shards = [{p.name: p.read_bytes() for p in (tmp_path / name).glob("*.safetensors")} for name in ("whole", "parts")]
    assert shards[0] == shards[1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["dense", "experts", "mxfp4"])
def test_peak_memory_is_within_the_budget(kind, tmp_path, record_property):
    """Decoding takes no more than what was planned; none of these models fits in float32."""
    if kind == "mxfp4":
        base = quantised_gpt_oss(tmp_path / "base", 1024)
    else:
        shapes = replace(SHAPES, layers=4) if kind == "dense" else Experts(layers=4)
        base = in_fp8(make_model(shapes, tmp_path / "plain"), tmp_path / "base", (128, 128))
    with_files_of(model_path(), base)
    checkpoint = open_folder(base, name="base")
    family = family_of(checkpoint.config, where="base")
    plan = plan_memory(checkpoint, family, dtype=torch.float32, memory_bytes=1)
    layer = max(sizes_of(checkpoint, family, dtype=torch.float32)[0].blocks)
    budget = plan.lockstep_bytes + 2**22
    assert budget < plan.held_bytes
    found = in_a_process("lockstep", base, batches=3, memory=budget)
    record_property("peak_bytes", found["peak"])
    assert layer < found["peak"] <= budget
    assert found["read"] <= 1.05 * checkpoint.size_bytes
