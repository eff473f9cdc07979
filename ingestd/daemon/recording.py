"""What sources give goes into the journal here, with what only the daemon knows about it.

Every source measures the wall clock for itself, and no two measurements are quite equal. Here offsets that differ by
less than `OFFSET_TOLERANCE_NS` become one, or the chunks of two buses would be cut at every record.

A restart on the same boot continues the session of the process that crashed. How long each source was not recorded is
known when both its last stamp of before (from the journal's recovery) and its first new one are there, in whichever
order; then it becomes a gap.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping

from ingestd.clock import OFFSET_TOLERANCE_NS, WallClock
from ingestd.journal import Journal
from ingestd.model import Clock, Event, FrameBatch

OFFSETS_MAX = 8  # A clock that is set to and fro comes back to an offset; others are of the past.

log = logging.getLogger(__name__)


class Recording:
    """The `model.Recorder` over a journal."""

    def __init__(self, journal: Journal, wall_clock: WallClock) -> None:
        self._journal = journal
        self._wall_clock = wall_clock
        self._first_ns: dict[str, tuple[int, Clock]] = {}
        self._last_ns: Mapping[str, int] = {}  # until recovery has found them
        self._is_continued = False
        self._offsets_ns: deque[int] = deque(maxlen=OFFSETS_MAX)

    def frames(self, batch: FrameBatch, clock: Clock) -> None:
        """Record frames."""
        clock = self._agreed(clock)
        if batch.source not in self._first_ns and len(batch):
            first_ns = int(batch.ts_ns.min())
            self._first_ns[batch.source] = (first_ns, clock)
            if self._is_continued:
                self._journal.append_event(Event(batch.source, "resumed", first_ns), clock)
            self._note_down_time(batch.source)
        self._journal.append_frames(batch, clock)

    def _agreed(self, clock: Clock) -> Clock:
        """The clock with an offset in use that is near enough to its own, else its own, which is in use from now on."""
        for offset_ns in self._offsets_ns:
            if abs(offset_ns - clock.utc_offset_ns) <= OFFSET_TOLERANCE_NS:
                return Clock(offset_ns, clock.state)
        self._offsets_ns.appendleft(clock.utc_offset_ns)
        return clock

    def overflow(self, source: str, frames_count: int, from_ns: int, to_ns: int) -> None:
        """Record a loss in the kernel: a gap, and received and dropped in the books."""
        payload = {"reason": "overflow", "frames": frames_count, "from_ns": from_ns, "to_ns": to_ns}
        event = Event(source, "gap", from_ns, "overflow", payload)
        self._journal.append_event(event, self._agreed(self._wall_clock.now()), lost={"overflow": frames_count})
        log.warning("frames lost in the kernel source=%s frames=%d", source, frames_count)

    def event(self, event: Event) -> None:
        """Record a fact."""
        self._journal.append_event(event, self._agreed(self._wall_clock.now()))

    def expect_last_stamps(self) -> None:
        """The session is continued: `last_stamps` will tell where it broke off."""
        self._is_continued = True

    def last_stamps(self, last_ns: Mapping[str, int]) -> None:
        """The last stamp of each source before this process, in the same boot."""
        self._last_ns = last_ns
        for source in list(self._first_ns):
            self._note_down_time(source)

    def _note_down_time(self, source: str) -> None:
        if source not in self._last_ns or source not in self._first_ns:
            return
        from_ns, (to_ns, clock) = self._last_ns[source], self._first_ns[source]
        payload = {"reason": "down", "from_ns": from_ns, "to_ns": to_ns}
        self._journal.append_event(Event(source, "gap", from_ns, "down", payload), clock)
        log.warning("not recorded while the daemon was down source=%s seconds=%.3f", source, (to_ns - from_ns) / 1e9)
