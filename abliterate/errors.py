"""Every failure a user can meet.

    AbliterateError             1   a bug, if it ever surfaces as itself
    ├── UsageError              2   bad option, recipe, prompt file or output folder
    │   ├── RecipeError
    │   ├── PromptError
    │   └── OutputError
    ├── PlanRefusedError        3   the edit cannot be exact, or there is no room for it
    │   ├── UnknownArchitectureError
    │   ├── UnknownTensorError
    │   ├── UnsupportedFormatError
    │   ├── TooFewPromptsError
    │   └── NotEnoughDiskError
    ├── VerificationError       4   the written bytes are not what they must be
    ├── SourceError             5   the source is unreadable or corrupt
    │   ├── CheckpointError
    │   ├── NonFiniteError
    │   └── HubError
    └── InterruptedRunError     6   stopped before the end, resumable

The number is the exit code of the command line.  Each error carries two lines: ``message`` says what is wrong with
which file or tensor, ``hint`` says what to do.
"""

import errno
from typing import ClassVar


class AbliterateError(Exception):
    """Base of all errors raised on purpose; ``message`` says what is wrong, ``hint`` what to do about it."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(AbliterateError):
    """The request itself cannot be served."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe file is malformed or holds a value that is not allowed."""


class PromptError(UsageError):
    """A prompt set is missing, empty or unusable for this model."""


class OutputError(UsageError):
    """The output folder exists already or lies where it must not."""


class PlanRefusedError(AbliterateError):
    """The edit cannot be made exact, so it is not made."""

    exit_code = 3


class UnknownArchitectureError(PlanRefusedError):
    """No registry entry covers this ``model_type``."""


class UnknownTensorError(PlanRefusedError):
    """A tensor has no role in the registry entry, or a writer that must exist does not."""


class UnsupportedFormatError(PlanRefusedError):
    """The weights are stored in a format that cannot be edited."""


class TooFewPromptsError(PlanRefusedError):
    """The model behaves as the classes say on a handful of prompts only, which are no ground for a direction."""


class NotEnoughDiskError(PlanRefusedError):
    """The output does not fit on its disk."""


class VerificationError(AbliterateError):
    """The written checkpoint is not the one that was planned."""

    exit_code = 4


class SourceError(AbliterateError):
    """The source cannot be read."""

    exit_code = 5


class CheckpointError(SourceError):
    """A shard, header, index or config is missing, truncated or inconsistent."""


class NonFiniteError(SourceError):
    """A weight or an activation is NaN or infinite."""

    def __init__(
        self,
        message: str,
        hint: str = "the checkpoint is damaged: fetch it again, or repair that tensor before editing",
    ) -> None:
        super().__init__(message, hint)


class HubError(SourceError):
    """The Hub refused or could not be reached."""


class InterruptedRunError(AbliterateError):
    """The run was stopped; the same command continues it."""

    exit_code = 6


DEVICE_ERRORS = frozenset(
    number for name in ("EIO", "EREMOTEIO", "ENXIO", "ENODEV", "ESTALE", "ENOTCONN", "EHOSTDOWN", "ETIMEDOUT")
    if (number := getattr(errno, name, None)) is not None
)  # fmt: skip
"""Of the system, where a disk or a network drive is at fault and not what was asked of it."""


def advice(error: OSError) -> str:
    """What to do about ``error``."""
    if error.errno in DEVICE_ERRORS:
        return "the disk or network drive fails: see what the system's log says of it; the same command then goes on"
    return "check the path and its rights"
