"""One model on all processes of a machine: tensor parallelism, as transformers has it.

Each process holds a part of most matrices, and all run the same passes at the same time.  What enters and leaves a
block is whole on each of them, so hooks see what they see of one process, but for the rounding of sums.
"""

from typing import Any

import torch

from abliterate.arch.packed import quantisation
from abliterate.checkpoint.source import Checkpoint
from abliterate.errors import UsageError
from abliterate.model.ranks import here, on_this_machine

START = "torchrun --nproc-per-node N -m abliterate run MODEL --tensor-parallel"


def check_parallel(checkpoint: Checkpoint, place: torch.device) -> None:
    """Check that ``checkpoint`` can be held by the processes that there are, on ``place``.

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
    if place.type != "cuda" and torch.accelerator.is_available():
        raise UsageError(f"--tensor-parallel: on {place.type}, beside cards", "leave --device out")


def load_parallel(checkpoint: Checkpoint, auto_class: Any, dtype: torch.dtype | str, **options: Any) -> Any:  # noqa: ANN401
    """The model, of which this process holds its part.

    Raises:
        UsageError: transformers cannot divide such a model.
    """
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
