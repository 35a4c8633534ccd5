"""What users bring: small changes of the bundled model, each standing for a kind of checkpoint or prompt that is about.

The right behaviour is to do it, or to refuse it in two lines that say what is wrong with what.
"""

import json
import shutil

import pytest
import torch
from tokenizers import AddedToken
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from abliterate.cli.app import app
from abliterate.data.bundled import model_path
from abliterate.errors import PromptError
from abliterate.model.forward import generate
from abliterate.recipe import Recipe
from abliterate.workflow.session import open_session
from tests import factories

SOURCES = {"harmful": "bundled:tiny-chat", "harmless": "bundled:tiny-chat"}


@pytest.fixture
def model(tmp_path):
    """A copy of the bundled model, to be changed."""
    return shutil.copytree(model_path(), tmp_path / "model")


def rewrite(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")


def tokenizer_of(folder):
    return PreTrainedTokenizerFast.from_pretrained(folder)


def notes_of(model, **recipe):
    """A session, and what it says."""
    said = []
    session = open_session(model, Recipe(**{**SOURCES, **recipe}), on_event=lambda event: said.append(str(event)))
    return session, said


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


# --- ids and positions that the model does not have -------------------------------------------------------------------


def test_a_token_without_a_row_is_named(model):
    changed = tokenizer_of(model)
    changed.add_tokens([AddedToken(f"<|{n}|>", special=True) for n in range(623, 701)])
    changed.chat_template += "{{ '<|700|>' }}"
    changed.save_pretrained(model)
    shown = run("measure", model, "--harmful", "bundled:tiny-chat", "--harmless", "bundled:tiny-chat")
    assert shown.exit_code == 5
    assert "token '<|700|>' has the id 700, and the embedding has 623 rows" in shown.stderr
    assert "do not belong together" in shown.stderr


def test_a_padding_token_without_a_row_is_not_used(model):
    changed = tokenizer_of(model)
    changed.add_special_tokens({"pad_token": "<|padding|>"})
    assert changed.pad_token_id >= 623
    changed.save_pretrained(model)
    session, _ = notes_of(model)
    assert session.chat.pad_id == changed.eos_token_id
    replies = generate(session.loaded, session.chat, ["Hi", "What is a lake?"], max_new_tokens=2)
    assert len(replies) == 2


LONG_PROMPT = "Tell me about it. " + "word " * 900


@pytest.fixture
def prompts(tmp_path):
    """Sixty prompts, one of them far beyond the context of the bundled model."""
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([LONG_PROMPT, *(f"What is the name of town {n} by lake {n * n}?" for n in range(59))]))
    return path


def test_prompts_beyond_the_context_are_left_out_and_counted(model, prompts):
    session, said = notes_of(model, harmful=str(prompts))
    parts = {name: its for name, its in session.contrast.hashes().items() if "harmful_" in name}
    assert sum(its["too_long"] for its in parts.values()) == 1
    assert LONG_PROMPT.strip() not in session.contrast.harmful_train.texts
    (note,) = [text for text in said if "left out" in text]
    assert "1 of" in note
    assert "exceed the context of 128 tokens" in note
    assert "Tell me about it." in note
    with pytest.raises(PromptError, match=r"a prompt takes .* tokens, and the context holds 128: 'Tell me"):
        session.chat.encode(LONG_PROMPT)


def test_prompts_that_are_all_beyond_the_context_are_refused(model, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("\n".join(f"{n} {'word ' * 200}{n * n}" for n in range(12)))
    shown = run("measure", model, "--harmful", path, "--harmless", "bundled:tiny-chat")
    assert shown.exit_code == 2
    assert "long.txt" in shown.stderr
    assert "exceed the context of 128 tokens" in shown.stderr


@pytest.mark.parametrize(
    ("file", "key"), [("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")]
)
def test_the_context_is_the_least_that_is_stated(model, file, key):
    rewrite(model / file, **{key: 40})
    assert notes_of(model)[0].chat.context == 40


def test_a_prompt_far_longer_than_the_rest_is_pointed_out(model, prompts):
    rewrite(model / "config.json", max_position_embeddings=4096)
    rewrite(model / "tokenizer_config.json", model_max_length=10**30)
    session, said = notes_of(model, harmful=str(prompts))
    assert session.fitting(session.contrast.harmless_test) == session.contrast.harmless_test
    (note,) = [text for text in said if "longest prompt" in text]
    assert "prompts.txt" in note


def test_a_model_with_learned_positions_stops_where_they_end(model):
    config = GPT2Config(vocab_size=623, n_positions=40, n_embd=32, n_layer=2, n_head=2, eos_token_id=[], bos_token_id=1)
    torch.manual_seed(0)
    factories.save(GPT2LMHeadModel(config), model.with_name("gpt2"), dtype=torch.float32)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(model / name, model.with_name("gpt2"))
    session, _ = notes_of(model.with_name("gpt2"))
    length = session.chat.length("What is a lake?")
    assert length < 40
    found = session.loaded, session.chat, ["What is a lake?"]
    assert generate(*found, max_new_tokens=100)[0]
