"""What a checkpoint says of itself that cannot be, and what changes while it is read."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

import abliterate
from abliterate.arch.registry import families
from abliterate.arch.sizes import config_size
from abliterate.checkpoint.direction_file import load
from abliterate.editing.planning import plan
from abliterate.errors import CheckpointError, UnknownTensorError
from tests import checkpoints
from tests.checkpoints import write_llama
from tests.edge_tools import done, refused
from tests.pushing import direction_file
from tests.quantising import quantised_llama


@pytest.fixture
def base(tmp_path):
    return write_llama(tmp_path / "base")


@pytest.fixture
def direction(tmp_path):
    return direction_file(tmp_path)


# --- what changes while it is read ------------------------------------------------------------------------------------


def grown(path):
    path.write_bytes(path.read_bytes() + b"\0" * 8)


def touched(path):
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def replaced(path):
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[:-1] + b"\x01")
    other.replace(path)


def gone(path):
    path.unlink()


@pytest.mark.parametrize("change", [grown, touched, replaced, gone])
@pytest.mark.parametrize(
    "name", ["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors", "config.json"]
)
def test_a_source_that_changes_during_an_edit(name, change, direction, tmp_path):
    base, changed = write_llama(tmp_path / "base", shards=3), []

    def listen(event):
        if type(event).__name__ == "Advanced" and not changed:
            changed.append(change(base / name))

    with pytest.raises(CheckpointError, match=rf"{name}: (changed while it was read|No such file)"):
        abliterate.edit(base, load(direction), tmp_path / "out", on_event=listen)
    assert changed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("side", ["base", "out"])
def test_a_source_that_changes_during_a_proof(side, direction, tmp_path):
    base = write_llama(tmp_path / "base", shards=3)
    out = abliterate.edit(base, load(direction), tmp_path / "out").out

    def listen(event):
        if type(event).__name__ == "Finished" and event.task == "verify":
            raise AssertionError("it ended well")
        if type(event).__name__ == "Advanced":
            touched(tmp_path / side / "model-00001-of-00003.safetensors")

    with pytest.raises(CheckpointError, match="changed while it was read"):
        abliterate.verify(out, behaviour=False, on_event=listen)


def test_a_shard_that_shrinks_between_plan_and_edit(base):
    made = checkpoints.without(plan(base), checkpoints.directions())
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="changed while it was read"):
        checkpoints.edit(made, base.with_name("out"))


def test_a_blob_of_the_cache_that_is_not_what_its_name_says(tmp_path, direction):
    """Where the Hub, or a disk, gave other bytes than it said: the name of the file in the cache is its hash."""
    plain = write_llama(tmp_path / "plain")
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / ("0" * 40), tmp_path / "models--a--b" / "blobs"
    shutil.copytree(plain, snapshot)
    blobs.mkdir()
    digest = checkpoints.tree(plain)["model.safetensors"]
    (snapshot / "model.safetensors").rename(blobs / digest)
    (snapshot / "model.safetensors").symlink_to(blobs / digest)
    good = abliterate.edit(snapshot, load(direction), tmp_path / "good").out
    assert abliterate.verify(good, behaviour=False).ok
    data = bytearray((blobs / digest).read_bytes())
    data[-1] ^= 1
    (blobs / digest).write_bytes(data)
    bad = abliterate.edit(snapshot, load(direction), tmp_path / "bad").out
    with pytest.raises(CheckpointError, match=rf"{digest}: its SHA-256 is not the one"):
        abliterate.verify(bad, behaviour=False)


# --- what a header or a configuration says ----------------------------------------------------------------------------


def test_a_tensor_that_lies_in_two_shards(tmp_path):
    base = write_llama(tmp_path / "base", shards=2)
    first, second = sorted(base.glob("*.safetensors"))
    name = "model.norm.weight"
    held = {its: checkpoints.read(base, its) for its in checkpoints.header(first) if its != "__metadata__"}
    first.write_bytes(checkpoints.pack({**held, name: checkpoints.read(base, name)}))
    said = refused(5, f"tensor '{name}' is stored in", "plan", base)
    assert first.name in said
    assert second.name in said


@pytest.mark.parametrize("at_the_end", [True, False])
def test_tensors_without_elements(at_the_end, tmp_path, direction):
    shapes = checkpoints.llama_shapes(checkpoints.llama_config())
    tensors = checkpoints.random_tensors(shapes, torch.bfloat16)
    empty = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(0)}
    base = checkpoints.write(
        tmp_path / "base", checkpoints.llama_config(), tensors | empty if at_the_end else empty | tensors
    )
    done("edit", base, direction, "--out", tmp_path / "out")
    done("verify", tmp_path / "out", "--bytes-only")
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == (base / "model.safetensors").stat().st_size


def test_a_writer_without_elements_is_none(tmp_path):
    tensors = checkpoints.random_tensors(checkpoints.llama_shapes(checkpoints.llama_config()), torch.bfloat16)
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(32, 0, dtype=torch.bfloat16)
    base = checkpoints.write(tmp_path / "base", checkpoints.llama_config(intermediate_size=0), tensors)
    refused(3, "", "plan", base)


def test_a_configuration_with_a_byte_order_mark(base, direction, tmp_path):
    data = b"\xef\xbb\xbf" + (base / "config.json").read_bytes()
    (base / "config.json").write_bytes(data)
    done("edit", base, direction, "--out", tmp_path / "out")
    done("verify", tmp_path / "out", "--bytes-only")
    assert (tmp_path / "out" / "config.json").read_bytes() == data


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("[]", 5, "must hold a JSON object"),
        ('// the model\n{"model_type": "llama"}', 5, "not valid JSON"),
        ('{"model_type": "llama", /* */ "hidden_size": 32}', 5, "not valid JSON"),
        ("{'model_type': 'llama'}", 5, "not valid JSON"),
        ('{"model_type": "llama",}', 5, "not valid JSON"),
        ('{"model_type": "llama", "text_config": []}', 5, "text_config must be an object"),
        ("{}", 3, "model_type None is not in the registry"),
        ('{"model_type": ["llama"]}', 3, "is not in the registry"),
    ],
)
def test_a_configuration_that_is_none(text, code, says, base):
    (base / "config.json").write_text(text)
    refused(code, says, "plan", base)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-1", "0", "null", "true", '"32"', "32.0", "1e400", "[32]"])
def test_a_size_that_is_no_number(key, value, base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config).replace(f'"{key}": {config[key]}', f'"{key}": {value}'))
    refused(3, key, "plan", base)


@pytest.mark.parametrize("options", [(), ("--allow-partial",)])
def test_more_blocks_than_there_are_tensors(options, base):
    """Looking for the writers of each of a billion would not end."""
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    refused(3, "n_layers is 1,000,000,000, and the checkpoint holds", "plan", base, *options)


def test_nan_beside_the_sizes_is_handed_on(base, direction, tmp_path):
    """Python writes and reads it; it is no size, so it is none of ours."""
    text = (base / "config.json").read_text().replace("{", '{"rms_norm_eps": NaN,', 1)
    (base / "config.json").write_text(text)
    done("edit", base, direction, "--out", tmp_path / "out")
    done("verify", tmp_path / "out", "--bytes-only")
    assert (tmp_path / "out" / "config.json").read_text() == text


@pytest.mark.parametrize("value", [None, "x", [], -1, 0, float("nan"), float("inf")], ids=repr)
@pytest.mark.parametrize("family", [its for its in families() if its.embedding_scale], ids=lambda its: its.family)
def test_a_scale_of_the_embedding_that_is_none(family, value):
    key, _, condition = family.embedding_scale.removeprefix("sqrt ").partition(" if ")
    with pytest.raises(UnknownTensorError, match=rf"config.json: {key} is"):
        family.scale_of_embedding({condition or "x": True, key: value})


def test_a_size_that_is_the_length_of_a_number():
    assert config_size({"blocks": ["a", "b"]}, "len blocks", "x") == 2
    with pytest.raises(UnknownTensorError, match="len blocks is None"):
        config_size({"blocks": 2}, "len blocks", "x")


@pytest.mark.parametrize(
    "value", ["128", [128], [0, 128], [128, "x"], [1.5, 2], True, {"x": 1}, 10**400], ids=lambda its: repr(its)[:9]
)
def test_blocks_of_scales_that_are_none(value, tmp_path):
    base, _ = quantised_llama(tmp_path / "base", "blocks")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = value
    (base / "config.json").write_text(json.dumps(config))
    refused(3, "weight_block_size is", "plan", base)


def test_blocks_of_mxfp4_without_their_axes(tmp_path):
    stem = "model.layers.0.mlp.experts.down_proj"
    tensors = {
        f"{stem}_blocks": torch.zeros(4, 16, dtype=torch.uint8),
        f"{stem}_scales": torch.zeros(4, dtype=torch.uint8),
    }
    config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    refused(3, "are not MXFP4", "plan", checkpoints.write(tmp_path / "base", config, tensors))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_a_direction_that_is_stored_as_no_vector(dtype, tmp_path):
    save_file({"direction": torch.ones(128).to(dtype)}, tmp_path / "d.safetensors")
    refused(
        5, "tensor 'direction' is stored as", "edit", "tiny-chat", tmp_path / "d.safetensors", "--out", tmp_path / "o"
    )
