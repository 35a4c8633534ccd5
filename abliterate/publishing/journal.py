"""What a stream has done so far, in a file: which shards the Hub has, and their proofs."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from abliterate.checkpoint.locking import Lock
from abliterate.checkpoint.output import JOURNAL, write_atomically
from abliterate.checkpoint.upload import Sent
from abliterate.errors import OutputError
from abliterate.verification.checkpoint_proof import ShardReport
from abliterate.verification.tensor_proof import TensorProof


@dataclass(kw_only=True)
class Journal:
    """What is done, in a file: the small tensors are here; these shards were proven and sent."""

    path: Path
    fingerprint: str
    filled: bool = False
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    lock: Lock | None = None

    @classmethod
    def open(cls, folder: Path, fingerprint: str) -> "Journal":
        """The journal in ``folder``, or a new one.

        Raises:
            OutputError: the folder belongs to something else, or another process is at it.
        """
        journal = cls(path=folder / JOURNAL, fingerprint=fingerprint, lock=Lock(folder))
        if folder.exists():
            try:
                document = json.loads(journal.path.read_bytes())
                known, journal.filled, journal.shards = (document[key] for key in ("fingerprint", "filled", "shards"))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise OutputError(
                    f"{folder}: is in the way", "move it away, delete it, or choose another --out"
                ) from error
            if known != fingerprint:
                raise OutputError(
                    f"{folder}: is the unfinished output of another run (model, direction, options or target differ)",
                    "finish it with the command that began it, delete it, or choose another --out",
                )
        journal.write()
        return journal

    def write(self) -> None:
        """To disk, flushed."""
        document = {"fingerprint": self.fingerprint, "filled": self.filled, "shards": self.shards}
        write_atomically(self.path, json.dumps(document).encode())

    def unlock(self) -> None:
        """Let other processes at the folder."""
        if self.lock is not None:
            self.lock.release()

    def add(self, report: ShardReport, sent: Sent, *, large: bool) -> None:
        """Record a shard that the Hub has."""
        self.shards[report.name] = {"report": asdict(report), "size_bytes": sent.size_bytes, "large": large}
        self.write()

    def is_large(self, name: str) -> bool:
        """Whether the Hub has this file ahead of the commit."""
        return name in self.shards and bool(self.shards[name]["large"])

    def sent(self, name: str) -> Sent:
        """A large file that the Hub has."""
        kept = self.shards[name]
        return Sent(path=name, size_bytes=kept["size_bytes"], sha256=kept["report"]["sha256"])

    def report(self, name: str) -> ShardReport:
        """The proof of a shard that was sent."""
        kept = dict(self.shards[name]["report"])
        proofs = tuple(TensorProof(**proof) for proof in kept.pop("proofs"))
        texts = {name: tuple(kept.get(name, ())) for name in ("failures", "not_finite")}
        return ShardReport(**{**kept, **texts, "proofs": proofs})
