"""Rates and distances, against values computed elsewhere."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.method import statistics
from abliterate.method.statistics import (
    LEAST_REFUSAL,
    Rate,
    exact_kl_nats,
    kl_nats,
    least_kl_nats,
    paired_difference,
    refusal_metric,
)

few = settings(max_examples=40, deadline=None)


def log_probs(seed, *shape, sharp=1.0):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (sharp * logits).log_softmax(-1)


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (1, 10, 0.0179, 0.4042),
        (0, 100, 0.0, 0.0370),
        (50, 100, 0.4038, 0.5962),
        (1, 1, 0.2065, 1.0),
    ],
)
def test_wilson_interval(hits, count, low, high):
    """Newcombe 1998, and R's ``prop.test(correct = FALSE)``."""
    assert Rate(hits=hits, count=count).interval == pytest.approx((low, high), abs=1e-4)


@few
@given(st.integers(1, 10**6), st.floats(0, 1))
def test_the_interval_holds_the_rate_and_stays_in_range(count, share):
    rate = Rate(hits=int(count * share), count=count)
    low, high = rate.interval
    assert 0 <= low <= rate.value + 1e-12
    assert rate.value - 1e-12 <= high <= 1
    assert low < high


def test_a_rate_of_nothing_is_nan():
    empty = Rate(hits=0, count=0)
    assert math.isnan(empty.value)
    assert all(math.isnan(bound) for bound in empty.interval)


@few
@given(st.integers(0, 2**32), st.floats(0.1, 30))
def test_exact_kl_is_never_negative(seed, sharp):
    p, q = log_probs(seed, 3, 20, sharp=sharp), log_probs(seed + 1, 3, 20, sharp=sharp)
    assert (exact_kl_nats(p, q) >= -1e-12).all()
    assert exact_kl_nats(p, p).abs().max() < 1e-12


def test_exact_kl_of_a_known_pair():
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    assert float(exact_kl_nats(p, q)) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)


@few
@given(st.integers(0, 2**32), st.floats(0.1, 30))
def test_smoothed_kl_is_the_exact_one_up_to_the_smoothing(seed, sharp):
    p, q = log_probs(seed, 3, 20, sharp=sharp), log_probs(seed + 1, 3, 20, sharp=sharp)
    smoothed = kl_nats(p, q)
    assert (smoothed >= -20 * 1e-6).all()
    assert (smoothed <= exact_kl_nats(p, q) + 20 * 1e-6).all()


@few
@given(st.integers(0, 2**32), st.floats(0.1, 30))
def test_no_distribution_has_a_lower_smoothed_kl_than_the_least(seed, sharp):
    """The one that reaches it, ``q = max(0, p / t - s)``, is found here by bisection."""
    (p,) = log_probs(seed, 1, 20, sharp=sharp)
    least = float(least_kl_nats(p))
    others = log_probs(seed + 1, 50, 20, sharp=sharp)
    near = (p.exp() + 1e-5 * torch.rand(50, 20, dtype=torch.float64)).log().log_softmax(-1)
    for q in (others, near, p[None]):
        assert (kl_nats(p.expand_as(q), q) >= least - 1e-12).all()
    low, high = 1e-9, 10.0
    for _ in range(100):
        t = math.sqrt(low * high)
        q = (p.exp() / t - 1e-6).clamp_min(0)
        low, high = (t, high) if q.sum() > 1 else (low, t)
    assert float(kl_nats(p, q.log())) == pytest.approx(least, abs=1e-9)
    assert least <= 1e-12


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.3, 1.0])
def test_no_refusal_metric_is_below_the_least(p):
    metric = float(refusal_metric(torch.tensor([p, 1 - p], dtype=torch.float64).log(), [0]))
    assert metric >= LEAST_REFUSAL
    assert (metric == LEAST_REFUSAL) == (p == 0.0)


def test_smoothing_bounds_the_kl_of_disjoint_distributions():
    p, q = torch.tensor([0.0, -math.inf]), torch.tensor([-math.inf, 0.0])
    assert float(kl_nats(p, q)) == pytest.approx(-math.log(1e-6), rel=1e-4)


@pytest.mark.parametrize(("p", "expected"), [(0.5, 0.0), (0.9, math.log(9)), (0.1, -math.log(9))])
def test_refusal_metric_is_the_log_odds(p, expected):
    log_p = torch.tensor([[p, 1 - p]], dtype=torch.float64).log()
    assert float(refusal_metric(log_p, [0])) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("p", "sign"), [(1.0, 1), (0.0, -1)])
def test_refusal_metric_is_clipped_at_certainty(p, sign):
    log_p = torch.tensor([p, 1 - p], dtype=torch.float64).log()
    assert float(refusal_metric(log_p, [0])) == pytest.approx(sign * 18.42, abs=0.01)


def test_rounding_above_one_does_not_give_nan():
    """Float32 probabilities of several tokens can sum to more than 1."""
    log_p = torch.tensor([math.log(0.6), math.log(0.4000002), -50.0])
    assert float(refusal_metric(log_p, [0, 1])) == pytest.approx(18.42, abs=0.01)


def test_several_refusal_tokens_add_up():
    log_p = torch.tensor([[0.2, 0.3, 0.5], [0.7, 0.2, 0.1]], dtype=torch.float64).log()
    assert refusal_metric(log_p, [0, 1]).tolist() == pytest.approx([0.0, math.log(9)], abs=1e-6)


def test_a_bootstrap_in_pieces_is_the_bootstrap(monkeypatch):
    before, after = [0.0, 1.0, 1.0, 0.0, 1.0, 0.25, 1.0], [0.0, 1.0, 0.0, 0.0, 0.5, 0.75, 0.0]
    whole = paired_difference(before, after)
    monkeypatch.setattr(statistics, "DRAWN_TOGETHER", 100)
    assert paired_difference(before, after) == whole
    assert whole.low < whole.value < whole.high
