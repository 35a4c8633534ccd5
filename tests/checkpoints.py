"""Tiny checkpoint folders written byte by byte: no model is built, and a header can say whatever a test wants."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from abliterate.arch.edit_plan import EditPlan
from abliterate.arch.formats import DTYPES
from abliterate.checkpoint.output import prepare
from abliterate.editing.planning import along, plan
from abliterate.editing.writing import edit_checkpoint
from abliterate.method.edits import removing

NAMES = {dtype: name for name, dtype in DTYPES.items()} | {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
}

INDEX = "model.safetensors.index.json"

SIDE_FILES = {
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b'{ "model_max_length": 64 }\r\n',
    "tokenizer.model": bytes(range(256)),
    "chat_template.jinja": b"{% for m in messages %}{{ m['content'] }}{% endfor %}",
    "generation_config.json": b'{"do_sample": true}',
    "modeling_custom.py": b"raise SystemExit('never run')\n",
    "LICENSE": b"A licence.\n",
    "README.md": b"---\nlicense: mit\nlanguage:\n- en\n---\n# The base\r\n",
    "assets/picture.png": b"\x89PNG\x00",
    "assets/deep/er/notes.txt": "Zürich".encode(),
    ".gitattributes": b"*.safetensors filter=lfs\n",
}


def pack(
    tensors: Mapping[str, torch.Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    gap: int = 0,
    pad: int = 8,
    change: Callable[[dict[str, Any]], Any] = lambda header: header,
) -> bytes:
    """One safetensors file: ``gap`` bytes of junk before each tensor, the header padded to ``pad`` and changed."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    data = b""
    for name, tensor in tensors.items():
        data += b"\xa5" * gap
        raw = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    return with_header(change(header), data, pad=pad)


def with_header(header: Any, data: bytes = b"", *, pad: int = 8) -> bytes:
    """A file from a header (JSON, or raw bytes) and its data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % pad)
    return len(text).to_bytes(8, "little") + text + data


def llama_config(**changes: Any) -> dict[str, Any]:
    """A Llama as small as can be; o_proj is ``[32, 40]``, so that its axes differ."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 44, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 10, "max_position_embeddings": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    return {**config, **changes}


def llama_shapes(config: Mapping[str, Any], *, head: bool = True, biases: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors, in the order transformers writes them."""
    d, ff, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"lm_head.weight": (vocab, d)} if head else {}
    shapes["model.embed_tokens.weight"] = (vocab, d)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        shapes |= {block + "input_layernorm.weight": (d,), block + "mlp.down_proj.weight": (d, ff)}
        shapes |= {block + f"mlp.{name}_proj.weight": (ff, d) for name in ("gate", "up")}
        shapes |= {block + "post_attention_layernorm.weight": (d,)}
        shapes |= {block + f"self_attn.{name}_proj.weight": (kv, d) for name in ("k", "v")}
        shapes |= {block + "self_attn.o_proj.weight": (d, q), block + "self_attn.q_proj.weight": (q, d)}
        if biases:
            shapes |= {block + "self_attn.o_proj.bias": (d,), block + "mlp.down_proj.bias": (d,)}
    return {**shapes, "model.norm.weight": (d,)}


def random_tensors(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, *, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    *,
    shards: int | None = None,
    files: Mapping[str, bytes] = SIDE_FILES,
    metadata: Mapping[str, str] | None = None,
    **options: Any,
) -> Path:
    """A checkpoint folder: one file, or ``shards`` of them with an index in a style of its own."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    metadata = {"format": "pt", "note": "kept"} if metadata is None else metadata
    if shards is None:
        (folder / "model.safetensors").write_bytes(pack(tensors, metadata=metadata, **options))
    else:
        names = [f"model-{number:05}-of-{shards:05}.safetensors" for number in range(1, shards + 1)]
        place = {name: names[position * shards // len(tensors)] for position, name in enumerate(tensors)}
        for shard in names:
            part = {name: tensor for name, tensor in tensors.items() if place[name] == shard}
            (folder / shard).write_bytes(pack(part, metadata=metadata, **options))
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total, "origin": "a test"}, "weight_map": dict(sorted(place.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=3))
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_llama(
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    head: bool = True,
    biases: bool = False,
    tied: bool = False,
    sizes: Mapping[str, Any] = {},
    **options: Any,
) -> Path:
    """A random Llama checkpoint."""
    config = llama_config(tie_word_embeddings=tied, **sizes)
    return write(folder, config, random_tensors(llama_shapes(config, head=head, biases=biases), dtype), **options)


def directions(d: int = 32, k: int = 1, *, seed: int = 7) -> torch.Tensor:
    """Random directions of length about ``3 sqrt(d)``."""
    return torch.randn(d, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def edit(
    source: Path | EditPlan,
    out: Path,
    *,
    k: int = 1,
    vectors: torch.Tensor | None = None,
    memory_bytes: int = 2**30,
    **options: Any,
) -> Path:
    """Plan (unless given), edit along ``vectors`` (random unless given), finish."""
    made = source if isinstance(source, EditPlan) else plan(source)
    if not made.edits:
        made = along(made, removing(directions(made.model_map.d_model, k) if vectors is None else vectors))
    output = prepare(out, source=made.checkpoint.folder, fingerprint="test", needed_bytes=made.output_bytes)
    edit_checkpoint(made, output, memory_bytes=memory_bytes, **options)
    return output.finish()


def without(made: EditPlan, vectors: torch.Tensor) -> EditPlan:
    """The plan of removing ``vectors``."""
    return along(made, removing(vectors))


def read(folder: Path, name: str) -> torch.Tensor:
    """One tensor, read without the package's help from what the header says."""
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        entry = json.loads(raw[8:start]).get(name)
        if entry is not None:
            begin, end = entry["data_offsets"]
            flat = torch.frombuffer(bytearray(raw[start + begin : start + end]), dtype=torch.uint8)
            return flat.view({name: dtype for dtype, name in NAMES.items()}[entry["dtype"]]).reshape(entry["shape"])
    raise KeyError(name)


def header(path: Path) -> dict[str, Any]:
    """The parsed header of a file."""
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


def overwrite(folder: Path, name: str, tensor: torch.Tensor) -> None:
    """Replace the bytes of one tensor in place."""
    for path in sorted(folder.glob("*.safetensors")):
        entry = header(path).get(name)
        if entry is not None:
            raw = bytearray(path.read_bytes())
            start = 8 + int.from_bytes(raw[:8], "little") + entry["data_offsets"][0]
            data = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
            assert len(data) == entry["data_offsets"][1] - entry["data_offsets"][0]
            raw[start : start + len(data)] = data
            path.write_bytes(raw)
            return
    raise KeyError(name)


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below ``folder``, through links."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
