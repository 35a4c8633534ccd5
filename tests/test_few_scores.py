"""The choice from few scores is that of the whole table, whatever stands in it."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.errors import PromptError
from abliterate.method.directions import Candidate, CandidateScore, Subspace
from abliterate.method.few_scores import Pace, Question, Seen, choose_from_few
from abliterate.method.selection import SelectionRule, choose
from abliterate.method.statistics import standard_error

NAN, INF = math.nan, math.inf
LAYERS, PROMPTS = 5, 4
LEAST = {"bypass": -3.0, "kl_nats": -0.25, "induce": -INF}
FIGURES = tuple(LEAST)
ONE = Subspace(vectors=torch.ones(2, 1))


class Written:
    """A table whose scores are known, and how many prompts of it were asked for."""

    def __init__(self, values: Sequence[dict[str, list[float]]], parts: int, least: dict[str, float] = LEAST) -> None:
        self.values, self.step, self.least = values, -(-PROMPTS // parts), least
        self.done = [dict.fromkeys(FIGURES, 0) for _ in values]
        self.rounds = 0

    def seen(self, figure: str, candidate: int) -> Seen:
        its, count = self.values[candidate][figure], self.done[candidate][figure]
        mean = sum(its[:count]) / count if count else NAN
        least = (sum(its[:count]) + (PROMPTS - count) * self.least[figure]) / PROMPTS if count < PROMPTS else mean
        error = standard_error(its) if count == PROMPTS else 0.0
        return Seen(mean=mean, least=least, whole=count == PROMPTS, error=error)

    def ask(self, questions: Sequence[Question]) -> None:
        assert questions
        self.rounds += 1
        for figure, candidate in questions:
            assert self.done[candidate][figure] < PROMPTS
            self.done[candidate][figure] = min(PROMPTS, self.done[candidate][figure] + self.step)

    @property
    def asked(self) -> int:
        return sum(sum(its.values()) for its in self.done)

    def scores(self, candidates: Sequence[Candidate]) -> list[CandidateScore]:
        return [
            CandidateScore(
                candidate=one.id, layer=one.layer, position=one.position,
                **{figure: sum(its[figure]) / PROMPTS for figure in FIGURES},
                kl_error_nats=standard_error(its["kl_nats"]),
            )
            for one, its in zip(candidates, self.values, strict=True)
        ]  # fmt: skip


def candidate(n: int, layer: int, position: int | None) -> Candidate:
    at = {} if position is None else {"position": position}
    return Candidate(id=f"x/{n}", subspace=ONE, layer=layer, provenance={"estimator": "x", **at})


CHOICES = {
    "bypass": (-3.0, -3.0, -2.0, -1.75, 0.0, 2.0),
    "kl_nats": (-0.25, 0.0, 0.25, 0.5, 1.0, 3.0, INF),
    "induce": (-2.0, -0.25, 0.0, 1.0),
}
"""Quarters, whose sums are exact; few of them, so that there are ties."""


def drawn(seed: int, count: int) -> list[tuple[dict[str, list[float]], int, int | None]]:
    """Values of candidates with layer and position: often the same on all prompts, now and then NaN on one."""
    draw = random.Random(seed)

    def values(figure: str) -> list[float]:
        some = CHOICES[figure] if draw.random() < 0.2 else CHOICES[figure][:-1]
        made = [draw.choice(some)] * PROMPTS if draw.random() < 0.4 else draw.choices(some, k=PROMPTS)
        return [NAN if draw.random() < 0.01 else value for value in made]

    return [
        ({figure: values(figure) for figure in FIGURES}, draw.randrange(LAYERS), draw.choice([None, -2, -1]))
        for _ in range(count)
    ]


TABLES = st.builds(drawn, st.integers(0, 2**32), st.integers(1, 14))
RULES = st.builds(
    SelectionRule,
    max_kl_nats=st.sampled_from([0.25, 0.5, 1.0, INF]),
    kl_margin=st.sampled_from([0.0, 0.5, 1.0, 4.0]),
    min_induce=st.sampled_from([-INF, -0.25, 0.0, 0.75, 1.0, 5.0]),
    prune_layers=st.sampled_from([0.0, 0.2, 0.2, 0.6, 0.99]),
)
PACES = st.builds(Pace, first=st.integers(1, 4), together=st.booleans())


def both(rows, rule, pace, parts, **options):
    """What few scores give and what all give: a choice, or None where there is nothing usable."""
    candidates = [candidate(n, layer, position) for n, (_, layer, position) in enumerate(rows)]
    table, found = Written([values for values, *_ in rows], parts, **options), []
    for choosing in (
        lambda: choose_from_few(candidates, table, LAYERS, rule, pace),
        lambda: choose(table.scores(candidates), LAYERS, rule),
    ):
        try:
            found.append(choosing())
        except PromptError as error:
            found.append((error.args, ()))
    return table, *found


@settings(max_examples=600, deadline=None)
@given(TABLES, RULES, PACES, st.sampled_from([1, 2, 4]))
def test_the_choice_is_that_of_the_whole_table(rows, rule, pace, parts):
    _, (few, judged), (all_of_them, expected) = both(rows, rule, pace, parts)
    assert few == all_of_them
    known = {one.candidate: one for one in expected}
    assert len(judged) == (len(known) if known else 0)
    for ours in judged:
        its = known[ours.candidate]
        for figure in FIGURES:
            value = getattr(ours, figure)
            if figure == "kl_nats" and ours.kl_stopped:
                assert rule.max_kl_nats < value
                assert not value > its.kl_nats
            elif not math.isnan(value):
                assert value == getattr(its, figure)
        if ours.verdict != its.verdict:
            assert ours.verdict in ("late layer", "kl", "kl margin", "not asked", "induce")
            assert (
                its.verdict == "nan"
                or ours.verdict == "not asked"
                or (ours.verdict == "induce" and its.verdict in ("kl", "kl margin"))
            )
    if judged and few.rule == "arditi-2024":
        assert judged[0].candidate == few.candidate


def flat(layer=0, position=-1, **values):
    return {"bypass": [-1.0] * 4, "kl_nats": [0.0] * 4, "induce": [1.0] * 4} | values, layer, position


RULE = SelectionRule(max_kl_nats=0.5)


def test_of_the_others_only_their_first_part_is_asked():
    """One is kept at once; the others are behind it after one prompt, or lie too late."""
    rows = [flat(bypass=[-3.0] * 4), *[flat(bypass=[9.5] * 4)] * 5, flat(layer=4)]
    table, (choice, judged), expected = both(rows, RULE, Pace(first=1), 4)
    assert choice == expected[0]
    assert table.asked == 3 * PROMPTS + 5
    assert [one.verdict for one in judged] == ["kept", *["not asked"] * 5, "late layer"]
    assert all(math.isnan(one.bypass) for one in judged[1:])


def test_a_kl_is_stopped_at_the_bound():
    rows = [flat(bypass=[-3.0] * 4, kl_nats=[3.0, 0.0, 0.0, 0.0]), flat()]
    table, (choice, judged), _ = both(rows, RULE, Pace(first=1), 4)
    assert choice.candidate == "x/1"
    assert [table.done[0][figure] for figure in FIGURES] == [4, 1, 0]
    stopped = next(one for one in judged if one.candidate == "x/0")
    assert (stopped.verdict, stopped.kl_stopped, stopped.kl_nats) == ("kl", True, (3.0 - 3 * 0.25) / 4)


def test_a_partial_sum_that_later_prompts_may_lower_is_no_reason():
    rows = [flat(bypass=[-3.0] * 4, kl_nats=[2.5, -0.25, -0.25, -0.25]), flat()]
    _, (choice, _), (expected, _) = both(rows, SelectionRule(max_kl_nats=0.4375), Pace(first=1), 4)
    assert choice == expected
    assert choice.candidate == "x/0"


def test_with_a_bound_that_is_none_the_choice_is_another():
    """That the terms of a smoothed KL may be negative matters, and so does what a bypass score may still become."""
    rows = [flat(bypass=[-3.0] * 4, kl_nats=[2.5, -0.25, -0.25, -0.25]), flat()]
    wrong = LEAST | {"kl_nats": 0.0}
    _, (choice, _), (expected, _) = both(rows, SelectionRule(max_kl_nats=0.4375), Pace(first=1), 4, least=wrong)
    assert choice != expected
    rows = [flat(bypass=[0.0, -3.0, -3.0, -3.0]), flat(bypass=[-1.0] * 4)]
    wrong = LEAST | {"bypass": 0.0}
    _, (choice, _), (expected, _) = both(rows, RULE, Pace(first=1), 4, least=wrong)
    assert choice != expected
    _, (choice, _), _ = both(rows, RULE, Pace(first=1), 4)
    assert choice == expected


def test_in_another_order_the_choice_is_another(monkeypatch):
    """Two tie in bypass: the order of places decides, here as there."""
    rows = [flat(layer=2), flat(layer=1, position=-2), flat(layer=1)]
    _, (choice, _), (expected, _) = both(rows, RULE, Pace(first=1), 1)
    assert choice == expected
    assert choice.candidate == "x/2"
    monkeypatch.setattr(
        "abliterate.method.few_scores.place_order", lambda layer, position, name: (-layer, False, 0, name)
    )
    _, (choice, _), _ = both(rows, RULE, Pace(first=1), 1)
    assert choice != expected


def test_what_may_still_tie_is_not_out():
    rows = [flat(layer=1, bypass=[-2.0] * 4), flat(layer=0, bypass=[1.0, -3.0, -3.0, -3.0])]
    _, (choice, _), (expected, _) = both(rows, RULE, Pace(first=1), 4)
    assert choice == expected
    assert choice.candidate == "x/1"


def test_induce_is_asked_of_the_best_alone():
    rows = [flat(bypass=[float(n)] * 4) for n in range(4)]
    table, (choice, _), _ = both(rows, RULE, Pace(first=4), 1)
    assert choice.candidate == "x/0"
    assert [its["induce"] for its in table.done] == [4, 0, 0, 0]


def test_where_nothing_is_kept_and_some_induce_the_front_is_enough():
    """The last is dominated: its KL is stopped at that of the second, and its induce is never asked."""
    rows = [
        flat(bypass=[-3.0] * 4, kl_nats=[3.0] * 4),
        flat(bypass=[-2.0] * 4, kl_nats=[1.0] * 4),
        flat(bypass=[-1.75] * 4, kl_nats=[2.0] * 4),
        flat(bypass=[0.0] * 4, kl_nats=[3.0] * 4),
    ]
    table, (choice, judged), (expected, _) = both(rows, RULE, Pace(first=1), 4)
    assert choice == expected
    assert choice.rule == "pareto-fallback"
    assert [its["induce"] for its in table.done] == [4, 4, 4, 0]
    assert table.done[3]["kl_nats"] < PROMPTS
    assert {one.verdict for one in judged} == {"kl"}


@pytest.mark.parametrize("parts", [1, 4])
def test_what_does_not_induce_takes_nothing_off_the_front(parts):
    """The second dominates the last two, and is not on the front itself."""
    rows = [
        flat(bypass=[-3.0] * 4, kl_nats=[3.0] * 4),
        flat(bypass=[-2.5] * 4, kl_nats=[0.75] * 4, induce=[-1.0] * 4),
        flat(bypass=[-2.25] * 4, kl_nats=[3.0] * 4),
        flat(bypass=[-2.0] * 4, kl_nats=[1.5] * 4),
        flat(bypass=[0.0] * 4, kl_nats=[1.25] * 4),
    ]
    _, (choice, _), (expected, _) = both(rows, RULE, Pace(first=1), parts)
    assert choice == expected
    assert choice.candidate == "x/3"


def test_induce_is_asked_first_where_most_fail_it():
    """After the first one: their KL is not asked, but for the one that induces."""
    rows = [flat(bypass=[float(n)] * 4, induce=[-1.0 if n < 5 else 1.0] * 4) for n in range(7)]
    table, (choice, judged), (expected, _) = both(rows, RULE, Pace(first=1), 1)
    assert choice == expected
    assert choice.candidate == "x/5"
    assert [its["kl_nats"] for its in table.done] == [4, 0, 0, 0, 0, 4, 4]
    assert [one.verdict for one in judged] == ["kept", "kept", *["induce"] * 5]


def test_where_none_induces_the_front_of_all_is_taken():
    rows = [flat(bypass=[-3.0] * 4, kl_nats=[3.0] * 4), flat(kl_nats=[1.0] * 4), *[flat(kl_nats=[3.0] * 4)] * 2]
    rows = [({**values, "induce": [-1.0] * 4}, layer, position) for values, layer, position in rows]
    table, (choice, _), (expected, _) = both(rows, RULE, Pace(first=1), 4)
    assert choice == expected
    assert table.done[3]["kl_nats"] < PROMPTS


def test_where_none_induces_the_first_within_the_bound_on_kl_is_taken():
    """The first is too far off, which a part of its prompts says; of the others no more than bypass is needed."""
    rows = [flat(bypass=[-3.0] * 4, kl_nats=[3.0] * 4), *[flat(bypass=[n / 4 - 2] * 4) for n in range(5)]]
    rows = [({**values, "induce": [-1.0] * 4}, layer, position) for values, layer, position in rows]
    table, (choice, judged), (expected, _) = both(rows, RULE, Pace(first=1), 4)
    assert choice == expected
    assert (choice.candidate, choice.rule) == ("x/1", "without-induce")
    assert table.done[0]["kl_nats"] < PROMPTS
    assert "kept" not in {one.verdict for one in judged}


def test_where_rounds_are_dear_there_are_few():
    rows = [flat(bypass=[n / 4] * 4, kl_nats=[3.0 if n < 7 else 0.0] * 4) for n in range(40)]
    table, (choice, _), (expected, _) = both(rows, RULE, Pace(first=8, together=True), 1)
    assert choice == expected
    assert table.rounds == 2


@pytest.mark.parametrize("rows", [[flat(bypass=[NAN] * 4)], [flat(layer=4)], [flat(induce=[NAN] * 4)]], ids=repr)
def test_nothing_usable_is_an_error(rows):
    candidates = [candidate(n, layer, position) for n, (_, layer, position) in enumerate(rows)]
    with pytest.raises(PromptError, match="no candidate direction"):
        choose_from_few(candidates, Written([values for values, *_ in rows], 2), LAYERS, RULE)


def test_what_is_known_already_is_not_asked_again():
    rows = [flat(bypass=[float(n)] * 4) for n in range(4)]
    candidates = [candidate(n, layer, position) for n, (_, layer, position) in enumerate(rows)]
    table = Written([values for values, *_ in rows], 4)
    first = choose_from_few(candidates, table, LAYERS, RULE)
    rounds = table.rounds
    assert choose_from_few(candidates, table, LAYERS, RULE) == first
    assert table.rounds == rounds
    assert replace(first[1][0], verdict="") == replace(table.scores(candidates)[0], verdict="")
