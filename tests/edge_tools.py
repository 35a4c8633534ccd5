"""What the tests of edges share: the command line, and what a refusal looks like."""

import json

from typer.testing import CliRunner

from abliterate.cli.app import app

SOURCES = {"harmful": "bundled:tiny-chat", "harmless": "bundled:tiny-chat"}


def rewrite(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def done(*args):
    shown = run(*args)
    assert shown.exit_code == 0, shown.output
    return shown


def refused(code, says, *args):
    """In two lines, which are no confession of a bug."""
    shown = run(*args)
    assert shown.exit_code == code, (shown.output, shown.exception)
    lines = shown.stderr.splitlines()  # what comes before are notes
    first, hint = lines[next(n for n, line in enumerate(lines) if line.startswith("error: ")) :]
    assert says in first
    assert hint.strip()
    assert "bug" not in hint
    return shown.stderr
