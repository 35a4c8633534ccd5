"""Words alone: how likely models find them, where no replies are asked for."""

from dataclasses import replace
from pathlib import Path

from abliterate.checkpoint.hub import fetch
from abliterate.data.bundled import open_model
from abliterate.evaluate.flinching import Flinching
from abliterate.events import OnEvent, ignore
from abliterate.model.words import load_words, score_words
from abliterate.recipe import Recipe
from abliterate.workflow.session import open_session
from abliterate.workflow.trials import BASE, EDITED, THIRD


def ask_words(
    base: str | Path | None,
    edited: str | Path,
    words: str | Path,
    recipe: Recipe | None = None,
    *,
    third: str | Path | None = None,
    on_event: OnEvent = ignore,
) -> Flinching:
    """Ask ``base``, ``edited`` and a ``third`` model how likely they find the words of a file, and nothing else.

    One model after the other is in memory; out of core each takes one weight pass, where memory allows.  None of them
    needs a chat template, and no prompts are read.

    Raises:
        PromptError: the file is unusable, a tokenizer knows none of its words, or a sentence is too long for a model;
            before any is loaded.
        SourceError: one of the models cannot be loaded.
    """
    listed = load_words(str(words))
    session = open_session(base, recipe or Recipe(), on_event=on_event)
    given = {EDITED: edited, **({} if third is None else {THIRD: third})}
    opened = {name: fetch(open_model(its)) for name, its in given.items()}
    every = {BASE: session, **{name: replace(session, checkpoint=its) for name, its in opened.items()}}
    for its in every.values():
        its.check_words(listed)
    found = {}
    for name, its in every.items():
        batch_size = its.recipe.model.batch_size
        found[name] = score_words(its.loaded, listed, name=name, batch_size=batch_size, on_event=on_event)
        its.release()
    return Flinching(listed, found, opened[THIRD].name if THIRD in opened else "")
