"""``abliterate import``: a GGUF file as a checkpoint."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from abliterate.cli import options as opt
from abliterate.cli.console import guarded, out, progress, show_json
from abliterate.errors import UsageError

DTYPES = ("bfloat16", "float16")


@guarded
def import_gguf(
    gguf: Annotated[Path, typer.Argument(help="A .gguf file of a language model, whole.")],
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Output folder. Default: the name of the file.")
    ] = None,
    half: Annotated[
        str | None,
        typer.Option("--as", help="bfloat16 or float16. Default: float16 for a file of F16, else bfloat16."),
    ] = None,
    json: opt.Json = False,
) -> None:
    """Write a GGUF file as a checkpoint folder, its weights dequantised, so that it can be edited.

    Example: abliterate import qwen2.5-0.5b-instruct-q4_k_m.gguf --out qwen2.5-0.5b
    """
    if half is not None and half not in DTYPES:
        raise UsageError(f"--as {half}: not a dtype to import in", f"choose one of: {', '.join(DTYPES)}")
    from abliterate import api
    from abliterate.exports.importing import loss

    dtype = cast(Literal["bfloat16", "float16"] | None, half)
    with progress() as listen:
        report = api.import_gguf(gguf, out_folder or Path(gguf.stem), dtype=dtype, on_event=listen)
    if json:
        show_json({**asdict(report), "out": str(report.out), "source": str(report.source)})
        return
    out.print(f"{report.architecture}: {', '.join(f'{n:,} values as {kind}' for kind, n in report.values.items())}")
    out.print(loss(report))
    out.print(f"written: {report.out}", markup=False, soft_wrap=True)
