"""What can go wrong while uploading, in two lines, and a client that keeps quiet while it tries again."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from abliterate.checkpoint.hub import is_network, plain_errors
from abliterate.errors import AbliterateError, CheckpointError, HubError, SourceError
from abliterate.events import Noted, OnEvent

AGAIN = "run the same command again: it continues"
FULL = re.compile(r"quota|storage|limit (?:reached|exceeded)|payment", re.IGNORECASE)
NO_ROOM = ("no room is left in the account's storage", "free some, or get more, at https://huggingface.co/settings")
LOST = "pointed to a file that does not exist"

STATUS: dict[int, tuple[str, str]] = {
    401: (
        "the token is missing or not valid",
        "log in with `hf auth login`, or set HF_TOKEN, to a token that may write",
    ),
    402: NO_ROOM,
    403: (
        "the token may not write here",
        "use a token with write access to this owner: https://huggingface.co/settings/tokens",
    ),
    404: ("no such repository or branch, or it is private", "check the spelling, and whose token it is"),
    409: ("is being changed by someone else", AGAIN),
    412: ("was changed by someone else meanwhile", AGAIN),
    413: ("a file is larger than the Hub takes", "save the base in smaller shards (5 GB is usual), and edit that"),
    429: ("too many requests", "wait some minutes, then " + AGAIN),
    507: NO_ROOM,
}
"""What to say of an answer, and the next step."""


@contextmanager
def plain_upload_errors(name: str) -> Iterator[None]:
    """Turn what the client raises while uploading into one line and a next step; never with a token or a signed URL.

    Raises:
        HubError: the Hub refused or cannot be reached.
        CheckpointError: a file here cannot be read.
    """
    with plain_errors(name):
        try:
            yield
        except AbliterateError:
            raise
        except Exception as error:
            explained = explain(name, error)
            if explained is None:
                raise
            raise explained from error


def explain(name: str, error: BaseException) -> SourceError | None:
    """``error``, or what caused it, in plain words; None when it is for ``plain_errors``."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    if isinstance(error, GatedRepoError):
        return None
    if isinstance(error, HfHubHTTPError):
        return _answer(name, error.response.status_code, " ".join((error.server_message or "").split()))
    if isinstance(error, ValueError):
        return _malformed(name, str(error))
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return explain(name, error.__cause__) or HubError(f"{name}: the upload broke off", AGAIN)
    if isinstance(error, OSError) and error.filename:
        return CheckpointError(f"{error.filename}: {error.strerror}", "check the file")
    if is_network(error):
        return HubError(
            f"{name}: the Hub cannot be reached ({type(error).__name__})", "check the network, then " + AGAIN
        )
    if type(error).__module__.split(".")[0] == "hf_xet":
        return HubError(f"{name}: the upload broke off (Xet: {type(error).__name__})", AGAIN)
    return None


def _answer(name: str, status: int, said: str) -> HubError:
    if LOST in said:
        return HubError(
            f"{name}: the Hub has let go of files that were sent long ago",
            "delete the unfinished folder and run the same command again",
        )
    if status == 403 and FULL.search(said):
        status = 402
    what, hint = STATUS.get(status, (f"the Hub answered {status}", AGAIN))
    return HubError(f"{name}: {what}", hint)


def _malformed(name: str, text: str) -> HubError | None:
    if "LFS batch" in text:
        what, hint = NO_ROOM if FULL.search(text) else ("the Hub refuses a file", "look at its page on the Hub")
        return HubError(f"{name}: {what}", hint)
    if "metadata in README.md" in text:
        return HubError(f"{name}: the Hub does not accept the metadata of README.md", "correct the head of that file")
    return None


class Waits(logging.Handler):
    """Hears the client's log: that it waits before it tries again is passed on, URLs are not."""

    def __init__(self, on_event: OnEvent) -> None:
        super().__init__(logging.WARNING)
        self._on_event = on_event

    def emit(self, record: logging.LogRecord) -> None:
        """Pass on how long the client waits."""
        waits = re.match(r"(Rate limited\. Waiting|Retrying in) ([\d.]+)s", record.getMessage())
        if waits:
            why = "asks to wait" if waits[1].startswith("Rate") else "does not answer as it should"
            self._on_event(Noted(text=f"the Hub {why}: trying again in {float(waits[2]):.0f} s"))


@contextmanager
def quiet_client(on_event: OnEvent) -> Iterator[None]:
    """No bars and no log lines of the client: what matters of them becomes events."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from huggingface_hub.utils.logging import get_logger

    logger = get_logger("huggingface_hub")  # theirs: importing it adds a handler, which must not come after ours
    handlers, had_bars = logger.handlers, not are_progress_bars_disabled()
    logger.handlers = [Waits(on_event)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        disable_progress_bars()
        try:
            yield
        finally:
            logger.handlers = handlers
            if had_bars:
                enable_progress_bars()
            for warning in (warning for warning in caught if warning.category is UserWarning):
                on_event(Noted(text=" ".join(str(warning.message).split())))
