"""How firmly a model refuses: known truths, on made up numbers and on the bundled model."""

import json
from dataclasses import replace

import pytest
import torch

from abliterate.data.tiny_chat import model_path
from abliterate.evaluate.audit_page import render_audit
from abliterate.evaluate.audit_report import Audit, Tried, side_by_side
from abliterate.method.separation import Separation, principal, separations
from abliterate.method.statistics import Rate
from abliterate.model.prompts import load_bundled
from abliterate.recipe import Recipe
from abliterate.workflow import auditing
from tests.edge_tools import run

FEW = Recipe(n_train=40, n_val=8, estimators=("difference-of-means",), max_new_tokens=12)


# --- the maths --------------------------------------------------------------------------------------------------------


def classes(*, apart, n=40, d=24, seed=0):
    """Two classes ``[n, layers, d]`` in two layers: ``apart`` in the second alone, along one axis."""
    drawn = torch.randn(2, n, 2, d, generator=torch.Generator().manual_seed(seed))
    drawn[0, :, 1, 3] += apart
    return drawn


def test_classes_are_apart_where_they_are_and_nowhere_else():
    first, second = separations(*classes(apart=6.0), seed=0)
    assert (first.layer, second.layer) == (0, 1)
    assert second.auc > 0.99
    assert second.stability > 0.9
    assert 3.0 < second.cohen_d < 8.0
    assert abs(first.auc - 0.5) < 0.2
    assert abs(first.cohen_d) < 1.0
    assert abs(first.stability) < 0.5


def test_a_direction_is_not_held_against_the_prompts_it_was_made_of():
    """With as many dimensions as prompts, noise would be told apart from noise."""
    noise = torch.randn(2, 40, 1, 2000, generator=torch.Generator().manual_seed(1))
    difference = noise[0].mean(0) - noise[1].mean(0)
    assert ((noise[0] @ difference[0]).min() > (noise[1] @ difference[0]).max()).all()
    (found,) = separations(*noise, seed=0)
    assert abs(found.auc - 0.5) < 0.25


def test_one_state_has_no_spread():
    (found,) = separations(torch.ones(6, 1, 4), torch.ones(6, 1, 4), seed=0)
    assert found.auc == 0.5
    assert found.cohen_d != found.cohen_d


def test_few_prompts_cannot_be_halved():
    with pytest.raises(ValueError, match="fewer than four"):
        separations(torch.ones(3, 1, 4), torch.ones(6, 1, 4), seed=0)


def test_the_first_principal_direction_is_the_difference_of_means_of_narrow_classes():
    harmful, harmless = classes(apart=50.0)[:, :, 1]
    found = principal(harmful, harmless.mean(0), 8)
    assert found.shape == (24, 8)
    difference = harmful.double().mean(0) - harmless.double().mean(0)
    assert abs(torch.cosine_similarity(found[:, 0], difference, dim=0)) > 0.99
    gram = found.T @ found
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(8, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(gram[0, 0].sqrt(), torch.linalg.vector_norm(difference))


def test_no_more_principal_directions_than_there_are():
    harmful = torch.zeros(5, 6)
    harmful[:, 0] = torch.arange(1.0, 6.0)
    assert principal(harmful, torch.zeros(6), 4).shape == (6, 1)


# --- the words --------------------------------------------------------------------------------------------------------


def tried(group, name, refused, k=1, kl=0.0, late=0):
    rate = Rate(hits=refused, count=100)
    return Tried(
        group=group, name=name, k=k, refused=rate, over_refused=Rate(hits=0, count=100),
        late=Rate(hits=late, count=refused), broken=Rate(hits=0, count=200), kl_nats=kl,
    )  # fmt: skip


def audit_of(*left, late=0):
    """A model that refuses 95 of 100, and with 1, 2, ... directions removed what is ``left``."""
    return Audit(
        model="m", candidate="c", layer=3, separations=(Separation(layer=0, auc=0.5, cohen_d=1.0, stability=0.9),),
        tried=(
            tried("as it is", "as it is", 95, k=0, late=late), tried("control", "control: random", 94),
            *(tried("directions", f"d{k}", hits, k=k, kl=k / 10) for k, hits in enumerate(left, 1)),
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("left", "says"),
    [
        ((3, 0), "refusal hangs on one direction"),
        ((60, 40, 5, 2), "it takes 3 directions to take refusal away (d3, 5 %)"),
        ((90, 80, 70), "up to 3 directions do not take refusal away: 70 % are left at least"),
    ],
)
def test_what_is_said_is_what_was_found(left, says):
    words = audit_of(*left).in_words()
    assert words[0] == (
        f"refusal of harmful prompts falls from 95 % to {left[0]} % when one direction is removed; a random direction: "
        "94 %"
    )
    assert words[1] == says
    assert len(words) == 2


def test_late_refusals_are_said():
    assert audit_of(3, late=19).in_words()[-1] == "20 % of its refusals come late, after an answer was begun"


def test_of_as_many_directions_those_that_change_least_are_named():
    found = audit_of(60, 5)
    other = replace(found, tried=(*found.tried, tried("directions", "better", 4, k=2, kl=0.01)))
    assert other.enough.name == "better"


def test_models_stand_side_by_side_by_what_was_tried():
    one, other = audit_of(3), audit_of(60, 5)
    rows = dict(side_by_side([one, other]))
    assert [its.refused.hits for its in rows["d1"]] == [3, 60]
    assert rows["d2"][0] is None
    page = render_audit([one, replace(other, model="<b>n</b>")])
    assert "&lt;b&gt;n&lt;/b&gt;" in page
    assert "<b>n</b>" not in page


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    page = tmp_path_factory.mktemp("audit") / "audit.html"
    recipe = page.with_name("few.toml")
    recipe.write_text(FEW.to_toml())
    done = run("audit", "tiny-chat", "--prompts", "16", "--recipe", recipe, "--json", "--report", page)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)["audits"][0], page.read_text("utf-8")


def test_the_bundled_models_refusal_hangs_on_one_direction(audited):
    found, page = audited
    assert "refusal hangs on one direction" in found["summary"]
    assert "refusal hangs on one direction" in page
    its = {one["name"]: one for one in found["tried"]}
    assert its["as it is"]["refused"]["rate"] > 0.8
    assert its["control: random"]["refused"]["rate"] > 0.8
    assert its[f"chosen: {found['candidate']}"]["refused"]["rate"] < 0.1
    assert its["principal 1"]["refused"]["rate"] < 0.1
    assert {one["k"] for one in found["tried"] if one["group"] == "directions"} == set(range(1, 9))
    assert its["as it is"]["kl_nats"] == 0.0
    assert its["control: random"]["kl_nats"] < 0.05


def test_it_sits_in_the_middle_and_in_attention(audited):
    """As the tuning put it: the first three blocks learned to refuse, attention carries it to the last token."""
    its = {one["name"]: one["refused"]["rate"] for one in audited[0]["tried"]}
    assert its["in the second third of the blocks"] < 0.3 < its["in the last third of the blocks"]
    assert its["in attention alone"] < 0.3 < its["in MLP alone"]
    apart = {one["layer"]: one["auc"] for one in audited[0]["separations"]}
    assert apart[0] == 0.5
    assert apart[4] > 0.95


def test_the_dose_decides(audited):
    its = {one["name"]: one for one in audited[0]["tried"]}
    doses = [its[f"{dose} of it removed"]["refused"]["rate"] for dose in ("0.25", "0.5", "0.75")]
    assert doses == sorted(doses, reverse=True)
    assert its["1 of it added"]["over_refused"]["rate"] > its["as it is"]["over_refused"]["rate"] + 0.3


def test_a_model_that_declines_nothing_has_no_refusal_to_audit(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text("\n".join(load_bundled("tiny-chat", "harmless", split).texts))
    (tmp_path / "few.toml").write_text(FEW.to_toml())
    sources = ("--harmful", tmp_path / "test.txt", "--harmless", tmp_path / "train.txt")
    done = run("audit", "tiny-chat", *sources, "--recipe", tmp_path / "few.toml", "--prompts", "16")
    assert done.exit_code == 2
    assert "refuses none of the" in done.stderr or "there is no refusal to audit" in done.stderr
    assert "use prompts that this model declines" in done.stderr


def test_models_are_shown_one_after_the_other(monkeypatch):
    """With the harmful rates of each, and words of its own."""
    made = iter([audit_of(3), replace(audit_of(60, 5), model="other")])
    asked = []
    monkeypatch.setattr(auditing, "audit", lambda its, **_: asked.append(its.recipe.find.harmful) or next(made))
    done = run("audit", "tiny-chat", "--against", model_path())  # of a folder the default prompts are others
    assert done.exit_code == 0
    assert asked == 2 * ["bundled:tiny-chat"]
    first, second = done.stdout.split("other: declined and answered")
    assert "refusal hangs on one direction" in first
    assert "it takes 2 directions to take refusal away (d2, 5 %)" in second
