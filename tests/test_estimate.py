"""What a run says beforehand about the time it will take."""

import re
from dataclasses import replace
from itertools import count

import pytest
import torch

from abliterate.checkpoint.output import writing_speed
from abliterate.events import Noted, duration
from abliterate.model import load
from abliterate.model.chat import ChatFormat
from abliterate.recipe import Recipe
from abliterate.workflow import pipeline
from abliterate.workflow.estimate import (
    Amount,
    Counts,
    Speed,
    amounts,
    counts_of,
    not_counted,
    seconds,
    sentence,
    timed,
)
from abliterate.workflow.passes import cost
from abliterate.workflow.session import open_session
from tests.offloading import block_loads, offloaded
from tests.test_drafts import stub

SOURCES = {"harmful": "bundled:tiny-chat", "harmless": "bundled:tiny-chat"}
ALL = ("measure", "select", "edit", "verify", "replies")
COUNTS = Counts(
    prompt_tokens=20.0, own_tokens=15.0, batch_size=32, train=256, probed=128, filtered=True, harmful_val=32,
    harmless_val=32, candidates=100, scored=0.5, held_out=32, test={"harmful": 100, "harmless": 100, "look-alike": 50},
    models=2, reply_tokens=128, output_bytes=10**9,
)  # fmt: skip
SPEED = Speed(prompt_tokens_per_s=1000.0, step_s=0.1, load_s=4.0, bytes_per_s=5e8)


def test_each_stage_is_counted_for_what_it_does():
    found = amounts(COUNTS, ALL)
    assert list(found) == list(ALL)
    assert found["measure"] == Amount(prompt_tokens=20.0 * (128 + 2 * 256), steps=4 * 24)
    assert found["select"].prompt_tokens == 20 * (64 + 32) + 15 * 100 * 0.5 * 96
    assert found["edit"] == Amount(moved_bytes=10**9)
    assert found["verify"] == Amount(prompt_tokens=20.0 * 3 * 32, moved_bytes=2 * 10**9, loads=1)
    assert found["replies"].steps == 2 * 128 * (4 + 4 + 2)
    assert found["replies"].prompt_tokens == 2 * (20 * 250 + 100 * (20 + 128))
    assert found["replies"].loads == 0
    assert amounts(COUNTS, ["replies"])["replies"].loads == 1
    assert list(amounts(COUNTS, ["verify"])) == ["verify"]


def test_replies_that_label_prompts_spare_the_passes_that_filter():
    found = amounts(replace(COUNTS, probed=0, label_tokens=32), ALL)
    assert found["measure"] == Amount(prompt_tokens=20.0 * 256, steps=8 * 32)
    assert found["select"].steps == 2 * 32


def test_trials_of_a_search_are_counted_in_place_of_scores():
    found = amounts(replace(COUNTS, label_tokens=32, trials=10, trial_tokens=16), ALL)["select"]
    assert found == Amount(prompt_tokens=20.0 * (64 + 32 + 10 * 64), steps=2 * 32 + 10 * 16)


def test_less_is_asked_where_the_recipe_asks_less():
    given = amounts(replace(COUNTS, probed=0, filtered=False, scored=1.0), ALL)
    assert given["measure"] == Amount(prompt_tokens=20.0 * 256)
    assert given["select"].prompt_tokens == 20 * 32 + 15 * 100 * 96


def test_seconds_follow_from_amounts_and_paces():
    amount = Amount(prompt_tokens=3000.0, steps=20, moved_bytes=10**9, loads=2)
    assert seconds(amount, SPEED) == pytest.approx(3 + 2 + 2 + 8)
    assert seconds(amount, replace(SPEED, bytes_per_s=None, load_s=0.0)) == pytest.approx(3 + 2)


def test_the_sentence_has_every_stage_and_the_sum():
    text = sentence(COUNTS, ALL, SPEED, left_out=["tasks"])
    each = {stage: seconds(amount, SPEED) for stage, amount in amounts(COUNTS, ALL).items()}
    assert each["measure"] == pytest.approx(22.4)
    parts = {stage: duration(its) for stage, its in each.items()}
    assert parts == {"measure": "22 s", "select": "74 s", "edit": "2 s", "verify": "10 s", "replies": "5 min"}
    said = ", ".join(f"{stage} {its}" for stage, its in parts.items())
    assert f"this will take about {duration(sum(each.values()))}: {said} at most (128 tokens each)" in text
    assert "1,000 tokens of prompts/s, 320 tokens of replies/s, 500 MB/s written" in text
    assert text.endswith("; not counted: tasks")
    alone = sentence(COUNTS, ["verify"], replace(SPEED, bytes_per_s=None))
    assert alone == "this will take about 6 s: verify 6 s; by a short trial: 1,000 tokens of prompts/s"


def test_what_cannot_be_known_is_named():
    assert not_counted(Recipe(), ALL) == []
    asked = Recipe(backend="vllm", tasks=("mmlu",), judge="llama-guard-3")
    assert not_counted(asked, ALL) == ["replies, which vLLM writes", "tasks", "the judge"]
    assert not_counted(asked, ["verify"]) == []


def test_counts_are_those_of_the_recipe():
    session = open_session(None, Recipe(**SOURCES, n_train=24, n_val=6, n_test=6, max_new_tokens=8))
    found = counts_of(session, ALL, models=2, output_bytes=7)
    contrast = session.contrast
    assert found.train == len(contrast.harmful_train.prompts) + len(contrast.harmless_train.prompts)
    assert (found.harmful_val, found.harmless_val) == (
        len(contrast.harmful_val.prompts), len(contrast.harmless_val.prompts)
    )  # fmt: skip
    tested = {"harmful": contrast.harmful_test, "harmless": contrast.harmless_test}
    assert found.test == {kind: len(its.prompts) for kind, its in tested.items()}
    early = session.loaded.n_layers - session.loaded.n_layers // 5
    assert found.candidates == len(session.chat.positions) * early * len(session.recipe.find.estimators)
    assert 0 < found.own_tokens < found.prompt_tokens < 40
    assert (found.models, found.reply_tokens, found.output_bytes) == (2, 8, 7)
    assert counts_of(session, ["measure"], models=2, output_bytes=0).test == {}
    asked = replace(session, recipe=session.recipe.with_changes({"controls": True, "all_scores": True}))
    assert counts_of(asked, ALL, models=2, output_bytes=0).models == 4
    assert counts_of(asked, ALL, models=2, output_bytes=0).scored == 1


class Slow:
    """A clock by which a forward pass takes a second for every token."""

    def __init__(self, monkeypatch, per_token):
        self.now, self.tokens, self.per_token = 0.0, [], per_token
        monkeypatch.setattr("abliterate.workflow.estimate.run_batch", self.run)

    def run(self, loaded, batch):
        self.tokens.append(batch.input_ids.numel())
        self.now += self.per_token * batch.input_ids.numel()
        return torch.zeros(len(batch.rows), 1, 5)

    def __call__(self):
        return self.now


@pytest.mark.parametrize(("per_token", "ran"), [(1.0, [32, 10]), (1e-3, [32, 32, 320]), (1.6e-3, [32, 32, 310])])
def test_the_trial_is_short_on_a_slow_machine_and_whole_on_a_fast_one(per_token, ran, monkeypatch):
    loaded = load.load_model(open_session(None, Recipe()).checkpoint, device="cpu")
    chat = ChatFormat(loaded.tokenizer)
    clock = Slow(monkeypatch, per_token)
    per_s, step_s = timed(loaded, chat, [list(range(10))] * 32, batch_size=32, clock=clock)
    assert clock.tokens == ran
    assert step_s == pytest.approx(32 * per_token)
    assert per_s == pytest.approx(1 / per_token)


@pytest.fixture(scope="module")
def heard(tmp_path_factory):
    """The events of a short run."""
    events = []
    recipe = Recipe(**SOURCES, n_train=24, n_val=6, n_test=6, max_new_tokens=8)
    pipeline.run(None, tmp_path_factory.mktemp("run") / "out", recipe, on_event=events.append)
    return events


def test_a_run_says_it_before_it_begins(heard):
    notes = [(place, event.text) for place, event in enumerate(heard) if isinstance(event, Noted)]
    ((said, text),) = [note for note in notes if "by a short trial" in note[1]]
    assert [event.task.split()[0] for event in heard[:said]] == ["load", "load"]
    assert re.search(r"this will take about .+: measure .+, select .+, edit .+, verify .+, replies .+ at most", text)
    assert "MB/s written" in text


def test_every_long_stage_begins_advances_and_ends(heard):
    done, totals, ended = {}, {}, set()
    for event in heard:
        name, kind = getattr(event, "task", None), type(event).__name__
        if kind == "Started":
            totals[name] = done.setdefault(name, 0) + event.total
        elif kind == "Advanced":
            done[name] += event.amount
        elif kind == "Finished":
            ended.add(name)
    assert ended == set(totals)
    never = {name for name in totals if not done[name]}
    assert all(name.startswith("load ") for name in never)
    for name in (
        "verify: the base, as it is and under hooks",
        "verify: the written checkpoint against the hooked base",
        "edited: likelihood of the base's replies",
        "base: reply to harmful prompts",
    ):
        assert done[name] == totals[name] > 0
    assert len(never) == 2


def test_the_disk_is_tried_without_a_trace(tmp_path):
    assert writing_speed(tmp_path, 2**20) > 0
    assert writing_speed(tmp_path, 0) is None
    assert not list(tmp_path.iterdir())


def test_out_of_core_the_first_reading_gives_the_pace():
    assert "which takes" not in cost(10**10, {"measure": 2})
    assert "2 times (measure 2), 0.02 TB in all, which takes about 40 s at the 500 MB/s" in cost(
        10**10, {"measure": 2}, bytes_per_s=5e8
    )
    heard = []
    recipe = Recipe(**SOURCES, memory_bytes=2**25 + 2**22, n_train=8, n_val=4, n_test=4)
    session = open_session(None, recipe, on_event=heard.append)
    pipeline.say_cost(session, ["verify"])
    assert session.loaded.offload is not None
    assert re.search(r"\(verify 2\).*takes about .+ MB/s of the first reading", heard[-1].text)
    pipeline.say_cost(session, ["verify"])
    assert "which takes" not in heard[-1].text


def test_out_of_core_the_first_block_stands_for_all(saved):
    """Nothing else is read, and reading does not count."""
    loaded = offloaded(saved("llama"))
    chat = stub()
    assert loaded.offload.prefetch
    per_s, step_s = timed(loaded, chat, [list(range(5, 17))] * 8, batch_size=8)
    loads, first = block_loads(loaded), next(unit for unit in loaded.offload.units if unit.is_block)
    assert set(loads[1:]) == {0}
    of_rows = sum(rows.bytes_read for rows in loaded.offload.rows)
    assert loaded.offload.bytes_read == loads[0] * first.stored_bytes + of_rows
    assert loaded.offload.prefetch
    assert step_s > 0
    assert per_s > 0


def test_what_a_block_takes_is_what_its_passes_say(saved, monkeypatch):
    """All blocks as the first one ran: by a clock that goes on by a second at each look, one second each."""
    loaded = offloaded(saved("llama"))
    ticks = count()
    monkeypatch.setattr("abliterate.model.offload.time.perf_counter", lambda: float(next(ticks)))
    assert timed(loaded, stub(), [list(range(5, 17))] * 8, batch_size=8)[1] == loaded.n_layers


def test_out_of_core_what_takes_longer_is_the_estimate():
    passes = {"measure": 30, "select": 3}
    assert "if not longer" in cost(10**9, passes, bytes_per_s=1e9)
    assert "about 33 s in all" in cost(10**9, passes, bytes_per_s=1e9, arithmetic_s=10.0)
    assert "about 2 min in all" in cost(10**9, passes, bytes_per_s=1e9, arithmetic_s=120.0)
    assert "in all," not in cost(10**9, passes, arithmetic_s=10.0).partition("TB")[2]
