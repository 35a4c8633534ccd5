"""Manifest and card of a hardened checkpoint: what was trained, on what, and what came of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from abliterate.checkpoint.hashes import sha256_file
from abliterate.checkpoint.output import OutputFolder, write_json, write_text
from abliterate.checkpoint.source import Checkpoint
from abliterate.method.hardening import Hardening
from abliterate.method.statistics import Rate
from abliterate.publishing.card import front_matter, percent
from abliterate.publishing.keeping import keep_base
from abliterate.publishing.manifest import (
    FILE_NAME,
    HARDENED,
    OUR_FILES,
    files_of,
    finite,
    machine,
    rate_json,
    source_of,
    versions,
)
from abliterate.recipe import Recipe
from abliterate.version import __version__

NUMBER = 1
LIBRARIES = ("peft", "trl")
WHAT = {
    "random-ablation": "refusing while its refusal direction, measured again and again, was ablated at random steps "
    "(in the manner of DeepRefusal, arXiv 2509.15202)",
    "extended-refusal": "extended refusals, which explain before and after declining (arXiv 2505.19056)",
    "both": "extended refusals, which explain before and after declining (arXiv 2505.19056), while its refusal "
    "direction, measured again and again, was ablated at random steps (in the manner of DeepRefusal, arXiv 2509.15202)",
}
LIMITS = (
    "Refusal was made harder to remove, not impossible. Whoever holds the weights can remove more directions, or train "
    "the refusals away again; `abliterate audit` shows how many directions it takes. Nothing was proven of the "
    "weights: training has no equation to hold them against."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stance:
    """What a model does on test prompts.

    ``refused`` and ``over_refused`` are refusals of harmful and of harmless prompts, ``facts`` the replies to harmless
    ones that hold the known answer.  ``without_one`` are refusals of harmful prompts once the direction that a run
    chooses on this very model is ablated; where it chooses none, None, and ``direction`` says why.
    """

    refused: Rate
    over_refused: Rate
    facts: Rate
    without_one: Rate | None
    direction: str

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "Stance":
        """From plain data."""
        rates = {name: its and Rate(**its) for name, its in document.items() if name != "direction"}
        return cls(direction=document["direction"], **rates)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for people."""
        rates = {name: getattr(self, name) for name in ("refused", "over_refused", "facts", "without_one")}
        return {name: its and rate_json(its) for name, its in rates.items()} | {"direction": self.direction}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardened:
    """What was trained and written.

    ``refused`` and ``answered`` are the numbers of examples, ``losses`` in nats per token on the way, ``changed`` the
    tensors; ``refusals`` names the file of texts that was given.
    """

    out: Path
    base: str
    options: Hardening
    refusals: str | None
    refused: int
    answered: int
    steps_ablated: int
    losses: tuple[float, ...]
    before: Stance | None
    after: Stance | None
    changed: tuple[str, ...]
    prompts: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "base": self.base,
            "options": asdict(self.options),
            "refusals": self.refusals,
            "examples": {"refused": self.refused, "answered": self.answered},
            "steps_ablated": self.steps_ablated,
            "losses": list(self.losses),
            "figures": {name: its and its.to_json() for name, its in (("base", self.before), ("hardened", self.after))},
            "prompts": dict(self.prompts),
        }


def finish(output: OutputFolder, base: Checkpoint, report: Hardened, recipe: Recipe) -> None:
    """Write manifest and card into an output that is otherwise complete, and give it its name."""
    keep_base(base, recipe, output)
    shards = {shard.name for shard in base.shards}
    names = [name for name in files_of(output.path) if name not in OUR_FILES]
    document = {
        "format": f"{HARDENED}{NUMBER}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions() | {name: metadata.version(name) for name in LIBRARIES},
        "machine": machine(),
        "source": source_of(base),
        "hardening": report.to_json(),
        "changed_tensors": list(report.changed),
        "recipe": recipe.model_dump(mode="json"),
        "sha256": {name: sha256_file(output.path / name) for name in names if name in shards},
        "files": {name: sha256_file(output.path / name) for name in names if name not in shards},
    }  # fmt: skip
    write_json(output.path / FILE_NAME, finite(document))
    write_text(output.path / "README.md", card(base, report))
    output.finish()


def card(base: Checkpoint, report: Hardened) -> str:
    """The model card; licence, terms and language of the base are carried over."""
    front = front_matter(base, ["hardened", "abliterate"])
    name, options = base.name.rstrip("/").rsplit("/", 1)[-1], report.options
    texts = f"the texts of `{report.refusals}`" if report.refusals else OWN_TEXTS[options.extends]
    lines = [
        "---", front.to_yaml(), "---", "",
        f"# {name}, hardened", "",
        f"This checkpoint is `{name}`, trained by abliterate {__version__} on {WHAT[options.method]}.", "",
        "## What was done", "",
        f"- {options.steps} steps of {options.batch} prompts, low-rank matrices of rank {options.rank} (alpha "
        f"{2 * options.rank}) beside {len(report.changed)} matrices, merged into them; peak rate {options.rate:g}, "
        f"seed {options.seed}. All other tensors and files are those of the base, byte for byte.",
        f"- Learned from: {report.refused} harmful prompts with {texts}, and {report.answered} harmless ones with the "
        "model's own replies.",
        *_ablated(report),
        "",
        "## What was measured", "",
        *_figures(report),
        "",
        "## Limits", "",
        LIMITS,
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


OWN_TEXTS = {True: "extended refusals put together from general texts", False: "the model's own refusals"}


def _ablated(report: Hardened) -> list[str]:
    options = report.options
    if not options.ablates:
        return []
    several = "one difference of means" if options.most == 1 else f"1 to {options.most} differences of means"
    return [
        f"- In {report.steps_ablated} of the steps {several}, of a random layer and token position, was ablated; they "
        f"were measured again every {options.every} steps."
    ]


def _figures(report: Hardened) -> list[str]:
    before, after = report.before, report.after
    if before is None or after is None:
        return ["Nothing: run `abliterate audit` on this folder."]
    rows = {
        "harmful refused": (before.refused, after.refused),
        "harmful refused, one direction ablated": (before.without_one, after.without_one),
        "harmless refused": (before.over_refused, after.over_refused),
    }
    if before.facts.count:
        rows["harmless replies with the known answer"] = (before.facts, after.facts)
    return [
        "Test prompts that training did not see, rates with 95 % intervals. The direction is the one that `abliterate "
        "run` chooses on each of the two models.", "",
        "| | base | hardened |", "|---|--:|--:|",
        *(f"| {name} | {' | '.join(percent(its and rate_json(its)) for its in pair)} |" for name, pair in rows.items()),
    ]  # fmt: skip
