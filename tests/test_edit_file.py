"""The file of an edit, which anybody may have changed: it is refused with words, or it is a valid edit."""

import copy
import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from abliterate.checkpoint import edit_file
from abliterate.errors import SourceError
from abliterate.method.stream_edit import StreamEdit
from abliterate.method.weight_edit import WeightEdit
from tests.test_weight_edits import stream_edit

D = 12


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Document and tensors of a valid file with everything that a file can hold."""
    path = tmp_path_factory.mktemp("edit") / "edit.safetensors"
    mixed, affine = stream_edit("mixed", 3, D), stream_edit("affine", 3, D)
    edit_file.save(StreamEdit(everywhere=mixed.everywhere, places={**mixed.places, **affine.places}), path)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return json.loads(file.metadata()[edit_file.KEY]), tensors


def load(document, tensors, folder):
    text = document if isinstance(document, str) else json.dumps(document)
    kept = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(kept, folder / "edit.safetensors", metadata={edit_file.KEY: text})
    return edit_file.load(folder / "edit.safetensors")


def valid(stream: StreamEdit) -> bool:
    """What everything that takes an edit relies on."""
    edits = list(stream.edits())
    for edit in edits:
        d, k = edit.read.shape
        assert 1 <= k <= d == stream.d_model
        assert edit.write.shape == edit.read.shape
        assert edit.constant is None or edit.constant.shape == (d,)
        assert math.isfinite(edit.strength)
        assert torch.isfinite(edit.kept).all()
        assert torch.linalg.matrix_rank(edit.read / edit.read.norm(dim=0)) == k
        assert edit.read.norm(dim=0).max() <= 1e6
        for part in (edit.read, edit.write, edit.constant):
            assert part is None or (part.dtype == torch.float64 and torch.isfinite(part).all())
    assert all(layer is None or layer >= 0 for layer, _ in stream.places)
    return all(edit is None or isinstance(edit, WeightEdit) for edit in (stream.everywhere, *stream.places.values()))


def test_the_file_itself_is_valid(parts, tmp_path):
    assert valid(load(*parts, tmp_path))


def put(document, path, value):
    document = copy.deepcopy(document)
    part = document
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return document


BAD = [
    (("format",), 0), (("format",), -1), (("format",), True), (("format",), "1"), (("format",), 1.0),
    (("format",), None),
    (("everywhere",), -1), (("everywhere",), 99), (("everywhere",), 0.5), (("everywhere",), True),
    (("edits", 0, "read"), -1), (("edits", 0, "write"), 99), (("edits", 0, "constant"), -1),
    (("edits", 0, "strength"), float("inf")), (("edits", 0, "strength"), float("nan")), (("edits", 0, "strength"), "1"),
    (("edits", 0, "strength"), 1e308 * 10), (("edits", 0, "column_scale"), "some"),
    (("places", 0, 0), -1), (("places", 0, 1), "nowhere"), (("places", 0, 2), -1), (("places", 0, 2), 99),
    (("edits",), []), (("places",), None),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), BAD)
def test_a_document_that_cannot_be_right(path, value, parts, tmp_path):
    with pytest.raises(SourceError, match="do not fit together") as found:
        load(put(parts[0], path, value), parts[1], tmp_path)
    assert found.value.exit_code == 5
    assert found.value.hint


def test_a_place_with_two_edits(parts, tmp_path):
    with pytest.raises(SourceError, match="a place has two edits"):
        load({**parts[0], "places": [*parts[0]["places"], parts[0]["places"][0]]}, parts[1], tmp_path)


@pytest.mark.parametrize("text", ["", "null", "[]", "[" * 100_000, "1" * 5000])
def test_a_document_that_is_none(text, parts, tmp_path):
    with pytest.raises(SourceError):
        load(text, parts[1], tmp_path)


def of(read, write=None, constant=None):
    """One edit everywhere."""
    tensors = {"vectors.0": read, "vectors.1": read if write is None else write}
    its = {"read": 0, "write": 1, "constant": None, "strength": 1.0, "column_scale": "none"}
    if constant is not None:
        tensors["vectors.2"] = constant
        its["constant"] = 2
    return {"format": 1, "edits": [its], "everywhere": 0, "places": []}, tensors


def wide(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


VECTOR = wide(D, 1)
TENSORS = {
    "no vectors": of(torch.zeros(D, 0, dtype=torch.float64)),
    "no width": of(torch.zeros(0, 1, dtype=torch.float64)),
    "more vectors than the width": of(wide(2, 3)),
    "one of zero": of(torch.cat((VECTOR, 0 * VECTOR), 1)),
    "one too short to be squared": of(VECTOR * 1e-300),
    "one far too long": of(VECTOR * 1e9),
    "one whose length is infinite": of(VECTOR * 1e300),
    "NaN": of(VECTOR * float("nan")),
    "written infinitely": of(VECTOR, VECTOR * float("inf")),
    "overflow": of(VECTOR, VECTOR / VECTOR.norm() * 1e308 * 1.5, None),
    "the same vector twice": of(torch.cat((VECTOR, -2 * VECTOR), 1)),
    "one dimension": of(wide(D)),
    "float32": of(VECTOR.float()),
    "integers": of(torch.ones(D, 1, dtype=torch.int64)),
    "another width of write": of(VECTOR, wide(D + 1, 1)),
    "a constant of another length": of(VECTOR, None, wide(D + 1)),
    "a constant that is a matrix": of(VECTOR, None, wide(D, 1)),
    "a constant that is not finite": of(VECTOR, None, torch.full((D,), float("inf"), dtype=torch.float64)),
}
FINE = {"overflow"}
"""What is large and yet finite may be."""


@pytest.mark.parametrize("kind", TENSORS)
def test_vectors_that_cannot_be_right(kind, tmp_path):
    try:
        assert valid(load(*TENSORS[kind], tmp_path))
    except SourceError as error:
        assert error.hint
    else:
        assert kind in FINE


def test_edits_of_different_widths(tmp_path):
    document, tensors = of(VECTOR)
    its = {"read": 2, "write": 2, "constant": None, "strength": 1.0, "column_scale": "none"}
    document = {**document, "edits": [*document["edits"], its], "places": [[0, "MLP", 1]]}
    with pytest.raises(SourceError, match="different widths"):
        load(document, {**tensors, "vectors.2": wide(D + 1, 1)}, tmp_path)


values = st.sampled_from(
    [None, True, -1, 0, 1, 2, 7, 99, 2**70, -(2**70), 0.5, 1e308, float("nan"), float("inf"), "", "MLP", [], {}, [0]]
)
changes = st.lists(st.tuples(st.lists(st.integers(0, 40), min_size=1, max_size=4), values), min_size=1, max_size=3)
spoils = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 11)), max_size=2)
SPOIL = (
    lambda t: t * 0, lambda t: t * 1e7, lambda t: t * 1e-200, lambda t: t * float("inf"), lambda t: t[:-1],
    lambda t: t[:, :0] if t.ndim == 2 else t[:0], lambda t: torch.cat((t, t), -1), lambda t: t.float(), lambda t: t[0],
    lambda t: t.to(torch.float8_e4m3fn), lambda t: t * 1e300, lambda t: t.to(torch.complex64),
)  # fmt: skip


def changed(part, way, value):
    """``part`` with ``value`` somewhere, ``way`` saying where."""
    if not way or not isinstance(part, dict | list) or not part:
        return value
    keys = sorted(part) if isinstance(part, dict) else range(len(part))
    key = keys[way[0] % len(part)]
    copied = copy.copy(part)
    copied[key] = changed(part[key], way[1:], value)
    return copied


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=changes, spoils=spoils)
def test_any_change_is_refused_or_leaves_a_valid_edit(changes, spoils, parts, tmp_path):
    document, tensors = parts
    for way, value in changes:
        document = changed(document, way, value)
    tensors = dict(tensors)
    for number, how in spoils:
        name = sorted(tensors)[number % len(tensors)]
        whole = tensors[name].real if tensors[name].is_complex() else tensors[name]
        tensors[name] = SPOIL[how](whole.double()) if whole.ndim else whole
    try:
        stream = load(document, tensors, tmp_path)
    except SourceError as error:
        assert error.hint
    else:
        assert valid(stream)
