"""Quantised weights on disk: which tensors hold them, and what they mean.

- FP8 (``F8_E4M3``, ``F8_E5M2``): the weight times a scale: one for the tensor, for each row, or for each block
  (DeepSeek and Qwen: ``weight_scale_inv``, 128 x 128; compressed-tensors: ``weight_scale``).  Each matrix of a stack
  has its own.
- MXFP4 (gpt-oss): two 4-bit floats a byte, low nibble first, 32 values along the input axis sharing an exponent
  (OCP Microscaling Formats 1.0, section 5.3): ``NAME_blocks`` and ``NAME_scales``.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from abliterate.arch.model_map import DEQUANTISED_METHODS, quantisation
from abliterate.checkpoint.header import TensorInfo
from abliterate.checkpoint.source import Checkpoint
from abliterate.errors import UnsupportedFormatError

FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
SCALES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
PACKED_INTEGERS = (".qweight", ".weight_packed", ".g_idx", ".qzeros", ".absmax")
SCALE_SUFFIXES = ("_scale_inv", "_scale")
INPUT_SCALES = (".input_scale", ".activation_scale", ".input_global_scale")
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MX_BLOCK = 32
EXPONENT_BIAS = 127
DEFAULT_BLOCK = (128, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """One quantised tensor: what it is called and shaped once dequantised, and where its parts lie.

    ``block`` is the block of one scale (rows, columns) where the scales form a grid.
    """

    name: str
    shape: tuple[int, ...]
    kind: Literal["fp8", "mxfp4"]
    values: TensorInfo
    scales: TensorInfo
    block: tuple[int, int] | None = None


def packed_tensors(checkpoint: Checkpoint) -> tuple[dict[str, Packed], set[str]]:
    """The quantised tensors of ``checkpoint`` by the name of their values, and the names that belong to them.

    Raises:
        UnsupportedFormatError: nothing is quantised, or in a way that is not known here.
    """
    settings = quantisation(checkpoint.config) or {}
    method = settings.get("quant_method")
    strange = next((name for name in checkpoint.tensors if name.endswith(PACKED_INTEGERS)), None)
    if method not in DEQUANTISED_METHODS or strange:
        raise UnsupportedFormatError(
            f"{checkpoint.name}: weights quantised by {method or 'no method'} cannot be dequantised here"
            + (f" ('{strange}')" if strange else ""),
            f"known are {', '.join(DEQUANTISED_METHODS)} with FP8 or MXFP4 values; "
            "take the checkpoint it was made from",
        )
    block = settings.get("weight_block_size")
    grid = (int(block[0]), int(block[1])) if block else DEFAULT_BLOCK
    found: dict[str, Packed] = {}
    extra: set[str] = set()
    for tensor in checkpoint.tensors.values():
        packed = _fp8(checkpoint, tensor, grid) if tensor.dtype in FP8 else _mxfp4(checkpoint, tensor)
        if packed is not None:
            found[tensor.name] = packed
            extra.add(packed.scales.name)
        if tensor.name.endswith(INPUT_SCALES):
            extra.add(tensor.name)
    if not found:
        raise UnsupportedFormatError(f"{checkpoint.name}: no tensor is stored as FP8 or MXFP4", "nothing to dequantise")
    return found, extra


def fp8_rows(
    values: Float[Tensor, "rows n"], scales: Float[Tensor, "..."], block: tuple[int, int] | None, first_row: int
) -> Float[Tensor, "rows n"]:
    """``values`` (the rows of one matrix from ``first_row`` on) times their scales, in float32.

    ``scales``: one number, one for each row of the whole matrix, or a grid of blocks, of which the last ones may
    reach beyond the matrix.
    """
    wide = values.to(torch.float32)
    factors = scales.to(torch.float32)
    rows, n = wide.shape
    if factors.numel() == 1:
        return wide * factors.reshape(())
    if block is None:
        return wide * factors.reshape(-1)[first_row : first_row + rows, None]
    at = torch.arange(first_row, first_row + rows) // block[0]
    return wide * factors[at].repeat_interleave(block[1], dim=1)[:, :n]


def mxfp4_matrix(blocks: UInt8[Tensor, "out groups 16"], scales: UInt8[Tensor, "out groups"]) -> Float[Tensor, "out n"]:
    """One matrix ``[out, in]`` of MXFP4 in float32."""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)])
    low, high = (blocks & 15).long(), (blocks >> 4).long()
    values = torch.stack((table[low], table[high]), dim=-1).reshape(*scales.shape, MX_BLOCK)
    return torch.ldexp(values, scales[..., None].to(torch.int32) - EXPONENT_BIAS).reshape(len(blocks), -1)


def _fp8(checkpoint: Checkpoint, tensor: TensorInfo, grid: tuple[int, int]) -> Packed:
    named = (checkpoint.tensors.get(tensor.name + suffix) for suffix in SCALE_SUFFIXES)
    scales = next((found for found in named if found), None)
    if scales is None or scales.dtype not in SCALES or len(tensor.shape) < 2:
        raise UnsupportedFormatError(
            f"{tensor.shard}: '{tensor.name}' is stored as {tensor.dtype} and has no scale beside it",
            "give a complete checkpoint",
        )
    rows, n = tensor.shape[-2:]
    stack = tensor.shape[:-2]
    blocks = (math.ceil(rows / grid[0]), math.ceil(n / grid[1]))
    allowed = {(*stack, 1, 1), (*stack, rows, 1), (*stack, *blocks)} | ({(rows,)} if not stack else set())
    block = None
    if scales.numel != 1:
        if scales.shape not in allowed:
            raise UnsupportedFormatError(
                f"{scales.shard}: '{scales.name}' has shape {list(scales.shape)}, which fits neither the rows of "
                f"'{tensor.name}' {list(tensor.shape)} nor its blocks of {grid[0]} x {grid[1]}",
                "the checkpoint or its quantization_config is damaged",
            )
        if scales.shape[len(stack) :] == blocks and blocks != (1, 1):
            block = grid
    return Packed(name=tensor.name, shape=tensor.shape, kind="fp8", values=tensor, scales=scales, block=block)


def _mxfp4(checkpoint: Checkpoint, tensor: TensorInfo) -> Packed | None:
    stem = tensor.name.removesuffix("_blocks")
    scales = checkpoint.tensors.get(f"{stem}_scales")
    if stem == tensor.name or tensor.dtype != "U8" or scales is None:
        return None
    experts, out, groups, _ = tensor.shape
    if tensor.shape[3] * 2 != MX_BLOCK or scales.shape != (experts, out, groups):
        raise UnsupportedFormatError(
            f"{tensor.shard}: '{tensor.name}' {list(tensor.shape)} and its scales {list(scales.shape)} are not MXFP4",
            "the checkpoint is damaged",
        )
    return Packed(name=stem, shape=(experts, groups * MX_BLOCK, out), kind="mxfp4", values=tensor, scales=scales)
