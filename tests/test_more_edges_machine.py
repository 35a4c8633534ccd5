"""The machine that it runs on: environment, locale, terminal, files that may be open, clocks; and absurd options."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import abliterate
from abliterate.checkpoint.direction_file import load
from abliterate.cli.lines import Lines
from abliterate.data.bundled import open_model
from abliterate.events import Advanced, Finished, Started
from abliterate.model import devices
from abliterate.model import load as loading
from tests import factories
from tests.checkpoints import write_llama
from tests.edge_tools import done, refused
from tests.pushing import direction_file

# --- environment ------------------------------------------------------------------------------------------------------

POOR = """
import sys
from abliterate.cli.app import main
for line in sys.stdin.read().splitlines():
    sys.argv = ["abliterate", *line.split("|")]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, (line, ended.code)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
def test_the_poorest_machine(tmp_path):
    """No home, a C locale, a dumb and narrow terminal, and 32 files at a time for a checkpoint of forty shards."""
    base = write_llama(tmp_path / "mödel 😀", shards=25)
    out = tmp_path / "öut"
    lines = [f"edit|{base}|{direction_file(tmp_path)}|--out|{out}", f"verify|{out}|--bytes-only", "plan|--help"]
    environment = {
        "PATH": os.environ["PATH"], "PYTHONPATH": str(Path(abliterate.__file__).parents[1]), "LC_ALL": "C",
        "TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "10",
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    shown = subprocess.run(
        ["bash", "-c", f'ulimit -n 32; exec {sys.executable} -c "$0"', POOR],
        input="\n".join(lines).encode(), capture_output=True, env=environment, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr.decode("utf-8", "replace")
    assert "Traceback" not in shown.stderr.decode("utf-8", "replace")
    assert b"\x1b" not in shown.stdout + shown.stderr
    assert json.loads((out / "abliterate.json").read_text("utf-8"))["source"]["name"] == str(base)


@pytest.mark.parametrize("columns", ["0", "1", "10", "-5", "x", "100000"])
def test_a_terminal_of_any_width(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    assert "--help" in done("plan", "--help").stdout
    done("--help")
    assert "llama" in done("plan", "tiny-chat").stdout
    refused(5, "", "plan", "/nowhere")


# --- clocks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def backwards(monkeypatch):
    """A clock that is set back by an hour whenever it is read."""
    now = [time.time()]

    def read():
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", read)
    monkeypatch.setattr(time, "time_ns", lambda: int(read() * 1e9))


def test_work_goes_on_where_the_clock_goes_back(backwards, tmp_path):
    base, direction = write_llama(tmp_path / "base", shards=3), direction_file(tmp_path)
    stop = []

    def interrupted(event):
        if isinstance(event, Advanced) and event.task == "edit":
            stop.append(event)
        if len(stop) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        abliterate.edit(base, load(direction), tmp_path / "out", on_event=interrupted)
    assert (tmp_path / "out.partial").is_dir()
    for path in (tmp_path / "out.partial").glob("*"):
        os.utime(path, (0, 0))  # as if from another age
    shown = done("edit", base, direction, "--out", tmp_path / "out")
    assert "-" not in "".join(line for line in shown.stderr.splitlines() if line.startswith("edit:"))
    done("verify", tmp_path / "out", "--bytes-only")


def test_files_of_the_past_and_of_the_future(tmp_path):
    base = write_llama(tmp_path / "base")
    for path, when in zip(sorted(base.rglob("*")), (0, 2**33, -(2**20)) * 9, strict=False):
        os.utime(path, (when, when))
    done("edit", base, direction_file(tmp_path), "--out", tmp_path / "out")
    done("verify", tmp_path / "out", "--bytes-only")


def test_progress_where_a_clock_stands_still():
    """The clock of progress never goes back, and may be coarse."""
    said = []
    lines = Lines(said.append, clock=lambda: 5.0, every_s=0.0, settling_s=0.0)
    for event in (Started(task="t", total=0, unit="bytes"), Advanced(task="t", amount=0), Advanced(task="t", amount=7)):
        lines.listen(event)
        lines.tick()
    lines.listen(Finished(task="t"))
    assert said[-1] == "t: 0.0 MB in 0.0 s"


# --- options ----------------------------------------------------------------------------------------------------------

ABSURD = [
    ("measure tiny-chat", "--batch-size", "0"), ("measure tiny-chat", "--batch-size", "-1"),
    ("measure tiny-chat", "--memory", "1KB"), ("measure tiny-chat", "--memory", "9" * 400 + "TB"),
    ("measure tiny-chat", "--memory", "-5GB"), ("measure tiny-chat", "--memory", "nan"),
    ("measure tiny-chat", "--memory", ""), ("measure tiny-chat", "--memory", "0"),
    ("measure tiny-chat", "--device", "cuda:99"), ("measure tiny-chat", "--device", ""),
    ("measure tiny-chat", "--dtype", "float3"), ("measure tiny-chat", "--trials", "-1"),
    ("measure tiny-chat", "--cone-size", "0"), ("measure tiny-chat", "--estimator", ""),
    ("edit tiny-chat {d} --out {o}", "--strength", "nan"), ("edit tiny-chat {d} --out {o}", "--strength", "inf"),
    ("edit tiny-chat {d} --out {o}", "--strength", "-1e999"), ("edit tiny-chat {d} --out {o}", "--strength", "0"),
    ("edit tiny-chat {d} --out {o}", "--exclude-layers", "0-99999999999"),
    ("edit tiny-chat {d} --out {o}", "--exclude-layers", "0%-99999999999%"),
    ("edit tiny-chat {d} --out {o}", "--exclude-layers", "5-1"),
    ("edit tiny-chat {d} --out {o}", "--exclude-layers", "-1"), ("edit tiny-chat {d} --out {o}", "--roles", "x"),
    ("edit tiny-chat {d} --position -1 --out {o}", "--layer", "1000000000"),
    ("edit tiny-chat {d} --position -1 --out {o}", "--layer", "-1"),
    ("edit tiny-chat {d} --out {o}", "--trial", "1000000000"), ("edit tiny-chat {d} --out {o}", "--category", ""),
    ("run tiny-chat --out {o}", "--max-new-tokens", "0"), ("run tiny-chat --out {o}", "--task-limit", "0"),
    ("run tiny-chat --out {o}", "--task-shots", "-1"), ("run tiny-chat --out {o}", "--recipe", ""),
    ("run tiny-chat --out {o}", "--recipe", "no-such"), ("run tiny-chat --out {o}", "--recipe", "\x00"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "option", "value"), ABSURD, ids=[f"{o} {v[:14]!r}" for _, o, v in ABSURD])
def test_absurd_options(command, option, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    direction = factories.save_direction(128, tmp_path / "d.safetensors")
    filled = [part.format(d=direction, o=tmp_path / "out") for part in command.split()]
    said = refused(2, "", *filled, f"{option}={value}")
    assert len(said) < 2000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.safetensors"]


@pytest.mark.parametrize(
    ("known", "kind", "dtype", "says"),
    [
        (False, "x86_64", torch.bfloat16, True),
        (False, "AMD64", torch.bfloat16, True),
        (True, "x86_64", torch.bfloat16, False),
        (False, "aarch64", torch.bfloat16, False),
        (False, "x86_64", torch.float32, False),
        (None, "x86_64", torch.bfloat16, False),
    ],
)
def test_a_processor_that_computes_bfloat16_in_software(known, kind, dtype, says, monkeypatch):
    """It takes ten times as long, which is said before it does; what another torch does not tell is not said."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", None if known is None else lambda: known, raising=False)
    monkeypatch.setattr(devices.platform, "machine", lambda: kind)
    assert (devices.slowness(torch.device("cpu"), dtype) is not None) == says
    assert devices.slowness(torch.device("cuda"), dtype) is None


def test_it_is_said_when_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr(loading, "slowness", lambda place, dtype: f"{dtype} on {place}")
    notes = []
    loading.load_model(open_model(None), device="cpu", dtype="bfloat16", on_event=notes.append)
    assert "torch.bfloat16 on cpu" in [getattr(its, "text", "") for its in notes]
