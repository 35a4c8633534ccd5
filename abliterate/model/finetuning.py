"""Supervised fine-tuning of a model that is held in memory, by TRL, of low-rank matrices by PEFT (LoRA).

What was learned is given as what is added to stored tensors, so that a checkpoint keeps its layout and everything else
of it its bytes.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from abliterate.arch.packed import Packed
from abliterate.arch.registry import family_of
from abliterate.checkpoint.source import Checkpoint
from abliterate.errors import NonFiniteError, UnsupportedFormatError, UsageError
from abliterate.model.load import LoadedModel, attach
from abliterate.model.room import check_held, free_bytes, gradient_rows, out_of_memory_is
from abliterate.model.stored import stored_tensors
from abliterate.model.targets import Example
from abliterate.model.training_libraries import own_random_numbers, quiet_libraries
from abliterate.model.weights import conversions_of

LIBRARIES = ("peft", "trl", "datasets")
STATE_BYTES = 16
"""Of a trained number: itself, its gradient and two moments of the optimiser, in float32."""
IGNORED = -100
"""The label of a token that carries no loss, as transformers has it."""
NO_ROOM = "give a smaller --train-batch or --rank, a smaller model, or a machine with more memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """``steps`` of AdamW with ``batch`` examples each, at a peak learning rate ``rate`` that falls as a cosine.

    ``batch`` is even.  ``rank`` is that of the matrices that are trained.
    """

    steps: int
    batch: int
    rank: int
    rate: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapted:
    """A model with low-rank matrices beside its weights, which alone are trained.

    ``loaded`` is the model with them, its sites found anew: a hook at a writer sees what they add.  ``stored`` names
    the tensor behind each module that has some.
    """

    loaded: LoadedModel
    peft: Any
    stored: Mapping[str, str]

    @property
    def trained_numbers(self) -> int:
        """How many numbers are trained."""
        return sum(its.numel() for its in self.peft.parameters() if its.requires_grad)

    def added(self) -> dict[str, Tensor]:
        """What was learned: what is added to each stored tensor, in float32, on the host.

        Raises:
            NonFiniteError: some of it is NaN or infinite.
        """
        model = self.loaded.model
        found = {}
        with torch.no_grad():
            for module, name in self.stored.items():
                found[name] = model.get_submodule(module).get_delta_weight("default").float().cpu().contiguous()
        broken = [name for name, its in found.items() if not its.isfinite().all()]
        if broken:
            raise NonFiniteError(f"training made {broken[0]!r} NaN or infinite", "give a smaller --rate")
        return found


def check_train_installed() -> None:
    """Check that the libraries are there that train.

    Raises:
        UsageError: they are not.
    """
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"training needs {' and '.join(missing)}, not installed here", "pip install 'abliterate[train]'"
        )


def check_trainable(loaded: LoadedModel, checkpoint: Checkpoint) -> None:
    """Check that the weights of ``loaded`` are held in memory, and stored as what can be added to.

    Raises:
        UsageError: they pass through memory, and gradients cannot flow.
        UnsupportedFormatError: they are quantised.
    """
    check_held(loaded, "training takes", "give it more --memory or --device-memory, or a smaller model")
    if any(isinstance(tensor, Packed) for tensor in stored_tensors(checkpoint).values()):
        raise UnsupportedFormatError(
            f"{checkpoint.name}: its weights are quantised, and what is learned cannot be added to them",
            "write it as bfloat16 first: abliterate dequantize MODEL --out FOLDER",
        )


def adapted(loaded: LoadedModel, checkpoint: Checkpoint, *, rank: int, seed: int) -> Adapted:
    """``loaded`` with matrices of ``rank`` beside every linear layer of its blocks that is stored as it is run.

    Fused experts, embeddings and the head are left as they are.  The model itself is changed.

    Raises:
        UnsupportedFormatError: there is no such layer.
    """
    from peft import LoraConfig, get_peft_model

    model = loaded.model
    stored = _linear_layers(loaded, checkpoint)
    if not stored:
        raise UnsupportedFormatError(
            f"{checkpoint.name}: none of its blocks has a linear layer that is stored as it is run",
            "train it elsewhere, and audit the result",
        )
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=sorted(stored))
    with own_random_numbers(seed), quiet_libraries():
        made = get_peft_model(model, config)
    family = family_of(checkpoint.config, where=checkpoint.name)
    return Adapted(loaded=attach(model, loaded.tokenizer, family, name=loaded.name), peft=made, stored=stored)


def _linear_layers(loaded: LoadedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """The linear layers in the blocks of a model, with the stored tensor that each has as its weight."""
    plain = {
        one.targets[0]: one.sources[0][1].name
        for one in conversions_of(loaded.model, stored_tensors(checkpoint))
        if one.transform is None
    }
    inside = {id(module) for block in loaded.blocks for module in block.modules()}
    return {
        name: plain[f"{name}.weight"]
        for name, module in loaded.model.named_modules()
        if type(module) is nn.Linear and id(module) in inside and f"{name}.weight" in plain
    }


def finetune(
    model: Adapted,
    examples: Sequence[tuple[Example, Example]],
    options: Tuning,
    *,
    around: Callable[[int], AbstractContextManager[None]],
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[float, ...]:
    """Train ``model`` on the replies of pairs of examples; gives the loss in nats per token, some ten times on the way.

    The first examples of all pairs are the first half of a batch, their second ones the second half; both halves weigh
    the same, however long their replies.
    ``around(step)`` is the context in which a step is taken, its forward and its backward pass.  The same seed gives
    the same numbers on the same machine.

    Raises:
        UsageError: memory does not suffice.
        NonFiniteError: the loss is NaN or infinite.
    """
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl.trainer.sft_trainer import SFTTrainer

    loaded = model.loaded
    pairs = _pairs(model, examples, options)
    pad_id = loaded.tokenizer.pad_token_id if loaded.tokenizer.pad_token_id is not None else 0
    with (
        tempfile.TemporaryDirectory() as folder,
        ExitStack() as contexts,
        own_random_numbers(options.seed),
        quiet_libraries(),
    ):
        trainer = SFTTrainer(
            model=model.peft,
            args=_settings(loaded, options, pairs, folder),
            train_dataset=Dataset.from_list([{"pair": [asdict(its) for its in pair]} for pair in examples]),
            processing_class=loaded.tokenizer,
            data_collator=lambda its: _collated(its, pad_id),
            compute_loss_func=_loss(passes=options.batch // 2 // pairs),
            callbacks=[_steps(around, contexts, advance)],
        )
        trainer.remove_callback(PrinterCallback)  # results are printed by commands alone
        with out_of_memory_is(UsageError(f"training {loaded.name} ran out of memory", NO_ROOM)):
            trainer.train()
    model.peft.eval()
    losses = tuple(float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    if not torch.tensor(losses).isfinite().all():
        raise NonFiniteError("the loss of training is NaN or infinite", "give a smaller --rate, or --dtype float32")
    return losses


def _pairs(model: Adapted, examples: Sequence[tuple[Example, Example]], options: Tuning) -> int:
    """Pairs of a pass, a divisor of those of a batch; the rest of it is accumulated.

    Raises:
        UsageError: there is no memory for what is trained.
    """
    loaded = model.loaded
    needed, free = STATE_BYTES * model.trained_numbers, free_bytes(loaded.device)
    free = free if loaded.room_bytes is None else min(free, loaded.room_bytes)
    if needed > free:
        raise UsageError(
            f"training {loaded.name} takes {needed / 2**30:,.2f} GiB beside its weights, and there are "
            f"{free / 2**30:,.2f}",
            NO_ROOM,
        )
    longest = max(len(its.ids) for pair in examples for its in pair)
    most = max(1, gradient_rows(loaded, options.batch, longest, longest) // 2)
    return next(pairs for pairs in range(most, 0, -1) if options.batch // 2 % pairs == 0)


def _settings(loaded: LoadedModel, options: Tuning, pairs: int, folder: str) -> Any:  # noqa: ANN401 - of TRL
    from trl.trainer.sft_config import SFTConfig

    settings = SFTConfig(
        output_dir=folder,
        max_steps=options.steps,
        per_device_train_batch_size=pairs,
        gradient_accumulation_steps=options.batch // 2 // pairs,
        gradient_checkpointing=False,
        learning_rate=options.rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(20, options.steps // 10),
        weight_decay=0.0,
        seed=options.seed,
        use_cpu=loaded.device.type == "cpu",
        bf16=False,
        fp16=False,
        report_to=[],
        save_strategy="no",
        logging_steps=max(1, options.steps // 10),
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=loaded.device.type == "cuda",
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    if settings.n_gpu > 1:
        settings._n_gpu = 1  # replicas have no hooks; transformers offers no other way
    return settings


def _collated(pairs: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """A batch padded on the right, where no causal model sees it; only replies carry loss."""
    rows = [its["pair"][half] for half in (0, 1) for its in pairs]
    width = max(len(row["ids"]) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for place, row in enumerate(rows):
        its = torch.tensor(row["ids"])
        ids[place, : len(its)] = its
        mask[place, : len(its)] = 1
        labels[place, len(its) - row["length"] : len(its)] = its[-row["length"] :]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _loss(passes: int) -> Callable[..., Tensor]:
    """The mean of both halves of a batch, each its cross-entropy per token, over the ``passes`` of a step.

    Over all tokens together, long replies in one half would leave next to nothing of the other.
    """

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:  # noqa: ANN401, ARG001
        halves = zip(outputs.logits[:, :-1].chunk(2), labels[:, 1:].chunk(2), strict=True)
        each = [
            cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)
            for logits, targets in halves
        ]
        return torch.stack(each).mean() / passes

    return loss


def _steps(
    around: Callable[[int], AbstractContextManager[None]], contexts: ExitStack, advance: Callable[[int], None]
) -> Any:  # noqa: ANN401 - of transformers
    """Enters the context of each step when it begins, and leaves it when it ends."""
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401, ARG002
            contexts.enter_context(around(state.global_step))

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401, ARG002
            contexts.close()
            advance(1)

    return Steps()
