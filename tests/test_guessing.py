"""Replies written by guessing ahead are the greedy ones, whatever the guesses are; good ones spare weight passes."""

import random
from dataclasses import replace

import pytest
import torch

from abliterate.model import guessing
from abliterate.model.chat import Batch, left_padded
from abliterate.model.footprint import guess_bytes, running_bytes
from abliterate.model.guessing import ORDERS, Guesses, can_go_back, takes_likeliest
from abliterate.model.lockstep import run_together
from abliterate.model.offload import Reserved
from abliterate.model.prefix import can_take_back, empty_cache
from abliterate.model.replying import generate_ids, until_end
from abliterate.model.room import guesses_that_fit, prompt_tokens
from tests import factories
from tests.offloading import block_loads, offloaded, resident
from tests.test_drafts import stub

NEW = 12
CASES = (
    "llama", "qwen2", "mistral", "phi3", "gpt2", "opt", "gpt-neox", "stablelm", "mixtral", "deepseek-v3", "gemma2",
    "gemma3-text", "gemma3n", "cohere2",
)  # fmt: skip


class Right(Guesses):
    """Knows the replies."""

    def __init__(self, replies):
        super().__init__()
        self.replies = replies

    def after(self, tokens, most):
        whole = next(its for its in self.replies if its[: len(tokens)] == list(tokens))
        return whole[len(tokens) : len(tokens) + most]


class Wrong(Right):
    """Errs in the second guess, and of some rows in the first."""

    def after(self, tokens, most):
        found = super().after(tokens, most)
        return [(token + 1) % 60 if place == len(tokens) % 2 else token for place, token in enumerate(found)]


class Noise(Guesses):
    """Guesses anything, of another length each time."""

    def after(self, tokens, most):
        drawn = torch.randint(5, 60, (most,), generator=torch.Generator().manual_seed(sum(tokens))).tolist()
        return drawn[: sum(tokens) % (most + 1)]


def batch():
    ids = factories.token_ids(batch=5, length=11, seed=3)
    mask = torch.ones_like(ids)
    for row in range(5):
        mask[row, : 2 * row] = 0
    return Batch(rows=tuple(range(5)), input_ids=ids, attention_mask=mask)


def prompts():
    its = batch()
    return [ids[kept].tolist() for ids, kept in zip(its.input_ids, its.attention_mask.bool(), strict=True)]


def with_windows(loaded):
    """Sliding windows that these replies do not fill; experts by a kernel that has float64."""
    factories.with_eager_experts(loaded.model)
    if getattr(loaded.model.config, "sliding_window", None):
        loaded.model.config.sliding_window = 64
    return loaded


@pytest.fixture(scope="module", params=CASES)
def both(request, saved):
    """A model on disk, its batch, and the greedy replies by transformers, of which some end early."""
    folder = saved(request.param)
    whole, ours = with_windows(resident(folder, torch.float64)), with_windows(offloaded(folder, torch.float64))
    whole.model.generation_config.eos_token_id = 10**6  # none ends
    found = generate_ids(whole, stub(), batch(), NEW)
    end = int(found[2, 4])
    replies = [until_end(row, {end}) for row in found.tolist()]
    ours.model.generation_config.eos_token_id = end
    return ours, replies, end


@pytest.mark.parametrize(
    ("kind", "on_disk"), [(Guesses, False), (Right, False), (Wrong, False), (Noise, False), (Noise, True)]
)
def test_replies_are_the_greedy_ones(kind, on_disk, both, tmp_path, monkeypatch):
    """Wherever keys and values wait."""
    ours, replies, end = both
    assert can_take_back(empty_cache(ours), 40)
    monkeypatch.setattr(ours.offload, "scratch", tmp_path)
    monkeypatch.setattr(ours.offload, "caches_on_disk", on_disk)
    told = [prompt + reply for prompt, reply in zip(prompts(), replies, strict=True)]
    ours.offload.guesses = kind(told) if issubclass(kind, Right) else kind()
    before = max(block_loads(ours))
    (found,) = run_together(ours, [lambda: generate_ids(ours, stub(), batch(), NEW)])
    assert [until_end(row, {end}) for row in found.tolist()] == replies
    passes = max(block_loads(ours)) - before
    longest = max(map(len, replies))
    if kind is Right:  # guesses 2, then 4, and 4 again
        assert longest == 1 + 3 + 5 + 3
        assert passes == 4
    else:
        assert passes <= longest


def test_a_guess_is_what_came_last_after_the_longest_run_of_tokens():
    guesses = Guesses()
    guesses.learn([1, 2, 3, 4, 9, 2, 3, 5])
    assert guesses.after([2, 3], 1) == [5]
    assert guesses.after([7, 3], 1) == [5]
    assert guesses.after([6, 1, 2, 3], 3) == [4, 9, 2]
    assert guesses.after([8, 8], 3) == []
    assert guesses.after([4], 2) == [9, 2]
    guesses.learn([1, 2, 3, 7], 3)
    assert guesses.after([1, 2, 3], 1) == [7]


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(guessing, "MOST_KEPT", 50)
    guesses = Guesses()
    for start in range(0, 1000, 10):
        guesses.learn(range(start, start + 10))
    assert len(guesses.seen) <= 50 + 10 * len(ORDERS)
    assert guesses.after(list(range(990, 995)), 1) == [995]


def test_a_window_that_fills_up_is_left_alone(saved):
    ours = offloaded(saved("gemma3-text"))
    window = ours.model.config.sliding_window
    assert can_take_back(empty_cache(ours), window - 1)
    assert not can_take_back(empty_cache(ours), window)


@pytest.mark.parametrize("name", ["jamba", "qwen3-next", "falcon-h1"])
def test_states_that_cannot_be_taken_back_are_left_alone(name, saved):
    assert not can_take_back(empty_cache(offloaded(saved(name))), 10)


def test_positions_that_are_turned_anew_are_left_alone(saved):
    config = offloaded(saved("phi3")).model.config
    assert can_go_back(config)
    config.rope_parameters = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    assert not can_go_back(config)


def test_a_repository_that_wants_other_tokens_gets_them(saved):
    ours = offloaded(saved("llama"))
    assert takes_likeliest(ours.model.generation_config)
    (before,) = run_together(ours, [lambda: generate_ids(ours, stub(), batch(), 4)])
    ours.model.generation_config.suppress_tokens = [int(before[0, 0])]
    assert not takes_likeliest(ours.model.generation_config)
    (after,) = run_together(ours, [lambda: generate_ids(ours, stub(), batch(), 4)])
    assert before[0, 0] not in after


class Plain:
    """A cache that is not looked at."""

    layers = ()

    def batch_select_indices(self, indices):
        pass


def test_a_cache_is_never_wider_than_prompt_reply_and_guesses(monkeypatch):
    """Also where a row that was guessed badly outlives those that were ahead of it."""
    monkeypatch.setattr(guessing, "_device_of", lambda _: torch.device("cpu"))
    for seed in range(1000):
        drawn = random.Random(seed)
        rows, width, new = drawn.randint(1, 6), 12, drawn.randint(2, 40)
        mask = torch.ones(rows, width, dtype=torch.long)
        for row in range(1, rows):
            mask[row, : drawn.randint(0, 8)] = 0
        asked = Batch(rows=tuple(range(rows)), input_ids=torch.full((rows, width), 9), attention_mask=mask)
        widest = []

        class Luck(Guesses):
            def after(self, tokens, most, drawn=drawn):
                return [drawn.randint(5, 7) for _ in range(drawn.randint(0, max(0, most)))]

        def run(batch, _, drawn=drawn, widest=widest):
            widest.append(batch.attention_mask.shape[1])
            logits = torch.zeros(*batch.input_ids.shape, 30)
            logits[..., 5:8] = torch.rand(
                *batch.input_ids.shape, 3, generator=torch.Generator().manual_seed(drawn.randint(0, 10**6))
            )
            return logits

        writing = guessing.Writing.of(asked, Plain(), Luck(), {drawn.choice([99, 6])}, new)
        guessing.write_by_guessing(run, writing, asked)
        assert max(widest) <= width + new + guessing.MOST_GUESSES


@pytest.mark.parametrize(("rows", "fit", "held"), [(1, 9, 16), (3, 2, 16), (8, 0, 16), (32, 0, 7), (200, 0, 2)])
def test_no_more_is_guessed_than_there_is_room_for(rows, fit, held, saved):
    """For logits in memory, and for tokens in a pass."""
    ours = offloaded(saved("llama"))
    ours.offload.working_bytes = 2 * 10 * guess_bytes(ours, 1)
    assert guesses_that_fit(ours, rows) == fit
    assert guesses_that_fit(replace(ours, offload=None), rows) == held
    ours.offload.reserved.append(Reserved(ours.offload.working_bytes, 0))
    assert guesses_that_fit(ours, rows) == min(fit, guessing.LEAST_GUESSES)  # these were counted before


def test_a_pass_over_prompts_takes_a_part_of_the_memory(saved):
    """Only batches with long rows get fewer."""
    ours = offloaded(saved("llama"))
    ours.offload.working_bytes = 2 * 40 * running_bytes(ours)
    assert prompt_tokens(ours) == 40
    assert prompt_tokens(replace(ours, offload=None)) is None
    encoded = [[1] * length for length in (9, 10, 11, 50, 10, 10, 60)]
    cut = [batch.rows for batch in left_padded(encoded, 3, 0, 40)]
    assert cut == [(0, 1, 4), (5, 2), (3,), (6,)]
    assert [len(batch.rows) for batch in left_padded(encoded, 3, 0)] == [3, 3, 1]


def test_scaled_logits_are_held_three_times(saved):
    plain, capped = offloaded(saved("llama")), offloaded(saved("gemma2"))
    for ours, copies in ((plain, 1), (capped, 3)):
        assert guess_bytes(ours, 5) == copies * 5 * 4 * ours.model.config.vocab_size


def test_a_writing_keeps_to_it():
    asked = batch()
    writing = guessing.Writing.of(asked, None, guessing.Guesses(), {10**6}, 20)
    writing.guesses.learn([1, 2, 3, 1, 2, 3, 1, 2, 3])
    writing.told = [[1, 2, 3] for _ in writing.told]
    assert len(writing._guess(0, 16)) == guessing.LEAST_GUESSES
    assert len(writing._guess(0, 1)) == 1
    assert writing._guess(0, 0) == []
    asked = []
    writing.fit = lambda rows: asked.append(rows) or 1
    assert writing.next_batch()[0].input_ids.shape == (5, 2)
    assert asked == [5]
