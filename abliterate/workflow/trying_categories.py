"""The directions of categories of prompts, each by itself: how alike they are, and what removing or adding one does.

After Joad et al. (arXiv 2602.02132).  All by hooks: nothing is written.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import torch

from abliterate.errors import PromptError, UsageError
from abliterate.evaluate.category_report import CategoryReport, Change, Tried
from abliterate.evaluate.observing import HARMLESS, LOOK_ALIKE
from abliterate.evaluate.replies import REFUSALS, SCORERS, ReplyClass, classes_of
from abliterate.evaluate.reply_text import open_thinking
from abliterate.events import Noted, working
from abliterate.method.directions import DirectionSet
from abliterate.method.estimators import CATEGORIES
from abliterate.method.linalg import cosine
from abliterate.method.statistics import Rate
from abliterate.model.changed import Intervention, replies_under
from abliterate.model.interventions import added, without
from abliterate.model.prompts import ContrastSet, load_prompts
from abliterate.model.thinking import prompt_ending
from abliterate.workflow.session import Session, prompts_of

STRENGTHS = (-1.0, -0.5, 0.5, 1.0)
"""Of what is added, in lengths of the difference of means."""
TASK = "reply with and without directions"

_What = tuple[Change, str | None, float | None]


def try_categories(
    session: Session, directions: DirectionSet, *, strengths: Sequence[float] = STRENGTHS, n_prompts: int = 32
) -> CategoryReport:
    """Cosines of the directions that were chosen, and replies with each removed, with all, and with each added.

    What is added is added at its layer, in every one of ``strengths``.  Greedy replies to at most ``n_prompts`` test
    prompts of each category, harmless ones and look-alikes, if the recipe names any.

    Raises:
        UsageError: what was chosen has no categories, one direction is zero, or they do not fit the model.
        PromptError: no test prompt is of these categories.
    """
    _check(session, directions)
    harmful, harmless = _prompts(session, directions, n_prompts)
    every = [*harmful.items(), *harmless.items()]
    asked = [text for _, texts in every for text in texts]
    changes = _changes(session, directions, strengths)
    loaded, chat, recipe = session.loaded, session.chat, session.recipe
    with working(session.on_event, TASK, len(asked) * len(changes), "replies") as advance:
        replies = replies_under(
            loaded, chat, asked, [its for _, its in changes], max_new_tokens=recipe.evaluate.max_new_tokens,
            batch_size=recipe.model.batch_size, advance=advance,
        )  # fmt: skip
    scorer, opening = SCORERS[recipe.evaluate.scorer], open_thinking(prompt_ending(chat.tokenizer, chat.options))
    tried = []
    for (change, category, strength), its in zip((what for what, _ in changes), replies, strict=True):
        classes = classes_of(asked, its, scorer, opening=opening)
        tried.append(
            Tried(
                change=change, category=category, strength=strength,
                refused=_refused(harmful, classes), over_refused=_refused(harmless, classes[-_count(harmless) :]),
                broken=Rate.of(one in ("degenerate", "empty") for one in classes),
            )
        )  # fmt: skip
    vectors = directions.chosen.everywhere.vectors.T
    return CategoryReport(
        candidate=directions.chosen.id,
        layer=directions.chosen.layer,
        position=directions.chosen.position,
        categories=directions.categories,
        cosines=tuple(tuple(float(cosine(a, b)) for b in vectors) for a in vectors),
        tried=tuple(tried),
    )


def _check(session: Session, directions: DirectionSet) -> None:
    chosen, loaded = directions.chosen, session.loaded
    if not directions.categories:
        raise UsageError(
            f"candidate {chosen.id} holds no directions of categories",
            "measure and select with --method categories, or choose a candidate of it with --position and --layer",
        )
    if directions.d_model != loaded.d_model or chosen.layer >= loaded.n_layers:
        raise UsageError(
            f"candidate {chosen.id} of width {directions.d_model} does not fit {loaded.name}, {loaded.n_layers} layers "
            f"of width {loaded.d_model}",
            "use one that was measured on this model",
        )
    for name, vector in zip(directions.categories, chosen.everywhere.vectors.T, strict=True):
        if not torch.any(vector):
            raise UsageError(f"candidate {chosen.id}: the direction of {name!r} is zero", "choose another layer")


def _changes(
    session: Session, directions: DirectionSet, strengths: Sequence[float]
) -> list[tuple[_What, Intervention]]:
    """Every intervention, and what it is."""
    loaded, chosen = session.loaded, directions.chosen
    alone = {name: directions.of_category(name).chosen for name in directions.categories}
    changes: list[tuple[_What, Intervention]] = [(("nothing", None, None), nullcontext)]
    for name, its in alone.items():
        changes.append((("removed", name, None), partial(without, loaded, its)))
    changes.append((("removed", None, None), partial(without, loaded, chosen)))
    for name, its in alone.items():
        for strength in strengths:
            add = partial(added, loaded, its.vector, chosen.layer, scale=strength)
            changes.append((("added", name, strength), add))
    return changes


def _prompts(
    session: Session, directions: DirectionSet, most: int
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Test prompts by category, and harmless ones by kind."""
    contrast = prompts_of(session.recipe.with_changes({"estimators": (CATEGORIES,)}))
    _say_if_measured(session, directions, contrast)
    test = contrast.harmful_test.prompts
    harmful = {
        name: [prompt.text for prompt in test if prompt.category == name][:most] for name in directions.categories
    }
    if not any(harmful.values()):
        raise PromptError(
            f"{contrast.harmful_test.source}: no prompt is of the categories {', '.join(harmful)}",
            "give the prompts that the directions were measured with",
        )
    if missing := [name for name, texts in harmful.items() if not texts]:
        session.on_event(Noted(text=f"no test prompts of these categories: {', '.join(missing)}"))
    harmless = {HARMLESS: contrast.harmless_test.texts[:most]}
    if session.recipe.evaluate.look_alike:
        harmless[LOOK_ALIKE] = load_prompts(session.recipe.evaluate.look_alike).texts[:most]
    return harmful, harmless


def _say_if_measured(session: Session, directions: DirectionSet, contrast: ContrastSet) -> None:
    """Say where the test prompts may be among those that the directions were measured with."""
    measured = directions.metadata.get("prompts", {}).get("harmful_train", {}).get("sha256")
    if measured not in (None, contrast.harmful_train.sha256):
        text = "the directions were measured with other prompts than these, or other sizes: they may have seen the test"
        session.on_event(Noted(text=f"{text} prompts"))


def _refused(prompts: Mapping[str, Sequence[str]], classes: Sequence[ReplyClass]) -> dict[str, Rate]:
    """How many prompts of each kind are refused; the first of ``classes`` belong to them, in order."""
    rest = iter(classes)
    return {kind: Rate.of(next(rest) in REFUSALS for _ in texts) for kind, texts in prompts.items()}


def _count(prompts: Mapping[str, Sequence[str]]) -> int:
    return sum(map(len, prompts.values()))
