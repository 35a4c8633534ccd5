"""``abliterate harden``: a model trained to refuse where its refusal direction is gone."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.markup import escape

from abliterate.cli import options as opt
from abliterate.cli.console import guarded, out, progress, show_json
from abliterate.cli.recipe_options import takes
from abliterate.errors import UsageError
from abliterate.method.hardening import DEFAULTS, METHODS, Hardening, HardeningMethod
from abliterate.recipe import Recipe

if TYPE_CHECKING:
    from abliterate.publishing.hardened import Hardened


@guarded
@takes("harmful", "harmless", "max_new_tokens", "scorer", "model", file=True)
def harden(
    model: opt.Model,
    *,
    out_folder: Annotated[Path | None, typer.Option("--out", help="Output folder. Default: NAME-hardened.")] = None,
    how: Annotated[
        str, typer.Option("--method", help="random-ablation, extended-refusal or both: what is trained.")
    ] = DEFAULTS.method,
    refusals: Annotated[
        Path | None,
        typer.Option(help='Replies to learn, one {"prompt": ..., "reply": ...} a line. Default: general texts.'),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimiser.")] = DEFAULTS.steps,
    batch: Annotated[
        int,
        typer.Option("--train-batch", min=2, help="Prompts of a step, half refused and half answered; an even number."),
    ] = DEFAULTS.batch,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the matrices that are trained.")] = DEFAULTS.rank,
    rate: Annotated[float, typer.Option(min=0, help="Peak learning rate.")] = DEFAULTS.rate,
    share: Annotated[
        float, typer.Option(min=0, max=1, help="Of the steps, those with directions ablated.")
    ] = DEFAULTS.share,
    most: Annotated[int, typer.Option(min=1, help="Directions ablated together at most.")] = DEFAULTS.most,
    every: Annotated[
        int, typer.Option(min=1, help="Steps after which directions are measured again.")
    ] = DEFAULTS.every,
    prompts: Annotated[
        int, typer.Option(min=0, help="Measure both models on at most so many test prompts of each class; 0: neither.")
    ] = 32,
    recipe: Recipe,
    revision: opt.Revision = None,
    json: opt.Json = False,
) -> None:
    """Train a model to refuse also where its refusal direction is removed. Needs the extra: abliterate[train].

    Example: abliterate harden tiny-chat --out tiny-chat-hardened --method random-ablation
    """
    if how not in METHODS:
        raise UsageError(f"--method {how}: no way to harden", f"choose one of: {', '.join(METHODS)}")
    if batch % 2:
        raise UsageError(f"--train-batch {batch}: is odd", "half of it are refused prompts, and half answered ones")
    from abliterate import api
    from abliterate.model.load import quiet_transformers

    options = Hardening(
        method=cast(HardeningMethod, how), steps=steps, batch=batch, rank=rank, rate=rate, share=share, most=most,
        every=every, seed=recipe.find.seed,
    )  # fmt: skip
    quiet_transformers()
    with progress() as listen:
        report = api.harden(
            model, out_folder or opt.default_out(model, suffix="hardened"), options, recipe=recipe, refusals=refusals,
            n_prompts=prompts, revision=revision, on_event=listen,
        )  # fmt: skip
    if json:
        show_json({**report.to_json(), "out": str(report.out)})
        return
    _show(report)


def _show(report: "Hardened") -> None:
    from abliterate.cli.tables import rate, table

    before, after = report.before, report.after
    if before is not None and after is not None:
        shown = table("test prompts; 95 % intervals", "", escape(report.base), "hardened", right=(1, 2))
        rows = {
            "harmful refused": "refused", "harmful refused, one direction ablated": "without_one",
            "harmless refused": "over_refused", "harmless replies with the known answer": "facts",
        }  # fmt: skip
        for name, field in rows.items():
            values = [getattr(its, field) for its in (before, after)]
            shown.add_row(name, *("-" if its is None else rate(its) for its in values))
        out.print(shown)
    out.print(
        f"learned from {report.refused} refusals and {report.answered} answers; loss {report.losses[0]:.3f} to "
        f"{report.losses[-1]:.3f} nats a token"
    )
    out.print("what still breaks it: abliterate audit on both", markup=False)
    out.print(f"written: {report.out}", markup=False, soft_wrap=True)
