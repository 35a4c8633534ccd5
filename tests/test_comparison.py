"""What differs between two checkpoints, and along what."""

import json
import shutil

import pytest
import torch

from abliterate.errors import SourceError
from abliterate.method.linalg import unit
from abliterate.verification.comparison import diff
from tests import checkpoints
from tests.checkpoints import directions, overwrite, read, write_llama

OUT = "model.layers.1.self_attn.o_proj.weight"
READER = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture
def base(tmp_path):
    return write_llama(tmp_path / "base", shards=2)


@pytest.fixture
def copy(base, tmp_path):
    return shutil.copytree(base, tmp_path / "copy")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", [{}, {"biases": True, "shards": 3}, {"head": False, "tied": True}], ids=str)
def test_an_edit_changes_exactly_the_writers_along_one_direction(options, dtype, tmp_path):
    source = write_llama(tmp_path / "base", dtype=dtype, **options)
    edited = checkpoints.edit(source, tmp_path / "edited")
    found = diff(source, edited)
    assert found.only_writers
    assert len(found.changed) == found.writers == (9 if options.get("biases") else 5)
    assert found.added == (("lm_head.weight",) if options.get("tied") else ())
    assert found.removed == found.reshaped == ()
    assert found.changed_files == (("config.json",) if options.get("tied") else ())
    for tensor in found.changed:
        w = read(source, tensor.name).double()
        r = unit(directions()[:, 0])
        axis = 1 if "embed" in tensor.name else 0
        removed = torch.tensordot(w, r, dims=([axis], [0])).norm() / w.norm()
        assert tensor.change == pytest.approx(float(removed), rel=0.02)
        assert tensor.rank_one > 0.98
        assert tensor.cosine > 0.98
        assert tensor.role != "not a writer"
        assert tensor.left < (0.05 if dtype == torch.bfloat16 else 1e-5)
        assert tensor.projected
    assert sum(group.count for group in found.groups) == len(found.changed)
    assert all(group.projected == group.count for group in found.groups)
    assert {group.role for group in found.groups} == {tensor.role for tensor in found.changed}


def test_identical_checkpoints_do_not_differ(base, copy):
    found = diff(base, copy)
    assert (found.changed, found.changed_files, found.identical) == ((), (), 21)
    assert not found.only_writers


def test_an_added_head_and_its_index_are_seen(tmp_path):
    source = write_llama(tmp_path / "base", head=False, tied=True, shards=2)
    found = diff(source, checkpoints.edit(source, tmp_path / "edited"))
    assert found.added == ("lm_head.weight",)
    assert found.changed_files == ("config.json", checkpoints.INDEX)
    assert found.only_writers


@pytest.mark.parametrize("name", [READER, NORM, "lm_head.weight"])
def test_a_changed_reader_is_named_and_denies_only_writers(name, tmp_path):
    source = write_llama(tmp_path / "base")
    edited = checkpoints.edit(source, tmp_path / "edited")
    overwrite(edited, name, read(edited, name) * 2)
    found = diff(source, edited)
    assert not found.only_writers
    changed = {tensor.name: tensor for tensor in found.changed}[name]
    assert (changed.role, changed.rank_one, changed.cosine) == ("not a writer", None, None)
    assert changed.change == pytest.approx(1, rel=1e-2)


def test_a_writer_that_did_not_change_denies_only_writers(tmp_path):
    source = write_llama(tmp_path / "base")
    edited = checkpoints.edit(source, tmp_path / "edited")
    overwrite(edited, OUT, read(source, OUT))
    found = diff(source, edited)
    assert len(found.changed) == 4
    assert not found.only_writers


def test_a_change_of_full_rank_is_not_called_rank_one(base, copy):
    overwrite(copy, OUT, read(copy, OUT) + torch.randn(32, 40).bfloat16())
    (changed,) = diff(base, copy).changed
    assert changed.rank_one < 0.5
    assert not changed.projected


@pytest.mark.parametrize(("strength", "left"), [(0.5, 0.5), (1.0, 0.0), (2.0, 1.0)])
def test_how_much_is_left_along_the_direction_tells_how_strong_an_edit_was(strength, left, tmp_path):
    """Half an ablation, a whole one, a reflection: all are changes of rank one."""
    source = write_llama(tmp_path / "base", dtype=torch.float32)
    copy = shutil.copytree(source, tmp_path / "copy")
    w, r = read(source, OUT).double(), unit(directions()[:, 0])
    overwrite(copy, OUT, (w - strength * r[:, None] * (r @ w)).float())
    (changed,) = diff(source, copy).changed
    assert changed.rank_one > 0.9999
    assert changed.left == pytest.approx(left, abs=1e-5)
    assert changed.projected == (strength == 1.0)


def test_an_unknown_architecture_is_compared_by_name(base, copy):
    for folder in (base, copy):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "unknown"}))
    overwrite(copy, OUT, read(copy, OUT) * 1.5)
    found = diff(base, copy)
    (changed,) = found.changed
    assert (changed.name, changed.rank_one, found.writers) == (OUT, None, 0)
    assert not found.only_writers
    overwrite(copy, OUT, read(base, OUT))
    assert not diff(base, copy).only_writers


@pytest.mark.parametrize("kind", ["added", "removed", "reshaped", "other dtype"])
def test_tensors_that_came_went_or_changed_shape(kind, tmp_path):
    config = checkpoints.llama_config()
    tensors = checkpoints.random_tensors(checkpoints.llama_shapes(config), torch.bfloat16)
    source = checkpoints.write(tmp_path / "base", config, tensors)
    edited = checkpoints.edit(source, tmp_path / "edited")
    ours = {name: read(edited, name) for name in tensors}
    if kind == "added":
        ours["mtp.weight"] = torch.ones(3)
    elif kind == "removed":
        del ours[READER]
    else:
        ours[READER] = ours[READER].T.contiguous() if kind == "reshaped" else ours[READER].float()
    other = checkpoints.write(tmp_path / "other", config, ours)
    found = diff(source, other)
    assert found.added == (("mtp.weight",) if kind == "added" else ())
    assert found.removed == ((READER,) if kind == "removed" else ())
    assert found.reshaped == ((READER,) if kind in ("reshaped", "other dtype") else ())
    assert not found.only_writers


def test_changed_missing_and_new_files_are_named(base, copy):
    (copy / "tokenizer.json").write_text("{}")
    (copy / "LICENSE").unlink()
    (copy / "new.txt").write_text("new")
    found = diff(base, copy)
    assert set(found.changed_files) == {"tokenizer.json", "LICENSE", "new.txt"}
    assert found.identical_files == len(checkpoints.SIDE_FILES)  # two fewer, and config and index


def test_tensors_may_lie_in_other_shards(base, tmp_path):
    tensors = {name: read(base, name) for shard in base.glob("*.safetensors") for name in checkpoints.header(shard)
               if name != "__metadata__"}  # fmt: skip
    other = checkpoints.write(tmp_path / "other", checkpoints.llama_config(), tensors, shards=5, gap=3)
    found = diff(base, other)
    assert (found.changed, found.identical) == ((), 21)
    assert found.changed_files == (checkpoints.INDEX,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [OUT, READER])
def test_weights_that_are_not_finite_are_compared_too(bad, name, base, copy):
    tensor = read(copy, name)
    tensor[0, 0] = bad
    overwrite(copy, name, tensor)
    assert [tensor.name for tensor in diff(base, copy).changed] == [name]


def test_bytes_that_differ_without_a_value_that_does_are_a_change_of_zero(base, copy):
    for folder, zero in ((base, 0.0), (copy, -0.0)):
        overwrite(folder, OUT, torch.full((32, 40), zero, dtype=torch.bfloat16))
    (changed,) = diff(base, copy).changed
    assert changed.change == 0


def test_a_folder_that_cannot_be_read_is_an_error(base, copy):
    (copy / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(SourceError, match="model-00001"):
        diff(base, copy)
