"""What llama.cpp calls our model types, and where its converter keeps the weights that we edit as they are.

Architectures by what the converter registers for the class of each model type (``conversion/`` of llama.cpp, read in
November 2026); their names, and those of their tensors, are the ``gguf`` library's own.  Of the converter two facts
matter here.  It puts the rows of queries and keys of Llama and its kin in another order; nothing that is edited reads
or writes those rows, so no edit has to be permuted.  And it changes what some families write to the stream, by
multipliers or by the order of columns (``changed``).
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

from abliterate.arch.model_map import Writer

ARCHITECTURES: Mapping[str, str] = {
    "Yi": "llama", "afmoe": "afmoe", "arcee": "arcee", "bamba": "granitehybrid", "cohere": "command-r",
    "cohere2": "cohere2", "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2", "dots1": "dots1",
    "ernie4_5": "ernie4_5", "ernie4_5_moe": "ernie4_5-moe", "exaone4": "exaone4", "falcon_h1": "falcon-h1",
    "gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3", "gemma3_text": "gemma3", "gemma3n": "gemma3n",
    "gemma3n_text": "gemma3n", "gemma4": "gemma4", "gemma4_text": "gemma4", "glm": "chatglm", "glm4": "glm4",
    "glm4_moe": "glm4moe", "glm4_moe_lite": "deepseek2", "glm4v": "glm4", "gpt2": "gpt2", "gpt_neox": "gptneox",
    "gpt_oss": "gpt-oss", "granite": "granite", "granitemoe": "granitemoe", "granitemoehybrid": "granitehybrid",
    "hunyuan_v1_dense": "hunyuan-dense", "jamba": "jamba", "kimi_k2": "deepseek2", "kimi_linear": "kimi-linear",
    "lfm2": "lfm2", "lfm2_moe": "lfm2moe", "llama": "llama", "llama4": "llama4", "llama4_text": "llama4",
    "mamba2": "mamba2", "minimax_m2": "minimax-m2", "ministral3": "mistral3", "mistral": "llama",
    "mistral3": "mistral3", "mixtral": "llama", "nemotron_h": "nemotron_h", "olmo": "olmo", "olmo2": "olmo2",
    "olmo3": "olmo2", "olmoe": "olmoe", "phi": "phi2", "phi3": "phi3", "phimoe": "phimoe", "qwen": "qwen",
    "qwen2": "qwen2", "qwen2_5_vl": "qwen2vl", "qwen2_moe": "qwen2moe", "qwen2_vl": "qwen2vl", "qwen3": "qwen3",
    "qwen3_5": "qwen35", "qwen3_5_moe": "qwen35moe", "qwen3_5_moe_text": "qwen35moe", "qwen3_5_text": "qwen35",
    "qwen3_moe": "qwen3moe", "qwen3_next": "qwen3next", "qwen3_vl": "qwen3vl", "qwen3_vl_moe": "qwen3vlmoe",
    "seed_oss": "seed_oss", "smollm3": "smollm3", "stablelm": "stablelm", "starcoder2": "starcoder2",
}  # fmt: skip
"""Model types that have no architecture there are not in it: Helium, Ministral, OPT, VaultGemma, Cohere 2 MoE."""

BY_CONFIG = ("bamba", "granitemoehybrid", "nemotron_h")
"""The converter names these after their blocks: all attention, or with experts, is another architecture."""

LINEAR_ATTENTION = ("qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text")
"""It puts the heads of their linear attention, and so the columns of its output, in another order."""


@runtime_checkable
class Names(Protocol):
    """A ``gguf.TensorNameMap``."""

    def get_name(self, key: str, try_suffixes: tuple[str, ...] = ()) -> str | None:
        """What llama.cpp calls a tensor of a checkpoint; None for what it does not know."""
        ...


def tensor_names(architecture: str, n_blocks: int) -> Names | None:
    """The names of tensors of an architecture; None where this ``gguf`` library does not know it."""
    library: Any = import_module("gguf")
    number = next((key for key, name in library.MODEL_ARCH_NAMES.items() if name == architecture), None)
    return None if number is None else library.get_tensor_name_map(number, n_blocks)


def plain_name(name: str) -> str:
    """The name of a tensor of a text model inside of a larger one, as the converter asks for it."""
    return name.replace("language_model.", "", 1)


def changed(model_type: str, writer: Writer) -> str:
    """How the converter changes the values of ``writer``, so that its edit is another one there; empty where not."""
    if model_type == "falcon_h1":
        return "llama.cpp's converter multiplies it"
    if model_type in LINEAR_ATTENTION and ".linear_attn." in writer.name:
        return "llama.cpp's converter puts its columns in another order"
    return ""
