"""``abliterate inspect``: how a model carries a direction."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abliterate.cli import options as opt
from abliterate.cli.console import guarded, out, progress, show_json
from abliterate.cli.evaluate import check_report
from abliterate.cli.recipe_options import takes
from abliterate.cli.stages import read_direction
from abliterate.recipe import Recipe

if TYPE_CHECKING:
    from abliterate.evaluate.inspection import Inspection


@guarded
@takes("harmful", "harmless", "model", leaving_out=["system"])
def inspect(
    model: opt.Model,
    direction: Annotated[Path, typer.Argument(help="A direction file, as select writes it.")],
    *,
    suffix: Annotated[str, typer.Option(help="A text of yours to put behind the harmful prompts.")] = "",
    prompts: Annotated[int, typer.Option(help="How many test prompts of each class.")] = 32,
    position: opt.Position = None,
    layer: opt.Layer = None,
    candidate: opt.CandidateId = None,
    category: opt.Category = None,
    recipe: Recipe,
    report: opt.FiguresFile = None,
    json: opt.Json = False,
) -> None:
    """Show the component along a direction layer by layer, and the heads and MLPs that write it.

    Example: abliterate inspect tiny-chat direction.safetensors
    """
    from abliterate.model.load import quiet_transformers
    from abliterate.workflow.inspecting import inspect as inspect_model
    from abliterate.workflow.session import open_session

    check_report(report)
    chosen = read_direction(direction, position, layer, category=category, candidate=candidate)
    if chosen is None:
        raise AssertionError("a file was given")
    quiet_transformers()
    with progress() as listen:
        session = open_session(model, recipe, on_event=listen)
        found = inspect_model(session, chosen, suffix=suffix, n_prompts=prompts)
    if report is not None:
        from abliterate.evaluate.inspection_page import write_inspection

        write_inspection(report, f"{session.checkpoint.name} along {direction.name}", found)
    if json:
        show_json(as_json(found))
        return
    _show(found)
    if report is not None:
        out.print(f"report: {report}", markup=False, soft_wrap=True)


def as_json(found: "Inspection") -> dict[str, Any]:
    """Means over the prompts, as plain data."""
    from abliterate.evaluate.inspection import SPANS

    return {
        "heads": [{"layer": layer, "head": head} for layer, head in found.heads],
        "sets": {
            one.name: {
                "prompts": one.prompts,
                "cosine": one.attribution.cosine.mean(0).tolist(),
                "stream": one.attribution.stream.mean(0).tolist(),
                "attention": one.attribution.attention.mean(0).tolist(),
                "mlp": one.attribution.mlp.mean(0).tolist(),
                "top_heads": [float(one.attribution.heads[:, layer, head].mean()) for layer, head in found.heads],
                "attention_of_top_heads": {span: one.attention[:, place].tolist() for place, span in enumerate(SPANS)},
                "unexplained": one.attribution.unexplained,
            }
            for one in found.sets
        },
    }


def _show(found: "Inspection") -> None:
    from abliterate.cli.tables import table

    names = [one.name for one in found.sets]
    right = tuple(range(1, len(names) + 1))
    cosines = table("cosine with the direction, last position, mean", "entering block", *names, right=right)
    states = found.sets[0].attribution.cosine.shape[1]
    for state in range(states):
        means = [float(one.attribution.cosine[:, state].mean()) for one in found.sets]
        cosines.add_row(str(state) if state < states - 1 else "(end)", *(f"{mean:+.3f} {_bar(mean)}" for mean in means))
    out.print(cosines)
    written = table(
        "written along the direction by each block, mean", "block", *(f"{n}: attention | MLP" for n in names)
    )
    for layer in range(states - 1):
        cells = [
            (one.attribution.attention[:, layer].mean(), one.attribution.mlp[:, layer].mean()) for one in found.sets
        ]
        written.add_row(str(layer), *(f"{float(a):+8.3f} | {float(b):+8.3f}" for a, b in cells))
    out.print(written)
    if found.heads:
        _show_heads(found, names)
    worst = max(one.attribution.unexplained for one in found.sets)
    if worst > 1e-2:
        out.print(f"note: these parts do not add up to the stream (off by {worst:.1%}): the model scales what it adds")


def _show_heads(found: "Inspection", names: list[str]) -> None:
    from abliterate.cli.tables import table
    from abliterate.evaluate.inspection import SPANS

    heads = table(
        f"the {len(found.heads)} heads that write most along it on harmful prompts; where they look",
        "block.head", *(f"{name}: writes | {', '.join(SPANS)}" for name in names),
    )  # fmt: skip
    for place, (layer, head) in enumerate(found.heads):
        cells = [
            f"{float(one.attribution.heads[:, layer, head].mean()):+.3f} | "
            + ", ".join(f"{float(share):.0%}" for share in one.attention[place])
            for one in found.sets
        ]
        heads.add_row(f"{layer}.{head}", *cells)
    out.print(heads)


def _bar(value: float, width: int = 8) -> str:
    """A bar for a cosine, empty for negative ones."""
    eighths = round(max(0.0, min(1.0, value)) * width * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")).ljust(width)
