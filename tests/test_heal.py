"""Healing: what is added keeps the proof, is trained on the base's replies, and is merged as an edit is written."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jsonschema
import pytest
import torch
from typer.testing import CliRunner

import abliterate
from abliterate.checkpoint import healing_file
from abliterate.cli.app import app
from abliterate.data.bundled import open_model
from abliterate.editing.healing import healable, healed
from abliterate.editing.planning import plan
from abliterate.errors import (
    CheckpointError,
    OutputError,
    PlanRefusedError,
    SourceError,
    TooFewPromptsError,
    UsageError,
    VerificationError,
)
from abliterate.method.directions import given
from abliterate.method.linalg import orthonormal_basis, project_out
from abliterate.method.statistics import Difference
from abliterate.method.weight_edit import LowRank
from abliterate.model import healing as training
from abliterate.model.healing import Schedule
from abliterate.model.interventions import as_planned, edited
from abliterate.publishing import manifest
from abliterate.recipe import Recipe
from abliterate.verification.checkpoint_proof import verify_bytes
from abliterate.workflow import healing as workflow
from abliterate.workflow.healing import HealingOptions
from abliterate.workflow.session import open_session
from tests import checkpoints, equivalence, factories
from tests.checkpoints import directions, overwrite, read, without
from tests.test_lora import logits, with_adapter
from tests.test_reproduce import RECIPE, SCHEMA

OUT = "model.layers.1.self_attn.o_proj.weight"
EXACT = 1e-10
FEW = HealingOptions(most_prompts=12, schedule=Schedule(most_steps=4, checked_every=2, rate=1e-3))


# --- the plan, the merge and the proof --------------------------------------------------------------------------------


def additions(made, *, orthogonal=True, size=0.6, rank=3):
    """Something of rank 3 for every writer that takes it, of about half its size."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for writer in healable(made):
        d, n = writer.tensor.shape
        b = torch.randn(d, rank, generator=generator, dtype=torch.float64)
        if orthogonal:
            for _ in range(2):
                b = project_out(b.T, orthonormal_basis(made.edits[writer.tensor.name].read)).T
        a = torch.randn(rank, n, generator=generator)
        found[writer.tensor.name] = LowRank(b=b.contiguous() * size, a=a * size)
    return found


def healed_llama(tmp_path, dtype=torch.bfloat16, *, k=1, **options):
    """The plan of healing a random Llama, and what was written by it."""
    base = checkpoints.write_llama(tmp_path / "base", dtype=dtype, sizes={"hidden_size": 128}, shards=2, biases=True)
    made = without(plan(base), directions(128, k))
    made = healed(made, additions(made, **options))
    return made, checkpoints.edit(made, tmp_path / "healed", memory_bytes=1)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_bytes_are_edit_and_addition_and_hold_no_direction(dtype, k, tmp_path):
    made, written = healed_llama(tmp_path, dtype, k=k)
    report = verify_bytes(made, written)
    assert report.ok, report.failures
    assert sum(proof.healed for proof in report.edited) == made.healed == 4
    w, added = read(made.checkpoint.folder, OUT).double(), made.edits[OUT].added
    q = orthonormal_basis(directions(128, k))
    exact = w - q @ (q.T @ w) + added.b @ added.a.double()
    off = (read(written, OUT).double() - exact).norm() / exact.norm()
    assert off < 2 * torch.finfo(dtype).eps
    assert (added.b @ added.a.double()).norm() > 0.3 * w.norm()


@pytest.mark.parametrize("memory_bytes", [1, 2**30])
def test_the_memory_budget_changes_no_byte(memory_bytes, tmp_path):
    made, written = healed_llama(tmp_path)
    other = checkpoints.edit(made, tmp_path / "other", memory_bytes=memory_bytes)
    assert checkpoints.tree(written) == checkpoints.tree(other)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3-text"])
def test_it_is_the_base_with_the_addition_under_hooks(name, tmp_path):
    base = factories.save(factories.build(name), tmp_path / "base")
    made = plan(base)
    vectors = directions(made.model_map.d_model)
    made = without(made, vectors)
    made = healed(made, additions(made, size=0.3))
    written = checkpoints.edit(made, tmp_path / "healed")
    assert verify_bytes(made, written).ok
    tokens = factories.token_ids(batch=4, length=16)
    with factories.really_float64(), torch.no_grad():
        ours = factories.load(written)(tokens).logits
        model = factories.load(base)
        loaded = equivalence.attached(base, model)
        with as_planned(loaded, made):
            hooked = model(tokens).logits
        with edited(loaded, made.stream):
            edit_alone = model(tokens).logits
    assert (edit_alone - ours).abs().max() > 1e-3
    if made.exactness == "A":
        assert (hooked - ours).abs().max() < EXACT
    _, share = equivalence.logits_and_share(written, factories.load(written), vectors, hooks=False)
    assert share < EXACT


def test_an_addition_that_writes_the_direction_is_found(tmp_path):
    """Whether it is written as it is or edited away, the proof does not take it."""
    made, written = healed_llama(tmp_path, orthogonal=False)
    failures = verify_bytes(made, written).failures
    assert f"what healing adds to '{OUT}' writes along what was edited" in failures
    assert any(f"'{OUT}' differs from the equation" in failure for failure in failures)
    w, added = read(made.checkpoint.folder, OUT).double(), made.edits[OUT].added
    q = orthonormal_basis(directions(128))
    overwrite(written, OUT, (w - q @ (q.T @ w) + added.b @ added.a.double()).to(torch.bfloat16))
    assert any(f"'{OUT}' still writes the direction" in failure for failure in verify_bytes(made, written).failures)


def test_another_addition_a_flipped_byte_and_another_tensor_are_found(tmp_path):
    made, written = healed_llama(tmp_path)
    whole = read(written, OUT)
    for other in (whole * 1.05, read(made.checkpoint.folder, OUT), _flipped(whole)):
        overwrite(written, OUT, other.to(whole.dtype))
        (failure,) = verify_bytes(made, written).failures
        assert OUT in failure
    overwrite(written, OUT, whole)
    assert verify_bytes(made, written).ok
    reader = "model.layers.0.self_attn.q_proj.weight"
    overwrite(written, reader, _flipped(read(written, reader)))
    assert verify_bytes(made, written).failures == (f"tensor '{reader}' changed, but is not in the plan",)


def _flipped(tensor):
    """One element with another sign and exponent."""
    changed = tensor.clone()
    changed.view(torch.int16)[3, 4] ^= 0x4180 - 0x8000
    return changed


def test_what_does_not_fit_is_refused(tmp_path):
    made = without(plan(checkpoints.write_llama(tmp_path / "base")), directions(32))
    its = additions(made)
    with pytest.raises(CheckpointError, match="'strange' is not in the plan"):
        healed(made, {"strange": its[OUT]})
    with pytest.raises(CheckpointError, match=r"has the shape \[32, 40\]"):
        healed(made, {OUT: LowRank(b=its[OUT].b, a=its[OUT].a[:, 1:])})
    with pytest.raises(PlanRefusedError, match="healed already"):
        healed(healed(made, its), its)
    keeping = {name: dataclasses.replace(edit, column_scale="kept norms") for name, edit in made.edits.items()}
    with pytest.raises(PlanRefusedError, match="keeps the lengths"):
        healable(dataclasses.replace(made, edits=keeping))
    with pytest.raises(PlanRefusedError, match="no edited writer is a plain linear layer"):
        healable(dataclasses.replace(made, writers=(made.model_map.embedding,)))


@pytest.mark.parametrize("change", ["cut", "b alone", "nan", "dtype"])
def test_a_damaged_file_is_refused(change, tmp_path):
    made = without(plan(checkpoints.write_llama(tmp_path / "base")), directions(32))
    its = additions(made)[OUT]
    if change == "nan":
        its.a[0, 0] = float("nan")
    its = dataclasses.replace(its, b=its.b.float()) if change == "dtype" else its
    path = healing_file.save({OUT: its}, tmp_path / "healing.safetensors", {"rank": 3})
    assert healing_file.about(path) == {"rank": 3}
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-8])
        assert healing_file.about(path) is None
    if change == "b alone":
        path.write_bytes(checkpoints.pack({f"{OUT}.b": its.b}))
    with pytest.raises(SourceError, match=r"healing\.safetensors"):
        healing_file.load(path)


# --- the whole job on the bundled model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def edit(tmp_path_factory):
    """The bundled model without the direction that its embedding uses most, which does harm."""
    embedding = read(open_model(None).folder, "model.embed_tokens.weight").float()
    direction = given(torch.linalg.svd(embedding, full_matrices=False)[2][0])
    return abliterate.edit(None, direction, tmp_path_factory.mktemp("edit") / "edited", recipe=RECIPE).out


def heal(edit, out, **options):
    return abliterate.heal(edit, out, changes={"max_new_tokens": 6}, options=dataclasses.replace(FEW, **options))


@pytest.fixture(scope="module")
def done(edit):
    return heal(edit, edit.parent / "healed")


def test_it_comes_closer_and_is_proven(done):
    kl = done.about["validation_kl_nats"]
    assert kl["after"] < kl["before"]
    assert done.verification.ok
    behaviour = done.verification.behaviour
    assert behaviour.exact_family
    assert behaviour.kl_nats < behaviour.kl_bound_nats
    assert [model.name for model in done.evaluation.models] == ["base", "edited", "healed"]
    assert done.plan.healed == done.about["writers"] == 16
    document = manifest.read(done.out)
    jsonschema.validate(document, SCHEMA)
    assert document["edit"]["healed"] == 16
    assert set(document["healing"]["refusal_change"]) == {"harmful", "harmless"}
    assert document["healing"]["kept"]["training"]["count"] == FEW.most_prompts
    assert not list(done.out.parent.glob("*.partial"))


def test_the_card_says_so(done):
    card = (done.out / "README.md").read_text()
    assert "and healed afterwards" in card
    assert "+ BA with r̂ᵀB = 0" in card
    assert "not of the base alone" in card
    assert "with what healing added beside its writers" in card
    assert "Refusals, healed against edited on the same test prompts:" in card


def test_all_that_is_not_a_writer_is_that_of_the_base(done):
    found = abliterate.diff("tiny-chat", done.out)
    assert found.only_writers
    assert all(tensor.planned > 0.99 for tensor in found.changed)


def test_verify_and_reproduce_know_it(done):
    assert abliterate.verify(done.out).ok
    found = abliterate.reproduce(done.out)
    assert found.agrees
    with pytest.raises(UsageError, match="it was healed"):
        abliterate.reproduce(done.out, measure=True)


def test_an_adapter_holds_edit_and_healing_and_a_patch_refuses(done, tmp_path):
    report = abliterate.export_lora("tiny-chat", tmp_path / "lora", edited=done.out)
    assert report.rank == 1 + FEW.rank
    base = done.plan.checkpoint.folder
    ours, theirs = logits(with_adapter(base, report.out)), logits(factories.load(done.out, dtype=torch.float32))
    plain = logits(factories.load(base, dtype=torch.float32))
    assert (ours - theirs).abs().max() < 0.1 * (plain - theirs).abs().max()  # these bytes are of bfloat16
    with pytest.raises(PlanRefusedError, match="was healed"):
        abliterate.export_patch(done.out, "tiny-chat", tmp_path / "patch.safetensors")


def test_it_is_healed_once(done, tmp_path):
    with pytest.raises(PlanRefusedError, match="healed already"):
        heal(done.out, tmp_path / "again")


def test_it_is_orthogonal_after_every_step(edit, tmp_path, monkeypatch):
    """And only because it is projected: a gradient step alone puts the direction into what is added."""
    seen = []
    project = training.Adapter.project

    def share(adapter):
        found = []
        for name, (_, b) in adapter._pairs.items():
            along = adapter._bases[name].T @ b.detach().double()
            found.append(float(along.norm() / b.detach().norm().clamp_min(1e-9)))
        return max(found)

    def watched(adapter):
        before = share(adapter)
        project(adapter)
        seen.append((before, share(adapter)))

    monkeypatch.setattr(training.Adapter, "project", watched)
    heal(edit, tmp_path / "healed")
    assert len(seen) == FEW.schedule.most_steps
    assert all(before > 1e-3 > 1e-6 > after for before, after in seen)


def test_a_stopped_run_goes_on_to_the_same_bytes(done, edit, tmp_path, monkeypatch):
    out = tmp_path / "healed"
    with monkeypatch.context() as patch:
        patch.setattr("abliterate.workflow.pipeline.edit", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            heal(edit, out)
    assert not out.exists()
    with monkeypatch.context() as patch:
        patch.setattr(workflow, "_train", _interrupted)
        heal(edit, out)
    for shard in done.plan.checkpoint.shards:
        assert (out / shard.name).read_bytes() == (done.out / shard.name).read_bytes()


def _interrupted(*_, **__):
    raise KeyboardInterrupt


def test_preferences_through_trl(edit, tmp_path):
    found = heal(edit, tmp_path / "healed", method="dpo", schedule=Schedule(most_steps=4, checked_every=2, rate=1e-2))
    assert found.verification.ok
    assert 0 < found.about["pairs"] <= 12
    assert set(found.about["versions"]) == {"peft", "trl"}


# --- what cannot be healed --------------------------------------------------------------------------------------------


def refused(error, match, edit, tmp_path, **options):
    with pytest.raises(error, match=match):
        abliterate.heal(edit, tmp_path / "out", **{"options": FEW, "changes": {"max_new_tokens": 6}, **options})
    assert not list(tmp_path.glob("out*"))


def test_an_edit_of_somebody_else(edit, tmp_path):
    base = checkpoints.write_llama(tmp_path / "plain")
    refused(CheckpointError, "has no abliterate.json", base, tmp_path)


def test_a_base_of_another_family_or_with_other_weights(edit, tmp_path):
    other = factories.save(factories.build("qwen2"), tmp_path / "other")
    refused(UsageError, "is of the family qwen2", edit, tmp_path, base=other)
    same = Path(shutil.copytree(open_model(None).folder, tmp_path / "same"))
    overwrite(same, OUT, read(same, OUT) * 2)
    refused(VerificationError, "is not .* with its edit", edit, tmp_path, base=same)


def test_too_few_prompts(edit, tmp_path):
    one = tmp_path / "one.txt"
    one.write_text("What is a lake?\n")
    changes = {"harmful": "bundled:tiny-chat", "harmless": str(one)}
    refused(UsageError, "holds 1 prompts", edit, tmp_path, changes=changes)
    few = dataclasses.replace(FEW, most_prompts=1)
    refused(TooFewPromptsError, "1 harmless prompts to learn from, and it takes 8", edit, tmp_path, options=few)


def test_what_the_base_refuses_is_not_learned_again():
    """Refusals of harmless prompts are what an edit took away with the others."""
    notes = []
    recipe = Recipe().with_changes({"max_new_tokens": 12, "n_train": 24, "n_val": 6})
    session = open_session(None, recipe, on_event=notes.append)
    contrast = session.contrast
    own, other = contrast.harmless_train.prompts[:9], contrast.harmful_train.prompts[:6]
    mixed = dataclasses.replace(contrast.harmless_train, prompts=(*own, *other))
    vars(session)["contrast"] = dataclasses.replace(contrast, harmless_train=mixed)
    (learned, validation), refused = workflow._answers(session)
    assert refused == {"training": [its.text for its in other], "validation": []}
    assert [its.prompt for its in learned] == [its.text for its in own]
    assert len(validation) == 6
    assert any("refuses 6 of 15 harmless training prompts" in getattr(its, "text", "") for its in notes)
    vars(session)["contrast"] = dataclasses.replace(contrast, harmless_train=contrast.harmful_train)
    with pytest.raises(TooFewPromptsError, match=r"the base answers . of 24 training prompts, and it takes 8"):
        workflow._answers(session)


def test_what_is_to_be_kept_pulls_as_what_is_learned(edit, tmp_path, monkeypatch):
    """Where only that is trained on, and another model teaches it, the model comes closer to that one."""
    train, found = training.train, []

    def swapped(room, *rest, **named):
        parts = (room.training, room.validation)
        of_training, of_validation = (its._replace(learned=(), kept=its.learned) for its in parts)
        room = dataclasses.replace(room, training=of_training, validation=of_validation)
        found.append(train(room, *rest, **named))
        return found[0]

    monkeypatch.setattr(workflow, "train", swapped)
    heal(edit, tmp_path / "healed")
    (its,) = found
    assert its.before.learned == its.after.learned == 0
    assert its.after.kept < 0.9 * its.before.kept


def test_prompts_are_drawn_each_once_before_one_comes_again():
    generator = torch.Generator().manual_seed(0)
    its = [training.Lesson(prompt=str(n), ids=[n], length=1, taught=torch.zeros(1, 2)) for n in range(6)]
    drawn = training._drawn(its, 4, generator)
    first = [one.prompt for _ in range(3) for one in next(drawn)]
    assert sorted(first[:6]) == sorted(first[6:]) == list("012345")
    assert next(training._drawn([], 4, generator)) == []


def test_refusals_that_come_back_are_said(edit, tmp_path, monkeypatch):
    back, notes = Difference(value=0.29, low=0.17, high=0.42), []
    monkeypatch.setattr(
        workflow, "_changes", lambda _: {"harmful": back, "harmless": dataclasses.replace(back, low=0.0)}
    )
    abliterate.heal(edit, tmp_path / "out", changes={"max_new_tokens": 6}, options=FEW, on_event=notes.append)
    said = [its.text for its in notes if "came back" in getattr(its, "text", "")]
    assert len(said) == 1
    assert "refusals of harmful prompts came back, +29 points" in said[0]


def test_too_little_memory(edit, tmp_path, monkeypatch):
    refused(UsageError, "out of core", edit, tmp_path, changes={"memory_bytes": 2**25 + 2**22, "max_new_tokens": 6})
    with monkeypatch.context() as patch:
        patch.setattr(training, "free_bytes", lambda _: 2**16)
        refused(UsageError, "half of the free memory", edit, tmp_path)

    def runs_out(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(workflow, "train", runs_out)
    refused(UsageError, "memory ran out while it was healed", edit, tmp_path)


@pytest.mark.parametrize(("library", "method"), [("peft", "kl"), ("trl", "dpo"), ("datasets", "dpo")])
def test_a_library_is_missing(library, method, edit, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    options = dataclasses.replace(FEW, method=method)
    refused(UsageError, "which is not installed", edit, tmp_path, options=options)


def test_nothing_is_written_where_nothing_got_better(edit, tmp_path):
    still = dataclasses.replace(FEW, schedule=dataclasses.replace(FEW.schedule, rate=0.0))
    refused(PlanRefusedError, "none of 4 steps brought it closer", edit, tmp_path, options=still)


def test_no_pair_to_prefer(edit, tmp_path, monkeypatch):
    monkeypatch.setattr("abliterate.model.healing_dpo.generate_tokens", _as_the_base(edit))
    refused(PlanRefusedError, "nothing to prefer", edit, tmp_path, options=dataclasses.replace(FEW, method="dpo"))


def _as_the_base(edit):
    from abliterate.model.replying import generate_tokens
    from abliterate.workflow.session import open_session

    base = open_session(None, Recipe())
    return lambda _, __, prompts, **options: generate_tokens(base.loaded, base.chat, prompts, **options)


def test_an_output_that_exists_stays(edit, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        abliterate.heal(edit, tmp_path / "out", options=FEW)
    with pytest.raises(OutputError, match="inside the source"):
        abliterate.heal(edit, edit / "inside", options=FEW)


def test_the_command(edit, tmp_path):
    wrong = CliRunner().invoke(app, ["heal", str(edit), "--method", "prayer", "--out", str(tmp_path / "healed")])
    assert wrong.exit_code == 2
    arguments = ["heal", str(edit), "--out", str(tmp_path / "healed"), "--prompts", "12", "--max-new-tokens", "6"]
    shown = CliRunner().invoke(app, [*arguments, "--steps", "2", "--report", str(tmp_path / "report.html")])
    assert shown.exit_code == 0, shown.output
    assert "nats per token (step 2 of 2)" in shown.stdout
    assert "of the writers hold what healing added as well" in shown.stdout
    assert "refusals, healed against edited, same prompts: harmful" in shown.stdout
    assert (tmp_path / "report.html").is_file()
    assert json.loads((tmp_path / "healed" / manifest.FILE_NAME).read_text())["healing"]["kept_step"] == 2
