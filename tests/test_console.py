"""What is drawn while work goes on: bars on a terminal, lines in a pipe."""

import io
import threading

import pytest
from rich.console import Console

from abliterate.cli import console
from abliterate.cli.lines import Lines, ticking
from abliterate.events import Advanced, Finished, Noted, Started, WeightsRead, duration, working

EVENTS = (
    Started(task="measure", total=4, unit="prompts"),
    WeightsRead(reading=1, part="model.layers.0", done=5 * 10**6, total=10**7),
    WeightsRead(reading=1, part="model.layers.1", done=10**7, total=10**7),
    Noted(text="something to know"),
    WeightsRead(reading=2, part="model.layers.0", done=5 * 10**6, total=10**7),
    Advanced(task="measure", amount=4),
    Finished(task="measure"),
)


@pytest.mark.parametrize("terminal", [True, False])
def test_weights_that_pass_are_drawn_on_a_terminal_only(terminal, monkeypatch):
    text = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=text, force_terminal=terminal, width=160))
    with console.progress() as listen:
        for event in EVENTS:
            listen(event)
    shown = text.getvalue()
    assert "something to know" in shown
    assert "measure" in shown
    assert ("weights, reading 2: model.layers.0" in shown) == terminal
    assert ("5.0/10.0 MB" in shown) == terminal
    assert ("4 prompts in" in shown) != terminal


class Clock:
    """A clock that is set."""

    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def said():
    return []


@pytest.fixture
def lines(said, clock):
    return Lines(said.append, clock=clock)


def pass_time(lines, clock, seconds):
    """As the thread does, which looks at the clock twice a second."""
    for _ in range(2 * seconds):
        clock.now += 0.5
        lines.tick()


def test_short_work_says_only_that_it_is_done(lines, clock, said):
    for _ in range(3):
        lines.listen(Started(task="filter", total=4, unit="prompts"))
        clock.now += 0.5
        lines.tick()
        lines.listen(Finished(task="filter"))
    assert said == ["filter: 4 prompts in 0.5 s"] * 3


def test_long_work_says_that_it_began_how_far_it_is_and_that_it_ended(lines, clock, said):
    lines.listen(Started(task="measure", total=1200, unit="prompts"))
    pass_time(lines, clock, 3)
    assert said == ["measure: begun, 1,200 prompts"]
    for _ in range(60):
        pass_time(lines, clock, 1)
        lines.listen(Advanced(task="measure", amount=10))
    assert said[1:] == [
        "measure: 260 of 1,200 prompts after 30 s, 8.7 prompts/s, about 108 s left",
        "measure: 560 of 1,200 prompts after 60 s, 9.3 prompts/s, about 69 s left",
    ]
    lines.listen(Finished(task="measure"))
    assert said[3:] == ["measure: 1,200 prompts in 63.0 s"]


def test_what_was_done_before_a_resumed_task_is_no_pace(lines, clock, said):
    lines.listen(Started(task="score", total=1000, unit="candidates"))
    lines.listen(Advanced(task="score", amount=700))
    pass_time(lines, clock, 29)
    lines.listen(Advanced(task="score", amount=30))
    pass_time(lines, clock, 1)
    assert said[-1] == "score: 730 of 1,000 candidates after 30 s, 1.0 candidates/s, about 4 min left"


def test_silent_work_says_that_it_runs_and_how_far_the_weights_have_passed(lines, clock, said):
    lines.listen(Started(task="load it", total=15 * 10**6, unit="bytes"))
    pass_time(lines, clock, 40)
    assert said == ["load it: begun, 15.0 MB", "load it: running for 30 s, 0.0 of 15.0 MB reported done"]
    lines.listen(WeightsRead(reading=2, part="model.layers.0", done=5 * 10**6, total=10**7))
    pass_time(lines, clock, 20)
    assert said[2:] == ["load it: running for 60 s, 0.0 of 15.0 MB reported done; weights, reading 2: 5.0 of 10.0 MB"]


def test_every_running_task_is_named(lines, clock, said):
    for task in ("one", "other"):
        lines.listen(Started(task=task, total=10**7, unit="bytes"))
        lines.listen(Advanced(task=task, amount=0))
    pass_time(lines, clock, 30)
    assert [line.split(":")[0] for line in said] == ["one", "other"] * 2


def test_silence_between_tasks_is_broken_as_well(lines, clock, said):
    pass_time(lines, clock, 30)
    assert said.pop() == "still at work; nothing was reported for 30 s, since the beginning"
    lines.listen(Started(task="filter", total=4, unit="prompts"))
    lines.listen(Finished(task="filter"))
    said.clear()
    pass_time(lines, clock, 61)
    assert said == ["still at work; nothing was reported for 30 s, since the end of 'filter'"] * 2


def test_the_clock_is_looked_at_though_no_event_comes():
    spoken, said = threading.Event(), []

    def say(text):
        said.append(text)
        spoken.set()

    lines = Lines(say, every_s=0.01)
    before = threading.active_count()
    with ticking(lines, looking_s=0.005):
        lines.listen(Started(task="long", total=3, unit="prompts"))
        assert spoken.wait(10)
    assert said[0].startswith("long: running for 0 s, 0 of 3 prompts")
    assert threading.active_count() == before


def test_work_is_reported_by_its_context():
    heard = []
    with working(heard.append, "read", 3, "files") as advance:
        advance(2)
        advance(1)
    assert heard == [
        Started(task="read", total=3, unit="files"),
        Advanced(task="read", amount=2),
        Advanced(task="read", amount=1),
        Finished(task="read"),
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (119.0, "119 s"), (150.0, "2 min"), (7199.0, "120 min"), (9000.0, "2.5 h"), (4e4, "11 h")],
)
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text
