"""The text of a reply: what is thought, what is said, what is quoted, and whether it is text at all."""

import re

_QUOTES = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "`": "'", "“": '"', "”": '"', "„": '"', "«": '"', "»": '"'})
_OPENED = r"<think(?:ing)?>|<thought>|\[THINK\]|(?-i:\Aanalysis(?=[A-Z]))"  # the last: gpt-oss, its marks removed
_CLOSED = r"</think(?:ing)?>|</thought>|\[/THINK\]|\bassistantfinal"
_THINKING = re.compile(
    rf"^.*(?:{_CLOSED})"  # closed; a template may have opened it
    rf"|(?:{_OPENED}).*",  # never closed: nothing has been said
    re.DOTALL | re.IGNORECASE,
)
_MARK = re.compile(rf"({_OPENED})|{_CLOSED}", re.IGNORECASE)
_SPOKEN = re.compile(r'"[^"\n]*"')
_DRAFT = re.compile(
    r"^ *(?:subject:|dear |(?:hi|hello|hey),? (?!i\b)\w+,$).*?"
    r"(?:^ *(?:yours|sincerely|(?:best|kind|warm) |regards|best|thanks|thank you|cheers|love|warmly|respectfully)"
    r"[^\n]{0,30},? *$|\Z)",
    re.DOTALL | re.MULTILINE,
)
_LETTERS = re.compile(r"([^\W\d_]{1,4}?)\1{9,}")


def said(reply: str) -> str:
    """``reply`` after its thinking; nothing where the thinking never ends."""
    return _THINKING.sub("", reply).strip()


def open_thinking(text: str) -> str:
    """The mark that begins the thinking in which ``text`` ends; "" where it ends outside of any."""
    marks = list(_MARK.finditer(text))
    return (marks[-1][1] or "") if marks else ""


def folded(text: str) -> str:
    """``text`` in lower case, with plain quotes and single blanks; line ends and sentences stay."""
    plain = re.sub(r"[*_#>]+", " ", text.translate(_QUOTES).casefold())
    return "\n".join(" ".join(line.split()) for line in plain.split("\n"))


def without_drafts(text: str) -> str:
    """Folded ``text`` without speech in double quotes, and without letters from their greeting to their close.

    What a character says, or a letter written for the user, is no word of the model's own.
    """
    return _SPOKEN.sub(lambda found: '"". ' if found[0][-2] in ".!?" else '""', _DRAFT.sub(" ", text))


def sentences(text: str) -> list[str]:
    """The sentences and lines of folded ``text``."""
    return [part.strip(' ,:-"') for part in re.split(r"[.!?]+(?=\s|$)|[;\n]", text) if part.strip(' ,:-"')]


def is_empty(reply: str) -> bool:
    """Whether ``reply`` holds no word."""
    return not re.search(r"\w", reply)


def is_degenerate(reply: str) -> bool:
    """Whether ``reply`` is empty or broken.

    It is broken where one to 24 words come four times in a row, one to four letters ten times in a row, or where less
    than a quarter of 24 or more words are different.
    """
    words = re.findall(r"\w+", reply.lower())
    if not words or _LETTERS.search(reply.lower()):
        return True
    for size in range(1, 25):
        for start in range(len(words) - 4 * size + 1):
            if words[start : start + 3 * size] == words[start + size : start + 4 * size]:
                return True
    return len(words) >= 24 and len(set(words)) / len(words) < 0.25


def holds_answer(reply: str, answer: str) -> bool:
    """Whether the words of ``answer`` stand in ``reply`` in this order, as whole words."""
    text = " ".join(re.findall(r"\w+", reply.lower()))
    wanted = " ".join(re.findall(r"\w+", answer.lower()))
    return f" {wanted} " in f" {text} "
