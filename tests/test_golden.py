"""What is written stays what it was, byte for byte, whatever becomes of the code that writes it."""

import json

import pytest

from tests import golden


@pytest.fixture(scope="module")
def found():
    return golden.in_a_process()


@pytest.mark.parametrize("name", json.loads(golden.FILE.read_text("utf-8")))
def test_bytes_are_those_of_the_committed_hashes(name, found):
    expected = json.loads(golden.FILE.read_text("utf-8"))
    assert found[name]["base"] == expected[name]["base"]
    assert found[name] == expected[name]
    assert set(found) == set(expected)
    assert found[name]["edited"] != found[name]["base"]
