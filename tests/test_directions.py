"""Direction files: what is saved comes back, and what is not a direction is refused in words."""

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from abliterate.checkpoint.direction_file import load, save
from abliterate.errors import SourceError, UsageError
from abliterate.method.directions import Candidate, CandidateScore, DirectionSet, Subspace, given, grid
from abliterate.method.moments import ActivationStats, Moments
from tests.factories import vectors_of

VERSION_1 = Path(__file__).parent / "data" / "version-1"


def some(*, chosen=True):
    values = torch.randn(3, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    moments = {kind: Moments(count=n, mean=values[n]) for n, kind in ((1, "harmful"), (2, "harmless"))}
    made = DirectionSet(
        candidates=grid("difference-of-means", values[0], (-2, -1)),
        statistics=ActivationStats(positions=(-2, -1), moments=moments),
        metadata={"model": "tiny", "kept": {"harmful_train": 3}, "revision": None},
        scores=(score("difference-of-means/-1/3", position=-1, layer=3),),
    )
    return made.choose(-1, 3, rule="arditi-2024") if chosen else made


def score(candidate, **place):
    return CandidateScore(candidate=candidate, bypass=-1.5, induce=0.25, kl_nats=0.01, verdict="kl", **place)


def described(one):
    """A candidate without its tensors."""
    layers = None if isinstance(one.subspace, Subspace) else tuple(one.subspace)
    return one.id, one.layer, dict(one.provenance), layers


def assert_same(after, before):
    assert [described(one) for one in after.candidates] == [described(one) for one in before.candidates]
    for ours, theirs in zip(after.candidates, before.candidates, strict=True):
        for a, b in zip(ours.subspaces, theirs.subspaces, strict=True):
            assert torch.equal(a.vectors, b.vectors)
    assert (after.statistics is None) == (before.statistics is None)
    if before.statistics is not None:
        assert after.statistics.positions == before.statistics.positions
        assert list(after.statistics.moments) == list(before.statistics.moments)
        for kind, moments in before.statistics.moments.items():
            assert torch.equal(after.statistics.mean(kind), moments.mean)
            assert after.statistics.moments[kind].count == moments.count
    assert (after.positions, after.metadata, after.scores, after.choice) == (
        before.positions, before.metadata, before.scores, before.choice,
    )  # fmt: skip
    assert (after.n_layers, after.d_model) == (before.n_layers, before.d_model)


@pytest.mark.parametrize("chosen", [True, False])
def test_everything_survives_a_round_trip(chosen, tmp_path):
    before = some(chosen=chosen)
    assert_same(load(save(before, tmp_path / "new folder" / "d.safetensors")), before)


@settings(max_examples=25, deadline=None)
@drawn(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 4), st.lists(st.integers(1, 3), max_size=4), st.data())
def test_candidates_of_any_estimators_survive_a_round_trip(tmp_path_factory, seed, positions, layers, ks, data):
    """One grid or none, and candidates of ``ks`` vectors, some with another subspace in each layer."""
    generator = torch.Generator().manual_seed(seed)
    places = tuple(range(-positions, 0))
    candidates = []
    if data.draw(st.booleans()) or not ks:
        candidates += grid("difference-of-means", torch.randn(positions, layers, 5, generator=generator), places)
    for n, k in enumerate(ks):
        shared, alone = (Subspace(vectors=torch.randn(5, k, generator=generator)) for _ in range(2))
        by_layer = {0: shared, 1: alone, 2: shared}
        subspace = by_layer if data.draw(st.booleans()) else shared
        provenance = {"estimator": "clusters", "cluster": n} | ({"position": -1} if n % 2 else {})
        candidates.append(Candidate(id=f"clusters/{n}", layer=n % layers, subspace=subspace, provenance=provenance))
    before = DirectionSet(candidates=tuple(candidates))
    scores = (score(one.id, layer=one.layer, position=one.position) for one in before.candidates[::2])
    before = DirectionSet(candidates=before.candidates, scores=tuple(scores))
    chosen = before.choose_candidate(data.draw(st.sampled_from([one.id for one in before.candidates])))
    file = save(chosen, tmp_path_factory.mktemp("d") / "d.safetensors")
    after = load(file)
    assert_same(after, chosen)
    for one in after.candidates:
        assert isinstance(one.subspace, Subspace) or one.subspace[0] is one.subspace[2]
    with safe_open(file, "pt") as opened:
        assert ("direction" in opened.keys()) == chosen.chosen.is_vector  # noqa: SIM118


def test_the_file_of_a_difference_of_means_does_not_grow(tmp_path):
    """What version 1 held is held under the same names, and the words about it take no more room."""
    old = VERSION_1 / "direction.safetensors"
    new = save(load(old), tmp_path / "d.safetensors")
    with safe_open(old, "pt") as before, safe_open(new, "pt") as after:
        assert set(after.keys()) == set(before.keys())
        for name in before.keys():  # noqa: SIM118
            assert torch.equal(after.get_tensor(name), before.get_tensor(name))
    assert new.stat().st_size <= old.stat().st_size


# --- formats ----------------------------------------------------------------------------------------------------------


def document_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["abliterate"])


def test_what_is_not_known_of_scores_survives_and_older_files_stopped_nothing(tmp_path):
    scores = (
        replace(score("difference-of-means/-1/3", position=-1, layer=3), bypass=math.nan, kl_stopped=True),
        replace(score("difference-of-means/-2/3", position=-2, layer=3), induce=math.nan, verdict="not asked"),
    )
    found = load(save(replace(some(chosen=True), scores=scores), tmp_path / "d.safetensors"))
    assert repr(found.scores) == repr(scores)
    document = document_of(tmp_path / "d.safetensors")
    assert document["format"] == "abliterate-direction-2"
    del document["scores"]["kl_stopped"]
    tensors = load_file(tmp_path / "d.safetensors")
    save_file(tensors, tmp_path / "older.safetensors", metadata={"abliterate": json.dumps(document)})
    older = load(tmp_path / "older.safetensors")
    assert repr(older.scores) == repr((replace(scores[0], kl_stopped=False), scores[1]))


def test_version_1_is_read(tmp_path):
    path = VERSION_1 / "direction.safetensors"
    found, document = load(path), document_of(path)
    assert document["format"] == "abliterate-direction-1"
    with safe_open(path, "pt") as file:
        assert torch.equal(vectors_of(found), file.get_tensor("candidates").flatten(0, 1))
        assert torch.equal(found.direction, file.get_tensor("direction"))
        for kind in ("harmful", "harmless"):
            assert torch.equal(found.statistics.mean(kind), file.get_tensor(f"{kind}_mean"))
            assert found.statistics.moments[kind].count == 16
    assert (found.choice.candidate, found.choice.rule) == ("difference-of-means/-1/3", "arditi-2024")
    assert (found.choice.position, found.choice.layer) == (-1, 3)
    assert found.metadata == document["measurement"]
    figures = ("position", "layer", "bypass", "induce", "kl_nats", "verdict")
    assert [{name: getattr(one, name) for name in figures} for one in found.scores] == document["scores"]
    again = load(save(found, tmp_path / "d.safetensors"))
    assert document_of(tmp_path / "d.safetensors")["format"] == "abliterate-direction-2"
    assert_same(again, found)


def test_version_1_of_a_given_vector_is_read(tmp_path):
    found = load(VERSION_1 / "direction-of-folder.safetensors")
    with safe_open(VERSION_1 / "direction-of-folder.safetensors", "pt") as file:
        assert torch.equal(found.direction, file.get_tensor("direction"))
    assert (found.choice.candidate, found.choice.rule) == ("given/-1/0", "given")
    assert (found.statistics, found.metadata) == (None, {"source": "d.safetensors"})
    assert_same(load(save(found, tmp_path / "d.safetensors")), found)


def with_format(name, path):
    with safe_open(save(some(), path), "pt") as file:
        document = {**json.loads(file.metadata()["abliterate"]), "format": name}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"abliterate": json.dumps(document)})
    return path


@pytest.mark.parametrize("number", [3, 10])
def test_a_newer_format_is_refused_with_words(number, tmp_path):
    path = with_format(f"abliterate-direction-{number}", tmp_path / "d.safetensors")
    with pytest.raises(SourceError, match=rf"d\.safetensors: was written by a newer .*\(format {number},") as error:
        load(path)
    assert error.value.hint == "update abliterate"


@pytest.mark.parametrize("name", ["abliterate-direction-0", "abliterate-patch-2", "", 2])
def test_another_format_is_refused(name, tmp_path):
    with pytest.raises(SourceError, match=r"d\.safetensors: format .* is unknown"):
        load(with_format(name, tmp_path / "d.safetensors"))


# --- candidates -------------------------------------------------------------------------------------------------------


def test_ids_are_told_apart():
    vectors = torch.ones(1, 1, 4)
    with pytest.raises(ValueError, match="different ids"):
        DirectionSet(candidates=grid("a", vectors, (-1,)) + grid("a", vectors, (-1,)))
    with pytest.raises(ValueError, match="takes candidates"):
        DirectionSet(candidates=())


def test_a_place_where_several_estimators_made_one_is_not_enough_to_choose():
    vectors = torch.arange(1.0, 5.0).view(1, 1, 4)
    both = DirectionSet(candidates=grid("a", vectors, (-1,)) + grid("b", -vectors, (-1,)))
    with pytest.raises(UsageError, match="several candidates are at position -1, layer 0: a/-1/0, b/-1/0"):
        both.choose(-1, 0)
    assert torch.equal(both.choose_candidate("b/-1/0").direction, -vectors[0, 0])
    with pytest.raises(UsageError, match="no candidate 'c'"):
        both.choose_candidate("c")


def test_what_is_not_one_vector_is_no_direction():
    plane = Subspace(vectors=torch.tensor([[3.0, 3.0], [0.0, 4.0], [0.0, 0.0]]))
    for subspace, says in ((plane, "has 2 vectors"), ({0: plane}, "another subspace in each layer")):
        one = Candidate(id="plane", subspace=subspace, layer=0, provenance={"estimator": "test"})
        assert not one.is_vector
        with pytest.raises(UsageError, match=says):
            _ = DirectionSet(candidates=(one,)).choose_candidate("plane").direction
    assert torch.allclose(plane.basis @ plane.basis.T, torch.diag(torch.tensor([1.0, 1.0, 0.0])).double())
    assert torch.equal(plane.added, torch.tensor([3.0, 2.0, 0.0]))


def test_a_given_vector_is_chosen():
    vector = torch.arange(4.0)
    made = given(vector, {"source": "x"})
    assert torch.equal(made.direction, vector)
    assert (made.positions, made.n_layers, made.d_model) == ((-1,), 1, 4)
    assert (made.choice.rule, made.choice.layer, made.choice.position) == ("given", 0, -1)


# --- the file ---------------------------------------------------------------------------------------------------------


def test_saving_leaves_nothing_else_behind(tmp_path):
    save(some(), tmp_path / "d.safetensors")
    save(some(chosen=False), tmp_path / "d.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["d.safetensors"]
    assert load(tmp_path / "d.safetensors").choice is None


def test_the_file_is_float32_and_says_what_its_layers_are(tmp_path):
    save(some(), tmp_path / "d.safetensors")
    with safe_open(tmp_path / "d.safetensors", "pt") as file:
        document = json.loads(file.metadata()["abliterate"])
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}  # noqa: SIM118
        assert torch.equal(file.get_tensor("direction"), some().direction)
    assert "entering block l" in document["layer_convention"]


@pytest.mark.parametrize(("position", "layer"), [(-1, 0), (-2, 3)])
def test_a_chosen_candidate_is_the_direction(position, layer):
    chosen = some().choose(position, layer)
    assert torch.equal(chosen.direction, vectors_of(some()).view(2, 4, 8)[{-2: 0, -1: 1}[position], layer])
    assert chosen.choice.rule == "given"


@pytest.mark.parametrize(("position", "layer"), [(-3, 0), (0, 0), (-1, 4), (-1, -1)])
def test_a_candidate_that_was_not_measured_is_refused(position, layer):
    with pytest.raises(UsageError, match=f"no candidate at position {position}, layer {layer}"):
        some().choose(position, layer)


def test_no_direction_before_a_choice():
    with pytest.raises(UsageError, match="no choice"):
        _ = some(chosen=False).direction


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_foreign_file_with_one_vector_is_a_direction(dtype, tmp_path):
    vector = torch.arange(1, 7).to(dtype)
    save_file({"direction": vector, "something else": torch.ones(2, 2)}, tmp_path / "v.safetensors")
    found = load(tmp_path / "v.safetensors")
    assert torch.equal(found.direction, vector.float())
    assert found.choice.rule == "given"


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"vector": torch.ones(4)}, "no vector called 'direction'"),
        ({"direction": torch.ones(1, 4)}, "no vector called 'direction'"),
        ({"direction": torch.tensor([1.0, float("nan")])}, "'direction' holds NaN"),
        ({"direction": torch.tensor([1.0, float("inf")])}, "'direction' holds NaN or infinity"),
        ({"direction": torch.ones(4), "candidates": torch.full((1, 1, 4), float("nan"))}, "'candidates' holds NaN"),
        ({"direction": torch.zeros(4)}, "is zero"),
    ],
)
def test_a_file_without_a_usable_vector_is_refused(tensors, says, tmp_path):
    save_file(tensors, tmp_path / "v.safetensors")
    with pytest.raises(SourceError, match=says):
        load(tmp_path / "v.safetensors")


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"not safetensors", pickle.dumps({"direction": [1.0]})])
def test_a_file_of_another_kind_is_refused(content, tmp_path):
    (tmp_path / "v.safetensors").write_bytes(content)
    with pytest.raises(SourceError, match="not a readable direction file"):
        load(tmp_path / "v.safetensors")


@pytest.mark.parametrize("name", ["missing.safetensors", "."])
def test_a_missing_file_is_refused(name, tmp_path):
    with pytest.raises(SourceError, match="not a readable direction file"):
        load(tmp_path / name)


LISTED = {"id": "x", "layer": 0, "provenance": {"estimator": "x"}, "subspace": 0, "by_layer": None}
PLANE = {"subspace.0": torch.ones(8, 2)}


def damage(document, tensors):
    """One way each in which one of our own files can be spoiled."""
    return {
        "not JSON": ("{", tensors),
        "not an object": ("[1]", tensors),
        "no positions": ({k: v for k, v in document.items() if k != "positions"}, tensors),
        "other positions": ({**document, "positions": [-3, -2, -1]}, tensors),
        "positions no numbers": ({**document, "positions": "ab"}, tensors),
        "unknown score": ({**document, "scores": [{"loss": 1}]}, tensors),
        "a score less": ({**document, "scores": {**document["scores"], "bypass": []}}, tensors),
        "a score of nothing": ({**document, "scores": {**document["scores"], "candidate": ["x"]}}, tensors),
        "unknown choice": ({**document, "choice": {"block": 1}}, tensors),
        "choice elsewhere": ({**document, "choice": {"position": -1, "layer": 99, "rule": "given"}}, tensors),
        "no format": ({k: v for k, v in document.items() if k != "format"}, tensors),
        "no counts": ({k: v for k, v in document.items() if k != "counts"}, tensors),
        "a mean that is not there": ({**document, "counts": {"other": 3}}, tensors),
        "a subspace that is not there": ({**document, "others": [LISTED]}, tensors),
        "a vector for a subspace": ({**document, "others": [LISTED]}, {**tensors, "subspace.0": torch.ones(8)}),
        "another width": ({**document, "others": [LISTED]}, {**tensors, "subspace.0": torch.ones(7, 1)}),
        "no estimator": ({**document, "others": [{**LISTED, "provenance": {}}]}, PLANE | tensors),
        "no layers": ({**document, "others": [{**LISTED, "subspace": None, "by_layer": {}}]}, PLANE | tensors),
        "two of one id": ({**document, "others": [LISTED, LISTED]}, PLANE | tensors),
        "no candidates": (document, {k: v for k, v in tensors.items() if k != "candidates"}),
        "flat candidates": (document, {**tensors, "candidates": torch.ones(8)}),
        "other means": (document, {**tensors, "harmful_mean": torch.ones(2, 4, 9)}),
    }


KINDS = list(damage({"positions": 0, "scores": {}}, {"candidates": 0}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_spoiled_file_of_our_own_is_refused(kind, tmp_path):
    with safe_open(save(some(), tmp_path / "d.safetensors"), "pt") as file:
        document = json.loads(file.metadata()["abliterate"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    document, tensors = damage(document, tensors)[kind]
    text = document if isinstance(document, str) else json.dumps(document)
    save_file(tensors, tmp_path / "spoiled.safetensors", metadata={"abliterate": text})
    with pytest.raises(SourceError, match="spoiled"):
        load(tmp_path / "spoiled.safetensors")
