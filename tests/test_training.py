"""Directions and cones that are trained by gradients: losses, geometry, the optimiser, and the stage that uses them."""

import dataclasses
import math

import pytest
import torch

from abliterate.checkpoint import direction_file
from abliterate.errors import NonFiniteError, PromptError, SourceError, UsageError
from abliterate.evaluate.labels import reader
from abliterate.evaluate.replies import SCORERS
from abliterate.method.directions import given
from abliterate.method.linalg import project_out, unit
from abliterate.method.refusal_cone import (
    ABLATION,
    ADDITION,
    INDEPENDENCE,
    RETAIN,
    WEIGHTS,
    WEIGHTS_INDEPENDENT,
    Schedule,
    cone_samples,
    grown,
    independence_loss,
    layers_compared,
    orthonormal,
    retain_loss,
    tangent,
)
from abliterate.method.scope import WHOLE, Scope
from abliterate.model.chat import ChatFormat
from abliterate.model.direction_losses import Losses
from abliterate.model.direction_training import Objective, train
from abliterate.model.measuring import Filtered
from abliterate.model.targets import Example, Writing, targets_of
from abliterate.recipe import Recipe
from abliterate.workflow import pipeline, training
from abliterate.workflow.estimate import amounts, counts_of, not_counted, sentence, speed_of
from abliterate.workflow.session import open_session
from tests import equivalence, factories

D = 48
SOURCE = "bundled:tiny-chat"
FEW = {"harmful": SOURCE, "harmless": SOURCE, "n_train": 12, "n_val": 4, "n_test": 2, "reply_tokens": 12}
SHORT = Schedule(most_steps=6, batch=4, checked_every=1)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the maths --------------------------------------------------------------------------------------------------------


def test_retaining_is_the_kl_of_the_ablated_to_the_base_summed_over_positions():
    p, q = random(5, 7), random(5, 7, seed=1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    ).sum()
    assert torch.allclose(retain_loss(p, q), expected, rtol=1e-12)
    assert float(retain_loss(p, p)) == 0


def test_a_basis_is_orthonormal_and_grows_by_what_is_orthogonal_to_it():
    basis = orthonormal(random(D, 3).float())
    more = grown(basis, torch.Generator().manual_seed(1))
    assert torch.equal(more[:, :3], basis) or torch.allclose(more[:, :3], basis, atol=1e-7)
    assert (more.T @ more - torch.eye(4)).abs().max() < 1e-6
    with pytest.raises(ValueError, match="2 vectors span 1 dimensions"):
        orthonormal(torch.ones(D, 2))


def test_samples_are_unit_directions_between_the_vectors_of_a_basis():
    samples = cone_samples(3, 200, torch.Generator().manual_seed(0))
    assert (samples >= 0).all()
    directions = orthonormal(random(D, 3)) @ samples
    assert torch.allclose(directions.norm(dim=0), torch.ones(200, dtype=torch.float64))
    assert samples.mean(1).std() < 0.05


def test_a_gradient_along_the_sphere_has_nothing_along_the_direction():
    basis = orthonormal(random(D, 3))
    assert (tangent(random(D, 3, seed=1), basis) * basis).sum(0).abs().max() < 1e-12


def test_the_cosine_condition_is_zero_where_ablation_changes_no_cosine():
    v, w = torch.eye(D, dtype=torch.float64)[:2]
    base = random(4, 5, D)
    by_v, by_w = project_out(base, v[:, None]), project_out(base, w[:, None])
    along = torch.nn.functional.cosine_similarity(base, w, dim=-1)
    changed = torch.nn.functional.cosine_similarity(by_v, w, dim=-1) - along
    other = torch.nn.functional.cosine_similarity(by_w, v, dim=-1) - torch.nn.functional.cosine_similarity(
        base, v, dim=-1
    )
    expected = changed.square().mean(1) + other.square().mean(1)
    assert torch.allclose(independence_loss(base, by_v, by_w, v, w), expected)
    assert (independence_loss(base, base, base, v, w) == 0).all()
    assert list(layers_compared(10)) == list(range(9))


# --- the losses on a model --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = factories.save(factories.build("llama"), tmp_path_factory.mktemp("llama"))
    return equivalence.attached(folder, factories.load(folder))


def chat_of(encoded):
    """A chat format that knows prompts by their number."""
    chat = ChatFormat.__new__(ChatFormat)
    chat.pads, chat.rows, chat.tokenizer = True, None, type("Tokenizer", (), {"pad_token_id": 0, "eos_token_id": 2})
    chat.encode = lambda prompt: encoded[int(prompt)]
    return chat


def examples(count=6, seed=2):
    lengths = [2 + n % 3 for n in range(count)]
    ids = factories.token_ids(batch=count, length=9, seed=seed).tolist()
    return [Example(its[: 6 + n], n) for its, n in zip(ids, lengths, strict=True)]


def losses_of(loaded, *, scope=WHOLE, independent=False):
    prompts = factories.token_ids(batch=4, length=6, seed=5).tolist()
    its = random(D, seed=9)[:, None] if independent else None
    return Losses(loaded=loaded, chat=chat_of(prompts), length=2.0, layer=1, scope=scope, given=its)


PARTLY = Scope(kinds=frozenset({"attention", "MLP"}), left_out=frozenset({0}), strength=0.7)


@pytest.mark.parametrize("scope", [WHOLE, PARTLY], ids=["everywhere", "partly"])
@pytest.mark.parametrize("part", [ABLATION, ADDITION, RETAIN, INDEPENDENCE])
def test_gradients_are_those_of_finite_differences(part, scope, loaded):
    with factories.really_float64():
        losses = losses_of(loaded, scope=scope, independent=True)
        its = losses.watched(["0", "1", "2"], 2) if part == INDEPENDENCE else examples(3)
        loss = losses.by_name[part]
        v, along = unit(random(D)).requires_grad_(), random(D, seed=3)
        loss(v, its).backward()
        step = 1e-5
        with torch.no_grad():
            difference = (loss(v + step * along, its) - loss(v - step * along, its)) / (2 * step)
        assert float(v.grad @ along) == pytest.approx(float(difference), rel=1e-5, abs=1e-9)
        assert abs(float(difference)) > 1e-6
    assert all(parameter.grad is None for parameter in loaded.model.parameters())


def test_training_lowers_the_loss_and_leaves_the_weights_alone(loaded):
    before = {name: its.clone() for name, its in loaded.model.state_dict().items()}
    losses = losses_of(loaded)
    objective = Objective(parts=losses.by_name, weights=WEIGHTS, rows=3)
    on = {part: examples() for part in losses.by_name}
    start = orthonormal(random(D, 2).float())
    with factories.really_float64():
        made = [train(objective, start, on, on, schedule=SHORT, seed=3) for _ in range(2)]
    assert objective.total(made[0].after) < objective.total(made[0].before)
    assert (made[0].basis.T @ made[0].basis - torch.eye(2)).abs().max() < 1e-6
    assert torch.equal(made[0].basis, made[1].basis)
    assert all(torch.equal(its, before[name]) for name, its in loaded.model.state_dict().items())


def test_a_direction_made_independent_has_the_lower_cosine_condition(loaded):
    losses = losses_of(loaded, independent=True)
    with factories.really_float64():
        check_independence(loaded, losses)


def check_independence(loaded, losses):
    watched = losses.watched(["0", "1", "2", "3"], 4)
    on = {**{part: examples() for part in WEIGHTS}, INDEPENDENCE: watched}
    objective = Objective(parts=losses.by_name, weights=WEIGHTS_INDEPENDENT, rows=6)
    without = Objective(parts=losses_of(loaded).by_name, weights=WEIGHTS, rows=6)
    start = unit(losses.given[:, 0] + 0.1 * random(D))[:, None].float()
    free = train(without, start, {part: on[part] for part in WEIGHTS}, on, schedule=SHORT, seed=3)
    bound = train(objective, start, on, on, schedule=SHORT, seed=3)
    itself = (torch.eye(1, dtype=torch.float64),)
    assert bound.after[INDEPENDENCE] < 0.8 * objective.measured(free.basis, itself, on)[INDEPENDENCE]


def test_what_is_trained_is_written_as_it_is_ablated(loaded, tmp_path):
    losses = losses_of(loaded)
    objective = Objective(parts=losses.by_name, weights=WEIGHTS, rows=6)
    on = {part: examples() for part in losses.by_name}
    with factories.really_float64():
        basis = train(objective, orthonormal(random(D, 2)), on, on, schedule=SHORT, seed=3).basis
    ours, hooked, share = equivalence.run_case("llama", tmp_path / "whole", basis)
    assert (ours - hooked).abs().max() < 1e-10
    assert share < 1e-10

    def broken(plan):
        kept = [writer for writer in plan.writers if "down_proj" not in writer.name or writer.layer != 1]
        return dataclasses.replace(plan, writers=tuple(kept))

    ours, hooked, _ = equivalence.run_case("llama", tmp_path / "broken", basis, change_plan=broken)
    assert (ours - hooked).abs().max() > 1e-4


# --- the optimiser ----------------------------------------------------------------------------------------------------

TOY = {"near": 1.0}


def toward(target):
    """A loss that is least at ``target``."""
    return {"near": lambda v, its: len(its) * (1 - v.double() @ target)}


def test_the_best_step_by_validation_is_kept():
    target = unit(random(D, seed=4))
    objective = Objective(parts=toward(target), weights=TOY, rows=2)
    start = unit(random(D))[:, None].float()
    made = train(objective, start, {"near": range(5)}, {"near": range(3)}, schedule=Schedule(), seed=0)
    assert 0 < made.kept <= made.steps <= 24
    assert made.after["near"] < 0.2 < made.before["near"]
    assert made.after["near"] == pytest.approx(float(1 - made.basis[:, 0].double() @ target))


def test_training_ends_when_nothing_gets_better_and_the_start_is_kept():
    start = unit(random(D))[:, None].float()
    objective = Objective(parts=toward(start[:, 0].double()), weights=TOY, rows=8)
    schedule = Schedule(most_steps=50, checked_every=1, patience=2, falls=1)
    made = train(objective, start, {"near": range(5)}, {"near": range(3)}, schedule=schedule, seed=0)
    assert (made.kept, made.steps) == (0, 4)
    assert torch.equal(made.basis, start)


def test_a_gradient_that_is_not_finite_stops_it():
    objective = Objective(parts={"near": lambda v, _: v.sum() * math.nan}, weights=TOY, rows=8)
    with pytest.raises(NonFiniteError, match="gradient of the direction"):
        train(objective, unit(random(D))[:, None], {"near": [1]}, {"near": [1]}, schedule=Schedule(), seed=0)


# --- what is learned --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session():
    return open_session(None, Recipe(**FEW, trained="rdo", estimators=("difference-of-means",)))


def writing_of(session, read):
    direction = given(torch.ones(session.loaded.d_model) * 1e-3).chosen
    return Writing(
        loaded=session.loaded, chat=session.chat, start=direction, scope=WHOLE, read=read, batch_size=8
    )  # fmt: skip


def test_targets_are_replies_of_the_model_by_what_they_are(session):
    scorer, contrast = reader(SCORERS["rules"], session.chat), session.contrast
    prompts = Filtered(
        harmful=tuple(contrast.harmful_val.texts[:3]), harmless=tuple(contrast.harmless_val.texts[:2]),
        harmful_before=3, harmless_before=2,
    )  # fmt: skip
    answer, refusal = "Pelgo.", "I am sorry, I will not speak of it."
    assert [scorer("x", text) for text in (answer, refusal)] == ["answered", "refused"]
    asked = []

    def read(prompt, reply):
        """The first harmful prompt counts as answered, so that there is something to learn from."""
        asked.append(prompt)
        return "answered" if prompt == prompts.harmful[0] else scorer(prompt, reply)

    found = targets_of(writing_of(session, read), prompts)
    assert [len(found[part]) for part in (ADDITION, RETAIN)] == [2, 2]
    assert len(found[ABLATION]) >= 1
    assert len(asked) == 3 + 2 + 2 + 3  # none is refused with so little added: the model's own refusals take turns
    for one in found[ADDITION]:
        text = session.chat.tokenizer.decode(one.ids[-one.length :])
        assert scorer("x", text) == "refused"
        assert text.count(".") <= 1
    with pytest.raises(PromptError, match="so there are no refusals to learn from"):
        targets_of(writing_of(session, lambda *_: "answered"), prompts)
    with pytest.raises(PromptError, match="so there are no answers to learn from"):
        targets_of(writing_of(session, lambda *_: "refused"), prompts)


# --- the stage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"independent_of": ("start",)}, UsageError, "only one direction"),
        ({"trained": "cone", "independent_of": ("start",)}, UsageError, "only one direction"),
        ({"trained": "rdo", "independent_of": ("none.safetensors",)}, SourceError, "none.safetensors"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_hours_of_work(options, error, text):
    with pytest.raises(error, match=text) as raised:
        pipeline.check_names(Recipe(**options))
    assert raised.value.hint


def test_a_model_out_of_core_is_refused():
    session = open_session(None, Recipe(**FEW, trained="rdo", memory_bytes=2**25 + 2**22))
    with pytest.raises(UsageError, match="is run out of core") as error:
        pipeline.measure(session)
    assert "--memory" in error.value.hint


def test_a_cone_is_no_larger_than_the_stream(session):
    wide = dataclasses.replace(session, recipe=Recipe(**FEW, trained="cone", cone_size=129))
    vars(wide)["loaded"] = session.loaded
    with pytest.raises(UsageError, match="a cone of 129 directions does not fit into a residual stream of width 128"):
        training.check_trainable(wide)


def test_the_estimate_counts_training(session):
    counts = counts_of(session, ["measure", "select"], models=2, output_bytes=0)
    assert counts.candidates == 1
    assert {"measure", "train", "select"} == set(amounts(counts, ["measure", "select"]))
    assert "train" not in amounts(counts, ["select"])
    longer = dataclasses.replace(session, recipe=session.recipe.with_changes({"trained": "cone", "cone_size": 3}))
    vars(longer).update(loaded=session.loaded, chat=session.chat)
    assert counts_of(longer, ["measure"], models=2, output_bytes=0).trained_tokens > 4 * counts.trained_tokens
    assert " at most" in sentence(counts, ["measure"], speed_of(session))
    assert not_counted(session.recipe, ["measure"]) == []


def test_an_independent_direction_says_how_independent_it_is(session, tmp_path):
    heard = []
    recipe = session.recipe.with_changes({"independent_of": ("start",), "train_steps": 2, "n_train": 8})
    work = dataclasses.replace(session, recipe=recipe, on_event=heard.append)
    vars(work).update(loaded=session.loaded, chat=session.chat)
    made = pipeline.measure(work)
    (one,) = made.candidates
    condition = one.provenance["cosine_condition"]
    assert 0 <= condition["with"] < condition["without"]
    assert any("independence of start: the cosine condition" in getattr(event, "text", "") for event in heard)
    again = direction_file.load(direction_file.save(made, tmp_path / "d.safetensors"))
    assert again.candidates[0].provenance == one.provenance
    assert again.candidates[0].vector.norm() == pytest.approx(one.provenance["length"], rel=1e-5)
