"""A finished folder, from outside in: its manifest, recipe, direction and edit, its base, and the plan it came from."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from abliterate.arch.edit_plan import EditPlan
from abliterate.checkpoint import direction_file, edit_file, healing_file
from abliterate.checkpoint.file_names import inner_name
from abliterate.checkpoint.finished import finished_folder
from abliterate.checkpoint.hub import fetch
from abliterate.checkpoint.source import OUR_MANIFEST, Checkpoint
from abliterate.data.bundled import open_model
from abliterate.editing.healing import healed
from abliterate.editing.planning import plan
from abliterate.errors import AbliterateError
from abliterate.events import Noted, OnEvent, ignore
from abliterate.method.directions import DirectionSet
from abliterate.method.edits import removal
from abliterate.method.stream_edit import StreamEdit
from abliterate.method.weight_edit import WeightEdit
from abliterate.publishing import manifest
from abliterate.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class FinishedEdit:
    """A folder that abliterate finished.  What came from the Hub lies in its cache, and nothing is written there."""

    folder: Path
    document: Mapping[str, Any]
    recipe: Recipe
    from_hub: bool = False

    @classmethod
    def open(cls, name: str | Path, *, revision: str | None = None) -> "FinishedEdit":
        """The folder ``name``, or the repository of that name on the Hub, at ``revision``.

        Raises:
            CheckpointError: not a folder that abliterate finished.
            HubError: the repository cannot be reached.
        """
        place = finished_folder(name, revision=revision)
        document = manifest.read(place.path)
        return cls(
            folder=place.path,
            document=document,
            recipe=manifest.recipe_of(document, where=place.path / manifest.FILE_NAME),
            from_hub=place.from_hub,
        )

    def with_changes(self, changes: Mapping[str, Any]) -> "FinishedEdit":
        """The same under other options of the recipe.

        Raises:
            RecipeError: a value is not allowed.
        """
        return replace(self, recipe=self.recipe.with_changes(changes))

    @cached_property
    def directions(self) -> DirectionSet:
        """The direction file."""
        return direction_file.load(self._file(self.document["direction"]["file"]))

    @cached_property
    def stream(self) -> StreamEdit:
        """What the edit did to the residual stream; manifests of version 1 name a direction alone."""
        name = self.document["edit"].get("file")
        return removal(self.directions.chosen) if name is None else edit_file.load(self._file(name))

    def _file(self, name: object) -> Path:
        return self.folder / inner_name(name, where=self.folder / manifest.FILE_NAME)

    @property
    def base_name(self) -> str:
        """What the base was called."""
        return str(self.document["source"]["name"])

    def revision_of(self, base: str | Path | None) -> str | None:
        """The commit of the base that was edited; None where another ``base`` is given, or it is a folder."""
        return self.document["source"]["revision"] if base is None and not Path(self.base_name).exists() else None

    def open_base(self, base: str | Path | None = None) -> Checkpoint:
        """The base, or the checkpoint given in its place, its files on this disk."""
        return fetch(open_model(base or self.base_name, revision=self.revision_of(base)))

    def plan(self, base: Checkpoint) -> EditPlan:
        """The plan of the edit and, where it was healed, of that, on ``base``."""
        made = plan(base, edit=self.stream, **self.recipe.plan_options)
        its = self.document.get("healing")
        return made if its is None else healed(made, healing_file.load(self._file(its["file"])))


def planned_edits(
    edited: str | Path, base: str | Path, *, on_event: OnEvent = ignore
) -> Mapping[str, WeightEdit] | None:
    """The edits that the folder ``edited`` was planned with, on ``base``; None where abliterate did not finish it.

    Raises:
        CheckpointError: its manifest cannot be read.
    """
    if not (Path(edited) / OUR_MANIFEST).is_file():
        return None
    finished = FinishedEdit.open(edited)
    try:
        return finished.plan(finished.open_base(base)).edits
    except AbliterateError as error:
        on_event(Noted(text=f"not held against the plan of {edited}: {error.message}"))
        return None
