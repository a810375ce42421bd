"""A record of the cache, and the row with a checksum that it is in the file."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

KEY_BYTES = 16


class Record(NamedTuple):
    """Log-prob of one completion under one reference."""

    logp: float
    """Nats, summed over the scored tokens: a float32 value (others are rounded to one when stored)."""
    count: int  # type: ignore[assignment]  # hides tuple.count, which is not used
    """Scored tokens."""
    tokens: np.ndarray | None = None
    """[count] float32, nats per token, where asked for."""


def check_keys(keys: Collection[bytes]) -> None:
    for key in keys:
        if not isinstance(key, bytes) or len(key) != KEY_BYTES:
            raise ValueError(f"A key of the reference cache is {KEY_BYTES} bytes, got {key!r}.")


def row_of(key: bytes, record: Record) -> tuple[bytes, float, int, bytes | None, int]:
    with np.errstate(over="ignore"):  # beyond float32 is refused below, as an infinity
        logp, count = float(np.float32(record.logp)), int(record.count)
        tokens = None if record.tokens is None else np.asarray(record.tokens, dtype="<f4")
    if not math.isfinite(logp) or (tokens is not None and not np.isfinite(tokens).all()):
        raise ValueError(
            f"The reference log-prob of the completion {key.hex()} is not finite ({record.logp} nats, {count} tokens), "
            "and is not cached. Look at the reference: its weights or its dtype overflow."
        )
    if count < 0 or (tokens is not None and tokens.shape != (count,)):
        shape = "" if tokens is None else f" and log-probs per token of shape {list(tokens.shape)}"
        raise ValueError(f"The completion {key.hex()} has a count of {count} tokens{shape}: both must be [count].")
    blob = None if tokens is None else tokens.tobytes()
    return key, logp, count, blob, _checksum(key, logp, count, blob)


def record_of(row: tuple, tokens: bool) -> Record | None:
    logp, count, blob, _ = row
    if not tokens:
        return Record(logp, count)
    return None if blob is None else Record(logp, count, np.frombuffer(blob, "<f4").astype(np.float32))


def intact(key: bytes, row: tuple) -> bool:
    """Whether the row is what was stored under this key. A damaged one may hold any type in any column."""
    logp, count, blob, checksum = row
    typed = isinstance(logp, float) and isinstance(count, int) and isinstance(blob, bytes | None)
    return typed and checksum == _checksum(key, logp, count, blob)


def _checksum(key: bytes, logp: float, count: int, blob: bytes | None) -> int:
    return zlib.crc32(key + struct.pack("<dq?", logp, count, blob is not None) + (blob or b""))
