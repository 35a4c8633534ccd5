"""A model whose weights stay on disk and are loaded from the shards, unit by unit, when they are needed.

A unit is a block, or a module outside the blocks.  The model is built on the meta device, and each unit gets its
parameters before it runs.  Embeddings are read row by row.  Other modules outside the blocks stay loaded once they were
used, if there is room, and then as many blocks.  Nothing is written to disk.

transformers knows the modules, and how stored tensors become parameters; it does not move the weights here.  With
``device_map`` "disk" it would read the whole checkpoint when it loads, write every converted tensor to a folder, and
read a block again for each batch.

Any code may run such a model.  With ``lockstep.run_together`` several batches share a weight pass.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from abliterate.checkpoint.source import Checkpoint
from abliterate.events import OnEvent, WeightsRead, ignore
from abliterate.model.carrying import carrier_to
from abliterate.model.guessing import Guesses
from abliterate.model.malloc import keep_no_holes
from abliterate.model.memory import Sizes, can_keep, can_prefetch, is_beyond_cache, rows_bytes, working_bytes
from abliterate.model.rows import Rows
from abliterate.model.spare import Spare
from abliterate.model.stored import Reader, stored_tensors
from abliterate.model.tasks import current
from abliterate.model.units import Place, Unit, compute_buffers, get, is_lookup, put, units_of
from abliterate.model.weights import Conversion, conversions_of, make

ALWAYS_KEPT_BYTES = 2**20
READERS = 4
"""Tensors of a unit that are read at a time: the disk is never waited for between two, and casts run beside it."""

Values = dict[str, Tensor]


class Reserved(NamedTuple):
    """Bytes of the working memory that wait between blocks, and of a pass beside them; ``lasting``: for many passes."""

    waits: int
    most: int
    lasting: bool = False


class Offloaded:
    """The offloaded weights of one model: which units are loaded, and how many bytes were read.

    ``memory_bytes`` is the budget for weights and hidden states.  Two units must fit into it, or one without reading
    ahead.  Modules outside the blocks stay loaded as far as there is room beside them.  Of the rest blocks that stay
    get one half, and hidden states the other.  Without a budget only small modules stay loaded.

    ``ranks`` and ``following`` are for the scheduler: the order in which units were first used, and which unit came
    after which.  ``reader`` reads the tensors.  ``reserved`` is what batches take of the working memory that wait, and
    the pass that runs beside them; ``with_prompts`` what some take beside that while they read their prompts.
    ``guesses`` is what the model was asked and said, ``run_s`` the seconds for which each unit ran, once it was loaded
    (on an accelerator, that it took to be told, unless ``is_timed``).  ``scratch`` is a folder for what may wait on
    disk, ``caches_on_disk`` whether keys and values do, as they have found no room, and ``mapped_bytes`` how much.

    Raises:
        UsageError: the memory does not hold the largest unit.
        CheckpointError: the checkpoint lacks a parameter.
        UnsupportedFormatError: it stores one in a dtype that no parameter has, or quantised in a way not known here.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - a model of transformers, all of it on the meta device
        checkpoint: Checkpoint,
        blocks: Iterable[nn.Module],
        *,
        device: torch.device,
        memory_bytes: int | None = None,
        on_event: OnEvent = ignore,
    ) -> None:
        self.scratch: Path | None = None
        self.caches_on_disk = False
        self.mapped_bytes = 0
        self.device = device
        self.on_event = on_event
        self.loads: Counter[str] = Counter()
        self.run_s: defaultdict[str, float] = defaultdict(float)
        self.is_timed = False
        self.ranks: dict[Unit, int] = {}
        self.rows: list[Rows] = []
        self.reserved: list[Reserved] = []
        self.with_prompts: list[Reserved] = []
        self.guesses = Guesses()
        self._spare = Spare()
        self.memory_bytes = memory_bytes
        self._model = model
        self._folder = checkpoint.folder
        self._unit_bytes_read = 0
        self._weight_passes = 1
        self._in_pass: set[Unit] = set()
        self._loaded: dict[Unit, dict[Place, Tensor]] = {}
        self._fetching = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights")
        self._reading = ThreadPoolExecutor(max_workers=READERS, thread_name_prefix="tensors")
        conversions = conversions_of(model, stored_tensors(checkpoint))
        self.size_bytes = sum(conversion.stored_bytes for conversion in conversions)
        past_cache = is_beyond_cache(self.size_bytes, memory_bytes if device.type == "cpu" else None)
        self.reader = Reader(folder=self._folder, device=device, carrier=carrier_to(device), past_cache=past_cache)
        compute_buffers(model, {target for conversion in conversions for target in conversion.targets}, device)
        self.units = units_of(model, conversions, tuple(blocks), checkpoint.name)
        self.prefetch = can_prefetch(self.sizes(), memory_bytes)
        self._staying = self._find_staying()
        passing = (unit for unit in self.units if unit not in self._staying and not self._by_rows(unit))
        self._pass_bytes = sum(unit.stored_bytes for unit in passing)
        in_order = [unit for unit in self.units if unit.is_block]
        self.following: dict[Unit, Unit] = dict(pairwise(in_order))
        for unit in self.units:
            self._set_up(unit)
        self.working_bytes = self._working_bytes()
        if memory_bytes is not None and device.type == "cpu":
            keep_no_holes()

    def sizes(self, *, without: Container[Unit] = ()) -> Sizes:
        """Bytes of the units that pass through memory: all but ``without`` and the embeddings that are read by rows."""
        others = [u for u in self.units if not u.is_block and u not in without and not self._by_rows(u)]
        converted = [conversion.extra_bytes for unit in self.units for conversion in unit.conversions]
        return Sizes(
            blocks=tuple(unit.size_bytes for unit in self.units if unit.is_block),
            others=tuple(unit.size_bytes for unit in others),
            conversion=max(converted, default=0),
        )

    @property
    def bytes_read(self) -> int:
        """Bytes of weights read so far."""
        return self._unit_bytes_read + sum(rows.bytes_read for rows in self.rows)

    @property
    def loaded(self) -> tuple[Unit, ...]:
        """The units that are loaded now, without those that stay loaded."""
        return tuple(unit for unit in self._loaded if unit not in self._staying)

    def stays(self, unit: Unit) -> bool:
        """Whether ``unit`` stays loaded once it was used."""
        return unit in self._staying

    def is_loaded(self, unit: Unit) -> bool:
        """Whether the parameters of ``unit`` are in its module."""
        return unit in self._loaded

    def fetch(self, unit: Unit) -> Future[Values]:
        """Begin to read the parameters of ``unit`` in another thread."""
        return self._fetching.submit(self._read, unit)

    def drop(self, unit: Unit, fetched: Future[Values]) -> None:
        """Cancel a ``fetch``, or wait for its end, and forget its result."""
        if not fetched.cancel():
            wait((fetched,))
            self._unit_bytes_read += unit.stored_bytes

    def load(self, unit: Unit, fetched: Future[Values] | None = None) -> None:
        """Put the parameters of ``unit`` into its module; they are read now where they were not ``fetched``.

        Raises:
            CheckpointError: a shard ends too early.
        """
        values = (fetched or self.fetch(unit)).result()
        self._unit_bytes_read += unit.stored_bytes
        self._loaded[unit] = {
            place: put(place, values[name]) for name, places in unit.places.items() for place in places
        }
        self.loads[unit.name] += 1
        if unit not in self._staying:
            self._tell(unit)

    def release(self, unit: Unit) -> None:
        """Take the parameters of ``unit`` out of its module, unless it stays loaded."""
        if unit in self._loaded and unit not in self._staying:
            befores = self._loaded.pop(unit)
            if unit.is_read_as_stored:
                self._spare.keep({its.data_ptr(): its for its in map(get, befores)}.values())
            for place, before in befores.items():
                put(place, before)

    def release_all(self) -> None:
        """Release every unit that does not stay loaded."""
        for unit in self.loaded:
            self.release(unit)
        self._spare.clear()

    def _tell(self, unit: Unit) -> None:
        """Report how far a weight pass is; the next one begins where one of its units comes again."""
        if unit in self._in_pass:
            self._in_pass.clear()
            self._weight_passes += 1
        self._in_pass.add(unit)
        done = sum(each.stored_bytes for each in self._in_pass)
        self.on_event(
            WeightsRead(reading=self._weight_passes, part=unit.name, done=done, total=max(done, self._pass_bytes))
        )

    def _read(self, unit: Unit) -> Values:
        values: Values = {}
        with self._spare.offered():
            if not unit.is_read_as_stored:
                self._spare.decline()  # what is converted takes other memory
            for made in self._made(unit):
                values |= {name: value for name, value in made.items() if name in unit.places}
        return values

    def _made(self, unit: Unit) -> Iterator[Values]:
        """What each conversion of ``unit`` gives; plain tensors are read side by side, the largest first."""

        def one(conversion: Conversion) -> Values:
            return make(conversion, self._model, self.reader, self._spare.room)

        plain = [its for its in unit.conversions if self.reader.carrier is None and its.is_plain]
        begun = {its: self._reading.submit(one, its) for its in sorted(plain, key=lambda its: -its.stored_bytes)}
        wait(begun.values())
        yield from (begun[its].result() if its in begun else one(its) for its in unit.conversions)

    def _set_up(self, unit: Unit) -> None:
        """Have the rows of an embedding read when they are looked up, and any other unit loaded when it is called."""
        if self._by_rows(unit):
            (conversion,) = unit.conversions
            most = rows_bytes(self.memory_bytes)
            self.rows.append(Rows(self._folder, conversion.sources[0][1], conversion.dtype, most_bytes=most))
            put((unit.module, "weight"), self.rows[-1].weight())
        else:
            self._guard(unit)

    def _working_bytes(self) -> int:
        """Bytes of the budget that are left for hidden states, masks and logits."""
        found = working_bytes(self.memory_bytes)
        if self.memory_bytes is not None:
            passing = self.sizes(without=self._staying).passing_bytes(prefetch=self.prefetch)
            found = max(found, self.memory_bytes - passing - sum(unit.size_bytes for unit in self._staying))
        return found - len(self.rows) * rows_bytes(self.memory_bytes)

    def _find_staying(self) -> set[Unit]:
        """The modules outside the blocks that stay loaded: the small ones, and others while there is room."""
        staying: set[Unit] = set()
        others = (unit for unit in self.units if not unit.is_block and not self._by_rows(unit))
        for unit in sorted(others, key=lambda unit: unit.size_bytes):
            runs_around_others = next(unit.module.children(), None) is not None
            if unit.size_bytes <= ALWAYS_KEPT_BYTES or runs_around_others or self._fits(staying | {unit}):
                staying.add(unit)
        return staying | self._staying_blocks(staying)

    def _staying_blocks(self, others: set[Unit]) -> set[Unit]:
        """The blocks that stay loaded beside ``others``: evenly among the rest, which are read while these run."""
        blocks = [unit for unit in self.units if unit.is_block]
        if self.memory_bytes is None or not self.prefetch:
            return set()
        taken = self.sizes(without=others).passing_bytes(prefetch=True) + sum(unit.size_bytes for unit in others)
        left = self.memory_bytes - working_bytes(self.memory_bytes) - taken
        count = max(0, min(left // 2 // max(unit.size_bytes for unit in blocks), len(blocks) - 2))
        return {blocks[(2 * place + 1) * len(blocks) // (2 * count)] for place in range(count)}

    def _fits(self, staying: set[Unit]) -> bool:
        size = sum(unit.size_bytes for unit in staying)
        return can_keep(size, self.sizes(without=staying), self.memory_bytes, prefetch=self.prefetch)

    def _by_rows(self, unit: Unit) -> bool:
        return self.device.type == "cpu" and is_lookup(unit)

    def _guard(self, unit: Unit) -> None:
        """Have ``unit`` loaded before its module runs, by wrapping ``forward``.

        A hook would not do.  A module calls its hooks from a copy of their list; while one of them waits, their owner
        may remove the others, and they would still be called.
        """
        forward = unit.module.forward

        @wraps(forward)
        def guarded(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever the module takes and gives
            task = self._task()
            if unit not in self._loaded:
                if task is None:
                    self.load(unit)
                else:
                    task.wait_for(unit)
            begun = time.perf_counter()
            try:
                return forward(*args, **kwargs)
            finally:
                if self.is_timed and self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                self.run_s[unit.name] += time.perf_counter() - begun
                if task is None:
                    self.release(unit)

        unit.module.forward = guarded

    def _task(self) -> Any:  # noqa: ANN401 - a task or None
        """The task that runs now, if it uses these weights."""
        task = current()
        return task if task is not None and task.weights is self else None
