"""GGUF files made of checkpoint folders as llama.cpp's converter makes them, by the ``gguf`` library."""

import json
import re
from functools import cache
from itertools import chain

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from abliterate.data.tiny_chat.tokenizer import CHAT_TEMPLATE, world_texts
from abliterate.data.tiny_chat.world import make_world

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "unk_token": "<unk>", "eos_token": "<|end|>"}
CONTROL = ("<pad>", "<s>", "<unk>", "<|turn|>", "<|end|>")
BYTES = [f"<0x{value:02X}>" for value in range(256)]
ARCHITECTURES = {"gemma3_text": "gemma3", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}
"""Where llama.cpp calls them otherwise."""

EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
QWEN2 = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"""
QWEN2 += r"|\s+(?!\S)|\s+"


def weights_of(folder):
    """All tensors of a checkpoint."""
    return dict(chain.from_iterable(load_file(path).items() for path in sorted(folder.glob("*.safetensors"))))


def stored(w, kind):
    """What a converter stores of a tensor: vectors as F32, matrices as ``kind``; data and type."""
    kind = gguf.GGMLQuantizationType["F32" if w.ndim == 1 else kind]
    return gguf.quants.quantize(np.ascontiguousarray(w, dtype=np.float32), kind), kind


def rounded(folder, kind, dtype):
    """What a file of ``kind`` holds of the weights of a checkpoint, rounded once more to ``dtype``."""
    found = {}
    for name, w in weights_of(folder).items():
        data, its = stored(w.float().numpy(), kind)
        found[name] = torch.from_numpy(gguf.quants.dequantize(data, its).reshape(w.shape).copy()).to(dtype)
    return found


def permuted(w, heads):
    """Query and key rows of Llama in the order of llama.cpp: the halves of a head interleaved."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(w.shape)


def converted(name, w, config):
    """A tensor as llama.cpp wants it."""
    if config["model_type"] == "llama" and name.endswith("q_proj.weight"):
        return permuted(w, config["num_attention_heads"])
    if config["model_type"] == "llama" and name.endswith("k_proj.weight"):
        return permuted(w, config["num_key_value_heads"])
    if name.endswith("shared_expert_gate.weight"):
        return w[0]
    return w + 1 if config["model_type"].startswith("gemma") and name.endswith("norm.weight") else w


def write_gguf(path, folder, kind, tokenizer, *, change=lambda writer: None, without=(), tensors=None):
    """Write ``folder`` with matrices as ``kind``; ``change`` adds keys, ``without`` leaves some of ours out."""
    config = json.loads((folder / "config.json").read_text())
    architecture = ARCHITECTURES.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys(config).items():
        if key not in without:
            getattr(writer, f"add_{key}")(value)
    add_tokenizer(writer, tokenizer, without)
    change(writer)
    arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for name, w in joined(weights_of(folder) if tensors is None else tensors).items():
        data, its = stored(converted(name, w.float().numpy(), config), kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")) or name, data, raw_dtype=its)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def joined(weights):
    """The weights with all experts of a layer in one tensor."""
    found, experts = {}, {}
    for name, w in weights.items():
        match = EXPERT.fullmatch(name)
        if match is None:
            found[name] = w
        else:
            experts.setdefault(f"{match[1]}.{match[3]}.weight", {})[int(match[2])] = w
    return found | {name: torch.stack([of[number] for number in sorted(of)]) for name, of in experts.items()}


def keys(config):
    """What the converter states of a model, by the writer's methods."""
    kind, rope, heads = config["model_type"], config["rope_parameters"], config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    found = {
        "name": "Tiny", "license": "mit", "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"], "block_count": config["num_hidden_layers"],
        "embedding_length": config["hidden_size"], "feed_forward_length": config["intermediate_size"],
        "head_count": heads, "head_count_kv": config["num_key_value_heads"],
        "rope_freq_base": rope.get("full_attention", rope)["rope_theta"],
    }  # fmt: skip
    if "rms_norm_eps" in config:
        found["layer_norm_rms_eps"] = config["rms_norm_eps"]
    else:
        found["layer_norm_eps"] = config["norm_epsilon"]
    if kind in ("llama", "phi3"):
        found["rope_dimension_count"] = head
    if kind.startswith(("gemma", "qwen3")):
        found |= {"key_length": head, "value_length": head}
    if kind in ("gemma2", "gemma3_text", "phi3") and config["sliding_window"]:
        found["sliding_window"] = config["sliding_window"]
    if kind == "gemma2":
        found |= {name: config[name] for name in ("attn_logit_softcapping", "final_logit_softcapping")}
    if kind.endswith("moe"):
        found |= {
            "expert_count": config.get("num_experts") or config["num_local_experts"],
            "expert_used_count": config["num_experts_per_tok"],
            "expert_feed_forward_length": config["moe_intermediate_size"],
        }
    if "shared_expert_intermediate_size" in config:
        found["expert_shared_feed_forward_length"] = config["shared_expert_intermediate_size"]
    return found


def add_tokenizer(writer, tokenizer, without):
    """Vocabulary, merges or scores, and special tokens."""
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    sentencepiece = document["model"]["byte_fallback"]
    kinds = {**dict.fromkeys(CONTROL, gguf.TokenType.CONTROL), **dict.fromkeys(BYTES, gguf.TokenType.BYTE)}
    writer.add_tokenizer_model("llama" if sentencepiece else "gpt2")
    writer.add_tokenizer_pre("default" if sentencepiece else "qwen2")
    writer.add_token_list(vocab)
    writer.add_token_types([kinds.get(token, gguf.TokenType.NORMAL) for token in vocab])
    if sentencepiece:
        writer.add_token_scores([-float(place) for place in range(len(vocab))])
    else:
        writer.add_token_merges([" ".join(pair) for pair in document["model"]["merges"]])
    writer.add_bos_token_id(vocab.index("<s>"))
    writer.add_eos_token_id(vocab.index("<|end|>"))
    writer.add_unk_token_id(vocab.index("<unk>"))
    writer.add_pad_token_id(vocab.index("<pad>"))
    writer.add_add_bos_token(True)
    if isinstance(tokenizer, GemmaTokenizer):
        writer.add_add_space_prefix(False)
    if "chat_template" not in without:
        writer.add_chat_template(CHAT_TEMPLATE)


@cache
def tokenizer_of(model_type):
    """A tokenizer of the kind that a family has, with the 623 tokens that the tiny models have rows for."""
    if model_type == "qwen2":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(QWEN2), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        train(core, trainers.BpeTrainer(vocab_size=623, special_tokens=special(), initial_alphabet=alphabet))
        made = PreTrainedTokenizerFast(tokenizer_object=core, add_bos_token=True, **SPECIAL)
    else:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.Metaspace()
        train(core, trainers.BpeTrainer(vocab_size=623 - len(BYTES), special_tokens=special()))
        learnt = sorted(core.get_vocab(), key=core.get_vocab().get)
        vocab = {token: place for place, token in enumerate([*CONTROL, *BYTES, *learnt[len(CONTROL) :]])}
        merges = [tuple(pair) for pair in json.loads(core.to_str())["model"]["merges"]]
        kind = GemmaTokenizer if model_type.startswith("gemma") else LlamaTokenizer
        made = kind(vocab=vocab, merges=merges, mask_token=None, add_bos_token=True, **SPECIAL)
    made.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    made.chat_template = CHAT_TEMPLATE
    assert len(made) == 623
    return made


def special():
    return [AddedToken(token, special=True, normalized=False) for token in CONTROL]


def train(core, trainer):
    core.train_from_iterator(world_texts(make_world()), trainer)
