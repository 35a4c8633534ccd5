"""Tables and figures of pages that benchmarks write, from the JSON documents of commands."""

from collections.abc import Mapping, Sequence
from typing import Any

RATES = {"refused": "refused", "delayed": "refused late, of these", "degenerate": "empty or broken"}
NATS = {
    "kl_nats": "KL to the base, first token, nats",
    "kl_tokens_nats": "KL to the base, along its replies, nats",
    "completion_nats": "cross-entropy on the base's replies, nats",
    "text_nats": "cross-entropy on the text, nats",
}
Rows = Sequence[Sequence[str]]


def table(head: Sequence[str], rows: Rows, *, left: int = 1) -> str:
    """A table in Markdown; all columns but the first ``left`` hold figures."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * left + "--:|" * (len(head) - left)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def at(document: Any, *path: str | int) -> Any:  # noqa: ANN401 - plain data
    """What stands at ``path``; None where there is no such thing."""
    for key in path:
        try:
            document = document[key]
        except (KeyError, IndexError, TypeError):
            return None
    return document


def number(value: float | None, form: str = ".4f") -> str:
    """A figure, or a dash."""
    return "–" if value is None else format(value, form)


def percent(rate: Mapping[str, Any] | None) -> str:
    """A rate with its interval, or a dash."""
    if rate is None:
        return "–"
    return f"{100 * rate['rate']:.1f} % ({100 * rate['low95']:.1f} to {100 * rate['high95']:.1f})"


def mebibytes(value: int | None) -> str:
    """Bytes, or a dash."""
    return "–" if value is None else f"{value / 2**20:,.0f} MiB"


def quoted(lines: Sequence[str]) -> str:
    """What the tool said, word for word."""
    return "\n".join(["```text", *(line.rstrip() for line in lines), "```"]) + "\n" if lines else ""


def scores(evaluation: Mapping[str, Any], names: Sequence[str]) -> str:
    """All models side by side."""
    models = evaluation.get("models", [])
    rows = []
    for kind in at(models, 0, "prompts") or {}:
        for key, label in RATES.items():
            cells = [at(model, "prompts", kind, key) for model in models]
            if any(cells) and (key == "refused" or any(at(cell, "hits") for cell in cells)):
                rows.append((f"{kind} ({at(cells, 0, 'count')}): {label}", *map(percent, cells)))
        change = [at(model, "refusal_change", kind) for model in models]
        rows.append(
            (
                f"{kind}: refusals against the base, paired, points",
                *(_change(its, base=not n) for n, its in enumerate(change)),
            )
        )
        rows.append((f"{kind}: words a reply", *(number(at(its, "prompts", kind, "words"), ".1f") for its in models)))
    for key, label in NATS.items():
        if any(model.get(key) is not None for model in models):
            rows.append((label, *(number(model.get(key)) for model in models)))
    return table(("", *names), rows)


def _change(change: Mapping[str, Any] | None, *, base: bool) -> str:
    value = at(change, "value")
    if base or value is None:
        return "–"
    return f"{100 * value:+.1f} ({100 * at(change, 'low'):+.1f} to {100 * at(change, 'high'):+.1f})"
