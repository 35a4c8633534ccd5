"""Files carry the number of their format: version 1 is still read, and a newer one is refused with words."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
from typer.testing import CliRunner

import abliterate
from abliterate.checkpoint.format_number import check_format
from abliterate.checkpoint.hashes import sha256_file
from abliterate.cli.app import app
from abliterate.errors import CheckpointError
from abliterate.exports.patches.file import PatchFile
from abliterate.publishing import manifest
from abliterate.publishing.finished import FinishedEdit
from tests import checkpoints

OLD = Path(__file__).parent / "data" / "version-1"
BASE = Path(__file__).parent / "models" / "tiny-qwen2"


@pytest.fixture(scope="module")
def old_folder(tmp_path_factory):
    """The finished folder of version 1, as its own patch makes it again."""
    out = tmp_path_factory.mktemp("version-1") / "edited"
    return abliterate.apply_patch(BASE, OLD / "patch.safetensors", out)


def test_a_patch_of_version_1_is_applied_and_taken_back(old_folder, tmp_path):
    recorded = json.loads((OLD / "abliterate.json").read_text())["verification"]["sha256"]
    assert {name: sha256_file(old_folder / name) for name in recorded} == recorded
    back = abliterate.revert_patch(old_folder, OLD / "patch.safetensors", tmp_path / "back")
    assert checkpoints.tree(back) == checkpoints.tree(BASE)


def test_a_folder_of_version_1_is_verified_by_the_direction_it_names(old_folder):
    finished = FinishedEdit.open(old_folder)
    assert finished.document["format"] == "abliterate-manifest-1"
    made = finished.plan(finished.open_base(BASE))
    assert made.claim == "equal to hooks"
    assert made.distinct_edits[0].rank == 1
    assert abliterate.verify(old_folder, base=BASE, behaviour=False).ok
    written = old_folder / "model-00002-of-00002.safetensors"
    data = bytearray(written.read_bytes())
    spoilt = old_folder.parent / "spoilt"
    shutil.copytree(old_folder, spoilt)
    data[-100] ^= 0x40
    (spoilt / written.name).write_bytes(data)
    assert not abliterate.verify(spoilt, base=BASE, behaviour=False).ok


def test_a_folder_of_version_1_gives_a_patch_and_an_adapter(old_folder, tmp_path):
    report = abliterate.export_patch(old_folder, BASE, tmp_path / "patch.safetensors")
    assert PatchFile(report.file).document["format"] == "abliterate-patch-2"
    again = abliterate.apply_patch(BASE, report.file, tmp_path / "again")
    assert sha256_file(again / "abliterate.json") == sha256_file(old_folder / "abliterate.json")
    assert abliterate.export_lora(BASE, tmp_path / "lora", edited=old_folder).rank == 1


@pytest.mark.parametrize("number", [1, 2])
def test_every_version_has_its_schema(number, tmp_path):
    schema = json.loads((files("abliterate") / f"publishing/schemas/manifest-{number}.schema.json").read_text("utf-8"))
    document = json.loads((OLD / "abliterate.json").read_text("utf-8"))
    if number == 2:
        base = checkpoints.write_llama(tmp_path / "base")
        vector = checkpoints.directions().float()
        from tests.factories import given_direction, save_direction

        direction = given_direction(save_direction(len(vector), tmp_path / "direction.safetensors"))
        document = json.loads((abliterate.edit(base, direction, tmp_path / "out").out / "abliterate.json").read_text())
    jsonschema.validate(document, schema)
    assert manifest.FORMAT_NUMBER == 2


def test_a_newer_manifest_is_refused_with_words(old_folder, tmp_path):
    newer = tmp_path / "newer"
    shutil.copytree(old_folder, newer)
    document = json.loads((newer / "abliterate.json").read_text()) | {"format": "abliterate-manifest-3"}
    (newer / "abliterate.json").write_text(json.dumps(document))
    result = CliRunner().invoke(app, ["verify", str(newer)])
    assert result.exit_code == 5
    assert "written by a newer abliterate (format 3, this one knows up to 2)" in " ".join(result.stderr.split())
    assert "update abliterate" in result.stderr


def test_a_newer_patch_is_refused_with_words(tmp_path):
    raw = (OLD / "patch.safetensors").read_bytes()
    newer = tmp_path / "newer.safetensors"
    newer.write_bytes(raw.replace(b"abliterate-patch-1", b"abliterate-patch-9"))
    with pytest.raises(CheckpointError, match="written by a newer abliterate"):
        abliterate.apply_patch(BASE, newer, tmp_path / "out")


@pytest.mark.parametrize("found", [None, 2, "", "abliterate-x-", "abliterate-x-0", "abliterate-x--1", "abliterate-y-1"])
def test_what_is_no_format_is_refused(found, tmp_path):
    with pytest.raises(CheckpointError, match=r"is unknown"):
        check_format(found, "abliterate-x-", 2, where=tmp_path)


@pytest.mark.parametrize("recipe", [{"edit": {"tied": "perhaps"}}, {"nonsense": 1}, None, 3])
def test_a_recipe_that_cannot_be_read_is_named_with_its_file(recipe, old_folder, tmp_path):
    spoilt = tmp_path / "spoilt"
    shutil.copytree(old_folder, spoilt)
    document = json.loads((spoilt / "abliterate.json").read_text()) | {"recipe": recipe}
    (spoilt / "abliterate.json").write_text(json.dumps(document))
    result = CliRunner().invoke(app, ["verify", str(spoilt)])
    assert result.exit_code == 5
    assert "abliterate.json: holds a recipe that cannot be read" in " ".join(result.stderr.split())
