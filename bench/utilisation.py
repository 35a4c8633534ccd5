"""How much of a device's arithmetic do measuring and selecting use?

    python -m bench.utilisation [--layers 4] [--device cuda] [--dtype bfloat16] [--write docs/utilisation.md]

Blocks of Llama-3-8B's shapes with random weights, embedding and head included; prompts of the contrast set behind a
system prompt.  What a stage needs of multiplications is counted, its time is taken, and both are set against the
fastest product of two square matrices on the same device, in the same dtype and the same process.
"""

import argparse
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import nn

from abliterate.checkpoint.source import open_folder
from abliterate.cli.options import parse_size
from abliterate.data.rehearsal import KNOWN, Shapes
from abliterate.method.estimators import difference_of_means
from abliterate.method.moments import ActivationStats, Moments
from abliterate.model.chat import ChatFormat
from abliterate.model.load import LoadedModel, load_model, quiet_transformers
from abliterate.model.measuring import Filtered, Validation, measure_class, score_candidates
from abliterate.model.prefix import shared_tokens
from abliterate.model.prompts import SplitSizes, contrast_set
from bench.edit_speed import machine
from bench.page_parts import table
from bench.selection import SYSTEM, make_model

NAME = "llama-3-8b"
REFUSAL_IDS = (20, 21, 22)
"""Of random weights any tokens will do."""
SIDE = {"cpu": 4096, "cuda": 16384, "mps": 4096}
"""Of the square matrices whose product is the measure."""
PAGE = """# How much of a device is used

Written by `make bench-utilisation`. {layers} of 32 blocks of Llama-3-8B's shapes with random weights, embedding and
head (128,256 rows) included, held in {dtype} on {device}; prompts of {tokens:.0f} tokens in the mean, {shared} of them
the same in all.
**{missing}**

{table}
- The measure is the fastest of some products of two matrices of {side} x {side} numbers, in the same process:
  {peak} FLOP/s. A block's largest product on a batch of prompts ({rows} rows) reaches {inner} of it.
- Counted is what a stage needs: two operations for each weight of the blocks and each token of a prompt. Padding,
  norms, hooks, attention itself (below 0.1 % at this length) and, in measuring, logits take time and count for nothing.
  In selecting, the products of the blocks as they are run count: tokens that all prompts share once for each
  candidate, additions from their block on (tokens are those of a block in the mean), and one row of logits for each
  prompt and candidate.
- On a card the goal is 50 % or more.
- Fewer blocks make embedding and head a larger share of the time than they are in the whole model.

Machine: {machine}.
"""
MISSING = (
    'Figures of a card are missing: none was at hand. `ARGS="--device cuda --dtype bfloat16 --layers 32"` makes them.'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What a stage did: ``work`` in FLOP, ``tokens`` that entered a block, and seconds."""

    name: str
    what: str
    work: float
    tokens: int
    seconds: float


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device-memory", help="of each card, such as 20GiB; what does not fit is streamed")
    parser.add_argument("--prompts", type=int, default=32, help="of each class that are measured")
    parser.add_argument("--validation", type=int, default=8, help="of each class that candidates are scored on")
    parser.add_argument("--candidates", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--work", type=Path, default=Path("out/bench-utilisation"))
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    quiet_transformers()
    shutil.rmtree(args.work, ignore_errors=True)
    folder = make_model(shapes(args.layers), args.work)
    given = None if args.device_memory is None else parse_size(args.device_memory)
    loaded = load_model(open_folder(folder, name=NAME), device=args.device, dtype=args.dtype, device_bytes=given)
    chat = ChatFormat(loaded.tokenizer, system=SYSTEM, name=NAME)
    stages = [*run(loaded, chat, args)]
    place, kind = loaded.device, loaded.embedding.weight.dtype
    side = SIDE[place.type]
    peak = product(place, kind, side, side, side)
    encoded = [chat.encode(prompt) for prompt in texts(args.prompts, "train")[0]]
    rows = min(args.batch_size, len(encoded)) * round(statistics.mean(map(len, encoded)))
    inner = product(place, kind, rows, KNOWN[NAME].d_model, KNOWN[NAME].d_ff)
    shutil.rmtree(args.work)
    page = PAGE.format(
        layers=args.layers, dtype=str(kind).removeprefix("torch."), device=device_name(place),
        tokens=statistics.mean(map(len, encoded)), shared=shared_tokens(encoded), table=report(stages, peak), side=side,
        peak=scaled(peak), rows=rows, inner=f"{100 * inner / peak:.0f} %", machine=machine(),
        missing=MISSING if place.type == "cpu" else "",
    ).replace("\n****\n", "\n")  # fmt: skip
    print(page)
    if args.write:
        args.write.write_text(page, "utf-8")


def shapes(layers: int) -> Shapes:
    """Llama-3-8B's, with fewer layers."""
    return replace(cast(Shapes, KNOWN[NAME]), layers=layers, shards=1)


def texts(count: int, part: str) -> tuple[list[str], list[str]]:
    """Harmful and harmless prompts of a part of the contrast set."""
    sizes = SplitSizes(train=64, val=32, test=0)
    sets = contrast_set("bundled:contrast", "bundled:contrast", sizes=sizes, seed=0)
    pair = (sets.harmful_train, sets.harmless_train) if part == "train" else (sets.harmful_val, sets.harmless_val)
    harmful, harmless = (list(one.texts)[:count] for one in pair)
    if min(len(harmful), len(harmless)) < count:
        raise SystemExit(f"there are {min(len(harmful), len(harmless))} prompts of each class")
    return harmful, harmless


def run(loaded: LoadedModel, chat: ChatFormat, args: argparse.Namespace) -> Iterator[Stage]:
    """Class means, and then scores of candidates made of them; each once before, on little, so that all is warm."""
    training = dict(zip(("harmful", "harmless"), texts(args.prompts, "train"), strict=True))
    measure_class(loaded, chat, training["harmful"][:4], batch_size=args.batch_size, task="warm up")
    tokens = sum(len(chat.encode(prompt)) for its in training.values() for prompt in its)
    started = time.perf_counter()
    means = {
        kind: measure_class(loaded, chat, its, batch_size=args.batch_size, task="measure")["mean"]
        for kind, its in training.items()
    }
    seconds = time.perf_counter() - started
    each = sum(
        2 * its.weight.numel() for block in loaded.blocks for its in block.modules() if isinstance(its, nn.Linear)
    )
    what = f"class means of {2 * args.prompts} prompts, batches of {args.batch_size}"
    yield Stage(name="measure", what=what, work=float(each * tokens), tokens=tokens, seconds=seconds)

    moments = {kind: Moments(count=args.prompts, mean=mean) for kind, mean in means.items()}
    stats = ActivationStats(positions=chat.positions, moments=moments)
    measured = [one for one in difference_of_means(stats) if one.layer]  # the embedding of one token has no difference
    step = max(1, len(measured) // args.candidates)
    candidates = measured[::step][: args.candidates]
    harmful, harmless = texts(args.validation, "val")
    prompts = Filtered(
        harmful=tuple(harmful), harmless=tuple(harmless), harmful_before=len(harmful), harmless_before=len(harmless)
    )
    on = Validation(prompts=prompts, refusal_ids=REFUSAL_IDS)
    score_candidates(loaded, chat, candidates[:1], on, batch_size=args.batch_size)
    with counted(loaded) as done:
        started = time.perf_counter()
        score_candidates(loaded, chat, candidates, on, batch_size=args.batch_size)
        seconds = time.perf_counter() - started
    what = f"all scores of {len(candidates)} candidates on {2 * args.validation} prompts"
    yield Stage(name="select", what=what, work=float(done["work"]), tokens=done["tokens"], seconds=seconds)


@contextmanager
def counted(loaded: LoadedModel) -> Iterator[dict[str, int]]:
    """What linear layers are given, while this is entered: FLOP, and tokens in the mean of blocks; none is padding."""
    done, entered = {"work": 0, "tokens": 0}, 0
    firsts = {next(its for its in block.modules() if isinstance(its, nn.Linear)) for block in loaded.blocks}

    def see(layer: nn.Module, inputs: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        rows = inputs[0].numel() // inputs[0].shape[-1]
        done["work"] += 2 * rows * layer.weight.numel()  # pyright: ignore[reportCallIssue]
        nonlocal entered
        entered += rows * (layer in firsts)
        done["tokens"] = entered // loaded.n_layers

    handles = [its.register_forward_hook(see) for its in loaded.model.modules() if isinstance(its, nn.Linear)]
    try:
        yield done
    finally:
        for handle in handles:
            handle.remove()


def product(device: torch.device, dtype: torch.dtype, rows: int, inner: int, columns: int) -> float:
    """FLOP per second of the fastest of some products ``[rows, inner] @ [inner, columns]``."""
    a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((rows, inner), (inner, columns)))
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    fastest = float("inf")
    for _ in range(5):
        wait(device)
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        wait(device)
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * rows * inner * columns / fastest


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def device_name(device: torch.device) -> str:
    """For people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"the {device.type.upper()}"


def scaled(rate: float) -> str:
    """FLOP per second, for people."""
    return f"{rate / 1e12:.1f} T" if rate >= 1e12 else f"{rate / 1e9:.0f} G"


def report(stages: list[Stage], peak: float) -> str:
    """The table."""
    rows = [
        (
            one.name, one.what, f"{one.tokens:,}", f"{one.work / 1e12:.1f}", f"{one.seconds:.1f}",
            scaled(one.work / one.seconds), f"**{100 * one.work / one.seconds / peak:.0f} %**",
        )
        for one in stages
    ]  # fmt: skip
    return table(("stage", "what", "tokens", "TFLOP", "seconds", "FLOP/s", "of the device's own"), rows, left=2)


if __name__ == "__main__":
    main()
