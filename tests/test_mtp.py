"""Next-token blocks: edited with the model or left alone on request, never lost."""

import pytest
import torch

from abliterate.checkpoint.output import prepare
from abliterate.checkpoint.source import open_folder
from abliterate.editing.planning import plan
from abliterate.editing.writing import edit_checkpoint
from abliterate.errors import UnknownTensorError
from abliterate.verification.checkpoint_proof import verify_bytes
from tests import factories
from tests.checkpoints import without, write

D = 48
BLOCK = {
    "eh_proj.weight": (D, 2 * D), "enorm.weight": (D,), "hnorm.weight": (D,), "embed_tokens.weight": (96, D),
    "shared_head.norm.weight": (D,), "shared_head.head.weight": (96, D), "input_layernorm.weight": (D,),
    "post_attention_layernorm.weight": (D,), "self_attn.o_proj.weight": (D, 64), "self_attn.q_proj.weight": (64, D),
    "mlp.down_proj.weight": (D, 80), "mlp.gate.weight": (4, D),
    **{f"mlp.experts.{n}.down_proj.weight": (D, 24) for n in range(4)},
}  # fmt: skip
WRITERS = {"eh_proj.weight", "embed_tokens.weight", "self_attn.o_proj.weight", "mlp.down_proj.weight"} | {
    f"mlp.experts.{n}.down_proj.weight" for n in range(4)
}


@pytest.fixture
def base(tmp_path):
    """A tiny GLM-4.5 with the next-token block of the released files behind its last block."""
    saved = open_folder(factories.save(factories.build("glm4-moe"), tmp_path / "saved"), name="saved")
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in saved.tensors.items()}
    shapes |= {f"model.layers.3.{name}": shape for name, shape in BLOCK.items()}
    tensors = {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()}
    return write(tmp_path / "base", {**saved.config, "num_nextn_predict_layers": 1}, tensors, shards=2)


@pytest.mark.parametrize("mtp", [True, False])
def test_a_next_token_block_is_edited_unless_told_not_to(base, tmp_path, mtp):
    made = plan(base, mtp=mtp)
    drafting = {writer.tensor.name.removeprefix("model.layers.3.") for writer in made.writers if writer.drafts}
    assert drafting == (WRITERS if mtp else set())
    assert made.exactness == "A"
    assert any("next-token" in note for note in made.notes) != mtp
    output = prepare(tmp_path / "out", source=base, fingerprint="test", needed_bytes=0)
    edit_checkpoint(without(made, factories.random_directions(D)), output)
    report = verify_bytes(without(made, factories.random_directions(D)), output.finish())
    assert report.ok, report.failures
    assert len(report.edited) == len(made.writers)


def test_a_block_beyond_those_announced_is_refused(base):
    config = base / "config.json"
    config.write_text(config.read_text().replace('"num_nextn_predict_layers": 1', '"num_nextn_predict_layers": 0'))
    with pytest.raises(UnknownTensorError, match=r"model\.layers\.3"):
        plan(base)
