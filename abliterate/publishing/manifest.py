"""``abliterate.json``: everything needed to say what a checkpoint is, to check it, and to make it again."""

import math
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from abliterate.arch.edit_plan import EditPlan
from abliterate.checkpoint import healing_file
from abliterate.checkpoint.documents import check_document
from abliterate.checkpoint.format_number import check_format
from abliterate.checkpoint.hashes import sha256_file
from abliterate.checkpoint.output import JOURNAL, PRIVATE_FOLDER, OutputFolder, write_json
from abliterate.checkpoint.source import IGNORED_PARTS, Checkpoint, read_json
from abliterate.errors import CheckpointError
from abliterate.evaluate.evaluation import EvalReport, ModelScores
from abliterate.method.directions import DirectionSet
from abliterate.method.statistics import Rate
from abliterate.model import ranks
from abliterate.publishing.card import write_card
from abliterate.publishing.manifest_keys import Manifest, Manifest1
from abliterate.recipe import OF_A_MACHINE, Recipe, in_tables
from abliterate.verification.report import VerifyReport
from abliterate.version import __version__

FILE_NAME = "abliterate.json"
FORMAT, FORMAT_NUMBER = "abliterate-manifest-", 2
"""Manifests of version 1, which name a direction and no edit, are still read."""
HARDENED = "abliterate-hardened-"
"""The format of the manifest of a hardened checkpoint, which holds another one (``hardened``)."""
OUR_FILES = {FILE_NAME, "README.md"}
"""Files the manifest has no hash of: itself, and the card, which may be edited by hand."""

LIBRARIES = ("torch", "transformers", "safetensors", "accelerate", "huggingface_hub", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of this tool and of the libraries that shape its results."""
    return {"abliterate": __version__} | {name: metadata.version(name) for name in LIBRARIES}


def machine() -> dict[str, str]:
    """What of the hardware can change a sum of floats."""
    import torch

    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def finite(value: Any) -> Any:  # noqa: ANN401 - plain data
    """Plain data without NaN and infinities, which JSON does not have: null stands for them."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def build(
    edit_plan: EditPlan,
    directions: DirectionSet,
    recipe: Recipe,
    *,
    prompts: Mapping[str, Any] | None = None,
    verification: VerifyReport | None = None,
    evaluation: EvalReport | None = None,
    healing: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The manifest of an edited checkpoint as plain data; ``verification`` and ``evaluation`` may come later.

    ``healing`` says how a healed one was healed.
    """
    checkpoint = edit_plan.checkpoint
    document = {
        "format": f"{FORMAT}{FORMAT_NUMBER}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": machine(),
        **({} if ranks.processes() == 1 else {"processes": ranks.processes()}),
        "source": source_of(checkpoint),
        "edit": {
            **{key: value for key, value in edit_plan.to_json().items() if key not in _NOT_KEPT},
            "file": "abliterate/edit.safetensors",
        },
        "direction": {
            "file": "abliterate/direction.safetensors",
            "sha256": directions.sha256,
            "norm": _length(directions),
            "choice": asdict(directions.choice) if directions.choice else None,
            "scores": [asdict(score) for score in directions.scores[:5]],
            "stability": directions.stability,
            "measurement": {
                key: directions.metadata[key]
                for key in ("position_tokens", "refusal_tokens", *COUNTED, *SCORED, "search", "template_sha256")
                if key in directions.metadata
            },
        },
        **({} if healing is None else {"healing": {"file": f"{PRIVATE_FOLDER}/{healing_file.NAME}", **healing}}),
        "prompts": dict(prompts or directions.metadata.get("prompts", {})),
        "recipe": _bounded(recipe.model_dump(mode="json")),
        "verification": None if verification is None else verification_json(verification),
        "evaluation": None if evaluation is None else evaluation_json(evaluation),
    }
    return finite(document)


def source_of(base: Checkpoint) -> dict[str, Any]:
    """Which checkpoint was the base, as plain data."""
    shards = {shard.name: shard.size_bytes for shard in base.shards}
    return {"name": base.name, "revision": base.revision, "shards": shards}


def verification_json(report: VerifyReport) -> dict[str, Any]:
    """A verification as plain data."""
    behaviour = report.behaviour
    return {
        "ok": report.ok,
        "failures": list(report.failures),
        "edited": [asdict(proof) for proof in report.bytes.edited],
        "worst_left": report.bytes.worst_left,
        "identical_tensors": report.bytes.identical_tensors,
        "identical_files": report.bytes.identical_files,
        "not_finite": list(report.bytes.not_finite),
        "sha256": dict(report.bytes.sha256_files),
        "source_sha256": dict(report.bytes.sha256_source_files),
        "behaviour": None if behaviour is None else asdict(behaviour),
    }


def evaluation_json(report: EvalReport) -> dict[str, Any]:
    """An evaluation as plain data, the base first; replies are not kept."""
    return {
        "models": [model_json(model) for model in report.models],
        "max_new_tokens": report.max_new_tokens,
        "modes": dict(report.modes),
        "scorer": report.scorer,
        "breakdowns": list(report.breakdowns),
        "agreement": {
            "rows": report.agreement.rows,
            "columns": report.agreement.columns,
            "counts": [[row, column, count] for (row, column), count in sorted(report.agreement.counts.items())],
        },
        "judge": report.judge or None,
        "benchmarks": None if report.benchmarks is None else asdict(report.benchmarks),
        **({} if report.flinching is None else {"words": report.flinching.to_json()}),
    }


def model_json(model: ModelScores) -> dict[str, Any]:
    """The scores of one model as plain data; null for what was not measured."""
    figures = {name: getattr(model, name) for name in ("kl_nats", "kl_tokens_nats", "completion_nats", "text_nats")}
    return {
        "name": model.name,
        "mode": model.mode or None,
        "against": model.against or None,
        "prompts": {
            kind: {
                name: rate_json(value) if isinstance(value, Rate) else value
                for name, value in ((field, getattr(scores, field)) for field in scores.__dataclass_fields__)
            }
            for kind, scores in model.scores.items()
        },
        "judged": rate_json(model.judged) if model.judged else None,
        "tasks": [asdict(score) | ({"verdict": score.change.verdict} if score.change else {}) for score in model.tasks],
        "refusal_change": {kind: asdict(change) for kind, change in model.refusal_change.items()},
        **{name: None if math.isnan(value) else value for name, value in figures.items()},
    }


def rate_json(rate: Rate) -> dict[str, Any] | None:
    """A rate with its interval, None where nothing was counted."""
    if not rate.count:
        return None
    low, high = rate.interval
    return {"rate": rate.value, "hits": rate.hits, "count": rate.count, "low95": low, "high95": high}


def finish(output: OutputFolder, edit_plan: EditPlan, document: Mapping[str, Any]) -> None:
    """Write manifest and model card into an output that is otherwise complete."""
    shards = {shard.name for shard in edit_plan.checkpoint.shards}
    hashed = {name: sha256_file(output.path / name) for name in files_of(output.path) if name not in shards | OUR_FILES}
    document = finite({**document, "files": hashed})
    write_json(output.path / FILE_NAME, document)
    write_card(output.path, edit_plan.checkpoint, document)


def record(folder: Path, base: Checkpoint, report: VerifyReport) -> None:
    """Write a verification that came after the edit into manifest and card."""
    document = read(folder) | {"verification": verification_json(report)}
    write_json(folder / FILE_NAME, document)
    write_card(folder, base, document)


def files_of(folder: Path) -> list[str]:
    """Names of all files below ``folder`` that belong to the checkpoint: no caches, no journal."""
    return [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != JOURNAL and not set(path.relative_to(folder).parts) & set(IGNORED_PARTS)
    ]


def read(folder: Path) -> dict[str, Any]:
    """The manifest of ``folder``.

    Raises:
        CheckpointError: there is none, or not one of ours, or it is damaged; or of what was trained, and not edited.
    """
    if not (folder / FILE_NAME).is_file():
        raise CheckpointError(f"{folder}: has no {FILE_NAME}", "give a folder that abliterate wrote (and finished)")
    where = folder / FILE_NAME
    document = read_json(where)
    if str(document.get("format")).startswith(HARDENED):
        raise CheckpointError(
            f"{folder}: was hardened by training, and there is no equation that its weights could be proven by",
            "`abliterate audit` measures what it is worth, and `hf upload` publishes it, with its card",
        )
    number = check_format(document.get("format"), FORMAT, FORMAT_NUMBER, where=where)
    keys = Manifest1 if number == 1 else Manifest
    return check_document(document, keys, where=where, hint="fetch this file again, or edit the base again")


def recipe_of(document: Mapping[str, Any], *, where: Path) -> Recipe:
    """The recipe in a manifest or patch, without what belongs to the machine that wrote it.

    It may come from anybody, so leave to run code of a repository is not taken from it either.

    Raises:
        CheckpointError: it cannot be read; names the file ``where`` it stands.
    """
    try:
        tables = in_tables(document["recipe"], without=OF_A_MACHINE)
        return Recipe.model_validate({**tables, "find": BEFORE_LABELS | tables.get("find", {})})
    except (ValidationError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{where}: holds a recipe that cannot be read ({first_line(error)})", "fetch this file again"
        ) from error


def first_line(error: Exception) -> str:
    """What an error of pydantic says of the first thing that is wrong."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error)


def _length(directions: DirectionSet) -> float:
    """Of the chosen vectors, all together."""
    return math.sqrt(sum(float(subspace.vectors.double().square().sum()) for subspace in directions.chosen.subspaces))


def _bounded(value: Any) -> Any:  # noqa: ANN401 - recipe values
    """An infinite bound as the largest number there is, so that the recipe can be read back."""
    if isinstance(value, Mapping):
        return {key: _bounded(part) for key, part in value.items()}
    return math.copysign(sys.float_info.max, value) if isinstance(value, float) and math.isinf(value) else value


BEFORE_LABELS = {"labels": "first-token", "estimators": ["difference-of-means"], "kl_margin": 0.0}
"""What a recipe did that has no such options."""
COUNTED = ("kept", "of", "labels", "calibration")
"""What a direction file says of the prompts it was measured on."""
SCORED = ("scored", "choose_by", "cosmic_layers")
"""And of how its candidates were scored."""
_NOT_KEPT = ("writers", "input_bytes", "output_bytes", "estimated_seconds", "model", "revision")
