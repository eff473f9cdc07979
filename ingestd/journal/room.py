"""The byte budget: what is removed when, and what is refused.

The budget holds one segment in reserve, for events and bookkeeping: they can be written even while data are refused or
before anything was removed. Room is made ahead of need, in the thread that syncs, in this order:

1. segments with nothing unacknowledged, the oldest first;
2. rejected records and damage kept aside, if they take more than a quarter of the budget;
3. by the policy `drop-oldest`, the oldest segment there is. What was not acknowledged in it is measured, written down
   in a REMOVED record and as a gap, and that is made durable before the file is deleted. What a reader has handed
   out of it is not counted: it is still on its way.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ingestd.journal.ledger import StretchAccount
from ingestd.journal.losses import gap
from ingestd.journal.record import Kind, Record
from ingestd.journal.recovery import Segment
from ingestd.journal.segment import read_segment, segment_name, sync_folder
from ingestd.model import Clock

if TYPE_CHECKING:
    from ingestd.journal.log import Journal

STRETCHES_KEPT_MAX = 64  # Done with, and kept only to be sent again; every one of them is in every STATE.


@dataclass(slots=True)
class _Piece:
    """A record of frames in a segment that is to go."""

    source: str
    through: int
    first_ns: int
    last_ns: int
    clock: Clock


class Room:
    """Makes room in a journal."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._next: tuple[int, int] | None = None  # number and descriptor of a segment allocated ahead
        self.names_changed = True
        self._is_removing = False

    def take_segment(self, *, is_data: bool) -> tuple[int, int, bool] | None:
        """Number and descriptor of an empty segment, and whether it is the reserve; None if there is no room.

        Called under the journal's lock. Raises OSError. Removes something itself only if more came than `prepare`, in
        its thread, could make room for.
        """
        journal = self._journal
        if self._next is not None:
            (number, descriptor), self._next = self._next, None
            return number, descriptor, False
        while self._lacking() > 0 and self._remove_acknowledged():
            pass
        if journal.when_full == "drop-oldest" and not self._is_removing:
            while self._excess(journal.segment_bytes) > 0 and (victim := self._victim()) is not None:
                self._remove_unsent(victim, self._measure(victim))
        is_reserve = journal.when_full == "drop-newest" and self._lacking() > 0
        if self._excess(journal.segment_bytes) > 0 or (is_data and is_reserve):
            return None
        number = journal.shelf.next_number()
        descriptor = journal.shelf.allocate(number)
        journal.shelf.note_allocated(number)
        self.names_changed = True
        return number, descriptor, is_reserve

    def _excess(self, more: int) -> int:
        """By how much the budget would be exceeded."""
        return self._journal.shelf.bytes_used + more - self._journal.max_bytes

    def _lacking(self) -> int:
        """Bytes to be removed until another segment fits beside the reserve."""
        return self._excess(2 * self._journal.segment_bytes)

    def prepare(self) -> None:
        """Make room for the next segment and allocate it. In a thread, without the lock; never raises."""
        journal = self._journal
        try:
            self._keep_few_stretches()
            while self._next is None:
                with journal.lock:
                    while self._lacking() > 0 and (self._remove_acknowledged() or self._remove_aside()):
                        pass
                    has_room = self._lacking() <= 0
                    victim = self._victim() if journal.when_full == "drop-oldest" else None
                if has_room:
                    self._allocate()
                elif victim is not None:
                    pieces = self._measure(victim)
                    with journal.lock:
                        if journal.shelf.segments.get(victim.number) is victim:
                            self._remove_unsent(victim, pieces)
                else:
                    break
            if self.names_changed:
                self.sync_names()
        except OSError as error:
            with journal.lock:
                if error.errno == errno.ENOSPC and self._remove_acknowledged():
                    return  # Somebody else fills the disk; what is only kept in case gives way.
                journal.trouble = f"no new segment can be made: {error.strerror}"

    def _allocate(self) -> None:
        journal = self._journal
        with journal.lock:
            journal.use_reserve()
            number = journal.shelf.next_number()
        descriptor = journal.shelf.allocate(number)
        with journal.lock:
            journal.shelf.note_allocated(number)
            self._next = number, descriptor
            self.names_changed = True
            if number < (journal.current_number or 0):
                self.close()  # Somebody needed one before this was ready. Numbers only go up.

    def sync_names(self) -> None:
        """Make new and removed names durable. Raises OSError."""
        self.names_changed = False
        sync_folder(self._journal.folder)

    def _is_acknowledged(self, segment: Segment) -> bool:
        account = self._journal.ledger.stretches.get(segment.header.stretch_id)
        if account is None:
            return True
        following = self._journal.shelf.following(segment)
        if following is None:
            return account is not self._journal.stretch and account.is_settled
        return following.header.sequence_first - 1 <= account.acknowledged

    def _candidates(self) -> list[Segment]:
        """The segments that no STATE depends on: those before the newest one. None before there is one."""
        return list(self._journal.shelf.oldest(self._journal.state_number or 0))

    def _remove_acknowledged(self) -> bool:
        for segment in self._candidates():
            if self._is_acknowledged(segment):
                self._journal.shelf.delete(segment)
                self.names_changed = True
                return True
        return False

    def _remove_aside(self) -> bool:
        path = self._journal.shelf.oldest_rejected(self._journal.max_bytes // 4)
        if path is None:
            return False
        self._journal.shelf.delete_other(path)
        return True

    def _keep_few_stretches(self) -> None:
        journal = self._journal
        with journal.lock:
            settled = [each for each in journal.ledger.stretches.values() if each.is_settled]
            for account in settled[: max(0, len(settled) - STRETCHES_KEPT_MAX)]:
                for segment in list(journal.shelf.by_stretch.get(account.id, ())):
                    if segment in self._candidates() and account is not journal.stretch:
                        journal.shelf.delete(segment)

    def _victim(self) -> Segment | None:
        current = self._journal.current_number
        return next((each for each in self._candidates() if each.number != current), None)

    def _measure(self, victim: Segment) -> list[_Piece]:
        """What is in a segment. Reads all of it."""
        try:
            items = list(read_segment(victim.path))
        except OSError:
            return []
        return [
            _Piece(item.source, item.frames_before + item.frames_count, item.ts_ns, item.last_ns, item.clock)
            for item in items
            if isinstance(item, Record) and item.kind is Kind.FRAMES
        ]

    def _remove_unsent(self, victim: Segment, pieces: list[_Piece]) -> None:
        """Write down what is lost with a segment, make that durable, delete it. Raises OSError.

        If it cannot be written down, the STATE that begins the next segment says it. Should the process end before,
        the frames are found missing when they are to be read.
        """
        journal = self._journal
        account = journal.ledger.stretches[victim.header.stretch_id]
        through = self._sequence_last(victim, account)
        lost, spans = _lost(pieces, account)
        self._is_removing = True
        try:
            value = {
                "stretch": account.id, "through": through, "lost": lost, "reason": "budget",
                "segments": [victim.number],
            }  # fmt: skip
            is_written = journal.write_bookkeeping(Kind.REMOVED, value)
            journal.ledger.remove(account, through, lost, "budget")
            journal.ledger.removing.add(victim.number)
            for source, (first_ns, last_ns, clock) in spans.items():
                journal.append_event(gap(source, "budget", lost[source], first_ns, last_ns), clock)
            if is_written:
                journal.sync_current()
        finally:
            self._is_removing = False
            journal.shelf.delete(victim)
        sync_folder(journal.folder)
        journal.ledger.removing.discard(victim.number)

    def _sequence_last(self, segment: Segment, account: StretchAccount) -> int:
        following = self._journal.shelf.following(segment)
        return account.sequence_last if following is None else following.header.sequence_first - 1

    def for_rejected(self, size: int) -> None:
        """Make room for a rejected record, at the cost of older ones. Raises OSError."""
        while self._excess(size) > 0 and (path := self._journal.shelf.oldest_rejected(0)) is not None:
            self._journal.shelf.delete_other(path)

    def close(self) -> None:
        """Give back the segment that was allocated ahead."""
        if self._next is not None:
            (number, descriptor), self._next = self._next, None
            os.close(descriptor)
            self._journal.shelf.delete_other(self._journal.folder / segment_name(number))


def _lost(pieces: list[_Piece], account: StretchAccount) -> tuple[dict[str, int], dict[str, tuple[int, int, Clock]]]:
    """Frames of each source that go with the pieces and are nowhere else, and from when to when they were."""
    lost: dict[str, int] = {}
    spans: dict[str, tuple[int, int, Clock]] = {}
    for source in sorted({piece.source for piece in pieces}):
        safe = account.passed[source] + account.in_flight(source) + account.ahead[source]
        gone = [piece for piece in pieces if piece.source == source and piece.through > safe]
        if gone:
            lost[source] = max(piece.through for piece in gone) - safe
            spans[source] = min(p.first_ns for p in gone), max(p.last_ns for p in gone), gone[0].clock
    return lost, spans
