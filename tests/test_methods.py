"""Every method that is listed has a recipe, and a whole run by it is written and proven in the class that it claims."""

import json

import pytest

from abliterate.data.methods import methods
from abliterate.errors import PlanRefusedError
from abliterate.method.edits import EDITS
from abliterate.method.estimators import ESTIMATORS
from abliterate.recipe import bundled_recipes, load_recipe
from abliterate.workflow import pipeline

FEW = {"n_train": 16, "n_val": 3, "n_test": 2, "reply_tokens": 12, "train_steps": 2, "cone_size": 2}
AT_THE_END = {"per-layer", "actsvd"}
"""Methods whose only candidates are of late layers; of the others half the layers will do."""
REFUSED = {"ace": "times the length", "steer": "no one bias that could hold the constant"}
"""What the bundled model cannot hold: its embedding would drown, and its MLPs have no biases."""
RUNS = [name for name in methods() if name not in REFUSED]


def test_every_method_is_a_recipe_and_every_estimator_and_edit_is_in_a_method():
    recipes = {name: load_recipe(name) for name in methods()}
    assert recipes.keys() <= bundled_recipes().keys()
    assert {name for its in recipes.values() for name in its.find.estimators} == ESTIMATORS.keys()
    assert {its.edit.change for its in recipes.values()} == EDITS.keys()


@pytest.mark.parametrize("name", RUNS)
def test_a_run_by_it_is_proven(name, tmp_path):
    layers = {} if name in AT_THE_END else {"prune_layers": 0.4}
    recipe = load_recipe(name).with_changes({**FEW, "allow_few": True, **layers})
    result = pipeline.run(None, tmp_path / "out", recipe, with_evaluation=False)
    assert result.plan.claim == methods()[name].worth(result.plan.exactness)
    assert result.verification.ok
    assert result.verification.behaviour is not None
    document = json.loads((result.out / "abliterate.json").read_text("utf-8"))
    assert document["recipe"]["find"]["estimators"] == list(recipe.find.estimators)
    assert document["recipe"]["edit"]["change"] == recipe.edit.change


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_model_cannot_hold_is_refused(name, tmp_path):
    recipe = load_recipe(name).with_changes({**FEW, "allow_few": True})
    with pytest.raises(PlanRefusedError, match=REFUSED[name]) as error:
        pipeline.run(None, tmp_path / "out", recipe, with_evaluation=False)
    assert error.value.hint


def test_a_constant_that_does_not_drown_the_embedding_is_written(tmp_path):
    """Of a direction that was made orthogonal to the harmless mean there is none."""
    recipe = load_recipe("ace").with_changes({**FEW, "allow_few": True})
    kind = recipe.with_changes({"estimators": ("projected-difference",)})
    assert pipeline.run(None, tmp_path / "other", kind, with_evaluation=False).verification.ok
