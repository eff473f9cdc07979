"""Time: CLOCK_MONOTONIC for order and duration, its offset to the wall clock for people.

Both clocks are read as integer nanoseconds. They tick alike except where somebody sets or slews the wall clock, so the
offset between them is measured again and again; `WallClock` decides when it has really changed.

Limits: one reading of the offset is good to a fraction of a microsecond on an idle machine. `OFFSET_TOLERANCE_NS` is
how far UTC may be from the system's before a new offset is used, so that a clock that is slewed does not cut chunks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from ingestd.model import Clock, ClockState

OFFSET_TOLERANCE_NS = 1_000_000
OFFSET_READING_NS_MAX = 5_000  # A reading that took longer was interrupted, and is taken again, …
OFFSET_NOISE_NS = 10_000  # Less than this is no difference: twice what an uninterrupted reading may be off.
OFFSET_READINGS_MAX = 4  # … so often at most; then the quickest counts.
# Nobody records with this program before it existed: a wall clock behind that date was never set.
CLOCK_SET_NS_MIN = 1_767_225_600_000_000_000  # 2026-01-01


def mono_ns() -> int:
    """Now, in nanoseconds of CLOCK_MONOTONIC."""
    return time.monotonic_ns()


def boot_id() -> str:
    """The id that the kernel gave this boot; CLOCK_MONOTONIC counts from there."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def read_offset_ns(known_ns: int | None = None) -> int:
    """CLOCK_REALTIME minus CLOCK_MONOTONIC, now; `known_ns` if a first look shows no difference beyond the noise.

    Where reading a clock is a system call, as on some virtual machines, the first look saves most of them.
    """
    if known_ns is not None and abs(-time.monotonic_ns() + time.time_ns() - known_ns) <= OFFSET_NOISE_NS:
        return known_ns
    best_ns, offset_ns = -1, 0
    for _ in range(OFFSET_READINGS_MAX):
        before = time.monotonic_ns()
        real = time.time_ns()
        after = time.monotonic_ns()
        if best_ns < 0 or after - before < best_ns:
            best_ns, offset_ns = after - before, real - (before + after) // 2
        if best_ns <= OFFSET_READING_NS_MAX:
            break
    return offset_ns


class WallClock:
    """The offset in force: kept while the measured one stays within the tolerance, then replaced.

    Keeping it lets chunks grow: no chunk spans two offsets.
    """

    def __init__(self, read: Callable[[], int] = read_offset_ns) -> None:
        self._read = read
        self._offset_ns = read()

    def now(self, measured_ns: int | None = None) -> Clock:
        """The clock in force, after looking whether the wall clock was set; `measured_ns` saves measuring again."""
        measured_ns = self._read() if measured_ns is None else measured_ns
        if abs(measured_ns - self._offset_ns) > OFFSET_TOLERANCE_NS:
            self._offset_ns = measured_ns
        set_since = mono_ns() + self._offset_ns >= CLOCK_SET_NS_MIN
        return Clock(self._offset_ns, ClockState.SET if set_since else ClockState.UNSET)
