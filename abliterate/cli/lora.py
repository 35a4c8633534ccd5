"""``abliterate lora``: the edit as a PEFT adapter."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from abliterate.cli import options as opt
from abliterate.cli.console import guarded, out, progress, show_json
from abliterate.cli.stages import read_direction
from abliterate.errors import UsageError

lora = typer.Typer(help="The edit as a PEFT adapter, for what an adapter can express.", no_args_is_help=True)

MOST_NAMES = 8


@lora.callback()
def _root() -> None:
    pass  # without it Typer makes the only command the group itself


@lora.command("export")
@guarded
def export(
    base: Annotated[str, typer.Option(help="The base checkpoint: a folder, a Hub name, or tiny-chat.")],
    out_folder: Annotated[Path, typer.Option("--out", help="Output folder of the adapter.")],
    edited: Annotated[
        str | None,
        typer.Argument(help="A folder that abliterate wrote, or its name on the Hub: gives direction and options."),
    ] = None,
    direction: Annotated[Path | None, typer.Option(help="A direction file, instead of an edited folder.")] = None,
    position: opt.Position = None,
    layer: opt.Layer = None,
    candidate: opt.CandidateId = None,
    category: opt.Category = None,
    gguf: Annotated[
        Path | None, typer.Option("--gguf", help="A .gguf file to write as well: the adapter for llama.cpp (--lora).")
    ] = None,
    revision: opt.Revision = None,
    json: opt.Json = False,
) -> None:
    """Write the edit of linear layers and embedding as an adapter, and name what it cannot express.

    Example: abliterate lora export tiny-chat-abl --base tiny-chat --out tiny-chat-lora
    """
    if (edited is None) == (direction is None):
        raise UsageError("give an edited folder or --direction", "one of them, not both")
    from dataclasses import asdict

    from abliterate import api

    chosen = read_direction(direction, position, layer, category=category, candidate=candidate)
    with progress() as listen:
        report = api.export_lora(
            base, out_folder, edited=edited, revision=revision, direction=chosen, gguf=gguf, on_event=listen
        )
    if json:
        beside = None if report.gguf is None else {**asdict(report.gguf), "file": str(report.gguf.file)}
        show_json({**asdict(report), "out": str(report.out), "complete": report.complete, "gguf": beside})
        return
    from abliterate.checkpoint.amounts import size

    out.print(f"rank {report.rank}, {len(report.expressed)} writers, {size(report.size_bytes)}")
    _name(report.left_out, "not expressed")
    if report.tied:
        out.print("the head is tied to the embedding: exact as an adapter, but do not merge it")
    out.print(f"written: {report.out}", markup=False, soft_wrap=True)
    if report.gguf is not None:
        _name(report.gguf.left_out, "not for llama.cpp")
        out.print(
            f"written: {report.gguf.file} ({len(report.gguf.names)} of them for llama.cpp, architecture "
            f"{report.gguf.architecture})",
            markup=False,
            soft_wrap=True,
        )


def _name(left_out: Mapping[str, str], how: str) -> None:
    """Name what is not in a file, and why."""
    for name, why in list(left_out.items())[:MOST_NAMES]:
        out.print(f"{how}: {name}: {why}", markup=False, soft_wrap=True)
    if len(left_out) > MOST_NAMES:
        out.print(f"… and {len(left_out) - MOST_NAMES} more")
