"""Amounts of bytes, for people."""


def size(size_bytes: int, *, digits: int = 1) -> str:
    """Bytes in the unit in which they have up to three digits before the point."""
    amount = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(amount) < 1000:
            return f"{amount:,.0f} {unit}" if unit == "B" else f"{amount:,.{digits}f} {unit}"
        amount /= 1000
    return f"{amount:,.{digits}f} TB"
