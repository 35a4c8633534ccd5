"""Models with thinking on and off, by the switch of their chat template, side by side."""

import json
import re
import shutil

import pytest
import torch
from typer.testing import CliRunner

import abliterate
from abliterate.cli.app import app
from abliterate.data.bundled import model_path
from abliterate.errors import RecipeError, UsageError
from abliterate.evaluate.page import render
from abliterate.method.directions import DirectionSet, grid
from abliterate.model.replying import generate
from abliterate.model.thinking import modes_of, prompt_ending
from abliterate.publishing import manifest
from abliterate.recipe import Recipe
from abliterate.workflow.session import open_session
from tests.test_report import CHROMIUM, PROBE, chromium

END = "{{- '<|turn|>assistant\\n' }}"
TEMPLATE = (model_path() / "chat_template.jinja").read_text("utf-8")
QUIET = "{%- if enable_thinking is defined and not enable_thinking %}{{- '\\n' }}{%- endif %}"
OPENED = "{%- if enable_thinking is defined and enable_thinking %}{{- '<think>' }}{%- endif %}"
SOURCES = {"harmful": "bundled:tiny-chat", "harmless": "bundled:tiny-chat", "n_test": 10, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Copies of the bundled model whose template has a switch, by what is behind the assistant's header."""
    made = {}
    for name, behind in {"quiet": QUIET, "opened": OPENED, "none": ""}.items():
        folder = tmp_path_factory.mktemp(name) / "model"
        shutil.copytree(model_path(), folder)
        assert END in TEMPLATE
        (folder / "chat_template.jinja").write_text(TEMPLATE.replace(END, END + behind), "utf-8")
        made[name] = folder
    return made


@pytest.fixture(scope="module")
def both(models):
    return abliterate.compare(models["quiet"], [models["quiet"]], Recipe(**SOURCES, thinking="both"))


class Tokenizer:
    """As much of one as rendering takes."""

    def __init__(self, render):
        self.render = render

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt, **options):
        assert not tokenize
        assert add_generation_prompt
        return messages[0]["content"] + self.render(**options)


# --- the switch -------------------------------------------------------------------------------------------------------


def strict(reasoning_effort="medium", **_):
    if reasoning_effort not in ("low", "medium", "high"):
        raise ValueError(reasoning_effort)
    return reasoning_effort


@pytest.mark.parametrize(
    ("render", "off", "on"),
    [
        (lambda enable_thinking=True, **_: "" if enable_thinking else "<think></think>", False, True),
        (lambda thinking=False, **_: "<think>" if thinking else "", False, True),
        (strict, "low", "high"),
    ],
    ids=["enable_thinking", "thinking", "reasoning_effort"],
)
def test_the_switch_is_found_by_rendering(render, off, on):
    tokenizer = Tokenizer(render)
    modes = modes_of(tokenizer, "both", name="m")
    assert [mode.name for mode in modes] == ["thinking off", "thinking on"]
    assert [list(mode.options.values()) for mode in modes] == [[off], [on]]
    assert modes_of(tokenizer, "on", name="m") == modes[1:]
    assert modes_of(tokenizer, "off", name="m") == modes[:1]
    assert modes_of(tokenizer, "", name="m")[0].options == {}


def test_a_template_that_thinks_in_its_own_way_is_not_switched():
    with pytest.raises(UsageError, match="m: its chat template has no switch for thinking") as error:
        modes_of(Tokenizer(lambda **_: "<think>"), "on", name="m")
    assert "--thinking" in error.value.hint


def test_what_the_template_has_begun_is_seen(models):
    tokenizer = open_session(models["opened"], Recipe()).loaded.tokenizer
    assert prompt_ending(tokenizer, {"enable_thinking": True}).endswith("assistant\n<think>")
    assert prompt_ending(tokenizer, {"enable_thinking": False}).endswith("assistant\n")


# --- both modes side by side ------------------------------------------------------------------------------------------


def test_every_model_is_asked_in_both_modes(both, models):
    other = str(models["quiet"])
    names = ["base, thinking off", f"{other}, thinking off", "base, thinking on", f"{other}, thinking on"]
    assert [model.name for model in both.models] == names
    assert [model.against for model in both.models] == ["", names[0], "", names[2]]
    assert dict(both.modes) == {"thinking off": "enable_thinking=False", "thinking on": "enable_thinking=True"}


def test_each_is_held_against_the_base_asked_the_same_way(both):
    """The second model is the base: in either mode nothing may differ, while the modes do."""
    for model in both.models:
        assert model.kl_nats == pytest.approx(0, abs=1e-9)
        assert model.kl_tokens_nats == pytest.approx(0, abs=1e-6)
        assert all(change.value == 0 for change in model.refusal_change.values())
    off, _, on, _ = both.models
    assert off.completion_nats != on.completion_nats


def test_the_prompts_are_those_of_the_mode(both, models):
    session = open_session(models["quiet"], Recipe(**SOURCES, thinking="both"))
    for place, mode in enumerate(session.modes):
        chat = session.chat_in(mode)
        assert chat.encode("Hello").count(chat.suffix[-1]) == 3 + (mode.name == "thinking off")
        sample = both.samples[0]
        reply = generate(session.loaded, chat, [sample.prompt], max_new_tokens=12)[0]
        assert sample.replies[2 * place] == reply


def test_without_the_option_the_template_is_given_nothing(models):
    session = open_session(models["quiet"], Recipe(**SOURCES))
    (mode,) = session.modes
    assert session.chat_in(mode) is session.chat
    assert session.chat.options == {}


def test_prompts_are_only_measured_along_the_direction_where_they_end_alike(models):
    vectors = torch.randn(2, 1, 128, generator=torch.Generator().manual_seed(0))
    directions = DirectionSet(candidates=grid("random", vectors, (-2, -1))).choose(-2, 0, rule="arditi-2024")
    recipe = Recipe(**SOURCES, thinking="both")
    found = abliterate.eval(models["quiet"], models["quiet"], recipe, directions=directions)
    assert [bool(model.along) for model in found.models] == [False, False, True, True]


# --- thinking that never ends -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unfinished(models, tmp_path_factory):
    recipe = Recipe(**SOURCES, n_train=16, n_val=8, thinking="both", filter_prompts=False)
    return abliterate.run(models["opened"], tmp_path_factory.mktemp("run") / "out", recipe)


def test_a_reply_that_never_ends_its_thinking_is_a_class_of_its_own(unfinished):
    """The template has begun the thinking, and this model never ends any: no mark is in the replies themselves."""
    modes = {model.mode for model in unfinished.evaluation.models}
    assert modes == {"thinking off", "thinking on"}
    for model in unfinished.evaluation.models:
        for scores in model.scores.values():
            thinks = model.mode == "thinking on"
            assert scores.unfinished.value == float(thinks)
            assert not thinks or scores.degenerate.hits == scores.refused.hits == scores.complied.hits == 0
    assert not any("<think>" in reply for sample in unfinished.evaluation.samples for reply in sample.replies)


def test_that_is_said_everywhere(unfinished):
    document = manifest.read(unfinished.out)["evaluation"]
    assert document["modes"] == {"thinking off": "enable_thinking=False", "thinking on": "enable_thinking=True"}
    assert [model["mode"] for model in document["models"]] == ["thinking off"] * 2 + ["thinking on"] * 2
    assert document["models"][3]["against"] == "base, thinking on"
    assert document["models"][3]["prompts"]["harmful"]["unfinished"]["rate"] == 1.0
    for text in (render("x", unfinished.evaluation), (unfinished.out / "README.md").read_text("utf-8")):
        assert "thinking never ended" in text
        assert "edited, thinking off" in text
        assert "enable_thinking=False" in text


def test_the_command_shows_both_and_says_what_would_help(models):
    options = ["--harmful", SOURCES["harmful"], "--harmless", SOURCES["harmless"], "--max-new-tokens", "4"]
    shown = CliRunner().invoke(app, ["eval", *[str(models["opened"])] * 2, "--thinking", "on", *options])
    assert shown.exit_code == 0, shown.stderr
    assert "thinking never ended" in shown.stdout
    assert "never ended their thinking; more --max-new-tokens help" in shown.stdout
    assert "thinking on: the chat template was given enable_thinking=True" in shown.stdout
    assert "base, thinking on" not in shown.stdout  # one mode only: the names stay


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize("width", [1100, 500])
def test_a_real_browser_shows_both_modes_within_the_page(unfinished, tmp_path, width):
    path = tmp_path / "page.html"
    page = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", render("x", unfinished.evaluation))
    path.write_text(page.replace("</body>", PROBE), "utf-8")
    dom, asked = chromium(path, tmp_path, width=width, scheme=1)
    seen = json.loads(re.search(r"<title>(.*?)</title>", dom)[1])
    assert seen["wide"] <= 0
    assert seen["small"] == seen["hidden"] == 0
    assert asked == set()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["eval", "compare", "run"])
def test_a_template_without_a_switch_is_refused_before_the_model_is_loaded(command, models, monkeypatch, tmp_path):
    def never(*_, **__):
        pytest.fail("the model was loaded")

    monkeypatch.setattr("abliterate.workflow.session.load_model", never)
    others = ["--out", str(tmp_path / "out")] if command == "run" else [str(models["none"])]
    shown = CliRunner().invoke(app, [command, str(models["none"]), *others, "--thinking", "both"])
    assert shown.exit_code == 2
    assert "no switch for thinking" in shown.stderr
    assert not list(tmp_path.iterdir())


def test_another_model_without_a_switch_is_refused_as_well(models, monkeypatch):
    monkeypatch.setattr("abliterate.workflow.session.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(UsageError, match="no switch for thinking"):
        abliterate.compare(models["quiet"], [models["none"]], Recipe(**SOURCES, thinking="on"))


def test_other_words_are_no_modes():
    with pytest.raises(RecipeError, match="thinking"):
        Recipe().with_changes({"thinking": "sometimes"})
