"""Several processes as one: the same command on each of them, under ``torchrun`` or ``accelerate launch``.

Every process, a *rank*, runs the same program in the same order.  What takes time is dealt out (``spread``): a rank
takes every n-th item, gives what it made to the others and takes theirs.  So all go on with the same values, which are
those of one process to the bit: each item is worked on as it would be there.

They meet in the key-value store of torch.distributed, which is the same for processors and for any card, and no process
group is made.  What goes through it is safetensors or JSON.  A rank that fails, or is not heard of, stops the others.
"""

import _thread
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from threading import Event, Thread
from typing import Any, Generic, TypeVar

from safetensors.torch import load, save
from torch import OutOfMemoryError, Tensor
from torch.distributed import DistError, DistNetworkError, DistStoreError

from abliterate.errors import (
    AbliterateError,
    InterruptedRunError,
    PlanRefusedError,
    SourceError,
    UsageError,
    VerificationError,
)
from abliterate.model.tasks import ELSEWHERE, current

T = TypeVar("T")
R = TypeVar("R")

POLL_S = 0.005
"""Between two looks at what others have made, where nothing else is to do."""
BEAT_S = 0.5
SILENT_S = 10.0
"""A rank that was not heard of for so long is taken for dead."""
CONNECT_S = 600.0
"""How long the others may take to start: a cluster's queue may hold them up."""
PIECE_BYTES = 4 * 2**20
"""Of a value: the store takes no more than 8 MiB at once."""

ERRORS = {its.exit_code: its for its in (UsageError, PlanRefusedError, VerificationError, SourceError)}
CONTINUE = "run the same command again: it continues"


@dataclass(frozen=True, slots=True)
class Codec(Generic[R]):
    """How results of one kind travel."""

    pack: Callable[[R], bytes]
    unpack: Callable[[bytes], R]


TENSORS: Codec[Mapping[str, Tensor]] = Codec(
    lambda its: save({name: tensor.contiguous().clone() for name, tensor in its.items()}), load
)
PLAIN: Codec[Any] = Codec(lambda its: json.dumps(its).encode(), json.loads)


class Ranks:
    """This process, number ``rank`` of ``count``, and its way to the others.

    ``store`` is one of torch.distributed.  ``lost`` says what stopped another rank, once that is known.  ``one_model``:
    all hold parts of one model and run it together (``parallel``), so that nothing that goes through it is dealt out.
    """

    def __init__(self, store: Any, rank: int, count: int) -> None:  # noqa: ANN401 - a store of torch
        self.store, self.rank, self.count = store, rank, count
        self.lost: AbliterateError | None = None
        self.one_model = False
        self._turns: Counter[tuple[int, ...]] = Counter()
        self._heard = {other: (0, time.monotonic()) for other in range(count) if other != rank}

    def turn(self) -> str:
        """A name for the next exchange, the same on all ranks: by the place of the running task, and a number."""
        task = current()
        path = () if task is None else task.path
        self._turns[path] += 1
        return f"{'.'.join(map(str, path))}#{self._turns[path]}"

    def give(self, key: str, value: bytes) -> None:
        """Put ``value`` where the others find it."""
        pieces = range(0, len(value), PIECE_BYTES)
        for number, first in enumerate(pieces):
            self.store.set(f"{key}/{number}", value[first : first + PIECE_BYTES])
        self.store.set(key, str(len(pieces)))

    def ready(self, key: str) -> bool:
        """Whether a value is there."""
        return bool(self.store.check([key]))

    def take(self, key: str) -> bytes:
        """The value that another rank gives; waits for it, and in a task lets others go on meanwhile.

        Raises:
            KeyboardInterrupt: another rank was lost; so what is kept of the work stays, and ``together`` says why.
        """
        while not self.ready(key):
            if self.lost is not None:
                raise KeyboardInterrupt
            task = current()
            if task is None:
                time.sleep(POLL_S)
            else:
                task.wait_for(ELSEWHERE)
        count = int(self.store.get(key))
        value = b"".join(self.store.get(f"{key}/{number}") for number in range(count))
        if self.store.add(f"{key}/taken", 1) == self.count - 1:  # nobody needs it any more
            for name in (*(f"{key}/{number}" for number in range(count)), f"{key}/taken", key):
                self.store.delete_key(name)
        return value

    def fail(self, error: AbliterateError) -> None:
        """Let the others know why this rank stops, unless one of them stopped first."""
        if self.lost is None:
            self.store.set(f"failed/{self.rank}", json.dumps([error.exit_code, error.message, error.hint]))

    def listen(self) -> None:
        """Show that this rank lives, and find out whether the others do; sets ``lost``."""
        self.store.add(f"alive/{self.rank}", 1)
        now = time.monotonic()
        for other, (beats, since) in self._heard.items():
            if self.ready(f"failed/{other}"):
                code, message, hint = json.loads(self.store.get(f"failed/{other}"))
                kind = ERRORS.get(code, InterruptedRunError)
                self.lost = kind(f"process {other + 1} of {self.count} has stopped: {message}", hint)
            heard = self.store.add(f"alive/{other}", 0)
            if heard != beats:
                self._heard[other] = heard, now
            elif now - since > (SILENT_S if beats else CONNECT_S) and not self.ready(f"ended/{other}"):
                text = f"process {other + 1} of {self.count} has not been heard of for {SILENT_S:.0f} s"
                self.lost = InterruptedRunError(text, CONTINUE)

    def end(self) -> None:
        """Say that this rank has all it needs; the first, who may hold the store, waits for the others."""
        self.store.set(f"ended/{self.rank}", "")
        while self.rank == 0 and self.lost is None and not all(self.ready(f"ended/{one}") for one in self._heard):
            time.sleep(POLL_S)


@cache
def here() -> Ranks | None:
    """This process among others, by the variables that launchers set (RANK, WORLD_SIZE, ...); None: it is alone.

    Raises:
        UsageError: the others cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from datetime import timedelta

    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, count = next(rendezvous("env://", timeout=timedelta(seconds=CONNECT_S)))
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"the other processes cannot be reached: {str(error).splitlines()[0]}",
            "start them with torchrun, or give each MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE",
        ) from error
    return Ranks(PrefixStore(f"abliterate/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store), rank, count)


def processes() -> int:
    """How many processes there are."""
    ranks = here()
    return 1 if ranks is None else ranks.count


def count() -> int:
    """How many processes share what goes through a model: 1 where they hold one together."""
    ranks = here()
    return 1 if ranks is None or ranks.one_model else ranks.count


def is_first() -> bool:
    """Whether this is the process that writes what is no shard, and shows what goes on."""
    ranks = here()
    return ranks is None or ranks.rank == 0


def on_this_machine() -> tuple[int, int]:
    """The number of this process among those on the same machine, and how many these are."""
    return int(os.environ.get("LOCAL_RANK", "0")), max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def spread(
    items: Sequence[T],
    run: Callable[[Sequence[T]], Iterable[R]],
    codec: Codec[R] = TENSORS,
    *,
    by_others: Callable[[int], None] = lambda _: None,
    ranks: Ranks | None = None,
) -> Iterator[R]:
    """What ``run`` gives of each of ``items``, in their order; of several processes each runs its share.

    ``by_others`` is told the places of items that another process worked on.  ``ranks``: where this process is not
    the one of ``here``.

    Raises:
        KeyboardInterrupt: another process was lost (see ``Ranks.take``).
    """
    ranks = ranks or here()
    if ranks is None:
        yield from run(items)
        return
    turn, place = ranks.turn(), 0
    own: dict[int, R] = {}
    mine = range(ranks.rank, len(items), ranks.count)

    def is_there() -> bool:
        return place in own or (place % ranks.count != ranks.rank and ranks.ready(f"{turn}/{place}"))

    def its() -> R:
        if place in own:
            return own.pop(place)
        found = codec.unpack(ranks.take(f"{turn}/{place}"))
        by_others(place)
        return found

    for number, result in zip(mine, run([items[number] for number in mine]), strict=True):
        ranks.give(f"{turn}/{number}", codec.pack(result))
        own[number] = result
        while place < len(items) and is_there():
            yield its()
            place += 1
    while place < len(items):
        yield its()
        place += 1


def everyone(document: Any) -> list[Any]:  # noqa: ANN401 - anything JSON can hold
    """What each process gives here, in the order of their numbers."""
    return list(spread(range(processes()), lambda mine: (document for _ in mine), PLAIN))


def least(number: int) -> int:
    """The least of what each process gives: what they measured of their memory, say."""
    return min(everyone(number))


def agreed(number: int) -> int:
    """``number`` or, where processes run one model together, the least of theirs: on it depends what they run."""
    ranks = here()
    return number if ranks is None or not ranks.one_model else least(number)


def first(make: Callable[[], T]) -> T:
    """What the first process makes (anything JSON can hold), on all of them."""
    return everyone(make() if is_first() else None)[0]


def meet() -> None:
    """Wait until all processes are here."""
    everyone(None)


@contextmanager
def together(*, one_model: bool = False) -> Iterator[None]:
    """Run while the processes look after each other: if one fails or dies, all stop within seconds.

    With ``one_model`` they hold one model together.

    Raises:
        AbliterateError: another process was lost.
    """
    ranks = here()
    if ranks is None:
        yield
        return
    ranks.one_model = one_model
    over = Event()
    watching = Thread(target=_watch, args=(ranks, over), daemon=True)
    watching.start()
    try:
        yield
        ranks.end()
    except KeyboardInterrupt:
        if ranks.lost is not None:
            raise ranks.lost from None
        ranks.fail(InterruptedRunError("it was interrupted", CONTINUE))
        raise
    except AbliterateError as error:
        ranks.fail(error)
        raise
    except (DistNetworkError, DistStoreError) as error:
        raise _gone(error) from error
    except Exception as error:
        if lost := _lost_soon(ranks, error):
            raise lost from None
        ranks.fail(AbliterateError(f"unexpected {type(error).__name__}: {error}", "look at what it printed"))
        raise
    finally:
        ranks.one_model = False
        over.set()
        watching.join()


def _watch(ranks: Ranks, over: Event) -> None:
    """Listen until ``over``, or until another rank is lost: then the main thread is stopped as a signal stops it."""
    while not over.wait(BEAT_S):
        try:
            ranks.listen()
        except DistError as error:
            ranks.lost = _gone(error)
        if ranks.lost is not None:
            if not over.wait(POLL_S):
                _thread.interrupt_main(signal.SIGTERM)
            return


def _lost_soon(ranks: Ranks, error: Exception) -> AbliterateError | None:
    """What stopped another rank, where ``error`` may come of a pass that it was to take part in."""
    if not ranks.one_model or not isinstance(error, RuntimeError) or isinstance(error, OutOfMemoryError):
        return None
    until = time.monotonic() + SILENT_S + 2 * BEAT_S
    try:
        while ranks.lost is None and time.monotonic() < until:
            time.sleep(POLL_S)
        time.sleep(10 * POLL_S)
    except KeyboardInterrupt:  # by which ``_watch`` stops whatever goes on
        if ranks.lost is None:
            raise
    return ranks.lost


def _gone(error: Exception) -> AbliterateError:
    """The store was lost, with the process that held it."""
    return InterruptedRunError(f"the other processes are gone: {str(error).splitlines()[0]}", CONTINUE)
