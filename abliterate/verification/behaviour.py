"""How far a written checkpoint behaves from its base under hooks, and what of that rounding explains.

``model.equivalence`` measures it; here stand the figures and their bounds.
"""

from dataclasses import dataclass

import torch

from abliterate.arch.formats import FORMATS, format_of

SHARE_BOUND = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Stream share that rounding can explain, by computing dtype: activations are rounded at every add."""

MOST_SHARE = 3e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """Distance between the written checkpoint and the hooked base on held-out prompts.

    ``kl_nats`` and ``worst_kl_nats``: KL(hooked base || written), mean and largest over prompts.  ``ablation_kl_nats``:
    KL(hooked base || base), how far the ablation itself moves the model.  ``same_top``: share of prompts with the same
    most likely token.  ``stream_share``: the largest ``|Q^T h| / |h|`` over all tokens before and after every block of
    the written checkpoint; it is rounding when every writer is edited, and 0.05 to 0.4 as soon as one is missed.  None
    where no one subspace is removed everywhere.
    """

    prompts: int
    kl_nats: float
    worst_kl_nats: float
    ablation_kl_nats: float
    same_top: float
    stream_share: float | None
    kl_bound_nats: float
    share_bound: float
    exact_family: bool
    expect_removed: bool

    @property
    def failures(self) -> tuple[str, ...]:
        """What is out of bounds, as sentences.

        The KL binds class A only.  A plan that is inexact by request (class C) is reported, not judged.
        """
        found = []
        if self.expect_removed and self.stream_share is not None and not self.stream_share <= self.share_bound:
            found.append(f"the residual stream still holds {self.stream_share:.1e} of r (bound {self.share_bound:.0e})")
        if self.exact_family and not self.kl_nats <= self.kl_bound_nats:
            found.append(
                f"the written checkpoint is {self.kl_nats:.1e} nats from inference-time ablation "
                f"(bound {self.kl_bound_nats:.0e})"
            )
        return tuple(found)


def kl_bound_nats(stored: str, computing: torch.dtype) -> float:
    """Mean KL that rounding can explain, by the coarser of stored format and computing dtype."""
    return max(FORMATS[stored].kl_bound_nats, format_of(computing).kl_bound_nats)


def share_bound(stored: str, computing: torch.dtype) -> float:
    """Stream share that rounding can explain, by the coarser of stored format and computing dtype."""
    return max(SHARE_BOUND[computing], stored_share_bound(stored))


def stored_share_bound(stored: str) -> float:
    """Share that weights rounded to nearest would leave in the stream; ours leave far less, quantised ones as well."""
    return min(MOST_SHARE, 4 * FORMATS[stored].unit_roundoff)
