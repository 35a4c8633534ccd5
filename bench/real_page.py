"""docs/real-models.md from what ``bench.real`` kept; every figure comes from there, none is written here.

What the kept results do not hold is a dash.  Replies to prompts are never shown.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from abliterate.checkpoint import direction_file
from abliterate.checkpoint.output import write_atomically
from abliterate.errors import SourceError
from bench.edit_speed import machine
from bench.page_parts import Rows, at, mebibytes, number, quoted, scores, table
from bench.real_models import MODELS
from bench.real_norms import NEARLY, summary
from bench.real_peer import peer
from bench.real_picture import landscape, with_error
from bench.real_steps import result_of, stages

PICTURE = "real-landscape.svg"
TEXT = "bench/real_text.txt"

HEAD = """# Real models

Written by `make real`. What is said elsewhere of refusal, exactness and cost is measured here on small models that
others trained. Model hubs are not needed: the models come from Python packages that hold them as GGUF files, and
`abliterate import` wrote them as bfloat16. So they are not the released weights but what quantising left of them, and
figures published for the released models do not apply. All figures are of one run of each, as it came out.
"""
MEASURES = """95 % Wilson intervals in brackets. Refusals are told by the scorer `{scorer}`; replies are greedy, of at
most {tokens} tokens, to prompts that neither measuring nor selecting saw (`{source}` and its harmless half; look-alikes
are harmless prompts that look harmful). The KL divergences are on harmless prompts. The text is `{text}`, written for
this purpose.
"""
GEMMA = """Between each writer and the stream stands a norm with a gain for every channel, which training gave it. The
[theory](post-norm.md) predicts how far each form of the edit ends from the hook: `J`, from the gains and the direction
alone. Measured here in float64 on {tokens} tokens of `{text}`, read as plain text: for every writer behind a norm the
distance `|y' - P y| / |P y|` of what enters the stream after the edit (`y'`) and after the hook (`P y`), from the same
input; and the divergence of the whole edited model from the hooked one, beside that of the hooked model from the base.
"Difference of means" is that of the last tokens of bundled harmful and harmless prompts, read as plain text, in the
middle of the model. "r left" is the largest share of the direction in the stream after the plain edit.
"""


def write(page: Path, work: Path, models: Path, *, remark: str = "") -> None:
    """Write the page, and its picture beside it, from the results in ``work``; ``remark`` is on how they were made."""
    run = result_of(work, "qwen-run")
    picture = _picture(page.parent / PICTURE, work) if run and not run["exit"] else ""
    parts = [
        HEAD,
        table(("model", "stored as", "licence", "from", "what it is here for"), _models(), left=5),
        *_qwen(work, run, picture),
        *peer(work, page),
        *_smollm2(work),
        *_gemma(work),
        f"Machine: {machine()}.{' ' * bool(remark)}{remark}",
    ]
    text = "\n".join(parts)
    for folder in (work, models):
        text = text.replace(f"{folder}/", "")
    write_atomically(page, (text.rstrip() + "\n").encode())


def _models() -> Rows:
    return [
        (
            its.title,
            its.stored,
            its.licence,
            f"`{its.packages[0]}`" + (" and so on" if its.packages[1:] else ""),
            its.about,
        )
        for its in MODELS.values()
    ]


def _picture(path: Path, work: Path) -> str:
    """The scores of all candidates as a picture; empty where they cannot be read."""
    file = work / "qwen-abliterated" / "abliterate" / "direction.safetensors"
    try:
        directions = direction_file.load(file)
    except SourceError:
        return ""
    if not directions.scores:
        return ""
    write_atomically(path, landscape(directions).encode())
    return path.name


def _qwen(work: Path, run: Mapping[str, Any] | None, picture: str) -> Iterator[str]:
    yield f"## {MODELS['qwen'].title}: the whole job\n"
    if run is None:
        yield "Not run.\n"
        return
    if run["exit"]:
        yield _refused(run)
        return
    document = run["document"]
    evaluation = at(document, "evaluation") or {}
    source = at(document, "prompts", "harmful_test", "source") or "bundled:contrast"
    yield MEASURES.format(
        scorer=evaluation.get("scorer"), tokens=evaluation.get("max_new_tokens"), source=source, text=TEXT
    )
    yield scores(evaluation, ["base", "edited"])
    yield from _direction(document)
    if picture:
        yield (
            f"![Scores of the candidates]({picture})\n\nStruck through: discarded by the rule. Framed: chosen. Empty: "
            "not scored, as the choice did not depend on it.\n"
        )
    yield from _proof(document, result_of(work, "qwen-diff"))
    yield from _costs(run)
    if run["said"]:
        yield "What it said besides:\n"
        yield quoted(run["said"])


def _direction(document: Mapping[str, Any]) -> Iterator[str]:
    """How the direction was measured and chosen."""
    direction, measured = document["direction"], at(document, "direction", "measurement") or {}
    yield "### The direction\n"
    rows = [
        ("chosen", f"`{at(direction, 'choice', 'candidate')}`"),
        ("by rule", f"`{at(direction, 'choice', 'rule')}`"),
        ("two random halves of the prompts agree to (cosine)", number(at(direction, "stability"), ".3f")),
    ]
    for kind, count in (measured.get("kept") or {}).items():
        rows.append((f"prompts kept, {kind.replace('_', ' ')}", f"{count} of {at(measured, 'of', kind) or '–'}"))
    tokens = at(measured, "refusal_tokens", "texts") or []
    rows.append(("refusals begin with", ", ".join(f"`{token!r}`" for token in tokens) or "–"))
    known = ("kept", "of", "refusal_tokens", "scored", "template_sha256", "position_tokens")
    for key, value in measured.items():
        if key not in known and value not in ([], {}, "", None):
            rows.append((key.replace("_", " "), _plain(value)))
    scored = measured.get("scored") or {}
    if scored:
        rows.append(("prompt passes of the choice", f"{scored.get('prompt_passes'):,} of {scored.get('of'):,}"))
    yield table(("", ""), rows, left=2)
    best = [
        (f"`{its['candidate']}`", number(its.get("bypass"), ".2f"), number(its.get("induce"), ".2f"),
         with_error(its, number(its.get("kl_nats"), ".3f")), str(its.get("verdict")))
        for its in direction.get("scores") or []
    ]  # fmt: skip
    if best:
        yield table(("best candidates", "bypass", "induce", "KL, nats", "verdict"), best)


def _plain(value: Any) -> str:  # noqa: ANN401 - plain data
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {_plain(its)}" for key, its in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _proof(document: Mapping[str, Any], diff: Mapping[str, Any] | None) -> Iterator[str]:
    yield "### The proof\n"
    verification, behaviour = at(document, "verification"), at(document, "verification", "behaviour")
    changed = at(diff, "document", "changed")
    rows = [
        ("writers edited", str(at(document, "edit", "coverage"))),
        ("claim", str(at(document, "edit", "claim"))),
        ("largest residual fraction in the written bytes", number(at(verification, "worst_left"), ".1e")),
        ("other tensors, byte-identical", str(at(verification, "identical_tensors"))),
        ("other files, byte-identical", str(at(verification, "identical_files"))),
        ("KL to the base under hooks, nats", number(at(behaviour, "kl_nats"), ".1e")),
        ("the same of the base and the hooks themselves, nats", number(at(behaviour, "ablation_kl_nats"), ".1e")),
        ("tensors that differ, by `abliterate diff`", "–" if changed is None else str(len(changed))),
    ]
    yield table(("", ""), rows)


def _costs(run: Mapping[str, Any]) -> Iterator[str]:
    yield "### What it cost\n"
    rows = [(name, f"{wall:,.0f}", number(cpu, ",.0f")) for name, wall, cpu in stages(run)]
    rows.append(("all", f"{run['wall_seconds']:,.0f}", f"{run['cpu_seconds']:,.0f}"))
    yield table(("stage", "wall, s", "CPU, s"), rows)
    stopped = f" It was stopped {run['attempts'] - 1} times before; times are those of the last part." * (
        run["attempts"] > 1
    )
    weights = sum((at(run, "document", "source", "shards") or {}).values()) or None
    peak = mebibytes(run["peak_bytes"])
    yield f"Peak memory of the process: {peak}; weights on disk: {mebibytes(weights)}.{stopped}\n"


def _refused(step: Mapping[str, Any]) -> str:
    return f"It stops with exit code {step['exit']} after {step['wall_seconds']:.0f} s:\n\n" + quoted(step["said"])


def _smollm2(work: Path) -> Iterator[str]:
    yield f"## {MODELS['smollm2'].title}: exactness and speed\n"
    run = result_of(work, "smollm2-run")
    if run is None:
        yield "Not run.\n"
        return
    if run["exit"]:
        yield "A model that declines next to nothing has no refusal to remove. " + _refused(run)
    else:
        yield scores(at(run, "document", "evaluation") or {}, ["base", "edited"])
        yield quoted(run["said"])
    yield "Edits along two directions, each proven afterwards:\n"
    yield edits(work, {"a random direction": "smollm2-random", "difference of means, middle layer": "smollm2-means"})


def edits(work: Path, names: Mapping[str, str]) -> str:
    """Edits with their proofs and their costs."""
    rows = []
    for label, name in names.items():
        edit, verify = result_of(work, f"{name}-edit"), result_of(work, f"{name}-verify")
        if edit is None or edit["exit"]:
            continue
        proof = at(verify, "document") or {}
        seconds = next((its["seconds"] for its in edit["tasks"] if its["task"] == "edit"), None)
        rate = at(edit, "document", "output_bytes") / 1e6 / seconds if seconds else None
        rows.append(
            (
                label,
                number(edit["wall_seconds"], ".1f"),
                number(rate, ",.0f"),
                mebibytes(edit["peak_bytes"]),
                str(at(edit, "document", "coverage")),
                number(proof.get("worst_left"), ".1e"),
                number(at(proof, "behaviour", "kl_nats"), ".1e"),
                number(at(proof, "behaviour", "ablation_kl_nats"), ".1e"),
            )
        )
    heads = ("edit, s (whole process)", "MB/s", "peak memory", "writers", "largest r left in the bytes")
    return table(("", *heads, "KL to hooks, nats", "KL of the hooks themselves"), rows)


def _gemma(work: Path) -> Iterator[str]:
    yield f"## {MODELS['gemma'].title}: norms that were trained\n"
    run, norms = result_of(work, "gemma-run"), result_of(work, "gemma-norms")
    if run is None:
        yield "Not run.\n"
        return
    if run["exit"]:
        yield "A base model has no chat template. " + _refused(run)
    yield "A direction can be removed all the same:\n"
    yield edits(work, {"a random direction": "gemma-random"})
    if norms is None:
        return
    yield GEMMA.format(tokens=norms["tokens"], text=TEXT)
    yield from _gains(norms)
    rows = [
        (
            row["direction"], form, number(its["predicted"], ".1e"), number(its["predicted_largest"], ".1e"),
            number(its["measured"], ".1e"), number(its["measured_largest"], ".1e"),
            number(its["correlation"], ".2f"), number(row["divergence"][form], ".1e"), number(row["ablation"], ".1e"),
            f"{row['plain_share']:.0e}" if form == "plain" else "",
        )
        for row in norms["rows"]
        for form in row["writers"]
        for its in [summary(row, form)]
    ]  # fmt: skip
    heads = ("r", "form", "J, median", "J, largest", "measured, median", "measured, largest")
    more = (
        "correlation of their logarithms",
        "divergence from the hooked model, nats",
        "of the hooked from the base",
        "r left",
    )
    yield table((*heads, *more), rows, left=2)


def _gains(norms: Mapping[str, Any]) -> Iterator[str]:
    """What the gains are like, and what that means for the forms of the edit."""
    gains = norms["gains"]
    medians, zeros = [its["median"] for its in gains], [its["zeros"] for its in gains]
    ridges = [ridge for row in norms["rows"] for ridge in row["writers"].get("regularised", {}).get("ridge", [])]
    yield (
        f"The gains of its {len(gains)} norms behind writers reach from {min(its['least'] for its in gains):.1e} to "
        f"{max(its['largest'] for its in gains):,.0f}; the medians of the norms from {min(medians):.2g} to "
        f"{max(medians):,.0f}. The regularised form takes a `t` between {min(ridges):g} and {max(ridges):g}.\n"
    )
    largest = norms["largest"]
    yield (
        f"In its {largest['channels']} largest channels the stream holds {largest['share']:.1%} of its length in the "
        "middle of the model. A direction with anything in them takes a part of that out, and puts it into all others: "
        "where the hook itself ruins the model (its divergence from the base), the distance of an edit to it says "
        "little. So each direction is also taken with nothing in these channels.\n"
    )
    if any(zeros):
        yield (
            f"{sum(zeros)} gains, in {sum(map(bool, zeros))} of the norms, are exactly zero. Then the oblique form "
            f'does not exist: it divides by every gain. In its place stands "{NEARLY}", with the least `t` above zero '
            "that the regularised form may take.\n"
        )
