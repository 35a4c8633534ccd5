"""The commands of the stages on the bundled model, one after the other: the same result as one ``run``."""

import json

import pytest
from typer.testing import CliRunner

from abliterate.cli.app import app
from abliterate.directions import load

PROMPTS = """
n_train = 12
n_val = 4
n_test = 4
max_new_tokens = 6
refusal_tokens = ["I"]
"""


def abliterate(*args):
    done = CliRunner().invoke(app, [str(arg) for arg in args])
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


def test_out_of_core_the_commands_say_what_it_costs(here, monkeypatch):
    monkeypatch.chdir(here)
    done = abliterate("measure", "tiny-chat", "--recipe", "few.toml", "--memory", "36MiB", "--out", "again.safetensors")
    assert "they stay on disk, and each layer is read once for all batches" in done.stderr
    assert "will be read about 4 times (measure 4)" in done.stderr
