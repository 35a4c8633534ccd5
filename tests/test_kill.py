"""``kill -9`` at any moment: the same command finishes the work, redoing one shard at most, to the same bytes."""

import hashlib
import os
import random
import signal

import pytest
import torch

from abliterate import api
from abliterate.method.directions import given
from tests import factories

FEW_POINTS = 50
POINTS = int(os.environ.get("ABLITERATE_KILL_POINTS", FEW_POINTS))
CALLS = ("pwritev", "fsync", "rename", "replace", "mkdir")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 needs POSIX processes")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Small shards, tied: a header, an index and a configuration change as well; more shards for more points."""
    folder = tmp_path_factory.mktemp("kill") / "base"
    model, shard = factories.build("llama-tied"), "20KB"
    if POINTS > FEW_POINTS:
        model.config.num_hidden_layers, shard = 8, "5KB"
        model = type(model)(model.config)
    return factories.save(model, folder, dtype=torch.bfloat16, shard=shard)


def direction():
    return given(factories.random_directions(48).float()[:, 0])


def edit_and_die(base, out, fatal):
    """Edit, until killed."""
    return work_and_die(lambda: api.edit(base, direction(), out), fatal)


def work_and_die(work, fatal, names=CALLS):
    """Work in a child process that is killed just before its ``fatal``-th system call; returns the calls made."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # worker threads do not survive a fork
        made = 0

        def counted(call):
            def wrapper(*args, **kwargs):
                nonlocal made
                if made == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                made += 1
                return call(*args, **kwargs)

            return wrapper

        for name in names:
            setattr(os, name, counted(getattr(os, name)))
        status = 1
        try:
            work()
            status = 0
        finally:
            os.write(write_end, str(made).encode())
            os._exit(status)
    _, status = os.waitpid(child, 0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        return os.WIFSIGNALED(status), int(pipe.read() or 0)


def content(folder):
    """Everything but the manifest, which holds the time of day."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "abliterate.json"
    }


def test_killed_anywhere_and_finished_by_the_same_command(base, tmp_path):
    killed, calls = edit_and_die(base, tmp_path / "whole", fatal=-1)
    assert not killed
    assert calls > POINTS
    whole = content(tmp_path / "whole")
    ends = {*range(8), *range(calls - 8, calls)}  # where folders are made and get their names
    points = sorted({*random.Random(0).sample(range(calls), min(POINTS, calls)), *ends})
    for point in points:
        out = tmp_path / f"out-{point}"
        killed, _ = edit_and_die(base, out, fatal=point)
        assert killed
        partial = tmp_path / f"out-{point}.partial"
        if out.exists():  # killed after the last rename
            assert not partial.exists()
            assert content(out) == whole
            continue
        kept = (
            {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")} if partial.exists() else {}
        )
        finished = api.edit(base, direction(), out)
        redone = [name for name, time in kept.items() if (out / name).stat().st_mtime_ns != time]
        assert len(redone) <= 1
        assert finished.out == out
        assert content(out) == whole
        assert not partial.exists()
    assert {path.name.split("-")[0] for path in tmp_path.iterdir()} == {"whole", "out"}


def test_a_source_that_changed_meanwhile_is_noticed(base, tmp_path):
    from abliterate.errors import OutputError

    killed, _ = edit_and_die(base, tmp_path / "out", fatal=30)
    assert killed
    shard = next(iter(base.glob("*.safetensors")))
    os.utime(shard)
    with pytest.raises(OutputError, match="another run"):
        api.edit(base, direction(), tmp_path / "out")
