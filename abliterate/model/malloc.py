"""Having glibc's malloc return memory: by itself it keeps holes between what is still used, and they add up.

Where batches take turns, each leaves a small state behind in a hole that the large tensors of the next one would have
filled; a hundred of them take up as much again as their weights.  Elsewhere than on Linux nothing is done.
"""

import ctypes
import os
import sys
from functools import cache
from typing import Any

M_MMAP_THRESHOLD = -3
OWN_PAGES_BYTES = 2**20
"""From this size on, an allocation has pages of its own, which go back when it is freed.  malloc's own limit grows up
to 32 MiB."""


def keep_no_holes() -> None:
    """Give large allocations pages of their own from now on, in the whole process, unless the environment says how."""
    call = _function("mallopt")
    if call is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        call(M_MMAP_THRESHOLD, OWN_PAGES_BYTES)


def give_back() -> None:
    """Return what was freed."""
    call = _function("malloc_trim")
    if call is not None:
        call(0)


@cache
def _function(name: str) -> Any:  # noqa: ANN401 - a C function, or None
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
