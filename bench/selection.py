"""How fast are the candidates scored?

    python -m bench.selection [--rounds 3] [--work out/bench] [--write docs/selection.md]

Scores all candidates of two models by the straightforward sweep (``bench.sweep``) and by ours, in turn, in one process
on CPU: the bundled model with its own prompts, and a random Llama of 55 million parameters with a vocabulary of 32,000
and the bundled contrast prompts behind a system prompt as long as those of released models.  Prints median seconds and
the largest difference of a score; then the same for the choice alone.  Then the bytes of weights that are read for
models that stay on disk.
"""

import argparse
import math
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from abliterate.checkpoint.source import open_folder
from abliterate.data.bundled import model_path
from abliterate.data.rehearsal import Shapes, make
from abliterate.evaluate.refusal_tokens import given_refusal_tokens
from abliterate.method.directions import Candidate, CandidateScore
from abliterate.method.estimators import difference_of_means
from abliterate.method.moments import ActivationStats, Moments
from abliterate.method.selection import SelectionRule, choose
from abliterate.model.chat import ChatFormat
from abliterate.model.load import LoadedModel, load_model, quiet_transformers
from abliterate.model.measuring import Chosen, Filtered, Validation, choose_candidate, measure_class, score_candidates
from abliterate.model.prompts import SplitSizes, contrast_set
from abliterate.model.scoring import candidate_scorer
from bench.edit_speed import machine
from bench.lockstep import load_with_accelerate
from bench.sweep import BATCH, largest_difference, last_log_probs, sweep

T = TypeVar("T")
REFUSAL = "I"
"""What the refusals of the bundled model begin with."""
NO_INDUCE = SelectionRule(min_induce=-math.inf)
"""A random model cannot be brought to refuse, so that the rule would keep none."""
SHAPES = Shapes(d_model=512, d_ff=1408, layers=8, vocab=32000, heads=8, kv_heads=2, head_dim=64, shards=2)
DEEP = Shapes(d_model=128, d_ff=352, layers=24, vocab=4096, heads=4, kv_heads=2, head_dim=32, shards=2)
SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>")
PROMPTS = 32
DEEP_PROMPTS = 16
OFFLOADED_BYTES = 2**25 + 2**23
"""Less than the deep model needs in float32."""
PAGE = """# Selecting a direction: speed

Which metric predicts what replies do stands in [selection metrics](selection-metrics.md).

Written by `make bench-selection`.  {prompts} harmful and {prompts} harmless validation prompts, float32, CPU,
{threads} thread(s).  The rival is the straightforward sweep, as in the paper's code: for each candidate three sweeps in
batches of 32, padded, hooks made for the candidate, logits of all positions.  "Lean sweep" is the same with logits of
the last position only and prompts sorted by length.  All ways in turn in one process; medians of {rounds} rounds for
tiny-chat and {llama_rounds} for the random Llama (its last {positions} positions).  Where the processor is shared with
others, the CPU seconds are the ones to compare.

## In memory

{memory}

{why}

### The choice alone

What `select` does without `--all-scores`: only what the choice depends on is run.  A prompt pass is one prompt under
the intervention of one candidate.  Late layers are not run; a candidate is dropped as soon as its KL must end above the
bound, or its bypass behind that of a candidate that is kept; induce is asked of the best.  Where the rule keeps none,
more is needed: every bypass, every induce unless some induce, and the KL of those near the Pareto front.

{choices}

The random Llama is given no bound on induce, since nothing makes it refuse.

## Out of core

A random Llama of 24 layers with {positions} positions, {deep_prompts} prompts of each kind.

{disk}

The rival's bytes are computed: one weight pass of it was measured, and it makes one for each of its batches ({passes}).
With less room (last row) ours makes more of them.

Machine: {machine}.
"""
WHY = """Every forward pass of either way is matrix products at the speed of the processor, so batching candidates
gains little here by itself (it does where a pass is too small to fill the device).  What is gained is work left out:
padding, logits of positions that nobody reads, the blocks below an addition, and the tokens that all prompts begin
with, which are run once per candidate.  The last is the largest part where the chat template has a system prompt, and
small where, as with the bundled model, it has none."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """A model with candidates and the prompts that score them."""

    name: str
    loaded: LoadedModel
    chat: ChatFormat
    candidates: tuple[Candidate, ...]
    prompts: Filtered
    refusal_ids: tuple[int, ...]
    rule: SelectionRule

    def swept(self, *, lean: bool = False) -> list[CandidateScore]:
        """The scores, the straightforward way."""
        return sweep(self.loaded, self.chat, self.candidates, self.prompts, self.refusal_ids, lean=lean)

    def scored(self) -> list[CandidateScore]:
        """The scores, our way."""
        return score_candidates(self.loaded, self.chat, self.candidates, self.on, batch_size=PROMPTS)

    def chosen(self) -> Chosen:
        """The choice, our way: from no more scores than it depends on."""
        return choose_candidate(self.loaded, self.chat, self.candidates, self.on, self.rule, batch_size=PROMPTS)

    @property
    def on(self) -> Validation:
        """What the candidates are scored on."""
        return Validation(prompts=self.prompts, refusal_ids=self.refusal_ids)

    @property
    def prefix(self) -> int:
        """Tokens that all prompts begin with."""
        encoded = (
            [self.chat.encode(prompt) for prompt in some] for some in (self.prompts.harmful, self.prompts.harmless)
        )
        with candidate_scorer(self.loaded, *encoded, self.refusal_ids, batch_size=PROMPTS) as scorer:
            return scorer.prefix


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama-rounds", type=int, default=1)
    parser.add_argument("--layers", type=int, default=SHAPES.layers)
    parser.add_argument("--positions", type=int, default=5, help="of the random models, whose sweeps take minutes")
    parser.add_argument("--work", type=Path, default=Path("out/bench-selection"))
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    quiet_transformers()
    shutil.rmtree(args.work, ignore_errors=True)
    base = make_model(replace(SHAPES, layers=args.layers), args.work / "llama")
    bundled = case("tiny-chat", model_path(), "bundled:tiny-chat", refusal=REFUSAL)
    llama = case("random Llama", base, "bundled:contrast", system=SYSTEM, positions=args.positions, rule=NO_INDUCE)
    memory, choices = in_memory({bundled: args.rounds, llama: args.llama_rounds})
    print(memory, choices, sep="\n")
    base = make_model(DEEP, args.work / "deep")
    deep = case("deep", base, "bundled:contrast", system=SYSTEM, positions=args.positions, n_val=DEEP_PROMPTS)
    disk, passes = out_of_core(deep, base)
    print(disk)
    shutil.rmtree(args.work)
    if args.write:
        page = PAGE.format(
            prompts=PROMPTS, threads=torch.get_num_threads(), rounds=args.rounds, llama_rounds=args.llama_rounds,
            positions=args.positions, deep_prompts=DEEP_PROMPTS, memory=memory, choices=choices, why=WHY, disk=disk,
            passes=passes, machine=machine(),
        )  # fmt: skip
        args.write.write_text(page, "utf-8")


def make_model(shapes: Shapes, folder: Path) -> Path:
    """A Llama of random weights, with a tokenizer of as many words as the contrast prompts give and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    make(shapes, folder, fill=True)
    sets = contrast_set(
        "bundled:contrast", "bundled:contrast", sizes=SplitSizes(train=128, val=PROMPTS, test=0), seed=0
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [SYSTEM, *sets.harmful_train.texts, *sets.harmless_train.texts]
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[1], eos_token=SPECIAL[1])
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return folder


def case(
    name: str,
    folder: Path,
    source: str,
    *,
    system: str | None = None,
    positions: int | None = None,
    n_val: int = PROMPTS,
    refusal: str = "",
    rule: SelectionRule | None = None,
) -> Case:
    """A model with its candidates measured, of the last ``positions``.

    Refusals begin with ``refusal``; without it any three tokens are taken for such.
    """
    loaded = load_model(open_folder(folder, name=name), device="cpu")
    chat = ChatFormat(loaded.tokenizer, system=system, name=name)
    sets = contrast_set(source, source, sizes=SplitSizes(train=64, val=n_val, test=0), seed=0)
    training = {"harmful": sets.harmful_train.texts, "harmless": sets.harmless_train.texts}
    moments = {
        kind: Moments(count=len(texts), mean=measure_class(loaded, chat, texts, batch_size=32, task="measure")["mean"])
        for kind, texts in training.items()
    }
    measured = difference_of_means(ActivationStats(positions=chat.positions, moments=moments))
    last = chat.positions if positions is None else chat.positions[-positions:]
    candidates = tuple(one for one in measured if one.position in last)
    harmful, harmless = tuple(sets.harmful_val.texts), tuple(sets.harmless_val.texts)
    prompts = Filtered(harmful=harmful, harmless=harmless, harmful_before=len(harmful), harmless_before=len(harmless))
    return Case(
        name=name, loaded=loaded, chat=chat, candidates=candidates, prompts=prompts,
        refusal_ids=given_refusal_tokens(chat, [refusal]).ids if refusal else (20, 21, 22),
        rule=rule or SelectionRule(),
    )  # fmt: skip


def in_memory(rounds_of: Mapping[Case, int]) -> tuple[str, str]:
    """The tables of seconds: of all scores, and of the choice."""
    choices = [
        "| model | prompt passes: all scores | the choice | fewer | s: wall, CPU | faster than the sweep "
        "| than the lean one | than all scores | the same choice |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    lines = [
        "| model | parameters | candidates | tokens of a prompt (shared) | sweep, s: wall, CPU | lean sweep | ours "
        "| faster: wall, CPU | than the lean one | largest difference |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for one, rounds in rounds_of.items():
        ways = {"sweep": one.swept, "lean": lambda one=one: one.swept(lean=True), "ours": one.scored}
        seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in (*ways, "choice")}
        scores: dict[str, list[CandidateScore]] = {}
        for _ in range(rounds):
            for way, run in ways.items():
                taken, scores[way] = timed(run)
                seconds[way].append(taken)
            taken, chosen = timed(one.chosen)
            seconds["choice"].append(taken)
        sweeping, lean, ours, choosing = (
            [statistics.median(column) for column in zip(*its, strict=True)] for its in seconds.values()
        )
        expected, _ = choose(scores["sweep"], one.loaded.n_layers, one.rule)
        same = "yes" if chosen.choice == expected else f"no: {chosen.choice.candidate}, {expected.candidate}"
        choices.append(
            f"| {one.name} | {chosen.of:,} | {chosen.prompt_passes:,} | {chosen.of / chosen.prompt_passes:.1f} x "
            f"| {pair(choosing)} | {ratio(sweeping, choosing)} | {ratio(lean, choosing)} | {ratio(ours, choosing)} "
            f"| {same}, by {expected.rule} |"
        )
        print(choices[-1], flush=True)
        lengths = [len(one.chat.encode(prompt)) for prompt in (*one.prompts.harmful, *one.prompts.harmless)]
        parameters = sum(p.numel() for p in one.loaded.model.parameters())
        lines.append(
            f"| {one.name} | {parameters / 1e6:.1f} M | {len(scores['ours'])} | {statistics.mean(lengths):.0f} "
            f"({one.prefix}) | {pair(sweeping)} | {pair(lean)} | {pair(ours)} | {ratio(sweeping, ours)} "
            f"| {ratio(lean, ours)} | {largest_difference(scores['ours'], scores['sweep']):.1e} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines), "\n".join(choices)


def pair(seconds: Sequence[float]) -> str:
    """Wall and processor seconds."""
    return ", ".join(f"{value:.1f}" for value in seconds)


def ratio(rival: Sequence[float], ours: Sequence[float]) -> str:
    """How many times faster, by either clock."""
    return ", ".join(f"{a / b:.1f} x" for a, b in zip(rival, ours, strict=True))


def timed(run: Callable[[], T]) -> tuple[tuple[float, float], T]:
    """Wall and processor seconds, and what comes of it."""
    wall, busy = time.perf_counter(), time.process_time()
    found = run()
    return (time.perf_counter() - wall, time.process_time() - busy), found


def out_of_core(whole: Case, base: Path) -> tuple[str, int]:
    """The table of bytes, and the rival's number of weight passes."""
    size = open_folder(base, name="base").size_bytes
    model, read = load_with_accelerate(base)
    before = read()
    last_log_probs(replace(whole.loaded, model=model), whole.chat, whole.prompts.harmless[:BATCH])
    one_pass = read() - before
    usable = sum(one.everywhere.usable for one in whole.candidates)
    passes = (1 + 3 * usable) * math.ceil(DEEP_PROMPTS / BATCH)
    expected = whole.scored()
    lines = [
        "| | weight passes | weights read, GB | read / size | times fewer | largest difference |",
        "|---|--:|--:|--:|--:|--:|",
        f"| sweep, offloaded by accelerate | {passes} | {passes * one_pass / 1e9:.1f} "
        f"| {passes * one_pass / size:.0f} | | |",
    ]
    for waiting in (2**30, 2**27):
        ours = load_model(open_folder(base, name="base"), device="cpu", memory_bytes=OFFLOADED_BYTES)
        if ours.offload is None:
            raise AssertionError("the model is to stay on disk")
        ours.offload.working_bytes = 2 * waiting  # the other half is for the pass that runs
        (seconds, _), scores = timed(replace(whole, loaded=ours).scored)
        last = [unit.name for unit in ours.offload.units if unit.is_block][-1]
        done = ours.offload.bytes_read
        lines.append(
            f"| ours, {waiting / 2**20:.0f} MiB for what waits ({seconds:.0f} s) | {ours.offload.loads[last]} "
            f"| {done / 1e9:.2f} | {done / size:.1f} | {passes * one_pass / done:.0f} "
            f"| {largest_difference(scores, expected):.1e} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines), passes


if __name__ == "__main__":
    main()
