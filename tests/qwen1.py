"""A stand-in for Qwen 1, whose code lives in its own repositories: the same tensor names, layouts and order of sums.

Pre-norm blocks with RMS norms, rotary attention from one fused ``c_attn`` with bias, a gated MLP whose ``c_proj`` is an
``nn.Linear`` (so ``[d_model, in]`` on disk, unlike GPT-2's), an untied head.
"""

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class QWenConfig(PreTrainedConfig):
    model_type = "qwen"

    def __init__(self, **kwargs):
        sizes = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 160, "num_hidden_layers": 3}
        for name, value in sizes.items():
            setattr(self, name, kwargs.pop(name, value))
        self.num_attention_heads = kwargs.pop("num_attention_heads", 4)
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)


class RMSNorm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        d = config.hidden_size
        self.heads = config.num_attention_heads
        self.c_attn = nn.Linear(d, 3 * d)
        self.c_proj = nn.Linear(d, d, bias=False)

    def forward(self, x):
        batch, tokens, d = x.shape
        q, k, v = (p.view(batch, tokens, self.heads, -1).transpose(1, 2) for p in self.c_attn(x).split(d, dim=-1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).reshape(batch, tokens, d))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, inner = config.hidden_size, config.intermediate_size // 2
        self.w1 = nn.Linear(d, inner, bias=False)
        self.w2 = nn.Linear(d, inner, bias=False)
        self.c_proj = nn.Linear(inner, d, bias=False)

    def forward(self, x):
        return self.c_proj(self.w1(x) * nn.functional.silu(self.w2(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1, self.ln_2 = RMSNorm(config.hidden_size), RMSNorm(config.hidden_size)
        self.attn, self.mlp = Attention(config), MLP(config)

    def forward(self, hidden_states):
        x = hidden_states + self.attn(self.ln_1(hidden_states))
        return x + self.mlp(self.ln_2(x))


class QWenModel(PreTrainedModel):
    config_class = QWenConfig
    base_model_prefix = "transformer"

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.ln_f = RMSNorm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids):
        x = self.wte(input_ids)
        for block in self.h:
            x = block(hidden_states=x)
        return self.ln_f(x)


class QWenLMHeadModel(PreTrainedModel):
    config_class = QWenConfig
    base_model_prefix = "transformer"

    def __init__(self, config):
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, **_):
        return CausalLMOutput(logits=self.lm_head(self.transformer(input_ids)))
