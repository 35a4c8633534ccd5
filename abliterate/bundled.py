"""The model that ships with the package, by name.  Importing this costs nothing."""

from pathlib import Path

from abliterate.tiny_chat import model_path

BUNDLED_NAME = "tiny-chat"


def is_bundled(model: str | Path | None) -> bool:
    """Whether ``model`` means the bundled model: None, or its name where no folder is called so."""
    return model is None or (str(model) == BUNDLED_NAME and not Path(model).exists())


def resolve_model(model: str | Path | None) -> str | Path:
    """``model``, or the folder of the bundled model where that is meant."""
    return model_path() if model is None or is_bundled(model) else model
