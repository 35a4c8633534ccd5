"""What the site is besides the pages of this folder; called by mkdocs (see ``mkdocs.yml``).

The pages link as GitHub reads them, so some links leave this folder: to the README, a recipe, a file of the code.  On
the site the README is the first page, and every other file that a page links to becomes a page of its own.  A link to
a file that is not there stays as it is, and the strict build stops at it.
"""

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PLACES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "abliterate/data/prompt_sets/README.md": "prompts.md",
}
"""Pages of the repository that have a place in the navigation: path there, path on the site."""

SOURCE = "source"
"""Folder on the site of the other files that are linked to."""

LANGUAGES = {".py": "python", ".toml": "toml", ".json": "json"}
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
FENCE = re.compile(r"^\s*(```|~~~)")


def slug(text: str, separator: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", separator)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Anchors as on GitHub."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside this folder, and those that they link to."""
    root = Path(config.docs_dir).parent
    waiting = [path for path in PLACES if (root / path).is_file()]
    waiting += [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    known = {f"docs/{file.src_uri}" for file in files}
    while waiting:
        path = waiting.pop()
        if path not in known:
            known.add(path)
            files.append(_generated(root, path, config))
        if path.endswith(".md"):
            text = (root / path).read_text("utf-8")
            waiting += [target for target in _targets(path, text) if target not in known and (root / target).is_file()]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: object) -> str:
    """Let links find their targets on the site."""
    root = Path(config.docs_dir).parent
    path = _path_of(page.file.src_uri)
    if not path.endswith(".md"):
        return markdown

    def there(match: re.Match[str]) -> str:
        target = _target(path, match[2])
        if target is None or not (root / target).is_file():
            return match[0]
        link = posixpath.relpath(_place_of(target), posixpath.dirname(page.file.src_uri) or ".")
        fragment = urlsplit(match[2]).fragment
        return f"{match[1]}{link}{'#' + fragment if fragment else ''}{match[3]}"

    return "\n".join(LINK.sub(there, line) if prose else line for line, prose in _lines(markdown))


def _generated(root: Path, path: str, config: MkDocsConfig) -> File:
    place, file = _place_of(path), root / path
    if path.endswith(".md"):
        return File.generated(config, place, content=file.read_text("utf-8"))
    if place.endswith(".md"):
        fence = f"```{LANGUAGES.get(file.suffix, '')}\n{file.read_text('utf-8').rstrip()}\n```\n"
        return File.generated(config, place, content=f"# `{path}`\n\n{fence}")
    return File.generated(config, place, abs_src_path=os.fspath(file))


def _place_of(path: str) -> str:
    """Where a file of the repository is on the site."""
    if path in PLACES:
        return PLACES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    text = path.endswith(tuple(LANGUAGES)) or "." not in posixpath.basename(path)
    return f"{SOURCE}/{path}.md" if text else f"{SOURCE}/{path}"


def _path_of(place: str) -> str:
    """Where a page of the site is in the repository."""
    for path, its in PLACES.items():
        if its == place:
            return path
    if place.startswith(f"{SOURCE}/"):
        path = place.removeprefix(f"{SOURCE}/")
        stem = path.removesuffix(".md")
        return stem if _place_of(stem) == place else path
    return f"docs/{place}"


def _target(path: str, link: str) -> str | None:
    """What a link in ``path`` means, as a path in the repository; None: something outside of it."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc or not parts.path or parts.path.startswith("/"):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), parts.path))


def _targets(path: str, text: str) -> Iterator[str]:
    for line, prose in _lines(text):
        found = (_target(path, match[2]) for match in LINK.finditer(line) if prose)
        yield from (target for target in found if target is not None)


def _lines(text: str) -> Iterator[tuple[str, bool]]:
    """Line by line, and whether it is prose: what stands between fences is not."""
    prose = True
    for line in text.split("\n"):
        fence = FENCE.match(line) is not None
        yield line, prose and not fence
        prose = prose != fence
