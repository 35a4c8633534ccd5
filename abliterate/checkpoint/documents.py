"""JSON that abliterate wrote and anybody may have changed: checked once, where it is read, for what will be used of it.

A document is checked against a pydantic model and stays as it is: keys that no model knows are of a later version, or
of use to people only.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from abliterate.checkpoint.file_names import inner_name
from abliterate.errors import CheckpointError


class Part(BaseModel):
    """The keys of an object that are used, with their types as JSON has them; others may stand beside them."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


def check_document(document: object, model: type[Part], *, where: str | Path, hint: str) -> dict[str, Any]:
    """``document`` as it was, if it has what ``model`` says.

    Raises:
        CheckpointError: it has not; names the file ``where`` it stands, and the key.
    """
    try:
        model.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the document"
        raise CheckpointError(f"{where}: is damaged: {key}: {first['msg']}", hint) from error
    assert isinstance(document, dict), "a model takes nothing else"
    return document


def _inner(name: str) -> str:
    try:
        return inner_name(name, where="it")
    except CheckpointError as error:
        raise ValueError(error.message.removeprefix("it: ")) from error


InnerName = Annotated[str, AfterValidator(_inner)]
"""The name of a file inside the folder that the document is about."""
