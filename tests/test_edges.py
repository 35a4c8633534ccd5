"""What users bring: small changes of the bundled model, each standing for a kind of checkpoint or prompt that is about.

The right behaviour is to do it, or to refuse it in two lines that say what is wrong with what.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from io import StringIO

import pytest
import torch
from rich.table import Table
from rich.text import Text
from tokenizers import AddedToken
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from abliterate.checkpoint import opening
from abliterate.checkpoint.locking import Lock
from abliterate.cli.app import app, main
from abliterate.cli.console import Plain
from abliterate.cli.process import prepare_streams, stop_on_signals
from abliterate.data.bundled import model_path
from abliterate.errors import PromptError
from abliterate.model.load import load_tokenizer
from abliterate.model.replying import generate
from abliterate.model.thinking import DEFAULT
from abliterate.recipe import Recipe
from abliterate.workflow.session import open_session
from tests import checkpoints, factories
from tests.edge_tools import SOURCES, rewrite, run


@pytest.fixture
def model(tmp_path):
    """A copy of the bundled model, to be changed."""
    return shutil.copytree(model_path(), tmp_path / "model")


def tokenizer_of(folder):
    return PreTrainedTokenizerFast.from_pretrained(folder)


def notes_of(model, **recipe):
    """A session, and what it says."""
    said = []
    session = open_session(model, Recipe(**{**SOURCES, **recipe}), on_event=lambda event: said.append(str(event)))
    return session, said


# --- ids and positions that the model does not have -------------------------------------------------------------------


def test_a_token_without_a_row_is_named(model):
    changed = tokenizer_of(model)
    changed.add_tokens([AddedToken(f"<|{n}|>", special=True) for n in range(623, 701)])
    changed.chat_template += "{{ '<|700|>' }}"
    changed.save_pretrained(model)
    shown = run("measure", model, "--harmful", "bundled:tiny-chat", "--harmless", "bundled:tiny-chat")
    assert shown.exit_code == 5
    assert "token '<|700|>' has the id 700, and the embedding has 623 rows" in shown.stderr
    assert "do not belong together" in shown.stderr


def test_a_padding_token_without_a_row_is_not_used(model):
    changed = tokenizer_of(model)
    changed.add_special_tokens({"pad_token": "<|padding|>"})
    assert changed.pad_token_id >= 623
    changed.save_pretrained(model)
    session, _ = notes_of(model)
    assert session.chat.pad_id == changed.eos_token_id
    replies = generate(session.loaded, session.chat, ["Hi", "What is a lake?"], max_new_tokens=2)
    assert len(replies) == 2


LONG_PROMPT = "Tell me about it. " + "word " * 900


@pytest.fixture
def prompts(tmp_path):
    """Sixty prompts, one of them far beyond the context of the bundled model."""
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([LONG_PROMPT, *(f"What is the name of town {n} by lake {n * n}?" for n in range(59))]))
    return path


def test_prompts_beyond_the_context_are_left_out_and_counted(model, prompts):
    session, said = notes_of(model, harmful=str(prompts))
    parts = {name: its for name, its in session.contrast.hashes().items() if "harmful_" in name}
    assert sum(its["too_long"] for its in parts.values()) == 1
    assert LONG_PROMPT.strip() not in session.contrast.harmful_train.texts
    (note,) = [text for text in said if "left out" in text]
    assert "1 of" in note
    assert "exceed the context of 128 tokens" in note
    assert "Tell me about it." in note
    with pytest.raises(PromptError, match=r"a prompt takes .* tokens, and the context holds 128: 'Tell me"):
        session.chat.encode(LONG_PROMPT)


def test_prompts_that_are_all_beyond_the_context_are_refused(model, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("\n".join(f"{n} {'word ' * 200}{n * n}" for n in range(12)))
    shown = run("measure", model, "--harmful", path, "--harmless", "bundled:tiny-chat")
    assert shown.exit_code == 2
    assert "long.txt" in shown.stderr
    assert "exceed the context of 128 tokens" in shown.stderr


@pytest.mark.parametrize(
    ("file", "key"), [("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")]
)
def test_the_context_is_the_least_that_is_stated(model, file, key):
    rewrite(model / file, **{key: 40})
    assert notes_of(model)[0].chat.context == 40


def test_a_prompt_far_longer_than_the_rest_is_pointed_out(model, prompts):
    rewrite(model / "config.json", max_position_embeddings=4096)
    rewrite(model / "tokenizer_config.json", model_max_length=10**30)
    session, said = notes_of(model, harmful=str(prompts))
    assert session.fitting(session.contrast.harmless_test) == session.contrast.harmless_test
    (note,) = [text for text in said if "longest prompt" in text]
    assert "prompts.txt" in note


def test_a_model_with_learned_positions_stops_where_they_end(model):
    config = GPT2Config(vocab_size=623, n_positions=40, n_embd=32, n_layer=2, n_head=2, eos_token_id=[], bos_token_id=1)
    torch.manual_seed(0)
    factories.save(GPT2LMHeadModel(config), model.with_name("gpt2"), dtype=torch.float32)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(model / name, model.with_name("gpt2"))
    session, _ = notes_of(model.with_name("gpt2"))
    length = session.chat.length("What is a lake?")
    assert length < 40
    found = session.loaded, session.chat, ["What is a lake?"]
    assert generate(*found, max_new_tokens=100)[0]


# --- where the chat template lies -------------------------------------------------------------------------------------


def test_a_template_beside_the_tokenizer_is_found(model):
    wanted = (model / "chat_template.jinja").read_text("utf-8")
    (model / "chat_template.jinja").unlink()
    assert not load_tokenizer(model).chat_template
    named = {"chat": wanted, "tool_use": "{{ messages }}"}
    listed = [{"name": name, "template": its} for name, its in named.items()]
    for file, held in [
        ("chat_template.json", wanted),
        ("processor_config.json", named),
        ("chat_template.json", listed),
    ]:
        (model / file).write_text(json.dumps({"chat_template": held}))
        assert load_tokenizer(model).chat_template == wanted
        (model / file).unlink()
    rewrite(model / "tokenizer_config.json", chat_template=listed)
    session, _ = notes_of(model)
    assert session.encoder_in(DEFAULT).encode("Hi")


def test_several_templates_without_a_default_are_named(model):
    (model / "chat_template.jinja").unlink()
    listed = [{"name": name, "template": "{{ messages }}"} for name in ("short", "long", "rag")]
    rewrite(model / "tokenizer_config.json", chat_template=listed)
    with pytest.raises(PromptError, match="has the chat templates long, rag, short, and none of them is the default"):
        load_tokenizer(model)


# --- signals and streams ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs POSIX signals")
@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP", "SIGINT"])
@pytest.mark.parametrize("command", ["edit tiny-chat {d} --out o", "measure tiny-chat", "run tiny-chat --out o"])
def test_a_polite_kill_is_an_interrupt(command, number, tmp_path, monkeypatch, capfd):
    """Whatever the command is at when the signal comes: here, opening the model."""
    monkeypatch.chdir(tmp_path)
    arguments = command.format(d=factories.save_direction(128, tmp_path / "d.safetensors")).split()
    monkeypatch.setattr(opening, "open_folder", lambda *_, **__: os.kill(os.getpid(), getattr(signal, number)))
    monkeypatch.setattr(sys, "argv", ["abliterate", *arguments])
    default = signal.SIG_DFL
    handlers = {signal.SIGTERM: default, signal.SIGHUP: default, signal.SIGINT: signal.default_int_handler}
    before = {its: signal.signal(its, handler) for its, handler in handlers.items()}
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        for its, handler in before.items():
            signal.signal(its, handler)
    assert ended.value.code == 6
    *_, first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("error: interrupted")
    assert second.endswith(f"abliterate {' '.join(arguments)}")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs POSIX signals")
def test_what_nohup_ignores_stays_ignored():
    before = {its: signal.signal(its, signal.SIG_IGN) for its in (signal.SIGTERM, signal.SIGHUP)}
    try:
        stop_on_signals()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for its, handler in before.items():
            signal.signal(its, handler)


class Gone:
    """A pipe whose reader has gone."""

    encoding = "utf-8"

    def write(self, _):
        raise BrokenPipeError

    flush = isatty = lambda _: False

    def fileno(self):
        raise OSError


@pytest.mark.parametrize("command", ["plan tiny-chat --tensors", "plan tiny-chat --json", "recipes", "methods --json"])
def test_a_reader_that_has_seen_enough_hears_nothing(command, monkeypatch):
    class Runner(CliRunner):
        def isolation(self, *args, **kwargs):
            return without_stdout(super().isolation(*args, **kwargs))

    @contextmanager
    def without_stdout(isolated):
        with isolated as streams:
            monkeypatch.setattr(sys, "stdout", Gone())
            yield streams

    shown = Runner().invoke(app, command.split())
    assert (shown.exit_code, shown.stderr) == (141, "")


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
@pytest.mark.parametrize(("closed", "code"), [(">&-", 0), ("2>&-", 0), (">&- 2>&- <&-", 0), ("| head -1", 141)])
def test_closed_streams_and_a_closed_pipe(closed, code, tmp_path):
    script = f"set -o pipefail; {sys.executable} -m abliterate architectures --json {closed}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stderr == ""
    assert done.returncode in (code, 0)


def test_a_closed_stream_gives_its_number_to_the_null_device(monkeypatch):
    monkeypatch.setattr(os, "fstat", lambda number, stat=os.fstat: stat(99999 if number == 1 else number))
    opened = []
    monkeypatch.setattr(os, "open", lambda *args: opened.append(args))
    prepare_streams()
    assert opened == [(os.devnull, os.O_RDWR)]


# --- what is given instead of a checkpoint ----------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1677216\n"
SHARD = "model-00001-of-00002.safetensors"


def refused(code, says, hint, *args):
    """In two lines."""
    shown = run(*args)
    assert shown.exit_code == code, shown.stderr
    first, second = shown.stderr.splitlines()
    assert says in first
    assert hint in second


def test_an_adapter_is_named_as_such(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    refused(3, "a LoRA adapter of some/base, not a checkpoint", "merge it into its base", "plan", tmp_path)


@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_a_file_is_named_as_such(name, model):
    refused(5, f"{name}: is a file, not a checkpoint folder", "folder that holds it", "plan", model / name)


@pytest.mark.parametrize("name", [SHARD, "config.json", "model.safetensors.index.json"])
def test_a_git_lfs_pointer_is_named_as_such(name, model):
    (model / name).write_bytes(POINTER)
    refused(5, f"{name}: a Git LFS pointer, not the file itself", "git lfs pull", "plan", model)


def test_weights_of_eight_bits_are_named_as_such(tmp_path):
    shapes = checkpoints.llama_shapes(checkpoints.llama_config())
    tensors = checkpoints.random_tensors(shapes, torch.bfloat16)
    for name in [name for name, shape in shapes.items() if "_proj" in name]:
        tensors[name] = tensors[name].to(torch.int8)
        tensors[f"{name}_scale"] = torch.ones(shapes[name][0], 1, dtype=torch.bfloat16)
    settings = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    base = checkpoints.write(tmp_path / "m", checkpoints.llama_config(quantization_config=settings), tensors)
    says = "quantised by compressed-tensors are stored as BF16, I8, none as FP8 or MXFP4"
    refused(3, says, "take the checkpoint it was made from", "plan", base)


def test_a_small_disk_is_measured_in_small_units(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1_500_000}))
    direction = factories.save_direction(128, tmp_path / "d.safetensors")
    says = "needs 2.89 MB and 67.1 MB in reserve, the disk has 1.50 MB free"
    refused(3, says, "free some space", "edit", "tiny-chat", direction, "--out", tmp_path / "o")


# --- the same command twice -------------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from abliterate.checkpoint.locking import Lock
held = Lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def another(tmp_path):
    """Another process that is writing ``out``."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("command", ["edit tiny-chat {d} --out {out}", "measure tiny-chat --out {out}"])
def test_a_second_run_is_told_of_the_first_and_takes_over_when_that_is_dead(command, another, tmp_path):
    direction, out = factories.save_direction(128, tmp_path / "d.safetensors"), tmp_path / "out"
    arguments = command.format(d=direction, out=out).split()
    for _ in range(2):
        shown = run(*arguments)
        assert shown.exit_code == 2, shown.stderr
        assert re.search(rf"another run \(process {another.pid}, since 20..-.*\) is writing this", shown.stderr)
    assert not (tmp_path / "out.partial").exists()
    another.kill()
    another.wait()
    assert (tmp_path / ".out.lock").exists()
    Lock(out).release()
    assert not (tmp_path / ".out.lock").exists()
    if command.startswith("edit"):
        assert run(*arguments).exit_code == 0
    assert not (tmp_path / ".out.lock").exists()


# --- what is beside the edit ------------------------------------------------------------------------------------------


def test_an_adapter_is_not_copied_by_half(model, tmp_path):
    (model / "adapter_config.json").write_text("{}")
    (model / "adapter_model.safetensors").write_bytes(b"")
    (model / "other").mkdir()
    (model / "other" / "adapter_config.json").write_text("{}")
    direction = factories.save_direction(128, tmp_path / "d.safetensors")
    shown = run("plan", model)
    assert "not copied, as these hold unedited weights: adapter_config.json, adapter_model.safetensors" in shown.stdout
    assert run("edit", model, direction, "--out", tmp_path / "out").exit_code == 0
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert (tmp_path / "out" / "other" / "adapter_config.json").exists()
    assert run("verify", tmp_path / "out", "--bytes-only").exit_code == 0


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_what_is_not_finite_beside_the_edit_is_named(value, tmp_path):
    base = checkpoints.write_llama(tmp_path / "base")
    name = "model.layers.1.self_attn.q_proj.weight"
    weight = checkpoints.read(base, name).clone()
    weight[-1, -1] = float(value)
    checkpoints.overwrite(base, name, weight)
    assert f"! {name} holds NaN or infinity" in run("plan", base, "--values").stdout
    assert json.loads(run("plan", base, "--values", "--json").stdout)["not_finite"] == [name]
    assert "holds NaN" not in run("plan", base).stdout
    direction = factories.save_direction(32, tmp_path / "d.safetensors")
    shown = run("edit", base, direction, "--out", tmp_path / "out")
    assert shown.exit_code == 0
    assert "nor looked through for NaN and infinity" in shown.stdout
    shown = run("verify", tmp_path / "out", "--bytes-only")
    assert shown.exit_code == 0
    assert f"! {name} holds NaN or infinity, as in the base" in shown.stdout
    assert shown.stdout.count("holds NaN") == 1
    kept = json.loads((tmp_path / "out" / "abliterate.json").read_text())
    assert kept["verification"]["not_finite"] == [name]


def test_values_that_are_all_finite_are_said_to_be(tmp_path):
    assert "no value is NaN or infinite" in run("plan", checkpoints.write_llama(tmp_path / "base"), "--values").stdout


def test_a_proof_on_the_bytes_alone_says_so(tmp_path):
    base = checkpoints.write_llama(tmp_path / "base")
    direction = factories.save_direction(32, tmp_path / "d.safetensors")
    assert run("edit", base, direction, "--out", tmp_path / "out").exit_code == 0
    shown = run("verify", tmp_path / "out")
    assert shown.exit_code == 0
    assert "its behaviour is not compared" in shown.stderr
    assert "give --harmful and --harmless" in shown.stderr
    assert "not compared" not in run("verify", tmp_path / "out", "--bytes-only").stderr


def test_a_tied_head_that_differs_is_pointed_out(tmp_path):
    base = checkpoints.write_llama(tmp_path / "base", tied=True)
    says = "transformers and vLLM take the embedding, llama.cpp the stored head"
    assert says in " ".join(run("plan", base).stdout.split())
    checkpoints.overwrite(base, "lm_head.weight", checkpoints.read(base, "model.embed_tokens.weight"))
    assert says not in " ".join(run("plan", base).stdout.split())


def test_an_index_that_was_published_wrong_can_be_told(model):
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost"] = SHARD
    path.write_text(json.dumps(index))
    refused(5, f"says tensor 'ghost' is in {SHARD}, but it is in no shard", "it was published so", "plan", model)


def test_what_a_terminal_obeys_is_shown(tmp_path):
    strange = "evil\x1b]0;title\x07\x1b[2J\x9b31m"
    shown = run("plan", tmp_path / strange)
    assert shown.exit_code == 5
    assert "evil\\x1b]0;title" in shown.stderr
    assert not set("\x1b\x07\x9b") & set(shown.stderr)
    written = StringIO()
    console = Plain(file=written, width=80)
    console.print(strange, markup=False)
    grid = Table(strange)
    grid.add_row(Text(strange))
    console.print(grid)
    assert not set("\x1b\x9b") & set(written.getvalue())
    assert written.getvalue().count("evil\\x1b]0;title") == 3
