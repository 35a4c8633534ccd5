"""``abliterate reproduce``: make a checkpoint again from its manifest, and compare."""

from typing import TYPE_CHECKING, Annotated

import typer

from abliterate.cli import options as opt
from abliterate.cli.console import guarded, out, progress, show_json
from abliterate.cli.recipe_options import takes
from abliterate.recipe import Recipe

if TYPE_CHECKING:
    from abliterate.workflow.reproducing import Reproduction

MOST_NAMES = 8


@guarded
@takes("trust_remote_code")
def reproduce(
    folder: opt.Finished,
    *,
    base: opt.Base = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure and select the direction again, not only the edit.")
    ] = False,
    revision: opt.Revision = None,
    recipe: Recipe,
    json: opt.Json = False,
) -> None:
    """Make a checkpoint again from its manifest, in a temporary folder beside it, and say whether the bytes agree.

    One of the Hub is made again in the current folder.

    Example: abliterate reproduce tiny-chat-abl
    """
    from dataclasses import asdict

    from abliterate import api
    from abliterate.errors import VerificationError
    from abliterate.model.load import quiet_transformers

    quiet_transformers()
    with progress() as listen:
        found = api.reproduce(
            folder, revision=revision, base=base, measure=measure, on_event=listen,
            trust_remote_code=recipe.model.trust_remote_code,
        )  # fmt: skip
    if json:
        show_json({**asdict(found), "agrees": found.agrees})
    else:
        _show(found)
    if not found.agrees:
        raise VerificationError(f"{folder}: {_first(found)}", _hint(found))


def _first(found: "Reproduction") -> str:
    if found.changed:
        return f"{found.changed[0]} is not what the manifest says: it was changed after it was written"
    what = f"'{found.tensors[0]}'" if found.tensors else found.shards[0]
    more = f" and {len(found.tensors) - 1} more tensors" if len(found.tensors) > 1 else ""
    return f"made again, {what}{more} came out otherwise"


def _hint(found: "Reproduction") -> str:
    if not found.direction_agrees:
        return "the direction is another one already; without --measure the recorded one is used"
    if found.differences:
        return f"other than then: {', '.join(found.differences)}; `abliterate verify` proves the edit all the same"
    return "`abliterate verify` says whether the edit holds"


def _show(found: "Reproduction") -> None:
    how = "measured again" if found.measured else "from its file"
    out.print(f"direction {how}: {'the same' if found.direction_agrees else 'another one'}")
    for name, (then, now) in found.differences.items():
        out.print(f"{name}: {then} then, {now} now", markup=False)
    if not found.recorded:
        out.print("the manifest holds no hashes (never verified): compared with the folder itself")
    for name in found.tensors[:MOST_NAMES]:
        out.print(f"differs: {name}", markup=False)
    if len(found.tensors) > MOST_NAMES:
        out.print(f"… and {len(found.tensors) - MOST_NAMES} more")
    if found.agrees:
        out.print("[green]every byte came out again[/green]")
