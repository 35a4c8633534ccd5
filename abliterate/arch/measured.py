"""What the equivalence tests measured for each family: ``measured.json``, written by ``make measured``."""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The worst of all tiny models of a family, in float64.

    ``difference`` is the largest absolute difference of logits to inference-time ablation, ``kl_nats`` the mean
    divergence from it (class B only), ``share`` the largest share of the direction left in the stream.
    """

    cases: int
    difference: float
    share: float
    kl_nats: float | None

    def __str__(self) -> str:
        agreement = f"{self.difference:.0e}" if self.kl_nats is None else f"KL {self.kl_nats:.0e}"
        return f"{agreement}, r {self.share:.0e}"


@cache
def measured() -> dict[str, Measured]:
    """By family; those without a proof (class C) are absent."""
    cases = json.loads((files("abliterate.arch") / "measured.json").read_text("utf-8")).values()
    found = {}
    for family in {case["family"] for case in cases}:
        its = [case for case in cases if case["family"] == family]
        divergences = [case["kl"] for case in its if "kl" in case]
        found[family] = Measured(
            cases=len(its),
            difference=max(case["difference"] for case in its),
            share=max(case["share"] for case in its),
            kl_nats=max(divergences) if divergences else None,
        )
    return found
