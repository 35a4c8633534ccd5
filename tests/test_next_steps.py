"""What users do next with an edited checkpoint still works: load it, train on it, convert it to GGUF."""

import json
import re

import gguf
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open

import abliterate
from abliterate.checkpoint.direction_file import load
from abliterate.data.tiny_chat import model_path
from abliterate.editing.planning import plan
from abliterate.exports.llama_cpp import ARCHITECTURES, plain_name, tensor_names
from tests import factories, zoo

WIDTH = 48


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    """A case of the zoo, edited in bfloat16, made once."""
    made = {}

    def get(name):
        if name not in made:
            here = tmp_path_factory.mktemp(name.replace(".", "-"))
            base = factories.save(factories.build(name), here / "base", dtype=torch.bfloat16)
            direction = load(factories.save_direction(WIDTH, here / "direction.safetensors"))
            recipe = abliterate.Recipe(allow_partial=name in zoo.CLASS_C)
            made[name] = base, abliterate.edit(base, direction, here / "edited", recipe=recipe).out
        return made[name]

    return get


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def names_in(folder):
    """Names of the tensors that the files of a checkpoint hold."""
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= set(file.keys())
    return found


# --- load it ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [*(case for case in zoo.CORE if case != "qwen"), "gemma3-vision", "qwen3-vl"]
)  # Qwen 1 has its own code
def test_it_loads_and_nothing_of_it_is_made_up(name, edited):
    """A head that is missing where the configuration says that there is one would be random."""
    _, folder = edited(name)
    pictures = "vision_config" in config_of(folder)
    auto = transformers.AutoModelForImageTextToText if pictures else transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not {kind: its for kind, its in info.items() if its}
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} <= {torch.bfloat16, torch.float32}
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head is not embedding
    assert not torch.equal(head, embedding)
    config = config_of(folder)  # other runtimes, and transformers 4, go by what it says
    assert not any(its.get("tie_word_embeddings", False) for its in (config, config.get("text_config", {})))


# --- train on it ------------------------------------------------------------------------------------------------------


def logits(model):
    with torch.no_grad():
        return model.eval()(factories.token_ids()).logits


@pytest.mark.filterwarnings("ignore")  # what the trainers say of each other's options
@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "gemma3-text"])
def test_lora_trains_on_top_and_can_be_merged(name, edited, tmp_path):
    _, folder = edited(name)
    model = factories.load(folder, dtype=torch.float32)
    before = {key: w.clone() for key, w in model.state_dict().items()}
    plain = logits(model)
    settings = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    tuned = get_peft_model(model, settings).train()
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0)
    tokens = factories.token_ids()
    loss = tuned(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    assert tuned(input_ids=tokens, labels=tokens).loss < loss
    changed = logits(tuned)
    assert (changed - plain).abs().max() > 1e-3
    base = {key.replace(".base_layer", ""): w for key, w in tuned.get_base_model().state_dict().items()}
    assert all(torch.equal(base[key], w) for key, w in before.items())
    tuned.save_pretrained(tmp_path / "lora")
    again = PeftModel.from_pretrained(factories.load(folder, dtype=torch.float32), tmp_path / "lora")
    assert torch.equal(logits(again), changed)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = factories.load(tmp_path / "merged", dtype=torch.float32)
    assert (logits(merged) - changed).abs().max() < 1e-4 * changed.abs().max()


@pytest.mark.filterwarnings("ignore")
def test_supervised_tuning_takes_a_step(tmp_path):
    """TRL's trainer, on the bundled model with its own tokenizer and chat template."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer  # the dev extra has it; without it this fails, and the rest does not

    config = config_of(model_path())
    direction = load(factories.save_direction(config["hidden_size"], tmp_path / "direction.safetensors"))
    folder = abliterate.edit(model_path(), direction, tmp_path / "edited").out
    turns = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A small model."}]
    settings = SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, seed=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = SFTTrainer(
        model=model, args=settings, train_dataset=Dataset.from_list(2 * [{"messages": turns}]),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    assert 0 < trainer.train().training_loss < 20
    assert trainer.state.global_step == 1
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert "lm_head.weight" in changed
    assert len(changed) > 0.9 * len(before)
    trainer.save_model(str(tmp_path / "tuned"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=torch.float32)
    assert all(torch.equal(p, dict(model.named_parameters())[name]) for name, p in again.named_parameters())


# --- convert it -------------------------------------------------------------------------------------------------------

UNKNOWN = {
    "cohere2-moe": "newer than this library", "helium": "llama.cpp has none", "ministral": "llama.cpp has none",
    "opt": "llama.cpp has none", "opt-350m": "llama.cpp has none", "vaultgemma": "llama.cpp has none",
}  # fmt: skip
"""Cases whose architecture the gguf library does not know."""

BY_CONFIG = {"nemotron-h": "nemotron_h_moe", "nemotron-h-latent": "nemotron_h_moe"}
"""Those that the converter names after what is in their blocks."""

TOWERS = ("visual.", "vision_tower.", "vision_model.", "multi_modal_projector.", "embed_vision.")
"""What goes to a file of its own, and which an edit leaves alone, but for the projector, whose name it keeps."""

RENAMED = (
    (r"\.experts\.\d+\.", ".experts."),  # all experts of a layer are joined
    (r"^model\.(layers\.\d+\.feed_forward\.experts\.w\d)", r"\1"),
    (r"^backbone\.(layers\.\d+)\.mixer\.experts\.", r"model.\1.mlp.experts."),
    (r"\.experts\.gate_up_proj", ".experts.up_proj"),  # gates are split from what they gate
    (r"\.experts\.(\w+)_bias$", r".experts.\1.bias"),
    (r"\.dt_bias$", ".dt_proj.bias"),
    (r"e_score_correction_bias$", "e_score_correction.bias"),
    (r"_layernorm\.norms\.\d+\.", "_layernorm."),  # norms of the heads are joined
    (r"(altup_\w*projections)\.\d+\.", r"\1."),
)
"""As llama.cpp's converter renames tensors before it asks for their names."""

DIRECTLY = (
    (r"block_sparse_moe\.input_linear", "FFN_UP_EXP"), (r"shared_mlp\.input_linear", "FFN_UP_SHEXP"),
    (r"router\.scale$", "FFN_GATE_INP"), (r"router\.per_expert_scale$", "FFN_DOWN_EXP"),
)  # fmt: skip
"""What the converter names without asking."""

DROPPED = ("gemma", "gemma2")
"""Of these the converter drops a head, and so ties it again."""

HEADLESS = ("cohere", "cohere2", "lfm2-moe")
"""At a head of these it stops."""

DENSE = {f"model.layers.N.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
NOT_KNOWN = {
    **{name: {"lm_head.weight"} for name in (*DROPPED, *HEADLESS)},
    # blocks without experts, which no released model that we know has, and llama.cpp has no place for
    **dict.fromkeys(("qwen2-moe", "qwen3-moe", "qwen3-next"), DENSE),
    # transformers 5.23 saves the dense MLP under the name of the experts; released files have it under its own
    "kimi-linear": {name.replace("mlp", "block_sparse_moe") for name in DENSE},
}
"""What is left without a name."""


def architecture(name):
    return BY_CONFIG.get(name) or ARCHITECTURES.get(zoo.model_type(name), "")


def asked_for(name):
    for pattern, instead in RENAMED:
        name = re.sub(pattern, instead, name)
    return plain_name(name)


def unnamed(case, folder):
    """Tensors of a checkpoint that the library has no name for, layers left out, and that of the head."""
    arch = next(number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == architecture(case))
    known = tensor_names(architecture(case), plan(folder, allow_partial=True).model_map.n_layers)
    found = set()
    for name in names_in(folder):
        direct = next((kind for pattern, kind in DIRECTLY if re.search(pattern, name)), None)
        if any(tower in name for tower in TOWERS):
            continue
        if direct is not None and gguf.MODEL_TENSOR[direct] in gguf.MODEL_TENSORS[arch]:
            continue
        if not any(
            known.get_name(its, try_suffixes=(".weight", ".bias")) for its in (plain_name(name), asked_for(name))
        ):
            found.add(re.sub(r"\.\d+\.", ".N.", name))
    return found, known.get_name("lm_head.weight", try_suffixes=(".weight",))


@pytest.mark.parametrize("name", [name for name in {**zoo.BUILDERS, **zoo.CLASS_C} if name not in UNKNOWN])
def test_the_gguf_library_has_a_name_for_every_tensor(name, edited):
    base, folder = edited(name)
    found, head = unnamed(name, folder)
    assert found == NOT_KNOWN.get(name, set())
    added = names_in(folder) - names_in(base)
    assert names_in(base) <= names_in(folder)
    assert bool(added) == plan(base, allow_partial=name in zoo.CLASS_C).model_map.tied
    assert (head is None) == (name in (*DROPPED, *HEADLESS))


def test_families_that_the_library_does_not_know_are_listed():
    everything = {**zoo.BUILDERS, **zoo.CLASS_C}
    assert {name for name in everything if not architecture(name)} == UNKNOWN.keys()
    known = {name.replace("-", "").replace("_", "") for name in gguf.MODEL_ARCH_NAMES.values()}
    assert not {zoo.model_type(name).replace("_", "") for name in UNKNOWN} & known
    assert all(architecture(name) in gguf.MODEL_ARCH_NAMES.values() for name in everything if name not in UNKNOWN)


@pytest.mark.parametrize(
    ("name", "tied", "says"),
    [
        *((name, "untie", "converter drops the separate head") for name in DROPPED),
        *((name, "untie", "converter stops at one: for GGUF choose --tied shared") for name in HEADLESS),
        *((name, tied, "") for name in ("gemma", "cohere") for tied in ("shared", "keep")),
        *((name, "untie", "") for name in ("gemma3-text", "llama-tied", "lfm2")),
    ],
)
def test_a_head_that_llama_cpp_would_not_take_is_warned_of(name, tied, says, edited):
    made = plan(edited(name)[0], tied=tied)
    assert made.model_map.tied
    assert [says in note for note in made.notes if "llama.cpp" in note] == ([True] if says else [])
    assert (made.added_head is not None) == (tied == "untie")
