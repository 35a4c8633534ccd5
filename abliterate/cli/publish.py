"""``abliterate push``, and what ``run`` and ``edit`` share with it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from abliterate.cli import options as opt
from abliterate.cli.console import guarded, out, progress, show_json
from abliterate.cli.recipe_options import takes
from abliterate.errors import UsageError
from abliterate.recipe import Recipe

if TYPE_CHECKING:
    from abliterate.events import OnEvent
    from abliterate.method.directions import DirectionSet
    from abliterate.publishing.push import Published


@dataclass(frozen=True, kw_only=True)
class Upload:
    """Where ``run`` and ``edit`` send what they made: nowhere without a name."""

    name: str | None
    branch: str | None
    private: bool

    def check(self, model: str, listen: "OnEvent") -> None:
        """Refuse, before hours of work, what could not be sent afterwards."""
        if self.name is None:
            return
        from abliterate.publishing import push as publishing

        publishing.refuse_base(model, self.name, self.branch)
        publishing.check_target(self.name, branch=self.branch, private=self.private, on_event=listen)


@guarded
@takes("publish")
def push(
    folder: Annotated[Path, typer.Argument(help="A finished and verified folder.")],
    name: Annotated[str, typer.Argument(help="The repository, OWNER/NAME. It is made if it is not there.")],
    *,
    recipe: Recipe,
    branch: opt.Branch = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    base: Annotated[str | None, typer.Option(help="Folder of the base. Default: the one the manifest names.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Prove the bytes once more if the base is on this disk.")
    ] = True,
    json: opt.Json = False,
) -> None:
    """Upload a verified folder to the Hub, in one commit. An unverified one is never uploaded.

    Example: abliterate push qwen-abl me/Qwen2.5-7B-Instruct-abliterated --private
    """
    from abliterate import api

    with progress() as listen:
        done = api.push(
            folder, name, private=recipe.publish.private, branch=branch, message=message, base=base, verify=verify,
            on_event=listen,
        )  # fmt: skip
    if json:
        show_json(asdict(done))
    else:
        show_published(done)


def check_push_options(push: str | None, branch: str | None, *, private: bool) -> None:
    """Refuse what says how to upload where nothing is uploaded.

    Raises:
        UsageError: ``--branch`` or ``--private`` without ``--push``.
    """
    if push is None and (branch is not None or private):
        option = "--private" if branch is None else "--branch"
        raise UsageError(f"{option} says how to upload, and nothing is uploaded", "add --push OWNER/NAME")


def stream_through(
    model: str | None,
    direction: "DirectionSet | None",
    target: Path,
    recipe: Recipe,
    upload: Upload,
    *,
    revision: str | None,
    as_json: bool,
) -> None:
    """``--stream`` of ``edit`` and ``run``."""
    if upload.name is None:
        raise UsageError("--stream sends every shard to the Hub", "add --push OWNER/NAME")
    if model is None or direction is None:
        raise UsageError(
            "--stream edits a model of the Hub along a direction that is there: measuring needs the whole model",
            "give the model, and its direction by --direction FILE",
        )
    from abliterate import api

    with progress() as listen:
        done = api.stream(
            model, direction, upload.name, target, recipe=recipe, revision=revision, branch=upload.branch,
            private=upload.private, on_event=listen,
        )  # fmt: skip
    if as_json:
        show_json(asdict(done))
    else:
        show_published(done)


def show_published(done: "Published") -> None:
    """Where it is."""
    out.print(f"published: {done.url} ({done.files} files, commit {done.commit[:8]})", markup=False, soft_wrap=True)
