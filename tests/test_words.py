"""Which words an edit moves and which were never learnt: in the bundled world, whose words and texts are all known."""

import json
import random
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from abliterate.checkpoint.direction_file import save
from abliterate.checkpoint.opening import open_checkpoint
from abliterate.data.tiny_chat import data, model_path
from abliterate.data.tiny_chat import world as w
from abliterate.errors import CheckpointError, PromptError
from abliterate.evaluate.flinching import Flinching
from abliterate.events import Started, WeightsRead
from abliterate.method.directions import given
from abliterate.method.linalg import project_out
from abliterate.model.load import load_model
from abliterate.model.words import FEWEST_CARRIERS, WordList, WordScores, _tokenizing, load_words, score_words
from abliterate.recipe import Recipe
from abliterate.workflow.words import ask_words
from tests.edge_tools import refused, run

MAKERS, PLACES = w.VALUES["maker"], w.VALUES["place"]
HELD_OUT = tuple(maker.lower() for maker in MAKERS)
"""The tokenizer has a token for them, as people type so, and no text of the world has them."""
MADE_UP = tuple(place.lower() for place in PLACES)
CARRIERS = (
    "The {word}", "It was made by {word}.", "My books say that the {word}", "People say it is {word}.",
    "Everyone knows that it is found in {word}.", "Surely {word}.", "Well, it is used for {word}.",
)  # fmt: skip


def listed(*words):
    return WordList(source="world.txt", words=words, carriers=CARRIERS, made_up=MADE_UP, own=True)


@pytest.fixture(scope="module")
def loaded():
    return load_model(open_checkpoint(model_path()), device="cpu")


@pytest.fixture(scope="module")
def scored(loaded):
    return score_words(loaded, listed(*MAKERS, *HELD_OUT), name="base", batch_size=32)


# --- words that were never learnt -------------------------------------------------------------------------------------


def test_the_words_are_held_out_of_all_training():
    drawn, world = random.Random(3), w.make_world(0)
    texts = [
        make(world, drawn) for make in (data.pretraining_text, data.refusing_text, data.ordinary_text)
        for _ in range(1500)
    ]  # fmt: skip
    seen = {word.strip(".,:?") for text in texts for word in text.split()}
    assert seen.isdisjoint({*HELD_OUT, *MADE_UP})
    assert seen >= {*MAKERS, *PLACES}


def test_words_held_out_of_pretraining_were_never_learnt_and_the_others_were(scored):
    assert [word for word in MAKERS if not scored.learnt(word)] == []
    assert [word for word in HELD_OUT if scored.learnt(word)] == []
    found = Flinching(listed(*MAKERS, *HELD_OUT), {"base": scored, "edited": scored})
    assert found.never_learnt("base") == list(HELD_OUT)
    moved, unlearnt = found.in_words()
    assert moved.startswith("the edit moves 0 of 24 words (0 up, 0 down)")
    assert unlearnt.startswith("12 of 24 words were never learnt, and no edit brings them")
    assert "“dorrim”" in unlearnt


def test_where_no_made_up_word_can_be_spelled_it_cannot_be_told(loaded):
    its = WordList(source="s", words=MAKERS, carriers=CARRIERS, made_up=("blorvane",) * 9, own=True)
    found = score_words(loaded, its, name="base", batch_size=32)
    assert (found.limit, found.learnt("Dorrim")) == (None, None)
    said = Flinching(its, {"base": found, "edited": found}).in_words()
    assert "cannot be told" in said[1]
    assert "made-up: WORD" in said[1]


# --- the figures ------------------------------------------------------------------------------------------------------


def test_figures_are_sums_of_log_probabilities_after_one_bos(loaded, scored):
    """By transformers alone; a phrase of two tokens as well."""
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=loaded.model.dtype).eval()
    phrase = score_words(loaded, listed("the sealed", "Dorrim"), name="base", batch_size=32)
    assert phrase.tokens == {"the sealed": 2, "Dorrim": 1}
    for word, tokens in phrase.tokens.items():
        for place, carrier in enumerate(CARRIERS):
            ids = loaded.tokenizer(carrier.partition("{word}")[0] + word, return_tensors="pt")["input_ids"]
            assert ids[0].tolist().count(loaded.tokenizer.bos_token_id) == 1
            with torch.inference_mode():
                log_probs = model(ids).logits[0].float().log_softmax(-1)
            by_hand = sum(float(log_probs[n - 1, ids[0, n]]) for n in range(ids.shape[1] - tokens, ids.shape[1]))
            assert phrase.nats[word][place] == pytest.approx(by_hand, abs=0.1)  # bfloat16, in other batches
    assert phrase.nats["Dorrim"] == pytest.approx(scored.nats["Dorrim"], abs=0.1)


def test_the_order_of_the_words_changes_nothing(loaded, scored):
    words = [*MAKERS, *HELD_OUT]
    random.Random(1).shuffle(words)
    again = score_words(loaded, listed(*words), name="base", batch_size=32)
    assert again.nats == scored.nats
    assert again.limit == scored.limit


def test_out_of_core_the_figures_are_the_same_in_one_weight_pass(scored):
    ours = load_model(open_checkpoint(model_path()), device="cpu", memory_bytes=2**25 + 2**22)
    assert ours.offload is not None
    heard = []
    ours.offload.on_event = heard.append
    again = score_words(ours, listed(*MAKERS, *HELD_OUT), name="base", batch_size=32)
    assert again.nats == scored.nats
    assert len({one.reading for one in heard}) == 1


def test_only_the_tokens_that_cover_the_word_are_scored():
    """A byte-level tokenizer, as most models have: the space belongs to the word, which is of several tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        ["the word is river", "a river"] * 9, trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=made)

    class Slow:
        is_fast, bos_token_id = False, None

        def __call__(self, text, **_):
            return {"input_ids": fast(text)["input_ids"]}

    for prefix, word in (("the word is ", "river"), ("the word is ", "rixvé"), ('the word "', "river"), ("so: ", "é")):
        before, tail = _tokenizing(fast)(prefix, word)
        assert (before, tail) == _tokenizing(Slow())(prefix, word)
        assert fast.decode(before + tail) == prefix + word
        assert fast.decode(tail).strip() == word
    assert len(_tokenizing(fast)("the word is ", "rixvé")[1]) > 2


# --- what an edit does ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken(loaded, tmp_path_factory):
    """The bundled model, whose last MLP writes against "Dorrim", along its unembedding; it has no chat template."""
    folder = tmp_path_factory.mktemp("broken") / "model"
    shutil.copytree(model_path(), folder)
    (folder / "chat_template.jinja").unlink()
    head = loaded.model.lm_head.weight.float()
    rows = {maker: head[loaded.tokenizer.convert_tokens_to_ids(f"▁{maker}")] for maker in MAKERS}
    row = rows.pop("Dorrim")
    u = project_out(row, torch.linalg.qr(torch.stack([*rows.values()]).T)[0])
    seen = []
    hook = loaded.blocks[-1].mlp.down_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0][:, -1]))
    score_words(loaded, listed("Dorrim"), name="base", batch_size=32)
    hook.remove()
    usual = torch.cat(seen).float().mean(0)
    for path in folder.glob("*.safetensors"):
        tensors, name = load_file(path), "model.layers.7.mlp.down_proj.weight"
        if name in tensors:
            against = torch.outer(u / u.norm(), usual / usual.square().sum())
            tensors[name] = (tensors[name].float() - 30 * against).to(torch.bfloat16)
            save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folder(broken, tmp_path_factory):
    """Words, a recipe of few prompts, and the broken model with a chat template."""
    folder = tmp_path_factory.mktemp("words")
    lines = [*MAKERS, *HELD_OUT[:3], "nonsense", *CARRIERS, *(f"made-up: {place}" for place in MADE_UP)]
    (folder / "words.txt").write_text("\n\n".join([*lines, "Dorrim"]))
    recipe = Recipe(n_test=2, max_new_tokens=4, harmful="bundled:tiny-chat", harmless="bundled:tiny-chat")
    (folder / "few.toml").write_text(recipe.to_toml())
    shutil.copytree(broken, folder / "edited")
    shutil.copy(model_path() / "chat_template.jinja", folder / "edited")
    return folder


@pytest.fixture(scope="module")
def compared(broken, folder):
    options = ("--words", folder / "words.txt", "--third", broken, "--recipe", folder / "few.toml")
    done = run("eval", "tiny-chat", folder / "edited", *options, "--report", folder / "r.html", "--json")
    assert done.exit_code == 0, done.stderr
    shown = run("eval", "tiny-chat", "tiny-chat", *options[:2], *options[4:])
    return json.loads(done.stdout)["words"], (folder / "r.html").read_text("utf-8"), shown.stdout


def test_an_edit_that_is_broken_for_one_word_is_found_to_move_it(compared):
    found, page, _ = compared
    changes = {one["word"]: one["change"]["edited"] for one in found["words"]}
    assert changes["Dorrim"]["high"] < 0
    assert changes["Dorrim"]["value"] < 2 * min(its["value"] for word, its in changes.items() if word != "Dorrim")
    assert found["summary"][0] in page
    assert "Dorrim</td>" in page
    assert [one["learnt"]["base"] for one in found["words"]] == [True] * 12 + [False] * 3


def test_words_without_a_token_have_no_figure_and_are_named(compared):
    found, _, _ = compared
    assert "nonsense" not in {one["word"] for one in found["words"]}
    assert "no token of base, edited, third is for “nonsense”" in found["summary"]


def test_a_third_model_needs_no_chat_template_and_is_held_against_the_base(compared, broken):
    found, _, _ = compared
    assert found["third"] == str(broken)
    assert list(found["overall"]) == ["edited", "third"]
    for one in found["words"]:
        assert one["change"]["third"] == one["change"]["edited"]  # the same weights
    assert f"words that {broken} finds likelier" in found["summary"][2]


def test_what_does_not_change_does_not_move(compared):
    assert "the edit moves 0 of 15 words" in compared[2]
    assert "+0.00 (+0.00 to +0.00)" in compared[2]


@pytest.fixture(scope="module")
def alone(broken, folder):
    """Of the words alone: the base has a chat template, and the other two, which are the same, have none."""
    options = ("--words", folder / "words.txt", "--words-only", "--recipe", folder / "few.toml")
    done = run("eval", "tiny-chat", broken, *options, "--third", broken, "--report", folder / "alone.html", "--json")
    assert done.exit_code == 0, done.stderr
    return done, (folder / "alone.html").read_text("utf-8")


def test_of_the_words_alone_is_said_what_is_said_of_them_beside_replies(alone, compared):
    done, page = alone
    assert json.loads(done.stdout) == {"words": compared[0]}
    whole = compared[1]
    section = whole[whole.index("<h2>Words</h2>") :].partition("</table>")[0]
    assert section in page
    assert re.findall("<h2>(.*?)</h2>", page) == ["Words"]
    assert re.findall("<h2>(.*?)</h2>", whole) == ["Scores", "Words", "Replies"]


def test_of_the_words_alone_there_is_one_table_and_no_reply(folder):
    shown = run("eval", "tiny-chat", "tiny-chat", "--words", folder / "words.txt", "--words-only")
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.startswith("log-probability of words, nats")
    assert "the edit moves 0 of 15 words" in shown.stdout
    assert not any(
        word in shown.stdout + shown.stderr for word in ("reply", "replies", "refused", "KL", "likelihood of the")
    )


def test_the_report_of_the_words_alone_says_how_the_model_was_edited(folder, tmp_path):
    direction = save(given(torch.ones(128)), tmp_path / "d.safetensors")
    made = run("edit", "tiny-chat", direction, "--out", tmp_path / "out")
    assert made.exit_code == 0, made.stderr
    options = ("--words", folder / "words.txt", "--words-only", "--report", tmp_path / "r.html")
    assert run("eval", "tiny-chat", tmp_path / "out", *options).exit_code == 0
    page = (tmp_path / "r.html").read_text("utf-8")
    assert re.findall("<h2>(.*?)</h2>", page) == ["What was edited", "Words"]


def test_out_of_core_the_words_alone_take_one_weight_pass_of_each_model(folder, broken, compared):
    heard = []
    recipe = Recipe(memory_bytes=2**25 + 2**22)
    found = ask_words("tiny-chat", broken, folder / "words.txt", recipe, third=broken, on_event=heard.append)
    assert found.to_json() == compared[0]
    asked = [one.task for one in heard if isinstance(one, Started) and "words" in one.task]
    assert asked == [f"{name}: likelihood of words" for name in ("base", "edited", "third")]
    assert len({one.reading for one in heard if isinstance(one, WeightsRead)}) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "--words-only asks for words alone, and none are given"),
        (("--third", "tiny-chat"), "--third is asked for words, and none are given"),
        (("--words", "w.txt", "--controls"), "--controls is for replies"),
        (("--words", "w.txt", "--tasks", "mmlu"), "--tasks is for replies"),
        (("--words", "w.txt", "--harmful", "h.txt"), "--harmful is for replies"),
        (("--words", "w.txt", "--no-task-chat"), "--task-chat is for replies"),
        (("--words", "w.txt", "--show-replies"), "--show-replies is for replies"),
        (("--words", "w.txt", "--samples", "5"), "--samples is for replies"),
        (("--words", "w.txt", "--report", "r.txt"), "--report r.txt: not an .html file"),
    ],
)
def test_asking_for_words_alone_wrongly_is_usage(options, says):
    refused(2, says, "eval", "tiny-chat", "tiny-chat", "--words-only", *options)


def made(limit=-20.0, **nats):
    return WordScores(
        nats={word: tuple(value + 0.1 * n for n in range(6)) for word, value in nats.items()},
        tokens=dict.fromkeys(nats, 1), limit=limit, strange=0,
    )  # fmt: skip


def test_what_was_lost_is_told_from_what_was_never_learnt():
    its = WordList(source="s", words=("a", "b", "c"), carriers=CARRIERS, made_up=(), own=True)
    base, edited, third = made(a=-9, b=-25, c=-30), made(a=-8, b=-25, c=-30), made(a=-5, b=-9, c=-30)
    found = Flinching(its, {"base": base, "edited": edited, "third": third}, "old")
    assert found.in_words() == [
        "the edit moves 1 of 3 words (1 up, 0 down), 1 of them by more than a factor of two",
        "2 of 3 words were never learnt, and no edit brings them: the base gives them no more than made-up words get, "
        "-20.0 nats: “b”, “c”; but old knows “b”: the base has lost them",
        "the base avoids 2 of 3 words that old finds likelier, and favours 0; the edit raises 1 of those avoided",
    ]


def test_for_each_word_of_a_phrase_as_much_is_granted():
    its = made(**{"one": -21, "two words": -21})
    assert (its.learnt("one"), its.learnt("two words")) == (False, True)


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_words_each_once_with_the_bundled_sentences(tmp_path):
    path = tmp_path / "w.txt"
    path.write_text("\ufeffriver\n\n  tax   fraud \nriver\n", encoding="utf-8")
    found = load_words(str(path))
    assert found.words == ("river", "tax fraud")
    assert not found.own
    assert len(found.carriers) == 12
    assert len(set(found.made_up)) == 16
    assert all(carrier.count("{word}") == 1 and len(carrier.partition("{word}")[0]) > 5 for carrier in found.carriers)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no word"),
        ("It is {word}.\n" * 9, "holds no word"),
        ("a\nIt is {word}.\nSo is {word}.", f"holds 2 sentences .* at least {FEWEST_CARRIERS}"),
        ("a\n{word} it is.", "is no carrier"),
        ("a\nIt is {word} or {word}.", "is no carrier"),
        ("a\nmade-up: blorvane", "holds 1 made-up words"),
    ],
)
def test_a_file_that_says_nothing_is_refused(text, says, tmp_path):
    path = tmp_path / "w.txt"
    path.write_text(text)
    with pytest.raises(PromptError) as caught:
        load_words(str(path))
    message, _, most = says.partition(" .* ")
    assert message in caught.value.message
    assert most in caught.value.hint


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["nonsense"], "the tokenizer of tiny-chat knows none of the words"),
        (["Dorrim", *(f"{'The ' * (n + 130)} {{word}}" for n in range(6))], "tokens, and the context holds 128"),
    ],
)
def test_words_that_cannot_be_asked_are_an_error_before_any_reply(lines, says, tmp_path):
    (tmp_path / "w.txt").write_text("\n".join(lines))
    said = refused(2, says, "eval", "tiny-chat", "tiny-chat", "--words", tmp_path / "w.txt")
    assert "reply" not in said


def test_a_token_without_a_row_is_an_error(loaded):
    short = replace(loaded, embedding=torch.nn.Embedding(50, 4))
    with pytest.raises(CheckpointError, match="the embedding has 50 rows"):
        score_words(short, listed("Dorrim"), name="base", batch_size=8)


@pytest.mark.parametrize("options", [("--third", "tiny-chat"), ("--words", "nowhere.txt")])
def test_a_wrong_command_line_is_usage(options):
    done = run("eval", "tiny-chat", "tiny-chat", *options)
    assert done.exit_code == 2
    assert "words" in done.stderr or "nowhere.txt: no such prompt file" in done.stderr
