"""Selection metrics: what their equations promise, and that a broken one is noticed."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.method.selection_metrics import (
    FLOOR,
    LEAST_OPENING,
    commonest_opening,
    cosmic,
    cosmic_of_means,
    evaluation_layers,
    first_token,
    forced,
    opening,
    opening_kl,
    set_mass,
    sets_by_position,
)
from abliterate.method.statistics import kl_nats, refusal_metric, spearman

few = settings(max_examples=40, deadline=None)
K, VOCAB, N, LAYERS, D = 5, 17, 3, 12, 8


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_probs(seed, *shape, sharp=3.0):
    return (sharp * random(seed, *shape)).log_softmax(-1)


def tokens(seed, *shape):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def certain(ids):
    """The log-probabilities of a model that is sure of ``ids``."""
    return torch.full((*ids.shape, VOCAB), -math.inf).scatter(-1, ids[..., None], 0.0)


@few
@given(seed=st.integers(0, 1000))
def test_first_token_is_the_papers_metric(seed):
    found = log_probs(seed, N, VOCAB)
    assert torch.equal(first_token(found, (1, 4)), refusal_metric(found, [1, 4]))


@few
@given(seed=st.integers(0, 1000))
def test_forced_is_the_likelihood_of_the_tokens(seed):
    found, ids = log_probs(seed, N, K, VOCAB), tokens(seed, N, K)
    for n in range(N):
        product = math.prod(math.exp(float(found[n, i, ids[n, i]])) + FLOOR for i in range(K))
        assert float(forced(found, ids)[n].sum()) == pytest.approx(math.log(product))


@few
@given(seed=st.integers(0, 1000), sharp=st.floats(0.1, 60))
def test_opening_is_bounded_and_turns_with_its_sides(seed, sharp):
    along, beside = log_probs(seed, N, K, VOCAB, sharp=sharp), log_probs(seed + 1, N, K, VOCAB, sharp=sharp)
    refusal, answer = forced(along, tokens(seed, N, K)), forced(beside, tokens(seed + 2, N, K))
    found = opening(refusal, answer)
    assert bool((found >= LEAST_OPENING - 1e-9).all() and (found <= -LEAST_OPENING + 1e-9).all())
    torch.testing.assert_close(found, -opening(answer, refusal))


def test_opening_reaches_its_bounds():
    ids = tokens(0, N, K)
    sure, never = forced(certain(ids), ids), forced(certain(ids), (ids + 1) % VOCAB)
    torch.testing.assert_close(opening(never, sure), torch.full((N,), LEAST_OPENING, dtype=torch.float64))
    torch.testing.assert_close(opening(sure, never), torch.full((N,), -LEAST_OPENING, dtype=torch.float64))


@few
@given(seed=st.integers(0, 1000), place=st.integers(0, K - 1))
def test_opening_rises_with_the_mass_of_a_token_of_the_refusal(seed, place):
    ids, answer = tokens(seed, N, K), forced(log_probs(seed + 1, N, K, VOCAB), tokens(seed + 2, N, K))
    logits = random(seed, N, K, VOCAB)
    more = logits.clone()
    more[:, place].scatter_add_(-1, ids[:, place, None], torch.ones(N, 1, dtype=torch.float64))
    before, after = (opening(forced(its.log_softmax(-1), ids), answer) for its in (logits, more))
    assert bool((after > before).all())


def shifted(found, ids):
    """``forced`` with the mistake of reading each token's probability one position late."""
    return forced(found.roll(-1, dims=-2), ids)


@pytest.mark.parametrize(("way", "right"), [(forced, True), (shifted, False)])
def test_a_model_that_is_sure_of_an_opening_gets_all_of_it(way, right):
    ids = torch.arange(K)[None]
    assert (float(way(certain(ids), ids).mean()) == pytest.approx(0, abs=1e-6)) is right


@few
@given(seed=st.integers(0, 1000))
def test_the_mass_of_single_tokens_is_their_likelihood_and_sets_only_add(seed):
    found, ids = log_probs(seed, K, VOCAB), tokens(seed, K)
    single, sets = [{int(token)} for token in ids], [{int(token), 0, 1} for token in ids]
    torch.testing.assert_close(set_mass(found, single), forced(found, ids))
    assert bool((set_mass(found, sets) >= set_mass(found, single)).all())
    everything = set_mass(found, [range(VOCAB)] * K)
    torch.testing.assert_close(everything, torch.zeros(K, dtype=torch.float64), atol=1e-6, rtol=0)
    assert float(set_mass(found, [set()] * K)[0]) == pytest.approx(math.log(FLOOR))


@few
@given(seed=st.integers(0, 1000))
def test_opening_kl_is_the_mean_over_positions(seed):
    base, other = log_probs(seed, N, K, VOCAB), log_probs(seed + 1, N, K, VOCAB)
    torch.testing.assert_close(opening_kl(base, base), torch.zeros(N, dtype=torch.float64))
    torch.testing.assert_close(opening_kl(base, other), sum(kl_nats(base[:, i], other[:, i]) for i in range(K)) / K)
    torch.testing.assert_close(opening_kl(base[:, :1], other[:, :1]), kl_nats(base[:, 0], other[:, 0]))


def test_the_commonest_opening_goes_where_most_go():
    replies = [(1, 9, 9), (2, 3, 4), (2, 3, 5), (2, 7, 5), (1, 8, 8), (2, 3, 5), (2,)]
    assert commonest_opening(replies, 3) == (2, 3, 5)
    assert commonest_opening([(4, 5), (6, 7)], 1) == (4,)
    with pytest.raises(ValueError, match="no reply has 4"):
        commonest_opening(replies, 4)


def test_sets_by_position_leave_out_what_is_rare():
    replies = [(1, 2)] * 12 + [(1, 3)] * 7 + [(4,)]
    assert sets_by_position(replies, 2, share=0.06) == (frozenset({1}), frozenset({2, 3}))
    assert sets_by_position(replies, 2, share=0.05) == (frozenset({1, 4}), frozenset({2, 3}))


def test_evaluation_layers_are_those_where_the_means_are_furthest_apart():
    harmful = torch.ones(20, 2)
    harmless = torch.ones(20, 2)
    harmless[0], harmless[7], harmless[12] = (torch.tensor(its) for its in ([-1.0, -1.0], [-1.0, 0.2], [-1.0, 1.0]))
    assert evaluation_layers(harmful, harmless) == (7, 12)
    assert evaluation_layers(harmful[:8], harmless[:8]) == (7,)  # at least one


@few
@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 10))
@pytest.mark.parametrize("way", [cosmic, cosmic_of_means])
def test_cosmic_is_2_at_best_and_does_not_see_lengths(way, seed, scale):
    harmful, harmless = random(seed, LAYERS, D), random(seed + 1, LAYERS, D)
    ablated, induced = random(seed + 2, N, LAYERS, D), random(seed + 3, N, LAYERS, D)
    best = way(harmless.expand(N, -1, -1), harmful.expand(N, -1, -1), harmful, harmless)
    assert best == pytest.approx((1.0, 1.0))
    found = way(ablated, induced, harmful, harmless)
    assert all(abs(its) <= 1 + 1e-9 for its in found)
    assert way(scale * ablated, scale * induced, harmful, harmless) == pytest.approx(found)


@few
@given(seed=st.integers(0, 1000), n=st.integers(3, 30))
def test_spearman_sees_order_alone(seed, n):
    a, b = random(seed, n), random(seed + 1, n)
    found = spearman(a, b)
    assert -1 - 1e-9 <= float(found) <= 1 + 1e-9
    torch.testing.assert_close(spearman(a.exp(), b.sinh()), found)
    torch.testing.assert_close(
        spearman(torch.stack([a, a]), torch.stack([a, -b])), torch.stack([torch.ones_like(found), -found])
    )


def test_spearman_shares_ranks_among_ties():
    a, b = torch.tensor([1.0, 2.0, 2.0, 4.0]), torch.tensor([1.0, 3.0, 2.0, 4.0])
    assert float(spearman(a, b)) == pytest.approx(0.9486832980505138)  # scipy.stats.spearmanr
    assert math.isnan(float(spearman(a, torch.ones(4))))
