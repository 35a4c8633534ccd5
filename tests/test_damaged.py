"""Manifests and patches that anybody may have changed: names that leave the folder, keys that are gone or wrong."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import abliterate
from abliterate.checkpoint import hub
from abliterate.checkpoint.file_names import inner_name, inside
from abliterate.checkpoint.shells import RemoteFiles
from abliterate.cli.app import app
from abliterate.errors import CheckpointError
from abliterate.exports.patches.file import KEY, PatchFile, PatchWriter
from abliterate.publishing import manifest
from tests import checkpoints
from tests.test_patch import SHARD, edited_by_us

OUTSIDE = [
    "../victim", "a/../../victim", "/nowhere/victim", "C:/victim", "C:victim", "..\\victim", "\\victim",
    "//host/victim", "a\0b", "", ".", "a//b", "./a",
]  # fmt: skip


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*OUTSIDE, None, 3, ["a"]])
def test_a_name_outside_is_refused(name, tmp_path):
    with pytest.raises(CheckpointError, match="names a file outside its folder"):
        inner_name(name, where="x")
    with pytest.raises(CheckpointError, match="names a file outside its folder"):
        inside(tmp_path, name, where="x")


@pytest.mark.parametrize("name", ["config.json", "a/b.txt", "..a", "a..b/...", "Zürich", ".gitattributes"])
def test_a_name_inside_is_not(name, tmp_path):
    assert inside(tmp_path, name, where="x") == tmp_path / name


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="outside its folder"):
        inside(tmp_path / "out", "link/victim", where="x")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, its edit, and the patch between them."""
    folder = tmp_path_factory.mktemp("damaged")
    base = checkpoints.write_llama(folder / "base", shards=2, head=False, tied=True)
    edited = edited_by_us(base, folder / "edited")
    assert abliterate.verify(edited, base=base, behaviour=False).ok
    return base, edited, abliterate.export_patch(edited, base, folder / "p.safetensors").file


def rewritten(patch: Path, out: Path, change, *, rename=lambda name: name) -> Path:
    """``patch`` with another document, or other names of tensors."""
    file, writer = PatchFile(patch), PatchWriter(out)
    for name in file._tensors:
        writer.add(rename(name), file.tensor(name))
    return writer.finish(change(copy.deepcopy(file.document)))


def put(document, path, value):
    """``document`` with ``value`` at ``path``."""
    *way, last = path
    part = document
    for key in way:
        part = part[key]
    part[last] = value
    return document


PLACES = [
    ("files", 0, "name"),
    ("files", 0, "copy_of"),
    ("tensors", 0, "shard"),
]


@pytest.mark.parametrize("way", ["apply", "revert"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", OUTSIDE)
def test_a_patch_names_no_file_outside(name, place, way, made, tmp_path):
    base, edited, patch = made
    victim = tmp_path / "victim"
    victim.write_text("mine")
    bad = rewritten(patch, tmp_path / "bad.safetensors", lambda document: put(document, place, name))
    do, source = (abliterate.apply_patch, base) if way == "apply" else (abliterate.revert_patch, edited)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors.*outside its folder"):
        do(source, bad, tmp_path / "out")
    assert victim.read_text() == "mine"
    assert not list(tmp_path.glob("out*"))


def test_a_patch_does_not_delete_or_overwrite_a_file_of_the_user(made, tmp_path):
    """What the finding was: an entry without a hash deletes, one with a text overwrites."""
    base, _, patch = made
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for entry in ({"base": "0", "edited": None}, {"base": None, "edited": "0"}):
        entry |= {"name": "../victim"}
        bad = rewritten(patch, tmp_path / "bad", lambda its, entry=entry: its | {"files": [*its["files"], entry]})
        with pytest.raises(CheckpointError, match="outside its folder"):
            abliterate.apply_patch(base, bad, tmp_path / "out")
        bad.unlink()
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("stem", ["header.", "base.", "edited."])
def test_a_patch_has_no_text_for_a_file_outside(stem, made, tmp_path):
    def rename(name):
        return f"{stem}../victim" if name == "direction" else name

    bad = rewritten(made[2], tmp_path / "bad", lambda its: its, rename=rename)
    with pytest.raises(CheckpointError, match="outside its folder"):
        PatchFile(bad)


def test_a_shard_of_a_patch_lies_inside(made, tmp_path):
    def change(document):
        document["shards"]["../x.safetensors"] = next(iter(document["shards"].values()))
        return document

    with pytest.raises(CheckpointError, match="outside its folder"):
        PatchFile(rewritten(made[2], tmp_path / "bad", change))


def test_names_from_the_hub_lie_inside(monkeypatch):
    class Entry:
        path, rfilename, size, lfs, sha = "../victim", "../victim", 1, None, "0"

    class Api:
        def model_info(self, *_, **__):
            return type("Info", (), {"sha": "0", "siblings": [Entry()]})()

        def list_repo_tree(self, *_, **__):
            return [Entry()]

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.hf_api.RepoFile", Entry)
    with pytest.raises(CheckpointError, match="outside its folder"):
        hub.open_remote("some/one")
    with pytest.raises(CheckpointError, match="outside its folder"):
        RemoteFiles.of("some/one", None)


# --- keys ---------------------------------------------------------------------------------------------------------


GONE = object()

MANIFEST = [
    ("versions",), ("versions", "abliterate"),
    ("source",), ("source", "name"), ("source", "revision"), ("source", "shards"),
    ("edit",), ("edit", "exactness"), ("edit", "claim"), ("edit", "coverage"), ("edit", "complete"),
    ("edit", "edited_parameters"), ("edit", "notes"), ("edit", "edits"), ("edit", "file"),
    *[("edit", "edits", 0, its) for its in ("directions", "strength", "column_scale")],
    *[("edit", "edits", 0, its) for its in ("constant", "removes", "writers")],
    ("direction",), ("direction", "file"), ("direction", "sha256"), ("direction", "choice"),
    ("direction", "choice", "layer"), ("direction", "choice", "position"), ("direction", "choice", "rule"),
    ("recipe",),
    ("verification",), ("verification", "ok"), ("verification", "failures"), ("verification", "edited"),
    ("verification", "edited", 0), ("verification", "edited", 0, "name"), ("verification", "edited", 0, "sha256_after"),
    ("verification", "worst_left"), ("verification", "identical_tensors"), ("verification", "identical_files"),
    ("verification", "sha256"), ("verification", "behaviour"),
    ("evaluation",), ("format",),
]  # fmt: skip
OPTIONAL = {("machine",), ("files",)}

PATCH = [
    ("for",), ("base",), ("base", "name"), ("recipe",), ("shards",), ("tensors",), ("files",), ("format",),
    *[("shards", SHARD, key) for key in ("size", "sha256", "edited_size", "edited_sha256")],
    *[
        ("tensors", 0, key)
        for key in ("name", "shard", "axis", "role", "coded", "projector", "sha256_before", "sha256_after")
    ],
    *[("files", 0, key) for key in ("name", "base", "edited")],
]  # fmt: skip


def spoilt(document, path, value):
    """``document`` without the key at ``path``, or with ``value`` there."""
    document = copy.deepcopy(document)
    if value is not GONE:
        return put(document, path, value)
    *way, last = path
    part = document
    for key in way:
        part = part[key]
    del part[last]
    return document


def wrong_for(value):
    """What no key that holds ``value`` may hold."""
    yield from (GONE, {"x": []}, [[0.5]])
    if value is not None:
        yield None


def at(document, path):
    for key in path:
        document = document[key]
    return document


def fails(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 5, (arguments, result.output, result.exception)
    return " ".join(result.stderr.split())


NULL_IS_FINE = {
    ("verification",), ("evaluation",), ("direction", "choice"), ("direction", "choice", "position"),
    ("verification", "worst_left"),
}  # fmt: skip
"""Keys that may hold null, whatever they hold here."""
ANYTHING = {("verification", "edited", 0): GONE, ("evaluation",): {"x": []}}
"""What is no damage: a proof less, an evaluation of any kind."""


@pytest.mark.parametrize("path", [*MANIFEST, *sorted(OPTIONAL, key=str)], ids=lambda path: ".".join(map(str, path)))
def test_a_damaged_manifest_is_refused_with_words(path, made, tmp_path):
    base, edited, _ = made
    folder = tmp_path / "folder"
    shutil.copytree(edited, folder)
    document = json.loads((folder / manifest.FILE_NAME).read_text())
    for value in wrong_for(at(document, path)):
        if (value is None and path in NULL_IS_FINE | {("files",)}) or (value is GONE and path in OPTIONAL):
            continue
        if path in ANYTHING and value == ANYTHING[path]:
            continue
        (folder / manifest.FILE_NAME).write_text(json.dumps(spoilt(document, path, value)))
        for command in (["verify", folder, "--base", base], ["diff", base, folder]):
            said = fails(*command)
            assert "abliterate.json" in said
            assert any(str(key) in said for key in path)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000])
def test_a_manifest_that_is_none(text, made, tmp_path):
    shutil.copytree(made[1], tmp_path / "folder")
    (tmp_path / "folder" / manifest.FILE_NAME).write_text(text)
    assert "abliterate.json" in fails("verify", tmp_path / "folder", "--base", made[0])
    assert "abliterate.json" in fails("diff", made[0], tmp_path / "folder")


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("place", [("edit", "file"), ("direction", "file")])
def test_a_manifest_names_no_file_outside(name, place, made, tmp_path):
    shutil.copytree(made[1], tmp_path / "folder")
    path = tmp_path / "folder" / manifest.FILE_NAME
    path.write_text(json.dumps(put(json.loads(path.read_text()), place, name)))
    with pytest.raises(CheckpointError, match="outside its folder"):
        abliterate.verify(tmp_path / "folder", base=made[0])


@pytest.mark.parametrize("path", PATCH, ids=lambda path: ".".join(map(str, path)))
def test_a_damaged_patch_is_refused_with_words(path, made, tmp_path):
    base, edited, patch = made
    document = PatchFile(patch).document
    for number, value in enumerate(wrong_for(at(document, path))):
        if value is None and path in {("files", 0, "base"), ("files", 0, "edited")}:
            continue
        bad = rewritten(patch, tmp_path / f"bad{number}", lambda its, value=value: spoilt(its, path, value))
        said = fails("patch", "apply", base, bad, "--out", tmp_path / "out")
        assert bad.name in said
        if path != ("recipe",):  # of which the way back needs nothing
            fails("patch", "revert", edited, bad, "--out", tmp_path / "out")
        assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "[" * 100_000])
def test_a_patch_whose_document_is_no_object(text, made, tmp_path):
    from safetensors.torch import save_file

    save_file({"direction": torch.ones(3)}, tmp_path / "bad", metadata={KEY: text})
    assert "bad" in fails("patch", "apply", made[0], tmp_path / "bad", "--out", tmp_path / "out")


def test_a_patch_that_lacks_or_mistypes_any_tensor(made, tmp_path):
    """One of every kind in turn has no bytes, others, or is gone."""
    base, edited, patch = made
    file = PatchFile(patch)
    kinds = {re.sub(r"\d+|base\..*", "", name): name for name in file._tensors}
    assert len(kinds) > 12
    for number, name in enumerate(kinds.values()):
        for data in (None, torch.zeros(0, dtype=torch.uint8)):
            writer = PatchWriter(tmp_path / "bad")
            for other in file._tensors:
                if other != name:
                    writer.add(other, file.tensor(other))
                elif data is not None:
                    writer.add(other, data)
            bad = writer.finish(file.document)
            for do, source in (("apply", base), ("revert", edited)):
                out = tmp_path / f"out{number}{do}"
                result = CliRunner().invoke(app, ["patch", do, str(source), str(bad), "--out", str(out)])
                assert result.exit_code in (0, 4, 5), (name, data, do, result.output)
                shutil.rmtree(out, ignore_errors=True)
                shutil.rmtree(out.with_name(out.name + ".partial"), ignore_errors=True)
