"""``abliterate eval`` and ``compare``: models side by side on the test prompts."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abliterate.cli import options as opt
from abliterate.cli.console import guarded, progress, show_json
from abliterate.cli.recipe_options import Given, flag_of, takes
from abliterate.cli.tables import SAMPLES
from abliterate.errors import UsageError
from abliterate.recipe import SECTIONS, Recipe

if TYPE_CHECKING:
    from abliterate.method.directions import DirectionSet

Samples = Annotated[
    int, typer.Option(min=0, help="Of how many prompts that one refuses and the other answers to show the replies.")
]


@guarded
@takes("harmful", "harmless", "model", "evaluate", file=True)
def evaluate(
    base: opt.Model,
    edited: Annotated[str, typer.Argument(help="The checkpoint to compare with BASE.")],
    *,
    recipe: Recipe,
    given: Given,
    words: Annotated[
        str | None,
        typer.Option(
            help="A file of words, one on each line: how likely each model finds them. Lines with {word} are "
            "sentences to put them into, in place of the bundled ones."
        ),
    ] = None,
    words_only: Annotated[
        bool,
        typer.Option(
            "--words-only", help="With --words: ask for these alone. No replies are written, nothing else is measured."
        ),
    ] = False,
    third: Annotated[
        str | None,
        typer.Option(help="With --words: another model to ask, such as the pretrained one. It needs no chat template."),
    ] = None,
    samples: Samples = SAMPLES,
    show_replies: opt.ShowReplies = False,
    report: opt.ReportFile = None,
    json: opt.Json = False,
) -> None:
    """Compare two checkpoints: refusal, broken replies, and what changed on harmless prompts.

    Example: abliterate eval tiny-chat tiny-chat-abl --report report.html
    """
    from abliterate.checkpoint.hub import fetch
    from abliterate.data.bundled import open_model
    from abliterate.model.words import load_words

    if third is not None and words is None:
        raise UsageError("--third is asked for words, and none are given", "add --words FILE")
    if words_only:
        if words is None:
            raise UsageError("--words-only asks for words alone, and none are given", "add --words FILE")
        _check_words_alone(given, ["--show-replies"] * show_replies + ["--samples"] * (samples != SAMPLES))
        _ask_words(base, edited, words, third, recipe, report_file=report, as_json=json)
        return
    asked: dict[str, Any] = {} if words is None else {"words": load_words(words)}
    if third is not None:
        asked["third"] = fetch(open_model(third))
    shown = {"samples": samples, "show_replies": show_replies}
    _evaluate(base, [("edited", edited)], recipe, shown, asked, report_file=report, as_json=json)


@guarded
@takes("harmful", "harmless", "model", "evaluate", leaving_out=["controls"], file=True)
def compare(
    base: opt.Model,
    others: Annotated[list[str], typer.Argument(help="Checkpoints to hold against BASE: anyone's.")],
    *,
    recipe: Recipe,
    samples: Samples = SAMPLES,
    show_replies: opt.ShowReplies = False,
    report: opt.ReportFile = None,
    json: opt.Json = False,
) -> None:
    """Hold several checkpoints against one base, on the same prompts.

    Example: abliterate compare Qwen/Qwen2.5-7B-Instruct qwen-abl somebody/Qwen2.5-7B-abliterated
    """
    if len({"base", *others}) <= len(others):
        raise UsageError("two of the models have one name", "name each once, and none of them base")
    named = [(other, other) for other in others]
    shown = {"samples": samples, "show_replies": show_replies}
    _evaluate(base, named, recipe, shown, {}, report_file=report, as_json=json)


def _evaluate(
    base: str,
    others: list[tuple[str, str]],
    recipe: Recipe,
    shown: dict[str, Any],
    asked: dict[str, Any],
    *,
    report_file: Path | None,
    as_json: bool,
) -> None:
    from abliterate.checkpoint.hub import fetch
    from abliterate.cli.tables import show_evaluation
    from abliterate.data.bundled import open_model
    from abliterate.model.load import quiet_transformers
    from abliterate.publishing import manifest
    from abliterate.workflow import pipeline
    from abliterate.workflow.session import open_session

    check_report(report_file)
    pipeline.check_evaluation(recipe)
    opened = [(name, fetch(open_model(other))) for name, other in others]
    direction = _direction_of(opened[0][1].folder)
    if recipe.evaluate.controls and direction is None:
        raise UsageError(
            f"{others[0][1]}: --controls needs the direction that was removed, and none is with it",
            "give a folder that abliterate wrote, or leave out --controls",
        )
    quiet_transformers()
    with progress() as listen:
        session = open_session(base, recipe, on_event=listen)
        found = pipeline.evaluate(session, opened, directions=direction, **asked)
    if report_file is not None:
        from abliterate.evaluate.page import write_report

        document = manifest.read(opened[0][1].folder) if direction is not None else None
        title = " and ".join([session.checkpoint.name, *(name for _, name in others)])
        write_report(report_file, title, found, directions=direction, manifest=document)
    if as_json:
        show_json(manifest.evaluation_json(found))
    else:
        show_evaluation(found, **shown)
    if found.flinching is not None and not as_json:
        from abliterate.cli.words import show_words

        show_words(found.flinching)


def _check_words_alone(given: Given, flags: Sequence[str]) -> None:
    """Check that no option is for what is not done where words are asked for alone; ``flags`` are such options.

    Raises:
        UsageError: one is.
    """
    unused = {*SECTIONS["evaluate"].model_fields, "harmful", "harmless", "system"}
    flags = [*(flag_of(name).name for name in given if name in unused), *flags]
    if flags:
        raise UsageError(f"{flags[0]} is for replies, and --words-only asks for words alone", "give one of the two")


def _ask_words(
    base: str, edited: str, words: str, third: str | None, recipe: Recipe, *, report_file: Path | None, as_json: bool
) -> None:
    """The part of ``eval`` that is about words."""
    from abliterate.cli.words import show_words
    from abliterate.model.load import quiet_transformers
    from abliterate.workflow.words import ask_words

    check_report(report_file)
    quiet_transformers()
    with progress() as listen:
        found = ask_words(base, edited, words, recipe, third=third, on_event=listen)
    if report_file is not None:
        from abliterate.checkpoint.hub import fetch
        from abliterate.data.bundled import open_model
        from abliterate.evaluate.page import write_words
        from abliterate.publishing import manifest

        folder = fetch(open_model(edited)).folder
        direction = _direction_of(folder)
        document = manifest.read(folder) if direction is not None else None
        title = f"{open_model(base).name} and edited"
        write_words(report_file, title, found, directions=direction, manifest=document)
    if as_json:
        show_json({"words": found.to_json()})
    else:
        show_words(found)


def check_report(path: Path | None) -> None:
    """Check, before minutes of work, that a report can be written there.

    Raises:
        UsageError: it is no .html file, or its folder is missing.
    """
    if path is None:
        return
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError(f"--report {path}: not an .html file in a folder that exists", "name one, e.g. report.html")


def _direction_of(folder: Path) -> "DirectionSet | None":
    """The direction that lies in a folder that abliterate wrote."""
    from abliterate.checkpoint.direction_file import load
    from abliterate.checkpoint.output import PRIVATE_FOLDER
    from abliterate.workflow.pipeline import DIRECTION_FILE

    path = folder / PRIVATE_FOLDER / DIRECTION_FILE
    return load(path) if path.is_file() else None
