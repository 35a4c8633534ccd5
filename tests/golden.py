"""Edits whose bytes must not change: the SHA-256 of what is written, computed in a process with reproducible sums.

    python -m tests.golden --write

writes ``tests/data/golden.json``.  Sums of floats depend on the processor; ``ENVIRONMENT`` makes MKL and torch take the
instructions that every x86-64 has.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "USE_HUB_KERNELS": "0",
}
HERE = Path(__file__).parent
FILE = HERE / "data" / "golden.json"
OF_THE_EDIT = ("direction", "projector.", "tensor.")
"""Tensors of a patch that come from the edit alone; others hold files with dates in them."""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def shards(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()) for path in sorted(folder.glob("*.safetensors"))}


def patch_data(path: Path) -> str:
    """The data of a patch in file order, whatever its tensors are called."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:start])
    entries.pop("__metadata__")
    offsets = sorted(entry["data_offsets"] for name, entry in entries.items() if name.startswith(OF_THE_EDIT))
    return sha256(b"".join(raw[start + begin : start + end] for begin, end in offsets))


def bases(work: Path) -> Iterator[tuple[str, Path, dict[str, str]]]:
    """Name, folder, options of the edit."""
    import torch

    from abliterate.data.tiny_chat import model_path
    from tests import quantising

    yield "tiny-chat", model_path(), {}
    yield "tiny-chat, rounded to nearest", model_path(), {"rounding": "nearest"}
    for name in ("tiny-gemma3", "tiny-qwen2"):
        yield name, HERE / "models" / name, {}
    yield "tiny-qwen2, tied head edited", HERE / "models" / "tiny-qwen2", {"tied": "shared"}
    (work / "fp8").mkdir()
    yield "FP8", quantising.quantised_tiny_chat(work / "fp8" / "base"), {}
    (work / "mxfp4").mkdir()
    torch.manual_seed(0)
    yield "MXFP4", quantising.quantised_gpt_oss(work / "mxfp4" / "base"), {}


def figures(work: Path) -> dict[str, dict[str, object]]:
    """The hashes of every edit, its patch and its adapter."""
    import torch
    from safetensors.torch import save_file

    import abliterate
    from tests import factories

    found: dict[str, dict[str, object]] = {}
    for place, (name, base, options) in enumerate(bases(work)):
        width = json.loads((base / "config.json").read_text())["hidden_size"]
        vector = torch.sin(torch.arange(1, width + 1, dtype=torch.float64) ** 1.5 * (place + 1)).to(torch.float32)
        file, out = work / f"{place}.safetensors", work / str(place)
        save_file({"direction": vector}, file)
        direction, recipe = factories.given_direction(file), abliterate.Recipe().with_changes(options)
        abliterate.edit(base, direction, out, recipe=recipe)
        patch = abliterate.export_patch(out, base, work / f"{place}.patch.safetensors")
        adapter = abliterate.export_lora(base, work / f"{place}-lora", edited=out)
        found[name] = {
            "base": shards(base),
            "edited": shards(out),
            "patch": patch_data(patch.file),
            "adapter": shards(adapter.out),
        }
    return found


def in_a_process() -> dict[str, dict[str, object]]:
    """The figures, under ``ENVIRONMENT``."""
    import os

    done = subprocess.run(
        [sys.executable, "-m", "tests.golden"], env={**os.environ, **ENVIRONMENT}, cwd=HERE.parent,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def main() -> None:
    if "--write" in sys.argv:
        FILE.write_text(json.dumps(in_a_process(), indent=1) + "\n", "utf-8")
        return
    with tempfile.TemporaryDirectory() as folder:
        json.dump(figures(Path(folder)), sys.stdout)


if __name__ == "__main__":
    main()
