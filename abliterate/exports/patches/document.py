"""What the document of a patch must hold, as far as it is used."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, model_validator

from abliterate.checkpoint.documents import InnerName, Part


class _Base(Part):
    name: str


class _Shard(Part):
    size: NonNegativeInt
    sha256: str
    edited_size: NonNegativeInt
    edited_sha256: str


class _Tensor(Part):
    name: str
    shard: InnerName
    axis: NonNegativeInt
    role: str
    coded: Literal["codes", "replay"]
    projector: NonNegativeInt
    sha256_before: str
    sha256_after: str


class _File(Part):
    name: InnerName
    base: str | None
    edited: str | None
    copy_of: InnerName = "-"


class PatchDocument(Part):
    """A patch of version 1 or 2."""

    purposes: Annotated[list[Literal["apply", "revert"]], Field(alias="for")]
    base: _Base
    recipe: Any
    shards: dict[InnerName, _Shard]
    tensors: list[_Tensor]
    files: list[_File]

    @model_validator(mode="after")
    def _fits_together(self) -> "PatchDocument":
        names = [tensor.name for tensor in self.tensors]
        if len(set(names)) < len(names):
            raise ValueError("a tensor occurs twice")
        if not self.shards.keys() >= {tensor.shard for tensor in self.tensors}:
            raise ValueError("a tensor lies in no shard")
        return self
