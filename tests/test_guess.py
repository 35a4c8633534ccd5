"""``plan --guess``: what it says of models whose entry it must not look at, and that it is never applied."""

import tomllib

import pytest
import torch

from abliterate.arch import guess as guessing
from abliterate.arch.guess import draft, guess
from abliterate.arch.registry import families
from abliterate.arch.spec import Family
from abliterate.checkpoint.source import open_folder
from abliterate.editing.planning import plan
from abliterate.errors import UnknownArchitectureError
from tests import factories, zoo
from tests.checkpoints import llama_config, llama_shapes, random_tensors, write


@pytest.fixture
def made(tmp_path, request):
    return open_folder(factories.save(factories.build(request.param), tmp_path / "base"), name="unknown")


@pytest.mark.parametrize(
    "made", ["llama-biases", "qwen3-moe", "gpt-neox", "qwen3.5-moe", "falcon-h1", "starcoder2", "opt"], indirect=True
)
def test_every_writer_is_guessed_without_the_entry_of_its_family(made, monkeypatch):
    """The family itself is hidden: what is known of others must be enough."""
    writers = plan(made, allow_partial=True).writers
    others = tuple(family for family in families() if made.model_type not in family.model_types)
    monkeypatch.setattr(guessing, "families", lambda: others)
    guessing._known_modules.cache_clear()
    found = {(one.pattern, one.shape): one for one in guess(made)}
    guessing._known_modules.cache_clear()
    for writer in writers:
        one = found[guessing._pattern(writer.tensor.name), writer.tensor.shape]
        if writer.role.startswith("projector"):
            assert "another kind" in one.evidence
        elif one.role:
            assert one.axes.split().index("d_model") == writer.axis
        else:
            assert "CHECK" in one.evidence, one


def test_a_guess_is_never_applied(tmp_path):
    config = {**llama_config(), "model_type": "llama_next"}
    base = write(tmp_path / "base", config, random_tensors(llama_shapes(llama_config()), torch.bfloat16))
    with pytest.raises(UnknownArchitectureError) as caught:
        plan(base, allow_partial=True)
    assert "plan --guess" in caught.value.hint
    checkpoint = open_folder(base, name="base")
    text = draft(checkpoint, guess(checkpoint))
    entry = Family.model_validate(tomllib.loads(text))
    assert {spec.role for spec in entry.writer} >= {"embedding", "attention out", "MLP out"}
    assert entry.model_types == ("llama_next",)


def test_towers_and_post_norms_are_pointed_out():
    assert "another kind" in guessing._look("vision_tower.blocks.{layer}.fc2.weight", (48, 80), 48)[1]
    assert "class B" in guessing._look("layers.{layer}.post_mlp_norm.weight", (48,), 48)[1]
    assert "SEVERAL" in guessing._look("layers.{layer}.o_proj.weight", (48, 48), 48)[1]


def test_the_zoo_has_no_family_without_a_case():
    assert len(zoo.BUILDERS) > len(families())
