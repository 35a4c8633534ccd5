"""The adapter for llama.cpp: its factors are our difference, under names and in shapes that llama.cpp takes."""

import json

import pytest
import torch
from typer.testing import CliRunner

import abliterate
from abliterate.checkpoint.direction_file import load
from abliterate.cli.app import app
from abliterate.editing.planning import plan
from abliterate.errors import OutputError, PlanRefusedError, UsageError
from abliterate.exports import gguf_file, lora_gguf
from abliterate.exports.factors import Factors
from abliterate.exports.llama_cpp import plain_name
from tests import checkpoints, factories, zoo
from tests.test_export_command import read

gguf = pytest.importorskip("gguf")

CLOSE = 3e-6
CASES = {
    "llama": "llama", "llama-square": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "gemma3-text": "gemma3", "phi3": "phi3", "gpt-neox": "gptneox", "starcoder2": "starcoder2", "mixtral": "llama",
    "deepseek-v3": "deepseek2", "lfm2": "lfm2", "mamba2": "mamba2", "qwen3-vl": "qwen3vl", "mistral3": "mistral3",
    "gpt-oss": "gpt-oss",
}  # fmt: skip
"""What llama.cpp calls each."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Base, edited checkpoint and report of a case, made once, in float32."""
    made = {}

    def get(name):
        if name not in made:
            here = tmp_path_factory.mktemp(name.replace(".", "-"))
            base = factories.save(factories.build(name), here / "base", dtype=torch.float32)
            direction = load(factories.save_direction(48, here / "direction.safetensors"))
            edited = abliterate.edit(base, direction, here / "edited").out
            report = abliterate.export_lora(base, here / "lora", direction=direction, gguf=here / "lora.gguf")
            made[name] = base, edited, report
        return made[name]

    return get


def arch_of(name):
    return next(number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def product(tensors, name):
    """``b a`` as the weight lies on disk, ``[d, n]``; of the embedding ``[tokens, d]``."""
    a, b = tensors[f"{name}.lora_a"].double(), tensors[f"{name}.lora_b"].double()
    return a @ b.T if name == "token_embd.weight" else b @ a


@pytest.mark.parametrize("name", CASES)
def test_the_pairs_multiply_to_our_difference(name, exported):
    base, edited, report = exported(name)
    values, tensors = read(report.gguf.file)
    assert tensors.keys() == {
        f"{its}.{part}" for its in report.gguf.names.values() for part in ("lora_a", "lora_b")
    }  # fmt: skip
    for ours, theirs in report.gguf.names.items():
        w, changed = (checkpoints.read(folder, ours).double() for folder in (base, edited))
        rank = tensors[f"{theirs}.lora_b"].shape[-1]
        change = values["adapter.lora.alpha"] / rank * product(tensors, theirs)
        assert change.shape == w.shape
        assert (w + change - changed).abs().max() < CLOSE * w.abs().max()
        assert (changed - w).norm() > 0.02 * w.norm()


@pytest.mark.parametrize("name", CASES)
def test_what_llama_cpp_asks_for_is_stated(name, exported):
    values, tensors = read(exported(name)[2].gguf.file)
    assert values["general.type"] == "adapter"
    assert values["adapter.type"] == "lora"
    assert values["general.architecture"] == CASES[name]
    assert values["adapter.lora.alpha"] == 1.0
    assert {tensor.shape[-1] for its, tensor in tensors.items() if its.endswith("lora_b")} == {1}


@pytest.mark.parametrize("name", CASES)
def test_every_name_is_one_that_the_library_gives_our_tensor(name, exported):
    base, _, report = exported(name)
    blocks = plan(base).model_map.n_layers
    known = gguf.get_tensor_name_map(arch_of(CASES[name]), blocks)
    for ours, theirs in report.gguf.names.items():
        assert known.get_name(plain_name(ours), try_suffixes=(".weight",)) == theirs
        assert theirs == "token_embd.weight" or theirs.startswith("blk.")


@pytest.mark.parametrize("name", CASES)
def test_all_that_peft_can_hold_is_there_or_named(name, exported):
    base, _, report = exported(name)
    its = report.gguf
    assert {*its.names, *its.left_out} == set(report.expressed)
    assert not its.names.keys() & its.left_out.keys()
    tied = plan(base).model_map.tied
    assert tied == any("tied head" in why for why in its.left_out.values())
    assert tied == ("token_embd.weight" not in its.names.values())
    projectors = {writer.name for writer in plan(base).writers if writer.role == "projector"}
    assert {name for name, why in its.left_out.items() if "projector" in why} == projectors
    assert len(its.left_out) == tied + len(projectors)
    assert bool(projectors) == (name in ("qwen3-vl", "mistral3"))


def test_a_tied_head_leaves_the_embedding_out(tmp_path):
    """llama.cpp has one tensor for both, and would multiply the head by what is laid out to be looked up."""
    base = checkpoints.write_llama(tmp_path / "base", tied=True, head=False)
    direction = load(factories.save_direction(32, tmp_path / "direction.safetensors"))
    report = abliterate.export_lora(base, tmp_path / "lora", direction=direction, gguf=tmp_path / "lora.gguf")
    assert "model.embed_tokens.weight" in report.expressed
    assert report.gguf.left_out.keys() == {"model.embed_tokens.weight"}
    assert not [name for name in read(report.gguf.file)[1] if "token_embd" in name]


def test_ranks_that_differ_share_one_alpha(tmp_path):
    """llama.cpp scales by ``alpha / rank``, and has one alpha for all."""
    base = checkpoints.write_llama(tmp_path / "base")
    writers = [writer for writer in plan(base).writers if writer.role != "embedding"][:2]
    generator = torch.Generator().manual_seed(0)
    factors = [
        Factors(
            writer=writer, a=torch.randn(rank, 40, generator=generator), b=torch.randn(32, rank, generator=generator)
        )
        for writer, rank in zip(writers, (1, 3), strict=True)
    ]
    names = {one.writer.name: f"blk.{place}.attn_output.weight" for place, one in enumerate(factors)}
    made = lora_gguf.GgufAdapter(file=tmp_path / "a.gguf", architecture="llama", names=names, left_out={})
    lora_gguf.write(made, factors, name="tiny")
    values, tensors = read(made.file)
    for one in factors:
        theirs = names[one.writer.name]
        rank = tensors[f"{theirs}.lora_b"].shape[-1]
        change = values["adapter.lora.alpha"] / rank * product(tensors, theirs)
        assert torch.allclose(change, (one.b @ one.a).double(), atol=1e-6)
        assert rank == one.rank


# --- what cannot be expressed -----------------------------------------------------------------------------------------


def refused(name, tmp_path, match):
    base = factories.save(factories.build(name), tmp_path / "base", dtype=torch.float32)
    direction = load(factories.save_direction(48, tmp_path / "direction.safetensors"))
    with pytest.raises(PlanRefusedError, match=match) as caught:
        abliterate.export_lora(base, tmp_path / "lora", direction=direction, gguf=tmp_path / "lora.gguf")
    assert caught.value.hint
    assert {path.name for path in tmp_path.iterdir()} == {"base", "direction.safetensors"}


def test_a_model_that_llama_cpp_does_not_have_is_refused(tmp_path):
    refused("helium", tmp_path, "'helium' is not known")


def test_a_model_that_is_named_after_its_blocks_is_refused(tmp_path):
    refused("granite-4", tmp_path, "'granitemoehybrid' depends on its blocks")


def test_weights_that_the_converter_multiplies_are_refused(tmp_path):
    refused("falcon-h1", tmp_path, "converter multiplies it")


def test_weights_that_the_converter_reorders_are_named(exported):
    _, _, report = exported("qwen3.5-text")
    reordered = {name for name, why in report.gguf.left_out.items() if "another order" in why}
    assert reordered == {f"model.layers.{layer}.linear_attn.out_proj.weight" for layer in (0, 2)}
    assert "model.layers.1.self_attn.o_proj.weight" in report.gguf.names


def test_nothing_is_written_where_the_file_cannot_be(tmp_path, monkeypatch):
    base = checkpoints.write_llama(tmp_path / "base")
    direction = load(factories.save_direction(32, tmp_path / "direction.safetensors"))
    out, file = tmp_path / "lora", tmp_path / "lora.gguf"
    file.write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists already"):
        abliterate.export_lora(base, out, direction=direction, gguf=file)
    assert file.read_bytes() == b"mine"
    file.unlink()
    monkeypatch.setattr(gguf_file, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match="gguf library is not installed"):
        abliterate.export_lora(base, out, direction=direction, gguf=file)
    assert not list(tmp_path.glob("lora*"))


def test_a_library_without_the_architecture_is_refused(tmp_path, monkeypatch):
    """An older one than ours."""
    monkeypatch.delitem(gguf.MODEL_ARCH_NAMES, gguf.MODEL_ARCH.LLAMA)
    refused("llama", tmp_path, "'llama' is not known")


def test_the_command(tmp_path):
    base = checkpoints.write_llama(tmp_path / "base", tied=True, head=False)
    file = factories.save_direction(32, tmp_path / "direction.safetensors")
    arguments = ["lora", "export", "--base", str(base), "--direction", str(file)]
    made = [*arguments, "--out", str(tmp_path / "lora"), "--gguf", str(tmp_path / "lora.gguf")]
    shown = CliRunner().invoke(app, made)
    assert shown.exit_code == 0, shown.output
    assert "not for llama.cpp: model.embed_tokens.weight" in shown.stdout
    assert "architecture llama" in shown.stdout
    again = [*arguments, "--out", str(tmp_path / "lora-2"), "--gguf", str(tmp_path / "lora-2.gguf"), "--json"]
    found = json.loads(CliRunner().invoke(app, again).stdout)
    assert found["gguf"]["file"] == str(tmp_path / "lora-2.gguf")
    assert found["gguf"]["architecture"] == "llama"
    assert len(found["gguf"]["names"]) == len(found["expressed"]) - 1
    plain = [*arguments, "--out", str(tmp_path / "lora-3"), "--json"]
    assert json.loads(CliRunner().invoke(app, plain).stdout)["gguf"] is None


def test_the_cases_are_of_the_zoo():
    assert CASES.keys() <= zoo.BUILDERS.keys()
