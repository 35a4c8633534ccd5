"""A patch used: applied to a pristine base, or taken back from the edited checkpoint.

Both stream as the edit does, and a shard counts as written only when its hash is the recorded one.
"""

import hashlib
import lzma
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from abliterate.arch.codecs import Codec, Plain
from abliterate.arch.edit_plan import EditPlan
from abliterate.arch.formats import DTYPES
from abliterate.arch.model_map import Writer
from abliterate.checkpoint import direction_file as direction_files
from abliterate.checkpoint.budget import DEFAULT_BYTES, RESERVED_BYTES, SMALLEST_PIECE
from abliterate.checkpoint.directio import SourceFile
from abliterate.checkpoint.file_names import inside
from abliterate.checkpoint.hashes import sha256_file, sha256_tensor
from abliterate.checkpoint.header import Shard
from abliterate.checkpoint.hub import fetch
from abliterate.checkpoint.opening import open_checkpoint
from abliterate.checkpoint.output import OutputFolder, copy_file, prepare, write_atomically
from abliterate.checkpoint.source import Checkpoint
from abliterate.data.bundled import open_model
from abliterate.editing.planning import plan
from abliterate.editing.shards import PIECES, Editor, InPlace
from abliterate.editing.writing import plain_failures, write_checkpoint, write_shards
from abliterate.errors import UsageError, VerificationError
from abliterate.events import Finished, OnEvent, Started, ignore
from abliterate.exports.patches.export import DIRECTION_FILE, Purpose
from abliterate.exports.patches.file import CHOSEN, PatchFile
from abliterate.exports.patches.replay import Replay, TensorReplay
from abliterate.method.directions import given
from abliterate.publishing import manifest
from abliterate.version import __version__

TASK = "revert"


def apply(
    base: str | Path,
    patch: Path,
    out: Path,
    *,
    memory_bytes: int = DEFAULT_BYTES,
    on_event: OnEvent = ignore,
) -> Path:
    """Write ``base`` with the edit of ``patch`` to ``out``: the bytes of the original edit, whatever the machine.

    Raises:
        UsageError: the patch was exported to be reverted only.
        VerificationError: ``base`` is not the checkpoint the patch was made from.
        SourceError: something cannot be read.
    """
    file = _open(patch, "apply")
    made = plan(fetch(open_model(base)), **manifest.recipe_of(file.document, where=patch).plan_options)
    source = Source(file=file, checkpoint=made.checkpoint, side="base")
    source.check()
    made = source.narrowed(made)
    output = prepare(out, source=made.checkpoint.folder, fingerprint=source.fingerprint, needed_bytes=made.output_bytes)
    write_checkpoint(made, source.edit_of, output, memory_bytes=memory_bytes, on_event=on_event, check=source.accept)
    source.write_files(output)
    _write_direction(file, output)
    return output.finish()


def revert(
    edited: str | Path,
    patch: Path,
    out: Path,
    *,
    revision: str | None = None,
    memory_bytes: int = DEFAULT_BYTES,
    on_event: OnEvent = ignore,
) -> Path:
    """Write the base of ``edited`` to ``out``, from ``edited`` and ``patch`` alone: byte for byte, by its hashes.

    ``edited`` is a folder, or a name on the Hub, at ``revision``.

    Raises:
        UsageError: the patch was exported to be applied only.
        VerificationError: ``edited`` is not the checkpoint the patch was made from.
        SourceError: something cannot be read.
    """
    file = _open(patch, "revert")
    checkpoint = fetch(open_checkpoint(edited, revision=revision))
    source = Source(file=file, checkpoint=checkpoint, side="edited")
    source.check()
    shards: Mapping[str, Any] = file.document["shards"]
    total = sum(entry["size"] for entry in shards.values())
    output = prepare(out, source=checkpoint.folder, fingerprint=source.fingerprint, needed_bytes=total)
    editor = Editor(
        folder=checkpoint.folder,
        writers=source.writers,
        edit_of=source.edit_of,
        piece_bytes=max(SMALLEST_PIECE, (memory_bytes - RESERVED_BYTES) // PIECES),
        direct=True,
        on_event=on_event,
        task=TASK,
    )

    def write(shard: Shard, target: Path) -> None:
        header = _header(file, shard)
        data = shards[shard.name]["size"] - (len(header) if header is not None else shard.data_start)
        editor.write_shard(_first(shard, data), target, header=header)
        source.accept(shard.name, target)

    on_event(Started(task=TASK, total=total, unit="bytes"))
    with plain_failures(output, checkpoint):
        write_shards(output, checkpoint, write, task=TASK, on_event=on_event)
    on_event(Finished(task=TASK))
    source.write_files(output)
    return output.finish()


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a patch is used on: the base (``side`` "base"), or the edited checkpoint."""

    file: PatchFile
    checkpoint: Checkpoint
    side: Literal["base", "edited"]

    @property
    def fingerprint(self) -> str:
        """What must be the same for unfinished work to be continued."""
        parts = (__version__, self.side, repr(self.checkpoint.identity()), sha256_file(self.file.path))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @cached_property
    def numbers(self) -> Mapping[str, int]:
        """The place of every tensor in the patch, by its name."""
        return {entry["name"]: number for number, entry in enumerate(self.file.document["tensors"])}

    @property
    def writers(self) -> Mapping[str, Writer]:
        """The tensors to change, as they lie in the checkpoint."""
        return {
            entry["name"]: Writer(
                tensor=self.checkpoint.tensors[entry["name"]],
                axis=entry["axis"],
                role=entry["role"],
                layer=None,
                norms=(),
                gain="w",
            )
            for entry in self.file.document["tensors"]
        }

    def check(self) -> None:
        """Compare the shards with what the patch says of them, by name and size.

        Raises:
            VerificationError: they are others.
        """
        size = "size" if self.side == "base" else "edited_size"
        expected = {name: entry[size] for name, entry in self.file.document["shards"].items()}
        found = {shard.name: shard.size_bytes for shard in self.checkpoint.shards}
        if expected != found:
            raise _other_checkpoint(self.checkpoint, self.file, "its shards have other names or sizes")
        for entry in self.file.document["tensors"]:
            tensor = self.checkpoint.tensors.get(entry["name"])
            if tensor is None:
                raise _other_checkpoint(self.checkpoint, self.file, f"it has no '{entry['name']}'")
            if not entry["axis"] < len(tensor.shape) or (entry["coded"] == "replay" and tensor.dtype not in DTYPES):
                raise _other_checkpoint(self.checkpoint, self.file, f"'{tensor.name}' has another shape or dtype")

    def narrowed(self, made: EditPlan) -> EditPlan:
        """The plan of an edit of everything as that of the edit in the patch, which may leave writers alone.

        A head was added if the header of the shard that gets it changed.  What the configuration says of it is in the
        patch, as all files are.

        Raises:
            VerificationError: the patch changes what is no writer here, or one that lies another way.
        """
        axes = {entry["name"]: entry["axis"] for entry in self.file.document["tensors"]}
        writers = tuple(writer for writer in made.writers if axes.get(writer.tensor.name) == writer.axis)
        if len(writers) != len(axes):
            raise _other_checkpoint(self.checkpoint, self.file, "its writers are others")
        grown = self.file.has(f"header.{made.model_map.embedding.tensor.shard}")
        return replace(made, writers=writers, added_head=made.added_head if grown else None)

    def edit_of(self, writer: Writer) -> InPlace:
        """The change of one tensor."""
        number = self.numbers[writer.tensor.name]
        side = 1 if self.side == "base" else 0
        if self.file.document["tensors"][number]["coded"] == "codes":
            return Codes(self.file, f"tensor.{number}.codes", writer.row_elements, 1 if side else -1)
        settle = partial(self.file.forwards if side else self.file.backwards, most=writer.tensor.numel)
        codec: Codec = Plain(DTYPES[writer.tensor.dtype], writer.row_elements)
        width = writer.tensor.shape[writer.axis]
        columns = writer.tensor.numel // width
        make = Once(lambda: self.file.replay(number, settle, width=width, columns=columns))
        return Replay(tensor=make, codec=codec, side=side)

    def accept(self, name: str, path: Path) -> None:
        """Compare a written shard with its hash.

        Raises:
            VerificationError: it is another; says whether the source was the right one.
        """
        key = "edited_sha256" if self.side == "base" else "sha256"
        if sha256_file(path) == self.file.document["shards"][name][key]:
            return
        mine = "sha256" if self.side == "base" else "edited_sha256"
        if sha256_file(self.checkpoint.folder / name) != self.file.document["shards"][name][mine]:
            wrong = self._changed_tensors(name)
            where = f"'{wrong[0]}' differs" if wrong else "it differs outside the writers"
            raise _other_checkpoint(self.checkpoint, self.file, f"{name}: {where}")
        raise VerificationError(
            f"{name}: the result has not the recorded hash", "fetch or export the patch again, and report this"
        )

    def write_files(self, output: OutputFolder) -> None:
        """Every file that is not a shard, as it was on the other side.

        Raises:
            VerificationError: a file that should be the same is not.
        """
        wanted = "edited" if self.side == "base" else "base"
        for entry in self.file.document["files"]:
            name = entry["name"]
            target = inside(output.path, name, where=self.file.path)
            if entry[wanted] is None or name == DIRECTION_FILE:
                if wanted == "base" or name != DIRECTION_FILE:
                    target.unlink(missing_ok=True)
                continue
            if self.file.has(f"{wanted}.{name}"):
                write_atomically(target, self.file.text(f"{wanted}.{name}"))
            elif not (target.is_file() and sha256_file(target) == entry[wanted]):
                copy_file(self.checkpoint.folder / entry.get("copy_of", name), target)
            if sha256_file(target) != entry[wanted]:
                raise _other_checkpoint(self.checkpoint, self.file, f"file {name} differs")

    def _changed_tensors(self, shard: str) -> list[str]:
        key = "sha256_before" if self.side == "base" else "sha256_after"
        with SourceFile(self.checkpoint.folder / shard) as file:
            return [
                entry["name"]
                for entry in self.file.document["tensors"]
                if entry["shard"] == shard and sha256_tensor(file, self.checkpoint.tensors[entry["name"]]) != entry[key]
            ]


class Once:
    """What ``make`` gives, made when it is first asked for."""

    def __init__(self, make: Callable[[], TensorReplay]) -> None:
        self._make = make
        self._made: TensorReplay | None = None

    def __call__(self) -> TensorReplay:
        """The same every time."""
        if self._made is None:
            self._made = self._make()
        return self._made


class Codes:
    """A quantised tensor changed by the differences of its bytes, which are read along with it; ``sign`` 1 or -1."""

    def __init__(self, file: PatchFile, name: str, width: int, sign: int) -> None:
        self.codec: Codec = Plain(torch.uint8, width)
        self._file, self._name, self._sign = file, name, sign
        self._decompressor = lzma.LZMADecompressor()
        self._rest: bytes | None = None

    @property
    def passes(self) -> tuple[Callable[[Tensor, int], None], ...]:
        """One."""
        return (self.edit_rows,)

    def block_rows(self) -> int:
        """Any."""
        return 1

    def edit_rows(self, rows: Tensor, first_row: int) -> None:  # noqa: ARG002 - they come in file order
        """The next rows of the tensor."""
        difference = torch.frombuffer(bytearray(self._next(rows.numel())), dtype=torch.uint8).view(rows.shape)
        rows.add_(difference, alpha=self._sign)

    def edit_columns(self, matrix: Tensor, first_row: int) -> None:
        """The same."""
        self.edit_rows(matrix, first_row)

    def columns(self, first_row: int) -> "Codes":  # noqa: ARG002
        """The same, block by block."""
        return self

    def finish(self) -> list[tuple[int, Tensor]]:
        """Nothing is left to be done."""
        return []

    def _next(self, size: int) -> bytes:
        if self._rest is None:
            self._rest = self._file.blob(self._name)
        parts, left = [], size
        while left:
            try:
                part = self._decompressor.decompress(self._rest, left)
            except (lzma.LZMAError, EOFError) as error:
                raise self._file.damaged(error) from error
            self._rest = b""
            if not part and self._decompressor.needs_input:
                raise self._file.damaged(ValueError("the differences end too early"))
            parts.append(part)
            left -= len(part)
        return b"".join(parts)


def _open(patch: Path, purpose: Purpose) -> PatchFile:
    file = PatchFile(patch)
    if purpose not in file.document["for"]:
        raise UsageError(
            f"{patch}: was exported for {' and '.join(file.document['for'])} only", f"export it with --for {purpose}"
        )
    return file


def _other_checkpoint(checkpoint: Checkpoint, file: PatchFile, why: str) -> VerificationError:
    return VerificationError(
        f"{checkpoint.name}: not the checkpoint that {file.path.name} was made from: {why}",
        f"the patch belongs to {file.document['base']['name']}",
    )


def _header(file: PatchFile, shard: Shard) -> bytes | None:
    """The header that a shard of the base had, where it had another."""
    name = f"header.{shard.name}"
    header = file.text(name) if file.has(name) else None
    if header is not None and not 8 <= len(header) <= file.document["shards"][shard.name]["size"]:
        raise file.damaged(ValueError(f"'{name}' is no header"))
    return header


def _first(shard: Shard, data_bytes: int) -> Shard:
    """The shard without what was added to its end."""
    end = shard.data_start + data_bytes
    tensors = tuple(tensor for tensor in shard.tensors if tensor.end <= end)
    return Shard(name=shard.name, data_start=shard.data_start, size_bytes=end, tensors=tensors, metadata=shard.metadata)


def _write_direction(file: PatchFile, output: OutputFolder) -> None:
    """The direction file with what was chosen alone: the candidates of the measurement are not in a patch."""
    target = output.path / DIRECTION_FILE
    if file.has(CHOSEN):
        write_atomically(target, file.blob(CHOSEN))
    else:
        vector = file.tensor("direction")
        if vector.ndim != 1 or not len(vector) or vector.dtype != torch.float32:
            raise file.damaged(ValueError("'direction' is no vector"))
        direction_files.save(given(vector), target)
    direction_files.load(target)
