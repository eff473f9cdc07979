"""Appending: the end of a journal, where records are written and the books move with them.

Whatever changes the books is written as a record and applied to the ledger in one step, under one lock, so a STATE
written at any moment is what the records before it say.

A fault of the disk never raises from an append. The segment it happened in is left and a new one is tried: at once, and
if that cannot be written either, again after pauses, in which what comes is counted as lost. The books of the new one
begin with a STATE, so that bookkeeping which could not be written is not lost either. A disk that takes what it is
given but does not keep it (`fail_sync`) costs nothing as long as the machine runs: frames are still accepted.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf
from threading import RLock
from typing import Any
from uuid import UUID, uuid4

from ingestd.backoff import Backoff
from ingestd.journal.ledger import Ledger, Lost, StretchAccount, settled, total_of
from ingestd.journal.losses import Losses, WaitingEvent
from ingestd.journal.record import (
    HEADER,
    NO_CLOCK,
    RECORD_BYTES_MAX,
    Kind,
    Origin,
    encode_event,
    encode_frames,
    encode_json,
    pack,
)
from ingestd.journal.room import Room
from ingestd.journal.segment import HEADER_BYTES, SegmentHeader
from ingestd.journal.shelf import OpenSegment, Shelf
from ingestd.model import Clock, Event, FrameBatch

FRAMES_RECORD_BYTES_MAX = 256 << 10  # The grain in which a journal is read back.
RETRY_SECONDS_MIN = 0.1
RETRY_SECONDS_MAX = 5.0
TROUBLE_SECONDS = 60.0  # how long trouble is said that has passed
NOTICES_MAX = 64  # Nobody need read them; the newest are kept.
REFUSED_EVENT_SECONDS = 10.0  # how often frames that a full journal refuses become an event


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """The session that is recorded; `fields` go into its SESSION records as JSON."""

    id: UUID
    fields: Mapping[str, Any] = field(default_factory=dict)


class Log:
    """Where records are appended. Its parts may be used by whoever holds `lock`; its methods take it themselves."""

    def __init__(self, shelf: Shelf, session: SessionInfo, machine_id: str, boot_id: UUID, when_full: str) -> None:
        """`begin_stretch` comes next."""
        self.lock = RLock()
        self.shelf = shelf
        self.ledger = Ledger()
        self.losses = Losses()
        self.room = Room(self, when_full)
        self.writable, self.durable = True, True
        self.trouble, self.trouble_at = "", 0.0
        self.notices: deque[str] = deque(maxlen=NOTICES_MAX)
        self.bytes_written = 0
        self.is_closed = False
        self.recovered = False  # Only then does the ledger know everything, and may be written down.
        self.state_number = 0  # the newest segment with a STATE: older ones are not needed for the books
        self.segment: OpenSegment | None = None
        self.finished: list[OpenSegment] = []  # to be trimmed, synced and closed
        self._session, self._machine_id = session, machine_id
        self._origin = Origin(session.id.bytes, boot_id.bytes)
        self._session_owed = False
        self._ordinal = 0
        self._retry_at, self._backoff = 0.0, Backoff(RETRY_SECONDS_MIN, RETRY_SECONDS_MAX)
        self._failed_at = -inf
        self._leave_at, self._leave_backoff = 0.0, Backoff(RETRY_SECONDS_MIN, RETRY_SECONDS_MAX)
        self._losses_written_at = 0.0
        self._record_bytes_max = min(RECORD_BYTES_MAX, shelf.segment_bytes // 4)
        self._frames_record_bytes_max = min(FRAMES_RECORD_BYTES_MAX, shelf.segment_bytes // 8)

    def append_frames(self, batch: FrameBatch, clock: Clock) -> None:
        """Record frames of one source in wire order. When this returns the kernel has them, or they are counted."""
        if not len(batch):
            return
        with self.lock:
            for first_ns, last_ns, count, payload in encode_frames(batch, self._frames_record_bytes_max):
                before = self.stretch.journalled[batch.source]
                reason = self._append(Kind.FRAMES, payload, batch.source, clock, first_ns, count, before)
                if reason:
                    self.losses.add_frames(batch.source, reason, count, first_ns, last_ns, clock)
                else:
                    self.ledger.note_frames(self.stretch, batch.source, before + count, last_ns)

    def append_event(self, event: Event, clock: Clock, lost: Mapping[str, int]) -> None:
        """Record a fact. `lost` are frames by reason that it counts as received and dropped."""
        with self.lock:
            if not self._append_event(event, clock, lost):
                self.losses.add_event(WaitingEvent(event, clock, lost))

    def _append_event(self, event: Event, clock: Clock, lost: Mapping[str, int]) -> bool:
        payload, before = encode_event(event, lost), self.stretch.journalled[event.source]
        if HEADER.size + len(event.source.encode()) + len(payload) > self._record_bytes_max:
            payload = encode_event(replace(event, payload={"left_out_bytes": len(payload)}), lost)
        if self._append(Kind.EVENT, payload, event.source, clock, event.ts_ns, 0, before):
            return False
        for reason, count in lost.items():
            self.ledger.lose(event.source, reason, count)
        self.ledger.note_resumption(event, self.stretch)
        return True

    def append_session(self, fields: Mapping[str, Any]) -> None:
        """Record metadata of the session; they also begin every further stretch."""
        with self.lock:
            self._session = SessionInfo(self._session.id, dict(fields))
            self._session_owed = bool(self._append(Kind.SESSION, encode_json(self._session.fields)))

    def begin_stretch(self, session: SessionInfo | None = None) -> None:
        """End the stretch being written and begin another, in a segment of its own; of another session if given."""
        with self.lock:
            if session is not None:
                self._session = session
                self._origin = Origin(session.id.bytes, self._origin.boot)
            self.leave_segment()
            stretch_id = uuid4().hex
            self.stretch = StretchAccount(stretch_id, self._origin, self._machine_id, stretch_id)
            self.ledger.stretches[stretch_id] = self.stretch
            self._ordinal = 0
            self._begin_segment(Kind.SESSION)

    def acknowledge(
        self, stretch_id: str, position: int, committed: Mapping[str, int], rejected: Mapping[str, int], dropped: Lost
    ) -> None:
        """Every record up to `position` is done with; what became of the frames since the last position, by source."""
        committed, rejected = +Counter(committed), +Counter(rejected)  # An event's source counts no frames.
        with self.lock:
            account = self.ledger.stretches.get(stretch_id)
            if account is None or position < account.acknowledged:
                return
            reads = [read for read in account.reads if read.sequence <= position]
            told = settled(committed, rejected, dropped)
            # At the same position again: what is missing behind the last record that there is (`settle_end`).
            is_told = position > account.read_through or position == account.acknowledged
            passed = told if is_told else total_of(reads, ahead=False)
            ahead = total_of(reads, ahead=True)
            parts = {"committed": committed, "rejected": rejected, "dropped": dropped, "ahead": ahead}
            value: dict[str, Any] = {"stretch": stretch_id, "position": position}
            value |= {name: counts for name, counts in parts.items() if counts}
            if passed != told:
                value["passed"] = passed
            self.write_bookkeeping(Kind.SETTLE, value)
            for _ in reads:
                account.reads.popleft()
            self.ledger.settle(account, position, committed, rejected, dropped, passed)
            self.ledger.pass_ahead(account, ahead)
            self.tell_lost(dropped)

    def assign_feed(self, stretch_id: str, feed_id: str, position: int) -> None:
        """The stretch is sent under this name from now on; it begins at `position`."""
        with self.lock:
            if (account := self.ledger.stretches.get(stretch_id)) is not None:
                value = {"stretch": stretch_id, "feed_id": feed_id, "position": position}
                self.write_bookkeeping(Kind.FEED, value)
                account.feed_id = feed_id

    def settle_end(self, account: StretchAccount, seen: Mapping[str, int], sequence: int) -> dict[str, dict[str, int]]:
        """Everything there is of a stretch that has ended was read, up to `sequence`: settle what is missing behind it.

        `seen` counts the frames of each source that were there, or are known to be lost. Returns what is lost.
        """
        if account.acknowledged < sequence or account.is_settled:
            return {}
        reason = "budget" if account.removed_through > sequence else "damage"
        missing = {source: through - seen[source] for source, through in account.journalled.items()}
        dropped = {source: {reason: count} for source, count in missing.items() if count > 0}
        self.acknowledge(account.id, account.sequence_last, {}, {}, dropped)
        return dropped

    def _append(self, kind: Kind, payload: bytes, source: str = "", clock: Clock = NO_CLOCK, ts_ns: int = 0,
                frames_count: int = 0, frames_before: int = 0) -> str:  # fmt: skip
        """Write a record. Returns why it could not be: "" (it was), "budget" or "journal"."""
        size = HEADER.size + len(source.encode()) + len(payload)
        if size > self._record_bytes_max:
            self.report(f"a record of {size} bytes is too large for the journal: left out")
            return "journal"
        while True:
            if (segment := self.segment) is None or segment.room < size:
                if reason := self._begin_segment(kind):
                    return reason
                continue
            if segment.is_reserve and kind is Kind.FRAMES:
                return "budget"
            sequence = self.stretch.sequence_last + kind.is_numbered
            data = pack(
                kind, self._origin, sequence, payload, source=source, clock=clock, ts_ns=ts_ns,
                frames_count=frames_count, frames_before=frames_before, seed=segment.segment.header.seed,
            )  # fmt: skip
            try:
                segment.append(data)
            except OSError as error:
                self.fail(error)  # Another segment may take it.
                continue
            self.bytes_written += len(data)
            self.stretch.sequence_last = sequence
            return ""

    def write_bookkeeping(self, kind: Kind, value: Mapping[str, Any]) -> bool:
        """Write a record about the journal itself. The caller applies what it says afterwards, written or not.

        Not before: a STATE that begins a new segment would say it already. If it could not be written nothing more
        goes into this segment, and the STATE of the next one says it.
        """
        if not self._append(kind, encode_json(value)):
            return True
        self.leave_segment()
        return False

    def _begin_segment(self, kind: Kind) -> str:
        """Go on in a new segment. Returns why that cannot be: "", "budget" or "journal"."""
        if self.is_closed or time.monotonic() < self._retry_at:
            return "journal"
        try:
            if (allocated := self.room.take_segment(is_data=kind is Kind.FRAMES)) is None:
                return "budget"
            number, descriptor, is_reserve = allocated
            header = SegmentHeader(
                number, bytes.fromhex(self.stretch.id), self._ordinal + 1, self._origin,
                self.stretch.sequence_last + 1, self._machine_id,
            )  # fmt: skip
            self.leave_segment()
            self.segment = self.shelf.use(descriptor, header, is_reserve=is_reserve)
            self._ordinal += 1
            self.bytes_written += HEADER_BYTES
            self.write_state()
        except OSError as error:
            self.fail(error)
            return "journal"
        if not self.writable:
            self.tell(f"the journal {self.shelf.folder} can be written again")
        self.writable = True
        if self.durable:
            self.trouble = ""
        if not self.stretch.sequence_last or self._session_owed:
            self.append_session(self._session.fields)
        self.write_losses()
        return "journal" if self._retry_at > time.monotonic() else ""

    def write_state(self) -> None:
        """Write down the whole ledger, unless what earlier runs left is not yet in it. Raises OSError."""
        if not self.recovered or self.segment is None:
            return
        self.ledger.forget({*self.shelf.by_stretch, self.stretch.id})
        records, header = [], self.segment.segment.header
        for state in self.ledger.as_states():
            if state["part"] == 1:
                state["segment"] = {
                    "version": header.version, "number": header.number, "stretch": header.stretch_id,
                    "ordinal": header.ordinal, "sequence_first": header.sequence_first, "machine_id": header.machine_id,
                }  # fmt: skip
            payload = encode_json(state)
            records.append(pack(Kind.STATE, self._origin, self.stretch.sequence_last, payload, seed=header.seed))
        data = b"".join(records)
        if len(data) <= min(self.segment.room, self.shelf.segment_bytes // 2):
            self.segment.append(data)
            self.bytes_written += len(data)
            self.state_number = self.segment.segment.number

    def leave_segment(self) -> None:
        """Write nothing more to the segment; `sync` does the rest."""
        if self.segment is not None:
            self.finished.append(self.segment)
            self.segment = None

    def fail(self, error: OSError) -> None:
        """The disk refused: leave the segment. The next one may be tried at once, and after more faults with pauses."""
        self.writable = False
        self.report(f"the journal {self.shelf.folder} cannot be written: {error.strerror or error}")
        self.leave_segment()
        now = time.monotonic()
        is_first = now > self._failed_at + 2 * RETRY_SECONDS_MAX
        if is_first:
            self._backoff.reset()
        self._failed_at = now
        self._retry_at = now if is_first else now + self._backoff.next_seconds()

    def fail_sync(self, error: OSError) -> None:
        """The disk took what was written and does not keep it, or the file is gone: what follows goes into another."""
        self.durable = False
        self.report(f"the journal {self.shelf.folder} cannot be made durable: {error.strerror or error}")
        if isinstance(error, FileNotFoundError):
            self.leave_segment()
        self.leave_suspect()

    def leave_suspect(self) -> None:
        """If a sync of the segment has failed: see, now and then, whether another can be made durable."""
        is_due = time.monotonic() >= self._leave_at
        if self.segment is not None and self.segment.is_suspect and is_due:
            self._leave_at = time.monotonic() + self._leave_backoff.next_seconds()
            self.leave_segment()

    def synced(self) -> None:
        """All that is in the segment being written is durable."""
        if not self.durable:
            self.durable = True
            self._leave_backoff.reset()
            self.tell(f"the journal {self.shelf.folder} is durable again")

    def report(self, trouble: str) -> None:
        """Something is wrong, in words for the operator: said for a while, or for as long as it lasts."""
        self.trouble, self.trouble_at = trouble, time.monotonic()
        self.tell(trouble)

    def tell(self, notice: str) -> None:
        """Something has changed, or is lost: kept until somebody asks."""
        self.notices.append(notice)

    def tell_lost(self, lost: Lost) -> None:
        """Frames are lost, by source and reason."""
        for source, reasons in lost.items():
            for reason, count in reasons.items():
                self.tell(f"frames lost source={source} frames={count} reason={reason}")

    def forget_trouble(self) -> None:
        """What was wrong is over: the disk takes what it is given, and nothing was reported for a while."""
        if self.writable and self.durable and time.monotonic() > self.trouble_at + TROUBLE_SECONDS:
            self.trouble = ""

    def try_again(self) -> None:
        """Where there was no segment to be had: see whether that is over, although nobody appends."""
        if self.segment is None:
            self._begin_segment(Kind.STATE)

    def write_losses(self, *, at_once: bool = True) -> None:
        """Write what could not be written before, though not too often; what still cannot be stays."""
        is_due = self.writable and time.monotonic() >= self._losses_written_at + REFUSED_EVENT_SECONDS
        if not self.losses or not (at_once or is_due):
            return
        self._losses_written_at = time.monotonic()
        waiting = self.losses.take()
        while waiting and self._append_event(*waiting[0]):
            event, _, lost = waiting.pop(0)
            if event.kind == "gap":
                self.tell_lost({event.source: lost})
        self.losses.put_back(waiting)
