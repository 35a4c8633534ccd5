"""Chat templates: one BOS, padding on the left, and positions that come from the template itself."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from abliterate.errors import PromptError
from abliterate.model.chat import ChatFormat, left_padded

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'system' %}<<SYS>>{{ m['content'] }}<</SYS>>"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


def tokenizer(template, *, adds_bos=True, **special):
    """Bytes as tokens, a few words whole, and a BOS in front of every text, as with Llama."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = {**SPECIAL, **special}
    names = [name for name in special.values() if name]
    vocabulary = {token: number for number, token in enumerate([*names, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=core, **{k: v for k, v in special.items() if v})
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    fast.add_tokens(["assistant", "[INST]", "[/INST]"])
    fast.chat_template = template
    return fast


def text_of(chat, ids):
    return chat.tokenizer.decode(ids)


# --- positions --------------------------------------------------------------------------------------------------------


def test_chatml_has_five_positions():
    chat = ChatFormat(tokenizer(CHATML))
    assert chat.positions == (-5, -4, -3, -2, -1)
    assert chat.position_tokens == ("<|im_end|>", "Ċ", "<|im_start|>", "assistant", "Ċ")


def test_llama_2_has_the_closing_tag():
    chat = ChatFormat(tokenizer(LLAMA2))
    assert chat.position_tokens == ("Ġ", "[/INST]")
    assert chat.positions == (-2, -1)


@pytest.mark.parametrize("template", [CHATML, LLAMA2])
@pytest.mark.parametrize("prompt", ["What is a lake?", "a", "two\nlines", "Zürich 7", "[/INST] <|im_end|>"])
def test_every_prompt_ends_with_the_position_tokens(template, prompt):
    chat = ChatFormat(tokenizer(template))
    ids = chat.encode(prompt)
    assert tuple(ids[chat.positions[0] :]) == chat.suffix
    assert prompt in text_of(chat, ids)


@pytest.mark.parametrize(
    "template", ["{{ messages[0]['content'] }}", "{{ bos_token }}User: {{ messages[-1].content }}"]
)
def test_a_template_that_adds_nothing_after_the_text_is_refused(template):
    with pytest.raises(PromptError, match="adds nothing after the user's text"):
        ChatFormat(tokenizer(template))


@pytest.mark.parametrize("template", [None, ""])
def test_no_template_is_refused(template):
    with pytest.raises(PromptError, match="tiny: its tokenizer has no chat template") as caught:
        ChatFormat(tokenizer(template), name="tiny")
    assert caught.value.exit_code == 2
    assert "chat" in caught.value.hint


PARTS = CHATML.replace("{{ m['content'] }}", "{% for part in m['content'] %}{{ part.text }}{% endfor %}")
"""As multimodal models have it: of a plain string it shows nothing."""


def test_a_template_that_takes_parts_is_given_parts():
    chat, plain = (ChatFormat(tokenizer(template), system="Be kind.") for template in (PARTS, CHATML))
    assert chat.encode("What is a lake?") == plain.encode("What is a lake?")
    assert chat.suffix == plain.suffix
    strict = ChatFormat(tokenizer(PARTS.replace("part.text", "part.text + ''")))  # fails on a string
    assert strict.encode("What is a lake?") == ChatFormat(tokenizer(CHATML)).encode("What is a lake?")


@pytest.mark.parametrize(
    "what",
    ["''", "m.content[:20]", "m.content[:20] | tojson", "m.content | lower", "m.content | tojson", "m.content | e"],
)
def test_a_template_that_alters_the_prompt_is_refused(what):
    template = CHATML.replace("m['content']", what)
    with pytest.raises(PromptError, match=r"tiny: its chat template drops, cuts or escapes a prompt: '") as caught:
        ChatFormat(tokenizer(template), name="tiny").encode('Is "a < b" a long enough text about Zürich?')
    assert "mend the template" in caught.value.hint


def test_a_template_that_trims_the_prompt_is_not():
    chat = ChatFormat(tokenizer(CHATML.replace("m['content']", "m['content'] | trim")))
    assert chat.encode(" Hi\n") == chat.encode("Hi")


def test_a_template_that_drops_the_system_prompt_is_refused():
    drops = "{% if messages[0]['role'] == 'system' %}{% set messages = messages[1:] %}{% endif %}"
    assert ChatFormat(tokenizer(drops + CHATML)).positions
    with pytest.raises(PromptError, match=r"drops, cuts or escapes the system prompt: 'Be kind.'") as caught:
        ChatFormat(tokenizer(drops + CHATML), system="Be kind.")
    assert "--system" in caught.value.hint


@pytest.mark.parametrize(
    "template", ["{{ messages[9]['content'] }}", "{{ raise_exception('no') }}", "{% if %}", "{{ 1 + 'a' }}"]
)
def test_a_template_that_fails_is_refused(template):
    with pytest.raises(PromptError, match="chat template fails"):
        ChatFormat(tokenizer(template))


def test_the_hash_is_that_of_the_template():
    one, same, other = (ChatFormat(tokenizer(t)).template_sha256 for t in (CHATML, CHATML, LLAMA2))
    assert one == same != other


# --- BOS --------------------------------------------------------------------------------------------------------------


def test_there_is_one_bos_although_the_tokenizer_adds_one():
    chat = ChatFormat(tokenizer(LLAMA2))
    bos = chat.tokenizer.bos_token_id
    assert chat.tokenizer("a")["input_ids"][0] == bos
    ids = chat.encode("What is a lake?")
    assert (ids[0], ids.count(bos)) == (bos, 1)


@pytest.mark.parametrize("count", [2, 3])
def test_a_template_with_several_bos_is_refused(count):
    with pytest.raises(PromptError, match=f"gives {count} BOS tokens"):
        ChatFormat(tokenizer("{{ bos_token }}" * (count - 1) + LLAMA2))


def test_a_tokenizer_without_bos_needs_none():
    chat = ChatFormat(tokenizer(CHATML, adds_bos=False, bos_token=None))
    assert text_of(chat, chat.encode("a")).startswith("<|im_start|>user")


# --- system prompts ---------------------------------------------------------------------------------------------------


def test_a_system_prompt_stands_before_the_user():
    chat = ChatFormat(tokenizer(LLAMA2), system="Be kind.")
    assert text_of(chat, chat.encode("Hi")) == "<s><<SYS>>Be kind.<</SYS>>[INST] Hi [/INST]"
    assert ChatFormat(tokenizer(LLAMA2)).suffix == chat.suffix


def test_a_template_without_a_system_role_is_refused_with_advice():
    assert ChatFormat(tokenizer(NO_SYSTEM + CHATML)).positions
    with pytest.raises(PromptError, match="System role not supported") as caught:
        ChatFormat(tokenizer(NO_SYSTEM + CHATML), system="Be kind.")
    assert "--system" in caught.value.hint


def test_a_template_that_wants_a_system_prompt_is_told_so():
    wants = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('needs a system turn') }}{% endif %}"
    with pytest.raises(PromptError, match="needs a system turn") as caught:
        ChatFormat(tokenizer(wants + CHATML))
    assert "give one with --system" in caught.value.hint
    assert ChatFormat(tokenizer(wants + CHATML), system="Be kind.").positions


def test_a_template_with_an_error_of_syntax_is_to_be_mended():
    with pytest.raises(PromptError, match=r"fails \(.*line 2\)") as caught:
        ChatFormat(tokenizer("{{ bos_token }}\n{% for m in messages %}"))
    assert "the template itself is broken" in caught.value.hint
    assert "--system" not in caught.value.hint


def test_a_conversation_is_rendered_turn_by_turn():
    chat = ChatFormat(tokenizer(LLAMA2))
    turns = [{"role": r, "content": c} for r, c in (("user", "A"), ("assistant", "B"), ("user", "C"))]
    assert text_of(chat, chat.encode_messages(turns)) == "<s>[INST] A [/INST] B </s>[INST] C [/INST]"


# --- padding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("special", "expected"),
    [({}, "<pad>"), ({"pad_token": None}, "</s>"), ({"pad_token": None, "eos_token": None}, None)],
)
def test_padding_falls_back_to_the_end_of_text(special, expected):
    fast = tokenizer(CHATML, **special)
    assert ChatFormat(fast).pad_id == (0 if expected is None else fast.convert_tokens_to_ids(expected))


def test_batches_are_padded_on_the_left():
    chat = ChatFormat(tokenizer(CHATML))
    prompts = ["a long prompt indeed", "a", "middling"]
    (batch,) = chat.batches(prompts, 8)
    assert batch.rows == (1, 2, 0)
    for place, row in enumerate(batch.rows):
        ids = chat.encode(prompts[row])
        padding = batch.input_ids.shape[1] - len(ids)
        assert batch.input_ids[place].tolist() == [chat.pad_id] * padding + ids
        assert batch.attention_mask[place].tolist() == [0] * padding + [1] * len(ids)
        assert batch.position_ids[place].tolist() == [0] * padding + list(range(len(ids)))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_every_row_is_in_exactly_one_batch(batch_size):
    encoded = [[7] * length for length in (3, 1, 2, 2, 5)]
    batches = list(left_padded(encoded, batch_size, 0))
    assert sorted(row for batch in batches for row in batch.rows) == [0, 1, 2, 3, 4]
    assert max(len(batch.rows) for batch in batches) == min(batch_size, 5)
    assert all(bool(batch.attention_mask[:, -1].all()) for batch in batches)


def test_a_padding_token_inside_the_text_is_not_padding():
    (batch,) = left_padded([[0, 5, 0], [4]], 2, 0)
    assert batch.attention_mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert torch.equal(batch.input_ids, torch.tensor([[0, 0, 4], [0, 5, 0]]))


def test_an_empty_row_is_seen():
    with pytest.raises(AssertionError, match="ends in padding"):
        list(left_padded([[1, 2], []], 2, 0))


def test_without_padding_only_prompts_of_one_length_share_a_batch():
    chat = ChatFormat(tokenizer(CHATML))
    encoded = [[5] * length for length in (3, 7, 3, 4, 7, 3)]
    chat.pads = False
    batches = list(chat.pack(encoded, 2))
    assert all(batch.attention_mask.all() for batch in batches)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(6))
    assert all(len(encoded[row]) == batch.input_ids.shape[1] for batch in batches for row in batch.rows)
    assert max(len(batch.rows) for batch in batches) == 2
    chat.pads = True
    assert len(list(chat.pack(encoded, 6))) == 1
