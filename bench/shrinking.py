"""Memory that shrinks under a run out of core: is it gone on with, and with the same result?

    python -m bench.shrinking            # Linux, as root: it makes a control group

The bundled model, made larger (``bench.quarter``), is run in a control group whose limit is lowered in the middle: once
to what the process has, so that the page cache goes; and once while it needs more, so that the system kills it, after
which the same command continues.  Bytes and evaluation are held against those of a run that was left alone.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.checkpoint.hashes import sha256_file
from bench.quarter import RECIPE, enlarged

GROUPS = Path("/sys/fs/cgroup")
MEMORY = "96MiB"
SPARE_BYTES = 2**22
STARTED_S = 2.0
SHARES = (0.5,)
"""Of the time of a whole run, after which the limit is lowered."""


@dataclass(frozen=True)
class Group:
    """A control group of version 1 or 2."""

    folder: Path

    @classmethod
    def made(cls) -> "Group":
        """A new one."""
        above = GROUPS if (GROUPS / "cgroup.controllers").exists() else GROUPS / "memory"
        folder = above / f"abliterate-{os.getpid()}"
        folder.mkdir()
        return cls(folder)

    def limit(self, size_bytes: int) -> bool:
        """Set the limit; whether the system could."""
        name = "memory.max" if (self.folder / "memory.max").exists() else "memory.limit_in_bytes"
        try:
            (self.folder / name).write_text(str(size_bytes))
        except OSError:
            return False
        return True

    @property
    def anonymous_bytes(self) -> int:
        """What is no page cache."""
        rows = dict(line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        return int(rows.get("anon", 0)) or int(rows.get("total_rss", 0))

    def enter(self) -> None:
        """The calling process belongs to it."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))


def started(group: Group, base: Path, recipe: Path, out: Path) -> subprocess.Popen[str]:
    """``abliterate run`` in ``group``."""
    words = ["-m", "abliterate", "run", str(base), "--recipe", str(recipe), "--out", str(out), "--memory", MEMORY]
    return subprocess.Popen(
        [sys.executable, *words, "--device", "cpu"], preexec_fn=group.enter, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def content(out: Path) -> tuple[dict[str, str], Any, Any]:
    """All but times of day and rates."""
    document = json.loads((out / "abliterate.json").read_text("utf-8"))
    files = {path.name: sha256_file(path) for path in sorted(out.glob("*.safetensors")) if "model" in path.name}
    return files, document["direction"]["choice"], document["evaluation"]


def lowered(process: subprocess.Popen[str], group: Group, after_s: float, limit: Callable[[], int]) -> list[str]:
    """Let ``process`` run for so long, and then lower the limit as soon as the system can; what was done."""
    begun = time.perf_counter()
    while process.poll() is None:
        time.sleep(0.5)
        if time.perf_counter() - begun > after_s and group.limit(size := limit()):
            return [f"limit lowered to {size / 2**20:.0f} MiB after {after_s:.0f} s"]
    return []


def main() -> None:
    """Run, lower, compare, print."""
    group = Group.made()
    try:
        with tempfile.TemporaryDirectory() as name:
            _compare(group, Path(name))
    finally:
        group.folder.rmdir()


def _compare(group: Group, work: Path) -> None:
    recipe, base = work / "recipe.toml", enlarged(work / "base")
    recipe.write_text(RECIPE)
    begun = time.perf_counter()
    alone = started(group, base, recipe, work / "alone")
    alone.communicate()
    whole_s, expected = time.perf_counter() - begun, content(work / "alone")
    print(f"left alone: {whole_s:.0f} s", flush=True)
    for share in SHARES:
        for name, limit in (
            ("to what it has", lambda: group.anonymous_bytes + 16 * SPARE_BYTES),
            ("below what it needs", lambda: max(2**28, group.anonymous_bytes - 16 * SPARE_BYTES)),
        ):
            out = work / f"{name}-{share}".replace(" ", "-")
            process = started(group, base, recipe, out)
            said = lowered(process, group, max(STARTED_S, share * whole_s), limit)
            error = (process.communicate()[1] or "").strip().splitlines()
            ended = f"exit code {process.returncode}"
            group.limit(2**40)
            if process.returncode:
                said.append(f"{ended}: {error[-1] if error else 'nothing said'}")
                again = started(group, base, recipe, out)
                again.communicate()
                ended = f"continued, exit code {again.returncode}"
            same = "the same" if content(out) == expected else "NOT the same"
            print(f"{name}: {'; '.join([*said, ended])}; result {same}", flush=True)


if __name__ == "__main__":
    main()
