"""``--branch``: an upload to a branch of the repository, made where it is missing; the other branches stay."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from abliterate.checkpoint.source import open_folder
from abliterate.checkpoint.upload import NOT_A_BRANCH
from abliterate.cli.app import app
from abliterate.data.tiny_chat import model_path
from tests.checkpoints import write_llama
from tests.loopback_hub import COMMIT, running
from tests.pushing import TOKEN, content, direction_file, errors, finished, run

BASE, NEW = "owner/model", "me/model"
STREAM = ("edit", BASE, "d.safetensors", "--push", NEW, "--stream", "--out", "work")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A verified folder, never to be written to."""
    return finished(tmp_path_factory.mktemp("branches"))


@pytest.fixture
def hub():
    with running(token=TOKEN) as server:
        yield server


def without(files, *names):
    return {name: data for name, data in files.items() if name not in names}


def somebody_elses(hub, tmp_path, name=NEW):
    """A repository with files that abliterate did not write."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    (other / "model-00009-of-00009.safetensors").write_bytes(b"theirs")
    hub.add(name, other)
    return content(other)


# --- push -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branch", ["rank-1", "rank/1"])
def test_repository_and_branch_are_made(branch, out, hub, tmp_path):
    done = run(tmp_path, hub, "push", out, NEW, "--branch", branch, "--message", "mine", "--json")
    assert done.returncode == 0, done.stderr
    assert hub.files(NEW, branch) == content(out)
    assert set(hub.files(NEW)) == {".gitattributes"}
    assert hub.repos[NEW].messages[-1] == "mine"
    shown = json.loads(done.stdout)
    page = branch.replace("/", "%2F")  # a slash would part the branch from a path in it
    assert (shown["branch"], shown["url"]) == (branch, f"{hub.url}/{NEW}/tree/{page}")


def test_what_the_branch_has_from_main_goes(out, hub, tmp_path):
    """The Hub begins a branch at main's commit: files of another upload must not lie among ours."""
    theirs = somebody_elses(hub, tmp_path)
    done = run(tmp_path, hub, "push", out, NEW, "--branch", "abl")
    assert done.returncode == 0, done.stderr
    assert hub.files(NEW, "abl") == content(out)
    assert hub.files(NEW) == theirs


def test_stopped_between_the_branch_and_the_commit_it_continues(out, hub, tmp_path):
    somebody_elses(hub, tmp_path)
    hub.fail("/commit/", status=500, times=1)
    assert run(tmp_path, hub, "push", out, NEW, "--branch", "abl").returncode == 5
    assert hub.repos[NEW].branches == {"main": COMMIT, "abl": COMMIT}
    sent = dict(hub.received)
    done = run(tmp_path, hub, "push", out, NEW, "--branch", "abl")
    assert done.returncode == 0, done.stderr
    assert hub.files(NEW, "abl") == content(out)
    assert sent
    assert hub.received == sent


def test_a_branch_with_files_of_its_own_is_not_overwritten(out, hub, tmp_path):
    theirs = somebody_elses(hub, tmp_path)
    repo = hub.repos[NEW]
    repo.commit("abl", {**repo.trees[COMMIT]}, "their own")
    done = run(tmp_path, hub, "push", out, NEW, "--branch", "abl")
    assert done.returncode == 2
    assert "holds files already that abliterate did not write (config.json)" in errors(done)[0]
    assert hub.files(NEW, "abl") == theirs


def test_an_earlier_upload_to_the_branch_is_replaced(out, hub, tmp_path):
    assert run(tmp_path, hub, "push", out, NEW, "--branch", "abl").returncode == 0
    first = hub.repos[NEW].branches["abl"]
    hub.repos[NEW].trees[first]["notes"] = hub.repos[NEW].trees[first]["README.md"]
    assert run(tmp_path, hub, "push", out, NEW, "--branch", "abl").returncode == 0
    assert hub.repos[NEW].branches["abl"] != first
    assert hub.files(NEW, "abl") == content(out)


def test_a_tag_is_refused_before_anything_is_sent(out, hub, tmp_path):
    somebody_elses(hub, tmp_path)
    hub.repos[NEW].tags["v1"] = COMMIT
    done = run(tmp_path, hub, "push", out, NEW, "--branch", "v1")
    assert done.returncode == 2
    assert "'v1' is a tag, not a branch" in errors(done)[0]
    assert not [line for line in hub.requests if line.startswith(("POST", "PUT"))]


@pytest.mark.parametrize(
    "name", ["", "-x", "/x", "x/", "a b", "a..b", "a//b", "a:b", "a^", "x.lock", "x.", "refs/pr/1", "a@{1", "a\\b"]
)
def test_what_is_no_name_of_a_branch(name, out, hub, tmp_path):
    assert NOT_A_BRANCH.match(name)
    if name == "a b":
        done = run(tmp_path, hub, "push", out, NEW, "--branch", name)
        assert (done.returncode, hub.requests) == (2, [])
        assert "not the name of a branch" in errors(done)[0]


@pytest.mark.parametrize("name", ["main", "rank-1", "rank/1", "v1.0", "abliterated_2", "größe", "x@y"])
def test_what_is_one(name):
    assert not NOT_A_BRANCH.match(name)


def test_the_base_may_have_an_edit_on_a_branch_but_not_in_its_place(out, hub, tmp_path):
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    document = json.loads((copy / "abliterate.json").read_text())
    document["source"]["name"] = NEW
    (copy / "abliterate.json").write_text(json.dumps(document))
    theirs = somebody_elses(hub, tmp_path)
    for options in ((), ("--branch", "main")):
        done = run(tmp_path, hub, "push", copy, NEW, *options)
        assert done.returncode == 2
        assert "is the base itself" in errors(done)[0]
    assert run(tmp_path, hub, "push", copy, NEW, "--branch", "abl").returncode == 0
    assert hub.files(NEW) == theirs
    assert hub.files(NEW, "abl") == content(copy)


# --- run and edit -----------------------------------------------------------------------------------------------------


def test_run_pushes_to_a_branch(hub, tmp_path):
    direction_file(tmp_path, open_folder(model_path(), name="x").config["hidden_size"])
    command = ("run", "--direction", "d.safetensors", "--out", "out", "--no-eval", "--push", NEW, "--branch", "abl")
    done = run(tmp_path, hub, *command)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "out").items() <= hub.files(NEW, "abl").items()
    assert set(hub.files(NEW)) == {".gitattributes"}
    assert f"published: {hub.url}/{NEW}/tree/abl" in done.stdout


def test_run_asks_for_the_branch_before_it_works(hub, tmp_path):
    somebody_elses(hub, tmp_path)
    hub.repos[NEW].tags["v1"] = COMMIT
    direction_file(tmp_path, 96)
    done = run(tmp_path, hub, "run", "--direction", "d.safetensors", "--out", "out", "--push", NEW, "--branch", "v1")
    assert done.returncode == 2
    assert not list(tmp_path.glob("out*"))


def test_a_stream_goes_to_a_branch(hub, tmp_path):
    hub.add(BASE, write_llama(tmp_path / "base", shards=3))
    theirs = somebody_elses(hub, tmp_path)
    direction_file(tmp_path)
    done = run(tmp_path, hub, *STREAM, "--branch", "abl")
    assert done.returncode == 0, done.stderr
    assert hub.files(NEW) == theirs
    names = set(hub.files(NEW, "abl"))
    assert {"abliterate.json", "model-00003-of-00003.safetensors"} <= names
    assert "model-00009-of-00009.safetensors" not in names


def test_a_base_is_streamed_to_a_branch_of_its_own_repository(hub, tmp_path):
    base = write_llama(tmp_path / "base", shards=3)
    hub.add(BASE, base)
    direction_file(tmp_path)
    command = ("edit", BASE, "d.safetensors", "--push", BASE, "--stream", "--out", "work")
    hub.fail("/commit/", status=500, times=1)
    assert run(tmp_path, hub, *command, "--branch", "abl").returncode == 5
    done = run(tmp_path, hub, *command, "--branch", "abl")  # goes on, though the branch holds the base meanwhile
    assert done.returncode == 0, done.stderr
    assert hub.files(BASE) == content(base)
    edited = hub.files(BASE, "abl")
    assert "abliterate.json" in edited
    assert edited["model-00001-of-00003.safetensors"] != hub.files(BASE)["model-00001-of-00003.safetensors"]


@pytest.mark.parametrize(("first", "second"), [("a", "b"), (None, "a")])
def test_another_branch_is_another_target(first, second, hub, tmp_path):
    """A stream that was stopped goes on to the branch it was begun for, and to no other."""

    def stream(branch):
        return run(tmp_path, hub, *STREAM, *(() if branch is None else ("--branch", branch)))

    hub.add(BASE, write_llama(tmp_path / "base", shards=3))
    direction_file(tmp_path)
    hub.fail("/commit/", status=500, times=1)
    assert stream(first).returncode == 5
    other = stream(second)
    assert other.returncode == 2
    assert "is the unfinished output of another run" in errors(other)[0]
    sent = dict(hub.received)
    assert stream(first).returncode == 0
    assert "abliterate.json" in hub.files(NEW, first or "main")
    assert {oid: hub.received[oid] for oid in sent} == sent  # the shards were not sent again
    assert second is None or second not in hub.repos[NEW].branches


def test_main_by_its_name_is_the_same_target(hub, tmp_path):
    hub.add(BASE, write_llama(tmp_path / "base", shards=3))
    direction_file(tmp_path)
    hub.fail("/commit/", status=500, times=1)
    assert run(tmp_path, hub, *STREAM).returncode == 5
    assert run(tmp_path, hub, *STREAM, "--branch", "main").returncode == 0
    assert "abliterate.json" in hub.files(NEW)


@pytest.mark.parametrize("option", [("--branch", "abl"), ("--private",)])
@pytest.mark.parametrize("command", [("run", "--no-eval"), ("edit", "tiny-chat", "d.safetensors")])
def test_how_to_upload_without_an_upload_is_refused(command, option, tmp_path, monkeypatch):
    direction_file(tmp_path, 96)
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, [*command, *option])
    assert shown.exit_code == 2
    assert f"{option[0]} says how to upload, and nothing is uploaded" in shown.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["d.safetensors"]
