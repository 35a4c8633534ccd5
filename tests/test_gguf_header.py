"""GGUF files that are damaged, incomplete or something else: two lines and an exit code, whatever they hold."""

import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from abliterate.checkpoint.gguf import read_gguf
from abliterate.cli.app import app
from abliterate.errors import AbliterateError, CheckpointError, SourceError, UnsupportedFormatError

ggufs = pytest.importorskip("tests.ggufs")

SOURCE = Path(__file__).parent / "models" / "tiny-qwen2"
MANY = settings(max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.too_slow])
WAY_OUT = "write it as one first: abliterate import "


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def two_lines(result, code, says):
    lines = result.stderr.splitlines()
    assert result.exit_code == code, result.stderr
    assert len(lines) == 2, result.stderr
    assert lines[0].startswith("error: ")
    assert says in lines[0]
    assert lines[1].startswith("       ")
    assert result.stdout == ""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def write(path, **options):
    return ggufs.write_gguf(path, SOURCE, "BF16", ggufs.tokenizer_of("qwen2"), **options)


@pytest.fixture(scope="module")
def data(file):
    return file.read_bytes()


def header_bytes(file):
    return min(tensor.start for tensor in read_gguf(file).tensors)


# --- what it says -----------------------------------------------------------------------------------------------------


def test_the_header_is_what_the_library_reads(file):
    found, theirs = read_gguf(file), ggufs.gguf.GGUFReader(file)
    assert found.architecture == "qwen2"
    assert [tensor.name for tensor in found.tensors] == [tensor.name for tensor in theirs.tensors]
    for ours, its in zip(found.tensors, theirs.tensors, strict=True):
        assert ours.shape == tuple(reversed(its.shape.tolist()))
        assert (ours.kind, ours.start) == (its.tensor_type.name, its.data_offset)
        assert ours.end - ours.start == its.n_bytes
    for key, value in found.metadata.items():
        its = theirs.get_field(key).contents()
        if isinstance(value, tuple):
            assert list(value) == its
        elif isinstance(its, list):
            assert value == len(its)
        else:
            assert value == its


def test_values_of_a_small_tensor(file):
    found = read_gguf(file)
    assert len(found.numbers("output_norm.weight")) == 96
    assert found.numbers("no such tensor") == ()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 0.00001, 0.0001, 0.01, 0.05, 0.3, 0.6, 0.999])
def test_a_file_that_is_cut_off(share, data, tmp_path):
    (tmp_path / "cut.gguf").write_bytes(data[: int(share * len(data))])
    result = run("import", tmp_path / "cut.gguf", "--out", tmp_path / "out")
    two_lines(result, 5, "cut.gguf: ")
    assert "truncated" in result.stderr or "not a GGUF file" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["cut.gguf"]


@MANY
@given(where=st.floats(0, 1))
def test_wherever_it_is_cut_off(where, file, data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "cut.gguf"
    path.write_bytes(data[: int(where * (len(data) - 64))])
    with pytest.raises(CheckpointError):
        read_gguf(path)


@MANY
@given(rest=st.binary(max_size=300))
def test_any_bytes_behind_the_magic(rest, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    path.write_bytes(b"GGUF" + rest)
    with pytest.raises(AbliterateError) as caught:
        read_gguf(path)
    assert caught.value.exit_code in (3, 5)


@MANY
@given(draw=st.data())
def test_a_header_with_other_bytes_is_read_or_refused(draw, file, data, tmp_path_factory):
    size = header_bytes(file)
    changed = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 4))):
        place = draw.draw(st.integers(4, size - 1))
        changed[place] = draw.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.write_bytes(bytes(changed))
    try:
        found = read_gguf(path)
    except (SourceError, UnsupportedFormatError):
        return
    assert all(tensor.end <= len(data) for tensor in found.tensors)


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_header_is_never_a_traceback(seed, file, data, tmp_path):
    """The whole import, in the keys that say what the model is."""
    changed, place = bytearray(data), 24 + 97 * seed
    changed[place : place + 3] = b"\xff\x07\xff"
    (tmp_path / "damaged.gguf").write_bytes(bytes(changed))
    result = run("import", tmp_path / "damaged.gguf", "--out", tmp_path / "out")
    if result.exit_code:
        two_lines(result, result.exit_code, "")
        assert result.exit_code in (3, 5), result.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["damaged.gguf"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("qwen2.block_count", 0), ("qwen2.block_count", 9), ("qwen2.block_count", 2**32 - 1),
        ("qwen2.block_count", "eight"),
        ("qwen2.attention.head_count", 0), ("qwen2.attention.head_count", 5), ("qwen2.embedding_length", 95),
        ("qwen2.rope.freq_base", "much"), ("tokenizer.ggml.eos_token_id", 10**6),
        ("tokenizer.ggml.model", "nobody-knows"), ("qwen2.context_length", "long"),
    ],
)  # fmt: skip
def test_keys_that_say_what_cannot_be(key, value, tmp_path):
    def change(writer):
        kind = ggufs.gguf.GGUFValueType.STRING if isinstance(value, str) else ggufs.gguf.GGUFValueType.UINT32
        writer.kv_data[0][key] = type(writer.kv_data[0][key])(value, kind)

    path = write(tmp_path / "odd.gguf", change=change)
    result = run("import", path, "--out", tmp_path / "out")
    two_lines(result, result.exit_code, "odd.gguf: ")
    assert result.exit_code in (3, 5), result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["odd.gguf"]


def header(*, version=3, entries=(), order="<"):
    """A header without tensors."""
    text = b"GGUF" + struct.pack(f"{order}IQQ", version, 0, len(entries))
    for key, value in entries:
        for part in (key, value):
            text += struct.pack(f"{order}Q", len(part)) + part.encode() + (struct.pack("<I", 8) if part is key else b"")
    return text


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (b"", 5, "not a GGUF file"),
        (b"PK\x03\x04 something else", 5, "not a GGUF file"),
        (header(version=1), 3, "is GGUF version 1"),
        (header(order=">"), 3, "is stored big-endian"),
        (header(entries=[("general.architecture", "qwen2")]), 5, "holds no tensors"),
        (header(entries=[("general.name", "qwen2")]), 5, "no architecture"),
    ],
)
def test_what_is_no_such_file(content, code, says, tmp_path):
    (tmp_path / "some.gguf").write_bytes(content)
    two_lines(run("import", tmp_path / "some.gguf", "--out", tmp_path / "out"), code, says)


def test_what_is_not_there(tmp_path):
    two_lines(run("import", tmp_path / "none.gguf"), 5, "none.gguf: no such file")
    two_lines(run("import", tmp_path), 5, "cannot be read")
    two_lines(run("plan", f"./{tmp_path.name}/none.gguf"), 5, "none.gguf: no such folder")


def test_a_part_says_how_to_join_it(file, tmp_path):
    part = shutil.copy(file, tmp_path / "big-00002-of-00003.gguf")
    result = run("import", part, "--out", tmp_path / "out")
    two_lines(result, 3, "part 2 of 3 of a split GGUF")
    assert "llama-gguf-split --merge big-00001-of-00003.gguf WHOLE.gguf" in result.stderr
    renamed = write(tmp_path / "renamed.gguf", change=lambda writer: writer.add_uint16("split.count", 3))
    two_lines(run("import", renamed, "--out", tmp_path / "out"), 3, "one of 3 parts of a split GGUF")
    alone = shutil.copy(file, tmp_path / "whole-00001-of-00001.gguf")
    assert read_gguf(Path(alone)).architecture == "qwen2"


def test_what_is_no_language_model(tmp_path):
    adapter = write(tmp_path / "adapter.gguf", change=lambda writer: writer.add_type("adapter"))
    two_lines(run("import", adapter, "--out", tmp_path / "out"), 3, "holds no language model (type 'adapter'")


def test_an_architecture_that_transformers_does_not_read_is_named(file, data, tmp_path):
    place = data.index(b"qwen2")
    (tmp_path / "other.gguf").write_bytes(data[:place] + b"rwkv7" + data[place + 5 :])
    result = run("import", tmp_path / "other.gguf", "--out", tmp_path / "out")
    two_lines(result, 3, "cannot read the architecture 'rwkv7' from GGUF")
    for name in ("llama", "qwen2", "qwen3moe", "gemma3", "phi3"):
        assert f" {name}," in result.stderr


def test_a_type_that_nobody_knows(file, data, tmp_path):
    name = b"token_embd.weight"
    place = data.index(name) + len(name) + 4 + 16
    assert struct.unpack_from("<I", data, place) == (30,)
    (tmp_path / "new.gguf").write_bytes(data[:place] + struct.pack("<I", 777) + data[place + 4 :])
    result = run("import", tmp_path / "new.gguf", "--out", tmp_path / "out")
    two_lines(result, 3, "'token_embd.weight' is of GGML type 777")


def test_without_the_library(file, tmp_path, monkeypatch):
    monkeypatch.setattr("abliterate.checkpoint.gguf.find_spec", lambda name: None)
    result = run("import", file, "--out", tmp_path / "out")
    two_lines(result, 2, "needs the gguf library")
    assert "pip install 'abliterate[gguf]'" in result.stderr


def test_another_dtype_is_usage(file, tmp_path):
    two_lines(run("import", file, "--out", tmp_path / "out", "--as", "float8"), 2, "--as float8")


# --- where a checkpoint is expected -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [("plan",), ("run", "--dry-run"), ("run",), ("measure",), ("chat", "--prompt", "hi"), ("dequantize",), ("diff",)],
    ids=str,
)
def test_commands_say_what_to_do_with_a_gguf(args, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    extra = (tmp_path,) if args == ("diff",) else ()
    result = run(args[0], file, *extra, *args[1:])
    assert result.exit_code == 3, result.stderr
    error, hint = result.stderr.splitlines()[-2:]
    assert error == f"error: {file}: a GGUF file, not a checkpoint folder"
    assert f"{WAY_OUT}{file} --out tiny" in hint
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_nothing_but_a_gguf_says_so_as_well(file, tmp_path):
    copy = shutil.copy(file, tmp_path / "a model.gguf")
    result = run("plan", tmp_path)
    two_lines(result, 3, "a model.gguf: a GGUF file, not a checkpoint folder")
    assert f"{WAY_OUT}'{copy}' --out 'a model'" in result.stderr
