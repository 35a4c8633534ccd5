"""COSMIC chooses by the code of the metric: what it gives for hooks of whole passes, prompt by prompt."""

import math
from dataclasses import replace

import pytest
import torch

from abliterate.arch.registry import family_of
from abliterate.errors import UsageError
from abliterate.method.measurement import chosen_by
from abliterate.method.moments import ActivationStats, Moments
from abliterate.method.selection import COSMIC, SelectionRule, choose
from abliterate.method.selection_metrics import Cosmic, cosmic, evaluation_layers
from abliterate.model.asking import can_be_scored
from abliterate.model.forward import see_residuals
from abliterate.model.interventions import ablated, added
from abliterate.model.load import attach
from abliterate.model.measuring import score_candidates
from abliterate.recipe import Recipe
from abliterate.workflow import finding, pipeline
from abliterate.workflow.session import open_session
from tests import factories, zoo
from tests.offloading import offloaded
from tests.test_scoring import ASKED, HARMFUL, HARMLESS, Chat, candidates


def loaded_in_float64(name):
    model = factories.cast(factories.with_eager_experts(factories.build(name)), torch.float64)
    return attach(model, None, family_of({"model_type": zoo.model_type(name)}, where=name), name=name)


def statistics(loaded):
    """Means of both classes, drawn: what matters is that the same are used on both sides."""
    generator = torch.Generator().manual_seed(8)
    drawn = (torch.randn(3, loaded.n_layers, loaded.d_model, generator=generator, dtype=torch.float64) for _ in "ab")
    moments = {kind: Moments(count=4, mean=mean) for kind, mean in zip(("harmful", "harmless"), drawn, strict=True)}
    return ActivationStats(positions=(-3, -2, -1), moments=moments)


def states(loaded, prompts):
    """What enters each block at the last token, ``[prompts, layers, d]``."""
    found = torch.empty(len(prompts), loaded.n_layers, loaded.d_model)

    def see(rows, layer, values):
        found[list(rows), layer] = values[:, -1]

    see_residuals(loaded, Chat(loaded), prompts, 1, see, batch_size=1)
    return found


@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon-h1"])
def test_candidates_are_scored_by_the_metric(name):
    loaded = loaded_in_float64(name)
    stats = statistics(loaded)
    harmful, harmless = (stats.mean(kind)[-1] for kind in ("harmful", "harmless"))
    layers = list(evaluation_layers(harmful, harmless))
    some = candidates(loaded.n_layers)[3:]
    with factories.really_float64():
        asked = replace(ASKED, cosmic=Cosmic.of(stats))
        scores = score_candidates(loaded, Chat(loaded), some, asked, batch_size=3)
        plain = score_candidates(loaded, Chat(loaded), some, ASKED, batch_size=3)
        for one, score, other in zip(some, scores, plain, strict=True):
            if math.isnan(other.bypass):
                assert math.isnan(score.bypass)
                continue
            with ablated(loaded, one.everywhere.vectors):
                removed = states(loaded, HARMFUL)
            with added(loaded, one.vector.to(torch.float64), one.layer):
                induced = states(loaded, HARMLESS)
            both = cosmic(removed[:, layers], induced[:, layers], harmful[layers], harmless[layers])
            assert score.bypass == pytest.approx(-sum(both), abs=1e-6)  # residuals are looked at in float32
            assert score.induce == pytest.approx(both[1], abs=1e-6)
            assert score.kl_nats == pytest.approx(other.kl_nats, abs=1e-12)
    assert len({round(score.bypass, 4) for score in scores}) > len(scores) / 2  # so that a mixed-up one would be seen


def test_out_of_core_too(tmp_path):
    model = factories.build("llama")
    folder = factories.save(model, tmp_path / "llama", dtype=torch.float32)
    found = []
    for loaded in (offloaded(folder), offloaded(folder)):
        asked = replace(ASKED, cosmic=Cosmic.of(statistics(loaded)))
        some = candidates(loaded.n_layers)[-2:]
        found.append(score_candidates(loaded, Chat(loaded), some, asked, batch_size=3))
    assert [one.bypass for one in found[0]] == [one.bypass for one in found[1]]


def test_the_highest_sum_is_taken_within_the_bound_on_kl_and_without_one_on_induce():
    from abliterate.method.directions import CandidateScore

    def score(candidate, bypass, kl):
        return CandidateScore(candidate=candidate, layer=1, bypass=bypass, induce=-0.9, kl_nats=kl)

    rule = SelectionRule(min_induce=-math.inf, name=COSMIC)
    choice, judged = choose([score("a", -1.2, 0.05), score("b", -1.9, 0.2), score("c", -1.4, 0.05)], 10, rule)
    assert (choice.candidate, choice.rule) == ("c", COSMIC)
    assert [one.verdict for one in judged] == ["kept", "kept", "kl"]
    assert choose([score("a", -1.2, 0.05)], 10, replace(rule, min_induce=0.0))[0].rule == "without-induce"


RECIPE = Recipe(n_train=16, n_val=4, n_test=2, reply_tokens=12, allow_few=True)


def test_the_file_says_which_metric_chose():
    session = open_session(None, RECIPE.with_changes({"choose_by": "cosmic"}))
    measured = pipeline.measure(session)
    chosen = pipeline.select(session, measured)
    assert chosen.metadata["choose_by"] == "cosmic"
    assert "scored by COSMIC at layers" in chosen_by(chosen.metadata)
    for one in chosen.scores:
        assert math.isnan(one.bypass) == (not can_be_scored(chosen.named(one.candidate)))
    assert chosen.choice.rule == COSMIC
    again = pipeline.select(replace(session, recipe=session.recipe.with_changes({"choose_by": "first-token"})), chosen)
    assert again.metadata["choose_by"] == "first-token"
    assert not chosen_by(again.metadata)
    with pytest.raises(UsageError, match="come without them") as caught:
        finding.select(session, replace(measured, statistics=None))
    assert caught.value.hint
