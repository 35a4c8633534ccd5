"""Which edit of a writer behind a norm comes closest to inference-time ablation?

    python -m bench.post_norm [--write docs/post-norm.md]

For every class B case of the tests, with gains of two spreads, a random direction and one that carries much of the
stream, and for the trained Gemma 3 of the tests: the divergence from the hooked model of four edits, in float64.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import geometric_mean
from unittest import mock

import torch

from abliterate.arch.edit_plan import EditPlan
from abliterate.editing.planning import along, plan
from abliterate.method import edits
from abliterate.model.interventions import observed
from abliterate.model.load import quiet_transformers
from abliterate.recipe import Recipe
from abliterate.workflow import pipeline
from abliterate.workflow.session import open_session
from tests import equivalence, factories, zoo

FORMS: Mapping[str, tuple[float, ...] | None] = {
    "plain": None,
    "orthogonal to g r": (1e9,),
    "oblique": (0.0,),
    "regularised": edits.RIDGE_GRID,
}
SPREADS = (0.3, 0.7)
TRAINED = Path("tests/models/tiny-gemma3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One model and direction: divergence (nats) of each form, worst predicted error and longest write vector."""

    name: str
    direction: str
    divergence: dict[str, float]
    plain_share: float
    predicted: float
    length: float


def spread_gains(model: torch.nn.Module, spread: float) -> None:
    """Make every norm's gain ``exp(spread * randn)``."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.ndim == 1:
                gain = torch.exp(spread * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
                one_more = type(model).__name__.startswith(("Gemma2", "Gemma3"))  # these store the gain less one
                parameter.copy_(gain - 1 if one_more else gain)


def mean_state(base: Path, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """The mean residual entering the last block: a direction that carries much of the stream."""
    model = factories.load(base)
    loaded = equivalence.attached(base, model)
    seen: dict[int, torch.Tensor] = {}
    with factories.really_float64(), torch.no_grad(), observed(loaded, lambda at, x: seen.__setitem__(at, x)):
        model(factories.token_ids(batch=4, length=16) if tokens is None else tokens)
    return seen[max(seen)].reshape(-1, loaded.d_model).mean(0)[:, None]


def measure(
    base: Path,
    name: str,
    kind: str,
    direction: torch.Tensor,
    work: Path,
    tokens: torch.Tensor | None = None,
    *,
    memory_bytes: int = 1,
    forms: Mapping[str, tuple[float, ...] | None] = FORMS,
) -> Row:
    """All ``forms`` of the edit of one model, on ``tokens`` or random ones; ``memory_bytes`` is for the editor."""
    hooked, _ = equivalence.logits_and_share(base, factories.load(base), direction, hooks=True, tokens=tokens)
    divergence, shares = {}, {}
    for form, grid in forms.items():
        made = plan(base)
        if grid is None:
            made = without_norms(made)
        with mock.patch.object(edits, "RIDGE_GRID", grid or edits.RIDGE_GRID):
            edited = equivalence.edit(made, direction, work / form.replace(" ", "-"), memory_bytes=memory_bytes)
        model = factories.load(edited)
        ours, shares[form] = equivalence.logits_and_share(edited, model, direction, hooks=False, tokens=tokens)
        divergence[form] = equivalence.kl(hooked, ours)
    behind = [p for p in along(plan(base), edits.removing(direction)).edits.values() if p.predicted_error]
    return Row(
        name=name, direction=kind, divergence=divergence, plain_share=shares["plain"],
        predicted=max(p.predicted_error for p in behind), length=max(float(p.write.norm()) for p in behind),
    )  # fmt: skip


def without_norms(made: EditPlan) -> EditPlan:
    """The plan of someone who overlooks the norms."""
    return dataclasses.replace(made, writers=tuple(dataclasses.replace(writer, norms=()) for writer in made.writers))


def rows() -> Iterator[Row]:
    """Every case."""
    for name in zoo.CLASS_B:
        for spread in SPREADS:
            with tempfile.TemporaryDirectory() as folder:
                model = factories.build(name)
                spread_gains(model, spread)
                base = factories.save(model, Path(folder) / "base")
                for kind, direction in (("random", factories.random_directions(48)), ("mean state", mean_state(base))):
                    yield measure(base, f"{name}, gains exp({spread} randn)", kind, direction, Path(folder) / kind)
    source = "bundled:tiny-chat"
    session = open_session(TRAINED, Recipe(harmful=source, harmless=source))
    chosen = pipeline.select(session, pipeline.measure(session)).direction.double()[:, None]
    encoded = [session.chat.encode(prompt) for prompt in session.contrast.harmful_test.prompts]
    longest = max(map(len, encoded))
    tokens = torch.tensor([ids for ids in encoded if len(ids) == longest])
    for kind, direction in (("refusal", chosen), ("random", factories.random_directions(len(chosen)))):
        with tempfile.TemporaryDirectory() as folder:
            yield measure(TRAINED, "trained Gemma 3, its own gains", kind, direction, Path(folder), tokens)


def main() -> None:
    """Measure and print, or write the page."""
    parser = argparse.ArgumentParser(description="Which edit behind a norm comes closest to inference-time ablation?")
    parser.add_argument("--write", type=Path, help="replace the tables of this page")
    args = parser.parse_args()
    quiet_transformers()
    lines = [
        f"| model | r | {' | '.join(FORMS)} | r left by plain | J | \\|a\\| |",
        "|---|---|" + "--:|" * (len(FORMS) + 3),
    ]
    found = []
    for row in rows():
        found.append(row)
        best = min(row.divergence.values())
        cells = [f"**{value:.1e}**" if value <= best * 1.0001 else f"{value:.1e}" for value in row.divergence.values()]
        lines.append(
            f"| {row.name} | {row.direction} | {' | '.join(cells)} | {row.plain_share:.0e} "
            f"| {row.predicted:.0e} | {row.length:.1f} |"
        )
        print(lines[-1], flush=True)
    means = {form: geometric_mean(max(row.divergence[form], 1e-18) for row in found) for form in FORMS}
    wins = {form: sum(row.divergence[form] <= min(row.divergence.values()) * 1.0001 for row in found) for form in FORMS}
    lines += ["", "| | " + " | ".join(FORMS) + " |", "|---|" + "--:|" * len(FORMS)]
    lines.append("| geometric mean, nats | " + " | ".join(f"{value:.1e}" for value in means.values()) + " |")
    lines.append(f"| closest, of {len(found)} | " + " | ".join(str(value) for value in wins.values()) + " |")
    print("\n".join(lines[-3:]))
    if args.write:
        page = args.write.read_text("utf-8")
        start, end = "<!-- measured -->", "<!-- end -->"
        before, after = page.split(start)[0], page.split(end)[1]
        args.write.write_text("\n".join([before + start, *lines, end]) + after, "utf-8")


if __name__ == "__main__":
    main()
