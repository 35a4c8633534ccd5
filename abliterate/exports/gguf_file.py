"""A small GGUF file, written whole or not at all, by the ``gguf`` library."""

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abliterate.checkpoint.output import flush
from abliterate.errors import OutputError, UsageError

Value = str | int | float
"""A string, an unsigned number of 32 bits, or a float32: what our files state."""


def check_writable(out: Path, what: str) -> None:
    """Check, before anything is computed, that ``out``, which is to be ``what``, can be written.

    Raises:
        UsageError: the ``gguf`` library is missing.
        OutputError: ``out`` exists.
    """
    if find_spec("gguf") is None:
        raise UsageError(
            f"{what} is a GGUF file, and the gguf library is not installed", "pip install 'abliterate[gguf]'"
        )
    if out.exists():
        raise OutputError(f"{out}: exists already", "choose another name, or delete it")


def write_gguf(
    out: Path, architecture: str, values: Mapping[str, Value], tensors: Mapping[str, Tensor], *, what: str
) -> Path:
    """Write ``tensors`` as float32, in their order, with the shapes they have in torch; folders are made.

    A GGUF header names the fastest axis first, as ``ne`` of llama.cpp does: ``[rows, columns]`` of torch is ``ne =
    (columns, rows)``.  Until it is complete the file is called ``NAME.partial``.

    Raises:
        UsageError: the ``gguf`` library is missing.
        OutputError: ``out`` exists, or cannot be written.
    """
    check_writable(out, what)
    partial = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _write(partial, architecture, values, tensors)
        flush(partial)
        partial.replace(out)
    except OSError as error:
        raise OutputError(
            f"{out}: cannot be written ({error.strerror or error})", "choose another place, or mend the disk"
        ) from error
    finally:
        if partial.is_file():
            partial.unlink()
    return out


def _write(path: Path, architecture: str, values: Mapping[str, Value], tensors: Mapping[str, Tensor]) -> None:
    library: Any = import_module("gguf")
    writer = library.GGUFWriter(path, architecture)
    for key, value in values.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_float32(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.to(torch.float32).contiguous().numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
