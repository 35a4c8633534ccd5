"""``read^T W`` of a writer on disk, summed block by block, for what is written beside a checkpoint: patches, adapters.

The editor sums it as it streams (``blocks``), and a proof for itself (``verification.tensor_proof``).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.arch.codecs import as_rows
from abliterate.arch.formats import DTYPES
from abliterate.arch.model_map import Writer
from abliterate.checkpoint.directio import Slab, SourceFile

READ_BYTES = 8 * 2**20
BLOCK_ELEMENTS = 2**18
"""Elements of a block.  Blocks begin at multiples of it whatever the memory budget, so that sums are grouped alike."""


def rows_of_block(values: int) -> int:
    """How many rows of ``values`` elements make a block."""
    return max(1, BLOCK_ELEMENTS // max(1, values))


def read_along(
    file: SourceFile, writer: Writer, vectors: Float[Tensor, "d k"]
) -> tuple[Float[Tensor, "k columns"], Float[Tensor, " columns"]]:
    """``vectors^T W`` and the squared lengths of the columns of a plain writer, through all matrices of a stack.

    In float64.  Columns are stream vectors, whether they lie in rows or in columns on disk.
    """
    tensor, width, stored = writer.tensor, writer.row_elements, DTYPES[writer.tensor.dtype]
    d, rows, row_bytes = len(vectors), tensor.numel // width, width * stored.itemsize
    count = rows if writer.in_rows else rows // d * width
    found = torch.zeros(vectors.shape[1], count, dtype=torch.float64)
    squares = torch.zeros(count, dtype=torch.float64)
    matrix_rows, step = rows if writer.in_rows else d, rows_of_block(width)
    at_once = max(1, READ_BYTES // (step * row_bytes)) * step
    slab = Slab(at_once * row_bytes)
    for first in range(0, rows, matrix_rows):
        for start in range(0, matrix_rows, at_once):
            size = min(at_once, matrix_rows - start)
            raw = file.read(slab, tensor.start + (first + start) * row_bytes, size * row_bytes)
            part = as_rows(raw, stored, width)
            for row in range(0, size, step):
                wide = part[row : row + step].to(torch.float64)
                if writer.in_rows:
                    place = slice(start + row, start + row + len(wide))
                    found[:, place] = (wide @ vectors).T
                    squares[place] = wide.square().sum(1)
                else:
                    place = slice(first // d * width, first // d * width + width)
                    found[:, place] += vectors[start + row : start + row + len(wide)].T @ wide
                    squares[place] += wide.square().sum(0)
    return found, squares
