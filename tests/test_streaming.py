"""Files past the page cache, three threads and a few buffers: the same bytes whatever the budget and the alignment."""

import hashlib
import itertools
import json
import os
import shutil
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abliterate.checkpoint import directio
from abliterate.checkpoint.directio import PAGE, Slab, SourceFile, TargetFile, patch, read_pieces, slab_bytes
from abliterate.checkpoint.output import prepare
from abliterate.checkpoint.pairs import same_content
from abliterate.checkpoint.reflink import SharedFile, share_blocks
from abliterate.checkpoint.transfer import ByteRange, Ring, StoppedError, transfer
from abliterate.editing import blocks
from abliterate.editing import shards as editor
from abliterate.editing.planning import plan
from abliterate.editing.shards import header_with
from abliterate.editing.writing import edit_checkpoint
from abliterate.errors import CheckpointError
from abliterate.verification.checkpoint_proof import verify_bytes
from tests import factories
from tests.checkpoints import without


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def direct(request):
    return request.param


def random_bytes(size, seed=0):
    return torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize(("start", "size"), [(0, 1), (0, PAGE), (1, PAGE), (4095, 2), (PAGE, 3 * PAGE), (17, 20000)])
def test_read_any_stretch(tmp_path, direct, start, size):
    data = random_bytes(30001)
    (tmp_path / "f").write_bytes(data.numpy().tobytes())
    with SourceFile(tmp_path / "f", direct=direct) as file:
        assert torch.equal(file.read(Slab(size), start, size), data[start : start + size])


@pytest.mark.skipif(not directio.NO_WAIT, reason="needs RWF_NOWAIT")
@pytest.mark.parametrize("cold", [(0, 0), (0, 64 * PAGE), (0, 20 * PAGE), (40 * PAGE, 24 * PAGE), (30 * PAGE, PAGE)])
@pytest.mark.parametrize(("start", "size"), [(0, 64 * PAGE), (17, 50 * PAGE), (33 * PAGE + 5, 100)])
def test_what_lies_in_the_page_cache_is_taken_from_there(tmp_path, cold, start, size):
    """Whatever part of the file is cached, the bytes are right; and they do come from the cache where it has them."""
    data = random_bytes(64 * PAGE + 100)
    path = tmp_path / "f"
    path.write_bytes(data.numpy().tobytes())
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        if cold[1]:
            os.posix_fadvise(file.fileno(), *cold, os.POSIX_FADV_DONTNEED)
    with SourceFile(path) as file:
        assert torch.equal(file.read(Slab(size), start, size), data[start : start + size])
        assert file.read(Slab(100), 64 * PAGE, 100).tolist() == data[64 * PAGE :].tolist()


@pytest.mark.skipif(not directio.NO_WAIT, reason="needs RWF_NOWAIT")
def test_cached_bytes_need_no_disk(tmp_path, monkeypatch):
    path = tmp_path / "f"
    path.write_bytes(b"x" * 10000)
    monkeypatch.setattr(SourceFile, "_fill", lambda *_, **__: pytest.fail("read from the disk"))
    with SourceFile(path) as file:
        assert file.direct == (file._cached is not None)
        if file.direct:
            assert bytes(file.read(Slab(9000), 500, 9000).tolist()) == b"x" * 9000


@pytest.mark.parametrize("past_cache", [True, False])
@pytest.mark.parametrize(("start", "size"), [(0, 0), (0, 1), (17, 30000), (PAGE, 3 * PAGE), (4095, PAGE + 2)])
def test_a_stretch_in_pieces(tmp_path, start, size, past_cache):
    data = random_bytes(30100)
    (tmp_path / "f").write_bytes(data.numpy().tobytes())
    pieces = read_pieces(tmp_path / "f", start, size, 2 * PAGE, past_cache=past_cache)
    found = [(first, piece.clone()) for first, piece in pieces]
    assert [first for first, _ in found] == list(range(0, size, 2 * PAGE))
    assert torch.cat([torch.empty(0, dtype=torch.uint8), *(its for _, its in found)]).equal(data[start : start + size])


def test_pieces_past_the_end_are_an_error(tmp_path):
    (tmp_path / "f").write_bytes(b"x" * 100)
    for past_cache in (True, False):
        with pytest.raises(CheckpointError, match="ends too early"):
            list(read_pieces(tmp_path / "f", 50, 51, PAGE, past_cache=past_cache))


def test_what_is_read_over_and_over_is_not_looked_for_in_the_cache(tmp_path):
    (tmp_path / "f").write_bytes(b"x" * 10000)
    with SourceFile(tmp_path / "f", look=False) as file:
        assert file._cached is None
        assert bytes(file.read(Slab(9000), 500, 9000).tolist()) == b"x" * 9000


@given(st.lists(st.integers(0, 5 * PAGE), max_size=60), st.randoms(use_true_random=False))
def test_pieces_of_the_ring_never_overlap(sizes, random):
    """Taken and given back in order, at random moments."""
    ring = Ring(16 * PAGE)
    held = []
    for size in sizes:
        while held and (len(held) > 12 or random.random() < 0.4 or ring._place(slab_bytes(size)) is None):
            held.pop(0)
            ring.give()
        slab = ring.take(size)
        held.append((slab.bytes.data_ptr(), slab.bytes.data_ptr() + len(slab.bytes)))
        ordered = sorted(held)
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(ordered))
        assert ordered[-1][1] - ring._memory.data_ptr() <= ring.capacity


def test_the_ring_refuses_what_can_never_fit_and_wakes_who_waits():
    ring = Ring(2 * PAGE)
    with pytest.raises(ValueError, match="do not fit"):
        ring.take(5 * PAGE)
    ring.take(2 * PAGE)
    threading.Timer(0.05, ring.stop).start()
    with pytest.raises(StoppedError):
        ring.take(PAGE)


def test_reading_past_the_end_is_an_error(tmp_path, direct):
    (tmp_path / "f").write_bytes(b"x" * 5000)
    with SourceFile(tmp_path / "f", direct=direct) as file, pytest.raises(CheckpointError, match="ends too early"):
        file.read(Slab(6000), 0, 5001)


@pytest.mark.parametrize("sizes", [(1,), (PAGE,), (5, PAGE - 5, 1), (3 * PAGE + 7, 2 * PAGE, 9000, 1), (0, 10)])
def test_appended_pieces_make_the_file(tmp_path, direct, sizes):
    pieces = [random_bytes(size, seed) for seed, size in enumerate(sizes)]
    with TargetFile(tmp_path / "f", direct=direct) as file:
        for piece in pieces:
            file.append(piece)
        file.finish()
    assert (tmp_path / "f").read_bytes() == torch.cat(pieces).numpy().tobytes()


def test_patches_overwrite_in_place(tmp_path, direct):
    data = random_bytes(20000)
    with TargetFile(tmp_path / "f", direct=direct) as file:
        file.append(data)
        file.finish()
    patch(tmp_path / "f", [(4090, torch.zeros(20, dtype=torch.uint8)), (19999, torch.ones(1, dtype=torch.uint8))])
    data[4090:4110] = 0
    data[19999] = 1
    assert (tmp_path / "f").read_bytes() == data.numpy().tobytes()


def test_a_file_system_without_direct_io_is_served_through_the_cache(tmp_path, monkeypatch):
    """Some refuse O_DIRECT when the file is opened."""
    real = os.open

    def refuse(path, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(directio.errno.EINVAL, "no direct I/O here")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    data = random_bytes(10000)
    with TargetFile(tmp_path / "f") as out:
        assert not out.direct
        out.append(data)
        out.finish()
    with SourceFile(tmp_path / "f") as file:
        assert not file.direct
        assert torch.equal(file.read(Slab(10000), 0, 10000), data)


def test_stream_changes_in_order(tmp_path, direct):
    data = random_bytes(50000)
    (tmp_path / "in").write_bytes(data.numpy().tobytes())
    seen = []

    def change(raw):
        seen.append(len(raw))
        raw.bitwise_not_()

    byte_ranges = [
        ByteRange(start=0, size=10000),
        ByteRange(start=10000, size=30000, change=change),
        ByteRange(start=40000, size=5000, change=lambda raw: seen.append(-len(raw)), written=False),
        ByteRange(start=40000, size=10000),
    ]
    with SourceFile(tmp_path / "in", direct=direct) as source, TargetFile(tmp_path / "out", direct=direct) as out:
        transfer(source, byte_ranges, Ring(100000), write=lambda _, data: out.append(data), advance=lambda _: None)
        out.finish()
    data[10000:40000] = ~data[10000:40000]
    assert (tmp_path / "out").read_bytes() == data.numpy().tobytes()
    assert seen == [30000, -5000]


@pytest.mark.parametrize("culprit", ["read", "change", "write"])
@pytest.mark.parametrize("at", [0, 7, 19])
def test_a_failure_in_any_thread_is_raised_and_nothing_hangs(tmp_path, monkeypatch, culprit, at):
    (tmp_path / "in").write_bytes(b"x" * 200000)
    calls = {"read": 0, "change": 0, "write": 0}

    def count(what):
        calls[what] += 1
        if what == culprit and calls[what] == at + 1:
            raise OSError(5, "planted")

    real_read, real_append = SourceFile.read, TargetFile.append
    monkeypatch.setattr(SourceFile, "read", lambda *args: (count("read"), real_read(*args))[1])
    monkeypatch.setattr(TargetFile, "append", lambda *args: (count("write"), real_append(*args))[1])
    byte_ranges = [ByteRange(start=n * 10000, size=10000, change=lambda raw: count("change")) for n in range(20)]
    with (
        SourceFile(tmp_path / "in") as file,
        TargetFile(tmp_path / "out") as out,
        pytest.raises(OSError, match="planted"),
    ):
        transfer(file, byte_ranges, Ring(50000), write=lambda _, data: out.append(data), advance=lambda _: None)


def edited_bytes(base, out, **options):
    edit_plan = plan(base)
    output = prepare(out, source=base, fingerprint="test", needed_bytes=0)
    edit_checkpoint(without(edit_plan, factories.random_directions(48)), output, **options)
    folder = output.finish()
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["llama-biases", "gemma2", "llama-tied"])
def test_the_memory_budget_does_not_change_a_bit(tmp_path, monkeypatch, name, dtype):
    """Blocks of a few rows, matrices read twice and patched, or all at once: the same file."""
    base = factories.save(factories.build(name), tmp_path / "base", dtype=dtype)
    monkeypatch.setattr(blocks, "WORK_ELEMENTS", 256)
    monkeypatch.setattr("abliterate.editing.writing.SMALLEST_PIECE", 1000)
    small = edited_bytes(base, tmp_path / "small", memory_bytes=1)
    large = edited_bytes(base, tmp_path / "large", memory_bytes=2**30)
    buffered = edited_bytes(base, tmp_path / "buffered", memory_bytes=1, direct=False)
    assert small == large == buffered


@pytest.mark.parametrize("name", ["llama-biases", "gemma2", "llama-tied"])
def test_shared_blocks_give_the_same_file(tmp_path, monkeypatch, name, direct):
    """A file system that shares blocks is played by a plain copy: only what changes is written again."""
    base = factories.save(factories.build(name), tmp_path / "base", dtype=torch.bfloat16, shard="60KB")
    plain = edited_bytes(base, tmp_path / "plain")
    written = []
    real = SharedFile.overwrite
    monkeypatch.setattr(editor, "share_blocks", lambda source, target: bool(shutil.copy(source, target)))
    monkeypatch.setattr(SharedFile, "overwrite", lambda *args: (written.append(len(args[2])), real(*args))[1])
    monkeypatch.setattr("abliterate.editing.writing.SMALLEST_PIECE", 1000)
    shared = edited_bytes(base, tmp_path / "shared", memory_bytes=1, direct=direct)
    assert shared == plain
    edit_plan = plan(base)
    # an added head moves the data, so the shard that gets it is written whole
    whole = {edit_plan.model_map.embedding.tensor.shard} if edit_plan.added_head else set()
    shared_writers = [writer.tensor for writer in edit_plan.writers if writer.tensor.shard not in whole]
    assert shared_writers
    assert sum(written) == sum(tensor.size_bytes for tensor in shared_writers)


def test_blocks_are_shared_or_not_at_all(tmp_path):
    """On this file system, whichever it is."""
    (tmp_path / "a").write_bytes(b"x" * 10000)
    if share_blocks(tmp_path / "a", tmp_path / "b"):
        assert (tmp_path / "b").read_bytes() == b"x" * 10000
    else:
        assert (tmp_path / "b").read_bytes() == b""


def test_an_added_header_entry_keeps_data_on_its_page_offset():
    header = {"__metadata__": {"format": "pt"}, "a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    raw = len(text).to_bytes(8, "little") + text
    from abliterate.checkpoint.header import TensorInfo, parse_header

    like = TensorInfo(name="a", shard="s", dtype="BF16", shape=(2,), start=0, end=4)
    grown = header_with(raw, "lm_head.weight", like, 4)
    assert (len(grown) - len(raw)) % PAGE == 0
    parsed = parse_header(grown[8:], shard="s", file_size=len(grown) + 8, where="s")
    assert [tensor.name for tensor in parsed.tensors] == ["a", "lm_head.weight"]
    assert parsed.metadata == {"format": "pt"}
    assert text.rstrip(b"}") in grown


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_along_the_direction_leaves_far_less_than_rounding_to_nearest(tmp_path, dtype):
    """At least 14 times less of r in every writer, with the weights as close to the exact edit."""
    base = factories.save(factories.build("llama-biases"), tmp_path / "base", dtype=dtype)
    edit_plan = plan(base)
    proofs = {}
    for rounding in ("nearest", "direction"):
        output = prepare(tmp_path / rounding, source=base, fingerprint="test", needed_bytes=0)
        edit_checkpoint(without(edit_plan, factories.random_directions(48)), output, rounding=rounding)
        report = verify_bytes(without(edit_plan, factories.random_directions(48)), output.finish())
        assert report.ok
        proofs[rounding] = report.edited
    for nearest, ours in zip(proofs["nearest"], proofs["direction"], strict=True):
        if "bias" not in nearest.name:  # one vector: its leak may be small by chance
            assert ours.left < nearest.left / 14


@pytest.mark.parametrize("offsets", [(0, 0), (8, 16), (3, 3), (1, 0)])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1000, 4096])
def test_content_is_compared_to_the_last_byte(offsets, size):
    data = random_bytes(size)
    sides = []
    for offset in offsets:
        room = torch.zeros(size + 64, dtype=torch.uint8)
        start = -room.data_ptr() % 8 + offset
        room[start : start + size] = data
        sides.append(room[start : start + size])
    assert same_content(*sides)
    assert not same_content(sides[0], torch.cat((sides[1], sides[1].new_zeros(1))))
    for place in {0, size // 2, size - 1} if size else ():
        sides[1][place] ^= 1
        assert not same_content(*sides)
        sides[1][place] ^= 1
