"""Whether a finished folder is what its manifest says: the edit is made again, and hashes of the bytes are compared."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from abliterate.arch.edit_plan import EditPlan
from abliterate.checkpoint.directio import SourceFile
from abliterate.checkpoint.hashes import sha256_file, sha256_tensor
from abliterate.checkpoint.output import prepare
from abliterate.checkpoint.source import Checkpoint, open_folder
from abliterate.editing.asked import plan_asked
from abliterate.editing.planning import plan
from abliterate.errors import UsageError
from abliterate.events import OnEvent, ignore
from abliterate.method.directions import DirectionSet
from abliterate.publishing import manifest
from abliterate.publishing.finished import FinishedEdit
from abliterate.workflow import pipeline
from abliterate.workflow.session import Session, open_session


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproduction:
    """The result of making a finished folder again.

    Attributes:
        shards: shards that came out with other bytes.
        tensors: tensors that came out with other bytes.
        changed: shards of the folder that are no longer what its manifest says.
        direction_agrees: whether the direction is the one of the manifest.
        measured: whether the direction was measured again.
        recorded: whether the manifest holds hashes; without them (never verified) the folder is compared with.
        differences: versions and hardware that are not the same, then and now.
    """

    shards: tuple[str, ...]
    tensors: tuple[str, ...]
    changed: tuple[str, ...]
    direction_agrees: bool
    measured: bool
    recorded: bool
    differences: Mapping[str, tuple[str, str]]

    @property
    def agrees(self) -> bool:
        """Every byte came out again, and the folder still holds them."""
        return not self.shards and not self.changed


def reproduce(
    folder: Path,
    *,
    base: str | Path | None = None,
    measure: bool = False,
    beside: Path | None = None,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> Reproduction:
    """Make ``folder`` again from its manifest and compare the bytes.

    The copy is made in a temporary folder, in ``beside`` or where ``folder`` is.  With ``measure`` the direction is
    measured again; else it is read from the direction file.

    Raises:
        CheckpointError: not a folder that abliterate finished.
        UsageError: with ``measure``, the edit was given as a value, so that no measurement makes it.
        NotEnoughDiskError: a second copy does not fit on the disk.
    """
    finished = FinishedEdit.open(folder).with_changes({"trust_remote_code": trust_remote_code})
    document, recipe = finished.document, finished.recipe
    why = "its edit was given, and not made of the direction" if document["edit"].get("given") else ""
    why = "it was healed, by a training that is not done again" if document.get("healing") else why
    if measure and why:
        raise UsageError(
            f"{folder}: {why}, so measuring again does not make it again",
            "leave out --measure: what was done is then read from its files",
        )
    session = open_session(base or finished.base_name, recipe, revision=finished.revision_of(base), on_event=on_event)
    directions, made = _measured(session) if measure else (finished.directions, finished.plan(session.checkpoint))
    ours = open_folder(folder, name=str(folder))
    expected = (document["verification"] or {}).get("sha256") or {}
    found = {shard.name: sha256_file(folder / shard.name) for shard in ours.shards}
    place = beside or folder.absolute().parent
    with TemporaryDirectory(dir=place, prefix=f".{folder.name}.reproduce-") as temporary:
        output = prepare(
            Path(temporary) / "again",
            source=session.checkpoint.folder,
            fingerprint="reproduce",
            needed_bytes=made.output_bytes,
        )
        pipeline.edit(made, directions, output, recipe, on_event=on_event)
        again = open_folder(output.path, name="again")
        other = [
            shard.name
            for shard in again.shards
            if sha256_file(again.folder / shard.name) != (expected or found).get(shard.name)
        ]
        tensors = _other_tensors(again, ours, other, document)
    return Reproduction(
        shards=tuple(other),
        tensors=tuple(tensors),
        changed=tuple(name for name, digest in found.items() if expected and expected.get(name) != digest),
        direction_agrees=directions.sha256 == document["direction"]["sha256"],
        measured=measure,
        recorded=bool(expected),
        differences=_differences(document),
    )


def _measured(session: Session) -> tuple[DirectionSet, EditPlan]:
    """The direction, measured again, and the plan of the recipe's edit along it."""
    recipe = session.recipe
    directions = pipeline.select(session, pipeline.measure(session))
    made = plan(session.checkpoint, **recipe.plan_options)
    return directions, plan_asked(made, recipe.edit, directions)


def _other_tensors(again: Checkpoint, ours: Checkpoint, shards: list[str], document: Mapping[str, Any]) -> list[str]:
    """The tensors of ``shards`` whose hash is not the recorded one or, where none is recorded, that of the folder."""
    recorded = {entry["name"]: entry["sha256_after"] for entry in (document["verification"] or {}).get("edited", ())}
    names = []
    for tensor in again.tensors.values():
        if tensor.shard not in shards:
            continue
        expected = recorded.get(tensor.name)
        if expected is None and tensor.name in ours.tensors:
            expected = _hash(ours, tensor.name)
        if _hash(again, tensor.name) != expected:
            names.append(tensor.name)
    return names


def _hash(checkpoint: Checkpoint, name: str) -> str:
    tensor = checkpoint.tensors[name]
    with SourceFile(checkpoint.folder / tensor.shard) as file:
        return sha256_tensor(file, tensor)


def _differences(document: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Versions and hardware, then and now, where they are not the same."""
    then = {**document["versions"], **document.get("machine", {})}
    now = {**manifest.versions(), **manifest.machine()}
    return {
        name: (str(then.get(name, "not recorded")), value) for name, value in now.items() if then.get(name) != value
    }
