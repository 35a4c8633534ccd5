"""A disk that fails, and runs out of core that are killed: said in words, and gone on with."""

import errno
import hashlib
import json
import os
import random

import pytest
import torch

from abliterate import api
from abliterate.checkpoint import directio
from abliterate.recipe import Recipe
from abliterate.workflow import pipeline
from tests import checkpoints, factories
from tests.edge_tools import run
from tests.test_kill import work_and_die

POINTS = int(os.environ.get("ABLITERATE_KILL_POINTS", "0")) // 25
"""Of a whole run out of core; with ABLITERATE_KILL_POINTS=500, twenty."""
CALLS = ("preadv", "pwritev", "fsync", "rename", "replace", "mkdir")
RECIPE = Recipe(
    **dict.fromkeys(("harmful", "harmless"), "bundled:tiny-chat"), n_train=8, n_val=4, n_test=4, max_new_tokens=6,
    reply_tokens=12, estimators=("difference-of-means",), memory_bytes=2**25 + 2**22,
)  # fmt: skip


def failing(monkeypatch, number, *, after):
    """The disk fails at the read after some others, once."""
    plain, made = directio._read_at, 0

    def read(file, view, place):
        nonlocal made
        made += 1
        if made == after:
            raise OSError(number, os.strerror(number))
        return plain(file, view, place)

    monkeypatch.setattr(directio, "_read_at", read)


@pytest.mark.parametrize("after", [1, 4])
def test_a_disk_that_fails_under_an_edit(after, tmp_path, monkeypatch):
    base = checkpoints.write_llama(tmp_path / "base")
    direction = factories.save_direction(32, tmp_path / "d.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(directio, "O_DIRECT", 0)
        patch.setattr(directio, "NO_WAIT", 0)
        failing(patch, errno.EIO, after=after)
        shown = run("edit", base, direction, "--out", tmp_path / "out")
    assert shown.exit_code == 5
    assert f"{base}{os.sep}model" in shown.stderr
    assert "Input/output error" in shown.stderr
    assert "the disk or network drive fails" in shown.stderr
    assert not (tmp_path / "out").exists()
    assert run("edit", base, direction, "--out", tmp_path / "out").exit_code == 0
    assert run("verify", tmp_path / "out", "--bytes-only").exit_code == 0


def test_a_disk_that_fails_under_a_run_out_of_core(tmp_path, monkeypatch):
    (tmp_path / "few.toml").write_text(RECIPE.to_toml())
    options = ("run", "tiny-chat", "--recipe", tmp_path / "few.toml", "--memory", "36MiB", "--no-eval", "--out")
    with monkeypatch.context() as patch:
        failing(patch, errno.EIO, after=40)
        shown = run(*options, tmp_path / "out")
    assert shown.exit_code == 5
    assert "model-0000" in shown.stderr
    assert "the disk or network drive fails" in shown.stderr
    assert not (tmp_path / "out").exists()
    assert run(*options, tmp_path / "out").exit_code == 0


def content(folder):
    """All but times of day and rates, which the manifest, the card and the direction's file hold."""
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
    document = json.loads((folder / "abliterate.json").read_text("utf-8"))
    return found, document["edit"], document["direction"]["choice"], document["evaluation"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 needs POSIX processes")
def test_a_run_out_of_core_killed_anywhere_is_continued(tmp_path):
    """To the same bytes and the same evaluation."""
    torch.set_num_threads(1)

    def work(out):
        return lambda: pipeline.run(None, out, RECIPE)

    killed, calls = work_and_die(work(tmp_path / "whole"), fatal=-1, names=CALLS)
    assert not killed
    expected = content(tmp_path / "whole")
    points = random.Random(0).sample(range(calls // 10, calls), max(1, POINTS))
    for point in points:
        out = tmp_path / f"out-{point}"
        killed, _ = work_and_die(work(out), fatal=point, names=CALLS)
        assert killed
        assert not (out.exists() and out.with_name(f"{out.name}.partial").exists())
        if not out.exists():
            work(out)()
        assert content(out) == expected
    assert api.verify(tmp_path / "whole").ok
