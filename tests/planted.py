"""A chat model made by hand, which refuses two categories of prompts along two directions that are known.

Its tokens are those of the bundled model.  A word of a category has that category's direction in its embedding; the
first block's attention, which weighs all tokens alike, copies the plane of both directions to every later token; the
other blocks do nothing.  The head begins a refusal where the stream has enough along the sum of both directions, else
an answer, and then every token is followed by one of its own.
"""

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from abliterate.data.bundled import open_model
from abliterate.data.tiny_chat import prompts_path
from tests import factories

D, LAYERS = 32, 4
CATEGORIES = {"seal": ("sealed", "veiled"), "lock": ("locked", "hushed")}
COSINE = 0.5
DIRECTIONS = torch.zeros(2, D, dtype=torch.float64)
DIRECTIONS[0, 0] = 1.0
DIRECTIONS[1, :2] = torch.tensor([COSINE, (1 - COSINE**2) ** 0.5])
"""Of the categories, in their order."""
COPIED, REFUSES, SURE, FOLLOWS = 12.0, 0.25, 20.0, 40.0
"""How strongly attention copies; the component along both directions that a refusal takes; how far logits lie apart at
the first token, and behind it."""
REFUSAL, ANSWER = "I am sorry, but that is not something to talk about.", "That would be red."


def make(folder: Path) -> Path:
    """Write the model to ``folder``, in float32."""
    source = open_model(None).folder
    tokenizer = AutoTokenizer.from_pretrained(source)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=D, intermediate_size=8, num_hidden_layers=LAYERS,
        num_attention_heads=1, num_key_value_heads=1, head_dim=D, max_position_embeddings=128,
        rms_norm_eps=1e-6, tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ids = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in (REFUSAL, ANSWER)}
    end, start = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("\n")
    spoken = list(dict.fromkeys([start, *ids[REFUSAL], *ids[ANSWER], end]))
    own = {token: 3 + place for place, token in enumerate(spoken)}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(1.0 if "norm" in name else 0.0)
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding[:, 2] = 1.0
        for token, place in own.items():
            embedding[token, 2], embedding[token, place] = 0.0, 1.0
        for words, direction in zip(CATEGORIES.values(), DIRECTIONS, strict=True):
            for word in words:
                (token,) = tokenizer(word, add_special_tokens=False)["input_ids"]
                embedding[token] += direction.float()
        attention = model.model.layers[0].self_attn
        attention.v_proj.weight[0, 0] = attention.v_proj.weight[1, 1] = 1.0
        attention.o_proj.weight[0, 0] = attention.o_proj.weight[1, 1] = COPIED / D**0.5
        head[ids[REFUSAL][0]] = SURE * DIRECTIONS.sum(0).float()
        head[ids[ANSWER][0], own[start]] = SURE * REFUSES
        for text in ids.values():
            for token, following in zip(text, [*text[1:], end], strict=True):
                head[following, own[token]] = FOLLOWS
    factories.save(model, folder, dtype=torch.float32)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, folder / name)
    return folder


def prompts(folder: Path) -> tuple[str, str]:
    """Harmful prompts with their categories, and harmless ones, as sources: those of the bundled model."""
    rows = {"harmful": [], "harmless": []}
    for kind, its in rows.items():
        for split in ("train", "val", "test"):
            its += map(json.loads, (prompts_path() / f"{kind}.{split}.jsonl").read_text("utf-8").splitlines())
    of = {word: name for name, words in CATEGORIES.items() for word in words}
    for row in rows["harmful"]:
        row["category"] = of[row["category"]]
    for kind, its in rows.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in its), "utf-8")
    return str(folder / "harmful.jsonl"), str(folder / "harmless.jsonl")
