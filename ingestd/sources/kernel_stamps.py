"""The kernel's stamps of received frames, which are wall clock, as nanoseconds of CLOCK_MONOTONIC.

A frame that a read finds was received after the read before it had left the queue empty, and before now. So where the
wall clock was set in between, that window tells which offset a stamp belongs to: the one in force before, or the one
after. Frames lie in the queue in the order of their arrival, so the stamps also show where it was set, as a jump. A
stamp that neither offset puts into the window is of a clock that was set twice; its frame gets the time of the next
one whose time is known, or that at which it was read, and its clock says so (`ClockState.STEPPED`).

The window begins before the read that left the queue empty, with a look at both clocks there: what is received while
that read goes on, and the clock set meanwhile, is the next read's.

Linux slews both clocks alike, so that the offset between them changes only when somebody sets the wall clock; what
differs from one reading of it to the next is the reading. Therefore it is kept until a reading differs clearly, and
stamps of successive reads do not jitter against each other.

Limits: a stamp is good to `OFFSET_NOISE_NS`. Where the clock was set by less than the time between two reads, and
stamps farther apart than that hide the jump, some frames of that one read may be off by as much as it was set. Where
it was set twice, by less than that time, some may be off by that time at most, and not say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ingestd.clock import OFFSET_NOISE_NS, OFFSET_TOLERANCE_NS, WallClock, mono_ns, read_offset_ns
from ingestd.model import Clock, ClockState, Int64s

# The kernel stamps a frame before it queues it, and may be busy in between: so much earlier than the window is allowed.
QUEUE_LAG_NS_MAX: Final = 100_000_000
NO_STAMP: Final = np.iinfo(np.int64).min // 2  # A frame without a stamp; no offset puts it anywhere near.

BEFORE, AFTER, NEITHER = 0, 1, 2


class Window(NamedTuple):
    """When the frames of a read were received, in CLOCK_MONOTONIC, and the offsets in force at its two ends."""

    from_ns: int
    to_ns: int
    offset_before_ns: int
    offset_after_ns: int


class Span(NamedTuple):
    """Consecutive frames of one read that share a clock."""

    rows: slice
    clock: Clock


class _Look(NamedTuple):
    """How the clocks stood at a time in CLOCK_MONOTONIC: UTC minus CLOCK_MONOTONIC, and the clock in force."""

    at_ns: int
    offset_ns: int
    clock: Clock


class ClockStep(NamedTuple):
    """The wall clock was set: UTC minus CLOCK_MONOTONIC was one thing and is another now."""

    from_offset_ns: int
    to_offset_ns: int


class Stamped(NamedTuple):
    """What is known of the time of frames that were read: int64[frames], which clock whose is, whether it was set."""

    ts_ns: Int64s
    spans: list[Span]
    step: ClockStep | None
    now_ns: int  # when they had been read


def place(wall_ns: Int64s, window: Window) -> tuple[Int64s, NDArray[np.uint8]]:
    """When frames were received, in CLOCK_MONOTONIC, and by which offset: BEFORE, AFTER or NEITHER.

    `wall_ns` are the stamps in the order of arrival. NEITHER means that the frame was received then at the latest.
    """
    offsets = window.offset_before_ns, window.offset_after_ns
    if offsets[0] == offsets[1]:
        by = np.full(len(wall_ns), AFTER, np.uint8)
    else:
        # The window's ends are stamps too: the clock may have been set before the first frame or after the last.
        ends = (window.from_ns + offsets[0],), wall_ns, (window.to_ns + offsets[1],)
        jumps = np.diff(np.concatenate(ends)) * (1 if offsets[1] > offsets[0] else -1)
        by = (np.arange(len(wall_ns)) >= jumps.argmax()).astype(np.uint8)
    ts_ns = wall_ns - np.where(by == AFTER, offsets[1], offsets[0])
    astray = ~_fits(ts_ns, window)
    if astray.any():
        rows = np.flatnonzero(astray)
        by[rows] ^= 1
        ts_ns[rows] = wall_ns[rows] - np.where(by[rows] == AFTER, offsets[1], offsets[0])
        rows = rows[~_fits(ts_ns[rows], window)]
        by[rows] = NEITHER
        ts_ns[rows] = window.to_ns
        ts_ns[rows] = np.minimum.accumulate(ts_ns[::-1])[::-1][rows]
    return ts_ns, by


def _fits(ts_ns: Int64s, window: Window) -> NDArray[np.bool_]:
    fits: NDArray[np.bool_] = (ts_ns >= window.from_ns - QUEUE_LAG_NS_MAX) & (
        ts_ns <= window.to_ns + OFFSET_TOLERANCE_NS
    )
    return fits


class KernelStamps:
    """Converts the stamps of one queue of frames, read after read: `reading`, then read, then `convert`."""

    def __init__(
        self, read_offset: Callable[[int | None], int] = read_offset_ns, now: Callable[[], int] = mono_ns
    ) -> None:
        """`read_offset` measures the offset between the clocks, or returns what it is given if that still holds."""
        self._read_offset, self._now = read_offset, now
        self._wall = WallClock(lambda: read_offset(None))
        in_force = self._wall.now()
        self._told_ns = in_force.utc_offset_ns  # the offset in force, as far as `convert` has told
        self._latest = self._reading = self._empty = _Look(now(), in_force.utc_offset_ns, in_force)

    def reading(self) -> None:
        """A read begins. Frames that come from now on may stay in the queue, though it leaves the queue empty."""
        self._reading = self._look()

    def _look(self) -> _Look:
        """See how the clocks stand now."""
        _, known_ns, clock = self._latest
        offset_ns, at_ns = self._read_offset(known_ns), self._now()
        if abs(offset_ns - known_ns) <= OFFSET_NOISE_NS:
            offset_ns = known_ns
        if offset_ns != known_ns or clock.state is not ClockState.SET:
            clock = self._wall.now(offset_ns)
        self._latest = _Look(at_ns, offset_ns, clock)
        return self._latest

    def convert(self, wall_ns: Int64s, *, emptied: bool) -> Stamped:
        """The stamps of the frames just read, which may be none; `emptied` tells that the read left none in the queue.

        A clock that was set by less than the tolerance of `WallClock` counts as not set.
        """
        before, after = self._empty, self._look()
        window = Window(before.at_ns, after.at_ns, before.offset_ns, after.offset_ns)
        ts_ns = wall_ns - after.offset_ns
        if before.offset_ns == after.offset_ns and _fits(ts_ns, window).all():
            spans = [Span(slice(0, len(ts_ns)), after.clock)] if len(ts_ns) else []  # As nearly always.
        else:
            ts_ns, by = place(wall_ns, window)
            unknown = Clock(after.clock.utc_offset_ns, ClockState.STEPPED)
            spans = list(_spans(by, (before.clock, after.clock, unknown)))
        if emptied:
            self._empty = self._reading
        was_ns, self._told_ns = self._told_ns, after.clock.utc_offset_ns
        step = ClockStep(was_ns, self._told_ns) if was_ns != self._told_ns else None
        return Stamped(ts_ns, spans, step, after.at_ns)


def _spans(by: NDArray[np.uint8], clocks: tuple[Clock, Clock, Clock]) -> Iterator[Span]:
    """Cut where the clock changes; `by` indexes `clocks`."""
    if not len(by):
        return
    if clocks[BEFORE] == clocks[AFTER]:
        by = np.maximum(by, AFTER)
    cuts = [0, *(np.flatnonzero(np.diff(by)) + 1).tolist(), len(by)]
    for start, stop in pairwise(cuts):
        yield Span(slice(start, stop), clocks[by[start]])
