"""What a verification found."""

from dataclasses import dataclass

from abliterate.verification.behaviour import Behaviour
from abliterate.verification.checkpoint_proof import BytesReport


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Proof on the bytes and, unless it was skipped, on the behaviour."""

    bytes: BytesReport
    behaviour: Behaviour | None

    @property
    def failures(self) -> tuple[str, ...]:
        """Everything that is not as it must be."""
        return (*self.bytes.failures, *(self.behaviour.failures if self.behaviour else ()))

    @property
    def ok(self) -> bool:
        """Verified."""
        return not self.failures
