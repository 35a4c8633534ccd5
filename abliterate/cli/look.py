"""Commands that look and change nothing: plan, diff, architectures, recipes."""

from typing import Annotated

import typer

from abliterate.cli import options as opt
from abliterate.cli.console import guarded, out, progress, show_json


@guarded
def plan(
    model: opt.OptionalModel = None,
    tied: opt.Tied = None,
    revision: opt.Revision = None,
    allow_partial: opt.AllowPartial = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every writer.")] = False,
    json: opt.Json = False,
) -> None:
    """Show what an edit would change, from headers only: no weights are read or downloaded.

    Example: abliterate plan meta-llama/Llama-3.1-8B-Instruct
    """
    settings = opt.make_recipe(None, tied=tied, allow_partial=allow_partial)
    from abliterate.bundled import resolve_model
    from abliterate.cli.tables import show_plan
    from abliterate.planning import plan as make_plan

    made = make_plan(resolve_model(model), revision=revision, tied=settings.tied, allow_partial=settings.allow_partial)
    if json:
        show_json(made.to_json())
        return
    show_plan(made)
    if tensors:
        for writer in made.writers:
            line = f"{writer.tensor.shard}  {writer.tensor.name}  {list(writer.tensor.shape)} axis {writer.axis}"
            out.print(line, markup=False)


@guarded
def diff(
    base: opt.Model,
    edited: Annotated[str, typer.Argument(help="The checkpoint folder to compare with BASE.")],
    top: Annotated[int, typer.Option(help="How many changed tensors to show.")] = 12,
    json: opt.Json = False,
) -> None:
    """Say which tensors differ between two checkpoints, by how much, and along what.

    Example: abliterate diff tiny-chat tiny-chat-abl
    """
    from dataclasses import asdict

    from abliterate.bundled import resolve_model
    from abliterate.cli.tables import show_diff
    from abliterate.comparison import diff as compare

    with progress() as listen:
        found = compare(resolve_model(base), edited, on_event=listen)
    if json:
        show_json({**asdict(found), "only_writers": found.only_writers})
    else:
        show_diff(found, top=top)


@guarded
def architectures(json: opt.Json = False) -> None:
    """Show the registry: which tensors write to the residual stream, per family.

    Example: abliterate architectures
    """
    from abliterate.arch.registry import families

    if json:
        show_json([family.model_dump() for family in families()])
        return
    from abliterate.cli.tables import EXACTNESS, table

    shown = table("architectures", "family", "model types", "writers", "class")
    for family in families():
        writers = [writer.name.replace(".{layer}.", ".N.") for writer in family.writer]
        shown.add_row(family.title, ", ".join(family.model_types), "\n".join(writers), family.exactness)
    out.print(shown)
    for name, meaning in EXACTNESS.items():
        out.print(f"class {name}: {meaning}")


@guarded
def recipes(json: opt.Json = False) -> None:
    """Show the recipes that ship with the package.

    Example: abliterate recipes
    """
    from abliterate.recipe import bundled_recipes, load_recipe

    loaded = {name: load_recipe(name) for name in bundled_recipes()}
    if json:
        show_json({name: recipe.model_dump(mode="json") for name, recipe in loaded.items()})
        return
    from abliterate.cli.tables import table

    shown = table("recipes", "name", "title", "max KL", "tied", right=(2,))
    for name, recipe in loaded.items():
        shown.add_row(name, recipe.title, f"{recipe.max_kl_nats:g}", recipe.tied)
    out.print(shown)
