"""The low-rank difference (ActSVD): the published operator, measured outputs of writers, and what is written of it."""

import dataclasses

import pytest
import torch

from abliterate.arch.registry import family_of
from abliterate.checkpoint import direction_file
from abliterate.editing.planning import along, plan
from abliterate.errors import NonFiniteError
from abliterate.method.directions import DirectionSet
from abliterate.method.edits import removal
from abliterate.method.estimators import low_rank_difference
from abliterate.method.low_rank import difference, principal
from abliterate.method.moments import ActivationStats, Moments
from abliterate.model.forward import see_residuals
from abliterate.model.load import attach
from abliterate.model.outputs import outputs_of, place_of
from abliterate.verification.checkpoint_proof import verify_bytes
from tests import factories, zoo
from tests.offloading import offloaded, resident
from tests.test_scoring import HARMFUL, HARMLESS, Chat
from tests.test_weight_edits import LOGITS, logits, matrix, write

D = 48


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the operator -----------------------------------------------------------------------------------------------------


def test_principal_vectors_span_what_samples_lie_in():
    span = torch.linalg.qr(drawn(D, 3, seed=1)).Q
    samples = drawn(20, 3, seed=2) @ span.T
    found = principal(samples.float(), 10)
    assert found.shape == (D, 3)  # no more than there are
    assert torch.dist(found @ found.T, span @ span.T) < 1e-5
    first = principal(samples, 1)[:, 0]
    others = (samples @ torch.nn.functional.normalize(drawn(D, seed=3), dim=0)).norm()
    assert (samples @ first).norm() > others
    assert principal(torch.ones(4, D), 2).shape == (D, 1)


@pytest.mark.parametrize(("safety", "utility"), [(3, 5), (12, 12), (1, 40), (30, 30)])
def test_it_is_the_published_operator_and_leaves_the_utility_subspace(safety, utility):
    s, u = (torch.linalg.qr(drawn(D, k, seed=k + n)).Q for n, k in enumerate((safety, utility)))
    published = (torch.eye(D, dtype=torch.float64) - u @ u.T) @ s @ s.T
    found = difference(s, u)
    operator = found.vectors @ found.read.T
    assert torch.dist(operator, published) < 1e-10
    assert found.k <= min(safety, D - utility)
    w = drawn(D, 7, seed=9)
    assert (u.T @ (w - operator @ w) - u.T @ w).abs().max() < 1e-12
    assert torch.dist(published, s @ s.T) > 0.1  # a plain removal would be another


def test_a_safety_subspace_within_the_utility_subspace_leaves_nothing_to_take_out():
    u = torch.linalg.qr(drawn(D, 6, seed=4)).Q
    assert difference(u @ torch.linalg.qr(drawn(6, 2, seed=5)).Q, u) is None


# --- what is measured -------------------------------------------------------------------------------------------------


def in_float64(name):
    model = factories.cast(factories.with_eager_experts(factories.build(name)), torch.float64)
    return attach(model, None, family_of({"model_type": zoo.model_type(name)}, where=name), name=name)


def measured(loaded, prompts, **options):
    return outputs_of(loaded, Chat(loaded), prompts, batch_size=options.get("batch_size", 2))


@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "gemma2"])
def test_outputs_are_what_blocks_add(name):
    """The residual entering the next block is the one before and both outputs."""
    loaded = in_float64(name)
    n = len(Chat(loaded).positions)
    entering = torch.empty(loaded.n_layers, len(HARMFUL), n, loaded.d_model)

    def see(rows, layer, values):
        entering[layer, list(rows)] = values.to(entering.dtype)

    with factories.really_float64():
        see_residuals(loaded, Chat(loaded), HARMFUL, n, see, batch_size=1)
        found = measured(loaded, HARMFUL)
    assert {place_of(name) for name in found} == {
        (n, kind) for n in range(loaded.n_layers) for kind in ("attention", "MLP")
    }
    for layer in range(loaded.n_layers - 1):
        added = (found[f"{layer}.attention"] + found[f"{layer}.MLP"]).to(entering.dtype)
        torch.testing.assert_close(added, entering[layer + 1] - entering[layer], atol=1e-5, rtol=1e-5)


def test_they_are_the_same_out_of_core(tmp_path):
    folder = factories.save(factories.build("llama"), tmp_path / "llama", dtype=torch.float32)
    ours, theirs = (measured(loaded, HARMFUL) for loaded in (offloaded(folder), resident(folder)))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_outputs_that_are_not_finite_are_named():
    loaded = in_float64("llama")
    with torch.no_grad():
        loaded.model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="the MLP of block 1 adds"):
        measured(loaded, HARMFUL)


# --- from outputs to a checkpoint -------------------------------------------------------------------------------------


def statistics(loaded):
    means = {
        kind: Moments(count=5, mean=drawn(1, loaded.n_layers, loaded.d_model, seed=6))
        for kind in ("harmful", "harmless")
    }
    outputs = {
        kind: {place_of(name): its.flatten(0, 1) for name, its in measured(loaded, prompts).items()}
        for kind, prompts in (("harmful", HARMFUL), ("harmless", HARMLESS))
    }
    return ActivationStats(positions=(-1,), moments=means, outputs=outputs)


@pytest.fixture(scope="module")
def made():
    with factories.really_float64():
        stats = statistics(in_float64("llama"))
    return stats, low_rank_difference(stats)


def test_ranks_are_the_published_shares_of_the_width(made):
    _, candidates = made
    assert [one.id for one in candidates] == [f"low-rank-difference/{s}/{D // 4}" for s in (12, 3, 1)]
    for one in candidates:
        assert one.of_mlps.keys() == one.subspace.keys() == {0, 1, 2}
        assert all(its.as_it_is and its.k <= one.provenance["safety_rank"] for its in one.subspaces)
        assert one.subspace[1] is not one.of_mlps[1]


def test_a_file_keeps_it(made, tmp_path):
    stats, candidates = made
    directions = DirectionSet(
        candidates=tuple(one.with_subspaces(lambda its: its.to(torch.float32)) for one in candidates),
        statistics=stats.means_alone(),
    ).choose_candidate(candidates[1].id)
    again = direction_file.load(direction_file.save(directions, tmp_path / "d.safetensors"))
    assert again.sha256 == directions.sha256
    assert again.chosen.of_mlps.keys() == {0, 1, 2}
    assert all(its.as_it_is for its in again.chosen.subspaces)
    assert removal(again.chosen).sha256 == removal(directions.chosen).sha256


def test_written_it_is_equal_to_its_hooks_and_utility_outputs_stay(made, tmp_path):
    stats, candidates = made
    folder = factories.save(factories.build("llama"), tmp_path / "base", dtype=torch.float64)
    edited = along(plan(folder), removal(candidates[0]))
    assert edited.claim == "equal to hooks"
    assert not any(edit.removes for edit in edited.distinct_edits)
    assert {writer.place[1] for writer in edited.writers} == {"attention", "MLP"}
    out = write(edited, tmp_path / "edited")
    assert verify_bytes(edited, out).failures == ()
    assert (logits(out) - logits(folder, edited.stream)).abs().max() <= LOGITS
    for writer in edited.writers:
        before, after = (matrix(at, writer) for at in (folder, out))
        utility = principal(stats.outputs["harmless"][writer.place], D // 4)
        safety = principal(stats.outputs["harmful"][writer.place], D // 4)
        assert (utility.T @ (after - before)).abs().max() < 1e-6 * before.norm()
        assert torch.linalg.matrix_rank(after - before, rtol=1e-6) <= D // 4
        assert (safety.T @ after).norm() < (safety.T @ before).norm()
    swapped = {**edited.edits, edited.writers[0].tensor.name: edited.edits[edited.writers[-1].tensor.name]}
    wrong = write(dataclasses.replace(edited, edits=swapped), tmp_path / "wrong")
    assert verify_bytes(edited, wrong).failures
    assert (logits(wrong) - logits(folder, edited.stream)).abs().max() > 100 * LOGITS


def test_many_directions_are_rounded_to_nearest_and_held_to_the_bound_of_that(tmp_path):
    """Above the rank up to which rows take up the leak, what is proven must not become loose with the rank."""
    folder = factories.save(factories.build("llama"), tmp_path / "base", dtype=torch.bfloat16)
    s, u = (torch.linalg.qr(drawn(D, 40, seed=n)).Q[:, :k] for n, k in enumerate((36, 4)))
    from abliterate.method.edits import WeightEdit
    from abliterate.method.stream_edit import StreamEdit

    its = difference(s, u)
    assert its.k > 32
    edited = along(plan(folder), StreamEdit(everywhere=WeightEdit(read=its.read, write=its.vectors)))
    out = write(edited, tmp_path / "edited")
    report = verify_bytes(edited, out)
    assert report.failures == ()
    assert max(proof.worst_error for proof in report.edited) > 0.2  # the bound is near what is there
