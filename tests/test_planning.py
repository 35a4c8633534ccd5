"""The plan: what will be edited, decided from headers alone, and refused by name where it cannot be exact."""

import json
import time

import pytest
import torch

from abliterate.arch.registry import families
from abliterate.editing.planning import plan
from abliterate.errors import UnknownArchitectureError, UnknownTensorError, UnsupportedFormatError
from tests import checkpoints
from tests.checkpoints import INDEX, llama_config, llama_shapes, random_tensors, with_header, write, write_llama

GEMMA2 = {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}
OUT = "model.layers.1.self_attn.o_proj.weight"


def write_changed(folder, *, config=None, drop=(), add=None, dtypes=None, head=True, **options):
    """A Llama with some tensors dropped, added or stored in another dtype."""
    config = {**llama_config(), **(config or {})}
    shapes = {n: s for n, s in llama_shapes(config, head=head).items() if n not in drop} | (add or {})
    tensors = random_tensors(shapes, torch.bfloat16)
    for name, dtype in (dtypes or {}).items():
        tensors[name] = torch.zeros(tensors[name].shape, dtype=dtype)
    return write(folder, {k: v for k, v in config.items() if v is not None}, tensors, **options)


def gemma_norms(config):
    return {
        f"model.layers.{layer}.{name}_feedforward_layernorm.weight": (config["hidden_size"],)
        for layer in range(config["num_hidden_layers"])
        for name in ("pre", "post")
    }


def refused(folder, says, kind, **options):
    with pytest.raises(kind, match=says) as caught:
        plan(folder, **options)
    assert caught.value.exit_code == 3
    assert caught.value.hint
    return caught.value


# --- coverage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("biases", [False, True])
def test_every_writer_is_planned_with_its_axis(biases, tmp_path):
    made = plan(write_llama(tmp_path / "base", biases=biases))
    axes = {writer.tensor.name: writer.axis for writer in made.writers}
    expected = {"model.embed_tokens.weight": 1}
    for layer in range(2):
        for module in ("self_attn.o_proj", "mlp.down_proj"):
            expected[f"model.layers.{layer}.{module}.weight"] = 0
            if biases:
                expected[f"model.layers.{layer}.{module}.bias"] = 0
    assert axes == expected
    assert made.coverage == f"{len(expected)} of {len(expected)}"
    assert (made.exactness, made.added_head, made.notes) == ("A", None, ())


def test_the_plan_as_json_is_json_and_complete(tmp_path):
    made = plan(write_llama(tmp_path / "base", shards=2))
    document = json.loads(json.dumps(made.to_json()))
    assert document["coverage"] == "5 of 5"
    assert document["edited_parameters"] == 44 * 32 + 2 * (32 * 40 + 32 * 48)
    assert document["input_bytes"] == document["output_bytes"] == made.checkpoint.size_bytes
    assert [writer["name"] for writer in document["writers"]] == [writer.tensor.name for writer in made.writers]
    assert document["writers"][0]["residual_axis"] in (0, 1)


def test_norms_behind_writers_are_found_and_the_class_is_b(tmp_path):
    config = llama_config(**GEMMA2)
    made = plan(write_changed(tmp_path / "base", config=GEMMA2, add=gemma_norms(config)))
    norms = {writer.tensor.name: writer.norms[0].name for writer in made.writers if writer.norms}
    assert norms[OUT] == "model.layers.1.post_attention_layernorm.weight"
    assert norms["model.layers.0.mlp.down_proj.weight"] == "model.layers.0.post_feedforward_layernorm.weight"
    assert (made.exactness, len(norms)) == ("B", 4)
    assert any("not equal to the hook" in note for note in made.notes)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.o_proj.lora_A", "model.layers.2.mlp.up_proj.weight", "mtp.proj.weight", "x"]
)
def test_an_unknown_tensor_is_refused_by_name(name, tmp_path):
    folder = write_changed(tmp_path / "base", add={name: (32, 32)})
    error = refused(folder, f"tensor '{name}' has no known role", UnknownTensorError)
    assert "--allow-partial" in error.hint


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", OUT, "model.layers.0.mlp.down_proj.weight"])
def test_a_missing_writer_is_refused_by_name(name, tmp_path):
    refused(
        write_changed(tmp_path / "base", drop=[name]), f"writers 4 of 5: writer '{name}' is missing", UnknownTensorError
    )


def test_a_missing_norm_behind_a_writer_is_refused_by_name(tmp_path):
    missing = "model.layers.0.post_feedforward_layernorm.weight"
    norms = {name: shape for name, shape in gemma_norms(llama_config()).items() if name != missing}
    refused(write_changed(tmp_path / "base", config=GEMMA2, add=norms), missing, UnknownTensorError)


@pytest.mark.parametrize("change", [{"add": {"mtp.proj.weight": (3,)}}, {"drop": [OUT]}])
def test_allow_partial_plans_what_is_known_and_brands_it(change, tmp_path):
    made = plan(write_changed(tmp_path / "base", **change), allow_partial=True)
    assert made.exactness == "C"
    assert not made.model_map.complete
    assert any(note.startswith("PARTIAL") for note in made.notes)
    assert made.coverage == ("4 of 5" if "drop" in change else "5 of 5")


def test_no_partial_edit_without_an_embedding(tmp_path):
    folder = write_changed(tmp_path / "base", drop=["model.embed_tokens.weight"])
    refused(folder, "no token embedding", UnknownTensorError, allow_partial=True)


# --- configurations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["mamba", "Llama", "", None, 3])
def test_an_unknown_model_type_is_refused_with_what_to_do(model_type, tmp_path):
    folder = write_changed(tmp_path / "base", config={"model_type": model_type})
    error = refused(folder, "is not in the registry", UnknownArchitectureError)
    assert "plan --guess" in error.hint
    assert ("like mamba2" in str(error)) == (model_type == "mamba")


@pytest.mark.parametrize(
    ("method", "says"), [("gptq", "run GPTQ"), ("awq", "run AWQ"), ("bitsandbytes", "16-bit"), ("x", "original bf16")]
)
def test_quantised_weights_are_refused_with_the_way_out(method, says, tmp_path):
    config = {"quantization_config": {"quant_method": method}}
    error = refused(write_changed(tmp_path / "base", config=config), rf"quantised \({method}\)", UnsupportedFormatError)
    assert says in error.hint


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("hidden_size", 40, "axis d_model is 32 there and 40 in config.json"),
        ("intermediate_size", 47, "axis d_ff is 48 there and 47 in config.json"),
        ("num_hidden_layers", 3, r"layers.2.self_attn.o_proj.weight' is missing \(and 1 more\)"),
        ("num_hidden_layers", 1, "tensor 'model.layers.1.input_layernorm.weight' has no known role"),
        ("hidden_size", None, "hidden_size is None"),
        ("hidden_size", "32", "hidden_size is '32'"),
        ("num_hidden_layers", 0, "num_hidden_layers is 0"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(key, value, says, tmp_path):
    folder = write_llama(tmp_path / "base")
    config = {**llama_config(), key: value}
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, says, UnknownTensorError)


@pytest.mark.parametrize("shape", [(40, 32), (32, 40, 1), (32,)])
def test_a_writer_of_another_shape_is_refused(shape, tmp_path):
    refused(write_changed(tmp_path / "base", drop=[OUT], add={OUT: shape}), f"'{OUT}' has shape", UnknownTensorError)


@pytest.mark.parametrize("shape", [(31,), (1, 32), ()])
def test_a_norm_behind_a_writer_of_another_shape_is_refused(shape, tmp_path):
    name = "model.layers.0.post_feedforward_layernorm.weight"
    folder = write_changed(tmp_path / "base", config=GEMMA2, add={**gemma_norms(llama_config()), name: shape})
    refused(folder, f"'{name}' has shape", UnknownTensorError)


@pytest.mark.parametrize("place", ["top", "text_config"])
def test_quantised_weights_are_refused(place, tmp_path):
    quantised = {"quantization_config": {"quant_method": "fp8"}}
    config = quantised if place == "top" else {"text_config": {**llama_config(), **quantised}}
    refused(write_changed(tmp_path / "base", config=config), "quantised", UnsupportedFormatError)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_a_writer_stored_in_integers_is_refused(dtype, tmp_path):
    refused(write_changed(tmp_path / "base", dtypes={OUT: dtype}), f"'{OUT}' is stored as", UnsupportedFormatError)


def test_a_reader_may_be_stored_in_anything(tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight"
    assert plan(write_changed(tmp_path / "base", dtypes={name: torch.uint8})).model_map.complete


# --- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "exactness", "edits_embedding", "added"),
    [("untie", "A", True, "lm_head.weight"), ("shared", "C", True, None), ("keep", "C", False, None)],
)
def test_policies_for_a_tied_head(policy, exactness, edits_embedding, added, tmp_path):
    made = plan(write_llama(tmp_path / "base", tied=True, head=False), tied=policy)
    names = [writer.tensor.name for writer in made.writers]
    assert (made.exactness, made.added_head, made.sets_untied) == (exactness, added, policy == "untie")
    assert ("model.embed_tokens.weight" in names) == edits_embedding
    assert made.output_bytes - made.checkpoint.size_bytes == (44 * 32 * 2 if added else 0)
    assert len(made.notes) == 1


def test_a_tied_head_that_is_stored_is_not_added_again(tmp_path):
    made = plan(write_llama(tmp_path / "base", tied=True, head=True))
    assert (made.added_head, made.sets_untied, made.exactness) == (None, True, "A")


@pytest.mark.parametrize("policy", ["untie", "shared", "keep"])
def test_an_untied_head_is_left_alone_by_every_policy(policy, tmp_path):
    made = plan(write_llama(tmp_path / "base"), tied=policy)
    assert (made.exactness, made.added_head, made.sets_untied, made.notes) == ("A", None, False, ())


def test_an_untied_head_that_is_missing_is_refused(tmp_path):
    refused(write_llama(tmp_path / "base", head=False), "not tied, but 'lm_head.weight' is missing", UnknownTensorError)


def test_every_default_for_an_absent_flag_is_that_of_transformers():
    from transformers import AutoConfig

    for family in families():
        for model_type in family.model_types:
            try:
                expected = AutoConfig.for_model(model_type).tie_word_embeddings
            except ValueError:
                continue  # remote code
            assert (model_type in family.tied_by_default) == expected, model_type


@pytest.mark.parametrize(("model_type", "tied"), [("llama", False), ("gemma", True)])
def test_an_absent_flag_means_the_default_of_the_family(model_type, tied, tmp_path):
    config = {"model_type": model_type, "tie_word_embeddings": None}
    assert plan(write_changed(tmp_path / "base", config=config, head=True)).model_map.tied is tied


@pytest.mark.parametrize(("top", "text", "tied"), [(True, False, True), (False, True, False), (None, True, True)])
def test_the_top_level_decides_before_text_config(top, text, tied, tmp_path):
    config = {"tie_word_embeddings": top, "text_config": llama_config(tie_word_embeddings=text)}
    assert plan(write_changed(tmp_path / "base", config=config)).model_map.tied is tied


def test_another_tensor_called_like_the_head_is_not_the_head(tmp_path):
    folder = write_changed(
        tmp_path / "base", config={"tie_word_embeddings": True}, head=False, add={"mtp.lm_head.weight": (44, 32)}
    )
    made = plan(folder, allow_partial=True)
    assert made.added_head == "lm_head.weight"
    assert made.model_map.unknown == ("mtp.lm_head.weight",)


def test_a_stored_head_is_edited_with_the_embedding_when_shared(tmp_path):
    made = plan(write_llama(tmp_path / "base", tied=True, head=True), tied="shared")
    assert "lm_head.weight" in {writer.tensor.name for writer in made.writers}


# --- headers only -----------------------------------------------------------------------------------------------------


def test_nothing_but_headers_is_read(tmp_path):
    """80 layers of Llama 70B in 20 shards: 141 GB of holes, planned in a moment."""
    config = llama_config(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    shapes = list(llama_shapes(config).items())
    (tmp_path / "config.json").write_text(json.dumps(config))
    place = {}
    for number in range(20):
        shard, header, end = f"model-{number}.safetensors", {}, 0
        for name, shape in shapes[number::20]:
            size = 2 * torch.Size(shape).numel()
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            place[name], end = shard, end + size
        with (tmp_path / shard).open("wb") as file:
            file.write(with_header(header))
            file.truncate(file.tell() + end)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": place}))
    begun = time.perf_counter()
    made = plan(tmp_path)
    assert time.perf_counter() - begun < 2
    assert made.coverage == "161 of 161"
    assert 141e9 < made.output_bytes < 142e9


def test_weights_in_other_formats_are_left_out_and_named(tmp_path):
    files = dict.fromkeys(("pytorch_model.bin", "consolidated.safetensors", "gguf/model.gguf"), b"weights")
    made = plan(write_llama(tmp_path / "base", files={**checkpoints.SIDE_FILES, **files}))
    assert set(made.checkpoint.left_out) == set(files)
    assert len(made.notes) == 1
    assert all(name in made.notes[0] for name in files)
