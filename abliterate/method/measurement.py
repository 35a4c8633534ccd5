"""What was measured beside directions, in words: for the screen, the card and the report."""

from collections.abc import Mapping
from typing import Any


def measured_on(measurement: Mapping[str, Any]) -> str:
    """How many prompts of each class a direction was measured on; empty where that is not known."""
    kept, before = measurement.get("kept"), measurement.get("of")
    if not kept:
        return ""
    parts = []
    for kind in ("harmful", "harmless"):
        of = f" of {before[f'{kind}_train']}" if before else ""
        parts.append(f"{kept[f'{kind}_train']}{of} {kind}")
    return f"{' and '.join(parts)} prompts"


def chosen_by(measurement: Mapping[str, Any]) -> str:
    """Which metric the candidates were scored by, in words; empty where it is the first token, as ever."""
    if measurement.get("choose_by") != "cosmic":
        return ""
    layers = ", ".join(map(str, measurement["cosmic_layers"]))
    return (
        f"candidates were scored by COSMIC at layers {layers}, not by tokens: bypass is -(S_comply + S_refuse), "
        "induce S_refuse"
    )


def told_apart(measurement: Mapping[str, Any]) -> str:
    """How well the first token tells refusals from answers on the model; empty where replies were not read."""
    found = measurement.get("calibration") or {}
    if found.get("auc") is None:
        return ""
    return (
        f"the first token tells {found['refused']} refused prompts from {found['answered']} answered ones with an AUC "
        f"of {found['auc']:.3f}, best at a refusal metric of {found['threshold']:.2f}"
    )
