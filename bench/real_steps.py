"""Steps of long work: commands of abliterate with what they cost, each kept so that a stopped run goes on."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from abliterate.checkpoint.output import fingerprint
from abliterate.workflow.steps import Steps
from bench.quarter import WRAPPER

ROOT = Path(__file__).parent.parent
TASK = re.compile(r"^(?P<task>.+): .+ in (?P<seconds>[\d.]+) s$")
"""What a command says of a task that is done, where it does not write to a terminal."""
SAID = ("note:", "error:", "       ")
"""How lines begin that say something to people: notes, errors, and what to do about them."""
BUG, INTERRUPTED = 1, 6
"""Exit codes after which a step is not done."""


def kept(work: Path, name: str, key: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """The result of the step ``name`` of the work that ``key`` stands for, made where it is not there."""
    steps = Steps(work / "steps" / name, fingerprint(key))
    return steps.document("result", make)


def result_of(work: Path, name: str) -> dict[str, Any] | None:
    """The kept result of the step ``name``, whatever work it belongs to; None where there is none."""
    path = work / "steps" / name / "result.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def command(
    work: Path, name: str, arguments: Sequence[str | Path], *, key: Mapping[str, Any], out: Path | None = None
) -> dict[str, Any]:
    """The step ``name``: ``abliterate ARGUMENTS --json`` with its exit code, document, costs and what it said.

    A folder ``out`` that it finished earlier, for other work or just before it was stopped, is deleted.

    Raises:
        SystemExit: the command crashed or was interrupted; nothing is kept then.
    """
    words = [str(argument) for argument in arguments]

    def make() -> dict[str, Any]:
        print(f"{name}: abliterate {' '.join(words)}", flush=True)
        if out is not None and out.exists():
            shutil.rmtree(out)
        found = _run(work, name, words)
        if found["exit"] in (BUG, INTERRUPTED) or found["exit"] < 0:
            raise SystemExit(f"{name}: exit code {found['exit']}\n" + "\n".join(found["said"]))
        print(f"{name}: exit code {found['exit']} after {found['wall_seconds']:.0f} s", flush=True)
        return found

    return kept(work, name, {"command": words, **key}, make)


def _run(work: Path, name: str, words: Sequence[str]) -> dict[str, Any]:
    """One run in a process of its own; ``attempts`` counts those that were stopped before."""
    tries = work / f"{name}.attempts"
    attempts = 1 + (int(tries.read_text("utf-8")) if tries.is_file() else 0)
    tries.write_text(str(attempts), "utf-8")
    output = work / f"{name}.stdout"
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    }  # fmt: skip
    started = time.perf_counter()
    with output.open("w", encoding="utf-8") as stdout:
        child = subprocess.Popen(
            [sys.executable, "-c", WRAPPER, *words, "--json"],
            stdout=stdout, stderr=subprocess.PIPE, encoding="utf-8", env=environment,
        )  # fmt: skip
    try:
        tasks, lines = _listened(child, started)
    except BaseException:
        child.terminate()
        child.wait()
        raise
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    peak = int(lines.pop()) * 1024 if lines and lines[-1].isdigit() else None
    tries.unlink()
    text = output.read_text("utf-8")
    output.unlink()
    return {
        "exit": child.returncode,
        "wall_seconds": time.perf_counter() - started,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_bytes": peak,
        "attempts": attempts,
        "tasks": tasks,
        "said": [line for line in lines if line.startswith(SAID)],
        "document": json.loads(text) if text.strip() and not child.returncode else None,
    }


def _listened(child: subprocess.Popen[str], started: float) -> tuple[list[dict[str, Any]], list[str]]:
    """The tasks of a running command as it says that they are done, and all its lines."""
    if child.stderr is None:
        raise AssertionError("its stderr is a pipe")
    process = psutil.Process(child.pid)
    tasks, lines = [], []
    with child.stderr:
        for line in map(str.rstrip, child.stderr):
            lines.append(line)
            found = TASK.match(line)
            if found is not None:
                tasks.append(
                    {
                        "task": found["task"],
                        "seconds": float(found["seconds"]),
                        "wall_seconds": time.perf_counter() - started,
                        "cpu_seconds": _cpu_seconds(process),
                    }
                )
                print(f"  {line}", flush=True)
    return tasks, lines


def _cpu_seconds(process: psutil.Process) -> float | None:
    """What a process has used so far; None where it has just ended."""
    try:
        times = process.cpu_times()
    except psutil.Error:
        return None
    return times.user + times.system


def stages(step: Mapping[str, Any]) -> list[tuple[str, float, float | None]]:
    """Wall and CPU seconds of the stages of a run, from its tasks; what lies between two belongs to the later.

    Everything before the edit is finding the direction, and everything after the proof on bytes is the evaluation.
    """
    bounds = [("find the direction", _start_of(step, "edit")), ("edit", _end_of(step, "edit"))]
    bounds += [("proof on the bytes", _end_of(step, "verify")), ("replies and proof against hooks", _whole(step))]
    found, before = [], (0.0, 0.0)
    for name, end in bounds:
        if end is None:
            continue
        cpu = None if end[1] is None or before[1] is None else end[1] - before[1]
        found.append((name, end[0] - before[0], cpu))
        before = end
    return found


def _whole(step: Mapping[str, Any]) -> tuple[float, float | None]:
    return step["wall_seconds"], step["cpu_seconds"]


def _end_of(step: Mapping[str, Any], task: str) -> tuple[float, float | None] | None:
    return next((_whole(its) for its in step["tasks"] if its["task"] == task), None)


def _start_of(step: Mapping[str, Any], task: str) -> tuple[float, float | None] | None:
    """When a task began; of its CPU seconds only the end of the task before it is known, which is as good."""
    for before, its in zip([None, *step["tasks"]], step["tasks"], strict=False):
        if its["task"] == task:
            return its["wall_seconds"] - its["seconds"], 0.0 if before is None else before["cpu_seconds"]
    return None
