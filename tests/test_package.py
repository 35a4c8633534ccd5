"""The wheel: everything the program needs is in it, and it runs from an installation of its own."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import abliterate
from abliterate import __version__, api
from abliterate.recipe import bundled_recipes

ROOT = Path(__file__).parent.parent
pytest.importorskip("hatchling")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel unpacked as pip does it; dependencies come from the environment of the tests."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", target, wheel]
    subprocess.run(command, check=True)
    return target


def run(installed, *arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "abliterate", *arguments], capture_output=True, text=True, check=False, cwd=cwd,
        env=environment,
    )  # fmt: skip


def test_every_file_of_the_package_is_in_the_wheel(wheel):
    listed = subprocess.run(["git", "ls-files", "abliterate"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a clone")
    tracked = {name for name in listed.stdout.split("\n") if name and (ROOT / name).is_file()}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert tracked <= names
    assert {f"abliterate/recipes/{name}.toml" for name in bundled_recipes()} <= names


@pytest.mark.parametrize(
    "name",
    [
        "abliterate/py.typed",
        "abliterate/publishing/card.md.j2",
        "abliterate/evaluate/report.html.j2",
        "abliterate/publishing/schemas/manifest-1.schema.json",
        "abliterate/publishing/schemas/manifest-2.schema.json",
        "abliterate/arch/families/llama.toml",
        "abliterate/data/prompt_sets/LICENSE",
        "abliterate/data/tiny_chat/model/model.safetensors.index.json",
        "abliterate/data/tiny_chat/prompts/harmful.train.jsonl",
        "abliterate/recipes/arditi-2024.toml",
    ],
)
def test_what_is_not_code_is_there_too(wheel, name):
    assert name in zipfile.ZipFile(wheel).namelist()


def test_no_tests_and_no_leftovers(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.startswith(("tests/", "docs/", "bench/")) or "__pycache__" in name]


def test_the_installed_program_runs_without_the_clone(installed, tmp_path):
    shown = run(installed, "--version", cwd=tmp_path)
    assert shown.stdout == f"abliterate {__version__}\n", shown.stderr
    where = run_python(installed, "import abliterate; print(abliterate.__file__)", cwd=tmp_path)
    assert where.startswith(str(installed))
    plan = run(installed, "plan", "tiny-chat", cwd=tmp_path)
    assert "writers 17 of 17" in plan.stdout, plan.stderr
    recipes = run(installed, "recipes", cwd=tmp_path)
    assert all(name in recipes.stdout for name in bundled_recipes())


def run_python(installed, code, cwd):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=cwd, env=environment
    )
    return done.stdout.strip()


def test_the_package_offers_what_the_interface_does():
    assert set(abliterate._API) == set(api.__all__)
    assert all(callable(getattr(abliterate, name)) for name in abliterate._API)


def test_the_citation_says_which_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == __version__
    assert citation["authors"] == [{"name": "The abliterate developers"}]
    assert {"cff-version", "message", "title"} <= set(citation)


def test_the_changelog_has_this_version():
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_the_image_copies_what_exists():
    lines = (ROOT / "Dockerfile").read_text("utf-8").splitlines()
    copied = [name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]]
    assert copied
    assert all((ROOT / name).exists() for name in copied)


def test_the_image_has_what_was_tested():
    """Its torch is the one of the constraints, and its Python one that the package takes."""
    text = (ROOT / "Dockerfile").read_text("utf-8")
    installs = [line for line in text.splitlines() if "pip install" in line]
    assert len(installs) == 2
    assert all("--constraint /src/constraints.txt" in line for line in installs)
    assert "torch==" in (ROOT / "constraints.txt").read_text("utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    version = re.search(r"^FROM python:(\S+?)-slim", text, flags=re.MULTILINE)[1]
    assert Version(version) in SpecifierSet(project["requires-python"])
    extras = re.search(r"/src\[(.*)\]", text)[1].split(",")
    assert set(extras) <= project["optional-dependencies"].keys()
