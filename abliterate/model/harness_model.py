"""A loaded model as lm-eval sees it.

This module imports lm-eval; ``harness`` imports it once lm-eval is known to be there.

Prompts and generation are those of ``HFLM``.  Likelihoods are computed here.  They are the same sums, but only the
logits of the answers are made, so that a large vocabulary and a long prompt do not take tens of gigabytes; and out of
core they are computed in lockstep.
"""

# The decorator on HFLM hides its type.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false
import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from lm_eval.models.huggingface import HFLM
from torch import Tensor

from abliterate.events import Advanced, Finished, Noted, OnEvent, Started, ignore
from abliterate.model.chat import ChatFormat
from abliterate.model.forward import fitting
from abliterate.model.likelihood import on_continuations
from abliterate.model.load import LoadedModel
from abliterate.model.lockstep import run_together
from abliterate.model.rendering import render

ENDS_THINKING = "</think>"
KINDS = {"loglikelihood": "answers", "loglikelihood_rolling": "texts", "generate_until": "replies"}


class HarnessModel(HFLM):
    """``HFLM`` around a model and a tokenizer that are loaded: the weights are there once."""

    def __init__(
        self, loaded: LoadedModel, chat: ChatFormat, *, name: str, batch_size: int, on_event: OnEvent = ignore
    ) -> None:
        super().__init__(
            pretrained=loaded.model,
            tokenizer=copy.deepcopy(loaded.tokenizer),  # HFLM gives it a padding token
            backend="causal",
            batch_size=batch_size if chat.pads else 1,
            think_end_token=ENDS_THINKING,
            chat_template_args=chat.options,
        )
        self._device = loaded.device  # the parameters of a model on disk say "meta"
        self.loaded, self.chat, self.name, self.rows, self.on_event = loaded, chat, name, batch_size, on_event

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:  # noqa: FBT001, FBT002
        """A conversation as text; where the template fails, ``HFLM`` would drop the system turn."""
        if not add_generation_prompt:
            return super().apply_chat_template(chat_history, add_generation_prompt=False)
        return render(self.chat.tokenizer, chat_history, self.chat.options, name=self.name)[1]

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list:  # noqa: FBT001, FBT002 - as lm-eval calls it
        """Likelihoods of answers."""
        with self._told("loglikelihood", requests):
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = True) -> list:  # noqa: FBT001, FBT002
        """Likelihoods of texts."""
        with self._told("loglikelihood_rolling", requests):
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: list, disable_tqdm: bool = True) -> list:  # noqa: ARG002, FBT001, FBT002
        """Replies; out of core, all that fit in lockstep."""
        reply = partial(super().generate_until, disable_tqdm=True)
        with self._told("generate_until", requests):
            if self.loaded.offload is None:
                return reply(requests)
            found: dict[int, str] = {}
            for parts in self._lockstep_parts(requests):
                thunks = [partial(reply, [requests[row] for row in rows]) for rows in parts]
                for rows, replies in zip(parts, run_together(self.loaded, thunks), strict=True):
                    found.update(zip(rows, replies, strict=True))
            return [found[row] for row in range(len(requests))]

    def _loglikelihood_tokens(
        self,
        requests: list,
        disable_tqdm: bool = False,  # noqa: ARG002, FBT001, FBT002
        override_bs: Any = None,  # noqa: ANN401, ARG002
    ) -> list:
        asked = [(context, continuation) for _, context, continuation in requests]
        found = on_continuations(
            self.loaded, self.chat.pack, asked, longest=self.max_length, batch_size=self.rows
        )  # fmt: skip
        cut = sum(len(context) + len(continuation) > self.max_length for context, continuation in asked)
        for (request, _, _), answer in zip(requests, found, strict=True):
            if request is not None:  # rolling windows come without a request
                self.cache_hook.add_partial("loglikelihood", request, answer)
        if cut:
            text = f"{self.name}: {cut} questions are longer than {self.max_length} tokens and lost their beginning"
            self.on_event(Noted(text=text))
        return found

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:  # noqa: ANN401
        # a model whose generation_config.json has max_new_tokens would take that for the task's limit
        options["max_new_tokens"] = max_length - context.shape[1]
        return super()._model_generate(context, None, stop, **options)  # type: ignore[arg-type]

    @contextmanager
    def _told(self, kind: str, requests: Sequence[Any]) -> Iterator[None]:
        task = f"{self.name}: {KINDS[kind]} to tasks"
        self.on_event(Started(task=task, total=len(requests), unit="requests"))
        self.cache_hook = _Hook(task, self.on_event)
        yield
        self.on_event(Finished(task=task))

    def _lockstep_parts(self, requests: Sequence[Any]) -> Iterator[list[list[int]]]:
        """Batches of requests (by place, of similar length), as many at a time as fit beside the weights."""
        widths = [len(self.tok_encode(request.args[0])) for request in requests]
        order = sorted(range(len(requests)), key=widths.__getitem__)
        batches = [order[first : first + self.rows] for first in range(0, len(order), self.rows)]
        shapes = []
        for rows in batches:
            new = max(int(requests[row].args[1].get("max_gen_toks", self.max_gen_toks)) for row in rows)
            shapes.append((len(rows), max(widths[row] for row in rows), new))
        for group in fitting(self.loaded, shapes):
            yield batches[group.start : group.stop]


class _Hook:
    """lm-eval tells its cache of every finished request; this one counts them."""

    def __init__(self, task: str, on_event: OnEvent) -> None:
        self.task, self.on_event = task, on_event

    def add_partial(self, *_: object) -> None:
        self.on_event(Advanced(task=self.task, amount=1))
