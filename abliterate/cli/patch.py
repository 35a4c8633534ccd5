"""``abliterate patch``: the edit as one file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from abliterate.cli import options as opt
from abliterate.cli.console import guarded, out, progress, show_json
from abliterate.errors import UsageError

if TYPE_CHECKING:
    from abliterate.exports.patches.export import PatchReport

patch = typer.Typer(help="The edit as one file: export it, apply it to a base, take it back.", no_args_is_help=True)

PatchArgument = Annotated[Path, typer.Argument(help="A file that `patch export` wrote.")]
OutFolder = Annotated[Path, typer.Option("--out", help="Output folder.")]
PURPOSES: dict[str, tuple[Literal["apply", "revert"], ...]] = {
    "both": ("apply", "revert"),
    "apply": ("apply",),
    "revert": ("revert",),
}


@patch.command("export")
@guarded
def export(
    edited: opt.Finished,
    base: Annotated[str, typer.Option(help="The base checkpoint: a folder, a Hub name, or tiny-chat.")],
    out_file: Annotated[Path, typer.Option("--out", help="Where to write the patch.")],
    purpose: Annotated[
        str, typer.Option("--for", help="apply (small), revert (what the edit lost as well), or both.")
    ] = "both",
    revision: opt.Revision = None,
    json: opt.Json = False,
) -> None:
    """Write what turns the base into the edited checkpoint, and back, to one safetensors file.

    Example: abliterate patch export tiny-chat-abl --base tiny-chat --out tiny.patch.safetensors
    """
    if purpose not in PURPOSES:
        raise UsageError(f"--for {purpose}: not a purpose", f"choose one of: {', '.join(PURPOSES)}")
    from dataclasses import asdict

    from abliterate import api

    with progress() as listen:
        report = api.export_patch(
            edited, base, out_file, revision=revision, purposes=PURPOSES[purpose], on_event=listen
        )
    if json:
        show_json({**asdict(report), "file": str(report.file)})
        return
    _show(report)


@patch.command("apply")
@guarded
def apply(
    base: opt.Model,
    patch_file: PatchArgument,
    out_folder: OutFolder,
    json: opt.Json = False,
) -> None:
    """Write the base with the edit of a patch: the bytes of the original edit, checked by their hashes.

    Example: abliterate patch apply tiny-chat tiny.patch.safetensors --out tiny-chat-abl
    """
    from abliterate import api

    with progress() as listen:
        written = api.apply_patch(base, patch_file, out_folder, on_event=listen)
    _written(written, json=json)


@patch.command("revert")
@guarded
def revert(
    edited: Annotated[str, typer.Argument(help="The edited checkpoint: a folder, or a Hub name (owner/model).")],
    patch_file: PatchArgument,
    out_folder: OutFolder,
    revision: opt.Revision = None,
    json: opt.Json = False,
) -> None:
    """Write the base that an edited checkpoint was made from, byte for byte, from the checkpoint and its patch alone.

    Example: abliterate patch revert tiny-chat-abl tiny.patch.safetensors --out tiny-chat-again
    """
    from abliterate import api

    with progress() as listen:
        written = api.revert_patch(edited, patch_file, out_folder, revision=revision, on_event=listen)
    _written(written, json=json)


def _written(folder: Path, *, json: bool) -> None:
    if json:
        show_json({"out": str(folder)})
        return
    out.print(f"written, every hash as recorded: {folder}", markup=False, soft_wrap=True)


def _show(report: "PatchReport") -> None:
    from abliterate.checkpoint.amounts import size
    from abliterate.cli.tables import table

    shown = table("patch", "part", "size", right=(1,))
    for name, amount in report.parts.items():
        if amount:
            shown.add_row(name, size(amount))
    shown.add_row("all", size(report.size_bytes))
    out.print(shown)
    if report.elements:
        out.print(
            f"{report.tensors} tensors, {report.elements:,} elements; {report.missed / report.elements:.1e} of them "
            f"are corrected to apply, {report.lost / report.elements:.1e} to revert"
        )
    out.print(f"written: {report.file}", markup=False, soft_wrap=True)
