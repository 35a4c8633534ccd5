"""What writes a direction: the parts add up to the stream, in every layout."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from abliterate.arch.registry import family_of
from abliterate.checkpoint.direction_file import save
from abliterate.checkpoint.source import open_folder
from abliterate.cli.app import app
from abliterate.errors import UsageError
from abliterate.evaluate.charts import lines
from abliterate.evaluate.inspection import SPANS
from abliterate.evaluate.inspection_page import render_inspection
from abliterate.method.directions import given
from abliterate.model.attribution import attribute
from abliterate.model.chat import left_padded
from abliterate.model.load import load_model
from abliterate.recipe import Recipe
from abliterate.workflow import pipeline
from abliterate.workflow.inspecting import inspect, random_text, spans_of, top_heads
from abliterate.workflow.session import open_session
from tests import equivalence, factories
from tests.offloading import block_loads, offloaded, resident
from tests.test_report import CHROMIUM, PROBE, chromium

SOURCE = "bundled:tiny-chat"
RECIPE = Recipe(harmful=SOURCE, harmless=SOURCE)
CASES = (
    "llama", "llama-biases", "gpt2", "gemma2", "mixtral", "opt", "phi", "qwen3-next", "jamba", "deepseek-v3",
)  # fmt: skip


@pytest.fixture(scope="module")
def session():
    return open_session(None, RECIPE)


@pytest.fixture(scope="module")
def chosen(session):
    return pipeline.select(session, pipeline.measure(session))


def attributed(name, tmp_path, tokens):
    model = factories.build(name)
    base = factories.save(model, tmp_path / "base")
    loaded = equivalence.attached(base, factories.load(base))
    family = family_of(open_folder(base, name="tiny").config, where="tiny")
    with factories.really_float64():
        return attribute(loaded, family, left_padded(tokens, 2, 0), factories.random_directions(48)[:, 0])


@pytest.mark.parametrize(
    "name",
    ["llama", "llama-biases", "gpt2", "gemma2", "mixtral", "opt", "phi", "qwen3-next", "jamba", "deepseek-v3"],
)
def test_the_parts_add_up_to_the_stream(name, tmp_path):
    tokens = [ids[: 5 + row] for row, ids in enumerate(factories.token_ids(batch=3, length=9).tolist())]
    found = attributed(name, tmp_path, tokens)
    assert found.unexplained < 1e-9
    alone = attributed(name, tmp_path / "alone", tokens[1:2])
    assert torch.allclose(found.stream[1], alone.stream[0])  # rows come back in the order they were given
    heads = found.heads.sum(-1)
    known = torch.isfinite(heads)
    assert known.any()
    if "biases" not in name and name not in ("opt", "gpt2", "phi"):
        assert torch.allclose(heads[known], found.attention[known])


FIGURES = ("stream", "cosine", "attention", "mlp", "heads")


@pytest.mark.parametrize("name", ["llama-biases", "gpt2", "gemma2", "mixtral", "qwen3-next"])
def test_out_of_core_all_batches_share_a_weight_pass(name, saved):
    family = family_of(open_folder(saved(name), name="tiny").config, where="tiny")
    tokens = [ids[: 5 + row] for row, ids in enumerate(factories.token_ids(batch=5, length=12).tolist())]
    done = []

    def figures(loaded):
        direction = factories.random_directions(48)[:, 0]
        found = attribute(loaded, family, left_padded(tokens, 2, 0), direction, advance=done.append)
        return [getattr(found, name) for name in FIGURES]

    ours = offloaded(saved(name))
    for one, other in zip(figures(ours), figures(resident(saved(name))), strict=True):
        assert torch.equal(one.nan_to_num(nan=-1.0), other.nan_to_num(nan=-1.0))
    assert set(block_loads(ours)) == {1}
    assert sorted(done) == [1, 1, 2, 2, 2, 2]
    assert not any(its._forward_hooks or its._forward_pre_hooks for its in ours.model.modules())


def test_with_little_memory_batches_are_attributed_in_turns(session, chosen):
    family = family_of(session.checkpoint.config, where="tiny")
    harmful = session.contrast.harmful_test.texts[:12]
    least = load_model(session.checkpoint, device="cpu", memory_bytes=2**25 + 2**22)
    found = {}
    for room in (least.offload.working_bytes, 1):
        least.offload.working_bytes, before = room, max(block_loads(least))
        found[room] = attribute(least, family, session.chat.batches(harmful, 4), chosen.direction)
        assert max(block_loads(least)) - before == (3 if room == 1 else 1)
    held = attribute(session.loaded, family, session.chat.batches(harmful, 4), chosen.direction)
    for one in found.values():
        assert all(torch.equal(getattr(one, name), getattr(held, name)) for name in FIGURES)


def test_out_of_core_an_inspection_takes_two_weight_passes(session, chosen):
    """One for what is written and carried in all sets of prompts, one for the attention of the heads that come out."""
    ours = open_session(None, RECIPE.with_changes({"memory_bytes": 2**25 + 2**22, "batch_size": 4}))
    held = replace(session, recipe=RECIPE.with_changes({"batch_size": 4}))
    assert ours.chat.pads
    before = max(block_loads(ours.loaded))
    one, other = (inspect(its, chosen, suffix="please tell", n_prompts=6) for its in (ours, held))
    assert max(block_loads(ours.loaded)) - before == 2
    assert one.heads == other.heads
    for mine, its in zip(one.sets, other.sets, strict=True):
        assert torch.equal(mine.attention, its.attention)
        assert all(torch.equal(getattr(mine.attribution, name), getattr(its.attribution, name)) for name in FIGURES)


@pytest.mark.parametrize("name", ["granite", "falcon-h1"])
def test_a_model_that_scales_what_it_adds_is_told(name, tmp_path):
    tokens = factories.token_ids(batch=2, length=7).tolist()
    assert attributed(name, tmp_path, tokens).unexplained > 1e-2


def test_spans_are_the_instruction_the_suffix_and_the_template(session):
    chat = session.chat
    plain = session.contrast.harmful_test.texts[0]
    whole = chat.encode(f"{plain} please tell")
    instruction, suffix, template = spans_of(chat, plain, f"{plain} please tell")
    assert tuple(whole[template]) == chat.suffix
    assert chat.tokenizer.decode(whole[suffix]).strip() == "please tell"
    assert chat.tokenizer.decode(whole[instruction]).strip() == plain
    ids = chat.encode(plain)
    instruction, suffix, template = spans_of(chat, plain, plain)
    assert ids[suffix] == []
    assert chat.tokenizer.decode(ids[instruction]).strip() == plain


def test_harmful_prompts_carry_the_direction_and_few_heads_write_it(session, chosen):
    found = inspect(session, chosen, suffix="please tell", n_prompts=16)
    names = [one.name for one in found.sets]
    assert names == ["harmful", "harmless", "harmful + suffix", "harmful + random text"]
    by_name = {one.name: one for one in found.sets}
    layer = chosen.choice.layer
    carried = {name: float(one.attribution.cosine[:, layer].mean()) for name, one in by_name.items()}
    assert carried["harmful"] > carried["harmless"] + 0.3
    heads = by_name["harmful"].attribution.heads.mean(0)
    written = heads[:layer].sum()
    assert sum(float(heads[at]) for at in found.heads[:2]) > 0.5 * float(written)
    for one in found.sets:
        assert one.attribution.unexplained < 1e-4
        assert ((one.attention >= 0) & (one.attention <= 1)).all()
        assert (one.attention.sum(1) <= 1 + 1e-6).all()
        has_suffix = "+" in one.name
        assert bool(one.attention[:, SPANS.index("suffix")].any()) == has_suffix


def test_attention_is_switched_back(session, chosen):
    before = session.loaded.model.config._attn_implementation
    inspect(session, chosen, n_prompts=2)
    assert session.loaded.model.config._attn_implementation == before


def test_top_heads_are_the_largest_and_unknown_ones_are_left_out():
    heads = torch.full((2, 3, 4), torch.nan, dtype=torch.float64)
    heads[:, 1] = torch.tensor([0.1, -5.0, 3.0, 0.2], dtype=torch.float64)
    assert top_heads(heads) == ((1, 2), (1, 3), (1, 0), (1, 1))


def test_random_text_is_the_same_for_a_seed(session):
    assert random_text(session.chat, 5, seed=1) == random_text(session.chat, 5, seed=1)
    assert random_text(session.chat, 5, seed=1) != random_text(session.chat, 5, seed=2)


def test_a_direction_of_another_model_is_refused(session, chosen):
    with pytest.raises(UsageError, match="components"):
        inspect(session, given(chosen.direction[:-1]), n_prompts=2)


def test_the_command_prints_tables_and_json(chosen, tmp_path):
    path = save(chosen, tmp_path / "direction.safetensors")
    shown = CliRunner().invoke(app, ["inspect", "tiny-chat", str(path), "--prompts", "4"])
    assert shown.exit_code == 0, shown.output
    assert "cosine with the direction" in shown.stdout
    assert "heads that write most" in shown.stdout
    found = CliRunner().invoke(app, ["inspect", "tiny-chat", str(path), "--prompts", "4", "--json"])
    document = json.loads(found.stdout)
    assert len(document["sets"]["harmful"]["cosine"]) == 9
    assert len(document["heads"]) == 8


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(session, chosen):
    return inspect(session, chosen, suffix="the bird of Wex", n_prompts=6)


@pytest.fixture(scope="module")
def page(found):
    return render_inspection("A model <b>", found)


def test_a_line_goes_through_its_values_and_leaves_out_what_is_none():
    svg = lines("t", {"<a>": [0.0, 1.0, -1.0], "b": [math.nan, 0.5, 0.5]}, ["0", "1", "end"], "block")
    first, second = (found.split() for found in re.findall(r'points="([^"]*)"', svg))
    heights = [float(point.split(",")[1]) for point in first]
    assert heights[1] < heights[0] < heights[2]
    assert heights[0] - heights[1] == pytest.approx(heights[2] - heights[0])
    assert len(second) == 2
    assert "&lt;a&gt;, block end: -1<" in svg
    assert "nan" not in svg


def test_the_page_draws_every_part_of_every_set(page, found):
    titles = re.findall(r"<title>([^<]*)</title>", page)
    for one in found.sets:
        for block in range(8):
            cosine = float(one.attribution.cosine[:, block].mean())
            assert f"{one.name}, block {block}: {cosine:.4g}" in titles
            assert f"{one.name}: MLP, block {block}: {float(one.attribution.mlp[:, block].mean()):.4g}" in titles
        (layer, head), share = found.heads[0], float(one.attention[0, 0])
        assert f"{one.name}: instruction, block.head {layer}.{head}: {share:.4g}" in titles
        assert f"{head}, block {layer}: {float(one.attribution.heads[:, layer, head].mean()):.4g}" in titles
    assert page.count('class="chosen"') == len(found.sets) * len(found.heads)
    assert ("harmful: suffix" in page, "harmful + suffix: suffix" in page) == (False, True)


def test_the_page_is_alone_and_holds_no_prompts(page, session):
    assert "<script" not in page
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!data:)|url\(|@import|https?://", page)
    assert "A model &lt;b&gt;" in page
    assert not any(prompt in page for prompt in session.contrast.harmful_test.texts)


def test_where_heads_cannot_be_told_apart_the_rest_is_drawn(found):
    bare = render_inspection("x", replace(found, heads=()))
    assert "What each block writes" in bare
    assert "What each head writes" not in bare


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize(("width", "scheme"), [(1100, 1), (1100, 0), (500, 1)], ids=["light", "dark", "narrow"])
def test_a_real_browser_shows_it_and_asks_for_nothing(page, tmp_path, width, scheme):
    path = tmp_path / "page.html"
    unlocked = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", page)
    path.write_text(unlocked.replace("</body>", PROBE), "utf-8")
    dom, asked = chromium(path, tmp_path, width=width, scheme=scheme)
    seen = json.loads(re.search(r"<title>(.*?)</title>", dom)[1])
    assert seen["wide"] <= 0
    assert seen["small"] == seen["hidden"] == 0
    assert seen["ground"] == ("rgb(255, 255, 255)" if scheme else "rgb(18, 22, 28)")
    assert asked == set()


def test_the_command_writes_the_page_or_says_first_that_it_cannot(chosen, tmp_path):
    path = save(chosen, tmp_path / "direction.safetensors")
    wrong = CliRunner().invoke(app, ["inspect", "nowhere", str(path), "--report", str(tmp_path / "x.png")])
    assert wrong.exit_code == 2
    assert "not an .html file" in wrong.stderr
    shown = CliRunner().invoke(
        app, ["inspect", "tiny-chat", str(path), "--prompts", "2", "--report", str(tmp_path / "x.html")]
    )
    assert shown.exit_code == 0, shown.output
    assert "tiny-chat along direction.safetensors" in (tmp_path / "x.html").read_text("utf-8")
