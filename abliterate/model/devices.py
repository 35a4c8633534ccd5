"""Which device computes."""

import platform
from typing import Literal

import torch

from abliterate.errors import UsageError
from abliterate.model.ranks import on_this_machine

Device = Literal["auto", "cpu", "cuda", "mps"] | str
X86 = ("x86_64", "amd64")
"""What ``platform.machine`` calls it, in small letters."""


def resolve_device(device: Device) -> torch.device:
    """The device meant by ``device``.

    Raises:
        UsageError: unknown or not available here.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device(own_card(torch.cuda.device_count()))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device {device!r} is unknown", "use auto, cpu, cuda, cuda:N or mps") from error
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(place.type, False):
        raise UsageError(f"device {device!r} is not available on this machine", "use --device auto or cpu")
    return place


def slowness(place: torch.device, dtype: torch.dtype | str) -> str | None:
    """What is to be said where ``dtype`` is one that the processor computes in software; None: nothing.

    Only x86 is known: a Xeon without AVX512-BF16 ran a model of 0.5B parameters 13 times slower in bfloat16.
    """
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if place.type != "cpu" or dtype != torch.bfloat16 or platform.machine().lower() not in X86 or known is None:
        return None
    said = "this processor has no arithmetic for bfloat16: float32 takes twice the memory, and may be ten times faster"
    return None if known() else said


def own_card(cards: int) -> str:
    """Which of ``cards`` this process computes on: others of its machine take others."""
    number, here = on_this_machine()
    return "cuda" if here == 1 else f"cuda:{number % cards}"
