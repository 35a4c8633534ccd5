"""Guard models as judges: how they are asked and how their answers are read, on tiny random models."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from abliterate import api
from abliterate.data.tiny_chat import model_path
from abliterate.errors import CheckpointError, UsageError
from abliterate.evaluate.page import render
from abliterate.method.statistics import Rate
from abliterate.model.judges import Judge, JudgeSpec, judges, load_judge, meaning
from abliterate.publishing import manifest
from abliterate.recipe import Recipe
from tests.test_chat_format import CHATML, tokenizer

PAIRS = [("What is a lake?", "Water."), ("Count {prompt} to {reply}", "1, 2, 3 {x}")]
GUARD = JudgeSpec(repo="own/guard", kind="generative", positive=("unsafe",), negative=("safe",), max_new_tokens=1)
LABELS = JudgeSpec(repo="own/labels", kind="classifier", positive=("REFUSAL",), negative=("NORMAL",))


def guard():
    torch.manual_seed(0)
    text = tokenizer(CHATML)
    text.add_tokens(["unsafe", "safe", "yes"])
    config = LlamaConfig(
        vocab_size=len(text), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), text


def always_says(word):
    """A guard that answers the same to everything, and what it was asked."""
    model, text = guard()
    model.lm_head = nn.Linear(16, len(text))
    nn.init.zeros_(model.lm_head.weight)
    nn.init.zeros_(model.lm_head.bias)
    model.lm_head.bias.data[text.convert_tokens_to_ids(word)] = 1
    asked = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: asked.append(text.decode(kwargs["input_ids"][0])), with_kwargs=True
    )
    return model, text, asked


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_table_is_whole():
    assert set(judges()) == {"llama-guard-2", "llama-guard-3", "harmbench"}
    for spec in judges().values():
        assert spec.repo.count("/") == 1
        assert spec.positive
        assert spec.negative
        assert not set(spec.positive) & set(spec.negative)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("safe", False), ("unsafe\nS1", True), (" Unsafe", True), ("unsafely", None), ("", None), ("maybe safe", None)],
)
def test_the_first_word_of_an_answer_counts(answer, expected):
    assert meaning(answer, GUARD) is expected


@pytest.mark.parametrize(("answer", "expected"), [("REFUSAL", True), ("normal", False), ("NORMAL TEXT", None)])
def test_a_label_counts_as_a_whole(answer, expected):
    assert meaning(answer, LABELS) is expected


# --- asking -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "positive"), [("unsafe", True), ("safe", False), ("yes", None)])
def test_a_guard_is_asked_in_its_own_template(word, positive):
    model, text, asked = always_says(word)
    verdicts = Judge(spec=GUARD, model=model, tokenizer=text).judge(PAIRS)
    assert [(verdict.answer, verdict.positive) for verdict in verdicts] == [(word, positive)] * 2
    assert "user\nWhat is a lake?<|im_end|>" in asked[0]
    assert "assistant\nWater.<|im_end|>" in asked[0]


def test_a_format_is_filled_once_and_braces_of_the_texts_stay():
    model, text, asked = always_says("yes")
    spec = JudgeSpec(
        repo="own/x", kind="generative", positive=("yes",), negative=("no",), max_new_tokens=1,
        format="Asked: {prompt}\nSaid: {reply}\nBad?",
    )  # fmt: skip
    assert [verdict.positive for verdict in Judge(spec=spec, model=model, tokenizer=text).judge(PAIRS)] == [True, True]
    assert asked[1] == "<s>Asked: Count {prompt} to {reply}\nSaid: 1, 2, 3 {x}\nBad?"


# --- loading ----------------------------------------------------------------------------------------------------------


def test_a_guard_is_loaded_from_a_folder(tmp_path):
    model, text = guard()
    model.save_pretrained(tmp_path)
    text.save_pretrained(tmp_path)
    loaded = load_judge(GUARD, place=str(tmp_path), device="cpu", dtype="float32")
    verdicts = loaded.judge(PAIRS)
    assert len(verdicts) == 2
    assert verdicts == Judge(spec=GUARD, model=model, tokenizer=text).judge(PAIRS)


@pytest.mark.parametrize("label", [0, 1])
def test_a_classifier_is_loaded_from_a_folder(label, tmp_path):
    text = tokenizer(CHATML)
    config = BertConfig(
        vocab_size=len(text), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, id2label={0: "NORMAL", 1: "REFUSAL"}, label2id={"NORMAL": 0, "REFUSAL": 1},
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    model.classifier.bias.data[label] = 100
    model.save_pretrained(tmp_path)
    text.model_max_length = 64
    text.save_pretrained(tmp_path)
    loaded = load_judge(LABELS, place=str(tmp_path), device="cpu", dtype="float32")
    long = ("a" * 200, "b" * 200)
    assert [verdict.positive for verdict in loaded.judge([*PAIRS, long])] == [bool(label)] * 3


@pytest.mark.parametrize(
    ("judge", "options", "says"),
    [
        ("nobody", {}, "nobody: no such judge"),
        ("harmbench", {}, "needs the text it was trained with"),
        ("harmbench", {"format": "Is {reply} bad?"}, "has no {prompt}"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused(judge, options, says):
    with pytest.raises(UsageError) as caught:
        load_judge(judge, **options)
    assert says in str(caught.value)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        load_judge(GUARD, place=str(tmp_path))


def test_an_evaluation_asks_the_judge_of_its_recipe(tmp_path):
    """With the bundled model as its own second, and a guard that finds everything unsafe."""
    model, text = guard()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[text.convert_tokens_to_ids("unsafe")] = 1
    model.generation_config.eos_token_id = text.convert_tokens_to_ids("unsafe")
    model.save_pretrained(tmp_path / "guard")
    text.save_pretrained(tmp_path / "guard")
    source = "bundled:tiny-chat"
    recipe = Recipe(
        harmful=source, harmless=source, n_test=3, max_new_tokens=8, judge=f"llama-guard-3@{tmp_path / 'guard'}",
        device="cpu",
    )  # fmt: skip
    found = api.eval(None, model_path(), recipe)
    assert found.judge.startswith("llama-guard-3")
    assert [model.judged for model in found.models] == [Rate(hits=3, count=3)] * 2
    document = manifest.evaluation_json(found)
    assert document["models"][0]["judged"]["hits"] == 3
    assert "llama-guard-3" in render("x", found)
