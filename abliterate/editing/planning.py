"""The plan: exactly what an edit will change, decided before any byte is written.

What is edited follows from headers and ``config.json`` alone (``plan``).  What happens to each writer follows from what
the edit does to the residual stream (``along``); for that the small gains of norms behind writers are read.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from abliterate.arch.edit_plan import EditPlan, TiedPolicy
from abliterate.arch.formats import FORMATS
from abliterate.arch.gains import read_gain
from abliterate.arch.model_map import ModelMap, Writer, map_model
from abliterate.arch.packed import text_config
from abliterate.checkpoint.hashes import same_bytes
from abliterate.checkpoint.opening import open_checkpoint
from abliterate.checkpoint.source import Checkpoint
from abliterate.errors import CheckpointError, PlanRefusedError, UnsupportedFormatError
from abliterate.method.edits import behind_norm
from abliterate.method.places import Place, in_words
from abliterate.method.stream_edit import StreamEdit
from abliterate.method.weight_edit import WeightEdit


def plan(
    model: str | Path | Checkpoint,
    *,
    edit: StreamEdit | None = None,
    revision: str | None = None,
    tied: TiedPolicy = "untie",
    mtp: bool = True,
    allow_partial: bool = False,
) -> EditPlan:
    """Plan the edit of ``model`` (a folder or a Hub name) from its headers; of tensors, ``edit`` takes norm gains only.

    ``edit`` is what shall happen to the stream; None plans what any edit of everything would touch.  ``tied`` decides
    what happens to a tied head: "untie" writes the unedited embedding as a head of its own (exact), "shared" edits the
    shared matrix in place (the head changes too), "keep" leaves the embedding unedited (it still writes the direction).
    ``mtp`` False leaves next-token blocks as they are.

    Raises:
        PlanRefusedError: unknown architecture, tensors without a role, or a format that cannot be edited.
        SourceError: the source is unreadable or corrupt, or is here with its headers only.
    """
    made = _covering(model, revision=revision, tied=tied, mtp=mtp, allow_partial=allow_partial)
    return made if edit is None else along(made, edit)


def along(made: EditPlan, edit: StreamEdit) -> EditPlan:
    """``made`` with the edit of every writer; what ``edit`` leaves alone is no longer in it.

    Raises:
        CheckpointError: the edit has the wrong width, or a gain cannot be read.
        NonFiniteError: a norm weight is not finite.
        PlanRefusedError: a norm's gain is zero along a direction, or a constant has no place to go.
    """
    if not any(True for _ in edit.edits()):
        raise PlanRefusedError("the edit changes nothing", "give it a direction to change something along")
    if edit.d_model != made.model_map.d_model:
        raise CheckpointError(
            f"the direction has {edit.d_model} components, {made.checkpoint.name} has {made.model_map.d_model}",
            "use a direction measured on this model",
        )
    layers = {layer for (layer, _), its in edit.places.items() if layer is not None and its is not None}
    if layers and max(layers) >= made.model_map.n_layers:
        raise PlanRefusedError(
            f"{made.checkpoint.name}: the edit names layer {max(layers)}, and there are {made.model_map.n_layers}",
            "use an edit that was made for this model",
        )
    found = within(made, lambda place: edit.at(*place) is not None, adding=edit.adds)
    edits = _Edits(made.checkpoint, made.model_map, edit, found.writers)
    return replace(found, stream=edit, edits={writer.tensor.name: edits.of(writer) for writer in found.writers})


def within(made: EditPlan, holds: Callable[[Place], bool], *, adding: bool = False) -> EditPlan:
    """``made`` without the writers at places where ``holds`` is false; a note says where they are.

    ``adding``: nothing was to be taken out of any.

    Raises:
        PlanRefusedError: none is left.
    """
    writers = tuple(writer for writer in made.writers if holds(writer.place))
    if not writers:
        raise PlanRefusedError(
            f"{made.checkpoint.name}: the edit changes no writer of this model", "use an edit that was made for it"
        )
    found = made
    if len(writers) < len(made.writers):
        alone = in_words(writer.place for writer in made.writers if not holds(writer.place))
        left = len(made.writers) - len(writers)
        still = "" if adding else " and may still write the direction"
        note = f"{left} of {len(made.writers)} writers are left alone{still}: {alone}"
        found = replace(made, writers=writers, notes=(*made.notes, note))
    if made.model_map.tied and not holds((None, "embedding")):  # whatever was asked for, the head stays as it is
        notes = tuple(
            note for note in found.notes if note not in _head_notes(made.checkpoint, made.model_map, made.tied)
        )
        partial = not made.model_map.complete or bool(made.model_map.reason)
        exactness = "C" if partial else made.model_map.family.exactness
        found = replace(found, added_head=None, sets_untied=False, notes=notes, exactness=exactness)
    return found


class _Edits:
    """The edits of writers; the same value for all that are edited alike."""

    def __init__(
        self, checkpoint: Checkpoint, model_map: ModelMap, stream: StreamEdit, writers: Sequence[Writer]
    ) -> None:
        self._checkpoint, self._stream = checkpoint, stream
        self._embedding_scale = model_map.family.scale_of_embedding(text_config(checkpoint.config))
        self._made: dict[object, WeightEdit] = {}
        for place in {writer.place for writer in writers}:
            edit = stream.at(*place)
            if edit is not None and edit.constant is not None:
                check_constant(checkpoint, [place], writers, adding=edit.adds)

    def of(self, writer: Writer) -> WeightEdit:
        """The edit of one writer."""
        edit = self._stream.at(*writer.place)
        assert edit is not None, "the writer is edited"
        constant = edit.constant is not None and _holds_constant(writer)
        key = (id(edit), writer.norms, writer.gain, constant and writer.role)
        if key not in self._made:
            try:
                self._made[key] = self._make(writer, edit, constant=constant)
            except ValueError as error:
                raise PlanRefusedError(
                    f"{writer.tensor.shard}: '{writer.tensor.name}' cannot be edited: {error}",
                    "this writer's norm needs no edit along the direction or is damaged: look at its weight",
                ) from error
        return self._made[key]

    def _make(self, writer: Writer, edit: WeightEdit, *, constant: bool) -> WeightEdit:
        if edit.constant is not None:
            scale = self._embedding_scale if writer.role in EMBEDDINGS else 1.0
            edit = replace(edit, constant=edit.constant / scale if constant else None)
        return behind_norm(edit, read_gain(self._checkpoint.folder, writer)) if writer.norms else edit


EMBEDDINGS = ("embedding", "stored copy of the tied head")

SHOWN = 2
"""Tensors that a refusal names."""

HEADLESS = ("cohere", "cohere2", "lfm2_moe")
"""Model types whose head is always the embedding in llama.cpp, by the tensors that gguf 0.19 has for them."""


def _holds_constant(writer: Writer) -> bool:
    """Whether a constant that is added where ``writer`` writes goes into it."""
    kind = writer.place[1]
    if kind == "embedding":
        return writer.role in (*EMBEDDINGS, "projector bias")
    return kind != "next-token block" and writer.role.endswith(" bias") and len(writer.tensor.shape) == 1


def check_constant(checkpoint: Checkpoint, places: Sequence[Place], writers: Sequence[Writer], *, adding: bool) -> None:
    """Check that a constant would be added once, wherever something enters, at one of ``places`` at least.

    ``adding``: it is all that the edit does.

    Raises:
        PlanRefusedError: it would be added not at all, or more than once.
    """
    if any(_adds_once(place, writers) for place in places):
        return
    layer, kind = places[0]
    where = "the embedding" if layer is None else f"the {kind} of block {layer}"
    names = [writer.tensor.name for writer in writers if writer.place == places[0]]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    others = ", and no other block has one" if len(places) > 1 else ""
    otherwise = "preview it by hooks, or remove the direction without a constant"
    if adding:
        otherwise = (
            "preview it by hooks (abliterate chat --add), or have a runtime add it (abliterate export control-vector)"
        )
    raise PlanRefusedError(
        f"{checkpoint.name}: {where} has no one bias that could hold the constant of this edit: it writes by "
        f"{', '.join(names[:SHOWN])}{more}{others}",
        otherwise,
    )


def _adds_once(place: Place, writers: Sequence[Writer]) -> bool:
    """Whether a constant at ``place`` is added exactly once.

    What other modalities put in place of the embedding must come from one projector with a bias.
    """
    there = [writer for writer in writers if writer.place == place]
    projectors = [writer for writer in there if writer.role == "projector"]
    biases = [writer for writer in there if writer.role == "projector bias"]
    own = [writer for writer in there if _holds_constant(writer) and writer not in biases]
    if place[0] is None:
        return place[1] == "next-token block" or (bool(own) and len(biases) == len(projectors) <= 1)
    return len(own) == len({writer.role.removesuffix(" bias") for writer in there}) == 1


def _covering(
    model: str | Path | Checkpoint, *, revision: str | None, tied: TiedPolicy, mtp: bool, allow_partial: bool
) -> EditPlan:
    """The plan of an edit of everything, without a direction."""
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model, revision=revision)
    model_map = map_model(checkpoint, allow_partial=allow_partial)
    if model_map.tied and tied == "untie" and model_map.embedding.packed:
        raise UnsupportedFormatError(
            f"{checkpoint.name}: the tied embedding '{model_map.embedding.tensor.name}' is quantised",
            "write it as bfloat16 first (abliterate dequantize), or choose --tied shared or --tied keep",
        )
    keep_embedding = model_map.tied and tied == "keep"
    untie = model_map.tied and tied == "untie"
    writers = tuple(
        writer
        for writer in model_map.writers
        if not (keep_embedding and writer.role == "embedding") and (mtp or not writer.drafts)
    )
    if model_map.tied and tied == "shared" and model_map.head is not None:
        copy = replace(model_map.embedding, tensor=model_map.head, role="stored copy of the tied head")
        writers = (*writers, copy)
    inexact = not model_map.complete or (model_map.tied and not untie) or bool(model_map.reason)
    return EditPlan(
        checkpoint=checkpoint,
        model_map=model_map,
        tied=tied,
        writers=writers,
        added_head=model_map.head_name if untie and model_map.head is None else None,
        sets_untied=untie,
        mtp=mtp,
        exactness="C" if inexact else model_map.family.exactness,
        notes=tuple(_notes(checkpoint, model_map, tied, mtp=mtp)),
    )


def _notes(checkpoint: Checkpoint, model_map: ModelMap, tied: TiedPolicy, *, mtp: bool) -> list[str]:
    notes = [*_head_notes(checkpoint, model_map, tied), *_exactness_notes(model_map), *_format_notes(model_map)]
    for tower, count in model_map.towers.items():
        where = tower.partition("{")[0].rstrip(".")
        notes.append(f"{count} tensors of {where} stay as they are: they meet the stream at a projector only")
    if not mtp and any(writer.drafts for writer in model_map.writers):
        notes.append("the next-token block stays as it is: it may draft tokens that the edited model rejects")
    linked = [name for name in checkpoint.left_out if name.endswith("/")]
    weights = [name for name in checkpoint.left_out if name not in linked]
    if linked:
        notes.append(f"not copied, as these are links to folders: {', '.join(linked)}")
    if weights:
        notes.append(f"not copied, as these hold unedited weights: {', '.join(weights)}")
    return notes


def _head_notes(checkpoint: Checkpoint, model_map: ModelMap, tied: TiedPolicy) -> list[str]:
    if not model_map.tied:
        return []
    if tied == "shared":
        return ["the tied head is edited together with the embedding: not equal to inference-time ablation"]
    if tied == "keep":
        return ["the tied embedding is left alone: it still writes the direction into the stream"]
    size = model_map.embedding.tensor.size_bytes
    stored = "is stored already and stays as it is" if model_map.head else f"is added ({size / 1e6:,.1f} MB)"
    notes = [f"the head is tied to the embedding: the unedited head {stored}, and tie_word_embeddings becomes false"]
    if model_map.model_type in ("gemma", "gemma2"):
        notes.append("llama.cpp's converter drops the separate head of Gemma 1 and 2 and so ties it again")
    if model_map.model_type in HEADLESS:
        notes.append(
            "llama.cpp has no separate head for this architecture, and its converter stops at one: for GGUF choose "
            "--tied shared"
        )
    if _holds_another_head(checkpoint, model_map):
        notes.append(
            "config.json ties the head to the embedding, and a head that differs is stored: of the base, transformers "
            "and vLLM take the embedding, llama.cpp the stored head; of the result, all take the stored head"
        )
    return notes


def _holds_another_head(checkpoint: Checkpoint, model_map: ModelMap) -> bool:
    """Whether a head is stored that is not the embedding; of a model on the Hub, whose bytes are not here, no."""
    if model_map.head is None or checkpoint.root is None:
        return False
    return not same_bytes(checkpoint.root, model_map.embedding.tensor, checkpoint.root, model_map.head)


def _format_notes(model_map: ModelMap) -> list[str]:
    """What an edit costs on the grid of quantised writers."""
    formats = Counter(writer.format for writer in model_map.writers if writer.packed)
    return [
        f"{count} writers are stored as {name}: edited on the grid they have, the scales stay; expect an error of "
        f"about {FORMATS[name].added_error:.1%} of the weights, where re-quantising without an edit costs "
        f"{FORMATS[name].requantising_error:.1%}"
        for name, count in formats.items()
    ]


def _exactness_notes(model_map: ModelMap) -> list[str]:
    notes = []
    if model_map.reason:
        notes.append(f"PARTIAL: the direction cannot be removed: {model_map.reason}")
    if model_map.family.exactness == "B":
        notes.append("norms stand between writers and stream: the result holds no r, but is not equal to the hook")
    if not model_map.complete:
        notes.append(f"PARTIAL: {len(model_map.unknown)} unknown and {len(model_map.missing)} missing tensors")
    return notes
