"""What is drawn while work goes on: bars on a terminal, lines in a pipe."""

import io

import pytest
from rich.console import Console

from abliterate.cli import console
from abliterate.events import Advanced, Finished, Noted, Started, WeightsRead

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
