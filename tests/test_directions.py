"""Direction files: what is saved comes back, and what is not a direction is refused in words."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from abliterate.checkpoint.direction_file import load, save
from abliterate.errors import SourceError, UsageError
from abliterate.method.directions import CandidateScore, DirectionSet


def some(*, chosen=True):
    values = torch.randn(3, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    made = DirectionSet(
        candidates=values[0],
        harmful_mean=values[1],
        harmless_mean=values[2],
        positions=(-2, -1),
        metadata={"model": "tiny", "kept": {"harmful_train": 3}, "revision": None},
        scores=(CandidateScore(position=-1, layer=3, bypass=-1.5, induce=0.25, kl_nats=0.01, verdict="kl"),),
    )
    return made.choose(-1, 3, rule="arditi-2024") if chosen else made


@pytest.mark.parametrize("chosen", [True, False])
def test_everything_survives_a_round_trip(chosen, tmp_path):
    before = some(chosen=chosen)
    after = load(save(before, tmp_path / "new folder" / "d.safetensors"))
    for name in ("candidates", "harmful_mean", "harmless_mean"):
        assert torch.equal(getattr(after, name), getattr(before, name))
    assert (after.positions, after.metadata, after.scores, after.choice) == (
        before.positions, before.metadata, before.scores, before.choice,
    )  # fmt: skip


def test_saving_leaves_nothing_else_behind(tmp_path):
    save(some(), tmp_path / "d.safetensors")
    save(some(chosen=False), tmp_path / "d.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["d.safetensors"]
    assert load(tmp_path / "d.safetensors").choice is None


def test_the_file_is_float32_and_says_what_its_layers_are(tmp_path):
    from safetensors import safe_open

    save(some(), tmp_path / "d.safetensors")
    with safe_open(tmp_path / "d.safetensors", "pt") as file:
        document = json.loads(file.metadata()["abliterate"])
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}  # noqa: SIM118
        assert torch.equal(file.get_tensor("direction"), some().direction)
    assert "entering block l" in document["layer_convention"]


@pytest.mark.parametrize(("position", "layer"), [(-1, 0), (-2, 3)])
def test_a_chosen_candidate_is_the_direction(position, layer):
    chosen = some().choose(position, layer)
    assert torch.equal(chosen.direction, some().candidates[{-2: 0, -1: 1}[position], layer])
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


def damage(document, tensors):
    """One way each in which one of our own files can be spoiled."""
    return {
        "not JSON": ("{", tensors),
        "not an object": ("[1]", tensors),
        "no positions": ({k: v for k, v in document.items() if k != "positions"}, tensors),
        "other positions": ({**document, "positions": [-3, -2, -1]}, tensors),
        "positions no numbers": ({**document, "positions": "ab"}, tensors),
        "unknown score": ({**document, "scores": [{"loss": 1}]}, tensors),
        "unknown choice": ({**document, "choice": {"block": 1}}, tensors),
        "choice elsewhere": ({**document, "choice": {"position": -1, "layer": 99, "rule": "given"}}, tensors),
        "no candidates": (document, {k: v for k, v in tensors.items() if k != "candidates"}),
        "flat candidates": (document, {**tensors, "candidates": torch.ones(8)}),
        "other means": (document, {**tensors, "harmful_mean": torch.ones(2, 4, 9)}),
    }


KINDS = list(damage({"positions": 0}, {"candidates": 0}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_spoiled_file_of_our_own_is_refused(kind, tmp_path):
    from safetensors import safe_open

    with safe_open(save(some(), tmp_path / "d.safetensors"), "pt") as file:
        document = json.loads(file.metadata()["abliterate"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    document, tensors = damage(document, tensors)[kind]
    text = document if isinstance(document, str) else json.dumps(document)
    save_file(tensors, tmp_path / "spoiled.safetensors", metadata={"abliterate": text})
    with pytest.raises(SourceError, match="spoiled"):
        load(tmp_path / "spoiled.safetensors")
