"""What the norms behind a writer do to what it writes: a gain for each channel of the stream."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.arch.codecs import read_plain
from abliterate.arch.model_map import Writer
from abliterate.errors import NonFiniteError


def read_gain(folder: Path, writer: Writer) -> Float[Tensor, " d"]:
    """The per-channel gain of the norms behind ``writer`` of the checkpoint in ``folder``, in float64.

    Of several in a row it is the product of their gains: the root mean square of an inner one is a scalar.

    Raises:
        ValueError: no norm stands behind the writer.
        NonFiniteError: a norm weight is not finite.
    """
    if not writer.norms:
        raise ValueError(f"{writer.tensor.name} has no norm behind it")
    product = torch.ones((), dtype=torch.float64)
    for norm in writer.norms:
        weight = read_plain(folder, norm).to(torch.float64)
        if not torch.isfinite(weight).all():
            raise NonFiniteError(f"{norm.shard}: '{norm.name}' holds NaN or infinity")
        product = product * (weight + 1 if writer.gain == "1+w" else weight)
    return product
