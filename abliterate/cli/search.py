"""What a search found, as a table for people."""

from typing import TYPE_CHECKING, Any

from abliterate.cli.console import out
from abliterate.cli.tables import table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from abliterate.method.directions import DirectionSet
    from abliterate.method.kernel import WeightKernel


def show_search(directions: "DirectionSet") -> None:
    """The trials on the Pareto front, the one that was taken, and why; nothing where nothing was searched."""
    found = directions.metadata.get("search")
    if found is None:
        return
    rows, taken = list(found["front"]), found["taken"]
    if taken not in rows:
        rows.append(taken)
    shown = table(
        f"{found['trials']} trials of the search along {found['estimator']}: {len(found['front'])} on the Pareto front",
        "", "trial", "refused", "unclear", "KL", "direction", "attention", "MLP", right=(1, 2, 3, 4),
    )  # fmt: skip
    for row in rows:
        shown.add_row(
            "→" if row["number"] == taken["number"] else "",
            str(row["number"]),
            f"{row['refused']} of {row['of']}",
            str(row["unclear"]),
            f"{row['kl_nats']:.3f} ± {row['kl_error_nats']:.3f}",
            *_in_words(row["parameters"]),
        )
    out.print(shown)
    broken = found["trials"] - found["finite"]
    out.print(
        f"taken: trial {taken['number']}, {found['why']}" + (f"; {broken} broke the model" if broken else ""),
        markup=False,
    )
    out.print("weights: at the peak → at the end of the reach, in blocks; another trial: --trial N", style="dim")


def _in_words(parameters: "Mapping[str, Any]") -> tuple[str, str, str]:
    """Where the direction comes from, and both kernels."""
    from abliterate.method.kernel import LAYER, PER_LAYER, kernels_of

    kernels = kernels_of(parameters)
    where = "of each layer" if parameters[PER_LAYER] else f"layer {parameters[LAYER]:.1f}"
    return where, _kernel(kernels["attention"]), _kernel(kernels["MLP"])


def _kernel(its: "WeightKernel") -> str:
    return f"{its.most:.2f} → {its.least:.2f}, {its.peak:.1f} ± {its.reach:.1f}" if its.most else "–"
