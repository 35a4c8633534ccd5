"""Both scorers on replies written for this test, and how two readings are compared.

The rules were written on the development half.  The held-out half was written after them, and they were not changed in
its light (changes since, for the wording of the bundled model's refusals, alter no result on it).  A first held-out
half was used up before: the rules found 21 of its 36 refusals, and it has joined the development half.
"""

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from abliterate.evaluate.agreement import confusion, precision, recall
from abliterate.evaluate.replies import CLASSES, SCORERS

DATA = Path(__file__).parent / "data"
HALVES = {
    half: [json.loads(line) for line in (DATA / f"replies.{half}.jsonl").read_text("utf-8").splitlines()]
    for half in ("dev", "held_out")
}


def read(half, scorer):
    labels = [row["label"] for row in HALVES[half]]
    return labels, [SCORERS[scorer].classify("", row["reply"]) for row in HALVES[half]]


# --- the labelled replies ---------------------------------------------------------------------------------------------


def test_there_are_enough_replies_of_every_class_and_none_twice():
    replies = [row["reply"].strip() for rows in HALVES.values() for row in rows]
    assert len(replies) >= 230
    counts = Counter(reply for reply in replies if reply)
    assert max(counts.values()) == 1
    for rows in HALVES.values():
        classes = Counter(row["label"] for row in rows)
        assert set(classes) == set(CLASSES)
        classes["empty"] += classes.pop("unfinished")
        assert min(classes.values()) >= 4


# --- how good the scorers are -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("half", "scorer", "bars"),
    [
        ("dev", "rules", (0.97, 0.97)),
        ("held_out", "rules", (0.90, 0.74)),
        ("dev", "substrings", (0.0, 0.0)),  # for comparison
        ("held_out", "substrings", (0.0, 0.0)),
    ],
)
def test_refusals_are_found(half, scorer, bars):
    """Early and late refusals together: what an evaluation counts as refused."""
    labels, found = read(half, scorer)
    exact, complete = precision(labels, found), recall(labels, found)
    print(f"\n{scorer} on {half}: precision {exact.value:.3f} {exact.hits}/{exact.count}, ", end="")
    print(f"recall {complete.value:.3f} {complete.hits}/{complete.count}")
    assert exact.value >= bars[0]
    assert complete.value >= bars[1]


@pytest.mark.parametrize("half", HALVES)
def test_every_class_is_told_apart(half):
    labels, found = read(half, "rules")
    for line in confusion(labels, found, rows="label", columns="rules").table():
        print("".join(f"{cell:>16}" for cell in line))
    for name, bars in {"delayed": (0.95, 0.9), "degenerate": (0.99, 0.9), "empty": (0.99, 0.99)}.items():
        assert precision(labels, found, {name}).value >= bars[0], name
        assert recall(labels, found, {name}).value >= bars[1], name


@pytest.mark.parametrize("half", HALVES)
def test_the_rules_are_better_than_the_substrings(half):
    rules, paper = (read(half, scorer) for scorer in ("rules", "substrings"))
    assert precision(*rules).value > precision(*paper).value + 0.2
    assert recall(*rules).value > recall(*paper).value + 0.1


def test_the_substrings_take_broken_and_empty_replies_for_compliance():
    labels, found = read("held_out", "substrings")
    lost = [name for label, name in zip(labels, found, strict=True) if label in ("degenerate", "empty", "unfinished")]
    assert Counter(lost)["complied"] >= len(lost) - 1


# --- comparing two readings -------------------------------------------------------------------------------------------

ONE = ["refused", "refused", "complied", "empty"]
OTHER = ["refused", "complied", "complied", "complied"]


def test_a_confusion_table_counts_pairs():
    made = confusion(ONE, OTHER, rows="rules", columns="substrings")
    assert made.counts == {
        ("refused", "refused"): 1, ("refused", "complied"): 1, ("complied", "complied"): 1, ("empty", "complied"): 1,
    }  # fmt: skip
    assert (made.agreement.hits, made.agreement.count) == (2, 4)
    assert made.table() == [
        ["rules \\ substrings", "refused", "complied", "empty"],
        ["refused", "1", "1", "0"],
        ["complied", "0", "1", "0"],
        ["empty", "0", "1", "0"],
    ]


def test_kappa_is_agreement_beyond_chance():
    assert confusion(ONE, ONE).kappa == pytest.approx(1)
    assert confusion(ONE, OTHER).kappa == pytest.approx((0.5 - 5 / 16) / (1 - 5 / 16))
    assert confusion(["refused", "complied"], ["complied", "refused"]).kappa == pytest.approx(-1)
    assert math.isnan(confusion(["empty"], ["empty"]).kappa)
    assert math.isnan(confusion([], []).kappa)


def test_readings_of_different_replies_are_not_compared():
    with pytest.raises(ValueError, match="shorter"):
        confusion(ONE, OTHER[:2])


def test_precision_and_recall():
    labels = ["refused", "delayed", "complied", "complied"]
    found = ["refused", "complied", "delayed", "complied"]
    assert (precision(labels, found).hits, precision(labels, found).count) == (1, 2)
    assert (recall(labels, found).hits, recall(labels, found).count) == (1, 2)
    assert recall(labels, found, {"delayed"}).value == 0
    assert math.isnan(precision(labels, ["complied"] * 4).value)
