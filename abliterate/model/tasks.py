"""Work that can pause in the middle of a forward pass: a thunk in a greenlet, and how code finds out which one runs.

A task may have parts: tasks that it waits for, and that take turns with all others.
"""

from collections.abc import Callable, Sequence
from typing import Any

from greenlet import getcurrent, greenlet

ROOM = "room"
"""What a task waits for that has no memory for its batches."""
ELSEWHERE = "elsewhere"
"""What a task waits for that needs what another process makes."""


class Task(greenlet):
    """A thunk that may wait for a unit of ``weights``; what it waits for goes to the greenlet that resumed it.

    ``whole`` is the task that it is a part of.  A part keeps what it raises as ``raised``, for its whole to raise.
    ``path``: its number among the tasks beside it, behind the path of its whole.
    """

    def __init__(
        self, thunk: Callable[[], Any], weights: object, whole: "Task | None" = None, *, number: int = 0
    ) -> None:
        super().__init__(self._work, None if whole is None else whole.parent)
        self.weights = weights
        self.whole = whole
        self.path: tuple[int, ...] = (*(() if whole is None else whole.path), number)
        self.result: Any = None
        self.raised: Exception | None = None
        self._thunk = thunk

    def _work(self) -> None:
        try:
            self.result = self._thunk()
        except Exception as error:
            if self.whole is None:
                raise
            self.raised = error

    def wait_for(self, what: object) -> None:
        """Pause until a unit is loaded, parts of this task have ended, or what ``what`` says may be there."""
        if self.parent is None:
            raise AssertionError("a task runs in a greenlet of its own")
        self.parent.switch(what)

    def call(self, thunks: Sequence[Callable[[], Any]]) -> list[Any]:
        """Call ``thunks`` as parts of this task and give their results; if one raises, the others are stopped."""
        parts = [Task(thunk, self.weights, self, number=number) for number, thunk in enumerate(thunks)]
        if parts:
            self.wait_for(parts)
        for part in parts:
            if part.raised is not None:
                raise part.raised
        return [part.result for part in parts]


def current() -> Task | None:
    """The task whose code is running, or None outside of all tasks."""
    running = getcurrent()
    return running if isinstance(running, Task) else None


def lineage() -> list[Task]:
    """The task whose code is running and all that it is a part of, the outermost first."""
    found: list[Task] = []
    task = current()
    while task is not None:
        found.insert(0, task)
        task = task.whole
    return found
