"""FP8 and MXFP4 checkpoints written as bfloat16: the values are those of transformers, the rest stays as it is."""

import errno
import json

import pytest
import torch

from abliterate import api
from abliterate.checkpoint.source import open_folder
from abliterate.cli.options import default_out
from abliterate.editing.planning import plan
from abliterate.errors import NotEnoughDiskError, OutputError, UnsupportedFormatError
from abliterate.exports import dequantising
from tests import checkpoints, factories
from tests.checkpoints import write
from tests.quantising import (
    GRID,
    fp8_rows,
    mxfp4_matrix,
    quantised_gpt_oss,
    quantised_llama,
    to_blocks,
    to_mxfp4,
    values,
)


@pytest.mark.parametrize("style", ["blocks", "rows", "tensor"])
def test_fp8_becomes_what_it_stands_for(style, tmp_path):
    base, meant = quantised_llama(tmp_path / "base", style)
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
    pieces = [fp8_rows(q[first : first + 5], scales, GRID, first, q.shape) for first in range(0, 37, 5)]
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


def test_a_full_disk_is_said_and_the_same_command_continues(tmp_path, monkeypatch):
    base, _ = quantised_llama(tmp_path / "base", "blocks")
    whole = api.dequantize(base, tmp_path / "whole")

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(dequantising.TargetFile, "append", full)
        with pytest.raises(NotEnoughDiskError, match="the disk is full"):
            api.dequantize(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert checkpoints.tree(api.dequantize(base, tmp_path / "out")) == checkpoints.tree(whole)


def test_the_default_folder_says_what_it_is():
    assert str(default_out("openai/gpt-oss-20b", suffix="bf16")) == "gpt-oss-20b-bf16"
