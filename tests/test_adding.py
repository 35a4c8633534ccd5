"""The direction added instead of removed: written where a bias can hold it, refused with the reason where none can."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import abliterate
from abliterate.checkpoint import direction_file
from abliterate.data.tiny_chat import model_path
from abliterate.editing.asked import plan_asked
from abliterate.editing.planning import plan
from abliterate.evaluate.replies import is_refusal
from abliterate.method.directions import DirectionSet, grid
from abliterate.model.interventions import added
from abliterate.publishing import manifest
from abliterate.recipe import Recipe
from abliterate.verification.checkpoint_proof import verify_bytes
from tests import factories
from tests.edge_tools import done, refused, run
from tests.equivalence import attached, edit

D, LAYER = 48, 2
ADDING = Recipe(change="addition", strength=0.5)


@pytest.fixture(scope="module")
def direction():
    vectors = torch.randn(1, 3, D, generator=torch.Generator().manual_seed(7))
    return DirectionSet(candidates=grid("given", vectors, (-1,))).choose(-1, LAYER)


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """The bundled model with biases of zero in its MLPs: the same model, in a form that can hold an addition."""
    folder = tmp_path_factory.mktemp("biased") / "base"
    shutil.copytree(model_path(), folder)
    for name, changes in (("config.json", {"mlp_bias": True}), ("model.safetensors.index.json", {})):
        document = json.loads((folder / name).read_text()) | changes
        for shard in folder.glob("*.safetensors") if "weight_map" in document else ():
            tensors = load_file(shard)
            mine = [its for its in tensors if ".mlp." in its]
            zeros = {
                its.replace("weight", "bias"): torch.zeros(len(tensors[its]), dtype=torch.bfloat16) for its in mine
            }
            save_file(tensors | zeros, shard, metadata={"format": "pt"})
            document["weight_map"] |= dict.fromkeys(zeros, shard.name)
        (folder / name).write_text(json.dumps(document))
    return folder


@pytest.fixture(scope="module")
def guarded(biased, tmp_path_factory):
    """``run --add`` on it."""
    folder = tmp_path_factory.mktemp("guarded")
    sources = {"harmful": "bundled:tiny-chat", "harmless": "bundled:tiny-chat"}
    recipe = Recipe(**sources, n_train=32, n_val=8, n_test=16, max_new_tokens=12, prune_layers=0.4)
    (folder / "few.toml").write_text(recipe.to_toml())
    done("run", biased, "--add", "--strength", "0.75", "--recipe", folder / "few.toml", "--out", folder / "out")
    return folder / "out"


# --- what is written --------------------------------------------------------------------------------------------------


def test_a_written_addition_is_the_hook_that_adds_and_a_broken_one_is_not(direction, tmp_path):
    base = factories.save(factories.build("llama-biases"), tmp_path / "base")
    made = plan_asked(plan(base), ADDING.edit, direction)
    out = edit(made, None, tmp_path / "edited")
    assert verify_bytes(made, out).failures == ()
    tokens = factories.token_ids()

    def distance(*, scale):
        with factories.really_float64(), torch.no_grad():
            written, loaded = factories.load(out)(tokens).logits, attached(base, factories.load(base))
            with added(loaded, direction.chosen.vector.double(), LAYER, scale=scale):
                return float((written - loaded.model(tokens).logits).abs().max())

    assert distance(scale=0.5) <= 1e-10
    assert distance(scale=0.0) > 1e-3
    (name,) = (name for name, its in made.edits.items() if its.constant is not None)
    assert name == f"model.layers.{LAYER - 1}.mlp.down_proj.bias"
    for shard in out.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name] = tensors[name] * 0.99
            save_file(tensors, shard, metadata={"format": "pt"})
    assert distance(scale=0.5) > 1e-6
    assert any(name in failure for failure in verify_bytes(made, out).failures)


def test_a_guard_refuses_more_and_says_what_it_is(guarded):
    document = manifest.read(guarded)
    (its,) = document["edit"]["edits"]
    assert its["added"] == pytest.approx(0.75 * document["direction"]["norm"], rel=1e-5)
    assert not its["removes"]
    assert document["verification"]["ok"]
    assert document["verification"]["behaviour"]["kl_nats"] < 1e-4
    base, edited = (model["prompts"] for model in document["evaluation"]["models"])
    assert edited["harmless"]["refused"]["rate"] > base["harmless"]["refused"]["rate"]
    card = " ".join((guarded / "README.md").read_text().split())
    assert "base, with a direction added" in card
    assert "with one direction added to its residual stream, and nothing removed from it" in card
    assert "1 direction added, not removed: +" in card
    assert "harmless ones too" in card
    assert "abliterated" not in card
    assert "may still write the direction" not in card


def test_a_manifest_whose_length_is_no_number_is_damaged(guarded, tmp_path):
    copy = shutil.copytree(guarded, tmp_path / "copy")
    document = manifest.read(copy)
    document["edit"]["edits"][0]["added"] = "much"
    (copy / manifest.FILE_NAME).write_text(json.dumps(document))
    refused(5, "is damaged: edit.edits.0.added", "verify", copy, "--bytes-only")


def test_below_zero_it_is_added_against_its_sense(biased, direction, tmp_path):
    wide = DirectionSet(candidates=grid("given", torch.ones(1, 8, 128), (-1,))).choose(-1, 4)
    out = abliterate.edit(biased, wide, tmp_path / "out", recipe=Recipe(change="addition", strength=-1.0)).out
    assert manifest.read(out)["edit"]["edits"][0]["added"] == pytest.approx(-(128**0.5))
    card = " ".join((out / "README.md").read_text().split())
    assert "with one direction added, against its sense, to its residual stream" in card
    assert "harmless ones too" not in card


# --- what is not ------------------------------------------------------------------------------------------------------


def test_without_a_bias_it_is_refused_before_anything_is_measured(tmp_path):
    said = refused(3, "no one bias that could hold the constant", "run", "tiny-chat", "--add", "--out", tmp_path / "o")
    flat = " ".join(said.split())
    assert "it writes by model.layers.0.mlp.down_proj.weight, and no other block has one" in flat
    assert "abliterate chat --add" in flat
    assert "abliterate export control-vector" in flat
    assert "measure" not in flat
    assert not list(tmp_path.iterdir())
    refused(3, "no other block has one", "run", "tiny-chat", "--add", "--dry-run")


def test_an_edit_without_a_bias_is_refused_with_the_same_words(guarded, tmp_path):
    direction = guarded / "abliterate" / "direction.safetensors"
    layer = direction_file.load(direction).chosen.layer
    said = refused(3, "no one bias", "edit", "tiny-chat", direction, "--add", "--out", tmp_path / "out")
    flat = " ".join(said.split())
    assert f"the MLP of block {layer - 1} has no one bias" in flat
    assert "abliterate export control-vector" in flat


@pytest.mark.parametrize("other", [("--change", "affine"), ("--change", "removal"), ("--method", "ace")])
def test_another_edit_beside_it_is_a_contradiction(other):
    refused(2, "--add adds the direction, and the edit", "run", "tiny-chat", "--add", *other)


def test_the_method_of_that_edit_is_none():
    refused(3, "no one bias", "run", "tiny-chat", "--add", "--method", "steer")


# --- before anything is written ---------------------------------------------------------------------------------------


def test_chat_previews_what_is_written(guarded, biased):
    prompts = ("What colour is the jebbo?", "Who made the kisko?", "Where is the rannow found?")
    asked = [part for prompt in prompts for part in ("-p", prompt)]
    options = (*asked, "--max-new-tokens", "12", "--json")
    adding = ("--direction", guarded / "abliterate" / "direction.safetensors", "--add", "--scale")

    def replies(model, *more):
        return [one["reply"] for one in json.loads(run("chat", model, *options, *more).stdout)]

    previewed = replies(biased, *adding, "0.75")
    assert previewed == replies(guarded)
    assert previewed == replies("tiny-chat", *adding, "0.75")  # by hooks also where no bias holds it
    plain, all_of_it = replies(biased), replies(biased, *adding, "1")
    assert plain != all_of_it
    assert not any(map(is_refusal, prompts, plain))
    assert any(map(is_refusal, prompts, all_of_it))
