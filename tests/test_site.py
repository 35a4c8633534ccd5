"""The documentation as a site: it builds strictly, a link that leads nowhere stops it, nothing comes from outside."""

import os
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip("mkdocs")

FETCHED = re.compile(
    r"<(?:link|script|img|iframe|source|video|audio|embed|object)\b[^>]*?\b(?:href|src|data)=\"([^\"]*)\""
)
OUTSIDE = re.compile(r"(?:https?:)?//")


def build(root, out):
    """The site of the repository ``root``, built in a process of its own."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", root / "mkdocs.yml"]
    return subprocess.run(
        [*command, "--site-dir", out], capture_output=True, text=True, check=False, cwd=root,
        env={**os.environ, "DISABLE_MKDOCS_2_WARNING": "true"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site") / "site"
    done = build(ROOT, out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def copy(tmp_path):
    """What the site is made from, to be spoilt."""
    root = tmp_path / "copy"
    shutil.copytree(ROOT / "docs", root / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", "README.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, root)
    for name in ("recipes", "abliterate/data/prompt_sets", "abliterate/publishing/schemas"):
        shutil.copytree(ROOT / name, root / name)
    (root / "abliterate" / "data" / "tiny_chat").mkdir(parents=True)
    shutil.copy(ROOT / "abliterate" / "data" / "tiny_chat" / "world.py", root / "abliterate" / "data" / "tiny_chat")
    return root


def links(page, pattern=re.compile(r"<a\b[^>]*?\bhref=\"([^\"]*)\"")):
    return pattern.findall(page.read_text("utf-8"))


def test_every_page_is_there(site):
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert pages
    for name in [*pages, "index.md", "changelog.md", "prompts.md"]:
        assert (site / name).with_suffix(".html").is_file(), name
    assert not list(site.rglob("*.py"))


def test_every_link_between_pages_finds_its_file_and_its_anchor(site):
    """Seen from the pages as they are, not from the builder's own checks."""
    looked = 0
    for page in site.rglob("*.html"):
        if page.name == "404.html":
            continue  # its links are for a server
        for link in links(page):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = page if not parts.path else (page.parent / unquote(parts.path)).resolve()
            assert target.is_file(), f"{page.name}: {link}"
            if parts.fragment and target.suffix == ".html":
                assert f'id="{unquote(parts.fragment)}"' in target.read_text("utf-8"), f"{page.name}: {link}"
            looked += 1
    assert looked > 200


def test_nothing_is_fetched_from_outside(site):
    for page in site.rglob("*.html"):
        found = [link for link in links(page, FETCHED) if OUTSIDE.match(link)]
        assert not found, page
    for style in [*site.rglob("*.css"), *site.rglob("*.svg")]:
        assert not re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", style.read_text("utf-8")), style


def test_what_lies_outside_the_folder_is_a_page(site):
    page = site / "source" / "recipes" / "arditi-2024.toml.html"
    first = (ROOT / "recipes" / "arditi-2024.toml").read_text("utf-8").splitlines()[0]
    assert first in unescape(page.read_text("utf-8"))
    assert "source/recipes/arditi-2024.toml.html" in links(site / "how-to.html")
    assert "prompts.html" in links(site / "how-to.html")
    assert "how-to.html" in links(site / "index.html")


def test_a_copy_builds_as_well(copy, tmp_path):
    assert build(copy, tmp_path / "site").returncode == 0


SPOILT = {
    "page": ("docs/how-to.md", "[x](nowhere.md)", "nowhere.md"),
    "anchor": ("docs/how-to.md", "[x](concepts.md#no-such-heading)", "no-such-heading"),
    "anchor here": ("docs/how-to.md", "[x](#no-such-heading)", "no-such-heading"),
    "picture": ("docs/how-to.md", "![x](nowhere.png)", "nowhere.png"),
    "file of the code": ("docs/how-to.md", "[x](../abliterate/nowhere.py)", "nowhere.py"),
    "in the README": ("README.md", "[x](docs/nowhere.md)", "nowhere.md"),
    "anchor in the README": ("README.md", "[x](docs/how-to.md#no-such-heading)", "no-such-heading"),
    "from outside in": ("abliterate/data/prompt_sets/README.md", "[x](nowhere.toml)", "nowhere.toml"),
    "absolute": ("docs/how-to.md", "[x](/concepts.md)", "/concepts.md"),
    "page that is in no menu": ("docs/forgotten.md", "# Forgotten", "forgotten.md"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_leads_nowhere_stops_the_build(case, copy, tmp_path):
    file, text, named = SPOILT[case]
    with (copy / file).open("a", encoding="utf-8") as page:
        page.write(f"\n\n{text}\n")
    done = build(copy, tmp_path / "site")
    assert done.returncode == 1
    (warning,) = re.findall(r"^WARNING.*(?:\n  .*)*", done.stderr, flags=re.MULTILINE)
    assert named in warning


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [
        ("Tied heads", "tied-heads"),
        ("`abliterate run`", "abliterate-run"),
        ("Gemma 2, Gemma 3 (text and vision)", "gemma-2-gemma-3-text-and-vision"),
        ("Larger than memory: a plan", "larger-than-memory-a-plan"),
        ("a - b & c", "a---b--c"),
        ("Größe_1.0", "größe_10"),
    ],
)
def test_anchors_are_those_of_github(heading, anchor):
    sys.path.insert(0, str(ROOT))
    try:
        from docs.hooks import slug
    finally:
        sys.path.remove(str(ROOT))
    assert slug(heading, "-") == anchor
