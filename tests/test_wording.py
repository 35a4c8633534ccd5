"""Words for edits other than the removal of one direction: manifest, card, adapter and tables."""

import dataclasses
import json
import re
from importlib.resources import files

import jsonschema
import pytest
import torch
from typer.testing import CliRunner

import abliterate
from abliterate.checkpoint.direction_file import load
from abliterate.cli import tables
from abliterate.cli.app import app
from abliterate.editing.planning import along, plan
from abliterate.errors import UsageError
from abliterate.method.edits import orthogonal
from abliterate.method.linalg import orthonormal_basis
from abliterate.method.places import in_words
from abliterate.method.stream_edit import StreamEdit
from abliterate.publishing import manifest, wording
from abliterate.publishing.card import worth
from tests import factories

SCHEMA = json.loads((files("abliterate") / "publishing/schemas/manifest-2.schema.json").read_text("utf-8"))
Q = orthonormal_basis(factories.random_directions(48, 1))
HALF = orthogonal(Q, strength=0.5)
MIDDLE = {(layer, kind): HALF for layer in (1, 2) for kind in ("attention", "MLP")}
EDITS = {
    "removal": StreamEdit(everywhere=orthogonal(Q)),
    "half": StreamEdit(everywhere=HALF),
    "kept norms": StreamEdit(everywhere=orthogonal(Q, column_scale="kept norms")),
    "removal of some": StreamEdit(places={(1, "attention"): orthogonal(Q)}),
    "middle": StreamEdit(places=MIDDLE),
    "two": StreamEdit(everywhere=orthogonal(Q), places=MIDDLE | {(0, "MLP"): None}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return factories.save(factories.build("llama-square"), tmp_path_factory.mktemp("b") / "base", dtype=torch.float32)


@pytest.fixture(scope="module")
def width(base):
    return json.loads((base / "config.json").read_text())["hidden_size"]


def edited(base, width, name, tmp_path):
    assert width == Q.shape[0]
    direction = load(factories.save_direction(width, tmp_path / "direction.safetensors"))
    return abliterate.edit(base, direction, tmp_path / "edited", change=EDITS[name]).out


def flat(text):
    return " ".join(text.split())


def test_places_in_words():
    both = [(layer, kind) for layer in (3, 4, 5, 9) for kind in ("MLP", "attention")]
    assert in_words(both) == "blocks 3 to 5, attention and MLP; block 9, attention and MLP"
    some = [(None, "next-token block"), (0, "MLP"), (1, "attention"), (2, "attention"), (None, "embedding")]
    assert in_words(some) == "the embedding; block 0, MLP; blocks 1 to 2, attention; next-token blocks"


@pytest.mark.parametrize("name", EDITS)
def test_the_card_says_what_the_edit_is(name, base, width, tmp_path):
    out = edited(base, width, name, tmp_path)
    document = manifest.read(out)
    jsonschema.validate(document, SCHEMA)
    card = flat((out / "README.md").read_text())
    removes = name in ("removal", "kept norms")
    assert ("will comply with many requests" in card) == removes
    assert ("this one has been removed" in card) == removes
    assert ("this edit changes it" in card) == (not removes)
    assert ("equal to inference-time ablation" in card) == (name == "removal")
    assert ("(directional ablation as weight orthogonalization" in card) == (name == "removal")
    assert ("equal to the same edit made at inference time" in card) == (name not in ("removal", "kept norms"))
    assert "the edit was given as it is" in card
    expected = {
        "removal": [],
        "half": ["the embedding; blocks 0 to 2, attention and MLP (7 writers): 1 direction edited, strength 0.5"],
        "removal of some": ["block 1, attention (1 writer): 1 direction removed"],
        "middle": ["blocks 1 to 2, attention and MLP (4 writers): 1 direction edited, strength 0.5"],
        "two": [
            "the embedding; block 0, attention (2 writers): 1 direction removed",
            "blocks 1 to 2, attention and MLP (4 writers): 1 direction edited, strength 0.5",
        ],
        "kept norms": [
            "the embedding; blocks 0 to 2, attention and MLP (7 writers): 1 direction removed, "
            "columns keep their lengths"
        ],
    }[name]
    assert wording.details(document["edit"])[:-1] == expected
    if name == "removal of some":
        assert "one direction removed from 1 of the 7 writers to its residual stream" in card


def test_manifests_that_name_no_places_are_told_without_them():
    edit = {"coverage": "7 of 7", "edits": [{**wording.REMOVAL, "strength": 0.5, "removes": False, "writers": 7}]}
    assert wording.details(edit) == ["7 writers: 1 direction edited, strength 0.5"]
    old = {"coverage": "7 of 7", "exactness": "A"}
    assert wording.details(old) == []
    assert worth(old) == "equal to inference-time ablation up to rounding"
    many = {"coverage": "9 of 9", "edits": [dict(wording.REMOVAL, writers=1, places=f"block {n}") for n in range(30)]}
    assert wording.details(many)[-1] == "and 22 more edits, which stand in `abliterate.json`"


@pytest.mark.parametrize("name", ["removal", "half"])
def test_the_card_of_an_adapter_says_the_same(name, base, width, tmp_path):
    out = edited(base, width, name, tmp_path)
    report = abliterate.export_lora(base, tmp_path / "lora", edited=out)
    card = flat((report.out / "README.md").read_text())
    assert ("it will comply with many requests" in card) == (name == "removal")
    assert ("it may comply" in card) == (name == "half")


def test_places_are_counted_once_for_all_edits(base, monkeypatch):
    made = along(plan(base), EDITS["two"])
    asked = []
    real = StreamEdit.at

    def at(stream, layer, kind):
        asked.append((layer, kind))
        return real(stream, layer, kind)

    monkeypatch.setattr(StreamEdit, "at", at)
    edits = made.to_json()["edits"]
    assert len(asked) == len(made.writers)
    assert sum(its["writers"] for its in edits) == len(made.writers)


def test_an_edit_that_no_writer_gets_is_not_told(base):
    places = {(None, "next-token block"): HALF}
    made = along(plan(base), StreamEdit(everywhere=orthogonal(Q), places=places))
    assert len(made.to_json()["edits"]) == 1


# --- tables -----------------------------------------------------------------------------------------------------------


def shown(capsys, show, *values):
    capsys.readouterr()
    show(*values)
    return flat(re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out))


def test_coverage_is_green_where_what_shall_be_edited_is(base, tmp_path):
    assert tables._colour(plan(base)) == "green"
    for stream in EDITS.values():
        assert tables._colour(along(plan(base), stream)) == "green"
    tied = factories.save(factories.build("llama", tied=True), tmp_path / "tied", dtype=torch.float32)
    assert tables._colour(plan(tied, tied="keep")) == "yellow"
    assert tables._colour(plan(tied, tied="shared")) == "green"
    made = plan(base)
    unknown = dataclasses.replace(made, model_map=dataclasses.replace(made.model_map, unknown=("x",)))
    assert tables._colour(unknown) == "red"


def test_the_plan_says_what_it_is_worth(base, capsys):
    for name, says in (
        ("removal", "A, equal to inference-time ablation"),
        ("middle", "A, equal to the same edit at inference time"),
        ("kept norms", "A, what the equation says of its bytes"),
    ):
        assert says in shown(capsys, tables.show_plan, along(plan(base), EDITS[name]))


@pytest.mark.parametrize("name", ["removal", "half", "kept norms"])
def test_a_verification_names_no_equation_that_is_not_its_own(name, base, width, tmp_path, capsys):
    report = abliterate.verify(edited(base, width, name, tmp_path), base=base, behaviour=False)
    assert report.ok
    text = shown(capsys, tables.show_verification, report)
    assert "W - r" not in text
    assert ("rᵀW' = 0" in text) == (name != "half")


# --- made again -------------------------------------------------------------------------------------------------------


def test_what_was_given_is_not_measured_again(base, width, tmp_path):
    out = edited(base, width, "half", tmp_path)
    assert manifest.read(out)["edit"]["given"] is True
    with pytest.raises(UsageError, match="its edit was given, and not made of the direction") as error:
        abliterate.reproduce(out, measure=True)
    assert "leave out --measure" in error.value.hint
    assert abliterate.reproduce(out).agrees
    done = CliRunner().invoke(app, ["reproduce", str(out), "--measure"])
    assert done.exit_code == 2


def test_what_a_recipe_makes_is_not_called_given(base, width, tmp_path):
    direction = load(factories.save_direction(width, tmp_path / "direction.safetensors"))
    out = abliterate.edit(base, direction, tmp_path / "edited").out
    assert "given" not in manifest.read(out)["edit"]
    assert "given as it is" not in (out / "README.md").read_text()


def test_the_table_of_norms_leaves_out_what_is_not_edited(tmp_path, capsys):
    from abliterate.checkpoint.direction_file import save
    from abliterate.cli.look import show_behind_norms
    from abliterate.method.directions import Candidate, DirectionSet, Subspace

    folder = factories.save(factories.build("gemma2"), tmp_path / "gemma", dtype=torch.float32)
    made = plan(folder)
    one = Subspace(vectors=factories.random_directions(made.model_map.d_model).float())
    layered = Candidate(id="x", subspace={1: one}, layer=1, provenance={"estimator": "x"})
    file = save(DirectionSet(candidates=(layered,)).choose_candidate("x"), tmp_path / "d.safetensors")
    text = shown(capsys, show_behind_norms, made, file)
    assert sum(text.count(writer.role) for writer in made.writers if writer.layer == 1) == 2
    assert sum(text.count(role) for role in made.by_role()) == 2
