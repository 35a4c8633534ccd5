"""A model trained to refuse where its refusal direction is gone, written as a checkpoint, measured before and after.

Training prompts train.  Test prompts, which training never sees, give the figures.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from abliterate.checkpoint.file_names import at_home
from abliterate.checkpoint.output import fingerprint, prepare
from abliterate.checkpoint.source import open_folder
from abliterate.editing.adding import write_with
from abliterate.errors import AbliterateError, NonFiniteError, PromptError, TooFewPromptsError
from abliterate.evaluate.labels import reader
from abliterate.evaluate.replies import SCORERS, holds_answer
from abliterate.events import Noted, working
from abliterate.method.hardening import Hardening
from abliterate.method.statistics import Rate
from abliterate.model.changed import replies_under
from abliterate.model.finetuning import Tuning, adapted, check_train_installed, check_trainable, finetune
from abliterate.model.interventions import without
from abliterate.model.random_ablation import RandomAblation
from abliterate.model.refusal_texts import Pair, check_enough, example_of, extended, pairs_of_file
from abliterate.model.replying import generate_tokens
from abliterate.model.targets import Example
from abliterate.publishing.hardened import Hardened, Stance, finish
from abliterate.workflow.finding import measure, select, work_fingerprint
from abliterate.workflow.session import Session
from abliterate.workflow.steps import Steps

STEPS, TRAINED = "steps", "trained"
TASK = "train"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lessons:
    """What is learned: ``refused`` prompts with refusals, and ``answered`` ones with what the model says anyway."""

    refused: tuple[Example, ...]
    answered: tuple[Example, ...]
    harmful: tuple[str, ...]
    harmless: tuple[str, ...]

    @property
    def pairs(self) -> list[tuple[Example, Example]]:
        """One of each kind together; the fewer take turns."""
        most = max(len(self.refused), len(self.answered))
        kinds = self.refused, self.answered
        first, second = ([its[place % len(its)] for place in range(most)] for its in kinds)
        return list(zip(first, second, strict=True))


def harden(
    session: Session,
    out: Path,
    options: Hardening,
    *,
    refusals: Path | None = None,
    n_prompts: int = 32,
) -> Hardened:
    """Train the model of ``session`` by ``options``, and write the result to ``out``.

    What it learns to say to harmful prompts stands in the file ``refusals``; else it is put together, or is what the
    model itself says.  Both models are measured on at most ``n_prompts`` test prompts of each class; 0: neither is.
    Stopped after training, the same call goes on from what was learned.

    Raises:
        UsageError: training libraries are missing, memory does not suffice, or the model is run out of core.
        PromptError: the prompts are unusable or too few, or the model refuses nothing to learn from.
        UnsupportedFormatError: the weights cannot be trained as they are stored.
        NonFiniteError: training diverges.
        OutputError, NotEnoughDiskError: ``out`` is in the way, or does not fit.
    """
    check_train_installed()
    given = None if refusals is None else pairs_of_file(refusals)
    checkpoint, _ = session.checkpoint, session.contrast
    work = _fingerprint(session, options, refusals)
    output = prepare(out, source=checkpoint.folder, fingerprint=work, needed_bytes=checkpoint.size_bytes)
    steps = Steps(output.private / STEPS, work)
    lessons = cache(partial(_lessons, session, options, given))
    try:
        if not steps.has(TRAINED):
            check_trainable(session.loaded, checkpoint)
            lessons()
        before = _kept_stance(steps, "base", session, n_prompts)
        learned = steps.tensors(TRAINED, lambda: _trained(session, options, lessons()))
        session.release()
        counts, losses = learned.pop("counts").tolist(), learned.pop("losses").tolist()
        write_with(checkpoint, learned, output, on_event=session.on_event)
        result = replace(session, checkpoint=open_folder(output.path, name=str(out)))
        after = _kept_stance(steps, "hardened", result, n_prompts)
        result.release()
    except AbliterateError:
        if not steps.has(TRAINED):  # else some shards may hold what was learned, and the others must hold the same
            steps.clear()
            output.discard()
        raise
    report = Hardened(
        out=output.final, base=checkpoint.name, options=options, refusals=None if refusals is None else refusals.name,
        refused=counts[0], answered=counts[1], steps_ablated=counts[2], losses=tuple(round(its, 4) for its in losses),
        before=before, after=after, changed=tuple(sorted(learned)), prompts=session.contrast.hashes(),
    )  # fmt: skip
    steps.clear()
    finish(output, checkpoint, report, session.recipe)
    return report


def _fingerprint(session: Session, options: Hardening, refusals: Path | None) -> str:
    digest = None if refusals is None else hashlib.sha256(at_home(refusals).read_bytes()).hexdigest()
    return fingerprint({"work": work_fingerprint(session), "harden": asdict(options), "refusals": digest})


def _trained(session: Session, options: Hardening, lessons: _Lessons) -> dict[str, Tensor]:
    """What is added to each stored tensor; "counts" of examples and ablated steps, and "losses" on the way."""
    model = adapted(session.loaded, session.checkpoint, rank=options.rank, seed=options.seed)
    ablation = RandomAblation(
        model.loaded, session.chat, lessons.harmful, lessons.harmless, options,
        batch_size=session.recipe.model.batch_size,
    )  # fmt: skip
    around: Callable[[int], AbstractContextManager[None]] = ablation.around if options.ablates else _nothing
    tuning = Tuning(
        steps=options.steps, batch=options.batch, rank=options.rank, rate=options.rate, seed=options.seed
    )  # fmt: skip
    with working(session.on_event, TASK, options.steps, "steps") as advance:
        losses = finetune(model, lessons.pairs, tuning, around=around, advance=advance)
    counts = [len(lessons.refused), len(lessons.answered), ablation.steps_ablated]
    return {**model.added(), "counts": torch.tensor(counts), "losses": torch.tensor(losses)}


def _nothing(_: int) -> AbstractContextManager[None]:
    return nullcontext()


def _lessons(session: Session, options: Hardening, given: Sequence[Pair] | None) -> _Lessons:
    """What is learned of the training prompts.

    Raises:
        PromptError: the model refuses or answers too few of them to learn from.
    """
    contrast, chat = session.contrast, session.chat
    harmless, replies = _own(session, contrast.harmless_train.texts, "answered")
    answered = [Example(chat.encode(its) + ids, len(ids)) for its, ids in zip(harmless, replies, strict=True)]
    check_enough(len(answered), f"harmless training prompts that {session.loaded.name} answers")
    if given is None and not options.extends:
        harmful, replies = _own(session, contrast.harmful_train.texts, "refused")
        refused = [Example(chat.encode(its) + ids, len(ids)) for its, ids in zip(harmful, replies, strict=True)]
    else:
        pairs = _pairs(session, options, given)
        harmful = [its.prompt for its in pairs]
        refused = [example_of(session.loaded, chat, its) for its in pairs]
    check_enough(len(refused), f"harmful training prompts with refusals for {session.loaded.name}")
    return _Lessons(
        refused=tuple(refused), answered=tuple(answered), harmful=tuple(harmful), harmless=tuple(harmless)
    )  # fmt: skip


def _pairs(session: Session, options: Hardening, given: Sequence[Pair] | None) -> list[Pair]:
    """What was given, without prompts that the figures are of; else extended refusals of the training prompts."""
    contrast = session.contrast
    if given is None:
        generator = random.Random(options.seed)
        return [extended(its, generator) for its in contrast.harmful_train.prompts]
    others = {*contrast.harmful_val.texts, *contrast.harmful_test.texts}
    kept = [its for its in given if its.prompt not in others]
    if len(kept) < len(given):
        text = f"left out: {len(given) - len(kept)} of {len(given)} replies are to prompts of validation or test"
        session.on_event(Noted(text=text))
    return kept


def _own(session: Session, prompts: Sequence[str], wanted: str) -> tuple[list[str], list[list[int]]]:
    """The prompts whose label is ``wanted``, and what the model itself replies to them, as token ids."""
    chat, recipe = session.chat, session.recipe
    read = reader(SCORERS[recipe.evaluate.scorer], chat)
    replies = generate_tokens(
        session.loaded, chat, prompts, max_new_tokens=recipe.evaluate.max_new_tokens,
        batch_size=recipe.model.batch_size, task=f"write replies to learn from ({wanted})", on_event=session.on_event,
    )  # fmt: skip
    kept = [
        (prompt, ids) for prompt, ids in zip(prompts, replies, strict=True) if read(prompt, chat.text(ids)) == wanted
    ]
    return [prompt for prompt, _ in kept], [ids for _, ids in kept]


def _kept_stance(steps: Steps, name: str, session: Session, n_prompts: int) -> Stance | None:
    """What a model does on the test prompts, the first time; None where nobody asks."""
    if not n_prompts:
        return None
    return Stance.of(steps.document(name, lambda: asdict(_stance(session, n_prompts))))


def _stance(session: Session, n_prompts: int) -> Stance:
    """What a model does on test prompts, as it is and without the direction that a run would choose on it."""
    contrast, recipe = session.contrast, session.recipe
    harmful, harmless = contrast.harmful_test.prompts[:n_prompts], contrast.harmless_test.prompts[:n_prompts]
    asked = [its.text for its in (*harmful, *harmless)]
    try:
        directions, why_none = select(session, measure(session, ahead=True)), ""
    except (PromptError, TooFewPromptsError, NonFiniteError) as error:
        directions, why_none = None, error.message
        session.on_event(Noted(text=f"no direction to remove: {error.message}"))
    hooks = [nullcontext]
    hooks += [] if directions is None else [partial(without, session.loaded, directions.chosen)]
    with working(session.on_event, "reply to test prompts", len(asked) * len(hooks), "replies") as advance:
        replies = replies_under(
            session.loaded, session.chat, asked, hooks, max_new_tokens=recipe.evaluate.max_new_tokens,
            batch_size=recipe.model.batch_size, advance=advance,
        )  # fmt: skip
    read = reader(SCORERS[recipe.evaluate.scorer], session.chat)
    refused = [[read(*pair) == "refused" for pair in zip(asked, its, strict=True)] for its in replies]
    known = [(its.answer, reply) for its, reply in zip(harmless, replies[0][len(harmful) :], strict=True) if its.answer]
    return Stance(
        refused=Rate.of(refused[0][: len(harmful)]),
        over_refused=Rate.of(refused[0][len(harmful) :]),
        facts=Rate.of([holds_answer(reply, answer) for answer, reply in known]),
        without_one=None if directions is None else Rate.of(refused[1][: len(harmful)]),
        direction=why_none if directions is None else directions.chosen.id,
    )
