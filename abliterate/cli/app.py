"""The application: which command is which function."""

import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from abliterate.cli.categories import categories
from abliterate.cli.chat import chat
from abliterate.cli.directions import directions
from abliterate.cli.evaluate import compare, evaluate
from abliterate.cli.importing import import_gguf
from abliterate.cli.inspect import inspect
from abliterate.cli.look import architectures, diff, methods, plan, recipes
from abliterate.cli.lora import lora
from abliterate.cli.patch import patch
from abliterate.cli.publish import push
from abliterate.cli.reproduce import reproduce
from abliterate.cli.run import run
from abliterate.cli.stages import dequantize, edit, measure, select, verify
from abliterate.version import __version__

app = typer.Typer(
    name="abliterate",
    help="Remove, add or measure a linear direction in an open-weight model, and prove what was written.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(*, value: bool) -> bool:
    if value:
        print(f"abliterate {__version__}")  # noqa: T201 - the command line prints
        raise typer.Exit
    return value


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=lambda value: _version(value=value), is_eager=True, help="Show the version."
        ),
    ] = False,
) -> None:
    pass


for _name, _command in {
    "run": run,
    "plan": plan,
    "measure": measure,
    "select": select,
    "directions": directions,
    "edit": edit,
    "dequantize": dequantize,
    "import": import_gguf,
    "verify": verify,
    "reproduce": reproduce,
    "eval": evaluate,
    "compare": compare,
    "diff": diff,
    "inspect": inspect,
    "categories": categories,
    "push": push,
    "chat": chat,
    "architectures": architectures,
    "recipes": recipes,
    "methods": methods,
}.items():
    app.command(_name)(_command)


app.add_typer(patch, name="patch")
app.add_typer(lora, name="lora")


def main() -> None:
    """Entry point of the ``abliterate`` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a code page without our signs must not stop the work
    app()
