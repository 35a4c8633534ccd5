"""The edit of one matrix, and its rounding: exact where the text says exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.method import edits
from abliterate.method.edits import apply, behind_norm, orthogonal
from abliterate.method.linalg import orthonormal_basis, unit
from abliterate.method.rounding import feedback_rows, round_keeping
from abliterate.method.weight_edit import WeightEdit

SEEDS = st.integers(0, 2**32 - 1)
few = settings(max_examples=40, deadline=None)
fewer = settings(max_examples=12, deadline=None)
HALVES = (torch.bfloat16, torch.float16)


def matrix(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(a, b):
    return float(torch.linalg.vector_norm(a.double() - b.double()) / torch.linalg.vector_norm(b.double()))


# --- orthogonal -------------------------------------------------------------------------------------------------------


@few
@given(SEEDS, st.integers(1, 4), st.integers(1, 9))
def test_orthogonal_edit_removes_everything_once(seed, k, n):
    q, w = orthonormal_basis(matrix(seed, 24, k)), matrix(seed + 1, 24, n)
    edited = apply(w, orthogonal(q))
    assert (q.T @ edited).abs().max() < 1e-13
    assert torch.allclose(apply(edited, orthogonal(q)), edited, atol=1e-13)


@few
@given(SEEDS, st.integers(1, 4))
def test_orthogonal_edit_never_grows_a_column(seed, k):
    q, w = orthonormal_basis(matrix(seed, 24, k)), matrix(seed + 1, 24, 7)
    assert (apply(w, orthogonal(q)).norm(dim=0) <= w.norm(dim=0) + 1e-12).all()


@few
@given(SEEDS, st.integers(1, 4))
def test_the_change_has_no_more_rank_than_directions(seed, k):
    q, w = orthonormal_basis(matrix(seed, 24, k)), matrix(seed + 1, 24, 12)
    change = w - apply(w, orthogonal(q))
    assert torch.linalg.matrix_rank(change, rtol=1e-10) == k


@few
@given(SEEDS, st.floats(-1e6, 1e6).filter(lambda scale: abs(scale) > 1e-6))
def test_sign_and_scale_of_the_direction_are_irrelevant(seed, scale):
    r, w = matrix(seed, 24, 1), matrix(seed + 1, 24, 7)
    once, scaled = (apply(w, orthogonal(orthonormal_basis(v))) for v in (r, scale * r))
    assert torch.allclose(once, scaled, atol=1e-12)


@few
@given(SEEDS, st.floats(0.5, 0.999))
def test_correlated_directions_are_removed_where_one_after_the_other_fails(seed, correlation):
    a, b, c = (unit(column) for column in matrix(seed, 40, 3).T)
    b, c = unit(correlation * a + (1 - correlation) * b), unit(correlation * a + (1 - correlation) * c)
    directions, w = torch.stack([a, b, c], dim=1), matrix(seed + 1, 40, 8)
    together = apply(w, orthogonal(orthonormal_basis(directions)))
    sequential = w
    for r in directions.T:
        sequential = sequential - r[:, None] * (r @ sequential)
    assert (directions.T @ together).abs().max() < 1e-10
    assert (directions.T @ sequential).abs().max() > 1e-6


# --- oblique ----------------------------------------------------------------------------------------------------------


@fewer
@given(SEEDS, st.integers(1, 3))
def test_oblique_edit_writes_nothing_through_the_gain(seed, k):
    q, gain, w = orthonormal_basis(matrix(seed, 32, k)), matrix(seed + 1, 32), matrix(seed + 2, 32, 6)
    edit = behind_norm(orthogonal(q), gain)
    assert torch.allclose(edit.read.T @ edit.write, torch.eye(k, dtype=q.dtype), atol=1e-9)
    edited = apply(w, edit)
    assert (q.T @ (gain[:, None] * edited)).abs().max() < 1e-9 * edit.write.norm()


@few
@given(SEEDS, st.floats(0, 2))
def test_purely_oblique_edit_leaves_the_direction_the_hook_leaves(seed, spread):
    q, w, x = orthonormal_basis(matrix(seed, 64, 1)), matrix(seed + 1, 64, 16), matrix(seed + 2, 16)
    gain = (spread * matrix(seed + 3, 64)).exp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edits, "RIDGE_GRID", (0.0,))
        edit = behind_norm(orthogonal(q), gain)
    ours = gain * (apply(w, edit) @ x)
    hooked = gain * (w @ x) - q[:, 0] * (q[:, 0] @ (gain * (w @ x)))
    assert float(unit(ours) @ unit(hooked)) == pytest.approx(1, abs=1e-9)


@fewer
@given(SEEDS, st.sampled_from([0.0, 1e-300, 1e-12, -1e-8]), st.integers(1, 5), st.integers(1, 2))
def test_gains_at_or_near_zero_stay_finite_and_tame(seed, tiny, count, k):
    q, gain, w = orthonormal_basis(matrix(seed, 64, k)), 1 + 0.3 * matrix(seed + 1, 64), matrix(seed + 2, 64, 8)
    gain[:count] = tiny
    edited = apply(w, behind_norm(orthogonal(q), gain))
    assert torch.isfinite(edited).all()
    assert (q.T @ (gain[:, None] * edited)).abs().max() < 1e-9
    assert edited.norm() < 4 * w.norm()


def test_a_gain_of_one_is_the_orthogonal_edit():
    q, w = orthonormal_basis(matrix(0, 32, 2)), matrix(1, 32, 5)
    edit = behind_norm(orthogonal(q), torch.ones(32))
    assert torch.allclose(apply(w, edit), apply(w, orthogonal(q)), atol=1e-12)


def test_a_gain_that_hides_the_direction_is_refused():
    with pytest.raises(ValueError, match="zero along the direction"):
        behind_norm(orthogonal(torch.eye(8, dtype=torch.float64)[:, :1]), torch.cat([torch.zeros(1), torch.ones(7)]))


# --- rounding ---------------------------------------------------------------------------------------------------------


def rounded_both_ways(d, k, dtype, *, gain=None, seed=3):
    """``(direction left, error of the weights)`` by feedback, each as a multiple of what rounding to nearest gives."""
    basis = orthonormal_basis(matrix(seed, d, k))
    edit = orthogonal(basis) if gain is None else behind_norm(orthogonal(basis), gain)
    edited = apply(matrix(seed + 1, d, 48).float(), edit)
    nearest, ours = edited.to(dtype), round_keeping(edited, dtype, edit)
    left = [torch.linalg.vector_norm(edit.read.T @ rounded.double()) for rounded in (ours, nearest)]
    return float(left[0] / left[1]), relative(ours, edited) / relative(nearest, edited)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("d", [512, 1024, 2880])
def test_rounding_with_feedback_leaves_100_times_less_at_the_same_error(dtype, d):
    left, error = rounded_both_ways(d, 1, dtype)
    assert left < 1 / 100
    assert error < 1 + 28 / d  # 28 rows of d are nudged: 1 % at 2880


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("k", [2, 3])
def test_rounding_with_feedback_serves_several_directions(dtype, k):
    left, error = rounded_both_ways(2880, k, dtype)
    assert left < 1 / 100
    assert error < 1.1


def test_many_directions_do_not_spoil_the_weights():
    errors = [rounded_both_ways(1024, 5, torch.bfloat16, seed=seed)[1] for seed in (3, 13, 23, 33)]
    assert max(errors) < 1.5


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_with_feedback_works_behind_a_gain(dtype):
    left, error = rounded_both_ways(1024, 1, dtype, gain=1 + 0.2 * matrix(5, 1024))
    assert left < 1 / 100
    assert error < 1.02


def sparse(d, *rows):
    r = torch.zeros(d, 1, dtype=torch.float64)
    for position, row in enumerate(rows):
        r[row] = 1.0 + position
    return r


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [(5,), (0, 511), tuple(range(40))], ids=["one-hot", "two", "forty"])
def test_sparse_directions_do_not_blow_up(dtype, rows):
    q = orthonormal_basis(sparse(512, *rows))
    edited = apply(matrix(4, 512, 32).float(), orthogonal(q))
    rounded = round_keeping(edited, dtype, orthogonal(q))
    eps = torch.finfo(dtype).eps
    assert ((rounded.double() - edited.double()).abs() <= 4 * eps * (1 + edited.abs())).all()
    assert (q.T @ rounded.double()).norm() <= 1.01 * (q.T @ edited.to(dtype).double()).norm() + 1e-6


def test_a_one_hot_direction_leaves_an_exact_zero_row():
    q = orthonormal_basis(sparse(64, 9))
    rounded = round_keeping(apply(matrix(4, 64, 8).float(), orthogonal(q)), torch.bfloat16, orthogonal(q))
    assert (rounded[9] == 0).all()


@pytest.mark.parametrize("d", [1, 2, 17])
def test_feedback_works_at_any_width(d):
    edit = orthogonal(orthonormal_basis(matrix(3, d, 1)))
    rounded = round_keeping(apply(matrix(4, d, 6).float(), edit), torch.bfloat16, edit)
    assert rounded.shape == (d, 6)
    assert torch.isfinite(rounded).all()


def test_a_spiky_direction_nudges_only_rows_that_can_carry_it():
    r = torch.full((512, 1), 1e-4, dtype=torch.float64)
    r[3] = 1.0
    read = orthonormal_basis(r)
    assert feedback_rows(read) == [3]


def test_feedback_rows_are_distinct_and_begin_with_the_largest():
    read = orthonormal_basis(matrix(8, 300, 2))
    rows = feedback_rows(read)
    assert len(set(rows)) == len(rows)
    assert rows[0] == int(read.norm(dim=1).argmax())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_apply_keeps_the_dtype_and_the_input(dtype):
    w = matrix(1, 16, 3).to(dtype)
    before = w.clone()
    q = orthonormal_basis(matrix(2, 16, 1))
    assert apply(w, WeightEdit(read=q, write=q)).dtype == dtype
    assert torch.equal(w, before)
