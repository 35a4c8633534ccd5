"""Opening a folder: headers are distrusted, and what does not fit together is refused before anything is written."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.checkpoint.header import MAX_HEADER_BYTES, parse_header, read_shard
from abliterate.checkpoint.opening import open_checkpoint
from abliterate.checkpoint.source import open_folder
from abliterate.errors import AbliterateError, CheckpointError, UnsupportedFormatError
from tests import checkpoints
from tests.checkpoints import INDEX, with_header, write_llama

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DATA = bytes(16)


def shard(folder, raw, name="model.safetensors"):
    (folder / name).write_bytes(raw)
    return read_shard(folder, name)


def refused(folder, raw, says):
    with pytest.raises(CheckpointError, match=says) as caught:
        shard(folder, raw)
    assert "model.safetensors" in caught.value.message
    assert caught.value.exit_code == 5


# --- one header -------------------------------------------------------------------------------------------------------


def test_a_header_is_read_in_file_order(tmp_path):
    raw = with_header({"b": {**ONE, "data_offsets": [8, 16]}, "__metadata__": {"k": "v"}, "a": ONE}, DATA)
    found = shard(tmp_path, raw)
    assert [tensor.name for tensor in found.tensors] == ["a", "b"]
    assert [tensor.start - found.data_start for tensor in found.tensors] == [0, 8]
    assert (found.metadata, found.size_bytes) == ({"k": "v"}, len(raw))


@pytest.mark.parametrize("keep", [0, 5, 8, 20])
def test_a_file_cut_inside_its_header_is_refused(keep, tmp_path):
    refused(tmp_path, with_header({"a": ONE}, DATA)[:keep], "truncated")


@pytest.mark.parametrize("missing", [1, 8])
def test_a_file_cut_inside_its_data_is_refused(missing, tmp_path):
    whole = with_header({"a": ONE, "b": {**ONE, "data_offsets": [8, 16]}}, DATA)
    refused(tmp_path, whole[:-missing], "truncated: the header describes")


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_a_huge_header_length_is_refused_without_reading_it(length, tmp_path):
    refused(tmp_path, length.to_bytes(8, "little") + b"{}", "truncated or not a safetensors file")


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({**ONE, "shape": [3]}, "does not fill its 8 bytes"),
        ({**ONE, "shape": []}, "does not fill its 8 bytes"),
        ({**ONE, "shape": [-2]}, "negative"),
        ({**ONE, "shape": [-1, -2]}, "negative"),
        ({**ONE, "shape": [2.0]}, "negative or fractional"),
        ({**ONE, "shape": 2}, "malformed"),
        ({**ONE, "shape": ["2"]}, "malformed"),
        ({**ONE, "data_offsets": [8, 0]}, "does not fill its -8 bytes"),
        ({**ONE, "data_offsets": [-8, 0]}, "negative"),
        ({**ONE, "data_offsets": [0]}, "malformed"),
        ({**ONE, "data_offsets": [0, 8, 16]}, "malformed"),
        ({**ONE, "data_offsets": None}, "malformed"),
        ({**ONE, "data_offsets": [16, 24]}, "truncated: the header describes"),
        ({**ONE, "data_offsets": [10**30, 10**30 + 8]}, "truncated: the header describes"),
        ({**ONE, "dtype": "F33"}, "unknown dtype 'F33'"),
        ({**ONE, "dtype": ["F32"]}, "malformed"),
        ({"dtype": "F32", "shape": [2]}, "malformed"),
        ({}, "malformed"),
        ("F32", "malformed"),
        (None, "malformed"),
    ],
)
def test_a_lying_entry_is_refused(entry, says, tmp_path):
    refused(tmp_path, with_header({"a": entry}, DATA), says)


@pytest.mark.parametrize("other", [[0, 8], [4, 12], [7, 15]])
def test_overlapping_ranges_are_refused(other, tmp_path):
    refused(tmp_path, with_header({"a": ONE, "b": {**ONE, "data_offsets": other}}, DATA), "overlaps")


@pytest.mark.parametrize(
    "header",
    [
        b"not json", b"[]", b"3", b"null", b'"text"', b"", b"\xff\xfe", b"{", b'{"a": NaN}', b"[" * 100_000,
        b'{"a":' * 50_000, b'{"__metadata__": 5}', b'{"__metadata__": {"a": 5}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": {"dtype": "F32", "shape": [2],'
        b' "data_offsets": [8, 16]}}',
    ],
    ids=lambda header: header[:24].decode("latin1"),
)  # fmt: skip
def test_a_header_that_is_not_one_is_refused(header, tmp_path):
    refused(tmp_path, with_header(header, DATA), "malformed")


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=40), st.recursive(st.none() | st.integers() | st.text(max_size=3), st.lists, max_leaves=4))
def test_random_headers_are_refused_or_lie_inside_the_file(noise, value):
    for raw in (noise, json.dumps({"a": value}).encode(), json.dumps({"a": {**ONE, "shape": value}}).encode()):
        try:
            found = parse_header(raw, shard="s", file_size=100, where="s")
        except CheckpointError:
            continue
        assert all(tensor.end <= 100 for tensor in found.tensors)


def test_odd_alignment_holes_and_empty_tensors_are_accepted(tmp_path):
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [1, 4]},
        "empty": {"dtype": "F32", "shape": [0, 7], "data_offsets": [4, 4]},
        "b": {**ONE, "data_offsets": [7, 15]},
    }
    found = shard(tmp_path, with_header(header, DATA, pad=1))
    assert [tensor.size_bytes for tensor in found.tensors] == [3, 0, 8]


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I64", "BOOL", "U8"])
def test_dtypes_that_cannot_be_edited_can_be_read(dtype, tmp_path):
    size = 16 if dtype == "I64" else 2
    found = shard(tmp_path, with_header({"a": {"dtype": dtype, "shape": [2], "data_offsets": [0, size]}}, DATA))
    assert found.tensors[0].dtype == dtype


def test_a_folder_in_place_of_a_shard_is_refused(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_shard(tmp_path, "model.safetensors")


# --- a folder ---------------------------------------------------------------------------------------------------------


def change_index(folder, change):
    document = json.loads((folder / INDEX).read_text())
    change(document)
    (folder / INDEX).write_text(json.dumps(document))


def cannot_open(folder, says, kind: type[AbliterateError] = CheckpointError):
    with pytest.raises(kind, match=says) as caught:
        open_checkpoint(folder)
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("shards", [None, 3])
def test_a_folder_is_opened_with_its_files(shards, tmp_path):
    checkpoint = open_checkpoint(write_llama(tmp_path / "base", shards=shards))
    assert len(checkpoint.tensors) == 3 + 2 * 9
    assert len(checkpoint.shards) == (shards or 1)
    assert set(checkpoint.other_files) == {*checkpoints.SIDE_FILES, "config.json"}
    assert checkpoint.left_out == ()


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors", "C:\\x.safetensors",
        "C:x.safetensors", "..", ".", "", "x\x00.safetensors", "config.json", 7, None, ["x.safetensors"],
    ],
)  # fmt: skip
def test_an_index_that_points_elsewhere_is_refused(name, tmp_path):
    folder = write_llama(tmp_path / "base", shards=2)
    change_index(folder, lambda document: document["weight_map"].update({"model.norm.weight": name}))
    assert "do not use this checkpoint" in cannot_open(folder, "is not a plain .safetensors file name").hint


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', '{"weight_map": null}', "[" * 100_000, "\xff"],
    ids=lambda content: content[:20],
)
def test_an_index_that_is_not_one_is_refused(content, tmp_path):
    folder = write_llama(tmp_path / "base", shards=2)
    (folder / INDEX).write_bytes(content.encode("latin1"))
    assert INDEX in cannot_open(folder, "JSON|weight_map").message


def test_an_index_that_forgets_a_tensor_is_refused(tmp_path):
    folder = write_llama(tmp_path / "base", shards=2)
    change_index(folder, lambda document: document["weight_map"].pop("model.norm.weight"))
    cannot_open(folder, "does not name tensor 'model.norm.weight'")


def test_an_index_that_invents_a_tensor_is_refused(tmp_path):
    folder = write_llama(tmp_path / "base", shards=2)
    change_index(folder, lambda document: document["weight_map"].update(ghost="model-00001-of-00002.safetensors"))
    cannot_open(folder, "says tensor 'ghost' is in model-00001.*but it is in no shard")


def test_an_index_that_misplaces_a_tensor_is_refused(tmp_path):
    folder = write_llama(tmp_path / "base", shards=2)
    move = {"model.norm.weight": "model-00001-of-00002.safetensors"}
    change_index(folder, lambda document: document["weight_map"].update(move))
    cannot_open(folder, "'model.norm.weight' is in model-00001.*but it is in model-00002")


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    folder = write_llama(tmp_path / "base", shards=2)
    extra = {"model.norm.weight": torch.ones(32), "extra": torch.ones(1)}
    (folder / "more.safetensors").write_bytes(checkpoints.pack(extra))
    change_index(folder, lambda document: document["weight_map"].update(extra="more.safetensors"))
    cannot_open(folder, "'model.norm.weight' is stored in model-00002.* and in more.safetensors")


def test_a_missing_shard_is_named(tmp_path):
    folder = write_llama(tmp_path / "base", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    cannot_open(folder, "model-00002-of-00003.safetensors: cannot be read")


@pytest.mark.parametrize(
    ("content", "says"), [(None, "cannot be read"), ("{", "not valid JSON"), ("[1]", "a JSON object")]
)
def test_a_missing_or_broken_config_is_refused(content, says, tmp_path):
    folder = write_llama(tmp_path / "base")
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    assert "config.json" in cannot_open(folder, says).message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused_with_code_3(name, tmp_path):
    folder = write_llama(tmp_path / "base")
    (folder / "model.safetensors").rename(folder / name)
    assert cannot_open(folder, f"pickled \\({name}\\)", UnsupportedFormatError).exit_code == 3


def test_a_folder_without_weights_is_refused(tmp_path):
    folder = write_llama(tmp_path / "base")
    (folder / "model.safetensors").unlink()
    cannot_open(folder, "holds neither model.safetensors nor model.safetensors.index.json")


def test_a_dangling_link_is_refused_rather_than_dropped(tmp_path):
    folder = write_llama(tmp_path / "base")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(tmp_path / "gone")
    cannot_open(folder, "tokenizer.json")


@pytest.mark.parametrize("name", ["./missing", "/no/such/folder", "a/b/c", "~/missing-folder", "C:missing"])
def test_a_missing_folder_is_not_looked_up_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cannot_open(name, "no such folder")


def test_version_control_and_caches_are_not_part_of_a_checkpoint(tmp_path):
    junk = {".git/config": b"x", ".cache/huggingface/download/x.lock": b"", "__pycache__/m.pyc": b""}
    folder = write_llama(tmp_path / "base", files=junk)
    assert open_folder(folder, name="base").other_files == ("config.json",)
