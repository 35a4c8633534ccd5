"""The Hub from the outside, played by a server on the loopback: headers only for a plan, and failures in two lines."""

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import abliterate as abliterate_package
from abliterate.cli.app import app
from abliterate.editing.planning import plan
from tests.checkpoints import write_llama
from tests.loopback_hub import COMMIT, running
from tests.processes import Running

TOKEN = "hf_averysecrettokenforthistest"


@pytest.fixture(scope="module")
def hub(request, tmp_path_factory):
    """A model of two megabytes: far more than its headers."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 512}
    folder = write_llama(tmp_path_factory.mktemp("hub") / "model", sizes=sizes, shards=getattr(request, "param", None))
    with running() as server:
        server.folder = folder
        server.add("owner/model", folder)
        yield server


def abliterate(home, *args, **environment):
    """The command in a process of its own, with an empty cache and a token."""
    here = str(Path(abliterate_package.__file__).parents[1])
    settings = {
        "PYTHONPATH": here,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "NO_PROXY": "*",
        **environment,
    }
    with Running(args, {**os.environ, **settings}, home) as process:
        shown, said = process.communicate(timeout=180)
    assert TOKEN not in shown + said
    assert "Traceback" not in said
    return subprocess.CompletedProcess(args, process.returncode, shown, said)


def fails(shown, code, says):
    lines = shown.stderr.splitlines()
    assert (shown.returncode, shown.stdout, len(lines)) == (code, "", 2), shown.stderr
    assert lines[0].startswith(f"error: owner/model: {says}")
    assert lines[1].strip()


@pytest.mark.parametrize("hub", [None, 3], ids=["one file", "shards"], indirect=True)
def test_a_plan_reads_headers_by_range_and_no_tensors(hub, tmp_path):
    hub.clear()
    shown = abliterate(tmp_path, "plan", "owner/model", "--json", HF_ENDPOINT=hub.url)
    assert shown.returncode == 0, shown.stderr
    remote, local = json.loads(shown.stdout), plan(hub.folder).to_json()
    different = {"model", "revision", "input_bytes", "output_bytes", "estimated_seconds", "writers", "running"}
    assert {k: v for k, v in remote.items() if k not in different} == {
        k: v for k, v in local.items() if k not in different
    }
    assert (remote["model"], remote["revision"]) == ("owner/model", COMMIT)
    assert sorted(remote["writers"], key=repr) == sorted(local["writers"], key=repr)
    weights = {name: count for name, count in hub.served.items() if name.endswith(".safetensors")}
    assert set(weights) == {path.name for path in hub.folder.glob("*.safetensors")}
    assert max(weights.values()) <= 100_001  # one request, which the header ends inside
    assert sum(weights.values()) < 0.2 * local["input_bytes"]
    assert not list(tmp_path.rglob("*.safetensors"))
    assert f"Bearer {TOKEN}" in hub.authorised


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ((403, "GatedRepo"), "access is gated"),
        ((404, "RepoNotFound"), "no such repository, or it is private"),
        ((404, "RevisionNotFound"), "no such revision"),
        ((500, "Internal"), "the Hub answered 500"),
    ],
)
def test_what_the_hub_refuses_is_said_in_two_lines(error, says, hub, tmp_path):
    hub.clear()
    status, kind = error
    hub.fail("", status=status, headers={"X-Error-Code": kind, "X-Error-Message": kind})
    fails(abliterate(tmp_path, "plan", "owner/model", HF_ENDPOINT=hub.url), 5, says)


def test_a_hub_that_cannot_be_reached_is_said_in_two_lines(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        fails(abliterate(tmp_path, "plan", "owner/model", HF_ENDPOINT=url), 5, "the Hub cannot be reached")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("owner/model", "not in the local cache, and offline mode is on"),
        ("owner//model", "no such folder"),
        ("owner/mo del", "neither a folder nor a valid Hub name"),
        ("-x/y", "neither a folder nor a valid Hub name"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "edit", "diff"])
def test_offline_and_bad_names_are_said_in_two_lines(command, name, says, tmp_path, monkeypatch):
    """In this process, which is offline (``conftest.py``)."""
    save_file({"direction": torch.ones(4)}, tmp_path / "d.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    rest = {"plan": [], "edit": ["d.safetensors"], "diff": ["other"]}[command]
    shown = CliRunner().invoke(app, [command, "--", name, *rest])
    assert (shown.exit_code, shown.stdout) == (5, "")
    assert shown.stderr.splitlines()[0] == f"error: {name}: {says}"
    assert len(shown.stderr.splitlines()) == 2
    assert TOKEN not in shown.stderr
