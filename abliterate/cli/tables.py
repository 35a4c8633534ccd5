"""Results as tables for people."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from abliterate.checkpoint.amounts import size
from abliterate.cli.console import err, out

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from abliterate.arch.edit_plan import EditPlan
    from abliterate.evaluate.benchmarks import TaskScore
    from abliterate.evaluate.evaluation import ClassScores, EvalReport
    from abliterate.method.directions import DirectionSet
    from abliterate.method.statistics import Difference, Rate
    from abliterate.verification.comparison import Diff
    from abliterate.verification.report import VerifyReport
    from abliterate.workflow.passes import Running

SAMPLES = 3

EXACTNESS = {
    "A": "equal to inference-time ablation",
    "B": "holds no r; a norm keeps it from being equal to the hook",
    "C": "inexact: by request, or because the stream itself is scaled channel by channel",
}

OF_OTHER_EDITS = {
    "equal to hooks": "equal to the same edit at inference time",
    "removes the direction": "edited writers write no r; a norm keeps it from being equal to the hook",
    "bytes only": "what the equation says of its bytes; no intervention at inference time is equal to it",
}
"""By claim, of edits that are not the removal of one subspace from everything."""


def table(title: str, *columns: str, right: Iterable[int] = ()) -> Table:
    """An empty table in the house style; ``right`` lists the columns of numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    numbers = set(right)
    for place, name in enumerate(columns):
        made.add_column(name, justify="right" if place in numbers else "left", overflow="fold")
    return made


def show_plan(plan: "EditPlan", needs: "Sequence[Running]" = ()) -> None:
    """Writers by role, coverage, exactness, sizes, and what running the model takes."""
    model_map = plan.model_map
    out.print(
        f"[bold]{escape(plan.checkpoint.name)}[/bold]  {model_map.model_type} ({model_map.family.title}), "
        f"{model_map.n_layers} blocks of width {model_map.d_model}, {size(plan.checkpoint.size_bytes)} "
        f"in {len(plan.checkpoint.shards)} shard{'s' if len(plan.checkpoint.shards) > 1 else ''}"
    )
    writers = table("writers to the residual stream", "role", "tensors", "shape", "axis", "norm behind", right=(1,))
    for role, group in plan.by_role().items():
        first = group[0]
        shapes = {"x".join(map(str, writer.tensor.shape)) for writer in group}
        writers.add_row(
            role,
            str(len(group)),
            ", ".join(sorted(shapes)),
            str(first.axis),
            f"gain {first.gain}" if first.norms else "-",
        )
    out.print(writers)
    out.print(f"head: {'tied, ' + plan.tied if model_map.tied else 'its own'}")
    out.print(f"exactness: [bold]{plan.exactness}[/bold], {_worth(plan)}")
    out.print(f"output: {size(plan.output_bytes)}, {plan.edited_parameters:,} parameters edited")
    for each in needs:
        out.print(
            f"memory to run it, {each.dtype}: {size(each.whole_bytes)}, out of core from {size(each.least_bytes)} "
            f"(a whole run then reads the weights about {each.weight_passes} times)"
        )
    for note in plan.notes:
        out.print(f"[yellow]note:[/yellow] {escape(note)}")
    colour = _colour(plan)
    out.print(f"writers [bold {colour}]{plan.coverage}[/bold {colour}]")


def _colour(plan: "EditPlan") -> str:
    """Green where all that shall be edited is, yellow where an option leaves some of it alone, red where it is unknown.

    What the edit itself leaves alone is not counted.
    """
    if not plan.model_map.complete:
        return "red"
    stream = plan.stream
    planned = [w for w in plan.model_map.writers if stream is None or stream.at(*w.place) is not None]
    return "green" if len(plan.writers) >= len(planned) else "yellow"


def _worth(plan: "EditPlan") -> str:
    """What the result is worth, by family and edit together."""
    stream, whole = plan.stream, len(plan.writers) == len(plan.model_map.writers)
    of_all = whole if stream is None else stream.removed is not None and plan.claim != "bytes only"
    of_all = of_all and not any(edit.is_oblique for edit in (stream.edits() if stream else ()))
    if plan.exactness == "C" or of_all:
        return EXACTNESS[plan.exactness]
    return OF_OTHER_EDITS[plan.claim]


def show_selection(directions: "DirectionSet", top: int = 5) -> None:
    """The best candidates and the chosen one."""
    from abliterate.method.measurement import chosen_by
    from abliterate.method.selection import WHY

    choice = directions.choice
    if not directions.scores:
        return
    tokens = list(directions.metadata.get("position_tokens", []))
    several = len({one.estimator for one in directions.candidates}) > 1
    scored = directions.metadata.get("scored", {})
    part = f", {scored['in_full']} scored in full" if scored.get("prompt_passes", 0) < scored.get("of", 0) else ""
    best = table(
        f"candidate directions, best {top} of {len(directions.scores)}{part}",
        "", "position", "token", "layer", "bypass", "induce", "KL", "verdict", right=(1, 3, 4, 5, 6),
    )  # fmt: skip
    for score in directions.scores[:top]:
        chosen = choice is not None and score.candidate == choice.candidate
        token = repr(tokens[score.position]) if tokens and score.position is not None else ""
        best.add_row(
            "→" if chosen else "",
            score.candidate if several or score.position is None else str(score.position),
            escape(token),
            str(score.layer),
            _known(score.bypass, 2),
            _known(score.induce, 2),
            ("> " if score.kl_stopped else "")
            + _known(score.kl_nats, 3)
            + (f" ± {score.kl_error_nats:.3f}" if score.kl_error_nats else ""),
            score.verdict,
        )
    out.print(best)
    if by := chosen_by(directions.metadata):
        out.print(by, style="yellow", markup=False)
    show_measured(directions.metadata)
    if choice is not None:
        place = (
            f"layer {choice.layer}" if choice.position is None else f"position {choice.position}, layer {choice.layer}"
        )
        which = f"{choice.candidate}, " if several else ""
        halves = (
            "" if directions.stability is None else f"; two halves of the prompts agree to {directions.stability:.3f}"
        )
        out.print(f"chosen: {which}{place}, by rule {choice.rule}{halves}", markup=False)
        if choice.rule in WHY:
            out.print(WHY[choice.rule], style="yellow", markup=False)


def show_measured(measurement: "Mapping[str, Any]") -> None:
    """What a direction rests on: prompts of each class, and how well the first token tells them apart."""
    from abliterate.method.measurement import measured_on, told_apart

    measured, apart = measured_on(measurement), told_apart(measurement)
    if measured:
        out.print(f"measured on {measured}")
    if apart:
        out.print(apart)


def _known(value: float, digits: int) -> str:
    """A score, or a dash for what was not asked or is none."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def show_verification(report: "VerifyReport") -> None:
    """One line of proof for each promise."""
    on_bytes, behaviour = report.bytes, report.behaviour
    mark = "[green]✓[/green]" if on_bytes.ok else "[red]✗[/red]"
    removes = all(proof.removes for proof in on_bytes.edited)
    equation, what = "their equation, with rᵀW' = 0,", "largest residual fraction"
    if not removes:
        equation, what = "the equations of their edits", "farthest from what is to be left along the directions"
    out.print(
        f"{mark} {len(on_bytes.edited)} writers satisfy {equation} on the written bytes "
        f"({what}: {on_bytes.worst_left:.1e})"
    )
    out.print(
        f"{mark} {on_bytes.identical_tensors} other tensors and {on_bytes.identical_files} other files byte-identical"
    )
    if shares := [proof.kept_along for proof in on_bytes.edited if proof.keeps_rows]:
        out.print(
            f"[yellow]rows keep their lengths: on the written bytes {min(shares):.1%} to {max(shares):.1%} of what a "
            "writer wrote along the direction is put back[/yellow]"
        )
    if healed := sum(proof.healed for proof in on_bytes.edited):
        out.print(
            f"{mark} {healed} of the writers hold what healing added as well, which writes nothing along what was "
            "edited; where hooks are compared with, the base has it beside its writers"
        )
    for name in on_bytes.not_finite:
        out.print(f"[yellow]![/yellow] {escape(name)} holds NaN or infinity, as in the base; the edit leaves it alone")
    if behaviour is not None:
        mark = "[red]✗[/red]" if behaviour.failures else "[green]✓[/green]"
        share = "" if behaviour.stream_share is None else f", r in the stream: {behaviour.stream_share:.1e}"
        out.print(
            f"{mark} against {'ablation hooks' if removes else 'the edit as hooks'}"
            f"{' and the healing' if healed else ''} on {behaviour.prompts} held-out "
            f"prompts: KL {behaviour.kl_nats:.1e} nats "
            f"({'the ablation' if removes else 'that edit'} itself: {behaviour.ablation_kl_nats:.1e}){share}"
        )
    for failure in report.failures:
        out.print(f"[red]✗[/red] {escape(failure)}")


def rate(value: "Rate") -> str:
    """A rate with its interval."""
    if not value.count:
        return "-"
    low, high = value.interval
    return f"{100 * value.value:5.1f} % [dim]({100 * low:.1f} to {100 * high:.1f})[/dim]"


def show_evaluation(report: "EvalReport", *, samples: int = SAMPLES, show_replies: bool = False) -> None:
    """All models side by side, the base first, and a few replies to prompts that one refuses and another answers.

    Those to harmful prompts are shown with ``show_replies`` only.
    """
    names = [model.name for model in report.models]
    right = tuple(range(2, 2 + len(names)))
    scores = table("95 % intervals", "prompts", "", *names, right=right)
    for kind in report.kinds:
        _kind_rows(scores, kind, [model.scores[kind] for model in report.models])
    figures = {
        "KL to base, first token": "kl_nats",
        "KL to base, along its replies": "kl_tokens_nats",
        "cross-entropy on base replies": "completion_nats",
        "cross-entropy on the text": "text_nats",
    }
    for label, field in figures.items():
        values = [getattr(model, field) for model in report.models]
        if not all(math.isnan(value) for value in values):
            scores.add_row("", label, *("-" if math.isnan(value) else f"{value:.4f} nats" for value in values))
    if report.judge:
        scores.add_row("harmful", "judged", *("-" if m.judged is None else rate(m.judged) for m in report.models))
    out.print(scores)
    if report.judge:
        out.print(f"judged by {escape(report.judge)}")
    _show_tasks(report)
    agreement = report.agreement
    out.print(
        f"scorers {agreement.rows} and {agreement.columns} agree on {agreement.agreement.value:.1%} of all replies"
    )
    for model in report.models:
        if not model.against:
            continue
        changes = "; ".join(f"{kind} {change(its)}" for kind, its in model.refusal_change.items())
        out.print(f"refusals, {escape(model.name)} against {escape(model.against)}, same prompts: {changes}")
    for breakdown in report.breakdowns:
        err.print(f"note: {breakdown}: this edit harms the model", markup=False)
    _show_modes(report)
    _show_replies(report, samples, harmful_too=show_replies)


def _show_replies(report: "EvalReport", most: int, *, harmful_too: bool) -> None:
    """How many labels changed, and a few of these replies, those to harmless prompts first."""
    from abliterate.evaluate.observing import HARMFUL

    changed = [sample for sample in report.samples if report.changed(sample)]
    for model in report.models:
        if model.against:
            its = Counter(sample.kind for sample in changed if model.name in report.changed(sample))
            of = ", ".join(f"{kind} {its[kind]}" for kind in report.kinds if its[kind])
            line = f"labels (refused or not) that changed, {model.name} against {model.against}: "
            out.print(f"{line}{its.total()} of {len(report.samples)}{f' ({of})' if of else ''}", markup=False)
    hidden = [] if harmful_too else [sample for sample in changed if sample.kind == HARMFUL]
    shown = sorted((s for s in changed if harmful_too or s.kind != HARMFUL), key=lambda sample: sample.kind == HARMFUL)
    if shown[:most]:
        rows = table("of these prompts", "kind", "prompt", *(model.name for model in report.models))
        for sample in shown[:most]:
            rows.add_row(sample.kind, *(escape(_short(text)) for text in (sample.prompt, *sample.replies)))
        out.print(rows)
    if hidden:
        out.print("replies to harmful prompts are not shown here: --show-replies does, and --report keeps them folded")


def _show_modes(report: "EvalReport") -> None:
    for mode, given in report.modes.items():
        out.print(f"{mode}: the chat template was given {given}", markup=False)
    cut = sum(scores.unfinished.hits for model in report.models for scores in model.scores.values())
    if cut:
        limit = f"more --max-new-tokens help those that were cut off at {report.max_new_tokens}"
        out.print(f"note: {cut} replies never ended their thinking; {limit}")


def _show_tasks(report: "EvalReport") -> None:
    """The tasks that were asked for, without their parts."""
    from abliterate.evaluate.benchmarks import against_base, figure

    if report.benchmarks is None:
        return
    names = [model.name for model in report.models if model.tasks]
    shown = table("tasks, ± standard error; difference to the base with its 95 % interval", "task", "metric", *names)
    for place, score in enumerate(report.base.tasks):
        if score.asked:
            found = [_task(model.tasks, score) for model in report.models if model.tasks]
            cells = [f"{figure(its)}  {against_base(its)}".strip() if its else "-" for its in found]
            first = place == 0 or report.base.tasks[place - 1].task != score.task
            shots = f", {score.shots} shots" if score.shots else ""
            name = f"{score.task} ({score.count}{shots})" if first else ""
            shown.add_row(escape(name), escape(score.metric), *map(escape, cells))
    out.print(shown)
    out.print(f"by {report.benchmarks.about}", markup=False)
    for task, figures in report.benchmarks.published.items():
        out.print(f"{task}, published: {figures}", markup=False)


def _task(scores: "Sequence[TaskScore]", like: "TaskScore") -> "TaskScore | None":
    return next((score for score in scores if (score.task, score.metric) == (like.task, like.metric)), None)


def change(its: "Difference") -> str:
    """A difference of rates in points, with its interval and what that says."""
    return f"{100 * its.value:+.1f} points ({100 * its.low:+.1f} to {100 * its.high:+.1f}: {its.verdict})"


def _kind_rows(scores: Table, name: str, models: "Sequence[ClassScores]") -> None:
    rows = (
        ("refused", "refused"),
        ("delayed", "refused late, of these"),
        ("held_out", "refused, held-out kinds"),
        ("degenerate", "empty or degenerate"),
        ("unfinished", "thinking never ended"),
        ("accuracy", "holds the known answer"),
    )
    for field, label in rows:
        rates = [getattr(model, field) for model in models]
        if rates[0].count and not (field in ("delayed", "unfinished") and not any(its.hits for its in rates)):
            scores.add_row(name, label, *map(rate, rates))
            name = ""
    scores.add_row(name, "words a reply", *(f"{model.words:.1f}" for model in models))


def show_diff(diff: "Diff", *, top: int = 12) -> None:
    """Changed tensors, and what is identical."""
    groups = table(
        "changed tensors by role", "role", "tensors", "one direction removed", "change", "cosine", "left along it",
        right=(1, 2, 3, 4, 5),
    )  # fmt: skip
    for group in diff.groups:
        change = f"{group.least_change:.1e} to {group.largest_change:.1e}"
        cosine, left = _figure(group.least_cosine, ".4f"), _figure(group.largest_left, ".1e")
        groups.add_row(group.role, str(group.count), str(group.projected), change, cosine, left)
    if diff.changed:
        out.print(groups)
    known = any(tensor.planned is not None for tensor in diff.changed)
    columns = ("tensor", "role", "change", "rank one", "cosine", "left", *(("as planned",) if known else ()))
    changed = table("changed tensors", *columns, right=range(2, len(columns)))
    for tensor in diff.changed[:top]:
        changed.add_row(
            escape(tensor.name),
            tensor.role,
            f"{tensor.change:.1e}",
            _figure(tensor.rank_one, ".4f"),
            _figure(tensor.cosine, ".4f"),
            _figure(tensor.left, ".1e"),
            *((_figure(tensor.planned, ".4f"),) if known else ()),
        )
    if len(diff.changed) > top:
        changed.add_row(f"… and {len(diff.changed) - top} more", *[""] * (len(columns) - 1))
    out.print(changed)
    for label, names in (("added", diff.added), ("removed", diff.removed), ("reshaped", diff.reshaped)):
        for name in names:
            out.print(f"{label}: {escape(name)}")
    for name in diff.changed_files:
        out.print(f"file differs: {escape(name)}")
    out.print(f"identical: {diff.identical} tensors, {diff.identical_files} files")
    if diff.only_writers:
        out.print(f"[green]exactly the {diff.writers} writers of the residual stream changed[/green]")


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _short(text: str, limit: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def runs_of(numbers: list[int]) -> str:
    """Numbers in order as "0 to 7, 9"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in runs)
