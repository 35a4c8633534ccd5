"""The command line: two lines for every failure, one document for every ``--json``, nothing slow before ``--help``."""

import errno
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

from abliterate import __version__
from abliterate.cli.app import COMMANDS as GROUPS
from abliterate.cli.app import app
from abliterate.cli.failures import explain
from abliterate.cli.options import default_out, parse_size
from abliterate.cli.recipe_options import flag_of, takes
from abliterate.errors import UsageError
from abliterate.options import Trait
from abliterate.recipe import SECTION_OF, SECTIONS, Recipe, load_recipe, option
from tests import checkpoints, factories
from tests.checkpoints import INDEX, write_llama

COMMANDS = [command.name for command in app.registered_commands]


def run(*args, **options):
    return CliRunner().invoke(app, [str(arg) for arg in args], **options)


def in_a_shell(*args, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-m", "abliterate", *map(str, args)],
        cwd=cwd, env={**os.environ, **environment}, capture_output=True, check=False,
    )  # fmt: skip


def two_lines(result, code, says):
    """The contract of every failure: red line, next step, exit code, silence on stdout."""
    lines = result.stderr.splitlines()
    assert result.exit_code == code, result.stderr
    assert len(lines) == 2, result.stderr
    assert lines[0].startswith("error: ")
    assert says in lines[0]
    assert lines[1].startswith("       ")
    assert lines[1].strip()
    assert result.stdout == ""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders of every kind, and a direction."""
    here = tmp_path_factory.mktemp("world")
    write_llama(here / "base", shards=2)
    write_llama(here / "tied", head=False, tied=True)
    checkpoints.edit(here / "base", here / "edited")
    hostile = write_llama(here / "hostile", shards=2)
    document = json.loads((hostile / INDEX).read_text())
    document["weight_map"]["model.norm.weight"] = "../base/model-00001-of-00002.safetensors"
    (hostile / INDEX).write_text(json.dumps(document))
    shard = write_llama(here / "truncated") / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    unknown = write_llama(here / "unknown") / "config.json"
    unknown.write_text(json.dumps({**checkpoints.llama_config(), "model_type": "mamba"}))
    pickled = write_llama(here / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    nan = write_llama(here / "nan")
    checkpoints.overwrite(nan, "model.embed_tokens.weight", torch.full((44, 32), float("nan"), dtype=torch.bfloat16))
    save_file({"direction": checkpoints.directions()[:, 0].float()}, here / "d.safetensors")
    save_file({"direction": torch.zeros(32)}, here / "zero.safetensors")
    save_file({"direction": torch.ones(31)}, here / "narrow.safetensors")
    (here / "bad.toml").write_text("n_trian = 1")
    (here / "misplaced.toml").write_text('[find]\ntied = "keep"')
    (here / "few.txt").write_text("a\nb\n")
    return here


@pytest.fixture
def here(world, monkeypatch):
    monkeypatch.chdir(world)
    return world


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command):
    shown = run(command, "--help")
    assert shown.exit_code == 0
    assert f"Example: abliterate {command}" in " ".join(shown.stdout.split())


def test_the_root_lists_every_command_under_a_heading():
    shown = run("--help").stdout
    everything = {name for group in GROUPS.values() for name in group}
    assert everything == typer.main.get_command(app).commands.keys()
    assert all(shown.count(f"\n  {name} ") == 1 for name in everything)
    assert all(f"\n{heading}:\n" in shown for heading in GROUPS)


def test_the_readme_names_every_command():
    text = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
    table = text.partition("## Commands")[2].partition("\n## ")[0]
    missing = [name for group in GROUPS.values() for name in group if not re.search(rf"`(abliterate )?{name}\b", table)]
    assert missing == []


def test_the_root_lists_every_command_and_the_version():
    shown = run("--help").stdout
    assert all(f"\n  {command}" in shown for command in COMMANDS)
    assert run("--version").stdout == f"abliterate {__version__}\n"


@pytest.mark.parametrize("args", [["--help"], ["run", "--help"], ["recipes"], ["architectures"]], ids=" ".join)
def test_looking_around_does_not_import_torch(args):
    code = (
        "import sys\nfrom abliterate.cli.app import app\n"
        f"try:\n    app({args!r})\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'safetensors'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-1] == "[]"


# --- options of the recipe --------------------------------------------------------------------------------------------

OFFERED = [name for name in SECTION_OF if Trait.FILE_ONLY not in option(name).metadata]


@functools.cache
def options_of(command):
    """The parameters of a command as Typer made them, by name."""
    return {its.name: its for its in typer.main.get_command(app).commands[command].params}


def test_every_flag_is_one_option_of_the_recipe():
    flags = [flag_of(name).name for name in OFFERED]
    assert len(set(flags)) == len(flags)
    for command in COMMANDS:
        for name, its in options_of(command).items():
            for flag in set(its.opts) & set(flags):
                assert flag == flag_of(name).name, command


@pytest.mark.parametrize("name", OFFERED)
def test_an_option_is_offered_with_the_help_text_of_its_field(name):
    """``run`` has them all; where another command has one, it is the same."""
    assert name in options_of("run")
    for its in (options_of(command).get(name) for command in COMMANDS):
        if its is not None:
            assert its.help == option(name).description
            assert its.opts == [flag_of(name).name]
            assert its.default is None


def test_what_stands_in_files_only_is_offered_nowhere():
    hidden = SECTION_OF.keys() - set(OFFERED)
    assert hidden == {
        "n_train", "n_val", "n_test", "seed", "filter_prompts", "reply_tokens", "max_kl_nats", "kl_margin",
        "min_induce", "prune_layers", "train_steps", "startup_trials",
    }  # fmt: skip
    assert not any(hidden & options_of(command).keys() for command in COMMANDS)
    with pytest.raises(ValueError, match="seed stands in recipe files only"):
        takes("seed")


TAKEN = {
    "measure": ["find", "model"],
    "select": ["find", "change", "roles", "exclude_layers", "strength", "model"],
    "edit": ["edit", "memory_bytes", "publish"],
    "push": ["publish"],
    "plan": ["tied", "mtp", "allow_partial", "roles", "exclude_layers", "strength"],
    "reproduce": ["trust_remote_code"],
    "eval": ["harmful", "harmless", "model", "evaluate"],
    "diff": [],
    "dequantize": [],
}


@pytest.mark.parametrize("command", TAKEN)
def test_a_command_has_the_options_of_its_stages(command):
    expected = {its for name in TAKEN[command] for its in (SECTIONS[name].model_fields if name in SECTIONS else [name])}
    expected -= {its for its in expected if Trait.OF_PROCESSES in option(its).metadata}  # other than `run`: one process
    assert options_of(command).keys() & SECTION_OF.keys() == expected & set(OFFERED)


@pytest.fixture
def seen():
    """A small application, and what its command was given."""
    small, found = typer.Typer(), {}

    @small.command()
    @takes("find", "edit", "model", "tasks", file=True)
    def command(name: str, *, recipe: Recipe, given: dict, last: bool = False) -> None:
        found.update(name=name, recipe=recipe, given=given, last=last)

    def call(*args):
        done = CliRunner().invoke(small, [str(arg) for arg in args])
        return done, found

    return call


def test_flags_win_over_the_file_and_the_file_over_the_defaults(seen, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('[find]\nn_train = 7\nharmful = "a"\n[edit]\nmtp = false\ntied = "keep"\n')
    done, found = seen("x", "--recipe", file, "--harmful", "b", "--memory", "2GiB", "--mtp", "--last")
    assert (done.exit_code, done.stderr) == (0, "")
    assert found["given"] == {"harmful": "b", "memory_bytes": 2**31, "mtp": True}
    assert found["recipe"] == Recipe(n_train=7, harmful="b", tied="keep", memory_bytes=2**31)
    assert (found["name"], found["last"]) == ("x", True)


def test_words_of_a_flag_are_taken_apart(seen):
    _, found = seen("x", "--tasks", " a, b,,a ", "--refusal-token", "I", "--refusal-token", "As an, AI")
    assert found["given"] == {"tasks": ("a", "b"), "refusal_tokens": ("I", "As an, AI")}
    assert seen("x", "--tasks", "")[1]["given"] == {"tasks": ()}
    assert seen("x")[1]["recipe"] == Recipe()


def test_an_old_recipe_is_read_with_a_note(here, tmp_path):
    old = tmp_path / "old.toml"
    old.write_text("n_train = 1\nn_val = 1\nn_test = 1\nbatch_size = 2\n")
    done = run("run", "--dry-run", "--recipe", old)
    assert done.exit_code == 0
    (note,) = done.stderr.splitlines()
    assert note == (
        f"note: {old} has the old form, and is read all the same; options now stand in tables: "
        "[find] n_train, n_val, n_test; [model] batch_size"
    )
    assert "harmful train: 1 prompts" in done.stdout
    new = tmp_path / "new.toml"
    new.write_text("[find]\nn_train = 1\nn_val = 1\nn_test = 1\n[model]\nbatch_size = 2\n")
    assert run("run", "--dry-run", "--recipe", new).stderr == ""
    assert run("run", "--dry-run", "--recipe", new).stdout == done.stdout


def test_private_in_a_recipe_is_no_wish_to_upload(here, tmp_path):
    (tmp_path / "mine.toml").write_text("[find]\nn_train = 1\nn_val = 1\nn_test = 1\n[publish]\nprivate = true\n")
    asked = ("run", "--dry-run", "--recipe", tmp_path / "mine.toml")
    assert run(*asked).exit_code == 0
    two_lines(run(*asked, "--private"), 2, "--private says how to upload")


# --- failures ---------------------------------------------------------------------------------------------------------

EDIT = ("edit", "base", "d.safetensors")
FAILURES = [
    (("plan", "unknown"), 3, "model_type 'mamba' is not in the registry"),
    (("plan", "pickled"), 3, "the weights are pickled"),
    (("plan", "./missing"), 5, "./missing: no such folder"),
    (("plan", "hostile"), 5, "'../base/model-00001-of-00002.safetensors' is not a plain .safetensors file name"),
    (("plan", "truncated"), 5, "model.safetensors: truncated"),
    (("plan", "base", "--tied", "both"), 2, "tied"),
    (("diff", "base", "truncated"), 5, "model.safetensors: truncated"),
    (("edit", "truncated", "d.safetensors", "--out", "new"), 5, "model.safetensors: truncated"),
    (("edit", "nan", "d.safetensors", "--out", "new"), 5, "'model.embed_tokens.weight' holds NaN"),
    (("edit", "base", "missing.safetensors"), 5, "missing.safetensors: not a readable direction file"),
    (("edit", "base", "zero.safetensors"), 5, "zero.safetensors: the direction is zero"),
    (("edit", "base", "narrow.safetensors", "--out", "wrong width"), 5, "31 components, base has 32"),
    ((*EDIT, "--out", "edited"), 2, "edited: exists already"),
    ((*EDIT, "--out", "base/inside"), 2, "lies inside the source"),
    ((*EDIT, "--memory", "1x"), 2, "'1x' is not a size"),
    ((*EDIT, "--memory", "1000"), 2, "memory_bytes"),
    ((*EDIT, "--position", "-1"), 2, "--position and --layer belong together"),
    ((*EDIT, "--candidate", "no/-1/0"), 2, "there is no candidate 'no/-1/0'"),
    ((*EDIT, "--candidate", "no/-1/0", "--position", "-1", "--layer", "0"), 2, "each take a candidate"),
    ((*EDIT, "--position", "-1", "--layer", "7"), 2, "no candidate at position -1, layer 7"),
    (("chat", "base", "--ablate"), 2, "need a direction"),
    (("chat", "base", "--ablate", "--add", "--direction", "d.safetensors"), 2, "exclude each other"),
    (("verify", "base"), 5, "has no abliterate.json"),
    (("verify", "./missing"), 5, "has no abliterate.json"),
    (("run", "base", "--dry-run", "--recipe", "bad.toml"), 2, "bad.toml: n_trian"),
    (("run", "base", "--recipe", "misplaced.toml"), 2, "misplaced.toml: find.tied: no such option here"),
    (("run", "base", "--dry-run", "--harmful", "few.txt"), 2, "two prompt sources are needed"),
    (("run", "base", "--dry-run", "--harmful", "few.txt", "--harmless", "d.txt"), 2, "few.txt: holds 2 prompts"),
    (("run", "base", "--dry-run", "--out", "edited"), 2, "edited: exists already"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("args", "code", "says"), FAILURES, ids=lambda value: " ".join(value) if isinstance(value, tuple) else None
)
def test_a_failure_is_two_lines_and_its_code(args, code, says, here):
    two_lines(run(*args), code, says)


def test_a_failure_in_a_real_pipe_is_two_lines_as_well(world):
    shown = in_a_shell("plan", "truncated", cwd=world)
    assert (shown.returncode, shown.stdout) == (5, b"")
    assert len(shown.stderr.splitlines()) == 2
    assert b"\x1b" not in shown.stderr


@pytest.mark.parametrize(
    "args", [["plan", "--nonsense"], ["frobnicate"], ["edit"], ["diff", "base"], ["plan", "a", "b"]]
)
def test_a_wrong_command_line_is_usage(args, here):
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("Usage: ")


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 6, "interrupted"),
        (RuntimeError("boom [/x]\n  twice"), 1, "unexpected RuntimeError: boom [/x] twice"),
        (OSError(errno.ENOSPC, "No space left on device"), 3, "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "x.bin"), 5, "x.bin: Permission denied"),
        (MemoryError(), 1, "out of memory"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_whatever_is_raised_becomes_two_lines(error, code, says, here, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("abliterate.editing.planning.plan", fail)
    result = run("plan", "base")
    two_lines(result, code, says)
    assert ("this is a bug" in result.stderr) == isinstance(error, RuntimeError)


def test_debugging_shows_the_traceback(here, monkeypatch):
    monkeypatch.setattr("abliterate.editing.planning.plan", lambda *args, **kwargs: 1 / 0)
    assert "Traceback" in run("plan", "base", env={"ABLITERATE_DEBUG": "1"}).stderr
    assert "Traceback" not in run("plan", "base").stderr


@pytest.mark.parametrize("name", ["[bold]x[/red]", ":rocket:", "Zürich", "with space", "x" * 200])
def test_any_folder_name_is_shown_as_it_is(name, here, tmp_path):
    assert run(*EDIT, "--out", tmp_path / name).stdout.splitlines()[-2] == f"written: {tmp_path / name}"
    assert name in run("plan", tmp_path / name, "--tensors").stdout.replace("\n", "")
    two_lines(run("plan", f"./{name}"), 5, f"./{name}: no such folder")
    failed = run("run", f"./{name}").stderr.splitlines()
    assert failed[-2] == f"error: ./{name}: no such folder"


# --- results ----------------------------------------------------------------------------------------------------------


def no_constants(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize(
    ("args", "key"),
    [
        (("plan", "base"), "writers"),
        (("plan", "tied", "--tied", "keep"), "writers"),
        (("diff", "base", "edited"), "only_writers"),
        (("diff", "base", "nan"), "changed"),
        (("recipes",), "arditi-2024"),
        (("methods",), None),
        (("architectures",), None),
        ((*EDIT, "--out", "as json"), "out"),
    ],
    ids=str,
)
def test_json_is_one_document_and_nothing_else(args, key, here):
    result = run(*args, "--json")
    assert result.exit_code == 0, result.stderr
    document = no_constants(result.stdout)
    assert document if key is None else key in document
    assert result.stdout.endswith("\n")


def test_an_edit_then_a_diff_then_a_verification(here, tmp_path):
    assert run("edit", "tied", "d.safetensors", "--out", tmp_path / "out", "--memory", "64MiB").exit_code == 0
    difference = no_constants(run("diff", "tied", tmp_path / "out", "--json").stdout)
    assert difference["only_writers"] is True
    assert difference["added"] == ["lm_head.weight"]
    verified = run("verify", tmp_path / "out", "--bytes-only", "--json")
    assert (verified.exit_code, no_constants(verified.stdout)["ok"]) == (0, True)
    checkpoints.overwrite(tmp_path / "out", "model.norm.weight", torch.ones(32, dtype=torch.bfloat16))
    failed = run("verify", tmp_path / "out", "--bytes-only")
    assert failed.exit_code == 4
    assert "'model.norm.weight' changed" in failed.stderr


def test_results_go_to_stdout_and_progress_to_stderr(here):
    shown = run("diff", "base", "edited")
    assert "compare: " in shown.stderr
    assert "compare: " not in shown.stdout
    assert "exactly the 5 writers of the residual stream changed" in shown.stdout


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_pipe_of_any_encoding_is_served(encoding, world):
    shown = in_a_shell("diff", "base", "edited", "--top", "1", cwd=world, PYTHONIOENCODING=encoding)
    assert (shown.returncode, b"and 4 more" in shown.stdout) == (0, True), shown.stderr


def test_a_reader_that_stops_early_is_no_failure(world):
    process = subprocess.Popen(
        [sys.executable, "-m", "abliterate", "architectures", "--json"],
        cwd=world, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    process.wait()


# --- small parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512MiB", 512 * 2**20), ("2GiB", 2**31), ("2GB", 2 * 10**9), ("1000000", 10**6), ("1.5 GiB", 3 * 2**29),
        ("64k", 64_000), ("64KiB", 65_536), ("1tib", 2**40), (" 7B ", 7), ("512mb", 512 * 10**6),
    ],
)  # fmt: skip
def test_sizes(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "MiB", "-1GB", "1x", "1e9", "1GiBB", "1,000", "nan", "1 2"])
def test_what_is_no_size(text):
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("model", "expected"),
    [(None, "tiny-chat"), ("owner/model", "model"), ("/a/b/", "b"), ("C:\\m\\x", "x"), ("./here", "here")],
)
def test_the_default_output_is_named_after_the_model(model, expected):
    assert str(default_out(model)) == f"{expected}-abliterated"


def test_a_guess_shows_a_draft_and_changes_nothing(here):
    result = run("plan", "unknown", "--guess")
    assert "It is not applied" in result.stdout
    assert "o_proj writes in" in result.stdout
    assert "q_proj reads in" in result.stdout
    assert 'role = "attention out"' in result.stdout
    assert run("plan", "unknown").exit_code == 3


def test_a_plan_with_a_direction_shows_how_close_the_edit_comes_behind_norms(tmp_path):
    gemma = factories.save(factories.build("gemma2"), tmp_path / "gemma")
    llama = factories.save(factories.build("llama"), tmp_path / "llama")
    file = factories.save_direction(48, tmp_path / "r.safetensors")
    shown = run("plan", str(gemma), "--direction", str(file)).stdout
    assert "predicted error" in shown
    assert shown.count("MLP out") == 1 + 3
    assert "exact whatever the direction" in run("plan", str(llama), "--direction", str(file)).stdout


def test_an_interruption_names_the_command_that_continues(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/abliterate", "run", "a model", "--out", "x"])
    failure = explain(KeyboardInterrupt())
    assert failure.exit_code == 6
    assert failure.hint.endswith("abliterate run 'a model' --out x")


def test_quick_is_a_recipe():
    small, found = typer.Typer(), {}

    @small.command()
    @takes("evaluate", file=True, method=True, quick=True)
    def command(*, recipe: Recipe) -> None:
        found["recipe"] = recipe

    def call(*args):
        return CliRunner().invoke(small, args)

    assert call("--quick", "--max-new-tokens", "7").exit_code == 0
    assert found["recipe"] == load_recipe("quick").with_changes({"max_new_tokens": 7})
    assert "Quick look" in found["recipe"].title
    assert isinstance(call("--quick", "--recipe", "arditi-2024").exception, UsageError)
    assert isinstance(call("--quick", "--method", "projected").exception, UsageError)
    assert isinstance(call("--method", "quick").exception, UsageError)
    assert call("--method", "projected").exit_code == 0
    assert found["recipe"] == load_recipe("projected")
    assert call().exit_code == 0
    assert found["recipe"] == Recipe()
