"""The books: what became of every frame, worked out from records and from nothing else.

A `Ledger` is what all records up to some point amount to. It is the same whether it followed the records as they were
written or read them back from the disk, because both go through `apply`. A STATE record is a ledger written down: to
know the books, read the last one and apply what follows.

Of each stretch and source it knows three growing counts of frames:

    journalled   in the records written so far
    passed       up to the acknowledged position, whatever became of them
    ahead        beyond that position, but lost with segments that had to make room

so `pending = journalled - passed - ahead`, counted in the records, must be what the totals leave over.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import UUID

from ingestd.journal.record import Kind, Origin, Record
from ingestd.model import Books, Event

STATE_STRETCHES_MAX = 32  # in one STATE record, so that none outgrows a small segment

Lost = Mapping[str, Mapping[str, int]]  # frames by source and reason


class Read(NamedTuple):
    """Frames that a reader has handed out, or passed over, and that are not acknowledged."""

    sequence: int
    source: str
    frames_count: int
    is_ahead: bool


@dataclass(slots=True)
class StretchAccount:
    """One stretch in the ledger."""

    id: str
    origin: Origin
    machine_id: str
    feed_id: str = ""
    acknowledged: int = 0
    sequence_last: int = 0
    removed_through: int = 0  # segments up to this record were removed before all of it was acknowledged
    journalled: Counter[str] = field(default_factory=Counter)
    passed: Counter[str] = field(default_factory=Counter)
    ahead: Counter[str] = field(default_factory=Counter)
    last_ns: dict[str, int] = field(default_factory=dict)
    resumed_ns: dict[str, int] = field(default_factory=dict)  # first stamps behind a time of which no gap tells yet
    begins_late: bool = False  # Its first segments are gone: what came before is not ours to count.
    reads: deque[Read] = field(default_factory=deque)  # Not part of the state: a new process begins to read anew.
    read_through: int = 0

    @property
    def session_id(self) -> UUID:
        """The session of its records."""
        return self.origin.session_id

    @property
    def boot_id(self) -> str:
        """The boot of its records."""
        return self.origin.boot_id

    def pending(self, source: str) -> int:
        """Frames that are in its records and still wait."""
        return self.journalled[source] - self.passed[source] - self.ahead[source]

    @property
    def is_settled(self) -> bool:
        """Whether nothing in it waits."""
        return self.acknowledged >= self.sequence_last and not any(map(self.pending, self.journalled))

    def begin_reading(self) -> None:
        """What was read and is not acknowledged is given up, to be read again."""
        self.reads.clear()
        self.read_through = self.acknowledged

    def in_flight(self, source: str) -> int:
        """Frames beyond the acknowledged position that a reader has handed out."""
        return sum(read.frames_count for read in self.reads if read.source == source and not read.is_ahead)

    def as_json(self) -> dict[str, Any]:
        """For a STATE record."""
        return {
            "id": self.id,
            "session": self.origin.session.hex(),
            "boot": self.origin.boot.hex(),
            "machine_id": self.machine_id,
            "feed_id": self.feed_id,
            "acknowledged": self.acknowledged,
            "sequence_last": self.sequence_last,
            "removed_through": self.removed_through,
            "journalled": dict(self.journalled),
            "passed": dict(+self.passed),
            "ahead": dict(+self.ahead),
            "last_ns": self.last_ns,
            **({"resumed_ns": self.resumed_ns} if self.resumed_ns else {}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StretchAccount:
        """The inverse of `as_json`."""
        return cls(
            value["id"],
            Origin(bytes.fromhex(value["session"]), bytes.fromhex(value["boot"])),
            value["machine_id"],
            value["feed_id"],
            value["acknowledged"],
            value["sequence_last"],
            value["removed_through"],
            Counter(value["journalled"]),
            Counter(value["passed"]),
            Counter(value["ahead"]),
            dict(value["last_ns"]),
            dict(value.get("resumed_ns", {})),
        )


class Ledger:
    """What the records so far amount to."""

    def __init__(self) -> None:
        self.received: Counter[str] = Counter()
        self.committed: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.dropped: dict[str, Counter[str]] = {}
        self.stretches: dict[str, StretchAccount] = {}
        self.removing: set[int] = set()  # numbers of segments that were to be deleted; are they?
        self.session: dict[str, Any] = {}  # what is known of the newest session, see `note_session`

    def books(self) -> dict[str, Books]:
        """Where the frames of each source are."""
        pending: Counter[str] = Counter()
        for stretch in self.stretches.values():
            for source in stretch.journalled:
                pending[source] += stretch.pending(source)
        sources = sorted({*self.received, *pending, *self.committed, *self.rejected, *self.dropped})
        return {
            source: Books(
                self.received[source],
                self.committed[source],
                pending[source],
                self.rejected[source],
                dict(+self.dropped.get(source, Counter())),
            )
            for source in sources
        }

    def drop(self, source: str, reason: str, frames_count: int) -> None:
        """Count a loss among frames that are counted as received."""
        self.dropped.setdefault(source, Counter())[reason] += frames_count

    def lose(self, source: str, reason: str, frames_count: int) -> None:
        """Count frames that were received and lost before they were in a record of frames."""
        self.received[source] += frames_count
        self.drop(source, reason, frames_count)

    def note_frames(self, stretch: StretchAccount, source: str, through: int, last_ns: int) -> None:
        """The stretch has had `through` frames of the source by now, more than were known."""
        self.received[source] += through - stretch.journalled[source]
        stretch.journalled[source] = through
        stretch.last_ns[source] = last_ns

    def settle(self, stretch: StretchAccount, position: int, committed: Mapping[str, int],
               rejected: Mapping[str, int], dropped: Lost, passed: Mapping[str, int]) -> None:  # fmt: skip
        """Everything up to `position` is done with; `passed` is what the records up to there hold."""
        self.committed.update(committed)
        self.rejected.update(rejected)
        for source, reasons in dropped.items():
            for reason, count in reasons.items():
                self.drop(source, reason, count)
        stretch.passed.update(passed)
        stretch.acknowledged = max(stretch.acknowledged, position)
        stretch.sequence_last = max(stretch.sequence_last, position)

    def pass_ahead(self, stretch: StretchAccount, ahead: Mapping[str, int]) -> None:
        """The position has moved over frames that were dropped before it came there."""
        stretch.ahead.subtract(ahead)
        stretch.passed.update(ahead)

    def remove(self, stretch: StretchAccount, through: int, lost: Mapping[str, int], reason: str) -> None:
        """The stretch's records up to `through` are no more; those of `lost` had not been sent."""
        stretch.removed_through = max(stretch.removed_through, through)
        stretch.ahead.update(lost)
        for source, count in lost.items():
            self.drop(source, reason, count)

    def apply(self, record: Record, stretch: StretchAccount) -> None:
        """Take in one record, read from `stretch`; a STATE record begins or goes on with a new ledger."""
        if record.kind.is_numbered:
            stretch.sequence_last = max(stretch.sequence_last, record.sequence)
        if record.kind in (Kind.FRAMES, Kind.EVENT):  # An event, too, says how many frames came before it.
            through = record.frames_before + record.frames_count
            if stretch.begins_late and through and record.source not in stretch.last_ns:
                stretch.journalled[record.source] = record.frames_before
                stretch.passed[record.source] = record.frames_before - stretch.ahead[record.source]
            if through > stretch.journalled[record.source]:
                self.note_frames(stretch, record.source, through, record.last_ns)
        if record.kind is Kind.EVENT:
            for reason, count in record.lost().items():
                self.lose(record.source, reason, count)
            self.note_resumption(record.event(), stretch)
        elif record.kind is Kind.SESSION:
            self.note_session(record.session_id, record.session())
        elif record.kind is Kind.STATE:
            self._take_state(record.json())
        elif record.kind in (Kind.SETTLE, Kind.FEED, Kind.REMOVED):
            self._apply_bookkeeping(record.kind, record.json(), stretch)

    def note_session(self, session_id: UUID, fields: Mapping[str, Any]) -> None:
        """Keep the metadata of the newest session, for the process that continues it; of one session the latest.

        One that only ends the session says nothing of it, and `config` is long and each process's own.
        """
        if "time_base" not in fields:
            return
        known = {"id": session_id.hex, **{name: value for name, value in fields.items() if name != "config"}}
        is_same = self.session.get("id") == known["id"]
        if not is_same or known.get("updated_utc", "") >= self.session.get("updated_utc", ""):
            self.session = known

    def note_resumption(self, event: Event, stretch: StretchAccount) -> None:
        """A source is recorded again after a time without a daemon; or a gap has told of such a time."""
        if event.kind == "resumed":
            stretch.resumed_ns[event.source] = event.ts_ns
        elif event.kind == "gap" and event.key == "down":
            for each in self.stretches.values():
                if event.source in each.resumed_ns and each.resumed_ns[event.source] == event.payload.get("to_ns"):
                    del each.resumed_ns[event.source]

    def _apply_bookkeeping(self, kind: Kind, value: Mapping[str, Any], writer: StretchAccount) -> None:
        """`writer` is the stretch the record stands in, the other is the one that it is about."""
        stretch = self.stretches.get(value["stretch"])
        if stretch is None:  # Its own records were damaged, all of them.
            stretch = StretchAccount(value["stretch"], writer.origin, writer.machine_id, value["stretch"])
            self.stretches[stretch.id] = stretch
        if kind is Kind.SETTLE:
            committed, rejected, dropped = (value.get(name, {}) for name in ("committed", "rejected", "dropped"))
            passed = value.get("passed") or settled(committed, rejected, dropped)
            self.settle(stretch, value["position"], committed, rejected, dropped, passed)
            self.pass_ahead(stretch, value.get("ahead", {}))
        elif kind is Kind.FEED:
            stretch.feed_id = value["feed_id"]
        else:
            self.remove(stretch, value["through"], value["lost"], value["reason"])
            self.removing.update(value["segments"])
        self._make_up(stretch)

    def _make_up(self, stretch: StretchAccount) -> None:
        """Count as received what is done with, also where a power cut took its records and left the word of it."""
        for source, through in (stretch.passed + stretch.ahead).items():
            missing = max(0, through - stretch.journalled[source])
            self.received[source] += missing
            stretch.journalled[source] += missing

    def as_states(self) -> Iterator[dict[str, Any]]:
        """The payloads of STATE records that, applied in order, make this ledger."""
        stretches = [stretch.as_json() for stretch in self.stretches.values()]
        cuts = range(0, max(1, len(stretches)), STATE_STRETCHES_MAX)
        for part, begin in enumerate(cuts, 1):
            state: dict[str, Any] = {"part": part, "parts": len(cuts)}
            if part == 1:
                state |= {
                    "received": dict(self.received),
                    "committed": dict(self.committed),
                    "rejected": dict(self.rejected),
                    "dropped": {source: dict(reasons) for source, reasons in self.dropped.items()},
                    "removing": sorted(self.removing),
                    **({"session": self.session} if self.session else {}),
                }
            yield state | {"stretches": stretches[begin : begin + STATE_STRETCHES_MAX]}

    def _take_state(self, state: Mapping[str, Any]) -> None:
        if state["part"] == 1:
            self.received = Counter(state["received"])
            self.committed = Counter(state["committed"])
            self.rejected = Counter(state["rejected"])
            self.dropped = {source: Counter(reasons) for source, reasons in state["dropped"].items()}
            self.removing = set(state["removing"])
            self.session = dict(state.get("session", {}))
            self.stretches = {}
        for value in state["stretches"]:
            self.stretches[value["id"]] = StretchAccount.from_json(value)

    def forget(self, with_segments: Container[str]) -> None:
        """Leave out the stretches that are done with and have no segment any more."""
        for stretch in list(self.stretches.values()):
            if stretch.id not in with_segments and stretch.is_settled and not stretch.reads:
                del self.stretches[stretch.id]

    def absorb(self, later: Ledger) -> None:
        """Add what `later` followed from nothing, in stretches that this one does not know."""
        self.received.update(later.received)
        self.committed.update(later.committed)
        self.rejected.update(later.rejected)
        for source, reasons in later.dropped.items():
            self.dropped.setdefault(source, Counter()).update(reasons)
        self.stretches |= later.stretches
        self.removing |= later.removing
        if later.session:
            self.note_session(UUID(later.session["id"]), later.session)


def settled(committed: Mapping[str, int], rejected: Mapping[str, int], dropped: Lost) -> Counter[str]:
    """Frames by source, whatever became of them."""
    total: Counter[str] = Counter(committed)
    total.update(rejected)
    for source, reasons in dropped.items():
        total[source] += sum(reasons.values())
    return total


def total_of(reads: Iterable[Read], *, ahead: bool) -> Counter[str]:
    """Frames by source of what was read, or only passed over."""
    total: Counter[str] = Counter()
    for read in reads:
        if read.is_ahead == ahead:
            total[read.source] += read.frames_count
    return total
