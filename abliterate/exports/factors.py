"""The two thin matrices that the edit of one writer comes to: what adapters of every format hold."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.arch.model_map import Writer
from abliterate.checkpoint.directio import SourceFile
from abliterate.editing.reading import read_along
from abliterate.method.weight_edit import WeightEdit


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Factors:
    """``W' - W = b a`` in float32, ``W [d, n]`` with the residual axis first; ``n`` of the embedding are the tokens."""

    writer: Writer
    a: Float[Tensor, "k n"]
    b: Float[Tensor, "d k"]

    @property
    def rank(self) -> int:
        """Number of directions."""
        return self.a.shape[0]


def factors_of(root: Path, writer: Writer, edit: WeightEdit) -> Factors:
    """``a = read^T W``, read from the file, and ``b = -strength write``; below and beside them what healing adds."""
    with SourceFile(root / writer.tensor.shard) as file:
        reads = read_along(file, writer, edit.read)[0].to(torch.float32)
    writes = (-edit.strength * edit.write).to(torch.float32)
    if edit.added is not None:
        more = edit.added.to(torch.float32)
        reads, writes = torch.cat([reads, more.a]), torch.cat([writes, more.b], dim=1)
    return Factors(writer=writer, a=reads.contiguous(), b=writes.contiguous())
