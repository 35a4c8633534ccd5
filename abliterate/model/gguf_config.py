"""The configuration of a GGUF file: what transformers reads of it, and what it leaves at the defaults of a class.

A default that is wrong changes what the model computes and raises nothing.  So every key that the file states about its
architecture is either read by transformers, or taken over or compared here, or refused, or named.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from abliterate.checkpoint.gguf import ROPE_FACTORS, GgufFile
from abliterate.errors import UnsupportedFormatError

ATTRIBUTES = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "vocab_size": "vocab_size",
}
"""Keys that transformers 5.23 leaves out for some architectures, and the names they have in a configuration."""

SCALING = "rope.scaling."
SCALING_NAMES = {"factor": "factor", "original_context_length": "original_max_position_embeddings"}
SCALING_IGNORED = ("type", "finetuned")

COMPUTES = re.compile(r"^(rope|attention|ssm|expert)[._]|scale|softcap|norm|parallel|bias")
"""Keys that say how the model computes: what is not understood of these is refused."""

LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
"""Their largest model, told by its layers as llama.cpp does it, scales queries by another width than that of a head."""

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What all released models with rotations of this kind have; the factor differs."""


def complete_config(config: Any, file: GgufFile) -> tuple[str, ...]:  # noqa: ANN401 - a configuration of transformers
    """Give ``config`` what ``file`` states and transformers leaves out; gives back what nothing was made of.

    Raises:
        UnsupportedFormatError: the file states something about the computation that is not understood.
    """
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS

    _shorten(config)
    if file.architecture in GGUF_CONFIG_ARCHS:
        return ()  # these functions read all there is, or raise
    model_type = transformers_name(file.architecture)
    read = {key for key, name in GGUF_CONFIG_MAPPING[model_type].items() if name is not None}
    stated = {key: value for key, value in _about_model(file).items() if key not in read}
    if model_type in LAYERS_OF_27B:
        largest = config.num_hidden_layers == LAYERS_OF_27B[model_type]
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if largest else _head(config)
    _set_attributes(config, stated)
    left = [key for key, value in stated.items() if not _agrees(config, key, value)]
    _set_rope(config, file, {key: stated[key] for key in left if key.startswith("rope.")})
    left = [key for key in left if not key.startswith("rope.")]
    for key in left:
        if COMPUTES.search(key):
            raise _refusal(file, key, stated[key])
    return tuple(f"its {key} = {_short(stated[key])} was not taken over" for key in left)


def transformers_name(architecture: str) -> str:
    """What transformers calls an architecture of llama.cpp."""
    known = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss", "minimax-m2": "minimax_m2"}
    return known.get(architecture, architecture)


def readable_architectures() -> tuple[str, ...]:
    """The architectures of GGUF files, by llama.cpp's names, that transformers reads as language models."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS

    other = {"general", "tokenizer", "t5", "t5encoder", "umt5"}
    its_own = {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss", "minimax_m2": "minimax-m2"}
    names = {*GGUF_CONFIG_MAPPING, *GGUF_CONFIG_ARCHS} - other
    return tuple(sorted(its_own.get(name, name) for name in names))


def _about_model(file: GgufFile) -> dict[str, Any]:
    prefix = f"{file.architecture}."
    return {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}


def _refusal(file: GgufFile, key: str, value: Any) -> UnsupportedFormatError:  # noqa: ANN401 - whatever a header says
    return UnsupportedFormatError(
        f"{file.path}: states {file.architecture}.{key} = {_short(value)}, which cannot be taken over",
        "the model would compute something else: start from its safetensors checkpoint",
    )


def _short(value: Any) -> str:  # noqa: ANN401 - whatever a header says
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


def _head(config: Any) -> int:  # noqa: ANN401 - a configuration
    return int(config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads)


def _set_attributes(config: Any, stated: Mapping[str, Any]) -> None:  # noqa: ANN401 - a configuration
    has = config.to_dict()
    for key, name in ATTRIBUTES.items():
        if key in stated and name in has:
            setattr(config, name, _short_float(stated[key]) if key.endswith("_epsilon") else stated[key])
    rope = config.to_dict().get("rope_parameters") or {}
    if "rope.freq_base" in stated and "rope_theta" in rope:
        config.rope_parameters["rope_theta"] = stated["rope.freq_base"]
    if "rope.freq_base_swa" in stated and "sliding_attention" in rope:
        config.rope_parameters["sliding_attention"]["rope_theta"] = stated["rope.freq_base_swa"]


def _shorten(config: Any) -> None:  # noqa: ANN401 - a configuration
    """Have constants of norms as the decimals that they were before a header held them as float32."""
    for name, value in config.to_dict().items():
        if name.endswith(("_eps", "_epsilon")):
            setattr(config, name, _short_float(value))


def _short_float(value: Any) -> Any:  # noqa: ANN401 - whatever a header says
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _agrees(config: Any, key: str, value: Any) -> bool:  # noqa: ANN401 - a configuration
    """Whether ``config`` says the same, or the key says nothing."""
    has = config.to_dict()
    rope = has.get("rope_parameters") or {}
    its = rope.get("full_attention", rope)
    if key in ATTRIBUTES and ATTRIBUTES[key] in has:
        return True  # it was set
    if key in ("attention.key_length", "attention.value_length"):
        return value == _head(config)
    if key == "rope.dimension_count":
        return value == int(_head(config) * its.get("partial_rotary_factor", has.get("partial_rotary_factor") or 1.0))
    if key == "rope.freq_base":
        return its.get("rope_theta") == value
    if key == "rope.freq_base_swa":
        return "sliding_attention" in rope and rope["sliding_attention"]["rope_theta"] == value
    if key == "attention.sliding_window_pattern":
        return _pattern(value, config.num_hidden_layers) == has.get("layer_types")
    return (key, value) in {("attention.causal", True), ("expert_count", 0), ("expert_used_count", 0)}


def _pattern(value: Any, layers: int) -> list[str]:  # noqa: ANN401 - a number or a list
    slides = [bool((layer + 1) % value) for layer in range(layers)] if isinstance(value, int) else map(bool, value)
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


def _set_rope(config: Any, file: GgufFile, left: Mapping[str, Any]) -> None:  # noqa: ANN401 - a configuration
    """Take over how rotations are scaled.

    Raises:
        UnsupportedFormatError: they are in a way that is not known.
    """
    kind = left.get(f"{SCALING}type", "none")
    factors = file.numbers(ROPE_FACTORS)
    for key, value in left.items():
        name = key.removeprefix(SCALING)
        known = key.startswith(SCALING) and (name in SCALING_NAMES or name in SCALING_IGNORED)
        if not known and not (name == "attn_factor" and value == 1.0):
            raise _refusal(file, key, value)
    scaled: dict[str, Any] = {}
    if kind in ("linear", "yarn"):
        scaled = {ours: left[SCALING + name] for name, ours in SCALING_NAMES.items() if SCALING + name in left}
        scaled = {"rope_type": kind, **(scaled if kind == "yarn" else {"factor": scaled.get("factor", 1.0)})}
    elif kind != "none":
        raise _refusal(file, f"{SCALING}type", kind)
    if any(factor != 1.0 for factor in factors):
        scaled = _llama3(config, factors)
        if not scaled or kind != "none":
            raise _refusal(file, ROPE_FACTORS, factors)
    if scaled:
        rope = config.rope_parameters
        rope.get("full_attention", rope).update(scaled)


def _llama3(config: Any, factors: Sequence[float]) -> dict[str, Any]:  # noqa: ANN401 - a configuration
    """The scaling of Llama 3.1 that gives ``factors``; empty where none does.

    With ``n = original_max_position_embeddings``, a wavelength ``w`` is kept below ``n / high``, divided by ``factor``
    above ``n / low``, and between by ``1 / ((1 - s) / factor + s)`` with ``s = (n / w - low) / (high - low)``.
    """
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    original, factor = LLAMA3["original_max_position_embeddings"], max(factors)
    theta = config.rope_parameters.get("rope_theta")
    if theta is None or 2 * len(factors) != _head(config):
        return {}
    for place, found in enumerate(factors):
        wavelength = 2 * math.pi * theta ** (2 * place / _head(config))
        share = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
        if not math.isclose(found, 1 / ((1 - share) / factor + share), rel_tol=1e-4):
            return {}
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}
