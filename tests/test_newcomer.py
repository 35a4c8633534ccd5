"""A newcomer's day: the wheel in an environment of its own, a run, a push; then a stranger who checks what was pushed.

The environment holds the wheel alone, installed without its dependencies: torch and the others, gigabytes that are none
of ours, come from the environment of the tests by a line in a ``.pth`` file.  Lines of that kind add a folder and do
not process its own ``.pth`` files, so an editable installation there is not seen; ``test_it_is_the_wheel_that_runs``
makes sure of it.

``day`` does everything once, by the installed command, and judges nothing; the tests read what came of it.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.loopback_hub import Hub, running

pytest.importorskip("hatchling")

TOKEN = "hf_averysecrettokenforthistest"
NAME = "me/tiny-chat-abliterated"
OUT, PATCH = "tiny-chat-abliterated", "edit.patch.safetensors"


@dataclass
class Person:
    """Somebody with a folder to work in, a home, and a Hub cache, all empty in the morning."""

    folder: Path
    program: Path
    settings: dict[str, str]
    said: dict[str, subprocess.CompletedProcess]

    @classmethod
    def new(cls, folder: Path, program: Path, hub: Hub, token: str | None) -> "Person":
        ours = ("ABLITERATE_", "HF_", "PYTHON", "XDG_", "VIRTUAL_ENV", "TRANSFORMERS_", "PYTEST_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        settings = {
            **kept, "HOME": str(folder / "home"), "HF_HOME": str(folder / "cache"), "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        for name in ("home", "cache", "work"):
            (folder / name).mkdir(parents=True)
        if token is not None:
            settings["HF_TOKEN"] = token
        return cls(folder, program, settings, {})

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def cache(self) -> Path:
        return self.folder / "cache" / "hub"

    def types(self, what: str, *args: object) -> None:
        """One command; ``what`` is its name in the tests."""
        self.said[what] = subprocess.run(
            [self.program, *map(str, args)], cwd=self.work, env=self.settings, capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip


def content(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` by its name, but for compiled code."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment with the wheel in it, and its folder of packages."""
    home = tmp_path_factory.mktemp("newcomer") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip())
    theirs = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "heavy.pth").write_text("".join(f"{path}\n" for path in theirs))
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*command, "--disable-pip-version-check", wheel], check=True)
    return SimpleNamespace(python=python, program=python.with_name("abliterate"), packages=packages)


@pytest.fixture(scope="module")
def day(installed, tmp_path_factory):
    """The author in the morning, the reader in the afternoon, and what is on the Hub in between."""
    place = tmp_path_factory.mktemp("day")
    package = content(installed.packages / "abliterate")
    with running(token=TOKEN) as hub:
        author = Person.new(place / "author", installed.program, hub, TOKEN)
        author.types("run", "run", "--quick")
        author.types("run again", "run", "--quick")
        author.types("patch export", "patch", "export", OUT, "--base", "tiny-chat", "--out", PATCH)
        author.types("push", "push", OUT, NAME)
        pushed = hub.files(NAME) if NAME in hub.repos else {}
        reader = Person.new(place / "reader", installed.program, hub, None)
        if (author.work / PATCH).exists():
            shutil.copy(author.work / PATCH, reader.work)
        hub.add("me/other", installed.packages / "abliterate" / "data" / "tiny_chat" / "model")
        reader.types("plan", "plan", NAME)
        served = dict(hub.served)
        reader.types("verify", "verify", NAME)
        reader.types("diff", "diff", "tiny-chat", NAME, "--json")
        reader.types("patch revert", "patch", "revert", NAME, PATCH, "--out", "base-again")
        reader.types("reproduce", "reproduce", NAME)
        reader.types("no such repository", "verify", "me/nothing")
        reader.types("not one of ours", "verify", "me/other")
        reader.types("push without a token", "push", "base-again", "me/mine")
        yield SimpleNamespace(
            hub=hub, author=author, reader=reader, pushed=pushed, served=served, package=package,
            base=installed.packages / "abliterate" / "data" / "tiny_chat" / "model",
        )  # fmt: skip


EXPECTED = {
    ("author", "run"): 0,
    ("author", "run again"): 2,
    ("author", "patch export"): 0,
    ("author", "push"): 0,
    ("reader", "plan"): 0,
    ("reader", "verify"): 0,
    ("reader", "diff"): 0,
    ("reader", "patch revert"): 0,
    ("reader", "reproduce"): 0,
    ("reader", "no such repository"): 5,
    ("reader", "not one of ours"): 5,
    ("reader", "push without a token"): 5,
}


def test_it_is_the_wheel_that_runs(installed, day):
    ask = "import abliterate, torch; print(abliterate.__file__); print(torch.__file__)"
    shown = subprocess.run(
        [installed.python, "-c", ask], cwd=day.author.work, env=day.author.settings, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    ours, torch = map(Path, shown.stdout.split())
    assert ours == installed.packages / "abliterate" / "__init__.py"
    assert not torch.is_relative_to(installed.packages)


@pytest.mark.parametrize(("who", "what"), EXPECTED)
def test_every_command_says_how_it_went(who, what, day):
    done = getattr(day, who).said[what]
    assert done.returncode == EXPECTED[who, what], done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not [line for line in done.stderr.splitlines() if "Warning" in line or "warn(" in line]
    if done.returncode:
        assert done.stdout == ""
        assert [line.startswith("error: ") for line in done.stderr.splitlines()][-2:] == [True, False]
    else:
        assert "error" not in done.stderr


def test_what_a_newcomer_reads(day):
    said = day.author.said
    assert f"done and verified: {day.author.work / OUT}" in said["run"].stdout
    assert f"published: {day.hub.url}/{NAME} " in said["push"].stdout
    assert "exists already" in said["run again"].stderr
    said = day.reader.said
    assert "writers 17 of 17" in said["plan"].stdout
    assert "every byte came out again" in said["reproduce"].stdout
    assert "has no abliterate.json" in said["not one of ours"].stderr
    found = json.loads(said["diff"].stdout)
    assert found["only_writers"]
    assert {group["role"] for group in found["groups"]} >= {"embedding"}


def test_what_was_pushed_is_what_was_made(day):
    ours = content(day.author.work / OUT)
    assert ours.items() <= day.pushed.items()
    assert day.pushed.keys() - ours.keys() == {".gitattributes"}


def test_nothing_of_the_author_is_in_it(day):
    """Neither the token nor the name of a folder of theirs."""
    handed_on = {**day.pushed, PATCH: (day.author.work / PATCH).read_bytes()}
    for name, data in handed_on.items():
        assert TOKEN.encode() not in data, name
        assert str(day.author.folder).encode() not in data, name
        assert str(day.base).encode() not in data, name


def test_a_plan_fetches_no_weights(day):
    weights = [name for name in day.served if name.endswith(".safetensors")]
    size = sum(len(data) for name, data in day.pushed.items() if name.endswith(".safetensors"))
    assert weights
    assert sum(day.served[name] for name in weights) < 0.5 * size


def test_the_base_comes_back_to_the_byte(day):
    assert content(day.reader.work / "base-again") == content(day.base)


def test_nothing_is_left_where_it_should_not_be(day, installed):
    assert {path.name for path in day.author.work.iterdir()} == {OUT, PATCH}
    assert {path.name for path in day.reader.work.iterdir()} == {PATCH, "base-again"}
    assert content(installed.packages / "abliterate") == day.package
    for person in (day.author, day.reader):
        assert content(person.folder / "home") == {}
    assert not [name for name in content(day.author.folder / "cache") if name.endswith(".safetensors")]


def test_the_cache_of_the_reader_holds_what_was_pushed_and_nothing_else(day):
    """No output, no half-made copy, and no file that was changed on the way."""
    held = {path.name for path in day.reader.cache.iterdir() if path.name.startswith("models--")}
    assert held == {"models--" + NAME.replace("/", "--")}
    (snapshot,) = (day.reader.cache / held.pop() / "snapshots").iterdir()
    found = content(snapshot)
    assert found.items() <= day.pushed.items()
    assert day.pushed.keys() - found.keys() <= {".gitattributes"}
    assert all(path.is_symlink() for path in snapshot.rglob("*") if path.is_file())


def test_a_flipped_bit_on_the_hub_is_found(day, installed, tmp_path):
    """The checks above can fail: the same commands on a repository that somebody changed."""
    reader = Person.new(tmp_path / "other", installed.program, day.hub, None)
    repo = day.hub.repos[NAME]
    tree = dict(repo.trees[repo.branches["main"]])
    name = next(name for name in tree if name.endswith(".safetensors") and "/" not in name)
    spoilt = bytearray(tree[name].read())
    spoilt[-1] ^= 1
    tree[name] = type(tree[name])(data=bytes(spoilt), large=True)
    repo.commit("spoilt", tree, "a bit")
    shutil.copy(day.author.work / PATCH, reader.work)
    reader.types("verify", "verify", NAME, "--revision", "spoilt", "--bytes-only")
    reader.types("reproduce", "reproduce", NAME, "--revision", "spoilt")
    reader.types("revert", "patch", "revert", NAME, PATCH, "--out", "base-again", "--revision", "spoilt")
    assert {what: done.returncode for what, done in reader.said.items()} == {"verify": 4, "reproduce": 4, "revert": 4}
    assert all("Traceback" not in done.stderr for done in reader.said.values())
    assert not (reader.work / "base-again").exists()
