"""What a tokenizer's chat template makes of a conversation, and whether the model still sees what was asked."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from abliterate.checkpoint.source import read_json
from abliterate.errors import PromptError

SHOWN = 40
"""Characters of a prompt that a message quotes."""


BESIDE = ("chat_template.json", "processor_config.json")
"""Files of multimodal models and their kin that may hold the template in place of the tokenizer's own."""
FOR_TOOLS = ("tool_use", "rag")
"""Names of templates that are not for plain conversations."""


def settle_template(tokenizer: Any, folder: Path) -> None:  # noqa: ANN401 - a tokenizer of transformers
    """Give ``tokenizer`` the chat template of its folder where transformers finds none, or none that is the default.

    Raises:
        PromptError: there are several for plain conversations, and none is the default.
        CheckpointError: a file that may hold it is no JSON.
    """
    found = tokenizer.chat_template
    for name in BESIDE:
        if not found and (folder / name).is_file():
            found = read_json(folder / name).get("chat_template")
    if isinstance(found, list):
        found = {its["name"]: its["template"] for its in found}
    if isinstance(found, dict) and "default" not in found:
        plain = [name for name in found if name not in FOR_TOOLS]
        if len(plain) != 1:
            raise PromptError(
                f"{folder}: has the chat templates {', '.join(sorted(found))}, and none of them is the default",
                "put the one to use into a chat_template.jinja in that folder",
            )
        found = found[plain[0]]
    tokenizer.chat_template = found


def render(
    tokenizer: Any,  # noqa: ANN401 - a tokenizer of transformers
    messages: Sequence[Mapping[str, str]],
    options: Mapping[str, Any],
    *,
    name: str,
) -> tuple[list[dict[str, Any]], str]:
    """``messages`` in the form that the template takes, and its text up to where the assistant begins.

    The content of a message is given as text.  Templates of multimodal models iterate over parts and say nothing to a
    text: where that fails, or what was asked is not in the rendered text, parts are given.  Assistant turns are not
    looked for, as templates cut earlier thinking from them.  ``options`` are variables of the template.

    Raises:
        PromptError: the template fails, or drops, cuts or escapes what it is given.
    """
    from jinja2 import TemplateError

    problem: PromptError | None = None
    for form in (_as_text, _as_parts):
        given = [{**message, "content": form(message["content"])} for message in messages]
        try:
            text = tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True, **options)
        except (TemplateError, ValueError, KeyError, TypeError) as error:
            problem = problem or _failed(error, messages, name)
            continue
        altered = [
            message
            for message, its in zip(messages, given, strict=True)
            if message["role"] != "assistant" and not _holds(str(text), message["content"], its["content"])
        ]
        if not altered:
            return given, str(text)
        problem = problem or _altered(altered[0], name)
    assert problem is not None
    raise problem


def _as_text(content: str) -> str:
    return content


def _as_parts(content: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}]


def _holds(text: str, asked: str, given: str | list[dict[str, str]]) -> bool:
    """Whether ``text`` holds what was asked, up to blanks around it, and does not hold a list of parts as such."""
    printed = () if isinstance(given, str) else (str(given), json.dumps(given, ensure_ascii=False))
    return asked.strip() in text and not any(its in text for its in printed)


def _failed(error: Exception, messages: Sequence[Mapping[str, str]], name: str) -> PromptError:
    from jinja2 import TemplateSyntaxError

    if isinstance(error, TemplateSyntaxError):
        said = f"{error.message}, line {error.lineno}"
        hint = "the template itself is broken: mend it in chat_template.jinja or tokenizer_config.json"
    elif messages[0]["role"] == "system":
        said, hint = str(error), "some templates refuse a system prompt: drop --system"
    else:
        said, hint = str(error), "if it asks for a system prompt, give one with --system; else mend the template"
    return PromptError(f"{name}: its chat template fails ({said})", hint)


def _altered(message: Mapping[str, str], name: str) -> PromptError:
    role, text = message["role"], message["content"].strip()
    what = "the system prompt" if role == "system" else "a prompt"
    shown = repr(text[:SHOWN]) + ("…" if len(text) > SHOWN else "")
    hint = "drop --system" if role == "system" else "mend the template (chat_template.jinja), or leave such prompts out"
    return PromptError(f"{name}: its chat template drops, cuts or escapes {what}: {shown} is not in its text", hint)
