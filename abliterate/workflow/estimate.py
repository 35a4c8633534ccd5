"""About how long the stages ahead will take, from one short timed forward pass of the model that is in memory.

What a stage does is counted in tokens of prompts, steps of writing replies, bytes moved and models loaded; each has a
pace that was measured.  Replies are counted at their full length, as nobody knows it before.
"""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import ceil
from statistics import fmean

from torch import Tensor

from abliterate.evaluate.observing import HARMLESS
from abliterate.evaluate.refusal_tokens import PROBE_PROMPTS, PROBE_TOKENS
from abliterate.events import duration
from abliterate.method.refusal_cone import CONE, TARGET_TOKENS, Schedule
from abliterate.model.chat import Batch, ChatFormat, left_padded
from abliterate.model.forward import run_batch
from abliterate.model.interventions import observed
from abliterate.model.load import LoadedModel
from abliterate.model.lockstep import run_together
from abliterate.model.ranks import agreed
from abliterate.recipe import Recipe
from abliterate.workflow.reading import reads_replies
from abliterate.workflow.session import Session
from abliterate.workflow.trials import held_out_prompts, material_of

FEW_SCORES = 0.25
"""About the share of all prompt passes that choosing takes where not every candidate is scored in full: 0.15 on
Qwen2.5-Coder-0.5B, 0.28 on the bundled model."""
PASSES_OF_PROOF = 3
"""Base, base under hooks, and written checkpoint."""
SHORT_S = 0.5
"""About the most that the timed forward pass should take."""
SAMPLE = 16
"""Prompts whose mean length stands for that of all."""
WIDTH = 4
"""Tokens of a row of the batch that stands for a step of writing: some models run no shorter one without a cache."""
BACKWARD = 1
"""Forward passes that the gradients of one take; those of the weights are not asked for."""
CHARACTERS = 4
"""Of a token, about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How much there is to do.

    Attributes:
        prompt_tokens, own_tokens: mean length of a prompt, and of what it does not share with all others.
        batch_size: replies that are written together.
        train, probed: prompts of both classes to measure on; prompts that find the refusal tokens.
        filtered: whether prompts are tried before they are used.
        label_tokens: length of the replies that say which prompts count; 0 where the first token says it.
        harmful_val, harmless_val, candidates: what candidates are scored on, and how many there are.
        scored: share of the prompt passes of scoring each candidate in full.
        trials, trial_tokens: of a search in place of these, and the length of the replies in each.
        held_out: prompts of the proof.
        test: prompts of the evaluation, by kind.
        models, reply_tokens: who replies to them, and how much at most.
        trained_tokens, trained_steps: tokens that directions are trained on, each as often as a forward pass or its
            gradients take it, and steps of writing what is learned.
        started: among how many candidates training finds its start.
        text_tokens: of a text to predict.
        output_bytes: what is written, and read again by the proof.
    """

    prompt_tokens: float
    own_tokens: float
    batch_size: int
    train: int
    probed: int
    filtered: bool
    harmful_val: int
    harmless_val: int
    candidates: int
    scored: float
    held_out: int
    test: Mapping[str, int]
    models: int
    reply_tokens: int
    label_tokens: int = 0
    trials: int = 0
    trial_tokens: int = 0
    trained_tokens: float = 0.0
    trained_steps: int = 0
    started: int = 0
    text_tokens: int = 0
    output_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """What a stage does.  A step writes the next token of all replies of a batch."""

    prompt_tokens: float = 0.0
    steps: int = 0
    moved_bytes: int = 0
    loads: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Measured paces; None and 0 where something was not measured, and is then not counted."""

    prompt_tokens_per_s: float
    step_s: float
    load_s: float = 0.0
    bytes_per_s: float | None = None


def amounts(counts: Counts, stages: Collection[str]) -> dict[str, Amount]:
    """What each of ``stages`` does, of ``measure``, ``select``, ``edit``, ``verify`` and ``replies``.

    Where directions are trained that belongs to ``measure``, and stands beside it as ``train``.
    """
    length, replies = counts.prompt_tokens, counts.models * sum(counts.test.values())
    each = counts.scored * (counts.harmful_val + 2 * counts.harmless_val)
    passes, validated = counts.candidates * each, counts.harmful_val + counts.harmless_val
    tried = validated if counts.filtered else 0
    labelled = {
        stage: ceil(n / counts.batch_size) * counts.label_tokens
        for stage, n in (("measure", counts.train), ("select", tried))
    }
    likely = counts.models * counts.test.get(HARMLESS, 0)  # the base's replies
    every = {
        "measure": Amount(
            prompt_tokens=length
            * (counts.probed + counts.train * (2 if counts.filtered and not counts.label_tokens else 1)),
            steps=ceil(counts.probed / counts.batch_size) * PROBE_TOKENS + labelled["measure"],
        ),
        "train": Amount(
            prompt_tokens=counts.trained_tokens + counts.own_tokens * counts.started * each, steps=counts.trained_steps
        ),
        "select": Amount(
            prompt_tokens=length * (tried + counts.harmless_val)
            + (length * counts.trials * validated if counts.trials else counts.own_tokens * passes),
            steps=labelled["select"]
            + counts.trials * ceil(counts.harmful_val / counts.batch_size) * counts.trial_tokens,
        ),
        "edit": Amount(moved_bytes=counts.output_bytes),
        "verify": Amount(
            prompt_tokens=length * PASSES_OF_PROOF * counts.held_out, moved_bytes=2 * counts.output_bytes, loads=1
        ),
        "replies": Amount(
            prompt_tokens=length * replies
            + likely * (length + counts.reply_tokens)
            + counts.models * counts.text_tokens,
            steps=counts.models * counts.reply_tokens * sum(ceil(n / counts.batch_size) for n in counts.test.values()),
            loads=0 if "verify" in stages else 1,
        ),
    }
    wanted = {*stages, *(["train"] if counts.trained_tokens and "measure" in stages else [])}
    return {stage: amount for stage, amount in every.items() if stage in wanted}


def seconds(amount: Amount, speed: Speed) -> float:
    """How long it takes."""
    moving = 0.0 if speed.bytes_per_s is None else amount.moved_bytes / speed.bytes_per_s
    running = amount.prompt_tokens / speed.prompt_tokens_per_s + amount.steps * speed.step_s
    return running + moving + amount.loads * speed.load_s


def whole_seconds(counts: Counts, stages: Collection[str], speed: Speed) -> float:
    """How long all ``stages`` take together."""
    return sum(seconds(amount, speed) for amount in amounts(counts, stages).values())


def sentence(counts: Counts, stages: Collection[str], speed: Speed, *, left_out: Collection[str] = ()) -> str:
    """The estimate, for people."""
    each = {stage: seconds(amount, speed) for stage, amount in amounts(counts, stages).items()}
    most = f" at most ({counts.reply_tokens} tokens each)" if counts.reply_tokens else ""
    after = {"replies": most, "train": " at most"}
    parts = ", ".join(f"{stage} {_about(time)}{after.get(stage, '')}" for stage, time in each.items())
    paces = [f"{speed.prompt_tokens_per_s:,.0f} tokens of prompts/s"]
    if any(amount.steps for amount in amounts(counts, stages).values()):
        paces.append(f"{counts.batch_size / speed.step_s:,.0f} tokens of replies/s")
    if speed.bytes_per_s is not None:
        paces.append(f"{speed.bytes_per_s / 1e6:,.0f} MB/s written")
    whole = f"this will take about {_about(whole_seconds(counts, stages, speed))}: {parts}"
    without = f"; not counted: {', '.join(left_out)}" if left_out else ""
    return f"{whole}; by a short trial: {', '.join(paces)}{without}"


def _about(time: float) -> str:
    return "under 1 s" if time < 1 else duration(time)


def counts_of(session: Session, stages: Collection[str], *, models: int, output_bytes: int) -> Counts:
    """What ``stages`` have to do by the recipe of ``session``, whose model is loaded for it.

    Raises:
        PromptError: prompts cannot be had.
    """
    recipe, contrast, chat = session.recipe, session.contrast, session.chat
    train = [contrast.harmful_train.texts, contrast.harmless_train.texts]
    encoded = [chat.encode(prompt) for texts in train for prompt in texts[: SAMPLE // 2]]
    shared = next((n for n, ids in enumerate(zip(*encoded, strict=False)) if len(set(ids)) > 1), 0)
    length = fmean(map(len, encoded))
    layers = session.loaded.n_layers
    early = layers - int(layers * recipe.find.prune_layers)
    labelled, measured = reads_replies(recipe), len(chat.positions) * early * len(recipe.find.estimators)
    tokens, written, made = _training(session, length) if recipe.find.trained else (0.0, 0, 0)
    material = material_of(session) if "replies" in stages else None
    return Counts(
        prompt_tokens=length,
        own_tokens=length - shared,
        batch_size=recipe.model.batch_size,
        train=sum(map(len, train)),
        probed=0 if recipe.find.refusal_tokens or labelled else sum(min(len(texts), PROBE_PROMPTS) for texts in train),
        filtered=recipe.find.filter_prompts,
        label_tokens=recipe.find.reply_tokens if labelled else 0,
        harmful_val=len(contrast.harmful_val.prompts),
        harmless_val=len(contrast.harmless_val.prompts),
        candidates=made or measured,
        trained_tokens=tokens,
        trained_steps=written,
        started=measured if made else 0,
        scored=1.0 if recipe.find.scores_all else FEW_SCORES,
        trials=recipe.find.trials,
        trial_tokens=recipe.find.reply_tokens,
        held_out=len(held_out_prompts(session)),
        test={} if material is None else {kind: len(its.prompts) for kind, its in material.prompts.items()},
        models=_models(recipe, models),
        reply_tokens=recipe.evaluate.max_new_tokens if recipe.evaluate.backend == "transformers" else 0,
        text_tokens=0 if material is None else len(material.text) // CHARACTERS,
        output_bytes=output_bytes,
    )


def _training(session: Session, length: float) -> tuple[float, int, int]:
    """Tokens of training and steps of writing, as in ``Counts``, and how many candidates are trained.

    A step has three losses with gradients and the base without, each look at the validation prompts all four without; a
    cone has them for its basis and for directions drawn from it.
    """
    find, contrast, schedule = session.recipe.find, session.contrast, Schedule()
    validation = max(len(contrast.harmful_val.prompts), len(contrast.harmless_val.prompts))
    looks = 1 + ceil(find.train_steps / schedule.checked_every)
    once = find.train_steps * schedule.batch * (3 * (1 + BACKWARD) + 1) + looks * validation * 4
    cones = find.cone_size - 1 if find.trained == CONE else 0
    fits = 1 + 2 * cones + bool(find.independent_of)
    harmful, harmless = (
        len(train.prompts) + len(val.prompts)
        for train, val in (
            (contrast.harmful_train, contrast.harmful_val), (contrast.harmless_train, contrast.harmless_val)
        )
    )  # fmt: skip
    replies = harmful + 2 * harmless
    tokens = fits * once * (length + TARGET_TOKENS) + replies * length
    return tokens, ceil(replies / session.recipe.model.batch_size) * TARGET_TOKENS, cones or 1


def _models(recipe: Recipe, models: int) -> int:
    """How often the evaluation is done: controls and modes count."""
    controls = 2 if recipe.evaluate.controls else 0
    return (models + controls) * (2 if recipe.evaluate.thinking == "both" else 1)


def not_counted(recipe: Recipe, stages: Collection[str]) -> list[str]:
    """What no estimate is made of."""
    if "replies" not in stages:
        return []
    found = ["replies, which vLLM writes"] if recipe.evaluate.backend == "vllm" else []
    found += ["tasks"] if recipe.evaluate.tasks else []
    return found + (["the judge"] if recipe.evaluate.judge else [])


def speed_of(session: Session, *, load_s: float = 0.0, bytes_per_s: float | None = None) -> Speed:
    """Time the model of ``session`` on few of its prompts; out of core its first block, which stands for all."""
    contrast, most = session.contrast, session.recipe.model.batch_size
    pairs = zip(contrast.harmful_train.texts, contrast.harmless_train.texts, strict=False)
    texts = [prompt for pair in pairs for prompt in pair]
    encoded = [session.chat.encode(prompt) for prompt in texts[:most]]
    per_s, step_s = timed(session.loaded, session.chat, encoded, batch_size=most)
    return Speed(prompt_tokens_per_s=per_s, step_s=step_s, load_s=load_s, bytes_per_s=bytes_per_s)


def reading_speed(session: Session) -> float | None:
    """Bytes a second at which the first weight passes read, out of core; None where there were some before.

    They are those that making the chat format takes.
    """
    weights = session.loaded.offload
    if weights is None or "chat" in vars(session):
        return None
    before, begun = weights.bytes_read, time.perf_counter()
    _ = session.chat
    return (weights.bytes_read - before) / max(time.perf_counter() - begun, 1e-9) or None


class _SeenEnoughError(Exception):
    """The first block has run."""


def _first_block_s(loaded: LoadedModel, batch: Batch) -> float:
    """Seconds for which the first block runs on a batch."""
    if loaded.offload is None:
        raise AssertionError("the weights are in memory")
    weights = loaded.offload
    name = next(unit.name for unit in weights.units if unit.module is loaded.blocks[0])
    before, ahead = weights.run_s[name], weights.prefetch

    def stop(layer: int, _: Tensor) -> None:
        if layer:
            raise _SeenEnoughError

    def run() -> None:
        with observed(loaded, stop):
            try:
                run_batch(loaded, batch)
            except _SeenEnoughError:
                return

    weights.prefetch, weights.is_timed = False, True
    try:
        run_together(loaded, [run])
    finally:
        weights.prefetch, weights.is_timed = ahead, False
    return weights.run_s[name] - before


def timed(
    loaded: LoadedModel,
    chat: ChatFormat,
    encoded: list[list[int]],
    *,
    batch_size: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """Tokens of prompts a second, and the seconds of a step that writes ``batch_size`` tokens.

    As many tokens as such a step takes are timed first: without a cache, which is short by then.  How long that took
    says how many prompts can be timed.  Out of core only the first block is read, and reading is not counted.
    """

    def run(batch: Batch) -> float:
        if loaded.offload is not None:
            return loaded.n_layers * _first_block_s(loaded, batch)
        begun = clock()
        run_batch(loaded, batch)[:, -1].cpu()  # waits for the device
        return clock() - begun

    rows = ceil(batch_size / WIDTH)
    tails = [ids[-WIDTH:] for ids in encoded]
    (few,) = left_padded([tails[row % len(tails)] for row in range(rows)], rows, chat.pad_id)
    step = run(few)
    if not agreed(int(step >= SHORT_S)):
        step = min(step, run(few))  # the first one may have warmed up
    width = max(map(len, encoded))
    fitting = agreed(int(SHORT_S / max(step, 1e-9) * batch_size / width))
    whole = encoded[: max(1, min(fitting, batch_size))]
    batches = list(chat.pack(whole, batch_size))
    if loaded.offload is not None:
        batches = batches[:1]
    took = sum(map(run, batches))
    tokens = sum(len(whole[row]) for batch in batches for row in batch.rows)
    return tokens / max(took, 1e-9), max(step, 1e-9)
