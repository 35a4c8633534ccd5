"""What no linter here says: files and functions stay short enough to be read at once."""

import ast
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch

import abliterate
from abliterate.method.edits import orthogonal
from tests.conftest import SHAPED

PACKAGE = Path(abliterate.__file__).parent
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 60

LONG_FILES: dict[str, str] = {}
"""Files that may be longer, each with the reason why: tables."""

LONG_FUNCTIONS: dict[str, str] = {}
"""Functions that may be longer, each with the reason why."""


def sources() -> Iterator[tuple[str, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), path.read_text("utf-8")


def functions(text: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def long_files() -> dict[str, int]:
    lengths = {name: len(text.splitlines()) for name, text in sources()}
    return {name: length for name, length in lengths.items() if length > MOST_LINES_OF_A_FILE}


def long_functions() -> dict[str, int]:
    """With their decorators and docstrings."""
    found = {}
    for name, text in sources():
        for function in functions(text):
            first = min([function.lineno, *(each.lineno for each in function.decorator_list)])
            length = (function.end_lineno or first) - first + 1
            if length > MOST_LINES_OF_A_FUNCTION:
                found[f"{name}:{function.name}"] = length
    return found


def test_the_package_is_looked_at():
    assert len(list(sources())) > 100
    assert sum(1 for _, text in sources() for _ in functions(text)) > 500


def test_no_file_is_long_without_a_reason():
    assert {name: length for name, length in long_files().items() if name not in LONG_FILES} == {}


def test_no_function_is_long_without_a_reason():
    assert {name: length for name, length in long_functions().items() if name not in LONG_FUNCTIONS} == {}


def test_every_exception_is_needed():
    assert set(LONG_FILES) <= set(long_files())
    assert set(LONG_FUNCTIONS) <= set(long_functions())


def test_shapes_are_checked_while_tests_run():
    assert len(SHAPED) > 30
    with pytest.raises(jaxtyping.TypeCheckError):
        orthogonal(torch.zeros(3))
