"""The search: its front and its knee, its file, its trials on the bundled model, and what it says."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given as given_values
from hypothesis import strategies as st
from typer.testing import CliRunner

from abliterate.checkpoint import direction_file
from abliterate.cli.app import app
from abliterate.cli.stages import read_direction
from abliterate.errors import NonFiniteError, SourceError, UsageError
from abliterate.evaluate.page import search_chart
from abliterate.events import Advanced, Noted, Started
from abliterate.method.kernel import PER_LAYER, ranges
from abliterate.method.search import ENOUGH, KNEE, SEARCH, Trial, bound, front, knee, take, trial_of, trials_in
from abliterate.method.statistics import exact_kl_nats
from abliterate.model.forward import last_log_probs
from abliterate.model.measuring import Filtered
from abliterate.recipe import load_recipe
from abliterate.workflow import finding, pipeline, study
from abliterate.workflow import search as searching
from abliterate.workflow.session import open_session
from abliterate.workflow.steps import Steps
from abliterate.workflow.study import Study, suggest

FEW = {
    "harmful": "bundled:tiny-chat", "harmless": "bundled:tiny-chat", "n_train": 12, "n_val": 4, "n_test": 2,
    "reply_tokens": 8, "allow_few": True, "trials": 4, "startup_trials": 2,
}  # fmt: skip
RECIPE = load_recipe("search").with_changes(FEW)
LAYERS = 8


def trial(number=0, refused=0, kl=0.1, *, unclear=0, of=32, parameters=None):
    return Trial(
        number=number, parameters=parameters or {PER_LAYER: False}, refused=refused, unclear=unclear, of=of,
        kl_nats=kl, kl_error_nats=0.01,
    )  # fmt: skip


BROKEN = trial(99, 0, math.nan, of=0)
some_trials = st.lists(
    st.tuples(st.integers(0, 8), st.sampled_from([0.0, 0.1, 0.2, 0.5, math.nan]), st.integers(0, 2)), min_size=1
).map(lambda drawn: [trial(n, hits, kl, unclear=odd, of=10) for n, (hits, kl, odd) in enumerate(drawn)])


# --- the front and the knee -----------------------------------------------------------------------------------------


def beats(one, other):
    better = one.unanswered < other.unanswered or one.kl_nats < other.kl_nats
    return better and one.unanswered <= other.unanswered and one.kl_nats <= other.kl_nats


@given_values(some_trials)
def test_no_trial_beats_one_on_the_front_and_every_other_is_beaten_or_equal(trials):
    finite, found = [its for its in trials if its.is_finite], front(trials)
    for one in finite:
        beaten = any(beats(other, one) for other in finite)
        equal = any((its.unanswered, its.kl_nats) == (one.unanswered, one.kl_nats) for its in found)
        assert equal != beaten
    assert found == sorted(found, key=lambda its: its.unanswered)
    assert all(its.is_finite for its in found)


@given_values(some_trials)
def test_the_knee_has_the_least_kl_within_the_bound_whatever_the_order(trials):
    finite = [its for its in trials if its.is_finite]
    if not finite:
        with pytest.raises(NonFiniteError):
            knee(trials)
        return
    chosen, most = knee(trials), bound(trials)
    within = [its for its in finite if its.unanswered <= most]
    assert chosen in front(trials)
    assert chosen.kl_nats == min(its.kl_nats for its in within)
    equal = [its for its in within if its.kl_nats == chosen.kl_nats]
    assert (chosen.unanswered, chosen.number) == min((its.unanswered, its.number) for its in equal)
    assert knee(trials[::-1]) == chosen == knee([*trials, BROKEN])


def test_the_bound_is_one_standard_error_above_the_least_or_one_in_twenty():
    assert bound([trial(0, 0), trial(1, 20)]) == ENOUGH == 0.05
    assert bound([trial(0, 8), BROKEN]) == pytest.approx(0.25 + math.sqrt(0.25 * 0.75 / 32))
    assert bound([trial(0, 32)]) == 1
    trials = [trial(0, 3, 0.9), trial(1, 4, 0.3), trial(2, 5, 0.1), trial(3, 30, 0.0)]
    assert knee(trials).number == 1  # 3 of 32 and a standard error are 4.6


def test_a_ruined_model_does_not_look_like_one_that_complies():
    """Its replies are no refusals, and no answers either."""
    ruined, good = trial(0, 0, 0.01, unclear=30), trial(1, 1, 0.2)
    assert ruined.refused < good.refused
    assert knee([ruined, good]) == good


def test_a_search_without_a_finite_trial_is_an_error():
    with pytest.raises(NonFiniteError, match="none of the 2 trials") as error:
        knee([BROKEN, trial(1, 3, math.nan)])
    assert error.value.exit_code == 5
    assert error.value.hint


# --- what is suggested, and the file --------------------------------------------------------------------------------


def made_up(number, parameters):
    """A trial without a model; every fifth is broken."""
    if number % 5 == 3:
        return trial(number, 0, math.nan, of=0, parameters=parameters)
    attention = parameters["attention most"]
    return trial(number, int(20 * (1.5 - attention)), attention**2, parameters=parameters)


def run(kept, trials, startup=4):
    while len(kept.trials) < trials:
        parameters = suggest(kept.trials, ranges(LAYERS), seed=7, startup=startup)
        kept.add(made_up(len(kept.trials), parameters))
    return kept.trials


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "study.jsonl"
    return run(Study(path, "work"), 9), path.read_bytes()


def same(some, others):
    return [its.to_json() for its in some] == [its.to_json() for its in others]


def test_a_study_killed_anywhere_gives_the_trials_of_one_that_was_not(whole, tmp_path):
    """Cut in the middle of every line, before the end of every line, and behind it."""
    trials, text = whole
    ends = [place for place, byte in enumerate(text) if byte == ord("\n")]
    for first, last in zip([-1, *ends], ends, strict=False):
        for cut in ((first + last) // 2, last, last + 1):
            path = tmp_path / "study.jsonl"
            path.write_bytes(text[:cut])
            kept = Study(path, "work")
            assert same(kept.trials, trials[: len(kept.trials)])
            assert len(kept.trials) >= text[:cut].count(b"\n") - 1
            if cut == last:  # once for every trial: suggesting is what takes time
                assert same(run(kept, 9), trials)
                assert path.read_bytes() == text


def test_a_trial_that_was_changed_changes_what_follows(whole, tmp_path):
    """Else the test above could not fail: suggestions follow from the trials before them."""
    trials, _ = whole
    changed = [replace(its, refused=32 - its.refused) if its.is_finite else its for its in trials[:8]]
    again = suggest(changed, ranges(LAYERS), seed=7, startup=4)
    assert again != trials[8].parameters
    assert suggest(trials[:8], ranges(LAYERS), seed=7, startup=4) == trials[8].parameters
    assert suggest(trials[:8], ranges(LAYERS), seed=8, startup=4) != trials[8].parameters


def test_what_is_suggested_lies_in_its_range_and_is_drawn_anew_each_time(whole):
    trials, _ = whole
    for name, (low, high) in ranges(LAYERS).items():
        drawn = [its.parameters[name] for its in trials]
        assert all(low <= value <= high for value in drawn)
        assert len(set(drawn)) == len(drawn)
    assert {its.parameters[PER_LAYER] for its in trials} == {False, True}


def test_a_file_of_other_work_is_begun_again(whole, tmp_path):
    path = tmp_path / "study.jsonl"
    path.write_bytes(whole[1])
    assert Study(path, "other work").trials == []
    assert Study(path, "other work").path.read_bytes().count(b"\n") == 1


@pytest.mark.parametrize("line", [b"{}", b"[]", b'{"number": 2}', b"\xff\xfe", b"1"])
def test_a_line_that_is_no_trial_ends_the_file(line, whole, tmp_path):
    path = tmp_path / "study.jsonl"
    lines = whole[1].split(b"\n")
    path.write_bytes(b"\n".join([*lines[:3], line, *lines[3:]]))
    assert same(Study(path, "work").trials, whole[0][:2])


def test_plain_data_of_a_trial_has_null_for_what_is_not_known():
    document = json.loads(json.dumps(BROKEN.to_json(), allow_nan=False))
    assert document["kl_nats"] is None
    assert trial_of(document).to_json() == document
    assert not trial_of(document).is_finite


# --- on the bundled model -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session():
    return open_session(None, RECIPE)


@pytest.fixture(scope="module")
def measured(session):
    return finding.measure(session)


@pytest.fixture(scope="module")
def found(session, measured, tmp_path_factory):
    """A search, the events it gave, and the file it left."""
    events = []
    heard = replace(session, on_event=events.append)
    heard.__dict__.update(loaded=session.loaded, chat=session.chat)
    steps = Steps(tmp_path_factory.mktemp("steps") / "steps", "work")
    return finding.select(heard, measured, steps=steps), events, steps


def test_the_search_takes_the_knee_and_says_why(found):
    directions, events, _ = found
    trials, about = trials_in(directions), directions.metadata[SEARCH]
    assert [its.number for its in trials] == [0, 1, 2, 3]
    assert directions.choice.rule == KNEE
    assert directions.choice.candidate == f"search/{knee(trials).number}"
    assert about["taken"] == knee(trials).to_json()
    assert about["front"] == [its.to_json() for its in front(trials)]
    assert (about["trials"], about["finite"], about["startup"], about["seed"]) == (4, 4, 2, 42)
    assert "least KL" in about["why"]
    assert directions.scores == ()
    assert Started(task="search", total=4, unit="trials") in events
    assert sum(its.amount for its in events if isinstance(its, Advanced) and its.task == "search") == 4
    best = [its.text for its in events if isinstance(its, Noted) and "joins the Pareto front" in its.text]
    assert best[0].startswith("trial 0 ")


def test_the_kl_of_a_trial_is_that_of_its_edit_by_hooks(found, session):
    """Measured again with the edit of the chosen candidate, as it would be written."""
    from abliterate.editing.asked import stream_asked
    from abliterate.model.interventions import edited

    directions, _, _ = found
    prompts = finding.read_validation(session, (), Steps()).harmless
    base = last_log_probs(session.loaded, session.chat, prompts)
    with edited(session.loaded, stream_asked(RECIPE.edit, directions, LAYERS)):
        other = last_log_probs(session.loaded, session.chat, prompts)
    assert other.dtype == torch.float64
    expected = float(exact_kl_nats(base, other).mean())
    assert directions.metadata[SEARCH]["taken"]["kl_nats"] == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_killed_at_a_trial_it_goes_on_with_the_next_and_finds_the_same(found, session, measured, tmp_path, monkeypatch):
    directions, _, _ = found
    steps, tried, real = Steps(tmp_path / "steps", "work"), [], searching._tried

    def until(last):
        def work(*arguments):
            if arguments[3] == last:
                raise KeyboardInterrupt
            tried.append(arguments[3])
            return real(*arguments)

        return work

    monkeypatch.setattr(searching, "_tried", until(2))
    with pytest.raises(KeyboardInterrupt):
        finding.select(session, measured, steps=steps)
    monkeypatch.setattr(searching, "_tried", until(9))
    again = finding.select(session, measured, steps=steps)
    assert tried == [0, 1, 2, 3]
    assert again.metadata["trials"] == directions.metadata["trials"]
    assert again.metadata[SEARCH] == directions.metadata[SEARCH]
    assert again.sha256 == directions.sha256


def test_a_finished_search_goes_on_where_more_trials_are_asked_for(found, session, monkeypatch):
    directions, _, _ = found
    more = replace(session, recipe=RECIPE.with_changes({"trials": 5}))
    more.__dict__.update(loaded=session.loaded, chat=session.chat)
    numbers = []

    def tried(*arguments):
        numbers.append(arguments[3])
        return made_up(arguments[3], arguments[4])

    monkeypatch.setattr(searching, "_tried", tried)
    assert finding.select(more, directions).metadata["trials"][:4] == directions.metadata["trials"]
    assert numbers == [4]
    fewer = replace(more, recipe=RECIPE.with_changes({"trials": 2}))
    fewer.__dict__.update(loaded=session.loaded, chat=session.chat)
    assert finding.select(fewer, directions).metadata["trials"] == directions.metadata["trials"][:2]
    assert numbers == [4]


def test_only_validation_prompts_are_seen(session, measured, monkeypatch):
    seen = []

    def stop(its, directions, prompts, *rest):
        seen.append(prompts)
        raise KeyboardInterrupt

    monkeypatch.setattr(searching, "_run_trials", stop)
    with pytest.raises(KeyboardInterrupt):
        finding.select(session, measured)
    (prompts,) = seen
    assert isinstance(prompts, Filtered)
    assert set(prompts.harmful) <= set(session.contrast.harmful_val.texts)
    assert set(prompts.harmless) <= set(session.contrast.harmless_val.texts)


def test_what_breaks_the_model_is_a_trial_without_figures_and_all_of_them_an_error(session, measured, monkeypatch):
    real, calls = searching._log_probs, []

    def broken(*arguments):
        calls.append(1)
        values = real(*arguments)
        return values if len(calls) == 1 else values * math.nan

    monkeypatch.setattr(searching, "_log_probs", broken)
    with pytest.raises(NonFiniteError, match="none of the 4 trials"):
        finding.select(session, measured)
    assert len(calls) == 5


def test_another_trial_is_taken_from_the_file(found, tmp_path):
    directions, _, _ = found
    again = direction_file.load(direction_file.save(directions, tmp_path / "direction.safetensors"))
    assert again.sha256 == directions.sha256
    number = next(its.number for its in trials_in(again) if its.number != knee(trials_in(again)).number)
    other = take(again, number)
    assert (other.choice.candidate, other.choice.rule) == (f"search/{number}", "given")
    assert other.metadata[SEARCH]["taken"]["number"] == number
    assert other.metadata[SEARCH]["why"] == "it was asked for"
    assert len(other.candidates) == len(again.candidates)
    assert take(other, knee(trials_in(again)).number).sha256 == directions.sha256


def test_trials_that_cannot_be_taken(found, measured):
    directions, _, _ = found
    with pytest.raises(UsageError, match="no search chose"):
        take(measured, 0)
    with pytest.raises(UsageError, match="trial 17 is none of them") as error:
        take(directions, 17)
    assert f"are trials {front(trials_in(directions))[0].number}" in error.value.hint
    metadata = {**directions.metadata, "trials": [*directions.metadata["trials"], {**BROKEN.to_json(), "number": 4}]}
    with pytest.raises(UsageError, match="trial 4 broke the model"):
        take(replace(directions, metadata=metadata), 4)
    with pytest.raises(UsageError, match="cannot be read"):
        take(replace(directions, metadata={**directions.metadata, "trials": [{"number": "x"}]}), 0)


def test_whoever_chooses_otherwise_has_nothing_of_the_search(found, session, measured, tmp_path):
    directions, _, _ = found
    file = direction_file.save(directions, tmp_path / "direction.safetensors")
    named = read_direction(file, -1, directions.chosen.layer)
    assert named.chosen.estimator == "projected-difference"
    ruled = replace(session, recipe=RECIPE.with_changes({"trials": 0}))
    ruled.__dict__.update(loaded=session.loaded, chat=session.chat)
    chosen = finding.select(ruled, directions)
    assert chosen.choice == finding.select(ruled, measured).choice
    for one in (named, chosen):
        assert not {SEARCH, "trials"} & one.metadata.keys()
        assert {its.id for its in one.candidates} == {its.id for its in measured.candidates}


def test_the_chart_has_every_trial_and_a_ring_at_the_one_taken(found):
    directions, _, _ = found
    svg = search_chart(directions).svg
    assert svg.count("<title>trial ") == 4
    assert svg.count('r="8"') == 1
    assert "harmful prompts without an answer" in svg


def test_the_commands_show_the_front_and_take_another_trial(found, tmp_path):
    directions, _, _ = found
    file = direction_file.save(directions, tmp_path / "direction.safetensors")
    shown = CliRunner().invoke(app, ["directions", str(file)]).stdout
    assert "4 trials of the search along projected-difference" in shown
    assert f"taken: trial {knee(trials_in(directions)).number}, of the trials that leave at most" in shown
    out, number = tmp_path / "edited", str(trials_in(directions)[-1].number)
    words = ["edit", "tiny-chat", str(file), "--out", str(out), "--trial", number]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    assert "only 'kernel' heeds them" in refused.stderr
    done = CliRunner().invoke(app, [*words, "--change", "kernel"])
    assert done.exit_code == 0, done.stderr
    document = json.loads((out / "abliterate.json").read_text("utf-8"))
    assert document["direction"]["choice"] == {
        "candidate": f"search/{number}", "layer": document["direction"]["choice"]["layer"], "position": -1,
        "rule": "given",
    }  # fmt: skip
    assert document["direction"]["measurement"]["search"]["taken"]["number"] == int(number)
    card = (out / "README.md").read_text("utf-8")
    assert "- Searched: 4 trials on validation prompts (multivariate TPE, optuna " in card
    assert f"Taken was trial {number} " in card


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--trial", "1"], "add --direction"), (["--trials", "2", "--change", "removal"], "add --change kernel"),
     (["--trials", "2", "--change", "kernel", "--roles", "embedding"], "add attention")],
)  # fmt: skip
def test_requests_that_make_no_sense_are_refused_before_any_work(words, said, tmp_path):
    done = CliRunner().invoke(app, ["run", "tiny-chat", "--out", str(tmp_path / "out"), *words])
    assert done.exit_code == 2, done.stderr
    assert said in done.stderr
    assert not [*tmp_path.iterdir()]


def test_without_optuna_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(study, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match="optuna") as error:
        pipeline.check_names(RECIPE)
    assert error.value.hint == "pip install 'abliterate[search]'"
    pipeline.check_names(RECIPE.with_changes({"trials": 0}))


def test_an_estimator_without_a_vector_at_every_layer_cannot_be_searched(found, session):
    directions, _, _ = found
    other = replace(session, recipe=RECIPE.with_changes({"estimators": ("per-layer",)}))
    other.__dict__.update(loaded=session.loaded, chat=session.chat)
    with pytest.raises(UsageError, match="'per-layer' made none"):
        finding.select(other, directions)


def test_a_damaged_study_in_a_file_is_named(found, tmp_path):
    directions, _, _ = found
    broken = replace(directions, metadata={**directions.metadata, "trials": "x"})
    file = direction_file.save(broken, tmp_path / "direction.safetensors")
    with pytest.raises((UsageError, SourceError)):
        take(direction_file.load(file), 0)
