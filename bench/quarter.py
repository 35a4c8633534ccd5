"""A whole run on a quarter of the memory that the weights take: same direction, same bytes, same report?

    python -m bench.quarter

The bundled model is made larger without changing what it says: idle MLP units, and blocks that add nothing.
"""

import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from abliterate.data.tiny_chat import model_path

LAYERS, INNER = 16, 8192
RECIPE = """
[find]
harmful = "bundled:tiny-chat"
harmless = "bundled:tiny-chat"
n_train = 32
n_val = 6
n_test = 8
[model]
batch_size = 8
[evaluate]
max_new_tokens = 12
"""
WRAPPER = """
import atexit, sys
def report():
    marks = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    print(marks[0].split()[1], file=sys.stderr)
atexit.register(report)
from abliterate.cli.app import main
main()
"""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """One run: its folder, how long it took, and the peak memory of its process."""

    out: Path
    seconds: float
    peak_bytes: int


def enlarged(folder: Path) -> Path:
    """The bundled model with more weights and the same function."""
    shutil.copytree(model_path(), folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((folder / "config.json").read_text())
    own = config["num_hidden_layers"]
    stored = {name: w for path in sorted(model_path().glob("*.safetensors")) for name, w in load_file(path).items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: w for name, w in stored.items() if ".layers." not in name}
    for layer in range(LAYERS):
        like = f"model.layers.{min(layer, own - 1)}."
        for name in [name for name in stored if name.startswith(like)]:
            w = stored[name].clone()
            if layer >= own and name.endswith(("o_proj.weight", "down_proj.weight")):
                w.zero_()
            if name.endswith(("gate_proj.weight", "up_proj.weight")):
                idle = torch.randn(INNER - len(w), w.shape[1], generator=generator) * 0.05
                w = torch.cat([w, idle.to(w.dtype)])
            if name.endswith("down_proj.weight"):
                w = torch.cat([w, torch.zeros(len(w), INNER - w.shape[1], dtype=w.dtype)], 1)
            tensors[f"model.layers.{layer}.{name.removeprefix(like)}"] = w
    config.update(num_hidden_layers=LAYERS, intermediate_size=INNER)
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:1] * LAYERS
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def run(base: Path | str, recipe: Path, out: Path, memory_bytes: int) -> Ran:
    """``abliterate run`` in a process of its own."""
    command = [sys.executable, "-c", WRAPPER, "run", str(base), "--recipe", str(recipe), "--out", str(out)]
    started = time.perf_counter()
    done = subprocess.run(
        [*command, "--memory", str(memory_bytes), "--device", "cpu"],
        capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds = time.perf_counter() - started
    return Ran(out=out, seconds=seconds, peak_bytes=int(done.stderr.split()[-1]) * 1024)


def weight_bytes(base: Path) -> int:
    """What the weights take in memory: float32, bfloat16 on disk."""
    return 2 * (base / "model.safetensors").stat().st_size


def rounded(document: Any, digits: int) -> Any:  # noqa: ANN401 - plain data
    """Plain data with its floats to so many digits."""
    if isinstance(document, dict):
        return {name: rounded(its, digits) for name, its in document.items()}
    if isinstance(document, list):
        return [rounded(its, digits) for its in document]
    return round(document, digits) if isinstance(document, float) else document


def main() -> None:
    """Run both ways, compare, print."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = folder / "recipe.toml"
        recipe.write_text(RECIPE)
        base = enlarged(folder / "base")
        weights = weight_bytes(base)
        small = run("tiny-chat", recipe, folder / "small", 2**26)
        whole = run(base, recipe, folder / "whole", 2**34)
        quarter = run(base, recipe, folder / "quarter", weights // 4)
        documents = [json.loads((its.out / "abliterate.json").read_text()) for its in (whole, quarter)]
        print(f"weights {weights / 2**20:.0f} MiB, given {weights / 4 / 2**20:.0f} MiB")
        for label, its in (("whole", whole), ("a quarter", quarter)):
            more = (its.peak_bytes - small.peak_bytes) / 2**20
            print(f"{label}: {its.seconds:.0f} s, {more:.0f} MiB more than a run of the bundled model itself")
        one, other = documents
        print("same direction:", one["direction"]["sha256"] == other["direction"]["sha256"])
        same = filecmp.cmp(whole.out / "model.safetensors", quarter.out / "model.safetensors", shallow=False)
        print("same bytes:", same)
        figures = [rounded(its["evaluation"], 6) for its in documents]  # edited replies are checked in one pass there
        print("same evaluation, to six digits:", figures[0] == figures[1])
        pairs = list(zip(one["direction"]["scores"], other["direction"]["scores"], strict=True))
        scores = [
            max(abs(a[key] - b[key]) for a, b in pairs if a[key] is not None) for key in ("bypass", "induce", "kl_nats")
        ]
        print("largest difference of the best scores (bypass, induce, KL):", ", ".join(f"{s:.0e}" for s in scores))


if __name__ == "__main__":
    main()
