"""Hooks: what they remove, what they add, and that they are gone afterwards."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from abliterate.arch.registry import family_of
from abliterate.method.linalg import orthonormal_basis
from abliterate.model.chat import left_padded
from abliterate.model.forward import padding_is_harmless, run_batch
from abliterate.model.interventions import ablated, added, observed
from abliterate.model.load import LoadedModel, attach
from tests import factories, zoo

D = 48
FAMILIES = ("llama", "llama-biases", "mistral", "qwen", "qwen2", "qwen3", "gemma", "gemma2", "gemma3-text")


@pytest.fixture(scope="module")
def models():
    """Models by name, built when first asked for."""
    made = {}

    def get(name):
        if name not in made:
            model = factories.build(name)
            family = family_of({"model_type": model.config.model_type}, where=name)
            made[name] = attach(model, None, family, name=name)
        return made[name]

    return get


def states(loaded):
    """The residual entering every block, and leaving the last."""
    seen = {}
    with factories.really_float64(), torch.no_grad(), observed(loaded, seen.__setitem__, leaving_last=True):
        logits = loaded.model(factories.token_ids()).logits
    return [seen[layer] for layer in range(loaded.n_layers + 1)], logits


def hooks(loaded):
    modules = list(loaded.model.modules())
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


# --- ablation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_ablation_leaves_nothing_along_the_directions(name, k, models):
    loaded, directions = models(name), factories.random_directions(D, k)
    basis = orthonormal_basis(directions)
    before, _ = states(loaded)
    with ablated(loaded, directions):
        after, _ = states(loaded)
    assert all((x @ basis).norm() > 1e-3 * x.norm() for x in before)
    assert all((x @ basis).norm() < 1e-14 * x.norm() for x in after)


def test_ablation_takes_nothing_but_the_directions_from_the_embedding(models):
    loaded, directions = models("llama"), factories.random_directions(D, 2)
    basis = orthonormal_basis(directions)
    before, _ = states(loaded)
    with ablated(loaded, directions):
        after, _ = states(loaded)
    assert torch.allclose(after[0], before[0] - before[0] @ basis @ basis.T, atol=1e-14)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_length_sign_and_order_of_the_directions_do_not_matter(name, models):
    loaded, directions = models(name), factories.random_directions(D, 2)
    logits = []
    for some in (directions, -100 * directions.flip(1)):
        with ablated(loaded, some):
            logits.append(states(loaded)[1])
    assert torch.allclose(*logits, atol=1e-11)


# --- hooks come and go ------------------------------------------------------------------------------------------------

INTERVENTIONS = {
    "ablated": lambda loaded: ablated(loaded, factories.random_directions(D)),
    "added": lambda loaded: added(loaded, factories.random_directions(D)[:, 0], 1),
    "observed": lambda loaded: observed(loaded, lambda layer, x: None, leaving_last=True),
}


@pytest.mark.parametrize("intervention", INTERVENTIONS.values(), ids=INTERVENTIONS)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_hooks_are_removed_afterwards(name, intervention, models):
    loaded = models(name)
    before, logits = hooks(loaded), states(loaded)[1]
    with intervention(loaded):
        assert hooks(loaded) > before
    assert hooks(loaded) == before
    assert torch.equal(states(loaded)[1], logits)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("intervention", INTERVENTIONS.values(), ids=INTERVENTIONS)
def test_hooks_are_removed_after_an_exception(intervention, error, models):
    loaded = models("llama")
    before = hooks(loaded)
    with pytest.raises(error), intervention(loaded):
        raise error
    assert hooks(loaded) == before


def test_hooks_are_removed_when_the_listener_raises(models):
    loaded = models("llama")
    before = hooks(loaded)

    def see(layer, x):
        raise RuntimeError("seen")

    with pytest.raises(RuntimeError, match="seen"), observed(loaded, see):
        loaded.model(factories.token_ids())
    assert hooks(loaded) == before


# --- addition ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, -0.5, 0.0])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_addition_shifts_the_input_of_one_block(layer, scale, models):
    loaded, vector = models("llama"), factories.random_directions(D)[:, 0]
    before, _ = states(loaded)
    with added(loaded, vector, layer, scale=scale):
        after, _ = states(loaded)
    for place in range(layer):
        assert torch.equal(after[place], before[place])
    assert torch.allclose(after[layer], before[layer] + scale * vector, atol=1e-14)
    assert torch.equal(after[-1], before[-1]) == (scale == 0)


# --- whatever a block looks like --------------------------------------------------------------------------------------


class Block(nn.Module):
    """Adds ``out(x)``; called with a keyword, and returning a tuple, where asked to."""

    def __init__(self, *, returns_tuple):
        super().__init__()
        self.out = nn.Linear(D, D, dtype=torch.float64)
        self.returns_tuple = returns_tuple

    def forward(self, hidden_states, scale=1.0):
        x = hidden_states + scale * self.out(hidden_states)
        return (x, "cache") if self.returns_tuple else x


class Model(nn.Module):
    def __init__(self, *, returns_tuple, keyword):
        super().__init__()
        self.embedding = nn.Embedding(96, D, dtype=torch.float64)
        self.blocks = nn.ModuleList(Block(returns_tuple=returns_tuple) for _ in range(2))
        self.keyword = keyword
        self.returned = []

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            out = block(scale=0.5, hidden_states=x) if self.keyword else block(x, 0.5)
            self.returned.append(out)
            x = out[0] if isinstance(out, tuple) else out
        return x


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("returns_tuple", [False, True])
def test_tuples_and_keywords_are_understood(returns_tuple, keyword):
    model = Model(returns_tuple=returns_tuple, keyword=keyword)
    loaded = LoadedModel(
        name="fake", model=model, tokenizer=None, blocks=tuple(model.blocks), embedding=model.embedding,
        sites=tuple((block.out,) for block in model.blocks), d_model=D,
    )  # fmt: skip
    directions, seen = factories.random_directions(D), {}
    with torch.no_grad(), ablated(loaded, directions), observed(loaded, seen.__setitem__, leaving_last=True):
        out = model(factories.token_ids())
    assert (out @ directions).abs().max() < 1e-12
    assert all((seen[layer] @ directions).abs().max() < 1e-12 for layer in range(3))
    assert torch.equal(seen[2], out)
    if returns_tuple:
        assert [returned[1] for returned in model.returned] == ["cache", "cache"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_ablation_keeps_the_dtype_of_the_stream(dtype, models):
    loaded = models("llama")
    small = replace(loaded, model=factories.build("llama").to(dtype))
    small = attach(small.model, None, family_of({"model_type": "llama"}, where="x"), name="x")
    directions, seen = factories.random_directions(D), {}
    with torch.no_grad(), ablated(small, directions), observed(small, seen.__setitem__, leaving_last=True):
        small.model(factories.token_ids())
    shares = [float((x.double() @ directions).norm() / directions.norm() / x.double().norm()) for x in seen.values()]
    assert {x.dtype for x in seen.values()} == {dtype}
    assert max(shares) < torch.finfo(dtype).eps


# --- padding ----------------------------------------------------------------------------------------------------------


SEES_PADDING = ("qwen", "lfm2")
"""The stand-in for Qwen 1 knows no mask; LFM2 with biases lets padding into the window of its convolution."""


@pytest.mark.parametrize("name", zoo.BUILDERS)
def test_left_padding_does_not_change_the_last_position(name, zoo_model):
    loaded = zoo_model(name)
    ids = [factories.token_ids(batch=1, length=length, seed=length)[0].tolist() for length in (4, 14, 9)]
    with factories.really_float64():
        assert padding_is_harmless(loaded, ids[0], 0) == (name not in SEES_PADDING)
        (batch,) = left_padded(ids, 3, 0)
        together = run_batch(loaded, batch)[:, -1]
        worst = 0.0
        for place, row in enumerate(batch.rows):
            (alone,) = left_padded([ids[row]], 1, 0)
            worst = max(worst, float((run_batch(loaded, alone)[0, -1] - together[place]).abs().max()))
    assert (worst < 1e-10) == (name not in SEES_PADDING)


@pytest.fixture(scope="module")
def zoo_model():
    def get(name):
        model = factories.with_eager_experts(factories.build(name))
        return attach(model, None, family_of({"model_type": zoo.model_type(name)}, where=name), name=name)

    return get
