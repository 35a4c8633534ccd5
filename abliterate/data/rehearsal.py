"""Checkpoints of the real shapes without the real weights, to rehearse an edit before downloading anything.

    python -m abliterate.data.rehearsal llama-3-70b /tmp/llama-3-70b

writes a folder with the tensor names, shapes, shards and index of the released checkpoint.  The data is holes: a 141 GB
checkpoint takes a few kilobytes of disk.  ``abliterate plan`` answers on it as on the real one; with ``--layers`` a
slice of it can be edited, to measure time and memory on this machine.  ``--fill`` writes random weights instead.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from abliterate.checkpoint.output import write_json
from abliterate.checkpoint.source import INDEX_NAME, SINGLE_NAME

FILL_BLOCK = 2**24
FILL_STD = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """The sizes of a Llama-architecture checkpoint in bfloat16, and the number of shards it was released in."""

    d_model: int
    d_ff: int
    layers: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    shards: int
    tied: bool = False

    def config(self) -> dict[str, object]:
        """The ``config.json`` of such a checkpoint."""
        own = {"intermediate_size": self.d_ff, "max_position_embeddings": 8192, "tie_word_embeddings": self.tied}
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **_common_config(self), **own}

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order of the released files."""
        d = self.d_model
        yield "model.embed_tokens.weight", (self.vocab, d)
        for layer in range(self.layers):
            start = f"model.layers.{layer}."
            yield start + "input_layernorm.weight", (d,)
            yield start + "mlp.down_proj.weight", (d, self.d_ff)
            yield start + "mlp.gate_proj.weight", (self.d_ff, d)
            yield start + "mlp.up_proj.weight", (self.d_ff, d)
            yield start + "post_attention_layernorm.weight", (d,)
            yield start + "self_attn.k_proj.weight", (self.kv_heads * self.head_dim, d)
            yield start + "self_attn.o_proj.weight", (d, self.heads * self.head_dim)
            yield start + "self_attn.q_proj.weight", (self.heads * self.head_dim, d)
            yield start + "self_attn.v_proj.weight", (self.kv_heads * self.head_dim, d)
        yield "model.norm.weight", (d,)
        if not self.tied:
            yield "lm_head.weight", (self.vocab, d)


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridShapes:
    """The sizes of a Qwen3-Next checkpoint: three blocks of linear attention to one of full, experts in every block."""

    d_model: int
    d_expert: int
    layers: int
    experts: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    linear_key_heads: int
    linear_value_heads: int
    linear_head_dim: int
    shards: int

    def config(self) -> dict[str, object]:
        """The ``config.json`` of such a checkpoint."""
        own = {
            "moe_intermediate_size": self.d_expert,
            "shared_expert_intermediate_size": self.d_expert,
            "num_experts": self.experts,
            "tie_word_embeddings": False,
        }
        return {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", **_common_config(self), **own}

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, the next-token block included."""
        d = self.d_model
        yield "model.embed_tokens.weight", (self.vocab, d)
        for layer in range(self.layers):
            start = f"model.layers.{layer}."
            yield from self._attention(start) if layer % 4 == 3 else self._linear_attention(start)
            yield from self._experts(start)
        yield "model.norm.weight", (d,)
        yield "lm_head.weight", (self.vocab, d)
        yield "mtp.fc.weight", (d, 2 * d)
        for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
            yield f"mtp.{name}.weight", (d,)
        yield from self._attention("mtp.layers.0.")
        yield from self._experts("mtp.layers.0.")

    def _attention(self, start: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        d, width = self.d_model, self.heads * self.head_dim
        yield start + "self_attn.q_proj.weight", (2 * width, d)
        yield start + "self_attn.k_proj.weight", (self.kv_heads * self.head_dim, d)
        yield start + "self_attn.v_proj.weight", (self.kv_heads * self.head_dim, d)
        yield start + "self_attn.o_proj.weight", (d, width)
        yield start + "self_attn.q_norm.weight", (self.head_dim,)
        yield start + "self_attn.k_norm.weight", (self.head_dim,)

    def _linear_attention(self, start: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        keys = self.linear_key_heads * self.linear_head_dim
        values = self.linear_value_heads * self.linear_head_dim
        yield start + "linear_attn.A_log", (self.linear_value_heads,)
        yield start + "linear_attn.conv1d.weight", (2 * keys + values, 1, 4)
        yield start + "linear_attn.dt_bias", (self.linear_value_heads,)
        yield start + "linear_attn.in_proj_ba.weight", (2 * self.linear_value_heads, self.d_model)
        yield start + "linear_attn.in_proj_qkvz.weight", (2 * keys + 2 * values, self.d_model)
        yield start + "linear_attn.norm.weight", (self.linear_head_dim,)
        yield start + "linear_attn.out_proj.weight", (self.d_model, values)

    def _experts(self, start: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        d, ff = self.d_model, self.d_expert
        yield start + "input_layernorm.weight", (d,)
        yield start + "post_attention_layernorm.weight", (d,)
        yield start + "mlp.gate.weight", (self.experts, d)
        yield start + "mlp.shared_expert_gate.weight", (1, d)
        for expert in ["shared_expert", *(f"experts.{number}" for number in range(self.experts))]:
            yield start + f"mlp.{expert}.down_proj.weight", (d, ff)
            yield start + f"mlp.{expert}.gate_proj.weight", (ff, d)
            yield start + f"mlp.{expert}.up_proj.weight", (ff, d)


def _common_config(shapes: Shapes | HybridShapes) -> dict[str, object]:
    return {
        "hidden_size": shapes.d_model,
        "num_hidden_layers": shapes.layers,
        "num_attention_heads": shapes.heads,
        "num_key_value_heads": shapes.kv_heads,
        "head_dim": shapes.head_dim,
        "vocab_size": shapes.vocab,
        "dtype": "bfloat16",
    }


@runtime_checkable
class CheckpointShapes(Protocol):
    """What ``make`` needs to know of a checkpoint."""

    @property
    def shards(self) -> int:
        """Number of files."""
        ...

    def config(self) -> dict[str, object]:
        """The ``config.json``."""
        ...

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes in file order."""
        ...


KNOWN: dict[str, Shapes | HybridShapes] = {
    "llama-3-8b": Shapes(
        d_model=4096, d_ff=14336, layers=32, vocab=128256, heads=32, kv_heads=8, head_dim=128, shards=4
    ),
    "llama-3-70b": Shapes(
        d_model=8192, d_ff=28672, layers=80, vocab=128256, heads=64, kv_heads=8, head_dim=128, shards=30
    ),
    "qwen3-next-80b": HybridShapes(
        d_model=2048,
        d_expert=512,
        layers=48,
        experts=512,
        vocab=151936,
        heads=16,
        kv_heads=2,
        head_dim=256,
        linear_key_heads=16,
        linear_value_heads=32,
        linear_head_dim=128,
        shards=41,
    ),
    "llama-3.2-1b": Shapes(
        d_model=2048, d_ff=8192, layers=16, vocab=128256, heads=32, kv_heads=8, head_dim=64, shards=1, tied=True
    ),
}


def make(shapes: CheckpointShapes, folder: Path, *, fill: bool = False) -> Path:
    """Write a checkpoint of ``shapes`` into the new ``folder``; holes, or with ``fill`` random bfloat16 weights."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", shapes.config())
    tensors = list(shapes.tensors())
    total = sum(_size(shape) for _, shape in tensors)
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in tensors:
        if filled >= total / shapes.shards and len(groups) < shapes.shards:
            groups.append([])
            filled = 0
        groups[-1].append((name, shape))
        filled += _size(shape)
    names = [f"model-{place + 1:05d}-of-{len(groups):05d}.safetensors" for place in range(len(groups))]
    if len(groups) == 1:
        names = [SINGLE_NAME]
    for name, group in zip(names, groups, strict=True):
        _write_shard(folder / name, group, fill=fill)
    if len(groups) > 1:
        weight_map = {t: name for name, group in zip(names, groups, strict=True) for t, _ in group}
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return folder


def _size(shape: tuple[int, ...]) -> int:
    return 2 * torch.Size(shape).numel()


def _write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]], *, fill: bool) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + _size(shape)]}
        end += _size(shape)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if fill:
            _fill(file, end)
        file.truncate(8 + len(text) + end)


def _fill(file, size: int) -> None:  # noqa: ANN001 - an open file
    generator = torch.Generator().manual_seed(size)
    block = (torch.randn(FILL_BLOCK, generator=generator) * FILL_STD).to(torch.bfloat16).view(torch.uint8).numpy()
    while size:
        count = min(size, len(block))
        file.write(block[:count])
        size -= count


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m abliterate.data.rehearsal", description="Make a checkpoint of a real shape."
    )
    parser.add_argument("shapes", choices=sorted(KNOWN))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="fewer layers than the released model")
    parser.add_argument("--shards", type=int, help="another number of shards")
    parser.add_argument("--fill", action="store_true", help="write random weights instead of holes")
    args = parser.parse_args()
    from dataclasses import replace

    changes = {"layers": args.layers, "shards": args.shards}
    shapes = replace(KNOWN[args.shapes], **{key: value for key, value in changes.items() if value})
    make(shapes, args.folder, fill=args.fill)


if __name__ == "__main__":
    main()
