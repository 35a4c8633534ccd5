"""Tiny models of every registered family, each from its own configuration class.

Widths are 48 (residual), 80 (MLP), 24 (experts), so that no two sides of a matrix agree by chance except where a case
is there to have them agree.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

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
PARTIAL = {"partial_rotary_factor": 0.5}
ROUTING = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
SHARED = {**ROUTING, "shared_expert_intermediate_size": 40}
GROUPED = {
    "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12}
GROUPS = {"n_group": 1, "topk_group": 1}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
MROPE_12 = {
    "head_dim": 12,
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10000.0},
}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
SSM = {"mamba_n_heads": 8, "mamba_d_head": 12, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_chunk_size": 8}
PER_LAYER = {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 16}
NEMOTRON = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "ssm_state_size": 16,
    "mamba_num_heads": 8, "mamba_head_dim": 12, "n_groups": 2, "chunk_size": 8, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 40,
    "use_mamba_kernels": False,
}  # fmt: skip
GEMMA4 = {**PER_LAYER, "num_kv_shared_layers": 1, "sliding_window": 8,
          "layer_types": ["full_attention", "sliding_attention", "full_attention"]}  # fmt: skip
SIGLIP = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 16, "patch_size": 4}  # fmt: skip
QWEN_TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 56, "num_heads": 4, "patch_size": 4,
              "spatial_merge_size": 2, "temporal_patch_size": 2}  # fmt: skip
QWEN_IMAGE = {"image_token_id": 90, "vision_start_token_id": 91, "video_token_id": 92}
Builder = Callable[[], nn.Module]


def _text(config: str, model: str, *without: str, **changes: Any) -> Builder:
    def build() -> nn.Module:
        sizes = {key: value for key, value in {**SIZES, **changes}.items() if key not in without}
        return getattr(transformers, model)(getattr(transformers, config)(**sizes))

    return build


def _vision(config: str, model: str, text: dict[str, Any], vision: dict[str, Any], **top: Any) -> Builder:
    def build() -> nn.Module:
        made = getattr(transformers, config)(text_config={**SIZES, **text}, vision_config=vision, **top)
        return getattr(transformers, model)(made)

    return build


CLASS_A: dict[str, Builder] = {
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
    "gemma": _text("GemmaConfig", "GemmaForCausalLM"),
    "vaultgemma": _text("VaultGemmaConfig", "VaultGemmaForCausalLM", query_pre_attn_scalar=16, sliding_window=8),
    # other pre-norm decoders
    "ministral": _text("MinistralConfig", "MinistralForCausalLM"),
    "ministral3": _text("Ministral3Config", "Ministral3ForCausalLM"),
    "phi3": _text("Phi3Config", "Phi3ForCausalLM", "head_dim"),
    "granite": _text(
        "GraniteConfig", "GraniteForCausalLM", "head_dim",
        embedding_multiplier=12.0, residual_multiplier=0.5, logits_scaling=2.0, attention_multiplier=0.1,
    ),
    "cohere": _text("CohereConfig", "CohereForCausalLM", "head_dim", logit_scale=0.25, use_qk_norm=True),
    "cohere2": _text("Cohere2Config", "Cohere2ForCausalLM", "head_dim", logit_scale=0.25),
    "glm": _text("GlmConfig", "GlmForCausalLM"),
    "stablelm": _text("StableLmConfig", "StableLmForCausalLM", "head_dim", **PARTIAL, qk_layernorm=True),
    "stablelm-parallel": _text(
        "StableLmConfig", "StableLmForCausalLM", "head_dim", use_parallel_residual=True, use_qkv_bias=True, **PARTIAL
    ),
    "olmo": _text("OlmoConfig", "OlmoForCausalLM", "head_dim"),
    "smollm3": _text("SmolLM3Config", "SmolLM3ForCausalLM", "head_dim"),
    "seed-oss": _text("SeedOssConfig", "SeedOssForCausalLM", attention_out_bias=True),
    "hunyuan": _text("HunYuanDenseV1Config", "HunYuanDenseV1ForCausalLM"),
    "ernie4.5": _text("Ernie4_5Config", "Ernie4_5ForCausalLM"),
    "helium": _text("HeliumConfig", "HeliumForCausalLM", head_dim=12),
    "arcee": _text("ArceeConfig", "ArceeForCausalLM"),
    # biases, positions, other layouts
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=96, n_embd=48, n_layer=3, n_head=4, n_inner=80, n_positions=64)
    ),
    "gpt-neox": _text("GPTNeoXConfig", "GPTNeoXForCausalLM", "head_dim", use_parallel_residual=True),
    "gpt-neox-serial": _text("GPTNeoXConfig", "GPTNeoXForCausalLM", "head_dim", use_parallel_residual=False),
    "opt": _text("OPTConfig", "OPTForCausalLM", word_embed_proj_dim=48, ffn_dim=80),
    "phi": _text("PhiConfig", "PhiForCausalLM", "head_dim", "num_key_value_heads"),
    "starcoder2": _text("Starcoder2Config", "Starcoder2ForCausalLM", "head_dim", use_bias=True),
    # experts
    "qwen2-moe": _text("Qwen2MoeConfig", "Qwen2MoeForCausalLM", **SHARED, mlp_only_layers=[1]),
    "qwen3-moe": _text("Qwen3MoeConfig", "Qwen3MoeForCausalLM", **ROUTING, mlp_only_layers=[0]),
    "olmoe": _text("OlmoeConfig", "OlmoeForCausalLM", "head_dim", num_experts=4, num_experts_per_tok=2),
    "cohere2-moe": _text("Cohere2MoeConfig", "Cohere2MoeForCausalLM", num_experts=4, num_experts_per_tok=2),
    "ernie4.5-moe": _text(
        "Ernie4_5_MoeConfig", "Ernie4_5_MoeForCausalLM", "head_dim",
        moe_intermediate_size=24, moe_num_experts=4, moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=1,
    ),
    "deepseek-v2": _text("DeepseekV2Config", "DeepseekV2ForCausalLM", "head_dim", **GROUPED, **LATENT, **GROUPS),
    "deepseek-v3": _text("DeepseekV3Config", "DeepseekV3ForCausalLM", "head_dim", **GROUPED, **LATENT, **GROUPS),
    "glm4-moe": _text("Glm4MoeConfig", "Glm4MoeForCausalLM", **{**GROUPED, "num_key_value_heads": 2}),
    "glm4-moe-lite": _text("Glm4MoeLiteConfig", "Glm4MoeLiteForCausalLM", "head_dim", **GROUPED, **LATENT),
    "dots1": _text("Dots1Config", "Dots1ForCausalLM", **GROUPED, **GROUPS),
    "mixtral": _text("MixtralConfig", "MixtralForCausalLM", **LOCAL),
    "phimoe": _text("PhimoeConfig", "PhimoeForCausalLM", "head_dim", **LOCAL, attention_bias=True),
    "minimax-m2": _text("MiniMaxM2Config", "MiniMaxM2ForCausalLM", **LOCAL),
    # width == the experts' inner width, as in the released models: only the name tells the axis
    "gpt-oss": _text("GptOssConfig", "GptOssForCausalLM", **LOCAL | {"intermediate_size": 48}),
    "llama4-text": _text(
        "Llama4TextConfig", "Llama4ForCausalLM",
        **LOCAL | {"num_experts_per_tok": 1}, intermediate_size_mlp=88, moe_layers=[1], interleave_moe_layer_step=2,
        attn_temperature_tuning=False, attention_chunk_size=64,
    ),
    # attention beside other mixers
    "qwen3-next": _text("Qwen3NextConfig", "Qwen3NextForCausalLM", **SHARED, **LINEAR, mlp_only_layers=[2]),
    "qwen3.5-text": _text("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", **LINEAR, **MROPE),
    "qwen3.5-moe-text": _text(
        "Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", "intermediate_size", **SHARED, **LINEAR, **MROPE
    ),
    "granite-moe": _text("GraniteMoeConfig", "GraniteMoeForCausalLM", "head_dim", **LOCAL, residual_multiplier=0.5),
    "granite-4": _text(
        "GraniteMoeHybridConfig", "GraniteMoeHybridForCausalLM", "head_dim",
        **LOCAL, **SSM, shared_intermediate_size=40, layer_types=["mamba", "attention", "mamba"],
    ),
    "falcon-h1": _text(
        "FalconH1Config", "FalconH1ForCausalLM",
        **SSM, mamba_d_ssm=96, mamba_rms_norm=True, embedding_multiplier=2.0, ssm_out_multiplier=0.5,
    ),
    "bamba": _text("BambaConfig", "BambaForCausalLM", "head_dim", **SSM, attn_layer_indices=[1]),
    "jamba": _text(
        "JambaConfig", "JambaForCausalLM", "head_dim",
        num_experts=4, num_experts_per_tok=2, mamba_d_state=8, mamba_dt_rank=8, use_mamba_kernels=False,
        attn_layer_period=3, attn_layer_offset=2, expert_layer_period=2, expert_layer_offset=1,
    ),
    "lfm2": _text(
        "Lfm2Config", "Lfm2ForCausalLM", "head_dim",
        block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention", "conv"], conv_bias=True,
    ),
    "lfm2-moe": _text(
        "Lfm2MoeConfig", "Lfm2MoeForCausalLM", "head_dim",
        **ROUTING, num_dense_layers=1, layer_types=["conv", "full_attention", "conv"],
    ),
    "nemotron-h": _text("NemotronHConfig", "NemotronHForCausalLM", "num_hidden_layers", **NEMOTRON),
    "nemotron-h-latent": _text(
        "NemotronHConfig", "NemotronHForCausalLM", "num_hidden_layers", **NEMOTRON, moe_latent_size=20
    ),
    "mamba2": lambda: transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            vocab_size=96, hidden_size=48, num_hidden_layers=3, num_heads=8, head_dim=12, state_size=16, n_groups=2,
            chunk_size=8, expand=2, tie_word_embeddings=False,
        )
    ),
    "kimi-linear": _text(
        "KimiLinearConfig", "KimiLinearForCausalLM", "head_dim", "q_lora_rank",
        **LATENT, moe_intermediate_size=24, **LOCAL, linear_head_dim=16, linear_num_heads=4,
        num_key_value_heads=4, layer_types=["linear_attention", "full_attention", "linear_attention"],
        mlp_layer_types=["dense", "sparse", "sparse"],
    ),
    # with a vision tower
    "qwen2-vl": _vision(
        "Qwen2VLConfig", "Qwen2VLForConditionalGeneration", MROPE_12,
        {"depth": 2, "embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2, "num_heads": 4, "patch_size": 4,
         "spatial_merge_size": 2, "temporal_patch_size": 2}, **QWEN_IMAGE,
    ),
    "qwen2.5-vl": _vision(
        "Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration", MROPE_12,
        {**QWEN_TOWER, "out_hidden_size": 48, "window_size": 16, "fullatt_block_indexes": [1]}, **QWEN_IMAGE,
    ),
    "qwen3-vl": _vision(
        "Qwen3VLConfig", "Qwen3VLForConditionalGeneration", MROPE,
        {**QWEN_TOWER, "out_hidden_size": 48, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
        **QWEN_IMAGE,
    ),
    "qwen3-vl-moe": _vision(
        "Qwen3VLMoeConfig", "Qwen3VLMoeForConditionalGeneration", {**MROPE, **ROUTING},
        {**QWEN_TOWER, "out_hidden_size": 48, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        **QWEN_IMAGE,
    ),
    "qwen3.5": _vision(
        "Qwen3_5Config", "Qwen3_5ForConditionalGeneration", {**MROPE, **LINEAR},
        {**QWEN_TOWER, "out_hidden_size": 48, "num_position_embeddings": 16}, **QWEN_IMAGE,
    ),
    "qwen3.5-moe": _vision(
        "Qwen3_5MoeConfig", "Qwen3_5MoeForConditionalGeneration", {**MROPE, **LINEAR, **SHARED},
        {**QWEN_TOWER, "out_hidden_size": 48, "num_position_embeddings": 16}, **QWEN_IMAGE,
    ),
    "mistral3": _vision(
        "Mistral3Config", "Mistral3ForConditionalGeneration", {"model_type": "mistral"},
        {**SIGLIP, "model_type": "pixtral"},
        image_token_index=90, spatial_merge_size=2, multimodal_projector_bias=True,
    ),
    "llama4": _vision(
        "Llama4Config", "Llama4ForConditionalGeneration",
        {**LOCAL, "num_experts_per_tok": 1, "intermediate_size_mlp": 88, "moe_layers": [1],
         "interleave_moe_layer_step": 2, "attn_temperature_tuning": False, "attention_chunk_size": 64},
        {**SIGLIP, "intermediate_size": 128, "vision_output_dim": 32, "projector_input_dim": 32,
         "projector_output_dim": 32, "pixel_shuffle_ratio": 0.5},
        image_token_index=90, boi_token_index=91, eoi_token_index=92,
    ),
}  # fmt: skip
CLASS_B: dict[str, Builder] = {
    "gemma2": _text("Gemma2Config", "Gemma2ForCausalLM", query_pre_attn_scalar=16, sliding_window=8),
    "gemma3-text": _text("Gemma3TextConfig", "Gemma3ForCausalLM", sliding_window=8),
    "gemma3-vision": _vision(
        "Gemma3Config", "Gemma3ForConditionalGeneration", WINDOW, SIGLIP,
        mm_tokens_per_image=4, image_token_index=90, boi_token_index=91, eoi_token_index=92,
    ),
    "gemma4-text": _text("Gemma4TextConfig", "Gemma4ForCausalLM", **GEMMA4, use_double_wide_mlp=True),
    "gemma4-moe": _text(
        "Gemma4TextConfig", "Gemma4ForCausalLM",
        **GEMMA4 | {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}, enable_moe_block=True,
        num_experts=4, top_k_experts=2, moe_intermediate_size=24,
    ),
    "gemma4": _vision(
        "Gemma4Config", "Gemma4ForConditionalGeneration", GEMMA4,
        {**SIGLIP, "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64},
        audio_config=None, image_token_id=90, video_token_id=91, audio_token_id=92,
    ),
    "olmo2": _text("Olmo2Config", "Olmo2ForCausalLM", "head_dim"),
    "olmo3": _text("Olmo3Config", "Olmo3ForCausalLM", "head_dim", **WINDOW),
    "exaone4": _text("Exaone4Config", "Exaone4ForCausalLM", "head_dim", **WINDOW),
    "glm4": _text("Glm4Config", "Glm4ForCausalLM"),
    "glm4v": _vision(
        "Glm4vConfig", "Glm4vForConditionalGeneration",
        {"head_dim": 12, "rope_parameters": {**MROPE_12["rope_parameters"], "partial_rotary_factor": 1.0}},
        {**QWEN_TOWER, "image_size": 16, "out_hidden_size": 48}, image_token_id=90, image_start_token_id=91,
        image_end_token_id=92, video_token_id=93,
    ),
    "afmoe": _text("AfmoeConfig", "AfmoeForCausalLM", **ROUTING, num_dense_layers=1, num_shared_experts=1, **WINDOW),
}  # fmt: skip
CLASS_C: dict[str, Builder] = {
    "gemma3n": _text(
        "Gemma3nTextConfig", "Gemma3nForCausalLM",
        **PER_LAYER, **WINDOW, laurel_rank=8, num_kv_shared_layers=0, activation_sparsity_pattern=[0.5, 0.0, 0.0],
    ),
    "opt-350m": _text("OPTConfig", "OPTForCausalLM", word_embed_proj_dim=48, ffn_dim=80, do_layer_norm_before=False),
}  # fmt: skip
BUILDERS = {**CLASS_A, **CLASS_B}
EXACT = tuple(CLASS_A)
R_FREE = tuple(CLASS_B)
CORE = (
    "llama", "llama-biases", "llama-tied", "llama-square", "qwen", "qwen2", "qwen3", "gemma", "gpt2", "opt", "mixtral",
    "qwen3-moe", "gpt-oss", "qwen3-next",
)  # fmt: skip
"""Where the code paths differ: the cases that are run in every dtype and with several directions."""


def is_routed(name: str) -> bool:
    """Whether text reaches routed experts that write the stream themselves."""
    routed = (
        "mixtral",
        "minimax",
        "dots",
        "deepseek",
        "gpt-oss",
        "llama4",
        "jamba",
        "kimi",
        "afmoe",
        "granite-4",
        "phimoe",
    )
    return name != "nemotron-h-latent" and ("moe" in name or name.startswith((*routed, "qwen3-next", "nemotron-h")))


@cache
def model_type(name: str) -> str:
    """The model type that a case is saved with."""
    return str({**BUILDERS, **CLASS_C}[name]().config.model_type)
