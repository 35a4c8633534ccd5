"""The output folder: it has its final name only when it is complete.

Until then it is called ``NAME.partial`` and holds a journal: the fingerprint of the work, and the files that are
complete and on disk (fsync).  The same command continues from there; other work is refused.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from abliterate.checkpoint.amounts import size
from abliterate.checkpoint.file_names import at_home, is_text
from abliterate.checkpoint.locking import Lock, refused_as_output
from abliterate.checkpoint.source import OUR_MANIFEST
from abliterate.errors import AbliterateError, NotEnoughDiskError, OutputError
from abliterate.version import __version__

T = TypeVar("T")
R = TypeVar("R")
Spread = Callable[..., Iterator[Any]]
"""``alone``, or what deals items out to several processes."""

JOURNAL = ".abliterate-journal.json"
PRIVATE_FOLDER = "abliterate"
"""The private folder, in the output: the direction, the recipe, the base's own README."""

DISK_RESERVE_BYTES = 64 * 2**20
TRIAL_BYTES = 32 * 2**20


@dataclass(slots=True, kw_only=True)
class OutputFolder:
    """An unfinished output folder at ``path``, which ``finish`` renames to ``final``.

    ``done`` are the complete files and their sizes in bytes.  ``lock`` keeps other processes away.  Of several that
    write it together one ``keeps`` the journal and all that is no shard.
    """

    final: Path
    path: Path
    fingerprint: str
    done: dict[str, int] = field(default_factory=dict)
    lock: Lock | None = None
    keeps: bool = True

    @property
    def private(self) -> Path:
        """The private folder."""
        return self.path / PRIVATE_FOLDER

    def is_done(self, name: str) -> bool:
        """Whether the file ``name`` was completed, and still has its size."""
        path = self.path / name
        return name in self.done and path.is_file() and path.stat().st_size == self.done[name]

    def complete(self, name: str, write: Callable[[Path], None]) -> None:
        """Have ``write`` write and flush a file under a temporary name, rename it to ``name``, and record it."""
        self.put(name, write)
        self.mark_done(name)

    def put(self, name: str, write: Callable[[Path], None]) -> None:
        """The same without the record."""
        unfinished = self.path / (name + ".tmp")
        write(unfinished)
        unfinished.replace(self.path / name)
        flush(self.path)

    def mark_done(self, name: str) -> None:
        """Record that a file is complete and on disk."""
        self.done[name] = (self.path / name).stat().st_size
        if not self.keeps:
            return
        write_atomically(self.path / JOURNAL, json.dumps({"fingerprint": self.fingerprint, "done": self.done}).encode())

    def discard(self) -> None:
        """Remove the folder if no work is in it yet."""
        if (
            self.keeps
            and not self.done
            and not any(path.is_file() for path in self.path.rglob("*") if path.name != JOURNAL)
        ):
            shutil.rmtree(self.path)
            self._unlock()

    def finish(self) -> Path:
        """Flush the folder and give it its final name, without the journal.

        The journal lies beside the folder while it is renamed, so that a run that is killed there can be continued.

        Raises:
            OutputError: something appeared under the final name meanwhile.
        """
        if os.path.lexists(self.final):
            raise OutputError(f"{self.final}: appeared while the run was going on", "move it away and run again")
        for path in sorted(self.path.rglob("*")):
            if path.is_file():
                flush(path)
        aside = _journal_aside(self.final)
        (self.path / JOURNAL).replace(aside)
        self.path.rename(self.final)
        aside.unlink()
        self._unlock()
        flush(self.final.parent)
        return self.final

    def _unlock(self) -> None:
        if self.lock is not None:
            self.lock.release()


def alone(items: Sequence[T], run: Callable[[Sequence[T]], Iterable[R]], **_: Any) -> Iterator[R]:  # noqa: ANN401
    """What ``run`` gives of each of ``items``: by one process, where several might share them."""
    yield from run(items)


def fingerprint(document: Mapping[str, Any]) -> str:
    """A hash of ``document`` and the version of this tool; unfinished work is continued only where it is the same."""
    text = json.dumps({**document, "version": __version__}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def prepare(final: Path, *, source: Path, fingerprint: str, needed_bytes: int) -> OutputFolder:
    """Create ``final.partial``, or continue one with the same ``fingerprint``.

    Raises:
        OutputError: ``final`` exists, or cannot be made; it lies inside ``source`` or around it, or inside the Hub
            cache; or the partial folder of other work is in the way, or another process is writing it.
        NotEnoughDiskError: ``needed_bytes`` do not fit on the disk.
    """
    final = Path(os.path.abspath(at_home(final)))  # noqa: PTH100 - symlinks stay as the user typed them
    check_place(final, source)
    lock = Lock(final)
    try:
        partial = unfinished(final)
        folder = OutputFolder(final=final, path=partial, fingerprint=fingerprint, lock=lock)
        with refused_as_output(final):
            return _continued(folder, needed_bytes)
    except AbliterateError:
        lock.release()
        raise


def unfinished(final: Path) -> Path:
    """What the folder ``final`` is called until it is complete."""
    final = Path(os.path.abspath(at_home(final)))  # noqa: PTH100 - symlinks stay as the user typed them
    return final.with_name(final.name + ".partial")


def _continued(folder: OutputFolder, needed_bytes: int) -> OutputFolder:
    """``folder`` as it was left, or new."""
    partial, final = folder.path, folder.final
    if partial.is_file() or any(path.is_file() and path.name != f"{JOURNAL}.tmp" for path in partial.rglob("*")):
        folder.done = _journal(folder)
    _journal_aside(final).unlink(missing_ok=True)
    done = sum((partial / name).stat().st_size for name in folder.done if folder.is_done(name))
    check_space(final, needed_bytes - done)
    partial.mkdir(parents=True, exist_ok=True)
    write_atomically(partial / JOURNAL, json.dumps({"fingerprint": folder.fingerprint, "done": folder.done}).encode())
    return folder


def check_space(final: Path, needed_bytes: int) -> None:
    """Check that ``needed_bytes`` and a small reserve fit on the disk that will hold ``final``.

    Raises:
        NotEnoughDiskError: they do not.
    """
    parent = final.parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed_bytes + DISK_RESERVE_BYTES:
        raise NotEnoughDiskError(
            f"{final}: needs {size(needed_bytes, digits=2)} and {size(DISK_RESERVE_BYTES)} in reserve, the disk has "
            f"{size(free, digits=2)} free",
            "free some space or choose an output folder on another disk",
        )


def writing_speed(folder: Path, most_bytes: int) -> float | None:
    """Bytes a second that the disk of ``folder`` takes, by a file that is gone at once; None where there are none."""
    size = min(TRIAL_BYTES, most_bytes)
    if size <= 0:
        return None
    data = os.urandom(size)  # what compresses would be written faster
    with tempfile.TemporaryFile(dir=folder) as file:
        begun = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return size / max(time.perf_counter() - begun, 1e-9)


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` through a temporary file, so that it never holds a part of ``data``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` atomically as UTF-8; what it cannot hold, bytes of a folder's name in another encoding, as "?"."""
    write_atomically(path, text.encode("utf-8", "replace"))


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document atomically, indented and with a final newline."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes of ``source`` (through symlinks) to ``target`` and flush them."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    flush(target)


def flush(path: Path) -> None:
    """Call fsync on a file or, where the platform can, on a folder."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_place(final: Path, source: Path) -> None:
    """Check that ``final`` does not exist, and lies neither in the source, nor around it, nor in the Hub cache.

    Raises:
        OutputError: it does, its name is no text, or the source holds what the output has a folder of its own for.
    """
    if os.path.lexists(final):  # a link to nothing is in the way as well
        raise OutputError(f"{final}: exists already", "choose another --out, or move it away")
    real, real_source = (Path(os.path.realpath(its)) for its in (final, source))  # of pathlib, it raises at a loop
    if real_source in (real, *real.parents) or real in real_source.parents:
        raise OutputError(
            f"{final}: lies inside the source {source}, or around it", "choose an --out outside the source folder"
        )
    if not is_text(str(final)):  # safetensors and transformers open no such path
        raise OutputError(f"{final}: is no UTF-8", "choose another --out")
    if (source / PRIVATE_FOLDER).exists() and not (source / OUR_MANIFEST).is_file():
        raise OutputError(
            f"{source}: holds {PRIVATE_FOLDER!r}, a name that the output has for itself",
            "rename it, or move it elsewhere",
        )
    from huggingface_hub.constants import HF_HUB_CACHE

    if Path(HF_HUB_CACHE).resolve() in real.parents:
        raise OutputError(f"{final}: lies inside the Hub cache", "choose an --out outside the cache")


def _journal_aside(final: Path) -> Path:
    return final.with_name(f".{final.name}.journal")


def _journal(folder: OutputFolder) -> dict[str, int]:
    """The complete files of an unfinished folder, by its journal.

    Raises:
        OutputError: the journal cannot be read, or belongs to other work.
    """
    partial, aside = folder.path, _journal_aside(folder.final)
    if aside.is_file() and not (partial / JOURNAL).exists():
        aside.replace(partial / JOURNAL)
    try:
        document = json.loads((partial / JOURNAL).read_bytes())
        known, done = document["fingerprint"], dict(document["done"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{partial}: is in the way and has no readable journal", "move it away or delete it"
        ) from error
    if known != folder.fingerprint:
        raise OutputError(
            f"{partial}: is the unfinished output of another run (model, direction or options differ)",
            "finish it with the command that began it, delete it, or choose another --out",
        )
    return done
