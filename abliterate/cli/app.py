"""The application: which command is which function."""

from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from abliterate.cli.audit import audit
from abliterate.cli.categories import categories
from abliterate.cli.chat import chat
from abliterate.cli.console import fail, silence
from abliterate.cli.directions import directions
from abliterate.cli.evaluate import compare, evaluate
from abliterate.cli.export import export
from abliterate.cli.harden import harden
from abliterate.cli.heal import heal
from abliterate.cli.importing import import_gguf
from abliterate.cli.inspect import inspect
from abliterate.cli.look import architectures, diff, methods, plan, recipes
from abliterate.cli.lora import lora
from abliterate.cli.patch import patch
from abliterate.cli.process import prepare_streams, processes, stop_on_signals
from abliterate.cli.publish import push
from abliterate.cli.reproduce import reproduce
from abliterate.cli.run import run
from abliterate.cli.stages import dequantize, edit, measure, select, verify
from abliterate.errors import UsageError
from abliterate.version import __version__

COMMANDS: dict[str, dict[str, Callable[..., None] | typer.Typer]] = {
    "The whole job": {"run": run},
    "Look, and change nothing": {
        "plan": plan, "chat": chat, "inspect": inspect, "directions": directions, "categories": categories,
        "audit": audit, "methods": methods, "recipes": recipes, "architectures": architectures,
    },
    "One stage at a time": {"measure": measure, "select": select, "edit": edit, "verify": verify, "eval": evaluate},
    "Train": {"heal": heal, "harden": harden},
    "Compare checkpoints": {"compare": compare, "diff": diff, "reproduce": reproduce},
    "Bring a model, hand on an edit": {
        "import": import_gguf, "dequantize": dequantize, "patch": patch, "lora": lora, "export": export, "push": push,
    },
}  # fmt: skip
"""Every command, by what a user wants."""


class Grouped(TyperGroup):
    """The commands under headings."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401, ARG002 - of typer's own click
        """Write them."""
        room = formatter.width - 6 - max(map(len, self.commands))
        for heading, names in COMMANDS.items():
            with formatter.section(heading):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(room)) for name in names])


app = typer.Typer(
    name="abliterate",
    cls=Grouped,
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
    ctx: typer.Context,
    version: Annotated[  # noqa: ARG001 - its callback shows it
        bool,
        typer.Option(
            "--version", callback=lambda value: _version(value=value), is_eager=True, help="Show the version."
        ),
    ] = False,
) -> None:
    rank, count = processes()
    if count > 1 and ctx.invoked_subcommand != "run":
        fail(UsageError(f"{count} processes were started, and only `run` shares its work", "start one process"))
        raise typer.Exit(UsageError.exit_code)
    if rank > 0 and count > 1:
        silence()


for _name, _command in (each for group in COMMANDS.values() for each in group.items()):
    if isinstance(_command, typer.Typer):
        app.add_typer(_command, name=_name)
    else:
        app.command(_name)(_command)


def main() -> None:
    """Entry point of the ``abliterate`` command."""
    prepare_streams()
    stop_on_signals()
    app()
