"""What the tests of publishing share: a finished folder, a process with a token, a look at its two lines."""

import os
import subprocess
from pathlib import Path

import torch
from safetensors.torch import save_file

import abliterate
from abliterate.checkpoint.direction_file import load
from tests.checkpoints import directions, write_llama
from tests.loopback_hub import Hub
from tests.processes import Running

TOKEN = "hf_averysecrettokenforthistest"
HEAD = b"---\nlicense: other\nlicense_name: terms\nlicense_link: LICENSE\nextra_gated_prompt: Behave.\n---\n# Base\n"


def direction_file(folder: Path, d: int = 32) -> Path:
    path = folder / "d.safetensors"
    save_file({"direction": directions(d)[:, 0].float()}, path)
    return path


def finished(folder: Path, *, verified: bool = True, **options) -> Path:
    """A base in ``folder / "base"``, edited (and verified) to ``folder / "out"``."""
    base = write_llama(folder / "base", **{"shards": 3, "tied": True, "head": False, **options})
    (base / "README.md").write_bytes(HEAD)
    abliterate.edit(base, load(direction_file(folder)), folder / "out")
    if verified:
        assert abliterate.verify(folder / "out").ok
    return folder / "out"


def settings(home: Path, hub: Hub, **environment: str) -> dict[str, str]:
    """The environment of a process that talks to ``hub``, has an empty cache and a token."""
    return {
        **os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home / "home"), "HF_TOKEN": TOKEN, "NO_PROXY": "*",
        "HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": hub.url, "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(abliterate.__file__).parents[1]), **environment,
    }  # fmt: skip


def start(home: Path, hub: Hub, *args: object, **environment: str) -> Running:
    """The command in a process of its own."""
    return Running([*map(str, args)], settings(home, hub, **environment), home)


def run(home: Path, hub: Hub, *args: object, **environment: str) -> subprocess.CompletedProcess:
    """The same, to its end; the token is nowhere in what it says or leaves."""
    with start(home, hub, *args, **environment) as process:
        shown, said = process.communicate(timeout=180)
    assert TOKEN not in shown + said
    assert "Signature" not in said
    assert "thrown while requesting" not in said
    assert "Traceback" not in said
    return subprocess.CompletedProcess(args, process.returncode, shown, said)


def errors(done: subprocess.CompletedProcess) -> list[str]:
    """The two lines of a failure: what came before are notes."""
    lines = done.stderr.splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("error: "))
    assert len(lines) == place + 2, done.stderr
    return lines[place:]


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def bfloat(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).bfloat16()
