"""FP8 and MXFP4 checkpoints written as bfloat16: the values are those of transformers, the rest stays as it is."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from abliterate import api, dequantising
from abliterate.checkpoint.source import open_folder
from abliterate.cli.options import default_out
from abliterate.errors import OutputError, UnsupportedFormatError
from abliterate.planning import plan
from abliterate.quantised import fp8_rows, mxfp4_matrix
from tests import checkpoints, factories, zoo
from tests.checkpoints import llama_config, llama_shapes, random_tensors, write

GRID = (16, 16)
FP8_MAX = 448.0


def to_blocks(w, grid):
    """``w`` as FP8 with a scale for each block, the last ones reaching beyond the matrix."""
    rows, n = w.shape
    shape = (math.ceil(rows / grid[0]), math.ceil(n / grid[1]))
    scales = torch.empty(shape)
    q = torch.empty_like(w, dtype=torch.float8_e4m3fn)
    for i in range(shape[0]):
        for j in range(shape[1]):
            part = w[i * grid[0] : (i + 1) * grid[0], j * grid[1] : (j + 1) * grid[1]]
            scales[i, j] = part.abs().max() / FP8_MAX
            q[i * grid[0] : (i + 1) * grid[0], j * grid[1] : (j + 1) * grid[1]] = (part / scales[i, j]).to(q.dtype)
    return q, scales


def to_mxfp4(w):
    """Matrices ``[E, out, in]`` as blocks and scales, each value rounded to the nearest of E2M1."""
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    parts = w.reshape(*w.shape[:2], -1, 32).float()
    exponent = torch.floor(torch.log2(parts.abs().amax(-1).clamp_min(1e-30))) - 2
    scaled = parts / torch.exp2(exponent)[..., None]
    codes = (scaled[..., None] - table).abs().argmin(-1).to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), (exponent + 127).to(torch.uint8)


def quantised_llama(folder, style):
    """A tiny Llama whose linear layers are FP8, and the values that they stand for."""
    config = llama_config()
    tensors = random_tensors(llama_shapes(config), torch.bfloat16)
    meant = {}
    for name, w in list(tensors.items()):
        if "proj" not in name:
            continue
        wide = w.float()
        if style == "blocks":
            q, scales = to_blocks(wide, GRID)
            meant[name] = fp8_rows(q, scales, GRID, 0)
            full = scales.repeat_interleave(16, 0)[: len(w)].repeat_interleave(16, 1)[:, : w.shape[1]]
            assert torch.equal(meant[name], q.float() * full)
            tensors |= {name: q, f"{name}_scale_inv": scales}
            continue
        amax = wide.abs().amax(1, keepdim=True) if style == "rows" else wide.abs().max().reshape(())
        scales = (amax / FP8_MAX).to(torch.bfloat16 if style == "rows" else torch.float32)
        q = (wide / scales.float()).to(torch.float8_e4m3fn)
        meant[name] = q.float() * scales.float()
        tensors |= {name: q, f"{name}_scale": scales, name.replace("weight", "input_scale"): torch.ones(1)}
    method = {"blocks": "fp8", "rows": "compressed-tensors", "tensor": "modelopt"}[style]
    settings = {"quant_method": method} | ({"weight_block_size": list(GRID)} if style == "blocks" else {})
    base = write(folder, {**config, "quantization_config": settings}, tensors, shards=2)
    (base / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    return base, meant


def values(folder):
    """All tensors of a checkpoint, by the safetensors library."""
    return {name: w for path in sorted(folder.glob("*.safetensors")) for name, w in load_file(path).items()}


@pytest.mark.parametrize("style", ["blocks", "rows", "tensor"])
def test_fp8_becomes_what_it_stands_for(style, tmp_path):
    base, meant = quantised_llama(tmp_path / "base", style)
    with pytest.raises(UnsupportedFormatError) as refused:
        plan(base)
    assert "abliterate dequantize" in refused.value.hint
    out = api.dequantize(base, tmp_path / "out")
    before, after = values(base), values(out)
    assert set(after) == {name for name in before if "scale" not in name}
    for name, w in after.items():
        if name in meant:
            assert w.dtype == torch.bfloat16
            assert torch.equal(w, meant[name].to(torch.bfloat16))
        else:
            assert torch.equal(w, before[name])
    made = plan(out)
    assert made.coverage == "5 of 5"
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n")
    assert "written as bfloat16 by abliterate" in card


def test_the_last_blocks_may_reach_beyond_the_matrix():
    """Where transformers' own operation raises."""
    w = torch.randn(37, 21, generator=torch.Generator().manual_seed(0))
    q, scales = to_blocks(w, GRID)
    assert scales.shape == (3, 2)
    whole = fp8_rows(q, scales, GRID, 0)
    assert (whole - w).abs().max() < w.abs().max() / 16
    pieces = [fp8_rows(q[first : first + 5], scales, GRID, first) for first in range(0, 37, 5)]
    assert torch.equal(torch.cat(pieces), whole)


def test_fp8_equals_transformers():
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    q, scales = to_blocks(torch.randn(64, 48, generator=torch.Generator().manual_seed(0)), GRID)
    theirs = Fp8Dequantize(None)._dequantize_one(q, scales, torch.float32)
    assert torch.equal(fp8_rows(q, scales, GRID, 0), theirs)


def test_mxfp4_equals_transformers():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    w = torch.randn(2, 48, 64, generator=torch.Generator().manual_seed(0))
    blocks, scales = to_mxfp4(w)
    theirs = convert_moe_packed_tensors(blocks, scales)  # [E, in, out]
    ours = torch.stack([mxfp4_matrix(*parts).T for parts in zip(blocks, scales, strict=True)])
    assert torch.equal(ours.to(torch.bfloat16), theirs)
    assert (ours.mT - w).abs().max() < w.abs().max() / 4


def quantised_gpt_oss(folder):
    """A tiny gpt-oss with MXFP4 experts, as released: biases and all else in bfloat16."""
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    with factories.without_bars():
        model = zoo._text("GptOssConfig", "GptOssForCausalLM", **zoo.LOCAL | sizes)()
    saved = factories.save(model, folder.with_name("saved"), dtype=torch.bfloat16)
    tensors = values(saved)
    for name in [name for name in tensors if name.endswith(("experts.down_proj", "experts.gate_up_proj"))]:
        blocks, scales = to_mxfp4(tensors.pop(name).mT)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    return write(folder, config, tensors, shards=3)


def test_gpt_oss_behaves_as_transformers_loads_it_and_can_be_edited(tmp_path):
    base = quantised_gpt_oss(tmp_path / "base")
    out = api.dequantize(base, tmp_path / "out")
    made = plan(out)
    assert made.model_map.complete
    assert made.by_role()["expert out"][0].tensor.shape == (4, 64, 64)
    assert made.by_role()["expert out"][0].axis == 2
    theirs, ours = factories.load(base, dtype=torch.float32), factories.load(out, dtype=torch.float32)
    with torch.no_grad():
        ids = factories.token_ids()
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_a_stack_of_experts_has_scales_for_each(tmp_path):
    w = torch.randn(3, 32, 48, generator=torch.Generator().manual_seed(0))
    parts = [to_blocks(matrix, GRID) for matrix in w]
    name = "model.language_model.layers.0.mlp.experts.down_proj"
    q, scales = torch.stack([q for q, _ in parts]), torch.stack([scales for _, scales in parts])
    settings = {"quant_method": "fp8", "weight_block_size": list(GRID)}
    base = write(tmp_path / "base", {"quantization_config": settings}, {name: q, f"{name}_scale_inv": scales})
    after = values(api.dequantize(base, tmp_path / "out"))
    meant = torch.stack([fp8_rows(q, scales, GRID, 0) for q, scales in parts])
    assert torch.equal(after[name], meant.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors, config: config["quantization_config"].update(quant_method="gptq"), "gptq"),
        (lambda tensors, config: config.pop("quantization_config"), "no method"),
        (lambda tensors, config: tensors.update({"a.weight_packed": torch.zeros(2)}), "weight_packed"),
        (lambda tensors, config: tensors.pop("model.layers.0.mlp.up_proj.weight_scale_inv"), "has no scale beside it"),
        (
            lambda tensors, config: tensors.update({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(2, 9)}),
            "fits neither the rows",
        ),
    ],
)
def test_what_cannot_be_understood_is_refused(change, says, tmp_path):
    base, _ = quantised_llama(tmp_path / "base", "blocks")
    config, tensors = json.loads((base / "config.json").read_text()), values(base)
    change(tensors, config)
    damaged = write(tmp_path / "damaged", config, tensors)
    with pytest.raises(UnsupportedFormatError, match=says):
        api.dequantize(damaged, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_a_stopped_run_continues(tmp_path, monkeypatch):
    base, _ = quantised_llama(tmp_path / "base", "blocks")
    whole = api.dequantize(base, tmp_path / "whole")
    with pytest.raises(OutputError, match="exists already"):
        api.dequantize(base, tmp_path / "whole")
    second = open_folder(base, name="base").shards[1].name
    with monkeypatch.context() as patch:
        real = dequantising._Writer.write
        patch.setattr(
            dequantising._Writer, "write",
            lambda self, shard, target: 1 / 0 if shard.name == second else real(self, shard, target),
        )  # fmt: skip
        with pytest.raises(ZeroDivisionError):
            api.dequantize(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert checkpoints.tree(api.dequantize(base, tmp_path / "out")) == checkpoints.tree(whole)


def test_the_default_folder_says_what_it_is():
    assert str(default_out("openai/gpt-oss-20b", suffix="bf16")) == "gpt-oss-20b-bf16"
