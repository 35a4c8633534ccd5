"""Tokenizers that lie in a folder as a SentencePiece file alone, which transformers reads by another library."""

from importlib.util import find_spec
from pathlib import Path

from abliterate.errors import UsageError

NEEDED = ("sentencepiece", "google.protobuf")
BEGINS = b"\n"
"""The tag of a first piece.  Files of tiktoken have the same ending, and begin otherwise."""


def check_sentencepiece(folder: Path) -> None:
    """Check that what reads the tokenizer of ``folder`` is installed, where that is a SentencePiece file alone.

    Raises:
        UsageError: it is not; of transformers one would hear of a library that such files have nothing to do with.
    """
    if (folder / "tokenizer.json").exists():
        return
    for path in sorted(folder.glob("*.model")):
        with path.open("rb") as file:
            is_one = file.read(len(BEGINS)) == BEGINS
        if is_one and not all(map(_is_installed, NEEDED)):
            raise UsageError(
                f"{path}: a tokenizer of SentencePiece without a tokenizer.json, and what reads it is not installed",
                "pip install sentencepiece protobuf",
            )


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the package that would hold it
        return False
