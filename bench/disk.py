"""How fast are weights read that are not in the page cache?

    python -m bench.disk MODEL [--memory 700MiB] [--rounds 3] [--write PAGE]

Side by side, in turns: ``dd iflag=direct bs=16M`` over the shards, and weight passes of MODEL out of core, of one short
prompt, so that arithmetic is next to nothing: past the page cache, as a model is read that is larger than it, and
through it, as others are.  Before each, the page cache is told to forget the shards.
"""

import argparse
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from unittest.mock import patch

from abliterate.checkpoint.opening import open_checkpoint
from abliterate.checkpoint.output import write_atomically
from abliterate.cli.options import parse_size
from abliterate.model.chat import Batch, ChatFormat, left_padded
from abliterate.model.forward import run_batch
from abliterate.model.load import LoadedModel, load_model
from abliterate.model.lockstep import run_together
from bench.edit_speed import machine
from bench.page_parts import table

PAGE = """# Reading weights from a disk

Written by `make bench-disk`: a weight pass over {model} ({size:,.0f} MB) that stays on disk, on {memory} of memory,
none of it in the page cache before; beside it `dd iflag=direct bs=16M` over the same files, in turns. Median of
{rounds} rounds. An embedding is not in the pass: its rows are looked up one by one. A model that is larger than the
page cache is read past it; others are read through it, so that it keeps them for the next pass.

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
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", default="700MiB")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.model)
    shards = [checkpoint.folder / shard.name for shard in checkpoint.shards]
    opened = {}
    for name, past_cache in (("a weight pass, past the page cache", True), ("a weight pass, through it", False)):
        with patch("abliterate.model.offload.is_beyond_cache", lambda *_, its=past_cache: its):
            opened[name] = load_model(checkpoint, device="cpu", dtype=args.dtype, memory_bytes=parse_size(args.memory))
    works: dict[str, Callable[[], object]] = {"dd": lambda: copied(shards)}
    sizes = {"dd": sum(shard.stat().st_size for shard in shards)}
    for name, loaded in opened.items():
        if loaded.offload is None:
            raise SystemExit(f"{args.memory} holds all weights: give less")
        chat = ChatFormat(loaded.tokenizer)
        (batch,) = left_padded([chat.encode("Hi")], 1, chat.pad_id)
        works[name] = partial(passed, loaded, batch)
        works[name]()  # what is read once and stays, is read here
        before = loaded.offload.bytes_read
        works[name]()
        sizes[name] = loaded.offload.bytes_read - before
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
        model=args.model.name,
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
