"""Prompt sets: bundled ones, files, and public ones.

A source is written as

- ``bundled:NAME`` - a set that ships with the package,
- a path to a ``.txt`` (one prompt per line), ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file,
- ``set:NAME[@PATH]`` - a public set of ``public_sets.toml``, from the Hub or from a local copy,
- ``hf:OWNER/NAME[/CONFIG][:COLUMN][@SPLIT]`` - any data set on the Hub,
- ``NAME=SOURCE,NAME=SOURCE,...`` - several of these, each the prompts of one category.

Data sets on the Hub need the ``datasets`` extra.
"""

import hashlib
import json
import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from abliterate.checkpoint.file_names import at_home
from abliterate.data.bundled import prompt_sets_path
from abliterate.data.tiny_chat import prompts_path
from abliterate.errors import PromptError
from abliterate.model.prompt_rows import Prompt as Prompt
from abliterate.model.prompt_rows import prompts_of_rows, rows_of_file, rows_of_hub
from abliterate.model.public_sets import PREFIX, load_pools, load_public

CONTRAST = "bundled:contrast"
LOOK_ALIKE = "bundled:over_refusal"
"""The prompts of models that no other prompts are named for."""

SPLITS = ("train", "val", "test")
NAMED = re.compile(r"(?:^|,)([\w-]+)=")
"""Begins the source of a category; a file that is called so is written ./NAME=..."""
NEAR = 0.75
"""Prompts that share more of their words than this (Jaccard index) are near-duplicates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """Some prompts and where they came from.

    ``near_duplicates`` is how many prompts of the source were left out because they nearly repeat one of an earlier
    split.  ``too_long`` is how many were, as the model has no room for them.
    """

    source: str
    prompts: tuple[Prompt, ...]
    near_duplicates: int = 0
    too_long: int = 0

    @property
    def texts(self) -> list[str]:
        """The requests alone."""
        return [prompt.text for prompt in self.prompts]

    @property
    def sha256(self) -> str:
        """Hash of the texts, in order."""
        return hashlib.sha256(json.dumps(self.texts, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastSet:
    """Harmful and harmless prompts, split three ways without overlap."""

    harmful_train: PromptSet
    harmless_train: PromptSet
    harmful_val: PromptSet
    harmless_val: PromptSet
    harmful_test: PromptSet
    harmless_test: PromptSet

    def hashes(self) -> dict[str, dict[str, Any]]:
        """Source, size and hash of each part, for the manifest."""
        parts = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            name: {
                "source": part.source,
                "count": len(part.prompts),
                "near_duplicates": part.near_duplicates,
                "too_long": part.too_long,
                "sha256": part.sha256,
            }
            for name, part in parts.items()
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSizes:
    """How many prompts of each class go where; the paper's numbers."""

    train: int = 128
    val: int = 32
    test: int = 100


def contrast_set(
    harmful: str, harmless: str, *, sizes: SplitSizes, seed: int = 42, by_category: bool = False
) -> ContrastSet:
    """Load two sources and split each into train, validation and test.

    A bundled source comes with its own splits, and the pools of a paper with their own pools.  Others are shuffled
    with ``seed`` and cut to ``sizes``; when a source is too small for them, in the same proportions.  Within a class,
    no prompt of a later split nearly repeats one of an earlier split: such prompts are left out and counted.
    ``by_category``: every harmful prompt must have a category, and a source without splits of its own is split category
    by category, each with an equal share of ``sizes``.

    Raises:
        PromptError: a source is missing, empty, too small, or shares prompts with the other one; or categories are
            wanted, and the harmful prompts are not all of one of several.
    """
    parts = {
        f"{kind}_{split}": part
        for kind, source in (("harmful", harmful), ("harmless", harmless))
        for split, part in _three_parts(
            kind, source, sizes, seed, by_category=by_category and kind == "harmful"
        ).items()
    }
    harmful_texts, harmless_texts = (
        {text for split in SPLITS for text in parts[f"{kind}_{split}"].texts} for kind in ("harmful", "harmless")
    )
    shared = harmful_texts & harmless_texts
    if shared:
        raise PromptError(
            f"{len(shared)} prompts are in both sets, for example {min(shared)[:60]!r}",
            "harmful and harmless prompts must differ",
        )
    return ContrastSet(**parts)


def load_prompts(source: str) -> PromptSet:
    """Load every prompt of ``source``, without exact duplicates.

    Raises:
        PromptError: the source cannot be read, or holds no prompt.
    """
    return _unique(source, _prompts(source))


def load_bundled(name: str, kind: str, split: str) -> PromptSet:
    """One part of a prompt set that ships with the package.

    Raises:
        PromptError: there is no such set.
    """
    folder = bundled_sets().get(name)
    if folder is None:
        raise _no_such_set(name)
    loaded = load_prompts(str(folder / f"{kind}.{split}.jsonl"))
    return replace(loaded, source=f"bundled:{name}/{kind}.{split}")


def bundled_sets() -> Mapping[str, Path]:
    """The contrast sets that ship, by name: folders of ``{harmful,harmless}.{train,val,test}.jsonl``."""
    return {"contrast": prompt_sets_path() / "contrast", "tiny-chat": prompts_path()}


def bundled_lists() -> Mapping[str, Path]:
    """The lists of prompts of one class that ship, by name."""
    return {path.stem: path for path in sorted(prompt_sets_path().glob("*.jsonl"))}


def split_three_ways(prompts: PromptSet, sizes: SplitSizes, seed: int) -> dict[str, PromptSet]:
    """Shuffle and cut into train, val and test.

    Raises:
        PromptError: fewer than six prompts, or too many of them nearly the same.
    """
    order = list(prompts.prompts)
    random.Random(seed).shuffle(order)
    wanted = sizes.train + sizes.val + sizes.test
    scale = min(1.0, len(order) / wanted)
    if len(order) < 6:
        raise PromptError(f"{prompts.source}: holds {len(order)} prompts", "give at least 6; 260 or more are good")
    n_val = max(1, min(int(sizes.val * scale), len(order) - 2))
    n_test = max(1, min(int(sizes.test * scale), len(order) - n_val - 1))
    n_train = min(sizes.train, len(order) - n_val - n_test)
    return _draw(prompts.source, dict.fromkeys(SPLITS, order), SplitSizes(train=n_train, val=n_val, test=n_test))


def nearly_same(one: str, other: str) -> bool:
    """Whether two prompts share more than ``NEAR`` of their words, whatever their order, case and punctuation."""
    return _near(_words(one), _words(other))


def split_by_category(source: str, sizes: SplitSizes, seed: int) -> dict[str, PromptSet]:
    """``split_three_ways`` of the prompts of each category, to an equal share of ``sizes``, and the parts put together.

    Raises:
        PromptError: as there, of a category; or prompts have no category, several, or all the same.
    """
    rows = _prompts(source)
    prompts, known = _unique(source, rows), {}
    for row in rows:
        if known.setdefault(row.text, row.category) != row.category:
            raise PromptError(
                f"{source}: {row.text[:60]!r} is of two categories, {known[row.text]!r} and {row.category!r}",
                "leave it in one of them",
            )
    names = categories_of(prompts)
    share = SplitSizes(**{split: math.ceil(getattr(sizes, split) / len(names)) for split in SPLITS})
    cut = [
        split_three_ways(
            replace(
                prompts,
                source=f"{prompts.source}, category {name}",
                prompts=tuple(prompt for prompt in prompts.prompts if prompt.category == name),
            ),
            share,
            seed,
        )
        for name in names
    ]
    pools = {split: [prompt for its in cut for prompt in its[split].prompts] for split in SPLITS}
    drawn = _draw(prompts.source, pools, SplitSizes(**{split: len(its) for split, its in pools.items()}))
    near = {split: sum(its[split].near_duplicates for its in cut) for split in SPLITS}
    return {split: replace(its, near_duplicates=its.near_duplicates + near[split]) for split, its in drawn.items()}


def categories_of(prompts: PromptSet) -> tuple[str, ...]:
    """The categories of ``prompts``, in alphabetical order.

    Raises:
        PromptError: a prompt has none, or all have the same.
    """
    without = [prompt.text for prompt in prompts.prompts if not prompt.category]
    if without:
        raise PromptError(
            f"{prompts.source}: {len(without)} of {len(prompts.prompts)} prompts have no category, for example "
            f"{without[0][:60]!r}",
            "give every row a 'category', or one source for each: --harmful NAME=SOURCE,NAME=SOURCE",
        )
    names = tuple(sorted({prompt.category for prompt in prompts.prompts}))
    if len(names) == 1:
        raise PromptError(f"{prompts.source}: all prompts are of one category, {names[0]!r}", "give two or more")
    return names


def named_sources(source: str) -> dict[str, str]:
    """The sources in ``NAME=SOURCE,NAME=SOURCE``, by name; none where ``source`` does not begin with a name.

    Raises:
        PromptError: a name stands there twice.
    """
    if not NAMED.match(source):
        return {}
    _, *parts = NAMED.split(source)
    twice = [name for name, count in Counter(parts[::2]).items() if count > 1]
    if twice:
        raise PromptError(f"{source}: category {twice[0]!r} is named twice", "put its prompts into one source")
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _three_parts(kind: str, source: str, sizes: SplitSizes, seed: int, *, by_category: bool) -> dict[str, PromptSet]:
    name = source.removeprefix("bundled:")
    if source.startswith("bundled:") and name not in bundled_lists():
        parts = {split: load_bundled(name, kind, split) for split in SPLITS}
        parts = {split: replace(part, prompts=part.prompts[: getattr(sizes, split)]) for split, part in parts.items()}
    elif (pools := load_pools(source, seed)) is not None:
        for prompts in pools.values():
            random.Random(seed).shuffle(prompts)
        parts = _draw(source, pools, sizes)
    elif by_category:
        return split_by_category(source, sizes, seed)
    else:
        return split_three_ways(load_prompts(source), sizes, seed)
    if by_category:
        for part in parts.values():
            categories_of(part)
    return parts


def _draw(source: str, pools: Mapping[str, Sequence[Prompt]], sizes: SplitSizes) -> dict[str, PromptSet]:
    """The first prompts of each pool that are in no earlier split, and nearly in none."""
    taken: list[frozenset[str]] = []
    texts: set[str] = set()
    parts = {}
    for split in SPLITS:
        chosen: list[Prompt] = []
        near = 0
        for prompt in _unique(source, pools[split]).prompts:
            if len(chosen) == getattr(sizes, split):
                break
            if prompt.text in texts:
                continue
            words = _words(prompt.text)
            if any(_near(words, other) for other in taken):
                near += 1
                continue
            chosen.append(prompt)
        if not chosen:
            raise PromptError(
                f"{source}: no prompt is left for {split}: {near} nearly repeat others", "give more varied prompts"
            )
        texts.update(prompt.text for prompt in chosen)
        taken += [_words(prompt.text) for prompt in chosen]
        parts[split] = PromptSet(source=f"{source}#{split}", prompts=tuple(chosen), near_duplicates=near)
    return parts


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.casefold()))


def _near(one: frozenset[str], other: frozenset[str]) -> bool:
    return len(one & other) > NEAR * len(one | other)


def _unique(source: str, prompts: Sequence[Prompt]) -> PromptSet:
    unique = list({prompt.text: prompt for prompt in prompts if prompt.text.strip()}.values())
    if not unique:
        raise PromptError(f"{source}: holds no prompt", "give one prompt per line, or a table with a 'prompt' column")
    return PromptSet(source=source, prompts=tuple(unique))


def _prompts(source: str) -> list[Prompt]:
    if named := named_sources(source):
        return [replace(its, category=name) for name, one in named.items() for its in load_prompts(one).prompts]
    if source.startswith(PREFIX):
        return load_public(source)
    if source.startswith("hf:"):
        return _from_hub(source)
    path = at_home(source)
    if source.startswith("bundled:"):
        name = source.removeprefix("bundled:")
        if name not in bundled_lists():
            raise _no_such_set(name)
        path = bundled_lists()[name]
    return prompts_of_rows(rows_of_file(path), source)


def _from_hub(source: str) -> list[Prompt]:
    name, _, split = source.removeprefix("hf:").partition("@")
    name, _, column = name.partition(":")
    owner, _, rest = name.partition("/")
    repo, _, config = rest.partition("/")
    rows = rows_of_hub(f"{owner}/{repo}", config=config or None, split=split or "train", source=source)
    return prompts_of_rows(rows, source, column or None)


def _no_such_set(name: str) -> PromptError:
    known = ", ".join(sorted([*bundled_sets(), *bundled_lists()]))
    return PromptError(f"bundled:{name}: no such prompt set", f"there are: {known}")
