"""``abliterate audit``: how firmly a model refuses."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from abliterate.cli import options as opt
from abliterate.cli.console import guarded, out, progress, show_json
from abliterate.cli.evaluate import check_report
from abliterate.cli.recipe_options import takes
from abliterate.recipe import Recipe

if TYPE_CHECKING:
    from abliterate.evaluate.audit_report import Audit

TOKENS = 48
"""Of a reply, unless said otherwise: there are thirty models to try."""


@guarded
@takes("find", "max_new_tokens", "scorer", "model", file=True)
def audit(
    model: opt.Model,
    *,
    prompts: Annotated[int, typer.Option(min=8, help="At most so many test prompts of each class.")] = 32,
    against: Annotated[
        str | None, typer.Option(help="Another model to audit beside it: a folder, or a Hub name.")
    ] = None,
    recipe: Recipe,
    revision: opt.Revision = None,
    report: opt.FiguresFile = None,
    json: opt.Json = False,
) -> None:
    """Say how firmly a model refuses: how many directions hold its refusals, where, and what removing them costs.

    Example: abliterate audit tiny-chat --report audit.html
    """
    from abliterate.model.load import quiet_transformers
    from abliterate.workflow import pipeline
    from abliterate.workflow.auditing import audit as audit_model
    from abliterate.workflow.session import open_session, with_default_prompts

    check_report(report)
    pipeline.check_names(recipe)
    if recipe.evaluate.max_new_tokens == Recipe().evaluate.max_new_tokens:
        recipe = recipe.with_changes({"max_new_tokens": TOKENS})
    recipe = with_default_prompts(model, recipe)  # the other model is asked the same, not what is its own default
    quiet_transformers()
    found = []
    for name, its in ((model, revision), (against, None)):
        if name is None:
            continue
        with progress() as listen:
            session = open_session(name, recipe, revision=its, on_event=listen)
            found.append(audit_model(session, n_prompts=prompts))
            session.release()
    if report is not None:
        from abliterate.evaluate.audit_page import write_audit

        write_audit(report, found)
    if json:
        show_json({"audits": [one.to_json() for one in found]})
        return
    for one in found:
        _show(one)
    if report is not None:
        out.print(f"report: {report}", markup=False, soft_wrap=True)


def _show(found: "Audit") -> None:
    from abliterate.cli.tables import rate, table

    apart = table(
        f"{escape(found.model)}: declined and answered prompts apart, on halves not seen before",
        "entering block", "AUC", "Cohen's d", "stability", right=range(4),
    )  # fmt: skip
    for one in found.separations:
        d = "–" if one.cohen_d != one.cohen_d else f"{one.cohen_d:.2f}"  # one token, one state: nothing varies
        apart.add_row(str(one.layer), f"{one.auc:.3f}", d, f"{one.stability:.3f}")
    out.print(apart)
    shown = table(
        "refused under interventions; 95 % intervals", "", "directions", "harmful", "harmless", "broken", "KL, nats",
        right=range(1, 6),
    )  # fmt: skip
    for its in found.tried:
        cells = (str(its.k) if its.k else "", rate(its.refused), rate(its.over_refused), rate(its.broken))
        shown.add_row(escape(its.name), *cells, f"{its.kl_nats:.3f}")
    out.print(shown)
    for sentence in found.in_words():
        out.print(sentence, markup=False, soft_wrap=True)
