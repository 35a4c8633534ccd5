"""Replies by vLLM, on a stand-in with the signatures of vLLM 0.33.0 that writes them with transformers.

vLLM itself needs a GPU; nothing here says that it writes the same tokens.
"""

import sys
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
import torch
from typer.testing import CliRunner

import abliterate
from abliterate.cli.app import app
from abliterate.data.bundled import model_path
from abliterate.errors import CheckpointError, UsageError
from abliterate.model import vllm_backend
from abliterate.recipe import Recipe

SOURCES = {"harmful": "bundled:tiny-chat", "harmless": "bundled:tiny-chat", "n_test": 8, "max_new_tokens": 12}


class SamplingParams:
    """vllm/sampling_params.py: the fields that are used, all keywords of the struct, with its defaults."""

    def __init__(
        self, *, n=1, repetition_penalty=1.0, temperature=1.0, top_p=1.0, top_k=0, seed=None, stop=None,
        stop_token_ids=None, ignore_eos=False, max_tokens=16, detokenize=True, skip_special_tokens=True,
    ):  # fmt: skip
        vars(self).update(locals())


class Engine:
    """vllm/entrypoints/llm.py: LLM, of whose arguments after ``model`` all are keywords, and its ``generate``."""

    alive = 0
    made: ClassVar = []

    def __init__(
        self, model, *, tokenizer=None, trust_remote_code=False, tensor_parallel_size=1, dtype="auto", seed=0,
        gpu_memory_utilization=0.92, enforce_eager=False, **kwargs,
    ):  # fmt: skip
        from transformers import AutoModelForCausalLM

        assert set(kwargs) == {"max_model_len"}  # passed on to EngineArgs
        assert Engine.alive == 0, "two models at once"
        Engine.alive += 1
        Engine.made.append(model)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.max_model_len = kwargs["max_model_len"]
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self.shutdown))

    def shutdown(self, timeout=None):
        Engine.alive -= 1

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None, priority=None):
        assert not use_tqdm
        assert sampling_params.temperature == 0.0
        assert not sampling_params.detokenize
        outputs = []
        for prompt in prompts:
            (ids,) = prompt.values()
            assert list(prompt) == ["prompt_token_ids"]
            assert len(ids) + sampling_params.max_tokens <= self.max_model_len
            new = self.model.generate(
                torch.tensor([ids]), max_new_tokens=sampling_params.max_tokens, do_sample=False,
                eos_token_id=sampling_params.stop_token_ids, repetition_penalty=sampling_params.repetition_penalty,
            )[0, len(ids) :]  # fmt: skip
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(index=0, text="", token_ids=tuple(new.tolist()))]))
        return outputs


@pytest.fixture
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams, module.__version__ = Engine, SamplingParams, "0.33.0"
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(vllm_backend, "find_spec", lambda name: object())
    monkeypatch.setattr(Engine, "made", [])
    monkeypatch.setattr(Engine, "alive", 0)


def test_the_report_is_the_one_of_transformers(vllm):
    """Same prompts, same ends, same words: of two models, one loaded after the other."""
    base = str(model_path())
    recipe = Recipe(**SOURCES)
    theirs = abliterate.compare(base, [base], recipe)
    assert Engine.made == []
    ours = abliterate.compare(base, [base], recipe.with_changes({"backend": "vllm"}))
    assert Engine.made == [base, base]
    assert Engine.alive == 0
    assert ours.samples == theirs.samples
    assert [model.scores for model in ours.models] == [model.scores for model in theirs.models]
    assert ours.base.completion_nats == theirs.base.completion_nats


def test_an_engine_that_fails_is_let_go_of_and_named(vllm, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no room for the cache\nof keys")

    monkeypatch.setattr(Engine, "generate", fail)
    with pytest.raises(CheckpointError, match=r"vLLM cannot run it \(no room for the cache\)"):
        abliterate.compare(model_path(), [model_path()], Recipe(**SOURCES, backend="vllm"))
    assert Engine.alive == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [({"controls": True}, "cannot try controls"), ({"dtype": "float64"}, "does not run in float64")],
)
def test_what_it_does_not_do_is_refused(options, says, vllm):
    with pytest.raises(UsageError, match=says):
        abliterate.compare(model_path(), [model_path()], Recipe(**SOURCES, **options, backend="vllm"))
    assert Engine.made == []


def test_without_the_extra_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(vllm_backend, "find_spec", lambda name: None)
    shown = CliRunner().invoke(app, ["eval", "nowhere", "nowhere", "--backend", "vllm"])
    assert shown.exit_code == 2
    assert "vLLM, which is not installed" in shown.stderr
    assert "pip install 'abliterate[vllm]'" in shown.stderr
