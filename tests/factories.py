"""Tiny random models of every registered family, saved by transformers so that the names on disk are the real ones."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch import nn

from abliterate.checkpoint import direction_file as directions
from abliterate.method.directions import DirectionSet, given
from tests.qwen1 import QWenLMHeadModel
from tests.zoo import BUILDERS, CLASS_C


def build(name: str, *, seed: int = 0, tied: bool = False) -> nn.Module:
    """A random model whose gains are far from 1 and whose biases are not 0, in float64; ``tied`` ties its head."""
    with without_bars():
        model = {**BUILDERS, **CLASS_C}[name]()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in parameter_name or ".ln_" in parameter_name:
                centre = float(p.float().mean().abs() > 0.5)
                p.copy_(centre + 0.3 * noise)
            elif p.ndim == 1:
                p.copy_(0.2 * noise)
            elif "embed" in parameter_name or "wte" in parameter_name:
                p.copy_(0.25 * noise)
            else:
                p.copy_(noise / math.sqrt(min(p.shape)))
    if tied:
        for config in (model.config, getattr(model.config, "text_config", model.config)):
            config.tie_word_embeddings = True
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return cast(model, torch.float64).eval()


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """All real parameters and buffers to ``dtype``; complex tables of rotations stay as they are."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


def save(model: nn.Module, folder: Path, *, dtype: torch.dtype | None = torch.float64, shard: str = "250KB") -> Path:
    """Save with transformers: several shards, real names; ``dtype`` None keeps that of the model."""
    with without_bars():
        (cast(model, dtype) if dtype else model).save_pretrained(folder, max_shard_size=shard)
    return folder


def load(folder: Path, *, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Load with transformers, in ``dtype``."""
    config = json.loads((folder / "config.json").read_text())
    auto = transformers.AutoModelForCausalLM
    if config["model_type"] == "qwen":
        auto = QWenLMHeadModel
    elif "vision_config" in config:
        auto = transformers.AutoModelForImageTextToText
    with without_bars():
        model = auto.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    return with_eager_experts(model)


def with_eager_experts(model: nn.Module) -> nn.Module:
    """The default kernel of experts has no float64."""
    if hasattr(model, "set_experts_implementation") and "expert" in str(model.config):
        model.set_experts_implementation("eager")
    return model


@contextmanager
def without_bars() -> Iterator[None]:
    transformers.logging.disable_progress_bar()
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


@contextmanager
def really_float64() -> Iterator[None]:
    """Norms and softmaxes of transformers cast to float32 by name: let that name mean float64 for a while."""
    names = ("float32", "float")
    before = {name: getattr(torch, name) for name in names}
    cast = torch.Tensor.float
    for name in names:
        setattr(torch, name, torch.float64)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(torch, name, value)
        torch.Tensor.float = cast  # type: ignore[method-assign]
        torch.set_default_dtype(default)


def token_ids(*, batch: int = 3, length: int = 9, seed: int = 1) -> torch.Tensor:
    """Random ids, none of them special."""
    return torch.randint(3, 80, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_directions(d: int, k: int = 1, *, seed: int = 7) -> torch.Tensor:
    """Random directions of any length."""
    return torch.randn(d, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def save_direction(d: int, path: Path) -> Path:
    """A direction file as ``select`` writes it, with a random direction."""
    vector = torch.randn(d, generator=torch.Generator().manual_seed(7))
    return directions.save(given(vector), path)


def given_direction(path: Path) -> DirectionSet:
    """The direction in a file, whoever wrote it."""
    return directions.load(path)


def vectors_of(made: DirectionSet) -> torch.Tensor:
    """The vectors of all candidates, ``[candidates, d]``."""
    return torch.stack([one.vector for one in made.candidates])
