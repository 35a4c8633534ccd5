"""Running means: the same whatever the batches, and exact where float32 would lose digits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.method.moments import RunningCovariance, RunningMoments

few = settings(max_examples=30, deadline=None)


def observations(seed, n):
    return torch.randn(n, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean_of(*batches):
    moments = RunningMoments((2, 3))
    for batch in batches:
        moments.update(batch)
    return moments.finish()


@few
@given(st.integers(0, 2**32), st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any))
def test_batches_do_not_matter(seed, sizes):
    everything = observations(seed, sum(sizes))
    result = mean_of(*everything.split(sizes))
    assert result.count == sum(sizes)
    assert torch.allclose(result.mean, everything.mean(0), atol=1e-14)


@few
@given(st.integers(0, 2**32), st.integers(0, 4), st.integers(1, 4))
def test_merging_is_one_pass(seed, first, second):
    everything = observations(seed, first + second)
    a, b = RunningMoments((2, 3)), RunningMoments((2, 3))
    a.update(everything[:first])
    b.update(everything[first:])
    a.merge(b)
    assert a.count == first + second
    assert torch.allclose(a.finish().mean, everything.mean(0), atol=1e-14)


def test_the_mean_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="mean of nothing"):
        RunningMoments((2, 3)).finish()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_kept_in_float64(dtype):
    """A thousand times 1 + 2^-7: a float16 or bfloat16 sum would be off by far more than the small part."""
    value = torch.full((1000, 2, 3), 1 + 2.0**-7, dtype=dtype)
    assert torch.equal(mean_of(value).mean, torch.full((2, 3), 1 + 2.0**-7, dtype=torch.float64))


def test_updating_does_not_keep_the_graph():
    batch = torch.ones(2, 2, 3, requires_grad=True)
    assert not mean_of(batch).mean.requires_grad


def test_a_finished_mean_does_not_change_any_more():
    moments = RunningMoments((1,))
    moments.update(torch.tensor([[1.0]]))
    first = moments.finish()
    moments.update(torch.tensor([[3.0]]))
    assert (first.count, float(first.mean)) == (1, 1.0)


# --- covariance -------------------------------------------------------------------------------------------------------


def covariance_of(*batches):
    running = RunningCovariance((2, 3))
    for batch in batches:
        running.update(batch)
    return running.finish()


@few
@given(st.integers(0, 2**32), st.lists(st.integers(0, 5), min_size=2, max_size=6).filter(lambda s: sum(s) > 1))
def test_covariance_is_that_of_all_at_once(seed, sizes):
    everything = observations(seed, sum(sizes))
    found = covariance_of(*everything.split(sizes))
    assert found.count == sum(sizes)
    assert torch.allclose(found.mean, everything.mean(0), atol=1e-13)
    for place in range(2):
        assert torch.allclose(found.covariance[place], everything[:, place].T.cov(), atol=1e-12)


@few
@given(st.integers(0, 2**32), st.integers(0, 4), st.integers(2, 4))
def test_merging_covariances_is_one_pass(seed, first, second):
    everything = observations(seed, first + second)
    a, b = RunningCovariance((2, 3)), RunningCovariance((2, 3))
    a.update(everything[:first])
    b.update(everything[first:])
    a.merge(b)
    assert torch.allclose(a.finish().covariance, covariance_of(everything).covariance, atol=1e-12)


def test_a_large_mean_costs_no_digits():
    """Sums of squares would lose them all: 1e9 squared has no room for a variance of 1."""
    everything = observations(0, 50)
    moved = covariance_of(*(everything + 1e9).split(7)).covariance
    assert torch.allclose(moved, covariance_of(everything).covariance, atol=1e-6)
    naive = ((everything + 1e9) ** 2).mean(0) - (everything + 1e9).mean(0) ** 2
    assert not torch.allclose(naive, everything.var(0, unbiased=False), atol=1e-1)


def test_the_covariance_of_one_is_an_error():
    with pytest.raises(ValueError, match="fewer than two"):
        covariance_of(observations(0, 1))
