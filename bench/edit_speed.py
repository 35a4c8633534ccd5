"""Is editing a checkpoint faster than copying it?

    python -m bench.edit_speed [--layers 12] [--rounds 5] [--work out/bench]

Makes a checkpoint with the shapes of Llama-3-8B (fewer layers, random weights, several shards, at least 6 GB), then
alternates, in one run and on one disk: ``cp -r`` + ``sync``, ``abliterate edit`` (as a whole process, fsync included),
and a straightforward editor that reads, edits and saves shard by shard with the safetensors library.  Before each of
them the source is read into the page cache; the first two also run with the source dropped from it.  Prints wall and
CPU seconds, peak resident memory above an interpreter with torch imported, and the ratios of medians.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from abliterate.checkpoint import direction_file as directions
from abliterate.data.rehearsal import KNOWN, make
from abliterate.editing.planning import plan
from abliterate.method.directions import given

LOOP = """
import sys, pathlib, shutil, torch
from safetensors.torch import load_file, save_file
src, dst = map(pathlib.Path, sys.argv[1:3])
from abliterate.checkpoint.direction_file import load
r = load(pathlib.Path(sys.argv[3])).direction
r = r / r.norm()
dst.mkdir()
for path in sorted(src.iterdir()):
    if path.suffix != ".safetensors":
        shutil.copy(path, dst)
        continue
    tensors = load_file(path)
    for name, w in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            f = w.float()
            tensors[name] = (f - torch.outer(r, r @ f)).to(w.dtype)
        elif name.endswith("embed_tokens.weight"):
            f = w.float()
            tensors[name] = (f - torch.outer(f @ r, r)).to(w.dtype)
    save_file(tensors, dst / path.name, metadata={"format": "pt"})
import os
os.sync()
"""
# ru_maxrss of a child begins with what its parent held; the high-water mark of /proc is the process's own.
MARK = """
import atexit, sys
def report():
    marks = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    print(marks[0].split()[1], file=sys.stderr)
atexit.register(report)
import torch
"""
EDIT = MARK + "from abliterate.cli.app import main\nmain()\n"


Case = tuple[str, str]
"""A command, and whether the source lay in the page cache."""

CACHED, COLD = "cached", "cold"

PAGE = """\
# Performance

Written by `make bench-edit`. In one run and on one disk, alternating, median of {rounds}: copying a checkpoint with the
shapes of Llama-3-8B (12 layers, random bfloat16 weights, four shards), editing it with `abliterate edit` (a whole
process, fsync included, 512 MiB budget), and a plain loop that loads each shard with the safetensors library, edits it
and saves it.

{table}

Machine: {machine}.

"Cached" rounds begin with the source read into the page cache, as after a download; "cold" ones with the source dropped
from it, as after a reboot or where the model is larger than memory. Ratios are to `cp` in the same state. In the cold
rounds both wait for the disk. That `cp` is slower with its source cached is this virtual machine: memory it has not
used before is slow to get, and dropping a cached source leaves it memory to use.

Verifying (`abliterate verify --bytes-only`) reads base and result once, side by side, and hashes both.
"""


def timed(command: list[str]) -> dict[str, float]:
    """Wall and CPU seconds of a whole process, and its peak resident memory where it says so on stderr."""
    begun = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        errors = process.stderr.read() if process.stderr else ""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(errors)
    mark = errors.split()[-1] if errors.split() else ""
    return {
        "wall": time.monotonic() - begun,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak": int(mark) * 1024 if mark.isdigit() else 0,
    }


def main() -> None:
    """Run the benchmark and print it."""
    parser = argparse.ArgumentParser(description="Is editing a checkpoint faster than copying it?")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("out/bench"))
    parser.add_argument("--memory", default="512MiB")
    parser.add_argument("--no-loop", action="store_true")
    parser.add_argument("--write", type=Path, help="write the result as a page")
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    base = make(replace(KNOWN["llama-3-8b"], layers=args.layers), args.work / "base", fill=True)
    size = sum(path.stat().st_size for path in base.iterdir())
    edited = plan(base).edited_parameters
    vector = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    direction = directions.save(given(vector), args.work / "direction.safetensors")
    idle = timed([sys.executable, "-c", MARK])["peak"]
    out = args.work / "out"
    commands = {
        "cp -r + sync": ["sh", "-c", f"cp -r {base} {out} && sync"],
        "abliterate edit": [
            sys.executable,
            "-c",
            EDIT,
            "edit",
            str(base),
            str(direction),
            "--out",
            str(out),
            "--memory",
            args.memory,
        ],
    }
    if not args.no_loop:
        commands["load, edit, save"] = [sys.executable, "-c", MARK + LOOP, str(base), str(out), str(direction)]
    cases = [(name, CACHED) for name in commands] + [(name, COLD) for name in list(commands)[:2]]
    results: dict[Case, list[dict[str, float]]] = {case: [] for case in cases}
    for round_number in range(args.rounds):
        for case in cases:
            name, state = case
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            prepare(base, cached=state == CACHED)
            results[case].append(timed(commands[name]))
            last = results[case][-1]
            print(
                f"round {round_number + 1}  {name:16s} {state:6s} {last['wall']:7.1f} s wall {last['cpu']:6.1f} s CPU",
                flush=True,
            )
    shutil.rmtree(args.work)
    lines = report(results, size, edited, idle)
    print("\n" + "\n".join(lines))
    if args.write:
        args.write.write_text(PAGE.format(table="\n".join(lines), machine=machine(), rounds=args.rounds), "utf-8")


def prepare(base: Path, *, cached: bool) -> None:
    """Read every file of ``base`` into the page cache, or drop it from there."""
    buffer = bytearray(2**24)
    for path in base.iterdir():
        with path.open("rb", buffering=0) as file:
            if not cached:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while cached and file.readinto(buffer):
                pass


def report(results: dict[Case, list[dict[str, float]]], size: int, edited: int, idle: float) -> list[str]:
    """The table of medians, as Markdown."""
    allowed = 0.15 * edited / 1e8 + 0.5 * size / 1e9
    lines = [
        f"{size / 1e9:.2f} GB, {edited / 1e9:.2f} billion parameters edited "
        f"(CPU budget: {allowed:.1f} s beyond starting Python)",
        "",
        "| | source | wall, s | range | ratio to cp | CPU, s | peak memory above torch, MiB |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for (name, state), runs in results.items():
        copied = statistics.median(run["wall"] for run in results["cp -r + sync", state])
        walls = [run["wall"] for run in runs]
        wall, cpu = statistics.median(walls), statistics.median(run["cpu"] for run in runs)
        peak = max(run["peak"] for run in runs)
        above = f"{(peak - idle) / 2**20:.0f}" if peak else "-"
        spread = f"{min(walls):.1f} to {max(walls):.1f}"
        lines.append(f"| {name} | {state} | {wall:.1f} | {spread} | {wall / copied:.2f} | {cpu:.1f} | {above} |")
    return lines


def machine() -> str:
    """Processor, cores, memory and disk of this machine, in one line."""
    cpu = Path("/proc/cpuinfo").read_text("utf-8")
    model = next((line.split(":")[1].strip() for line in cpu.splitlines() if "model name" in line), "?")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB memory, torch {torch.__version__}"


if __name__ == "__main__":
    main()
