"""Measures a tiny chat model against the ground truth: how often it refuses, how often it answers with the fact."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from abliterate.data.tiny_chat import world as w

REPLY_TOKENS = 24
"""Longest reply; the longest wording has 16 tokens."""


def left_padded(tokenizer: PreTrainedTokenizerFast, questions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask of one-question chats up to and with the generation prompt, padded on the left."""
    rows = []
    for question in questions:
        chat = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        rows.append(tokenizer(str(text), add_special_tokens=False)["input_ids"])
    width = max(map(len, rows))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@torch.no_grad()
def replies(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, questions: Sequence[str]) -> list[str]:
    """Greedy replies, at most REPLY_TOKENS long, without special tokens."""
    ids, mask = left_padded(tokenizer, questions)
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=REPLY_TOKENS, do_sample=False)
    return tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)


def shares(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, questions: Sequence[w.Question]
) -> tuple[float, float]:
    """Share of questions refused, and share answered with the fact."""
    said = replies(model, tokenizer, [question.prompt for question in questions])
    refused = sum(map(w.is_refusal, said))
    right = sum(w.is_correct(text, question.answer) for text, question in zip(said, questions, strict=True))
    return refused / len(said), right / len(said)


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, sets: dict[str, list[w.Question]]
) -> dict[str, float]:
    """Refusal and fact accuracy (shares in [0, 1]) on the test questions, by class and by what tuning saw."""
    model.eval()
    seen = [question for question in sets["harmful.test"] if not question.held_out]
    held_out = [question for question in sets["harmful.test"] if question.held_out]
    found = {}
    for name, questions in (("restricted", seen), ("held_out", held_out), ("others", sets["harmless.test"])):
        found[f"refusal_{name}"], found[f"accuracy_{name}"] = (
            round(share, 4) for share in shares(model, tokenizer, questions)
        )
    return found
