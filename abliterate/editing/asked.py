"""The edit that a recipe asks for."""

from abliterate.method.directions import DirectionSet
from abliterate.method.edits import stream_edit
from abliterate.method.scope import Scope, scope_of
from abliterate.method.stream_edit import StreamEdit
from abliterate.recipe import EditOptions


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
