"""Directions span a subspace: their sign, length and order must not matter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.method.linalg import cosine, orthonormal_basis, project_out, unit
from tests.checkpoints import directions

SEEDS = st.integers(0, 2**32 - 1)
few = settings(max_examples=40, deadline=None)


def matrix(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@few
@given(SEEDS, st.integers(1, 40), st.floats(1e-100, 1e100))
def test_unit_has_length_one_and_keeps_the_direction(seed, d, scale):
    v = matrix(seed, d) * scale
    u = unit(v)
    assert torch.linalg.vector_norm(u) == pytest.approx(1, abs=1e-12)
    assert float(u @ (v / scale)) == pytest.approx(float(torch.linalg.vector_norm(v / scale)), rel=1e-12)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_vector_without_direction_is_refused(bad):
    with pytest.raises(ValueError, match="has no direction"):
        unit(torch.full((3,), bad))


@few
@given(SEEDS, st.integers(4, 60), st.integers(1, 4))
def test_basis_is_orthonormal_and_spans_the_directions(seed, d, k):
    given_directions = matrix(seed, d, k)
    q = orthonormal_basis(given_directions)
    assert torch.allclose(q.T @ q, torch.eye(k, dtype=q.dtype), atol=1e-13)
    assert torch.allclose(q @ (q.T @ given_directions), given_directions, atol=1e-12)


@few
@given(SEEDS, st.permutations(range(3)), st.lists(st.floats(1e-6, 1e6), min_size=3, max_size=3), st.booleans())
def test_order_scale_and_sign_do_not_change_the_subspace(seed, order, scales, flip):
    a = matrix(seed, 24, 3)
    b = a[:, list(order)] * torch.tensor(scales, dtype=a.dtype) * (-1 if flip else 1)
    p, q = orthonormal_basis(a), orthonormal_basis(b)
    assert torch.allclose(p @ p.T, q @ q.T, atol=1e-9)


@pytest.mark.parametrize("copies", [2, 5])
def test_dependent_and_zero_columns_are_dropped(copies):
    v = directions(16)
    columns = [scale * v for scale in range(1, copies + 1)] + [torch.zeros_like(v)]
    assert orthonormal_basis(torch.cat(columns, dim=1)).shape == (16, 1)


def test_nearly_parallel_directions_still_give_an_orthonormal_basis():
    v = directions(64, 2)
    close = torch.stack([v[:, 0], v[:, 0] + 1e-5 * v[:, 1]], dim=1)
    q = orthonormal_basis(close)
    assert torch.allclose(q.T @ q, torch.eye(2, dtype=q.dtype), atol=1e-13)


def test_an_empty_span_is_refused():
    with pytest.raises(ValueError, match="all columns are zero"):
        orthonormal_basis(torch.zeros(5, 2))


@few
@given(SEEDS, st.integers(1, 3))
def test_projecting_out_is_idempotent_and_never_lengthens(seed, k):
    q, x = orthonormal_basis(matrix(seed, 20, k)), matrix(seed + 1, 2, 5, 20)
    once = project_out(x, q)
    assert (once @ q).abs().max() < 1e-13
    assert torch.allclose(project_out(once, q), once, atol=1e-13)
    assert (once.norm(dim=-1) <= x.norm(dim=-1) + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_projecting_out_keeps_the_dtype(dtype):
    assert project_out(torch.ones(2, 4).to(dtype), orthonormal_basis(torch.eye(4)[:, :1])).dtype == dtype


def test_cosine_of_known_angles():
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    b = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 1.0]])
    assert torch.allclose(cosine(a, b), torch.tensor([1.0, 0.0, -(0.5**0.5)], dtype=torch.float64))
