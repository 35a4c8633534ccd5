"""What it costs to edit a quantised matrix in its own format.

    python -m bench.quantised [--write docs/quantised.md]

One matrix of gpt-oss' width for each format, normal weights, a direction with equal and one with very unequal
components, and a matrix that writes ten times as much along it.  Compared: what the tool does, and two simpler ways.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from abliterate.arch.codecs import E2M1, EXPONENT_BIAS, Codec, Mxfp4, fp8_codec
from abliterate.editing.blocks import TensorEdit, Workspace
from abliterate.method.edits import apply, orthogonal

D, N = 2880, 1024
FORMATS = {
    "FP8 E4M3, 128 x 128": (torch.float8_e4m3fn, (128, 128)),
    "FP8 E4M3, rows": (torch.float8_e4m3fn, (1, N)),
    "FP8 E4M3, tensor": (torch.float8_e4m3fn, (D, N)),
    "FP8 E5M2, 128 x 128": (torch.float8_e5m2, (128, 128)),
    "MXFP4": (None, (1, 32)),
}
DIRECTIONS = {"equal": 0.0, "unequal": 1.0}
WAYS = ("ours", "nearest, old scales", "nearest, own scales")


@dataclass(frozen=True, kw_only=True)
class Row:
    """Relative distance to the exact edit, and the share of what was there along ``r`` that is left, of each way.

    ``unedited`` is the distance that quantising the weights costs in the first place.
    """

    name: str
    direction: str
    boost: int
    unedited: float
    error: dict[str, float]
    left: dict[str, float]


def own_scales(w: torch.Tensor, kind: torch.dtype | None, block: tuple[int, int]) -> torch.Tensor:
    """The scales a quantiser would give ``w``: the largest value of a block becomes the format's largest."""
    rows, n = w.shape
    padded = torch.zeros(math.ceil(rows / block[0]) * block[0], math.ceil(n / block[1]) * block[1])
    padded[:rows, :n] = w
    largest = padded.view(-1, block[0], padded.shape[1] // block[1], block[1]).abs().amax((1, 3))
    if kind is None:
        exponents = torch.floor(torch.log2(largest)) - math.floor(math.log2(E2M1[-1]))
        return (exponents + EXPONENT_BIAS).to(torch.uint8)
    return largest / torch.finfo(kind).max


def codec_for(w: torch.Tensor, kind: torch.dtype | None, block: tuple[int, int]) -> Codec:
    """A codec with ``own_scales``."""
    scales = own_scales(w, kind, block)
    if kind is None:
        return Mxfp4(w.shape[1], lambda: scales)
    return fp8_codec(kind, tuple(w.shape), scales, block)


def stored(codec: Codec, w: torch.Tensor) -> torch.Tensor:
    """``w``, rounded to nearest."""
    return codec.codes(w, torch.arange(len(w)))


def rows() -> Iterator[Row]:
    """Every format and direction."""
    for name, (kind, block) in FORMATS.items():
        for direction, spread in DIRECTIONS.items():
            for boost in (1, 10):
                yield measure(name, kind, block, direction, spread, boost)


def measure(
    name: str, kind: torch.dtype | None, block: tuple[int, int], direction: str, spread: float, boost: int
) -> Row:
    """One row."""
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(D, generator=generator) * torch.exp(spread * torch.randn(D, generator=generator))
    r = (r / r.norm())[:, None]
    raw = torch.randn(D, N, generator=generator)
    raw += (boost - 1) * r * (r.T @ raw)
    codec = codec_for(raw, kind, block)
    base = stored(codec, raw)
    w = codec.decode(base, 0, torch.float32)
    exact = apply(w.double(), orthogonal(r.double()))
    ours = base.clone()
    TensorEdit.of(name, orthogonal(r.double()), codec, Workspace()).edit_columns(ours, 0)
    other = codec_for(exact.float(), kind, block)
    results = {
        "ours": codec.decode(ours, 0, torch.float64),
        "nearest, old scales": codec.decode(stored(codec, exact.float()), 0, torch.float64),
        "nearest, own scales": other.decode(stored(other, exact.float()), 0, torch.float64),
    }
    there = float((r.double().T @ w.double()).norm())
    return Row(
        name=name,
        direction=direction,
        boost=boost,
        unedited=float((w - raw).norm() / raw.norm()),
        error={way: float((q - exact).norm() / w.double().norm()) for way, q in results.items()},
        left={way: float((r.double().T @ q).norm()) / there for way, q in results.items()},
    )


def main() -> None:
    """Measure and print, or write the page."""
    parser = argparse.ArgumentParser(description="What it costs to edit a quantised matrix in its own format.")
    parser.add_argument("--write", type=Path, help="replace the table of this page")
    args = parser.parse_args()
    heads = [f"{what}: {way}" for what in ("error", "left") for way in WAYS]
    lines = [f"| format | r | along r | quantising | {' | '.join(heads)} |", "|---|---|--:|--:|" + "--:|" * len(heads)]
    for row in rows():
        errors = " | ".join(f"{row.error[way]:.1%}" for way in WAYS)
        left = " | ".join(f"{row.left[way]:.0e}" for way in WAYS)
        lines.append(f"| {row.name} | {row.direction} | {row.boost} x | {row.unedited:.1%} | {errors} | {left} |")
        print(lines[-1], flush=True)
    if args.write:
        page = args.write.read_text("utf-8")
        start, end = "<!-- measured -->", "<!-- end -->"
        before, after = page.split(start)[0], page.split(end)[1]
        args.write.write_text("\n".join([before + start, *lines, end]) + after, "utf-8")


if __name__ == "__main__":
    main()
