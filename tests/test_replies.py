"""Reading replies: refused, complied, or broken."""

import pytest

from abliterate.evaluate.replies import REFUSAL_SUBSTRINGS, classify, holds_answer, is_degenerate, is_refusal, shares


@pytest.mark.parametrize("phrase", REFUSAL_SUBSTRINGS)
def test_every_phrase_is_found_in_any_case_and_place(phrase):
    assert is_refusal(phrase)
    assert is_refusal(f"Well. {phrase.upper()} help with that.")


@pytest.mark.parametrize("quote", ["'", "’", "‘", "ʼ", "`"])
def test_curly_quotes_are_quotes(quote):
    assert is_refusal(f"I{quote}m sorry, but I can{quote}t do that.")


@pytest.mark.parametrize("gap", ["\n", "  ", "\t", "\u00a0"])
def test_any_white_space_is_a_space(gap):
    assert is_refusal(f"I{gap}cannot help")


@pytest.mark.parametrize(
    "reply",
    ["Sure! Here is how.", "A cannot-miss offer", "I can help.", "You can't see it, but I can.", "Unable? Not me.", ""],
)
def test_other_replies_are_not_refusals(reply):
    assert not is_refusal(reply)


@pytest.mark.parametrize(
    "reply",
    [
        "", "   \n", "...", "!!!??",
        "no no no no",
        "the end the end the end the end",
        "I'm sorry sorry sorry sorry sorry",
        "first second third fourth " * 4,
        "fine words until it it it it breaks",
        " ".join(f"w{n % 5} x{n % 3}" for n in range(40)),
    ],
)  # fmt: skip
def test_empty_and_repeating_replies_are_degenerate(reply):
    assert is_degenerate(reply)
    assert classify(reply) == "degenerate"


@pytest.mark.parametrize(
    "reply",
    [
        "Yes.",
        "no no no",
        "one two three one two three one two three",
        "The cat sat on the mat and the dog sat on the rug while the bird sang in the tree near the house by the lake.",
        "1, 2, 3, 4, 5, 6, 7, 8, 9, 10",
    ],
)
def test_plain_replies_are_not_degenerate(reply):
    assert not is_degenerate(reply)
    assert classify(reply) == "complied"


def test_a_refusal_is_a_refusal_and_nothing_else():
    assert classify("I’m sorry, but I cannot help you with this.") == "refused"


def test_every_reply_is_counted_once():
    counted = shares(["Sure.", "I cannot.", "", "na na na na", "Of course: here."])
    assert counted == {"complied": 2, "refused": 1, "degenerate": 2}
    assert sum(counted.values()) == 5
    assert shares([]) == {"complied": 0, "refused": 0, "degenerate": 0}


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("It is Paris.", "paris"),
        ("PARIS", "Paris"),
        ("The answer: forty-two!", "forty two"),
        ("in Saint-Denis,\nsurely", "Saint Denis"),
        ("Zürich liegt am See", "zürich"),
    ],
)
def test_an_answer_is_found_as_words(reply, answer):
    assert holds_answer(reply, answer)


@pytest.mark.parametrize(
    ("reply", "answer"), [("Parisian", "Paris"), ("two forty", "forty two"), ("", "Paris"), ("fortytwo", "forty two")]
)
def test_parts_of_words_and_other_orders_are_no_answer(reply, answer):
    assert not holds_answer(reply, answer)
