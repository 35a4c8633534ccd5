"""The plan: exactly what an edit will change, decided from headers and ``config.json`` before any byte is written."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

from abliterate.arch.edit_plan import EditPlan, TiedPolicy
from abliterate.arch.formats import FORMATS
from abliterate.arch.model_map import ModelMap, map_model
from abliterate.checkpoint.opening import open_checkpoint
from abliterate.checkpoint.source import Checkpoint
from abliterate.errors import UnsupportedFormatError


def plan(
    model: str | Path | Checkpoint,
    *,
    revision: str | None = None,
    tied: TiedPolicy = "untie",
    mtp: bool = True,
    allow_partial: bool = False,
) -> EditPlan:
    """Plan the edit of ``model`` (a folder or a Hub name) from its headers; no tensor byte is read.

    ``tied`` decides what happens to a tied head: "untie" writes the unedited embedding as a head of its own (exact),
    "shared" edits the shared matrix in place (the head changes too), "keep" leaves the embedding unedited (it still
    writes the direction).  ``mtp`` False leaves next-token blocks as they are.

    Raises:
        PlanRefusedError: unknown architecture, tensors without a role, or a format that cannot be edited.
        SourceError: the source is unreadable or corrupt.
    """
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
        exactness="C" if inexact else model_map.family.exactness,
        notes=tuple(_notes(checkpoint, model_map, tied, mtp=mtp)),
    )


def _notes(checkpoint: Checkpoint, model_map: ModelMap, tied: TiedPolicy, *, mtp: bool) -> list[str]:
    notes = [*_head_notes(model_map, tied), *_exactness_notes(model_map), *_format_notes(model_map)]
    for tower, count in model_map.towers.items():
        where = tower.partition("{")[0].rstrip(".")
        notes.append(f"{count} tensors of {where} stay as they are: they meet the stream at a projector only")
    if not mtp and any(writer.drafts for writer in model_map.writers):
        notes.append("the next-token block stays as it is: it may draft tokens that the edited model rejects")
    if checkpoint.left_out:
        notes.append(f"not copied, as these hold unedited weights: {', '.join(checkpoint.left_out)}")
    return notes


def _head_notes(model_map: ModelMap, tied: TiedPolicy) -> list[str]:
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
    return notes


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
