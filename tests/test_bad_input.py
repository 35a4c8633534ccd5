"""Every method on prompts and files that it can do nothing with: an error that says so, or a result; no traceback."""

import re

import pytest
import torch

from abliterate.checkpoint import direction_file
from abliterate.data.methods import methods
from abliterate.editing.asked import plan_asked
from abliterate.editing.planning import plan
from abliterate.errors import AbliterateError, PlanRefusedError, PromptError, UsageError
from abliterate.exports import control_vector, projection
from abliterate.method.directions import Candidate, DirectionSet, Subspace, given
from abliterate.method.edits import EDITS, stream_edit
from abliterate.method.moments import ActivationStats, Moments
from abliterate.model.prompts import ContrastSet, Prompt, PromptSet
from abliterate.recipe import load_recipe
from abliterate.workflow import pipeline
from abliterate.workflow.session import Session, open_session

# Which prompts count is not asked: here are prompts that cannot be told apart.
QUICK = {"filter_prompts": False, "labels": "first-token", "refusal_tokens": ("I",), "allow_few": True}
AT_THE_END = {"per-layer", "actsvd"}
"""Methods whose only candidates are of late layers."""


@pytest.fixture(scope="module")
def opened():
    return open_session(None, load_recipe("default"))


def texts(session, kind, count):
    found = getattr(session.contrast, f"{kind}_train").texts
    assert len(found) >= count
    return found[:count]


def same_in_each_class(session):
    return 3 * texts(session, "harmful", 1), 3 * texts(session, "harmless", 1)


def both_classes_the_same(session):
    return 2 * (texts(session, "harmless", 3),)


def one_of_each(session):
    return texts(session, "harmful", 1), texts(session, "harmless", 1)


def fewer_than_directions_and_dimensions(session):
    """A map has room for seven directions, and a covariance of two prompts is singular."""
    return texts(session, "harmful", 2), texts(session, "harmless", 2)


def with_prompts(session, found, recipe):
    """``session`` measuring on the prompts of ``found``, harmful and harmless, and scoring on a few others."""
    other = Session(checkpoint=session.checkpoint, recipe=recipe)
    parts = {}
    for kind, its in zip(("harmful", "harmless"), found, strict=True):
        parts[f"{kind}_train"] = PromptSet(source=kind, prompts=tuple(Prompt(text=text) for text in its))
        few = getattr(session.contrast, f"{kind}_val").prompts[:2]
        parts |= {f"{kind}_{split}": PromptSet(source=kind, prompts=few) for split in ("val", "test")}
    other.__dict__.update(loaded=session.loaded, chat=session.chat, contrast=ContrastSet(**parts))
    return other


NO_ROOM = {"steer", "ace"}
"""Methods that the bundled model has no place for, whatever the prompts are."""
NO_SPREAD = {"som": "made no candidate", "leace": "made no candidate"}
NO_DIFFERENCE = {
    name: "no candidate direction|made no candidate|NaN or infinity" for name in methods() if name != "som"
}
"""A map finds how the prompts of a class differ among themselves."""
CANNOT = {
    same_in_each_class: NO_SPREAD,
    both_classes_the_same: NO_DIFFERENCE,
    one_of_each: NO_SPREAD | {"leace": "a covariance takes two"},
    fewer_than_directions_and_dimensions: {},
}
"""Which methods say what about which prompts; all others come to an edit."""


def finds_alike():
    """The methods, those together that find their direction in the same way."""
    found = {}
    for name in methods():
        find = load_recipe(name).find
        found.setdefault((find.estimators, find.trained, find.trials, find.choose_by), []).append(name)
    return {names[0]: names for names in found.values()}


ALIKE = finds_alike()


@pytest.mark.parametrize("bad", CANNOT, ids=lambda its: its.__name__)
@pytest.mark.parametrize("name", ALIKE)
def test_prompts_that_say_nothing(name, bad, opened):
    recipe = load_recipe(name)
    changes = {**QUICK, "trials": min(2, recipe.find.trials), "train_steps": 1, "cone_size": 2}
    recipe = recipe.with_changes(changes | ({} if name in AT_THE_END else {"prune_layers": 0.5}))
    session = with_prompts(opened, bad(opened), recipe)
    try:
        chosen = pipeline.select(session, pipeline.measure(session))
    except AbliterateError as error:
        assert error.hint, error.message
        assert isinstance(error, PromptError), repr(error)
        assert re.search(CANNOT[bad][name], error.message), error.message
        return
    assert name not in CANNOT[bad]
    assert all(its.usable for its in chosen.chosen.subspaces)
    for alike in ALIKE[name]:
        asked = load_recipe(alike)
        try:
            plan_asked(plan(session.checkpoint, **asked.plan_options), asked.edit, chosen)
        except PlanRefusedError as error:
            assert alike in NO_ROOM, error.message
            assert error.hint


# --- files of one method where another is asked for -------------------------------------------------------------------

D, LAYERS = 6, 4


def vectors(k, seed):
    return torch.randn(D, k, generator=torch.Generator().manual_seed(seed))


def of(subspace, position=None, **more):
    provenance = {"estimator": "some"} | ({} if position is None else {"position": position})
    one = Candidate(id="some/1", subspace=subspace, layer=1, provenance=provenance, **more)
    means = {kind: Moments(count=2, mean=torch.ones(1, LAYERS, D)) for kind in ("harmful", "harmless")}
    stats = ActivationStats(positions=(-1,), moments=means)
    return DirectionSet(candidates=(one,), statistics=stats).choose_candidate(one.id)


def layered(**more):
    return {layer: Subspace(vectors=vectors(1, layer), **more) for layer in range(LAYERS)}


FILES = {
    "a vector": lambda: of(Subspace(vectors=vectors(1, 0)), position=-1),
    "a vector from elsewhere": lambda: given(vectors(1, 0)[:, 0]),
    "several directions": lambda: of(Subspace(vectors=vectors(3, 0))),
    "read along others": lambda: of(Subspace(vectors=vectors(2, 0), read=vectors(2, 1)), position=-1),
    "another in each layer": lambda: of(layered(), position=-1),
    "others in the MLPs": lambda: of(
        layered(read=vectors(1, 9), as_it_is=True), of_mlps=layered(read=vectors(1, 8), as_it_is=True)
    ),
    "none at its layer": lambda: of({0: Subspace(vectors=vectors(1, 0))}),
    "taken out across what is read": lambda: of(
        Subspace(vectors=torch.eye(D)[:, :1].clone(), read=torch.eye(D)[:, 1:2].clone())
    ),
}
"""Directions as the methods leave them."""
REFUSED = {
    ("a vector from elsewhere", "affine"), ("several directions", "affine"), ("another in each layer", "affine"),
    ("others in the MLPs", "affine"), ("none at its layer", "affine"), ("none at its layer", "addition"),
    *(("taken out across what is read", change) for change in EDITS if change != "addition"),
}  # fmt: skip


@pytest.mark.parametrize("change", EDITS)
@pytest.mark.parametrize("kind", FILES)
def test_a_direction_of_one_method_and_the_edit_of_another(kind, change, tmp_path):
    directions = direction_file.load(direction_file.save(FILES[kind](), tmp_path / "direction.safetensors"))
    if (kind, change) in REFUSED:
        with pytest.raises(UsageError) as caught:
            stream_edit(change, directions, LAYERS)
        assert caught.value.hint
    else:
        assert all(edit.d_model == D for edit in stream_edit(change, directions, LAYERS).edits())


def written(directions, out):
    return projection.export(directions, out, n_blocks=None if directions.statistics else LAYERS)


CANNOT_PROJECT = {
    "several directions", "read along others", "others in the MLPs", "none at its layer",
    "taken out across what is read",
}  # fmt: skip
CANNOT_ADD = {"a vector", "a vector from elsewhere", "several directions", "read along others", "others in the MLPs",
              "none at its layer", "taken out across what is read"}  # fmt: skip
"""Nothing of these is added at layer 2 or later, or at all."""


@pytest.mark.parametrize(("export", "cannot"), [(control_vector.export, CANNOT_ADD), (written, CANNOT_PROJECT)])
@pytest.mark.parametrize("kind", FILES)
def test_a_file_for_a_runtime_of_it(kind, export, cannot, tmp_path):
    pytest.importorskip("gguf")
    directions, out = FILES[kind](), tmp_path / "out.gguf"
    if kind in cannot:
        with pytest.raises(UsageError) as caught:
            export(directions, out)
        assert caught.value.hint
        assert not list(tmp_path.iterdir())
    else:
        export(directions, out)
        assert out.exists()


def test_a_run_along_what_its_edit_cannot_be_made_of_is_refused_first(tmp_path):
    with pytest.raises(UsageError) as caught:
        pipeline.run(None, tmp_path / "out", load_recipe("ace"), direction=given(torch.randn(128)))
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []
