"""Settings of every test: offline, quiet, two threads where nothing else is said."""

import functools
import gc
import inspect
import itertools
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

gc.disable()  # importing and collecting make next to no garbage; ``pytest_collection_finish`` turns it on again
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads on shared cores: 200 times slower
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("USE_HUB_KERNELS", "0")

import jaxtyping
import jaxtyping._storage
import pytest
import torch
from greenlet import getcurrent
from jaxtyping import install_import_hook

PACKAGE = Path(__file__).parent.parent / "abliterate"
SHAPED = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in sorted(PACKAGE.rglob("*.py"))
    if "from jaxtyping import" in path.read_text("utf-8")
]
"""Modules whose shapes are checked.  Checking all others takes as long as all other work of short tests, and pyright
has checked what it would find."""
CHECKED, EVERY = 8, 127
"""Of the calls of a function in one test, the first so many are checked, and then one in so many: checking is dear."""


def _sparing(plain=jaxtyping.jaxtyped, /):
    """``jaxtyped`` without most calls, and without functions inside of others, which are compiled anew each time."""

    def decorate(its=None, *, typechecker):
        if its is None:
            return functools.partial(decorate, typechecker=typechecker)
        if not inspect.isfunction(its):
            return plain(its, typechecker=typechecker)
        if "<locals>" in its.__qualname__:
            return its
        checked, calls, of = plain(its, typechecker=typechecker), itertools.count(), None

        @functools.wraps(its)
        def called(*args, **kwargs):
            nonlocal calls, of
            if of != _tests.done:
                calls, of = itertools.count(), _tests.done
            number = next(calls)
            return (checked if number < CHECKED or number % EVERY == 0 else its)(*args, **kwargs)

        return called

    return decorate


_tests = SimpleNamespace(done=0)
jaxtyping.jaxtyped = _sparing()
install_import_hook(SHAPED, "beartype.beartype")

from abliterate.model.load import quiet_transformers
from tests import factories, measured

LONG = (
    "newcomer", "run", "memory", "quantised_running", "quarter", "steps", "methods", "scoring", "subspaces", "relay",
    "harness", "patch", "out_of_core", "kill",
)  # fmt: skip
"""Files that take longest, in this order: begun first, none of them is left alone at the end of a parallel run."""


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))


def pytest_collection_finish():
    """Keep modules and tests out of what is searched for garbage, which takes half a second for each model freed."""
    gc.collect()
    gc.freeze()
    gc.enable()


class _OfGreenlets:
    """What jaxtyping knows of the calls that have not ended: of each task, for tasks take turns at them."""

    def __init__(self):
        object.__setattr__(self, "calls", weakref.WeakKeyDictionary())

    def __getattr__(self, name):
        try:
            return self.calls[getcurrent()][name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name, value):
        self.calls.setdefault(getcurrent(), {})[name] = value


jaxtyping._storage._shape_storage = _OfGreenlets()


def pytest_runtest_setup():
    """Shapes are checked anew in each test."""
    _tests.done += 1


@pytest.fixture(autouse=True, scope="session")
def _quiet():
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    undo = quiet_transformers()
    yield
    undo()
    measured.write()


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk():
    """No test outlives the machine, so none needs what it wrote to be on the disk; it is a third of their time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The package as pip builds it from this folder."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    root = Path(__file__).parent.parent
    done = subprocess.run([*command, "--wheel-dir", out, root], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder with a case in bfloat16, made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name.replace(".", "-"))
            made[name] = factories.save(factories.build(name), folder, dtype=torch.bfloat16)
        return made[name]

    return get
