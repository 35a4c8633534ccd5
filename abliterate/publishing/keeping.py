"""What goes into an output folder beside the checkpoint itself, and what must hold before it gets its name."""

from abliterate.arch.edit_plan import EditPlan
from abliterate.checkpoint import direction_file as direction_files
from abliterate.checkpoint import edit_file
from abliterate.checkpoint.output import OutputFolder, copy_file, write_text
from abliterate.checkpoint.source import Checkpoint
from abliterate.errors import VerificationError
from abliterate.method.directions import DirectionSet
from abliterate.publishing import manifest
from abliterate.recipe import Recipe
from abliterate.verification.report import VerifyReport

DIRECTION_FILE = "direction.safetensors"
EDIT_FILE = "edit.safetensors"
RECIPE_FILE = "recipe.toml"


def keep_origin(plan: EditPlan, directions: DirectionSet, recipe: Recipe, output: OutputFolder) -> None:
    """Put direction, edit, recipe, and what the base says of itself, into the private folder of ``output``."""
    if plan.stream is not None:
        edit_file.save(plan.stream, output.private / EDIT_FILE)
    direction_files.save(directions, output.private / DIRECTION_FILE)
    keep_base(plan.checkpoint, recipe, output)


def keep_base(base: Checkpoint, recipe: Recipe, output: OutputFolder) -> None:
    """Put the recipe, and what the base says of itself, into the private folder of ``output``."""
    write_text(output.private / RECIPE_FILE, recipe.to_toml())
    for name in ("README.md", manifest.FILE_NAME):
        if (base.folder / name).is_file():
            copy_file(base.folder / name, output.private / f"base-{name}")


def require_verified(report: VerifyReport, output: OutputFolder) -> None:
    """Stop unless everything was proven; the unfinished output keeps its ``.partial`` name.

    Raises:
        VerificationError: names the first failure.
    """
    if report.ok:
        return
    failures = list(report.failures)
    more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    raise VerificationError(
        f"verification failed: {failures[0]}{more}",
        f"nothing was written under {output.final}; look at {output.path}, and delete it before trying again",
    )
