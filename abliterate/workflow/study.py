"""The trials of a search: kept one by one in a file, and the next one suggested from all before it.

What is suggested follows from the seed, the number of the trial and the trials before it alone: whether these were run
just now or read from the file makes no difference.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from abliterate.checkpoint.output import write_atomically
from abliterate.errors import UsageError
from abliterate.method.kernel import PER_LAYER
from abliterate.method.search import Trial, trial_of
from abliterate.model.ranks import is_first, meet

EI_CANDIDATES = 128
"""Points that are compared for each suggestion, heretic's number."""


def check_optuna() -> None:
    """Check that the library that suggests trials is there.

    Raises:
        UsageError: it is not.
    """
    if find_spec("optuna") is None:
        raise UsageError("--trials needs optuna, which is not installed", "pip install 'abliterate[search]'")


def sampler() -> str:
    """What suggests trials, with its version."""
    return f"multivariate TPE, optuna {metadata.version('optuna')}"


def suggest(
    trials: Sequence[Trial], ranges: Mapping[str, tuple[float, float]], *, seed: int, startup: int
) -> dict[str, float | bool]:
    """The parameters of the trial after ``trials``, by multivariate TPE; the first ``startup`` are drawn at random.

    Trials that broke the model are left out of account.
    """
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space: dict[str, BaseDistribution] = {name: FloatDistribution(*ends) for name, ends in ranges.items()}
    space[PER_LAYER] = CategoricalDistribution((False, True))
    drawn = hashlib.sha256(f"{seed}/{len(trials)}".encode()).digest()
    sampler = optuna.samplers.TPESampler(
        multivariate=True, n_startup_trials=startup, n_ei_candidates=EI_CANDIDATES, seed=int.from_bytes(drawn[:4])
    )
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    for trial in trials:
        told: dict[str, Any] = {"state": optuna.trial.TrialState.FAIL}
        if trial.is_finite:
            told = {"values": [trial.unanswered, trial.kl_nats]}
        study.add_trial(optuna.trial.create_trial(params=dict(trial.parameters), distributions=space, **told))
    return study.ask(space).params


class Study:
    """The finished trials of one piece of work, ``key``, in a file; without a path they are kept in memory alone.

    The file has the key on its first line, and a trial on each other.  A line that was cut off is dropped with whatever
    is behind it, and a file of other work is begun again.  ``known`` are trials of the same work from elsewhere.
    """

    def __init__(self, path: Path | None, key: str, known: Sequence[Trial] = ()) -> None:
        self.path, self.key = path, key
        self.trials = max(list(known), self._read(), key=len)
        meet()  # all have read what there was
        if path is not None and is_first():
            lines = [_line({"study": key}), *(_line(trial.to_json()) for trial in self.trials)]
            write_atomically(path, b"".join(lines))

    def add(self, trial: Trial) -> None:
        """Keep one more trial."""
        self.trials.append(trial)
        if self.path is not None and is_first():
            with self.path.open("ab") as file:
                file.write(_line(trial.to_json()))
                file.flush()
                os.fsync(file.fileno())

    def _read(self) -> list[Trial]:
        if self.path is None or not self.path.is_file():
            return []
        first, *lines = self.path.read_bytes().split(b"\n")
        found: list[Trial] = []
        if first + b"\n" != _line({"study": self.key}):
            return found
        for line in lines:
            try:
                trial = trial_of(json.loads(line))
            except ValueError:
                break
            if trial.number != len(found):
                break
            found.append(trial)
        return found


def _line(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, allow_nan=False).encode() + b"\n"
