"""The commands of the stages on the bundled model, one after the other: the same result as one ``run``."""

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from abliterate import api
from abliterate.checkpoint.direction_file import load
from abliterate.cli.app import app
from abliterate.errors import TooFewPromptsError
from abliterate.events import Noted
from abliterate.model.forward import see_residuals
from abliterate.model.measuring import Filtered
from abliterate.publishing import manifest
from abliterate.recipe import Recipe, load_recipe
from abliterate.workflow import finding, reading
from abliterate.workflow.session import open_session, prompts_of, with_default_prompts

PROMPTS = """
[evaluate]
max_new_tokens = 6
[find]
n_train = 12
n_val = 4
n_test = 4
refusal_tokens = ["I"]
"""


def abliterate(*args, **options):
    done = CliRunner().invoke(app, [str(arg) for arg in args], **options)
    assert done.exit_code == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    (folder / "few.toml").write_text(PROMPTS)
    return folder


def test_the_stages_one_by_one_make_what_run_makes(here, monkeypatch):
    monkeypatch.chdir(here)
    measured = json.loads(abliterate("measure", "tiny-chat", "--recipe", "few.toml", "--json").stdout)
    assert measured["kept"] == {"harmful_train": 12, "harmless_train": 12}
    assert load(here / "candidates.safetensors").choice is None
    shown = abliterate("select", "tiny-chat", "candidates.safetensors", "--recipe", "few.toml").stdout
    assert "by rule arditi-2024" in shown
    assert sorted(path.name for path in here.iterdir()) == [
        "candidates.safetensors", "direction.safetensors", "few.toml",
    ]  # fmt: skip
    abliterate("edit", "tiny-chat", "direction.safetensors", "--out", "staged")
    abliterate("verify", "staged")
    abliterate("eval", "tiny-chat", "staged", "--recipe", "few.toml", "--json")
    abliterate("run", "--recipe", "few.toml", "--out", "whole")
    assert load(here / "direction.safetensors").choice == load(here / "whole/abliterate/direction.safetensors").choice
    for path in sorted((here / "whole").glob("*.safetensors")):
        assert path.read_bytes() == (here / "staged" / path.name).read_bytes()
    assert len([*(here / "whole").glob("*.safetensors")]) == 2


def test_covariances_are_those_of_the_activations(here, monkeypatch):
    monkeypatch.chdir(here)
    recipe = here / "raw.toml"
    recipe.write_text(PROMPTS + 'filter_prompts = false\nestimators = ["difference-of-means"]\n')
    options = ("measure", "tiny-chat", "--recipe", recipe)
    abliterate(*options, "--out", "raw.safetensors", "--covariance", "spread.safetensors")
    session = open_session(None, load_recipe(str(recipe)))
    texts = session.contrast.harmful_train.texts
    values = torch.empty(len(texts), 8, 128, dtype=torch.float64)

    def see(rows, layer, its):
        values[list(rows), layer] = its[:, -1].double()

    see_residuals(session.loaded, session.chat, texts, 1, see, batch_size=len(texts))
    found = load_file(here / "spread.safetensors")
    assert found["harmful_covariance"].shape == (8, 128, 128)
    for layer in range(8):
        expected = values[:, layer].T.cov()
        assert torch.allclose(found["harmful_covariance"][layer].double(), expected, atol=1e-6 * float(expected.max()))
    difference = found["harmful_mean"] - found["harmless_mean"]
    raw = load(here / "raw.safetensors")
    assert torch.allclose(torch.stack([raw.candidate(-1, layer) for layer in range(8)]), difference, atol=1e-4)
    monkeypatch.setattr(reading, "available_bytes", lambda: 2**20)
    short = CliRunner().invoke(app, [*map(str, options), "--covariance", "no.safetensors"])
    assert short.exit_code == 2
    assert "covariances of 8 layers of width 128 take 0.00 GiB" in short.stderr
    assert not (here / "no.safetensors").exists()


def test_out_of_core_the_commands_say_what_it_costs(here, monkeypatch):
    monkeypatch.chdir(here)
    done = abliterate("measure", "tiny-chat", "--recipe", "few.toml", "--memory", "36MiB", "--out", "again.safetensors")
    assert "they stay on disk, and each block is read once for all batches" in done.stderr
    assert "will be read about 32 times (measure 32)" in done.stderr
    options = ("--direction", "whole/abliterate/direction.safetensors", "--ablate", "--memory", "36MiB")
    question = prompts_of(with_default_prompts(None, Recipe())).harmful_test.texts[0]
    replies = [abliterate("chat", "tiny-chat", *options[:count], input=question + "\n") for count in (3, 5, 0)]
    assert "they stay on disk" in replies[1].stderr
    assert replies[0].stdout == replies[1].stdout != replies[2].stdout


# --- how many prompts a direction rests on --------------------------------------------------------------------------


def _kept(harmful, harmless, before=128):
    return Filtered(harmful=("a",) * harmful, harmless=("b",) * harmless, harmful_before=before, harmless_before=before)


def test_a_handful_of_prompts_is_refused_unless_asked_for():
    with pytest.raises(TooFewPromptsError, match="3 of 128 harmful and 128 of 128 harmless") as raised:
        finding.few_kept("some-model", _kept(3, 128), allow_few=False)
    assert raised.value.exit_code == 3
    assert "--allow-few" in raised.value.hint
    assert "3 of 128 harmful" in finding.few_kept("some-model", _kept(3, 128), allow_few=True)


@pytest.mark.parametrize(
    ("harmful", "harmless", "said"), [(31, 128, True), (128, 31, True), (32, 32, False), (8, 128, True)]
)
def test_few_prompts_are_said_with_what_to_do(harmful, harmless, said):
    warning = finding.few_kept("some-model", _kept(harmful, harmless), allow_few=False)
    assert bool(warning) == said
    if said:
        assert f"{harmful} of 128 harmful and {harmless} of 128 harmless" in warning
        assert "give more prompts" in warning


def test_who_brings_few_prompts_has_asked_for_few():
    assert finding.few_kept("some-model", _kept(4, 4, before=4), allow_few=False)
    with pytest.raises(TooFewPromptsError):
        finding.few_kept("some-model", _kept(3, 4, before=4), allow_few=False)


def test_halves_are_drawn_by_seed_and_make_up_the_whole():
    first = reading.half_of(9, seed=42)
    assert len(first) == 4
    assert first == reading.half_of(9, seed=42) != reading.half_of(9, seed=43)
    assert reading.half_of(1, seed=42) == frozenset()
    values = torch.randn(9, 3, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, half = values.mean(0), values[sorted(first)].mean(0)
    ours, others = reading.halves_of(mean, half, 9, len(first))
    rest = [row for row in range(9) if row not in first]
    assert torch.allclose(others.mean, values[rest].mean(0))
    assert (ours.count, others.count) == (4, 5)


def test_a_run_says_what_its_direction_rests_on(tmp_path):
    notes = []
    recipe = Recipe(n_train=16, n_val=4, n_test=4, max_new_tokens=8)
    result = api.run(None, tmp_path / "out", recipe, on_event=notes.append)
    document = manifest.read(result.out)
    kept = document["direction"]["measurement"]["kept"]
    assert kept["harmful_train"] <= document["direction"]["measurement"]["of"]["harmful_train"] == 16
    assert 0.8 < document["direction"]["stability"] <= 1
    assert result.directions.stability == document["direction"]["stability"]
    card = (result.out / "README.md").read_text()
    assert f"Measured on {kept['harmful_train']} of 16 harmful and" in card
    assert "two random halves of them agree to a cosine of 0." in card
    assert any("measured on few prompts" in event.text for event in notes if isinstance(event, Noted))
