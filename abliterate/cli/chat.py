"""``abliterate chat``: talk to a model, or preview an edit by hooks before any byte is written."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abliterate.cli import options as opt
from abliterate.cli.console import err, guarded, out, show_json, show_note
from abliterate.cli.recipe_options import takes
from abliterate.cli.stages import read_direction
from abliterate.errors import UsageError
from abliterate.recipe import Recipe

if TYPE_CHECKING:
    from abliterate.workflow.session import Session


@guarded
@takes("model", "max_new_tokens", "change", leaving_out=["batch_size"])
def chat(
    model: opt.OptionalModel = None,
    *,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Ask this and stop; repeatable.")] = None,
    direction: Annotated[Path | None, typer.Option(help="A direction file, for --ablate or --add.")] = None,
    position: opt.Position = None,
    layer: opt.Layer = None,
    candidate: opt.CandidateId = None,
    trial: opt.Trial = None,
    category: opt.Category = None,
    ablate: Annotated[bool, typer.Option("--ablate", help="Preview the edit: remove the direction by hooks.")] = False,
    add: Annotated[bool, typer.Option("--add", help="Add the direction at its layer: induces refusal.")] = False,
    scale: Annotated[float, typer.Option(help="Factor for --add; negative subtracts.")] = 1.0,
    recipe: Recipe,
    revision: opt.Revision = None,
    json: opt.Json = False,
) -> None:
    """Talk to a model; with --ablate or --add, to the model as an intervention makes it.

    Example: abliterate chat tiny-chat --direction direction.safetensors --ablate -p "Who made the torrik?"
    """
    if ablate and add:
        raise UsageError("--ablate and --add exclude each other", "choose one")
    if (ablate or add) and direction is None:
        raise UsageError("--ablate and --add need a direction", "add --direction FILE")
    from abliterate.model.load import quiet_transformers
    from abliterate.workflow.session import open_session

    quiet_transformers()
    chosen = read_direction(direction, position, layer, trial, category, candidate)
    session = open_session(model, recipe, revision=revision, on_event=show_note)
    how = {"direction": chosen, "mode": "ablate" if ablate else "add" if add else None, "scale": scale}
    replies = []
    for question, answer in _answers(session, prompt, how):
        replies.append({"prompt": question, "reply": answer})
        if not json:
            out.print(answer, markup=False)
    if json:
        show_json(replies)


def _answers(session: "Session", prompts: list[str] | None, how: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Question and answer: each of ``prompts`` alone, or the turns of one conversation."""
    from abliterate import api

    messages: list[dict[str, str]] = []
    for question in prompts if prompts else _questions():
        turn = {"role": "user", "content": question}
        history = [turn] if prompts else [*messages, turn]
        answer = api.reply(session, history, **how)
        messages = [*history, {"role": "assistant", "content": answer}]
        yield question, answer


def _questions() -> Iterator[str]:
    """Lines of stdin: prompted for on a terminal, read to the end from a pipe."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    err.print("[dim]an empty line or Ctrl-D ends the conversation[/dim]")
    while True:
        try:
            line = err.input("[bold]> [/bold]").strip()
        except EOFError:
            return
        if not line:
            return
        yield line
