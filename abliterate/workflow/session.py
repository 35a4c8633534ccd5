"""A checkpoint opened for work: its model, its chat format and its prompts, each made once, when first asked for."""

import gc
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch

from abliterate.arch.packed import text_config
from abliterate.checkpoint.hub import fetch
from abliterate.checkpoint.source import Checkpoint
from abliterate.data.bundled import BUNDLED_NAME, is_bundled, open_model
from abliterate.errors import PromptError, UsageError
from abliterate.events import Noted, OnEvent, ignore
from abliterate.method.estimators import needs_of
from abliterate.model.chat import ChatFormat, context_of
from abliterate.model.forward import padding_is_harmless
from abliterate.model.load import LoadedModel, explained, load_model, load_tokenizer
from abliterate.model.memory import available_bytes
from abliterate.model.prompts import CONTRAST, LOOK_ALIKE, ContrastSet, PromptSet, SplitSizes, contrast_set
from abliterate.model.ranks import everyone
from abliterate.model.rendering import SHOWN
from abliterate.model.thinking import DEFAULT, Mode, modes_of
from abliterate.model.words import WordList, spelled
from abliterate.recipe import Recipe

PROBE = "What is the capital of France?"
"""Any prompt: run alone and beside a longer one."""

FAR_LONGER, LONG = 8, 512
"""A prompt of more than so many times the median length, and of more tokens than this, is pointed out."""


@dataclass(frozen=True)
class Session:
    """``checkpoint`` under ``recipe``; ``on_event`` hears what functions do that take the session.

    The model is loaded when first asked for, and dropped with the session.  ``pads``: what is known of padding (see
    ``ChatFormat``); None: it is tried.  ``scratch`` is a folder for what may wait on disk.  ``most_prompts``: of every
    part of the prompts the first so many; None: all.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    on_event: OnEvent = ignore
    pads: bool | None = None
    scratch: Path | None = None
    most_prompts: int | None = None

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model, held or out of core."""
        loaded = load_model(
            fetch(self.checkpoint),
            device=self.recipe.model.device,
            dtype=self.recipe.model.dtype,
            trust_remote_code=self.recipe.model.trust_remote_code,
            memory_bytes=self.recipe.model.memory_bytes or available_bytes(),
            device_bytes=self.recipe.model.device_memory_bytes,
            tensor_parallel=self.recipe.model.tensor_parallel,
            on_event=self.on_event,
        )
        if loaded.offload is not None:
            loaded.offload.scratch = self.scratch
        if len(set(everyone(loaded.offload is None))) > 1:
            raise UsageError(
                f"{self.checkpoint.name}: fits into the memory of some processes, and not of others",
                "give all of them the same --memory or --device-memory",
            )
        return loaded

    @cached_property
    def chat(self) -> ChatFormat:
        """The model's chat format, which knows whether the model may be given padding."""
        rows = int(self.loaded.embedding.weight.shape[0])  # type: ignore[union-attr]
        chat = self._format(self.loaded.tokenizer, rows=rows)
        known = self.pads
        if known is None:
            known = all(everyone(padding_is_harmless(self.loaded, chat.encode(PROBE), chat.pad_id)))
        chat.pads = known
        return chat

    @cached_property
    def modes(self) -> tuple[Mode, ...]:
        """The modes in which an evaluation asks the model, by the recipe; only the tokenizer is loaded for it.

        Raises:
            UsageError: thinking cannot be switched.
        """
        if not self.recipe.evaluate.thinking:
            return (DEFAULT,)
        return modes_of(self.tokenizer, self.recipe.evaluate.thinking, name=self.checkpoint.name)

    def check_modes(self) -> None:
        """Check, before hours of work, that the template can switch thinking as the recipe wants; no model is loaded.

        Raises:
            UsageError: it cannot.
        """
        _ = self.modes

    def check_words(self, words: WordList) -> None:
        """Check, before hours of work, that the tokenizer knows some of ``words`` and their carriers are short enough.

        Raises:
            PromptError: it is not so.
        """
        context = context_of(text_config(self.checkpoint.config), self.tokenizer)
        spelled(self.tokenizer, words, name=self.checkpoint.name, context=context)

    @cached_property
    def tokenizer(self) -> Any:  # noqa: ANN401 - a tokenizer of transformers
        """The tokenizer; no model is loaded."""
        options = {"trust_remote_code": self.recipe.model.trust_remote_code, "local_files_only": True}
        with explained(self.checkpoint):
            return load_tokenizer(fetch(self.checkpoint).folder, **options)

    def chat_in(self, mode: Mode) -> ChatFormat:
        """The chat format in one of the modes."""
        if not mode.options:
            return self.chat
        chat = self.encoder_in(mode)
        chat.pads = self.chat.pads
        return chat

    def encoder_in(self, mode: Mode) -> ChatFormat:
        """The chat format in one of the modes, for token ids only; no model is loaded."""
        return self._format(self.tokenizer, options=mode.options)

    def _format(self, tokenizer: Any, **more: Any) -> ChatFormat:  # noqa: ANN401 - a tokenizer of transformers
        context = context_of(text_config(self.checkpoint.config), tokenizer)
        return ChatFormat(
            tokenizer, system=self.recipe.model.system, name=self.checkpoint.name, context=context, **more
        )

    def release(self) -> None:
        """Free the memory of the model; it is loaded again when next asked for."""
        self.__dict__.pop("loaded", None)
        gc.collect()  # modules that know who loads them are cycles
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    @cached_property
    def contrast(self) -> ContrastSet:
        """The prompts of the recipe that the model has room for.

        Raises:
            PromptError: a source is missing or unusable, or none of its prompts is short enough.
        """
        parts = prompts_of(self.recipe)
        return replace(parts, **{its.name: self.fitting(getattr(parts, its.name)) for its in fields(parts)})

    def fitting(self, prompts: PromptSet) -> PromptSet:
        """``prompts`` without those longer than the context; says which, and where one is far longer than the rest.

        Raises:
            PromptError: none is left.
        """
        chat = self.encoder_in(DEFAULT)
        lengths = {prompt: chat.length(prompt.text) for prompt in prompts.prompts}
        kept = {prompt: n for prompt, n in lengths.items() if chat.context is None or n <= chat.context}
        left_out = len(lengths) - len(kept)
        if left_out:
            longest = max(lengths, key=lengths.__getitem__)
            said = (
                f"{prompts.source}: {left_out} of {len(lengths)} prompts exceed the context of {chat.context:,} "
                f"tokens, the longest with {lengths[longest]:,}: {longest.text[:SHOWN]!r}…"
            )
            if not kept:
                raise PromptError(said, "give shorter prompts")
            self.on_event(Noted(text=f"left out: {said}"))
        most, typical = max(kept.values()), median(kept.values())
        if most > max(FAR_LONGER * typical, LONG):
            said = f"{prompts.source}: the longest prompt has {most:,} tokens, half of them at most {typical:,.0f}: "
            self.on_event(Noted(text=f"{said}its batch takes as much longer"))
        return replace(prompts, prompts=tuple(kept)[: self.most_prompts], too_long=left_out)


def open_session(
    model: str | Path | None,
    recipe: Recipe,
    *,
    revision: str | None = None,
    scratch: Path | None = None,
    on_event: OnEvent = ignore,
) -> Session:
    """Open ``model`` with all its files on this disk; None is the bundled tiny chat model with its own prompts.

    ``scratch`` is a folder, there when the model is loaded, for what may wait on disk.

    Raises:
        SourceError: it cannot be opened or fetched.
    """
    checkpoint = fetch(open_model(model, revision=revision))
    recipe = with_default_prompts(model, recipe)
    return Session(checkpoint=checkpoint, recipe=recipe, on_event=on_event, scratch=scratch)


def with_default_prompts(model: str | Path | None, recipe: Recipe) -> Recipe:
    """``recipe`` with prompts where it names none.

    The bundled model gets its own; every other model gets ``CONTRAST``, and ``LOOK_ALIKE`` beside it.
    """
    if recipe.find.harmful or recipe.find.harmless:
        return recipe
    if is_bundled(model):
        source = f"bundled:{BUNDLED_NAME}"
        return recipe.with_changes({"harmful": source, "harmless": source})
    changes = {"harmful": CONTRAST, "harmless": CONTRAST, "look_alike": recipe.evaluate.look_alike or LOOK_ALIKE}
    return recipe.with_changes(changes)


def prompts_of(recipe: Recipe) -> ContrastSet:
    """The contrast set a recipe names.

    Raises:
        PromptError: a source is missing or unusable.
    """
    if not recipe.find.harmful or not recipe.find.harmless:
        raise PromptError(
            "two prompt sources are needed: prompts the model declines, and prompts it answers",
            "give both --harmful and --harmless, or neither for the bundled ones",
        )
    sizes = SplitSizes(train=recipe.find.n_train, val=recipe.find.n_val, test=recipe.find.n_test)
    by_category = "categories" in needs_of(recipe.find.estimators)
    return contrast_set(
        recipe.find.harmful, recipe.find.harmless, sizes=sizes, seed=recipe.find.seed, by_category=by_category
    )
