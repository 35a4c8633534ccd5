"""The edit that a recipe asks for."""

import torch

from abliterate.arch.codecs import read_rows
from abliterate.arch.edit_plan import EditPlan
from abliterate.arch.model_map import Writer
from abliterate.checkpoint.source import Checkpoint
from abliterate.editing.planning import along, check_constant, plan
from abliterate.editing.row_lengths import with_row_lengths
from abliterate.errors import PlanRefusedError
from abliterate.method.directions import DirectionSet
from abliterate.method.edits import stream_edit
from abliterate.method.places import Place
from abliterate.method.scope import Scope, scope_of
from abliterate.method.stream_edit import StreamEdit
from abliterate.options import ADDITION, EditOptions
from abliterate.recipe import Recipe

MOST_OF_EMBEDDING = 0.25
"""A constant in the embedding, as a share of the length of its rows.  Early residuals are little more than these rows,
and their norms see mostly the constant where it is long.  KL on the first token of harmless prompts, measured on the
bundled model: share 0.1 0.01 nats, 0.25 0.06, 0.5 1.2, 1.0 5.4; the harmless mean has a share of 1.6 there."""
ROWS = 1024


def scope_asked(options: EditOptions, n_layers: int) -> Scope:
    """Where a model of ``n_layers`` is edited, and how strongly.

    Raises:
        UsageError: there are no such layers, or nothing is left to edit.
    """
    return scope_of(options.roles, options.exclude_layers, options.strength, n_layers)


def stream_asked(options: EditOptions, directions: DirectionSet, n_layers: int) -> StreamEdit:
    """What is done to the stream of a model of ``n_layers`` along what was chosen.

    Raises:
        UsageError: there is no such edit, nothing was chosen, or the edit cannot be made of it.
    """
    return scope_asked(options, n_layers).of(stream_edit(options.change, directions, n_layers), n_layers)


def stream_of_hooks(checkpoint: Checkpoint, recipe: Recipe, directions: DirectionSet, n_layers: int) -> StreamEdit:
    """``stream_asked`` as hooks need it: lengths that rows are to keep are read from the weights of ``checkpoint``.

    Raises:
        UsageError: as for ``stream_asked``.
        PlanRefusedError: the lengths are asked for, and the plan refuses.
    """
    stream = stream_asked(recipe.edit, directions, n_layers)
    if not stream.lacks_lengths:
        return stream
    return with_row_lengths(plan(checkpoint, edit=stream, **recipe.plan_options)).stream or stream


def check_room(made: EditPlan, options: EditOptions) -> None:
    """Check, before a direction is looked for, that some block could hold it where the recipe adds it.

    Raises:
        PlanRefusedError: none could.
    """
    if options.change == ADDITION:
        places: list[Place] = [(layer, "MLP") for layer in range(made.model_map.n_layers)]
        check_constant(made.checkpoint, places, made.model_map.writers, adding=True)


def plan_asked(made: EditPlan, options: EditOptions, directions: DirectionSet) -> EditPlan:
    """``made`` with the edit that is asked for.

    Raises:
        UsageError: as for ``stream_asked``.
        PlanRefusedError: as for ``planning.along``, or a constant would drown the rows of the embedding.
    """
    found = with_row_lengths(along(made, stream_asked(options, directions, made.model_map.n_layers)))
    for writer in found.writers:
        constant = found.edits[writer.tensor.name].constant
        if constant is None or writer.role != "embedding" or writer.packed:
            continue
        share = float(constant.norm()) / _row_length(found, writer)
        if share > MOST_OF_EMBEDDING:
            raise PlanRefusedError(
                f"{writer.tensor.shard}: '{writer.tensor.name}' would gain a constant of {share:.1f} times the length "
                f"of its rows (at most {MOST_OF_EMBEDDING:g}): the model would be ruined",
                "remove the direction without a constant (--change removal), or preview this by hooks: chat --ablate",
            )
    return found


def _row_length(plan: EditPlan, writer: Writer) -> float:
    """Root mean square length of the first rows of an embedding."""
    rows = read_rows(plan.checkpoint.folder, writer.tensor, ROWS).to(torch.float64)
    return float(rows.square().sum(1).mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny))
