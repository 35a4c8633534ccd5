"""Memory is a setting: the peak of a whole process stays within the budget, whatever the shapes."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch

from abliterate.checkpoint import direction_file as directions
from abliterate.data.rehearsal import KNOWN, make
from abliterate.method.directions import given
from tests.checkpoints import write

SOAK = bool(os.environ.get("ABLITERATE_SOAK"))
BUDGET = (512 if SOAK else 256) * 2**20
"""With ABLITERATE_SOAK the default budget and tensors of its size; else the half of all."""
# ru_maxrss of a child begins with what its parent held; the mark of /proc is the process's own.  Commands are run
# one after the other in one process, which imports torch once: a mark is forgotten before each, and what a command has
# not given back counts against the next.
WRAPPER = """
import json, sys
from pathlib import Path
def high_water_mark():
    return next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
import torch
marks = [high_water_mark()]
for arguments in json.loads(sys.argv[1]):
    from abliterate.cli.app import main
    Path("/proc/self/clear_refs").write_text("5")
    sys.argv = ["abliterate", *arguments]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
    marks.append(high_water_mark())
print(*marks, file=sys.stderr)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@dataclass(frozen=True, kw_only=True)
class Fused:
    """One block whose experts lie in one tensor as large as the budget: [experts, in, out], or [experts, out, in]."""

    d_model: int
    d_expert: int
    experts: int
    in_out: bool
    shards: int = 1

    def config(self):
        return {
            "model_type": "gpt_oss" if self.in_out else "qwen3_5_moe_text", "hidden_size": self.d_model,
            "intermediate_size": self.d_expert, "moe_intermediate_size": self.d_expert, "num_hidden_layers": 1,
            "num_local_experts": self.experts, "num_experts": self.experts, "tie_word_embeddings": False,
        }  # fmt: skip

    def tensors(self):
        shape = (self.d_expert, self.d_model) if self.in_out else (self.d_model, self.d_expert)
        yield "model.embed_tokens.weight", (1024, self.d_model)
        yield "model.layers.0.self_attn.o_proj.weight", (self.d_model, 4096)
        yield "model.layers.0.mlp.experts.down_proj", (self.experts, *shape)
        if self.in_out:
            yield "model.layers.0.mlp.experts.down_proj_bias", (self.experts, self.d_model)
        yield "lm_head.weight", (1024, self.d_model)


SHAPES = {
    "8b": replace(KNOWN["llama-3-8b"], layers=1, vocab=32768 if SOAK else 16384, shards=1),
    # one matrix of 256 MiB (with ABLITERATE_SOAK, of 4 GiB), which no buffer of the budget holds
    "wide": replace(KNOWN["llama-3-8b"], layers=1, vocab=1024, d_model=2048, d_ff=2**20 if SOAK else 2**16, shards=1),
    "fused-in-out": Fused(d_model=2880, d_expert=2880, experts=32 if SOAK else 16, in_out=True),
    "fused-out-in": Fused(d_model=2048, d_expert=1024, experts=128 if SOAK else 64, in_out=False),
    "rows": replace(KNOWN["llama-3-8b"], layers=1, vocab=BUDGET // 268, d_model=256, d_ff=512, shards=1),
}


def peaks(*commands):
    """Peak resident memory in bytes, of one process: after importing torch, and in each command after that."""
    listed = json.dumps([[str(argument) for argument in command] for command in commands])
    done = subprocess.run([sys.executable, "-c", WRAPPER, listed], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [int(mark) * 1024 for mark in done.stderr.splitlines()[-1].split()]


def make_mxfp4(folder):
    """One block of gpt-oss; with ABLITERATE_SOAK as wide as that of the large one, its scales 33 MB."""
    fused = Fused(d_model=2880, d_expert=2880, experts=128 if SOAK else 4, in_out=True)
    tensors = {
        name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in fused.tensors() if "down_proj" not in name
    }
    name, shape = "model.layers.0.mlp.experts.down_proj", (fused.experts, fused.d_model, fused.d_expert // 32)
    tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8)
    tensors[f"{name}_scales"] = torch.full(shape, 120, dtype=torch.uint8)
    tensors[f"{name}_bias"] = torch.zeros(fused.experts, fused.d_model, dtype=torch.bfloat16)
    return write(folder, {**fused.config(), "quantization_config": {"quant_method": "mxfp4"}}, tensors, files={})


@pytest.mark.parametrize("name", [*SHAPES, "mxfp4"])
def test_peak_memory_is_within_the_budget(name, tmp_path, record_property):
    base = make_mxfp4(tmp_path / "base") if name == "mxfp4" else make(SHAPES[name], tmp_path / "base")
    d_model = 2880 if name == "mxfp4" else SHAPES[name].d_model
    vector = torch.randn(d_model, generator=torch.Generator().manual_seed(0))
    file = directions.save(given(vector), tmp_path / "direction.safetensors")
    out = tmp_path / "out"
    commands = ("edit", base, file, "--out", out, "--memory", BUDGET), ("verify", out, "--bytes-only")
    idle, *marks = peaks(*commands)
    above = {command: mark - idle for (command, *_), mark in zip(commands, marks, strict=True)}
    for command, used in above.items():
        print(f"{name} {command}: {used / 2**20:.0f} MiB above an interpreter with torch")
        record_property(f"{command}_mib", used / 2**20)
    assert max(above.values()) <= BUDGET
