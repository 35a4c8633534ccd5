"""A GGUF file written as a checkpoint folder, so that it can be measured and edited like any other."""

import errno
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from abliterate.arch.registry import family_of
from abliterate.checkpoint.gguf import GgufFile, read_gguf
from abliterate.checkpoint.hashes import sha256_file
from abliterate.checkpoint.output import OutputFolder, fingerprint, prepare, write_text
from abliterate.checkpoint.source import open_folder
from abliterate.errors import CheckpointError, NotEnoughDiskError, UnknownArchitectureError
from abliterate.events import Advanced, Finished, Noted, OnEvent, Started, ignore
from abliterate.model.gguf_source import PLAIN, ImportedModel, check_architecture, load_gguf, memory_bytes
from abliterate.model.room import free_bytes
from abliterate.version import __version__

TASK = "import"
BYTES = 2
"""Of a value, as it is written."""

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
Half = Literal["bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What an import wrote: ``values`` are the numbers of weights by the type the file has them in."""

    out: Path
    source: Path
    source_sha256: str
    architecture: str
    model_type: str
    dtype: Half
    values: Mapping[str, int]
    notes: tuple[str, ...]

    @property
    def quantised(self) -> float:
        """The share of the values that the file holds in fewer than 16 bits."""
        return sum(count for kind, count in self.values.items() if kind not in PLAIN) / sum(self.values.values())


def import_gguf(path: Path, out: Path, *, dtype: Half | None = None, on_event: OnEvent = ignore) -> ImportReport:
    """Write the GGUF file ``path`` as a checkpoint in ``dtype``; None is float16 for a file of F16, else bfloat16.

    Raises:
        CheckpointError: it cannot be read, or holds what no model can have.
        UnsupportedFormatError: it is a part of a split file, or transformers cannot read all of it.
        NonFiniteError: a weight is NaN, infinite or too large for ``dtype``.
        OutputError: ``out`` exists or is in the way.
        NotEnoughDiskError: it will not fit.
        UsageError: the ``gguf`` library is not installed, or memory does not suffice.
    """
    file = read_gguf(path)
    check_architecture(file)
    values = Counter[str]()
    for tensor in file.weights:
        values[tensor.kind] += tensor.numel
    chosen = dtype or ("float16" if set(values) <= {"F16", "F32"} and "F16" in values else "bfloat16")
    on_event(Started(task=TASK, total=path.stat().st_size, unit="bytes"))
    digest = sha256_file(path)
    output = prepare(
        out,
        source=path,
        fingerprint=fingerprint({"task": TASK, "sha256": digest, "dtype": chosen}),
        needed_bytes=BYTES * sum(values.values()),
    )
    free = free_bytes(torch.device("cpu"))
    if (needed := memory_bytes(file)) > free:
        on_event(Noted(text=f"this takes about {needed / 1e9:,.1f} GB of memory; {free / 1e9:,.1f} GB are free"))
    with _discarded(output):
        imported = load_gguf(file, HALF[chosen], on_tensor=lambda size: on_event(Advanced(task=TASK, amount=size)))
        report = _report(output.final, file, imported, digest, chosen, values)
        with _plain_failures(output):
            imported.save(output.path)
            write_text(output.path / "README.md", card(report, file, imported.model))
        open_folder(output.path, name=str(out))
    on_event(Finished(task=TASK))
    for note in report.notes:
        on_event(Noted(text=note))
    output.finish()
    return report


@contextmanager
def _discarded(output: OutputFolder) -> Iterator[None]:
    """Remove the unfinished folder where nothing was written into it."""
    try:
        yield
    except BaseException:
        output.discard()
        raise


@contextmanager
def _plain_failures(output: OutputFolder) -> Iterator[None]:
    """Failures of writing, said in words; safetensors has an error of its own for them.

    Raises:
        NotEnoughDiskError: the disk filled up.
        CheckpointError: anything else that the system refused.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise NotEnoughDiskError(
                f"{output.path}: the disk is full", "free some space and run the same command again"
            ) from error
        raise CheckpointError(f"{output.path}: cannot be written ({error})", "check the disk and its rights") from error


def _report(
    out: Path, file: GgufFile, imported: ImportedModel, digest: str, dtype: Half, values: Mapping[str, int]
) -> ImportReport:
    notes, model_type = list(imported.notes), imported.model.config.model_type
    try:
        family_of({"model_type": model_type}, where=str(file.path))
    except UnknownArchitectureError as error:
        notes.append(f"it can be run, not edited: {error.message}")
    return ImportReport(
        out=out,
        source=file.path,
        source_sha256=digest,
        architecture=file.architecture,
        model_type=model_type,
        dtype=dtype,
        values=dict(values),
        notes=tuple(notes),
    )


def card(report: ImportReport, file: GgufFile, model: Any) -> str:  # noqa: ANN401 - a model of transformers
    """The model card: where the weights come from, and what they are not."""
    from huggingface_hub import ModelCardData

    licence = file.metadata.get("general.license")
    front = ModelCardData(
        license=licence if isinstance(licence, str) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gguf-import", "abliterate"],
    )
    name = str(file.metadata.get("general.name") or file.path.stem)
    rows = [
        f"| {kind} | {count:,} | {count / sum(report.values.values()):.1%} |" for kind, count in report.values.items()
    ]
    lines = [
        "---", front.to_yaml(), "---", "",
        f"# {name}, from GGUF", "",
        f"Read from `{report.source.name}` and written as {report.dtype} by abliterate {__version__}, through "
        f"transformers {version('transformers')} and gguf {version('gguf')}.", "",
        f"- SHA-256 of the file: `{report.source_sha256}`",
        f"- architecture: `{report.architecture}`, here `{type(model).__name__}`", "",
        "| stored in the file as | values | share |", "|---|--:|--:|", *rows, "",
        "## What was lost", "",
        loss(report), "",
        *(f"- {note}" for note in report.notes),
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def loss(report: ImportReport) -> str:
    """What the weights are not, in words."""
    rounded = f"Each value was rounded once to {report.dtype}."
    if report.quantised:
        return (
            f"These are not the original weights. The file holds {report.quantised:.1%} of them quantised; what was "
            f"rounded away when it was made is gone. {rounded} An edit of this checkpoint is exact with respect to it, "
            "not to the original."
        )
    half = {"float16": "F16", "bfloat16": "BF16"}[report.dtype]
    if half in report.values and set(report.values) <= {half, "F32"}:
        return f"Nothing of what the file holds as {half}; what it holds as F32 was rounded once to {report.dtype}."
    return f"The file is not quantised. {rounded}"
