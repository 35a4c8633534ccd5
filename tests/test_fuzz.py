"""Hostile bytes: never a crash, a hang, or a tensor outside its file.  ``fuzz_targets.py`` has the checks."""

import json
import random
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz_targets import CORPUS, TARGETS, check_header, check_index
from tests.fuzz_targets import VALID_HEADER as VALID

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
    check_header(data)


@MANY
@given(headers, st.integers(0, 200), st.integers(-20, 20))
def test_any_header(header, data_bytes, lie):
    text = json.dumps(header).encode()
    check_header(max(0, len(text) + lie).to_bytes(8, "little") + text + b"\0" * data_bytes)


@MANY
@given(st.integers(0, len(VALID) - 1), st.integers(0, 255), st.integers(0, len(VALID)))
def test_a_valid_file_with_one_byte_changed_or_cut_short(place, value, length):
    check_header(VALID[:place] + bytes([value]) + VALID[place + 1 :])
    check_header(VALID[:length])


@MANY
@given(documents | st.fixed_dictionaries({"weight_map": documents}))
def test_any_index(document):
    check_index(json.dumps(document).encode())


# --- every format, from its corpus ------------------------------------------------------------------------------------

KNOWN = sorted(path for path in CORPUS.rglob("*") if path.is_file())
LONGEST_S = 5.0
"""For one input, on a machine that does other things as well."""
TRIES = 150
HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 3, 10**9, 10**30, 10**400, 0.5, float("nan"), float("inf"), "", "x", "../x", "\ud800", "C:x",
    [], [None], ["x"], [[0.5]], {}, {"x": []}, {"": None},
)  # fmt: skip
TOKENS = (
    b"null", b"true", b"-1", b"0", b"1e999", b"NaN", b"9" * 400, b'"\\ud800"', b'"', b"'", b"[", b"]", b"{", b"}",
    b"[" * 900, b"\0", b"\xff", b"\n", b"\r", b"../x", b"&a *a", b"!!binary", b"---", b"=", b",", b":", b"#",
)  # fmt: skip


@pytest.mark.parametrize("path", KNOWN, ids=lambda path: path.relative_to(CORPUS).as_posix())
def test_the_corpus(path):
    taken = TARGETS[path.parent.name](path.read_bytes())
    assert taken or not path.name.startswith("valid"), "or the checks would check nothing"


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_nearly_valid(name):
    """The same every time: the seed is the name."""
    draw = random.Random(name)
    valid = [path.read_bytes() for path in KNOWN if path.parent.name == name and path.name.startswith("valid")]
    assert valid
    for _ in range(TRIES):
        data = draw.choice(valid)
        for change in draw.choices(
            (changed_bytes, changed_tokens, changed_value), weights=(1, 1, 2), k=draw.choice((1, 1, 2))
        ):
            data = change(data, draw)
        begun = time.perf_counter()
        TARGETS[name](data)
        assert time.perf_counter() - begun < LONGEST_S, data[:500]


def changed_bytes(data: bytes, draw: random.Random) -> bytes:
    """``data`` cut, with other bytes in it, or with a part of it twice."""
    place, length = draw.randrange(len(data) + 1), draw.choice((0, 1, 1, 2, 8, 100))
    new = draw.choice((b"", bytes([draw.randrange(256)]), draw.randbytes(8), data[place : place + length] * 2))
    return data[:place] if draw.random() < 0.1 else data[:place] + new + data[place + length :]


def changed_tokens(data: bytes, draw: random.Random) -> bytes:
    """``data`` with something in the place of a word or sign of its text."""
    words = [match.span() for match in re.finditer(rb"[\w.+-]+|[^\w\s]", data)]
    begin, end = draw.choice(words) if words else (0, 0)
    return data[:begin] + draw.choice(TOKENS) + data[end:]


def changed_value(data: bytes, draw: random.Random) -> bytes:
    """``data``, if it is JSON, with one value of it replaced, or gone; else with another token."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return changed_tokens(data, draw)
    places = list(places_in(document))
    if not places:
        return json.dumps(draw.choice(HOSTILE)).encode()
    holder, key = draw.choice(places)
    if isinstance(holder, dict) and draw.random() < 0.2:
        del holder[key]
    else:
        holder[key] = draw.choice(HOSTILE)
    return json.dumps(document).encode()


def places_in(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a document with each of its keys."""
    if isinstance(document, dict | list):
        for key, value in document.items() if isinstance(document, dict) else enumerate(document):
            yield document, key
            yield from places_in(value)
