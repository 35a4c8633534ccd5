"""What the model does on the prompts of a recipe: which of them count, and what was measured on them.

With ``labels = "replies"`` one pass gives every prompt a short reply, which is read, and measures it.  With
``labels = "first-token"``, the paper's way, passes follow each other: one finds the refusal tokens, one filters by the
probability of them, and one measures each class.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from abliterate.errors import UsageError
from abliterate.evaluate.labels import calibration_of, check_labels, counts_of, reader, tokens_of_refusals
from abliterate.evaluate.refusal_tokens import RefusalTokens, find_refusal_tokens, given_refusal_tokens
from abliterate.evaluate.replies import SCORERS
from abliterate.method.calibration import Calibration
from abliterate.method.estimators import Need
from abliterate.method.moments import ActivationStats, Moments
from abliterate.method.places import Place
from abliterate.model import measuring
from abliterate.model.labelling import WANTED, Measured, Replies, label
from abliterate.model.lockstep import share
from abliterate.model.memory import available_bytes
from abliterate.model.outputs import outputs_of, place_of
from abliterate.recipe import Recipe
from abliterate.workflow.session import Session
from abliterate.workflow.steps import Steps

TRAIN, VALIDATION = "train", "val"


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What was found out on the training prompts.

    ``stats`` is of the prompts in ``kept``.  Where replies were read, ``labels`` counts them by class and label, and
    ``calibration`` holds the first token against them.
    """

    tokens: RefusalTokens
    kept: measuring.Filtered
    stats: ActivationStats
    labels: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    calibration: Calibration | None = None


def reads_replies(recipe: Recipe) -> bool:
    """Whether the replies of a model say which prompts count."""
    return recipe.find.filter_prompts and recipe.find.labels == "replies"


def read_training(session: Session, needs: frozenset[Need], steps: Steps, *, ahead: bool = False) -> Read:
    """Which training prompts count, and what ``needs`` names of them.

    ``ahead``: the validation prompts will be asked for as well.  Out of core they are read in the same weight passes.

    Raises:
        UsageError: no memory for the statistics that are needed.
        PromptError: no prompt of a class counts.
    """
    of_stream = needs - {"outputs"}
    read = (
        _from_replies(session, of_stream, steps, ahead=ahead)
        if reads_replies(session.recipe)
        else _one_by_one(session, of_stream, steps, ahead=ahead)
    )
    if "outputs" not in needs:
        return read
    return replace(read, stats=replace(read.stats, outputs=_outputs(session, read.kept, steps)))


def read_validation(session: Session, refusal_ids: Sequence[int], steps: Steps) -> measuring.Filtered:
    """Which validation prompts count.

    Raises:
        PromptError: no prompt of a class counts.
    """
    if reads_replies(session.recipe):
        return _kept(session, _replies(_asked(session, VALIDATION, steps)), VALIDATION)
    step = f"typical-val-{'-'.join(map(str, refusal_ids))}"  # candidates measured again may name other tokens
    return _typical(session, VALIDATION, refusal_ids, steps, step)


def _outputs(session: Session, kept: measuring.Filtered, steps: Steps) -> dict[str, dict[Place, Tensor]]:
    """What writers add on the prompts that count, by class and place, ``[n, d]``; one pass more.

    Raises:
        UsageError: no memory for it.
    """
    texts = [*kept.harmful, *kept.harmless]
    _check_room(session, frozenset({"outputs"}), at_once=1, rows=len(texts))
    found = steps.tensors("outputs", partial(outputs_of, session.loaded, session.chat, texts, **_options(session)))
    of_class = {"harmful": slice(0, len(kept.harmful)), "harmless": slice(len(kept.harmful), None)}
    return {
        kind: {place_of(name): its[rows].flatten(0, 1) for name, its in found.items()}
        for kind, rows in of_class.items()
    }


# --- from replies -----------------------------------------------------------------------------------------------------


def _from_replies(session: Session, needs: frozenset[Need], steps: Steps, *, ahead: bool) -> Read:
    _check_room(session, needs, at_once=2, rows=sum(map(len, _prompts(session, TRAIN).values())))
    together = ahead and session.loaded.offload is not None
    found = _asked(session, TRAIN, steps, needs, also=(VALIDATION,) if together else ())
    replies = _replies(found)
    kept = _kept(session, replies, TRAIN)
    given = session.recipe.find.refusal_tokens
    name = session.loaded.name
    tokens = given_refusal_tokens(session.chat, given) if given else tokens_of_refusals(name, session.chat, replies)
    stats = _stats(session, found)
    calibration = calibration_of(replies, tokens.ids)
    return Read(tokens=tokens, kept=kept, stats=stats, labels=counts_of(replies), calibration=calibration)


def _asked(
    session: Session, split: str, steps: Steps, needs: frozenset[Need] | None = None, also: Sequence[str] = ()
) -> dict[str, dict[str, Tensor]]:
    """What the pass over the prompts of ``split`` gave, by class; ``also`` are splits that share the pass."""
    joint = f"asked-{TRAIN}-{VALIDATION}"
    alone = "-".join([f"asked-{split}", *sorted(needs or ())])
    name = joint if also or (needs is None and steps.has(joint)) else alone
    found = steps.tensors(name, partial(_ask, session, (split, *also), needs))
    return {kind: _within(found, f"{split}/{kind}/") for kind in WANTED}


def _within(found: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): its for name, its in found.items() if name.startswith(prefix)}


def _ask(session: Session, splits: Sequence[str], needs: frozenset[Need] | None) -> dict[str, Tensor]:
    """One pass over the prompts of ``splits``; what is needed is measured on those of the first."""
    find = session.recipe.find
    groups = {f"{split}/{kind}": its for split in splits for kind, its in _prompts(session, split).items()}
    first = _prompts(session, splits[0])
    measured = {
        f"{splits[0]}/{kind}": Measured(
            wanted=wanted,
            needs=needs or (),
            half=half_of(len(first[kind]), seed=find.seed),
            categories=_categories(session, first[kind], needs or (), kind),
        )
        for kind, wanted in WANTED.items()
        if needs is not None
    }
    found = label(
        session.loaded,
        session.chat,
        groups,
        reader(SCORERS[session.recipe.evaluate.scorer], session.chat),
        measured,
        max_new_tokens=find.reply_tokens,
        batch_size=session.recipe.model.batch_size,
        task=f"reply to {' and '.join(NAMES[split] for split in splits)} prompts",
        on_event=session.on_event,
    )
    return {f"{group}/{name}": its for group, one in found.items() for name, its in one.items()}


NAMES = {TRAIN: "training", VALIDATION: "validation"}


def _replies(found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Replies]:
    return {kind: Replies.of(its) for kind, its in found.items()}


def _kept(session: Session, replies: Mapping[str, Replies], split: str) -> measuring.Filtered:
    check_labels(session.loaded.name, replies, reply_tokens=session.recipe.find.reply_tokens)
    prompts = _prompts(session, split)
    kept = {kind: tuple(prompts[kind][row] for row in replies[kind].where(WANTED[kind])) for kind in prompts}
    return measuring.Filtered(
        harmful=kept["harmful"], harmless=kept["harmless"],
        harmful_before=len(prompts["harmful"]), harmless_before=len(prompts["harmless"]),
    )  # fmt: skip


def _stats(session: Session, found: Mapping[str, Mapping[str, Tensor]]) -> ActivationStats:
    """The statistics in ``found``, by class (see ``ClassSums.finish``)."""
    counts = {kind: its["counts"].tolist() for kind, its in found.items()}
    return ActivationStats(
        positions=session.chat.positions,
        moments={
            kind: Moments(count=counts[kind][0], mean=its["mean"], covariance=its.get("covariance"))
            for kind, its in found.items()
        },
        samples={kind: its["samples"] for kind, its in found.items() if "samples" in its},
        halves={
            kind: halves_of(its["mean"], its["half"], *counts[kind]) for kind, its in found.items() if "half" in its
        },
        categories=_category_moments(session, found["harmful"]),
    )


def _category_moments(session: Session, harmful: Mapping[str, Tensor]) -> dict[str, Moments]:
    """The means of the categories of which prompts count, where they were measured."""
    if "category_counts" not in harmful:
        return {}
    names = sorted({prompt.category for prompt in session.contrast.harmful_train.prompts})
    counts = zip(names, harmful["category_counts"].tolist(), strict=True)
    means = iter(harmful["category_means"])
    return {name: Moments(count=count, mean=next(means)) for name, count in counts if count}


# --- one by one, as the paper does ------------------------------------------------------------------------------------


def _one_by_one(session: Session, needs: frozenset[Need], steps: Steps, *, ahead: bool) -> Read:
    """Out of core two weight passes, but for the tokens: the prompts of both splits, then the means of both classes."""
    tokens = RefusalTokens.of(steps.document("refusal-tokens", lambda: asdict(refusal_tokens(session))))
    filtering = [partial(_typical, session, TRAIN, tokens.ids, steps, "typical-train")]
    if ahead and steps.folder is not None and session.loaded.offload is not None:
        filtering.append(partial(read_validation, session, tokens.ids, steps))
    kept = share(session.loaded, filtering)[0]
    _check_room(session, needs, at_once=1, rows=len(kept.harmful) + len(kept.harmless))
    step = "-and-".join(["mean", *sorted(needs - {"means"})])
    measured = []
    for kind, texts in (("harmful", kept.harmful), ("harmless", kept.harmless)):
        options = _options(session) | {"half": half_of(len(texts), seed=session.recipe.find.seed)}
        options["categories"] = _categories(session, texts, needs, kind)
        task = f"measure {kind} prompts"
        work = partial(measuring.measure_class, session.loaded, session.chat, texts, needs, task=task, **options)
        measured.append(partial(steps.tensors, f"{step}-{kind}", work))
    # covariances of both classes at once take twice the memory
    both = [make() for make in measured] if "covariance" in needs else share(session.loaded, measured)
    found = dict(zip(WANTED, both, strict=True))
    return Read(tokens=tokens, kept=kept, stats=_stats(session, found))


def _all_of(prompts: Mapping[str, Sequence[str]]) -> measuring.Filtered:
    harmful, harmless = tuple(prompts["harmful"]), tuple(prompts["harmless"])
    return measuring.Filtered(
        harmful=harmful, harmless=harmless, harmful_before=len(harmful), harmless_before=len(harmless)
    )


def _typical(session: Session, split: str, refusal_ids: Sequence[int], steps: Steps, name: str) -> measuring.Filtered:
    """The prompts of ``split`` that behave as their class says; all of them where the recipe keeps all."""
    prompts = _prompts(session, split)
    if not session.recipe.find.filter_prompts:
        return _all_of(prompts)

    def find() -> dict[str, Any]:
        texts = prompts["harmful"], prompts["harmless"]
        task = f"filter {NAMES[split]} prompts"
        kept = measuring.keep_typical(
            session.loaded, session.chat, *texts, refusal_ids, task=task, **_options(session)
        )  # fmt: skip
        return asdict(kept)

    found = steps.document(name, find)
    return measuring.Filtered(
        harmful=tuple(found["harmful"]),
        harmless=tuple(found["harmless"]),
        harmful_before=found["harmful_before"],
        harmless_before=found["harmless_before"],
    )


def refusal_tokens(session: Session) -> RefusalTokens:
    """Those that the recipe names, or those that refusals of training prompts begin with.

    Raises:
        PromptError: the model refuses nothing, or its refusals begin like other replies.
    """
    if session.recipe.find.refusal_tokens:
        return given_refusal_tokens(session.chat, session.recipe.find.refusal_tokens)
    prompts = _prompts(session, TRAIN)
    return find_refusal_tokens(
        session.loaded, session.chat, prompts["harmful"], prompts["harmless"], **_options(session)
    )


# --- shared -----------------------------------------------------------------------------------------------------------


def half_of(count: int, *, seed: int) -> frozenset[int]:
    """A random half of the numbers below ``count``; none where there are fewer than two."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return frozenset(order[: count // 2].tolist())


def halves_of(mean: Tensor, half: Tensor, count: int, drawn: int) -> tuple[Moments, Moments]:
    """The means over ``drawn`` of ``count`` prompts and over the others, given those over the first and over all."""
    other = (count * mean - drawn * half) / (count - drawn)
    return Moments(count=drawn, mean=half), Moments(count=count - drawn, mean=other)


def _prompts(session: Session, split: str) -> dict[str, tuple[str, ...]]:
    contrast = session.contrast
    if split == TRAIN:
        return {"harmful": tuple(contrast.harmful_train.texts), "harmless": tuple(contrast.harmless_train.texts)}
    return {"harmful": tuple(contrast.harmful_val.texts), "harmless": tuple(contrast.harmless_val.texts)}


def _categories(session: Session, texts: Sequence[str], needs: Collection[Need], kind: str) -> tuple[str, ...]:
    """The categories of training prompts, where means over each are needed; harmless prompts have none."""
    if "categories" not in needs or kind != "harmful":
        return ()
    of = {prompt.text: prompt.category for prompt in session.contrast.harmful_train.prompts}
    return tuple(of[text] for text in texts)


def _options(session: Session) -> dict[str, Any]:
    return {"batch_size": session.recipe.model.batch_size, "on_event": session.on_event}


def _check_room(session: Session, needs: frozenset[Need], *, at_once: int, rows: int) -> None:
    """Check that covariances, samples of ``rows`` prompts, and means of categories fit into memory.

    Covariances take as many classes in float64 as are summed up ``at_once``, and both in float32; samples float32, and
    what the two kinds of writers of a layer add float32 as well, twice while it is put together; sums and means of
    categories float64.

    Raises:
        UsageError: they do not.
    """
    loaded, positions = session.loaded, len(session.chat.positions)
    n, d, floats = loaded.n_layers, loaded.d_model, torch.float32.itemsize
    categories = len({its.category for its in session.contrast.harmful_train.prompts}) if "categories" in needs else 0
    sizes = {
        "covariances": (at_once + 1) * n * d**2 * torch.float64.itemsize if "covariance" in needs else 0,
        "samples": rows * n * d * floats if "samples" in needs else 0,
        "outputs of writers": 2 * rows * len(session.chat.positions) * 2 * n * d * floats if "outputs" in needs else 0,
        "means of categories": 2 * categories * positions * n * d * torch.float64.itemsize,
    }
    needed, free = sum(sizes.values()), session.recipe.model.memory_bytes or available_bytes()
    if needed > free:
        what = " and ".join(name for name, size in sizes.items() if size)
        raise UsageError(
            f"{what} of {n} layers of width {d} take {needed / 2**30:,.2f} GiB of memory, and there are "
            f"{free / 2**30:,.2f}",
            "give more --memory, leave out --covariance, or choose an estimator that needs the means alone",
        )
