"""Options that several commands share and that no recipe holds."""

import re
from pathlib import Path
from typing import Annotated

import typer

from abliterate.errors import UsageError
from abliterate.options import ADDITION
from abliterate.recipe import Recipe

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Model = Annotated[str, typer.Argument(help="A checkpoint folder, a Hub name (owner/model), or tiny-chat.")]
OptionalModel = Annotated[
    str | None,
    typer.Argument(help="A checkpoint folder or a Hub name (owner/model). Default: the bundled tiny chat model."),
]
OptionalMap = Annotated[
    str | None, typer.Argument(help="A checkpoint folder or a Hub name: what each result would be worth there.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")]
Finished = Annotated[str, typer.Argument(help="A folder that abliterate wrote, or its name on the Hub (owner/model).")]
Base = Annotated[str | None, typer.Option(help="The base checkpoint. Default: the one the manifest names.")]
DirectionFile = Annotated[Path, typer.Argument(help="A direction file written by measure or select.")]
ReportFile = Annotated[
    Path | None, typer.Option("--report", help="Write a report for a browser to this .html file, with all replies.")
]
FiguresFile = Annotated[
    Path | None, typer.Option("--report", help="Draw all of it into this .html file; it holds no prompts.")
]
ShowReplies = Annotated[
    bool, typer.Option("--show-replies", help="Show replies to harmful prompts as well, where they changed.")
]
Quick = Annotated[
    bool, typer.Option("--quick", help="A first look: fewer prompts, shorter replies (recipe quick). Not a result.")
]
Add = Annotated[
    bool,
    typer.Option(
        "--add",
        help="Add the direction at its layer instead, as a guard, --strength times as long as it is; nothing is "
        "removed. Needs an output bias.",
    ),
]
Method = Annotated[
    str | None, typer.Option("--method", help="A published method, as `abliterate methods` lists them: its recipe.")
]
RecipeFile = Annotated[str | None, typer.Option("--recipe", help="Recipe: a .toml file or a bundled name.")]
Position = Annotated[int | None, typer.Option(help="Take the candidate at this position (negative), with --layer.")]
Layer = Annotated[int | None, typer.Option(help="Take the candidate entering this block, with --position.")]
CandidateId = Annotated[
    str | None,
    typer.Option("--candidate", help="Take the candidate of this id: ESTIMATOR/POSITION/LAYER, say."),
]
Trial = Annotated[int | None, typer.Option(help="Take this trial of the search that chose the direction.")]
Category = Annotated[
    str | None, typer.Option(help="Of a candidate that holds one for each category: this category's direction alone.")
]
Push = Annotated[str | None, typer.Option(help="Upload the result to this repository of the Hub, OWNER/NAME.")]
Branch = Annotated[
    str | None, typer.Option(help="Branch of the repository to upload to; made if it is not there. Default: main.")
]
Stream = Annotated[
    bool, typer.Option("--stream", help="With --push: from Hub to Hub, shard by shard; the disk holds about two.")
]

SIZE = re.compile(r"(\d{1,18}(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes from "512MiB", "2GB" or "1000000".

    Raises:
        UsageError: not a size.
    """
    match = SIZE.fullmatch(text.strip())
    if not match:
        raise UsageError(f"{text!r} is not a size", "write it as 512MiB, 2GiB or a number of bytes")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " kmgt".index(match[2].lower() or " "))


def suffix_of(recipe: Recipe) -> str:
    """What the default output folder of an edit ends in."""
    return "added" if recipe.edit.change == ADDITION else "abliterated"


def default_out(model: str | None, *, suffix: str = "abliterated") -> Path:
    """``NAME-abliterated`` (or another suffix) in the current folder."""
    name = (model or "tiny-chat").rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]
    return Path(f"{name}-{suffix}")
