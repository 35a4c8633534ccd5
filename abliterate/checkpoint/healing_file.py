"""The file that holds what healing added to writers: safetensors, never pickle.

Tensors ``NAME.b`` ``[d, k]`` in float64 and ``NAME.a`` ``[k, n]`` in float32, by the name of the writer's tensor.  The
metadata holds one JSON document under ``abliterate-healing``: how it was trained.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialise

from abliterate.checkpoint.output import write_atomically
from abliterate.errors import SourceError
from abliterate.method.weight_edit import LowRank

NAME = "healing.safetensors"
KEY = "abliterate-healing"
HINT = "give the file that healing left in its folder, under abliterate/"


def save(added: Mapping[str, LowRank], path: Path, about: Mapping[str, Any]) -> Path:
    """Write ``added`` to ``path``, with what there is to say ``about`` it."""
    tensors = {f"{name}.{part}": getattr(its, part).contiguous() for name, its in added.items() for part in ("a", "b")}
    write_atomically(path, serialise(tensors, metadata={"format": "pt", KEY: json.dumps(about, sort_keys=True)}))
    return path


def about(path: Path) -> dict[str, Any] | None:
    """What a file says of itself; None where there is no whole one."""
    try:
        with safe_open(path, "pt") as handle:
            return dict(json.loads((handle.metadata() or {})[KEY]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def load(path: Path) -> dict[str, LowRank]:
    """Read what ``save`` wrote.

    Raises:
        SourceError: missing, damaged, or not finite.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{path}: not a readable file of healing ({error})", HINT) from error
    names = sorted({name[:-2] for name in tensors})
    if not names or set(tensors) != {f"{name}.{part}" for name in names for part in ("a", "b")}:
        raise SourceError(f"{path}: its parts do not fit together (not one a and one b for each writer)", HINT)
    found = {name: LowRank(b=tensors[f"{name}.b"], a=tensors[f"{name}.a"]) for name in names}
    for name, its in found.items():
        kinds = (its.b.dtype, its.a.dtype) == (torch.float64, torch.float32)
        if not kinds or its.b.ndim != 2 or its.a.ndim != 2 or its.b.shape[1] != its.a.shape[0]:
            raise SourceError(f"{path}: '{name}' has factors of other shapes or dtypes", HINT)
        if not (torch.isfinite(its.b).all() and torch.isfinite(its.a).all()):
            raise SourceError(f"{path}: '{name}' holds NaN or infinity", HINT)
    return found
