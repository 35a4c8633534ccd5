"""Replies read off drafts are the greedy ones, whatever the drafts are; good ones spare passes."""

from pathlib import Path

import pytest
import torch

from abliterate.checkpoint.opening import open_checkpoint
from abliterate.data.bundled import model_path
from abliterate.model import replying
from abliterate.model.chat import Batch, ChatFormat
from abliterate.model.drafts import TIE_NATS, agreed, follow
from abliterate.model.interventions import observed
from abliterate.model.load import load_model
from abliterate.model.prefix import empty_cache, is_plain
from abliterate.model.replying import Watching, ends_of, generate_ids, generate_tokens, until_end
from tests.offloading import batches, block_loads, resident

MODELS = Path(__file__).parent / "models"
PROMPTS = (
    "What is a lake?", "Tell me the secret of the tower, please!", "Count to 7", "Where does Ann live?", "Hi you",
    "What is the colour of the kizkin?", "How do I open the gate of the north tower?",
)  # fmt: skip
NEW = 14


@pytest.fixture(scope="module", params=["tiny-chat", "tiny-gemma3", "tiny-qwen2"])
def model(request):
    folder = model_path() if request.param == "tiny-chat" else MODELS / request.param
    loaded = load_model(open_checkpoint(folder), device="cpu")
    return loaded, ChatFormat(loaded.tokenizer)


@pytest.fixture(scope="module")
def replies(model):
    found = generate_tokens(*model, PROMPTS, max_new_tokens=NEW, batch_size=3)
    assert len(set(map(tuple, found))) > 3
    assert any(its[-1] in ends_of(model[0]) for its in found)
    return found


def spoilt(replies):
    """Every reply with another token in it, one place further on each time."""
    return [[*its[: n % len(its)], 5, *its[n % len(its) + 1 :]] for n, its in enumerate(replies)]


DRAFTS = {
    "the replies": lambda its: its,
    "nothing": lambda its: [[] for _ in its],
    "those of other prompts": lambda its: [*its[1:], its[0]],
    "one token wrong": spoilt,
    "cut short": lambda its: [one[: len(one) // 2] for one in its],
    "too long": lambda its: [one + its[0] for one in its],
    "noise": lambda its: torch.randint(5, 600, (len(its), 9), generator=torch.Generator().manual_seed(0)).tolist(),
}


@pytest.mark.parametrize("kind", DRAFTS)
def test_replies_are_the_greedy_ones(kind, model, replies):
    drafts = DRAFTS[kind](replies)
    assert follow(*model, PROMPTS, drafts, max_new_tokens=NEW, batch_size=3, task="x") == replies


def test_shorter_replies_of_longer_drafts(model, replies):
    found = follow(*model, PROMPTS, replies, max_new_tokens=3, batch_size=3, task="x")
    assert found == [its[:3] for its in replies]


def test_what_begins_a_reply_is_seen_as_ever(model, replies):
    seen = []
    for write in (
        lambda watching: generate_tokens(*model, PROMPTS, max_new_tokens=NEW, batch_size=3, watching=watching),
        lambda watching: follow(*model, PROMPTS, spoilt(replies), max_new_tokens=NEW, batch_size=3, task="x",
                                watching=watching),
    ):  # fmt: skip
        first, states = {}, {}

        def see(rows, layer, values, states=states):
            assert layer == 2
            states.update(zip(rows, values, strict=True))

        def show(rows, logits, first=first):
            first.update(zip(rows, logits.log_softmax(-1), strict=True))

        write(Watching(first=show, see=see, layers=(2,), n_positions=3))
        seen.append([torch.stack([its[row] for row in range(len(PROMPTS))]) for its in (first, states)])
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)
    assert seen[0][1].shape == (len(PROMPTS), 3, model[0].d_model)


@pytest.mark.parametrize(("kind", "passes"), [("the replies", 1), ("cut short", 8), ("nothing", 15)])
def test_good_drafts_spare_weight_passes(kind, passes):
    ours = load_model(open_checkpoint(model_path()), device="cpu", memory_bytes=2**25 + 2**22)
    assert ours.offload is not None
    chat = ChatFormat(ours.tokenizer)
    replies = generate_tokens(ours, chat, PROMPTS, max_new_tokens=NEW, batch_size=3)
    before = max(block_loads(ours))
    assert before == NEW
    assert follow(ours, chat, PROMPTS, DRAFTS[kind](replies), max_new_tokens=NEW, batch_size=3, task="x") == replies
    assert max(block_loads(ours)) - before <= passes


def test_a_tie_goes_to_the_draft_and_no_more_than_a_tie():
    near = TIE_NATS[4]
    logits = torch.tensor([[0.0, 1.0, 1.0 - near / 2], [2.0, 2.0 - 2 * near, 0.0], [0.0, 0.0, 3.0]])
    assert agreed(logits, [2, 0]) == [2, 0, 2]
    assert agreed(logits, [1, 0]) == [1, 0, 2]
    assert agreed(logits, [1, 1]) == [1, 0]
    assert agreed(logits[:1], []) == [1]


def test_a_reply_ends_with_the_token_that_ends_it():
    assert until_end([4, 5, 2, 0, 0], {2}) == [4, 5, 2]
    assert until_end([4, 5], {2}) == [4, 5]
    assert until_end([], {2}) == []


def stub():
    """As much of a chat format as writing asks about."""
    chat = ChatFormat.__new__(ChatFormat)
    chat.rows, chat.context, chat.pads = None, None, True
    chat.tokenizer = type("Tokenizer", (), {"pad_token_id": 0, "eos_token_id": None})
    return chat


@pytest.mark.parametrize(
    "name", ["llama", "gemma3-text", "gemma2", "mixtral", "gpt-oss", "qwen3-next", "falcon-h1", "gemma3n", "opt"]
)
def test_rows_that_have_ended_leave_their_batch(name, saved, monkeypatch):
    """Whatever the cache is: the tokens are those of a batch that stays whole."""
    loaded = resident(saved(name))
    loaded.model.generation_config.eos_token_id = None
    ids, mask = (torch.cat([one, one.flip(1)]) for one in list(batches())[1])
    mask[2:] = 1
    options = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0}
    whole = loaded.model.generate(input_ids=ids, max_new_tokens=9, **options)[:, ids.shape[1] :]
    end = int(whole[1, 2])
    expected = [until_end(row, {end}) for row in whole.tolist()]
    assert any(len(its) < 4 for its in expected)
    loaded.model.generation_config.eos_token_id = end
    sizes = []
    with observed(loaded, lambda layer, x: sizes.append(len(x)) if not layer else None):
        for stretch in (2, 3, 16):
            monkeypatch.setattr(replying, "STRETCH", stretch)
            batch = Batch(rows=(0, 1, 2, 3), input_ids=ids, attention_mask=mask)
            found = generate_ids(loaded, stub(), batch, 9)
            assert [until_end(row, {end}) for row in found.tolist()] == expected
            assert found.shape[1] == (9 if any(len(its) == 9 for its in expected) else max(map(len, expected)))
    plain = is_plain(empty_cache(loaded))
    assert plain == (name not in ("qwen3-next", "falcon-h1"))
    lengths = [*map(len, expected)]
    apart = any(min(lengths) <= done < max(lengths) for done in range(2, 9, 2))
    assert apart or name in ("gemma3n", "opt")  # which say the same in all rows
    assert (min(sizes) < 4) == (plain and apart) or name == "gemma3n"  # whose blocks take four streams
