"""Stages of work in lockstep: each as if alone, in the weight passes of the longest."""

from functools import partial

import pytest
import torch

from abliterate.cli.lines import Lines
from abliterate.model.chat import Batch
from abliterate.model.forward import each_batch
from abliterate.model.interventions import ablated, added
from abliterate.model.lockstep import room_for, run_together, share
from abliterate.model.offload import Offloaded, Reserved
from abliterate.model.tasks import current
from abliterate.recipe import Recipe
from abliterate.workflow import pipeline
from abliterate.workflow.passes import passes_of
from bench.passes import OF_EDITED, Counted
from tests import factories
from tests.offloading import all_equal, batches, block_loads, load, logits, offloaded, resident

D = 48


@pytest.fixture
def pair(saved):
    return resident(saved("gemma2")), offloaded(saved("gemma2"))


def asked(loaded, places, passes=1):
    """A stage: some batches, each run a few times, as parts of it."""
    inputs = list(batches())

    def run(place):
        return [logits(loaded.model, *inputs[place]) for _ in range(passes)][-1]

    return run_together(loaded, [partial(run, place) for place in places])


def test_stages_share_the_passes_of_the_longest(pair):
    whole, ours = pair
    work = [((0, 1, 2), 1), ((3,), 3), ((4, 0), 2), ((), 1)]
    expected = [asked(whole, *its) for its in work]
    found = share(ours, [partial(asked, ours, *its) for its in work])
    for one, other in zip(found, expected, strict=True):
        assert all_equal(one, other)
    assert block_loads(ours) == [3] * ours.n_layers


def test_stages_may_have_stages(pair):
    whole, ours = pair

    def deep(loaded):
        inner = share(loaded, [partial(asked, loaded, (0, 1)), partial(asked, loaded, (2,), 2)])
        return [*inner, asked(loaded, (3, 4))]

    found, beside = share(ours, [partial(deep, ours), partial(asked, ours, (0, 1, 2))])
    for one, other in zip(found, deep(whole), strict=True):
        assert all_equal(one, other)
    assert all_equal(beside, asked(whole, (0, 1, 2)))
    assert block_loads(ours) == [3] * ours.n_layers


def test_an_intervention_of_a_stage_is_one_of_its_parts(pair):
    whole, ours = pair
    r, v = (factories.random_directions(D, seed=seed).float() for seed in (1, 2))

    def changed(loaded):
        with ablated(loaded, r):
            return asked(loaded, (0, 1))

    def changed_twice(loaded):
        with ablated(loaded, r):

            def inner():
                with added(loaded, v[:, 0], 1):
                    return asked(loaded, (2, 3))

            return share(loaded, [inner, partial(asked, loaded, (4,))])

    expected = changed(whole), changed_twice(whole), asked(whole, (0,))
    found = share(ours, [partial(changed, ours), partial(changed_twice, ours), partial(asked, ours, (0,))])
    assert all_equal(found[0], expected[0])
    assert all_equal(found[1][0], expected[1][0])
    assert all_equal(found[1][1], expected[1][1])
    assert all_equal(found[2], expected[2])
    assert not torch.equal(expected[0][0], expected[2][0])


@pytest.mark.parametrize("when", ["at once", "later"])
def test_what_a_part_raises_its_stage_may_catch(when, pair):
    whole, ours = pair
    inputs, ended = list(batches()), []

    def fail():
        if when == "later":
            logits(ours.model, *inputs[1])
        raise ArithmeticError(when)

    def beside():
        try:
            return [logits(ours.model, *inputs[0]) for _ in range(4)]
        finally:
            ended.append(current())

    def stage():
        with pytest.raises(ArithmeticError, match=when):
            run_together(ours, [fail, beside])
        return asked(ours, (2,))

    found, other = share(ours, [stage, partial(asked, ours, (3, 4))])
    assert all_equal(found, asked(whole, (2,)))
    assert all_equal(other, asked(whole, (3, 4)))
    assert len(ended) == (when == "later")
    assert ours.offload.loaded == ()


def test_what_a_stage_raises_ends_all(pair):
    _, ours = pair

    def fail():
        asked(ours, (0, 1))
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        share(ours, [fail, partial(asked, ours, (2, 3), 5)])
    assert ours.offload.loaded == ()
    assert all_equal(asked(ours, (0,)), asked(pair[0], (0,)))


@pytest.mark.parametrize(("fit", "passes"), [(100, 2), (2, 4), (1, 8)])
def test_stages_wait_for_memory(fit, passes, pair, monkeypatch):
    """Two stages of two batches, each run twice."""
    whole, ours = pair
    monkeypatch.setattr("abliterate.model.forward.waiting_bytes", lambda *_, **__: 1)
    monkeypatch.setattr("abliterate.model.forward.running_bytes", lambda *_: 0)
    monkeypatch.setattr("abliterate.model.forward.logit_bytes", lambda *_: 0)
    inputs = list(batches())
    ours.offload.working_bytes = fit * 2  # of two rows each
    at_once = []

    def stage(loaded, places):
        def work(batch, _):
            if loaded.offload:
                at_once.append(sum(its.waits for its in loaded.offload.reserved))
            return [logits(loaded.model, batch.input_ids, batch.attention_mask) for _ in range(2)][-1]

        asked = [Batch(rows=(place,), input_ids=inputs[place][0], attention_mask=inputs[place][1]) for place in places]
        return [its for _, its in each_batch(loaded, asked, work)]

    found = share(ours, [partial(stage, ours, (0, 1)), partial(stage, ours, (2, 3))])
    assert all_equal(found[0], stage(whole, (0, 1)))
    assert all_equal(found[1], stage(whole, (2, 3)))
    assert block_loads(ours) == [passes] * ours.n_layers
    assert max(at_once) <= max(fit * 2, 2)
    assert ours.offload.reserved == []


@pytest.mark.parametrize(("lasting", "taken"), [(True, 2), (False, 1)])
def test_who_lasts_rather_waits_for_one_pass_than_to_take_turns(lasting, taken, pair):
    """Two of its batches fit, one beside the other stage."""
    _, ours = pair
    ours.offload.working_bytes = 20
    got = []

    def passing():
        with room_for(ours.offload, [10], 0):
            asked(ours, (0,))

    def writing():
        with room_for(ours.offload, [10, 10], 0, lasting=lasting) as count:
            got.append(count)
            asked(ours, (1,))

    share(ours, [passing, writing])
    assert got == [taken]
    assert ours.offload.reserved == []


def test_memory_that_nobody_gives_back_is_noticed(saved):
    ours = offloaded(saved("llama"))
    ours.offload.working_bytes = 10
    ours.offload.reserved.append(Reserved(10, 0))

    def stage():
        with room_for(ours.offload, [5], 0):
            return

    with pytest.raises(AssertionError, match="nobody gives back"):
        share(ours, [stage, stage])
    ours.offload.reserved.clear()
    assert share(ours, [stage, stage]) == [None, None]


def test_generation_is_the_same_beside_other_stages(saved):
    whole, ours = load(saved("llama")), offloaded(saved("llama"))
    inputs = list(batches())

    def reply(model, place, tokens):
        ids, mask = inputs[place]
        return model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )

    def stage(places, tokens):
        return run_together(ours, [partial(reply, ours.model, place, tokens) for place in places])

    found = share(ours, [partial(stage, (0, 1), 6), partial(stage, (2,), 3)])
    assert all_equal(found[0], [reply(whole, place, 6) for place in (0, 1)])
    assert all_equal(found[1], [reply(whole, 2, 3)])
    assert max(block_loads(ours)) <= 6


def test_a_whole_run_takes_the_passes_that_are_announced(tmp_path):
    """Labels, a few for the choice, one for each token of all replies, and one for the edited model."""
    recipe = Recipe(
        **dict.fromkeys(("harmful", "harmless"), "bundled:tiny-chat"), n_train=8, n_val=4, n_test=4, max_new_tokens=10,
        reply_tokens=10, estimators=("difference-of-means",), controls=True, refusal_tokens=("I",),
    )  # fmt: skip
    asked = recipe.with_changes({"memory_bytes": 2**25 + 2**22})
    counted = Counted()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Offloaded, "__init__", counted.opened(Offloaded.__init__))
        patch.setattr(Offloaded, "_working_bytes", lambda _: 2**30)  # or stages wait for memory, and take more passes
        ours = pipeline.run(None, tmp_path / "ours", asked, on_event=counted.hear)
    counted.ended("")
    whole = pipeline.run(None, tmp_path / "whole", recipe)
    assert ours.evaluation.samples == whole.evaluation.samples
    for one, other in zip(ours.evaluation.models, whole.evaluation.models, strict=True):
        assert one.kl_nats == pytest.approx(other.kl_nats, abs=1e-5)
        assert one.completion_nats == pytest.approx(other.completion_nats, abs=1e-5)
        for kind, its in one.along.items():
            assert its == pytest.approx(other.along[kind], abs=1e-3)
    assert ours.verification.behaviour.stream_share == pytest.approx(
        whole.verification.behaviour.stream_share, abs=1e-6
    )
    announced = passes_of(asked)
    assert counted.passes["labels and means"] <= announced["measure"]
    assert counted.passes["selection"] <= announced["select"] + 2  # more rounds, where the first leave it open
    assert counted.passes["base: replies, likelihoods, hooks"] <= asked.evaluate.max_new_tokens + 1
    assert counted.passes[OF_EDITED] == 1
    assert any("8 of 8 replies are, token for token" in text for text in counted.said)


def test_the_papers_way_filters_in_one_pass_and_measures_in_another(tmp_path):
    """With the refusal tokens given and no replies, a direction and its proof take eight passes or fewer.

    Two more may be taken: one tries whether padding is harmless, one is for a second round of the choice.
    """
    recipe = Recipe(
        **dict.fromkeys(("harmful", "harmless"), "bundled:tiny-chat"), n_train=8, n_val=4, n_test=4,
        labels="first-token", estimators=("difference-of-means",), refusal_tokens=("I",),
    )  # fmt: skip
    asked = recipe.with_changes({"memory_bytes": 2**25 + 2**22})
    counted = Counted()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Offloaded, "__init__", counted.opened(Offloaded.__init__))
        patch.setattr(Offloaded, "_working_bytes", lambda _: 2**30)
        said: list[str] = []
        lines = Lines(said.append)

        def hear(event):
            counted.hear(event)
            lines.listen(event)

        ours = pipeline.run(None, tmp_path / "ours", asked, with_evaluation=False, on_event=hear)
    counted.ended("")
    assert any("filter validation prompts" in text for text in said)
    announced = passes_of(asked, ("measure", "select", "verify"))
    assert counted.passes["filter and means"] == announced["measure"] == 2
    assert sum(counted.passes.values()) <= sum(announced.values()) + 2
    assert sum(announced.values()) <= 8
    whole = pipeline.run(None, tmp_path / "whole", recipe, with_evaluation=False)
    assert ours.directions.chosen.id == whole.directions.chosen.id
    assert torch.equal(ours.directions.chosen.vector, whole.directions.chosen.vector)
