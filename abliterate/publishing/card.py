"""The model card of an edited checkpoint: what it is, what was done, what was proven, what was measured."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from abliterate.checkpoint.output import write_atomically
from abliterate.checkpoint.source import Checkpoint
from abliterate.method.measurement import chosen_by, measured_on, told_apart
from abliterate.method.selection import WHY
from abliterate.publishing import wording

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

GATED = "extra_gated_"
"""Fields of a card with these names hold the terms of a gated repository; they are carried over with its licence."""


def write_card(folder: Path, base: Checkpoint, manifest: Mapping[str, Any]) -> Path:
    """Write ``README.md`` for an edited checkpoint; the base's licence, terms and language are carried over."""
    from huggingface_hub import ModelCard, ModelCardData

    carried = base_metadata(base)
    name = base.name if "/" in base.name and not Path(base.name).exists() else None
    data = ModelCardData(
        base_model=name,
        base_model_relation="finetune" if name else None,
        library_name="transformers",
        pipeline_tag=carried.get("pipeline_tag", "text-generation"),
        license=carried.get("license"),
        license_name=carried.get("license_name"),
        license_link=carried.get("license_link"),
        language=carried.get("language"),
        tags=["abliterated", "abliterate"],
        **{key: value for key, value in carried.items() if key.startswith(GATED)},
    )
    template = (files("abliterate.publishing") / "card.md.j2").read_text("utf-8")
    card = ModelCard.from_template(
        data,
        template_str=template,
        base=base.name.rstrip("/").rsplit("/", 1)[-1] if name is None else base.name,
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
        ablation=wording.is_ablation(manifest["edit"]),
        method=wording.method(manifest["edit"]),
        effect=wording.effect(manifest["edit"]),
        percent=percent,
        nats=nats,
        task=task,
    )
    write_atomically(folder / "README.md", str(card).encode())
    return folder / "README.md"


def worth(edit: Mapping[str, Any]) -> str:
    """What the result is, by exactness class and claim; manifests of version 1 claim nothing of their own."""
    if edit["exactness"] != "C" and edit.get("claim") == "bytes only":
        return "what the equation says of its bytes; no intervention at inference time is equal to it"
    if not wording.is_ablation(edit) and edit["exactness"] in OF_OTHER_EDITS:
        return OF_OTHER_EDITS[edit["exactness"]]
    return EXACTNESS[edit["exactness"]]


def base_metadata(base: Checkpoint) -> dict[str, Any]:
    """The metadata block of the base's own card; empty when there is none or it is malformed."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    path = base.folder / "README.md"
    if not path.is_file():
        return {}
    try:
        return dict(ModelCard.load(path, ignore_metadata_errors=True).data.to_dict())
    except (YAMLError, ValueError, UnicodeDecodeError):
        return {}


def percent(rate: Mapping[str, Any] | None) -> str:
    """A rate with its interval for people, e.g. "3.0 % (1.0 to 8.5)"."""
    if rate is None:
        return "-"
    return f"{100 * rate['rate']:.1f} % ({100 * rate['low95']:.1f} to {100 * rate['high95']:.1f})"


def task(score: Mapping[str, Any]) -> str:
    """The score on a task for people, with its difference to the base."""
    from abliterate.evaluate.benchmarks import against_base, figure, score_of

    its = score_of(score)
    return f"{figure(its)}; {against_base(its)}" if its.change else figure(its)


def nats(value: float | None) -> str:
    """A divergence or cross-entropy for people."""
    return "-" if value is None else f"{value:.4f}"
