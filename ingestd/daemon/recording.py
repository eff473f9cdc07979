"""What sources give goes into the journal here, with what only the daemon knows about it.

Every source measures the wall clock for itself, and no two measurements are quite equal. Here offsets that differ by
less than `OFFSET_TOLERANCE_NS` become one, or the chunks of two buses would be cut at every record.

A restart on the same boot continues the session of the process that crashed. How long each source was not recorded is
known when both its last stamp of before (from the journal's recovery) and its first new one are there, in whichever
order; then it becomes a gap.

Limits: a source that overflows at every read would make gaps and log lines without end. `OVERFLOWS_MAX` may follow one
another, then one every `OVERFLOW_NS`, which tells all that was lost since; a process that is killed takes with it what
is not told yet.

The newest `EVENTS_KEPT` events of this process stay in memory, for people who watch; all of them are in the journal.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from ingestd.clock import OFFSET_TOLERANCE_NS, WallClock, mono_ns
from ingestd.journal import Journal
from ingestd.model import Clock, Event, FrameBatch

OFFSETS_MAX = 8  # A clock that is set to and fro comes back to an offset; others are of the past.
OVERFLOWS_MAX: Final = 20
OVERFLOW_NS: Final = 5_000_000_000
EVENTS_KEPT: Final = 200

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Overflow:
    """What a source has lost in the kernel that is not told yet. Each telling pays for OVERFLOW_NS, some on credit."""

    frames_count: int = 0
    from_ns: int = 0
    to_ns: int = 0
    paid_until_ns: int = 0

    def add(self, frames_count: int, from_ns: int, to_ns: int) -> None:
        """Some more was lost, between two instants."""
        self.from_ns = min(self.from_ns, from_ns) if self.frames_count else from_ns
        self.to_ns = max(self.to_ns, to_ns) if self.frames_count else to_ns
        self.frames_count += frames_count

    def may_be_told(self, now_ns: int) -> bool:
        """Whether there is anything, and the rate allows it."""
        return self.frames_count > 0 and self.paid_until_ns - now_ns <= (OVERFLOWS_MAX - 1) * OVERFLOW_NS


class Told(NamedTuple):
    """An event that was recorded, and its number: they count from 1, in the order of recording."""

    number: int
    event: Event
    clock: Clock


class Recording:
    """The `model.Recorder` over a journal."""

    def __init__(
        self,
        journal: Journal,
        wall_clock: WallClock,
        now: Callable[[], int] = mono_ns,
        on_frames: Callable[[FrameBatch, Clock], None] | None = None,
    ) -> None:
        """`on_frames` is told of frames once the journal has them; it returns at once and never raises."""
        self.newest_ns: dict[str, int] = {}  # the stamp of each source's newest frame, in this process
        self._journal = journal
        self._on_frames = on_frames
        self._wall_clock = wall_clock
        self._now = now
        self._first_ns: dict[str, tuple[int, Clock]] = {}
        self._last_ns: Mapping[str, int] = {}  # until recovery has found them
        self._is_continued = False
        self._offsets_ns: deque[int] = deque(maxlen=OFFSETS_MAX)
        self._overflows: dict[str, _Overflow] = {}
        self._gaps: dict[str, tuple[int, str]] = {}  # sources that are away, since when and why, until they give again
        self.newest_events: deque[Told] = deque(maxlen=EVENTS_KEPT)

    def frames(self, batch: FrameBatch, clock: Clock) -> None:
        """Record frames."""
        clock = self._agreed(clock)
        if batch.source in self._gaps and len(batch):
            from_ns, reason = self._gaps.pop(batch.source)
            payload = {"reason": reason, "from_ns": from_ns, "to_ns": int(batch.ts_ns.min())}
            self._append(Event(batch.source, "gap", from_ns, reason, payload), clock)
        if batch.source not in self._first_ns and len(batch):
            first_ns = int(batch.ts_ns.min())
            self._first_ns[batch.source] = (first_ns, clock)
            if self._is_continued:
                self._append(Event(batch.source, "resumed", first_ns), clock)
            self._journal.append_frames(batch, clock)
            self._note_down_time(batch.source)  # Behind the frames: it says that they are there.
        else:
            self._journal.append_frames(batch, clock)
        if len(batch):
            self.newest_ns[batch.source] = int(batch.ts_ns[-1])
        if self._on_frames is not None:
            self._on_frames(batch, clock)

    def _agreed(self, clock: Clock) -> Clock:
        """The clock with an offset in use that is near enough to its own, else its own, which is in use from now on."""
        for offset_ns in self._offsets_ns:
            if abs(offset_ns - clock.utc_offset_ns) <= OFFSET_TOLERANCE_NS:
                return Clock(offset_ns, clock.state)
        self._offsets_ns.appendleft(clock.utc_offset_ns)
        return clock

    def overflow(self, source: str, frames_count: int, from_ns: int, to_ns: int) -> None:
        """Record a loss in the kernel: a gap, and received and dropped in the books."""
        self._overflows.setdefault(source, _Overflow()).add(frames_count, from_ns, to_ns)
        self.tell_overflows()

    def tell_overflows(self, *, at_once: bool = False) -> None:
        """Record the losses that are waiting, as far as the rate allows, or all of them `at_once`. Call it often."""
        now_ns = self._now()
        for source, lost in self._overflows.items():
            if not lost.may_be_told(now_ns) and not (at_once and lost.frames_count):
                continue
            count, lost.frames_count = lost.frames_count, 0
            lost.paid_until_ns = max(lost.paid_until_ns, now_ns) + OVERFLOW_NS
            payload = {"reason": "overflow", "frames": count, "from_ns": lost.from_ns, "to_ns": lost.to_ns}
            event = Event(source, "gap", lost.from_ns, "overflow", payload)
            self._append(event, self._agreed(self._wall_clock.now()), lost={"overflow": count})
            log.warning("frames lost in the kernel source=%s frames=%d", source, count)

    def event(self, event: Event) -> None:
        """Record a fact."""
        self._append(event, self._agreed(self._wall_clock.now()))

    def _append(self, event: Event, clock: Clock, lost: Mapping[str, int] | None = None) -> None:
        self._journal.append_event(event, clock, lost=lost)
        number = self.newest_events[-1].number + 1 if self.newest_events else 1
        self.newest_events.append(Told(number, event, clock))

    def expect_last_stamps(self) -> None:
        """The session is continued: `last_stamps` will tell where it broke off."""
        self._is_continued = True

    def expect_gap(self, source: str, reason: str) -> None:
        """The source is away for a moment from now on: a gap, until its next frame."""
        self._gaps.setdefault(source, (self._now(), reason))  # Of two reloads without a frame between, the first.

    def forget_before(self) -> None:
        """Another session begins: what comes next continues nothing."""
        self._is_continued, self._last_ns = False, {}
        self._gaps.clear()

    def last_stamps(self, last_ns: Mapping[str, int], untold: Iterable[tuple[str, int, int]] = ()) -> None:
        """The last stamp of each source before this process, in the same boot, and gaps that are not told yet."""
        for source, from_ns, to_ns in untold:
            self._tell_down_time(source, from_ns, to_ns, self._agreed(self._wall_clock.now()))
        self._last_ns = last_ns
        for source in list(self._first_ns):
            self._note_down_time(source)

    def _note_down_time(self, source: str) -> None:
        if source not in self._last_ns or source not in self._first_ns:
            return
        from_ns, (to_ns, clock) = self._last_ns[source], self._first_ns[source]
        self._tell_down_time(source, from_ns, to_ns, clock)

    def _tell_down_time(self, source: str, from_ns: int, to_ns: int, clock: Clock) -> None:
        payload = {"reason": "down", "from_ns": from_ns, "to_ns": to_ns}
        self._append(Event(source, "gap", from_ns, "down", payload), clock)
        log.warning("not recorded while the daemon was down source=%s seconds=%.3f", source, (to_ns - from_ns) / 1e9)
