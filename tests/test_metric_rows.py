"""What the study of selection metrics runs behind kept prompts is what running them whole gives."""

import pytest
import torch

from abliterate.checkpoint.source import open_folder
from abliterate.data.bundled import model_path
from abliterate.method.directions import Subspace
from abliterate.model.chat import ChatFormat
from abliterate.model.interventions import ablated
from abliterate.model.likelihood import predict
from abliterate.model.load import load_model
from abliterate.model.replying import generate
from abliterate.model.rowwise import subspaces_ablated
from bench.metric_rows import run_rows

PROMPTS = ("What is a lake?", "Count to 7", "Where is the colour of the kizkin to be found?")
TAILS = ((5, 6, 7, 8), (9,), (10, 11))
NEAR = {"atol": 2e-4, "rtol": 0}


@pytest.fixture(scope="module")
def loaded():
    return load_model(open_folder(model_path(), name="tiny-chat"), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def chat(loaded):
    return ChatFormat(loaded.tokenizer)


def directions(loaded):
    return torch.randn(2, loaded.d_model, generator=torch.Generator().manual_seed(0))


def whole(loaded, chat, encoded):
    found = {}
    rows = [[*ids, *tail] for ids, tail in zip(encoded, TAILS, strict=True)]
    predict(
        loaded,
        chat.pack,
        rows,
        list(map(len, TAILS)),
        lambda _, its, __: [("", its)],
        lambda row, _, its: found.update({row: its}),
        batch_size=8,
    )
    return [found[row] for row in range(len(rows))]


def test_candidates_together_give_what_each_gives_alone(loaded, chat):
    encoded, vectors = [chat.encode(prompt) for prompt in PROMPTS], directions(loaded)
    with subspaces_ablated(loaded, [Subspace(vectors=its[:, None]) for its in vectors]):
        rows = run_rows(loaded, encoded, chat.pad_id, copies=2)
        forced = rows.of(range(6)).forced(TAILS * 2)
        ends = {chat.pad_id, chat.tokenizer.eos_token_id}
        replies = [chat.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in rows.greedy(12, ends)]
    for place, vector in enumerate(vectors):
        with ablated(loaded, vector[:, None]):
            alone = whole(loaded, chat, encoded)
            said = generate(loaded, chat, PROMPTS, max_new_tokens=12)
        for mine, its in zip(forced[3 * place : 3 * place + 3], alone, strict=True):
            torch.testing.assert_close(mine.double(), its.double(), **NEAR)
        assert replies[3 * place : 3 * place + 3] == said


def test_what_is_run_behind_some_rows_leaves_the_others_as_they_are(loaded, chat):
    rows = run_rows(loaded, [chat.encode(prompt) for prompt in PROMPTS], chat.pad_id)
    before = rows.of([2, 0]).forced([TAILS[2], TAILS[0]])
    rows.of([1, 1]).greedy(4, {chat.pad_id})
    after = rows.of([0, 1, 2]).forced(TAILS)
    torch.testing.assert_close(before[0], after[2], **NEAR)
    torch.testing.assert_close(before[1], after[0], **NEAR)
