"""A checkpoint as its headers, configuration and file names describe it, and a folder opened as one.

Opening reads headers and ``config.json`` only.  For a Hub repository (``hub``) these come by range requests, so a plan
of a 140 GB model fetches a few megabytes; ``hub.fetch`` then downloads what the other stages need.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from abliterate.checkpoint.file_names import is_inner, is_plain, same_without_case
from abliterate.checkpoint.header import Shard, TensorInfo, check_no_pointer, read_shard, size_of_file
from abliterate.errors import CheckpointError, UnsupportedFormatError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

SHARD_NAME = re.compile(r"[^/\\:\0]+\.safetensors")

MISMATCHED = (
    "index and shards do not belong together: fetch both again; where their hashes are those that the Hub shows, "
    "it was published so: tell its author, or save it anew with transformers"
)

OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".safetensors")
"""Files with these endings that the index does not name hold unedited weights: they are left out, and said so.

So are links to folders, with a ``/`` behind their names.
"""

IGNORED_PARTS = (".git", ".cache", "__pycache__")
HUBS_OWN = (".gitattributes",)
"""What the Hub puts into a repository by itself: no file of a checkpoint, whether the base has it or not."""
CONFIG_PARTS = ("text_config", "vision_config", "audio_config")
ADAPTER, ADAPTER_STEM = "adapter_config.json", "adapter_model."
OUR_MANIFEST, OUR_FOLDER = "abliterate.json", "abliterate"
"""What an edit leaves in its output: when that is edited again, the folder is made anew."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint seen from outside: headers, configuration and file names, no tensor bytes.

    ``root`` is the folder the files lie in, or None while only the headers of a Hub repository are here.
    ``name`` is what the user typed.  ``index`` is the parsed index file, or None for a single-file checkpoint.
    ``state`` has the size and the time of the last change of what was read when it was opened (``check_unchanged``).
    """

    name: str
    root: Path | None
    revision: str | None
    config: Mapping[str, Any]
    shards: tuple[Shard, ...]
    index: Mapping[str, Any] | None
    other_files: tuple[str, ...]
    left_out: tuple[str, ...]
    state: tuple[tuple[str, int, int], ...] = ()

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}

    @property
    def model_type(self) -> str:
        """``model_type`` of the configuration."""
        return str(self.config.get("model_type", ""))

    @property
    def size_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size_bytes for shard in self.shards)

    def check_unchanged(self) -> None:
        """Check that the files are still those that were opened: half of one state and half of another is no model.

        Raises:
            CheckpointError: one was written to meanwhile, or is gone.
        """
        now = _state(self.folder, [name for name, *_ in self.state])
        if now != self.state:
            changed = next(name for name, *rest in self.state if (name, *rest) not in now)
            raise CheckpointError(
                f"{self.folder / changed}: changed while it was read",
                "wait until nothing writes to it any more, delete the unfinished output, and run the command again",
            )

    def identity(self) -> dict[str, Any]:
        """What tells this checkpoint from another, or from itself after a change, as plain data."""
        return {
            "changed": [(self.folder / shard.name).stat().st_mtime_ns for shard in self.shards],
            "source": [[t.name, t.shard, t.dtype, t.shape, t.start] for t in self.tensors.values()],
            "config": dict(self.config),
        }

    @property
    def folder(self) -> Path:
        """``root``, for stages that need the bytes.

        Raises:
            CheckpointError: only headers were fetched.
        """
        if self.root is None:
            raise CheckpointError(
                f"{self.name}: only its headers are here", "fetch it with `abliterate.checkpoint.hub.fetch` first"
            )
        return self.root


def looks_like_path(name: str) -> bool:
    """Whether ``name`` can only be meant as a local path (a Hub name is ``model`` or ``owner/model``)."""
    return name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or "\\" in name or (name[1:2] == ":")


def open_folder(folder: Path, *, name: str, revision: str | None = None) -> Checkpoint:
    """Open a checkpoint folder: its configuration, its index and the header of every shard.

    Raises:
        CheckpointError: a file is missing, truncated, or names something outside the folder.
        UnsupportedFormatError: there are weights, but not as safetensors.
    """
    _check_no_adapter(folder)
    read = ["config.json", INDEX_NAME]
    state = _state(folder, read)
    config = read_config(folder / "config.json")
    index, shard_names = _shard_names(folder)
    state += _state(folder, shard_names)
    shards = tuple(read_shard(folder, shard) for shard in shard_names)
    check_index(index, shards, where=folder / INDEX_NAME)
    others, left_out = _other_files(folder, set(shard_names))
    return Checkpoint(
        name=name,
        root=folder,
        revision=revision or revision_of_cache(folder),
        config=config,
        shards=shards,
        index=index,
        other_files=others,
        left_out=left_out,
        state=state,
    )


def _state(folder: Path, names: Iterable[str]) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of the last change of those of ``names`` that are there."""
    found = []
    for name in names:
        try:
            its = (folder / name).stat()
        except OSError:  # reading it, later, says why
            continue
        found.append((name, its.st_size, its.st_mtime_ns))
    return tuple(found)


def _check_no_adapter(folder: Path) -> None:
    if (folder / ADAPTER).is_file() and not (folder / "config.json").exists():
        base = read_json(folder / ADAPTER).get("base_model_name_or_path") or "its base"
        raise UnsupportedFormatError(
            f"{folder}: a LoRA adapter of {base}, not a checkpoint",
            "merge it into its base first (merge_and_unload and save_pretrained of peft), or edit the base",
        )


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of a model, whose parts are objects as well.

    Raises:
        CheckpointError: as ``read_json``, or a part of it is none.
    """
    config = read_json(path)
    for name in CONFIG_PARTS:
        if not isinstance(config.get(name, {}), dict | None):
            raise CheckpointError(f"{path}: {name} must be an object", "fetch this file again")
    return config


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        CheckpointError: missing, unreadable, a pointer, or not an object.
    """
    try:
        size_of_file(path)
        raw = path.read_bytes()
        check_no_pointer(raw, where=path)
        document = json.loads(raw)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror})", "the folder must hold a complete checkpoint"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})", "fetch this file again") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: must hold a JSON object", "fetch this file again")
    return document


def safe_shard_names(index: Mapping[str, Any], where: Path) -> list[str]:
    """The shard file names of an index, in order of first use.

    Raises:
        CheckpointError: no weight map, or a name that would leave the folder.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: has no weight_map", "fetch this file again")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not SHARD_NAME.fullmatch(shard) or not is_plain(shard):
            raise CheckpointError(
                f"{where}: shard name {shard!r} is not a plain .safetensors file name",
                "do not use this checkpoint: its index points outside its own folder",
            )
    names = list(dict.fromkeys(weight_map.values()))
    twins = same_without_case(names)
    if twins:
        raise CheckpointError(
            f"{where}: shards {twins[0]!r} and {twins[1]!r} differ in case only",
            "on many disks they are one file: rename one, here and in the index",
        )
    return names


def check_index(index: Mapping[str, Any] | None, shards: tuple[Shard, ...], *, where: Path) -> None:
    """Check that the index and the headers agree on where every tensor lies.

    Raises:
        CheckpointError: a tensor is missing, misplaced, or stored twice.
    """
    placed: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name in placed:
                raise CheckpointError(
                    f"{where}: tensor '{tensor.name}' is stored in {placed[tensor.name]} and in {shard.name}",
                    "fetch the checkpoint again",
                )
            placed[tensor.name] = shard.name
    if index is None:
        return
    for name, shard in index["weight_map"].items():
        if placed.get(name) != shard:
            raise CheckpointError(
                f"{where}: says tensor '{name}' is in {shard}, but it is {_where(placed.get(name))}",
                MISMATCHED,
            )
    for name, shard in placed.items():
        if name not in index["weight_map"]:
            raise CheckpointError(
                f"{where}: does not name tensor '{name}' of {shard}",
                MISMATCHED,
            )


def revision_of_cache(folder: Path) -> str | None:
    """The commit of a Hub-cache snapshot folder (``.../snapshots/<commit>``), else None."""
    return folder.name if folder.parent.name == "snapshots" else None


def _where(shard: str | None) -> str:
    return "in no shard" if shard is None else f"in {shard}"


def _shard_names(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    if (folder / INDEX_NAME).exists():
        index = read_json(folder / INDEX_NAME)
        return index, safe_shard_names(index, folder / INDEX_NAME)
    if (folder / SINGLE_NAME).exists():
        return None, [SINGLE_NAME]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        raise UnsupportedFormatError(
            f"{folder}: the weights are pickled ({pickles[0]}), which can run code when opened",
            "convert them first: https://huggingface.co/spaces/safetensors/convert, or save_pretrained of transformers",
        )
    raise CheckpointError(
        f"{folder}: holds neither {SINGLE_NAME} nor {INDEX_NAME}", "give the folder of a safetensors checkpoint"
    )


def without_weights(names: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """``names`` of files beside the shards: those that are copied, and those that hold weights.

    An adapter's configuration goes with its weights: alone, transformers would look for them.
    """
    names = tuple(names)
    weights = {name for name in names if name.endswith(OTHER_WEIGHTS)}
    adapted = {name.rpartition("/")[0] for name in weights if name.rpartition("/")[2].startswith(ADAPTER_STEM)}
    weights |= {name for name in names if name.rpartition("/")[2] == ADAPTER and name.rpartition("/")[0] in adapted}
    return tuple(name for name in names if name not in weights), tuple(name for name in names if name in weights)


def _other_files(folder: Path, shards: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    found, linked = [], []
    ours = OUR_FOLDER if (folder / OUR_MANIFEST).is_file() else None
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if relative.parts[0] == ours or any(part in IGNORED_PARTS for part in relative.parts):
            continue
        if path.is_symlink() and not path.exists():
            raise CheckpointError(f"{path}: is a link to a file that is not there", "fetch this file again")
        if path.is_symlink() and path.is_dir():  # it may lead anywhere, or in a circle
            linked.append(f"{relative.as_posix()}/")
        if not path.is_file():
            continue
        name = relative.as_posix()
        if name in shards or name == INDEX_NAME:
            continue
        if not is_inner(name):
            raise CheckpointError(
                f"{folder}: the name of its file {name!r} cannot be handed on",
                "rename that file, or move it out of the folder: names are UTF-8, without backslashes",
            )
        found.append(name)
    copied, weights = without_weights(found)
    return copied, (*weights, *linked)
