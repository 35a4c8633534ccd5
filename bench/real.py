"""The main job on small models that others trained; writes docs/real-models.md.

    python -m bench.real [--models FOLDER] [--only qwen,smollm2,gemma] [--recipe FILE] [--all-scores]
    python -m bench.real --peer FOLDER --peer-facts FILE

Fetches the models (``bench.real_models``), or takes the imports in ``--models``, and runs what ``JOBS`` says of each.
Every finished step is kept in ``--work`` (out/real), so that the same command goes on where it was stopped; delete the
folder of a step to do it again.  The page holds what is in ``--work`` and no figure from anywhere else.

``--peer`` is a checkpoint that another tool made of the same Qwen, and the file of facts a JSON object: ``tool`` (name
and version), ``how``, ``cpu_seconds``, ``peak_bytes``.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from abliterate.checkpoint import direction_file
from abliterate.method.directions import given
from abliterate.model.load import quiet_transformers
from abliterate.model.prompts import load_bundled
from abliterate.recipe import Recipe, load_recipe
from bench import real_page
from bench.real_models import MODELS, UnavailableError, existing, obtain
from bench.real_steps import command, kept

TEXT = Path(__file__).parent / "real_text.txt"
PROMPTS = "bundled:contrast"
REFUSAL = "I"
"""What refusals are taken to begin with where too few are written to find out."""
CLASS_PROMPTS = 32
"""Prompts of each class that a model without a chat template reads as plain text."""


class Jobs:
    """What is done with each model; results are kept in ``work``."""

    def __init__(self, work: Path, recipe: str | None, *, all_scores: bool) -> None:
        self.work = work
        self.recipe = load_recipe(recipe) if recipe else Recipe()
        self.options = [*(["--recipe", recipe] if recipe else []), *(["--all-scores"] if all_scores else [])]
        self.key = {
            "recipe": self.recipe.to_toml(),
            "text": hashlib.sha256(TEXT.read_bytes()).hexdigest(),
            "all_scores": all_scores,
        }

    def qwen(self, base: Path) -> None:
        """The whole job, and what it changed."""
        out = self.work / "qwen-abliterated"
        self._whole("qwen-run", base, out)
        self._command("qwen-diff", ["diff", base, out])

    def smollm2(self, base: Path) -> None:
        """The whole job, which may refuse; and edits along two directions, proven."""
        self._whole("smollm2-run", base, self.work / "smollm2-abliterated")
        self._edited("smollm2-random", ["edit", base, self._random(base)], prompts=True)
        recipe = self.work / "unfiltered.toml"
        changes = {"filter_prompts": False, "refusal_tokens": (REFUSAL,)}
        recipe.write_text(self.recipe.with_changes(changes).to_toml(), "utf-8")
        candidates = self.work / "smollm2-candidates.safetensors"
        self._command("smollm2-measure", ["measure", base, "--recipe", recipe, "--out", candidates])
        middle = _layers(base) // 2
        words = ["edit", base, candidates, "--candidate", f"difference-of-means/-1/{middle}"]
        self._edited("smollm2-means", words, prompts=True)

    def gemma(self, base: Path) -> None:
        """The whole job, which refuses; an edit, proven on its bytes; and how close edits come behind its norms."""
        self._whole("gemma-run", base, self.work / "gemma-abliterated")
        self._edited("gemma-random", ["edit", base, self._random(base)], prompts=False)

        def norms() -> Mapping[str, Any]:
            from bench.real_norms import study

            kinds = {kind: load_bundled("contrast", kind, "train").texts for kind in ("harmful", "harmless")}
            classes = {kind: texts[:CLASS_PROMPTS] for kind, texts in kinds.items()}
            return study(base, TEXT.read_text("utf-8"), classes, self.work)

        kept(self.work, "gemma-norms", {**self._of(base), "prompts": CLASS_PROMPTS}, norms)

    def peer(self, base: Path, theirs: Path, facts: Path) -> None:
        """A checkpoint of another tool beside ours."""
        ours = self.work / "qwen-abliterated"
        if not (ours / "abliterate.json").is_file():
            raise SystemExit(f"{ours}: is not there; run python -m bench.real --only qwen first")
        recipe = self.options[: 2 * ("--recipe" in self.options)]
        words = ["compare", base, ours, theirs, "--text", TEXT, *recipe]
        self._command("peer-compare", words, more={"theirs": _fingerprint(theirs), "ours": _fingerprint(ours)})
        self._command("peer-diff", ["diff", base, theirs], more={"theirs": _fingerprint(theirs)})
        document = json.loads(facts.read_text("utf-8"))
        kept(self.work, "peer-facts", document, lambda: document)

    def _whole(self, name: str, base: Path, out: Path) -> dict[str, Any]:
        """``abliterate run``."""
        words = ["run", base, "--out", out, "--text", TEXT, *self.options]
        return self._command(name, words, out=out)

    def _edited(self, name: str, words: Sequence[str | Path], *, prompts: bool) -> None:
        """An edit and its proof: against hooks with ``prompts``, else on its bytes alone."""
        out = self.work / name
        done = self._command(f"{name}-edit", [*words, "--out", out], out=out)
        if done["exit"]:
            return
        how = ["--harmful", PROMPTS, "--harmless", PROMPTS] if prompts else ["--bytes-only"]
        self._command(f"{name}-verify", ["verify", out, *how])

    def _command(
        self,
        name: str,
        words: Sequence[str | Path],
        *,
        out: Path | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """A step; a folder that it shall write is in its way only where the step was not kept."""
        key = {**self.key, **(more or {})}
        return command(self.work, name, words, key=key, out=out)

    def _of(self, base: Path) -> dict[str, Any]:
        return {**self.key, "base": str(base)}

    def _random(self, base: Path) -> Path:
        """A direction file with a random vector of the width of ``base``."""
        width = json.loads((base / "config.json").read_text("utf-8"))["hidden_size"]
        vector = torch.randn(width, generator=torch.Generator().manual_seed(self.recipe.find.seed))
        return direction_file.save(given(vector), self.work / f"random-{width}.safetensors")


def _layers(base: Path) -> int:
    return int(json.loads((base / "config.json").read_text("utf-8"))["num_hidden_layers"])


def _fingerprint(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and dates of the shards of a checkpoint."""
    found = [(path.name, path.stat()) for path in sorted(folder.glob("*.safetensors"))]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


def models_in(folder: Path, names: Sequence[str], *, fetch: bool) -> tuple[dict[str, Path], dict[str, str]]:
    """The models that can be had, and why others cannot."""
    found: dict[str, Path] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            path = obtain(name, folder) if fetch else existing(name, folder)
        except UnavailableError as error:
            path, why = None, str(error)
        else:
            why = f"{MODELS[name].title}: is not in {folder}"
        if path is None:
            missing[name] = why
            print(f"left out: {why}", file=sys.stderr, flush=True)
        else:
            found[name] = path
    return found, missing


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="The main job on small models that others trained.")
    parser.add_argument("--models", type=Path, help="a folder with imports: qwen, smollm2, gemma; nothing is fetched")
    parser.add_argument("--only", default=",".join(MODELS), help="some of them, with commas")
    parser.add_argument("--recipe", help="a recipe file for all runs")
    parser.add_argument("--all-scores", action="store_true", help="score every candidate in full, for the picture")
    parser.add_argument("--peer", type=Path, help="a checkpoint of Qwen that another tool made")
    parser.add_argument("--peer-facts", type=Path, help="what is known of its making, as JSON")
    parser.add_argument("--work", type=Path, default=Path("out/real"), help="where results are kept")
    parser.add_argument("--remark", default="", help="what a reader of the costs should know of the machine")
    parser.add_argument("--write", type=Path, default=Path("docs/real-models.md"), help="the page")
    args = parser.parse_args()
    if (args.peer is None) != (args.peer_facts is None):
        parser.error("--peer and --peer-facts belong together")
    if unknown := set(args.only.split(",")) - MODELS.keys():
        parser.error(f"--only {','.join(sorted(unknown))}: there are {', '.join(MODELS)}")
    return args


def main() -> int:
    """Fetch, run, write the page; 1 where a model could not be had."""
    args = parsed()
    work = args.work.absolute()
    (work / "steps").mkdir(parents=True, exist_ok=True)
    quiet_transformers()
    jobs = Jobs(work, args.recipe, all_scores=args.all_scores)
    names = ["qwen"] if args.peer else args.only.split(",")
    folder = (args.models or work / "models").absolute()
    found, missing = models_in(folder, names, fetch=args.models is None)
    if args.peer and "qwen" in found:
        jobs.peer(found["qwen"], args.peer.absolute(), args.peer_facts)
    elif not args.peer:
        todo: Mapping[str, Callable[[Path], None]] = {"qwen": jobs.qwen, "smollm2": jobs.smollm2, "gemma": jobs.gemma}
        for name, base in found.items():
            todo[name](base)
    real_page.write(args.write, work, folder, remark=args.remark)
    print(f"written: {args.write}")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
