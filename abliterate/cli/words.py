"""Words side by side: how likely each model finds them."""

from typing import TYPE_CHECKING

from rich.markup import escape

from abliterate.cli.console import out
from abliterate.cli.tables import table

if TYPE_CHECKING:
    from abliterate.evaluate.flinching import Flinching


def show_words(found: "Flinching") -> None:
    """A line for each word, and what they say in words."""
    names = list(found.models)
    columns = [*names, *(f"{name} - {found.base}" for name in found.others)]
    shown = table(
        f"log-probability of words, nats; mean over {len(found.listed.carriers)} sentences, 95 % intervals",
        "word", "tokens", *columns, "", right=range(1, 2 + len(columns)),
    )  # fmt: skip
    for word in found.words:
        changes = (found.changes[name][word] for name in found.others)
        shown.add_row(
            escape(word),
            str(found.models[found.base].tokens[word]),
            *(f"{found.mean(name, word):.2f}" for name in names),
            *(f"{its.value:+.2f} [dim]({its.low:+.2f} to {its.high:+.2f})[/dim]" for its in changes),
            "never learnt" if found.models[found.base].learnt(word) is False else "",
        )
    out.print(shown)
    for sentence in found.in_words():
        out.print(sentence, markup=False, soft_wrap=True)
