"""Settings of every test: offline, quiet, two threads."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads on shared cores: 200 times slower
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("USE_HUB_KERNELS", "0")

import pytest
import torch

from abliterate.model.load import quiet_transformers
from tests import measured


@pytest.fixture(autouse=True, scope="session")
def _quiet():
    torch.set_num_threads(2)
    undo = quiet_transformers()
    yield
    undo()
    measured.write()
