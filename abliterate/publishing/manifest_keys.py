"""What a manifest must hold, as far as proofs, uploads and cards use it.

The shipped JSON schema says all that this version writes; this holds for every version that is read.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from abliterate.checkpoint.documents import InnerName, Part


class _Versions(Part):
    abliterate: str


class _Source(Part):
    name: str
    revision: str | None
    shards: dict[InnerName, int]


class _Its(Part):
    """One of the different edits."""

    directions: int
    strength: float
    column_scale: str
    constant: bool
    added: float = 0.0
    removes: bool
    writers: int


class _Edit1(Part):
    exactness: Literal["A", "B", "C"]
    coverage: str
    complete: bool
    edited_parameters: int
    notes: list[str]


class _Edit(_Edit1):
    claim: str
    edits: list[_Its]
    file: InnerName


class _Choice(Part):
    candidate: str = ""
    layer: int
    position: int | None
    rule: str


class _Direction(Part):
    file: InnerName
    sha256: str
    choice: _Choice | None


class _Proof(Part):
    name: str
    sha256_after: str


class _Behaviour(Part):
    prompts: int
    kl_nats: float | None
    ablation_kl_nats: float | None


class _Verification(Part):
    ok: bool
    failures: list[str]
    edited: list[_Proof]
    worst_left: float | None
    identical_tensors: int
    identical_files: int
    sha256: dict[InnerName, str]
    behaviour: _Behaviour | None

    @model_validator(mode="after")
    def _says_what_failed(self) -> "_Verification":
        if not self.ok and not self.failures:
            raise ValueError("failed, and does not say how")
        return self


class _Healing(Part):
    file: InnerName


class _Manifest(Part):
    """What all versions have."""

    versions: _Versions
    machine: dict[str, str] = Field(default_factory=dict)
    source: _Source
    direction: _Direction
    recipe: Any
    verification: _Verification | None
    evaluation: dict[str, Any] | None
    files: dict[InnerName, str] | None = None


class Manifest1(_Manifest):
    """A manifest of version 1, which names no file of an edit."""

    edit: _Edit1


class Manifest(_Manifest):
    """A manifest of version 2."""

    edit: _Edit
    healing: _Healing | None = None
