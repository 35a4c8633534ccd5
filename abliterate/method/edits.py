"""Edits by name, each a function that makes a ``WeightEdit``, and what one does to a whole matrix.

- ``orthogonal``: ``read = write = Q``, so ``W' = W - Q Q^T W`` (Arditi et al. 2024, eq. 5), for writers that are added
  to the stream as they are.
- ``oblique``: another ``write`` than ``read`` (LEACE, arXiv 2306.03819).
- ``affine``: the component along ``Q`` is set to that of a mean instead of 0 (ACE, arXiv 2411.09003, eq. 4).
- ``behind_norm``: any of these for a writer behind a norm with a per-channel gain ``g`` (Gemma 2/3).  The stream then
  receives ``g * W x / rms(W x)``, whose component along ``r`` is ``(g * r)^T W x / rms``: so ``read = g * r``, and
  ``write ~ r / g`` keeps the direction of what the hook would leave, ``P_r (g * W x)``.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.errors import UsageError
from abliterate.method.directions import Candidate, DirectionSet, Subspace
from abliterate.method.kernel import kernels_in, middle
from abliterate.method.linalg import orthonormal_basis, unit
from abliterate.method.places import IN_BLOCKS, Place
from abliterate.method.stream_edit import StreamEdit
from abliterate.method.weight_edit import NOTHING_LEFT, ColumnScale, WeightEdit

RIDGE_GRID = (0.0, 1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1e9)
"""Weights of the median squared gain tried by ``behind_norm``: 0 is purely oblique, infinity orthogonal to ``g *
r``."""


def orthogonal(basis: Float[Tensor, "d k"], *, strength: float = 1.0, column_scale: ColumnScale = "none") -> WeightEdit:
    """``W' = W - strength Q Q^T W`` for the orthonormal columns of ``basis``."""
    q = basis.to(torch.float64)
    return WeightEdit(read=q, write=q, strength=strength, column_scale=column_scale)


def oblique(read: Float[Tensor, "d k"], write: Float[Tensor, "d k"], *, strength: float = 1.0) -> WeightEdit:
    """``W' = W - strength B (A^T B)^-1 A^T W`` with ``A = read`` and ``B = write``: reads along one, takes out another.

    Raises:
        ValueError: ``A^T B`` is singular, so that taking out along ``write`` cannot remove what is read.
    """
    a, b = read.to(torch.float64), write.to(torch.float64)
    a = a / torch.linalg.vector_norm(a, dim=0)
    across = a.T @ b
    if torch.linalg.matrix_rank(across, rtol=1e-9) < len(across):
        raise ValueError("what is taken out lies across what is read")
    b = b @ torch.linalg.inv(across)
    return WeightEdit(read=a, write=b, strength=strength)


def affine(basis: Float[Tensor, "d k"], mean: Float[Tensor, " d"]) -> WeightEdit:
    """``s' = s - Q Q^T (s - mean)`` for the orthonormal columns of ``basis``."""
    q = basis.to(torch.float64)
    return WeightEdit(read=q, write=q, constant=q @ (q.T @ mean.to(torch.float64)))


def behind_norm(edit: WeightEdit, gain: Float[Tensor, " d"]) -> WeightEdit:
    """``edit`` of the stream as the edit of a writer behind a norm with per-channel ``gain``.

    ``read = D R`` with ``D = diag(gain)`` and unit columns; ``write = (D^2 + t m)^-1 D S`` scaled so that
    ``read^T write`` is what it is in the stream, with ``m`` the median squared gain.  ``t = 0`` is ``D^-1 S``, which
    keeps the written direction exactly but blows up where a gain is near zero; the ``t`` of ``RIDGE_GRID`` with the
    least predicted error is taken:

        J^2 = |D (a_t - a_0)|^2 / |g|^2 + ((A - 2) / 2d)^2 + 2 (A / 2d)^2,      A = |a_t|^2 |read|^2

    The per-token rms of the norm's denominator still differs from the hook's: such an edit holds no ``r`` but is not
    equal to the hook (exactness class B).

    Raises:
        ValueError: the gain removes a direction altogether (``g * r = 0``), or the edit has a constant.
    """
    if edit.constant is not None:
        raise ValueError("what stands behind a norm cannot gain a constant")
    g = gain.to(torch.float64)
    d = g.numel()
    read, taken = g[:, None] * edit.read, g[:, None] * edit.write
    lengths = torch.linalg.vector_norm(read, dim=0)
    if torch.any(lengths == 0):
        raise ValueError("the norm's gain is zero along the direction, so nothing can be read along it")
    read, taken = read / lengths, taken / lengths
    safe_gain = torch.where(g == 0, torch.full_like(g, 1e-12), g)
    ideal = edit.write / safe_gain[:, None] * lengths
    same = edit.read is edit.write
    between = None if same else (edit.read.T @ edit.write) * (lengths / lengths[:, None])
    median = (g * g).median()
    best: WeightEdit | None = None
    for ridge in RIDGE_GRID:
        raw = taken / (g * g + ridge * median)[:, None]
        inverse, singular = torch.linalg.inv_ex(read.T @ raw)
        if singular.any() or not torch.isfinite(inverse).all():
            continue
        write = raw @ inverse
        write = write if between is None else write @ between
        if not torch.isfinite(write).all():  # a gain whose square is zero, and no ridge
            continue
        size = write.square().sum(0)
        turn = ((g[:, None] * (write - ideal)).square().sum(0) / g.square().sum()).mean()
        gain_error = (((size - 2) / (2 * d)).square() + 2 * (size / (2 * d)).square()).mean()
        error = float((turn + gain_error).sqrt())
        if best is None or error < best.predicted_error:
            best = replace(edit, read=read, write=write, predicted_error=error, ridge=ridge)
    if best is None:
        raise ValueError("no finite oblique projector exists for this gain")
    return best


def removing(directions: Float[Tensor, "d k"]) -> StreamEdit:
    """Nothing writes along the span of ``directions`` any more (any lengths, any angles).

    Raises:
        ValueError: all of them are zero, or one is not finite.
    """
    return StreamEdit(everywhere=orthogonal(orthonormal_basis(directions)))


def _removal(subspace: Subspace) -> WeightEdit:
    if subspace.read is None:
        return orthogonal(subspace.basis)
    if subspace.as_it_is:
        return WeightEdit(read=subspace.read.to(torch.float64), write=subspace.vectors.to(torch.float64))
    return oblique(subspace.read, subspace.vectors)


def removal(candidate: Candidate) -> StreamEdit:
    """Nothing writes along the subspace of ``candidate`` any more; where it is read along others, along those.

    Where it has another subspace in each layer, each is removed from what that layer adds, and places that it does not
    name are left alone.

    Raises:
        ValueError: a subspace is empty or not finite.
    """
    if isinstance(candidate.subspace, Subspace):
        return StreamEdit(everywhere=_removal(candidate.subspace))
    of_layers = {layer: _removal(subspace) for layer, subspace in candidate.subspace.items()}
    of_mlps = of_layers
    if candidate.of_mlps is not None:
        of_mlps = {layer: _removal(subspace) for layer, subspace in candidate.of_mlps.items()}
    by_kind = zip(IN_BLOCKS, (of_layers, of_mlps), strict=True)
    return StreamEdit(places={(layer, kind): edit for kind, its in by_kind for layer, edit in its.items()})


def removal_with_kept_norms(candidate: Candidate) -> StreamEdit:
    """``removal``, and every column of a writer gets its length back.

    "Norm-preserving" ablation, of columns: nothing is left along the direction, and what the writer writes otherwise
    grows with what was taken from the column.  The form published by grimjim (2025) keeps the lengths of *rows*, which
    puts a part of the direction back (``removal_with_kept_rows``).

    Raises:
        ValueError: as for ``removal``.
    """
    return removal(candidate).with_edits(lambda edit: replace(edit, column_scale="kept norms"))


def removal_with_kept_rows(candidate: Candidate) -> StreamEdit:
    """``removal``, and every row of a writer gets its length back: ``W' = D (W - Q Q^T W)``, ``D`` diagonal.

    "Norm-preserving" ablation as published (grimjim 2025; heretic 1.4.0, row normalisation "full").  ``D`` turns what
    is written, so that a part of the direction comes back: this edit does not remove it.  The rows of the attention or
    of the MLP of a layer go through all its matrices, if there are several (experts).

    Raises:
        ValueError: as for ``removal``.
    """
    return removal(candidate).with_edits(lambda edit: replace(edit, keeps_rows=True))


def kernel_removal(candidate: Candidate, n_layers: int) -> StreamEdit:
    """``s' = s - w(l) Q Q^T s`` for what block ``l`` adds, one ``w`` for attention and one for MLPs (heretic 1.4.0).

    The weights are those that the candidate came with, as one of the search does, or else those in the middle of
    heretic's ranges (``kernel``).  The embedding is left alone, and so are blocks out of a kernel's reach.

    Raises:
        ValueError: a subspace is empty or not finite, or the weights that it came with are none.
    """
    kernels = kernels_in(candidate.provenance) or middle(n_layers)
    whole, places = removal(candidate), dict[Place, WeightEdit]()
    for block, kind in product(range(n_layers), IN_BLOCKS):
        weight, edit = kernels[kind].weight(block), whole.at(block, kind)
        if weight and edit is not None:
            places[block, kind] = replace(edit, strength=weight)
    return StreamEdit(places=places)


def affine_removal(directions: DirectionSet) -> StreamEdit:
    """``x' = x - Q Q^T (x - mean)`` with the harmless mean where the candidate was read (ACE, arXiv 2411.09003, eq. 4).

    Every writer loses what it writes along ``Q``, and the embedding gains ``Q Q^T mean``, which no block takes away
    again: the component of the stream is that of the harmless mean everywhere.

    Raises:
        ValueError: there is no harmless mean, the candidate was read at no position, or it has another subspace in each
            layer.
    """
    chosen, stats = directions.chosen, directions.statistics
    if stats is None or chosen.position is None:
        raise ValueError("the harmless mean where the direction was read is not known")
    basis = chosen.everywhere.basis
    mean = stats.mean("harmless")[stats.positions.index(chosen.position), chosen.layer]
    return StreamEdit(everywhere=orthogonal(basis), places={(None, "embedding"): affine(basis, mean)})


def addition(candidate: Candidate) -> StreamEdit:
    """``x' = x + vector`` for what enters the layer of the candidate (activation addition, eq. 3; CAA; RepE).

    Nothing is removed.  The vector is added by the MLP of the block below, whose output bias holds it, or by the
    embedding where the candidate was read at layer 0.

    Raises:
        ValueError: the vector is zero.
    """
    subspace = candidate.at(candidate.layer)
    if subspace is None:
        raise ValueError("the candidate has nothing at its layer")
    vector = subspace.added.to(torch.float64)
    q = unit(vector)[:, None]
    adding = WeightEdit(read=q, write=q, strength=0.0, constant=vector)
    return StreamEdit(places={(candidate.layer - 1, "MLP") if candidate.layer else (None, "embedding"): adding})


KERNEL = "kernel"
EDITS: Mapping[str, Callable[[DirectionSet, int], StreamEdit]] = {
    "removal": lambda directions, _: removal(directions.chosen),
    "kept-norms": lambda directions, _: removal_with_kept_norms(directions.chosen),
    "kept-rows": lambda directions, _: removal_with_kept_rows(directions.chosen),
    KERNEL: lambda directions, n_layers: kernel_removal(directions.chosen, n_layers),
    "affine": lambda directions, _: affine_removal(directions),
    "addition": lambda directions, _: addition(directions.chosen),
}
"""What a recipe may do with a chosen candidate in a model of so many layers, by name.

How to add one stands in ``docs/design.md``.
"""


def check_edit(name: str) -> None:
    """Check that there is an edit of this name.

    Raises:
        UsageError: there is none.
    """
    if name not in EDITS:
        raise UsageError(f"there is no edit {name!r}", f"edits are: {', '.join(EDITS)}")


def stream_edit(name: str, directions: DirectionSet, n_layers: int) -> StreamEdit:
    """What the edit of this name does to the stream of a model along what was chosen.

    Raises:
        UsageError: there is no such edit, nothing was chosen, or the edit cannot be made of it.
    """
    check_edit(name)
    if name != KERNEL and "kernels" in directions.chosen.provenance:
        raise UsageError(
            f"edit {name!r}: what was chosen came with weights for each block, and only {KERNEL!r} heeds them",
            f"add --change {KERNEL} (the edit of a finished folder is read from its own file)",
        )
    try:
        return EDITS[name](directions, n_layers)
    except ValueError as error:
        raise UsageError(f"edit {name!r}: {error}", "choose another candidate, or another edit") from error


def apply(w: Float[Tensor, "d n"], edit: WeightEdit) -> Float[Tensor, "d n"]:
    """``diag(row_scale) (W - strength write (read^T W) + constant) diag(column_scale)`` in the dtype of ``w``."""
    read, write = (vectors.to(device=w.device, dtype=w.dtype) for vectors in (edit.read, edit.write))
    edited = w - edit.strength * (write @ (read.T @ w))
    if edit.constant is not None:
        edited = edited + edit.constant.to(device=w.device, dtype=w.dtype)[:, None]
    if edit.scales:
        edited = edited * column_scale(w.square().sum(0), edited.square().sum(0))
    rows = edit.known_row_scale
    return edited if rows is None else edited * rows.to(device=w.device, dtype=w.dtype)[:, None]


def column_scale(before: Float[Tensor, " n"], after: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """What gives columns of squared length ``after`` their squared length ``before`` back; 1 where nothing is left.

    In float64, as ``after`` may be the difference of nearly equal numbers.
    """
    kept = after > before * NOTHING_LEFT
    return torch.where(kept, (before / torch.where(kept, after, torch.ones_like(after))).sqrt(), torch.ones_like(after))
