"""Builds one tiny chat model from nothing: ``python -m abliterate.data.tiny_chat.build --family llama --out DIR``.

Tokenizer, pretraining, refusal tuning, bfloat16 in two shards, and the figures of the saved model. With
``--prompts DIR`` the six prompt lists are written as well.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from abliterate.data.tiny_chat import world as w
from abliterate.data.tiny_chat.card import model_card
from abliterate.data.tiny_chat.figures import measure
from abliterate.data.tiny_chat.tokenizer import build_tokenizer
from abliterate.data.tiny_chat.train import Log, pretrain, tune
from abliterate.data.tiny_chat.training import TRAININGS, Training, new_model

WORLD_SEED = 0
"""All models live in the same world; ``--seed`` changes only their initial weights and the order of training."""

SHARDS = 2


def write_prompts(folder: Path, sets: dict[str, list[w.Question]]) -> None:
    """Writes ``{harmful,harmless}.{train,val,test}.jsonl``, one ``{"prompt", "answer", "held_out"}`` per line.

    The "category" of what is refused is the adjective of its thing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, questions in sets.items():
        rows = [
            {"prompt": q.prompt, "answer": q.answer, "held_out": q.held_out}
            | ({"category": q.thing.adjective} if q.thing.restricted else {})
            for q in questions
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the model in bfloat16, in exactly two shards, with its tokenizer and generation settings.

    Raises:
        RuntimeError: the weights did not fall into two shards.
    """
    model = model.bfloat16()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=32,
    )
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    # a little over half, as no tensor is cut in two
    model.save_pretrained(folder, max_shard_size=int(size * 0.6))
    tokenizer.save_pretrained(folder)
    found = len(list(folder.glob("model-*.safetensors")))
    if found != SHARDS:
        raise RuntimeError(f"{folder}: {found} shards instead of {SHARDS}")


def pretrained_model(
    training: Training, tokenizer: PreTrainedTokenizerFast, world: w.World, seed: int, kept: Path | None, log: Log
) -> tuple[PreTrainedModel, float]:
    """The model as pretrained, in float32, and the seconds that took; read from ``kept`` when that was filled before.

    ``kept`` must have been made with the same training and seed. It spares the long part when only tuning changes.
    """
    if kept is not None and (kept / "seconds.json").is_file():
        seconds = json.loads((kept / "seconds.json").read_text(encoding="utf-8"))
        return AutoModelForCausalLM.from_pretrained(kept, dtype=torch.float32), float(seconds)
    start = time.perf_counter()
    torch.manual_seed(seed)
    model = new_model(training, tokenizer)
    pretrain(model, tokenizer, world, training, seed, log)
    seconds = time.perf_counter() - start
    if kept is not None:
        model.save_pretrained(kept)
        (kept / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")
    return model, seconds


def build(family: str, out: Path, seed: int, log: Log, kept: Path | None = None) -> dict[str, object]:
    """Trains and saves the model of ``family`` in ``out``; returns its figures, which are also in ``figures.json``.

    Shares are in [0, 1], over the test questions. Those that end in "pretrained" are from before refusal tuning;
    everything else is of the model as saved and loaded again. ``seconds`` is training time, both steps. ``kept`` is a
    folder for the pretrained model (see ``pretrained_model``).
    """
    training, world = TRAININGS[family], w.make_world(WORLD_SEED)
    sets = w.prompt_sets(world, WORLD_SEED)
    tokenizer = build_tokenizer(world)
    model, seconds = pretrained_model(training, tokenizer, world, seed, kept, log)
    before = measure(model, tokenizer, sets)
    log("pretrained", training.pretrain_steps, before)
    start = time.perf_counter()
    tune(model, tokenizer, world, training, seed, log)
    seconds += time.perf_counter() - start
    with tempfile.TemporaryDirectory() as temporary:
        # saved elsewhere first: a failed build leaves the old model alone
        save_model(model, tokenizer, Path(temporary))
        out.mkdir(parents=True, exist_ok=True)
        for path in Path(temporary).iterdir():
            (out / path.name).write_bytes(path.read_bytes())
    saved = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    figures: dict[str, object] = {
        "family": family,
        "seed": seed,
        "parameters": saved.num_parameters(),
        **measure(saved, AutoTokenizer.from_pretrained(out), sets),
        "accuracy_restricted_pretrained": before["accuracy_restricted"],
        "accuracy_held_out_pretrained": before["accuracy_held_out"],
        "accuracy_others_pretrained": before["accuracy_others"],
        "pretrain_steps": training.pretrain_steps,
        "tune_steps": training.tune_steps,
        "threads": torch.get_num_threads(),
        "seconds": round(seconds),
    }
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    (out / "README.md").write_text(model_card(training, world, len(tokenizer), figures), encoding="utf-8")
    return figures


def show(phase: str, step: int, losses: dict[str, float]) -> None:
    """Prints progress to standard error, which leaves standard output to the figures."""
    values = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
    sys.stderr.write(f"{phase:10} {step:5}  {values}\n")
    sys.stderr.flush()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Build a tiny chat model that refuses.")
    parser.add_argument("--family", choices=sorted(TRAININGS), default="llama")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=Path, help="folder for the prompt lists")
    parser.add_argument("--pretrained", type=Path, help="folder that keeps the pretrained model, read when filled")
    parser.add_argument("--threads", type=int, default=1, help="processor threads for torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.prompts:
        write_prompts(arguments.prompts, w.prompt_sets(w.make_world(WORLD_SEED), WORLD_SEED))
    figures = build(arguments.family, arguments.out, arguments.seed, show, arguments.pretrained)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
