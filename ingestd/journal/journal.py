"""The journal of a running daemon: a folder that is held, appended to, made durable, read back and kept small.

Appending is for the event loop's thread and returns when the kernel has the bytes. `sync`, `recover` and reading are
slow and for other threads; beside them appends go on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple
from uuid import UUID

from ingestd.errors import IngestdError, UsageError
from ingestd.journal.holder import LOCK_NAME, take_lock
from ingestd.journal.ledger import Lost
from ingestd.journal.log import Log, SessionInfo
from ingestd.journal.reader import StretchReader
from ingestd.journal.record import Record
from ingestd.journal.recovery import Segment, take_stock
from ingestd.journal.segment import (
    MACHINE_BYTES_MAX,
    Replaced,
    Unreadable,
    ignore,
    is_in_place,
    list_folder,
    read_header,
    read_segment,
)
from ingestd.journal.shelf import OpenSegment, Shelf
from ingestd.model import Books, Clock, Event, FrameBatch

SEGMENT_BYTES = 16 << 20
SEGMENT_BYTES_MIN = 64 << 10
SEGMENTS_MIN = 4  # written, prepared, kept for bookkeeping, and one with data
POLICIES = ("drop-oldest", "drop-newest")


@dataclass(frozen=True, slots=True)
class LastSession:
    """What the newest segment says of the process that wrote it."""

    session_id: UUID
    boot_id: str
    ended: bool


@dataclass(frozen=True, slots=True)
class Recovery:
    """What earlier runs left, in words and numbers, and of the session before ours what to know for its continuation.

    `session` is its metadata, without `config`; `last_stamps` of each source; `untold`: source, last stamp before and
    first stamp behind a time without a daemon of which the process that ended it did not live to tell.
    """

    warnings: list[str]
    last_stamps: Mapping[str, int]
    untold: list[tuple[str, int, int]] = field(default_factory=list)
    torn_bytes: int = 0
    damaged_bytes: int = 0
    session: Mapping[str, Any] = field(default_factory=dict)


class Stretch(NamedTuple):
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


class Tally(NamedTuple):
    """Frames of one source in a stretch: in all records, in those up to the acknowledged position; its last stamp."""

    journalled: int
    passed: int
    last_ns: int


class Journal:
    """A folder of segments, held by this process."""

    def __init__(self, log: Log, lock_descriptor: int) -> None:
        """Use `open`."""
        self.syncs = 0
        self._log, self._shelf = log, log.shelf
        self._lock_descriptor = lock_descriptor
        self._number_first = log.shelf.number_last + 1  # of the segments of this process
        self._sync_lock = Lock()

    def __repr__(self) -> str:
        return f"<Journal {self._shelf.folder}: {len(self._log.ledger.stretches)} stretches, {self.bytes_used} bytes>"

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        session: SessionInfo,
        machine_id: str,
        boot_id: str,
        max_bytes: int,
        when_full: str = "drop-oldest",
        segment_bytes: int = SEGMENT_BYTES,
    ) -> Journal:
        """Take the folder and begin a stretch in it. Raises UsageError, and IngestdError if somebody else has it.

        Takes the same time however much lies in the folder: that is for `recover` to read.
        """
        _check_budget(max_bytes, when_full, segment_bytes)
        if len(machine_id.encode()) > MACHINE_BYTES_MAX:
            raise UsageError(f"an id of a machine takes at most {MACHINE_BYTES_MAX} bytes")
        with ExitStack() as on_error:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock_descriptor = take_lock(folder)
                on_error.callback(os.close, lock_descriptor)
                shelf = Shelf(folder, segment_bytes, max_bytes)
            except OSError as error:
                raise IngestdError(f"the journal {folder} cannot be opened: {error.strerror}") from error
            on_error.pop_all()
        log = Log(shelf, session, machine_id, UUID(boot_id), when_full)
        journal = cls(log, lock_descriptor)
        log.recovered = shelf.number_last == 0
        log.begin_stretch()
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
                return LastSession(header.origin.session_id, header.origin.boot_id, header.ended)
        return None

    def append_frames(self, batch: FrameBatch, clock: Clock) -> None:
        """Record frames of one source in wire order. When this returns the kernel has them, or they are counted."""
        self._log.append_frames(batch, clock)

    def append_event(self, event: Event, clock: Clock, *, lost: Mapping[str, int] | None = None) -> None:
        """Record a fact. `lost` are frames by reason that it counts as received and dropped."""
        self._log.append_event(event, clock, lost or {})

    def append_session(self, fields: Mapping[str, Any]) -> None:
        """Record metadata of the session; they also begin every further stretch."""
        self._log.append_session(fields)

    def begin_stretch(self, session: SessionInfo | None = None) -> None:
        """End the stretch being written and begin another, in a segment of its own; of another session if given."""
        self._log.begin_stretch(session)

    def set_budget(self, max_bytes: int, when_full: str) -> None:
        """How much of the disk it may take from now on, and what is lost when that is used up; see `open`."""
        _check_budget(max_bytes, when_full, self._shelf.segment_bytes)
        with self._log.lock:
            self._log.room.set_budget(max_bytes, when_full)

    def sync(self) -> None:
        """Make durable what was appended before this call, and make room for what comes. For a thread; never raises."""
        log = self._log
        with self._sync_lock:
            if log.is_closed:
                return
            with log.lock:
                log.leave_suspect()
                log.try_again()
                log.write_losses(at_once=False)
                log.forget_trouble()
                finished, log.finished = log.finished, []
                current = log.segment if log.segment is not None and log.segment.is_dirty else None
                if current is not None:
                    current.is_dirty = False
            self._keep_lock()
            for segment in finished:
                self._finish(segment)
            try:
                if current is not None:
                    current.sync()
                log.room.sync_names()
                self.syncs += bool(finished or current)
            except OSError as error:
                with log.lock:
                    if log.segment is current or not isinstance(error, FileNotFoundError):
                        log.fail_sync(error)
            else:
                with log.lock:
                    if current is not None and log.segment is current and not current.is_suspect:
                        log.synced()
            log.room.prepare()

    def _keep_lock(self) -> None:
        """If somebody has emptied or deleted the folder: hold what is there now, before another process does."""
        if is_in_place(self._lock_descriptor, self._shelf.folder / LOCK_NAME):
            return
        try:
            descriptor = take_lock(self._shelf.folder)
        except FileNotFoundError:
            return  # There is nothing to be held until the next segment makes the folder anew.
        except (OSError, IngestdError) as error:
            self._log.report(str(error))
            return
        os.close(self._lock_descriptor)
        self._lock_descriptor = descriptor

    def _finish(self, segment: OpenSegment) -> None:
        name = segment.segment.path.name
        try:
            segment.trim()
        except OSError as error:
            self._log.report(f"{name} could not be trimmed: {error.strerror or error}")
        try:
            segment.sync()
        except OSError as error:
            self._log.report(f"{name} could not be synced: {error.strerror or error}")
        segment.close()

    def close(self, *, ended: bool) -> None:
        """Write the last, sync and give the folder back. `ended`: the session is over, nobody is to continue it."""
        log = self._log
        with self._sync_lock, log.lock:
            if log.is_closed:
                return
            log.write_losses()
            log.is_closed = True
            if log.segment is not None and ended:
                try:
                    log.segment.mark_ended(log.stretch.sequence_last)
                except OSError as error:
                    log.fail(error)
            log.leave_segment()
            for segment in log.finished:
                self._finish(segment)
            log.finished = []
            log.room.close()
            self._shelf.close()
            os.close(self._lock_descriptor)

    def recover(self) -> Recovery:
        """Find out what earlier runs left, and take it into the books. Once, in a thread; capture goes on meanwhile."""
        if self._log.recovered:
            return Recovery([], {})
        stock = take_stock(self._shelf.folder, self._number_first)
        warnings = list(stock.warnings)
        with self._log.lock:
            if self._log.is_closed:
                return Recovery([], {})
            _trim_unused(stock.segments, warnings)
            for segment in stock.segments:
                self._shelf.add(segment)
            earlier = [each for each in stock.ledger.stretches.values() if each.sequence_last]
            session = stock.ledger.session
            stock.ledger.absorb(self._log.ledger)
            self._log.ledger, self._log.recovered = stock.ledger, True
            self._log.state_number = stock.state_number
            for damage in stock.damages:
                self._shelf.note_damage(damage)
            for path in [*stock.unused, *stock.removed]:
                try:
                    self._shelf.delete_other(path)
                except OSError as error:
                    warnings.append(f"{path.name} cannot be removed: {error.strerror}")
                    continue
                self._log.ledger.removing.discard(int(path.stem))
            try:
                self._log.write_state()
            except OSError as error:
                self._log.fail(error)
        if stock.damages:
            warnings.append(f"damaged: {'; '.join(map(str, stock.damages[:5]))}; {len(stock.damages)} places in all")
        last_ns: dict[str, int] = {}
        untold: list[tuple[str, int, int]] = []
        for account in earlier:
            if account.origin == earlier[-1].origin:
                behind = ((source, at_ns) for source, at_ns in account.resumed_ns.items() if source in account.last_ns)
                untold += [(source, last_ns[source], at_ns) for source, at_ns in behind if source in last_ns]
                last_ns |= account.last_ns
        damaged_bytes = sum(len(damage.data) for damage in stock.damages)
        return Recovery(warnings, last_ns, untold, stock.torn_bytes, damaged_bytes, session)

    def stretches(self) -> list[Stretch]:
        """What there is to send, oldest first, the one being written last; before `recover` only that one."""
        with self._log.lock:
            segments = self._shelf.by_stretch
            return [
                Stretch(
                    account.id, account.origin.session_id, account.origin.boot_id, account.machine_id, account.feed_id,
                    account.acknowledged, account.sequence_last, account is self._log.stretch,
                    sum([segment.end or segment.bytes for segment in segments.get(account.id, ())]),
                )
                for account in self._log.ledger.stretches.values()
            ]  # fmt: skip

    def tallies(self, stretch_id: str) -> dict[str, Tally]:
        """How many frames of each source a stretch has had, whatever became of them."""
        with self._log.lock:
            account = self._log.ledger.stretches.get(stretch_id)
            if account is None:
                return {}
            return {
                source: Tally(count, account.passed[source], account.last_ns.get(source, 0))
                for source, count in account.journalled.items()
            }

    def reader(self, stretch_id: str, after: int) -> StretchReader:
        """Read a stretch's records with numbers greater than `after`. One reader of a stretch at a time.

        What an earlier reader handed out and nobody acknowledged is given up by this, to be read again.
        """
        with self._log.lock:
            if (account := self._log.ledger.stretches.get(stretch_id)) is not None:
                account.begin_reading()
        return StretchReader(self._log, stretch_id, after)

    def look_back(self, stretch_id: str, after: int, through: int) -> Iterator[Record]:
        """The records after one position and up to another, as far as they can be read, each once.

        For who wants to know what there was: nothing is counted as sent, missing or damaged by it.
        """
        with self._log.lock:
            segments = [
                (each, each.bytes if each.end is None else each.end)
                for each in self._shelf.by_stretch.get(stretch_id, ())
            ]
        for number, (segment, end) in enumerate(segments):
            following = segments[number + 1][0].header.sequence_first if number + 1 < len(segments) else through + 1
            if following <= after + 1 or segment.header.sequence_first > through:
                continue
            try:
                items = read_segment(segment.path, end=end, header=segment.header, on_refusal=ignore)
            except (OSError, Replaced):
                continue
            for item in items:
                if isinstance(item, Record) and item.kind.is_numbered and after < item.sequence <= through:
                    after = item.sequence
                    yield item

    def acknowledge(
        self,
        stretch_id: str,
        position: int,
        committed: Mapping[str, int],
        rejected: Mapping[str, int] | None = None,
        dropped: Lost | None = None,
    ) -> None:
        """Every record up to `position` is done with; what became of the frames since the last position, by source."""
        self._log.acknowledge(stretch_id, position, committed, rejected or {}, dropped or {})

    def assign_feed(self, stretch_id: str, feed_id: str, position: int) -> None:
        """The stretch is sent under this name from now on; it begins at `position`."""
        self._log.assign_feed(stretch_id, feed_id, position)

    def reject(self, record: Record, reason: str) -> None:
        """Keep a copy of a record that PostgreSQL can never take, durably. Raises IngestdError if that fails.

        It is counted when it is acknowledged.
        """
        with self._log.lock:
            if self._log.is_closed:
                raise IngestdError("a rejected record cannot be set aside: the journal is closed")
            try:
                self._log.room.for_rejected(record.size)
                self._shelf.reject(record, reason)
            except OSError as error:
                raise IngestdError(f"a rejected record cannot be set aside: {error.strerror}") from error

    def books(self) -> dict[str, Books]:
        """Where the frames of each source are, over the lifetime of the journal; before `recover`, of this process."""
        with self._log.lock:
            return self._log.losses.into(self._log.ledger.books())

    @property
    def bytes_used(self) -> int:
        """Of all files of the folder."""
        with self._log.lock:
            return self._shelf.bytes_used

    @property
    def damaged_bytes(self) -> int:
        """Bytes met by this process that are no record."""
        return self._shelf.damaged_bytes

    @property
    def bytes_written(self) -> int:
        """Bytes this process has written into segments."""
        return self._log.bytes_written

    @property
    def writable(self) -> bool:
        """Whether the disk took the last append, and keeps what it took."""
        return self._log.writable and self._log.durable

    @property
    def trouble(self) -> str:
        """What is wrong, in words for the operator; "" if nothing is."""
        return self._log.trouble

    def notices(self) -> list[str]:
        """What has changed or was lost since this was asked last, each a line for people."""
        with self._log.lock:
            notices = list(self._log.notices)
            self._log.notices.clear()
        return notices


def _check_budget(max_bytes: int, when_full: str, segment_bytes: int) -> None:
    if when_full not in POLICIES:
        raise UsageError(f"a journal has no policy {when_full!r}", f"one of {', '.join(POLICIES)}")
    if segment_bytes < SEGMENT_BYTES_MIN or max_bytes < SEGMENTS_MIN * segment_bytes:
        raise UsageError(f"{max_bytes} bytes are too few for a journal", f"{SEGMENTS_MIN * segment_bytes} at least")


def _trim_unused(segments: list[Segment], warnings: list[str]) -> None:
    """Give back what a process that was killed had allocated behind its last record."""
    for segment in segments:
        if segment.end is not None and segment.end < segment.bytes:
            try:
                os.truncate(segment.path, segment.end)
                segment.bytes = segment.end
            except OSError as error:
                warnings.append(f"{segment.path.name} cannot be trimmed: {error.strerror}")
