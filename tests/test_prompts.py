"""Prompt files of every kind, the splits, and what is said about unusable ones."""

import csv
import gzip
import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.errors import PromptError
from abliterate.model.prompts import (
    Prompt,
    PromptSet,
    SplitSizes,
    contrast_set,
    load_prompts,
    nearly_same,
    split_three_ways,
)

SIZES = SplitSizes(train=6, val=2, test=3)


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def numbered(folder, name, count):
    return written(folder, f"{name}.txt", "\n".join(f"{name} {n}" for n in range(count)))


def refused(source, says):
    with pytest.raises(PromptError, match=says) as caught:
        load_prompts(source)
    assert caught.value.exit_code == 2
    assert caught.value.hint


# --- files ------------------------------------------------------------------------------------------------------------

GOOD = {
    "lines.txt": "first one\n\n  second one  \r\nthird, one\n",
    "rows.jsonl": '{"prompt": "first one"}\n\n{"instruction": "second one"}\n"third, one"\n',
    "list.json": '["first one", {"goal": "second one"}, {"question": "third, one"}]',
    "table.csv": 'prompt,id\nfirst one,1\nsecond one,2\n"third, one",3\n',
    "UPPER.TXT": "first one\nsecond one\nthird, one",
}


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "with BOM"])
@pytest.mark.parametrize("name", GOOD)
def test_every_kind_of_file_is_read(name, bom, tmp_path):
    assert load_prompts(written(tmp_path, name, bom + GOOD[name].encode())).texts == [
        "first one", "second one", "third, one",
    ]  # fmt: skip


@pytest.mark.parametrize("character", ["\u2028", "\u0085", "\x0b", "\x0c"])
def test_only_a_line_feed_ends_a_line(character, tmp_path):
    text = f"one{character}prompt"
    row = json.dumps({"prompt": text}, ensure_ascii=False)
    assert load_prompts(written(tmp_path, "p.jsonl", f'{row}\n{row[:-2]}!"}}')).texts == [text, text + "!"]
    assert load_prompts(written(tmp_path, "p.txt", f"{text}\nother")).texts == [text, "other"]


def test_known_answers_and_held_out_marks_are_kept(tmp_path):
    rows = '{"prompt": "a", "answer": "Paris", "held_out": true}\n{"prompt": "b"}\n{"prompt": "c", "answer": 42}'
    assert load_prompts(written(tmp_path, "p.jsonl", rows)).prompts == (
        Prompt(text="a", answer="Paris", held_out=True),
        Prompt(text="b"),
        Prompt(text="c", answer="42"),
    )


@pytest.mark.parametrize(
    ("text", "expected"), [("true", True), ("True", True), ("1", True), ("false", False), ("", False)]
)
def test_held_out_marks_in_a_csv_are_read_as_words(text, expected, tmp_path):
    rows = f"prompt,held_out\na,{text}\n"
    assert load_prompts(written(tmp_path, "p.csv", rows)).prompts[0].held_out is expected


def test_duplicates_and_blank_prompts_are_dropped_in_order(tmp_path):
    rows = '["b", "a", "b", "", "  ", "a", "c"]'
    assert load_prompts(written(tmp_path, "p.json", rows)).texts == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.jsonl", "", "holds no prompt"),
        ("p.json", "[]", "holds no prompt"),
        ("p.csv", "prompt\n", "holds no prompt"),
        ("p.csv", "id,words\n1,hello\n", "row 1 has a text in none of the columns"),
        ("p.csv", "id,words\n1,hello\n", "its columns are 'id', 'words'"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 1}', "row 2 has a text in none of the columns"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"', "row 2 is no JSON"),
        ("p.jsonl", '{"messages": [{"role": "system", "content": "a"}]}', "row 1 has a text in none of the columns"),
        ("p.json", '{"a": [1], "b": [2]}', "holds an object with 'a', 'b'"),
        ("p.txt", b"one\ncaf\xe9", "line 2 is not utf-8"),
        ("p.jsonl", b'{"prompt": "caf\xe9"}', "line 1 is not utf-8"),
        ("p.txt.gz", b"one\ntwo", "cannot be read"),
        ("p.txt.gz", gzip.compress(b"one\ntwo", mtime=0)[:-9], "cannot be read"),
        ("p.jsonl", '{"words": "hello"}', "none of the columns"),
        ("p.jsonl", '{"prompt": 3}', "none of the columns"),
        ("p.jsonl", "[1]", "neither text nor an object"),
        ("p.json", '{"prompt": "hello"}', "must hold a JSON list"),
        ("p.jsonl", '{"prompt": ', "cannot be read"),
        ("p.json", "not json", "cannot be read"),
        ("p.txt", b"\xff\xfe", "holds no prompt"),
        ("p.xlsx", "hello", "unknown kind"),
        ("p", "hello", "unknown kind"),
    ],
)
def test_an_unusable_file_is_refused(name, content, says, tmp_path):
    refused(written(tmp_path, name, content), says)


def test_a_csv_field_beyond_the_limit_is_refused(tmp_path):
    refused(written(tmp_path, "p.csv", "prompt\n" + "x" * (csv.field_size_limit() + 1)), "cannot be read")


def test_a_missing_file_is_refused(tmp_path):
    refused(str(tmp_path / "missing.txt"), "no such prompt file")


def test_a_folder_is_refused_with_one_of_its_files(tmp_path):
    written(tmp_path, "p.txt", "hello")
    with pytest.raises(PromptError, match="is a folder") as caught:
        load_prompts(str(tmp_path))
    assert "p.txt" in caught.value.hint


TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "one"},
    {"role": "user", "content": "x"},
]
ASKED = [{"from": "human", "value": "two"}, {"from": "gpt", "value": "x"}]
FORMS = {
    "utf-16.txt": "one\ntwo".encode("utf-16"),
    "utf-16-be.txt": b"\xfe\xff" + "one\ntwo".encode("utf-16-be"),
    "utf-32.txt": "one\ntwo".encode("utf-32"),
    "windows.txt": b"\xef\xbb\xbfone\r\ntwo\r\n",
    "semicolon.csv": b"id;prompt\n1;one\n2;two\n",
    "tab.csv": b"id\tprompt\n1\tone\n2\ttwo\n",
    "tab.tsv": b"id\tprompt\n1\tone\n2\ttwo\n",
    "utf-16.csv": "id,prompt\n1,one\n2,two\n".encode("utf-16"),
    "capital.csv": b"Prompt \none\ntwo\n",
    "prompts.json": b'{"prompts": ["one", "two"], "tags": ["x"]}',
    "data.json": b'{"data": [{"prompt": "one"}, {"Prompt": "two"}]}',
    "only-list.json": b'{"version": 1, "cases": ["one", "two"]}',
    "chat.jsonl": json.dumps({"messages": TURNS}).encode() + b"\n" + json.dumps({"conversations": ASKED}).encode(),
    "packed.txt.gz": gzip.compress(b"one\ntwo"),
    "packed.jsonl.gz": gzip.compress(b'"one"\n{"prompt": "two"}'),
}


@pytest.mark.parametrize("name", FORMS)
def test_what_spreadsheets_and_chat_logs_write_is_read(name, tmp_path):
    assert load_prompts(written(tmp_path, name, FORMS[name])).texts == ["one", "two"]


def test_parquet_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(written(tmp_path, "p.parquet", "PAR1"), "needs pyarrow")


def test_a_hub_set_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("hf:owner/name:goal@test", "need an extra")


# --- splits -----------------------------------------------------------------------------------------------------------


def made(count):
    return PromptSet(source="s", prompts=tuple(Prompt(text=f"p{n}") for n in range(count)))


@settings(max_examples=40, deadline=None)
@given(st.integers(6, 400), st.integers(1, 200), st.integers(1, 200), st.integers(1, 5000), st.integers(0, 99))
def test_splits_are_disjoint_full_and_never_too_large(count, train, val, test, seed):
    parts = split_three_ways(made(count), SplitSizes(train=train, val=val, test=test), seed)
    texts = [text for part in parts.values() for text in part.texts]
    assert len(set(texts)) == len(texts)
    for name, size in {"train": train, "val": val, "test": test}.items():
        assert 1 <= len(parts[name].prompts) <= size


def test_a_large_source_gives_the_sizes_asked_for():
    parts = split_three_ways(made(500), SplitSizes(), 42)
    assert [len(parts[name].prompts) for name in ("train", "val", "test")] == [128, 32, 100]


def test_a_small_source_is_cut_in_proportion():
    parts = split_three_ways(made(26), SplitSizes(), 42)
    assert [len(parts[name].prompts) for name in ("train", "val", "test")] == [13, 3, 10]


def test_splits_depend_on_the_seed_and_on_nothing_else():
    first, again, other = (split_three_ways(made(50), SIZES, seed)["train"].texts for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("count", [1, 5])
def test_too_few_prompts_are_refused(count):
    with pytest.raises(PromptError, match=f"holds {count} prompts"):
        split_three_ways(made(count), SIZES, 0)


@pytest.mark.parametrize(
    ("one", "other", "near"),
    [
        ("Write a short poem about rain", "write a POEM about rain, short!", True),  # order, case, punctuation
        ("Write a short poem about rain", "Write a short poem about the rain", True),  # 6 of 7
        ("Write a short poem about rain", "Write a short poem about snow", False),  # 5 of 7
        ("a b c d", "a b c", False),  # three quarters are not more than three quarters
        ("p1", "p2", False),
        ("同じ", "同じ", True),
        ("!", "!", False),  # no words: nothing to compare
    ],
)
def test_prompts_are_nearly_the_same_when_they_share_most_words(one, other, near):
    assert nearly_same(one, other) is nearly_same(other, one) is near


def test_near_duplicates_do_not_cross_splits_and_are_counted():
    twice = [f"tell me about thing {n} please{mark}" for n in range(20) for mark in ("", "!")]
    prompts = PromptSet(
        source="s", prompts=tuple(Prompt(text=f"{text} {'x' * 3} w{n // 2}") for n, text in enumerate(twice))
    )
    parts = split_three_ways(prompts, SplitSizes(train=10, val=5, test=5), 0)
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not any(nearly_same(a, b) for a in parts[first].texts for b in parts[second].texts)
    assert parts["train"].near_duplicates == 0
    assert parts["val"].near_duplicates + parts["test"].near_duplicates > 0
    assert [len(parts[name].prompts) for name in ("train", "val", "test")] == [10, 5, 5]  # the rest fills the gaps


def test_a_source_of_near_duplicates_alone_is_refused():
    same = PromptSet(source="s", prompts=tuple(Prompt(text="a b c d e f g h" + "!" * n) for n in range(9)))
    with pytest.raises(PromptError, match="no prompt is left for val: 5 nearly repeat others"):
        split_three_ways(same, SplitSizes(train=4, val=2, test=2), 0)


# --- contrast sets ----------------------------------------------------------------------------------------------------


def test_a_contrast_set_has_six_parts_with_hashes(tmp_path):
    made_set = contrast_set(numbered(tmp_path, "bad", 30), numbered(tmp_path, "good", 30), sizes=SIZES)
    hashes = made_set.hashes()
    assert [part["count"] for part in hashes.values()] == [6, 6, 2, 2, 3, 3]
    assert len({part["sha256"] for part in hashes.values()}) == 6
    assert all(text.startswith("bad") for text in made_set.harmful_train.texts)


def test_prompts_in_both_sets_are_refused(tmp_path):
    both = numbered(tmp_path, "same", 11)
    with pytest.raises(PromptError, match="11 prompts are in both sets, for example 'same 0'"):
        contrast_set(both, both, sizes=SIZES)


def test_an_unknown_bundled_set_is_answered_with_the_known_ones(tmp_path):
    with pytest.raises(PromptError, match="no such prompt set") as caught:
        contrast_set("bundled:nothing", numbered(tmp_path, "good", 11), sizes=SIZES)
    assert caught.value.hint == "there are: contrast, over_refusal, tiny-chat"


def test_the_hash_sees_every_text_and_the_order():
    hashes = {made(3).sha256, made(4).sha256, PromptSet(source="s", prompts=made(3).prompts[::-1]).sha256}
    assert len(hashes) == 3
    assert made(3).sha256 == PromptSet(source="elsewhere", prompts=made(3).prompts).sha256
