"""Healing: a small LoRA on edited writers, trained until harmless prompts are answered as the base answers them.

What it is taught are the distributions of the base along the base's own greedy replies; the loss is KL(base || healed),
a mean over the tokens of replies.  Beside it stands KL(edited || healed) on prompts that the base is likely to refuse,
so that these are answered as before.  After every step of the optimiser ``B`` loses what it holds along what the edit
reads (``B <- B - U U^T B``), so that at no time the adapter can write it.  Validation prompts say which step is kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from abliterate.arch.edit_plan import EditPlan
from abliterate.arch.model_map import Writer
from abliterate.errors import NonFiniteError, PlanRefusedError, UsageError
from abliterate.events import OnEvent, ignore, working
from abliterate.method.linalg import orthonormal_basis, project_out
from abliterate.method.statistics import exact_kl_nats
from abliterate.method.weight_edit import LowRank
from abliterate.model.chat import ChatFormat
from abliterate.model.forward import run_batch
from abliterate.model.interventions import linear_of
from abliterate.model.likelihood import logit_row_bytes, predict, wide
from abliterate.model.load import LoadedModel
from abliterate.model.replying import generate_tokens
from abliterate.model.room import free_bytes, gradient_rows
from abliterate.model.training_libraries import own_random_numbers, quiet_libraries

NAME = "default"
"""What PEFT calls an adapter that is given no name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long and how fast: ``batch`` prompts a step, at most ``most_steps`` of them.

    Validation is looked at every ``checked_every`` steps; after ``patience`` looks that found nothing better it ends.
    """

    most_steps: int = 160
    rate: float = 3e-4
    batch: int = 8
    checked_every: int = 8
    patience: int = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lesson:
    """A prompt and the reply of the model that teaches, as token ids of which the last ``length`` are the reply.

    ``taught``: its log-probabilities there, in float32, on the host.
    """

    prompt: str
    ids: list[int]
    length: int
    taught: Float[Tensor, "length vocab"]


class Distances(NamedTuple):
    """Mean KL on validation prompts, nats per token: to the base, and to the edited model where that teaches."""

    learned: float
    kept: float


class Lessons(NamedTuple):
    """What the base teaches, and what the edited model does, so that it is kept."""

    learned: Sequence[Lesson]
    kept: Sequence[Lesson]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Healed:
    """What training came to: ``added`` by tensor name, as it was best on the validation prompts.

    ``before`` and ``after`` are the distances there; ``steps`` were taken, and after step ``best`` their sum was least
    (0: before the first, so that nothing was healed).
    """

    added: Mapping[str, LowRank]
    before: Distances
    after: Distances
    steps: int
    best: int


def lessons(
    loaded: LoadedModel,
    chat: ChatFormat,
    prompts: Sequence[str],
    *,
    teaches: Callable[[str, str], bool] = lambda *_: True,
    max_new_tokens: int,
    batch_size: int,
    task: str,
    on_event: OnEvent = ignore,
) -> list[Lesson]:
    """What the model that is ``loaded`` teaches on ``prompts``.

    Prompts it says nothing to are left out, and those whose reply is not to be learned: ``teaches(prompt, reply)``.

    Raises:
        UsageError: half of the free memory does not hold its distributions.
    """
    needed = len(prompts) * logit_row_bytes(loaded, max_new_tokens)
    free = free_bytes(torch.device("cpu"))
    if needed > free // 2:
        raise UsageError(
            f"{loaded.name}: its distributions along {len(prompts)} replies of up to {max_new_tokens} tokens take "
            f"{needed / 1e9:.1f} GB, and half of the free memory is {free / 2e9:.1f} GB",
            "give fewer --prompts, or a smaller --max-new-tokens",
        )
    options = {"batch_size": batch_size, "on_event": on_event}
    replies = generate_tokens(loaded, chat, prompts, max_new_tokens=max_new_tokens, task=task, **options)
    asked = zip(prompts, replies, strict=True)
    said = [(prompt, reply) for prompt, reply in asked if reply and teaches(prompt, chat.text(reply))]
    encoded, lengths = [chat.encode(prompt) + reply for prompt, reply in said], [len(reply) for _, reply in said]
    taught: dict[int, Tensor] = {}

    def figures(_: int, log_probs: Tensor, __: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield "", log_probs.float().clone()

    def see(row: int, _: str, log_probs: Tensor) -> None:
        taught[row] = log_probs

    with working(on_event, f"{task}: what is predicted along them", len(said), "replies") as advance:
        predict(loaded, chat.pack, encoded, lengths, figures, see, batch_size=batch_size, advance=advance)
    return [
        Lesson(prompt=prompt, ids=ids, length=len(reply), taught=taught[row])
        for row, ((prompt, reply), ids) in enumerate(zip(said, encoded, strict=True))
    ]


class Adapter:
    """A LoRA of ``rank`` on ``writers`` of ``loaded``, which its layers become parts of; it begins as nothing.

    Raises:
        UsageError: peft is not installed.
        PlanRefusedError: none of the writers is a linear layer of the model as it is loaded.
    """

    def __init__(self, loaded: LoadedModel, plan: EditPlan, writers: Sequence[Writer], *, rank: int, seed: int) -> None:
        peft = peft_library()
        linear = [writer for writer in writers if type(linear_of(loaded, writer)) is nn.Linear]
        if not linear:
            raise PlanRefusedError(
                f"{loaded.name}: none of its edited writers is a linear layer as transformers loads it",
                "use the edited checkpoint as it is",
            )
        names = {module: name for name, module in loaded.model.named_modules()}
        settings = peft.LoraConfig(
            r=rank, lora_alpha=rank, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
            target_modules=[names[linear_of(loaded, writer)] for writer in linear],
        )  # fmt: skip
        with own_random_numbers(seed), quiet_libraries():
            self.model = peft.get_peft_model(loaded.model, settings)
        self.model.eval()
        self._layers = {writer.tensor.name: linear_of(loaded, writer) for writer in linear}
        bases = {id(edit): orthonormal_basis(edit.read) for edit in plan.distinct_edits}
        self._bases = {name: bases[id(plan.edits[name])] for name in self._layers}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [part for pair in self._pairs.values() for part in pair]

    @property
    def _pairs(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """``A`` and ``B`` of every layer."""
        return {
            name: (layer.get_submodule(f"lora_A.{NAME}").weight, layer.get_submodule(f"lora_B.{NAME}").weight)
            for name, layer in self._layers.items()
        }  # pyright: ignore[reportReturnType]

    @torch.no_grad()
    def project(self) -> None:
        """Take out of every ``B`` what it holds along what the edit of its layer reads, in float64."""
        for name, (_, b) in self._pairs.items():
            b.copy_(project_out(b.T.to(device="cpu", dtype=torch.float64), self._bases[name]).T)

    @torch.no_grad()
    def added(self) -> dict[str, LowRank]:
        """What it adds to each writer; taken out once more, and what that leaves of rounding again."""
        found = {}
        for name, (a, b) in self._pairs.items():
            kept = b.T.to(device="cpu", dtype=torch.float64)
            for _ in range(2):
                kept = project_out(kept, self._bases[name])
            found[name] = LowRank(b=kept.T.contiguous(), a=a.to(device="cpu", dtype=torch.float32, copy=True))
        return found


def peft_library() -> Any:  # noqa: ANN401 - a module
    """PEFT.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise UsageError("healing trains by peft, which is not installed", "pip install 'abliterate[train]'") from error
    return peft


@dataclass(slots=True, kw_only=True)
class Watch:
    """What keeps an adapter orthogonal while it is trained, and the best of it by the validation prompts."""

    adapter: Adapter
    measured: Callable[[], Distances]
    schedule: Schedule
    advance: Callable[[int], None] = lambda _: None
    best: Healed = field(init=False)
    step: int = 0
    looks: int = 0

    def __post_init__(self) -> None:
        loss = self.measured()
        self.best = Healed(added={}, before=loss, after=loss, steps=0, best=0)

    @property
    def ended(self) -> bool:
        """Whether training is to end."""
        return self.step >= self.schedule.most_steps or self.looks >= self.schedule.patience

    @property
    def result(self) -> Healed:
        """The best, and how many steps were taken."""
        return replace(self.best, steps=self.step)

    def stepped(self) -> None:
        """To be called after every step of the optimiser.

        Raises:
            NonFiniteError: the validation loss became NaN or infinite.
        """
        self.adapter.project()
        self.step += 1
        self.advance(1)
        if self.step % self.schedule.checked_every and self.step < self.schedule.most_steps:
            return
        loss = self.measured()
        if not sum(loss) < float("inf"):
            raise NonFiniteError("healing made the model's distributions NaN or infinite", "give a smaller --rate")
        if sum(loss) < sum(self.best.after):
            self.best = replace(self.best, added=self.adapter.added(), after=loss, best=self.step)
            self.looks = 0
        else:
            self.looks += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Classroom:
    """A model that carries an adapter, and what it shall learn; ``rows`` lessons go through it together."""

    loaded: LoadedModel
    chat: ChatFormat
    training: Lessons
    validation: Lessons
    rows: int

    @classmethod
    def of(
        cls, loaded: LoadedModel, chat: ChatFormat, training: Lessons, validation: Lessons, batch: int
    ) -> "Classroom":
        """With as many rows as the free memory holds the gradients of."""
        every = [one for part in (training, validation) for its in part for one in its]
        longest, kept = max(len(its.ids) for its in every), 1 + max(its.length for its in every)
        return cls(
            loaded=loaded, chat=chat, training=training, validation=validation,
            rows=gradient_rows(loaded, batch, longest, kept),
        )  # fmt: skip

    def measured(self) -> Distances:
        """The distances on the validation prompts."""
        with torch.no_grad():
            return Distances(*(float(sum(map(float, self.losses(its, gradients=False)))) for its in self.validation))

    def losses(self, its: Sequence[Lesson], *, gradients: bool = True) -> Iterator[Tensor]:
        """Parts of the mean KL(teacher || model) per token, a few rows at a time."""
        tokens = sum(one.length for one in its)
        for first in range(0, len(its), self.rows):
            part = its[first : first + self.rows]
            for batch in self.chat.pack([one.ids for one in part], len(part)):
                keep = 1 + max(part[row].length for row in batch.rows)
                logits = run_batch(self.loaded, batch, keep=keep, gradients=gradients)
                sums = []
                for place, row in enumerate(batch.rows):
                    its_own = logits[place, -part[row].length - 1 : -1]
                    ours = its_own.to(wide(its_own.dtype)).log_softmax(-1)
                    sums.append(exact_kl_nats(part[row].taught.to(ours), ours).sum())
                yield torch.stack(sums).sum() / tokens


def train(
    room: Classroom, adapter: Adapter, schedule: Schedule, *, seed: int, advance: Callable[[int], None] = lambda _: None
) -> Healed:
    """Train ``adapter`` by KL to the base, and to the edited model where that teaches; the same seed, the same result.

    Raises:
        NonFiniteError: a loss became NaN or infinite.
    """
    generator = torch.Generator().manual_seed(seed)
    watch = Watch(adapter=adapter, measured=room.measured, schedule=schedule, advance=advance)
    optimizer = torch.optim.AdamW(adapter.parameters, lr=schedule.rate, weight_decay=0.0, foreach=False)
    learned = _drawn(room.training.learned, schedule.batch, generator)
    kept = _drawn(room.training.kept, ceil(schedule.batch / 2), generator)
    while not watch.ended:
        optimizer.zero_grad()
        for lessons_of_step in (next(learned), next(kept)):
            for part in room.losses(lessons_of_step):
                part.backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters, 1.0)
        optimizer.step()
        watch.stepped()
    return watch.result


def _drawn(its: Sequence[Lesson], count: int, generator: torch.Generator) -> Iterator[list[Lesson]]:
    """``count`` of ``its`` at a time, all of them before one comes again; none where there are none."""
    order: list[int] = []
    while True:
        while its and len(order) < count:
            order += torch.randperm(len(its), generator=generator).tolist()
        yield [its[place] for place in order[:count]]
        order = order[count:]
