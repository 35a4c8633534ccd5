"""Hardening: what is drawn and added, hooks while a model is trained, and the command with its bad inputs."""

import json
import random
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from abliterate import api
from abliterate.checkpoint.opening import open_checkpoint
from abliterate.checkpoint.output import prepare
from abliterate.data.tiny_chat import model_path
from abliterate.editing.adding import write_with
from abliterate.errors import NonFiniteError, PromptError, UsageError
from abliterate.method.hardening import Hardening
from abliterate.method.random_ablation import Separating
from abliterate.model import finetuning
from abliterate.model.finetuning import Tuning, adapted, finetune
from abliterate.model.interventions import ablated, observed
from abliterate.model.prompt_rows import Prompt
from abliterate.model.prompts import load_bundled
from abliterate.model.random_ablation import RandomAblation
from abliterate.model.refusal_texts import extended
from abliterate.model.targets import Example
from abliterate.recipe import Recipe
from abliterate.workflow import hardening
from abliterate.workflow.session import open_session
from tests import checkpoints, equivalence, factories
from tests.edge_tools import done, refused

SOURCE = "bundled:tiny-chat"
FEW = Recipe(
    harmful=SOURCE, harmless=SOURCE, n_train=16, n_val=4, n_test=8, estimators=("difference-of-means",),
    max_new_tokens=12,
)  # fmt: skip
SHORT = Hardening(method="random-ablation", steps=3, batch=8, rank=2, every=2, share=1.0, most=1)


# --- what is drawn ----------------------------------------------------------------------------------------------------


def apart(*, hidden=0.0, n=40, d=24):
    """Means and samples of two classes in two layers, the same in the first; ``hidden`` is a spread around the mean."""
    noise = torch.randn(2, n, d, generator=torch.Generator().manual_seed(0)) * 0.01
    samples = torch.ones(2, n, 2, d)
    samples[:, :, 1] += noise
    samples[0, :, 1, 3] += 1.0
    samples[0, :, 1, 5] += hidden * (-1.0) ** torch.arange(n)
    return samples.mean(1)[:, None].unbind(0), samples.unbind(0)


def test_only_what_separates_the_classes_is_drawn():
    means, samples = apart()
    separating = Separating.of(means, samples, 3)
    assert len(separating.differences) == len(separating.last) == len(separating.principal) == 1
    seen = set()
    for seed in range(40):
        found = separating.drawn(3, torch.Generator().manual_seed(seed))
        assert 1 <= found.shape[1] <= 3
        seen.add(found.shape[1])
        assert found[:, 0].abs().argmax() == 3
    assert seen == {1, 2, 3}
    with pytest.raises(ValueError, match="same means everywhere"):
        Separating.of((means[1], means[1]), (samples[1], samples[1]), 3)


def test_what_is_hidden_around_the_mean_is_drawn_too():
    """A difference of means has nothing of it."""
    separating = Separating.of(*apart(hidden=3.0), 2)
    assert separating.differences[0, 5].abs() < 0.02
    assert separating.principal[0][:, 0].abs().argmax() == 5
    firsts = {
        int(separating.drawn(1, torch.Generator().manual_seed(seed))[:, 0].abs().argmax()) for seed in range(20)
    }  # fmt: skip
    assert firsts == {3, 5}


def test_an_extended_refusal_explains_declines_and_gives_a_reason():
    pair = extended(Prompt(text="p", category="pranks"), random.Random(0))
    first, second, third = pair.reply.split(". ", 2)
    assert first.startswith("Pranks are jokes")
    assert any(word in second for word in ("can't", "won't", "not", "decline"))
    assert third
    assert extended(Prompt(text="p"), random.Random(1)) == extended(Prompt(text="p"), random.Random(1))


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harden") / "base"
    return factories.save(factories.build("llama"), folder, dtype=torch.bfloat16, shard="20KB")


def written(base, out, added):
    source = open_checkpoint(base)
    output = prepare(out, source=base, fingerprint="x", needed_bytes=0)
    write_with(source, added, output)
    return output.finish()


def test_what_is_added_is_rounded_once_and_nothing_else_changes(base, tmp_path):
    source = open_checkpoint(base)
    names = [name for name in source.tensors if name.endswith(("o_proj.weight", "up_proj.weight"))]
    added = {name: 0.01 * torch.randn(source.tensors[name].shape) for name in names}
    out = written(base, tmp_path / "out", added)
    assert len(source.shards) > 2
    for shard in source.shards:
        assert checkpoints.header(out / shard.name) == checkpoints.header(base / shard.name)
        before, after = load_file(base / shard.name), load_file(out / shard.name)
        for name, its in before.items():
            expected = (its.float() + added[name]).bfloat16() if name in added else its
            assert torch.equal(after[name], expected)
    shards = {shard.name for shard in source.shards}
    before, after = ({n: h for n, h in checkpoints.tree(its).items() if n not in shards} for its in (base, out))
    assert before == after


def test_a_sum_that_overflows_is_not_written(base, tmp_path):
    name = next(name for name in open_checkpoint(base).tensors if name.endswith("o_proj.weight"))
    added = {name: torch.full(open_checkpoint(base).tensors[name].shape, 3.4e38)}
    written(base, tmp_path / "out", {})
    assert checkpoints.tree(tmp_path / "out") == checkpoints.tree(base)
    with pytest.raises(NonFiniteError, match="would be NaN or infinite"):
        written(base, tmp_path / "other", {name: 2 * added[name]})
    assert not (tmp_path / "other").exists()


# --- training ---------------------------------------------------------------------------------------------------------


class Tokenizer:
    """What a trainer asks of a tokenizer whose work is done."""

    def __init__(self):
        from transformers import AutoTokenizer

        self.made = AutoTokenizer.from_pretrained(model_path())


def model_of(base, rank=4):
    loaded = equivalence.attached(base, factories.load(base, dtype=torch.float32))
    loaded = replace(loaded, tokenizer=Tokenizer().made)
    return adapted(loaded, open_checkpoint(base), rank=rank, seed=0)


def examples(count=8):
    ids = factories.token_ids(batch=count, length=9, seed=3).tolist()
    found = [Example(its[: 7 + n % 3], 2 + n % 3) for n, its in enumerate(ids)]
    return list(zip(found[::2], found[1::2], strict=True))


TUNING = Tuning(steps=12, batch=4, rank=4, rate=1e-2, seed=0)


def test_the_loss_falls_every_step_has_its_context_and_the_seed_decides(base):
    entered, left, steps = [], [], []

    @contextmanager
    def around(step):
        entered.append(step)
        yield
        left.append(step)

    model = model_of(base)
    losses = finetune(model, examples(), TUNING, around=around, advance=steps.append)
    assert entered == left == list(range(12))
    assert steps == [1] * 12
    assert losses[-1] < 0.8 * losses[0]
    found = model.added()
    assert found.keys() <= open_checkpoint(base).tensors.keys()
    assert {name.split(".")[-2] for name in found} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert all(its.abs().max() > 0 for its in found.values())
    again = model_of(base)
    finetune(again, examples(), TUNING, around=lambda _: nullcontext())
    assert all(torch.equal(its, found[name]) for name, its in again.added().items())
    other = model_of(base)
    finetune(other, examples(), replace(TUNING, seed=1), around=lambda _: nullcontext())
    assert not all(torch.equal(its, found[name]) for name, its in other.added().items())


def test_both_halves_of_a_batch_weigh_the_same_however_long_their_replies():
    logits = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.full((2, 6), finetuning.IGNORED)
    labels[0, 1:], labels[1, 5] = torch.tensor([1, 2, 3, 4, 0]), 2
    first, second = (
        torch.nn.functional.cross_entropy(its[:-1], of[1:], ignore_index=finetuning.IGNORED)
        for its, of in zip(logits, labels, strict=True)
    )
    found = finetuning._loss(passes=2)(SimpleNamespace(logits=logits), labels)
    torch.testing.assert_close(found, (first + second) / 4)


def test_what_is_learned_is_what_was_run(base):
    """The base with what is added to its weights has the logits of the model as it was trained."""
    model = model_of(base)
    finetune(model, examples(), TUNING, around=lambda _: nullcontext())
    ids = factories.token_ids()
    with torch.no_grad():
        trained = model.loaded.model(ids).logits
        plain = factories.load(base, dtype=torch.float32)
        before = plain(ids).logits
        for name, its in model.added().items():
            plain.get_parameter(name).add_(its)
        torch.testing.assert_close(plain(ids).logits, trained, atol=1e-4, rtol=1e-4)
    assert (trained - before).abs().max() > 0.01


def test_hooks_take_the_direction_out_of_what_was_learned_too(base):
    """A writer is its matrix and what is trained beside it: a hook at the matrix alone would miss the second."""
    model = model_of(base)
    finetune(model, examples(), TUNING, around=lambda _: nullcontext())
    loaded, r = model.loaded, factories.random_directions(48)
    seen = {}
    with torch.no_grad(), ablated(loaded, r), observed(loaded, seen.__setitem__, leaving_last=True):
        loaded.model(factories.token_ids())
    last = seen[loaded.n_layers].double()
    assert ((last @ r).abs().max() / last.norm(dim=-1).max()) < 1e-5


def test_directions_are_ablated_in_their_share_of_the_steps_and_measured_again():
    session = open_session("tiny-chat", FEW)
    loaded, chat = session.loaded, session.chat
    harmful, harmless = (its.texts[:8] for its in (session.contrast.harmful_train, session.contrast.harmless_train))

    ones = Separating(differences=torch.ones(1, 128), last=torch.ones(1, 128), principal=())

    def tried(share, steps=6):
        ablation = RandomAblation(loaded, chat, harmful, harmless, replace(SHORT, share=share, every=4), batch_size=8)
        measured = []
        ablation._measured = lambda: measured.append(1) or ones
        for step in range(steps):
            seen = {}
            with ablation.around(step), observed(loaded, seen.__setitem__):
                loaded.model(torch.tensor(2 * [chat.encode(harmful[0])]))
            refused, answered = (its[-1].sum().abs() / its[-1].norm() for its in seen[4])
            assert (refused < 1e-5) == (share == 1.0)
            assert answered > 1e-3
        assert not any(its._forward_hooks or its._forward_pre_hooks for its in loaded.model.modules())
        return ablation.steps_ablated, len(measured)

    assert tried(1.0) == (6, 2)
    assert tried(0.0) == (0, 2)
    ablation = RandomAblation(loaded, chat, harmful, harmless, SHORT, batch_size=8)
    found = ablation._measured()
    assert len(found.differences) == 5 * 8 - 5
    assert len(found.principal) == 7
    assert loaded.model.training
    loaded.model.eval()


# --- the command ------------------------------------------------------------------------------------------------------


def hardened(out, options=SHORT, recipe=FEW, **more):
    return api.harden("tiny-chat", out, options, recipe=recipe, **more)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("hardened") / "out"
    return hardened(out, n_prompts=4), out


def test_a_hardened_folder_has_the_layout_of_its_base_and_says_what_was_done(result):
    report, out = result
    assert report.out == out
    assert not list(out.parent.glob("*.partial"))
    shards = [path.name for path in model_path().glob("*.safetensors")]
    assert len(shards) == 2
    changed = 0
    for name in shards:
        assert checkpoints.header(out / name) == checkpoints.header(model_path() / name)
        before, after = load_file(model_path() / name), load_file(out / name)
        changed += sum(not torch.equal(its, after[key]) for key, its in before.items())
    assert changed == len(report.changed) == 8 * 7
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        assert (out / name).read_bytes() == (model_path() / name).read_bytes()
    document = json.loads((out / "abliterate.json").read_text("utf-8"))
    assert document["format"] == "abliterate-hardened-1"
    assert document["hardening"]["examples"] == {"refused": 16, "answered": 16}
    assert document["hardening"]["steps_ablated"] == 3
    assert document["hardening"]["figures"]["base"]["refused"]["count"] == 4
    assert document["recipe"]["find"]["harmful"] == SOURCE
    card = (out / "README.md").read_text("utf-8")
    assert "\nlicense: apache-2.0\n" in card
    assert "# tiny-chat, hardened" in card
    assert "In 3 of the steps one difference of means" in card
    assert "| harmful refused, one direction ablated |" in card
    assert "not impossible" in card
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert not any("adapter" in name or "journal" in name or "steps" in name for name in names)
    assert "abliterate/base-README.md" in names


@pytest.mark.parametrize("command", [("verify",), ("push", "me/hardened")])
def test_what_was_trained_is_not_called_proven(result, command):
    name, *rest = command
    says = "was hardened by training, and there is no equation that its weights could be proven by"
    assert "`abliterate audit` measures what it is worth" in refused(5, says, name, result[1], *rest)


def test_the_same_seed_gives_the_same_bytes(result, tmp_path):
    hardened(tmp_path / "again", n_prompts=0)
    for path in result[1].glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def stopped(*_, **__):
    raise KeyboardInterrupt


def test_stopped_while_it_trains_nothing_looks_finished(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(hardening, "finetune", stopped)
        with pytest.raises(KeyboardInterrupt):
            hardened(tmp_path / "out", n_prompts=0)
    assert not (tmp_path / "out").exists()
    left = {path.name for path in (tmp_path / "out.partial").rglob("*") if path.is_file()}
    assert not any(name.endswith(".safetensors") or name == "config.json" for name in left)


def test_stopped_while_it_writes_the_same_command_goes_on_from_what_was_learned(result, tmp_path, monkeypatch):
    """It may not train again: on other hardware half of the shards would hold something else than the rest."""
    with monkeypatch.context() as patched:
        patched.setattr(hardening, "write_with", stopped)
        with pytest.raises(KeyboardInterrupt):
            hardened(tmp_path / "out", n_prompts=0)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(hardening, "finetune", stopped)
    hardened(tmp_path / "out", n_prompts=0)
    assert not (tmp_path / "out.partial").exists()
    for path in result[1].glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "few.toml"
    path.write_text(FEW.to_toml())
    return path


def replies(path, count, **more):
    rows = [
        {"prompt": its, "reply": "I am sorry."} | more for its in load_bundled("tiny-chat", "harmful", "train").texts
    ]
    path.write_text("".join(json.dumps(its) + "\n" for its in rows[:count]))
    return path


def test_bad_texts_are_refused_before_anything_is_written(tmp_path, recipe):
    def bad(says, file):
        out = tmp_path / "out"
        refused(2, says, "harden", "tiny-chat", "--out", out, "--recipe", recipe, "--refusals", file)
        assert not out.exists()
        assert not out.with_name("out.partial").exists()

    bad("1 pairs of prompt and reply", replies(tmp_path / "one.jsonl", 1))
    bad("row 1 has no prompt and reply", replies(tmp_path / "none.jsonl", 9, reply=""))
    bad("no such prompt file", tmp_path / "missing.jsonl")
    bad("no tokens for some words", replies(tmp_path / "words.jsonl", 9, reply="Xylophones elsewhere."))


def test_general_texts_have_no_words_in_the_bundled_model(tmp_path, recipe):
    says = refused(2, "no tokens for some words", "harden", "tiny-chat", "--out", tmp_path / "out", "--recipe", recipe)
    assert "--refusals FILE" in says


def test_replies_to_prompts_of_the_test_are_left_out(tmp_path):
    rows = [
        *load_bundled("tiny-chat", "harmful", "train").texts[:9],
        load_bundled("tiny-chat", "harmful", "test").texts[0],
    ]
    path = tmp_path / "replies.jsonl"
    path.write_text("".join(json.dumps({"prompt": its, "reply": "I am sorry."}) + "\n" for its in rows))
    said = []
    found = hardened(
        tmp_path / "out", replace(SHORT, method="extended-refusal", steps=1), refusals=path, n_prompts=0,
        on_event=said.append,
    )  # fmt: skip
    assert found.refused == 9
    assert found.steps_ablated == 0
    assert any("left out: 1 of 10 replies" in getattr(its, "text", "") for its in said)


def test_a_model_that_refuses_nothing_has_no_refusals_of_its_own(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text("\n".join(load_bundled("tiny-chat", "harmless", split).texts))
    recipe = FEW.with_changes({"harmful": str(tmp_path / "train.txt"), "harmless": str(tmp_path / "test.txt")})
    with pytest.raises(PromptError, match="0 harmful training prompts with refusals"):
        hardened(tmp_path / "out", recipe=recipe)
    assert not list(tmp_path.glob("out*"))


def test_too_little_memory_is_said_first(tmp_path, recipe, monkeypatch):
    out = ("harden", "tiny-chat", "--out", tmp_path / "out", "--recipe", recipe, "--method", "random-ablation")
    refused(2, "is run out of core", *out, "--memory", "36MiB")
    monkeypatch.setattr(finetuning, "free_bytes", lambda _: 1000)
    refused(2, "GiB beside its weights", *out, "--prompts", 0)
    assert not list(tmp_path.glob("out*"))


def test_memory_that_runs_out_is_said_in_words(base):
    def around(_):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(UsageError, match="ran out of memory"):
        finetune(model_of(base), examples(), TUNING, around=around)


def test_missing_libraries_and_unknown_methods_are_named(tmp_path, recipe, monkeypatch):
    out = ("harden", "tiny-chat", "--out", tmp_path / "out", "--recipe", recipe)
    refused(2, "no way to harden", *out, "--method", "prayer")
    monkeypatch.setattr(finetuning, "find_spec", lambda name: None if name in ("peft", "trl") else object())
    says = refused(2, "training needs peft and trl", *out)
    assert "abliterate[train]" in says


def test_the_command_shows_both_models(tmp_path, recipe):
    shown = done(
        "harden", "tiny-chat", "--out", tmp_path / "out", "--recipe", recipe, "--method", "random-ablation",
        "--steps", 1, "--train-batch", 4, "--prompts", 4,
    )  # fmt: skip
    assert "harmful refused, one direction ablated" in shown.stdout
    assert "learned from 16 refusals and 16 answers" in shown.stdout
    assert Path(tmp_path / "out" / "abliterate.json").is_file()
