"""Inference-time interventions by forward hooks: directional ablation and activation addition, for all rows or by row.

Ablation (Arditi et al. 2024, eq. 4) removes the directions wherever something enters the residual stream: at the
embedding's output, at the input of every block, and at every site where an attention or MLP output is added (behind
its norm, where there is one).  Addition (eq. 3) adds one vector to the input of one block, at all positions.

An edit of weights (``edited``) has its operator at the outputs of the writers alone, for it need not be one that can be
applied twice.

Where several thunks take turns at one model (``lockstep``), an intervention acts on the passes of the thunk that made
it, and of those that are parts of it; one made outside of them acts on all.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from abliterate.arch.edit_plan import EditPlan
from abliterate.arch.model_map import Writer
from abliterate.method.directions import Candidate
from abliterate.method.edits import removal, removing
from abliterate.method.linalg import orthonormal_basis, project_out, unit
from abliterate.method.places import Place
from abliterate.method.scope import WHOLE, Scope
from abliterate.method.stream_edit import StreamEdit
from abliterate.method.weight_edit import LowRank, WeightEdit
from abliterate.model.load import LoadedModel
from abliterate.model.tasks import Task, current, lineage

EMBEDDING: Place = (None, "embedding")
Change = Callable[[Tensor], Tensor]
Undo = Callable[[], None]


@contextmanager
def ablated(loaded: LoadedModel, directions: Float[Tensor, "d k"]) -> Iterator[None]:
    """Run with ``directions`` (any lengths, any angles) projected out of the residual stream everywhere."""
    basis = orthonormal_basis(directions)
    prepared: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def change(x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        key = (x.device, dtype)
        if key not in prepared:
            prepared[key] = basis.to(device=x.device, dtype=dtype)
        return project_out(x.to(dtype), prepared[key]).to(x.dtype)

    with everywhere(loaded, change):
        yield


@contextmanager
def edited(loaded: LoadedModel, stream: StreamEdit) -> Iterator[None]:
    """Run as an edit of the weights would make the model: its operator on what every writer adds to the stream.

    Not on the inputs of blocks: what is already in the stream stays, as it does when weights are edited.
    """

    def change_at(place: Place, module: nn.Module) -> Change | None:
        edit = stream.at(*place)
        if edit is None:
            return None
        if place != EMBEDDING:
            return operator(edit)
        return operator(edit, constant_factor=1 / loaded.embedding_factor if module is loaded.embedding else 0.0)

    with at_writers(loaded, change_at):
        yield


@contextmanager
def as_planned(loaded: LoadedModel, plan: EditPlan) -> Iterator[None]:
    """Run as the edit of ``plan`` would make the model; healed, with ``b (a x)`` beside each writer's ``W x``."""
    stream = plan.stream
    if stream is None:
        raise AssertionError("the plan has an edit")
    undoing = [
        undo
        for writer in plan.writers
        if (added := plan.edits[writer.tensor.name].added) is not None
        for undo in _on_product(linear_of(loaded, writer), added)
    ]
    try:
        with edited(loaded, stream):
            yield
    finally:
        for undo in undoing:
            undo()


def linear_of(loaded: LoadedModel, writer: Writer) -> nn.Module:
    """The module of a writer in a block, by its place in that block: models loaded otherwise have other prefixes."""
    assert writer.layer is not None, "the writer is in a block"
    _, _, name = writer.tensor.name.partition(f".{writer.layer}.")
    return loaded.blocks[writer.layer].get_submodule(name.removesuffix(".weight"))


def _on_product(module: nn.Module, added: LowRank) -> list[Undo]:
    """``module(x) + b (a x)``, in float32 or wider."""
    seen: list[Tensor] = []

    def see(x: Tensor) -> Tensor:
        seen[:] = [x]
        return x

    def add(y: Tensor) -> Tensor:
        dtype = torch.promote_types(y.dtype, torch.float32)
        a, b = (its.to(device=y.device, dtype=dtype) for its in (added.a, added.b))
        return (y.to(dtype) + (seen.pop().to(dtype) @ a.T) @ b.T).to(y.dtype)

    return [_on_input(module, see), _on_output(module, add)]


@contextmanager
def without(loaded: LoadedModel, candidate: Candidate, scope: Scope = WHOLE) -> Iterator[None]:
    """Run with what ``candidate`` holds taken out: everywhere, or, where each layer has its own, of what that adds.

    What is read along other vectors than it is taken out along is taken out of what writers add.
    With a ``scope`` that is not the whole, of what is added where it holds.
    """
    if candidate.is_orthogonal:
        taken_out = removed(loaded, candidate.everywhere.vectors, scope)
    else:
        taken_out = edited(loaded, scope.of(removal(candidate), loaded.n_layers))
    with taken_out:
        yield


def removed(
    loaded: LoadedModel, directions: Float[Tensor, "d k"], scope: Scope = WHOLE
) -> AbstractContextManager[None]:
    """Run with ``directions`` taken out: everywhere, or of what is added where ``scope`` holds."""
    if scope.is_whole:
        return ablated(loaded, directions)
    return edited(loaded, scope.of(removing(directions), loaded.n_layers))


def operator(edit: WeightEdit, *, constant_factor: float = 1.0) -> Change:
    """``s - strength write (read^T s) + constant``, in float32 or wider; the constant times ``constant_factor``.

    Where rows of writers are scaled, each component of that is.

    Raises:
        ValueError: by how much was not read from the weights.
    """
    scale = edit.known_row_scale
    prepared: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = {}

    def change(x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        key = (x.device, dtype)
        if key not in prepared:
            read, write = (vectors.to(device=x.device, dtype=dtype) for vectors in (edit.read, edit.write))
            constant, rows = (
                None if its is None else its.to(device=x.device, dtype=dtype) for its in (edit.constant, scale)
            )
            prepared[key] = (read, edit.strength * write, constant, rows)
        read, write, constant, rows = prepared[key]
        changed = x.to(dtype) - (x.to(dtype) @ read) @ write.T
        changed = changed if constant is None else changed + constant_factor * constant
        return (changed if rows is None else changed * rows).to(x.dtype)

    return change


@contextmanager
def ablated_each(loaded: LoadedModel, directions: Float[Tensor, "k d"], scope: Scope = WHOLE) -> Iterator[None]:
    """Run with one direction for each of ``k`` equal stretches of the rows of a batch: ``x_b - (x_b . r_b) r_b``.

    Where ``scope`` holds: if that is everywhere, on the inputs of blocks as well; else on what is added to the stream.

    Every place must give ``[rows, tokens, d]`` or ``[rows * tokens, d]``; see ``rows_apart``.

    Raises:
        ValueError: a direction is zero or not finite.
    """
    directions = torch.stack([unit(direction) for direction in directions])
    prepared: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def change(x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        key = (x.device, dtype)
        if key not in prepared:
            prepared[key] = directions.to(device=x.device, dtype=dtype)[:, None]
        r = prepared[key]
        of_each = x.to(dtype).reshape(len(r), -1, r.shape[-1])
        along = (of_each * r).sum(-1, keepdim=True)
        return torch.addcmul(of_each, along, r, value=-scope.strength).view(x.shape).to(x.dtype)

    with where(loaded, change, scope):
        yield


@contextmanager
def added_each(loaded: LoadedModel, vectors: Float[Tensor, "k d"], layer: int) -> Iterator[None]:
    """Run with one vector for each of ``k`` equal stretches of the rows added to what enters block ``layer``."""
    undo = _on_input(loaded.blocks[layer], lambda x: plus_each(x, vectors))
    try:
        yield
    finally:
        undo()


def plus_each(x: Float[Tensor, "rows *rest d"], vectors: Float[Tensor, "k d"]) -> Float[Tensor, "rows *rest d"]:
    """``x`` with one of ``vectors`` added to each of ``k`` equal stretches of its rows."""
    of_each = x.reshape(len(vectors), -1, x.shape[-1])
    return (of_each + vectors.to(device=x.device, dtype=x.dtype)[:, None]).view(x.shape)


@contextmanager
def rows_apart(loaded: LoadedModel, rows: int, tokens: int) -> Iterator[list[bool]]:
    """Run while every place of the residual stream is asked whether its rows can be told apart by its shape."""
    found: list[bool] = []
    shapes = ((rows, tokens), (rows * tokens,), (rows, 1))  # Gemma 4 runs its last blocks on the last token only

    def see(x: Tensor) -> Tensor:
        found.append(tuple(x.shape[:-1]) in shapes and x.shape[-1] == loaded.d_model)
        return x

    with everywhere(loaded, see):
        yield found


@contextmanager
def replaced(loaded: LoadedModel, layer: int, state: Tensor) -> Iterator[None]:
    """Run with ``state`` entering block ``layer``, whatever the blocks below it make."""
    undo = _on_input(loaded.blocks[layer], lambda x: state.to(device=x.device, dtype=x.dtype))
    try:
        yield
    finally:
        undo()


@contextmanager
def everywhere(loaded: LoadedModel, change: Change) -> Iterator[None]:
    """Run with ``change`` made wherever something enters the residual stream."""
    undoing = [_on_output(loaded.embedding, change)]
    undoing += [_on_input(block, change) for block in loaded.blocks]
    undoing += [_on_output(site, change) for sites in loaded.sites for site in sites]
    with _until_done(undoing):
        yield


@contextmanager
def at_writers(loaded: LoadedModel, change_at: Callable[[Place, nn.Module], Change | None]) -> Iterator[None]:
    """Run with a change of its own made of what each writer adds to the stream; None leaves a writer alone."""
    places: list[tuple[Place, nn.Module]] = [(EMBEDDING, one) for one in (loaded.embedding, *loaded.other_embeddings)]
    for layer, (sites, kinds) in enumerate(zip(loaded.sites, loaded.kinds, strict=True)):
        for site, kind in zip(sites, kinds, strict=True):
            place: Place = (layer, kind)
            places.append((place, site))
    changes = [(module, change_at(place, module)) for place, module in places]
    undoing = [_on_output(module, change) for module, change in changes if change is not None]
    with _until_done(undoing):
        yield


def where(loaded: LoadedModel, change: Change, scope: Scope) -> AbstractContextManager[None]:
    """Run with ``change`` made wherever something enters the stream; of less than that, where writers add to it."""
    if scope.is_whole:
        return everywhere(loaded, change)
    return at_writers(loaded, lambda place, _: change if scope.holds(place) else None)


@contextmanager
def added(loaded: LoadedModel, vector: Float[Tensor, " d"], layer: int, *, scale: float = 1.0) -> Iterator[None]:
    """Run with ``scale * vector`` added to the residual entering block ``layer``, at every position."""

    def change(x: Tensor) -> Tensor:
        return x + (scale * vector).to(device=x.device, dtype=x.dtype)

    undo = _on_input(loaded.blocks[layer], change)
    try:
        yield
    finally:
        undo()


@contextmanager
def observed(loaded: LoadedModel, see: Callable[[int, Tensor], None], *, leaving_last: bool = False) -> Iterator[None]:
    """Run while ``see(l, x)`` is shown the residual entering each block ``l``.

    With ``leaving_last``, ``see(n_layers, x)`` is shown the residual leaving the last block as well.
    """
    undoing = [_on_input(block, _showing(partial(see, layer))) for layer, block in enumerate(loaded.blocks)]
    if leaving_last:
        undoing.append(_on_output(loaded.blocks[-1], _showing(partial(see, loaded.n_layers))))
    with _until_done(undoing):
        yield


@contextmanager
def watched(
    module: nn.Module, *, entering: Callable[[Tensor], None] | None = None, leaving: Callable[[Tensor], None]
) -> Iterator[None]:
    """Run while ``entering`` is shown what goes into ``module``, and ``leaving`` what comes out of it."""
    undoing = [] if entering is None else [_on_input(module, _showing(entering))]
    undoing.append(_on_output(module, _showing(leaving)))
    with _until_done(undoing):
        yield


@contextmanager
def _until_done(undoing: Sequence[Undo]) -> Iterator[None]:
    try:
        yield
    finally:
        for undo in undoing:
            undo()


def _showing(see: Callable[[Tensor], None]) -> Change:
    def change(x: Tensor) -> Tensor:
        see(x)
        return x

    return change


def _on_output(module: nn.Module, change: Change) -> Undo:
    return _set(module, change, _hook_output)


def _on_input(module: nn.Module, change: Change) -> Undo:
    return _set(module, change, _hook_input)


def _set(module: nn.Module, change: Change, register: Callable[[nn.Module, Change], RemovableHandle]) -> Undo:
    owner = current()
    if owner is None:
        return register(module, change).remove
    shared = _SHARED.setdefault(module, {})
    if register not in shared:
        shared[register] = _OfTasks(lambda: shared.pop(register).handle.remove())
        shared[register].handle = register(module, shared[register].change)
    return shared[register].add(owner, change)


class _OfTasks:
    """The changes that tasks have set at one place, behind one hook: else every task would pass all hooks."""

    handle: RemovableHandle

    def __init__(self, when_empty: Callable[[], None]) -> None:
        self._changes: dict[Task, list[Change]] = {}
        self._when_empty = when_empty

    def change(self, x: Tensor) -> Tensor:
        """``x`` after the changes of the task that runs, and of those that it is a part of."""
        for task in lineage():
            for change in self._changes.get(task, ()):
                x = change(x)
        return x

    def add(self, owner: Task, change: Change) -> Undo:
        """Add a change of ``owner``."""
        self._changes.setdefault(owner, []).append(change)
        return partial(self._remove, owner, change)

    def _remove(self, owner: Task, change: Change) -> None:
        self._changes[owner].remove(change)
        if not self._changes[owner]:
            del self._changes[owner]
        if not self._changes:
            self._when_empty()


_SHARED: WeakKeyDictionary[nn.Module, dict[Any, _OfTasks]] = WeakKeyDictionary()


def _hook_output(module: nn.Module, change: Change) -> RemovableHandle:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:  # noqa: ANN401 - whatever the module returns
        if isinstance(output, Tensor):
            return change(output)
        return (change(output[0]), *output[1:])

    return module.register_forward_hook(hook)


def _hook_input(module: nn.Module, change: Change) -> RemovableHandle:
    """The residual is the first positional argument, or the keyword ``hidden_states``."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return module.register_forward_pre_hook(hook, with_kwargs=True)
