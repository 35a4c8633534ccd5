"""Scoring candidates many at a time: the same figures as one after the other, whatever the model is made of."""

import os
from dataclasses import replace

import pytest
import torch

from abliterate.arch.registry import family_of
from abliterate.events import Advanced, Noted
from abliterate.method.directions import Candidate, Subspace, grid
from abliterate.method.edits import removal
from abliterate.method.selection import RULE, SelectionRule, choose
from abliterate.method.statistics import refusal_metric
from abliterate.model import scoring
from abliterate.model.chat import ChatFormat, left_padded
from abliterate.model.equivalence import seen
from abliterate.model.forward import last_log_probs, padding_is_harmless, run_batch, see_residuals
from abliterate.model.interventions import ablated, ablated_each, added, added_each, edited, observed
from abliterate.model.jobs import Job
from abliterate.model.load import attach
from abliterate.model.measuring import Filtered, Validation, choose_candidate, score_candidates
from abliterate.model.scores import ScoreFile, Scores
from bench.sweep import largest_difference, sweep
from tests import factories, zoo
from tests.offloading import block_loads, offloaded, resident

D = 48
POSITIONS = (-3, -2, -1)
REFUSAL = [5, 6, 7]
PREFIX = "1 9 8 7"
SOAK = bool(os.environ.get("ABLITERATE_SOAK"))
ALL = (*zoo.BUILDERS, *zoo.CLASS_C)
NO_PREFIX = (
    "qwen", "qwen3-next", "qwen3.5-text", "qwen3.5-moe-text", "granite-4", "falcon-h1", "bamba", "jamba", "lfm2",
    "lfm2-moe", "nemotron-h", "nemotron-h-latent", "mamba2", "kimi-linear", "qwen3.5", "qwen3.5-moe", "gemma4-text",
    "gemma4", "gemma3n",
)  # fmt: skip
"""Hybrids, layers that share keys and values, and a model without a cache: each prompt is run from its beginning."""
NO_START = ("gemma4-text", "gemma4", "gemma3n")
FAMILIES = (
    "llama", "gpt2", "opt", "qwen3-moe", "gpt-oss", "llama4-text", "gemma2", "gemma3-text", "gemma4", "deepseek-v3",
    "lfm2", "falcon-h1", "nemotron-h", "qwen3-next", "mamba2", "gemma3-vision", "qwen2.5-vl",
)  # fmt: skip
ATTENTION_ONLY = ("llama", "gpt2", "qwen3-moe", "gpt-oss", "gemma2", "gemma3-text", "deepseek-v3")


class Chat(ChatFormat):
    """Prompts are ids already."""

    def __init__(self, loaded):
        self.system, self.name, self.suffix = None, "numbers", (3, 4, 5)
        self.pads = padding_is_harmless(loaded, [5, 6, 7, 8, 9], 0)

    template_sha256 = "none"
    pad_id = 0

    def encode(self, prompt):
        return [int(token) for token in prompt.split()]


def prompts(*lengths, seed, prefix=PREFIX):
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randint(10, 80, (length,), generator=generator).tolist() for length in lengths)
    return tuple(f"{prefix} {' '.join(map(str, ids))}" for ids in drawn)


HARMFUL, HARMLESS = prompts(5, 3, 5, 8, 5, seed=1), prompts(4, 5, 12, 4, seed=2)
FILTERED = Filtered(harmful=HARMFUL, harmless=HARMLESS, harmful_before=5, harmless_before=4)
ASKED = Validation(prompts=FILTERED, refusal_ids=REFUSAL)


def candidates(n_layers, d=D, positions=POSITIONS):
    """Random ones, one of them zero and one not finite."""
    values = torch.randn(len(positions), n_layers, d, generator=torch.Generator().manual_seed(3))
    values[0, 1], values[1, 0, 0] = 0, torch.nan
    return grid("random", values, positions)


@pytest.fixture(scope="module")
def models():
    made = {}

    def get(name, dtype=torch.float64):
        if (name, dtype) not in made:
            model = factories.cast(factories.with_eager_experts(factories.build(name)), dtype)
            family = family_of({"model_type": zoo.model_type(name)}, where=name)
            made[name, dtype] = attach(model, None, family, name=name)
        return made[name, dtype]

    return get


def scored(loaded, **options):
    return score_candidates(loaded, Chat(loaded), candidates(loaded.n_layers), ASKED, **{"batch_size": 3, **options})


def swept(loaded):
    return sweep(loaded, Chat(loaded), candidates(loaded.n_layers), FILTERED, REFUSAL)


# --- the same figures -------------------------------------------------------------------------------------------------


def scorer_of(loaded):
    encoded = ([Chat(loaded).encode(prompt) for prompt in some] for some in (HARMFUL, HARMLESS))
    return scoring.candidate_scorer(loaded, *encoded, REFUSAL, batch_size=3)


@pytest.mark.parametrize("name", ALL if SOAK else FAMILIES)
def test_figures_are_those_of_the_sweep(name, models):
    """In float64, where rounding is far below what a mixed-up row would change."""
    loaded = models(name)
    with factories.really_float64():
        ours, rival = scored(loaded), swept(loaded)
        small = scored(loaded, max_tokens=20)
        with scorer_of(loaded) as scorer:
            assert scorer.base.apart == (name != "gemma3n")
            assert scorer.prefix == (0 if name in NO_PREFIX else 4)
            assert scorer.base.starts == (set() if name in NO_START else set(range(1, loaded.n_layers)))
    assert largest_difference(ours, rival) < 1e-9
    assert largest_difference(small, rival) < 1e-9
    figures = [(s.bypass, s.induce, s.kl_nats) for s in ours if s.bypass == s.bypass]
    assert len(figures) == len(ours) - 2
    for column in zip(*figures, strict=True):  # so different that a figure of another candidate would be seen
        assert min(abs(a - b) for i, a in enumerate(column) for b in column[:i]) > 1e-8


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3-moe", "falcon-h1"])
def test_in_float32_too(name, models):
    loaded = models(name, torch.float32)
    assert largest_difference(scored(loaded), swept(loaded)) < 1e-5


def several(n_layers):
    """Subspaces of one to three dimensions; of one of them a vector lies in the span of the others."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for n, k in enumerate((1, 3, 2, 1, 2)):
        vectors = torch.randn(D, k, generator=generator)
        if n == 2:
            vectors[:, 1] = -2 * vectors[:, 0]
        subspace = Subspace(vectors=vectors)
        made.append(Candidate(id=f"x/{n}", subspace=subspace, layer=n % n_layers, provenance={"estimator": "x"}))
    return made


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3-moe", "falcon-h1", "gemma3n"])
def test_subspaces_of_several_dimensions_are_scored_as_well(name, models):
    loaded = models(name)
    with factories.really_float64():
        made = several(loaded.n_layers)
        rival = sweep(loaded, Chat(loaded), made, FILTERED, REFUSAL)
        for options in ({}, {"max_tokens": 20}):
            ours = score_candidates(loaded, Chat(loaded), made, ASKED, batch_size=3, **options)
            assert largest_difference(ours, rival) < 1e-9
    assert [(one.candidate, one.layer) for one in ours] == [(one.id, one.layer) for one in made]
    assert len({one.bypass for one in ours}) == len(made)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3-moe"])
def test_another_subspace_in_each_layer_is_scored_by_hooks(name, models):
    loaded = models(name)
    with factories.really_float64():
        one, other, *rest = several(loaded.n_layers)
        layered = replace(one, subspace={0: one.subspace, 2: other.subspace})
        chat, made = Chat(loaded), [layered, other, *rest]
        with edited(loaded, removal(layered)):
            log_probs = last_log_probs(loaded, chat, FILTERED.harmful, batch_size=1)
        expected = float(refusal_metric(log_probs, list(REFUSAL)).mean())
        alone = score_candidates(loaded, chat, [one, *made[1:]], ASKED, batch_size=3)
        for options in ({}, {"max_tokens": 20}):
            ours = score_candidates(loaded, chat, made, ASKED, batch_size=3, **options)
            assert ours[0].bypass == pytest.approx(expected, abs=1e-9)
            assert abs(ours[0].bypass - alone[0].bypass) > 1e-6
            assert ours[0].induce == pytest.approx(alone[0].induce, abs=1e-9)
            assert largest_difference(ours[1:], alone[1:]) < 1e-9


def test_a_model_that_sees_padding_is_given_none(models):
    assert not Chat(models("lfm2")).pads
    assert "lfm2" in FAMILIES


@pytest.mark.parametrize("name", ["llama", "llama4-text", "falcon-h1"])
@pytest.mark.parametrize("each", [ablated_each, added_each], ids=["ablated", "added"])
def test_each_stretch_of_rows_has_its_own_intervention(name, each, models):
    loaded, vectors = models(name), factories.random_directions(D, 3).T
    ids = factories.token_ids(batch=2)
    at = (1,) if each is added_each else ()
    alone = {ablated_each: lambda r: ablated(loaded, r[:, None]), added_each: lambda r: added(loaded, r, 1)}[each]
    with factories.really_float64(), torch.no_grad():
        with each(loaded, vectors, *at):
            together = loaded.model(ids.repeat(3, 1)).logits.view(3, 2, 9, -1)
        for place, r in enumerate(vectors):
            with alone(r):
                expected = loaded.model(ids).logits
            assert torch.allclose(together[place], expected, atol=1e-11)
            assert not torch.allclose(together[place - 1], expected, atol=1e-3)


def test_nothing_is_left_behind(models):
    loaded = models("llama")
    before = [(block.__dict__.get("forward"), len(block._forward_pre_hooks)) for block in loaded.blocks]
    with pytest.raises(KeyError), scorer_of(loaded):
        raise KeyError
    assert [(block.__dict__.get("forward"), len(block._forward_pre_hooks)) for block in loaded.blocks] == before
    assert before[0] == (None, 0)


# --- the rule's choice ------------------------------------------------------------------------------------------------


def rules(scores):
    """Rules that keep many, few, and none of which some and none of which any induce; none has a score at its bound."""
    early = [one for one in scores if one.layer < 2 and one.bypass == one.bypass]
    kls, induced = (sorted(getattr(one, figure) for one in early) for figure in ("kl_nats", "induce"))
    kl, induce = ((some[len(some) // 2] + some[len(some) // 2 - 1]) / 2 + 1e-6 for some in (kls, induced))
    for bounds in ((1 + kls[-1], induced[0] - 1), (kl, induce), (kls[0] / 2, induce), (kl, 99.0)):
        yield SelectionRule(max_kl_nats=bounds[0], min_induce=bounds[1], prune_layers=0.3)


def chosen(loaded, rule, **options):
    return choose_candidate(
        loaded, Chat(loaded), candidates(loaded.n_layers), ASKED, rule, **{"batch_size": 3, **options}
    )


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3-moe", "falcon-h1", "gemma3n"])
def test_few_scores_give_the_choice_of_all(name, models):
    loaded = models(name)
    with factories.really_float64():
        every = scored(loaded)
        known = {one.candidate: one for one in every}
        for rule in rules(every):
            ours, (choice, _) = chosen(loaded, rule), choose(every, loaded.n_layers, rule)
            assert ours.choice == choice
            assert ours.prompt_passes < ours.of == 13 * (len(every) - 2)
            assert len(ours.scores) == len(every)
            for one in ours.scores:
                its = known[one.candidate]
                assert one.layer < 2 or one.bypass != one.bypass
                assert one.bypass != one.bypass or one.bypass == pytest.approx(its.bypass, abs=1e-9)
                assert one.induce != one.induce or one.induce == pytest.approx(its.induce, abs=1e-9)
                if one.kl_stopped:
                    assert rule.max_kl_nats < one.kl_nats < its.kl_nats
                else:
                    assert one.kl_nats != one.kl_nats or one.kl_nats == pytest.approx(its.kl_nats, abs=1e-9)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_another_subspace_in_each_layer_is_chosen_from_few_scores_as_well(name, models):
    """One that is best of all by hooks, one that is not, and one that cannot be scored."""
    loaded, events = models(name), []
    with factories.really_float64():
        one, other, *rest = several(loaded.n_layers)
        layered = replace(one, subspace={0: one.subspace, 2: other.subspace})
        second = replace(other, subspace={1: other.subspace, 2: one.subspace})
        nowhere = replace(rest[0], id="x/nowhere", subspace={0: one.subspace}, layer=1)
        made = [layered, second, *rest, nowhere]
        chat, chosen = Chat(loaded), set()
        every = score_candidates(loaded, chat, made, ASKED, batch_size=3)
        known = {its.candidate: its for its in every}
        for usable in ([*made], [layered, nowhere, rest[0]], [second, nowhere, rest[0]]):
            its = [known[candidate.id] for candidate in usable]
            for rule in rules([score for score in its if score.candidate != "x/nowhere"]):
                ours = choose_candidate(loaded, chat, usable, ASKED, rule, batch_size=3, on_event=events.append)
                assert ours.choice == choose(its, loaded.n_layers, rule)[0]
                assert ours.of == 13 * (len(usable) - 1)
                assert {score.verdict for score in ours.scores if score.candidate == "x/nowhere"} == {"nan"}
                chosen.add(ours.choice.candidate)
    assert {layered.id, second.id} & chosen
    assert any(isinstance(event, Noted) and "1 candidates, x/nowhere the first" in event.text for event in events)


def test_prompt_passes_are_those_that_were_run(models, monkeypatch):
    loaded, run = models("llama"), []
    plain = scoring.CandidateScorer._figures

    def figures(self, *args):
        found = plain(self, *args)
        run.append(found.numel())
        return found

    monkeypatch.setattr(scoring.CandidateScorer, "_figures", figures)
    rule = next(rules(scored(loaded)))
    run.clear()
    events = []
    ours = chosen(loaded, rule, on_event=events.append)
    assert sum(run) == ours.prompt_passes
    assert sum(event.amount for event in events if isinstance(event, Advanced)) == events[0].total


@pytest.mark.parametrize("many", [3, 10, 17])
def test_a_stopped_choice_goes_on(many, models, monkeypatch, tmp_path):
    """Nothing is run twice, and what is found is the same."""
    loaded, store = models("llama"), ScoreFile(tmp_path / "scores.safetensors")
    *_, rule = rules(scored(loaded))
    expected, counted = chosen(loaded, rule), []
    plain = scoring.CandidateScorer._figures

    def figures(self, *args):
        if len(counted) == many:
            raise KeyboardInterrupt
        counted.append(1)
        return plain(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(scoring.CandidateScorer, "_figures", figures)
        with pytest.raises(KeyboardInterrupt):
            chosen(loaded, rule, store=store)
    again = chosen(loaded, rule, store=store)
    assert again.choice == expected.choice
    assert again.prompt_passes <= expected.prompt_passes
    every = score_candidates(loaded, Chat(loaded), candidates(loaded.n_layers), ASKED, batch_size=3, store=store)
    assert largest_difference(every, scored(loaded)) < 1e-9
    assert chosen(loaded, rule, store=store).choice == expected.choice


@pytest.mark.parametrize("name", ["llama", "gemma2", "lfm2"])
def test_out_of_core_the_choice_takes_few_weight_passes(name, saved):
    whole, ours = resident(saved(name)), offloaded(saved(name))
    every = scored(whole)
    for rule in rules(every):
        before = max(block_loads(ours))
        found, (choice, _) = chosen(ours, rule), choose(every, whole.n_layers, rule)
        assert found.choice == choice
        passes = max(block_loads(ours)) - before
        assert passes <= (3 if choice.rule == RULE else 5) + 4  # and what finds out about padding and starts


# --- nothing is run that need not be ----------------------------------------------------------------------------------


def calls(loaded, run):
    """Tokens that each block was run on."""
    counts = [0] * loaded.n_layers

    def counting(layer):
        def count(module, args, output):
            counts[layer] += output.shape[:2].numel()

        return count

    hooks = [block.mlp.register_forward_hook(counting(layer)) for layer, block in enumerate(loaded.blocks)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return counts


def drawn(n, k=1):
    return tuple(Subspace(vectors=torch.randn(D, k)) for _ in range(n))


def test_the_prefix_and_what_is_below_an_addition_are_run_once(models):
    loaded = models("llama")
    ablations = 7 * sum(len(prompt.split()) - 4 for prompt in (*HARMFUL, *HARMLESS)) + 7 * 4
    of_harmless = sum(len(prompt.split()) - 4 for prompt in HARMLESS) + 4
    with scorer_of(loaded) as one:
        jobs = [
            Job(kind="ablated", candidates=tuple(range(7)), subspaces=drawn(7)),
            *(Job(kind="added", candidates=(7, 8), subspaces=drawn(2), layer=at) for at in range(3)),
        ]
        counts = calls(loaded, lambda: one.run(jobs, lambda *_: None))
    assert counts == [ablations + 2 * (layer + 1) * of_harmless for layer in range(3)]


# --- too little memory ------------------------------------------------------------------------------------------------


def failing(monkeypatch, when, error):
    """Let passes fail, and count those that do not."""
    plain, rows = scoring.CandidateScorer._last, []

    def last(self, ids, *args, **options):
        if when(len(ids), rows):
            raise error
        rows.append(len(ids))
        return plain(self, ids, *args, **options)

    monkeypatch.setattr(scoring.CandidateScorer, "_last", last)
    return rows


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=["card", "host"],
)
def test_batches_are_halved_where_memory_runs_out(error, models, monkeypatch):
    loaded = models("llama")
    expected = scored(loaded)
    rows = failing(monkeypatch, lambda n, _: n > 6, error)
    assert largest_difference(scored(loaded), expected) < 1e-12
    assert max(rows) in (4, 6)


def test_other_errors_are_not_taken_for_it(models, monkeypatch):
    failing(monkeypatch, lambda n, rows: len(rows) > 20, RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        scored(models("llama"))


def test_one_candidate_that_does_not_fit_is_an_error(models, monkeypatch):
    failing(monkeypatch, lambda n, rows: len(rows) > 20, torch.OutOfMemoryError("out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        scored(models("llama"))


# --- stopped, and begun again -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_stopped_run_goes_on(share, models, monkeypatch, tmp_path):
    """What was finished is not run again, and the figures are the same to the last bit."""
    loaded, store = models("llama"), ScoreFile(tmp_path / "scores.safetensors")
    with monkeypatch.context() as patch:
        rows = failing(patch, lambda *_: False, None)
        expected = scored(loaded, max_tokens=20)
        passes = len(rows)
    with monkeypatch.context() as patch:
        failing(patch, lambda _, rows: len(rows) >= share * passes, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            scored(loaded, max_tokens=20, store=store)
    begun = []
    plain = scoring.CandidateScorer.run

    def run(self, jobs, tell):
        begun.extend((job.kind, candidate) for job in jobs for candidate in job.candidates)
        plain(self, jobs, tell)

    monkeypatch.setattr(scoring.CandidateScorer, "run", run)
    events = []
    assert repr(scored(loaded, max_tokens=20, store=store, on_event=events.append)) == repr(expected)
    assert 0 < len(begun) < 14
    assert len(set(begun)) == len(begun)
    assert sum(event.amount for event in events if isinstance(event, Advanced)) == 9
    begun.clear()
    assert repr(scored(loaded, max_tokens=20, store=store)) == repr(expected)
    assert begun == []


def test_the_file_is_for_the_same_work_only(models, tmp_path):
    store = ScoreFile(tmp_path / "deeper" / "scores.safetensors")
    scores = Scores.none_of(2, 2, 1)
    scores.put("added", 1, (2,), torch.tensor([float("nan")], dtype=torch.float64))
    scores.put("ablated", 1, (0, 2), torch.tensor([3.0, 4.0], dtype=torch.float64))
    store.save("one", scores)
    again = store.load("one", 2, 2, 1)
    assert again.has("induce", 1)
    assert not again.has("bypass", 1)
    assert again.done("bypass", 1).tolist() == [True, False]
    assert again.get("kl_nats", 1) == 4.0
    assert again.prompt_passes == 3
    assert not store.load("other", 2, 2, 1).has("induce", 1)
    assert not store.load("one", 3, 2, 1).has("induce", 1)
    assert not store.load("one", 2, 1, 2).has("induce", 1)
    store.path.write_bytes(b"damaged")
    assert not store.load("one", 2, 2, 1).has("induce", 1)


# --- out of core ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3-moe", "lfm2", "gemma4-text"])
def test_out_of_core_in_a_few_passes_or_in_more(name, saved):
    whole, ours = resident(saved(name)), offloaded(saved(name))
    expected = scored(whole)
    before = max(block_loads(ours))
    assert largest_difference(scored(ours), expected) < 1e-5
    assert max(block_loads(ours)) - before <= 4 + 2  # and two that find out about padding
    ours.offload.working_bytes = 50_000
    before = max(block_loads(ours))
    assert largest_difference(scored(ours), expected) < 1e-5
    assert max(block_loads(ours)) - before > 8


# --- what is shown of the residual stream -----------------------------------------------------------------------------


def alone(loaded, ids):
    """What enters each block of one prompt, at all positions."""
    seen = {}
    batch = next(left_padded([ids], 1, 0))
    with observed(loaded, seen.__setitem__):
        run_batch(loaded, batch, keep=len(ids))
    return seen


@pytest.mark.parametrize("name", ["llama", "gemma4", "gemma4-text"])
def test_the_last_positions_are_shown_of_every_block(name, models):
    """Gemma 4 runs the blocks that share keys and values on the positions alone whose logits are asked for."""
    loaded = models(name)
    chat = Chat(loaded)
    seen = {}
    with factories.really_float64():
        see_residuals(loaded, chat, HARMFUL, 3, lambda rows, layer, x: seen.update({(rows, layer): x}), batch_size=3)
        for (rows, layer), values in seen.items():
            for row, its in zip(rows, values, strict=True):
                assert its.shape == (3, loaded.d_model)
                assert torch.allclose(its.double(), alone(loaded, chat.encode(HARMFUL[row]))[layer][0, -3:], atol=1e-5)
    assert {layer for _, layer in seen} == set(range(loaded.n_layers))


@pytest.mark.parametrize("name", ["gemma4", "gemma4-text"])
def test_the_stream_share_of_blocks_that_run_on_the_last_position(name, models):
    loaded = models(name)
    with factories.really_float64():
        _, share = seen(loaded, Chat(loaded), torch.eye(D, 1), HARMFUL, batch_size=3)
    assert 0.01 < share <= 1
