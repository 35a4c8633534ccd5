"""What the fuzz tests check of each format that comes from others, and coverage-guided targets for ``make soak``:

python -m tests.fuzz_targets FORMAT -max_total_time=600

Any bytes give a valid object, or an error made for people: nothing else, no hang, no large allocation.
"""

import gzip
import importlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import yaml
from huggingface_hub import ModelCard, ModelCardData

from abliterate.checkpoint import direction_file, edit_file
from abliterate.checkpoint.gguf import read_gguf
from abliterate.checkpoint.header import DTYPE_BITS, read_shard
from abliterate.checkpoint.source import INDEX_NAME, Checkpoint, open_folder
from abliterate.editing.planning import plan
from abliterate.errors import AbliterateError
from abliterate.exports.patches.file import KEY as PATCH_KEY
from abliterate.exports.patches.file import PatchFile
from abliterate.model.prompts import load_prompts
from abliterate.publishing import card, manifest
from abliterate.recipe import Recipe, load_recipe
from tests.checkpoints import with_header, write_llama

T = TypeVar("T")

CORPUS = Path(__file__).parent / "data" / "corpus"
"""Small inputs of every format: valid ones, and those that once failed."""

VALID_HEADER = with_header(
    {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        "b": {"dtype": "F32", "shape": [], "data_offsets": [12, 16]},
    },
    bytes(range(16)),
    pad=1,
)
_FOLDER = Path(tempfile.mkdtemp(prefix="abliterate-fuzz-"))


def result_of(make: Callable[[], T]) -> T | None:
    """What ``make`` gives, or None where it refuses, in words."""
    try:
        return make()
    except AbliterateError as error:
        assert error.message
        assert error.hint
        return None


def written(data: bytes, name: str) -> Path:
    """A file that holds ``data``."""
    path = _FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def llama() -> Path:
    """A checkpoint, made when first asked for."""
    folder = _FOLDER / "llama"
    return folder if folder.exists() else write_llama(folder)


def as_document(data: bytes, key: str, format_name: str) -> bytes:
    """A valid file of a format that is safetensors, with ``data`` as the document in its metadata."""
    valid = (CORPUS / format_name / "valid.safetensors").read_bytes()
    start = 8 + int.from_bytes(valid[:8], "little")
    header = json.loads(valid[8:start])
    header["__metadata__"][key] = data.decode("utf-8", "replace")
    return with_header(header, valid[start:])


def check_header(data: bytes) -> bool:
    """A shard that fits its file."""
    path = written(data, "shard")
    shard = result_of(lambda: read_shard(path.parent, path.name))
    if shard is None:
        return False
    end = shard.data_start
    for tensor in shard.tensors:
        assert end <= tensor.start <= tensor.end <= len(data)
        assert tensor.numel * DTYPE_BITS[tensor.dtype] == tensor.size_bytes * 8
        end = tensor.end
    return True


def check_index(data: bytes) -> bool:
    """Shards that lie in the folder."""
    folder = written(b"{}", "indexed/config.json").parent
    written(VALID_HEADER, "indexed/model.safetensors")
    written(data, f"indexed/{INDEX_NAME}")
    opened = result_of(lambda: open_folder(folder, name="fuzz"))
    if opened is not None:
        assert all((folder / shard.name).parent == folder for shard in opened.shards)
    return opened is not None


def check_config(data: bytes) -> bool:
    """A plan whose writers are there."""
    (llama() / "config.json").write_bytes(data)
    made = result_of(lambda: plan(llama()))
    if made is not None:
        assert made.writers
        assert all(writer.tensor.shape[writer.axis] == made.model_map.d_model for writer in made.writers)
    result_of(lambda: plan(llama(), allow_partial=True))
    return made is not None


def check_direction(data: bytes) -> bool:
    """Directions that can be written and read back."""
    taken = False
    for content in (data, as_document(data, "abliterate", "direction")):
        path = written(content, "direction.safetensors")
        found = result_of(lambda path=path: direction_file.load(path))
        if found is not None:
            again = direction_file.load(direction_file.save(found, path.with_name("again.safetensors")))
            assert [one.id for one in again.candidates] == [one.id for one in found.candidates]
            taken = True
    return taken


def check_edit(data: bytes) -> bool:
    """An edit of one width."""
    taken = False
    for content in (data, as_document(data, edit_file.KEY, "edit")):
        path = written(content, "edit.safetensors")
        found = result_of(lambda path=path: edit_file.load(path))
        if found is not None:
            assert len({edit.d_model for edit in found.edits()}) <= 1
            taken = True
    return taken


def check_patch(data: bytes) -> bool:
    """A patch whose recipe and edits can be read, or are refused."""
    taken = False
    for content in (data, as_document(data, PATCH_KEY, "patch")):
        path = written(content, "patch.safetensors")
        file = result_of(lambda path=path: PatchFile(path))
        if file is not None:
            result_of(lambda file=file, path=path: manifest.recipe_of(file.document, where=path))
            result_of(lambda file=file: [file.edit(entry["projector"]) for entry in file.document["tensors"]])
            taken = True
    return taken


def check_manifest(data: bytes) -> bool:
    """A manifest whose recipe can be read, or is refused."""
    path = written(data, f"finished/{manifest.FILE_NAME}")
    document = result_of(lambda: manifest.read(path.parent))
    if document is not None:
        assert isinstance(document["source"]["name"], str)
        result_of(lambda: manifest.recipe_of(document, where=path))
    return document is not None


def check_recipe(data: bytes) -> bool:
    """A recipe that is the same once written and read."""
    path = written(data, "recipe.toml")
    found = result_of(lambda: load_recipe(str(path)))
    if found is not None:
        assert isinstance(found, Recipe)
        again = load_recipe(str(written(found.to_toml().encode(), "again.toml")))
        assert again.to_toml() == found.to_toml()
    return found is not None


def check_prompts(data: bytes) -> bool:
    """Prompts that hold something, whatever kind of file the bytes are said to be."""
    taken = False
    for suffix in (".txt", ".jsonl", ".json", ".csv", ".tsv"):
        for packed, content in (("", data), (".gz", data), (".gz", gzip.compress(data, mtime=0))):
            path = written(content, f"prompts{suffix}{packed}")
            found = result_of(lambda path=path: load_prompts(str(path)))
            if found is not None:
                assert all(text.strip() for text in found.texts)
                assert found.sha256
                taken = True
    return taken


def check_gguf(data: bytes) -> bool:
    """Tensors that lie in the file."""
    path = written(data, "model.gguf")
    found = result_of(lambda: read_gguf(path))
    if found is not None:
        assert found.architecture
        assert all(0 <= tensor.start <= tensor.end <= len(data) for tensor in found.tensors)
    return found is not None


def check_card(data: bytes) -> bool:
    """Metadata that make a card whose own are valid YAML."""
    folder = written(data, "base/README.md").parent
    base = Checkpoint(
        name="base", root=folder, revision=None, config={}, shards=(), index=None, other_files=(), left_out=()
    )
    carried = card.base_metadata(base)
    made = str(ModelCard.from_template(ModelCardData(**carried), template_str="---\n{{ card_data }}\n---\n\n# Text\n"))
    assert ModelCard(made).text.strip() == "# Text"
    assert (yaml.safe_load(made.split("---\n")[1]) or {}).keys() == carried.keys()
    return bool(carried)


TARGETS: dict[str, Callable[[bytes], bool]] = {
    "header": check_header, "index": check_index, "config": check_config, "direction": check_direction,
    "edit": check_edit, "patch": check_patch, "manifest": check_manifest, "recipe": check_recipe,
    "prompts": check_prompts, "gguf": check_gguf, "card": check_card,
}  # fmt: skip
"""The check of each format, and whether the bytes were taken; its name is that of its folder in the corpus."""


def main() -> None:
    """Run the coverage-guided fuzzer on one format, from its corpus on."""
    import atheris

    program, name, *options = sys.argv
    with atheris.instrument_imports(include=["abliterate"]):
        for module in [its for its in sys.modules if its.split(".")[0] == "abliterate"]:
            del sys.modules[module]  # imported above, before it could be instrumented
        check = importlib.import_module("tests.fuzz_targets").TARGETS[name]
    found = Path(tempfile.gettempdir()) / f"abliterate-corpus-{name}"
    found.mkdir(exist_ok=True)
    limits = ["-timeout=20", "-rss_limit_mb=4096", "-max_len=8192"]
    atheris.Setup([program, str(found), str(CORPUS / name), *limits, *options], lambda data: check(data) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
