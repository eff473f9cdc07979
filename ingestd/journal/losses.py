"""What could not be written, until it can be: events that wait, and frames that are gone and must be counted.

Limits: `EVENTS_MAX` events wait; of older ones only the frames they count as lost are kept.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ingestd.model import Books, Clock, Event

EVENTS_MAX = 256


class WaitingEvent(NamedTuple):
    """An event to be written, and the frames it counts as received and lost."""

    event: Event
    clock: Clock
    lost: Mapping[str, int]


@dataclass(slots=True)
class _Loss:
    clock: Clock
    from_ns: int
    to_ns: int
    frames_count: int = 0


class Losses:
    """Counted in memory, in the order of their causes."""

    def __init__(self) -> None:
        self._events: deque[WaitingEvent] = deque()
        self._frames: dict[tuple[str, str], _Loss] = {}

    def __bool__(self) -> bool:
        return bool(self._events or self._frames)

    def add_frames(
        self, source: str, reason: str, frames_count: int, first_ns: int, last_ns: int, clock: Clock
    ) -> None:
        """These frames are gone."""
        loss = self._frames.setdefault((source, reason), _Loss(clock, first_ns, last_ns))
        loss.from_ns, loss.to_ns = min(loss.from_ns, first_ns), max(loss.to_ns, last_ns)
        loss.frames_count += frames_count

    def add_event(self, waiting: WaitingEvent) -> None:
        """This event could not be written now."""
        self._events.append(waiting)
        if len(self._events) > EVENTS_MAX:
            event, clock, lost = self._events.popleft()
            for reason, count in lost.items():
                self.add_frames(event.source, reason, count, event.ts_ns, event.ts_ns, clock)

    def take(self) -> list[WaitingEvent]:
        """All of it as events to be written now; the caller adds again what cannot be."""
        events = list(self._events)
        events += [
            WaitingEvent(gap(source, reason, loss.frames_count, loss.from_ns, loss.to_ns), loss.clock,
                         {reason: loss.frames_count})
            for (source, reason), loss in self._frames.items()
        ]  # fmt: skip
        self._events.clear()
        self._frames.clear()
        return events

    def put_back(self, waiting: list[WaitingEvent]) -> None:
        """What `take` gave and nobody could write."""
        for each in waiting:
            self.add_event(each)

    def into(self, books: dict[str, Books]) -> dict[str, Books]:
        """The books, with what waits here counted as received and dropped."""
        lost: dict[str, Counter[str]] = {}
        for event, _, by_reason in self._events:
            lost.setdefault(event.source, Counter()).update(by_reason)
        for (source, reason), loss in self._frames.items():
            lost.setdefault(source, Counter())[reason] += loss.frames_count
        for source, reasons in lost.items():
            of = books.get(source, Books())
            if total := sum(reasons.values()):
                dropped = Counter(of.dropped) + reasons
                books[source] = Books(of.received + total, of.committed, of.pending, of.rejected, dict(dropped))
        return books


def gap(source: str, reason: str, frames_count: int, from_ns: int, to_ns: int) -> Event:
    """The event that says that frames were lost."""
    payload = {"reason": reason, "frames": frames_count, "from_ns": from_ns, "to_ns": to_ns}
    return Event(source, "gap", from_ns, reason, payload)
