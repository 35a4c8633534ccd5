"""heretic's weight kernel: its weights, its ranges, and where its directions lie in our numbering of layers."""

import math

import pytest
import torch
from hypothesis import given as given_values
from hypothesis import strategies as st

from abliterate.checkpoint.direction_file import load, save
from abliterate.errors import UsageError
from abliterate.method.directions import Candidate, DirectionSet, Subspace, given
from abliterate.method.edits import kernel_removal, stream_edit
from abliterate.method.kernel import (
    LAYER,
    PER_LAYER,
    WeightKernel,
    between,
    kernels_in,
    kernels_of,
    middle,
    ranges,
)
from abliterate.method.linalg import unit
from abliterate.method.search import candidate

LAYERS, D = 10, 6
KERNEL = WeightKernel(most=1.2, least=0.3, peak=6.5, reach=3.0)


def measured(layers=LAYERS, d=D):
    vectors = torch.randn(layers, d, generator=torch.Generator().manual_seed(0))
    made = tuple(
        Candidate(
            id=f"projected-difference/-1/{layer}",
            subspace=Subspace(vectors=vector[:, None]),
            layer=layer,
            provenance={"estimator": "projected-difference", "position": -1},
        )
        for layer, vector in enumerate(vectors)
    )
    return vectors, DirectionSet(candidates=made)


def parameters(layers=LAYERS, **changes):
    found = {name: (low + high) / 2 for name, (low, high) in ranges(layers).items()}
    return {**found, PER_LAYER: False, **changes}


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "weight"), [(6, 1.2 - 0.9 / 6), (7, 1.2 - 0.9 / 6), (4, 1.2 - 0.9 * 2.5 / 3), (3, 0), (9, 0.45), (10, 0)]
)
def test_a_weight_falls_off_on_both_sides_and_ends(block, weight):
    assert KERNEL.weight(block) == pytest.approx(weight)


@given_values(
    st.floats(0, 2), st.floats(0, 1), st.floats(0, 40), st.floats(1, 30), st.integers(0, 40), st.integers(0, 40)
)
def test_weights_lie_between_least_and_most_and_nearer_blocks_have_more(most, share, peak, reach, one, other):
    kernel = WeightKernel(most=most, least=share * most, peak=peak, reach=reach)
    near, far = sorted((one, other), key=lambda block: abs(block - peak))
    assert kernel.weight(near) >= kernel.weight(far) - 1e-12
    for block in (near, far):
        inside = abs(block - peak) <= reach
        assert (kernel.weight(block) >= kernel.least - 1e-12 and kernel.weight(block) <= most + 1e-12) if inside else (
            kernel.weight(block) == 0
        )  # fmt: skip


@pytest.mark.parametrize("broken", [{"reach": 0.0}, {"reach": -1.0}, {"most": math.nan}, {"peak": math.inf}])
def test_what_is_no_kernel(broken):
    with pytest.raises(ValueError, match="no weight kernel"):
        WeightKernel(**{"most": 1.0, "least": 0.0, "peak": 2.0, "reach": 1.0, **broken})


# --- ranges ---------------------------------------------------------------------------------------------------------


def test_the_ranges_are_the_published_ones():
    found = ranges(32)
    assert found[LAYER] == (0.4 * 31 + 1, 0.9 * 31 + 1)  # heretic's direction index z is our layer z + 1
    assert (found["attention most"], found["MLP most"]) == ((0.8, 1.5), (-0.25, 1.5))
    for kind in ("attention", "MLP"):
        assert found[f"{kind} least"] == (0, 1)
        assert found[f"{kind} peak"] == (0.6 * 31, 31)
        assert found[f"{kind} reach"] == (1, 0.6 * 31)


@pytest.mark.parametrize("layers", range(2, 9))
def test_shallow_models_have_ranges_within_their_layers(layers):
    found = ranges(layers)
    assert all(low <= high for low, high in found.values())
    assert found[LAYER][1] <= layers - 1
    vectors, directions = measured(layers)
    for end in (0, 1):
        chosen = {name: ends[end] for name, ends in found.items()}
        for alone in (False, True):
            made = candidate(0, {**chosen, PER_LAYER: alone}, directions, "projected-difference")
            assert any(True for _ in kernel_removal(made, layers).edits())
    assert len(vectors) == layers


def test_a_highest_weight_below_zero_leaves_the_mlps_alone():
    kernels = kernels_of(parameters(**{"MLP most": -0.1}))
    assert [kernels["MLP"].weight(block) for block in range(LAYERS)] == [0] * LAYERS
    assert any(kernels["attention"].weight(block) for block in range(LAYERS))


def test_the_middle_is_the_middle_of_every_range():
    kernels = middle(31)
    assert kernels["attention"].most == pytest.approx(1.15)
    assert kernels["MLP"].most == pytest.approx(0.625)
    for kernel in kernels.values():
        assert kernel.peak == pytest.approx(0.8 * 30)
        assert kernel.least == pytest.approx(kernel.most / 2)
        assert kernel.reach == pytest.approx(0.3 * 30 + 0.5)


# --- where directions lie -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("z", [3.0, 4.25, 7.75])
def test_a_direction_between_layers_is_heretics_of_index_z(z):
    """Its list of directions begins with that of the embedding's output, and it reads it one place further on."""
    vectors, directions = measured()
    theirs = [unit(vector) for vector in vectors]
    first = math.floor(z)
    mixed = torch.lerp(theirs[first + 1], theirs[first + 2], z - first)
    made = candidate(3, parameters(**{LAYER: z + 1}), directions, "projected-difference")
    assert torch.allclose(made.vector, (mixed / mixed.norm()).float())
    assert not torch.allclose(made.vector, between(vectors, z).float(), atol=1e-2)
    assert (made.id, made.layer) == ("search/3", math.floor(z + 1.5))


def test_a_block_with_a_direction_of_its_own_has_that_of_what_it_leaves():
    vectors, directions = measured()
    made = candidate(0, parameters(**{PER_LAYER: True}), directions, "projected-difference")
    kernels = kernels_in(made.provenance)
    assert made.layer in made.subspace
    assert set(made.subspace) == {b for b in range(LAYERS) if any(its.weight(b) for its in kernels.values())}
    for block, subspace in made.subspace.items():
        expected = vectors[min(block + 1, LAYERS - 1)]
        assert torch.allclose(subspace.vectors[:, 0], unit(expected).float())


def test_lengths_do_not_matter_between_layers():
    vectors, _ = measured()
    longer = vectors * torch.arange(1, LAYERS + 1)[:, None]
    assert torch.allclose(between(vectors, 4.3), between(longer, 4.3))
    assert torch.allclose(between(vectors, 4.0), unit(vectors[4]))
    assert torch.allclose(between(vectors, LAYERS - 1.0), unit(vectors[-1]))


# --- the edit -------------------------------------------------------------------------------------------------------


def test_each_place_loses_what_its_kernel_says_and_the_embedding_nothing():
    _, directions = measured()
    made = candidate(0, parameters(), directions, "projected-difference")
    stream, kernels = kernel_removal(made, LAYERS), kernels_in(made.provenance)
    assert stream.everywhere is None
    assert stream.at(None, "embedding") is None
    for block in range(LAYERS):
        for kind, kernel in kernels.items():
            edit = stream.at(block, kind)
            assert (0 if edit is None else edit.strength) == kernel.weight(block)
    assert {stream.at(block, kind) is None for block in range(LAYERS) for kind in kernels} == {False, True}


def test_without_kernels_of_its_own_a_candidate_gets_those_in_the_middle():
    stream = stream_edit("kernel", given(torch.ones(D)), LAYERS)
    kernels = middle(LAYERS)
    strengths = {place: edit.strength for place, edit in stream.places.items()}
    assert strengths == {
        (block, kind): weight for block in range(LAYERS) for kind in kernels if (weight := kernels[kind].weight(block))
    }


@pytest.mark.parametrize("alone", [False, True])
def test_a_file_keeps_the_weights_to_the_last_bit(alone, tmp_path):
    _, directions = measured()
    made = candidate(
        7, parameters(**{PER_LAYER: alone, "MLP peak": 7.123456789012345}), directions, "projected-difference"
    )
    chosen = DirectionSet(candidates=(*directions.candidates, made)).choose_candidate(made.id)
    again = load(save(chosen, tmp_path / "direction.safetensors"))
    assert stream_edit("kernel", again, LAYERS).sha256 == stream_edit("kernel", chosen, LAYERS).sha256
    assert (
        stream_edit("kernel", chosen, LAYERS).sha256
        != stream_edit("kernel", given(made.at(7).vectors[:, 0]), LAYERS).sha256
    )


def test_weights_are_not_dropped_in_silence():
    _, directions = measured()
    made = candidate(0, parameters(), directions, "projected-difference")
    chosen = DirectionSet(candidates=(made,)).choose_candidate(made.id)
    with pytest.raises(UsageError, match="only 'kernel' heeds them") as error:
        stream_edit("removal", chosen, LAYERS)
    assert "--change kernel" in error.value.hint


@pytest.mark.parametrize(
    "kernels", [{}, {"attention": {"most": 1}}, {"attention": 1, "MLP": 2}, [], {"attention": {"peak": "x"}, "MLP": {}}]
)
def test_a_file_with_kernels_that_are_none_is_refused(kernels):
    subspace, provenance = Subspace(vectors=torch.ones(D, 1)), {"estimator": "search", "kernels": kernels}
    made = Candidate(id="search/0", subspace=subspace, layer=1, provenance=provenance)
    with pytest.raises(UsageError, match="cannot be read"):
        stream_edit("kernel", DirectionSet(candidates=(made,)).choose_candidate("search/0"), LAYERS)
