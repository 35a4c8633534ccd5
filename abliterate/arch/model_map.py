"""Every tensor of a checkpoint gets exactly one role: writer, reader or head.  What has none is an error.

This is where a silent skip would begin, so nothing here guesses: the names decide, the shapes are a guard, and every
block must hold every writer that is not optional.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from abliterate.arch.formats import DTYPES
from abliterate.arch.packed import METHODS, Packed, packed_tensors, quantisation, text_config
from abliterate.arch.registry import family_of
from abliterate.arch.sizes import config_sizes, is_tied
from abliterate.arch.spec import DRAFTS, RESIDUAL_AXIS, Family, Matcher, WriterSpec, kind_of
from abliterate.checkpoint.header import TensorInfo
from abliterate.checkpoint.source import Checkpoint
from abliterate.errors import PlanRefusedError, UnknownTensorError, UnsupportedFormatError
from abliterate.method.places import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """One tensor that writes to the residual stream.

    ``axis`` is its residual axis on disk.  ``norms`` are the norm weights between it and the stream, if any.
    ``drafts`` says that it belongs to a next-token block, which only drafts for the main model.  ``packed`` is given
    where the values are quantised: ``tensor`` then holds them as they are stored.
    """

    tensor: TensorInfo
    axis: int
    role: str
    layer: int | None
    norms: tuple[TensorInfo, ...]
    gain: Literal["w", "1+w"]
    drafts: bool = False
    packed: Packed | None = None

    @property
    def name(self) -> str:
        """What the model calls it: where it is quantised, the tensor on disk may be called after its blocks."""
        return self.packed.name if self.packed else self.tensor.name

    @property
    def format(self) -> str:
        """The format of its values: a dtype of safetensors, or "MXFP4"."""
        return self.packed.format if self.packed else self.tensor.dtype

    @property
    def place(self) -> Place:
        """Where in the model it writes."""
        kind = kind_of(self.role)
        return (self.layer if kind in ("attention", "MLP") else None, kind)

    @property
    def in_rows(self) -> bool:
        """Whether stream vectors lie in the rows on disk, next to each other; otherwise in the columns."""
        return self.axis == len(self.tensor.shape) - 1

    @property
    def row_elements(self) -> int:
        """Stored elements of one row."""
        return self.tensor.shape[-1] if self.in_rows else math.prod(self.tensor.shape[self.axis + 1 :])

    @property
    def row_values(self) -> int:
        """Values of one row."""
        return self.row_elements * (2 if self.format == "MXFP4" else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMap:
    """What the registry makes of a checkpoint.

    ``head`` is the stored unembedding, None when only the embedding is stored.  ``tied`` says whether the model loads
    the embedding as its head.  ``expected`` counts the writers the family and configuration call for, ``unknown`` and
    ``missing`` name what keeps coverage from being complete.  ``towers`` counts the tensors of each encoder that is
    left alone.  ``reason`` says why no edit can be exact (class C), and is empty where one can.
    """

    family: Family
    model_type: str
    d_model: int
    n_layers: int
    writers: tuple[Writer, ...]
    head: TensorInfo | None
    head_name: str
    tied: bool
    expected: int
    unknown: tuple[str, ...]
    missing: tuple[str, ...]
    towers: Mapping[str, int]
    reason: str

    @property
    def complete(self) -> bool:
        """Every tensor known and every writer found."""
        return not self.unknown and not self.missing

    @property
    def embedding(self) -> Writer:
        """The token embedding."""
        return next(writer for writer in self.writers if writer.role == "embedding")


def map_model(checkpoint: Checkpoint, *, allow_partial: bool = False) -> ModelMap:
    """Give every tensor of ``checkpoint`` its role.

    Raises:
        UnknownArchitectureError: the model type is not in the registry.
        UnknownTensorError: coverage is not complete, unless ``allow_partial``.
        UnsupportedFormatError: a writer is stored in a format that cannot be edited.
    """
    family = family_of(checkpoint.config, where=checkpoint.name)
    text = text_config(checkpoint.config)
    packed, extra = _packed(checkpoint)
    reason = family.class_c_reason(text)
    if reason and not allow_partial:
        raise PlanRefusedError(
            f"{checkpoint.name}: no edit of {checkpoint.model_type} weights can remove a direction: {reason}",
            "--allow-partial edits what can be edited, brands the result and reports what is left",
        )
    sizes = config_sizes(text, family, checkpoint.name)
    _check_counts(checkpoint, sizes)
    family = family.for_config(text)
    found = _sort_tensors(checkpoint, family, sizes, packed, extra)
    writers, prefix, head = found.writers, found.prefix, found.head
    missing = _missing(family, writers, sizes, prefix)
    model_map = ModelMap(
        family=family,
        model_type=checkpoint.model_type,
        d_model=sizes[RESIDUAL_AXIS],
        n_layers=sizes["n_layers"],
        writers=tuple(writers),
        head=head,
        head_name=head.name if head else _head_name(family, prefix),
        tied=is_tied(checkpoint.config, family),
        expected=len(writers) + len(missing),
        unknown=tuple(found.unknown),
        missing=tuple(missing),
        towers=found.towers,
        reason=reason,
    )
    if not model_map.complete and not allow_partial:
        raise UnknownTensorError(_incomplete(checkpoint, model_map), _INCOMPLETE_HINT)
    if not any(writer.role == "embedding" for writer in writers):
        raise UnknownTensorError(f"{checkpoint.name}: has no token embedding", "give a complete checkpoint")
    if head is None and not model_map.tied:
        raise UnknownTensorError(
            f"{checkpoint.name}: the head is not tied, but '{model_map.head_name}' is missing",
            "give a complete checkpoint, or set tie_word_embeddings in its config.json",
        )
    return model_map


def _check_counts(checkpoint: Checkpoint, sizes: Mapping[str, int]) -> None:
    """Check that there can be so many blocks, and layers of experts: each block has a tensor, each expert an element.

    Raises:
        UnknownTensorError: there are more; looking for the writers of each would take for ever.
    """
    found = len(checkpoint.tensors)
    for axis, count in sizes.items():
        if (axis in ("n_layers", "n_mtp") and count > found) or (axis == "n_experts" and count > MOST_EXPERTS):
            raise UnknownTensorError(
                f"{checkpoint.name}/config.json: {axis} is {count:,}, and the checkpoint holds {found:,} tensors",
                "config.json and shards do not belong together: fetch both again",
            )


MOST_EXPERTS = 2**16


def _refused_format(checkpoint: Checkpoint, method: str) -> UnsupportedFormatError:
    ways = {
        "gptq": "edit the checkpoint it was made from, and run GPTQ on the result",
        "awq": "edit the checkpoint it was made from, and run AWQ on the result",
        "bitsandbytes": "edit the 16-bit checkpoint; bitsandbytes quantises that when it is loaded",
    }
    way = ways.get(method, "edit the original bf16 or fp16 checkpoint and quantise the result")
    return UnsupportedFormatError(f"{checkpoint.name}: the weights are quantised ({method})", way)


def _packed(checkpoint: Checkpoint) -> tuple[Mapping[str, Packed], set[str]]:
    """The FP8 and MXFP4 tensors of a checkpoint by the name of their values, and the names that belong to them.

    Raises:
        UnsupportedFormatError: it is quantised in another way.
    """
    settings = quantisation(checkpoint.config)
    if settings is None:
        return {}, set()
    method = str(settings.get("quant_method", "unknown"))
    if method not in METHODS:
        raise _refused_format(checkpoint, method)
    return packed_tensors(checkpoint)


@dataclass(slots=True, kw_only=True)
class _Sorted:
    """The tensors of a checkpoint by role, as far as they have one."""

    writers: list[Writer]
    unknown: list[str]
    prefix: str
    head: TensorInfo | None
    towers: dict[str, int]


def _sort_tensors(
    checkpoint: Checkpoint,
    family: Family,
    sizes: Mapping[str, int],
    packed: Mapping[str, Packed],
    extra: set[str],
) -> _Sorted:
    found = _Sorted(writers=[], unknown=[], prefix=family.prefixes[0], head=None, towers={})
    matchers = MatcherCache(family)
    heads = {_head_name(family, prefix) for prefix in family.prefixes}
    head_biases = {name.removesuffix("weight") + "bias" for name in heads}
    n_layers, drafting = sizes["n_layers"], sizes.get("n_mtp", 0)
    for tensor in checkpoint.tensors.values():
        if tensor.name in heads:
            found.head = tensor
            continue
        if tensor.name in head_biases or tensor.name in extra:
            continue
        own = packed.get(tensor.name)
        match, matcher = matchers.role(own.name if own else tensor.name)
        layer, expert = _number(match, "layer"), _number(match, "expert")
        beyond = (layer or 0) >= n_layers + drafting or (expert or 0) >= sizes.get("n_experts", 1)
        if matcher is None or match is None or beyond:
            found.unknown.append(tensor.name)
        elif matcher.writer is not None:
            drafts = (layer or 0) >= n_layers or matcher.writer.role == DRAFTS
            writer = _writer(checkpoint, tensor, own, matcher.writer, sizes, layer, match["prefix"])
            found.writers.append(replace(writer, drafts=drafts, role=DRAFTS if drafts else writer.role))
            if writer.role == "embedding" and not drafts:
                found.prefix = match["prefix"]
        elif matcher.tower is not None:
            found.towers[matcher.tower] = found.towers.get(matcher.tower, 0) + 1
    return found


class MatcherCache:
    """Names that differ in layer and expert only mostly match the same pattern: it is tried first."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._last: dict[str, Matcher] = {}

    def role(self, name: str) -> tuple["re.Match[str] | None", Matcher | None]:
        """The pattern that ``name`` matches, if any."""
        form = _NUMBER.sub("0", name)
        guess = self._last.get(form)
        match = guess.regex.fullmatch(name) if guess else None
        if guess is not None and match is not None:
            return match, guess
        for matcher in self._family.matchers:
            match = matcher.regex.fullmatch(name)
            if match is not None:
                self._last[form] = matcher
                return match, matcher
        return None, None


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def _number(match: "re.Match[str] | None", name: str) -> int | None:
    return int(match[name]) if match and match.groupdict().get(name) else None


def _axes(tensor: TensorInfo, shape: tuple[int, ...], spec: WriterSpec, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The one layout of ``spec`` that ``tensor``, of this shape, has."""
    problems = {axes: _misfit(shape, axes, sizes) for axes in spec.layouts}
    fitting = [axes for axes, problem in problems.items() if not problem]
    if len(fitting) == 1:
        return fitting[0]
    problem = next(iter(problems.values())) or "fits several layouts, and nothing tells which it is"
    raise UnknownTensorError(
        f"{tensor.shard}: '{tensor.name}' has shape {list(shape)}: {problem}",
        "the registry entry or the configuration does not fit this checkpoint; nothing was changed",
    )


def _misfit(shape: tuple[int, ...], axes: tuple[str, ...], sizes: Mapping[str, int]) -> str:
    if len(shape) != len(axes):
        return f"expected axes ({' '.join(axes)})"
    for axis, extent in zip(axes, shape, strict=True):
        if axis in sizes and sizes[axis] != extent:
            return f"axis {axis} is {extent} there and {sizes[axis]} in config.json"
    return ""


def _writer(
    checkpoint: Checkpoint,
    tensor: TensorInfo,
    packed: Packed | None,
    spec: WriterSpec,
    sizes: Mapping[str, int],
    layer: int | None,
    prefix: str,
) -> Writer:
    if packed is None and tensor.dtype not in DTYPES:
        raise UnsupportedFormatError(
            f"{tensor.shard}: '{tensor.name}' is stored as {tensor.dtype}, which cannot be edited",
            f"use a checkpoint stored as one of {', '.join(DTYPES)}",
        )
    axis = _axes(tensor, packed.shape if packed else tensor.shape, spec, sizes).index(RESIDUAL_AXIS)
    if packed is not None:
        axis = packed.stored_axis(axis)
    names = [prefix + name.replace("{layer}", str(layer)) for name in spec.norms]
    norms = tuple(
        _norm(checkpoint, tensor, axis, name.removesuffix("?"))
        for name in names
        if not name.endswith("?") or name.removesuffix("?") in checkpoint.tensors
    )
    return Writer(tensor=tensor, axis=axis, role=spec.role, layer=layer, norms=norms, gain=spec.gain, packed=packed)


def _norm(checkpoint: Checkpoint, tensor: TensorInfo, axis: int, name: str) -> TensorInfo:
    norm = checkpoint.tensors.get(name)
    if norm is None:
        raise UnknownTensorError(
            f"{checkpoint.name}: '{name}', the norm behind '{tensor.name}', is missing",
            "give a complete checkpoint; nothing was changed",
        )
    if norm.shape != (tensor.shape[axis],) or norm.dtype not in DTYPES:
        raise UnknownTensorError(
            f"{norm.shard}: '{name}' has shape {list(norm.shape)} {norm.dtype}, "
            f"expected one gain for each of the {tensor.shape[axis]} channels of '{tensor.name}'",
            "the registry entry does not fit this checkpoint; nothing was changed",
        )
    return norm


def _missing(family: Family, writers: list[Writer], sizes: Mapping[str, int], prefix: str) -> list[str]:
    """Names of writers that must exist and do not: fixed ones, missing experts, and slots that nothing fills."""
    present = {writer.name for writer in writers}
    wanted: list[str] = []
    filled: set[tuple[str, int]] = set()
    for spec in family.writer:
        layers = range(sizes["n_layers"]) if spec.per_layer else (0,)
        for layer in layers:
            names = _names(spec, layer, sizes, prefix)
            found = [name for name in names if name in present]
            if spec.slot and found:
                filled.add((spec.slot, layer))
            if found if spec.slot else not spec.optional:
                wanted += names
    missing = [name for name in wanted if name not in present]
    for slot in family.slots:
        missing += [f"{slot} of block {n}" for n in range(sizes["n_layers"]) if (slot, n) not in filled]
    return missing


def _names(spec: WriterSpec, layer: int, sizes: Mapping[str, int], prefix: str) -> list[str]:
    name = ("" if spec.absolute else prefix) + spec.name.replace("{layer}", str(layer))
    if not spec.per_expert:
        return [name]
    return [name.replace("{expert}", str(expert)) for expert in range(sizes.get("n_experts", 0))]


def _head_name(family: Family, prefix: str) -> str:
    return prefix.removesuffix("model.") + family.head if prefix.startswith("language_model.") else family.head


def _incomplete(checkpoint: Checkpoint, model_map: ModelMap) -> str:
    parts = []
    if model_map.missing:
        parts.append(f"writer '{model_map.missing[0]}' is missing{_more(model_map.missing)}")
    if model_map.unknown:
        parts.append(f"tensor '{model_map.unknown[0]}' has no known role{_more(model_map.unknown)}")
    found = len(model_map.writers)
    return f"{checkpoint.name}: writers {found} of {model_map.expected}: {'; '.join(parts)}"


def _more(names: tuple[str, ...]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


_INCOMPLETE_HINT = "nothing was changed; --allow-partial edits what is known and brands the result as partial"
