"""The model card of an edited checkpoint: what it is, what was done, what was proven, what was measured."""

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from abliterate.checkpoint.output import write_text
from abliterate.checkpoint.source import Checkpoint
from abliterate.method.measurement import chosen_by, measured_on, told_apart
from abliterate.method.selection import WHY
from abliterate.publishing import wording

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

EXACTNESS = {
    "A": "equal to inference-time ablation up to rounding",
    "B": "free of the direction; not equal to inference-time ablation, because norms stand behind the writers",
    "C": "**inexact by request**: see the notes below",
}
OF_OTHER_EDITS = {
    "A": "equal to the same edit made at inference time, up to rounding",
    "B": "the edited writers write nothing along the direction; not equal to the same edit made at inference time, "
    "because norms stand behind the writers",
}
"""The same of edits that are no directional ablation."""

OF_HEALED = (
    "As it was healed, this holds of the base with what healing added beside its writers, not of the base alone, from "
    "which it differs by what healing was for"
)

GATED = "extra_gated_"
"""Fields of a card whose names begin so hold the terms of a gated repository, and are carried over with its licence."""

MOST_DEPTH = 50
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")


def write_card(folder: Path, base: Checkpoint, manifest: Mapping[str, Any]) -> Path:
    """Write ``README.md`` for an edited checkpoint; the base's licence, terms and language are carried over."""
    from huggingface_hub import ModelCard

    data = front_matter(base, ["abliterate"] if wording.adds(manifest["edit"]) else ["abliterated", "abliterate"])
    template = (files("abliterate.publishing") / "card.md.j2").read_text("utf-8")
    card = ModelCard.from_template(
        data,
        template_str=template,
        base=data.base_model or base.name.rstrip("/").rsplit("/", 1)[-1],
        m=manifest,
        exactness=worth(manifest["edit"]),
        measured=measured_on(manifest["direction"].get("measurement", {})),
        why=WHY,
        apart=told_apart(manifest["direction"].get("measurement", {})),
        by=chosen_by(manifest["direction"].get("measurement", {})),
        summary=wording.summary(manifest["edit"]),
        details=wording.details(manifest["edit"]),
        equation=wording.equation(manifest["edit"]),
        none_left=all(its["removes"] for its in wording.edits_of(manifest["edit"])),
        removes=wording.removes(manifest["edit"]),
        title=wording.title(manifest["edit"]),
        ablation=wording.is_ablation(manifest["edit"]),
        method=wording.method(manifest["edit"]),
        effect=wording.effect(manifest["edit"]),
        percent=percent,
        points=points,
        nats=nats,
        task=task,
    )
    write_text(folder / "README.md", str(card))
    return folder / "README.md"


def front_matter(base: Checkpoint, tags: Sequence[str]) -> "ModelCardData":
    """The metadata of the card of what was made of ``base``, whose licence, terms and language are carried over."""
    from huggingface_hub import ModelCardData

    carried = base_metadata(base)
    name = base.name if "/" in base.name and not Path(base.name).exists() else None
    return ModelCardData(
        base_model=name,
        base_model_relation="finetune" if name else None,
        library_name="transformers",
        pipeline_tag=carried.get("pipeline_tag", "text-generation"),
        license=carried.get("license"),
        license_name=carried.get("license_name"),
        license_link=carried.get("license_link"),
        language=carried.get("language"),
        tags=[*tags],
        **{key: value for key, value in carried.items() if key.startswith(GATED)},
    )


def worth(edit: Mapping[str, Any]) -> str:
    """What the result is, by exactness class and claim; manifests of version 1 claim nothing of their own."""
    if edit.get("healed"):
        return f"{worth({**edit, 'healed': 0})}. {OF_HEALED}"
    if edit["exactness"] != "C" and edit.get("claim") == "bytes only":
        return "what the equation says of its bytes; no intervention at inference time is equal to it"
    if not wording.is_ablation(edit) and edit["exactness"] in OF_OTHER_EDITS:
        return OF_OTHER_EDITS[edit["exactness"]]
    return EXACTNESS[edit["exactness"]]


class _CardLoader(yaml.SafeLoader):
    """YAML as the Hub reads it ("no" is a language), without references: a few lines of them stand for gigabytes."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the name that PyYAML looks for
        first: [(tag, pattern) for tag, pattern in found if tag.rpartition(":")[2] not in ("bool", "timestamp")]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # noqa: ANN401 - a place or a key
        """The next node."""
        if self.check_event(yaml.AliasEvent) or self._depth > MOST_DEPTH:
            raise yaml.YAMLError
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


_CardLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("true|false", re.IGNORECASE), list("tTfF"))


def base_metadata(base: Checkpoint) -> dict[str, Any]:
    """What is carried over of the metadata in the base's own card; empty when there are none or they are malformed."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    path = base.folder / "README.md"
    try:
        block = REGEX_YAML_BLOCK.search(path.read_text("utf-8-sig")) if path.is_file() else None
        found = yaml.load(block[2], _CardLoader) if block else None
    except (yaml.YAMLError, OSError, ValueError, TypeError, OverflowError):
        return {}
    if not isinstance(found, dict):
        return {}
    gated = {key: its for key, its in found.items() if str(key).startswith(GATED) and its is not None}
    return gated | {key: found[key] for key in CARRIED if _is_text(found.get(key))}


def _is_text(value: object) -> bool:
    """Whether a value is text, or a list of text."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(its, str) for its in value))


def percent(rate: Mapping[str, Any] | None) -> str:
    """A rate with its interval for people, e.g. "3.0 % (1.0 to 8.5)"."""
    if rate is None:
        return "-"
    return f"{100 * rate['rate']:.1f} % ({100 * rate['low95']:.1f} to {100 * rate['high95']:.1f})"


def points(change: Mapping[str, float | None]) -> str:
    """A difference of rates with its interval for people, e.g. "-2.0 points (-5.0 to +0.5)"."""
    if change["value"] is None:
        return "-"
    value, low, high = (100 * float(change[key] or 0) for key in ("value", "low", "high"))
    return f"{value:+.1f} points ({low:+.1f} to {high:+.1f})"


def task(score: Mapping[str, Any]) -> str:
    """The score on a task for people, with its difference to the base."""
    from abliterate.evaluate.benchmarks import against_base, figure, score_of

    its = score_of(score)
    return f"{figure(its)}; {against_base(its)}" if its.change else figure(its)


def nats(value: float | None) -> str:
    """A divergence or cross-entropy for people."""
    return "-" if value is None else f"{value:.4f}"
