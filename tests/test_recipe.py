"""Recipes are parsed at the door: whatever is wrong is said with file and key."""

from pathlib import Path

import pytest

from abliterate.errors import RecipeError
from abliterate.recipe import Recipe, bundled_recipes, load_recipe


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


def test_the_paper_is_the_default():
    assert load_recipe("arditi-2024").model_copy(update={"title": ""}) == Recipe()


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
