"""Files and names that users bring: strange ones, none, links, folders in their place, and files that change.

The right behaviour is to do it, or to refuse it in two lines that say what is wrong with what.
"""

import json
import os
import shutil
import stat
from pathlib import Path, PureWindowsPath

import pytest

import abliterate
from abliterate.checkpoint import file_names
from abliterate.checkpoint.direction_file import load
from abliterate.checkpoint.file_names import at_home, inner_name, is_inner
from abliterate.errors import CheckpointError, OutputError
from tests import checkpoints
from tests.checkpoints import INDEX, write_llama
from tests.edge_tools import done, refused
from tests.pushing import direction_file

POSIX = pytest.mark.skipif(os.name == "nt", reason="needs names, links and modes of POSIX")


@pytest.fixture
def base(tmp_path):
    return write_llama(tmp_path / "base")


@pytest.fixture
def direction(tmp_path):
    return direction_file(tmp_path)


# --- names of shards and files ----------------------------------------------------------------------------------------

NO_PLAIN_NAMES = [
    "..\\x.safetensors", "C:\\x.safetensors", "C:x.safetensors", "a:b.safetensors", "x.safetensors:y.safetensors",
    "\\\\host\\x.safetensors", "/x.safetensors", "CON.safetensors", "nul.x.safetensors", "LPT1.safetensors",
    "com¹.safetensors", "a?.safetensors", "a*.safetensors", "a<b.safetensors", "a\nb.safetensors",
    "x.safetensors.", "x.safetensors ", "aux .safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", NO_PLAIN_NAMES)
def test_a_shard_has_a_plain_name_on_every_system(name, tmp_path):
    base = write_llama(tmp_path / "base", shards=2)
    index = json.loads((base / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (base / INDEX).write_text(json.dumps(index))
    refused(5, "is not a plain .safetensors file name", "plan", base)


OF_WINDOWS = [
    "CON", "con.txt", "a/NUL", "aux.d/x", "COM1.log", "lpt²", "conin$", "x.", "x ", "a /b", "ab:c", "a/b.txt:stream",
    "a?", "a\tb", "a|b", "a\"b",
]  # fmt: skip


@pytest.mark.parametrize("name", OF_WINDOWS)
def test_what_windows_obeys_is_no_name_there(name, monkeypatch):
    assert is_inner(name), "elsewhere such files exist"
    monkeypatch.setattr(file_names, "ON_WINDOWS", True)
    with pytest.raises(CheckpointError, match="outside its folder"):
        inner_name(name, where="x")


@pytest.mark.parametrize("name", ["console.txt", "icon", "aux-files/x", "com/10", "a.b.c", ".gitattributes", "Zürich"])
def test_a_plain_name_is_one_on_windows(name, monkeypatch):
    monkeypatch.setattr(file_names, "ON_WINDOWS", True)
    assert inner_name(name, where="x") == name
    assert not PureWindowsPath(name).is_reserved()
    assert PureWindowsPath("C:/out") in (PureWindowsPath("C:/out") / name).parents


def test_shards_that_differ_in_case_only(tmp_path):
    base = write_llama(tmp_path / "base", shards=2)
    first, second = sorted(path.name for path in base.glob("*.safetensors"))
    twins = {first: "Model.safetensors", second: "model.safetensors"}
    for old, new in twins.items():
        (base / old).rename(base / new)
    index = json.loads((base / INDEX).read_text())
    index["weight_map"] = {name: twins[shard] for name, shard in index["weight_map"].items()}
    (base / INDEX).write_text(json.dumps(index))
    refused(5, "differ in case only", "plan", base)


@POSIX
@pytest.mark.parametrize("name", [b"a\\b.txt", b"\xff.txt"], ids=["backslash", "no UTF-8"])
def test_a_file_whose_name_a_manifest_cannot_hold(name, base):
    Path(os.fsdecode(os.fsencode(base / "x")[:-1] + name)).write_text("x")
    refused(5, "cannot be handed on", "plan", base)


STRANGE = ["mödel 😀 v1", "[bold]x[/]", "a'b\"c %s {x}", "-x", "a\nb", "..x", "~", "x:y"]


@POSIX
@pytest.mark.parametrize("name", STRANGE, ids=range(len(STRANGE)))
def test_folders_of_any_name(name, tmp_path, direction):
    base, out = write_llama(tmp_path / name / "base"), tmp_path / f"{name} out" / name
    done("edit", base, direction, "--out", out)
    done("verify", out, "--bytes-only")
    assert json.loads((out / "abliterate.json").read_text("utf-8"))["source"]["name"] == str(base)


@POSIX
def test_a_folder_whose_name_is_no_text(tmp_path, direction):
    name = os.fsdecode(b"m\xffdel")
    base, out = write_llama(tmp_path / name), tmp_path / "out"
    refused(2, "is no UTF-8", "edit", base, direction, "--out", tmp_path / f"{name}-out")
    done("edit", base, direction, "--out", out)
    done("verify", out, "--bytes-only", "--base", base)
    document = json.loads((out / "abliterate.json").read_text("utf-8"))
    assert document["source"]["name"] == str(tmp_path / "m?del")


@pytest.mark.parametrize("name", ["~nobody-of-this-name/model", "~nobody-of-this-name"])
def test_a_home_of_nobody_is_the_name_of_a_folder(name, tmp_path, direction, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert at_home(name) == Path(name)
    refused(5, "no such folder", "plan", name)
    refused(2, "no such prompt file", "measure", "tiny-chat", "--harmful", f"{name}.txt", "--harmless", "x.txt")
    done("edit", "tiny-chat", direction_file(tmp_path, 128), "--out", name)
    assert (tmp_path / name).is_dir()


@POSIX
def test_a_name_that_is_too_long(tmp_path, base, direction):
    refused(2, "cannot be written (File name too long)", "edit", base, direction, "--out", tmp_path / ("o" * 250))
    deep = tmp_path.joinpath(*["d" * 200] * 12)
    done("edit", base, direction, "--out", deep / "out")
    done("verify", deep / "out", "--bytes-only")


# --- what stands where a file should ----------------------------------------------------------------------------------

PLACES = {
    "config.json": (5, ["plan", "{base}"]),
    "model.safetensors": (5, ["plan", "{base}"]),
    INDEX: (5, ["plan", "{base}"]),
    "d.safetensors": (5, ["edit", "{base}", "{base}/d.safetensors", "--out", "{out}"]),
    "d.toml": (2, ["edit", "{base}", "{direction}", "--recipe", "{base}/d.toml", "--out", "{out}"]),
    "p.txt": (2, ["measure", "tiny-chat", "--harmful", "{base}/p.txt", "--harmless", "bundled:tiny-chat"]),
    "p.json": (2, ["measure", "tiny-chat", "--harmful", "{base}/p.json", "--harmless", "bundled:tiny-chat"]),
    "x.patch": (5, ["patch", "apply", "{base}", "{base}/x.patch", "--out", "{out}"]),
    "abliterate.json": (5, ["verify", "{base}"]),
    "x.gguf": (5, ["import", "{base}/x.gguf", "--out", "{out}"]),
}


CASES = [(name, kind) for name in PLACES for kind in ("empty", "folder") if (name, kind) != ("d.toml", "empty")]
"""An empty recipe is one: all defaults."""


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_nothing_or_a_folder_in_the_place_of_a_file(name, kind, base, direction, tmp_path):
    code, command = PLACES[name]
    path = base / name
    path.unlink(missing_ok=True)
    path.write_bytes(b"") if kind == "empty" else path.mkdir()
    if (name, kind) == ("x.patch", "folder"):
        code = 2  # as where there is none
    command = [part.format(base=base, direction=direction, out=tmp_path / "out") for part in command]
    refused(code, name, *command)
    assert not (tmp_path / "out").exists()


@POSIX
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", INDEX])
def test_a_pipe_is_not_waited_for(name, base):
    (base / name).unlink(missing_ok=True)
    os.mkfifo(base / name)
    refused(5, "it is no file", "plan", base)


@pytest.mark.parametrize("command", ["measure tiny-chat --out {folder}", "run tiny-chat --out o --report {folder}"])
def test_a_folder_where_a_file_is_to_be_written(command, tmp_path):
    """Known before hours of work, not after."""
    folder = tmp_path / "there.html"
    folder.mkdir()
    refused(2, "there.html", *command.format(folder=folder).split())
    assert [path.name for path in tmp_path.iterdir()] == ["there.html"]


@POSIX
def test_links(base, direction, tmp_path):
    shard, elsewhere = base / "model.safetensors", tmp_path / "blob"
    shard.rename(elsewhere)
    shard.symlink_to(elsewhere)  # as in the cache of the Hub
    done("edit", base, direction, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / shard.name).is_symlink()
    for target in ("nowhere", shard.name):  # dangling, and a loop
        shard.unlink()
        shard.symlink_to(target)
        refused(5, "model.safetensors", "plan", base)
    (base / "tokenizer.json").unlink()
    (base / "tokenizer.json").symlink_to("tokenizer.json")
    shard.unlink()
    shard.symlink_to(elsewhere)
    refused(5, "is a link to a file that is not there", "plan", base)


@POSIX
@pytest.mark.parametrize("target", ["nowhere", "out"], ids=["dangling", "loop"])
def test_an_output_that_is_a_link_to_nothing(target, base, direction, tmp_path):
    (tmp_path / "out").symlink_to(target)
    refused(2, "exists already", "edit", base, direction, "--out", tmp_path / "out")
    refused(2, "out", "edit", base, direction, "--out", tmp_path / "out" / "deeper")


@POSIX
@pytest.mark.parametrize("place", ["file/out", "/proc/nowhere/out"])
def test_an_output_that_cannot_be_made(place, base, direction, tmp_path):
    (tmp_path / "file").write_text("mine")
    if place.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("needs /proc")
    refused(2, "cannot be written", "edit", base, direction, "--out", tmp_path / place)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_an_output_on_another_file_system(base, direction, tmp_path):
    out = Path("/dev/shm") / f"abliterate-{os.getpid()}"
    try:
        done("edit", base, direction, "--out", out)
        done("verify", out, "--bytes-only")
    finally:
        shutil.rmtree(out, ignore_errors=True)


# --- rights -----------------------------------------------------------------------------------------------------------


@POSIX
def test_a_source_that_is_read_only(base, direction, tmp_path):
    for path in [*base.rglob("*"), base]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: (path.stat().st_mode, path.stat().st_mtime_ns) for path in [base, *base.rglob("*")]}
    tree = checkpoints.tree(base)
    done("edit", base, direction, "--out", tmp_path / "out")
    done("verify", tmp_path / "out", "--bytes-only")
    assert before == {path: (path.stat().st_mode, path.stat().st_mtime_ns) for path in [base, *base.rglob("*")]}
    assert checkpoints.tree(base) == tree
    assert all(path.stat().st_mode & stat.S_IWUSR for path in (tmp_path / "out").rglob("*"))


@POSIX
@pytest.mark.parametrize("mask", [0o002, 0o077])
def test_the_umask_decides_who_may_do_what(mask, direction, tmp_path):
    base = write_llama(tmp_path / "base", tied=True, head=False)  # which gets a head, and so no copy of its blocks
    before = os.umask(mask)
    try:
        done("edit", base, direction, "--out", tmp_path / "out")
        done("verify", tmp_path / "out", "--bytes-only")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert modes == dict.fromkeys(modes, 0o666 & ~mask)


def test_a_lock_that_is_in_the_way(base, direction, tmp_path):
    (tmp_path / ".out.lock").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        abliterate.edit(base, load(direction), tmp_path / "out")


@POSIX
@pytest.mark.parametrize("target", [".", "..", "/"], ids=["itself", "around", "everything"])
def test_a_link_to_a_folder_is_left_out_and_said_so(target, base, direction, tmp_path):
    (base / "assets" / "more").symlink_to(target)
    assert "not copied, as these are links to folders: assets/more/" in " ".join(done("plan", base).stdout.split())
    done("edit", base, direction, "--out", tmp_path / "out")
    done("verify", tmp_path / "out", "--bytes-only")
    assert not (tmp_path / "out" / "assets" / "more").exists()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_name_that_the_output_has_for_itself(kind, base, direction, tmp_path):
    """Known before the shards are written, not after."""
    (base / "abliterate").write_text("x") if kind == "file" else (base / "abliterate").mkdir()
    refused(2, "holds 'abliterate'", "edit", base, direction, "--out", tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
