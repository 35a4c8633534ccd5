"""Hostile bytes: never a crash, a hang, or a tensor outside its file.  ``fuzz_header.py`` drives the same checks."""

import json
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abliterate.checkpoint.source import open_folder
from tests.fuzz_header import VALID_HEADER as VALID
from tests.fuzz_header import check_index, check_shard

MANY = settings(max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.too_slow])

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8),
    st.sampled_from(["BF16", "F32", "BOGUS", "../x.safetensors", "/etc/passwd", "shape", "dtype", "data_offsets"]),
)  # fmt: skip
documents = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["BF16", "F32", "I64", "BOOL", "F4", "nope"]) | scalars,
        "shape": st.lists(st.integers(-2, 2**40), max_size=4) | documents,
        "data_offsets": st.lists(st.integers(-4, 2**40), min_size=0, max_size=3) | documents,
    },
)
headers = st.dictionaries(st.text(max_size=10) | st.just("__metadata__"), entries | documents, max_size=5)


@MANY
@given(st.binary(max_size=200))
def test_any_bytes(data):
    check_shard(data)


@MANY
@given(headers, st.integers(0, 200), st.integers(-20, 20))
def test_any_header(header, data_bytes, lie):
    text = json.dumps(header).encode()
    check_shard(max(0, len(text) + lie).to_bytes(8, "little") + text + b"\0" * data_bytes)


@MANY
@given(st.integers(0, len(VALID) - 1), st.integers(0, 255), st.integers(0, len(VALID)))
def test_a_valid_file_with_one_byte_changed_or_cut_short(place, value, length):
    check_shard(VALID[:place] + bytes([value]) + VALID[place + 1 :])
    check_shard(VALID[:length])


@MANY
@given(documents | st.fixed_dictionaries({"weight_map": documents}))
def test_any_index(document):
    check_index(json.dumps(document).encode())


def test_the_valid_file_is_accepted():
    """Or the checks above would check nothing."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(VALID)
        assert [tensor.name for tensor in open_folder(folder, name="x").tensors.values()] == ["a", "b"]
