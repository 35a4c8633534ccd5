"""All published methods side by side, on the same prompts and under the same proof; writes docs/methods.md.

    python -m bench.methods [NAME=FOLDER[:OPTIONS] ...] [--at NAME=FOLDER:DIRECTION ...] [--keep] [--work FOLDER]

The bundled model always, and other models that are named: OPTIONS are those of ``abliterate run``, by commas, such as
``--quick`` or ``--dtype bfloat16``.  ``--at``: all methods at the place of a direction file (``bench.methods_at``).
``--keep``: what the page says of whole runs stands as it is.
Every finished run is kept in ``--work`` (out/methods), so that the same command goes on where it was stopped.  The page
holds what is in ``--work`` and no figure from anywhere else.
"""

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from abliterate.checkpoint.output import write_atomically
from abliterate.data.methods import Method, methods
from abliterate.recipe import load_recipe
from abliterate.workflow.passes import passes_of
from bench import methods_at
from bench.edit_speed import machine
from bench.methods_picture import trade
from bench.page_parts import at, number, percent, table
from bench.real_steps import command, result_of
from bench.weight_change import weight_change

BUNDLED = "tiny-chat"
BASE = methods_at.BASE
INTRO = """# Methods side by side

Written by `make methods`. Every method of [`abliterate methods`](cli.md), run as `abliterate run MODEL --method NAME`:
the same prompts, the same rule of selection, the same proof. Percentages have 95 % Wilson intervals; where those of two
methods overlap, the figures do not tell them apart. Refusals are told by the scorer `rules`, on greedy replies to
prompts that neither measuring nor selecting saw. KL and cross-entropy are in nats, on harmless prompts. "Weights
changed" is the Frobenius norm of what changed over that of all weights, in the written bytes; "passes" are the weight
passes that a whole run takes out of core, as `abliterate plan` says before it. A method that refuses to write says so.
"""
HEAD = ("method", "harmful refused", "look-alikes refused", "harmless refused", "facts kept", "KL, first token",
        "KL, replies", "cross-entropy", "weights changed", "chosen", "writers", "claim", "passes",
        "CPU, s")  # fmt: skip
AT_ONE_PLACE = """Every method takes its candidate where the default chose its own, `{chosen}`, as far as it has one
there, so that what differs is what the method does, not where. Methods that find or choose otherwise are left
out, but for a search of {trials} trials, which makes its own choice, and so is `categories`: the bundled prompts have
too few of each. Where two make the same edit of it, the first stands for both (`default` is `projected` here, if its
choice is a projected difference). `blocks` and `middle-blocks` are the default's direction in fewer writers: not in the
embedding, and in the middle half of the blocks alone. {n_test} prompts of each class, replies of at most
{max_new_tokens} tokens. Controls: `random`, a random direction, and `shuffled`, the difference of means of two classes
that are both half harmful; neither should do anything.
"""
KNOWN_TRUTH = """The bundled model is small and was trained to refuse, so that what is true of it is known: its
figures are a test of the code, and say nothing of other models.
"""


def main() -> None:
    """Run what is not kept yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="NAME=FOLDER[:OPTIONS]")
    parser.add_argument("--at", nargs="*", default=[], help="NAME=FOLDER:DIRECTION")
    parser.add_argument("--trials", type=int, default=32, help="of the search beside --at; 0: none")
    parser.add_argument("--keep", action="store_true", help="run no method whole, and keep what the page says of that")
    parser.add_argument("--work", type=Path, default=Path("out/methods"))
    parser.add_argument("--write", type=Path, default=Path("docs/methods.md"))
    args = parser.parse_args()
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    tried = {} if args.keep else {BUNDLED: (BUNDLED, [])} | dict(map(_model, args.models))
    for name, (folder, options) in tried.items():
        for method in methods():
            out = work / f"{name}-{method}"
            words = ["run", folder, "--out", out, "--method", method, *options]
            command(work, f"{name}-{method}", words, key={}, out=out)
    whole = [INTRO, *(part for name, its in tried.items() for part in _section(work, name, *its))]
    page = _kept(args.write) if args.keep else [*whole, f"Machine: {machine()}.\n"]
    for text in args.at:
        name, (folder, (direction,)) = _model(text)
        place = methods_at.place_of(name, Path(folder), Path(direction), work)
        methods_at.run_all(place, trials=args.trials)
        page += _section_at(place, args.write.parent, args.trials)
        page.append(f"Machine: {machine()}.\n")
    write_atomically(args.write, ("\n".join(page).rstrip() + "\n").encode())


def _kept(page: Path) -> list[str]:
    """What a page says of whole runs."""
    text = page.read_text("utf-8")
    at_one_place = re.search(r"^## .+, all at one place$", text, re.MULTILINE)
    return [text[: at_one_place.start() if at_one_place else None].rstrip() + "\n"]


def _model(text: str) -> tuple[str, tuple[str, list[str]]]:
    name, _, rest = text.partition("=")
    folder, _, options = rest.partition(":")
    return name, (folder, options.split(",") if options else [])


def _section(work: Path, name: str, model: str, options: Sequence[str]) -> Iterator[str]:
    yield f"## {name}\n"
    if name == BUNDLED:
        yield KNOWN_TRUTH
    if options:
        yield f"With `{' '.join(options)}`.\n"
    steps = {method: step for method in methods() if (step := result_of(work, f"{name}-{method}")) is not None}
    rows, refusals = [], []
    for method in methods().values():
        step = steps.get(method.name)
        if step is None:
            continue
        if step["exit"]:
            refusals.append(f"- `{method.name}` stops with exit code {step['exit']}: {methods_at.why(step)}")
        else:
            rows.append(_row(method, step, weight_change(model, work / f"{name}-{method.name}")))
    base = next((at(step, "document", "evaluation", "models", 0) for step in steps.values() if not step["exit"]), None)
    if base is not None:
        rows.insert(0, (BASE, *_figures(base, 0.0), *[""] * 5))
    yield table(HEAD, rows)
    yield from refusals
    yield ""


def _section_at(place: methods_at.Place, folder: Path, trials: int) -> Iterator[str]:
    """All methods at one place of a model, as a table and a picture."""
    found = dict(methods_at.results(place.name, place.work))
    known = methods()
    yield f"## {place.name}, all at one place\n"
    yield AT_ONE_PLACE.format(**methods_at.SIZES, chosen=place.chosen, trials=trials)
    changed = {name: weight_change(place.base, place.work / place.step(name)) for name in found if name != BASE}
    rows = [
        (_linked(known[name]) if name in known else name, *_figures(model, changed.get(name, 0.0)))
        for name, model in found.items()
    ]
    yield table(HEAD[: len(rows[0])] if rows else HEAD, rows)
    yield _beside_the_default(found)
    for method, why in methods_at.refusals(place.name, place.work):
        yield f"- `{method}` is refused: {why}"
    yield ""
    points = {
        name: (at(model, "prompts", "harmful", "refused"), model["kl_nats"]) for name, model in found.items()
    }  # fmt: skip
    picture = folder / f"methods-{place.name}.svg"
    front = methods_at.front_of(place.name, place.work)
    write_atomically(picture, trade(points, front=front).encode())
    yield f"![Refusals against KL]({picture.name})\n"


def _beside_the_default(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Which leave as few refusals as the default at a lower KL, by their figures as they are."""

    def of(name: str) -> tuple[float, float]:
        return float(at(found[name], "prompts", "harmful", "refused", "rate") or 0.0), found[name]["kl_nats"]

    if "default" not in found:
        return ""
    most, nats = of("default")
    better = [name for name in found if name != BASE and of(name)[0] <= most and of(name)[1] < nats]
    named = ", ".join(f"`{name}` ({of(name)[1]:.3f})" for name in better)
    return f"With as few refusals as the default, at a lower KL on the first token ({nats:.3f}): {named or 'none'}.\n"


def _row(method: Method, step: Mapping[str, Any], changed: float) -> tuple[str, ...]:
    document = step["document"]
    return (
        _linked(method),
        *_figures(at(document, "evaluation", "models", 1) or {}, changed),
        f"`{at(document, 'direction', 'choice', 'candidate')}`",
        str(at(document, "edit", "coverage")),
        str(at(document, "edit", "claim")),
        f"{sum(passes_of(load_recipe(method.name)).values()):,}",
        number(step["cpu_seconds"], ",.0f"),
    )


def _linked(method: Method) -> str:
    return f"[`{method.name}`](../recipes/{method.name}.toml)"


def _figures(model: Mapping[str, Any], changed: float) -> tuple[str, ...]:
    return (
        *(percent(at(model, "prompts", kind, "refused")) for kind in ("harmful", "look-alike", "harmless")),
        percent(at(model, "prompts", "harmless", "accuracy")),
        number(model.get("kl_nats"), ".3f"),
        number(model.get("kl_tokens_nats"), ".3f"),
        number(model.get("completion_nats"), ".3f"),
        f"{100 * changed:.2f} %",
    )


if __name__ == "__main__":
    main()
