"""Numbers and row lists in words."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 5
"""Row numbers named in a sentence; inspection.json has more."""


def count(value: int, noun: str = "") -> str:
    """12,345 or "1 row", "2 rows"."""
    return f"{value:,} {noun}{'s' * (value != 1)}" if noun else f"{value:,}"


def share(value: float, whole: float) -> str:
    """12 (3.4 %); a share that is not nothing never reads 0.0 %."""
    if not whole:
        return f"{value:,}"
    percent = 100 * value / whole
    return f"{value:,} ({'<0.1' if 0 < percent < 0.05 else f'{percent:.1f}'} %)"


def row_list(rows: Sequence[int], total: int) -> str:
    """row 3; rows 3, 8, ..."""
    more = ", ..." if total > len(rows[:SHOWN]) else ""
    return f"row{'s' * (total > 1)} {', '.join(map(str, rows[:SHOWN]))}{more}"


def pair_list(rows: Sequence[Sequence[int]], total: int) -> str:
    """row 9 of row 2, ..."""
    more = ", ..." if total > len(rows[:SHOWN]) else ""
    return "; ".join(f"{row} and {other}" for row, other in rows[:SHOWN]) + more


def size(number: int) -> str:
    """Bytes as GiB, MiB or KiB."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= scale:
            return f"{number / scale:,.1f} {unit}"
    return f"{number / 2**10:,.1f} KiB"
