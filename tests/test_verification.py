"""The proof on the bytes fails, by name, for every way in which a checkpoint can be wrong."""

import dataclasses
import json
import shutil

import pytest
import torch

from abliterate.editing.planning import plan
from abliterate.errors import SourceError
from abliterate.method.linalg import orthonormal_basis
from abliterate.verification.checkpoint_proof import verify_bytes
from tests import checkpoints
from tests.checkpoints import INDEX, directions, overwrite, read, without, write_llama

EMBEDDING = "model.embed_tokens.weight"
OUT = "model.layers.1.self_attn.o_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
BIAS = "model.layers.1.mlp.down_proj.bias"
READER = "model.layers.0.self_attn.q_proj.weight"
D = 128
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Bases and edited copies, made once: ``(folder, made so far)``."""
    return tmp_path_factory.mktemp("store"), {}


@pytest.fixture
def pair(store, tmp_path):
    """``pair(**options)``: the plan of a base, and an edited copy of its own for every test."""

    def make(change=lambda made: made, **options):
        folder, known = store
        place = folder / str(len(known))
        made, edited = known.get(str(options), (None, None))
        if made is None:
            kept = {"shards": 3, "biases": True, "sizes": {"hidden_size": D}, **options}
            made = plan(write_llama(place / "base", **kept))
            edited = checkpoints.edit(made, place / "edited")
            known[str(options)] = made, edited
        changed = change(made)
        if changed is made:
            return made, shutil.copytree(edited, tmp_path / "edited")
        return made, checkpoints.edit(changed, tmp_path / "edited")

    return make


def failures(made, edited):
    return verify_bytes(without(made, directions(D)), edited).failures


def only_failure(made, edited):
    found = failures(made, edited)
    assert len(found) == 1, found
    return found[0]


def keep_writers(condition):
    return lambda made: dataclasses.replace(made, writers=tuple(w for w in made.writers if condition(w.tensor.name)))


# --- what must pass ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{}, {"shards": None}, {"gap": 5, "pad": 1}, {"head": False, "tied": True}], ids=str
)
def test_an_edit_is_verified(dtype, options, pair):
    made, edited = pair(dtype=dtype, **options)
    report = verify_bytes(without(made, directions(D)), edited)
    assert report.ok, report.failures
    assert {proof.name for proof in report.edited} == {writer.tensor.name for writer in made.writers}
    assert report.identical_tensors + len(made.writers) == len(made.checkpoint.tensors)
    assert all(proof.before > 10 * proof.left for proof in report.edited)
    assert all(proof.sha256_before != proof.sha256_after for proof in report.edited)


@pytest.mark.parametrize(("dtype", "bound"), [*zip(DTYPES, (1e-5, 1e-6, 1e-9, 1e-15), strict=True)])
def test_what_is_left_is_far_below_rounding(dtype, bound, tmp_path):
    made = plan(write_llama(tmp_path / "base", dtype=dtype, sizes={"hidden_size": 512}))
    report = verify_bytes(without(made, directions(512)), checkpoints.edit(made, tmp_path / "edited"))
    assert report.ok
    assert 0 < report.worst_left <= bound


def rounded_to_nearest(made, edited):
    q = orthonormal_basis(directions(made.model_map.d_model))
    for writer in made.writers:
        w = read(made.checkpoint.folder, writer.tensor.name)
        exact = w.double().movedim(writer.axis, 0)
        exact = (exact - torch.tensordot(q, torch.tensordot(q.T, exact, 1), 1)).movedim(0, writer.axis)
        overwrite(edited, writer.tensor.name, exact.to(w.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_to_nearest_passes_as_well(dtype, pair):
    """The bounds belong to the equation and the dtype, not to the way this package rounds."""
    made, edited = pair(dtype=dtype)
    rounded_to_nearest(made, edited)
    assert failures(made, edited) == ()


@pytest.mark.parametrize("k", [1, 3])
def test_wide_enough_edits_are_verified_for_every_column(k, tmp_path):
    sizes = {"hidden_size": 768 * k, "vocab_size": 1500}
    made = plan(write_llama(tmp_path / "base", sizes=sizes))
    report = verify_bytes(without(made, directions(768 * k, k)), checkpoints.edit(made, tmp_path / "edited", k=k))
    assert report.ok, report.failures


@pytest.mark.parametrize(("d", "k"), [(48, 1), (128, 2), (256, 3)])
def test_narrow_edits_are_verified_for_every_column(d, k, tmp_path):
    made = plan(write_llama(tmp_path / "base", sizes={"hidden_size": d, "vocab_size": 5000}))
    for seed in range(3):
        vectors = directions(d, k, seed=seed)
        edited = checkpoints.edit(made, tmp_path / str(seed), vectors=vectors)
        assert verify_bytes(without(made, vectors), edited).failures == ()


# --- what must fail ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [EMBEDDING, OUT, DOWN, BIAS])
def test_a_dropped_writer_fails_by_name(name, dtype, pair):
    made, edited = pair(keep_writers(lambda other: other != name), dtype=dtype)
    assert f"'{name}' still writes the direction" in only_failure(made, edited)


def test_the_wrong_axis_fails(tmp_path):
    base = write_llama(tmp_path / "base", sizes={"hidden_size": D, "head_dim": D // 4})  # a square o_proj

    def turned(writer):
        return dataclasses.replace(writer, axis=1) if writer.tensor.name == OUT else writer

    made = plan(base)
    wrong = dataclasses.replace(made, writers=tuple(turned(writer) for writer in made.writers))
    assert f"'{OUT}'" in only_failure(made, checkpoints.edit(wrong, tmp_path / "edited"))


def test_another_direction_fails_for_every_writer(pair):
    made, edited = pair()
    found = verify_bytes(without(made, directions(D, seed=8)), edited).failures
    assert len(found) == len(made.writers)


@pytest.mark.parametrize("place", [0, -1])
def test_a_flipped_bit_in_an_unedited_tensor_fails(place, pair):
    made, edited = pair()
    tensor = read(edited, READER)
    tensor.view(torch.int16).view(-1)[place] ^= 1
    overwrite(edited, READER, tensor)
    assert only_failure(made, edited) == f"tensor '{READER}' changed, but is not in the plan"


@pytest.mark.parametrize("bit", [5, 6, 9, 13, 15])
@pytest.mark.parametrize("name", [EMBEDDING, OUT, BIAS])
def test_a_flipped_bit_in_an_edited_tensor_fails(bit, name, pair):
    """From a quarter of a value on; a unit in the last place of one value is what rounding does."""
    made, edited = pair()
    tensor = read(edited, name)
    place = int(tensor.float().abs().argmax())
    tensor.view(torch.int16).view(-1)[place] ^= (1 << bit) - (1 << 16 if bit == 15 else 0)
    overwrite(edited, name, tensor)
    assert f"'{name}'" in only_failure(made, edited)


@pytest.mark.parametrize("factor", [1.05, 0.95, 0.0, -1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_matrix_off_by_more_than_its_rounding_fails(factor, dtype, pair):
    made, edited = pair(dtype=dtype)
    overwrite(edited, DOWN, (read(edited, DOWN).double() * factor).to(dtype))
    assert f"'{DOWN}' differs from the equation" in only_failure(made, edited)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [EMBEDDING, OUT, BIAS])
def test_a_value_that_is_not_finite_fails(bad, name, pair):
    made, edited = pair()
    tensor = read(edited, name)
    tensor.view(-1)[-1] = bad
    overwrite(edited, name, tensor)
    assert f"'{name}'" in only_failure(made, edited)


def test_a_head_that_is_not_the_embedding_fails(pair):
    made, edited = pair(head=False, tied=True)
    overwrite(edited, "lm_head.weight", read(edited, EMBEDDING))
    assert only_failure(made, edited) == "'lm_head.weight' is not the unedited embedding"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"added_head": None}, "the untied head 'lm_head.weight' is missing"),
        ({"sets_untied": False}, "config.json differs in more than tie_word_embeddings"),
    ],
)
def test_a_head_that_is_not_untied_fails(change, says, pair):
    made, edited = pair(lambda made: dataclasses.replace(made, **change), head=False, tied=True)
    assert says in failures(made, edited)


@pytest.mark.parametrize("options", [{}, {"head": False, "tied": True}], ids=["untied", "tied"])
def test_a_changed_configuration_fails(options, pair):
    made, edited = pair(**options)
    config = json.loads((edited / "config.json").read_text())
    (edited / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0}))
    assert "config.json" in only_failure(made, edited)


@pytest.mark.parametrize("name", ["tokenizer.json", "modeling_custom.py", "assets/deep/er/notes.txt", INDEX])
def test_a_changed_or_missing_file_fails(name, pair):
    made, edited = pair()
    (edited / name).write_bytes((edited / name).read_bytes() + b" ")
    assert only_failure(made, edited) == f"file {name} changed"
    (edited / name).unlink()
    assert name == INDEX or only_failure(made, edited) == f"file {name} is missing"


def repacked(folder, name, **changes):
    """Write one shard anew: other metadata, order or shapes."""
    path = folder / name
    tensors = {n: read(folder, n) for n in checkpoints.header(path) if n != "__metadata__"}
    tensors = changes.pop("tensors", lambda same: same)(tensors)
    path.write_bytes(checkpoints.pack(tensors, metadata={"format": "pt", "note": "kept"}, **changes))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"change": lambda h: {**h, "__metadata__": {"format": "pt"}}}, "__metadata__ changed"),
        ({"change": lambda h: {n: e for n, e in h.items() if n != "__metadata__"}}, "__metadata__ changed"),
        ({"tensors": lambda t: dict(reversed(t.items()))}, "names, order, dtypes, shapes or offsets changed"),
        ({"gap": 8}, "names, order, dtypes, shapes or offsets changed"),
    ],
    ids=["metadata changed", "metadata dropped", "order", "offsets"],
)
def test_a_changed_header_fails(change, says, pair):
    made, edited = pair()
    repacked(edited, "model-00002-of-00003.safetensors", **change)
    assert failures(made, edited)[0] == f"model-00002-of-00003.safetensors: {says}"


@pytest.mark.parametrize("name", [READER, DOWN])
def test_a_tensor_of_another_shape_fails(name, pair):
    made, edited = pair()
    repacked(edited, made.checkpoint.tensors[name].shard, tensors=lambda t: {**t, name: t[name][:-1].contiguous()})
    assert any("shapes" in failure for failure in failures(made, edited))


@pytest.mark.parametrize("damage", ["missing", "truncated", "no index"])
def test_an_unreadable_copy_is_an_error(damage, pair):
    made, edited = pair()
    shard = edited / "model-00002-of-00003.safetensors"
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-3])
    else:
        (shard if damage == "missing" else edited / INDEX).unlink()
    with pytest.raises(SourceError):
        failures(made, edited)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "modeling_new.py", "adapter_model.safetensors"])
def test_a_file_that_does_not_belong_there_fails(name, pair):
    made, edited = pair()
    (edited / name).write_bytes(b"new")
    assert name in only_failure(made, edited)


def test_a_byte_flipped_between_tensors_fails(pair):
    made, edited = pair(gap=7)
    path = edited / "model-00001-of-00003.safetensors"
    raw = bytearray(path.read_bytes())
    raw[8 + int.from_bytes(raw[:8], "little") + 2] ^= 1
    path.write_bytes(raw)
    assert "model-00001-of-00003.safetensors" in only_failure(made, edited)


def test_the_report_holds_the_hashes_of_both_sides(pair):
    made, edited = pair()
    report = verify_bytes(without(made, directions(D)), edited)
    for hashes, folder in ((report.sha256_files, edited), (report.sha256_source_files, made.checkpoint.folder)):
        tree = checkpoints.tree(folder)
        assert dict(hashes) == {name: tree[name] for name in tree if name.endswith(".safetensors")}
