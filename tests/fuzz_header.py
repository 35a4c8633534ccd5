"""What the fuzz tests check, and a coverage-guided target for ``make soak``:

python -m tests.fuzz_header -max_total_time=600
"""

import json
import sys
import tempfile
from pathlib import Path

from abliterate.checkpoint.header import DTYPE_BITS, read_shard
from abliterate.checkpoint.source import INDEX_NAME, open_folder
from abliterate.errors import AbliterateError


def _valid() -> bytes:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        "b": {"dtype": "F32", "shape": [], "data_offsets": [12, 16]},
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(range(16))


VALID_HEADER = _valid()
_FOLDER = Path(tempfile.mkdtemp(prefix="abliterate-fuzz-"))


def check_shard(data: bytes) -> None:
    """Reading any bytes as a shard gives one that fits its file, or an error made for people."""
    (_FOLDER / "shard").write_bytes(data)
    try:
        shard = read_shard(_FOLDER, "shard")
    except AbliterateError as error:
        assert error.message
        assert error.hint
        return
    end = shard.data_start
    for tensor in shard.tensors:
        assert end <= tensor.start <= tensor.end <= len(data)
        assert tensor.numel * DTYPE_BITS[tensor.dtype] == tensor.size_bytes * 8
        end = tensor.end


def check_index(data: bytes) -> None:
    """Opening a folder with any bytes as its index works or fails with an error made for people."""
    (_FOLDER / "config.json").write_text("{}")
    (_FOLDER / "model.safetensors").write_bytes(VALID_HEADER)
    (_FOLDER / INDEX_NAME).write_bytes(data)
    try:
        opened = open_folder(_FOLDER, name="fuzz")
    except AbliterateError as error:
        assert error.hint
        return
    assert all((_FOLDER / shard.name).parent == _FOLDER for shard in opened.shards)


def main() -> None:
    """Run the coverage-guided fuzzer on both checks."""
    import atheris

    def target(data: bytes) -> None:
        check_shard(data)
        check_index(data)

    atheris.instrument_all()
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
