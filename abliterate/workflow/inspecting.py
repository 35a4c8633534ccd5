"""How a model carries a direction: its component along it layer by layer, and the heads and MLPs that write it.

After Arditi et al. 2024, section 5 ("mechanistic analysis of adversarial suffixes"): a suffix that makes a model answer
takes the component along the refusal direction down, by drawing the attention of the heads that write it from the
instruction to itself.  Suffixes are given by the user; none is searched for here.
"""

import random
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.arch.registry import family_of
from abliterate.errors import UsageError
from abliterate.evaluate.inspection import SPANS, Inspected, Inspection
from abliterate.events import working
from abliterate.method.directions import DirectionSet
from abliterate.model.attribution import Attribution, attention_to_spans, attribute
from abliterate.model.chat import PROBES, ChatFormat
from abliterate.model.lockstep import share
from abliterate.workflow.session import Session

TOP_HEADS = 8
TASK = "inspect"


def inspect(
    session: Session,
    directions: DirectionSet,
    *,
    suffix: str = "",
    n_prompts: int = 32,
) -> Inspection:
    """Measure how test prompts of both classes carry the direction, and what writes it.

    With ``suffix``, harmful prompts are measured with it behind them as well, and with a random text of as many tokens.

    Raises:
        UsageError: several directions are chosen, or the direction does not fit the model.
    """
    if not directions.chosen.is_vector:
        raise UsageError(
            f"candidate {directions.chosen.id} is a subspace, and a single direction can be inspected",
            "choose a candidate of one vector, the same in all layers",
        )
    loaded, chat, batch_size = session.loaded, session.chat, session.recipe.model.batch_size
    if directions.d_model != loaded.d_model:
        raise UsageError(
            f"the direction has {directions.d_model} components, {loaded.name} has {loaded.d_model}",
            "use one that was measured on this model",
        )
    family = family_of(session.checkpoint.config, where=session.checkpoint.name)
    harmful = session.contrast.harmful_test.texts[:n_prompts]
    sets = {"harmful": harmful, "harmless": session.contrast.harmless_test.texts[:n_prompts]}
    if suffix:
        control = random_text(chat, len(_ids(chat, suffix)), seed=session.recipe.find.seed)
        sets |= {"harmful + suffix": [f"{prompt} {suffix}" for prompt in harmful]}
        sets |= {"harmful + random text": [f"{prompt} {control}" for prompt in harmful]}
    with working(session.on_event, TASK, sum(map(len, sets.values())), "prompts") as advance:

        def written(prompts: Sequence[str]) -> Attribution:
            batches = chat.batches(prompts, batch_size)
            return attribute(loaded, family, batches, directions.direction, advance=advance)

        every = share(loaded, [partial(written, prompts) for prompts in sets.values()])
        found: dict[str, Attribution] = dict(zip(sets, every, strict=True))
        heads = top_heads(found["harmful"].heads)
        attention = _attention(session, sets, harmful, heads)
    inspected = [
        Inspected(name=name, prompts=len(prompts), attribution=found[name], attention=attention[name])
        for name, prompts in sets.items()
    ]
    return Inspection(sets=tuple(inspected), heads=heads)


def top_heads(heads: Float[Tensor, "prompts layers heads"], count: int = TOP_HEADS) -> tuple[tuple[int, int], ...]:
    """The heads with the largest mean component, largest first; none where heads cannot be told apart."""
    means = heads.mean(0)
    flat = means.flatten().nan_to_num(nan=-torch.inf)
    order = flat.argsort(descending=True)[:count].tolist()
    return tuple(divmod(place, means.shape[1]) for place in order if flat[place] > -torch.inf)


def random_text(chat: ChatFormat, n_tokens: int, *, seed: int) -> str:
    """A text of about ``n_tokens`` random tokens, none of them special."""
    special = set(chat.tokenizer.all_special_ids)
    ordinary = [token for token in range(len(chat.tokenizer)) if token not in special]
    drawn = random.Random(seed).choices(ordinary, k=n_tokens)
    return str(chat.tokenizer.decode(drawn)).strip()


def spans_of(chat: ChatFormat, plain: str, prompt: str) -> tuple[slice, slice, slice]:
    """The tokens of the instruction, of the suffix and of the template behind them, counted from the end.

    ``prompt`` is ``plain``, with or without a suffix.
    """
    whole, end = len(chat.encode(prompt)), len(chat.suffix)
    added = whole - len(chat.encode(plain))
    start = _template_start(chat)
    return (slice(start - whole, -end - added), slice(-end - added, -end), slice(-end, None))


def _attention(
    session: Session, sets: Mapping[str, Sequence[str]], harmful: Sequence[str], heads: Sequence[tuple[int, int]]
) -> dict[str, Tensor]:
    """The mean attention ``[heads, spans]`` of the prompts of each set; those with a text added are ``harmful``."""
    if not heads:
        return dict.fromkeys(sets, torch.zeros(0, len(SPANS), dtype=torch.float64))
    chat, asked = session.chat, [prompt for prompts in sets.values() for prompt in prompts]
    plain = [prompt for name, prompts in sets.items() for prompt in (harmful if " + " in name else prompts)]
    spans = [spans_of(chat, *pair) for pair in zip(plain, asked, strict=True)]
    batches = chat.batches(asked, session.recipe.model.batch_size)
    found = attention_to_spans(session.loaded, batches, heads, spans).split([len(its) for its in sets.values()])
    return {name: its.mean(0) for name, its in zip(sets, found, strict=True)}


def _template_start(chat: ChatFormat) -> int:
    """Tokens before the user's text."""
    encoded = [chat.encode(probe) for probe in PROBES]
    shared = 0
    while all(len(ids) > shared for ids in encoded) and len({ids[shared] for ids in encoded}) == 1:
        shared += 1
    return shared


def _ids(chat: ChatFormat, text: str) -> list[int]:
    return list(chat.tokenizer(text, add_special_tokens=False)["input_ids"])
