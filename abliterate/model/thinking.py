"""Thinking switched on and off: the variable by which a chat template does that, and the modes a user asks for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from abliterate.errors import PromptError, UsageError
from abliterate.model.rendering import render

SWITCHES: tuple[tuple[str, Any, Any], ...] = (
    ("enable_thinking", True, False),  # Qwen 3, GLM 4.5, SmolLM 3, Hunyuan
    ("thinking", True, False),  # DeepSeek V3.1, Granite 3.2
    ("reasoning_effort", "high", "low"),  # gpt-oss, which always thinks
)
"""Variables of chat templates: name, value for on, value for off (or for least)."""
PROBE = "What is a lake?"
ON, OFF, BOTH = "on", "off", "both"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """A way to ask a model: what its template is given.  ``name`` is "" for the template's own way."""

    name: str = ""
    options: Mapping[str, Any]

    @property
    def text(self) -> str:
        """What the template is given, e.g. "enable_thinking=True"."""
        return ", ".join(f"{key}={value}" for key, value in self.options.items())


DEFAULT = Mode(options={})


def modes_of(tokenizer: Any, wanted: str, *, name: str) -> tuple[Mode, ...]:  # noqa: ANN401 - a tokenizer of transformers
    """The modes meant by "on", "off", "both" or "" (the template's own).

    Which variable the template knows is found out by rendering a prompt with it on and off.

    Raises:
        UsageError: neither of the variables makes a difference.
    """
    if not wanted:
        return (DEFAULT,)
    for key, on, off in SWITCHES:
        rendered = [_rendered(tokenizer, {key: value}) for value in (on, off)]
        if None not in rendered and rendered[0] != rendered[1]:
            values = {ON: on, OFF: off}
            chosen: Sequence[str] = (OFF, ON) if wanted == BOTH else (wanted,)
            return tuple(Mode(name=f"thinking {one}", options={key: values[one]}) for one in chosen)
    raise UsageError(
        f"{name}: its chat template has no switch for thinking (none of {', '.join(key for key, *_ in SWITCHES)})",
        "leave out --thinking: the template has one way only",
    )


def prompt_ending(tokenizer: Any, options: Mapping[str, Any]) -> str:  # noqa: ANN401
    """The template's text behind the user's, up to where the reply begins; thinking may have begun in it."""
    return (_rendered(tokenizer, options) or "").rpartition(PROBE)[2]


def _rendered(tokenizer: Any, options: Mapping[str, Any]) -> str | None:  # noqa: ANN401
    """A prompt as text; None where the template refuses what it is given."""
    messages = [{"role": "user", "content": PROBE}]
    try:
        return render(tokenizer, messages, options, name="")[1]
    except PromptError:
        return None
