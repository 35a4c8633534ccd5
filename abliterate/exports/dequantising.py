"""A quantised checkpoint written as bfloat16, shard by shard, so that it can be edited; the model is never loaded.

Each value is its stored one times its scale, rounded once.  Everything else is copied byte for byte.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abliterate.arch.codecs import HeldScales, decoded, packed_codec
from abliterate.arch.packed import Packed, packed_tensors, quantisation
from abliterate.checkpoint.directio import Slab, SourceFile, TargetFile
from abliterate.checkpoint.header import Shard, TensorInfo
from abliterate.checkpoint.output import OutputFolder, copy_file, fingerprint, prepare, write_atomically, write_json
from abliterate.checkpoint.source import INDEX_NAME, Checkpoint
from abliterate.checkpoint.transfer import bytes_of
from abliterate.editing.writing import plain_failures, write_shards
from abliterate.events import Advanced, Finished, OnEvent, Started, ignore
from abliterate.version import __version__

TASK = "dequantize"
PIECE_BYTES = 8 * 2**20
BF16_BYTES = 2


def dequantise(checkpoint: Checkpoint, out: Path, *, on_event: OnEvent = ignore) -> Path:
    """Write ``checkpoint`` with all its FP8 and MXFP4 weights as bfloat16.  A run that was stopped continues.

    Raises:
        UnsupportedFormatError: it is not quantised, or not in a format known here.
        OutputError: ``out`` exists or is in the way of the source.
        NotEnoughDiskError: it will not fit.
    """
    writer = _Writer(checkpoint)
    needed = sum(len(header) + size for header, size in map(writer.header, checkpoint.shards))
    output = prepare(
        out,
        source=checkpoint.folder,
        fingerprint=fingerprint({**checkpoint.identity(), "task": TASK}),
        needed_bytes=needed,
    )
    on_event(Started(task=TASK, total=checkpoint.size_bytes, unit="bytes"))

    def write(shard: Shard, target: Path) -> None:
        writer.write(shard, target)
        on_event(Advanced(task=TASK, amount=shard.size_bytes))

    with plain_failures(output, checkpoint):
        write_shards(output, checkpoint, write, task=TASK, on_event=on_event)
        writer.finish(output)
    on_event(Finished(task=TASK))
    return output.finish()


class _Writer:
    """Writes shards; knows what becomes of every tensor."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.packed, self.dropped = packed_tensors(checkpoint)
        self._slab = Slab(PIECE_BYTES)

    def header(self, shard: Shard) -> tuple[bytes, int]:
        """The new header of ``shard`` and the size of its data."""
        entries: dict[str, Any] = {} if shard.metadata is None else {"__metadata__": dict(shard.metadata)}
        end = 0
        for tensor in self._kept(shard):
            packed = self.packed.get(tensor.name)
            name, dtype, shape, size = tensor.name, tensor.dtype, tensor.shape, tensor.size_bytes
            if packed is not None:
                name, dtype, shape = packed.name, "BF16", packed.shape
                size = torch.Size(shape).numel() * BF16_BYTES
            entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text, end

    def write(self, shard: Shard, target: Path) -> None:
        """Write one shard to ``target`` and flush it to disk."""
        header, _ = self.header(shard)
        with SourceFile(self.checkpoint.folder / shard.name) as source, TargetFile(target) as out:
            out.append(bytes_of(header))
            for tensor in self._kept(shard):
                packed = self.packed.get(tensor.name)
                parts = self._copied(source, tensor) if packed is None else self._widened(source, packed)
                for part in parts:
                    out.append(part.contiguous().reshape(-1).view(torch.uint8))
            out.finish()

    def finish(self, output: OutputFolder) -> None:
        """Write the index, the configuration, the card and every other file."""
        source = self.checkpoint
        if source.index is not None:
            kept = {t.name: shard.name for shard in source.shards for t in self._kept(shard)}
            weight_map = {self.packed[name].name if name in self.packed else name: at for name, at in kept.items()}
            size = sum(self.header(shard)[1] for shard in source.shards)
            metadata = {**(source.index.get("metadata") or {}), "total_size": size}
            write_json(output.path / INDEX_NAME, {**source.index, "metadata": metadata, "weight_map": weight_map})
        write_json(output.path / "config.json", bf16_config(source.config))
        for name in source.other_files:
            if name not in ("config.json", "README.md"):
                copy_file(source.folder / name, output.path / name)
        readme = source.folder / "README.md"
        write_atomically(output.path / "README.md", self._card(readme.read_text("utf-8") if readme.is_file() else ""))

    def _kept(self, shard: Shard) -> Iterator[TensorInfo]:
        return (tensor for tensor in shard.tensors if tensor.name not in self.dropped)

    def _copied(self, source: SourceFile, tensor: TensorInfo) -> Iterator[Tensor]:
        for start in range(tensor.start, tensor.end, PIECE_BYTES):
            yield source.read(self._slab, start, min(PIECE_BYTES, tensor.end - start))

    def _widened(self, source: SourceFile, packed: Packed) -> Iterator[Tensor]:
        codec = packed_codec(self.checkpoint.folder, packed, HeldScales())
        slab = Slab(packed.row_bytes * packed.stored_rows if packed.transposed else max(PIECE_BYTES, packed.row_bytes))

        def read(start: int, size: int) -> Tensor:
            return source.read(slab, start, size)

        for _, _, values in decoded(packed, codec, read, None if packed.transposed else PIECE_BYTES):
            yield (values.T if packed.transposed else values).to(torch.bfloat16)

    def _card(self, readme: str) -> bytes:
        method = (quantisation(self.checkpoint.config) or {}).get("quant_method")
        line = (
            f"> The {method} weights of {self.checkpoint.name} were written as bfloat16 by abliterate {__version__}; "
            "nothing else was changed.\n\n"
        )
        front, closing, rest = readme.partition("\n---\n") if readme.startswith("---\n") else ("", "", readme)
        return f"{front}{closing}\n{line}{rest.lstrip()}".lstrip().encode()


def bf16_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` without quantisation, stored as bfloat16."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    for key in ("dtype", "torch_dtype"):
        if key in plain:
            plain[key] = "bfloat16"
    if isinstance(plain.get("text_config"), Mapping):
        plain["text_config"] = bf16_config(plain["text_config"])
    return plain
