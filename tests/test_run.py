"""The whole job on small models that really refuse, in three layouts, against their ground truth."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import abliterate
from abliterate.checkpoint.hashes import sha256_file
from abliterate.data.tiny_chat import model_path, prompts_path
from abliterate.errors import NonFiniteError, OutputError, PromptError, UsageError, VerificationError
from abliterate.evaluate.replies import is_refusal
from abliterate.events import Started
from abliterate.method.directions import grid
from abliterate.publishing import manifest
from abliterate.recipe import Recipe
from abliterate.workflow import pipeline
from abliterate.workflow.session import open_session
from tests import factories

MODELS = Path(__file__).parent / "models"
SOURCES = {"harmful": "bundled:tiny-chat", "harmless": "bundled:tiny-chat"}
RECIPE = Recipe(**SOURCES, max_new_tokens=32)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """``abliterate run`` on the bundled model."""
    return abliterate.run(None, tmp_path_factory.mktemp("run") / "out", RECIPE)


FEW = RECIPE.with_changes({"n_train": 16, "n_val": 4, "n_test": 4, "max_new_tokens": 8})


@pytest.fixture(scope="session")
def few_finished(tmp_path_factory):
    """The same on few prompts."""
    return abliterate.run(None, tmp_path_factory.mktemp("run") / "out", FEW)


@pytest.fixture(scope="session", params=["tiny-gemma3", "tiny-qwen2"])
def finished_tied(request, tmp_path_factory):
    """``abliterate run`` on the models with tied heads."""
    return abliterate.run(MODELS / request.param, tmp_path_factory.mktemp("run") / "out", RECIPE)


def assert_refusal_removed(result, *, refused=0.95, held_out=0.85):
    base, edited = result.evaluation.base.scores, result.evaluation.edited.scores
    (before, others_before), (after, others_after) = base.values(), edited.values()
    assert list(base) == ["harmful", "harmless"]
    assert before.refused.value >= refused
    assert before.held_out.value >= held_out
    assert others_before.refused.value <= 0.03
    assert others_before.accuracy.value >= 0.95
    assert after.refused.value <= 0.05
    assert after.held_out.value <= 0.05
    assert others_after.refused.value <= 0.05
    assert others_after.accuracy.value >= others_before.accuracy.value - 0.02
    assert after.degenerate.hits == others_after.degenerate.hits == 0


def test_refusal_goes_and_the_facts_stay(finished):
    assert_refusal_removed(finished)
    assert finished.directions.choice.rule == "arditi-2024"


def test_restricted_questions_get_the_fact_learnt_in_pretraining(finished):
    """What no real model lets one ask: under the refusal, the knowledge is still there."""
    figures = json.loads((model_path() / "figures.json").read_text())
    pretrained = figures["accuracy_restricted_pretrained"]
    assert finished.evaluation.base.scores["harmful"].accuracy.value <= 0.05
    assert finished.evaluation.edited.scores["harmful"].accuracy.value >= pretrained - 0.10


def test_refusal_goes_from_models_with_tied_heads(finished_tied):
    """Gemma's layout (norms behind the writers) and Qwen 2's (biases in attention), heads untied."""
    assert_refusal_removed(finished_tied, refused=0.9)
    assert finished_tied.verification.ok
    assert finished_tied.plan.added_head == "lm_head.weight"


def test_the_result_is_proven(finished):
    report = finished.verification
    assert report.ok
    assert len(report.bytes.edited) == finished.plan.model_map.expected == 17
    assert report.bytes.worst_left < 1e-5
    assert report.behaviour.kl_nats < 1e-4 < report.behaviour.ablation_kl_nats


def test_the_folder_loads_with_plain_transformers(finished):
    model = AutoModelForCausalLM.from_pretrained(finished.out)
    tokenizer = AutoTokenizer.from_pretrained(finished.out)
    prompt = finished.evaluation.samples[0].prompt
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    reply = tokenizer.decode(model.generate(**ids, max_new_tokens=32)[0][ids["input_ids"].shape[1] :])
    assert not is_refusal(prompt, reply)


def test_exactly_the_writers_changed(finished):
    found = abliterate.diff(model_path(), finished.out)
    assert found.only_writers
    assert {tensor.name for tensor in found.changed} == {w.tensor.name for w in finished.plan.writers}
    assert all(tensor.rank_one > 0.999 and tensor.cosine > 0.9999 for tensor in found.changed)
    assert found.identical == 75 - 17


def test_verify_needs_only_the_folder(finished):
    assert abliterate.verify(finished.out).ok


def test_verify_sees_a_flipped_bit(finished, tmp_path):
    broken = shutil.copytree(finished.out, tmp_path / "broken")
    shard = broken / "model-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert not abliterate.verify(broken, behaviour=False).ok


def test_the_manifest_says_what_is_there(finished):
    document = manifest.read(finished.out)
    assert document["verification"]["ok"]
    assert document["edit"]["coverage"] == "17 of 17"
    for name, digest in document["verification"]["sha256"].items():
        assert sha256_file(finished.out / name) == digest
    with safe_open(finished.out / document["direction"]["file"], "pt") as handle:
        assert torch.equal(handle.get_tensor("direction"), finished.directions.direction)
    assert set(document["prompts"]) == {f"{kind}_{part}" for kind in SOURCES for part in ("train", "val", "test")}


def test_the_card_says_what_was_done(finished):
    card = (finished.out / "README.md").read_text("utf-8")
    assert card.startswith("---\n")
    for words in ("one direction removed", "17 of 17 writers", "byte-identical", "| harmful | refused |", "## Use"):
        assert words in card


def test_chat_previews_the_edit_by_hooks(finished):
    session = open_session(None, RECIPE)
    for sample in finished.evaluation.samples[:4]:
        turn = [{"role": "user", "content": sample.prompt}]
        before, after = sample.replies
        assert abliterate.reply(session, turn) == before
        assert abliterate.reply(session, turn, direction=finished.directions, mode="ablate") == after


def test_adding_the_direction_induces_refusal(finished):
    session = open_session(None, RECIPE.with_changes({"max_new_tokens": 16}))
    prompts = session.contrast.harmless_test.texts[:20]
    replies = [
        abliterate.reply(session, [{"role": "user", "content": p}], direction=finished.directions, mode="add")
        for p in prompts
    ]
    plain = [abliterate.reply(session, [{"role": "user", "content": p}]) for p in prompts]
    assert sum(map(is_refusal, prompts, plain)) == 0
    assert sum(map(is_refusal, prompts, replies)) >= 15


def test_a_random_direction_does_nothing_of_the_kind(finished, tmp_path):
    """The control: it is this direction, not any direction."""
    d = finished.directions
    shape = (len(d.positions), d.n_layers, d.d_model)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    other = type(d)(candidates=grid("noise", noise, d.positions)).choose(d.choice.position, d.choice.layer)
    result = abliterate.run(None, tmp_path / "out", RECIPE.with_changes({"n_test": 40}), direction=other)
    assert result.evaluation.edited.scores["harmful"].refused.value >= 0.9


def test_the_stages_one_by_one_give_the_same_bytes(few_finished, tmp_path):
    measured = abliterate.measure(None, FEW)
    chosen = abliterate.select(None, measured, FEW)
    assert chosen.choice == few_finished.directions.choice
    edited = abliterate.edit(None, chosen, tmp_path / "out", recipe=FEW)
    for shard in edited.plan.checkpoint.shards:
        assert (edited.out / shard.name).read_bytes() == (few_finished.out / shard.name).read_bytes()


def stop_at(task):
    def listen(event):
        if isinstance(event, Started) and event.task == task:
            raise KeyboardInterrupt

    return listen


@pytest.mark.parametrize("task", ["score candidates", "edit", "verify", "edited: reply to harmless prompts"])
def test_a_stopped_run_continues(few_finished, tmp_path, task):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        abliterate.run(None, out, FEW, on_event=stop_at(task))
    assert not out.exists()
    seen = []
    abliterate.run(None, out, FEW, on_event=lambda event: seen.append(getattr(event, "task", "")))
    assert ("score candidates" in seen) == (task == "score candidates")  # the chosen direction was kept
    assert (out / "model-00001-of-00002.safetensors").read_bytes() == (
        few_finished.out / "model-00001-of-00002.safetensors"
    ).read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_a_failed_verification_leaves_no_finished_folder(monkeypatch, tmp_path, finished):
    def sabotage(output, edit_plan, document):
        raise AssertionError("must not be reached")

    real = abliterate.workflow.pipeline.edit

    def edit_and_break(edit_plan, directions, output, recipe, **options):
        real(edit_plan, directions, output, recipe, **options)
        shard = output.path / "model-00001-of-00002.safetensors"
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)

    monkeypatch.setattr("abliterate.workflow.pipeline.edit", edit_and_break)
    monkeypatch.setattr("abliterate.publishing.manifest.finish", sabotage)
    with pytest.raises(VerificationError) as error:
        abliterate.run(None, tmp_path / "out", RECIPE, direction=finished.directions)
    assert error.value.exit_code == 4
    assert not (tmp_path / "out").exists()


def test_the_memory_budget_of_the_recipe_is_that_of_the_proof(monkeypatch, few_finished):
    real, budgets = pipeline.verify_bytes, []

    def watched(*args, memory_bytes, **options):
        budgets.append(memory_bytes)
        return real(*args, memory_bytes=memory_bytes, **options)

    monkeypatch.setattr(pipeline, "verify_bytes", watched)
    session = open_session(None, FEW.with_changes({"memory_bytes": 2**21}))
    assert pipeline.verify(session, few_finished.plan, few_finished.out, behaviour=False).ok
    assert abliterate.verify(few_finished.out, changes={"memory_bytes": 2**22}, behaviour=False).ok
    assert budgets == [2**21, 2**22]


# --- inputs that cannot work --------------------------------------------------------------------------------------


def test_prompts_that_are_not_refused(tmp_path):
    """Two harmless sets: there is nothing to find, and it is said before anything is written."""
    lines = (prompts_path() / "harmless.train.jsonl").read_text().splitlines()
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:60]))
    (tmp_path / "b.jsonl").write_text("\n".join(lines[60:]))
    recipe = Recipe(harmful=str(tmp_path / "a.jsonl"), harmless=str(tmp_path / "b.jsonl"))
    with pytest.raises(PromptError, match="refuses none") as error:
        abliterate.run(None, tmp_path / "out", recipe)
    assert error.value.exit_code == 2
    assert not list(tmp_path.glob("out*"))  # another try with other prompts is not in its own way


def test_one_prompt_source_is_not_enough(tmp_path):
    with pytest.raises(PromptError, match="two prompt sources"):
        abliterate.run(model_path(), tmp_path / "out", Recipe(harmful="bundled:contrast"))


def test_a_model_of_ones_own_gets_the_bundled_contrast_set():
    session = open_session(model_path(), Recipe())
    assert session.recipe.find.harmful == session.recipe.find.harmless == "bundled:contrast"
    assert session.contrast.harmful_train.source == "bundled:contrast/harmful.train"
    assert len(session.contrast.harmless_test.prompts) == 100
    assert open_session(None, Recipe()).contrast.harmful_train.source == "bundled:tiny-chat/harmful.train"


def copy_of_model(tmp_path):
    return shutil.copytree(model_path(), tmp_path / "model")


def test_no_chat_template(tmp_path):
    folder = copy_of_model(tmp_path)
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(PromptError, match="no chat template"):
        abliterate.run(folder, tmp_path / "out", RECIPE)


@pytest.mark.parametrize(
    ("filtering", "says"), [(True, "logits are NaN"), (False, "activations entering block 3 are NaN or infinite for")]
)
def test_nan_in_a_reader_shows_in_the_activations(filtering, says, tmp_path):
    folder = copy_of_model(tmp_path)
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if name == "model.layers.2.self_attn.q_proj.weight":
                tensor[0, 0] = float("nan")
        save_file(tensors, shard, metadata={"format": "pt"})
    recipe = RECIPE.with_changes({"refusal_tokens": ("I",), "filter_prompts": filtering})
    with pytest.raises(NonFiniteError, match=says) as error:
        abliterate.run(folder, tmp_path / "out", recipe)
    assert error.value.exit_code == 5


def test_an_output_folder_that_exists(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        abliterate.run(None, tmp_path / "out", RECIPE)


def test_directions_of_another_model(finished):
    d = finished.directions
    cut = factories.vectors_of(d)[: len(d.positions) * d.n_layers, :64].view(len(d.positions), d.n_layers, 64)
    narrow = type(d)(candidates=grid("difference-of-means", cut, d.positions))
    with pytest.raises(UsageError, match="of width 64"):
        abliterate.select(None, narrow, RECIPE)
