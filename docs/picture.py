"""Draw ``run.svg``, the picture of a run on the bundled model that the README shows.

python -m docs.picture
"""

import io
import re
import shutil
import tempfile
from pathlib import Path

from rich.console import Console

from abliterate.cli import console, run, tables
from abliterate.cli.app import app

WIDTH = 118


def main() -> None:
    """Run the main job with a recording console and save what it shows."""
    recorder = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False, force_terminal=True)
    for module in (console, tables, run):
        module.out = recorder
    folder = Path(tempfile.mkdtemp())
    recorder.print("[bold]$ abliterate run --out tiny-chat-abliterated[/bold]\n")
    try:
        app(["run", "--out", str(folder / "tiny-chat-abliterated")], standalone_mode=False)
    finally:
        shutil.rmtree(folder)
    picture = tidy(recorder.export_svg(title="abliterate"), str(folder) + "/")
    (Path(__file__).parent / "run.svg").write_text(picture, "utf-8")


def tidy(picture: str, folder: str) -> str:
    """Without ``folder`` in any line, which keeps the width of a letter, and without fonts from somewhere else."""

    def shorter(match: re.Match[str]) -> str:
        width, before, text = float(match[1]), match[2], match[3]
        letters = len(text.replace("&#160;", " "))
        return f'textLength="{width * (letters - len(folder)) / letters:g}"{before}>{text.replace(folder, "")}</text>'

    lines = rf'textLength="([\d.]+)"([^>]*)>([^<]*{re.escape(folder)}[^<]*)</text>'
    return re.sub(lines, shorter, re.sub(r"\s*@font-face \{.*?\}", "", picture, flags=re.DOTALL))


if __name__ == "__main__":
    main()
