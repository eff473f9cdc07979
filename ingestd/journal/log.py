"""The journal of a running daemon: appended to on the event loop, read back and made durable in threads.

One lock guards everything but the slow calls to the kernel. Whatever changes the books is written as a record and
applied to the ledger in one step under that lock, so a STATE written at any moment is what the records before it say.

A fault of the disk never raises from an append. The segment it happened in is left, what could not be written is
counted, and the next append after a pause tries a new segment; the books of that one begin with a STATE, so that
bookkeeping which could not be written is not lost either.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock, RLock
from typing import Any
from uuid import UUID, uuid4

from ingestd.errors import IngestdError, UsageError
from ingestd.journal.holder import take_lock
from ingestd.journal.ledger import Ledger, Lost, StretchAccount, settled, total_of
from ingestd.journal.losses import Losses, WaitingEvent, gap
from ingestd.journal.reader import StretchReader
from ingestd.journal.record import (
    HEADER,
    NO_CLOCK,
    RECORD_BYTES_MAX,
    Kind,
    Origin,
    Record,
    encode_event,
    encode_frames,
    encode_json,
    pack,
)
from ingestd.journal.recovery import Segment, take_stock
from ingestd.journal.room import Room
from ingestd.journal.segment import (
    HEADER_BYTES,
    MACHINE_BYTES_MAX,
    Damage,
    SegmentHeader,
    Unreadable,
    list_folder,
    read_header,
)
from ingestd.journal.shelf import OpenSegment, Shelf
from ingestd.model import Books, Clock, Event, FrameBatch

SEGMENT_BYTES = 16 << 20
SEGMENT_BYTES_MIN = 64 << 10
SEGMENTS_MIN = 4  # written, prepared, kept for bookkeeping, and one with data
FRAMES_RECORD_BYTES_MAX = 256 << 10  # The grain in which a journal is read back.
RETRY_SECONDS_MIN = 0.1
RETRY_SECONDS_MAX = 5.0
REFUSED_EVENT_SECONDS = 10.0  # how often frames that a full journal refuses become an event

POLICIES = ("drop-oldest", "drop-newest")


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """The session that is recorded; `fields` go into its SESSION records as JSON."""

    id: UUID
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LastSession:
    """What the newest segment says of the process that wrote it."""

    session_id: UUID
    boot_id: str
    ended: bool


@dataclass(frozen=True, slots=True)
class Recovery:
    """What earlier runs left, in words and numbers. `last_stamps`: of each source, in the session before ours."""

    warnings: list[str]
    last_stamps: Mapping[str, int]
    torn_bytes: int = 0
    damaged_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Stretch:
    """A stretch as it was when asked for. Positions are sequence numbers; 0 is before the first record."""

    id: str
    session_id: UUID
    boot_id: str
    machine_id: str
    feed_id: str
    acknowledged: int
    last_sequence: int
    is_current: bool
    bytes: int


class Journal:
    """A folder of segments, held by this process. Appends are for one thread; everything may be called from any."""

    def __init__(self, folder: Path, lock_descriptor: int, session: SessionInfo, machine_id: str, boot_id: str,
                 max_bytes: int, when_full: str, segment_bytes: int) -> None:  # fmt: skip
        """Use `open`."""
        self.folder, self.max_bytes, self.when_full, self.segment_bytes = folder, max_bytes, when_full, segment_bytes
        self.writable, self.trouble = True, ""
        self.bytes_written = self.syncs = 0
        self.lock = RLock()
        self.ledger = Ledger()
        self.shelf = Shelf(folder, segment_bytes)
        self.state_number: int | None = None  # the newest segment that holds a STATE; older ones are not needed for it
        self.recovered = False
        self._session, self._machine_id = session, machine_id
        self._origin = Origin(session.id.bytes, UUID(boot_id).bytes)
        self._number_first = self.shelf.number_last + 1  # of our own segments
        self._lock_descriptor = lock_descriptor
        self._sync_lock = Lock()
        self._room = Room(self)
        self._losses = Losses()
        self._refused_event_at = 0.0
        self._segment: OpenSegment | None = None
        self._finished: list[OpenSegment] = []  # to be trimmed, synced and closed
        self._ordinal = 0
        self._retry_at, self._pause = 0.0, RETRY_SECONDS_MIN
        self._record_bytes_max = min(FRAMES_RECORD_BYTES_MAX, segment_bytes // 8)
        self._session_owed = False
        self._closed = False

    def __repr__(self) -> str:
        return f"<Journal {self.folder}: {len(self.ledger.stretches)} stretches, {self.bytes_used} bytes>"

    @classmethod
    def open(cls, folder: Path, *, session: SessionInfo, machine_id: str, boot_id: str, max_bytes: int,
             when_full: str = "drop-oldest", segment_bytes: int = SEGMENT_BYTES) -> Journal:  # fmt: skip
        """Take the folder and begin a stretch in it. Raises UsageError, and IngestdError if somebody else has it.

        Takes the same time however much lies in the folder: that is for `recover` to read.
        """
        if when_full not in POLICIES:
            raise UsageError(f"a journal has no policy {when_full!r}", f"one of {', '.join(POLICIES)}")
        if segment_bytes < SEGMENT_BYTES_MIN or max_bytes < SEGMENTS_MIN * segment_bytes:
            raise UsageError(f"{max_bytes} bytes are too few for a journal", f"{SEGMENTS_MIN * SEGMENT_BYTES} at least")
        if len(machine_id.encode()) > MACHINE_BYTES_MAX:
            raise UsageError(f"an id of a machine takes at most {MACHINE_BYTES_MAX} bytes")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            journal = cls(folder, take_lock(folder), session, machine_id, boot_id, max_bytes, when_full, segment_bytes)
        except OSError as error:
            raise IngestdError(f"the journal {folder} cannot be opened: {error.strerror}") from error
        journal.recovered = journal._number_first == 1
        journal.begin_stretch()
        return journal

    @staticmethod
    def peek(folder: Path) -> LastSession | None:
        """Whose the newest segment is. Changes nothing, and asks nobody who holds the journal."""
        names = list_folder(folder)[0] if folder.is_dir() else []
        for name in reversed([name for name in names if name.number and not name.rejected]):
            try:
                header = read_header(name.path)
            except Unreadable:
                continue
            if header is not None:
                session_id, boot = UUID(bytes=header.origin.session), UUID(bytes=header.origin.boot)
                return LastSession(session_id, str(boot), header.ended)
        return None

    # What is recorded

    def append_frames(self, batch: FrameBatch, clock: Clock) -> None:
        """Record frames of one source in wire order. When this returns the kernel has them, or they are counted."""
        if not len(batch):
            return
        with self.lock:
            for first_ns, last_ns, count, payload in encode_frames(batch, self._record_bytes_max):
                before = self.stretch.journalled[batch.source]
                reason = self._append(Kind.FRAMES, payload, batch.source, clock, first_ns, count, before)
                if reason:
                    self._losses.add_frames(batch.source, reason, count, first_ns, last_ns, clock)
                else:
                    self.ledger.note_frames(self.stretch, batch.source, before + count, last_ns)

    def append_event(self, event: Event, clock: Clock, *, lost: Mapping[str, int] | None = None) -> None:
        """Record a fact. `lost` are frames by reason that it counts as received and dropped."""
        with self.lock:
            if not self._append_event(event, clock, lost or {}):
                self._losses.add_event(WaitingEvent(event, clock, lost or {}))

    def _append_event(self, event: Event, clock: Clock, lost: Mapping[str, int]) -> bool:
        payload, before = encode_event(event, lost), self.stretch.journalled[event.source]
        if self._append(Kind.EVENT, payload, event.source, clock, event.ts_ns, 0, before):
            return False
        for reason, count in lost.items():
            self.ledger.lose(event.source, reason, count)
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
            self._leave_segment()
            stretch_id = uuid4().hex
            self.stretch = StretchAccount(stretch_id, self._origin, self._machine_id, stretch_id)
            self.ledger.stretches[stretch_id] = self.stretch
            self._ordinal = 0
            self._begin_segment(Kind.SESSION)

    # Writing

    def _append(self, kind: Kind, payload: bytes, source: str = "", clock: Clock = NO_CLOCK, ts_ns: int = 0,
                frames_count: int = 0, frames_before: int = 0) -> str:  # fmt: skip
        """Write a record. Returns why it could not be: "" (it was), "budget" or "journal"."""
        size = HEADER.size + len(source.encode()) + len(payload)
        if size > min(RECORD_BYTES_MAX, self.segment_bytes // 2):
            self.trouble = f"a record of {size} bytes is too large for the journal: left out"
            return "journal"
        segment = self._segment
        if segment is None or segment.room < size:
            if reason := self._begin_segment(kind):
                return reason
            segment = self._segment
        assert segment is not None
        if segment.is_reserve and kind is Kind.FRAMES:
            return "budget"
        sequence = self.stretch.sequence_last + kind.is_numbered
        data = pack(
            kind, self._origin, sequence, payload, source=source, clock=clock, ts_ns=ts_ns, frames_count=frames_count,
            frames_before=frames_before,
        )  # fmt: skip
        try:
            segment.append(data)
        except OSError as error:
            self._fail(error)
            return "journal"
        self.bytes_written += len(data)
        self.stretch.sequence_last = sequence
        return ""

    def write_bookkeeping(self, kind: Kind, value: Mapping[str, Any]) -> bool:
        """Write a record about the journal itself. What it says is applied by the caller, also if it is not written.

        Then nothing more goes into this segment: the next one begins with a STATE, which says it too.
        """
        if not self._append(kind, encode_json(value)):
            return True
        self._leave_segment()
        return False

    def _begin_segment(self, kind: Kind) -> str:
        """Go on in a new segment. Returns why that cannot be: "", "budget" or "journal"."""
        if time.monotonic() < self._retry_at:
            return "journal"
        try:
            if (allocated := self._room.take_segment(is_data=kind is Kind.FRAMES)) is None:
                return "budget"
            number, descriptor, is_reserve = allocated
            header = SegmentHeader(
                number, bytes.fromhex(self.stretch.id), self._ordinal + 1, self._origin,
                self.stretch.sequence_last + 1, self._machine_id,
            )  # fmt: skip
            self._leave_segment()
            self._segment = self.shelf.use(descriptor, header, is_reserve=is_reserve)
            self._ordinal += 1
            self.bytes_written += HEADER_BYTES
            self.write_state()
        except OSError as error:
            self._fail(error)
            return "journal"
        self.writable, self.trouble, self._pause = True, "", RETRY_SECONDS_MIN
        if not self.stretch.sequence_last or self._session_owed:
            self.append_session(self._session.fields)
        self._write_losses()
        return "journal" if self._retry_at > time.monotonic() else ""

    def write_state(self) -> None:
        """Write down the whole ledger, unless earlier runs are not yet in it. Raises OSError."""
        if not self.recovered or self._segment is None:
            return
        self.ledger.forget({*self.shelf.by_stretch, self.stretch.id})
        records = []
        for state in self.ledger.as_states():
            if state["part"] == 1:
                header = self._segment.segment.header
                state["segment"] = {
                    "number": header.number, "stretch": header.stretch_id, "ordinal": header.ordinal,
                    "sequence_first": header.sequence_first, "machine_id": header.machine_id,
                }  # fmt: skip
            records.append(pack(Kind.STATE, self._origin, self.stretch.sequence_last, encode_json(state)))
        data = b"".join(records)
        if len(data) <= min(self._segment.room, self.segment_bytes // 2):
            self._segment.append(data)
            self.bytes_written += len(data)
            self.state_number = self._segment.segment.number

    def _leave_segment(self) -> None:
        """Nothing more is written to the segment; `sync` does the rest."""
        if self._segment is not None:
            self._finished.append(self._segment)
            self._segment = None

    def _fail(self, error: OSError) -> None:
        self.writable, self.trouble = False, f"the journal {self.folder} cannot be written: {error.strerror or error}"
        self._leave_segment()
        self._retry_at = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, RETRY_SECONDS_MAX)

    def _write_losses(self) -> None:
        """Write what could not be written before; what still cannot stays."""
        if not self._losses:
            return
        self._refused_event_at = time.monotonic()
        waiting = self._losses.take()
        while waiting and self._append_event(*waiting[0]):
            waiting.pop(0)
        self._losses.put_back(waiting)

    # Durability and room

    def sync(self) -> None:
        """Make durable what was appended before this call, and make room for what comes. For a thread; never raises."""
        with self._sync_lock:
            with self.lock:
                if self._losses and time.monotonic() >= self._refused_event_at + REFUSED_EVENT_SECONDS:
                    self._write_losses()
                finished, self._finished = self._finished, []
                current = self._segment if self._segment is not None and self._segment.is_dirty else None
                if current is not None:
                    current.is_dirty = False
            for segment in finished:
                self._finish(segment)
            try:
                if current is not None:
                    current.sync()
                if self._room.names_changed:
                    self._room.sync_names()
                self.syncs += 1
            except OSError as error:
                with self.lock:
                    if self._segment is current:
                        self._fail(error)
            self._room.prepare()

    def sync_current(self) -> None:
        """Make the segment being written durable, for a deletion that its records announce. Raises OSError."""
        segment = self._segment
        if segment is not None:
            segment.sync()

    def _finish(self, segment: OpenSegment) -> None:
        try:
            segment.trim()
            segment.sync()
        except OSError as error:
            self.trouble = f"{segment.segment.path.name} could not be synced: {error.strerror or error}"
        finally:
            segment.close()

    def close(self, *, ended: bool) -> None:
        """Write the last, sync and give the folder back. `ended`: the session is over, nobody is to continue it."""
        if self._closed:
            return
        self._closed = True
        with self._sync_lock, self.lock:
            self._write_losses()
            if self._segment is not None and ended:
                try:
                    self._segment.mark_ended(self.stretch.sequence_last)
                except OSError as error:
                    self._fail(error)
            self._leave_segment()
            for segment in self._finished:
                self._finish(segment)
            self._finished = []
            self._room.close()
            self.shelf.close()
            os.close(self._lock_descriptor)

    # What earlier runs left

    def recover(self) -> Recovery:
        """Find out what earlier runs left, and take it into the books. Once, in a thread; capture goes on meanwhile."""
        if self.recovered:
            return Recovery([], {})
        stock = take_stock(self.folder, self._number_first)
        warnings = list(stock.warnings)
        _trim_unused(stock.segments[-1:], warnings)
        with self.lock:
            for segment in stock.segments:
                self.shelf.add(segment)
            earlier = [each for each in stock.ledger.stretches.values() if each.sequence_last]
            stock.ledger.absorb(self.ledger)
            self.ledger, self.recovered = stock.ledger, True
            for damage in stock.damages:
                self.shelf.note_damage(damage)
            for path in [*stock.unused, *stock.removed]:
                try:
                    self.shelf.delete_other(path)
                except OSError as error:
                    warnings.append(f"{path.name} cannot be removed: {error.strerror}")
                    continue
                self.ledger.removing.discard(int(path.stem))
            try:
                self.write_state()
            except OSError as error:
                self._fail(error)
        if stock.damages:
            warnings.append(f"damaged: {'; '.join(map(str, stock.damages[:5]))}; {len(stock.damages)} places in all")
        last_ns: dict[str, int] = {}
        for account in earlier:
            if account.origin == earlier[-1].origin:
                last_ns |= account.last_ns
        damaged_bytes = sum(len(damage.data) for damage in stock.damages)
        return Recovery(warnings, last_ns, stock.torn_bytes, damaged_bytes)

    # Sending

    def stretches(self) -> list[Stretch]:
        """What there is to send, oldest first, the one being written last; before `recover` only that one."""
        with self.lock:
            return [
                Stretch(
                    account.id, account.session_id, account.boot_id, account.machine_id, account.feed_id,
                    account.acknowledged, account.sequence_last, account is self.stretch,
                    sum(segment.end or segment.bytes for segment in self.shelf.by_stretch.get(account.id, ())),
                )
                for account in self.ledger.stretches.values()
            ]  # fmt: skip

    def reader(self, stretch_id: str, after: int) -> StretchReader:
        """Read a stretch's records with numbers greater than `after`. One reader of a stretch at a time.

        What an earlier reader handed out and nobody acknowledged is given up by this, to be read again.
        """
        with self.lock:
            if (account := self.ledger.stretches.get(stretch_id)) is not None:
                account.begin_reading()
        return StretchReader(self, stretch_id, after)

    def acknowledge(self, stretch_id: str, position: int, committed: Mapping[str, int],
                    rejected: Mapping[str, int] | None = None, dropped: Lost | None = None) -> None:  # fmt: skip
        """Every record up to `position` is done with; what became of the frames since the last position, by source."""
        rejected, dropped = rejected or {}, dropped or {}
        with self.lock:
            account = self.ledger.stretches.get(stretch_id)
            if account is None or position < account.acknowledged:
                return
            reads = []
            while account.reads and account.reads[0].sequence <= position:
                reads.append(account.reads.popleft())
            told = settled(committed, rejected, dropped)
            passed = told if position > account.read_through else total_of(reads, ahead=False)
            ahead = total_of(reads, ahead=True)
            self.ledger.settle(account, position, committed, rejected, dropped, passed)
            self.ledger.pass_ahead(account, ahead)
            parts = {"committed": +Counter(committed), "rejected": +Counter(rejected), "dropped": dropped}
            value: dict[str, Any] = {"stretch": stretch_id, "position": position}
            value |= {name: counts for name, counts in (parts | {"ahead": ahead}).items() if counts}
            if passed != told:
                value["passed"] = passed
            self.write_bookkeeping(Kind.SETTLE, value)

    def assign_feed(self, stretch_id: str, feed_id: str, position: int) -> None:
        """The stretch is sent under this name from now on; it begins at `position`."""
        with self.lock:
            if (account := self.ledger.stretches.get(stretch_id)) is not None:
                account.feed_id = feed_id
                value = {"stretch": stretch_id, "feed_id": feed_id, "position": position}
                self.write_bookkeeping(Kind.FEED, value)

    def reject(self, record: Record, reason: str) -> None:
        """Keep a copy of a record that PostgreSQL can never take, durably. Raises IngestdError if that fails.

        It is counted when it is acknowledged.
        """
        with self.lock:
            try:
                self._room.for_rejected(record.size)
                self.shelf.reject(record, reason)
            except OSError as error:
                raise IngestdError(f"a rejected record cannot be set aside: {error.strerror}") from error

    # What there is to tell

    def books(self) -> dict[str, Books]:
        """Where the frames of each source are, over the lifetime of the journal; before `recover`, of this process."""
        with self.lock:
            return self._losses.into(self.ledger.books())

    @property
    def bytes_used(self) -> int:
        """Of all files of the folder."""
        with self.lock:
            return self.shelf.bytes_used

    @property
    def damaged_bytes(self) -> int:
        """Bytes met by this process that are no record."""
        return self.shelf.damaged_bytes

    @property
    def current_number(self) -> int | None:
        """The segment being written."""
        return None if self._segment is None else self._segment.segment.number

    def use_reserve(self) -> None:
        """There is room again: the segment that was kept for bookkeeping takes data, too."""
        if self._segment is not None:
            self._segment.is_reserve = False

    def settle_end(self, account: StretchAccount, seen: Mapping[str, int], sequence: int) -> None:
        """Everything there is of a stretch that has ended was read, up to `sequence`: what is missing is damage.

        `seen` counts the frames of each source that were there, or are known to be lost.
        """
        if account.acknowledged < sequence or account.is_settled:
            return
        missing = {source: through - seen[source] for source, through in account.journalled.items()}
        dropped = {source: {"damage": count} for source, count in missing.items() if count > 0}
        self.acknowledge(account.id, account.sequence_last, {}, {}, dropped)
        for source, reasons in dropped.items():
            at_ns = account.last_ns.get(source, 0)
            self.append_event(gap(source, "damage", reasons["damage"], at_ns, at_ns), NO_CLOCK)

    def note_damage(self, damage: Damage) -> None:
        """A reader has met damage."""
        with self.lock:
            self.shelf.note_damage(damage)


def _trim_unused(segments: list[Segment], warnings: list[str]) -> None:
    """Give back what a process that was killed had allocated behind its last record."""
    for segment in segments:
        if segment.end is not None and segment.end < segment.bytes:
            try:
                os.truncate(segment.path, segment.end)
                segment.bytes = segment.end
            except OSError as error:
                warnings.append(f"{segment.path.name} cannot be trimmed: {error.strerror}")
