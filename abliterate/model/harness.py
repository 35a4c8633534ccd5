"""Tasks of lm-evaluation-harness, put to a model that is loaded already.

Tasks, prompts, filters and metrics are lm-eval's.  It is an extra, imported when a task is asked for and nowhere else.
"""

import difflib
import io
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from abliterate.errors import UsageError
from abliterate.events import OnEvent, ignore
from abliterate.model.chat import ChatFormat
from abliterate.model.load import LoadedModel, first_line

SEED, FEWSHOT_SEED = 0, 1234
"""lm-eval's own defaults: which documents a task draws, and which examples it shows."""
BOOTSTRAP = 1000
"""Resamples for the standard error of a metric that is no mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRequest:
    """Which tasks of lm-eval, and how they are put.

    ``limit``: so many documents of each, None all.  ``path``: a folder with tasks of your own, or "".  ``shots``:
    examples before each question, None as the task says.  ``chat``: questions go through the chat template, examples
    as turns, which is what lm-eval recommends for chat models.
    """

    names: tuple[str, ...]
    limit: int | None = None
    path: str = ""
    shots: int | None = None
    chat: bool = True


def check_tasks(request: TaskRequest) -> None:
    """Load every task with its data, before long work begins; nothing happens where none is asked for.

    Raises:
        UsageError: lm-eval is not installed, there is no such task, its data cannot be had, or it is one that runs
            code a model wrote or needs pictures.
    """
    if not request.names:
        return
    if find_spec("lm_eval") is None:
        raise UsageError("--tasks needs lm-eval, which is not installed", "pip install 'abliterate[eval]'")
    if request.path and not Path(request.path).is_dir():
        raise UsageError(
            f"--task-path {request.path}: no such folder", "name a folder with YAML files of lm-eval tasks"
        )
    known = _manager(request.path).all_tasks
    for name in request.names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=4)
            hint = f"near it: {', '.join(near)}" if near else "`lm-eval ls tasks` lists them"
            raise UsageError(f"{name}: lm-eval has no such task", f"{hint}; --task-path adds a folder of your own")
        _load(request, [name])


def version() -> str:
    """Version of the installed lm-eval."""
    return metadata.version("lm_eval")


def run_tasks(
    loaded: LoadedModel,
    chat: ChatFormat,
    request: TaskRequest,
    *,
    name: str,
    batch_size: int,
    on_event: OnEvent = ignore,
) -> Mapping[str, Any]:
    """What ``lm_eval.evaluate`` gives back for one model, of each sample its metrics only; ``name`` is for progress.

    Not ``simple_evaluate``, which asks git and the system about the machine and loads the tasks anew; its seeds and
    its few-shot defaults are kept.

    Raises:
        UsageError: a task cannot be put to this model.
    """
    import lm_eval

    from abliterate.model.harness_model import HarnessModel

    tasks = _load(request, request.names)
    with _quiet():
        wrapped = HarnessModel(loaded, chat, name=name, batch_size=batch_size, on_event=on_event)
        try:
            found = lm_eval.evaluate(
                wrapped, tasks, limit=request.limit, bootstrap_iters=BOOTSTRAP, log_samples=True,
                system_instruction=chat.system, apply_chat_template=request.chat, fewshot_as_multiturn=request.chat,
            )  # fmt: skip
        except (AssertionError, ValueError) as error:
            raise UsageError(
                f"{name}: lm-eval cannot put these tasks to it ({first_line(error)})",
                "often the model's context is too short for them: leave that task out, or give fewer --task-shots",
            ) from error
    if found is None:
        raise AssertionError("only other processes of a group get nothing back")
    kept = {key: found.get(key, {}) for key in ("results", "group_subtasks", "n-shot", "higher_is_better")}
    return {**kept, "samples": {task: [_figures(one) for one in its] for task, its in found.get("samples", {}).items()}}


def _figures(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample without its texts, which take up gigabytes."""
    return {key: sample[key] for key in ("doc_id", "doc_hash", "filter", *sample["metrics"])}


@cache
def _manager(path: str) -> Any:  # noqa: ANN401 - a TaskManager
    from lm_eval.tasks import TaskManager

    with _quiet():
        return TaskManager(include_path=path or None)


def _load(request: TaskRequest, names: Sequence[str]) -> Any:  # noqa: ANN401 - lm-eval's dictionary of tasks
    import numpy as np

    random.seed(SEED)
    np.random.seed(FEWSHOT_SEED)  # what tasks draw from
    torch.manual_seed(FEWSHOT_SEED)
    try:
        with _quiet():
            found = _manager(request.path).load(list(names))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, AttributeError) as error:
        raise UsageError(
            f"{', '.join(names)}: lm-eval cannot load it ({first_line(error)})",
            "its data comes from the Hub: check the network, your rights, and what the task needs installed",
        ) from error
    for name, task in found["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise UsageError(
                f"{name}: runs code that the model wrote, or shows it pictures: not done here", "leave that task out"
            )
        if request.shots is not None and task.get_config("num_fewshot") != 0:  # 0 in a task is meant
            task.set_config(key="num_fewshot", value=request.shots)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what lm-eval and datasets say and draw: progress is drawn elsewhere, and stdout may be for JSON."""
    from datasets import utils as bars
    from lm_eval.api import task as tasks

    logger, drawn, its = logging.getLogger("lm_eval"), not bars.are_progress_bars_disabled(), tasks.tqdm
    before = logger.level
    logger.setLevel(logging.ERROR)
    bars.disable_progress_bars()
    tasks.tqdm = partial(its, disable=True)  # it has no switch
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)
        tasks.tqdm = its
        if drawn:
            bars.enable_progress_bars()
