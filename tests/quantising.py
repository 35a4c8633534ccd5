"""Quantised checkpoints, as other tools write them."""

import json
import math
import shutil

import torch
from safetensors.torch import load_file

from abliterate.arch.codecs import Mxfp4, fp8_codec
from abliterate.data.tiny_chat import model_path
from tests import factories, zoo
from tests.checkpoints import llama_config, llama_shapes, random_tensors, write

GRID = (16, 16)
FP8_MAX = 448.0
SHARD = "60KB"
"""What a model is saved in before it is quantised: the hashes of golden bytes hang on the order."""


def fp8_rows(rows, scales, grid, first, shape=None):
    """The values of some rows of an FP8 matrix."""
    return fp8_codec(rows.dtype, tuple(shape or rows.shape), scales, grid).decode(rows, first, torch.float32)


def mxfp4_matrix(blocks, scales):
    """The values of one MXFP4 matrix ``[out, in]``."""
    return Mxfp4(32 * scales.shape[1], lambda: scales).decode(blocks.view(len(blocks), -1), 0, torch.float32)


def to_blocks(w, grid):
    """``w`` as FP8 with a scale for each block, the last ones reaching beyond the matrix."""
    (rows, n), (high, wide) = w.shape, grid
    shape = (math.ceil(rows / high), math.ceil(n / wide))
    beyond = (0, shape[1] * wide - n, 0, shape[0] * high - rows)
    parts = torch.nn.functional.pad(w, beyond).view(shape[0], high, shape[1], wide)
    scales = parts.abs().amax((1, 3)) / FP8_MAX
    q = (parts / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return q.view(shape[0] * high, shape[1] * wide)[:rows, :n].contiguous(), scales


def to_mxfp4(w):
    """Matrices ``[E, out, in]`` as blocks and scales, each value rounded to the nearest of E2M1."""
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    parts = w.reshape(*w.shape[:2], -1, 32).float()
    exponent = torch.floor(torch.log2(parts.abs().amax(-1).clamp_min(1e-30))) - 2
    scaled = parts / torch.exp2(exponent)[..., None]
    codes = (scaled[..., None] - table).abs().argmin(-1).to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), (exponent + 127).to(torch.uint8)


def quantised_llama(folder, style, **sizes):
    """A tiny Llama whose linear layers are FP8, and the values that they stand for."""
    config = llama_config(**sizes)
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


def quantised_gpt_oss(folder, width=64):
    """A tiny gpt-oss with MXFP4 experts, as released: biases and all else in bfloat16."""
    sizes = {"hidden_size": width, "intermediate_size": width}
    with factories.without_bars():
        model = zoo._text("GptOssConfig", "GptOssForCausalLM", **zoo.LOCAL | sizes)()
    saved = factories.save(model, folder.with_name("saved"), dtype=torch.bfloat16, shard=SHARD)
    tensors = values(saved)
    for name in [name for name in tensors if name.endswith(("experts.down_proj", "experts.gate_up_proj"))]:
        blocks, scales = to_mxfp4(tensors.pop(name).mT)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    return write(folder, config, tensors, shards=3)


def in_fp8(base, out, grid, **settings):
    """A checkpoint with everything that is called a projection, and its experts, in FP8."""
    tensors = values(base)
    for key in [key for key, w in tensors.items() if ("proj" in key or ".experts." in key) and w.ndim > 1]:
        w = tensors[key].float()
        parts = [to_blocks(matrix, grid) for matrix in w.view(-1, *w.shape[-2:])]
        scales = torch.stack([scales for _, scales in parts])
        tensors[key] = torch.stack([q for q, _ in parts]).view(w.shape)
        tensors[f"{key}_scale_inv"] = scales.view(*w.shape[:-2], *scales.shape[1:])
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": list(grid), **settings}
    return write(out, config, tensors, shards=3)


def quantised_zoo(name, folder):
    """A case of the zoo in FP8."""
    return in_fp8(
        factories.save(factories.build(name), folder.with_name("saved"), dtype=torch.bfloat16, shard=SHARD),
        folder,
        GRID,
    )


def quantised_tiny_chat(folder):
    """The bundled model in FP8 with blocks of 128."""
    settings = {"activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]}
    in_fp8(model_path(), folder, (128, 128), **settings)
    return with_files_of(model_path(), folder)


def with_files_of(base, folder):
    """``folder`` with what ``base`` has beside its weights and their configuration."""
    for path in base.iterdir():
        if path.suffix != ".safetensors" and not path.name.endswith(".index.json") and path.name != "config.json":
            shutil.copy(path, folder)
    return folder
