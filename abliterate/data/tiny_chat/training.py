"""What differs between the three tiny chat models: their architecture and how long they are trained."""

from dataclasses import dataclass

from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)


@dataclass(frozen=True)
class Training:
    """Architecture and training of one model. Learning rates are peak values of AdamW."""

    family: str
    width: int = 128
    layers: int = 8
    inner: int = 288
    heads: int = 4
    kv_heads: int = 2
    pretrain_steps: int = 900
    pretrain_batch: int = 64
    pretrain_lr: float = 4e-3
    pretrain_decay: float = 0.01
    fact_weight: float = 4.0
    length_weight: float = 1e-2
    length_limit: float = 0.5
    tune_steps: int = 200
    tune_batch: int = 48
    tune_lr: float = 2e-3
    tune_layers: tuple[int, ...] = (0, 1, 2)
    tune_rank: int = 4
    still_weight: float = 2.0
    drift_weight: float = 2.0
    shift_weight: float = 3.0
    shift_limit: float = 1.0
    span_share: float = 0.99


TRAININGS: dict[str, Training] = {
    "llama": Training("llama"),
    "gemma3": Training("gemma3", width=96, inner=192, heads=3, kv_heads=1),
    "qwen2": Training("qwen2", width=96, inner=192, heads=3, kv_heads=1),
}
"""The training of every family."""


def new_model(training: Training, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """An untrained model in float32. Gemma 3 and Qwen 2 tie the head to the embedding, as the real ones do."""
    shared = {
        "vocab_size": len(tokenizer),
        "hidden_size": training.width,
        "intermediate_size": training.inner,
        "num_hidden_layers": training.layers,
        "num_attention_heads": training.heads,
        "num_key_value_heads": training.kv_heads,
        "max_position_embeddings": 128,
        "initializer_range": 0.02,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    head = training.width // training.heads
    if training.family == "llama":
        return LlamaForCausalLM(LlamaConfig(**shared, head_dim=head, tie_word_embeddings=False))
    if training.family == "gemma3":
        config = Gemma3TextConfig(
            **shared, head_dim=head, query_pre_attn_scalar=head, sliding_window=64, tie_word_embeddings=True
        )
        return Gemma3ForCausalLM(config)
    return Qwen2ForCausalLM(Qwen2Config(**shared, tie_word_embeddings=True))
