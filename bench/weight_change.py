"""How much of a checkpoint's weights an edit changed, in norm."""

from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from abliterate.data.bundled import resolve_model


def weight_change(base: str | Path, edited: Path) -> float:
    """The Frobenius norm of what changed, over that of all weights of ``base``.

    Read from the bytes of both checkpoints, one tensor at a time, and summed in float64.  A head that an edit unties is
    no change: it holds what the base used there.
    """
    changed = whole = 0.0
    for before, after in _pairs(Path(resolve_model(base)), edited):
        whole += float(before.double().square().sum())
        changed += float((after.double() - before.double()).square().sum())
    return (changed / whole) ** 0.5


def _pairs(base: Path, edited: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Every tensor of ``base``, before and after; an edit keeps the names of shards."""
    for shard in sorted(base.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as one, safe_open(edited / shard.name, framework="pt") as other:
            for name in one.keys():  # noqa: SIM118 - not a dict
                yield one.get_tensor(name), other.get_tensor(name)
