"""Recipes are parsed at the door: whatever is wrong is said with file and key."""

import json
import tomllib
from pathlib import Path

import pytest
from safetensors import safe_open

from abliterate.checkpoint.output import fingerprint
from abliterate.errors import RecipeError
from abliterate.events import Noted
from abliterate.recipe import (
    NOT_IN_NUMBERS,
    NOT_IN_WORK,
    OF_A_MACHINE,
    SECTION_OF,
    SECTIONS,
    EditOptions,
    FindOptions,
    Recipe,
    bundled_recipes,
    load_recipe,
    option,
)

OLD = Path(__file__).parent / "data" / "version-1"


def written(folder, text):
    path = folder / "mine.toml"
    path.write_text(text, "utf-8")
    return str(path)


@pytest.mark.parametrize("name", bundled_recipes())
def test_every_bundled_recipe_loads_by_name_and_by_path(name):
    assert load_recipe(name) == load_recipe(str(bundled_recipes()[name]))
    assert load_recipe(name).title


def test_all_recipe_files_are_bundled():
    folder = Path(__file__).parent.parent / "recipes"
    assert {path.stem for path in folder.glob("*.toml")} == set(bundled_recipes()) >= {"arditi-2024"}


def test_the_default_is_a_recipe_and_the_paper_differs_from_it_in_who_says_what_is_refused():
    assert load_recipe("default").model_copy(update={"title": ""}) == Recipe()
    assert load_recipe("arditi-2024").model_copy(update={"title": ""}) == Recipe(
        labels="first-token", estimators=("difference-of-means",), kl_margin=0.0
    )


def test_values_of_a_file_are_taken(tmp_path):
    recipe = load_recipe(written(tmp_path, 'tied = "shared"\nn_train = 7\nrefusal_tokens = ["I", "Sorry"]\n'))
    assert (recipe.edit.tied, recipe.find.n_train, recipe.find.refusal_tokens) == ("shared", 7, ("I", "Sorry"))
    assert recipe.find.n_val == Recipe().find.n_val


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("n_trian = 3", "n_trian"),
        ("n_train = 'many'", "n_train"),
        ("n_train = 0", "n_train"),
        ("n_train = 1.5", "n_train"),
        ("seed = []", "seed"),
        ("tied = 'both'", "tied"),
        ("prune_layers = 1.0", "prune_layers"),
        ("prune_layers = nan", "prune_layers"),
        ("max_kl_nats = 0.0", "max_kl_nats"),
        ("max_kl_nats = nan", "max_kl_nats"),
        ("min_induce = nan", "min_induce"),
        ("memory_bytes = 1000", "memory_bytes"),
        ("dtype = 'int8'", "dtype"),
        ("batch_size = -1", "batch_size"),
        ("refusal_tokens = [1]", "refusal_tokens"),
        ("[harmful]\nfile = 'x'", "harmful"),
    ],
)
def test_a_bad_value_is_named_with_its_file(line, key, tmp_path):
    path = written(tmp_path, line)
    with pytest.raises(RecipeError, match=f"mine.toml: {key}") as caught:
        load_recipe(path)
    assert caught.value.exit_code == 2
    assert caught.value.hint


def test_an_unknown_key_is_answered_with_the_known_ones(tmp_path):
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(tmp_path, "n_trian = 3"))
    assert "n_train" in caught.value.hint


@pytest.mark.parametrize("text", ["n_train = ", "= 3", "[", "a = 1\na = 2"])
def test_bad_toml_is_refused(text, tmp_path):
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_recipe(written(tmp_path, text))


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_recipe(str(tmp_path / "mine.toml"))


@pytest.mark.parametrize("name", ["missing.toml", "no-such-recipe", "", "."])
def test_a_missing_recipe_is_answered_with_the_bundled_ones(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="no such recipe") as caught:
        load_recipe(name)
    assert "arditi-2024" in caught.value.hint


def test_given_flags_win_and_absent_ones_do_not(tmp_path):
    recipe = load_recipe(written(tmp_path, 'n_train = 7\ntied = "keep"\n'))
    changed = recipe.with_changes({"tied": "shared", "n_train": None, "allow_partial": True})
    assert (changed.edit.tied, changed.find.n_train, changed.edit.allow_partial) == ("shared", 7, True)
    assert recipe.edit.tied == "keep"


def test_a_flag_can_switch_off_what_the_file_switches_on(tmp_path):
    recipe = load_recipe(written(tmp_path, "filter_prompts = true"))
    assert recipe.with_changes({"filter_prompts": False}).find.filter_prompts is False


def test_a_bad_flag_is_refused_like_a_bad_value():
    with pytest.raises(RecipeError, match="command line: batch_size"):
        Recipe().with_changes({"batch_size": 0})


def test_a_recipe_survives_its_own_json():
    recipe = Recipe(harmful="a.txt", refusal_tokens=("I",), max_kl_nats=0.25)
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


# --- the fields -------------------------------------------------------------------------------------------------------


def test_the_tables_are_the_stages():
    assert list(SECTIONS) == ["find", "edit", "model", "evaluate", "publish"]


@pytest.mark.parametrize("name", ["title", *SECTIONS, *SECTION_OF])
def test_every_option_and_every_table_says_what_it_is(name):
    field = Recipe.model_fields[name] if name in SECTIONS else option(name)
    assert field.description
    assert field.description[-1] == "."


def test_no_two_options_have_one_name():
    names = ["title", *SECTIONS, *(name for options in SECTIONS.values() for name in options.model_fields)]
    assert len(set(names)) == len(names)


def test_the_sets_of_options_that_do_not_matter():
    assert {"memory_bytes", "device_memory_bytes", "batch_size", "title", "private"} == NOT_IN_NUMBERS
    assert NOT_IN_NUMBERS | {"device", "dtype", "tensor_parallel"} == NOT_IN_WORK
    of_a_machine = {"device", "memory_bytes", "device_memory_bytes", "tensor_parallel", "trust_remote_code", "private"}
    assert of_a_machine == OF_A_MACHINE


# --- with tables and without ------------------------------------------------------------------------------------------


LATER = {
    "estimators": ("difference-of-means", "projected-difference"),
    "all_scores": False,
    "choose_by": "first-token",
    "trained": "",
    "train_steps": 24,
    "cone_size": 3,
    "independent_of": (),
    "change": "removal",
    "allow_few": False,
    "labels": "replies",
    "reply_tokens": 32,
    "kl_margin": 1.645,
    "trials": 0,
    "startup_trials": 60,
    "roles": ("embedding", "attention", "mlp"),
    "exclude_layers": "",
    "strength": 1.0,
    "tensor_parallel": False,
}
"""Options that version 1 did not have, with what it did."""


@pytest.fixture(scope="module")
def old():
    """The flat recipe of version 1, as its manifest holds it."""
    return json.loads((OLD / "abliterate.json").read_text("utf-8"))["recipe"]


def test_a_file_of_version_1_is_the_recipe_of_its_nested_form(old, tmp_path):
    recipe = load_recipe(str(OLD / "recipe.toml"))
    nested = {"title": old["title"]}
    for name, section in SECTION_OF.items():
        if name in old:
            nested.setdefault(section, {})[name] = old[name]
    assert recipe == Recipe.model_validate(nested) == Recipe.model_validate(old)
    assert load_recipe(written(tmp_path, recipe.to_toml())) == recipe
    assert (recipe.model.system, recipe.model.memory_bytes, recipe.title) == ("Be brief.", 2**28, "version 1")


def test_every_option_of_version_1_has_its_place(old):
    assert old.keys() == {"title", *SECTION_OF} - {"private", *LATER}
    assert Recipe.model_validate(old).flat() == {**old, "refusal_tokens": (), "tasks": (), "private": False, **LATER}


def test_a_patch_of_version_1_holds_a_recipe_that_is_read(old):
    with safe_open(OLD / "patch.safetensors", framework="np") as file:
        (document,) = (json.loads(its) for its in file.metadata().values() if "recipe" in its)
    assert Recipe.model_validate(document["recipe"]) == Recipe.model_validate(old)


def test_fingerprints_are_those_of_the_flat_form(old):
    recipe = Recipe.model_validate(old)
    for left_out in (NOT_IN_NUMBERS, NOT_IN_WORK):
        before = {name: value for name, value in {**old, **LATER}.items() if name not in left_out}
        assert fingerprint({"recipe": recipe.flat(without=left_out)}) == fingerprint({"recipe": before})


def test_flat_keywords_and_tables_in_python():
    assert Recipe(n_train=7, tied="keep") == Recipe(find=FindOptions(n_train=7), edit=EditOptions(tied="keep"))


def test_an_old_file_is_noted_with_the_tables_to_write(tmp_path):
    notes = []
    old = written(tmp_path, 'title = "x"\nn_train = 7\ntied = "keep"\nseed = 1\n')
    load_recipe(old, on_event=notes.append)
    (note,) = notes
    assert isinstance(note, Noted)
    assert note.text.startswith(old)
    assert note.text.endswith("[find] n_train, seed; [edit] tied")


@pytest.mark.parametrize("text", ["", 'title = "x"', "[find]\nn_train = 7", 'title = "x"\n[edit]'])
def test_a_file_with_tables_or_nothing_to_put_into_them_is_not_noted(text, tmp_path):
    load_recipe(written(tmp_path, text), on_event=lambda event: pytest.fail(str(event)))


@pytest.mark.parametrize("name", bundled_recipes())
def test_no_bundled_recipe_has_the_old_form(name):
    load_recipe(name, on_event=lambda event: pytest.fail(str(event)))


def test_a_bad_old_file_is_an_error_and_no_note(tmp_path):
    with pytest.raises(RecipeError):
        load_recipe(written(tmp_path, "n_train = 0"), on_event=lambda event: pytest.fail(str(event)))


def test_a_recipe_is_written_with_its_tables():
    document = tomllib.loads(Recipe(n_train=7, system="Be brief.").to_toml())
    assert list(document) == ["title", *SECTIONS]
    assert document["find"]["n_train"] == 7
    assert document["model"]["system"] == "Be brief."
    assert "memory_bytes" not in document["model"]


@pytest.mark.parametrize(
    ("text", "says", "hint"),
    [
        ("[find]\nn_train = 0", "find.n_train", "change find.n_train"),
        ("[find]\nn_trian = 3", "find.n_trian", "n_train"),
        ('[find]\ntied = "keep"', "find.tied", "stands in the table [edit]"),
        ("n_train = 3\n[edit]", "n_train", "stands in the table [find]"),
        ('[find]\ntitle = "x"', "find.title", "title stands above the tables"),
        ("[fnid]\nn_train = 3", "fnid", "[find] harmful"),
        ("n_trian = 3", "n_trian", "[edit] tied"),
        ("find = 3", "find", "under [find]"),
        ("[find]\nn_train = {a = 1}", "find.n_train", "change"),
        ("[find.n_train]\na = 1", "find.n_train", "change"),
        ("[evaluate]\ntask_limit = 0", "evaluate.task_limit", "change"),
    ],
)
def test_what_is_wrong_in_a_table_is_named_with_it(text, says, hint, tmp_path):
    with pytest.raises(RecipeError, match=f"mine.toml: {says}: ") as caught:
        load_recipe(written(tmp_path, text))
    assert hint in caught.value.hint


def test_an_unknown_change_is_refused():
    with pytest.raises(RecipeError, match="command line: n_trian: no such option"):
        Recipe().with_changes({"n_trian": 3})
