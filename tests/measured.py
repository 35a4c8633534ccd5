"""What the equivalence tests measured, for the table of architectures.

``make measured`` runs them and writes the file that ships with the package; ``make test`` checks that it is complete.
"""

import json
import os
from pathlib import Path
from typing import Any

from abliterate.arch.edit_plan import EditPlan
from tests.zoo import BUILDERS

FILE = Path(__file__).parent.parent / "abliterate" / "arch" / "measured.json"
_FOUND: dict[str, dict[str, Any]] = {}


def record(name: str, plan: EditPlan, **figures: float) -> None:
    """Keep the figures of one case."""
    _FOUND[name] = {
        "family": plan.model_map.family.family,
        "model_type": plan.model_map.model_type,
        "writers": len(plan.writers),
        **{key: float(f"{value:.1e}") for key, value in figures.items()},
    }


def write() -> None:
    """Write the file, when asked to."""
    if os.environ.get("ABLITERATE_WRITE_MEASURED") and _FOUND:
        known = {name: case for name, case in json.loads(FILE.read_text("utf-8")).items() if name in BUILDERS}
        FILE.write_text(json.dumps(dict(sorted((known | _FOUND).items())), indent=1) + "\n", "utf-8")
