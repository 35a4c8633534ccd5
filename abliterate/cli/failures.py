"""From any exception to an ``AbliterateError`` that can be shown."""

import errno
import os
import shlex
import sys
import traceback

from abliterate.errors import AbliterateError, InterruptedRunError, NotEnoughDiskError, SourceError, advice

DEBUG_VARIABLE = "ABLITERATE_DEBUG"


def explain(error: BaseException) -> AbliterateError:
    """``error`` itself when it was raised on purpose, else the nearest thing that says what to do.

    With ``ABLITERATE_DEBUG=1`` the traceback is printed as well.
    """
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exception(error)
    if isinstance(error, AbliterateError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return InterruptedRunError(
            "interrupted; an unfinished output keeps its .partial name",
            f"what is finished is not done again by: {shlex.join(['abliterate', *sys.argv[1:]])}",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NotEnoughDiskError("the disk is full", "free some space and run the same command: it continues")
    if isinstance(error, OSError):
        return SourceError(f"{error.filename or 'a file'}: {error.strerror or error}", advice(error))
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return AbliterateError("out of memory", "lower --batch-size, or choose a smaller --dtype or another --device")
    text = " ".join(str(error).split())[:200]
    return AbliterateError(
        f"unexpected {type(error).__name__}: {text}",
        f"this is a bug: run again with {DEBUG_VARIABLE}=1 and report what it prints",
    )
