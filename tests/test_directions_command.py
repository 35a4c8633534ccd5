"""``abliterate directions``: what is in a file, and how far two of them agree."""

import json

import pytest
import torch
from typer.testing import CliRunner

from abliterate.checkpoint.direction_file import save
from abliterate.cli.app import app
from abliterate.method.directions import Candidate, DirectionSet, Subspace, given, grid

D, LAYERS = 8, 3


def vectors(seed):
    return torch.randn(2, LAYERS, D, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def files(tmp_path):
    """Two that share candidates, whose second has every vector turned by 60 degrees, and one of another width."""
    plain = vectors(0)
    across = vectors(1)
    across = across - (across * plain).sum(-1, keepdim=True) * plain / plain.square().sum(-1, keepdim=True)
    turned = 0.5 * plain / plain.norm(dim=-1, keepdim=True) + 0.75**0.5 * across / across.norm(dim=-1, keepdim=True)
    pair = Subspace(vectors=torch.eye(D)[:, :2], read=torch.eye(D)[:, 1:3])
    layered = {layer: Subspace(vectors=torch.eye(D)[:, layer : layer + 1]) for layer in range(LAYERS)}
    more = (
        Candidate(id="pair/0", subspace=pair, layer=0, provenance={"estimator": "pair"}),
        Candidate(id="layered", subspace=layered, layer=1, provenance={"estimator": "layered"}),
    )
    sets = {
        "one": DirectionSet(candidates=(*grid("x", plain, (-2, -1)), *more)),
        "other": DirectionSet(candidates=grid("x", turned, (-2, -1))),
    }
    made = {name: save(its.choose_candidate("x/-1/1"), tmp_path / f"{name}.safetensors") for name, its in sets.items()}
    return made | {"wide": save(given(torch.ones(D + 1)), tmp_path / "wide.safetensors")}


def run(*args):
    return CliRunner().invoke(app, ["directions", *map(str, args)])


def test_a_file_is_summed_up(files):
    shown = run(files["one"], "--json")
    found = json.loads(shown.stdout)
    assert found["estimators"]["x"] == {"candidates": 6, "vectors": "1", "layers": [0, 1, 2]}
    assert found["estimators"]["pair"]["vectors"] == "2, read along others"
    assert found["estimators"]["layered"]["vectors"] == "1 a layer"
    assert found["choice"] == {"candidate": "x/-1/1", "rule": "given"}
    own = torch.nn.functional.cosine_similarity(vectors(0)[1][:, None], vectors(0)[1][None], dim=-1)
    assert torch.allclose(torch.tensor(found["cosines"]), own, atol=1e-4)
    text = run(files["one"]).stdout
    assert "8 candidates, width 8" in text
    assert "0 to 2" in text
    assert "  1 " in text


def test_two_files_are_compared(files):
    found = json.loads(run(files["one"], files["other"], "--json").stdout)["compared"]
    assert found["shared"] == 6
    assert found["chosen"] == pytest.approx(0.5, abs=1e-5)
    assert found["mean"] == pytest.approx(0.5, abs=1e-5)
    text = run(files["one"], files["other"]).stdout
    assert "what was chosen in both: cosine 0.5000" in text
    assert "6 candidates of the same name" in text


def test_what_cannot_be_compared_is_said(files):
    failure = run(files["one"], files["wide"])
    assert failure.exit_code == 2
    assert "width 9" in failure.stderr
