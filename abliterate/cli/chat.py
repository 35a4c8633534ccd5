"""``abliterate chat``: talk to a model, or preview an edit by hooks before any byte is written."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from abliterate.cli import options as opt
from abliterate.cli.console import err, guarded, out, show_json, show_note
from abliterate.errors import UsageError


@guarded
def chat(
    model: opt.OptionalModel = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Ask this and stop; repeatable.")] = None,
    direction: Annotated[Path | None, typer.Option(help="A direction file, for --ablate or --add.")] = None,
    position: opt.Position = None,
    layer: opt.Layer = None,
    ablate: Annotated[bool, typer.Option("--ablate", help="Preview the edit: remove the direction by hooks.")] = False,
    add: Annotated[bool, typer.Option("--add", help="Add the direction at its layer: induces refusal.")] = False,
    scale: Annotated[float, typer.Option(help="Factor for --add; negative subtracts.")] = 1.0,
    system: opt.System = None,
    max_new_tokens: opt.MaxNewTokens = None,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    memory: opt.Memory = None,
    device_memory: opt.DeviceMemory = None,
    revision: opt.Revision = None,
    trust_remote_code: opt.TrustRemoteCode = None,
    json: opt.Json = False,
) -> None:
    """Talk to a model; with --ablate or --add, to the model as an intervention makes it.

    Example: abliterate chat tiny-chat --direction direction.safetensors --ablate -p "Who made the torrik?"
    """
    settings = opt.make_recipe(
        None,
        system=system,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
        memory=memory,
        device_memory=device_memory,
        trust_remote_code=trust_remote_code,
    )
    if ablate and add:
        raise UsageError("--ablate and --add exclude each other", "choose one")
    if (ablate or add) and direction is None:
        raise UsageError("--ablate and --add need a direction", "add --direction FILE")
    from abliterate import api
    from abliterate.cli.stages import read_direction
    from abliterate.model.load import quiet_transformers
    from abliterate.workflow.session import open_session

    quiet_transformers()
    chosen = read_direction(direction, position, layer)
    session = open_session(model, settings, revision=revision, on_event=show_note)
    mode = "ablate" if ablate else "add" if add else None
    replies = []
    messages: list[dict[str, str]] = []
    for question in prompt if prompt else _questions():
        turn = {"role": "user", "content": question}
        history = [turn] if prompt else [*messages, turn]
        answer = api.reply(session, history, direction=chosen, mode=mode, scale=scale)
        messages = [*history, {"role": "assistant", "content": answer}]
        replies.append({"prompt": question, "reply": answer})
        if not json:
            out.print(answer, markup=False)
    if json:
        show_json(replies)


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
