"""The paper's rule, at each of its boundaries."""

import math
import random

import pytest
import torch

from abliterate.errors import PromptError
from abliterate.method.directions import CandidateScore
from abliterate.method.selection import WHY, SelectionRule, choose, judge, pareto_front, pareto_knee
from abliterate.method.statistics import standard_error

NAN = float("nan")
RULE = SelectionRule()


def score(position=-1, layer=3, bypass=-2.0, induce=1.0, kl_nats=0.05, **more):
    candidate = f"difference-of-means/{position}/{layer}"
    return CandidateScore(
        candidate=candidate, position=position, layer=layer, bypass=bypass, induce=induce, kl_nats=kl_nats, **more
    )


def verdict(n_layers=10, rule=RULE, **values):
    return judge(score(**values), n_layers, rule).verdict


@pytest.mark.parametrize("name", ["bypass", "induce", "kl_nats"])
def test_a_nan_score_is_discarded(name):
    assert verdict(**{name: NAN}) == "nan"


@pytest.mark.parametrize(
    ("n_layers", "first_late"),
    [(5, 4), (10, 8), (12, 9), (16, 12), (18, 14), (24, 19), (28, 22), (32, 25), (36, 28), (40, 32), (64, 51)],
)  # fmt: skip
def test_the_last_fifth_of_the_layers_is_pruned(n_layers, first_late):
    """``layer >= int(0.8 L)``, as in the paper's code."""
    assert first_late == int(n_layers * 8) // 10
    assert verdict(n_layers, layer=first_late - 1) == "kept"
    assert verdict(n_layers, layer=first_late) == "late layer"


@pytest.mark.parametrize(("share", "first_late"), [(0.9, 1), (0.7, 3), (0.5, 5), (0.1, 9)])
def test_any_share_of_the_layers_can_be_pruned(share, first_late):
    """1 - 0.9 is a little less than 0.1 in floating point."""
    rule = SelectionRule(prune_layers=share)
    assert [verdict(10, rule, layer=layer) for layer in (first_late - 1, first_late)] == ["kept", "late layer"]


def test_pruning_can_be_switched_off():
    assert verdict(10, SelectionRule(prune_layers=0.0), layer=9) == "kept"


@pytest.mark.parametrize(("kl", "expected"), [(0.1, "kept"), (math.nextafter(0.1, 1), "kl"), (0.0, "kept")])
def test_kl_is_bounded_from_above(kl, expected):
    assert verdict(kl_nats=kl) == expected


@pytest.mark.parametrize(("induce", "expected"), [(0.0, "kept"), (math.nextafter(0.0, -1), "induce"), (9.0, "kept")])
def test_induce_is_bounded_from_below(induce, expected):
    assert verdict(induce=induce) == expected


def test_infinite_thresholds_switch_rules_off():
    free = SelectionRule(max_kl_nats=math.inf, min_induce=-math.inf, prune_layers=0.0)
    assert verdict(10, free, layer=9, kl_nats=50.0, induce=-50.0) == "kept"


def test_the_lowest_bypass_among_survivors_wins():
    scores = [
        score(layer=1, bypass=-3.0),
        score(layer=2, bypass=-9.0, kl_nats=0.2),
        score(layer=9, bypass=-8.0),
        score(layer=4, bypass=-7.0, induce=-1.0),
        score(layer=5, bypass=NAN),
        score(layer=6, bypass=-2.0),
    ]
    choice, judged = choose(scores, 10, RULE)
    assert (choice.layer, choice.rule) == (1, "arditi-2024")
    assert [s.layer for s in judged[:2]] == [1, 6]
    assert {s.layer: s.verdict for s in judged} == {
        1: "kept", 2: "kl", 9: "late layer", 4: "induce", 5: "nan", 6: "kept",
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_scores_does_not_matter(seed):
    scores = [
        score(position, layer, bypass=b, kl_nats=k)
        for position in (-2, -1)
        for layer, b, k in ((1, -1.0, 0.01), (2, -1.0, 0.2), (3, NAN, 0.1), (9, -5.0, 0.1))
    ]
    expected = choose(scores, 10, RULE)
    random.Random(seed).shuffle(scores)
    choice, judged = choose(scores, 10, RULE)
    assert choice == expected[0]
    assert [(s.position, s.layer, s.verdict) for s in judged] == [(s.position, s.layer, s.verdict) for s in expected[1]]


def test_ties_fall_to_the_earlier_layer_then_the_later_position():
    choice, _ = choose([score(-1, 4), score(-3, 2), score(-2, 2), score(-2, 3)], 10, RULE)
    assert (choice.position, choice.layer) == (-2, 2)


def test_candidates_of_any_estimator_compete():
    others = [
        CandidateScore(candidate=f"clusters/{n}", layer=3, bypass=b, induce=1.0, kl_nats=0.05)
        for n, b in ((0, -2.0), (1, -4.0), (2, -4.0))
    ]
    choice, judged = choose([score(layer=3), *reversed(others)], 10, RULE)
    assert (choice.candidate, choice.position, choice.layer) == ("clusters/1", None, 3)
    assert [one.candidate for one in judged] == [
        "clusters/1", "clusters/2", "difference-of-means/-1/3", "clusters/0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "scores", [[], [score(bypass=NAN)], [score(layer=9)], [score(kl_nats=NAN), score(layer=8)]], ids=repr
)
def test_nothing_usable_is_an_error(scores):
    with pytest.raises(PromptError, match="no candidate direction"):
        choose(scores, 10, RULE)


# --- when nothing survives --------------------------------------------------------------------------------------------


def test_the_knee_of_the_front_is_taken_when_nothing_survives():
    scores = [
        score(layer=1, bypass=-10.0, kl_nats=5.0),
        score(layer=2, bypass=-9.0, kl_nats=0.5),
        score(layer=3, bypass=0.0, kl_nats=0.4),
        score(layer=4, bypass=-8.0, kl_nats=0.6),  # beaten by layer 2 in both
    ]
    choice, judged = choose(scores, 10, RULE)
    assert (choice.layer, choice.rule) == (2, "pareto-fallback")
    assert all(s.verdict == "kl" for s in judged)


def test_the_fallback_prefers_candidates_that_induce():
    scores = [score(layer=1, kl_nats=0.5, bypass=-99.0, induce=-1.0), score(layer=2, kl_nats=3.0, bypass=-1.0)]
    assert choose(scores, 10, RULE)[0].layer == 2


def test_where_none_induces_the_lowest_bypass_within_the_bound_on_kl_is_taken():
    scores = [
        score(layer=1, bypass=-9.0, induce=-1.0, kl_nats=0.2),
        score(layer=2, bypass=-5.0, induce=-1.0),
        score(layer=3, bypass=-7.0, induce=-3.0),
        score(layer=4, bypass=-8.0, induce=NAN),
        score(layer=9, bypass=-8.0, induce=-1.0),
    ]
    choice, _ = choose(scores, 10, RULE)
    assert (choice.layer, choice.rule) == (3, "without-induce")
    assert {"without-induce", "without-margin", "pareto-fallback"} == WHY.keys()


def test_a_kl_stays_below_the_bound_by_its_margin():
    """Of a mean of 0.08 one does not know that it is below 0.1 where its standard error is 0.03."""
    rule = SelectionRule(kl_margin=1.0)
    unsure = score(layer=1, bypass=-9.0, kl_nats=0.08, kl_error_nats=0.03)
    sure = score(layer=2, bypass=-5.0, kl_nats=0.08, kl_error_nats=0.01)
    choice, judged = choose([unsure, sure], 10, rule)
    assert (choice.layer, choice.rule) == (2, "arditi-2024")
    assert [one.verdict for one in judged] == ["kept", "kl margin"]
    assert choose([unsure, sure], 10, SelectionRule())[0].layer == 1
    over = score(layer=3, bypass=-10.0, kl_nats=0.2)
    choice, judged = choose([over, unsure], 10, rule)
    assert (choice.layer, choice.rule) == (1, "without-margin")
    assert {one.layer: one.verdict for one in judged} == {1: "kl margin", 3: "kl"}
    few, _ = choose([unsure, score(layer=4, induce=-1.0)], 10, rule)
    assert (few.layer, few.rule) == (4, "without-induce")


@pytest.mark.parametrize("values", [[], [3.0], [math.inf, 1.0], [NAN, 1.0, 2.0]], ids=repr)
def test_where_it_cannot_be_told_a_standard_error_is_zero(values):
    assert standard_error(values) == 0


def test_the_standard_error_is_that_of_a_mean():
    values = torch.tensor([0.1, 0.4, 0.0, 2.0], dtype=torch.float64)
    assert standard_error(values.tolist()) == pytest.approx(float(values.std() / 2), rel=1e-14)


def test_the_fallback_takes_what_does_not_induce_rather_than_nothing():
    choice, _ = choose([score(layer=2, induce=-1.0, kl_nats=1.0)], 10, RULE)
    assert (choice.layer, choice.rule) == (2, "pareto-fallback")


def test_the_front_holds_what_nothing_beats_in_both():
    pairs = [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0), (2.0, 5.0), (3.0, 2.0)]
    scores = [score(layer=n, bypass=b, kl_nats=k) for n, (b, k) in enumerate(pairs)]
    assert [(s.bypass, s.kl_nats) for s in pareto_front(scores)] == [(1, 3), (2, 2), (3, 1)]


def test_a_front_of_one_is_its_own_knee():
    only = score(layer=7, kl_nats=1.0)
    assert pareto_knee([only]) is only
