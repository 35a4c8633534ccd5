"""``abliterate export``: a direction as a file that a runtime takes beside the model."""

from pathlib import Path
from typing import Annotated

import typer

from abliterate.cli import options as opt
from abliterate.cli.console import err, guarded, out, show_json
from abliterate.cli.stages import read_direction

export = typer.Typer(
    help="A direction as a file that a runtime takes beside the model, which stays as it is.", no_args_is_help=True
)

File = Annotated[Path, typer.Option("--out", help="The .gguf file to write.")]


@export.command("control-vector")
@guarded
def control_vector(
    direction: opt.DirectionFile,
    out_file: File,
    position: opt.Position = None,
    layer: opt.Layer = None,
    candidate: opt.CandidateId = None,
    category: opt.Category = None,
    ablate: Annotated[
        bool, typer.Option("--ablate", hidden=True, help="Refused, with the reason: such a file can only add.")
    ] = False,
    json: opt.Json = False,
) -> None:
    """Write the direction as a control vector of llama.cpp, which adds it to what leaves its block; it cannot ablate.

    Example: abliterate export control-vector direction.safetensors --out refusal.gguf
    """
    from abliterate import api

    if ablate:
        from abliterate.exports.control_vector import refuse_ablation

        refuse_ablation()
    chosen = read_direction(direction, position, layer, category=category, candidate=candidate)
    assert chosen is not None, "a file was given"
    blocks = api.export_control_vector(chosen, out_file)
    if json:
        show_json({"file": str(out_file), "blocks": blocks})
        return
    from abliterate.cli.tables import runs_of

    out.print(f"added to what leaves block {runs_of(blocks)} (from 0), by the strength given at run time")
    out.print(f"written: {out_file}", markup=False, soft_wrap=True)


@export.command("projection")
@guarded
def projection(
    direction: opt.DirectionFile,
    out_file: File,
    position: opt.Position = None,
    layer: opt.Layer = None,
    candidate: opt.CandidateId = None,
    category: opt.Category = None,
    blocks: Annotated[
        int | None, typer.Option(min=1, help="How many blocks the model has, where the file holds no measurement.")
    ] = None,
    json: opt.Json = False,
) -> None:
    """Write the direction as a projection file (GLP), for runtimes that know its keys; llama.cpp does not.

    Example: abliterate export projection direction.safetensors --out refusal-projection.gguf
    """
    from abliterate import api

    chosen = read_direction(direction, position, layer, category=category, candidate=candidate)
    assert chosen is not None, "a file was given"
    written = api.export_projection(chosen, out_file, blocks=blocks)
    if json:
        show_json({"file": str(written.out), "blocks": list(written.blocks), "mode": "project"})
        return
    from abliterate.cli.tables import runs_of

    out.print(f"taken out of what leaves block {runs_of(list(written.blocks))} (from 0)")
    err.print(
        "note: llama.cpp does not know this form and would add the vector: give it to runtimes that read glp.mode"
    )
    out.print(f"written: {out_file}", markup=False, soft_wrap=True)
