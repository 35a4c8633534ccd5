"""A GGUF file as a source: what comes out is what the file holds, or it is refused in words."""

import json
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from abliterate import api
from abliterate.checkpoint import output
from abliterate.cli.app import app
from abliterate.data.tiny_chat import model_path
from abliterate.editing.planning import plan
from abliterate.errors import CheckpointError, NonFiniteError, NotEnoughDiskError, OutputError, UnsupportedFormatError
from abliterate.events import Noted
from abliterate.model.load import load_tokenizer
from tests import factories, zoo

ggufs = pytest.importorskip("tests.ggufs")

MODELS = Path(__file__).parent / "models"
SOURCES = {"llama": model_path(), "qwen2": MODELS / "tiny-qwen2", "gemma3_text": MODELS / "tiny-gemma3"}
WRITERS = {"llama": "17 of 17", "qwen2": "17 of 17", "gemma3_text": "17 of 17"}
DTYPES = {"F32": "bfloat16", "BF16": "bfloat16", "F16": "float16", "Q8_0": "bfloat16", "Q4_1": "bfloat16"}
TEXTS = (
    "What is the capital of the land?", "  two  spaces, 1234 digits\n\n\tand a tab", "Zürich 日本 é",
    "<|turn|>user\nhello<|end|>\n", "",
)  # fmt: skip
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Who are you? "}]


def write(tmp_path, family="llama", kind="BF16", **options):
    return ggufs.write_gguf(
        tmp_path / f"{family}-{kind}.gguf", SOURCES[family], kind, ggufs.tokenizer_of(family), **options
    )


def logits(folder, weights=None):
    model = factories.load(folder)
    if weights is not None:
        model.load_state_dict({name: w.double() for name, w in weights.items()}, strict=False)
    with torch.no_grad():
        return model(factories.token_ids(length=100)).logits


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A report for each family and type, made once."""
    made = {}

    def get(family, kind):
        if (family, kind) not in made:
            here = tmp_path_factory.mktemp(f"{family}-{kind}")
            made[family, kind] = api.import_gguf(write(here, family, kind), here / "out")
        return made[family, kind]

    return get


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("family", SOURCES)
def test_weights_and_logits_are_those_of_the_file(family, kind, imported):
    report = imported(family, kind)
    assert report.dtype == DTYPES[kind]
    meant = ggufs.rounded(SOURCES[family], kind, getattr(torch, report.dtype))
    found = ggufs.weights_of(report.out)
    assert found.keys() == meant.keys()
    assert all(torch.equal(found[name], w) for name, w in meant.items())
    assert (logits(report.out) - logits(SOURCES[family], meant)).abs().max() < 1e-12
    assert sum(report.values.values()) == sum(w.numel() for w in found.values())
    assert (report.quantised > 0.9) == kind.startswith("Q")


@pytest.mark.parametrize("family", SOURCES)
def test_a_file_with_the_rounding_of_its_source_gives_back_the_source(family, imported):
    source, found = ggufs.weights_of(SOURCES[family]), ggufs.weights_of(imported(family, "BF16").out)
    assert all(torch.equal(found[name], w) for name, w in source.items())
    assert (logits(imported(family, "BF16").out) - logits(SOURCES[family])).abs().max() < 1e-12


@pytest.mark.parametrize("family", SOURCES)
def test_eight_bits_stay_close_to_the_source(family, imported):
    ours, theirs = (x.log_softmax(-1) for x in (logits(imported(family, "Q8_0").out), logits(SOURCES[family])))
    assert (theirs.exp() * (theirs - ours)).sum(-1).mean() < 0.05


@pytest.mark.parametrize("family", SOURCES)
def test_the_configuration_says_what_that_of_the_source_says(family, imported):
    source = json.loads((SOURCES[family] / "config.json").read_text())
    found = json.loads((imported(family, "Q8_0").out / "config.json").read_text())
    assert {key: found.get(key) for key in source} == source
    assert set(found) - set(source) == {"unk_token_id"}


@pytest.mark.parametrize("family", SOURCES)
def test_tokens_and_template_are_those_of_the_source(family, imported):
    source, found = ggufs.tokenizer_of(family), load_tokenizer(imported(family, "Q8_0").out)
    assert found.get_vocab() == source.get_vocab()
    for text in TEXTS:
        assert found(text).input_ids == source(text).input_ids
        assert found.decode(found(text).input_ids) == source.decode(source(text).input_ids)
    rendered = [t.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) for t in (source, found)]
    assert rendered[0] == rendered[1]
    assert found.special_tokens_map.items() >= ggufs.SPECIAL.items()


@pytest.mark.parametrize("family", SOURCES)
def test_every_writer_is_covered_and_an_edit_is_possible(family, imported, tmp_path):
    out = imported(family, "Q8_0").out
    made = plan(out)
    assert made.model_map.complete
    assert made.coverage == WRITERS[family]
    assert made.model_map.tied == (family != "llama")
    direction = factories.save_direction(made.model_map.d_model, tmp_path / "d.safetensors")
    edited = api.edit(out, factories.given_direction(direction), tmp_path / "edited").out
    assert api.verify(edited, behaviour=False).ok


OTHERS = {
    "qwen3": zoo._text("Qwen3Config", "Qwen3ForCausalLM", vocab_size=623),
    "gemma2": zoo._text(
        "Gemma2Config", "Gemma2ForCausalLM", vocab_size=623, query_pre_attn_scalar=16, sliding_window=8,
        attn_logit_softcapping=20.0, final_logit_softcapping=10.0,
    ),
    "phi3": zoo._text("Phi3Config", "Phi3ForCausalLM", "head_dim", vocab_size=623, sliding_window=8),
    "starcoder2": zoo._text(
        "Starcoder2Config", "Starcoder2ForCausalLM", "head_dim", vocab_size=623, use_bias=True, norm_epsilon=1e-4,
        rope_parameters={"rope_type": "default", "rope_theta": 777.0},
    ),
    "qwen2_moe": zoo._text("Qwen2MoeConfig", "Qwen2MoeForCausalLM", "head_dim", vocab_size=623, **zoo.SHARED),
    "qwen3_moe": zoo._text(
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM", vocab_size=623, **zoo.ROUTING, norm_topk_prob=True
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_come_out_under_the_names_of_their_checkpoints(name, tmp_path, monkeypatch):
    """Sizes, thetas, caps and windows that are not the defaults of their classes; experts stored one by one."""
    monkeypatch.setitem(zoo.BUILDERS, name, OTHERS[name])
    source = factories.save(factories.build(name), tmp_path / "source", dtype=torch.bfloat16)
    file = ggufs.write_gguf(tmp_path / "tiny.gguf", source, "BF16", ggufs.tokenizer_of("qwen2"))
    out = api.import_gguf(file, tmp_path / "out").out
    before, after = ggufs.weights_of(source), ggufs.weights_of(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], w) for key, w in before.items())
    assert (logits(out) - logits(source)).abs().max() < 1e-12
    assert plan(out).model_map.complete


def test_the_card_says_where_it_comes_from_and_what_was_lost(imported):
    report = imported("qwen2", "Q8_0")
    card = (report.out / "README.md").read_text()
    assert card.startswith("---\n")
    assert "license: mit\n" in card
    for text in ("`qwen2-Q8_0.gguf`", report.source_sha256, "| Q8_0 | 698,784 | 99.6% |", "not the original weights"):
        assert text in card
    assert "Nothing of what the file holds as F16" in (imported("qwen2", "F16").out / "README.md").read_text()
    assert "The file is not quantised." in (imported("qwen2", "F32").out / "README.md").read_text()


def test_a_dtype_can_be_asked_for(tmp_path):
    report = api.import_gguf(write(tmp_path, "qwen2", "F16"), tmp_path / "out", dtype="bfloat16")
    meant = ggufs.rounded(SOURCES["qwen2"], "F16", torch.bfloat16)
    assert all(torch.equal(w, meant[name]) for name, w in ggufs.weights_of(report.out).items())
    assert json.loads((report.out / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_ends_a_reply_and_how_to_sample_is_taken_over(tmp_path):
    def change(writer):
        writer.add_eot_token_id(3)
        writer.add_float32("general.sampling.temp", 0.5)
        writer.add_int32("general.sampling.top_k", 20)

    report = api.import_gguf(write(tmp_path, change=change), tmp_path / "out")
    found = json.loads((report.out / "generation_config.json").read_text())
    asked = {"eos_token_id": [3, 4], "temperature": 0.5, "top_k": 20, "do_sample": True, "pad_token_id": 0}
    assert found.items() >= asked.items()
    assert "_from_model_config" not in found


# --- what transformers alone leaves out -------------------------------------------------------------------------------


def llama3_factors(theta=10000.0, head=32, factor=32.0):
    """As the converter computes them."""
    frequencies = 1.0 / theta ** (np.arange(0, head, 2) / head)
    found = []
    for wavelength in 2 * np.pi / frequencies:
        smooth = (8192 / wavelength - 1) / (4 - 1)
        found.append(np.where(wavelength < 8192 / 4, 1, np.where(
            wavelength > 8192, factor, 1 / ((1 - smooth) / factor + smooth))))  # fmt: skip
    return np.array(found, dtype=np.float32)


def test_the_rotations_of_llama_3_are_recognised(tmp_path):
    factors = llama3_factors()
    assert 1 < sorted(set(factors.tolist()))[1] < 32
    file = write(tmp_path, change=lambda writer: writer.add_tensor("rope_freqs.weight", factors))
    out = api.import_gguf(file, tmp_path / "out").out
    rope = json.loads((out / "config.json").read_text())["rope_parameters"]
    assert rope == {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    plain = 1.0 / 10000.0 ** (torch.arange(0, 32, 2) / 32)
    assert torch.allclose(factories.load(out).model.rotary_emb.inv_freq.float(), plain / torch.from_numpy(factors))


def test_scaled_rotations_are_taken_over(tmp_path):
    def linear(writer):
        writer.add_string("gemma3.rope.scaling.type", "linear")
        writer.add_float32("gemma3.rope.scaling.factor", 8.0)

    def yarn(writer):
        writer.add_string("qwen2.rope.scaling.type", "yarn")
        writer.add_float32("qwen2.rope.scaling.factor", 4.0)
        writer.add_uint32("qwen2.rope.scaling.original_context_length", 32)

    out = api.import_gguf(write(tmp_path, "gemma3_text", change=linear), tmp_path / "gemma").out
    rope = json.loads((out / "config.json").read_text())["rope_parameters"]
    assert rope["full_attention"] == {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    assert rope["sliding_attention"] == {"rope_type": "default", "rope_theta": 1e4}
    out = api.import_gguf(write(tmp_path, "qwen2", change=yarn), tmp_path / "qwen").out
    rope = json.loads((out / "config.json").read_text())["rope_parameters"]
    yarned = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    assert rope.items() >= yarned.items()


@pytest.mark.parametrize(
    ("family", "change", "says"),
    [
        ("llama", lambda w: w.add_float32("llama.attention.scale", 0.1), "attention.scale = 0.1"),
        ("llama", lambda w: w.add_uint32("llama.attention.value_length", 16), "attention.value_length = 16"),
        ("llama", lambda w: w.add_string("llama.rope.scaling.type", "longrope"), "rope.scaling.type = longrope"),
        ("llama", lambda w: w.add_tensor("rope_freqs.weight", np.full(16, 3, np.float32)), "rope_freqs.weight"),
        ("llama", lambda w: w.add_float32("llama.logit_scale", 0.5), "logit_scale = 0.5"),
        ("qwen2", lambda w: w.add_uint32("qwen2.rope.dimension_count", 8), "rope.dimension_count = 8"),
        ("qwen2", lambda w: w.add_uint32("qwen2.expert_count", 4), "expert_count = 4"),
        ("llama", lambda w: w.add_tensor("blk.0.attn_q.bias", np.zeros(128, np.float32)), "values, LlamaForCausalLM"),
        ("llama", lambda w: w.add_tensor("blk.0.made_up.weight", np.zeros(7, np.float32)), "values, LlamaForCausalLM"),
    ],
)
def test_what_would_compute_otherwise_is_refused(family, change, says, tmp_path):
    file = write(tmp_path, family, change=change)
    with pytest.raises(UnsupportedFormatError, match=says):
        api.import_gguf(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("name", ["model.layers.3.mlp.down_proj.weight", "model.norm.weight"])
def test_a_parameter_without_a_tensor_is_never_made_up(name, tmp_path):
    tensors = ggufs.weights_of(SOURCES["llama"])
    del tensors[name]
    with pytest.raises(UnsupportedFormatError, match=r"holds [\d,]+ values, LlamaForCausalLM of transformers [\d,]+"):
        api.import_gguf(write(tmp_path, tensors=tensors), tmp_path / "out")


def test_a_tensor_of_another_shape_or_name_is_refused(tmp_path):
    tensors, name = ggufs.weights_of(SOURCES["llama"]), "model.layers.3.mlp.down_proj.weight"
    turned = tensors | {name: tensors[name].T.contiguous()}
    with pytest.raises(UnsupportedFormatError, match=rf"nothing in it that fits '{name}'"):
        api.import_gguf(write(tmp_path, tensors=turned), tmp_path / "out")
    tensors["blk.3.ffn_downwards.weight"] = tensors.pop(name)
    with pytest.raises(UnsupportedFormatError, match=rf"nothing in it that fits '{name}'"):
        api.import_gguf(write(tmp_path, tensors=tensors), tmp_path / "out")


@pytest.mark.parametrize("key", ["block_count", "embedding_length", "head_count", "feed_forward_length"])
def test_a_size_that_is_missing_is_not_guessed(key, tmp_path):
    file = write(tmp_path, without=[key])
    with pytest.raises((UnsupportedFormatError, CheckpointError)):
        api.import_gguf(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_what_does_not_matter_is_named_and_left(tmp_path):
    def change(writer):
        writer.add_string("llama.tensor_data_layout", "Meta AI original pth")
        writer.add_string("tokenizer.chat_template.tool_use", "{{ messages }}")

    heard = []
    report = api.import_gguf(write(tmp_path, change=change), tmp_path / "out", on_event=heard.append)
    said = [event.text for event in heard if isinstance(event, Noted)]
    assert said == list(report.notes)
    assert said == [
        "of its chat templates only the default one was taken, not: tool_use",
        "its tensor_data_layout = Meta AI original pth was not taken over",
    ]
    assert all(f"- {note}\n" in (report.out / "README.md").read_text() for note in said)
    bare = api.import_gguf(write(tmp_path, "qwen2", without=["chat_template"]), tmp_path / "bare")
    assert bare.notes == ("the file has no chat template: it may be of a base model",)


@pytest.mark.parametrize(("value", "dtype", "says"), [(float("nan"), None, "NaN"), (1e5, "float16", "float16")])
def test_what_is_not_finite_is_refused(value, dtype, says, tmp_path):
    tensors = ggufs.weights_of(SOURCES["llama"])
    tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
    tensors["lm_head.weight"][5, 7] = value
    with pytest.raises(NonFiniteError, match=f"'lm_head.weight' holds NaN.*{'' if dtype is None else says}"):
        api.import_gguf(write(tmp_path, tensors=tensors), tmp_path / "out", dtype=dtype)


# --- tokenizers -------------------------------------------------------------------------------------------------------


def split(file):
    from abliterate.checkpoint.gguf import read_gguf
    from abliterate.model.gguf_tokenizer import load_gguf_tokenizer

    tokenizer, notes = load_gguf_tokenizer(read_gguf(file))
    return tokenizer, notes


def renamed(pre):
    return lambda writer: writer.kv_data[0].__setitem__(
        "tokenizer.ggml.pre", type(writer.kv_data[0]["tokenizer.ggml.pre"])(pre, ggufs.gguf.GGUFValueType.STRING)
    )


def test_digits_are_split_where_the_file_says_so(tmp_path):
    tokenizer, notes = split(write(tmp_path, "qwen2", change=renamed("smollm")))
    pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12 b")]
    assert pieces == ["a", "ĠĠ", "1", "2", "Ġb"]
    assert notes == ()


def test_a_split_that_is_not_known_is_said(tmp_path):
    _, notes = split(write(tmp_path, "qwen2", change=renamed("nobody-knows")))
    assert len(notes) == 1
    assert "does not know how 'nobody-knows' splits text" in notes[0]


def test_words_of_llama_3_that_are_tokens_stay_whole(tmp_path):
    tokenizer, notes = split(write(tmp_path, "qwen2", change=renamed("llama-bpe")))
    assert json.loads(tokenizer.backend_tokenizer.to_str())["model"]["ignore_merges"]
    assert notes == ()


def test_no_space_comes_first_where_the_file_says_so(tmp_path):
    tokenizer, _ = split(write(tmp_path, "llama", change=lambda writer: writer.add_add_space_prefix(False)))
    assert tokenizer.convert_ids_to_tokens(tokenizer("hello").input_ids)[1][0] != "▁"
    assert tokenizer.decode(tokenizer("hello you").input_ids, skip_special_tokens=True) == "hello you"


# --- the folder -------------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        api.import_gguf(write(tmp_path), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_is_said_before_anything_is_loaded(tmp_path, monkeypatch):
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage(0, 0, output.DISK_RESERVE_BYTES + 1000))
    monkeypatch.setattr("abliterate.exports.importing.load_gguf", lambda *args, **options: pytest.fail("loaded"))
    file = write(tmp_path)
    with pytest.raises(NotEnoughDiskError, match=r"needs 2\.88 MB"):
        api.import_gguf(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_stopped_import_has_no_final_name_and_the_same_command_does_it_again(tmp_path, monkeypatch):
    file = write(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("abliterate.exports.importing.card", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            api.import_gguf(file, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", file.name, "out.partial"]
    with pytest.raises(OutputError):
        api.import_gguf(write(tmp_path, "qwen2"), tmp_path / "out")
    api.import_gguf(file, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1


def test_a_file_of_that_name_in_the_current_folder_is_another(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    file = write(tmp_path / "there")
    (tmp_path / "here" / file.name).write_bytes(b"GGUF, but no more than that")
    monkeypatch.chdir(tmp_path / "here")
    assert api.import_gguf(file, tmp_path / "out").model_type == "llama"


def test_too_little_memory_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("abliterate.exports.importing.free_bytes", lambda device: 10**6)
    heard = []
    api.import_gguf(write(tmp_path), tmp_path / "out", on_event=heard.append)
    assert any(isinstance(event, Noted) and "0.0 GB are free" in event.text for event in heard)


def test_the_command(tmp_path):
    file = write(tmp_path, "gemma3_text", "Q8_0")
    shown = CliRunner().invoke(app, ["import", str(file), "--out", str(tmp_path / "out"), "--json"])
    assert shown.exit_code == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert found["out"] == str(tmp_path / "out")
    assert found["values"] == {"Q8_0": 698784, "F32": 3680}
    shown = CliRunner().invoke(app, ["import", str(file), "--out", str(tmp_path / "again")])
    assert shown.stdout.splitlines()[0] == "gemma3: 698,784 values as Q8_0, 3,680 values as F32"
    assert f"written: {tmp_path / 'again'}" in shown.stdout
    assert "it/s" not in shown.stderr
