"""The model that ships with the package, by name.  Importing this costs nothing."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from abliterate.data.tiny_chat import model_path

if TYPE_CHECKING:
    from abliterate.checkpoint.source import Checkpoint

BUNDLED_NAME = "tiny-chat"


def prompt_sets_path() -> Path:
    """The folder of the prompt sets that ship with the package."""
    return Path(__file__).parent / "prompt_sets"


def is_bundled(model: str | Path | None) -> bool:
    """Whether ``model`` means the bundled model: None, or its name where no folder is called so."""
    return model is None or (str(model) == BUNDLED_NAME and not Path(model).exists())


def resolve_model(model: str | Path | None) -> str | Path:
    """``model``, or the folder of the bundled model where that is meant."""
    return model_path() if model is None or is_bundled(model) else model


def open_model(model: str | Path | None, *, revision: str | None = None) -> "Checkpoint":
    """``open_checkpoint``; the bundled model keeps its name: the folder it lies in is another on every machine.

    Raises:
        SourceError: it cannot be opened.
    """
    from abliterate.checkpoint.opening import open_checkpoint

    checkpoint = open_checkpoint(resolve_model(model), revision=revision)
    return replace(checkpoint, name=BUNDLED_NAME) if is_bundled(model) else checkpoint
