"""``abliterate export``: files that a runtime takes beside the model say what the direction does, or are refused."""

import errno
import json

import pytest
import torch
from typer.testing import CliRunner

from abliterate.checkpoint.direction_file import load, save
from abliterate.cli.app import app
from abliterate.errors import OutputError
from abliterate.exports import control_vector, gguf_file, projection
from abliterate.method.directions import Candidate, DirectionSet, Subspace, given, grid
from abliterate.method.moments import ActivationStats, Moments

gguf = pytest.importorskip("gguf")

D, LAYERS = 8, 4
BLOCKS = [1, 2, 3]
KINDS = ("control-vector", "projection")


def vectors(seed=0):
    return torch.randn(2, LAYERS, D, generator=torch.Generator().manual_seed(seed))


def candidate(name, subspace, **more):
    return Candidate(id=name, subspace=subspace, layer=2, provenance={"estimator": name, **more})


@pytest.fixture
def file(tmp_path):
    """A measurement of four layers, with candidates of every form."""
    along = torch.eye(D)
    pair = candidate("pair", Subspace(vectors=along[:, :2].clone()), categories=("crime", "hate"))
    layered = candidate("layered", {layer: Subspace(vectors=along[:, layer : layer + 1]) for layer in range(LAYERS)})
    across = candidate("across", Subspace(vectors=along[:, :1].clone(), read=along[:, 1:2].clone()))
    means = {kind: Moments(count=2, mean=vectors(seed)) for seed, kind in enumerate(("harmful", "harmless"))}
    made = DirectionSet(
        candidates=(*grid("x", vectors(), (-2, -1)), pair, layered, across),
        statistics=ActivationStats(positions=(-2, -1), moments=means),
        metadata={"model": "tiny"},
    )
    return save(made.choose_candidate("x/-2/2"), tmp_path / "direction.safetensors")


def chosen(file, name):
    return save(load(file).choose_candidate(name), file.with_name(f"{name}.safetensors"))


def run(*args):
    return CliRunner().invoke(app, ["export", *map(str, args)])


def refused(code, *says):
    def check(shown):
        assert shown.exit_code == code, shown.output
        assert all(text in " ".join(shown.stderr.split()) for text in says), shown.stderr
        assert "Traceback" not in shown.output

    return check


def read(path):
    """Keys and tensors of a GGUF file, by the library that others read it with."""
    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return values, {its.name: torch.tensor(its.data.copy()) for its in reader.tensors}


# --- what is written --------------------------------------------------------------------------------------------------


def test_a_control_vector_holds_what_enters_the_next_block(file, tmp_path):
    out = tmp_path / "new" / "out.gguf"
    assert json.loads(run("control-vector", file, "--out", out, "--json").stdout) == {
        "file": str(out),
        "blocks": [2 - 1],
    }
    values, tensors = read(out)
    assert values == {
        "general.architecture": "controlvector", "controlvector.model_hint": "tiny", "controlvector.layer_count": 1,
    }  # fmt: skip
    assert tensors.keys() == {"direction.1"}
    assert torch.equal(tensors["direction.1"], vectors()[0, 2])


def test_another_candidate_is_taken_by_its_place(file, tmp_path):
    out = tmp_path / "out.gguf"
    shown = run("control-vector", file, "--out", out, "--position", -1, "--layer", 3)
    assert "what leaves block 2 " in shown.stdout
    assert torch.equal(read(out)[1]["direction.2"], vectors()[1, 3])


def test_a_candidate_of_many_layers_is_a_vector_for_each(file, tmp_path):
    found = control_vector.vectors_of(load(file).choose_candidate("layered"))
    assert {block: vector.tolist() for block, vector in found.items()} == {
        1: torch.eye(D)[:, 2].tolist(), 2: torch.eye(D)[:, 3].tolist(),
    }  # fmt: skip


def test_a_projection_takes_the_direction_out_behind_every_block_but_the_first(file, tmp_path):
    out = tmp_path / "out.gguf"
    shown = run("projection", file, "--out", out)
    assert "what leaves block 1 to 3 " in shown.stdout
    assert "llama.cpp does not know this form" in shown.stderr
    values, tensors = read(out)
    assert values == {
        "general.architecture": "controlvector", "controlvector.model_hint": "tiny", "controlvector.layer_count": 3,
        "glp.mode": "project", "glp.alpha_default": 1.0, "glp.rank": 1, "glp.hook_point": "resid_post",
        "glp.spec_version": 1,
    }  # fmt: skip
    assert tensors.keys() == {f"direction.{block}" for block in BLOCKS}
    direction = vectors()[0, 2]
    assert direction.norm() > 1.5
    for vector in tensors.values():
        stream = torch.randn(5, D, generator=torch.Generator().manual_seed(3))
        left = stream - values["glp.alpha_default"] * (stream @ vector)[:, None] * vector
        assert (left @ direction).abs().max() < 1e-5
        assert (stream @ direction).abs().max() > 1


def test_what_differs_from_layer_to_layer_is_taken_out_where_it_was_read(file, tmp_path):
    out = tmp_path / "out.gguf"
    found = json.loads(run("projection", chosen(file, "layered"), "--out", out, "--json").stdout)
    assert found == {"file": str(out), "blocks": [1, 2], "mode": "project"}
    assert torch.equal(read(out)[1]["direction.1"], torch.eye(D)[:, 2])


def test_one_of_several_vectors_is_taken_by_its_category(file, tmp_path):
    pair, out = chosen(file, "pair"), tmp_path / "out.gguf"
    refused(2, "has 2 vectors", "--category")(run("projection", pair, "--out", out))
    assert run("projection", pair, "--out", out, "--category", "hate").exit_code == 0
    assert torch.equal(read(out)[1]["direction.3"], torch.eye(D)[:, 1])


def test_a_vector_from_elsewhere_takes_the_number_of_blocks(tmp_path):
    file, out = save(given(torch.ones(D)), tmp_path / "direction.safetensors"), tmp_path / "out.gguf"
    refused(2, "how many blocks the model has", "--blocks")(run("projection", file, "--out", out))
    assert run("projection", file, "--out", out, "--blocks", LAYERS).exit_code == 0
    assert read(out)[1].keys() == {f"direction.{block}" for block in BLOCKS}


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_control_vector_cannot_ablate(file, tmp_path):
    shown = run("control-vector", file, "--out", tmp_path / "out.gguf", "--ablate")
    refused(2, "cannot take anything out", "abliterate export projection", "abliterate edit", "patch")(shown)
    assert not (tmp_path / "out.gguf").exists()


def test_what_no_file_can_express_is_refused(file, tmp_path):
    out = tmp_path / "out.gguf"
    early = run("control-vector", file, "--out", out, "--position", -1, "--layer", 1)
    refused(2, "is of layer 1", "begins at layer 2", "--layer")(early)
    refused(2, "takes out something else than what it reads", "patch")(
        run("projection", chosen(file, "across"), "--out", out)
    )
    refused(2, "--blocks says 9 blocks, the measurement in the direction file 4")(
        run("projection", file, "--out", out, "--blocks", 9)
    )
    refused(2, "behind the second block")(
        run("projection", save(given(torch.ones(D)), tmp_path / "g.safetensors"), "--out", out, "--blocks", 1)
    )
    assert not out.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_input_that_is_none_is_refused(kind, file, tmp_path):
    out, broken = tmp_path / "out.gguf", tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a direction")
    refused(5, "not a readable direction file")(run(kind, broken, "--out", out))
    refused(5, "not a readable direction file")(run(kind, tmp_path / "missing.safetensors", "--out", out))
    refused(2, "no candidate at position -1, layer 77")(run(kind, file, "--out", out, "--position", -1, "--layer", 77))
    refused(2, "no direction of a category 'crime'")(run(kind, file, "--out", out, "--category", "crime"))
    undecided = save(DirectionSet(candidates=grid("x", vectors(), (-2, -1))), tmp_path / "undecided.safetensors")
    refused(2, "no choice")(run(kind, undecided, "--out", out))
    assert not out.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_overwritten(kind, file, tmp_path):
    out = tmp_path / "out.gguf"
    out.write_bytes(b"mine")
    refused(2, "exists already")(run(kind, file, "--out", out))
    assert out.read_bytes() == b"mine"
    refused(2, "cannot be written")(run(kind, file, "--out", out / "below"))


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_library_the_way_to_it_is_named(kind, file, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "find_spec", lambda _: None)
    refused(2, "gguf library is not installed", "pip install 'abliterate[gguf]'")(
        run(kind, file, "--out", tmp_path / "out.gguf")
    )


def test_a_file_has_its_name_only_when_it_is_whole(file, tmp_path, monkeypatch):
    out, partial = tmp_path / "out.gguf", tmp_path / "out.gguf.partial"
    partial.write_bytes(b"left by a run that was killed")

    def full(writer):
        assert partial.exists()
        assert not out.exists()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
        with pytest.raises(OutputError, match="No space left"):
            projection.export(load(file), out)
    assert not out.exists()
    assert not partial.exists()
    projection.export(load(file), out)
    assert read(out)[1].keys() == {f"direction.{block}" for block in BLOCKS}
    assert not partial.exists()
