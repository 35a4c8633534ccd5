"""``abliterate categories``: the directions of categories of prompts, each removed and each added."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from abliterate.cli import options as opt
from abliterate.cli.console import guarded, out, progress, show_json
from abliterate.cli.evaluate import check_report
from abliterate.cli.recipe_options import takes
from abliterate.cli.stages import read_direction
from abliterate.errors import UsageError
from abliterate.recipe import Recipe

if TYPE_CHECKING:
    from abliterate.evaluate.category_report import CategoryReport


@guarded
@takes("harmful", "harmless", "look_alike", "max_new_tokens", "scorer", "model", file=True)
def categories(
    model: opt.Model,
    directions: opt.DirectionFile,
    *,
    strengths: Annotated[
        str, typer.Option(help="How much of each direction to add: 1 is the difference of means, below 0 subtracts.")
    ] = "-1,-0.5,0.5,1",
    prompts: Annotated[int, typer.Option(min=1, help="At most so many test prompts of each category and kind.")] = 32,
    position: opt.Position = None,
    layer: opt.Layer = None,
    candidate: opt.CandidateId = None,
    recipe: Recipe,
    report: opt.FiguresFile = None,
    json: opt.Json = False,
) -> None:
    """Compare the directions of categories of prompts: cosines, refusals with each removed, and with each added.

    Example: abliterate categories tiny-chat direction.safetensors --report categories.html
    """
    from abliterate.model.load import quiet_transformers
    from abliterate.workflow.session import open_session
    from abliterate.workflow.trying_categories import try_categories

    check_report(report)
    amounts = _numbers(strengths)
    chosen = read_direction(directions, position, layer, candidate=candidate)
    assert chosen is not None
    quiet_transformers()
    with progress() as listen:
        session = open_session(model, recipe, on_event=listen)
        found = try_categories(session, chosen, strengths=amounts, n_prompts=prompts)
    if report is not None:
        from abliterate.evaluate.category_page import write_categories

        write_categories(report, f"{session.checkpoint.name} by category", found)
    if json:
        show_json(found.to_json())
        return
    _show(found)
    if report is not None:
        out.print(f"report: {report}", markup=False, soft_wrap=True)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(dict.fromkeys(float(part) for part in text.split(",") if part.strip()))
    except ValueError as error:
        raise UsageError(f"--strengths {text}: not numbers", "write them as -1,-0.5,0.5,1") from error


def _show(found: "CategoryReport") -> None:
    from abliterate.cli.tables import rate, table

    names = [escape(name) for name in found.categories]
    right = range(1, 1 + len(names))
    cosines = table(f"cosines of the directions of {found.candidate}", "", *names, right=right)
    for name, row in zip(names, found.cosines, strict=True):
        cosines.add_row(name, *(f"{value:+.3f}" for value in row))
    out.print(cosines)
    kinds = list(found.removals[0].over_refused)
    columns = ("", *names, *kinds, "broken")
    removed = table("refused, with directions removed; 95 % intervals", *columns, right=range(1, len(columns)))
    for one in found.removals:
        removed.add_row(escape(one.name), *map(rate, (*one.refused.values(), *one.over_refused.values(), one.broken)))
    out.print(removed)
    added = table("refused, with a direction added", "", "harmful", *kinds, "broken", right=range(1, 3 + len(kinds)))
    for category in found.categories:
        for one in found.curve(category):
            added.add_row(escape(one.name), *map(rate, (one.harmful, *one.over_refused.values(), one.broken)))
    out.print(added)
    if not found.removals[0].harmful.hits:
        out.print("note: the model refuses none of these prompts as it is, so removing shows nothing")
