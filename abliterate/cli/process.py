"""The process around a command: its standard streams, and the signals that stop it."""

import os
import signal
import sys
from io import TextIOWrapper

HUNG_UP = 141
"""What a shell gives a program that SIGPIPE stopped."""


def prepare_streams() -> None:
    """Have stdin, stdout and stderr there, and able to take any character.

    Where one is closed, the null device is opened: the next file opened would get its number, and a shard, say, what
    C libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a code page without our signs must not stop the work


def stop_on_signals() -> None:
    """Treat a polite kill, and a terminal that is closed, as Ctrl-C: the work can be continued.

    A signal that is ignored, SIGHUP under ``nohup``, stays so.
    """
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)


def processes() -> tuple[int, int]:
    """The number of this process, and of how many, where a launcher started several (``model.ranks``)."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def drop_output() -> None:
    """Write nothing more to stdout and stderr, of which the reader of one, ``head`` say, has seen enough."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            os.dup2(null, stream.fileno())
        except (OSError, ValueError):  # it is no file
            continue
    os.close(null)
