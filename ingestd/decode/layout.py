"""Signals of one kind of frame, compiled: payload words in, columns of values out.

A `Layout` is a set of signals that occur together in frames of one kind. `decode` takes all such frames of a batch at
once and works on matrices of signals x frames; its cost is some ten array operations, whatever the number of signals.

How the bits are found: payloads are rows of 64-bit words. A signal that lies in one word is shifted left until its most
significant bit is the word's, then right (arithmetically if it is signed) until only its own bits are left. For
big-endian signals the words are byte-swapped first; then bit positions in network order count from the most
significant bit. A signal across two words is put together from both before the right shift.

Values equal cantools' to the last bit: whole-number scaling is done in whole numbers where a float64 would round on the
way (beyond 2^53), everything else as float64 multiplication and addition, in that order.

Limits: signals of at most 64 bits, payloads zero-padded to whole words (see `FrameBatch`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from ingestd.decode.databases import SignalDefinition
from ingestd.model import (
    GROUP_CHANNELS_MAX,
    Channel,
    Float64s,
    Int16s,
    Int64s,
    Quality,
    SignalBatch,
    SignalGroup,
)

Words = NDArray[np.uint64]

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
NMEA2000_PGN_MIN = 126_208  # NMEA 2000's own parameter groups begin here, those of J1939-71 end before.
EXACT_MAX = 2**53  # the largest integer up to which float64 holds every one

NOT_AVAILABLE_LABEL = re.compile(r"not.?avail|unavailable|^n/?a$|^sna$|no.?data|^null$", re.IGNORECASE)
ERROR_LABEL = re.compile(r"error|fault|invalid|fail", re.IGNORECASE)


def reserved_patterns(signal: SignalDefinition, pgn: int | None) -> tuple[int, int] | None:
    """The reserved raw values of a J1939 or NMEA 2000 parameter as (error, not available), or None if it has none.

    A raw value from `error` up to below `not available` is an error, from there on there is no data.
    J1939-71, table 1: for parameters of 16 and 32 bits the top byte decides (FE error, FF not available), for all
    others the two highest values. NMEA 2000 reserves the two highest values of any width, signed ones too. A label
    that the database gives to such a value makes it an ordinary value, unless the label says the same.
    """
    if pgn is None or signal.floating or signal.length < 2:
        return None
    nmea2000 = pgn >= NMEA2000_PGN_MIN
    if signal.signed and not nmea2000:
        return None
    highest = raw_range(signal)[1]
    error, not_available = highest - 1, highest
    if signal.length in (16, 32) and not nmea2000:
        step = (highest >> 8) + 1
        error, not_available = 0xFE * step, 0xFF * step
    for raw, label in (signal.labels or {}).items():
        if raw >= not_available and not NOT_AVAILABLE_LABEL.search(label):
            not_available = highest + 1
        if error <= raw < not_available and not ERROR_LABEL.search(label):
            error = not_available
    return error, not_available


def float8_text(value: float) -> str:
    """`value` as PostgreSQL prints a float8 (its default, shortest-precise output), to look labels up by.

    Differs from Python's repr in whole numbers ("1", not "1.0") and in switching to exponents from 1e15 on.
    """
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    sign = "-" if math.copysign(1, value) < 0 else ""
    mantissa, _, exponent_text = f"{abs(value)!r}".partition("e")
    whole, _, fraction = mantissa.partition(".")
    digits = (whole + fraction).lstrip("0")
    if not digits:
        return f"{sign}0"
    exponent = int(exponent_text or 0) - len(fraction) + len(digits) - 1
    digits = digits.rstrip("0")
    if not -4 <= exponent < 15:
        return f"{sign}{digits[0]}{'.' if digits[1:] else ''}{digits[1:]}e{exponent:+03d}"
    if exponent < 0:
        return f"{sign}0.{'0' * (-exponent - 1)}{digits}"
    whole, fraction = digits[: exponent + 1].ljust(exponent + 1, "0"), digits[exponent + 1 :]
    return f"{sign}{whole}{'.' if fraction else ''}{fraction}"


def scaled(signal: SignalDefinition, raw: int) -> float:
    """The value of one raw integer, rounded once if scaling is in whole numbers."""
    return float(raw * signal.scale + signal.offset)


def channel_of(message: str, signal: SignalDefinition) -> Channel:
    """How users see the signal: `Message.Signal`, unit, range, and labels by scaled value."""
    labels = {float8_text(scaled(signal, raw)): label for raw, label in sorted((signal.labels or {}).items())}
    return Channel(
        f"{message}.{signal.name}", signal.unit, signal.minimum, signal.maximum, labels or None, signal.layout
    )


def raw_range(signal: SignalDefinition) -> tuple[int, int]:
    """The smallest and the largest raw integer the signal's bits can hold."""
    if signal.signed:
        return -(2 ** (signal.length - 1)), 2 ** (signal.length - 1) - 1
    return 0, 2**signal.length - 1


def raw_bounds(signal: SignalDefinition) -> tuple[int, int] | None:
    """The raw integers within the signal's minimum and maximum, or None where every raw value is.

    Computed in exact fractions of the numbers as written: 3 x 0.1 is not above a maximum of 0.3.
    """
    if (signal.minimum is None and signal.maximum is None) or signal.scale == 0:
        return None
    lowest, highest = raw_range(signal)
    scale, offset = Fraction(repr(signal.scale)), Fraction(repr(signal.offset))
    low, high = lowest, highest
    for limit, is_minimum in ((signal.minimum, True), (signal.maximum, False)):
        if limit is None or not math.isfinite(limit):
            continue
        raw = (Fraction(repr(limit)) - offset) / scale
        if is_minimum == (scale > 0):
            low = max(low, math.ceil(raw))
        else:
            high = min(high, math.floor(raw))
    return None if (low, high) == (lowest, highest) else (low, high)


def extract(words: Words, signal: SignalDefinition) -> Words:
    """The bits of one signal of every frame, left-justified in a word. words: uint64[frames, words of a payload]."""
    word, shift = divmod(signal.start, 64)
    across = shift + signal.length > 64
    first = words[:, word]
    second = words[:, word + 1] if across else first
    if signal.big_endian:
        bits = first.byteswap() << np.uint64(shift)
        return bits | (second.byteswap() >> np.uint64(64 - shift)) if across else bits
    if across:
        joined = (first >> np.uint64(shift)) | (second << np.uint64(64 - shift))
        return joined << np.uint64(64 - signal.length)
    return first << np.uint64(64 - shift - signal.length)


def raw_integers(words: Words, signal: SignalDefinition) -> Int64s:
    """The raw integer of one signal of every frame; unsigned 64-bit values wrap into int64."""
    bits, shift = extract(words, signal), 64 - signal.length
    if signal.signed:
        return bits.view(np.int64) >> np.int64(shift)
    return (bits >> np.uint64(shift)).view(np.int64)


def _column(values: list[int], dtype: type[np.generic]) -> NDArray[np.generic]:
    return np.array(values, dtype=dtype).reshape(-1, 1)


class Layout:
    """The signals of one kind of frame, compiled. Build once, decode many batches; keeps no state between them."""

    def __init__(
        self,
        groups: tuple[SignalGroup, ...],
        signals: tuple[SignalDefinition, ...],
        *,
        short: bool = False,
        pgn: int | None = None,
        keep_not_available: bool = False,
    ) -> None:
        """`groups` hold the channels of `signals`, in order, `GROUP_CHANNELS_MAX` each; all frames are `short` or none.

        `pgn` is given for messages matched by it: then the reserved patterns of J1939 and NMEA 2000 apply.
        """
        self.groups = groups
        self.signals = signals
        self._short = short
        self._keep_not_available = keep_not_available
        self._word = np.array([s.start // 64 for s in signals], dtype=np.intp)
        self._swapped = np.array([s.big_endian for s in signals], dtype=bool)
        self._signed = np.flatnonzero([s.signed for s in signals])
        across = [s.start % 64 + s.length > 64 for s in signals]
        self._across = [row for row, is_across in enumerate(across) if is_across]
        self._left: Words = _column(
            [
                0 if is_across else s.start % 64 if s.big_endian else 64 - s.start % 64 - s.length
                for s, is_across in zip(signals, across, strict=True)
            ],
            np.uint64,
        )  # type: ignore[assignment]
        self._right: Words = _column([64 - s.length for s in signals], np.uint64)  # type: ignore[assignment]
        self._scale = np.array([float(s.scale) for s in signals]).reshape(-1, 1)
        self._offset = np.array([float(s.offset) for s in signals]).reshape(-1, 1)
        # Multiplying by one and adding zero would turn a float signal's -0.0 into 0.0; for integers it is a waste.
        self._linear = any(s.scale != 1 or s.offset != 0 for s in signals if not s.floating)
        self._floats = [row for row, s in enumerate(signals) if s.floating]
        self._wide = [row for row, s in enumerate(signals) if not s.floating and _may_round(s)]
        self._bounds = _Limits.make(signals, {row: raw_bounds(s) for row, s in enumerate(signals) if not s.floating})
        patterns = {row: reserved_patterns(s, pgn) for row, s in enumerate(signals)}
        self._patterns = _Limits.make(signals, patterns)

    def decode(self, words: Words, ts_ns: Int64s) -> list[SignalBatch]:
        """The signals of all frames, a batch per group. words: uint64[frames, words], ts_ns: int64[frames]."""
        if not self.signals:
            return []
        raw = self._raw(words)
        value = raw.astype(np.float64)
        if self._linear:
            value *= self._scale
            value += self._offset
        for row in self._floats:
            value[row] = _floats(words, self.signals[row])
        text = self._mend_wide(raw, value)
        quality = self._quality(raw, value, text)
        batches = []
        for number, group in enumerate(self.groups):
            rows = slice(number * GROUP_CHANNELS_MAX, number * GROUP_CHANNELS_MAX + len(group.channels))
            group_text = None if text is None or not text[rows].any() else text[rows]
            group_quality = None if quality is None or not quality[rows].any() else quality[rows]
            batches.append(SignalBatch(group, ts_ns, value[rows], group_text, group_quality))
        return batches

    def _raw(self, words: Words) -> Int64s:
        """int64[signals, frames]; unsigned 64-bit values wrap around."""
        if words.shape[1] == 1:
            first = words[:, 0]
            if not self._swapped.any():
                bits = first << self._left
            elif self._swapped.all():
                bits = first.byteswap() << self._left
            else:
                bits = np.where(self._swapped.reshape(-1, 1), first.byteswap(), first) << self._left
        else:
            bits = np.ascontiguousarray(words.T)[self._word]
            bits[self._swapped] = bits[self._swapped].byteswap()
            bits <<= self._left
            for row in self._across:
                bits[row] = extract(words, self.signals[row])
        if len(self._signed) == len(self.signals):
            return bits.view(np.int64) >> self._right.view(np.int64)
        raw = (bits >> self._right).view(np.int64)
        if len(self._signed):
            raw[self._signed] = bits[self._signed].view(np.int64) >> self._right[self._signed].view(np.int64)
        return raw

    def _mend_wide(self, raw: Int64s, value: Float64s) -> NDArray[np.object_] | None:
        """Recompute in whole numbers what float64 may have rounded; returns exact decimals beyond 2^53, or None."""
        text = None
        for row in self._wide:
            signal = self.signals[row]
            unsigned = raw[row].view(np.uint64) if not signal.signed else raw[row]
            # float64 is near enough to tell which samples are worth the slow way; the margin covers its rounding.
            approximate = np.abs(unsigned.astype(np.float64)) * max(1.0, abs(float(signal.scale)))
            large = np.flatnonzero(np.maximum(approximate, np.abs(value[row])) >= EXACT_MAX / 2)
            if signal.length == 64 and not signal.signed:
                large = np.union1d(large, np.flatnonzero(raw[row] < 0))
            for frame, number in zip(large.tolist(), unsigned[large].tolist(), strict=True):
                exact = number * signal.scale + signal.offset
                value[row, frame] = float(exact)
                if isinstance(exact, int) and abs(exact) > EXACT_MAX:
                    if text is None:
                        text = np.full(value.shape, None, dtype=object)
                    text[row, frame] = str(exact)
        return text

    def _quality(self, raw: Int64s, value: Float64s, text: NDArray[np.object_] | None) -> Int16s | None:
        """int16[signals, frames], or None where all is good. Not-available samples lose value and text, unless kept."""
        quality = np.full(raw.shape, Quality.SHORT_FRAME if self._short else 0, np.int16)
        if self._bounds is not None:
            level = self._bounds.comparable(raw)
            outside = (level < self._bounds.low) | (level > self._bounds.high)
            quality[self._bounds.rows] |= outside * np.int16(Quality.OUT_OF_RANGE)
        for row in self._floats:
            signal = self.signals[row]
            low = -np.inf if signal.minimum is None else signal.minimum
            high = np.inf if signal.maximum is None else signal.maximum
            outside = (value[row] < low) | (value[row] > high)
            quality[row] |= outside * np.int16(Quality.OUT_OF_RANGE)
        if self._patterns is not None:
            rows, level = self._patterns.rows, self._patterns.comparable(raw)
            absent = level >= self._patterns.high
            reserved = level >= self._patterns.low
            quality[rows] &= ~(reserved * np.int16(Quality.OUT_OF_RANGE))
            quality[rows] |= np.where(absent, Quality.NOT_AVAILABLE, Quality.ERROR_PATTERN).astype(np.int16) * reserved
            if not self._keep_not_available and reserved.any():
                value[rows] = np.where(reserved, np.nan, value[rows])
                if text is not None:
                    text[rows] = np.where(reserved, None, text[rows])  # type: ignore[call-overload]
        return quality if quality.any() else None


@dataclass(frozen=True, slots=True)
class _Limits:
    """Two limits for some of the rows of a raw matrix, comparable also for unsigned 64-bit signals.

    rows: which signals; low, high: int64[rows, 1]; flip: int64[rows, 1], what turns a wrapped-around unsigned value
    into a signed one of the same order (its top bit inverted), zero for all other signals.
    """

    rows: NDArray[np.intp]
    low: Int64s
    high: Int64s
    flip: Int64s

    @staticmethod
    def make(signals: tuple[SignalDefinition, ...], limits: dict[int, tuple[int, int] | None]) -> _Limits | None:
        kept = {row: limit for row, limit in limits.items() if limit is not None}
        if not kept:
            return None
        flip = [INT64_MIN if signals[row].length == 64 and not signals[row].signed else 0 for row in kept]

        def column(values: Iterable[int]) -> Int64s:
            clipped = [min(max(value + bias, INT64_MIN), INT64_MAX) for value, bias in zip(values, flip, strict=True)]
            return np.array(clipped, np.int64).reshape(-1, 1)

        low, high = zip(*kept.values(), strict=True)
        return _Limits(np.array(list(kept)), column(low), column(high), np.array(flip, np.int64).reshape(-1, 1))

    def comparable(self, raw: Int64s) -> Int64s:
        """The limited rows of `raw`, in an order that signed comparison sees."""
        return raw[self.rows] ^ self.flip


def _may_round(signal: SignalDefinition) -> bool:
    """Whether some raw value needs whole-number arithmetic to equal cantools."""
    if not isinstance(signal.scale, int):
        return signal.length == 64 and not signal.signed  # its raw value wraps around in int64
    largest = max(map(abs, raw_range(signal)))
    return largest * max(1, abs(signal.scale)) + abs(signal.offset) > EXACT_MAX


def _floats(words: Words, signal: SignalDefinition) -> Float64s:
    """The IEEE float signal of every frame, scaled."""
    bits = extract(words, signal) >> np.uint64(64 - signal.length)
    with np.errstate(all="ignore"):  # Any bits may come: signalling NaNs, infinities, products that overflow.
        if signal.length == 64:
            value = bits.view(np.float64)
        elif signal.length == 32:
            value = bits.astype(np.uint32).view(np.float32).astype(np.float64)
        else:
            value = bits.astype(np.uint16).view(np.float16).astype(np.float64)
        if signal.scale == 1 and signal.offset == 0:
            return value
        return value * float(signal.scale) + float(signal.offset)
