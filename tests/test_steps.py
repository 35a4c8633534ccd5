"""What is finished is not done again, and belongs to one piece of work."""

from dataclasses import replace

import pytest
import torch

import abliterate
from abliterate.errors import PromptError
from abliterate.events import Advanced, Noted, Started
from abliterate.recipe import Recipe
from abliterate.workflow import pipeline
from abliterate.workflow.session import open_session
from abliterate.workflow.steps import Steps
from tests import factories

SOURCE = "bundled:tiny-chat"
RECIPE = Recipe(
    harmful=SOURCE, harmless=SOURCE, n_train=24, n_val=8, n_test=8, max_new_tokens=8,
    estimators=("difference-of-means",),
)  # fmt: skip


def never():
    raise AssertionError("this was done already")


def test_results_come_back(tmp_path):
    made = Steps(tmp_path / "steps", "work")
    value = torch.arange(6, dtype=torch.float64).view(2, 3).T
    assert made.document("a", lambda: {"x": [1, 2]}) == {"x": [1, 2]}
    assert torch.equal(made.tensors("b", lambda: {"y": value})["y"], value)
    again = Steps(tmp_path / "steps", "work")
    assert again.document("a", never) == {"x": [1, 2]}
    assert torch.equal(again.tensors("b", never)["y"], value)


def test_other_work_begins_anew(tmp_path):
    Steps(tmp_path / "steps", "work").document("a", lambda: {"x": 1})
    assert Steps(tmp_path / "steps", "other").document("a", lambda: {"x": 2}) == {"x": 2}


def test_what_was_cut_off_is_made_again(tmp_path):
    made = Steps(tmp_path / "steps", "work")
    made.document("a", lambda: {"x": 1})
    made.tensors("b", lambda: {"y": torch.ones(3)})
    for path in (tmp_path / "steps" / "a.json", tmp_path / "steps" / "b.safetensors"):
        path.write_bytes(path.read_bytes()[:-3])
    assert made.document("a", lambda: {"x": 2}) == {"x": 2}
    assert made.tensors("b", lambda: {"y": torch.zeros(3)})["y"].sum() == 0


@pytest.mark.parametrize(("error", "stays"), [(None, False), (PromptError, False), (KeyboardInterrupt, True)])
def test_only_an_interruption_leaves_something(error, stays, tmp_path):
    def work():
        with Steps(tmp_path / "steps", "work") as steps:
            steps.document("a", lambda: {"x": 1})
            if error is not None:
                raise error("why", "what") if error is PromptError else error

    if error is None:
        work()
    else:
        with pytest.raises(error):
            work()
    assert (tmp_path / "steps").exists() == stays


def test_without_a_folder_nothing_is_kept():
    kept_nowhere = Steps()
    assert kept_nowhere.document("a", lambda: {"x": 1}) == {"x": 1}
    assert kept_nowhere.document("a", lambda: {"x": 2}) == {"x": 2}


@pytest.fixture(scope="module")
def measured():
    session = open_session(None, RECIPE)
    return session, pipeline.measure(session)


class Heard:
    """Tasks that began; the process is "killed" when ``stop`` begins."""

    def __init__(self, stop=None):
        self.tasks, self.stop = [], stop

    def __call__(self, event):
        if isinstance(event, Started):
            self.tasks.append(event.task)
            if event.task == self.stop:
                raise KeyboardInterrupt


def test_measuring_continues_where_it_was_stopped(tmp_path):
    """By the paper's way, where passes follow each other."""
    session = open_session(None, RECIPE.with_changes({"labels": "first-token"}))
    whole = pipeline.measure(session)
    folder, fingerprint = tmp_path / "steps", pipeline.work_fingerprint(session)
    with pytest.raises(KeyboardInterrupt), Steps(folder, fingerprint) as steps:
        pipeline.measure(replace(session, on_event=Heard(stop="measure harmless prompts")), steps=steps)
    heard = Heard()
    with Steps(folder, fingerprint) as steps:
        measured = pipeline.measure(replace(session, on_event=heard), steps=steps)
    assert [task for task in heard.tasks if not task.startswith("load ")] == ["measure harmless prompts"]
    assert torch.equal(factories.vectors_of(measured), factories.vectors_of(whole))
    assert measured.metadata == whole.metadata
    assert not folder.exists()


def test_a_run_that_was_stopped_while_it_measured_continues(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        abliterate.run(None, tmp_path / "out", RECIPE, on_event=Heard(stop="score candidates"))
    heard = Heard()
    result = abliterate.run(None, tmp_path / "out", RECIPE, on_event=heard)
    assert next(task for task in heard.tasks if not task.startswith("load ")) == "score candidates"
    assert result.verification.ok
    assert not list(result.out.rglob("steps"))


@pytest.mark.parametrize("rule", [{}, {"max_kl_nats": 1e-9}, {"min_induce": 50.0}, {"prune_layers": 0.5}], ids=repr)
def test_few_scores_choose_what_all_choose(measured, rule):
    """On the bundled model, where the rule keeps some, and where it keeps none."""
    session, directions = measured
    few, every = (
        pipeline.select(replace(session, recipe=RECIPE.with_changes({**rule, "all_scores": one})), directions)
        for one in (False, True)
    )
    assert few.choice == every.choice
    other = {"max_kl_nats": "pareto-fallback", "min_induce": "without-induce"}
    assert few.choice.rule == next((other[key] for key in rule if key in other), "arditi-2024")
    assert {one.candidate for one in few.scores} == {one.candidate for one in every.scores}
    scored, whole = few.metadata["scored"], every.metadata["scored"]
    assert whole["prompt_passes"] == whole["of"] == scored["of"]
    assert whole["in_full"] == sum(one.verdict != "nan" for one in every.scores)
    assert scored["in_full"] < whole["in_full"]
    fewer = scored["of"] / scored["prompt_passes"]
    assert fewer > (3.5 if few.choice.rule == "arditi-2024" else 1.3)


def test_a_choice_that_was_stopped_continues(measured, tmp_path):
    session, directions = measured
    expected = pipeline.select(session, directions)
    seen = []

    def stop(event):
        seen.append(event)
        if sum(isinstance(one, Advanced) for one in seen) == 12:
            raise KeyboardInterrupt

    folder, fingerprint = tmp_path / "steps", pipeline.work_fingerprint(session)
    with pytest.raises(KeyboardInterrupt), Steps(folder, fingerprint) as steps:
        pipeline.select(replace(session, on_event=stop), directions, steps=steps)
    seen.clear()
    with Steps(folder, fingerprint) as steps:
        found = pipeline.select(replace(session, on_event=seen.append), directions, steps=steps)
    begun = [event.task for event in seen if isinstance(event, Started)]
    assert begun == ["load tiny-chat", "score candidates"]
    assert next(event.amount for event in seen if isinstance(event, Advanced)) > 0
    assert found.choice == expected.choice
    assert found.metadata["scored"]["prompt_passes"] <= expected.metadata["scored"]["prompt_passes"]
    assert any("fewer than" in event.text for event in seen if isinstance(event, Noted))


def test_other_options_that_touch_the_numbers_begin_anew():
    session = open_session(None, RECIPE)
    same = open_session(None, RECIPE.with_changes({"batch_size": 3, "memory_bytes": 2**30}))
    other = open_session(None, RECIPE.with_changes({"dtype": "float64"}))
    assert pipeline.work_fingerprint(session) == pipeline.work_fingerprint(same)
    assert pipeline.work_fingerprint(session) != pipeline.work_fingerprint(other)
