"""A checkpoint of another tool beside ours, as a section of docs/real-models.md."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.page_parts import at, mebibytes, number, scores, table
from bench.real_steps import result_of, stages

KEPT = "From an earlier run, with what abliterate made then. "
"""How a section begins that this run did not make."""


def peer(work: Path, page: Path) -> list[str]:
    """The section from the results in ``work``, or as it stands in ``page`` where they hold none."""
    return list(_peer(work)) or _peer_of(page)


def _peer(work: Path) -> Iterator[str]:
    compared, facts = result_of(work, "peer-compare"), result_of(work, "peer-facts")
    if compared is None or facts is None or compared["exit"]:
        return
    yield f"## Beside {facts['tool']}\n"
    yield f"By `abliterate compare`: one base, the same prompts, replies of the same length. {facts['how']}\n"
    evaluation = compared["document"]
    names = ["base", "abliterate", facts["tool"]]
    yield scores(evaluation, names)
    ours, diffs = result_of(work, "qwen-run") or {}, [result_of(work, "qwen-diff"), result_of(work, "peer-diff")]
    found = sum(cpu or 0 for name, _, cpu in stages(ours) if not name.startswith("replies")) if ours else None
    changed = [at(its, "document", "changed") for its in diffs]
    rows = [
        ("CPU seconds to make it", number(found, ",.0f"), number(facts.get("cpu_seconds"), ",.0f")),
        ("peak memory", mebibytes(ours.get("peak_bytes")), mebibytes(facts.get("peak_bytes"))),
        ("tensors that differ from the base", *("–" if its is None else str(len(its)) for its in changed)),
        ("of these, one direction removed", *map(_projected, diffs)),
        ("largest share of that direction left in them", *(number(_left(its), ".1e") for its in changed)),
    ]
    yield table(("", "abliterate", facts["tool"]), rows)
    yield (
        "The CPU seconds of abliterate are those of finding the direction, the edit and its proof on the bytes; those "
        "of the other tool are its whole search, in which it writes replies to judge its trials. The peak of "
        "abliterate is that of a run with its evaluation.\n"
    )


def _peer_of(page: Path) -> list[str]:
    """That section as it stands in ``page``: another tool's checkpoint takes an environment of its own to make."""
    text = page.read_text("utf-8") if page.is_file() else ""
    found = re.search(r"^## Beside .*?\n\n(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
    if found is None:
        return []
    return [found[0].replace(found[1], KEPT + found[1].removeprefix(KEPT)).rstrip() + "\n"]


def _projected(diff: Mapping[str, Any] | None) -> str:
    groups = at(diff, "document", "groups")
    return "–" if groups is None else str(sum(group["projected"] for group in groups))


def _left(changed: Sequence[Mapping[str, Any]] | None) -> float | None:
    return max((its["left"] for its in changed or [] if its.get("left") is not None), default=None)
