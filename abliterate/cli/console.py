"""Where things are shown: results on stdout, progress and failures on stderr.

On a terminal, long work draws bars with rate and time left; in a pipe or a log it leaves lines (see ``lines``).
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TextIO, TypeVar

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.text import Text

from abliterate.cli.lines import Lines, ticking
from abliterate.cli.process import HUNG_UP, drop_output
from abliterate.errors import AbliterateError
from abliterate.events import Advanced, Event, Finished, Noted, OnEvent, Started, WeightsRead, ignore

P = ParamSpec("P")
R = TypeVar("R")

PIPE_WIDTH = 160


CONTROLS = {n: f"\\x{n:02x}" for n in (*range(32), *range(127, 160)) if chr(n) not in "\n\t"}
"""Characters that a terminal obeys, as they are shown: prompts, replies and names come from others."""
CONTROLS |= dict.fromkeys(range(0xD800, 0xE000), "\ufffd")  # bytes of a file name that are no text


class Plain(Console):
    """A console that shows control characters, and leaves it to ``guarded`` what happens when its reader is gone."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """What is to be written; our own control codes come as such."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=segment.text.translate(CONTROLS))

    def on_broken_pipe(self) -> None:
        """Let it be known."""
        raise BrokenPipeError


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()  # None where it was closed


out = Plain(highlight=False, emoji=False, width=None if _is_terminal(sys.stdout) else PIPE_WIDTH)
err = Plain(stderr=True, highlight=False, emoji=False, soft_wrap=not _is_terminal(sys.stderr))


class RateColumn(ProgressColumn):
    """Units per second; bytes as MB."""

    def render(self, task: Task) -> Text:
        """The rate of one task."""
        speed = task.finished_speed or task.speed
        if speed is None:
            return Text("")
        if task.fields["unit"] == "bytes":
            return Text(f"{speed / 1e6:,.0f} MB/s", style="progress.data.speed")
        return Text(f"{speed:,.1f} {task.fields['unit']}/s", style="progress.data.speed")


class AmountColumn(ProgressColumn):
    """Bytes with their unit, anything else as a count."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes, self._count = DownloadColumn(), MofNCompleteColumn()

    def render(self, task: Task) -> Text:
        """How much of one task is done."""
        return (self._bytes if task.fields["unit"] == "bytes" else self._count).render(task)


@contextmanager
def progress(*, quiet: bool = False) -> Iterator[OnEvent]:
    """A listener for the events of a stage; silent when ``quiet``."""
    if quiet:
        yield ignore
    elif err.is_terminal:
        with _bars() as listener:
            yield listener
    else:
        with _lines() as listener:
            yield listener


@contextmanager
def _bars() -> Iterator[OnEvent]:
    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        AmountColumn(),
        RateColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=err) as bars:
        yield _Drawing(bars).listen


class _Drawing:
    """A bar for each task, and one for the weights that pass while tasks go on."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.tasks: dict[str, TaskID] = {}
        self.weights: TaskID | None = None
        self.reading = 0

    def listen(self, event: Event) -> None:
        """Draw what ``event`` says."""
        if isinstance(event, Started):
            self.tasks[event.task] = self.bars.add_task(event.task, total=event.total, unit=event.unit)
        elif isinstance(event, Advanced):
            self.bars.advance(self.tasks[event.task], event.amount)
        elif isinstance(event, Finished):
            task = self.tasks.pop(event.task)
            self.bars.update(task, completed=self.bars.tasks[self.bars.task_ids.index(task)].total)
        elif isinstance(event, WeightsRead):
            self._weights(event)
        else:
            self.bars.console.print(f"[yellow]note:[/yellow] {escape(event.text)}")

    def _weights(self, event: WeightsRead) -> None:
        if self.weights is None:
            self.weights = self.bars.add_task("", total=event.total, unit="bytes")
        if event.reading != self.reading:
            self.bars.reset(self.weights)
            self.reading = event.reading
        said = f"weights, reading {event.reading}: {event.part}"
        self.bars.update(self.weights, description=said, total=event.total, completed=event.done)


@contextmanager
def _lines() -> Iterator[OnEvent]:
    lines = Lines(lambda text: err.print(text, markup=False))
    with ticking(lines):
        yield lines.listen


def silence() -> None:
    """Show nothing: another process of the same work does."""
    out.quiet = err.quiet = True


def show_note(event: Event) -> None:
    """Of all events, only what the user should know."""
    if isinstance(event, Noted):
        err.print(f"note: {event.text}", markup=False)


def show_json(document: Any) -> None:  # noqa: ANN401 - anything JSON can hold
    """One JSON document on stdout, and nothing else.  NaN and infinity become null."""
    ascii_only = not (sys.stdout.encoding or "").lower().startswith("utf")
    text = json.dumps(_plain(document), indent=2, ensure_ascii=ascii_only)
    print(text, flush=True)  # noqa: T201 - the one place for it


def _plain(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def fail(error: AbliterateError) -> None:
    """One red line that says what is wrong, one that says what to do."""
    err.print(f"[bold red]error:[/bold red] {escape(_one_line(error.message))}")
    if error.hint:
        err.print(f"       {escape(_one_line(error.hint))}")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Turn every failure of ``command`` into two lines and its exit code."""

    @wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        from abliterate.cli.failures import explain

        try:
            try:
                return command(*args, **kwargs)
            except (typer.Exit, BrokenPipeError):
                raise
            except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the last line of defence: no traceback
                failure = explain(error)
                fail(failure)
                raise typer.Exit(failure.exit_code) from None
        except BrokenPipeError:
            drop_output()
            raise typer.Exit(HUNG_UP) from None

    return wrapper
