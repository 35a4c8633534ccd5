"""Quantised weights on disk: which tensors hold them, and what they mean.

- FP8 (``F8_E4M3``, ``F8_E5M2``): the weight times a scale: one for the tensor, for each row, or for each block
  (DeepSeek and Qwen: ``weight_scale_inv``, 128 x 128; compressed-tensors: ``weight_scale``).  Each matrix of a stack
  has its own.
- MXFP4 (gpt-oss): two 4-bit floats a byte, low nibble first, 32 values along the input axis sharing an exponent
  (OCP Microscaling Formats 1.0, section 5.3): ``NAME_blocks`` and ``NAME_scales``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from abliterate.arch.formats import FP8, SCALES
from abliterate.checkpoint.header import TensorInfo
from abliterate.checkpoint.source import Checkpoint
from abliterate.errors import UnsupportedFormatError

METHODS = ("fp8", "compressed-tensors", "modelopt", "mxfp4")
"""Quantisation methods whose weights may be FP8 or MXFP4."""
PACKED_INTEGERS = (".qweight", ".weight_packed", ".g_idx", ".qzeros", ".absmax")
SCALE_SUFFIXES = ("_scale_inv", "_scale")
INPUT_SCALES = (".input_scale", ".activation_scale", ".input_global_scale", ".k_scale", ".v_scale")
MX_BLOCK = 32
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

    @property
    def format(self) -> str:
        """The format of its values: a dtype of safetensors, or "MXFP4"."""
        return self.values.dtype if self.kind == "fp8" else "MXFP4"

    @property
    def numel(self) -> int:
        """Number of its values."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of its values and scales as they are stored."""
        return self.values.size_bytes + self.scales.size_bytes

    @property
    def transposed(self) -> bool:
        """Whether a row on disk is a column of its matrix."""
        return self.kind == "mxfp4"

    @property
    def stored_rows(self) -> int:
        """Rows on disk of each of its matrices."""
        return self.shape[-1 if self.transposed else -2]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row on disk."""
        return self.values.size_bytes // max(1, math.prod(self.shape[:-2]) * self.stored_rows)

    def stored_axis(self, axis: int) -> int:
        """Where axis ``axis`` of ``shape`` lies in the tensor on disk: MXFP4 matrices are stored transposed.

        Raises:
            UnsupportedFormatError: several of its values share a byte.
        """
        if self.kind == "fp8":
            return axis
        if axis != len(self.shape) - 1:
            raise UnsupportedFormatError(
                f"{self.values.shard}: '{self.values.name}' holds two stream channels in a byte",
                "write it as bfloat16 first: abliterate dequantize MODEL --out FOLDER",
            )
        return axis - 1


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a configuration that describes the text model."""
    return config.get("text_config") or config


def quantisation(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantisation settings of a configuration, at its top or in its text model; None where there are none."""
    found = config.get("quantization_config") or text_config(config).get("quantization_config")
    if not found:
        return None
    return found if isinstance(found, Mapping) else {}


def packed_tensors(checkpoint: Checkpoint) -> tuple[dict[str, Packed], set[str]]:
    """The quantised tensors of ``checkpoint`` by the name of their values, and the names that belong to them.

    Raises:
        UnsupportedFormatError: nothing is quantised, or in a way that is not known here.
    """
    settings = quantisation(checkpoint.config) or {}
    method = settings.get("quant_method")
    strange = next((name for name in checkpoint.tensors if name.endswith(PACKED_INTEGERS)), None)
    if method not in METHODS or strange:
        raise UnsupportedFormatError(
            f"{checkpoint.name}: weights quantised by {method or 'no method'} cannot be dequantised here"
            + (f" ('{strange}')" if strange else ""),
            f"known are {', '.join(METHODS)} with FP8 or MXFP4 values; take the checkpoint it was made from",
        )
    grid = _grid(settings.get("weight_block_size"), checkpoint.name)
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
        stored = ", ".join(sorted({tensor.dtype for tensor in checkpoint.tensors.values()}))
        raise UnsupportedFormatError(
            f"{checkpoint.name}: weights quantised by {method} are stored as {stored}, none as FP8 or MXFP4",
            "take the checkpoint it was made from, and quantise the result",
        )
    return found, extra


def _grid(block: Any, where: str) -> tuple[int, int]:  # noqa: ANN401 - whatever the configuration says
    """Rows and columns that share a scale.

    Raises:
        UnsupportedFormatError: they are no two positive integers.
    """
    if not block:
        return DEFAULT_BLOCK
    if not isinstance(block, list) or len(block) != 2 or not all(type(its) is int and its > 0 for its in block):
        raise UnsupportedFormatError(
            f"{where}: weight_block_size is {block!r}", "quantization_config of config.json must give two sizes"
        )
    return block[0], block[1]


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
    experts, out, groups, half = tensor.shape if len(tensor.shape) == 4 else (0, 0, 0, 0)
    if half * 2 != MX_BLOCK or scales.shape != (experts, out, groups):
        raise UnsupportedFormatError(
            f"{tensor.shard}: '{tensor.name}' {list(tensor.shape)} and its scales {list(scales.shape)} are not MXFP4",
            "the checkpoint is damaged",
        )
    return Packed(name=stem, shape=(experts, groups * MX_BLOCK, out), kind="mxfp4", values=tensor, scales=scales)
