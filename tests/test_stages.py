"""The commands of the stages on the bundled model, one after the other: the same result as one ``run``."""

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from abliterate.checkpoint.direction_file import load
from abliterate.cli.app import app
from abliterate.model.forward import see_residuals
from abliterate.recipe import Recipe, load_recipe
from abliterate.workflow import finding
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
    recipe.write_text(PROMPTS + "filter_prompts = false\n")
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
    monkeypatch.setattr(finding, "available_bytes", lambda: 2**20)
    short = CliRunner().invoke(app, [*map(str, options), "--covariance", "no.safetensors"])
    assert short.exit_code == 2
    assert "covariances of 8 layers of width 128 take 0.00 GiB" in short.stderr
    assert not (here / "no.safetensors").exists()


def test_out_of_core_the_commands_say_what_it_costs(here, monkeypatch):
    monkeypatch.chdir(here)
    done = abliterate("measure", "tiny-chat", "--recipe", "few.toml", "--memory", "36MiB", "--out", "again.safetensors")
    assert "they stay on disk, and each block is read once for all batches" in done.stderr
    assert "will be read about 4 times (measure 4)" in done.stderr
    options = ("--direction", "whole/abliterate/direction.safetensors", "--ablate", "--memory", "36MiB")
    question = prompts_of(with_default_prompts(None, Recipe())).harmful_test.texts[0]
    replies = [abliterate("chat", "tiny-chat", *options[:count], input=question + "\n") for count in (3, 5, 0)]
    assert "they stay on disk" in replies[1].stderr
    assert replies[0].stdout == replies[1].stdout != replies[2].stdout
