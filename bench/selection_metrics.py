"""Which selection metric predicts whether replies refuse?

    python -m bench.selection_metrics [NAME=FOLDER[:DTYPE] ...] [--candidates 28] [--write docs/selection-metrics.md]

For each model, candidates over all layers and positions are ablated in turn.  Each selection metric is computed on
validation prompts; then replies are written, to those prompts and to others.  Spearman's correlation over the
candidates says how well a metric predicts the share of refusals, and the damage.  What was finished is kept in
``--work``, so that a stopped study goes on; the page is written from the files there.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abliterate.data.bundled import model_path
from abliterate.evaluate.replies import REFUSALS
from abliterate.model.load import quiet_transformers
from abliterate.model.prompts import CONTRAST
from bench.metric_page import page
from bench.metric_readings import OUTCOMES, rate
from bench.metric_study import Sizes, open_study

TOGETHER = 4
"""Candidates of one batch."""
TINY = "bundled:tiny-chat"
ROOT = Path(__file__).parent.parent
BUNDLED: Mapping[str, tuple[Path, str, str]] = {
    "tiny-chat": (model_path(), TINY, "float32"),
    "tiny-gemma3": (ROOT / "tests/models/tiny-gemma3", TINY, "float32"),
    "tiny-qwen2": (ROOT / "tests/models/tiny-qwen2", TINY, "float32"),
}


def study(name: str, folder: Path, prompts: str, dtype: str, *, count: int, work: Path) -> None:
    """Run what is missing of a model's study."""
    one = open_study(name, folder, prompts, dtype=dtype, work=work)
    candidates = one.spread(count)
    info = {
        "dtype": dtype,
        "n_layers": one.loaded.n_layers,
        "positions": list(one.chat.positions),
        "k": one.lengths,
        "refusal_tokens": [str(one.chat.tokenizer.decode([token])) for token in one.refusal_tokens],
        "measured_on": {
            kind: sum(its.kind == wanted for its in one.labelled[part])
            for kind, part, wanted in (
                ("harmful", "harmful_train", "refused"),
                ("harmless", "harmless_train", "complied"),
            )
        },
        "refused": {
            part: [sum(its.kind in REFUSALS for its in one.labelled[part]), len(one.labelled[part])]
            for part in one.labelled
            if part.startswith("harmful")
        },
        "candidates": [its.id for its in candidates],
        "sizes": {key: getattr(one.sizes, key) for key in Sizes.__dataclass_fields__},
    }
    (work / name / "study.json").write_text(json.dumps(info), "utf-8")
    parts = -(-len(candidates) // TOGETHER)
    groups = [
        [None],
        *(candidates[first::parts] for first in range(parts)),
    ]  # each of all depths, in case it is stopped
    for group in groups:
        one.run(missing) if (missing := one.missing(group)) else None
        for found in map(one.kept_of, group):
            print(
                f"{name} {found['candidate']}: refused {rate(found, 'val', 'test', 'others'):.2f}, "
                f"damage {OUTCOMES['damage'](found, found):.3f}, {found['seconds']:.0f} s",
                flush=True,
            )


def results_of(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """What is kept of a model: about the study, the base, and the candidates that are done."""
    info = json.loads((folder / "study.json").read_text("utf-8"))
    base = json.loads((folder / "candidatenone.json").read_text("utf-8"))
    paths = (folder / f"candidate{one.replace('/', '_')}.json" for one in info["candidates"])
    return info, base, [json.loads(path.read_text("utf-8")) for path in paths if path.exists()]


def main() -> None:
    """Run the study and write its page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="NAME=FOLDER[:DTYPE]", help="besides the bundled ones")
    parser.add_argument("--candidates", type=int, default=28)
    parser.add_argument("--only", nargs="*", help="names of models to run; none: from the files alone")
    parser.add_argument("--work", type=Path, default=Path("out/bench/selection-metrics"))
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    quiet_transformers()
    models = dict(BUNDLED)
    for given in args.models:
        name, _, where = given.partition("=")
        folder, _, dtype = where.partition(":")
        models[name] = (Path(folder), CONTRAST, dtype or "float32")
    for name, where in models.items():
        if args.only is None or name in args.only:
            study(name, *where, count=args.candidates, work=args.work)
    if args.write:
        done = {path.parent.name: results_of(path.parent) for path in sorted(args.work.glob("*/candidatenone.json"))}
        args.write.write_text(page(done), "utf-8")


if __name__ == "__main__":
    main()
