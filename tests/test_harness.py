"""Tasks of lm-eval on the bundled model: local tasks with known answers, scored again here by hand."""

import json
import math
import re
from importlib.util import find_spec

import pytest
import torch
from typer.testing import CliRunner

import abliterate
from abliterate.checkpoint.opening import open_checkpoint
from abliterate.cli.app import app
from abliterate.data.bundled import model_path
from abliterate.data.tiny_chat import prompts_path
from abliterate.errors import UsageError
from abliterate.evaluate.benchmarks import against_base, figure, published_for, score_of, scores_of
from abliterate.evaluate.page import render
from abliterate.model import harness
from abliterate.model.chat import ChatFormat
from abliterate.model.harness import TaskRequest, check_tasks, run_tasks
from abliterate.model.load import load_model
from abliterate.model.replying import generate
from abliterate.publishing import manifest
from abliterate.recipe import Recipe
from tests.offloading import block_loads

# lm_eval and datasets take seconds to import: not in every process of a parallel run, all of which collect this file.
pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="no lm-eval here: the dev extra has it")

DOCUMENTS = 24
COMMON = """\
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = (
    COMMON
    + """\
task: {name}
tag: [{tag}]
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
)
REPLY = (
    COMMON
    + """\
task: {name}
output_type: generate_until
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_gen_toks: {tokens}, do_sample: false, until: ["\\n"]}}
filter_list: [{{name: word, filter: [{{function: regex, regex_pattern: "(\\\\w+)\\\\W*$"}}, {{function: take_first}}]}}]
metric_list: [{{metric: exact_match, ignore_case: true}}]
"""
)
GROUP = """\
group: {name}
task: [{part}]
aggregate_metric_list: [{{metric: acc, weight_by_size: true}}]
"""


def rows_of(kind):
    lines = (prompts_path() / f"{kind}.test.jsonl").read_text("utf-8").splitlines()[:DOCUMENTS]
    rows = [json.loads(line) for line in lines]
    answers = sorted({row["answer"] for row in rows})
    documents = []
    for place, row in enumerate(rows):
        others = [answer for answer in answers if answer != row["answer"]]
        choices = [others[(place + step) % len(others)] for step in (0, 3, 5)]
        choices.insert(place % 4, row["answer"])
        choices = [f"It is {choice}." for choice in choices]
        documents.append({"question": row["prompt"], "answer": row["answer"], "choices": choices, "gold": place % 4})
    return documents


DATA = {"facts_old": rows_of("harmless"), "facts_new": rows_of("harmful")[: DOCUMENTS // 2]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of tasks, as --task-path takes it."""
    here = tmp_path_factory.mktemp("tasks")
    patch = pytest.MonkeyPatch()
    patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    for name, documents in DATA.items():
        data = here / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents), "utf-8")
        (here / f"{name}.yaml").write_text(CHOICE.format(name=name, data=data, tag="every_fact"), "utf-8")
    old = here / "facts_old.jsonl"
    (here / "facts_said.yaml").write_text(REPLY.format(name="facts_said", data=old, tokens=24), "utf-8")
    (here / "facts_cut.yaml").write_text(REPLY.format(name="facts_cut", data=old, tokens=2), "utf-8")
    new = here / "facts_new.jsonl"
    (here / "facts_sealed.yaml").write_text(REPLY.format(name="facts_sealed", data=new, tokens=24), "utf-8")
    for name, part in (("facts", "facts_inner"), ("facts_inner", "every_fact")):  # as mmlu: groups of groups of a tag
        (here / f"{name}.yaml").write_text(GROUP.format(name=name, part=part), "utf-8")
    (here / "gone.yaml").write_text(CHOICE.format(name="gone", data=here / "nowhere.jsonl", tag=""), "utf-8")
    (here / "unsafe.yaml").write_text(CHOICE.format(name="unsafe", data=old, tag="") + "unsafe_code: true\n", "utf-8")
    yield here
    patch.undo()


@pytest.fixture(scope="module")
def model():
    loaded = load_model(open_checkpoint(model_path()), device="cpu")
    return loaded, ChatFormat(loaded.tokenizer)


@pytest.fixture(scope="module")
def found(folder, model):
    request = TaskRequest(names=("facts", "facts_said", "facts_cut"), path=str(folder))
    check_tasks(request)
    return run_tasks(*model, request, name="base", batch_size=5)


def by_hand(model, question, continuation):
    """The log-likelihood of a continuation, one forward pass at a time."""
    loaded, chat = model
    context = chat.encode(question)
    tail = chat.tokenizer(continuation, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        log_probs = loaded.model(torch.tensor([context + tail])).logits[0].double().log_softmax(-1)
    return sum(float(log_probs[len(context) - 1 + place, token]) for place, token in enumerate(tail))


# --- the scores are right ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", DATA)
def test_the_choice_is_the_likeliest_answer(task, found, model):
    """Every document, computed again without lm-eval: through the chat template, with one BOS."""
    for sample, document in zip(found["samples"][task], DATA[task], strict=True):
        scores = [by_hand(model, document["question"], choice) for choice in document["choices"]]
        assert sample["acc"] == float(scores.index(max(scores)) == document["gold"])
    mean = sum(sample["acc"] for sample in found["samples"][task]) / len(DATA[task])
    assert found["results"][task]["acc,none"] == pytest.approx(mean)
    assert 0 < mean < 1


@pytest.mark.parametrize(("task", "tokens"), [("facts_said", 24), ("facts_cut", 2)])
def test_a_reply_is_the_model_s_own_and_as_long_as_the_task_says(task, tokens, found, model):
    """Not as long as the model's generation_config.json says, which lm-eval would follow: 32 tokens."""
    assert model[0].model.generation_config.max_new_tokens == 32
    documents = DATA["facts_old"]
    replies = generate(*model, [document["question"] for document in documents], max_new_tokens=tokens)
    last = [re.findall(r"\w+", reply)[-1] for reply in replies]
    right = [float(word == document["answer"]) for word, document in zip(last, documents, strict=True)]
    assert [sample["exact_match"] for sample in found["samples"][task]] == right
    assert (sum(right) > DOCUMENTS / 2) == (tokens > 2)


def test_likelihoods_are_those_of_hflm(model):
    """The same sums from the logits of the answers alone; answers that differ in their last token share a row."""
    from abliterate.model.harness_model import HarnessModel

    held = HarnessModel(*model, name="base", batch_size=3)
    requests = [
        ((question, answer), held.tok_encode(question), held.tok_encode(answer, add_special_tokens=False))
        for question in ("<s>What is the colour of the lulm?", "<s>Where?", "<s>" + "Tell me the colour. " * 40)
        for answer in ("blue", "red", "It is red.", "It is blue.", " ")
        if held.tok_encode(answer, add_special_tokens=False)
    ]
    notes = []
    held.on_event = notes.append
    ours = held._loglikelihood_tokens(requests)
    theirs = super(HarnessModel, held)._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    short = [place for place, (_, context, tail) in enumerate(requests) if len(context) + len(tail) <= held.max_length]
    for place in short:
        assert ours[place][0] == pytest.approx(theirs[place][0], abs=1e-4)
    assert 5 <= len(short) < len(requests)
    assert "lost their beginning" in notes[-1].text


def test_the_tokenizer_is_left_as_it_was(model):
    from abliterate.model.harness_model import HarnessModel

    loaded, chat = model
    before = loaded.tokenizer.pad_token
    loaded.tokenizer.pad_token = None
    try:
        HarnessModel(loaded, chat, name="base", batch_size=1)
        assert loaded.tokenizer.pad_token is None
    finally:
        loaded.tokenizer.pad_token = before


def test_the_template_is_given_what_the_mode_says(model, monkeypatch):
    from abliterate.model.harness_model import HarnessModel

    loaded, _ = model
    template = loaded.tokenizer.chat_template + "{%- if enable_thinking %}{{- '<think>' }}{%- endif %}"
    monkeypatch.setattr(loaded.tokenizer, "chat_template", template)
    for options, ending in (({"enable_thinking": True}, "assistant\n<think>"), ({}, "assistant\n")):
        held = HarnessModel(loaded, ChatFormat(loaded.tokenizer, options=options), name="base", batch_size=1)
        assert held.apply_chat_template([{"role": "user", "content": "a"}]).endswith(ending)


def test_out_of_core_the_scores_are_the_same(folder, found):
    """And the layers are read a few times for all questions, once for every token of the replies."""
    loaded = load_model(open_checkpoint(model_path()), device="cpu", memory_bytes=2**25 + 2**22)
    assert loaded.offload is not None
    request = TaskRequest(names=("facts", "facts_cut"), path=str(folder))
    ours = run_tasks(loaded, ChatFormat(loaded.tokenizer), request, name="base", batch_size=5)
    for task in ("facts", "facts_old", "facts_new", "facts_cut"):
        assert ours["results"][task] == found["results"][task]
    assert max(block_loads(loaded)) <= 12


def test_few_shots_and_a_limit(folder, model):
    request = TaskRequest(names=("facts_old",), path=str(folder), limit=5, shots=0, chat=False)
    plain = run_tasks(*model, request, name="base", batch_size=5)
    (score, _) = scores_of(plain, None, ("facts_old",))
    assert (score.count, score.shots) == (5, 0)
    assert len(plain["samples"]["facts_old"]) == 5


# --- against the base -------------------------------------------------------------------------------------------------


def made(values, *, value=None, stderr=0.1, metric="acc", document="d"):
    """What lm-eval gives back for one task."""
    mean = sum(values) / len(values) if value is None else value
    samples = [
        {"doc_id": place, "doc_hash": f"{document}{place}", "filter": "none", metric: one}
        for place, one in enumerate(values)
    ]
    metrics = {"alias": "t", "sample_len": len(values), f"{metric},none": mean, f"{metric}_stderr,none": stderr}
    return {
        "results": {"t": metrics}, "samples": {"t": samples}, "group_subtasks": {}, "n-shot": {"t": 5},
        "higher_is_better": {"t": {metric: True}},
    }  # fmt: skip


def test_differences_are_paired_over_the_documents():
    """All but five of a hundred documents agree: paired that is a loss, unpaired it would be a tie."""
    base, edited = made([1.0] * 60 + [0.0] * 40), made([1.0] * 52 + [0.0] * 48)
    (score,) = scores_of(edited, base, ("t",))
    assert score.paired
    assert score.change.value == pytest.approx(-0.08)
    assert score.change.verdict == "lower"
    (same,) = scores_of(base, base, ("t",))
    assert same.change.verdict == "tie"
    (first,) = scores_of(base, None, ("t",))
    assert first.change is None
    assert (figure(first), against_base(first)) == ("60.0 % ± 10.0", "")
    assert against_base(score).startswith("-8.0 points (-1")
    assert against_base(score).endswith(": lower)")


@pytest.mark.parametrize(
    "other",
    [
        made([1.0] * 52 + [0.0] * 48, document="e"),  # other documents
        made([1.0] * 52 + [0.0] * 48, value=0.5),  # the value is no mean of them
        made([1.0] * 52 + [0.0] * 47),  # one is missing
    ],
)
def test_what_cannot_be_paired_says_so(other):
    base = made([1.0] * 60 + [0.0] * 40)
    (score,) = scores_of(other, base, ("t",))
    assert not score.paired
    assert score.change.verdict == "tie"
    assert score.change.high - score.change.low == pytest.approx(2 * 1.959964 * math.sqrt(0.02), rel=1e-5)
    assert "unpaired" in against_base(score)


def test_without_a_standard_error_there_is_no_verdict():
    base, other = (made([3.0, 5.0], value=value, stderr="N/A", metric="perplexity") for value in (4.1, 4.2))
    (score,) = scores_of(other, base, ())
    assert score.change is None
    assert figure(score) == "4.2000"
    assert math.isnan(score.stderr)


def test_a_group_is_paired_over_its_parts(found):
    scores = {score.task: score for score in scores_of(found, found, ("facts",)) if score.metric == "acc"}
    assert scores["facts"].count == DOCUMENTS + DOCUMENTS // 2
    assert scores["facts"].paired
    assert [name for name, score in scores.items() if score.asked] == ["facts"]
    parts = [scores[name].value * scores[name].count for name in DATA]
    assert scores["facts"].value == pytest.approx(sum(parts) / scores["facts"].count)


def test_a_tag_stands_for_its_tasks(folder, model):
    plain = run_tasks(*model, TaskRequest(names=("every_fact",), path=str(folder), limit=2), name="base", batch_size=5)
    scores = scores_of(plain, None, ("every_fact",))
    assert {score.task for score in scores} == set(DATA)
    assert all(score.asked for score in scores)


def test_what_the_paper_published_stands_beside():
    assert published_for("Qwen/Qwen-7B-Chat", ("mmlu", "mine")) == {
        "mmlu": "-2.0 points for this model (Arditi et al. 2024, Table 8)"
    }
    others = published_for("somebody/else", ("mmlu", "gsm8k", "truthfulqa_mc2", "arc_challenge"))
    assert list(others) == ["mmlu", "gsm8k", "truthfulqa_mc2", "arc_challenge"]
    assert others["mmlu"].startswith("-2.0 to +0.2 points over the paper's models")


# --- asked for what cannot be had -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("facts", "facts_odl"), "facts_odl: lm-eval has no such task"),
        (("gone",), "gone: lm-eval cannot load it"),
        (("unsafe",), "unsafe: runs code"),
    ],
)
def test_a_task_that_cannot_be_had_is_refused_at_once(names, says, folder):
    with pytest.raises(UsageError, match=says) as error:
        check_tasks(TaskRequest(names=names, path=str(folder)))
    assert error.value.hint
    if "facts_odl" in names:
        assert "facts_old" in error.value.hint


def test_lm_eval_s_own_tasks_are_known_as_well(folder):
    assert {"mmlu", "arc_challenge", "gsm8k", "truthfulqa_mc2"} <= set(harness._manager(str(folder)).all_tasks)


def test_without_the_extra_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    check_tasks(TaskRequest(names=()))
    with pytest.raises(UsageError, match="not installed") as error:
        check_tasks(TaskRequest(names=("mmlu",)))
    assert error.value.hint == "pip install 'abliterate[eval]'"


@pytest.mark.parametrize("command", [["eval", "nowhere", "nowhere"], ["compare", "nowhere", "no"], ["run", "nowhere"]])
def test_tasks_are_looked_for_before_anything_else(command, folder, tmp_path):
    """The models named here do not exist: nothing has been opened yet."""
    shown = CliRunner().invoke(app, [*command, "--tasks", "facts,nope", "--task-path", str(folder)])
    assert shown.exit_code == 2
    assert "nope: lm-eval has no such task" in shown.stderr.replace("\n", " ")
    missing = CliRunner().invoke(app, [*command, "--tasks", "facts", "--task-path", str(tmp_path / "none")])
    assert "no such folder" in missing.stderr


def test_a_context_that_is_too_short_is_named(folder, model, monkeypatch):
    request = TaskRequest(names=("facts_said",), path=str(folder))
    monkeypatch.setattr(model[0].model.config, "max_position_embeddings", 20)
    with pytest.raises(UsageError, match="cannot put these tasks"):
        run_tasks(*model, request, name="base", batch_size=5)


# --- from the command line to the report ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    sizes = {"n_train": 32, "n_val": 12, "n_test": 20, "max_new_tokens": 12}
    recipe = Recipe(**sizes, tasks=("facts", "facts_sealed"), task_path=str(folder), controls=True)
    return abliterate.run(None, tmp_path_factory.mktemp("run") / "out", recipe)


def test_a_run_scores_base_and_result(run):
    base, edited, *controls = run.evaluation.models
    assert [score.task for score in base.tasks if score.asked] == ["facts", "facts_sealed"]
    assert all(score.change is None for score in base.tasks)
    assert all(score.change is not None and score.paired for score in edited.tasks)
    (sealed,) = (score for score in edited.tasks if score.task == "facts_sealed")
    assert sealed.change.verdict == "higher"  # refused before, answered now
    assert not any(control.tasks for control in controls)
    assert "through the chat template" in run.evaluation.benchmarks.about


def test_they_stand_in_manifest_card_and_report(run):
    document = manifest.read(run.out)["evaluation"]
    (score, *_) = document["models"][1]["tasks"]
    assert (score["task"], score["count"], score["paired"]) == ("facts", 36, True)
    assert score_of(score) == run.evaluation.edited.tasks[0]
    card = (run.out / "README.md").read_text("utf-8")
    page = render("x", run.evaluation)
    for text in (card, page):
        assert figure(run.evaluation.edited.tasks[0]) in text
        assert against_base(run.evaluation.edited.tasks[0]) in text
        assert "facts_sealed" in text
    assert "parts of these: 5 lines" in page
    assert "facts_new" not in card


def test_the_command_prints_them(run, folder):
    options = ["--tasks", "facts", "--task-path", str(folder), "--task-limit", "3", "--no-task-chat"]
    options += ["--recipe", str(run.out / "abliterate" / "recipe.toml")]
    shown = CliRunner().invoke(app, ["eval", "tiny-chat", str(run.out), *options])
    assert shown.exit_code == 0, shown.stderr
    assert "facts (6)" in shown.stdout
    assert "as plain text, without the chat template, the first 3 documents of each" in shown.stdout
    asked = CliRunner().invoke(app, ["eval", "tiny-chat", str(run.out), *options, "--json"])
    assert json.loads(asked.stdout)["models"][0]["tasks"][0]["count"] == 6
