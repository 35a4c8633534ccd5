"""A finished folder made again, and the schema of what it is made from."""

import json
import shutil
from importlib.resources import files

import jsonschema
import pytest
from typer.testing import CliRunner

import abliterate
from abliterate.cli.app import app
from abliterate.errors import CheckpointError
from abliterate.publishing import manifest
from abliterate.recipe import Recipe, load_recipe
from tests import checkpoints
from tests.test_patch import SHARD, edited_by_us, flip

RECIPE = Recipe(
    harmful="bundled:tiny-chat", harmless="bundled:tiny-chat", n_train=24, n_val=6, n_test=8, max_new_tokens=8
)  # fmt: skip
SCHEMA = json.loads((files("abliterate") / "publishing/schemas/manifest-2.schema.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """``abliterate run`` on the bundled model."""
    return abliterate.run(None, tmp_path_factory.mktemp("run") / "out", RECIPE).out


@pytest.fixture
def edited(tmp_path):
    return edited_by_us(checkpoints.write_llama(tmp_path / "base", shards=2), tmp_path / "edited")


def test_a_run_comes_out_again_measured_anew(finished):
    found = abliterate.reproduce(finished, measure=True)
    assert found.agrees
    assert found.direction_agrees
    assert found.recorded
    assert found.differences == {}
    assert [path.name for path in finished.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("form", ["in tables", "flat"])
def test_a_manifest_gives_no_leave_to_run_code(form, edited, monkeypatch):
    """Nor does it say which device or how much memory of this machine is used."""
    path = edited / manifest.FILE_NAME
    document = json.loads(path.read_text())
    tables = document["recipe"]
    tables["model"] |= {"trust_remote_code": True, "device": "cuda:7", "memory_bytes": 2**20}
    tables["find"] |= {"harmful": "a", "harmless": "b"}
    if form == "flat":
        document["recipe"] = Recipe.model_validate(tables).flat()
    path.write_text(json.dumps(document))
    seen = []

    def verify(session, *_, **__):
        seen.append(session.recipe.model)
        raise CheckpointError("enough", "seen")

    monkeypatch.setattr("abliterate.workflow.pipeline.verify", verify)
    monkeypatch.setattr("abliterate.workflow.pipeline.measure", verify)
    for asked in (lambda: abliterate.verify(edited), lambda: abliterate.reproduce(edited, measure=True)):
        with pytest.raises(CheckpointError, match="enough"):
            asked()
    assert [(its.trust_remote_code, its.device, its.memory_bytes) for its in seen] == [(False, "auto", None)] * 2
    with pytest.raises(CheckpointError, match="enough"):
        abliterate.verify(edited, changes={"trust_remote_code": True})
    assert seen[-1].trust_remote_code


def test_an_edit_that_was_never_verified_is_compared_with_itself(edited):
    found = abliterate.reproduce(edited)
    assert found.agrees
    assert not found.recorded
    flip(edited / SHARD)
    assert not abliterate.reproduce(edited).agrees


def test_a_folder_that_was_changed_is_not_what_its_manifest_says(finished, tmp_path):
    broken = shutil.copytree(finished, tmp_path / "broken")
    flip(broken / "model-00001-of-00002.safetensors")
    found = abliterate.reproduce(broken)
    assert not found.agrees
    assert found.shards == ()
    assert found.changed == ("model-00001-of-00002.safetensors",)


def test_what_came_out_otherwise_is_named_with_what_is_not_as_it_was(finished, tmp_path):
    other = shutil.copytree(finished, tmp_path / "other")
    document = json.loads((other / manifest.FILE_NAME).read_text())
    proof = document["verification"]["edited"][2]
    proof["sha256_after"] = "0" * 64
    for name in document["verification"]["sha256"]:
        document["verification"]["sha256"][name] = "0" * 64
    document["versions"]["torch"] = "1.0"
    document["machine"]["cpu_capability"] = "AVX9"
    (other / manifest.FILE_NAME).write_text(json.dumps(document))
    found = abliterate.reproduce(other)
    assert found.tensors == (proof["name"],)
    assert {name: then for name, (then, _) in found.differences.items()} == {"torch": "1.0", "cpu_capability": "AVX9"}
    shown = CliRunner().invoke(app, ["reproduce", str(other)])
    assert shown.exit_code == 4
    assert proof["name"] in shown.stdout


def test_the_command_agrees(edited):
    shown = CliRunner().invoke(app, ["reproduce", str(edited)])
    assert (shown.exit_code, "every byte came out again" in shown.stdout) == (0, True)
    document = json.loads(CliRunner().invoke(app, ["reproduce", str(edited), "--json"]).stdout)
    assert document["agrees"]


def test_a_folder_without_a_manifest(tmp_path):
    with pytest.raises(CheckpointError, match="has no"):
        abliterate.reproduce(checkpoints.write_llama(tmp_path / "base"))


# --- the recipe of a run ------------------------------------------------------------------------------------------


def test_a_run_leaves_its_recipe_to_be_run_again(finished):
    again = load_recipe(str(finished / "abliterate" / "recipe.toml"))
    assert again == Recipe.model_validate(manifest.read(finished)["recipe"])
    assert again.find.harmful == "bundled:tiny-chat"


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(title='quotes " and \\ and\nlines', system="é\t\x7f", refusal_tokens=("I", "Sor'ry")),
        Recipe(min_induce=float("-inf"), memory_bytes=2**40, controls=True, max_kl_nats=1e-30),
    ],
    ids=["default", "text", "numbers"],
)
def test_any_recipe_comes_back_from_its_file(recipe, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml(), "utf-8")
    assert load_recipe(str(path)) == recipe


# --- the schema ---------------------------------------------------------------------------------------------------


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_what_is_written_fits_the_schema(finished, edited):
    for folder in (finished, edited):
        jsonschema.validate(manifest.read(folder), SCHEMA)
    assert manifest.read(finished)["evaluation"] is not None


@pytest.mark.parametrize("key", SCHEMA["required"])
def test_nothing_that_is_required_may_be_missing(finished, key):
    document = manifest.read(finished)
    del document[key]
    with pytest.raises(jsonschema.ValidationError, match=key):
        jsonschema.validate(document, SCHEMA)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("extra",), 1),
        (("format",), "abliterate-manifest-1"),
        (("direction", "sha256"), "abc"),
        (("edit", "exactness"), "D"),
        (("edit", "coverage"), "all"),
        (("verification", "edited", 0, "left"), "none"),
        (("verification", "sha256", "model.safetensors"), 3),
        (("source", "shards", "model.safetensors"), -1),
        (("evaluation", "models"), []),
    ],
    ids=str,
)
def test_the_schema_refuses_what_is_not_written(finished, path, value):
    document = manifest.read(finished)
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, SCHEMA)


def test_what_is_not_a_number_is_null():
    nan, inf = float("nan"), float("inf")
    assert manifest.finite({"a": [nan, 1.0, (inf, -inf)], "b": {"c": nan}, "d": "nan"}) == {
        "a": [None, 1.0, [None, None]], "b": {"c": None}, "d": "nan",
    }  # fmt: skip


def test_an_unbounded_recipe_can_be_read_back(tmp_path):
    base = checkpoints.write_llama(tmp_path / "base")
    edited = edited_by_us(base, tmp_path / "edited", recipe=Recipe(min_induce=float("-inf")))
    text = (edited / manifest.FILE_NAME).read_text()
    document = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert Recipe.model_validate(document["recipe"]).find.min_induce < -1e300
