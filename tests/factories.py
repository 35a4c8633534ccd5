"""Tiny random models of every registered family, saved by transformers so that the names on disk are the real ones."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from tests.qwen1 import QWenConfig, QWenLMHeadModel

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _text(config: str, model: str, **changes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return getattr(transformers, model)(getattr(transformers, config)(**{**SIZES, **changes}))

    return build


def _gemma3_vision() -> nn.Module:
    text = {**SIZES, "sliding_window": 8, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 4,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4,
        image_token_index=90, boi_token_index=91, eoi_token_index=92,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "llama": _text("LlamaConfig", "LlamaForCausalLM"),
    "llama-biases": _text("LlamaConfig", "LlamaForCausalLM", attention_bias=True, mlp_bias=True),
    "llama-tied": _text("LlamaConfig", "LlamaForCausalLM", tie_word_embeddings=True),
    # heads * head_dim == hidden_size: a square o_proj, where a wrong axis passes every shape check
    "llama-square": _text("LlamaConfig", "LlamaForCausalLM", head_dim=12, intermediate_size=48),
    "mistral": _text("MistralConfig", "MistralForCausalLM"),
    "qwen": lambda: QWenLMHeadModel(QWenConfig()),
    "qwen2": _text("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen2-tied": _text("Qwen2Config", "Qwen2ForCausalLM", tie_word_embeddings=True),
    "qwen3": _text("Qwen3Config", "Qwen3ForCausalLM", attention_bias=True),
    "qwen3-tied": _text("Qwen3Config", "Qwen3ForCausalLM", tie_word_embeddings=True),
    "qwen2-moe": _text(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        mlp_only_layers=[1],
    ),
    "qwen3-moe": _text(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        mlp_only_layers=[0],
    ),
    "mixtral": _text("MixtralConfig", "MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2),
    "qwen3-next": _text(
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    "gemma": _text("GemmaConfig", "GemmaForCausalLM"),
    "gemma2": _text("Gemma2Config", "Gemma2ForCausalLM", query_pre_attn_scalar=16, sliding_window=8),
    "gemma3-text": _text("Gemma3TextConfig", "Gemma3ForCausalLM", sliding_window=8),
    "gemma3-vision": _gemma3_vision,
}
EXACT = tuple(name for name in BUILDERS if not name.startswith(("gemma2", "gemma3")))
R_FREE = tuple(name for name in BUILDERS if name not in EXACT)
ROUTED = tuple(name for name in BUILDERS if "moe" in name or name in ("mixtral", "qwen3-next"))
TIED = tuple(name for name in BUILDERS if "tied" in name or name.startswith("gemma"))


def build(name: str, *, seed: int = 0) -> nn.Module:
    """A random model whose gains are far from 1 and whose biases are not 0, in float64."""
    with without_bars():
        model = BUILDERS[name]()
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
    return model.to(torch.float64).eval()


def save(model: nn.Module, folder: Path, *, dtype: torch.dtype = torch.float64, shard: str = "60KB") -> Path:
    """Save with transformers: several shards, real names."""
    with without_bars():
        model.to(dtype).save_pretrained(folder, max_shard_size=shard)
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
    if hasattr(model, "set_experts_implementation") and "expert" in str(config):
        model.set_experts_implementation("eager")  # the default kernel has no float64
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
