"""Around training by PEFT and TRL, whatever is trained: their random numbers, and what they say of each other."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_random_numbers(seed: int) -> Iterator[None]:
    """Run with the random numbers of ``seed``, where a library draws them from torch's own generators."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Run without what training libraries say of each other's old names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
