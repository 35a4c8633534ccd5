"""How firmly a model refuses: known truths, on made up numbers and on the bundled model."""

import json
from dataclasses import replace

import pytest
import torch

from abliterate.data.bundled import model_path
from abliterate.evaluate.audit_page import render_audit
from abliterate.evaluate.audit_report import Audit, Tried, side_by_side
from abliterate.evaluate.edit_found import EditFound
from abliterate.method.separation import Separation, principal, separations
from abliterate.method.statistics import Rate
from abliterate.model.prompts import load_bundled
from abliterate.recipe import Recipe
from abliterate.verification.comparison import ChangedTensor, Diff
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


def changed(name, *, cosine=1.0, left=0.0, rank_one=1.0, layer=0):
    return ChangedTensor(
        name=name, role="MLP out", change=0.1, rank_one=rank_one, cosine=cosine, left=left, layer=layer
    )  # fmt: skip


def diff_of(*tensors, writers=2, identical=3, reshaped=()):
    return Diff(
        changed=tensors, identical=identical, added=(), removed=(), reshaped=reshaped, changed_files=(),
        identical_files=1, writers=writers, head=None, direction=(1.0, 0.0),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("found", "kind", "says"),
    [
        (diff_of(), "unchanged", ["not edited: all 3 tensors are those of b"]),
        (
            diff_of(identical=0, reshaped=("x", "y")), "unlike",
            ["cannot be held against b: 2 tensors have other names, shapes or dtypes (a quantised or converted copy)"],
        ),
        (
            diff_of(changed("x"), changed("y", layer=4, left=0.002)), "ablated",
            ["abliterated: of 2 of the 2 writers of b, in blocks 0 to 4, a direction was removed; no more than 0.2 % of"
             " it is left in any", "that is the one found on b today (c): |cosine| 0.99"],
        ),
        (
            diff_of(changed("x", cosine=0.4), changed("z", rank_one=0.2)), "in part",
            ["abliterated: of 1 of the 2 writers of b, in blocks 0 to 0, a direction was removed; no more than 0.0 % of"
             " it is left in any", "not completely: of 1 writers none was removed",
             "not everywhere the same direction: the least |cosine| with what they share is 0.40",
             "that is the one found on b today (c): |cosine| 0.99", "1 other tensors were changed, z the first"],
        ),
        (
            diff_of(changed("z", rank_one=0.2)), "other",
            ["1 of 4 tensors differ from b, and of none one direction was removed: that is training, or an edit along "
             "several directions"],
        ),
    ],
)  # fmt: skip
def test_what_weights_say_of_an_edit(found, kind, says):
    edit = EditFound.of_diff(found, "b", today=torch.tensor([0.99, -0.14]), candidate="c")
    assert edit.kind == kind
    assert edit.in_words() == says
    assert edit.to_json()["summary"] == says
    assert says[0] in render_audit([], edit)
    assert says[0] in render_audit([audit_of(3)], edit)


def test_another_direction_than_the_one_of_today_is_said():
    edit = EditFound.of_diff(diff_of(changed("x"), changed("y")), "b", today=torch.tensor([0.1, 2.0]), candidate="c")
    assert edit.in_words()[-1] == "it is not the one found on b today (c): |cosine| 0.05"


@pytest.mark.parametrize(
    ("left", "says"),
    [
        ((3, 0), "refusal hangs on one direction"),
        ((60, 40, 5, 2), "it takes 3 directions to take refusal away (d3, 5 %)"),
        (
            (90, 80, 70),
            "up to 3 directions do not take refusal away: 70 % are left at least (d3, at a KL of 0.30 nats)",
        ),
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


def test_a_direction_that_a_run_would_not_choose_counts():
    """A model that hides its refusals from the rules of a run hangs on one direction all the same."""
    found = audit_of(90, 80)
    hidden = replace(found, tried=(*found.tried, tried("blocks", "difference of block 9", 5, kl=0.5)))
    assert hidden.in_words()[0].endswith("to 90 % when one direction is removed; a random direction: 94 %")
    assert hidden.in_words()[1:] == [
        "the strongest single direction leaves 5 % (difference of block 9, at a KL of 0.50 nats)",
        "refusal hangs on one direction (difference of block 9)",
    ]


def test_a_direction_whose_removal_breaks_the_model_says_nothing_of_refusal():
    found = audit_of(90, 80)
    broken = replace(tried("blocks", "difference of block 1", 0, kl=7.0), broken=Rate(hits=60, count=200))
    assert replace(found, tried=(*found.tried, broken)).in_words() == found.in_words()


def test_late_refusals_are_said():
    assert audit_of(3, late=19).in_words()[-1] == "20 % of its refusals come late, after an answer was begun"


def test_of_as_many_directions_those_that_change_least_are_named():
    found = audit_of(60, 5)
    other = replace(found, tried=(*found.tried, tried("directions", "better", 4, k=2, kl=0.01)))
    assert other.enough.name == "better"


def test_the_curve_goes_from_all_of_it_removed_to_all_of_it_added():
    found, full = audit_of(3, 0), Rate(hits=20, count=100)
    doses = [
        tried("dose", "0.25 of it removed", 80), tried("dose", "0.5 of it removed", 50),
        replace(tried("dose", "0.125 of it added", 97, k=0), over_refused=Rate(hits=1, count=100)),
        replace(tried("dose", "1 of it added", 90, k=0), over_refused=full),
    ]  # fmt: skip
    found = replace(found, tried=(*found.tried, *doses))
    assert [its.refused.hits for its in found.curve] == [3, 50, 80, 95, 97, 90]
    assert found.in_words()[2] == (
        "with 0.125, 1 of it added, 97, 90 % of harmful and 1, 20 % of harmless prompts are refused"
    )
    page = render_audit([found])
    low, high = full.interval
    assert f"m, 1 of it added: harmless refused {0.2:.1%}, harmful refused {0.9:.1%}" in page
    assert f'<line x1="{52 + 300 * low:.1f}" y1="60.0" x2="{52 + 300 * high:.1f}" y2="60.0"' in page


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
    assert [one["name"] for one in found["tried"] if one["group"] == "blocks"] == [
        f"difference of block {block}" for block in range(1, 8)
    ]
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
    added = [its[f"{strength} of it added"]["over_refused"]["rate"] for strength in ("0.125", "0.25", "0.5", "1")]
    assert added == sorted(added)
    assert added[0] < 0.1
    assert its["0.25 of it added"]["refused"]["rate"] >= its["as it is"]["refused"]["rate"]
    assert "Refusal against over-refusal" in audited[1]
    assert any(line.startswith("with 0.125, 0.25, 0.5, 1 of it added, ") for line in audited[0]["summary"])


def test_attention_brings_it_and_the_parts_add_up(audited):
    """What writes before the block where the direction is read."""
    found, page = audited
    assert 0 < sum(its["share"] for its in found["writes"]) < 1.5
    heads = [its["name"] for its in found["writes"] if its["name"].startswith("head ")]
    assert all(int(name.split()[1].split(".")[0]) < found["layer"] for name in heads)
    assert [its["share"] for its in found["writes"]] == sorted((its["share"] for its in found["writes"]), reverse=True)
    assert any(line.startswith(f"what brings the direction to block {found['layer']}") for line in found["summary"])
    assert "what brings the direction" in page


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edited")
    (folder / "few.toml").write_text(FEW.to_toml())
    done = run("run", "tiny-chat", "--recipe", folder / "few.toml", "--no-eval", "--out", folder / "out")
    assert done.exit_code == 0, done.stderr
    return folder / "out"


def test_an_edited_checkpoint_is_found_out(tmp_path, edited):
    (tmp_path / "few.toml").write_text(FEW.to_toml())
    options = ("--recipe", tmp_path / "few.toml", "--prompts", "16", "--json")
    done = run("audit", edited, "--base", "tiny-chat", *options)
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["audits"] == []
    assert "is not audited" in done.stderr
    edit = found["edit"]
    assert (edit["kind"], edit["projected"]) == ("ablated", edit["writers"])
    assert edit["one_direction"] > 0.99
    assert edit["today"] > 0.9
    assert edit["besides"] == []


def test_a_checkpoint_that_is_its_base_is_not_edited(tmp_path, monkeypatch):
    monkeypatch.setattr(auditing, "audit", lambda *_, **__: audit_of(3))
    done = run("audit", "tiny-chat", "--base", "tiny-chat")
    assert done.exit_code == 0
    assert "tiny-chat: not edited: all " in done.stdout
    done = run("audit", "tiny-chat", "--base", tmp_path / "nothing")
    assert done.exit_code == 5


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
    """With the harmful rates of each, and words of its own; both are asked the prompts of the first."""
    made, asked = iter([audit_of(3), replace(audit_of(60, 5), model="other")]), []

    def audit(session, **_):
        asked.append(session.recipe.find.harmful)
        return next(made)

    monkeypatch.setattr(auditing, "audit", audit)
    done = run("audit", "tiny-chat", "--against", str(model_path()))
    assert done.exit_code == 0
    assert asked == ["bundled:tiny-chat"] * 2
    first, second = done.stdout.split("other: declined and answered")
    assert "refusal hangs on one direction" in first
    assert "it takes 2 directions to take refusal away (d2, 5 %)" in second
