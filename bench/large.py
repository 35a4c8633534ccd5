"""A model of 70 billion parameters rehearsed on this machine: some of its blocks, from holes, out of core.

    python -m bench.large [--layers 3] [--memory-gib 9] [--write docs/large-models.md]

Measured: bytes read, memory, and the time of loading and of running a block, for batches that move together; and how
fast this disk gives up a file that is not cached.  The whole run is computed from these.
"""

import argparse
import os
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch

from abliterate.arch.registry import family_of
from abliterate.checkpoint.directio import Slab, SourceFile
from abliterate.checkpoint.source import open_folder
from abliterate.data.rehearsal import KNOWN, make
from abliterate.model.chat import Batch, left_padded
from abliterate.model.forward import run_batch
from abliterate.model.load import LoadedModel, attach, empty_model
from abliterate.model.lockstep import run_together
from abliterate.model.offload import Offloaded
from abliterate.recipe import Recipe
from abliterate.workflow.estimate import FEW_SCORES, Counts, amounts
from abliterate.workflow.passes import passes_of

NAME = "llama-3-70b"
BATCHES, ROWS, TOKENS = 8, 4, 24
READ_BYTES = 2**31
PIECE = 2**25
NVME_BYTES_PER_SECOND = 3.0e9
"""What a current NVMe disk reads; assumed, not measured here."""
GPU_FLOPS_PER_SECOND = 6e13
"""What a 24 GB card does in bfloat16; assumed, not measured here."""
CACHED_BYTES = 80 * 2 * 8 * 128 * 2
"""Keys and values of a token of Llama-3-70B: layers, both, heads, width, bytes."""
REPLY_TOKENS = 128
MEASURED_PROMPTS = 256
CARD = "a 24 GB card at 60 TFLOP/s and an NVMe disk at 3 GB/s"


STAGES = {
    "measure": "labels, means", "select": "choice", "replies": f"replies of {REPLY_TOKENS} tokens, proof by behaviour",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Rehearsed:
    """One weight pass of all batches through a slice."""

    layers: int
    seconds: float
    bytes_read: int
    peak_bytes: int
    block_bytes: int


def open_slice(folder: Path, memory_bytes: int, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """The slice in ``folder``, its weights on disk, without a tokenizer."""
    checkpoint = open_folder(folder, name=NAME)
    family = family_of(checkpoint.config, where=NAME)
    model = empty_model(checkpoint, dtype)
    model.eval()
    loaded = attach(model, None, family, name=NAME)
    weights = Offloaded(model, checkpoint, loaded.blocks, device=torch.device("cpu"), memory_bytes=memory_bytes)
    return replace(loaded, offload=weights)


def batches() -> list[Batch]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 1000, (BATCHES * ROWS, TOKENS), generator=generator).tolist()
    return list(left_padded(rows, ROWS, 0))


def rehearse(layers: int, memory_bytes: int) -> Rehearsed:
    """Run one weight pass in a process of its own, so that the peak of memory is that of this pass."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_rehearse, layers, memory_bytes).result()


def _rehearse(layers: int, memory_bytes: int) -> Rehearsed:
    with tempfile.TemporaryDirectory() as folder:
        loaded = open_slice(make(replace(KNOWN[NAME], layers=layers, shards=1), Path(folder) / "slice"), memory_bytes)
        started = time.perf_counter()
        run_together(loaded, [lambda batch=batch: run_batch(loaded, batch) for batch in batches()])
        seconds = time.perf_counter() - started
        weights = loaded.offload
        if weights is None:
            raise AssertionError("it stays on disk")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        block = sum(tensor.nbytes for tensor in loaded.blocks[0].parameters()) // 2  # stored in half of float32
        return Rehearsed(
            layers=layers, seconds=seconds, bytes_read=weights.bytes_read, peak_bytes=peak, block_bytes=block
        )


def disk_rate() -> float:
    """Bytes per second of reading a file that is not in the cache, past the cache."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data"
        piece = os.urandom(PIECE)
        with path.open("wb") as file:
            for _ in range(READ_BYTES // PIECE):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        slab = Slab(PIECE)
        started = time.perf_counter()
        with SourceFile(path) as source:
            for start in range(0, READ_BYTES, PIECE):
                source.read(slab, start, PIECE)
        return READ_BYTES / (time.perf_counter() - started)


def hours(seconds: float) -> str:
    """For people."""
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def whole_run(recipe: Recipe, size: float) -> list[str]:
    """What a default run of ``size`` bytes takes, stage by stage, on one machine and on two, with disk and card each.

    A weight pass reads everything on each of them, and two share its arithmetic; they share the shards.  Keys and
    values of all replies wait on disk, and are read in each pass, on the mean half as many as in the end.
    """
    find, test = recipe.find, dict.fromkeys(("harmful", "harmless", "look-alikes"), recipe.find.n_test)
    layers = KNOWN[NAME].layers
    positions = 5  # of Llama 3: what its template puts after an instruction
    counts = Counts(
        prompt_tokens=TOKENS, own_tokens=TOKENS / 2, batch_size=1, train=2 * find.n_train, probed=0, filtered=True,
        label_tokens=find.reply_tokens, harmful_val=find.n_val, harmless_val=find.n_val, scored=FEW_SCORES,
        candidates=positions * (layers - int(layers * find.prune_layers)) * len(find.estimators),
        held_out=2 * find.n_val, test=test, models=2, reply_tokens=recipe.evaluate.max_new_tokens,
    )  # fmt: skip
    passes = passes_of(recipe)
    validated = 2 * find.n_val
    cached = {
        "measure": (counts.train + validated) * (TOKENS + find.reply_tokens / 2),
        "replies": counts.models * sum(test.values()) * (TOKENS + counts.reply_tokens / 2),
    }
    rows, total = [], [0.0, 0.0]
    for stage, its in amounts(counts, ("measure", "select", "replies")).items():
        reading = passes[stage] * (size + CACHED_BYTES * cached.get(stage, 0)) / NVME_BYTES_PER_SECOND
        running = 2 * (size / 2) * (its.prompt_tokens + its.steps) / GPU_FLOPS_PER_SECOND
        rows.append((STAGES[stage], f"{passes[stage]} passes", reading, running))
    rows += [
        ("edit: read and write", "", 2 * size / NVME_BYTES_PER_SECOND, 0.0),
        ("proof on the bytes: read both", "", 2 * size / NVME_BYTES_PER_SECOND, 0.0),
    ]
    lines = [
        f"| computed: a default run, {CARD} (assumed) | | reading | arithmetic | one machine | two such machines |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, count, reading, running in rows:
        one, two = max(reading, running), max(reading if count else reading / 2, running / 2)
        total = [total[0] + one, total[1] + two]
        lines.append(f"| {name} | {count} | {hours(reading)} | {hours(running)} | {hours(one)} | {hours(two)} |")
    return [*lines, f"| all | | | | {hours(total[0])} | {hours(total[1])} |"]


def main() -> None:
    """Measure, compute, print."""
    parser = argparse.ArgumentParser(description="A 70B model rehearsed out of core.")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--memory-gib", type=float, default=9.0)
    parser.add_argument("--write", type=Path, help="replace the figures of this page")
    args = parser.parse_args()
    rate = disk_rate()
    one, more = (rehearse(layers, int(args.memory_gib * 2**30)) for layers in (1, args.layers))
    layer_seconds = (more.seconds - one.seconds) / (more.layers - one.layers)
    shapes = KNOWN[NAME]
    size = shapes.layers * more.block_bytes + 2 * shapes.vocab * shapes.d_model * 2
    prompts = BATCHES * ROWS
    lines = [
        "| measured here | |",
        "|---|--:|",
        f"| blocks of {NAME} run | {more.layers} of {shapes.layers} |",
        f"| prompts x tokens | {prompts} x {TOKENS}, {BATCHES} batches, float32, {torch.get_num_threads()} threads |",
        f"| weights read | {more.bytes_read / 1e9:.2f} GB, each block once: {more.block_bytes / 1e9:.2f} GB a block |",
        f"| memory given | {args.memory_gib:g} GiB |",
        f"| peak memory of the process | {more.peak_bytes / 2**30:.2f} GiB |",
        f"| a block, loaded and run | {layer_seconds:.1f} s (from holes: no disk in it) |",
        f"| this disk, not cached | {rate / 1e9:.2f} GB/s |",
    ]
    recipe = Recipe(max_new_tokens=REPLY_TOKENS, look_alike="bundled:over_refusal")
    passes = passes_of(recipe)
    work = passes["measure"] + passes["select"] + passes["verify"]
    compute = layer_seconds * shapes.layers / (prompts * TOKENS)
    lines += [
        "",
        f"| computed: the whole of {NAME}, {size / 1e9:.0f} GB | a weight pass "
        f"| labels, means, choice ({work} passes) "
        f"| replies of {REPLY_TOKENS} tokens and the proof ({passes['replies']} passes) |",
        "|---|--:|--:|--:|",
    ]
    for name, speed in (
        (f"this disk, {rate / 1e9:.2f} GB/s", rate),
        ("NVMe at 3 GB/s (assumed)", NVME_BYTES_PER_SECOND),
    ):
        read = size / speed
        lines.append(f"| reading, {name} | {hours(read)} | {hours(work * read)} | {hours(passes['replies'] * read)} |")
    tokens = MEASURED_PROMPTS * TOKENS
    on_a_card = 2 * (size / 2) * tokens / GPU_FLOPS_PER_SECOND  # two operations a parameter of two bytes
    what = f"for {MEASURED_PROMPTS} prompts of {TOKENS} tokens"
    lines += [
        f"| arithmetic on these two cores | {hours(compute * tokens)} {what} | | |",
        f"| arithmetic, a 24 GB GPU at 60 TFLOP/s (assumed) | {on_a_card:.0f} s {what} | | |",
    ]
    lines += ["", *whole_run(recipe, size)]
    print("\n".join(lines))
    if args.write:
        page = args.write.read_text("utf-8")
        start, end = "<!-- measured -->", "<!-- end -->"
        before, after = page.split(start)[0], page.split(end)[1]
        args.write.write_text("\n".join([before + start, *lines, end]) + after, "utf-8")


if __name__ == "__main__":
    main()
