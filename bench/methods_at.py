"""All methods at one place of a real model: one measurement, an edit for each, all compared with one base.

Choosing a candidate for every method takes hours on a slow machine, and what each method would do with its own choice
is another question.  Here every method takes its candidate where the default chose its own, as far as it has one there,
so that what differs is what the method does.  Only commands of abliterate are run; each is kept (``real_steps``).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from abliterate.checkpoint import direction_file
from abliterate.data.methods import methods
from abliterate.method.directions import Candidate, DirectionSet, given
from abliterate.method.estimators import ESTIMATORS
from abliterate.model.prompts import load_bundled
from abliterate.publishing.keeping import DIRECTION_FILE
from abliterate.recipe import Recipe, load_recipe
from bench.real_steps import command, result_of

SIZES = {"n_test": 50, "max_new_tokens": 32}
"""Prompts of each class, and tokens of a reply: a dozen models take hours otherwise."""
CONTROLS = ("random", "shuffled")
RANGES: Mapping[str, Sequence[str]] = {
    "blocks": ("--roles", "attention,mlp"),
    "middle-blocks": ("--roles", "attention,mlp", "--exclude-layers", "0%-33%,84%-100%"),
}
"""The default's direction, taken out of fewer writers: without the embedding, and in half of the blocks."""
BASE, SEARCH = "base", "search"
BY_CATEGORY = "category-differences"
"""Left out: the bundled prompts have eight of a category, and a model that declines a third of them leaves too few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the default chose its candidate, ``chosen``, and the checkpoint and folder that all is about."""

    name: str
    base: Path
    chosen: str
    position: int
    layer: int
    work: Path

    def step(self, what: str) -> str:
        """The name of a step."""
        return f"{self.name}-at-{what}"


def place_of(name: str, base: Path, chosen: Path, work: Path) -> Place:
    """The place that stands in a direction file.

    Raises:
        SystemExit: its candidate was read at no position.
    """
    candidate = direction_file.load(chosen).chosen
    if candidate.position is None:
        raise SystemExit(f"{chosen}: its candidate was read at no position")
    return Place(
        name=name, base=base, chosen=candidate.id, position=candidate.position, layer=candidate.layer, work=work
    )


def run_all(place: Place, *, trials: int = 0) -> None:
    """Measure, edit by every method that has a candidate at the place, and compare; kept results are not made again.

    With ``trials``, the result of a search of so many is compared as well.
    """
    recipe = _recipe(place, {})
    words = [word for name in ESTIMATORS if name != BY_CATEGORY for word in ("--estimator", name)]
    file = place.work / f"{place.name}-candidates.safetensors"
    _command(place, "measure", ["measure", place.base, *words, "--recipe", recipe, "--out", file])
    directions = direction_file.load(file)
    written = {}
    for name, candidate in edits_at(directions, place).items():
        its = direction_file.save(
            directions.choose_candidate(candidate), place.work / f"{place.name}-{name}.safetensors"
        )
        written[name] = _edited(place, name, its, name)
    for name, vector in _controls(place, directions).items():
        its = direction_file.save(given(vector), place.work / f"{place.name}-{name}.safetensors")
        written[name] = _edited(place, name, its, None)
    ours = written["default"] and place.work / f"{place.name}-default.safetensors"
    for name, options in RANGES.items() if ours else ():
        written[name] = _edited(place, name, ours, "default", options)
    if trials:
        out = place.work / place.step(SEARCH)
        words = ["run", place.base, "--out", out, "--method", SEARCH, "--trials", str(trials), "--no-eval"]
        written[SEARCH] = None if _command(place, SEARCH, words, out=out)["exit"] else out
    done = {name: out for name, out in written.items() if out is not None}
    words = ["compare", place.base, *done.values(), "--recipe", _recipe(place, SIZES)]
    _command(place, "compare", words)


def edits_at(directions: DirectionSet, place: Place) -> dict[str, str]:
    """The candidate of each method that has one at the place, but for those that make the edit of one before them."""
    found: dict[str, str] = {}
    seen = set()
    for name in methods():
        method = load_recipe(name)
        candidate = None if is_choice(method) else candidate_at(directions, method, place)
        if candidate is not None and (candidate.id, method.edit) not in seen:
            seen.add((candidate.id, method.edit))
            found[name] = candidate.id
    return found


def is_choice(recipe: Recipe) -> bool:
    """Whether a method is another way to find or choose candidates, so that it has none of its own at a place."""
    return bool(recipe.find.trained or recipe.find.trials or recipe.find.choose_by != "first-token")


def candidate_at(directions: DirectionSet, recipe: Recipe, place: Place) -> Candidate | None:
    """What the method of ``recipe`` made at the place, or nearest to being there; the first of several."""
    made = [one for one in directions.candidates if one.estimator in recipe.find.estimators]
    return min(
        made,
        key=lambda one: (one.id != place.chosen, one.layer != place.layer, one.position != place.position),
        default=None,
    )


def _edited(place: Place, name: str, direction: Path, recipe: str | None, options: Sequence[str] = ()) -> Path | None:
    """The checkpoint that a method wrote; None where it refuses."""
    out = place.work / place.step(name)
    words = ["edit", place.base, direction, "--out", out, *(["--method", recipe] if recipe else []), *options]
    done = _command(place, f"edit-{name}", words, out=out)
    return None if done["exit"] else out


def _controls(place: Place, directions: DirectionSet) -> dict[str, torch.Tensor]:
    """Directions that should do nothing: a random one, and the difference of means of shuffled classes."""
    width = directions.d_model
    random = torch.randn(width, generator=torch.Generator().manual_seed(Recipe().find.seed))
    harmful, harmless = (load_bundled("contrast", kind, "train").texts for kind in ("harmful", "harmless"))
    half = min(len(harmful), len(harmless)) // 2
    files = {}
    for side, texts in {
        "one": [*harmful[:half], *harmless[:half]], "other": [*harmful[half : 2 * half], *harmless[half : 2 * half]]
    }.items():  # fmt: skip
        files[side] = place.work / f"shuffled-{side}.txt"
        files[side].write_text("\n".join(texts) + "\n", "utf-8")
    out = place.work / f"{place.name}-shuffled-candidates.safetensors"
    sizes = {
        "n_train": half,
        "n_val": half // 4,
        "n_test": half // 4,
        "filter_prompts": False,
        "refusal_tokens": ("I",),
    }
    words = ["measure", place.base, "--harmful", files["one"], "--harmless", files["other"], "--out", out]
    _command(place, "measure-shuffled", [*words, "--recipe", _recipe(place, sizes)])
    found = direction_file.load(out).named(f"difference-of-means/{place.position}/{place.layer}")
    return dict(zip(CONTROLS, (random, found.vector), strict=True))


def _recipe(place: Place, changes: Mapping[str, Any]) -> Path:
    """A recipe file with the default and some changes."""
    text = Recipe().with_changes(changes).to_toml()
    file = place.work / ("-".join([place.name, *changes]) + ".toml")
    file.write_text(text, "utf-8")
    return file


def _command(place: Place, what: str, words: Sequence[str | Path], *, out: Path | None = None) -> dict[str, Any]:
    return command(place.work, place.step(what), words, key={}, out=out)


def results(name: str, work: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every model of the comparison, the base first, by method."""
    step = result_of(work, f"{name}-at-compare")
    if step is None or step["exit"]:
        return
    for number, model in enumerate(step["document"]["models"]):
        yield (BASE if not number else Path(model["name"]).name.removeprefix(f"{name}-at-")), model


def front_of(name: str, work: Path) -> list[tuple[float, float]]:
    """Of the trials on the Pareto front of the search: the share of prompts not answered, and the KL in nats."""
    file = work / f"{name}-at-{SEARCH}" / DIRECTION_FILE
    found = direction_file.load(file).metadata.get(SEARCH, {}).get("front", []) if file.is_file() else []
    return [((its["refused"] + its["unclear"]) / its["of"], its["kl_nats"]) for its in found]


def why(step: Mapping[str, Any]) -> str:
    """What a command said when it refused."""
    return next((line.removeprefix("error: ") for line in step["said"] if line.startswith("error:")), "").strip()


def refusals(name: str, work: Path) -> Iterator[tuple[str, str]]:
    """Methods that would not write, and why."""
    for method in methods():
        step = result_of(work, f"{name}-at-edit-{method}")
        if step is not None and step["exit"]:
            yield method, why(step)
