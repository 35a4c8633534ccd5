"""Directions of categories of prompts, on a model whose two directions are known."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from abliterate.checkpoint.direction_file import load, save
from abliterate.cli.app import app
from abliterate.errors import PromptError, TooFewPromptsError, UsageError
from abliterate.evaluate.category_page import render_categories
from abliterate.evaluate.charts import curves
from abliterate.method.directions import DirectionSet, Subspace, given
from abliterate.method.estimators import category_differences, difference_of_means
from abliterate.method.linalg import cosine
from abliterate.method.moments import Moments
from abliterate.model import interventions
from abliterate.model.prompts import SplitSizes, contrast_set, load_prompts
from abliterate.recipe import Recipe
from abliterate.workflow import pipeline, trying_categories
from abliterate.workflow.session import open_session
from abliterate.workflow.trying_categories import try_categories
from tests import offloading, planted
from tests.test_estimators import statistics

NAMES = ("lock", "seal")
TRUTH = planted.DIRECTIONS.flip(0)
"""In the order of ``NAMES``."""
SIZES = SplitSizes(train=24, val=8, test=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return planted.make(tmp_path_factory.mktemp("planted") / "model")


@pytest.fixture(scope="module")
def recipe(folder):
    harmful, harmless = planted.prompts(folder.parent)
    return Recipe(
        harmful=harmful, harmless=harmless, n_train=24, n_val=8, n_test=8, reply_tokens=14, max_new_tokens=14,
        estimators=("category-differences",),
    )  # fmt: skip


@pytest.fixture(scope="module")
def session(folder, recipe):
    return open_session(folder, recipe)


@pytest.fixture(scope="module")
def chosen(session):
    return pipeline.select(session, pipeline.measure(session))


@pytest.fixture(scope="module")
def found(session, chosen):
    return try_categories(session, chosen, strengths=(0.1, 0.5), n_prompts=3)


def refusals(report):
    """How many of three prompts are refused, of each category, and of harmless ones."""
    return {
        one.name: (*(its.hits for its in one.refused.values()), one.over_refused["harmless"].hits)
        for one in report.tried
    }


PLANTED = {
    "as it is": (3, 3, 0),
    "without lock": (0, 3, 0),
    "without seal": (3, 0, 0),
    "without all of them": (0, 0, 0),
    "lock added, +0.1": (3, 3, 0),
    "lock added, +0.5": (3, 3, 3),
    "seal added, +0.1": (3, 3, 0),
    "seal added, +0.5": (3, 3, 3),
}
"""What follows from the head: half of a direction is above what a refusal takes, a tenth is below."""


# --- the truth --------------------------------------------------------------------------------------------------------


def test_what_is_measured_is_what_was_planted(chosen, found):
    assert chosen.categories == found.categories == NAMES
    vectors = chosen.chosen.everywhere.vectors.T
    assert cosine(vectors, TRUTH) == pytest.approx([1.0, 1.0], abs=1e-6)  # of float32 residuals
    assert found.cosines[0][1] == pytest.approx(planted.COSINE, abs=1e-6)
    assert chosen.metadata["categories"] == {"lock": [12, 12], "seal": [12, 12]}


def test_the_categories_of_a_place_are_its_vectors_in_their_order_and_make_up_the_difference_of_means():
    stats, generator = statistics(), torch.Generator().manual_seed(1)
    first = stats.mean("harmful") + torch.randn(stats.mean("harmful").shape, generator=generator, dtype=torch.float64)
    parts = {"a": Moments(count=2, mean=first), "b": Moments(count=1, mean=3 * stats.mean("harmful") - 2 * first)}
    found = category_differences(replace(stats, categories=parts))
    assert len(found) == 12
    for one, whole in zip(found, difference_of_means(stats), strict=True):
        a, b = one.everywhere.vectors.double().T
        place = stats.positions.index(one.position), one.layer
        assert torch.allclose(a, (first - stats.mean("harmless"))[place], atol=1e-6)
        assert torch.allclose((2 * a + b) / 3, whole.vector.double(), atol=1e-6)
        assert one.provenance["categories"] == ["a", "b"]
    (alone,) = DirectionSet(candidates=found[:1]).choose_candidate(found[0].id).of_category("b").chosen.subspaces
    assert torch.equal(alone.vectors[:, 0], found[0].everywhere.vectors[:, 1])


def test_each_direction_refuses_its_own_category_and_adding_one_refuses_all(found):
    assert refusals(found) == PLANTED


def test_a_removal_that_leaves_something_is_seen(session, chosen, monkeypatch):
    broken = {
        "nothing is removed": lambda *_: nullcontext(),
        "the first vector alone": lambda loaded, one: interventions.without(
            loaded, replace(one, subspace=Subspace(vectors=one.everywhere.vectors[:, :1]))
        ),
    }
    for without in broken.values():
        monkeypatch.setattr(trying_categories, "without", without)
        assert refusals(try_categories(session, chosen, strengths=(), n_prompts=3)) != {
            name: its for name, its in PLANTED.items() if "added" not in name
        }


def test_one_category_is_written_alone(folder, recipe, chosen, tmp_path):
    file = save(chosen, tmp_path / "direction.safetensors")
    out = tmp_path / "out"
    made = CliRunner().invoke(app, ["edit", str(folder), str(file), "--category", "seal", "--out", str(out)])
    assert made.exit_code == 0, made.output
    kept = load(out / "abliterate" / "direction.safetensors")
    assert kept.choice.candidate == f"{chosen.choice.candidate}/seal"
    written = try_categories(open_session(out, recipe), chosen, strengths=(), n_prompts=3)
    assert refusals(written)["as it is"] == PLANTED["without seal"]


def test_a_whole_run_is_proven_and_refuses_neither(folder, recipe, chosen, tmp_path):
    result = pipeline.run(folder, tmp_path / "out", recipe, direction=chosen, with_evaluation=False)
    assert result.verification.ok
    assert result.plan.claim == "equal to hooks"
    written = try_categories(open_session(result.out, recipe), chosen, strengths=(), n_prompts=3)
    assert refusals(written)["as it is"] == PLANTED["without all of them"]


def test_out_of_core_is_the_same(folder, session, chosen, found):
    other = open_session(folder, session.recipe)
    other.__dict__["loaded"] = replace(offloading.offloaded(folder), tokenizer=session.loaded.tokenizer)
    passes = other.loaded.offload
    before = passes.bytes_read
    again = try_categories(other, chosen, strengths=(0.1, 0.5), n_prompts=3)
    assert again == found
    whole = sum(one.numel() * one.element_size() for one in session.loaded.model.parameters())
    assert passes.bytes_read - before <= 16 * whole  # one weight pass a token, whatever the number of interventions


def test_the_first_token_labels_measure_the_same(session, chosen):
    other = replace(session, recipe=session.recipe.with_changes({"labels": "first-token"}))
    again = pipeline.measure(other)
    ours = chosen.chosen.everywhere.vectors
    assert torch.allclose(again.named(chosen.choice.candidate).everywhere.vectors, ours, atol=1e-6)


# --- prompts ----------------------------------------------------------------------------------------------------------


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def asked(words, count=20):
    return [f"{words} {n} {n + 100} {n + 200}" for n in range(count)]


def test_every_part_has_an_equal_share_of_each_category(tmp_path):
    rows = [{"prompt": text, "category": "big"} for text in asked("a b", 90)]
    rows += [{"prompt": text, "Category": "small"} for text in asked("c d", 20)]
    harmful, harmless = lines(tmp_path / "h.jsonl", rows), lines(tmp_path / "s.jsonl", asked("e f"))
    split = contrast_set(harmful, harmless, sizes=SIZES, by_category=True)
    for part, share in ((split.harmful_train, 12), (split.harmful_val, 4), (split.harmful_test, 4)):
        assert [sum(its.category == name for its in part.prompts) for name in ("big", "small")] == [share, share]
    as_ever = contrast_set(harmful, harmless, sizes=SIZES)
    bare = lines(tmp_path / "bare.jsonl", [row["prompt"] for row in rows])
    assert as_ever.harmful_train.texts == contrast_set(bare, harmless, sizes=SIZES).harmful_train.texts


def test_named_sources_are_categories(tmp_path):
    (tmp_path / "a,b.txt").write_text("\n".join(asked("a")), "utf-8")
    (tmp_path / "c.csv").write_text("prompt,category\nc d,other\n", "utf-8")
    found = load_prompts(f"one={tmp_path}/a,b.txt,two={tmp_path}/c.csv")
    assert {its.category for its in found.prompts} == {"one", "two"}
    assert len(found.prompts) == 21


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "x y"}, {"prompt": "z", "category": "a"}], "1 of 2 prompts have no category, for example 'x y'"),
        ([{"prompt": "x", "category": "a"}, {"prompt": "z", "category": "a"}], "all prompts are of one category, 'a'"),
        ([{"prompt": "x", "category": "a"}, {"prompt": "x", "category": "b"}], "is of two categories, 'a' and 'b'"),
        ([{"prompt": "x", "category": "a"}, {"prompt": "z", "category": "b"}], "category a: holds 1 prompts"),
    ],
    ids=["none", "one", "two of one", "too few"],
)
def test_what_is_wrong_with_categories_is_said(rows, message, tmp_path):
    harmful, harmless = lines(tmp_path / "h.jsonl", rows), lines(tmp_path / "s.jsonl", asked("e"))
    with pytest.raises(PromptError, match=message) as error:
        contrast_set(harmful, harmless, sizes=SIZES, by_category=True)
    assert error.value.hint


def test_a_name_that_stands_twice_is_refused():
    with pytest.raises(PromptError, match="'a' is named twice"):
        load_prompts("a=x.txt,a=y.txt")


def test_a_category_that_is_not_refused_is_an_error_even_if_few_will_do(session, tmp_path):
    find = session.recipe.find
    rows, plain = (
        [json.loads(line) for line in Path(source).read_text("utf-8").splitlines()]
        for source in (find.harmful, find.harmless)
    )
    rows += [{**row, "category": "plain"} for row in plain[:60]]
    changes = {"harmful": lines(tmp_path / "h.jsonl", rows), "harmless": lines(tmp_path / "s.jsonl", plain[60:])}
    other = replace(session, recipe=session.recipe.with_changes({**changes, "allow_few": True}))
    with pytest.raises(TooFewPromptsError, match="no prompt of 'plain' behaves as its class says"):
        pipeline.measure(other)


# --- commands and pages -----------------------------------------------------------------------------------------------


def test_the_command_prints_tables_json_and_a_page(folder, recipe, chosen, found, tmp_path):
    file = save(chosen, tmp_path / "direction.safetensors")
    toml = tmp_path / "r.toml"
    toml.write_text(recipe.to_toml(), "utf-8")
    words = ["categories", str(folder), str(file), "--recipe", str(toml), "--prompts", "3", "--strengths", "0.1,0.5"]
    shown = CliRunner().invoke(app, [*words, "--report", str(tmp_path / "x.html")])
    assert shown.exit_code == 0, shown.output
    assert "without all of them" in shown.stdout
    page = (tmp_path / "x.html").read_text("utf-8")
    assert page == render_categories(f"{folder} by category", found)
    document = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert document["cosines"][0][1] == pytest.approx(planted.COSINE, abs=1e-6)
    first = document["tried"][1]
    assert (first["change"], first["category"]) == ("removed", "lock")
    assert (first["refused"]["lock"]["rate"], first["refused"]["seal"]["rate"]) == (0.0, 1.0)
    listed = json.loads(CliRunner().invoke(app, ["directions", str(file), "--json"]).stdout)
    assert listed["categories"] == list(NAMES)
    assert listed["cosines"][0] == pytest.approx([1.0, planted.COSINE], abs=1e-4)
    assert "seal" in CliRunner().invoke(app, ["directions", str(file)]).stdout


def test_the_page_is_alone_and_holds_figures_and_no_prompts(found, session):
    page = render_categories("A <b>", found)
    assert "A &lt;b&gt;" in page
    assert "seal, category lock: 0.5<" in page
    assert "without lock, prompts seal: 1<" in page
    assert "lock added, +0.5: harmless refused 100.0%, harmful refused 100.0%" in page
    assert "<script" not in page
    assert not any(prompt in page for prompt in session.contrast.harmful_test.texts)


def test_a_curve_goes_through_its_points():
    svg = curves("t", {"<a>": [(0.0, 1.0, "x"), (0.5, 0.0, "y"), (float("nan"), 0.0, "z")]}, ("over", "refused"))
    assert 'points="52.0,30.0 202.0,330.0"' in svg
    assert "y: over 50.0%, refused 0.0%" in svg
    assert "&lt;a&gt;" in svg
    assert "nan" not in svg


def test_what_cannot_be_tried_is_said(session, chosen, tmp_path):
    with pytest.raises(UsageError, match="holds no directions of categories"):
        try_categories(session, given(torch.ones(planted.D)))
    wide = [replace(one, subspace=Subspace(vectors=torch.ones(3, 2))) for one in chosen.candidates]
    with pytest.raises(UsageError, match="does not fit"):
        try_categories(session, replace(chosen, candidates=tuple(wide)))
    with pytest.raises(UsageError, match="no direction of a category 'x'") as error:
        chosen.of_category("x")
    assert error.value.hint == "its categories are: lock, seal"
    zero = chosen.choose(-1, 0)
    with pytest.raises(UsageError, match="the direction of 'lock' is zero"):
        try_categories(session, zero)
    file = save(chosen, tmp_path / "d.safetensors")
    for words, message in (
        (["categories", "nowhere", str(file), "--strengths", "1,x"], "not numbers"),
        (["edit", "nowhere", str(file), "--category", "x"], "no direction of a category"),
        (["run", "--category", "x"], "--category choose in a file"),
    ):
        failed = CliRunner().invoke(app, words)
        assert failed.exit_code == 2
        assert message in failed.stderr


def test_prompts_that_may_have_been_measured_on_are_named(session, chosen):
    notes = []
    other = replace(session, recipe=session.recipe.with_changes({"n_train": 16}), on_event=notes.append)
    other.__dict__["loaded"] = session.loaded
    try_categories(other, chosen, strengths=(), n_prompts=1)
    assert any("may have seen the test prompts" in getattr(note, "text", "") for note in notes)
