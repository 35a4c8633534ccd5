"""How often does a whole run read the weights of a model that stays on disk?

    python -m bench.passes [MODEL] [--memory 700MiB] [--recipe FILE] [--apart] [--write PAGE] [--work WORK] [--kept]

Runs MODEL (the bundled model made larger, see ``bench.quarter``) three times, each in a process of its own: held in
memory; out of core; and, with ``--apart``, out of core with every stage in weight passes of its own, replies of the
edited checkpoint written one token at a time.  Counts the loads of blocks, and compares choices, bytes and replies.
Runs of the same code are kept in ``--work``; with ``--kept`` those of other code as well, which the page then says.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from abliterate import api
from abliterate.checkpoint.hashes import sha256_file
from abliterate.checkpoint.output import write_atomically
from abliterate.cli.options import parse_size
from abliterate.events import Event, Noted, Started
from abliterate.model.offload import Offloaded
from abliterate.recipe import Recipe, load_recipe
from bench.edit_speed import machine
from bench.page_parts import number, table
from bench.quarter import enlarged

HELD, SHARED, APART = "held", "shared", "apart"
STAGES = {
    "reply to training prompts": "labels and means", "reply to training and validation prompts": "labels and means",
    "filter training prompts": "filter and means", "score candidates": "selection", "edit": "edit",
    "verify": "base: replies, likelihoods, hooks",
}  # fmt: skip
"""The tasks with which stages begin."""
CLASSES, PROMPTS = ("harmful", "harmless"), "bundled:tiny-chat"
"""Of the bundled model, also where it was made larger."""
OF_EDITED = "edited: proof, replies, likelihoods"
PAGE = """# Weight passes of a run

Written by `make bench-passes`: `abliterate run {model}` on {memory} of memory, where its weights take {weights}
in float32; {find.n_train} + {find.n_val} + {find.n_test} prompts of each class, replies of at most {tokens} tokens.
{about}Loads of blocks are counted by the loader; one pass loads each once. Trials of one block, for the estimate, are
not counted.{apart}

{rows}

{checks}

Machine: {machine}.
"""
ABOUT = "The bundled model, made larger, ends its replies before. "
IN_PASSES_OF_ITS_OWN = """ "Apart": every stage in passes of its own, as if nothing were shared, all replies one token
at a time and without guesses."""


class Counted:
    """Counts the loads of the blocks of every model that is opened out of core, stage by stage."""

    def __init__(self) -> None:
        self.models: list[Offloaded] = []
        self.passes: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.said: list[str] = []
        self._stage, self._before, self._begun = "load", 0, time.perf_counter()

    def opened(self, plain: Any) -> Any:  # noqa: ANN401 - the constructor that is replaced, and its stand-in
        """A constructor that keeps what it makes."""

        def make(weights: Offloaded, *args: Any, **options: Any) -> None:  # noqa: ANN401
            plain(weights, *args, **options)
            if self.models:
                self.ended(OF_EDITED)
            self.models.append(weights)

        return make

    def hear(self, event: Event) -> None:
        """A stage ends where the next one begins."""
        if isinstance(event, Noted):
            self.said.append(event.text)
        if isinstance(event, Started):
            following = STAGES.get(event.task)
            if following is not None and self._stage != OF_EDITED:
                self.ended(following)

    def ended(self, following: str) -> None:
        """Note what the stage took."""
        now, at = self._total(), time.perf_counter()
        self.passes[self._stage] = self.passes.get(self._stage, 0) + now - self._before
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + at - self._begun
        self._stage, self._before, self._begun = following, now, at

    def _total(self) -> int:
        """Passes of all models; the first block alone is read for trials as well."""
        loads = ([its.loads[unit.name] for unit in its.units if unit.is_block] for its in self.models)
        return sum(max(of_blocks[1:], default=0) for of_blocks in loads)


def run_one(way: str, model: str, out: Path, memory_bytes: int, recipe: Recipe) -> dict[str, Any]:
    """One run in this process, as ``way`` says; what it counted."""
    counted = Counted()
    memory = None if way == HELD else memory_bytes
    with ExitStack() as changed:
        changed.enter_context(patch.object(Offloaded, "__init__", counted.opened(Offloaded.__init__)))
        if way == APART:
            for module in ("workflow.trials", "evaluate.observing", "model.equivalence"):
                changed.enter_context(patch(f"abliterate.{module}.share", lambda _, stages: [its() for its in stages]))
            changed.enter_context(patch("abliterate.workflow.trials._draft", lambda *_: None))
            changed.enter_context(patch("abliterate.model.replying.can_take_back", lambda *_: False))
        begun = time.perf_counter()
        asked = recipe.with_changes({"memory_bytes": memory or 2**40, "device": "cpu"})
        result = api.run(model, out, asked, on_event=counted.hear)
        counted.ended("")
    document = json.loads((out / "abliterate.json").read_text("utf-8"))
    if result.evaluation is None:
        raise AssertionError("replies were asked for")
    return {
        "code": code(),
        "seconds": time.perf_counter() - begun,
        "passes": {stage: count for stage, count in counted.passes.items() if count},
        "bytes_read": sum(its.bytes_read for its in counted.models),
        "size": max((its.size_bytes for its in counted.models), default=0),
        "direction": document["direction"]["sha256"],
        "files": {path.name: sha256_file(path) for path in sorted(out.glob("*.safetensors"))},
        "replies": [[sample.kind, sample.prompt, *sample.replies] for sample in result.evaluation.samples],
        "kl_nats": result.evaluation.edited.kl_nats,
        "said": [text for text in counted.said if "token for token" in text or "will be read" in text],
    }


def code() -> str:
    """What tells one state of the package from another."""
    files = sorted(Path(api.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def in_a_process(way: str, model: str, work: Path, memory: str, recipe: str | None, *, kept: bool) -> dict[str, Any]:
    """``run_one`` in a process; what an earlier one left is taken if its code was the same, or ``kept``."""
    result = work / f"{way}.json"
    if not result.is_file() or not (kept or json.loads(result.read_text("utf-8")).get("code") == code()):
        shutil.rmtree(work / way, ignore_errors=True)
        words = [
            model,
            "--way",
            way,
            "--memory",
            memory,
            "--work",
            str(work),
            *(["--recipe", recipe] if recipe else []),
        ]
        subprocess.run([sys.executable, "-m", "bench.passes", *words], check=True)
    return json.loads(result.read_text("utf-8"))


def checks(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is the same in all runs; blocks that add nothing make candidates of several layers one direction."""
    lines = []
    for what in ("direction", "files"):
        same = all(its[what] == found[HELD][what] for its in found.values())
        lines.append(f"- {what}: {'the same in all' if same else 'NOT the same'}")
    whole = found[HELD]["replies"]
    for way in found:
        if way != HELD:
            pairs = zip(whole, found[way]["replies"], strict=True)
            same = sum(one == other for one, other in pairs)
            lines.append(f"- replies of both models, {way} against held: {same} of {len(whole)} prompts the same")
            lines.append(f"- KL, first token: {found[way]['kl_nats']:.6f} against {found[HELD]['kl_nats']:.6f} nats")
    older = [way for way in found if found[way].get("code") != found[SHARED].get("code")]
    lines += [f"- run by another state of the code: {', '.join(older)}"] if older else []
    return [*lines, *(f"- said: {text}" for text in found[SHARED]["said"])]


def rows_of(found: Mapping[str, Mapping[str, Any]]) -> list[Sequence[str]]:
    """Passes by stage and way."""
    ways = [way for way in (APART, SHARED) if way in found]
    stages = dict.fromkeys(stage for way in ways for stage in found[way]["passes"])
    rows: list[Sequence[str]] = [
        (stage, *(str(found[way]["passes"].get(stage, 0)) for way in ways)) for stage in stages
    ]
    rows.append(("all", *(str(sum(found[way]["passes"].values())) for way in ways)))
    rows.append(("bytes read, GB", *(number(found[way]["bytes_read"] / 1e9, ",.1f") for way in ways)))
    rows.append(("seconds", *(number(found[way]["seconds"], ",.0f") for way in ways)))
    rows.append(("seconds, held in memory", *(number(found[HELD]["seconds"], ",.0f") for _ in ways)))
    return rows


def main() -> None:
    """Run all ways, print the table, and write the page where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("--memory", default="192MiB")
    parser.add_argument("--recipe")
    parser.add_argument("--apart", action="store_true")
    parser.add_argument("--way", choices=(HELD, SHARED, APART), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, default=Path("out/passes"))
    parser.add_argument("--write", type=Path)
    parser.add_argument("--kept", action="store_true")
    args = parser.parse_args()
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    model = args.model or str(work / "base")
    if not args.model and not (work / "base").is_dir():
        enlarged(work / "base")
    if args.way:
        recipe = load_recipe(args.recipe) if args.recipe else Recipe()
        recipe = recipe if args.model != str(work / "base") else recipe.with_changes(dict.fromkeys(CLASSES, PROMPTS))
        made = run_one(args.way, model, work / args.way, parse_size(args.memory), recipe)
        write_atomically(work / f"{args.way}.json", json.dumps(made).encode())
        return
    ways = (HELD, SHARED, *((APART,) if args.apart else ()))
    found = {way: in_a_process(way, model, work, args.memory, args.recipe, kept=args.kept) for way in ways}
    shown = [way for way in (APART, SHARED) if way in found]
    rows = table(("weight passes", *shown), rows_of(found))
    recipe = load_recipe(args.recipe) if args.recipe else Recipe()
    page = PAGE.format(
        about="" if args.model else ABOUT, apart=IN_PASSES_OF_ITS_OWN if args.apart else "",
        find=recipe.find, tokens=recipe.evaluate.max_new_tokens,
        model=Path(model).name, memory=args.memory, weights=f"{2 * found[SHARED]['size'] / 2**20:,.0f} MiB",
        rows=rows, checks="\n".join(checks(found)), machine=machine(),
    )  # fmt: skip
    print(page)
    if args.write:
        write_atomically(args.write, page.encode())


if __name__ == "__main__":
    main()
