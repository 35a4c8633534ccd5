"""Several directions from a self-organising map of the harmful residuals (Piras et al., arXiv 2511.08379).

A map of one neuron is the mean, so that the difference of means is its smallest case.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

ROWS = COLUMNS = 4
"""Neurons of the map, as published."""
SIGMA = 0.33
"""Width of the neighbourhood on the map, in the distance of neighbours: a neuron's neighbours count 1 % of what it
does."""
ROUNDS = 100
"""After which a map that has not settled is taken as it is."""


def hexagonal(rows: int, columns: int) -> Float[Tensor, "neurons 2"]:
    """Where the neurons of a map stand: rows shifted by half, so that six neighbours are at distance 1."""
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    return torch.stack([column + 0.5 * (row % 2), row * 0.75**0.5], dim=-1).view(-1, 2)


def batch_map(
    samples: Float[Tensor, "n d"], *, rows: int = ROWS, columns: int = COLUMNS, sigma: float = SIGMA
) -> tuple[Float[Tensor, "neurons d"], Int[Tensor, " n"]]:
    """The neurons of a map of ``samples``, and which neuron each sample is nearest to; in float64.

    Every neuron is the mean of all samples, weighted by ``exp(-distance^2 / 2 sigma^2)`` of the neuron that won them to
    it on the map, again and again until no sample changes its neuron (the batch map of Kohonen 2013).  The published
    code takes samples one by one in a random order instead, with a falling rate; this has no order and no rate.
    Neurons begin as samples: the one farthest from the mean, then each time the one farthest from all so far.

    Raises:
        ValueError: there is no sample.
    """
    if not len(samples):
        raise ValueError("a map of nothing is undefined")
    x = samples.to(torch.float64)
    places = hexagonal(rows, columns)
    kernel = torch.exp(-torch.cdist(places, places).square() / (2 * sigma**2))
    neurons = _spread_out(x, len(places))
    won = torch.full((len(x),), -1)
    for _ in range(ROUNDS):
        nearest = torch.cdist(x, neurons).argmin(1)
        if torch.equal(nearest, won):
            break
        won = nearest
        weights = kernel[:, won]
        neurons = (weights @ x) / weights.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return neurons, won


def _spread_out(x: Float[Tensor, "n d"], count: int) -> Float[Tensor, "count d"]:
    chosen = [int((x - x.mean(0)).square().sum(1).argmax())]
    distance = torch.full((len(x),), torch.inf, dtype=x.dtype)
    while len(chosen) < count:
        distance = torch.minimum(distance, (x - x[chosen[-1]]).square().sum(1))
        chosen.append(int(distance.argmax()))
    return x[chosen]


def directions_of(
    neurons: Float[Tensor, "neurons d"], won: Int[Tensor, " n"], harmless: Float[Tensor, " d"]
) -> Float[Tensor, "d k"]:
    """``w_j - mean_harmless`` of every neuron that won a sample, those that won most first."""
    counts = torch.bincount(won, minlength=len(neurons))
    order = [int(j) for j in counts.argsort(descending=True, stable=True) if counts[j]]
    return (neurons[order] - harmless.to(torch.float64)).T
