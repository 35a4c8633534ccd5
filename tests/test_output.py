"""The output folder: complete or not there, resumable, and never in the way of anything else."""

import errno
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from abliterate.checkpoint import directio, output
from abliterate.checkpoint.output import JOURNAL, prepare
from abliterate.editing.planning import plan
from abliterate.editing.writing import edit_checkpoint
from abliterate.errors import InterruptedRunError, NonFiniteError, NotEnoughDiskError, OutputError
from tests import checkpoints
from tests.checkpoints import directions, without, write_llama


def ready(final, source, *, fingerprint="one", needed_bytes=0):
    return prepare(final, source=source, fingerprint=fingerprint, needed_bytes=needed_bytes)


def refused(final, source, says, kind=OutputError, **options):
    with pytest.raises(kind, match=says) as caught:
        ready(final, source, **options)
    assert caught.value.exit_code == (3 if kind is NotEnoughDiskError else 2)
    assert caught.value.hint
    return caught.value


# --- where it may lie -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_exists_is_never_overwritten(kind, tmp_path):
    source = write_llama(tmp_path / "base")
    (tmp_path / "out").mkdir() if kind == "folder" else (tmp_path / "out").write_text("mine")
    refused(tmp_path / "out", source, "exists already")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("place", ["base/out", "base/deep/er/out", "base", "."])
def test_output_and_source_are_kept_apart(place, tmp_path):
    source = write_llama(tmp_path / "base")
    before = checkpoints.tree(tmp_path)
    refused(tmp_path / place, source, "exists already|inside the source")
    assert checkpoints.tree(tmp_path) == before


def test_links_do_not_hide_that_the_output_lies_in_the_source(tmp_path):
    source = write_llama(tmp_path / "base")
    (tmp_path / "link").symlink_to(source)
    refused(tmp_path / "link" / "out", source, "inside the source")


def test_the_hub_cache_is_never_written(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    refused(tmp_path / "hub" / "models--x" / "out", write_llama(tmp_path / "base"), "inside the Hub cache")
    assert not (tmp_path / "hub").exists()


def test_missing_parents_are_made(tmp_path):
    folder = ready(tmp_path / "a" / "b" / "out", write_llama(tmp_path / "base"))
    assert folder.finish() == tmp_path / "a" / "b" / "out"


def test_a_relative_output_stays_where_it_was_meant(tmp_path, monkeypatch):
    source = write_llama(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    folder = ready(Path("out"), source)
    monkeypatch.chdir("/")
    assert folder.finish() == tmp_path / "out"


# --- unfinished ones --------------------------------------------------------------------------------------------------


def test_the_partial_folder_of_another_plan_is_refused(tmp_path):
    source = write_llama(tmp_path / "base")
    ready(tmp_path / "out", source, fingerprint="one")
    refused(tmp_path / "out", source, "unfinished output of another run", fingerprint="two")
    assert ready(tmp_path / "out", source, fingerprint="one").done == {}


@pytest.mark.parametrize(
    "journal", [None, b"", b"{}", b"[1]", b'{"fingerprint": "one"}', b'{"fingerprint": "one", "done": 3}']
)
def test_a_partial_folder_that_is_not_ours_is_refused(journal, tmp_path):
    (tmp_path / "out.partial").mkdir()
    if journal is None:
        (tmp_path / "out.partial" / "mine.txt").write_text("mine")
    else:
        (tmp_path / "out.partial" / JOURNAL).write_bytes(journal)
    refused(tmp_path / "out", write_llama(tmp_path / "base"), "no readable journal")


def test_an_empty_partial_folder_is_in_nobodys_way(tmp_path):
    (tmp_path / "out.partial").mkdir()
    assert ready(tmp_path / "out", write_llama(tmp_path / "base")).done == {}


def test_a_file_in_place_of_the_partial_folder_is_refused(tmp_path):
    (tmp_path / "out.partial").write_text("mine")
    refused(tmp_path / "out", write_llama(tmp_path / "base"), "in the way")


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path):
    folder = ready(tmp_path / "out", write_llama(tmp_path / "base"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(OutputError, match="appeared while"):
        folder.finish()
    assert (tmp_path / "out" / "mine").exists()


def test_a_file_that_lost_bytes_is_not_done(tmp_path):
    folder = ready(tmp_path / "out", write_llama(tmp_path / "base"))
    (folder.path / "shard").write_bytes(b"12345")
    folder.mark_done("shard")
    assert ready(tmp_path / "out", tmp_path / "base").is_done("shard")
    (folder.path / "shard").write_bytes(b"1234")
    assert not ready(tmp_path / "out", tmp_path / "base").is_done("shard")


class Stop:
    """A listener that raises once ``shards`` shards are done."""

    def __init__(self, folder, shards, error):
        self.folder, self.shards, self.error = folder, shards, error

    def __call__(self, event):
        assert not self.folder.final.exists()
        if len(self.folder.done) == self.shards:
            raise self.error


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), InterruptedRunError("stopped"), RuntimeError("a bug")], ids=repr
)
@pytest.mark.parametrize("shards", [0, 2])
def test_a_stopped_edit_continues_to_the_same_bytes(error, shards, tmp_path):
    base = write_llama(tmp_path / "base", shards=4, head=False, tied=True)
    made = plan(base)
    folder = ready(tmp_path / "out", base)
    with pytest.raises(type(error)):
        edit_checkpoint(without(made, directions()), folder, on_event=Stop(folder, shards, error))
    assert not (tmp_path / "out").exists()
    finished = {name: (folder.path / name).stat().st_mtime_ns for name in folder.done}
    assert len(finished) == shards

    again = ready(tmp_path / "out", base)
    assert set(again.done) == set(finished)
    edit_checkpoint(without(made, directions()), again)
    assert {name: (again.path / name).stat().st_mtime_ns for name in finished} == finished
    assert not (tmp_path / "out").exists()
    assert checkpoints.tree(again.finish()) == checkpoints.tree(checkpoints.edit(base, tmp_path / "at once"))
    assert not (tmp_path / "out.partial").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
import abliterate
from abliterate.checkpoint import direction_file as directions
def listen(event):
    partial = sys.argv[3] + ".partial"
    if os.path.exists(partial) and sum(name.startswith("model-00003") for name in os.listdir(partial)):
        os.kill(os.getpid(), signal.SIGKILL)
abliterate.edit(sys.argv[1], directions.load(Path(sys.argv[2])), sys.argv[3], on_event=listen)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX signals")
def test_a_killed_process_continues_to_the_same_bytes(tmp_path):
    from safetensors.torch import save_file

    import abliterate
    from abliterate.checkpoint.direction_file import load

    base = write_llama(tmp_path / "base", shards=5)
    save_file({"direction": directions()[:, 0].float()}, tmp_path / "d.safetensors")
    command = [sys.executable, "-c", KILLED, str(base), str(tmp_path / "d.safetensors"), str(tmp_path / "out")]
    assert subprocess.run(command, check=False).returncode == -9
    assert not (tmp_path / "out").exists()
    partial = tmp_path / "out.partial"
    finished = {path.name: path.stat().st_mtime_ns for path in partial.glob("model-0000[12]*")}
    assert len(finished) == 2
    for name in ("out", "at once"):
        abliterate.edit(base, load(tmp_path / "d.safetensors"), tmp_path / name)
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished} == finished
    ours, other = (checkpoints.tree(tmp_path / name) for name in ("out", "at once"))
    dated = ("abliterate.json", "README.md")
    assert {n: h for n, h in ours.items() if n not in dated} == {n: h for n, h in other.items() if n not in dated}
    assert ours.keys() == other.keys()


# --- disks ------------------------------------------------------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("spare", "fits"), [(0, True), (-1, False)])
def test_a_full_disk_is_seen_before_anything_is_written(spare, fits, tmp_path, monkeypatch):
    free = 10**9 + output.DISK_RESERVE_BYTES + spare
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: Usage(2 * free, free, free))
    source = write_llama(tmp_path / "base")
    if fits:
        assert ready(tmp_path / "out", source, needed_bytes=10**9).path.is_dir()
        return
    refused(
        tmp_path / "out",
        source,
        r"needs 1.00 GB and 67.1 MB in reserve, the disk has 1.07 GB free",
        NotEnoughDiskError,
        needed_bytes=10**9,
    )
    assert not (tmp_path / "out.partial").exists()


def test_what_is_done_already_needs_no_room(tmp_path, monkeypatch):
    source = write_llama(tmp_path / "base")
    folder = ready(tmp_path / "out", source, needed_bytes=1000)
    (folder.path / "shard").write_bytes(bytes(900))
    folder.mark_done("shard")
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: Usage(0, 0, output.DISK_RESERVE_BYTES + 100))
    assert ready(tmp_path / "out", source, needed_bytes=1000).done == {"shard": 900}
    refused(tmp_path / "out", source, "needs", NotEnoughDiskError, needed_bytes=1001)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("after", [0, 3, 7])
def test_a_disk_that_fills_up_is_said_and_the_edit_continues(code, after, tmp_path, monkeypatch):
    base = write_llama(tmp_path / "base", shards=4)
    made, folder = plan(base), ready(tmp_path / "out", base)
    real, count = directio.write_all, iter(range(10**6))

    def full(*args):
        if next(count) >= after:
            raise OSError(code, os.strerror(code))
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(directio, "write_all", full)
        with pytest.raises(NotEnoughDiskError, match="the disk is full") as caught:
            edit_checkpoint(without(made, directions()), folder, memory_bytes=1)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()
    again = ready(tmp_path / "out", base)
    edit_checkpoint(without(made, directions()), again)
    assert checkpoints.tree(again.finish()) == checkpoints.tree(checkpoints.edit(base, tmp_path / "at once"))


# --- values that cannot be edited -------------------------------------------------------------------------------------

WRITERS = ("model.embed_tokens.weight", "model.layers.1.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.bias")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad, place, name, dtype, tmp_path):
    base = write_llama(tmp_path / "base", shards=2, biases=True, dtype=dtype)
    tensor = checkpoints.read(base, name)
    tensor.view(-1)[place] = bad
    checkpoints.overwrite(base, name, tensor)
    with pytest.raises(NonFiniteError, match=f"model-0000.*'{name}' holds NaN or infinity") as caught:
        checkpoints.edit(base, tmp_path / "out")
    assert caught.value.exit_code == 5
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", WRITERS)
def test_an_edit_that_overflows_float16_is_refused_by_name(name, tmp_path):
    """Turning (a, a) by the direction at 22.5 degrees makes one component 1.2 a."""
    base = write_llama(tmp_path / "base", biases=True, dtype=torch.float16)
    checkpoints.overwrite(base, name, torch.full_like(checkpoints.read(base, name), 65000.0))
    r = torch.zeros(32, 1, dtype=torch.float64)
    r[3], r[20] = 0.9239, -0.3827
    with pytest.raises(NonFiniteError, match=f"'{name}' overflows its dtype when edited") as caught:
        checkpoints.edit(base, tmp_path / "out", vectors=r)
    assert "bfloat16" in caught.value.hint
    assert "nothing is damaged" in caught.value.hint


def test_large_weights_that_do_not_overflow_are_edited(tmp_path):
    base = write_llama(tmp_path / "base", dtype=torch.float16)
    name = WRITERS[1]
    w = 20000 * checkpoints.read(base, name).clamp(-2, 2)
    checkpoints.overwrite(base, name, w)
    r = directions()[:, 0] / directions().norm()
    edited = checkpoints.read(checkpoints.edit(base, tmp_path / "out"), name)
    assert (edited.double() - (w.double() - torch.outer(r, r @ w.double()))).norm() < 1e-3 * w.double().norm()
