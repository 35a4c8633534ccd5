"""The formats in which values are stored, and all that is known of each: one table.

Tolerances are those of the proofs: ``verification`` says how they are used, ``docs/quantised.md`` how they were
measured.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One format of stored values, called as in a safetensors header, or "MXFP4".

    ``dtype`` is that of a stored element.  ``unit_roundoff`` is the largest relative error of rounding to nearest, and
    ``smallest_step`` the spacing of the subnormal numbers before any scale: below it rounding has an absolute error.
    ``arithmetic_roundoff`` allows for the arithmetic of an edit, relative to a column: in float64 for float32 and
    wider, else in float32.  ``kl_bound_nats`` is the mean KL between two models that rounding can explain:
    rounding the edited matrices moves a logit by about ``eps * |logit|``, and KL grows with its square.  Tiny random
    models give 1e-5 in bfloat16; the bound leaves room for deep models.

    ``added_error`` is the distance of an edited quantised matrix to the exact edit, and ``requantising_error`` that of
    re-quantising bfloat16 weights with scales of their own, both relative to the weights.
    """

    name: str
    dtype: torch.dtype
    unit_roundoff: float
    smallest_step: float
    kl_bound_nats: float
    arithmetic_roundoff: float = 2.0**-20
    added_error: float = 0.0
    requantising_error: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether values stand for themselves, without scales: only such tensors are edited element by element."""
        return self.requantising_error == 0


FORMATS = {
    each.name: each
    for each in (
        Format(
            name="BF16", dtype=torch.bfloat16, unit_roundoff=2.0**-8, smallest_step=2.0**-133, kl_bound_nats=1e-2
        ),
        Format(name="F16", dtype=torch.float16, unit_roundoff=2.0**-11, smallest_step=2.0**-24, kl_bound_nats=1e-3),
        Format(
            name="F32", dtype=torch.float32, unit_roundoff=2.0**-24, smallest_step=2.0**-149, kl_bound_nats=1e-5,
            arithmetic_roundoff=2.0**-46,
        ),
        Format(
            name="F64", dtype=torch.float64, unit_roundoff=2.0**-53, smallest_step=2.0**-1074, kl_bound_nats=1e-9,
            arithmetic_roundoff=2.0**-46,
        ),
        Format(
            name="F8_E4M3", dtype=torch.float8_e4m3fn, unit_roundoff=2.0**-4, smallest_step=2.0**-9,
            kl_bound_nats=1e-1, added_error=0.014, requantising_error=0.026,
        ),
        Format(
            name="F8_E5M2", dtype=torch.float8_e5m2, unit_roundoff=2.0**-3, smallest_step=2.0**-16,
            kl_bound_nats=3e-1, added_error=0.020, requantising_error=0.053,
        ),
        Format(
            name="MXFP4", dtype=torch.uint8, unit_roundoff=2.0**-2, smallest_step=2.0**-1,
            kl_bound_nats=3e-1, added_error=0.036, requantising_error=0.115,
        ),
    )
}  # fmt: skip

DTYPES = {each.name: each.dtype for each in FORMATS.values() if each.plain}
"""The plain formats by name."""

FP8 = {name: each.dtype for name, each in FORMATS.items() if name.startswith("F8_")}

SCALES = {**DTYPES, "F8_E8M0": torch.float8_e8m0fnu}
"""What the scales of FP8 may be stored as."""


def format_of(dtype: torch.dtype) -> Format:
    """The plain format whose elements have ``dtype``."""
    return next(each for each in FORMATS.values() if each.plain and each.dtype == dtype)
