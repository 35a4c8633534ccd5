"""Which device computes."""

from typing import Literal

import torch

from abliterate.errors import UsageError
from abliterate.model.ranks import on_this_machine

Device = Literal["auto", "cpu", "cuda", "mps"] | str


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


def own_card(cards: int) -> str:
    """Which of ``cards`` this process computes on: others of its machine take others."""
    number, here = on_this_machine()
    return "cuda" if here == 1 else f"cuda:{number % cards}"
