"""Estimators: what they make of statistics, and that what they need is measured."""

import dataclasses
from pathlib import Path

import pytest
import torch

from abliterate.checkpoint.direction_file import load, save
from abliterate.errors import PromptError, UsageError
from abliterate.method.directions import Candidate, Subspace
from abliterate.method.estimators import ESTIMATORS, Estimator, difference_of_means, estimate, needs_of
from abliterate.method.moments import ActivationStats, Moments
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
