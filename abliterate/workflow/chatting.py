"""Talking with a model, with the edit of a direction made by hooks: what an edited checkpoint would say."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

from abliterate.editing.asked import stream_of_hooks
from abliterate.method.directions import DirectionSet
from abliterate.model.chat import left_padded
from abliterate.model.interventions import added, edited
from abliterate.model.replying import generate_ids
from abliterate.recipe import Recipe
from abliterate.workflow.session import Session, open_session

Mode = Literal["ablate", "add"]


def chat(
    model: str | Path | None,
    prompt: str,
    *,
    direction: DirectionSet | None = None,
    mode: Mode | None = None,
    scale: float = 1.0,
    recipe: Recipe | None = None,
) -> str:
    """One reply of ``model`` to ``prompt``, with the direction ablated or added if asked."""
    session = open_session(model, recipe or Recipe())
    return reply(session, [{"role": "user", "content": prompt}], direction=direction, mode=mode, scale=scale)


def reply(
    session: Session,
    messages: Sequence[Mapping[str, str]],
    *,
    direction: DirectionSet | None = None,
    mode: Mode | None = None,
    scale: float = 1.0,
) -> str:
    """The next assistant turn of a conversation, greedy."""
    chat_format, loaded = session.chat, session.loaded
    history = [dict(message) for message in messages]
    if session.recipe.model.system is not None and history[0]["role"] != "system":
        history.insert(0, {"role": "system", "content": session.recipe.model.system})
    ids = chat_format.encode_messages(history)
    batch = next(left_padded([ids], 1, chat_format.pad_id))
    context = nullcontext()
    if direction is not None and mode == "ablate":
        context = edited(loaded, stream_of_hooks(session.checkpoint, session.recipe, direction, loaded.n_layers))
    elif direction is not None and mode == "add" and direction.choice is not None:
        context = added(loaded, direction.chosen.everywhere.added, direction.choice.layer, scale=scale)
    with context:
        tokens = generate_ids(loaded, chat_format, batch, session.recipe.evaluate.max_new_tokens)[0]
    return chat_format.text(tokens)
