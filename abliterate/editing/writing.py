"""The streaming edit of a checkpoint: shard by shard (``shards``), never a whole model in memory."""

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from abliterate.arch.codecs import HeldScales, codec_of
from abliterate.arch.edit_plan import untied_config
from abliterate.arch.model_map import Writer
from abliterate.checkpoint.budget import DEFAULT_BYTES, RESERVED_BYTES, SMALLEST_PIECE
from abliterate.checkpoint.directio import slab_bytes
from abliterate.checkpoint.header import Shard, TensorInfo, read_header
from abliterate.checkpoint.output import OutputFolder, Spread, alone, copy_file, write_json
from abliterate.checkpoint.source import INDEX_NAME, Checkpoint
from abliterate.checkpoint.transfer import one_core
from abliterate.editing.blocks import Rounding, TensorEdit, Workspace
from abliterate.editing.planning import EditPlan
from abliterate.editing.shards import HELD_BYTES, PIECES, TASK, Editor, InPlace, header_with
from abliterate.errors import CheckpointError, NotEnoughDiskError, UsageError, advice
from abliterate.events import Advanced, Finished, OnEvent, Started, ignore


def edit_checkpoint(
    plan: EditPlan,
    output: OutputFolder,
    *,
    rounding: Rounding = "direction",
    memory_bytes: int = DEFAULT_BYTES,
    direct: bool = True,
    spread: Spread = alone,
    on_event: OnEvent = ignore,
) -> None:
    """Write the edited checkpoint into ``output``: shards, index, configuration and every other file.

    Files that an earlier run of the same plan completed are kept.  ``direct`` False uses the page cache.  ``spread``
    deals the shards out to several processes, all of which call this.

    Raises:
        SourceError: the source is corrupt or not finite.
        UsageError: rounding to nearest was asked for on a coarse grid.
        NotEnoughDiskError: the disk filled up; what is complete stays, and the same command continues.
    """
    edit_of = edits_of(plan, rounding)
    write_checkpoint(
        plan, edit_of, output, memory_bytes=memory_bytes, direct=direct, spread=spread, on_event=on_event
    )  # fmt: skip


def write_checkpoint(
    plan: EditPlan,
    edit_of: Callable[[Writer], InPlace],
    output: OutputFolder,
    *,
    memory_bytes: int = DEFAULT_BYTES,
    direct: bool = True,
    spread: Spread = alone,
    on_event: OnEvent = ignore,
    check: Callable[[str, Path], None] = lambda _name, _path: None,
) -> None:
    """Write the checkpoint that ``edit_of`` makes of every writer, and all files that come with it, into ``output``.

    ``check`` may refuse a shard (name, file) before it counts as written.

    Raises:
        SourceError: the source is corrupt or not finite, or changed meanwhile.
        NotEnoughDiskError: the disk filled up.
    """
    source = plan.checkpoint
    editor = editor_for(plan, edit_of, memory_bytes=memory_bytes, direct=direct, on_event=on_event)
    on_event(Started(task=TASK, total=plan.output_bytes, unit="bytes"))

    def write(shard: Shard, target: Path) -> None:
        write_shard(editor, plan, shard, target)
        check(shard.name, target)

    with plain_failures(output, source), one_core(needed=not plan.packed):
        write_shards(output, source, write, spread=spread, on_event=on_event)
        if output.keeps:
            write_other_files(plan, output)
        source.check_unchanged()
    on_event(Finished(task=TASK))


def write_shards(
    output: OutputFolder,
    source: Checkpoint,
    write: Callable[[Shard, Path], None],
    *,
    task: str = TASK,
    spread: Spread = alone,
    on_event: OnEvent = ignore,
) -> None:
    """Have ``write`` (which tells its own progress) make every shard that an earlier run has not completed.

    Raises:
        CheckpointError: the source changed meanwhile.
    """

    def make(shards: Sequence[Shard]) -> Iterator[None]:
        for shard in shards:
            source.check_unchanged()
            if output.is_done(shard.name):
                there(source.shards.index(shard))
            else:
                output.put(shard.name, partial(write, shard))
            yield None

    def there(place: int) -> None:
        on_event(Advanced(task=task, amount=source.shards[place].size_bytes))

    for shard, _ in zip(source.shards, spread(source.shards, make, by_others=there), strict=True):
        if not output.is_done(shard.name):
            output.mark_done(shard.name)
    source.check_unchanged()


def edits_of(plan: EditPlan, rounding: Rounding = "direction") -> Callable[[Writer], InPlace]:
    """The edit of every writer of ``plan``.

    Raises:
        UsageError: rounding to nearest was asked for on a coarse grid.
    """
    packed = next((writer for writer in plan.writers if writer.packed), None)
    if packed is not None and rounding == "nearest":
        raise UsageError(
            f"rounding to nearest leaves much of the direction in '{packed.tensor.name}', stored as {packed.format}",
            "leave --rounding at its default",
        )
    held, work = HeldScales(), Workspace()

    def edit_of(writer: Writer) -> TensorEdit:
        tensor = writer.tensor
        where, codec = f"{tensor.shard}: '{tensor.name}'", codec_of(plan.checkpoint.folder, writer, held)
        return TensorEdit.of(where, plan.edits[tensor.name], codec, work, rounding)

    return edit_of


def editor_for(
    plan: EditPlan,
    edit_of: Callable[[Writer], InPlace],
    *,
    memory_bytes: int = DEFAULT_BYTES,
    direct: bool = True,
    on_event: OnEvent = ignore,
) -> Editor:
    """What writes the shards of ``plan``."""
    return Editor(
        folder=plan.checkpoint.folder,
        writers={writer.tensor.name: writer for writer in plan.writers},
        edit_of=edit_of,
        piece_bytes=piece_bytes(plan, memory_bytes),
        direct=direct,
        on_event=on_event,
    )


def write_shard(editor: Editor, plan: EditPlan, shard: Shard, target: Path) -> None:
    """Write one shard of ``plan``, with the head that untying adds where it belongs there."""
    header, added = edited_header(plan, shard)
    editor.write_shard(shard, target, header=header, copied=added)


def write_other_files(plan: EditPlan, output: OutputFolder) -> None:
    """Index, configuration and every other file of the checkpoint."""
    _write_index(plan, output)
    _write_config(plan, output)
    for name in plan.checkpoint.other_files:
        if name != "config.json" and not output.is_done(name):
            copy_file(plan.checkpoint.folder / name, output.path / name)


@contextmanager
def plain_failures(output: OutputFolder, source: Checkpoint) -> Iterator[None]:
    """Failures of reading and writing, said in words.

    Raises:
        NotEnoughDiskError: the disk filled up.
        CheckpointError: anything else that the system refused.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NotEnoughDiskError(
                f"{output.path}: the disk is full", "free some space and run the same command: it continues"
            ) from error
        raise CheckpointError(f"{error.filename or source.folder}: {error.strerror}", advice(error)) from error


def piece_bytes(plan: EditPlan, memory_bytes: int) -> int:
    """The largest piece of a file that the budget lets the ring hold ``PIECES`` times."""
    held = HELD_BYTES * max((writer.row_values for writer in plan.writers if not writer.in_rows), default=0)
    held += max((writer.packed.scales.size_bytes for writer in plan.writers if writer.packed), default=0)
    return max(SMALLEST_PIECE, (memory_bytes - RESERVED_BYTES - held) // PIECES - slab_bytes(0))


def edited_header(plan: EditPlan, shard: Shard) -> tuple[bytes | None, TensorInfo | None]:
    """The header of an edited shard and the tensor copied to its end, where untying adds a head; else nothing."""
    embedding = plan.model_map.embedding.tensor
    if plan.added_head is None or embedding.shard != shard.name:
        return None, None
    header = read_header(plan.checkpoint.folder / shard.name, shard)
    return header_with(header, plan.added_head, embedding, shard.size_bytes - shard.data_start), embedding


def _write_index(plan: EditPlan, output: OutputFolder) -> None:
    if plan.checkpoint.index is None:
        return
    if plan.added_head is None:
        copy_file(plan.checkpoint.folder / INDEX_NAME, output.path / INDEX_NAME)
        return
    embedding = plan.model_map.embedding.tensor
    metadata = dict(plan.checkpoint.index.get("metadata") or {})
    for key, amount in (("total_size", embedding.size_bytes), ("total_parameters", embedding.numel)):
        if key in metadata:
            metadata[key] += amount
    weight_map = dict(plan.checkpoint.index["weight_map"])
    weight_map[plan.added_head] = embedding.shard
    write_json(output.path / INDEX_NAME, {**plan.checkpoint.index, "metadata": metadata, "weight_map": weight_map})


def _write_config(plan: EditPlan, output: OutputFolder) -> None:
    if not plan.sets_untied:
        copy_file(plan.checkpoint.folder / "config.json", output.path / "config.json")
        return
    write_json(output.path / "config.json", untied_config(plan.checkpoint.config))
