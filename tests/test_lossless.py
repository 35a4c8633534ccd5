"""Everything that is not edited comes through byte for byte."""

import json

import pytest
import torch

import abliterate
from abliterate.arch.edit_plan import untied_config
from abliterate.checkpoint import direction_file as direction_files
from abliterate.editing.planning import plan
from tests import checkpoints
from tests.checkpoints import INDEX, SIDE_FILES, write_llama

LAYOUTS = {
    "one file": {},
    "shards": {"shards": 3},
    "more shards than blocks": {"shards": 9, "biases": True},
    "holes": {"shards": 2, "gap": 6},
    "odd alignment": {"shards": 2, "gap": 3, "pad": 1},
    "odd alignment, one file": {"pad": 1, "gap": 1},
    "no metadata": {"metadata": {}},
    "large header padding": {"pad": 4096},
}


def outside(path, tensors):
    """The bytes of a file that belong to none of ``tensors``, and those that do."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    ranges = sorted(entry["data_offsets"] for name, entry in checkpoints.header(path).items() if name in tensors)
    rest, inside, position = b"", b"", 0
    for first, last in ranges:
        rest += raw[position : start + first]
        inside += raw[start + first : start + last]
        position = start + last
    return rest + raw[position:], inside


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("memory", [1, 2**30])
def test_only_the_bytes_of_writers_change(layout, dtype, memory, tmp_path):
    base = write_llama(tmp_path / "base", dtype=dtype, **layout)
    before = checkpoints.tree(base)
    edited = checkpoints.edit(base, tmp_path / "edited", memory_bytes=memory)
    writers = {writer.tensor.name for writer in plan(base).writers}
    for shard in sorted(base.glob("*.safetensors")):
        old, new = outside(shard, writers), outside(edited / shard.name, writers)
        assert old[0] == new[0]
        assert len(old[1]) == len(new[1])
        assert old[1] != new[1] or not old[1]
    kept = {name: digest for name, digest in before.items() if not name.endswith(".safetensors")}
    assert {name: digest for name, digest in checkpoints.tree(edited).items() if name in kept} == kept
    assert checkpoints.tree(edited).keys() == before.keys()
    assert checkpoints.tree(base) == before


def test_every_kind_of_side_file_is_there(tmp_path):
    edited = checkpoints.edit(write_llama(tmp_path / "base", shards=2), tmp_path / "edited")
    for name, content in SIDE_FILES.items():
        assert (edited / name).read_bytes() == content, name


def test_dtypes_that_are_not_edited_come_through(tmp_path):
    config = checkpoints.llama_config()
    tensors = checkpoints.random_tensors(checkpoints.llama_shapes(config), torch.float16)
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.arange(40 * 32, dtype=torch.int64).reshape(40, 32)
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.arange(5, dtype=torch.uint8)
    base = checkpoints.write(tmp_path / "base", config, tensors)
    edited = checkpoints.edit(base, tmp_path / "edited")
    for name, tensor in tensors.items():
        ours = checkpoints.read(edited, name)
        assert (ours.dtype, ours.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(ours, tensor) != any(writer.tensor.name == name for writer in plan(base).writers)


def test_a_symlinked_hub_snapshot_works_and_is_never_written(tmp_path):
    """``snapshots/<commit>/`` holds links into ``blobs/``, as in the Hub cache."""
    plain = write_llama(tmp_path / "plain", shards=2)
    repo = tmp_path / "cache" / "models--owner--model"
    (repo / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(plain.rglob("*"))):
        if path.is_file():
            blob = repo / "blobs" / f"{number:040}"
            blob.write_bytes(path.read_bytes())
            blob.chmod(0o444)
            link = repo / "snapshots" / "abc123" / path.relative_to(plain)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
    before = checkpoints.tree(repo)
    snapshot = repo / "snapshots" / "abc123"
    assert plan(snapshot).checkpoint.revision == "abc123"
    from_links = checkpoints.edit(snapshot, tmp_path / "from links")
    from_files = checkpoints.edit(plain, tmp_path / "from files")
    assert checkpoints.tree(from_links) == checkpoints.tree(from_files)
    assert not any(path.is_symlink() for path in from_links.rglob("*"))
    assert checkpoints.tree(repo) == before


def test_weights_in_other_formats_are_not_copied(tmp_path):
    others = {"pytorch_model.bin": b"w", "consolidated.safetensors": b"w", "gguf/m.gguf": b"w", "a/b.onnx": b"w"}
    base = write_llama(tmp_path / "base", files={**SIDE_FILES, **others})
    edited = checkpoints.edit(base, tmp_path / "edited")
    assert not others.keys() & checkpoints.tree(edited).keys()
    assert all(name in " ".join(plan(base).notes) for name in others)


# --- untying ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [{}, {"shards": 3}, {"shards": 2, "pad": 1}], ids=["one file", "shards", "odd"])
def test_the_added_head_is_the_unedited_embedding_and_nothing_moves(layout, tmp_path):
    base = write_llama(tmp_path / "base", head=False, tied=True, **layout)
    edited = checkpoints.edit(base, tmp_path / "edited")
    embedding = checkpoints.read(base, "model.embed_tokens.weight")
    assert torch.equal(checkpoints.read(edited, "lm_head.weight"), embedding)
    assert not torch.equal(checkpoints.read(edited, "model.embed_tokens.weight"), embedding)
    for shard in sorted(base.glob("*.safetensors")):
        old, new = checkpoints.header(shard), checkpoints.header(edited / shard.name)
        assert list(new)[: len(old)] == list(old)
        assert all(new[name] == entry for name, entry in old.items())
        assert set(new) - set(old) <= {"lm_head.weight"}
    untouched = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(checkpoints.read(edited, untouched), checkpoints.read(base, untouched))


def test_the_index_gains_the_head_and_nothing_else(tmp_path):
    base = write_llama(tmp_path / "base", head=False, tied=True, shards=3)
    edited = checkpoints.edit(base, tmp_path / "edited")
    old, new = (json.loads((folder / INDEX).read_text()) for folder in (base, edited))
    added = {"lm_head.weight": old["weight_map"]["model.embed_tokens.weight"]}
    assert new["weight_map"] == {**old["weight_map"], **added}
    assert new["metadata"] == {"total_size": old["metadata"]["total_size"] + 44 * 32 * 2, "origin": "a test"}


@pytest.mark.parametrize("flag", [{"tie_word_embeddings": True}, {}])
@pytest.mark.parametrize("text", [None, {"tie_word_embeddings": True}, {}])
def test_the_configuration_says_untied_wherever_it_could_say_tied(flag, text, tmp_path):
    config = checkpoints.llama_config(model_type="gemma")
    del config["tie_word_embeddings"]
    config |= flag
    if text is not None:
        config["text_config"] = {**config, **text}
    shapes = checkpoints.llama_shapes(checkpoints.llama_config(), head=False)
    base = checkpoints.write(tmp_path / "base", config, checkpoints.random_tensors(shapes, torch.bfloat16))
    new = json.loads((checkpoints.edit(base, tmp_path / "edited") / "config.json").read_text())
    assert new["tie_word_embeddings"] is False
    assert text is None or new["text_config"]["tie_word_embeddings"] is False
    for part, original in ((new, config), (new.get("text_config", {}), config.get("text_config", {}))):
        rest = [item for item in part.items() if item[0] not in ("tie_word_embeddings", "text_config")]
        assert rest == [item for item in original.items() if item[0] not in ("tie_word_embeddings", "text_config")]


def test_untying_a_configuration_does_not_change_the_original():
    config = {"a": 1, "text_config": {"b": 2}}
    untied_config(config)
    assert config == {"a": 1, "text_config": {"b": 2}}


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_the_result_untied(tied, tmp_path):
    from transformers import AutoModelForCausalLM

    base = write_llama(tmp_path / "base", head=not tied, tied=tied, shards=2)
    edited = checkpoints.edit(base, tmp_path / "edited")
    model, loading = AutoModelForCausalLM.from_pretrained(edited, dtype="auto", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.tie_word_embeddings is False
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    assert head.data_ptr() != embedding.data_ptr()
    original = checkpoints.read(base, "model.embed_tokens.weight" if tied else "lm_head.weight")
    assert torch.equal(head, original)
    assert torch.equal(embedding, checkpoints.read(edited, "model.embed_tokens.weight"))


# --- the whole command ------------------------------------------------------------------------------------------------


def given_direction(folder):
    from safetensors.torch import save_file

    save_file({"direction": checkpoints.directions()[:, 0].float()}, folder / "d.safetensors")
    return direction_files.load(folder / "d.safetensors")


def test_the_base_readme_and_manifest_are_kept_aside(tmp_path):
    base = write_llama(tmp_path / "base", files={**SIDE_FILES, "abliterate.json": b'{"not": "ours"}'})
    out = abliterate.edit(base, given_direction(tmp_path), tmp_path / "out").out
    assert (out / "abliterate" / "base-README.md").read_bytes() == SIDE_FILES["README.md"]
    assert (out / "abliterate" / "base-abliterate.json").read_bytes() == b'{"not": "ours"}'
    card = (out / "README.md").read_text()
    assert "license: mit" in card
    assert json.loads((out / "abliterate.json").read_text())["source"]["name"] == str(base)


@pytest.mark.parametrize(
    "readme", [None, b"no metadata", b"---\n: [\n---\n", b"---\nlicense: [a, b]\n---\n", b"\xff\xfe"]
)
def test_any_base_readme_gives_a_card(readme, tmp_path):
    files = {} if readme is None else {"README.md": readme}
    base = write_llama(tmp_path / "base", files=files)
    out = abliterate.edit(base, given_direction(tmp_path), tmp_path / "out").out
    assert (out / "README.md").read_text("utf-8").startswith("---")
    assert (out / "abliterate" / "base-README.md").exists() == (readme is not None)


def test_an_edited_checkpoint_can_be_edited_and_verified_again(tmp_path):
    first = abliterate.edit(write_llama(tmp_path / "base"), given_direction(tmp_path), tmp_path / "first").out
    second = abliterate.edit(first, given_direction(tmp_path), tmp_path / "second").out
    report = abliterate.verify(second, behaviour=False)
    assert report.failures == ()
    assert (second / "abliterate" / "base-README.md").read_bytes() == (first / "README.md").read_bytes()
