"""Edit a tiny model on disk, load it again, and compare it with its base under hooks, in float64."""

import torch

from abliterate.arch.edit_plan import EditPlan
from abliterate.arch.registry import family_of
from abliterate.checkpoint.output import prepare
from abliterate.checkpoint.source import open_folder
from abliterate.editing.planning import plan
from abliterate.editing.writing import edit_checkpoint
from abliterate.method.linalg import orthonormal_basis
from abliterate.model.interventions import ablated, observed
from abliterate.model.load import attach
from tests import factories
from tests.checkpoints import without


def edit(edit_plan: EditPlan, directions, out, *, memory_bytes=1):
    if not edit_plan.edits:
        edit_plan = without(edit_plan, directions)
    output = prepare(out, source=edit_plan.checkpoint.folder, fingerprint="test", needed_bytes=0)
    edit_checkpoint(edit_plan, output, memory_bytes=memory_bytes)  # by default the smallest blocks there are
    return output.finish()


def attached(folder, model):
    checkpoint = open_folder(folder, name="tiny")
    return attach(model, None, family_of(checkpoint.config, where="tiny"), name="tiny")


def logits_and_share(folder, model, directions, *, hooks, tokens=None):
    """Logits, and the largest share of the directions at the input of any block and in the final state."""
    loaded = attached(folder, model)
    tokens = factories.token_ids(batch=4, length=16) if tokens is None else tokens
    basis = orthonormal_basis(directions)
    shares = []

    def see(_, x):
        shares.append(float(((x @ basis).norm(dim=-1) / x.norm(dim=-1)).max()))

    with factories.really_float64(), torch.no_grad(), observed(loaded, see, leaving_last=True):
        if hooks:
            with ablated(loaded, directions):
                return model(tokens).logits, max(shares)
        return model(tokens).logits, max(shares)


def run_case(name, tmp_path, directions, *, change_plan=lambda p: p, tied="untie", tie=False):
    """Edit a saved model and return (edited logits, hooked logits, share left in the stream)."""
    base = factories.save(factories.build(name, tied=tie), tmp_path / "base")
    edit_plan = change_plan(plan(base, tied=tied))
    edited = edit(edit_plan, directions, tmp_path / "edited")
    hooked, _ = logits_and_share(base, factories.load(base), directions, hooks=True)
    ours, share = logits_and_share(edited, factories.load(edited), directions, hooks=False)
    return ours, hooked, share


def kl(hooked, ours):
    return float(
        torch.nn.functional.kl_div(ours.log_softmax(-1), hooked.log_softmax(-1), log_target=True, reduction="none")
        .sum(-1)
        .mean()
    )
