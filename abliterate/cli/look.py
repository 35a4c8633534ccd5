"""Commands that look and change nothing: plan, diff, architectures, recipes, methods."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from abliterate.cli import options as opt
from abliterate.cli.console import guarded, out, progress, show_json
from abliterate.cli.recipe_options import takes
from abliterate.recipe import Recipe, bundled_recipes, load_recipe

if TYPE_CHECKING:
    from abliterate.arch.edit_plan import EditPlan
    from abliterate.checkpoint.source import Checkpoint


@guarded
@takes("edit", leaving_out=["rounding", "change"])
def plan(
    model: opt.OptionalModel = None,
    *,
    revision: opt.Revision = None,
    recipe: Recipe,
    guess: Annotated[
        bool, typer.Option("--guess", help="Of an unknown model type, say what its tensors look like; edits nothing.")
    ] = False,
    direction: Annotated[
        Path | None, typer.Option(help="With a direction: how close the edit comes behind norms, block by block.")
    ] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every writer.")] = False,
    values: Annotated[
        bool, typer.Option("--values", help="Read all weights as well, and name those that hold NaN or infinity.")
    ] = False,
    json: opt.Json = False,
) -> None:
    """Show what an edit would change, from headers only: no weights are read or downloaded without --values.

    Example: abliterate plan meta-llama/Llama-3.1-8B-Instruct
    """
    from abliterate.data.bundled import open_model

    if guess:
        show_guess(open_model(model, revision=revision), as_json=json)
        return
    from abliterate.cli.tables import show_plan
    from abliterate.editing.asked import scope_asked
    from abliterate.editing.planning import plan as make_plan
    from abliterate.editing.planning import within

    made = make_plan(open_model(model, revision=revision), **recipe.plan_options)
    made = within(made, scope_asked(recipe.edit, made.model_map.n_layers).holds)
    from abliterate.workflow.passes import running
    from abliterate.workflow.session import with_default_prompts

    needs = running(made.checkpoint, made.model_map.family, with_default_prompts(model, recipe))
    bad = values_not_finite(made.checkpoint) if values else ()
    if json:
        found = {"not_finite": list(bad)} if values else {}
        show_json({**made.to_json(), "running": [each.to_json() for each in needs], **found})
        return
    show_plan(made, needs)
    if values:
        show_not_finite(bad)
    if direction is not None:
        show_behind_norms(made, direction)
    if tensors:
        show_writers(made)


def values_not_finite(checkpoint: "Checkpoint") -> tuple[str, ...]:
    """The tensors that hold NaN or infinity; fetches a checkpoint of the Hub."""
    from abliterate.checkpoint.hub import fetch
    from abliterate.checkpoint.values import not_finite

    with progress() as on_event:
        return not_finite(fetch(checkpoint), on_event)


def show_not_finite(names: Sequence[str]) -> None:
    """What looking at all values found."""
    for name in names:
        out.print(f"[yellow]![/yellow] {escape(name)} holds NaN or infinity")
    if not names:
        out.print("no value is NaN or infinite (of tensors in F16, BF16, F32 and F64; others were not looked at)")


def show_writers(plan: "EditPlan") -> None:
    """Every writer on a line of its own."""
    for writer in plan.writers:
        line = f"{writer.tensor.shard}  {writer.tensor.name}  {list(writer.tensor.shape)} axis {writer.axis}"
        out.print(line, markup=False)


def show_behind_norms(plan: "EditPlan", file: Path) -> None:
    """What ``docs/post-norm.md`` calls J and |a|, for each writer behind a norm; reads the norms."""
    from dataclasses import replace

    from abliterate.checkpoint import direction_file
    from abliterate.checkpoint.hub import fetch
    from abliterate.cli.tables import table
    from abliterate.editing.planning import along
    from abliterate.method.edits import removal

    behind = [writer for writer in plan.writers if writer.norms]
    if not behind:
        out.print("no norm stands behind a writer: the edit is exact whatever the direction")
        return
    plan = replace(plan, checkpoint=fetch(plan.checkpoint))
    found = along(plan, removal(direction_file.load(file).chosen)).edits
    shown = table("behind norms", "block", "writer", "J, predicted error", "|a|", "t", right=(0, 2, 3, 4))
    for writer in (writer for writer in behind if writer.tensor.name in found):
        made = found[writer.tensor.name]
        length = f"{float(made.write.norm()):.2f}"
        shown.add_row(str(writer.layer), writer.role, f"{made.predicted_error:.1e}", length, f"{made.ridge:g}")
    out.print(shown)


def show_guess(checkpoint: "Checkpoint", *, as_json: bool) -> None:
    """What the tensors of ``checkpoint`` look like, and a draft of a registry entry."""
    from dataclasses import asdict

    from abliterate.arch.guess import draft, guess
    from abliterate.cli.tables import table

    guesses = guess(checkpoint)
    if as_json:
        show_json([asdict(one) for one in guesses])
        return
    shown = table("a guess from names and shapes", "tensors", "count", "shape", "looks like", "evidence", right=(1,))
    for one in guesses:
        shape = "x".join(map(str, one.shape))
        shown.add_row(one.pattern, str(one.count), shape, one.role or "reader", escape(one.evidence))
    out.print(shown)
    out.print("\nA draft of a registry entry. It is not applied: check it against the model's code, and prove it.\n")
    out.print(draft(checkpoint, guesses), markup=False, highlight=False, soft_wrap=True)


@guarded
def diff(
    base: opt.Model,
    edited: Annotated[str, typer.Argument(help="The checkpoint to compare with BASE: a folder, or a Hub name.")],
    top: Annotated[int, typer.Option(help="How many changed tensors to show.")] = 12,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of EDITED on the Hub.")] = None,
    json: opt.Json = False,
) -> None:
    """Say which tensors differ between two checkpoints, by how much, and along what.

    Example: abliterate diff tiny-chat tiny-chat-abl
    """
    from dataclasses import asdict

    from abliterate import api
    from abliterate.cli.tables import show_diff

    with progress() as listen:
        found = api.diff(base, edited, revision=revision, on_event=listen)
    if json:
        groups = [asdict(group) for group in found.groups]
        document = asdict(found)
        document.pop("direction")  # as wide as the stream
        show_json({**document, "groups": groups, "only_writers": found.only_writers})
    else:
        show_diff(found, top=top)


@guarded
def architectures(json: opt.Json = False) -> None:
    """Show the registry: which tensors write to the residual stream, per family.

    Example: abliterate architectures
    """
    from dataclasses import asdict

    from abliterate.arch.measured import measured
    from abliterate.arch.registry import families

    found = measured()
    if json:
        show_json(
            [
                {**family.model_dump(), "measured": asdict(found[family.family]) if family.family in found else None}
                for family in families()
            ]
        )
        return
    from abliterate.cli.tables import EXACTNESS, table

    shown = table("architectures", "family", "model types", "writers", "class", "max difference", right=(4,))
    for family in families():
        roles = dict.fromkeys(writer.role for writer in family.writer if not writer.name.endswith("bias"))
        figures = str(found.get(family.family, "-"))
        shown.add_row(family.title, ", ".join(family.model_types), ", ".join(roles), family.exactness, figures)
    out.print(shown)
    out.print("max difference: largest difference of logits to inference-time ablation (A), or KL (B), in float64 on")
    out.print("tiny models of each type; and the largest share of the direction left in the stream")
    for name, meaning in EXACTNESS.items():
        out.print(f"class {name}: {meaning}")


@guarded
def recipes(json: opt.Json = False) -> None:
    """Show the recipes that ship with the package.

    Example: abliterate recipes
    """
    loaded = {name: load_recipe(name) for name in bundled_recipes()}
    if json:
        show_json({name: recipe.model_dump(mode="json") for name, recipe in loaded.items()})
        return
    from abliterate.cli.tables import table

    shown = table("recipes", "name", "title", "max KL", "tied", right=(2,))
    for name, recipe in loaded.items():
        shown.add_row(name, recipe.title, f"{recipe.find.max_kl_nats:g}", recipe.edit.tied)
    out.print(shown)


@guarded
def methods(model: opt.OptionalMap = None, *, revision: opt.Revision = None, json: opt.Json = False) -> None:
    """Show the published methods: what they do, where they are from and, with MODEL, what their results are worth.

    Example: abliterate methods Qwen/Qwen2.5-0.5B-Instruct
    """
    from dataclasses import asdict

    from abliterate.data.methods import methods as known

    worth = {}
    if model is not None:
        from abliterate.data.bundled import open_model
        from abliterate.editing.planning import plan as make_plan

        exactness = make_plan(open_model(model, revision=revision)).exactness
        worth = {name: its.worth(exactness) for name, its in known().items()}
    if json:
        show_json([{**asdict(its), "worth": worth.get(name)} for name, its in known().items()])
        return
    from abliterate.cli.tables import table

    shown = table("methods (--method NAME)", "name", "what", "published in", *(("its result is",) if worth else ()))
    for name, its in known().items():
        shown.add_row(name, its.what, its.source, *((worth[name],) if worth else ()))
    out.print(shown)
