"""Rows of writers keep their lengths: on the written bytes, equal to hooks, and with what comes back of r named."""

import dataclasses
import json

import pytest
import torch

from abliterate import api
from abliterate.checkpoint import edit_file
from abliterate.checkpoint.source import open_folder
from abliterate.data.methods import methods
from abliterate.editing.asked import plan_asked, stream_of_hooks
from abliterate.editing.planning import along, plan
from abliterate.editing.row_lengths import with_row_lengths
from abliterate.errors import PlanRefusedError
from abliterate.method.directions import given
from abliterate.method.edits import orthogonal
from abliterate.method.stream_edit import StreamEdit
from abliterate.model.interventions import operator
from abliterate.options import EditOptions
from abliterate.publishing import wording
from abliterate.recipe import Recipe
from abliterate.verification.checkpoint_proof import verify_bytes
from tests import factories
from tests.test_weight_edits import LOGITS, basis, logits, matrix, write

KEEPING = StreamEdit(everywhere=dataclasses.replace(orthogonal(basis(1, 2)), keeps_rows=True))
NAMES = ("llama-biases", "gpt2", "qwen3-moe")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a model in float64, made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = factories.save(factories.build(name), folder, dtype=torch.float64)
        return made[name]

    return get


def by_hand(folder, made):
    """``D`` and the share of ``r`` that comes back, of every place, from whole matrices side by side, in float64."""
    found = {}
    for place in {writer.place for writer in made.writers}:
        writers = [one for one in made.writers if one.place == place and len(one.tensor.shape) > 1]
        w = torch.cat([matrix(folder, one).double() for one in writers], dim=1)
        q = made.stream.at(*place).read
        removed = w - q @ (q.T @ w)
        factor = w.norm(dim=1) / removed.norm(dim=1)
        found[place] = factor, float((q.T @ (factor[:, None] * removed)).norm() / (q.T @ w).norm())
    return found


@pytest.mark.parametrize("name", NAMES)
def test_rows_keep_their_lengths_and_the_share_that_comes_back_is_told(name, base, tmp_path):
    made = with_row_lengths(along(plan(base(name)), KEEPING))
    out = write(made, tmp_path / "edited")
    report = verify_bytes(made, out)
    assert report.failures == ()
    expected = by_hand(base(name), made)
    for place, (factor, _) in expected.items():
        writers = [one for one in made.writers if one.place == place and len(one.tensor.shape) > 1]
        before, after = (torch.cat([matrix(at, one) for one in writers], dim=1) for at in (base(name), out))
        torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1), rtol=1e-9, atol=0)
        torch.testing.assert_close(made.stream.at(*place).row_scale, factor, rtol=1e-9, atol=0)
    shares = {proof.name: proof.kept_along for proof in report.edited}
    for writer in made.writers:
        w, (factor, _) = matrix(base(name), writer).double(), expected[writer.place]
        q = made.stream.at(*writer.place).read
        back = (q.T @ (factor[:, None] * (w - q @ (q.T @ w)))).norm() / (q.T @ w).norm()
        assert shares[writer.tensor.name] == pytest.approx(float(back), rel=1e-9)
    least, most = (pick(share for _, share in expected.values()) for pick in (min, max))
    assert 1e-3 < least < most < 1  # random rows: little comes back, and it is not rounding
    assert f"({least:.1%} to {most:.1%} of what" in made.notes[-1]
    assert made.notes[-1].startswith("NOT REMOVED")
    assert made.claim == "equal to hooks"
    assert not any(edit.removes for edit in made.distinct_edits)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_equal_to_its_hooks(name, base, tmp_path):
    made = with_row_lengths(along(plan(base(name)), KEEPING))
    out = write(made, tmp_path / "edited")
    assert (logits(out) - logits(base(name), made.stream)).abs().max() <= LOGITS
    plain = StreamEdit(everywhere=orthogonal(basis(1, 2)))
    assert (logits(out) - logits(base(name), plain)).abs().max() > 100 * LOGITS


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss"])
def test_in_half_precision_and_in_parts(name, saved, tmp_path):
    """Rounding leaves the lengths, and a budget that cuts a matrix into parts leaves every byte."""
    made = with_row_lengths(along(plan(saved(name)), KEEPING))
    whole, parts = write(made, tmp_path / "whole"), write(made, tmp_path / "parts", memory_bytes=2**20)
    for shard in made.checkpoint.shards:
        assert (whole / shard.name).read_bytes() == (parts / shard.name).read_bytes()
    assert verify_bytes(made, whole, memory_bytes=2**20).failures == ()
    assert made.claim == ("bytes only" if name == "gemma2" else "equal to hooks")


SPOILT = {
    "rows as the removal leaves them": lambda edit: dataclasses.replace(edit, keeps_rows=False, row_scale=None),
    "one row in a hundredth": lambda edit: dataclasses.replace(
        edit, row_scale=edit.row_scale * torch.tensor([1.01] + [1.0] * (edit.d_model - 1), dtype=torch.float64)
    ),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_writer_is_seen(how, base, tmp_path):
    made = with_row_lengths(along(plan(base("llama")), KEEPING))
    name = next(writer.tensor.name for writer in made.writers if writer.place == (1, "MLP"))
    spoilt = dataclasses.replace(made, edits={**made.edits, name: SPOILT[how](made.edits[name])})
    out = write(spoilt, tmp_path / "edited")
    assert any(f"'{name}'" in failure for failure in verify_bytes(made, out).failures)
    assert (logits(out) - logits(base("llama"), made.stream)).abs().max() > 100 * LOGITS


def test_factors_that_give_no_lengths_back_are_seen_though_all_agree_on_them(base, tmp_path):
    """Plan, bytes and hooks say the same, and the lengths of the rows still tell."""
    made = with_row_lengths(along(plan(base("llama")), KEEPING))
    stream = made.stream.with_edits(lambda edit: dataclasses.replace(edit, row_scale=edit.row_scale * 1.001))
    wrong = along(made, stream)
    failures = verify_bytes(wrong, write(wrong, tmp_path / "edited")).failures
    assert failures
    assert all("have other lengths than in the base" in failure for failure in failures)


def test_the_file_of_the_edit_keeps_the_factors(base, tmp_path):
    made = with_row_lengths(along(plan(base("llama")), KEEPING))
    again = edit_file.load(edit_file.save(made.stream, tmp_path / "edit.safetensors"))
    assert again.sha256 == made.stream.sha256
    assert all(edit.keeps_rows for edit in again.edits())
    plain = made.stream.with_edits(lambda edit: dataclasses.replace(edit, keeps_rows=False, row_scale=None))
    assert plain.sha256 != made.stream.sha256


def test_weights_that_were_not_read_are_no_factors(base):
    edit = next(KEEPING.edits())
    assert KEEPING.lacks_lengths
    for use in (operator, lambda its: edit_file.save(StreamEdit(everywhere=its), base("llama") / "none")):
        with pytest.raises(ValueError, match="were not read from the weights"):
            use(edit)


def test_it_is_said_wherever_the_edit_is_told(base):
    options = EditOptions(change="kept-rows", roles=("attention", "mlp"))
    made = plan_asked(plan(base("llama")), options, given(torch.randn(48)))
    assert {writer.place[1] for writer in made.writers} == {"attention", "MLP"}
    document = made.to_json()
    assert any(note.startswith("NOT REMOVED") for note in document["notes"])
    assert not wording.removes(document)
    assert not wording.is_ablation(document)
    assert any("rows keep their lengths, which puts a part of" in line for line in wording.details(document))
    assert methods()["norm-preserving-rows"].worth("A") == made.claim == "equal to hooks"


def test_folder_card_and_manifest_say_it_and_what_has_no_room_for_it_refuses(base, tmp_path):
    direction = given(torch.randn(48))
    recipe = Recipe(change="kept-rows")
    out = api.edit(base("llama"), direction, tmp_path / "out", recipe=recipe).out
    assert api.verify(out, behaviour=False).ok
    document = json.loads((out / "abliterate.json").read_text("utf-8"))
    assert all(0 < one["kept_along"] < 1 for one in document["verification"]["edited"])
    assert "NOT REMOVED" in (out / "README.md").read_text("utf-8")
    with pytest.raises(PlanRefusedError, match="a patch holds no such edit") as caught:
        api.export_patch(out, base("llama"), tmp_path / "patch")
    assert caught.value.hint
    with pytest.raises(PlanRefusedError):
        api.export_lora(base("llama"), tmp_path / "lora", edited=out)


def test_a_preview_by_hooks_reads_the_lengths(base):
    recipe = Recipe(change="kept-rows")
    direction = given(torch.randn(48))
    stream = stream_of_hooks(open_folder(base("llama"), name="tiny"), recipe, direction, 3)
    assert stream.sha256 == plan_asked(plan(base("llama")), recipe.edit, direction).stream.sha256
    assert not stream.lacks_lengths
