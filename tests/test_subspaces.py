"""Candidates of several vectors, or of others in each layer, all the way through a run and what comes after it."""

import dataclasses
import math

import pytest
import torch
from typer.testing import CliRunner

import abliterate
from abliterate.checkpoint import direction_file
from abliterate.cli.app import app
from abliterate.editing import asked
from abliterate.errors import NonFiniteError, UsageError
from abliterate.evaluate.observing import components
from abliterate.evaluate.page import write_report
from abliterate.events import Noted, Started
from abliterate.method import edits
from abliterate.method.directions import Candidate, DirectionSet, Subspace, given
from abliterate.method.edits import affine, removal
from abliterate.method.estimators import ESTIMATORS, Estimator, estimate
from abliterate.method.stream_edit import StreamEdit
from abliterate.model import measuring
from abliterate.model.forward import last_log_probs
from abliterate.model.interventions import added, edited
from abliterate.publishing import manifest
from abliterate.recipe import Recipe
from abliterate.workflow import pipeline
from abliterate.workflow.session import open_session
from abliterate.workflow.trials import control_candidates

SOURCE = "bundled:tiny-chat"
RECIPE = Recipe(
    harmful=SOURCE, harmless=SOURCE, n_train=12, n_val=4, n_test=4, refusal_tokens=("I",), max_new_tokens=8,
    controls=True, max_kl_nats=1e9, min_induce=-1e9,
)  # fmt: skip


def candidate(name, subspace, layer=3):
    return Candidate(id=f"{name}/{layer}", subspace=subspace, layer=layer, provenance={"estimator": name})


def differences(stats):
    """Float64, as an estimator may leave them."""
    return stats.mean("harmful") - stats.mean("harmless")


def planes(stats):
    """The differences at the last two positions, together."""
    found = differences(stats)
    return tuple(candidate("planes", Subspace(vectors=found[-2:, layer].T), layer) for layer in range(2, 5))


def layered(stats):
    """The difference of each layer, removed from what the layer adds."""
    found = differences(stats)
    by_layer = {layer: Subspace(vectors=found[-1, layer][:, None]) for layer in range(1, stats.n_layers)}
    elsewhere = {layer: subspace for layer, subspace in by_layer.items() if layer != 3}
    return (candidate("layered", by_layer, 3), candidate("layered", by_layer, 4), candidate("elsewhere", elsewhere, 3))


@pytest.fixture
def estimators(monkeypatch):
    for name, made in (("planes", planes), ("layered", layered)):
        monkeypatch.setitem(ESTIMATORS, name, Estimator(needs=frozenset({"means"}), candidates=made))


@pytest.fixture(scope="module")
def session():
    return open_session(None, RECIPE)


@pytest.mark.parametrize(("name", "rank"), [("planes", 2), ("layered", 1)])
def test_a_run_removes_it_and_what_comes_after_takes_it(name, rank, estimators, tmp_path):
    recipe = RECIPE.with_changes({"estimators": (name,)})
    run = abliterate.run(None, tmp_path / "out", recipe)
    assert run.verification.ok
    assert [one.name for one in run.evaluation.models] == ["base", "edited", "control: random", "control: orthogonal"]
    along = run.evaluation.base.along
    assert all(math.isfinite(value) for values in along.values() for value in values)
    assert not math.isnan(run.directions.scores[0].bypass)
    write_report(tmp_path / "report.html", "x", run.evaluation, directions=run.directions)
    assert abliterate.verify(run.out).ok
    for measure in (False, True):
        again = abliterate.reproduce(run.out, measure=measure)
        assert again.agrees
        assert again.direction_agrees
    found = abliterate.diff("tiny-chat", run.out)
    assert found.only_writers or name == "layered"  # the embedding of the latter is left alone
    assert abliterate.export_lora("tiny-chat", tmp_path / "lora", edited=run.out).rank == rank
    with pytest.raises(UsageError, match="is a subspace, and a single direction can be inspected"):
        abliterate.inspect(None, run.directions, recipe)


def test_the_commands_take_a_subspace(tmp_path):
    one = candidate("planes", Subspace(vectors=torch.randn(128, 2, generator=torch.Generator().manual_seed(0))))
    file = direction_file.save(DirectionSet(candidates=(one,)).choose_candidate(one.id), tmp_path / "d.safetensors")
    done = CliRunner().invoke(app, ["edit", "tiny-chat", str(file), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert manifest.read(tmp_path / "out")["edit"]["edits"][0]["directions"] == 2


# --- scores and figures -----------------------------------------------------------------------------------------------


def test_a_subspace_for_each_layer_is_scored_by_hooks(session, estimators):
    stats = pipeline.measure(session).statistics
    one, _, elsewhere = layered(stats)
    whole = Candidate(id="whole", subspace=one.subspace[3], layer=3, provenance={"estimator": "x"})
    prompts = measuring.Filtered(
        harmful=tuple(session.contrast.harmful_val.texts), harmless=tuple(session.contrast.harmless_val.texts),
        harmful_before=4, harmless_before=4,
    )  # fmt: skip
    ids, notes = [5], []
    on = measuring.Validation(prompts=prompts, refusal_ids=ids)
    scores = measuring.score_candidates(
        session.loaded, session.chat, [whole, one, elsewhere], on, batch_size=8, on_event=notes.append
    )
    for found, around in (
        ((scores[1].bypass, prompts.harmful), edited(session.loaded, removal(one))),
        ((scores[1].induce, prompts.harmless), added(session.loaded, one.subspace[3].added, 3)),
    ):
        with around:
            log_probs = last_log_probs(session.loaded, session.chat, found[1], batch_size=8)
        assert found[0] == pytest.approx(float(measuring.refusal_metric(log_probs, ids).mean()), abs=1e-3)
    assert scores[0].induce == pytest.approx(scores[1].induce, abs=1e-3)
    assert math.isnan(scores[2].bypass)
    texts = [event.text for event in notes if isinstance(event, Noted)]
    assert texts == [
        "not scored, as they have a zero vector in some layer, or nothing at their own: 1 candidates, "
        "elsewhere/3 the first"
    ]


def test_components_are_signed_along_one_vector_and_lengths_along_several(session):
    v = torch.randn(128, 2, generator=torch.Generator().manual_seed(0))
    prompts = session.contrast.harmful_test.texts[:3]

    def along(subspace):
        return components(session.loaded, session.chat, prompts, candidate("x", subspace), batch_size=8)

    one, other = along(Subspace(vectors=v[:, :1])), along(Subspace(vectors=-3 * v[:, :1]))
    assert one == pytest.approx([-value for value in other])
    assert along({3: Subspace(vectors=v[:, :1]), 4: Subspace(vectors=v)}) == pytest.approx(one)
    both = along(Subspace(vectors=v))
    second = v[:, 1:] - v[:, :1] * (v[:, 0] @ v[:, 1]) / (v[:, 0] @ v[:, 0])
    rest = along(Subspace(vectors=second))
    assert both == pytest.approx([math.hypot(a, b) for a, b in zip(one, rest, strict=True)], rel=1e-4)


@pytest.mark.parametrize("k", [1, 3])
def test_controls_are_like_the_chosen(k):
    v = torch.randn(20, k, generator=torch.Generator().manual_seed(0))
    one = candidate("x", {1: Subspace(vectors=v), 3: Subspace(vectors=2 * v)})
    chosen = DirectionSet(candidates=(one,)).choose_candidate(one.id)
    controls = dict(control_candidates(chosen, seed=1))
    assert list(controls) == ["control: random", "control: orthogonal"]
    for control in controls.values():
        for layer, factor in ((1, 1), (3, 2)):
            vectors = control.subspace[layer].vectors
            assert torch.allclose(vectors.norm(dim=0), factor * v.norm(dim=0), rtol=1e-5)
    assert (v.T @ controls["control: orthogonal"].subspace[3].vectors).abs().max() < 1e-4
    assert (v.T @ controls["control: random"].subspace[3].vectors).abs().max() > 1e-2


def test_controls_of_one_direction_stay_what_they_were():
    r = torch.randn(16, generator=torch.Generator().manual_seed(0)).double()
    generator = torch.Generator().manual_seed(42)
    drawn, other = (torch.randn(16, generator=generator, dtype=torch.float64) for _ in range(2))
    other -= r * (r @ other) / (r @ r)
    found = dict(control_candidates(given(r.float()), seed=42))
    for name, expected in (("control: random", drawn), ("control: orthogonal", other)):
        assert torch.allclose(found[name].vector.double(), expected / expected.norm() * r.norm(), atol=1e-5)


# --- the same numbers before and after a file -------------------------------------------------------------------------


def affine_edit(directions, _):
    """The component of everything is set to that of the mean of harmless prompts, at the embedding alone."""
    place = affine(directions.chosen.subspaces[0].basis, directions.statistics.mean("harmless")[-1, 3])
    return StreamEdit(places={(None, "embedding"): place})


class Killed:
    """The process is "killed" when the edit begins."""

    def __call__(self, event):
        if isinstance(event, Started) and event.task == "edit":
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["planes", "layered", "difference-of-means"])
def test_a_run_that_was_stopped_gives_the_same_bytes(name, estimators, monkeypatch, tmp_path):
    monkeypatch.setitem(edits.EDITS, "affine", affine_edit)
    monkeypatch.setattr(asked, "MOST_OF_EMBEDDING", math.inf)
    recipe = RECIPE.with_changes({"estimators": (name,), "change": "affine", "controls": False})
    options = {"with_evaluation": False}
    whole = pipeline.run(None, tmp_path / "whole", recipe, **options)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(None, tmp_path / "stopped", recipe, on_event=Killed(), **options)
    resumed = pipeline.run(None, tmp_path / "stopped", recipe, **options)
    assert whole.directions.sha256 == resumed.directions.sha256
    files = sorted(path.name for path in whole.out.glob("*.safetensors"))
    assert files
    for file in (*files, "abliterate/edit.safetensors", "abliterate/direction.safetensors"):
        assert (whole.out / file).read_bytes() == (resumed.out / file).read_bytes(), file
    assert manifest.read(whole.out)["edit"] == manifest.read(resumed.out)["edit"]
    stages = pipeline.select(open_session(None, recipe), pipeline.measure(open_session(None, recipe)))
    assert stages.sha256 == whole.directions.sha256
    assert torch.equal(stages.statistics.mean("harmless"), resumed.directions.statistics.mean("harmless"))


def test_vectors_are_float32_once_they_are_estimated(session, estimators):
    stats = pipeline.measure(session).statistics
    found = estimate(stats, ["planes", "layered", "difference-of-means"])
    assert {its.vectors.dtype for one in found for its in one.subspaces} == {torch.float32}


def test_the_hash_of_many_layers_survives_a_file(tmp_path):
    """As text, layer 10 comes before layer 2."""
    generator = torch.Generator().manual_seed(0)
    one = candidate("x", {layer: Subspace(vectors=torch.randn(6, 1, generator=generator)) for layer in range(12)})
    before = DirectionSet(candidates=(one,)).choose_candidate(one.id)
    after = direction_file.load(direction_file.save(before, tmp_path / "d.safetensors"))
    assert after.sha256 == before.sha256
    assert list(after.chosen.subspace) == list(range(12))


def test_candidates_that_are_not_finite_are_left_out(session, monkeypatch):
    def some(stats):
        vectors = torch.full((128, 1), torch.nan)
        return (candidate("broken", Subspace(vectors=vectors)), *planes(stats))

    notes = []
    for name, made in (("some", some), ("none", lambda stats: some(stats)[:1])):
        monkeypatch.setitem(ESTIMATORS, name, Estimator(needs=frozenset({"means"}), candidates=made))

    def asking(name):
        recipe = session.recipe.with_changes({"estimators": (name,)})
        return dataclasses.replace(session, recipe=recipe, on_event=notes.append)

    assert len(pipeline.measure(asking("some")).candidates) == 3
    assert any(isinstance(event, Noted) and "broken/3 the first" in event.text for event in notes)
    with pytest.raises(NonFiniteError, match="all candidates hold NaN or infinity"):
        pipeline.measure(asking("none"))


# --- names are checked before any work --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"change": "typo"}, "there is no edit 'typo'"),
        ({"estimators": ("guessing",)}, "there is no estimator 'guessing'"),
        ({"estimators": ()}, "no estimator is named"),
        ({"estimators": ("difference-of-means",) * 2}, "'difference-of-means' is named more than once"),
    ],
)
def test_wrong_names_are_found_before_any_work(changes, says, monkeypatch, tmp_path):
    monkeypatch.setattr("abliterate.workflow.pipeline.open_session", None)
    monkeypatch.setattr("abliterate.api.open_session", None)
    monkeypatch.setattr("abliterate.api.fetch", None)
    monkeypatch.setattr("abliterate.publishing.relay.stream", None)
    recipe, direction = RECIPE.with_changes(changes), given(torch.ones(128))
    for work in (
        lambda: pipeline.run(None, tmp_path / "out", recipe),
        lambda: abliterate.measure(None, recipe),
        lambda: abliterate.edit("tiny-chat", direction, tmp_path / "out", recipe=recipe),
        lambda: abliterate.stream("a/b", direction, "c/d", tmp_path / "out", recipe=recipe),
    ):
        with pytest.raises(UsageError, match=says) as error:
            work()
        assert "are: " in error.value.hint or "once" in error.value.hint
    assert not list(tmp_path.iterdir())
