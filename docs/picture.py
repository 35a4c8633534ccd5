"""Draw ``run.svg``, the picture of a run on the bundled model that the README shows.

python -m docs.picture
"""

import io
import shutil
import tempfile
from pathlib import Path

from rich.console import Console

from abliterate.cli import console, run, tables

WIDTH = 118


def main() -> None:
    """Run the main job with a recording console and save what it shows."""
    recorder = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False, force_terminal=True)
    for module in (console, tables, run):
        module.out = recorder
    folder = Path(tempfile.mkdtemp())
    recorder.print("[bold]$ abliterate run --out tiny-chat-abliterated[/bold]\n")
    try:
        run.run(out_folder=folder / "tiny-chat-abliterated")
    finally:
        shutil.rmtree(folder)
    picture = recorder.export_svg(title="abliterate").replace(str(folder) + "/", "")
    (Path(__file__).parent / "run.svg").write_text(picture, "utf-8")


if __name__ == "__main__":
    main()
