"""The edit as an adapter: PEFT loads it, and base and adapter together give the logits of the hooks."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import abliterate
from abliterate.checkpoint.direction_file import load
from abliterate.cli.app import app
from abliterate.errors import PlanRefusedError
from abliterate.exports.lora import ADAPTER, CONFIG
from abliterate.model.interventions import ablated
from tests import checkpoints, equivalence, factories
from tests.quantising import quantised_llama
from tests.test_patch import edited_by_us

CLOSE = 2e-5


def logits(model, folder=None, vectors=None):
    tokens = factories.token_ids(batch=4, length=16)
    with torch.no_grad():
        if vectors is None:
            return model(tokens).logits
        with ablated(equivalence.attached(folder, model), vectors):
            return model(tokens).logits


def with_adapter(base, adapter):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tied weights, and what PEFT says of itself
        return peft.PeftModel.from_pretrained(factories.load(base, dtype=torch.float32), str(adapter)).eval()


def made(name, tmp_path, *, tied=False):
    base = factories.save(factories.build(name, tied=tied), tmp_path / "base", dtype=torch.float32)
    width = json.loads((base / "config.json").read_text())["hidden_size"]
    direction = load(factories.save_direction(width, tmp_path / "direction.safetensors"))
    report = abliterate.export_lora(base, tmp_path / "lora", direction=direction)
    return base, direction, report


@pytest.mark.parametrize("name", ["llama", "llama-square", "mistral", "qwen2", "gemma"])
def test_base_and_adapter_give_the_logits_of_the_hooks(name, tmp_path):
    base, direction, report = made(name, tmp_path)
    assert report.complete
    assert report.rank == 1
    hooked = logits(factories.load(base, dtype=torch.float32), base, direction.direction[:, None].double())
    plain = logits(factories.load(base, dtype=torch.float32))
    ours = logits(with_adapter(base, report.out))
    assert (ours - hooked).abs().max() < CLOSE * hooked.abs().max()
    assert (plain - hooked).abs().max() > 100 * CLOSE * hooked.abs().max()


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_tied_head_stays_what_it_was(name, tmp_path):
    base, direction, report = made(name, tmp_path, tied=True)
    assert report.tied
    assert "do not merge" in (report.out / "README.md").read_text()
    hooked = logits(factories.load(base, dtype=torch.float32), base, direction.direction[:, None].double())
    assert (logits(with_adapter(base, report.out)) - hooked).abs().max() < CLOSE * hooked.abs().max()


def test_behind_norms_it_is_the_edit(tmp_path):
    base, direction, report = made("gemma3-text", tmp_path)
    edited = abliterate.edit(base, direction, tmp_path / "edited").out
    theirs = logits(factories.load(edited, dtype=torch.float32))
    assert report.complete
    assert (logits(with_adapter(base, report.out)) - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_biases_are_named_and_all_else_is_removed(tmp_path):
    """Base and adapter equal an edit that leaves the biases alone."""
    base, direction, report = made("llama-biases", tmp_path)
    assert not report.complete
    assert len(report.left_out) == 6
    assert all(name.endswith((".o_proj.bias", ".down_proj.bias")) for name in report.left_out)
    assert all("bias" in why for why in report.left_out.values())
    edited = abliterate.edit(base, direction, tmp_path / "edited").out
    for name in report.left_out:
        checkpoints.overwrite(edited, name, checkpoints.read(base, name))
    theirs = logits(factories.load(edited, dtype=torch.float32))
    assert (logits(with_adapter(base, report.out)) - theirs).abs().max() < CLOSE * theirs.abs().max()
    card = (report.out / "README.md").read_text()
    assert all(name in card for name in report.left_out)


@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_experts_and_transposed_layers_are_named(name, tmp_path):
    _, _, report = made(name, tmp_path) if name == "mixtral" else transposed(tmp_path)
    assert report.left_out
    assert not any("expert" in name for name in report.expressed)


def transposed(tmp_path):
    base = factories.save(factories.build("gpt2"), tmp_path / "base", dtype=torch.float32)
    width = json.loads((base / "config.json").read_text())["n_embd"]
    direction = load(factories.save_direction(width, tmp_path / "direction.safetensors"))
    return base, direction, abliterate.export_lora(base, tmp_path / "lora", direction=direction)


def test_the_factors_are_the_equation(tmp_path):
    base = checkpoints.write_llama(tmp_path / "base")
    edited = edited_by_us(base, tmp_path / "edited")
    report = abliterate.export_lora(base, tmp_path / "lora", edited=edited)
    factors = load_file(report.out / ADAPTER)
    settings = json.loads((report.out / CONFIG).read_text())
    assert (settings["r"], settings["lora_alpha"]) == (1, 1)
    for module in settings["target_modules"]:
        stem = f"base_model.model.{module}"
        w, ours = (checkpoints.read(folder, f"{module}.weight").double() for folder in (base, edited))
        if "embed" in module:
            change = (factors[f"{stem}.lora_embedding_B"] @ factors[f"{stem}.lora_embedding_A"]).T
        else:
            change = factors[f"{stem}.lora_B.weight"] @ factors[f"{stem}.lora_A.weight"]
        assert (w + change.double() - ours).norm() < 0.01 * w.norm()
        assert change.norm() > 0.05 * w.norm()


def test_a_quantised_base_keeps_only_what_is_plain(tmp_path):
    base = quantised_llama(tmp_path / "base", "blocks")[0]
    width = json.loads((base / "config.json").read_text())["hidden_size"]
    direction = load(factories.save_direction(width, tmp_path / "direction.safetensors"))
    report = abliterate.export_lora(base, tmp_path / "lora", direction=direction)
    assert report.left_out
    assert all("F8_E4M3" in why for why in report.left_out.values())


def test_nothing_to_express_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("abliterate.exports.lora.not_expressible", lambda *_: "made of stone")
    base = checkpoints.write_llama(tmp_path / "base")
    direction = load(factories.save_direction(32, tmp_path / "direction.safetensors"))
    with pytest.raises(PlanRefusedError, match="made of stone"):
        abliterate.export_lora(base, tmp_path / "lora", direction=direction)
    assert not list(tmp_path.glob("lora*"))


def test_the_command(tmp_path):
    base = checkpoints.write_llama(tmp_path / "base", biases=True)
    file = factories.save_direction(32, tmp_path / "direction.safetensors")
    arguments = ["lora", "export", "--base", str(base), "--out", str(tmp_path / "lora")]
    assert CliRunner().invoke(app, arguments).exit_code == 2
    shown = CliRunner().invoke(app, [*arguments, "--direction", str(file)])
    assert shown.exit_code == 0, shown.output
    assert "not expressed" in shown.stdout
    assert (tmp_path / "lora" / ADAPTER).is_file()
