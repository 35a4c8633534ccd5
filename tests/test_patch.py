"""The edit as a file: applied it gives the bytes of the edit, reverted those of the base, on any machine."""

import json
import lzma
import os
import shutil

import pytest
import torch
from typer.testing import CliRunner

import abliterate
from abliterate.arch.codecs import Plain
from abliterate.checkpoint import direction_file as directions
from abliterate.checkpoint.directio import patch as overwrite_bytes
from abliterate.cli.app import app
from abliterate.editing.blocks import TensorEdit, Workspace
from abliterate.editing.planning import plan
from abliterate.editing.reading import rows_of_block
from abliterate.errors import CheckpointError, OutputError, UsageError, VerificationError
from abliterate.events import Advanced
from abliterate.exports.patches import use
from abliterate.exports.patches.bitstreams import BitReader, BitWriter, Intervals, Sparse, ordinal, value, widths
from abliterate.exports.patches.file import PatchFile, PatchWriter
from abliterate.exports.patches.replay import (
    Backwards,
    Forwards,
    Recorder,
    Replay,
    StoredEdit,
    TensorReplay,
    expected,
    rounded,
)
from abliterate.method.directions import Candidate, DirectionSet, Subspace, given
from abliterate.method.edits import orthogonal
from abliterate.method.stream_edit import StreamEdit
from abliterate.publishing import manifest
from abliterate.recipe import Recipe
from tests import checkpoints, test_kill
from tests.quantising import quantised_gpt_oss, quantised_llama
from tests.test_weight_edits import stream_edit

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
DIRECTION_FILE = "abliterate/direction.safetensors"
SHARD = "model-00001-of-00002.safetensors"


# --- corrections --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ordinals_count_every_pattern_in_the_order_of_the_values(dtype):
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    places = ordinal(patterns)
    assert torch.equal(places.sort().values, torch.arange(-(2**15), 2**15, dtype=places.dtype))
    assert torch.equal(value(places, dtype).view(torch.int16), patterns.view(torch.int16))
    finite = patterns[patterns.isfinite()]
    in_order = finite[ordinal(finite).argsort()].double()
    assert (in_order.diff() >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ordinals_of_neighbours_differ_by_one(dtype):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    above = torch.nextafter(values, torch.full_like(values, float("inf")))
    assert (ordinal(above) - ordinal(values) == 1).all()
    assert torch.equal(value(ordinal(values), dtype), values)


def test_bits_come_back():
    writer = BitWriter()
    parts = [
        (torch.randint(0, 2**width, (count,)).numpy(), width) for width, count in ((1, 5), (3, 9), (31, 4), (2, 0))
    ]
    for numbers, width in parts:
        writer.write(numbers, width)
    data = writer.to_bytes()
    assert len(data) == (5 + 27 + 124 + 7) // 8
    reader = BitReader(data)
    for numbers, width in parts:
        assert (reader.read(len(numbers), width) == numbers).all()
    with pytest.raises(ValueError, match="too early"):
        reader.read(9, 1)


def test_widths_are_those_of_the_largest_number():
    counts = torch.tensor([1, 2, 3, 4, 5, 8, 9, 2**31])
    assert widths(counts).tolist() == [0, 1, 2, 2, 3, 3, 4, 31]


def test_sparse_differences_come_back_part_by_part():
    generator = torch.Generator().manual_seed(0)
    parts = [(torch.rand(size, generator=generator) < 0.01).int() for size in ((40, 50), (1, 3), (90, 20))]
    written = Sparse()
    for part in parts:
        written.write(part)
    read = Sparse(written.to_bytes())
    for part in parts:
        assert torch.equal(read.read_onto(torch.ones_like(part)), part + 1)
    assert written.count == sum(int((part != 0).sum()) for part in parts)


def test_few_bytes_that_stand_for_many_differences_are_refused():
    bomb = lzma.compress(bytes(2**24), preset=1)
    assert len(bomb) < 2**13
    with pytest.raises(ValueError, match="more than 100 places"):
        Sparse(bomb, 100)
    with pytest.raises(ValueError, match="no end"):
        Sparse(lzma.compress(bytes(32))[:-5], 100)
    assert Sparse(lzma.compress(bytes(1600)), 100).count == 100


def test_no_differences_at_all():
    assert torch.equal(Sparse(Sparse().to_bytes()).read_onto(torch.arange(9)), torch.arange(9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_interval_holds_exactly_what_rounds_to_the_edited_value(dtype):
    """By trying every value of the dtype as the base of one edited value."""
    everything = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    everything = everything[everything.abs() < 100]
    generator = torch.Generator().manual_seed(0)
    for shift in (torch.randn(40, generator=generator, dtype=torch.float64) * 0.01).tolist():
        new = rounded(torch.randn(1, 1, generator=generator).to(dtype), torch.full((1, 1), shift, dtype=torch.float64))
        shifts = torch.full((len(everything), 1), shift, dtype=torch.float64)
        bases = ordinal(everything)[rounded(everything[:, None], shifts)[:, 0] == new[0, 0]]
        low, counts = expected(new, shifts[:1])
        assert low.item() <= bases.min()
        assert bases.max() < low.item() + counts.item() <= bases.max() + 2


# --- one matrix ---------------------------------------------------------------------------------------------------


def recorded(old, edited, axis, projector, *, feedback=True):
    """What a patch would hold of a matrix, made block by block as the export does."""
    stored = StoredEdit.of(projector, feedback=feedback)
    columns = old.double().T if axis == 1 else old.double()
    compute = Plain(old.dtype, 0).compute
    c = (projector.read.T @ columns).to(compute)
    settle, tail = Recorder(), Recorder()
    replay = TensorReplay(edit=stored, coefficients=c, settle=settle, tail=tail)
    both = torch.stack((old, edited))
    step = rows_of_block(old.shape[1])
    whole = None if axis == 1 else replay.walk(slice(0, old.shape[1]))
    for start in range(0, len(old), step):
        part = both[:, start : start + step]
        if whole is not None:
            whole.block(part, start)
            continue
        walk = replay.walk(slice(start, start + part.shape[1]))
        walk.block(part.transpose(1, 2), 0)
        walk.finish()
    if whole is not None:
        whole.finish()
    return stored, c, settle, tail


def replayed(known, side, axis, stored, c, settle, tail):
    made = TensorReplay(edit=stored, coefficients=c, settle=settle, tail=tail)
    replay = Replay(tensor=lambda: made, codec=Plain(known.dtype, known.shape[1]), side=side)
    found = known.clone()
    (replay.edit_rows if axis == 1 else replay.edit_columns)(found, 0)
    return found


LOST = {(96, 1): 0.20, (1024, 1): 0.08, (1024, 3): 0.14}
"""Share of elements whose base the edited value does not tell; at most, by width and number of directions."""


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("d", "k"), [(96, 1), (1024, 1), (1024, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_matrix_there_and_back(dtype, d, k, axis):
    generator = torch.Generator().manual_seed(d)
    basis = torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64))[0]
    projector = orthogonal(basis)
    old = (0.02 * torch.randn((600, d) if axis == 1 else (d, 600), generator=generator)).to(dtype)
    old[3, 5], old[7, 9] = 0.0, -0.0
    edited = old.clone()
    edit = TensorEdit.of("w", projector, Plain(dtype, old.shape[1]), Workspace())
    (edit.edit_rows if axis == 1 else edit.edit_columns)(edited, 0)
    stored, c, settle, tail = recorded(old, edited, axis, projector)
    forwards = [Forwards(Sparse(part.forward.to_bytes())) for part in (settle, tail)]
    backwards = []
    for part in (settle, tail):
        bits, outside = part.backward.to_bytes()
        backwards.append(Backwards(Intervals(bits, Sparse(outside))))
    assert torch.equal(ordinal(replayed(old, 1, axis, stored, c, *forwards)), ordinal(edited))
    assert torch.equal(ordinal(replayed(edited, 0, axis, stored, c, *backwards)), ordinal(old))
    if dtype != torch.float64:  # there the last bit is that of the arithmetic
        assert settle.forward.count + tail.forward.count < 0.005 * old.numel()
        assert settle.backward.ambiguous + tail.backward.ambiguous < LOST[d, k] * old.numel()


# --- checkpoints --------------------------------------------------------------------------------------------------


def edited_by_us(source, out, *, recipe=None):
    """``abliterate edit`` along a random direction."""
    made = plan(source, **(recipe or Recipe()).plan_options)
    found = given(checkpoints.directions(made.model_map.d_model).float()[:, 0])
    return abliterate.edit(source, found, out, recipe=recipe).out


def there_and_back(base, edited, tmp_path):
    report = abliterate.export_patch(edited, base, tmp_path / "p.safetensors")
    applied = abliterate.apply_patch(base, report.file, tmp_path / "applied")
    ours, theirs = checkpoints.tree(applied), checkpoints.tree(edited)
    del ours[DIRECTION_FILE], theirs[DIRECTION_FILE]
    assert ours == theirs
    reverted = abliterate.revert_patch(edited, report.file, tmp_path / "reverted")
    assert checkpoints.tree(reverted) == checkpoints.tree(base)
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]
    return report


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"biases": True, "shards": 2}, {"head": False, "tied": True, "shards": 2}, {"gap": 3, "pad": 1}],
    ids=["one file", "biases", "untied", "odd addresses"],
)
def test_a_checkpoint_there_and_back(options, dtype, tmp_path):
    base = checkpoints.write_llama(tmp_path / "base", dtype=dtype, **options)
    report = there_and_back(base, edited_by_us(base, tmp_path / "edited"), tmp_path)
    assert report.tensors == (9 if options.get("biases") else 5)
    assert report.elements > 0


@pytest.mark.parametrize("recipe", [Recipe(rounding="nearest"), Recipe(tied="shared"), Recipe(tied="keep")], ids=str)
def test_other_ways_to_edit(recipe, tmp_path):
    base = checkpoints.write_llama(tmp_path / "base", head=False, tied=True)
    there_and_back(base, edited_by_us(base, tmp_path / "edited", recipe=recipe), tmp_path)


def test_a_family_with_norms_behind_its_writers(saved, tmp_path):
    base = saved("gemma3-text")
    report = there_and_back(base, edited_by_us(base, tmp_path / "edited"), tmp_path)
    document = PatchFile(report.file).document
    assert len({entry["projector"] for entry in document["tensors"]}) > 2


def test_stacked_experts(saved, tmp_path):
    base = saved("mixtral")
    there_and_back(base, edited_by_us(base, tmp_path / "edited"), tmp_path)


@pytest.mark.parametrize("kind", ["blocks", "mxfp4"])
def test_quantised_checkpoints(kind, tmp_path):
    base = tmp_path / "base"
    base = quantised_gpt_oss(base) if kind == "mxfp4" else quantised_llama(base, kind)[0]
    report = there_and_back(base, edited_by_us(base, tmp_path / "edited"), tmp_path)
    assert report.parts["codes"] > 0


def test_a_small_memory_budget_does_not_change_a_byte(tmp_path, monkeypatch):
    """Stacks and matrices larger than a buffer: feedback rows come last, and the corrections still fit."""
    monkeypatch.setattr("abliterate.editing.writing.SMALLEST_PIECE", 4096)
    monkeypatch.setattr("abliterate.exports.patches.use.SMALLEST_PIECE", 4096)
    monkeypatch.setattr("abliterate.editing.reading.BLOCK_ELEMENTS", 512)
    base = checkpoints.write_llama(tmp_path / "base", sizes={"intermediate_size": 200, "vocab_size": 300})
    edited = edited_by_us(base, tmp_path / "edited")
    report = abliterate.export_patch(edited, base, tmp_path / "p.safetensors")
    for memory in (1, 2**30):
        applied = use.apply(base, report.file, tmp_path / f"applied{memory}", memory_bytes=memory)
        reverted = use.revert(edited, report.file, tmp_path / f"reverted{memory}", memory_bytes=memory)
        assert checkpoints.tree(reverted) == checkpoints.tree(base)
        assert (applied / "model.safetensors").read_bytes() == (edited / "model.safetensors").read_bytes()


@pytest.fixture
def pair(tmp_path):
    base = checkpoints.write_llama(tmp_path / "base", shards=2)
    return base, edited_by_us(base, tmp_path / "edited")


def test_another_machine_gets_the_same_bytes(pair, tmp_path, monkeypatch):
    """Where sums come out otherwise (another BLAS), the edit differs, and the patch does not."""
    base, edited = pair
    report = abliterate.export_patch(edited, base, tmp_path / "p.safetensors")
    real = TensorEdit.of.__func__

    def other(cls, where, projector, codec, work, rounding="direction"):
        made = real(cls, where, projector, codec, work, rounding)
        made.read.mul_(1 + 2e-3)
        return made

    monkeypatch.setattr(TensorEdit, "of", classmethod(other))
    there = edited_by_us(base, tmp_path / "there")
    assert (there / SHARD).read_bytes() != (edited / SHARD).read_bytes()
    applied = abliterate.apply_patch(base, report.file, tmp_path / "applied")
    assert (applied / SHARD).read_bytes() == (edited / SHARD).read_bytes()


def test_an_applied_patch_verifies(pair, tmp_path):
    base, edited = pair
    report = abliterate.export_patch(edited, base, tmp_path / "p.safetensors", purposes=("apply",))
    applied = abliterate.apply_patch(base, report.file, tmp_path / "applied")
    assert abliterate.verify(applied, base=base, behaviour=False).ok


def test_the_smaller_kinds_hold_what_they_are_for(pair, tmp_path):
    base, edited = pair
    sizes = {}
    for purpose in ("apply", "revert"):
        report = abliterate.export_patch(edited, base, tmp_path / f"{purpose}.safetensors", purposes=(purpose,))
        sizes[purpose] = report.parts
    assert sizes["apply"]["revert"] == sizes["revert"]["apply"] == 0
    with pytest.raises(UsageError, match="for apply only"):
        abliterate.revert_patch(edited, tmp_path / "apply.safetensors", tmp_path / "out")
    with pytest.raises(UsageError, match="for revert only"):
        abliterate.apply_patch(base, tmp_path / "revert.safetensors", tmp_path / "out")
    reverted = abliterate.revert_patch(edited, tmp_path / "revert.safetensors", tmp_path / "out")
    assert checkpoints.tree(reverted) == checkpoints.tree(base)


def stop_after(amount):
    seen = 0

    def listen(event):
        nonlocal seen
        seen += getattr(event, "amount", 0) if isinstance(event, Advanced) else 0
        if seen > amount:
            raise KeyboardInterrupt

    return listen


@pytest.mark.parametrize("way", ["apply", "revert"])
def test_a_stopped_one_continues_and_never_looks_finished(way, pair, tmp_path):
    base, edited = pair
    report = abliterate.export_patch(edited, base, tmp_path / "p.safetensors")
    source, wanted, do = {
        "apply": (base, edited, abliterate.apply_patch),
        "revert": (edited, base, abliterate.revert_patch),
    }[way]
    size = (base / SHARD).stat().st_size
    with pytest.raises(KeyboardInterrupt):
        do(source, report.file, tmp_path / "out", on_event=stop_after(size + 100))
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / SHARD).read_bytes() == (wanted / SHARD).read_bytes()
    out = do(source, report.file, tmp_path / "out")
    ours, theirs = checkpoints.tree(out), checkpoints.tree(wanted)
    assert {name: ours[name] for name in ours if name != DIRECTION_FILE} == {
        name: theirs[name] for name in theirs if name != DIRECTION_FILE
    }


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 needs POSIX processes")
@pytest.mark.parametrize("way", ["apply", "revert"])
def test_a_killed_one_continues_and_never_looks_finished(way, tmp_path):
    base = checkpoints.write_llama(tmp_path / "base", head=False, tied=True, shards=4)
    edited = edited_by_us(base, tmp_path / "edited")
    report = abliterate.export_patch(edited, base, tmp_path / "p.safetensors")
    source, wanted, do = {
        "apply": (base, edited, abliterate.apply_patch),
        "revert": (edited, base, abliterate.revert_patch),
    }[way]
    theirs = checkpoints.tree(wanted)
    theirs.pop(DIRECTION_FILE, None)
    killed, calls = test_kill.work_and_die(lambda: do(source, report.file, tmp_path / "whole"), -1)
    assert not killed
    assert calls > 20
    for fatal in range(0, calls, max(1, calls // 12)):
        out = tmp_path / f"out{fatal}"
        killed, _ = test_kill.work_and_die(lambda out=out: do(source, report.file, out), fatal)
        assert killed
        if not out.exists():
            do(source, report.file, out)
        ours = checkpoints.tree(out)
        ours.pop(DIRECTION_FILE, None)
        assert ours == theirs


def test_a_stopped_export_leaves_nothing(pair, tmp_path):
    base, edited = pair
    before = set(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        abliterate.export_patch(edited, base, tmp_path / "p.safetensors", on_event=stop_after(3000))
    assert set(tmp_path.iterdir()) == before


# --- what cannot be right -----------------------------------------------------------------------------------------


def flip(path, place=-1):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("way", ["apply", "revert"])
def test_another_checkpoint_is_refused_by_name(way, pair, tmp_path):
    base, edited = pair
    report = abliterate.export_patch(edited, base, tmp_path / "p.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    folder = base if way == "apply" else edited
    checkpoints.overwrite(folder, name, checkpoints.read(folder, name) * 2)
    do = abliterate.apply_patch if way == "apply" else abliterate.revert_patch
    with pytest.raises(VerificationError, match=f"not the checkpoint.*{name}.*differs"):
        do(folder, report.file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_changed_reader_is_found_by_the_hash(pair, tmp_path):
    base, edited = pair
    report = abliterate.export_patch(edited, base, tmp_path / "p.safetensors")
    flip(edited / "model-00002-of-00002.safetensors")
    with pytest.raises(VerificationError, match="outside the writers"):
        abliterate.revert_patch(edited, report.file, tmp_path / "out")


def test_a_changed_file_is_found(pair, tmp_path):
    base, edited = pair
    report = abliterate.export_patch(edited, base, tmp_path / "p.safetensors")
    (edited / "tokenizer.json").write_text("{}")
    with pytest.raises(VerificationError, match=r"tokenizer\.json differs"):
        abliterate.revert_patch(edited, report.file, tmp_path / "out")


def test_a_checkpoint_of_another_size_is_refused_before_anything_is_written(pair, tmp_path):
    base, edited = pair
    report = abliterate.export_patch(edited, base, tmp_path / "p.safetensors")
    other = checkpoints.write_llama(tmp_path / "other")
    with pytest.raises(VerificationError, match="other names or sizes"):
        abliterate.apply_patch(other, report.file, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_more_than_an_edit_cannot_be_exported(pair, tmp_path):
    base, edited = pair
    checkpoints.overwrite(edited, "model.norm.weight", torch.zeros(32, dtype=torch.bfloat16))
    with pytest.raises(VerificationError, match="more than its writers"):
        abliterate.export_patch(edited, base, tmp_path / "p.safetensors")
    assert not list(tmp_path.glob("p.*"))


def test_a_file_in_the_way_is_left_alone(pair, tmp_path):
    (tmp_path / "p.safetensors").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        abliterate.export_patch(pair[1], pair[0], tmp_path / "p.safetensors")


def test_files_that_are_no_patch(pair, tmp_path):
    base, edited = pair
    with pytest.raises(UsageError, match="no such patch"):
        abliterate.apply_patch(base, tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(UsageError, match="not a patch"):
        abliterate.apply_patch(base, base / SHARD, tmp_path / "out")
    report = abliterate.export_patch(edited, base, tmp_path / "p.safetensors")
    data = report.file.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[:-20])
    with pytest.raises(CheckpointError, match="truncated"):
        abliterate.apply_patch(base, tmp_path / "cut.safetensors", tmp_path / "out")


@pytest.mark.parametrize("ending", [".bits", ".outside", ".forward", ".c"])
def test_a_damaged_part_never_makes_a_finished_folder(ending, pair, tmp_path):
    base, edited = pair
    report = abliterate.export_patch(edited, base, tmp_path / "p.safetensors")
    info = next(its for name, its in PatchFile(report.file)._tensors.items() if name.endswith(ending))
    overwrite_bytes(report.file, [(info.start + info.size_bytes // 2, torch.tensor([0x5A], dtype=torch.uint8))])
    do, source = (abliterate.apply_patch, base) if ending == ".forward" else (abliterate.revert_patch, edited)
    with pytest.raises((VerificationError, CheckpointError)):
        do(source, report.file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_patch_is_a_direction_file_too(pair, tmp_path):
    base, edited = pair
    report = abliterate.export_patch(edited, base, tmp_path / "p.safetensors")
    assert directions.load(report.file).sha256 == manifest.read(edited)["direction"]["sha256"]


def test_the_command_line(pair, tmp_path):
    base, edited = pair
    run = CliRunner().invoke
    file = tmp_path / "p.safetensors"
    shown = run(app, ["patch", "export", str(edited), "--base", str(base), "--out", str(file), "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["tensors"] == 5
    shown = run(app, ["patch", "revert", str(edited), str(file), "--out", str(tmp_path / "back")])
    assert "every hash as recorded" in shown.stdout
    assert checkpoints.tree(tmp_path / "back") == checkpoints.tree(base)
    shutil.rmtree(tmp_path / "back")
    flip(edited / SHARD)
    assert run(app, ["patch", "revert", str(edited), str(file), "--out", str(tmp_path / "back")]).exit_code == 4
    assert run(app, ["patch", "apply", str(base), str(file), "--out", str(tmp_path / "again")]).exit_code == 0
    arguments = ["patch", "export", str(edited), "--base", str(base), "--out", str(tmp_path / "q"), "--for", "fun"]
    assert run(app, arguments).exit_code == 2


# --- edits that leave writers alone, and what was chosen ----------------------------------------------------------


def kept_embedding(stream):
    return StreamEdit(everywhere=stream.everywhere, places={**stream.places, (None, "embedding"): None})


OTHER_EDITS = {
    "embedding left alone": lambda q: kept_embedding(StreamEdit(everywhere=orthogonal(q))),
    "one block": lambda q: StreamEdit(places={(1, "MLP"): orthogonal(q)}),
    "another in every layer": lambda q: stream_edit("another in every layer", 2, d=len(q)),
    "kept norms": lambda q: StreamEdit(everywhere=orthogonal(q, column_scale="kept norms")),
    "strength 0.6": lambda q: StreamEdit(everywhere=orthogonal(q, strength=0.6)),
    "affine": lambda q: stream_edit("affine", 2, d=len(q)),
    "oblique": lambda q: stream_edit("oblique", 2, d=len(q)),
}


@pytest.mark.parametrize("options", [{"shards": 2}, {"head": False, "tied": True, "shards": 2}], ids=["head", "tied"])
@pytest.mark.parametrize("kind", OTHER_EDITS)
def test_any_edit_of_the_stream_there_and_back(kind, options, tmp_path):
    base = checkpoints.write_llama(tmp_path / "base", **options)
    q = checkpoints.directions(plan(base).model_map.d_model)
    stream = OTHER_EDITS[kind](q)
    edited = abliterate.edit(base, given(q.float()[:, 0]), tmp_path / "edited", change=stream).out
    there_and_back(base, edited, tmp_path)
    assert abliterate.verify(tmp_path / "applied", base=base, behaviour=False).ok


def test_a_head_that_stays_tied_gets_no_copy(tmp_path):
    base = checkpoints.write_llama(tmp_path / "base", head=False, tied=True)
    q = checkpoints.directions(plan(base).model_map.d_model)
    stream = OTHER_EDITS["embedding left alone"](q)
    edited = abliterate.edit(base, given(q.float()[:, 0]), tmp_path / "edited", change=stream).out
    report = abliterate.export_patch(edited, base, tmp_path / "p.safetensors")
    applied = abliterate.apply_patch(base, report.file, tmp_path / "applied")
    assert (applied / "model.safetensors").stat().st_size == (base / "model.safetensors").stat().st_size
    assert (applied / "config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_chosen_candidate_of_several_vectors_there_and_back(by_layer, tmp_path):
    base = checkpoints.write_llama(tmp_path / "base", shards=2)
    d = plan(base).model_map.d_model
    parts = [Subspace(vectors=torch.randn(d, 2, generator=torch.Generator().manual_seed(seed))) for seed in (0, 1)]
    subspace = dict(enumerate(parts)) if by_layer else parts[0]
    one = Candidate(id="some", subspace=subspace, layer=1, provenance={"estimator": "some", "note": [1]})
    chosen = DirectionSet(candidates=(one,)).choose_candidate("some")
    edited = abliterate.edit(base, chosen, tmp_path / "edited").out
    there_and_back(base, edited, tmp_path)
    applied = directions.load(tmp_path / "applied" / DIRECTION_FILE)
    assert applied.sha256 == manifest.read(edited)["direction"]["sha256"]
    assert applied.chosen.provenance == one.provenance
    assert abliterate.verify(tmp_path / "applied", base=base, behaviour=False).ok
    assert abliterate.reproduce(tmp_path / "applied", base=base).agrees


def test_a_patch_that_changes_what_is_no_writer_is_refused(pair, tmp_path):
    base, edited = pair
    report = abliterate.export_patch(edited, base, tmp_path / "p.safetensors")
    file, writer = PatchFile(report.file), PatchWriter(tmp_path / "other")
    for name in file._tensors:
        writer.add(name, file.tensor(name))
    file.document["tensors"][0]["name"] = "model.norm.weight"
    file.document["tensors"][0]["axis"] = 0
    with pytest.raises(VerificationError, match="its writers are others"):
        abliterate.apply_patch(base, writer.finish(file.document), tmp_path / "out")
