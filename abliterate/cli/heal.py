"""``abliterate heal``: an edited checkpoint brought back to its base on harmless prompts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer
from rich.markup import escape

from abliterate.cli import options as opt
from abliterate.cli.console import guarded, out, progress, show_json
from abliterate.cli.evaluate import check_report
from abliterate.cli.recipe_options import Given, takes
from abliterate.errors import UsageError

if TYPE_CHECKING:
    from abliterate.workflow.healing import HealResult

METHODS = ("kl", "dpo")


@guarded
@takes("harmful", "harmless", "max_new_tokens", "scorer", "model")
def heal(
    edited: opt.Finished,
    *,
    base: opt.Base = None,
    out_folder: Annotated[Path | None, typer.Option("--out", help="Output folder. Default: NAME-healed.")] = None,
    objective: Annotated[
        str, typer.Option("--method", help="kl (the base's distributions), or dpo (preferences, through trl).")
    ] = "kl",
    rank: Annotated[int, typer.Option(min=1, help="Of the matrix that is added to each writer.")] = 8,
    prompts: Annotated[
        int, typer.Option(min=1, help="At most so many prompts of each part: training, validation, test.")
    ] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimiser at most.")] = 160,
    rate: Annotated[float, typer.Option(min=0.0, help="The learning rate.")] = 3e-4,
    given: Given,
    revision: opt.Revision = None,
    report: opt.ReportFile = None,
    json: opt.Json = False,
) -> None:
    """Train a small LoRA on harmless prompts to bring an edited checkpoint back to its base, and merge it.

    What it adds is kept orthogonal to what was removed at every step, so the proof still holds on the merged bytes;
    by --method kl, replies to harmful prompts are trained to stay as they are.
    Needs the extra: abliterate[train].

    Example: abliterate heal tiny-chat-abl --out tiny-chat-healed
    """
    if objective not in METHODS:
        raise UsageError(f"--method {objective}: no way to heal", f"choose one of: {', '.join(METHODS)}")
    from abliterate.model.healing import Schedule
    from abliterate.model.load import quiet_transformers
    from abliterate.publishing import manifest
    from abliterate.workflow.healing import HealingOptions
    from abliterate.workflow.healing import heal as heal_checkpoint

    check_report(report)
    quiet_transformers()
    target = out_folder or opt.default_out(edited, suffix="healed")
    options = HealingOptions(
        method=cast(Literal["kl", "dpo"], objective), rank=rank, most_prompts=prompts,
        schedule=Schedule(most_steps=steps, rate=rate),
    )  # fmt: skip
    with progress() as listen:
        result = heal_checkpoint(
            edited, target, base=base, revision=revision, changes=given, options=options, on_event=listen
        )
    document = manifest.read(result.out)
    if report is not None:
        from abliterate.evaluate.page import write_report

        title = f"{document['source']['name']}, abliterated and healed"
        write_report(report, title, result.evaluation, manifest=document)
    if json:
        show_json({"out": str(result.out), **document})
        return
    _show(result)


def _show(result: "HealResult") -> None:
    from abliterate.cli import tables
    from abliterate.method.statistics import Difference

    about = result.about
    kl, parts = about["validation_kl_nats"], about["prompts"]
    out.print(
        f"healed by {about['objective']}: rank {about['rank']} on {about['writers']} of {len(result.plan.writers)} "
        f"writers, from {parts['training']['count']} harmless prompts; KL on {parts['validation']['count']} validation "
        f"prompts from {kl['before']:.4f} to {kl['after']:.4f} nats per token "
        f"(step {about['kept_step']} of {about['steps']}), to the edited model on what is to stay "
        f"{kl['to_edited']:.4f}",
        markup=False,
        soft_wrap=True,
    )
    tables.show_verification(result.verification)
    out.print()
    tables.show_evaluation(result.evaluation)
    changes = "; ".join(f"{kind} {tables.change(Difference(**its))}" for kind, its in about["refusal_change"].items())
    out.print(f"refusals, healed against edited, same prompts: {changes}", markup=False, soft_wrap=True)
    out.print(f"[bold green]healed and verified:[/bold green] {escape(str(result.out))}", soft_wrap=True)
