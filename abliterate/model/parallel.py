"""One model on all processes of a machine: tensor parallelism, as transformers has it.

Each process holds a part of most matrices, and all run the same passes at the same time.  What enters and leaves a
block is whole on each of them, so hooks see what they see of one process, but for the rounding of sums.
"""

from typing import Any

import torch

from abliterate.arch.packed import quantisation, text_config
from abliterate.checkpoint.source import Checkpoint
from abliterate.errors import UsageError
from abliterate.model.devices import Device, resolve_device
from abliterate.model.ranks import here, on_this_machine

START = "torchrun --nproc-per-node N -m abliterate run MODEL --tensor-parallel"


def check_parallel(checkpoint: Checkpoint, device: Device) -> None:
    """Check that ``checkpoint`` can be held by the processes that there are, on ``device``; only its headers are read.

    Raises:
        UsageError: it cannot.
    """
    ranks = here()
    if ranks is None or not ranks.one_model:
        raise UsageError("--tensor-parallel: one process holds the whole model", f"start several: {START}")
    if on_this_machine()[1] != ranks.count:
        raise UsageError(
            f"--tensor-parallel: {ranks.count} processes, of which {on_this_machine()[1]} are on this machine",
            "start all of them on one, or leave it out: each process then holds a model",
        )
    if quantisation(checkpoint.config) is not None:
        raise UsageError(
            f"{checkpoint.name}: is quantised, and --tensor-parallel is for plain weights",
            "leave it out, or write it as bfloat16 first: abliterate dequantize MODEL --out FOLDER",
        )
    config = text_config(checkpoint.config)
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = config.get(name)
        if isinstance(heads, int) and heads % ranks.count:
            raise UsageError(
                f"{checkpoint.name}: its {heads} heads ({name}) cannot be divided among {ranks.count} processes",
                "start as many as divide them",
            )
    _check_devices(device, ranks.count)


def _check_devices(device: Device, count: int) -> None:
    """Check that each of ``count`` processes has a card, or that all compute on a host without cards.

    Raises:
        UsageError: neither.
    """
    place = resolve_device(device)
    if place.type == "cuda":
        if device not in ("auto", "cuda"):
            raise UsageError(f"--device {device}: with --tensor-parallel each process takes its own", "leave it out")
        if torch.cuda.device_count() < count:
            raise UsageError(
                f"--tensor-parallel: {count} processes, and {torch.cuda.device_count()} cards",
                "start one for each card",
            )
    elif torch.accelerator.is_available():
        raise UsageError(
            f"--tensor-parallel: transformers divides a model among cards where there are any, not on {place.type}",
            "leave out --device, or, on a Mac, --tensor-parallel",
        )


def load_parallel(
    checkpoint: Checkpoint,
    device: Device,
    auto_class: Any,  # noqa: ANN401
    dtype: torch.dtype | str,
    **options: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """The model, of which this process holds its part.

    Raises:
        UsageError: these processes cannot hold it, or transformers cannot divide such a model.
    """
    check_parallel(checkpoint, device)
    from torch.distributed.tensor import DTensor

    try:
        from transformers.distributed.configuration_utils import DistributedConfig

        config = DistributedConfig(tp_plan="auto", tp_size=on_this_machine()[1])
    except (ImportError, TypeError) as error:
        raise UsageError(
            "--tensor-parallel: this version of transformers does not know it", "pip install -U transformers"
        ) from error
    model = auto_class.from_pretrained(
        checkpoint.folder, dtype=dtype, distributed_config=config, use_safetensors=True, **options
    )
    if not any(isinstance(its, DTensor) for its in model.parameters()):
        raise UsageError(
            f"{checkpoint.name}: transformers has no plan for dividing this model among processes",
            "leave out --tensor-parallel: each process then holds a model",
        )
    return model
