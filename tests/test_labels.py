"""Which prompts count is read from replies, in one pass that measures them as well."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.errors import PromptError, TooFewPromptsError
from abliterate.evaluate.labels import counts_of, first_token_metric, reader
from abliterate.evaluate.replies import RULES, classify
from abliterate.events import Noted, Started
from abliterate.method.calibration import Calibration, calibrate
from abliterate.method.statistics import refusal_metric
from abliterate.model.forward import last_log_probs
from abliterate.model.labelling import LABELS, MISSING, Measured, Replies, label
from abliterate.model.measuring import Filtered, measure_class
from abliterate.model.replying import generate
from abliterate.recipe import Recipe
from abliterate.workflow import finding, pipeline, reading
from abliterate.workflow.session import open_session
from abliterate.workflow.steps import Steps

SOURCE = "bundled:tiny-chat"
RECIPE = Recipe(harmful=SOURCE, harmless=SOURCE, n_train=20, n_val=6, n_test=4, reply_tokens=12)
fewer = settings(max_examples=60, deadline=None)
METRICS = st.lists(st.floats(-18, 18) | st.sampled_from([0.0, 1.0]), max_size=12)


def test_where_nothing_is_filtered_all_prompts_count():
    session = open_session(None, RECIPE.with_changes({"filter_prompts": False, "refusal_tokens": ("I",)}))
    found = reading.read_validation(session, [5], Steps())
    assert found.harmful == tuple(session.contrast.harmful_val.texts)
    assert found.harmless == tuple(session.contrast.harmless_val.texts)
    assert (found.harmful_before, found.harmless_before) == (len(found.harmful), len(found.harmless))


# --- the first token held against replies -----------------------------------------------------------------------------


@fewer
@given(METRICS, METRICS)
def test_the_area_is_the_share_of_pairs_in_order(refused, answered):
    found = calibrate(refused, answered)
    assert (found.refused, found.answered) == (len(refused), len(answered))
    if not refused or not answered:
        assert math.isnan(found.auc)
        assert found.threshold == 0
        return
    pairs = [(a > b) + (a == b) / 2 for a in refused for b in answered]
    assert found.auc == pytest.approx(sum(pairs) / len(pairs))


@fewer
@given(METRICS, METRICS)
def test_no_threshold_tells_more_of_both_classes_right(refused, answered):
    if not refused or not answered:
        return

    def right(cut):
        return sum(a > cut for a in refused) / len(refused) + sum(b <= cut for b in answered) / len(answered)

    best = max(right(cut) for cut in (-99, *refused, *answered))
    assert right(calibrate(refused, answered).threshold) == pytest.approx(best)


def test_the_threshold_lies_in_the_middle_of_the_gap():
    assert calibrate([2.0, 5.0], [-4.0, -9.0]) == Calibration(auc=1.0, threshold=-1.0, refused=2, answered=2)
    assert calibrate([-3.0, -2.0], [-9.0]).threshold == -6.0  # far below the paper's line
    assert calibrate([1.0, math.nan], [-1.0]).refused == 1


@pytest.mark.parametrize("found", [calibrate([1.0], [0.0]), calibrate([], [0.0])])
def test_a_calibration_as_plain_data(found):
    again = Calibration.of(found.to_json())
    assert again.to_json() == found.to_json()
    assert (again.threshold, again.refused) == (found.threshold, found.refused)


# --- the pass ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session():
    return open_session(None, RECIPE)


@pytest.fixture(scope="module")
def prompts(session):
    harmful, harmless = session.contrast.harmful_train.texts, session.contrast.harmless_train.texts
    return {"mixed": (*harmful[:7], *harmless[:6]), "harmless": tuple(harmless[6:14])}


def labelled(session, prompts, measured=None, read=None, **options):
    return label(
        session.loaded, session.chat, prompts, read or reader(RULES, session.chat), measured or {},
        **{"max_new_tokens": 12, "batch_size": 5, "task": "label", **options},
    )  # fmt: skip


def test_replies_and_labels_are_those_of_a_pass_for_each(session, prompts):
    found = labelled(session, prompts)
    for group, texts in prompts.items():
        its = Replies.of(found[group])
        replies = generate(session.loaded, session.chat, texts, max_new_tokens=12, batch_size=3)
        words = [[int(token) for token in row if token != MISSING] for row in its.tokens]
        assert [session.chat.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in words] == replies
        expected = [classify(*turn) for turn in zip(texts, replies, strict=True)]
        assert list(its.labels) == [{"complied": "answered"}.get(one, one) for one in expected]
    assert counts_of({"mixed": Replies.of(found["mixed"])})["mixed"]["refused"] == 7


def test_the_first_token_metric_is_that_of_the_whole_distribution(session, prompts):
    its = Replies.of(labelled(session, prompts)["mixed"])
    expected = refusal_metric(last_log_probs(session.loaded, session.chat, prompts["mixed"]), [53])
    found = torch.tensor(first_token_metric(its, [53]), dtype=torch.float64)
    assert torch.allclose(found, expected, atol=1e-3)
    few = replace(its, likely=its.likely[:, :3], log_probs=its.log_probs[:, :3])
    assert torch.allclose(torch.tensor(first_token_metric(few, [53]), dtype=torch.float64)[:6], expected[:6], atol=1e-3)


@pytest.mark.parametrize("wanted", LABELS[:2])
def test_what_is_measured_is_the_mean_over_those_with_the_label(session, prompts, wanted):
    needs = frozenset({"means", "covariance", "samples"})
    half = {0, 2, 3, 8, 9, 10}
    found = labelled(session, prompts, {"mixed": Measured(wanted=wanted, needs=needs, half=half)})["mixed"]
    rows = Replies.of(found).where(wanted)
    texts = [prompts["mixed"][row] for row in rows]
    ours = [place for place, row in enumerate(rows) if row in half]
    expected = measure_class(session.loaded, session.chat, texts, needs, half=ours, batch_size=4, task="measure")
    assert expected.keys() <= found.keys()
    assert found["counts"].tolist() == [len(rows), len(ours)]
    for name in expected:
        assert torch.allclose(found[name], expected[name], atol=2e-5), name
    other = [place for place in range(len(rows)) if place not in ours]
    off = measure_class(session.loaded, session.chat, texts, needs, half=other, batch_size=4, task="measure")
    assert not torch.allclose(found["half"], off["half"], atol=1e-3)


def test_prompts_with_other_labels_count_nowhere(session, prompts):
    found = labelled(
        session, prompts, {"mixed": Measured(wanted="refused", needs=())}, read=lambda prompt, reply: "unclear"
    )
    assert found["mixed"].keys() == {"tokens", "labels", "likely", "log_probs"}
    with pytest.raises(PromptError, match="a covariance takes two"):
        labelled(session, {"one": prompts["mixed"][:1]}, {"one": Measured(wanted="refused", needs=("covariance",))})


def test_few_prompts_to_score_on_are_said():
    def of(harmful, harmless):
        return Filtered(harmful=("a",) * harmful, harmless=("b",) * harmless, harmful_before=32, harmless_before=32)

    assert finding.few_to_score(of(8, 8)) == ""
    assert "7 harmful and 32 harmless" in finding.few_to_score(of(7, 32))
    assert "32 harmful and 1 harmless" in finding.few_to_score(of(32, 1))


# --- in a run ---------------------------------------------------------------------------------------------------------


def test_a_direction_is_measured_on_what_replies_say(session):
    measured = pipeline.measure(session)
    labels, calibration = measured.metadata["labels"], measured.metadata["calibration"]
    assert labels["harmful_train"]["refused"] == measured.metadata["kept"]["harmful_train"] > 16
    assert labels["harmless_train"]["answered"] == measured.metadata["kept"]["harmless_train"]
    assert calibration["auc"] > 0.99
    assert calibration["refused"] + calibration["answered"] == 40
    chosen = pipeline.select(session, measured)
    assert chosen.metadata["of"]["harmful_val"] == 6
    assert chosen.metadata["kept"]["harmful_val"] >= 5


def test_the_threshold_is_what_adding_must_reach(session):
    """The rule's bound on induce is above the line between refused and answered prompts."""
    measured = pipeline.measure(session)
    high = {**measured.metadata, "calibration": {"auc": 1.0, "threshold": 17.0, "refused": 1, "answered": 1}}
    notes = []
    found = pipeline.select(
        replace(session, on_event=lambda event: notes.append(getattr(event, "text", ""))),
        replace(measured, metadata=high),
    )
    assert found.choice.rule != pipeline.select(session, measured).choice.rule
    assert any("whatever it induces" in text for text in notes)


def test_one_pass_labels_and_measures(session, tmp_path):
    seen = []
    listen = replace(session, on_event=lambda event: seen.append(event) if isinstance(event, Started) else None)
    with Steps(tmp_path / "steps", "work") as steps:
        measured = pipeline.measure(listen, steps=steps)
        again = pipeline.measure(listen, steps=steps)
    assert [event.task for event in seen if "load" not in event.task] == ["reply to training prompts"]
    assert again.metadata == measured.metadata


def test_out_of_core_training_and_validation_share_the_pass(tmp_path):
    held, tight = (open_session(None, RECIPE.with_changes({"memory_bytes": size})) for size in (None, 36 * 2**20))
    assert tight.loaded.offload is not None
    seen = []
    tight = replace(tight, on_event=lambda event: seen.append(event) if isinstance(event, Started) else None)
    with Steps(tmp_path / "steps", "work") as steps:
        measured = finding.measure(tight, steps=steps, ahead=True)
        prompts = reading.read_validation(tight, (53,), steps)
    assert [event.task for event in seen if "load" not in event.task] == ["reply to training and validation prompts"]
    expected = finding.measure(held)
    assert prompts == reading.read_validation(held, (53,), Steps())
    assert measured.metadata["labels"] == expected.metadata["labels"]
    for one, other in zip(measured.candidates, expected.candidates, strict=True):
        assert torch.allclose(one.vector, other.vector, atol=1e-4)


def test_replies_that_say_nothing_yet_are_named(monkeypatch, session):
    monkeypatch.setattr(reading, "reader", lambda scorer, chat: lambda prompt, reply: "unclear")
    with pytest.raises(PromptError, match="refuses none of the 20 harmful prompts") as found:
        pipeline.measure(session)
    assert "larger reply_tokens" in found.value.hint


def test_a_handful_is_refused_and_few_are_said(session):
    def only(count):
        left = iter(range(count))
        return lambda scorer, chat: (
            lambda prompt, reply: (
                ("refused" if next(left, None) is not None else "answered")
                if prompt in session.contrast.harmful_train.texts
                else "answered"
            )
        )

    notes = []
    listen = replace(session, on_event=lambda event: notes.append(event) if isinstance(event, Noted) else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "reader", only(5))
        with pytest.raises(TooFewPromptsError, match="5 of 20 harmful"):
            pipeline.measure(listen)
        patch.setattr(reading, "reader", only(9))
        assert pipeline.measure(listen).metadata["kept"]["harmful_train"] == 9
    assert "9 of 20 harmful" in notes[-1].text
