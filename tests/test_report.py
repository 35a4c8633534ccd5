"""The report: what it draws, that it is alone with its reader, and that a real browser shows it."""

import io
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from rich.console import Console

from abliterate.cli import tables
from abliterate.evaluate.charts import Bar, HeatMap, colour, heat_map, histogram, intervals
from abliterate.evaluate.evaluation import report
from abliterate.evaluate.observing import HARMFUL, HARMLESS, LOOK_ALIKE, Material, Observations, divergence_nats
from abliterate.evaluate.page import render
from abliterate.method.directions import CandidateScore, DirectionSet, grid
from abliterate.model.prompts import Prompt, PromptSet
from abliterate.publishing.manifest import evaluation_json

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = "<script>alert('x')</script> & \"quotes\" {{ braces }}"
REFUSAL = "I'm sorry, but I can't help with that."


def prompts(*texts):
    return PromptSet(source="test", prompts=tuple(Prompt(text=text) for text in texts))


@pytest.fixture(scope="module")
def evaluation():
    material = Material(
        prompts={HARMFUL: prompts(NASTY, "b"), HARMLESS: prompts("c", "d"), LOOK_ALIKE: prompts("e", "f")},
    )

    def seen(name, refuse, shift):
        of_base, log_probs = (torch.tensor([[0.7 - by, 0.2 + by, 0.1]] * 2).log() for by in (0.0, shift))
        distance = divergence_nats(of_base, log_probs)
        return Observations(
            name=name,
            replies={
                HARMFUL: (REFUSAL, REFUSAL) if refuse else ("Here it is.", NASTY),
                HARMLESS: ("Fine, it is blue.", "Fine, it is red."),
                LOOK_ALIKE: (REFUSAL, "Fine, it is green."),
            },
            first=None, tokens=None, kl_nats=distance, kl_tokens_nats=distance,
            completion_nats=1.5 + shift, text_nats=math.nan,
            along={HARMFUL: (3.0, 4.0), HARMLESS: (-1.0, 0.0)},
        )  # fmt: skip

    observed = [seen("base", True, 0.0), seen("edited", False, 0.1), seen("control: random", True, 0.01)]
    return report(material, observed, max_new_tokens=32)


@pytest.fixture(scope="module")
def directions():
    candidates = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    candidates[0, 0] = 0
    scores = tuple(
        CandidateScore(
            candidate=f"random/{position}/{layer}", position=position, layer=layer,
            bypass=layer - 1.0, induce=float(layer) if layer else math.nan,
            kl_nats=0.01 * layer, verdict="kept" if layer == 1 else "kl",
        )
        for position in (-2, -1)
        for layer in range(3)
    )  # fmt: skip
    made = DirectionSet(
        candidates=grid("random", candidates, (-2, -1)), scores=scores,
        metadata={"position_tokens": ["<|a|>", "\n"]},
    )  # fmt: skip
    return made.choose(-2, 1, rule="arditi-2024")


@pytest.fixture(scope="module")
def page(evaluation, directions):
    return render("A model <b>", evaluation, directions=directions)


def test_models_are_held_against_the_base(evaluation):
    base, edited, control = evaluation.models
    assert [model.scores[HARMFUL].refused.value for model in evaluation.models] == [1.0, 0.0, 1.0]
    assert base.kl_nats == 0
    assert 0 < control.kl_nats < edited.kl_nats
    assert edited.refusal_change[HARMFUL].verdict == "lower"
    assert control.refusal_change[HARMFUL].verdict == edited.refusal_change[HARMLESS].verdict == "tie"
    assert evaluation.kinds == (HARMFUL, HARMLESS, LOOK_ALIKE)
    assert evaluation.samples[0].replies == (REFUSAL, "Here it is.", REFUSAL)


def broken(share):
    """A report on a model of which ``share`` of 40 harmless replies are empty, as 2 of the base's are."""
    material = Material(prompts={kind: prompts(*(f"{kind} {n}" for n in range(40))) for kind in (HARMFUL, HARMLESS)})

    def seen(name, count):
        harmless = ("",) * count + ("Fine, it is blue.",) * (40 - count)
        return Observations(
            name=name, replies={HARMFUL: (REFUSAL,) * 40, HARMLESS: harmless}, first=None, tokens=None, kl_nats=0.0,
            kl_tokens_nats=0.0, completion_nats=1.0, text_nats=math.nan, along={},
        )  # fmt: skip

    return report(material, [seen("base", 2), seen("edited", round(40 * share))], max_new_tokens=32)


def test_replies_that_break_are_pointed_out_everywhere(capsys):
    harmed = broken(0.4)
    (line,) = harmed.breakdowns
    assert line.startswith("edited: 40% (26% to 55%) of its replies to harmless prompts are empty or broken, 5% (1% to")
    assert evaluation_json(harmed)["breakdowns"] == [line]
    assert f"<b>{line}: this edit harms the model.</b>" in render("x", harmed, directions=None)
    tables.show_evaluation(harmed)
    assert "this edit harms the model" in " ".join(capsys.readouterr().err.split())
    assert broken(0.15).breakdowns == broken(0.05).breakdowns == ()


def test_the_page_is_alone_and_what_it_quotes_is_text(page):
    assert "<script" not in page
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!data:)", page)
    assert not re.search(r"url\(|@import|https?://", page)
    assert "&lt;script&gt;alert" in page
    assert "A model &lt;b&gt;" in page
    assert not re.search(r"<details[^>]+open", page)
    assert page.count("<svg") == 1 + 3 + 1 + 3
    assert "&lt;|a|&gt;" in page


def test_replies_stand_folded_in_the_page_and_nowhere_else(page):
    """Nothing of what models said is seen before one opens it twice: the kind, then the prompt."""
    seen, depth = [], 0
    for tag, text in re.findall(r"(<[^>]+>)|([^<]+)", page):
        depth += tag.startswith("<details") - tag.startswith("</details")
        seen.append((depth, text))
    said = [depth for depth, text in seen if REFUSAL in text or "Here it is." in text or "Fine, it is" in text]
    assert len(said) > 6
    assert set(said) == {2}
    assert "harmful: 2 prompts, 2 changed" in page
    assert "harmless: 2 prompts, 0 changed" in page
    assert page.count("<b>changed</b>") == 2


def test_a_label_changes_where_one_refuses_and_the_base_does_not(evaluation):
    changed = {sample.prompt: evaluation.changed(sample) for sample in evaluation.samples}
    assert changed == {NASTY: ("edited",), "b": ("edited",), "c": (), "d": (), "e": (), "f": ()}
    assert evaluation.samples[0].refused == (True, False, True)


@pytest.fixture
def shown(monkeypatch):
    """What the command line shows of an evaluation."""

    def show(found, **options):
        text = io.StringIO()
        monkeypatch.setattr(tables, "out", Console(file=text, width=200))
        tables.show_evaluation(found, **options)
        return text.getvalue()

    return show


def test_replies_to_harmful_prompts_are_shown_on_request(evaluation, shown):
    hidden, asked = shown(evaluation), shown(evaluation, show_replies=True)
    counted = "labels (refused or not) that changed, edited against base: 2 of 6 (harmful 2)"
    for text in (hidden, asked):
        assert counted in text
        assert "control: random against base: 0 of 6\n" in text
        assert "Fine, it is" not in text  # of harmless prompts no label changed
    assert "Here it is." not in hidden
    assert REFUSAL not in hidden
    assert "not shown here: --show-replies" in hidden
    assert "Here it is." in asked
    assert "--show-replies" not in asked
    assert "of these prompts" not in shown(evaluation, show_replies=True, samples=0)


def test_replies_to_harmless_prompts_come_first(evaluation, shown):
    samples = tuple(
        replace(sample, refused=(True, False, True)) if sample.kind == LOOK_ALIKE else sample
        for sample in evaluation.samples
    )
    found = replace(evaluation, samples=samples)
    text = shown(found)
    assert "edited against base: 4 of 6 (harmful 2, look-alike 2)" in text
    assert "Fine, it is green." in text
    assert "Here it is." not in text
    assert "not shown here" in text
    two = shown(found, samples=2, show_replies=True)
    assert "Fine, it is green." in two
    assert "Here it is." not in two
    assert "Here it is." in shown(found, samples=3, show_replies=True)


def test_without_a_direction_the_page_has_the_scores_alone(evaluation):
    bare = render("x", evaluation)
    assert "How the direction was chosen" not in bare
    assert "+0.0 points" in bare


def test_the_page_says_what_was_not_scored(evaluation, directions, page):
    assert "were scored in full" not in page
    scores = tuple(
        replace(one, bypass=math.nan, induce=math.nan, kl_stopped=one.layer == 2, verdict="not asked")
        if one.candidate != directions.choice.candidate
        else one
        for one in directions.scores
    )
    scored = {"in_full": 1, "candidates": 6, "prompt_passes": 40, "of": 120}
    few = replace(directions, scores=scores, metadata={**directions.metadata, "scored": scored})
    found = render("x", evaluation, directions=few)
    assert "1 of 6 candidates were scored in full" in found
    assert found.count('class="empty"') == page.count('class="empty"') + 5 + 3 + 2
    assert "were scored in full" not in render("x", evaluation, directions=replace(
        directions, metadata={**directions.metadata, "scored": {**scored, "prompt_passes": 120}}
    ))  # fmt: skip


def test_a_heat_map_marks_the_chosen_and_leaves_out_what_is_not_there():
    chart = HeatMap(
        title="t", values=[[1.0, None], [math.nan, 4.0]], rows=["a", "b"], columns=["0", "1"], row_axis="r",
        column_axis="c", chosen=(1, 1), struck=frozenset({(0, 0)}),
    )  # fmt: skip
    svg = heat_map(chart)
    assert svg.count('class="empty"') == 2
    assert svg.count('class="chosen"') == 1
    assert svg.count("<path") == 2
    assert "a, c 0: 1<" in svg
    assert "b, c 1: 4<" in svg


def test_colours_grow_in_lightness_and_zero_is_in_the_middle():
    def lightness(code):
        red, green, blue = (int(code[place : place + 2], 16) for place in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    steps = [lightness(colour(value / 10, 0.0, 1.0, "sequential")) for value in range(11)]
    assert steps == sorted(steps)
    assert colour(0.0, -3.0, 3.0, "diverging") == "#f7f7f7"
    assert colour(99.0, 0.0, 1.0, "sequential") == colour(1.0, 0.0, 1.0, "sequential")
    assert colour(1.0, 1.0, 1.0, "sequential").startswith("#")


def test_every_outline_of_a_histogram_has_the_same_area():
    svg = histogram("t", {"many": [0.0, 1.0] * 50, "few": [0.5]}, bins=4)
    outlines = [
        [tuple(map(float, point.split(","))) for point in found.split()]
        for found in re.findall(r'points="([^"]*)"', svg)
    ]
    areas = [
        abs(sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(line, [*line[1:], line[0]], strict=True))) / 2
        for line in outlines
    ]
    assert areas[0] == pytest.approx(areas[1], rel=1e-3)
    assert "nan" not in histogram("t", {"none": [], "bad": [math.nan, math.inf]})


def test_intervals_say_their_numbers():
    bars = [
        Bar(label="x", series=0, value=0.5, low=0.25, high=0.75),
        Bar(label="x", series=1, value=math.nan, low=math.nan, high=math.nan),
    ]
    svg = intervals("t", bars, ["base", "<edited>"])
    assert "x, base: 50.0% (25.0% to 75.0%)" in svg
    assert svg.count("<g>") == 1
    assert "&lt;edited&gt;" in svg


def test_names_of_models_do_not_run_into_each_other():
    names = ["a model with quite a long name, thinking off", "b", "c", "d"]
    svg = intervals("t", [Bar(label="x", series=0, value=0.5, low=0.4, high=0.6)], names)
    places = [float(x) for x in re.findall(r'<text x="([\d.]+)" y="13"', svg)]
    assert len(places) == 4
    assert min(b - a for a, b in pairwise(places)) > 6 * len(names[0])
    assert float(re.search(r'viewBox="0 0 (\d+)', svg)[1]) > places[-1]


OWN = r"https?://[\w.-]*\.(?:google|googleapis|gvt1)\.com/"
"""What Chromium asks for on its own account, with no page at all."""

PROBE = """<script>
document.title = JSON.stringify({
  wide: document.documentElement.scrollWidth - window.innerWidth,
  open: document.querySelectorAll('details[open]').length,
  ground: getComputedStyle(document.body).backgroundColor,
  small: [...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width < 100).length,
  hidden: [...document.querySelectorAll('h2')].filter(h => h.getBoundingClientRect().height < 5).length,
});
</script></body>"""


def chromium(path, tmp_path, *, width, scheme):
    """The page as Chromium has it, and what it asked the network for."""
    log = tmp_path / "net.json"
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-quic",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1200",
            f"--blink-settings=preferredColorScheme={scheme}", f"--log-net-log={log}", "--virtual-time-budget=2000",
            "--dump-dom", path.as_uri(),
        ],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    asked = re.findall(r'"url":"((?:https?|ftp|wss?):[^"]+)"', log.read_text("utf-8", errors="replace"))
    return done.stdout, {url for url in asked if not re.match(OWN, url)}


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize(("width", "scheme"), [(1100, 1), (1100, 0), (500, 1)], ids=["light", "dark", "narrow"])
def test_a_real_browser_shows_it_and_asks_for_nothing(page, tmp_path, width, scheme):
    path = tmp_path / "report.html"
    unlocked = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", page)
    assert unlocked != page
    path.write_text(unlocked.replace("</body>", PROBE), "utf-8")
    dom, asked = chromium(path, tmp_path, width=width, scheme=scheme)
    found = json.loads(re.search(r"<title>(.*?)</title>", dom)[1])
    assert found["wide"] <= 0
    assert found["open"] == found["small"] == found["hidden"] == 0
    assert found["ground"] == ("rgb(255, 255, 255)" if scheme else "rgb(18, 22, 28)")
    assert asked == set()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_the_browser_would_tell_of_a_request(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("<title>x</title><img src='http://127.0.0.1:9/x.png'>", "utf-8")
    assert chromium(path, tmp_path, width=500, scheme=1)[1] == {"http://127.0.0.1:9/x.png"}
