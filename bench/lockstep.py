"""What does it cost to run a model that is larger than memory?

    python -m bench.lockstep [--layers 24] [--batches 8] [--work out/bench] [--write docs/lockstep.md]

Makes a Llama of about 1.2 GB (random bfloat16 weights) and runs the same batches through it, each way in a process of
its own: offloaded by accelerate, offloaded in lockstep within a quarter of the model's size, and held in memory whole.
Prints the bytes of weights read, wall seconds of loading and of running, peak resident memory above that of a process
that has run a small model, and whether all ways gave the same bits.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from abliterate.checkpoint.source import open_folder
from abliterate.data.bundled import model_path
from abliterate.data.rehearsal import CheckpointShapes, Shapes, make
from abliterate.model.load import LoadedModel, load_model, quiet_transformers
from abliterate.model.lockstep import run_together
from bench.edit_speed import machine

SHAPES = Shapes(d_model=1536, d_ff=4096, layers=24, vocab=4096, heads=12, kv_heads=4, head_dim=128, shards=3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A mixture of experts whose experts are stored one by one, as released, and fused when they are loaded."""

    layers: int = 16
    experts: int = 16
    shards: int = 2

    def config(self) -> dict[str, object]:
        """The ``config.json``."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 1024,
            "num_hidden_layers": self.layers, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128,
            "vocab_size": 4096, "num_experts": self.experts, "num_experts_per_tok": 2, "moe_intermediate_size": 384,
            "intermediate_size": 384, "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False,
        }  # fmt: skip

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes."""
        yield "model.embed_tokens.weight", (4096, 1024)
        for layer in range(self.layers):
            start = f"model.layers.{layer}."
            yield start + "self_attn.q_proj.weight", (1024, 1024)
            yield start + "self_attn.o_proj.weight", (1024, 1024)
            for name in ("k", "v"):
                yield start + f"self_attn.{name}_proj.weight", (256, 1024)
                yield start + f"self_attn.{'q' if name == 'v' else 'k'}_norm.weight", (128,)
            yield start + "input_layernorm.weight", (1024,)
            yield start + "post_attention_layernorm.weight", (1024,)
            yield start + "mlp.gate.weight", (self.experts, 1024)
            for expert in range(self.experts):
                for name in ("gate", "up"):
                    yield start + f"mlp.experts.{expert}.{name}_proj.weight", (384, 1024)
                yield start + f"mlp.experts.{expert}.down_proj.weight", (1024, 384)
        yield "model.norm.weight", (1024,)
        yield "lm_head.weight", (4096, 1024)


WAYS = ("accelerate", "lockstep", "resident")
ROWS, TOKENS = 2, 16
PAGE = """# Larger than memory

Written by `make bench-lockstep`. {batches} batches of {rows} prompts of {tokens} tokens and more, in float32, through a
Llama with random bfloat16 weights, each way in a process of its own, the checkpoint in the page cache, one thread.

{table}

Machine: {machine}.
"""


def main() -> None:
    """Run the benchmark, or one way of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=SHAPES.layers)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path("out/bench"))
    parser.add_argument("--write", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.work, args.memory, args.batches)))
        return
    shutil.rmtree(args.work, ignore_errors=True)
    base = make_model(replace(SHAPES, layers=args.layers), args.work / "base")
    found = {way: in_a_process(way, base, batches=args.batches) for way in WAYS}
    table = "\n".join(report(found, open_folder(base, name="base").size_bytes))
    shutil.rmtree(args.work)
    print(table)
    if args.write:
        page = PAGE.format(table=table, machine=machine(), batches=args.batches, rows=ROWS, tokens=TOKENS)
        args.write.write_text(page, "utf-8")


def make_model(shapes: CheckpointShapes, folder: Path) -> Path:
    """A checkpoint of random weights with a tokenizer."""
    make(shapes, folder, fill=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_path() / name, folder)
    return folder


def in_a_process(way: str, base: Path, *, batches: int, memory: int | None = None) -> dict[str, Any]:
    """What ``measure`` finds in a new process."""
    memory = memory or open_folder(base, name="base").size_bytes // 4
    options = ["--way", way, "--work", str(base), "--memory", str(memory), "--batches", str(batches)]
    command = [sys.executable, "-m", "bench.lockstep", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(way: str, base: Path, memory: int, batches: int) -> dict[str, Any]:
    """Run ``batches`` through the model in ``base``, after a small model that warms the libraries up."""
    quiet_transformers()
    with tempfile.TemporaryDirectory() as folder:
        small = replace(SHAPES, layers=2, d_model=256, d_ff=512, heads=2, kv_heads=1, shards=1)
        run(way, make_model(small, Path(folder) / "small"), 2**26, batches=2)
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # forget the high-water mark
    found = run(way, base, memory, batches=batches)
    return {**found, "peak": resident_bytes("VmHWM") - before}


def run(way: str, base: Path, memory: int, *, batches: int) -> dict[str, Any]:
    """Load and run: seconds, bytes of weights read, and a hash of all logits."""
    ids = [
        torch.randint(3, 90, (ROWS, TOKENS + place), generator=torch.Generator().manual_seed(place))
        for place in range(batches)
    ]
    start = time.perf_counter()
    if way == "accelerate":
        model, read = load_with_accelerate(base)
    else:
        loaded = load_model(
            open_folder(base, name="base"), device="cpu", memory_bytes=memory if way == "lockstep" else None
        )
        model = loaded.model
    loading = time.perf_counter() - start
    start = time.perf_counter()
    thunks = [lambda batch=batch: model(batch, use_cache=False).logits for batch in ids]
    with torch.inference_mode():
        logits = [thunk() for thunk in thunks] if way == "accelerate" else run_together(loaded, thunks)
    running = time.perf_counter() - start
    digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in logits)).hexdigest()
    return {
        "loading": loading,
        "running": running,
        "sha256": digest,
        "read": read() if way == "accelerate" else bytes_read(loaded),
    }


def bytes_read(loaded: LoadedModel) -> int:
    """Bytes of weights read by a model that was loaded here."""
    return loaded.offload.bytes_read if loaded.offload else sum(p.numel() * 2 for p in loaded.model.parameters())


def load_with_accelerate(base: Path) -> tuple[Any, Any]:
    """The model dispatched to disk by accelerate, and a function that tells the stored bytes its hooks have read."""
    from accelerate.utils import offload
    from transformers import AutoModelForCausalLM

    read = 0
    plain = offload.OffloadedWeightsLoader.__getitem__

    def counted(self: Any, key: str) -> torch.Tensor:  # noqa: ANN401
        nonlocal read
        value = plain(self, key)
        read += value.numel() * 2
        return value

    offload.OffloadedWeightsLoader.__getitem__ = counted
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, device_map={"": "disk"}, offload_folder=base / "offload"
    )
    return model.eval(), lambda: read


def resident_bytes(field: str) -> int:
    """A memory figure of this process."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def report(found: dict[str, dict[str, Any]], size: int) -> list[str]:
    """The table, as Markdown."""
    names = {
        "accelerate": "offloaded by accelerate",
        "lockstep": f"in lockstep, {size / 4 / 2**20:.0f} MiB",
        "resident": "held whole",
    }
    expected = found["resident"]["sha256"]
    lines = [
        f"{size / 1e9:.2f} GB of weights",
        "",
        "| | weights read, GB | read / size | loading, s | running, s | peak memory above libraries, MiB | same bits |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for way, row in found.items():
        lines.append(
            f"| {names[way]} | {row['read'] / 1e9:.2f} | {row['read'] / size:.2f} | {row['loading']:.1f} | "
            f"{row['running']:.1f} | {row['peak'] / 2**20:.0f} | {'yes' if row['sha256'] == expected else 'NO'} |"
        )
    return lines


if __name__ == "__main__":
    main()
