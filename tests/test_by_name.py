"""Checkpoints that abliterate wrote, by their name on the Hub; and the bundled model, whose name is no path."""

import json
import shutil

import pytest

import abliterate
from abliterate.checkpoint.direction_file import load
from abliterate.checkpoint.source import open_folder
from abliterate.data.bundled import open_model
from abliterate.data.tiny_chat import model_path
from abliterate.exports.patches.file import PatchFile
from abliterate.publishing import manifest
from abliterate.publishing.push import check_files, finished_manifest
from tests.loopback_hub import running
from tests.pushing import TOKEN, content, direction_file, errors, finished, run

NAME = "me/model"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder that was edited and never verified, never to be written to."""
    return finished(tmp_path_factory.mktemp("by-name"), verified=False)


@pytest.fixture
def hub():
    with running(token=TOKEN) as server:
        yield server


def snapshot(home):
    """What the Hub cache holds of the repository."""
    (folder,) = (home / "home" / "hub" / "models--me--model" / "snapshots").iterdir()
    return folder


def test_what_verify_proves_of_a_repository_is_not_written_into_the_cache(out, hub, tmp_path):
    """A folder gets the proof into its manifest; the cache belongs to the Hub's client."""
    hub.add(NAME, out)
    done = run(tmp_path, hub, "verify", NAME, "--bytes-only")
    assert done.returncode == 0, done.stderr
    assert content(snapshot(tmp_path)) == content(out)
    assert all(path.is_symlink() for path in snapshot(tmp_path).rglob("*") if path.is_file())


def test_weights_that_are_none_of_ours_are_not_fetched(out, hub, tmp_path):
    both = shutil.copytree(out, tmp_path / "both")
    (both / "model.gguf").write_bytes(b"x" * 1000)
    (both / "notes.txt").write_text("strange")
    hub.add(NAME, both)
    done = run(tmp_path, hub, "verify", NAME, "--bytes-only")
    assert done.returncode == 4
    assert "file notes.txt is not in the base" in errors(done)[0]
    assert "model.gguf" not in hub.served
    assert "abliterate/direction.safetensors" in hub.served


def test_a_repository_of_somebody_else_is_not_fetched(out, hub, tmp_path):
    hub.add(NAME, out.parent / "base")
    for command in (("verify", NAME), ("reproduce", NAME), ("patch", "export", NAME, "--base", "b", "--out", "p")):
        done = run(tmp_path, hub, *command)
        assert done.returncode == 5
        assert errors(done)[0] == f"error: {NAME}: has no abliterate.json"
    assert hub.served == {}


@pytest.mark.parametrize("command", [("patch", "export"), ("lora", "export")])
def test_an_edit_is_exported_from_a_revision(command, out, hub, tmp_path):
    hub.add(NAME, out.parent / "base")
    repo = hub.repos[NAME]
    hub.add("me/edited", out)
    repo.commit("abl", hub.repos["me/edited"].trees[hub.repos["me/edited"].branches["main"]], "the edit", oid="a" * 40)
    base = out.parent / "base"
    done = run(tmp_path, hub, *command, NAME, "--revision", "abl", "--base", base, "--out", "from-hub")
    assert done.returncode == 0, done.stderr
    here = run(tmp_path, hub, *command, out, "--base", base, "--out", "from-disk")
    assert here.returncode == 0, here.stderr
    made = [tmp_path / name for name in ("from-hub", "from-disk")]
    if made[0].is_dir():
        assert content(made[0]) == content(made[1])
    else:
        assert made[0].read_bytes() == made[1].read_bytes()


def test_what_the_hub_adds_by_itself_is_no_strange_file(tmp_path):
    """``.gitattributes`` comes along with every download."""
    folder = finished(tmp_path)
    base = open_folder(tmp_path / "base", name="x")
    assert ".gitattributes" in base.other_files  # then it is the base's, and must be the same
    (folder / ".gitattributes").write_text("other\n")
    assert "file .gitattributes changed" in abliterate.verify(folder).failures
    shutil.rmtree(folder)
    (tmp_path / "base" / ".gitattributes").unlink()
    abliterate.edit(tmp_path / "base", load(direction_file(tmp_path)), folder)
    assert abliterate.verify(folder).ok
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    assert abliterate.verify(folder).ok
    check_files(folder, finished_manifest(folder), base=None, verify=True)
    assert ".gitattributes" not in abliterate.diff(tmp_path / "base", folder).changed_files


def test_the_bundled_model_keeps_its_name_in_what_is_handed_on(tmp_path):
    """Where the package is installed says something of its owner, and is nowhere else."""
    direction = load(direction_file(tmp_path, open_folder(model_path(), name="x").config["hidden_size"]))
    assert open_model(None).name == open_model("tiny-chat").name == "tiny-chat"
    assert abliterate.edit("tiny-chat", direction, tmp_path / "out").plan.checkpoint.name == "tiny-chat"
    assert manifest.read(tmp_path / "out")["source"]["name"] == "tiny-chat"
    assert abliterate.verify(tmp_path / "out", behaviour=False).ok
    assert abliterate.reproduce(tmp_path / "out").agrees
    report = abliterate.export_patch(tmp_path / "out", "tiny-chat", tmp_path / "p.safetensors")
    assert PatchFile(report.file).document["base"]["name"] == "tiny-chat"
    abliterate.export_lora("tiny-chat", tmp_path / "lora", direction=direction)
    ours = {**content(tmp_path / "out"), **content(tmp_path / "lora"), "patch": report.file.read_bytes()}
    assert not [name for name, data in ours.items() if str(model_path()).encode() in data]
    assert json.loads(ours["abliterate.json"])["edit"]
    assert abliterate.diff("tiny-chat", tmp_path / "out").only_writers
