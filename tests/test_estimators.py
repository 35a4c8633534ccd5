"""Estimators: what they make of statistics, and that what they need is measured."""

import dataclasses
from pathlib import Path

import pytest
import torch

from abliterate.checkpoint.direction_file import load, save
from abliterate.errors import PromptError, UsageError
from abliterate.method.directions import Candidate, DirectionSet, Subspace
from abliterate.method.edits import removal
from abliterate.method.estimators import (
    ESTIMATORS,
    Estimator,
    biprojected_difference,
    difference_of_means,
    estimate,
    least_squares_erasure,
    needs_of,
    per_layer,
    self_organising_map,
)
from abliterate.method.moments import ActivationStats, Moments, shrunk, within_classes
from abliterate.method.som import batch_map, directions_of, hexagonal
from abliterate.model.forward import see_residuals
from abliterate.model.measuring import measure_class
from abliterate.recipe import Recipe, load_recipe
from abliterate.workflow import pipeline, reading
from abliterate.workflow.session import open_session
from abliterate.workflow.steps import Steps
from tests.factories import vectors_of

VERSION_1 = Path(__file__).parent / "data" / "version-1" / "direction.safetensors"
SOURCE = "bundled:tiny-chat"
RECIPE = Recipe(
    harmful=SOURCE, harmless=SOURCE, n_train=12, n_val=4, n_test=4, refusal_tokens=("I",),
    estimators=("difference-of-means",),
)  # fmt: skip


def statistics(positions=(-3, -2, -1), layers=4, d=6):
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(2, len(positions), layers, d, generator=generator, dtype=torch.float64)
    moments = {kind: Moments(count=3, mean=mean) for kind, mean in zip(("harmful", "harmless"), means, strict=True)}
    return ActivationStats(positions=positions, moments=moments)


def test_the_difference_of_means_is_one_at_each_position_and_layer():
    stats = statistics()
    found = difference_of_means(stats)
    assert len(found) == 12
    for one in found:
        place = stats.positions.index(one.position), one.layer
        expected = stats.mean("harmful")[place] - stats.mean("harmless")[place]
        assert torch.equal(one.vector, expected.float())
        assert one.id == f"difference-of-means/{one.position}/{one.layer}"
        assert one.estimator == "difference-of-means"


def test_small_differences_of_large_means_keep_their_digits():
    """A float32 difference would be off by 1e-3 of it."""
    stats = statistics()
    moved = {kind: Moments(count=3, mean=its.mean * 1e-3 + 1e3) for kind, its in stats.moments.items()}
    found = difference_of_means(ActivationStats(positions=stats.positions, moments=moved))
    for one, expected in zip(found, difference_of_means(stats), strict=True):
        assert torch.allclose(one.vector, expected.vector * 1e-3, rtol=1e-6, atol=1e-12)


def test_the_projected_difference_has_nothing_along_the_harmless_mean():
    """So that removing it leaves the harmless mean as it is; what is left is the difference otherwise."""
    stats = statistics()
    for one, plain in zip(
        ESTIMATORS["projected-difference"].candidates(stats), difference_of_means(stats), strict=True
    ):
        harmless = stats.mean("harmless")[stats.positions.index(one.position), one.layer]
        r, h = one.vector.double(), harmless / harmless.norm()
        assert abs(r @ h) < 1e-6 * r.norm()
        assert abs(plain.vector.double() @ h) > 1e-2
        unit = r / r.norm()
        assert torch.allclose(harmless - unit * (unit @ harmless), harmless, atol=1e-6)
        assert torch.allclose(r + (plain.vector.double() @ h) * h, plain.vector.double(), atol=1e-6)
        assert one.id == f"projected-difference/{one.position}/{one.layer}"


def test_an_unknown_estimator_is_refused():
    with pytest.raises(UsageError, match="no estimator 'guessing'") as error:
        needs_of(["difference-of-means", "guessing"])
    assert "difference-of-means" in error.value.hint


# --- what an estimator needs is measured ------------------------------------------------------------------------------


def largest_variance(stats):
    """Per layer the direction in which harmful prompts differ most, and the first two prompts."""
    covariance = stats.moments["harmful"].covariance
    for layer in range(stats.n_layers):
        yield "pca", layer, torch.linalg.eigh(covariance[layer].double())[1][:, -1:].float()
        yield "two", layer, stats.samples["harmless"][:2, layer].T.contiguous()


def made(stats):
    return tuple(
        Candidate(id=f"{name}/{layer}", subspace=Subspace(vectors=vectors), layer=layer, provenance={"estimator": name})
        for name, layer, vectors in largest_variance(stats)
    )


@pytest.fixture
def session():
    return open_session(None, RECIPE)


@pytest.fixture
def curious(monkeypatch):
    """An estimator that needs everything there is."""
    needs = frozenset({"covariance", "samples"})
    monkeypatch.setitem(ESTIMATORS, "curious", Estimator(needs=needs, candidates=made))


def asking(session, names):
    """The session under a recipe with these estimators."""
    return dataclasses.replace(session, recipe=session.recipe.with_changes({"estimators": names}))


def test_estimators_get_what_they_ask_for(session, curious, tmp_path):
    assert needs_of(["difference-of-means"]) == {"means"}
    assert needs_of(["difference-of-means", "curious"]) == {"means", "covariance", "samples"}
    with Steps(tmp_path / "steps", "work") as steps:
        found = pipeline.measure(asking(session, ["difference-of-means", "curious"]), steps=steps)
        again = pipeline.measure(asking(session, ["difference-of-means", "curious"]), steps=steps)
    alone = pipeline.measure(session)
    n = len(alone.candidates)
    assert torch.equal(torch.stack([one.vector for one in found.candidates[:n]]), vectors_of(alone))
    assert [one.id for one in found.candidates[n : n + 2]] == ["pca/0", "two/0"]
    assert [one.id for one in again.candidates] == [one.id for one in found.candidates]
    loaded, chat = session.loaded, session.chat
    texts = session.contrast.harmless_train.texts[:2]
    seen = torch.empty(2, 8, 128)

    def see(rows, layer, values):
        seen[list(rows), layer] = values[:, -1].float()

    see_residuals(loaded, chat, texts, 1, see, batch_size=2)
    for layer in range(8):
        assert torch.allclose(found.named(f"two/{layer}").everywhere.vectors, seen[:, layer].T, atol=1e-4)
    assert all(its.covariance is None for its in found.statistics.moments.values())
    assert not found.statistics.samples


def test_candidates_of_several_estimators_are_scored_chosen_and_kept(session, curious, tmp_path):
    measured = load(save(pipeline.measure(asking(session, ["curious"])), tmp_path / "candidates.safetensors"))
    chosen = load(save(pipeline.select(session, measured), tmp_path / "direction.safetensors"))
    assert len(chosen.scores) == 16
    assert chosen.choice.candidate in {one.id for one in measured.candidates}
    assert chosen.choice.position is None
    assert chosen.choice.layer < 6
    assert {score.candidate.split("/")[0] for score in chosen.scores} == {"pca", "two"}


def test_samples_take_memory_too(session, curious, monkeypatch):
    monkeypatch.setattr(reading, "available_bytes", lambda: 2**20)
    with pytest.raises(UsageError, match="covariances and samples of 8 layers of width 128 take"):
        pipeline.measure(asking(session, ["curious"]))


def test_a_covariance_takes_two_prompts(session):
    with pytest.raises(PromptError, match="measure x: one is left, and a covariance takes two"):
        measure_class(session.loaded, session.chat, ["a"], {"covariance"}, batch_size=2, task="measure x")


# --- and it is the paper's --------------------------------------------------------------------------------------------


def test_a_run_finds_what_version_1_found(tmp_path):
    changes = {"harmful": SOURCE, "harmless": SOURCE, "n_train": 16, "n_val": 8, "n_test": 8, "all_scores": True}
    recipe = load_recipe("arditi-2024").with_changes(changes)
    pipeline.run(None, tmp_path / "out", recipe, with_evaluation=False)
    found, expected = load(tmp_path / "out" / "abliterate" / "direction.safetensors"), load(VERSION_1)
    assert found.choice == expected.choice
    assert torch.allclose(found.direction, expected.direction, atol=1e-4)
    assert torch.allclose(vectors_of(found), vectors_of(expected), atol=1e-4)
    assert [one.candidate for one in found.scores if one.verdict == "kept"] == [
        one.candidate for one in expected.scores if one.verdict == "kept"
    ]
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        assert ours.candidate == theirs.candidate
        assert ours.bypass == pytest.approx(theirs.bypass, abs=1e-3, nan_ok=True)
    assert estimate(found.statistics)[0].id == found.candidates[0].id


# --- a direction of its own in each layer -----------------------------------------------------------------------------


def test_every_layer_has_its_own_direction_but_where_a_class_makes_no_difference():
    stats = statistics()
    same = {kind: its.mean.clone() for kind, its in stats.moments.items()}
    same["harmless"][:, 0] = same["harmful"][:, 0] * (1 + 1e-9)
    moments = {kind: Moments(count=3, mean=mean) for kind, mean in same.items()}
    found = per_layer(ActivationStats(positions=stats.positions, moments=moments))
    assert [one.id for one in found] == ["per-layer/-3", "per-layer/-2", "per-layer/-1"]
    for p, one in enumerate(found):
        assert list(one.subspace) == [1, 2, 3]
        assert one.layer == 2
        for layer, its in one.subspace.items():
            assert torch.equal(its.vectors[:, 0], (same["harmful"] - same["harmless"])[p, layer])


def test_where_no_layer_differs_there_is_no_candidate():
    stats = statistics()
    moments = dict.fromkeys(("harmful", "harmless"), stats.moments["harmful"])
    assert per_layer(ActivationStats(positions=stats.positions, moments=moments)) == ()


def test_a_biprojected_direction_leaves_the_harmless_mean_of_every_edited_layer():
    stats = statistics()
    plain = {one.id.partition("/")[2]: one.vector.double() for one in difference_of_means(stats)}
    found = biprojected_difference(stats)
    assert len(found) == len(plain)
    for one in found:
        p = stats.positions.index(one.position)
        assert list(one.subspace) == [0, 1, 2, 3]
        for layer, its in one.subspace.items():
            h = stats.mean("harmless")[p, layer]
            r = its.vectors[:, 0] / its.vectors.norm()
            assert torch.allclose(h - r * (r @ h), h, atol=1e-12)
            expected = plain[f"{one.position}/{one.layer}"] - (plain[f"{one.position}/{one.layer}"] @ h) * h / (h @ h)
            assert torch.allclose(its.vectors[:, 0], expected, atol=1e-6)


# --- self-organising maps ---------------------------------------------------------------------------------------------


def test_a_map_of_one_neuron_is_the_mean():
    """So the difference of means is the map's smallest case, exactly."""
    samples = torch.randn(40, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    harmless = torch.randn(7, dtype=torch.float64)
    neurons, won = batch_map(samples, rows=1, columns=1)
    assert torch.allclose(neurons[0], samples.mean(0), atol=1e-14)
    assert torch.allclose(directions_of(neurons, won, harmless)[:, 0], samples.mean(0) - harmless, atol=1e-14)


@pytest.mark.parametrize("seed", range(4))
def test_a_map_finds_clusters_whatever_the_order_of_the_samples(seed):
    generator = torch.Generator().manual_seed(seed)
    centres = 20 * torch.randn(3, 9, generator=generator, dtype=torch.float64)
    counts = (40, 25, 10)
    samples = torch.cat([c + torch.randn(n, 9, generator=generator) for c, n in zip(centres, counts, strict=True)])
    neurons, won = batch_map(samples, rows=1, columns=3)
    found = directions_of(neurons, won, torch.zeros(9))
    assert found.shape == (9, 3)
    for column, centre in zip(found.T, centres, strict=True):  # most prompts first
        assert torch.dist(column, centre) < 0.1 * torch.cdist(centres, centres).max()  # its neighbours pull by 1 %
    order = torch.randperm(len(samples), generator=generator)
    again, won_again = batch_map(samples[order], rows=1, columns=3)
    assert torch.allclose(directions_of(again, won_again, torch.zeros(9)), found, atol=1e-9)


def test_neighbours_on_the_map_pull_each_other_by_the_width_of_the_neighbourhood():
    places = hexagonal(4, 4)
    apart = torch.cdist(places, places)
    neighbours = ((apart - 1).abs() < 1e-9).sum(1)
    assert neighbours.max() == 6
    assert apart[apart > 0].min() == pytest.approx(1)
    samples = torch.tensor([[0.0], [0.0], [10.0]], dtype=torch.float64)
    alone, _ = batch_map(samples, rows=1, columns=2, sigma=0.01)
    assert sorted(alone[:, 0].tolist()) == [0.0, 10.0]
    wide, _ = batch_map(samples, rows=1, columns=2, sigma=100.0)
    assert torch.allclose(wide, samples.mean().expand(2, 1), atol=1e-3)


def test_the_largest_neurons_of_each_layer_are_a_candidate():
    generator = torch.Generator().manual_seed(3)
    samples = {kind: torch.randn(30, 4, 6, generator=generator) for kind in ("harmful", "harmless")}
    stats = dataclasses.replace(statistics(), samples=samples)
    found = self_organising_map(stats)
    assert {one.provenance["k"] for one in found} <= set(range(2, 8))
    for one in found:
        assert one.subspace.vectors.shape == (6, one.provenance["k"])
        assert one.id == f"self-organising-map/{one.provenance['k']}/{one.layer}"
    three = next(one for one in found if one.provenance["k"] == 3)
    two = next(one for one in found if one.provenance["k"] == 2 and one.layer == three.layer)
    assert torch.equal(three.subspace.vectors[:, :2], two.subspace.vectors)


def test_one_prompt_makes_no_map_of_two_directions():
    samples = {kind: torch.randn(1, 4, 6) for kind in ("harmful", "harmless")}
    assert self_organising_map(dataclasses.replace(statistics(), samples=samples)) == ()
    with pytest.raises(ValueError, match="nothing"):
        batch_map(torch.empty(0, 3))


# --- least squares erasure --------------------------------------------------------------------------------------------


def two_classes(*, n=60, d=5, seed=0):
    """Samples of two classes around other means, with one strongly skewed covariance, and their statistics."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64) * torch.logspace(0, 1, d, dtype=torch.float64)
    classes = {
        kind: torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix
        + shift * torch.randn(d, generator=generator)
        for kind, shift in (("harmful", 4.0), ("harmless", 1.0))
    }
    moments = {
        kind: Moments(count=n, mean=its.mean(0)[None, None], covariance=its.T.cov()[None])
        for kind, its in classes.items()
    }
    return classes, ActivationStats(positions=(-1,), moments=moments)


def erased(x, candidate):
    """The closed form, written out."""
    delta, w = candidate.subspace.vectors[:, 0].double(), candidate.subspace.read[:, 0].double()
    return x - torch.outer(x @ w, delta) / (w @ delta)


def test_erasure_makes_the_means_of_the_classes_one():
    classes, stats = two_classes()
    (one,) = least_squares_erasure(stats)
    assert one.id == "least-squares-erasure/-1/0"
    means = [erased(its, one).mean(0) for its in classes.values()]
    assert torch.allclose(*means, atol=1e-10)
    assert not torch.allclose(*(its.mean(0) for its in classes.values()), atol=0.1)


def test_erasure_changes_less_than_the_orthogonal_projection_in_the_metric_of_the_covariance():
    classes, stats = two_classes()
    (one,) = least_squares_erasure(stats)
    delta = one.subspace.vectors[:, 0].double()
    inverse = torch.linalg.inv(within_classes(stats, 0))

    def cost(change):
        return float(((change @ inverse) * change).sum(1).mean())

    everything = torch.cat(list(classes.values())) - torch.cat(list(classes.values())).mean(0)
    ours = cost(everything - erased(everything, one))
    r = delta / delta.norm()
    assert ours < cost(torch.outer(everything @ r, r))
    elsewhere = torch.randn(len(delta), dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    assert ours < cost(torch.outer(everything @ elsewhere, delta) / (elsewhere @ delta))


def test_no_linear_probe_tells_the_classes_apart_afterwards():
    """Least squares on labels, the best linear probe there is for two classes of one covariance, has nothing left."""
    classes, stats = two_classes(n=400)
    (one,) = least_squares_erasure(stats)
    x, labels = torch.cat(list(classes.values())), torch.cat([torch.ones(400), -torch.ones(400)]).double()

    def accuracy(values):
        columns = torch.cat([values, torch.ones(len(values), 1, dtype=torch.float64)], 1)
        told = columns @ torch.linalg.lstsq(columns, labels[:, None]).solution[:, 0]
        return float(((told > 0) == (labels > 0)).double().mean()), float(told.var())

    assert accuracy(x)[0] > 0.8
    assert accuracy(erased(x, one))[1] < 1e-12


def test_a_covariance_of_few_prompts_is_shrunk_and_one_of_none_gives_no_candidate():
    s = torch.diag(torch.tensor([4.0, 1.0, 1.0], dtype=torch.float64))
    assert torch.allclose(shrunk(s, 10**9), s, atol=1e-6)
    few = shrunk(s, 2)
    assert float(few.trace()) == pytest.approx(6.0)
    assert torch.allclose(few, 2 * torch.eye(3, dtype=torch.float64))
    a = 1 - 36 / 20 / (18 - 12)
    assert torch.allclose(shrunk(s, 20), a * s + (1 - a) * 2 * torch.eye(3, dtype=torch.float64))
    _, stats = two_classes()
    same = {kind: dataclasses.replace(its, covariance=its.covariance * 0) for kind, its in stats.moments.items()}
    assert least_squares_erasure(ActivationStats(positions=(-1,), moments=same)) == ()


def test_what_is_read_along_others_survives_a_file_and_is_removed_as_it_says(tmp_path):
    _, stats = two_classes(d=8)
    (one,) = estimate(stats, ["least-squares-erasure"])
    before = DirectionSet(candidates=(one,)).choose_candidate(one.id)
    after = load(save(before, tmp_path / "d.safetensors"))
    assert after.sha256 == before.sha256
    assert torch.equal(after.chosen.subspace.read, one.subspace.read)
    assert not after.chosen.is_vector
    (edit,) = removal(after.chosen).edits()
    assert edit.removes
    x = torch.randn(4, 8, dtype=torch.float64)
    assert torch.allclose(x - (x @ edit.read) @ edit.write.T, erased(x, one), atol=1e-10)
    plain = dataclasses.replace(one, subspace=Subspace(vectors=one.subspace.vectors))
    assert DirectionSet(candidates=(plain,)).choose_candidate(one.id).sha256 != before.sha256
