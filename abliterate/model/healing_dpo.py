"""Healing by preferences: DPO (Rafailov et al. 2023, arXiv:2305.18290) as trl has it, the edited model its reference.

Of every harmless prompt the base's reply is preferred to the edited model's; where both reply the same there is nothing
to prefer.  After every step of the optimiser the adapter is projected, and the same validation prompts as for training
by KL say which step is kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

from abliterate.errors import PlanRefusedError, UsageError
from abliterate.events import OnEvent, ignore
from abliterate.model.chat import ChatFormat
from abliterate.model.healing import (
    Adapter,
    Classroom,
    Distances,
    Healed,
    Lesson,
    Schedule,
    Watch,
    peft_library,
)
from abliterate.model.load import LoadedModel
from abliterate.model.replying import generate_tokens
from abliterate.model.training_libraries import own_random_numbers, quiet_libraries

BETA = 0.1
"""Weight of the reference, as published."""
RATE = 1 / 3
"""Of the rate that the schedule has for KL: a preference pulls harder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two replies to a prompt: the base's is ``chosen``, the edited model's ``rejected``."""

    prompt: str
    chosen: str
    rejected: str


def trl_library() -> Any:  # noqa: ANN401 - a module
    """trl, which trains with peft.

    Raises:
        UsageError: one of them is not installed.
    """
    peft_library()
    try:
        import datasets  # noqa: F401 - trl takes its data from it
        import trl
    except ImportError as error:
        raise UsageError(
            "healing by preferences trains by trl, which is not installed", "pip install 'abliterate[train]'"
        ) from error
    return trl


def pairs_of(
    loaded: LoadedModel,
    chat: ChatFormat,
    training: Sequence[Lesson],
    *,
    max_new_tokens: int,
    batch_size: int,
    on_event: OnEvent = ignore,
) -> list[Pair]:
    """The pairs of all prompts to which the edited model, which is ``loaded``, replies otherwise than the base.

    Raises:
        PlanRefusedError: there are none.
    """
    prompts = [one.prompt for one in training]
    replies = generate_tokens(
        loaded, chat, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size,
        task="replies of the edited model", on_event=on_event,
    )  # fmt: skip
    pairs = [
        Pair(prompt=one.prompt, chosen=chat.text(one.ids[-one.length :]), rejected=chat.text(reply))
        for one, reply in zip(training, replies, strict=True)
    ]
    found = [pair for pair in pairs if pair.chosen != pair.rejected]
    if not found:
        raise PlanRefusedError(
            f"{loaded.name}: replies as its base does to all {len(pairs)} training prompts: there is nothing to prefer",
            "heal with --method kl, or give other prompts by --harmless",
        )
    return found


def train_by_preference(
    room: Classroom,
    adapter: Adapter,
    pairs: Sequence[Pair],
    schedule: Schedule,
    *,
    seed: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Healed:
    """Train ``adapter`` on ``pairs``; the same seed gives the same result.

    Raises:
        NonFiniteError: the model's distributions became NaN or infinite.
    """
    trl = trl_library()
    from datasets import Dataset, disable_progress_bars
    from transformers import PrinterCallback, TrainerCallback

    def measured() -> Distances:
        adapter.model.eval()
        return room.measured()

    watch = Watch(adapter=adapter, measured=measured, schedule=schedule, advance=advance)

    class Projecting(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401, ARG002
            watch.stepped()
            adapter.model.train()
            control.should_training_stop = watch.ended

    chat = room.chat
    system = [] if chat.system is None else [{"role": "system", "content": chat.system}]
    rows = [
        {
            "prompt": [*system, {"role": "user", "content": pair.prompt}],
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
            **({"chat_template_kwargs": chat.options} if chat.options else {}),
        }
        for pair in pairs
    ]
    each = max(1, min(room.rows // 2, schedule.batch))
    with TemporaryDirectory() as folder, own_random_numbers(seed), quiet_libraries():
        settings = trl.DPOConfig(
            output_dir=folder, beta=BETA, learning_rate=RATE * schedule.rate, lr_scheduler_type="constant",
            max_steps=schedule.most_steps, per_device_train_batch_size=each,
            gradient_accumulation_steps=-(-schedule.batch // each), optim="adamw_torch", weight_decay=0.0,
            max_grad_norm=1.0, max_length=None, gradient_checkpointing=False, bf16=False, seed=seed,
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=room.loaded.device.type == "cpu", dataloader_pin_memory=False,
        )  # fmt: skip
        disable_progress_bars()
        trainer = trl.DPOTrainer(
            model=adapter.model, args=settings, train_dataset=Dataset.from_list(rows),
            processing_class=chat.tokenizer, callbacks=[Projecting()],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    adapter.model.eval()
    return watch.result
