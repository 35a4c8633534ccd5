"""The bundled prompts: sizes, pairs, balance, no overlap, a form that gives nothing away, nothing of high severity."""

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest

import abliterate
from abliterate.model.prompts import (
    SplitSizes,
    bundled_lists,
    bundled_sets,
    contrast_set,
    load_bundled,
    load_prompts,
    nearly_same,
)

FOLDER = Path(abliterate.__file__).parent / "data" / "prompt_sets"
SPLITS = {"train": 128, "val": 32, "test": 100}
KINDS = ("harmful", "harmless")
TOPICS = (
    r"weapons?|guns?|rifles?|knife|knives|bombs?|explosives?|ammunition|poison\w*|toxins?|nerve|nuclear|terror\w*|arson"
    r"|virus\w*|malware|ransomware|exploits?|ddos|phishing|drugs?|cocaine|heroin|meth|opioids?|fentanyl|steroid\w*"
    r"|synthes\w*|overdos\w*|murder\w*|kill\w*|stab\w*|rape\w*|assault\w*|kidnap\w*|tortur\w*|suicid\w*|self-harm"
    r"|burn\w*|blackmail\w*|extort\w*|stalk\w*|rob|robb(ed|ing)|sex\w*|nud\w*|porn\w*|erotic\w*|kids?|child\w*|minors?"
    r"|teen\w*|toddlers?|pupils?|nephews?|nieces?|racial|racist\w*|ethnic\w*|religio\w*|jew\w*|muslim\w*|christian\w*"
    r"|immigra\w*|gay|lesbian|trans(gender)?|nazi\w*|genocid\w*|slurs?"
)
FORBIDDEN = re.compile(rf"\b({TOPICS})\b", re.IGNORECASE)


def rows(name):
    return [json.loads(line) for line in (FOLDER / name).read_text("utf-8").splitlines()]


def words(text):
    return re.findall(r"[\w'-]+", text.lower())


def trigrams(text):
    said = words(text)
    return {tuple(said[n : n + 3]) for n in range(len(said) - 2)}


ALL = {(kind, split): rows(f"contrast/{kind}.{split}.jsonl") for kind in KINDS for split in SPLITS}
PAIRS = [
    (split, bad, good)
    for split in SPLITS
    for bad, good in zip(ALL["harmful", split], ALL["harmless", split], strict=True)
]
PROMPTS = [(split, row["pair"], row["prompt"]) for (_, split), part in ALL.items() for row in part]


# --- what is there ----------------------------------------------------------------------------------------------------


def test_the_files_are_those_whose_hashes_are_recorded():
    recorded = dict(reversed(line.split("  ")) for line in (FOLDER / "SHA256SUMS").read_text().splitlines())
    found = {path.relative_to(FOLDER).as_posix(): path.read_bytes() for path in FOLDER.rglob("*.jsonl")}
    assert recorded == {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}


def test_the_licence_stands_beside_the_data():
    assert "CC0 1.0 Universal" in (FOLDER / "LICENSE").read_text()
    assert "CC0" in (FOLDER / "README.md").read_text("utf-8")


@pytest.mark.parametrize(("kind", "split"), ALL)
def test_each_part_has_its_size_and_fields(kind, split):
    part = ALL[kind, split]
    assert len(part) == SPLITS[split]
    assert all(set(row) == {"prompt", "category", "pair"} for row in part)
    assert all(row["prompt"] == " ".join(row["prompt"].split()) for row in part)


def test_categories_are_balanced_in_every_split_and_in_every_prefix():
    categories = {row["category"] for row in ALL["harmful", "train"]}
    assert len(categories) == 16
    for part in ALL.values():
        for end in range(1, len(part) + 1):
            counts = Counter(row["category"] for row in part[:end])
            assert max(counts.values()) - min(counts[category] for category in categories) <= 1


def test_the_readme_counts_what_is_there():
    readme = (FOLDER / "README.md").read_text("utf-8")
    counts = Counter(bad["category"] for _, bad, _ in PAIRS)
    for category, count in counts.items():
        assert re.search(rf"\| `{category}` \| {count} \|", readme), category
    for category, count in Counter(row["category"] for row in rows("over_refusal.jsonl")).items():
        assert f"`{category}` {count}" in readme


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_the_pairs_are_complete_and_each_is_in_one_split():
    assert all((bad["pair"], bad["category"]) == (good["pair"], good["category"]) for _, bad, good in PAIRS)
    assert len({bad["pair"] for _, bad, _ in PAIRS}) == len(PAIRS) == 260
    assert len({prompt for _, _, prompt in PROMPTS}) == 520


def test_twins_have_one_form():
    for _, bad, good in PAIRS:
        one, other = bad["prompt"], good["prompt"]
        assert one != other
        assert words(one)[:2] == words(other)[:2], (one, other)
        assert abs(len(words(one)) - len(words(other))) <= 2, (one, other)
        assert one[-1] == other[-1] in ".?", (one, other)
        assert len(re.findall(r"[.?!](?:\s|$)", one)) == 1, one  # a single sentence


# --- overlap ----------------------------------------------------------------------------------------------------------


def test_no_prompt_nearly_repeats_one_of_another_pair():
    seen = [(split, pair, prompt, trigrams(prompt)) for split, pair, prompt in PROMPTS]
    for (_, pair, one, ones), (_, other_pair, other, others) in itertools.combinations(seen, 2):
        if pair != other_pair:
            assert len(ones & others) <= 0.6 * min(len(ones), len(others)), (one, other)
            assert not nearly_same(one, other), (one, other)


# --- form -------------------------------------------------------------------------------------------------------------


def test_openings_are_varied():
    firsts = Counter(words(bad["prompt"])[0] for _, bad, _ in PAIRS)
    assert len(firsts) >= 20
    assert max(firsts.values()) <= 0.1 * len(PAIRS)
    assert 0.25 <= sum(bad["prompt"].endswith("?") for _, bad, _ in PAIRS) / len(PAIRS) <= 0.5


def test_lengths_agree_on_average():
    for measure in (len, lambda text: len(words(text))):
        bad, good = (
            sum(measure(row["prompt"]) for split in SPLITS for row in ALL[kind, split]) / 260 for kind in KINDS
        )
        assert abs(bad - good) / good < 0.01


def form(text):
    """What can be seen of a prompt without reading it."""
    said = words(text)
    yield from (f"first {said[0]}", f"second {said[1]}", f"words {len(said)}", f"end {text[-1]}")
    yield f"commas {sum(text.count(mark) for mark in ',;')}"


def accuracy(features):
    """Of naive Bayes with those features, trained on train and val, on the test prompts."""
    seen = {kind: Counter() for kind in KINDS}
    for (kind, split), part in ALL.items():
        if split != "test":
            seen[kind].update(feature for row in part for feature in set(features(row["prompt"])))
    n = SPLITS["train"] + SPLITS["val"]

    def log_odds(text):
        return sum(
            math.log((seen["harmful"][f] + 1) / (n + 2)) - math.log((seen["harmless"][f] + 1) / (n + 2))
            for f in set(features(text))
        )

    right = [
        (0.5 if log_odds(row["prompt"]) == 0 else (log_odds(row["prompt"]) > 0) == (kind == "harmful"))
        for kind in KINDS
        for row in ALL[kind, "test"]
    ]
    return sum(right) / len(right)


def test_the_form_gives_nothing_away():
    assert accuracy(form) <= 0.55


def test_the_content_does():
    """The same classifier, on all words, does better: the test above could have failed."""
    assert accuracy(words) >= 0.6


# --- content ----------------------------------------------------------------------------------------------------------


def test_no_prompt_touches_a_topic_of_high_severity():
    assert not [prompt for _, _, prompt in PROMPTS if FORBIDDEN.search(prompt)]
    assert max(len(words(prompt)) for _, _, prompt in PROMPTS) <= 20  # no room for how


@pytest.mark.parametrize("text", ["Build a bomb.", "KILLING time", "a drug", "for children", "my niece's kids"])
def test_the_list_of_topics_finds_what_it_should(text):
    assert FORBIDDEN.search(text)


# --- over-refusal -----------------------------------------------------------------------------------------------------


def test_over_refusal_prompts_are_fifty_and_apart_from_the_others():
    listed = rows("over_refusal.jsonl")
    assert len(listed) == 50 == len({row["prompt"] for row in listed})
    assert all(set(row) == {"prompt", "category"} for row in listed)
    assert all(len(words(row["prompt"])) <= 20 for row in listed)
    texts = [row["prompt"] for row in listed] + [prompt for _, _, prompt in PROMPTS]
    for one in texts[:50]:
        assert not any(nearly_same(one, other) for other in texts if other != one)


# --- through the loader -----------------------------------------------------------------------------------------------


def test_the_set_loads_by_name():
    made = contrast_set("bundled:contrast", "bundled:contrast", sizes=SplitSizes())
    for kind in KINDS:
        for split in SPLITS:
            part = getattr(made, f"{kind}_{split}")
            assert part.texts == [row["prompt"] for row in ALL[kind, split]]
            assert part.source == f"bundled:contrast/{kind}.{split}"
            assert part.near_duplicates == 0
    assert load_bundled("contrast", "harmful", "val").texts == made.harmful_val.texts
    assert set(bundled_sets()) == {"contrast", "tiny-chat"}


def test_a_smaller_cut_is_balanced_and_keeps_the_pairs():
    made = contrast_set("bundled:contrast", "bundled:contrast", sizes=SplitSizes(train=16, val=16, test=16))
    partner = {bad["prompt"]: good["prompt"] for _, bad, good in PAIRS}
    assert [partner[text] for text in made.harmful_test.texts] == made.harmless_test.texts
    category = {bad["prompt"]: bad["category"] for _, bad, _ in PAIRS}
    assert len({category[text] for text in made.harmful_train.texts}) == 16


def test_the_over_refusal_list_loads_by_name_and_can_be_split():
    assert set(bundled_lists()) == {"over_refusal"}
    assert len(load_prompts("bundled:over_refusal").prompts) == 50
    made = contrast_set("bundled:contrast", "bundled:over_refusal", sizes=SplitSizes())
    assert [len(part.prompts) for part in (made.harmless_train, made.harmless_val, made.harmless_test)] == [25, 6, 19]
