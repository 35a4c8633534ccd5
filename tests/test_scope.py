"""Edits of a part of the writers, and at less than full strength: the same parts in plans, hooks, scores and bytes."""

from dataclasses import replace

import pytest
import torch

from abliterate.arch.registry import family_of
from abliterate.editing.asked import scope_asked, stream_asked
from abliterate.errors import UsageError
from abliterate.method.directions import Subspace, given
from abliterate.method.edits import affine, removing
from abliterate.method.places import IN_BLOCKS
from abliterate.method.scope import WHOLE, Scope, layers_of, scope_of
from abliterate.method.stream_edit import StreamEdit
from abliterate.model.interventions import ablated_each, edited, operator, removed
from abliterate.model.load import attach
from abliterate.model.rowwise import subspaces_ablated
from abliterate.recipe import Recipe
from tests import factories

D, LAYERS = 16, 6


@pytest.mark.parametrize(
    ("text", "n_layers", "layers"),
    [
        ("", 6, []),
        ("0-2", 6, [0, 1, 2]),
        ("5", 6, [5]),
        (" 0 , 3-4 ", 6, [0, 3, 4]),
        ("0%-33%", 24, [*range(8)]),
        ("0%-50%", 5, [0, 1, 2]),
        ("80%-100%", 5, [4]),
    ],
)
def test_layers_by_number_and_by_depth(text, n_layers, layers):
    assert sorted(layers_of(text, n_layers)) == layers


@pytest.mark.parametrize("text", ["x", "1-", "-1", "2-1", "6", "0-6", "0..3", "101%", "1.5"])
def test_layers_that_there_are_not(text):
    with pytest.raises(UsageError, match="layers"):
        layers_of(text, LAYERS)


@pytest.mark.parametrize("roles", [("attention", "mlp"), ("attention",), ()])
def test_nothing_left_is_an_error(roles):
    with pytest.raises(UsageError, match="nothing is left"):
        scope_of(roles, f"0-{LAYERS - 1}", 1.0, LAYERS)


def test_the_whole_changes_nothing():
    stream = removing(torch.randn(D, 1))
    assert scope_asked(Recipe().edit, LAYERS) == WHOLE
    assert WHOLE.of(stream, LAYERS) is stream
    assert WHOLE.is_whole
    assert not Scope(strength=0.5).is_whole


def test_places_strengths_and_no_others():
    scope = scope_of(("attention", "mlp"), "1-2", 0.5, LAYERS)
    stream = scope.of(removing(torch.randn(D, 2)), LAYERS)
    assert stream.at(None, "embedding") is None
    assert stream.at(None, "next-token block") is None
    for layer in range(LAYERS):
        for kind in IN_BLOCKS:
            edit = stream.at(layer, kind)
            assert (edit is None) == (layer in (1, 2))
            assert edit is None or edit.strength == 0.5
    assert len(list(stream.edits())) == 1
    assert stream.removed is None


def test_a_constant_is_as_strong_as_what_is_taken_out():
    mean = torch.randn(D, dtype=torch.float64)
    plain = affine(torch.eye(D, dtype=torch.float64)[:, :1], mean)
    half = Scope(strength=0.5).of(StreamEdit(everywhere=plain), LAYERS).at(0, "MLP")
    x = torch.randn(4, D, dtype=torch.float64)
    assert torch.allclose(operator(half)(x), (x + operator(plain)(x)) / 2)


SCOPES = [
    Scope(kinds=frozenset({"attention", "MLP"})),
    Scope(kinds=frozenset({"embedding", "attention"}), left_out=frozenset({1})),
    Scope(left_out=frozenset({0}), strength=0.5),
]


@pytest.mark.parametrize("scope", SCOPES, ids=["blocks", "a layer less", "half"])
@pytest.mark.parametrize("k", [1, 2])
def test_candidates_are_scored_as_they_are_edited(scope, k):
    """Row by row, alone, and by the hooks that a written checkpoint is compared with: the same logits."""
    model = factories.cast(factories.build("llama"), torch.float64).eval()
    loaded = attach(model, None, family_of({"model_type": "llama"}, where="llama"), name="llama")
    vectors = [torch.randn(loaded.d_model, k, dtype=torch.float64) for _ in range(2)]
    ids = torch.arange(12).view(2, 6)

    def logits(context, rows):
        with context, torch.no_grad():
            return loaded.model(rows).logits

    many = logits(subspaces_ablated(loaded, [Subspace(vectors=its) for its in vectors], scope), ids.repeat(2, 1))
    for place, its in enumerate(vectors):
        expected = logits(edited(loaded, scope.of(removing(its), loaded.n_layers)), ids)
        assert torch.allclose(many[2 * place : 2 * place + 2], expected, atol=1e-10)
        assert torch.allclose(logits(removed(loaded, its, scope), ids), expected, atol=1e-10)
        everything = logits(removed(loaded, its), ids)
        assert not torch.allclose(expected, everything, atol=1e-6)
    if k == 1:
        lines = torch.stack([its[:, 0] for its in vectors])
        assert torch.allclose(logits(ablated_each(loaded, lines, scope), ids.repeat(2, 1)), many, atol=1e-10)
        weaker = replace(scope, strength=0.3)
        assert not torch.allclose(logits(ablated_each(loaded, lines, weaker), ids.repeat(2, 1)), many, atol=1e-6)


def test_a_recipe_says_where():
    recipe = Recipe(roles=("mlp",), exclude_layers="0%-50%", strength=0.25)
    stream = stream_asked(recipe.edit, given(torch.randn(D)), LAYERS)
    assert {place for place, edit in stream.places.items() if edit is not None} == {(n, "MLP") for n in (3, 4, 5)}
