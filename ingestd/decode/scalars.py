"""What text protocols say for a value: numbers, text, nothing. To columns of values, text and quality.

- A number is a number wherever it stands; whether a channel is number or text follows from each sample alone, so a
  device may change its mind without becoming another channel.
- A whole number beyond 2^53 has its exact digits as text beside the nearest float64. One that float64 does not reach
  has only its digits, and the quality OUT_OF_RANGE; so has infinity, without digits.
- NaN, null and an empty text are none, with the quality NOT_AVAILABLE.
- PostgreSQL stores no NUL, and no half of a surrogate pair, which JSON can spell: U+FFFD stands for either.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ingestd.model import Float64s, Int16s, Quality

Scalar = float | int | str | bool | None

EXACT_MAX: Final = 2**53
_NOTHING: Final = frozenset({"", "nan", "+nan", "-nan", "null", "none", "n/a"})
_TOO_LARGE: Final = {"inf": math.inf, "+inf": math.inf, "ovf": math.inf, "-inf": -math.inf, "-ovf": -math.inf}
_INTEGER: Final = re.compile(r"[+-]?[0-9]+")
_NUMBER: Final = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_SURROGATE: Final = re.compile("[\ud800-\udfff\0]")
# Seconds, milliseconds, microseconds and nanoseconds since 1970 do not overlap between 1990 and 2100.
_UTC_MIN, _UTC_MAX = 631_152_000.0, 4_102_444_800.0


def scalar_of(text: str, *, decimal_comma: bool = False) -> Scalar:
    """What a text without quotes means: a number, nothing, or itself."""
    text = text.strip()
    if decimal_comma and "," in text and _NUMBER.fullmatch(dotted := text.replace(",", ".", 1)):
        text = dotted
    if _NUMBER.fullmatch(text):
        value = float(text)
        return int(text) if abs(value) >= EXACT_MAX and _INTEGER.fullmatch(text) else value
    lowered = text.lower()
    if lowered in _NOTHING:
        return None
    return _TOO_LARGE.get(lowered, text)


def is_number(text: str, *, decimal_comma: bool = False) -> bool:
    """Whether a text stands where a number belongs: NaN does, an empty one does not."""
    text = text.strip()
    if _NUMBER.fullmatch(text) or (decimal_comma and _NUMBER.fullmatch(text.replace(",", ".", 1))):
        return True
    return text.lower() in _TOO_LARGE or text.lower() in ("nan", "+nan", "-nan")


def storable(text: str) -> str:
    """The text without what PostgreSQL cannot store."""
    return _SURROGATE.sub("\ufffd", text)


def utc_of(value: Scalar) -> float | None:
    """Seconds since 1970 of an ISO 8601 text (without a zone it is UTC) or of a count of s, ms, µs or ns; else None."""
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            return None
    if isinstance(value, bool) or value is None:
        return None
    for per_second in (1, 10**3, 10**6, 10**9):
        if _UTC_MIN * per_second <= value < _UTC_MAX * per_second:
            return value / per_second
    return None


def column_of(cells: Sequence[Scalar]) -> tuple[Float64s, NDArray[np.object_] | None, Int16s | None]:
    """The samples of one channel: values, text where any has text, quality where any is not good."""
    if set(map(type, cells)) <= {float, int, bool}:
        try:
            value = np.fromiter(cells, np.float64, len(cells))
        except OverflowError:
            pass
        else:
            if (np.abs(value) < EXACT_MAX).all():
                return value, None, None
    samples = [_sample(cell) for cell in cells]
    value = np.array([sample[0] for sample in samples], np.float64)
    text = np.empty(len(samples), np.object_)
    text[:] = [sample[1] for sample in samples]
    quality = np.array([sample[2] for sample in samples], np.int16)
    return value, text if any(sample[1] is not None for sample in samples) else None, quality if quality.any() else None


def _sample(cell: Scalar) -> tuple[float, str | None, int]:
    if cell is None or cell == "":
        return math.nan, None, Quality.NOT_AVAILABLE
    if isinstance(cell, str):
        return math.nan, storable(cell), 0
    if isinstance(cell, int) and abs(cell) > EXACT_MAX:
        try:
            return float(cell), str(cell), 0
        except OverflowError:
            return math.nan, str(cell), Quality.OUT_OF_RANGE
    if math.isnan(cell):
        return math.nan, None, Quality.NOT_AVAILABLE
    if math.isinf(cell):
        return math.nan, None, Quality.OUT_OF_RANGE
    return float(cell), None, 0
