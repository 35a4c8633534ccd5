"""How firmly a model refuses: what separates its prompts, how many directions hold its refusals, and where they sit.

All by hooks: nothing is written.  What is measured is how many prompts are refused, and what else changes.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from abliterate.arch.registry import family_of
from abliterate.errors import PromptError
from abliterate.evaluate.audit_report import Audit, Group, Tried, Writes
from abliterate.evaluate.edit_found import EditFound
from abliterate.evaluate.replies import REFUSALS, SCORERS, ReplyClass, classes_of
from abliterate.evaluate.reply_text import open_thinking
from abliterate.events import working
from abliterate.method.directions import Candidate, DirectionSet, Subspace
from abliterate.method.estimators import DIFFERENCE_OF_MEANS, SOM, estimate, needs_of
from abliterate.method.places import IN_BLOCKS
from abliterate.method.scope import Scope
from abliterate.method.separation import principal, separations
from abliterate.method.statistics import Rate, exact_kl_nats
from abliterate.model.attribution import attribute
from abliterate.model.changed import Intervention, replies_under
from abliterate.model.forward import last_log_probs
from abliterate.model.interventions import added, without
from abliterate.model.lockstep import share
from abliterate.model.thinking import prompt_ending
from abliterate.verification.comparison import diff
from abliterate.workflow.finding import read_and_measure, select
from abliterate.workflow.reading import Read
from abliterate.workflow.session import Session
from abliterate.workflow.steps import Steps
from abliterate.workflow.trials import control_candidates

MOST_DIRECTIONS = 8
MOST_BLOCKS = 8
"""Of which the difference of means is tried, whichever a run chooses."""
THIRDS = ("first", "second", "last")
DOSES = (0.25, 0.5, 0.75)
"""Of the direction, how much is removed; all of it is among the directions."""
STRENGTHS = (0.125, 0.25, 0.5, 1.0)
"""Of what is added, in lengths of the difference of means."""
MOST_WRITES = 8
"""Heads and MLPs in the report."""
FEWEST_REFUSALS = 8
"""Of the test prompts, or a quarter of them where they are fewer than four times as many."""
TASK = "reply under each intervention"

_What = tuple[Group, str, int]


def audit(session: Session, *, n_prompts: int = 32, steps: Steps | None = None) -> Audit:
    """Audit the model of ``session`` on at most ``n_prompts`` test prompts of each class.

    The direction is measured and chosen as a run does it.  Directions of other kinds are taken where it lies, and the
    differences of means of other blocks, which the rules of a run may leave out.

    Raises:
        PromptError: the prompts are unusable, or the model refuses too few of the test prompts for anything to fall.
    """
    steps = steps or Steps()
    find = session.recipe.find
    read, measured = read_and_measure(session, needs_of([*find.estimators, SOM]), steps, ahead=True)
    directions = select(session, measured, steps=steps)
    tried = _tried(session, directions, read, n_prompts)
    base = tried[0]
    if base.refused.hits < min(FEWEST_REFUSALS, max(1, base.refused.count // 4)):
        raise PromptError(
            f"{session.checkpoint.name}: declines {base.refused.hits} of {base.refused.count} harmful test prompts: "
            "there is no refusal to audit",
            "use prompts that this model declines",
        )
    samples = read.stats.samples
    return Audit(
        model=session.checkpoint.name,
        candidate=directions.chosen.id,
        layer=directions.chosen.layer,
        separations=separations(samples["harmful"], samples["harmless"], seed=find.seed),
        tried=tuple(tried),
        writes=_writes(session, directions, n_prompts),
    )


def edit_of(session: Session, edited: str, *, revision: str | None = None, steps: Steps | None = None) -> EditFound:
    """Whether the base of ``session`` was abliterated in the checkpoint ``edited``, where, along what, how completely.

    By the weights alone; the direction that is found on the base today is held against what was removed.

    Raises:
        SourceError: one of the two cannot be read.
        PromptError: no direction is found on the base.
    """
    steps = steps or Steps()
    found = diff(session.checkpoint.folder, edited, revision=revision, on_event=session.on_event)
    base = session.checkpoint.name
    if not any(its.projected for its in found.changed):
        return EditFound.of_diff(found, base)
    _, measured = read_and_measure(session, needs_of(session.recipe.find.estimators), steps, ahead=True)
    chosen = select(session, measured, steps=steps).chosen
    today = chosen.vector if chosen.is_vector else None
    return EditFound.of_diff(found, base, today=today, candidate=chosen.id)


def _tried(session: Session, directions: DirectionSet, read: Read, n_prompts: int) -> list[Tried]:
    """The model under every intervention; out of core they share their weight passes."""
    loaded, chat, recipe = session.loaded, session.chat, session.recipe
    harmful = session.contrast.harmful_test.texts[:n_prompts]
    harmless = session.contrast.harmless_test.texts[:n_prompts]
    asked, every = [*harmful, *harmless], list(_interventions(session, directions, read))
    hooks = [its for _, its in every]
    with working(session.on_event, TASK, len(asked) * len(every), "replies") as advance:
        replies = replies_under(
            loaded, chat, asked, hooks, max_new_tokens=recipe.evaluate.max_new_tokens,
            batch_size=recipe.model.batch_size, advance=advance,
        )  # fmt: skip

    def first_tokens(intervention: Intervention) -> torch.Tensor:
        with intervention():
            return last_log_probs(loaded, chat, harmless, batch_size=recipe.model.batch_size)

    firsts = share(loaded, [partial(first_tokens, its) for its in hooks])
    scorer, opening = SCORERS[recipe.evaluate.scorer], open_thinking(prompt_ending(chat.tokenizer, chat.options))
    found = []
    for ((group, name, k), _), its, first in zip(every, replies, firsts, strict=True):
        classes = classes_of(asked, its, scorer, opening=opening)
        of_harmful, of_harmless = classes[: len(harmful)], classes[len(harmful) :]
        refused = _rate(of_harmful, REFUSALS)
        found.append(
            Tried(
                group=group, name=name, k=k, refused=refused, over_refused=_rate(of_harmless, REFUSALS),
                late=Rate(hits=of_harmful.count("delayed"), count=refused.hits),
                broken=_rate(classes, ("degenerate", "empty")),
                kl_nats=float(exact_kl_nats(firsts[0], first).mean()),
            )
        )  # fmt: skip
    return found


def _writes(session: Session, directions: DirectionSet, n_prompts: int) -> tuple[Writes, ...]:
    """Which heads and MLPs write the chosen direction before it is read, by the means of both classes.

    A head's share is what it adds more on harmful prompts, of what enters the block more (Arditi et al. 2024, sec. 5).
    """
    chosen = directions.chosen
    if not chosen.is_vector:
        return ()
    harmful = session.contrast.harmful_test.texts[:n_prompts]
    asked = [*harmful, *session.contrast.harmless_test.texts[:n_prompts]]
    with working(session.on_event, "what writes the direction", len(asked), "prompts") as advance:
        batches = session.chat.batches(asked, session.recipe.model.batch_size)
        family = family_of(session.checkpoint.config, where=session.checkpoint.name)
        found = attribute(session.loaded, family, batches, directions.direction, advance=advance)

    def more(values: Tensor) -> Tensor:
        return values[: len(harmful)].mean(0) - values[len(harmful) :].mean(0)

    whole, heads = float(more(found.stream)[chosen.layer]), more(found.heads)
    shares = {f"MLP {layer}": its / whole for layer, its in enumerate(more(found.mlp)[: chosen.layer].tolist())}
    for layer, its in enumerate(more(found.attention)[: chosen.layer].tolist()):
        if heads[layer].isnan().any():
            shares[f"attention {layer}"] = its / whole
        else:
            shares |= {f"head {layer}.{head}": value / whole for head, value in enumerate(heads[layer].tolist())}
    most = sorted(shares, key=lambda name: -abs(shares[name]))[:MOST_WRITES]
    return tuple(Writes(name=name, share=shares[name]) for name in most)


def _rate(classes: Sequence[ReplyClass], wanted: Sequence[ReplyClass]) -> Rate:
    return Rate.of(one in wanted for one in classes)


def _interventions(session: Session, directions: DirectionSet, read: Read) -> Iterator[tuple[_What, Intervention]]:
    """What is tried, in the order of the report."""
    loaded, chosen = session.loaded, directions.chosen
    yield ("as it is", "as it is", 0), nullcontext
    name, control = next(control_candidates(directions, seed=session.recipe.find.seed))
    yield ("control", name, 1), partial(without, loaded, control)
    for k, name, candidate in _directions(directions, read):
        yield ("directions", name, k), partial(without, loaded, candidate)
    everywhere = frozenset(range(loaded.n_layers))
    for name, candidate in _of_blocks(loaded.n_layers, read):
        yield ("blocks", name, 1), partial(without, loaded, candidate)
    for place, third in enumerate(THIRDS):
        first, end = place * loaded.n_layers // 3, (place + 1) * loaded.n_layers // 3
        scope = Scope(kinds=frozenset(IN_BLOCKS), left_out=everywhere - set(range(first, end)))
        yield ("where", f"in the {third} third of the blocks", 1), partial(without, loaded, chosen, scope)
    for kind in IN_BLOCKS:
        yield ("where", f"in {kind} alone", 1), partial(without, loaded, chosen, Scope(kinds=frozenset([kind])))
    for dose in DOSES:
        yield ("dose", f"{dose:g} of it removed", 1), partial(without, loaded, chosen, Scope(strength=dose))
    vector = chosen.everywhere.added
    for strength in STRENGTHS:
        add: Intervention = partial(added, loaded, vector, chosen.layer, scale=strength)
        yield ("dose", f"{strength:g} of it added", 0), add


def _directions(directions: DirectionSet, read: Read) -> Iterator[tuple[int, str, Candidate]]:
    """The chosen direction, maps and principal directions where it lies, by how many they are."""
    chosen, samples = directions.chosen, read.stats.samples
    yield chosen.everywhere.k, f"chosen: {chosen.id}", chosen
    for one in estimate(read.stats, [SOM]):
        if one.layer == chosen.layer:
            yield one.everywhere.k, f"map of {one.everywhere.k}", one
    harmful, harmless = samples["harmful"][:, chosen.layer], samples["harmless"][:, chosen.layer].double().mean(0)
    vectors = principal(harmful, harmless, MOST_DIRECTIONS).float()
    for k in range(1, vectors.shape[1] + 1):
        subspace = Subspace(vectors=vectors[:, :k].contiguous())
        candidate = Candidate(id=f"principal/{k}/{chosen.layer}", subspace=subspace, layer=chosen.layer, provenance={})
        yield k, f"principal {k}", candidate


def _of_blocks(n_layers: int, read: Read) -> Iterator[tuple[str, Candidate]]:
    """The difference of means at the last token, of what enters some of the blocks, evenly among all but the first."""
    count = min(MOST_BLOCKS, n_layers - 1)
    layers = {1 + (2 * place + 1) * (n_layers - 1) // (2 * count) for place in range(count)}
    for one in estimate(read.stats, [DIFFERENCE_OF_MEANS]):
        if one.position == -1 and one.layer in layers and one.everywhere.usable:
            yield f"difference of block {one.layer}", one
