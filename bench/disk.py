"""How fast are weights read that are not in the page cache?

    python -m bench.disk [MODEL] [--memory 1400MiB] [--rounds 5] [--write PAGE]

Side by side, in turns: ``dd iflag=direct bs=16M`` over the shards, and weight passes of MODEL out of core, of one short
prompt, so that arithmetic is next to nothing: past the page cache, as a model is read that is larger than it, and
through it, as others are.  Before each, the page cache is told to forget the shards.  Without MODEL, five blocks of
Llama-3-8B's shapes with random weights are written and read.
"""

import argparse
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

from abliterate.checkpoint.output import write_atomically
from abliterate.checkpoint.source import open_folder
from abliterate.cli.options import parse_size
from abliterate.data.rehearsal import KNOWN, make
from abliterate.model.chat import Batch, left_padded
from abliterate.model.forward import run_batch
from abliterate.model.load import LoadedModel
from abliterate.model.lockstep import run_together
from bench.edit_speed import machine
from bench.large import open_slice
from bench.page_parts import table

SHAPES, BLOCKS = "llama-3-8b", 5
PAGE = """# Reading weights from a disk

Written by `make bench-disk`: weight passes over {model} ({size:,.0f} MB) that stay on disk,
on {memory} of memory, none of it in the page cache before; beside it `dd iflag=direct bs=16M` over the same files, in
turns. Median of {rounds} rounds. An embedding is not in the pass: its rows are looked up one by one. Arithmetic is
little: one row of three tokens in bfloat16. A model that is larger than the page cache is read past it; others are read
through it, so that it keeps them for the next pass.

{rows}
Machine: {machine}.
"""


def forgotten(shards: Sequence[Path]) -> None:
    """Have the page cache forget files."""
    for shard in shards:
        file = os.open(shard, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def timed(work: Callable[[], object], shards: Sequence[Path]) -> float:
    """Seconds of ``work``, the files not cached before."""
    forgotten(shards)
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def copied(shards: Sequence[Path]) -> None:
    """Read files with ``dd``."""
    for shard in shards:
        words = ["dd", f"if={shard}", "of=/dev/null", "bs=16M", "iflag=direct"]
        subprocess.run(words, check=True, capture_output=True)


def passed(loaded: LoadedModel, batch: Batch) -> None:
    """One weight pass."""
    run_together(loaded, [lambda: run_batch(loaded, batch)])


def main() -> None:
    """Measure, print, and write the page where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--memory", default="1400MiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("out/disk"))
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    folder = args.model or args.work / "shapes"
    if not folder.is_dir():
        make(replace(KNOWN[SHAPES], layers=BLOCKS, shards=1, vocab=4096), folder, fill=True)
    checkpoint = open_folder(folder, name=folder.name)
    shards = [checkpoint.folder / shard.name for shard in checkpoint.shards]
    opened = {}
    for name, past_cache in (("a weight pass, past the page cache", True), ("a weight pass, through it", False)):
        with patch("abliterate.model.offload.is_beyond_cache", lambda *_, its=past_cache: its):
            opened[name] = open_slice(folder, parse_size(args.memory), dtype=torch.bfloat16)
    (batch,) = left_padded([[5, 6, 7]], 1, 0)
    works: dict[str, Callable[[], object]] = {"dd": lambda: copied(shards)}
    sizes = {"dd": sum(shard.stat().st_size for shard in shards)}
    for name, loaded in opened.items():
        weights = loaded.offload
        if weights is None:
            raise AssertionError("it stays on disk")
        works[name] = partial(passed, loaded, batch)
        works[name]()  # what is read once and stays, is read here
        before = weights.bytes_read
        works[name]()
        sizes[name] = weights.bytes_read - before
    rounds = [[timed(work, shards) for work in works.values()] for _ in range(args.rounds)]
    medians = dict(zip(works, (statistics.median(times) for times in zip(*rounds, strict=True)), strict=True))
    rates = {name: sizes[name] / its for name, its in medians.items()}
    rows = table(
        ("", "bytes, MB", "seconds", "MB/s", "against dd"),
        [
            (
                name, f"{sizes[name] / 1e6:,.0f}", f"{its:.2f}", f"{rates[name] / 1e6:,.0f}",
                f"{rates[name] / rates['dd']:.2f}",
            )
            for name, its in medians.items()
        ],
    )  # fmt: skip
    page = PAGE.format(
        model=args.model.name if args.model else f"{BLOCKS} blocks of the shapes of {SHAPES}",
        size=sizes["dd"] / 1e6,
        memory=args.memory,
        rounds=args.rounds,
        rows=rows,
        machine=machine(),
    )
    print(page)
    if args.write:
        write_atomically(args.write, page.encode())


if __name__ == "__main__":
    main()
