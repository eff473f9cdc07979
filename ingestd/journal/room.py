"""The byte budget: what is removed when, and what is refused.

The budget holds one segment in reserve, for events and bookkeeping: they can be written even while data are refused or
before anything was removed. Room is made ahead of need, in the thread that syncs, in this order:

1. segments with nothing unacknowledged, the oldest first;
2. rejected records and damage kept aside, if they take more than a quarter of the budget;
3. by the policy `drop-oldest`, the oldest segment there is. What was not acknowledged in it is measured, written down
   in a REMOVED record, and that is made durable before the file is deleted. What a reader has handed out of it is not
   counted: it is still on its way. No event tells of it, for that might have to make room itself: the next record that
   is read says how many frames were before it.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ingestd.journal.ledger import StretchAccount
from ingestd.journal.record import Kind, Record
from ingestd.journal.recovery import Segment
from ingestd.journal.segment import Replaced, ignore, is_in_place, read_segment, segment_name, sync_folder

if TYPE_CHECKING:
    from ingestd.journal.log import Log

STRETCHES_KEPT_MAX = 64  # Done with, and kept only to be sent again; every one of them is in every STATE.


@dataclass(slots=True)
class _Piece:
    """A record of frames in a segment that is to go."""

    source: str
    through: int


class Room:
    """Makes room in a log."""

    def __init__(self, log: Log, when_full: str) -> None:
        self._log = log
        self._drops_oldest = when_full == "drop-oldest"
        self._is_full = False  # Data were refused; `prepare` will look whether that is over.
        self._next: tuple[int, int] | None = None  # number and descriptor of a segment allocated ahead
        self._names_changed = True
        self._is_removing = False

    def take_segment(self, *, is_data: bool) -> tuple[int, int, bool] | None:
        """Number and descriptor of an empty segment, and whether it is the reserve; None if there is no room.

        Called under the lock. Raises OSError. Removes something itself only if more came than `prepare`, in
        its thread, could make room for.
        """
        log = self._log
        if self._next is not None:
            number, descriptor = self._next
            if is_in_place(descriptor, log.shelf.folder / segment_name(number)):
                self._next = None
                return number, descriptor, False
            self.close()  # Somebody has deleted it, or moved it away.
        if is_data and self._is_full:
            return None
        while self._lacking() > 0 and self._remove_acknowledged():
            pass
        if self._drops_oldest and not self._is_removing:
            while self._excess(log.shelf.segment_bytes) > 0 and (victim := self._victim()) is not None:
                self._remove_unsent(victim, self._measure(victim))
        is_reserve = not self._drops_oldest and self._lacking() > 0
        if self._excess(log.shelf.segment_bytes) > 0 or (is_data and is_reserve):
            self._is_full = is_data
            return None
        number = log.shelf.next_number()
        descriptor = log.shelf.allocate(number)
        log.shelf.note_allocated(number)
        self._names_changed = True
        return number, descriptor, is_reserve

    def _excess(self, more: int) -> int:
        """By how much the budget would be exceeded."""
        return self._log.shelf.bytes_used + more - self._log.shelf.bytes_max

    def _lacking(self) -> int:
        """Bytes to be removed until another segment fits beside the reserve."""
        return self._excess(2 * self._log.shelf.segment_bytes)

    def prepare(self) -> None:
        """Make room for the next segment and allocate it. In a thread, without the lock; never raises."""
        log = self._log
        try:
            self._keep_few_stretches()
            while self._next is None and log.durable:  # A disk that keeps nothing need not make segments all the time.
                with log.lock:
                    while self._lacking() > 0 and (self._remove_acknowledged() or self._remove_aside()):
                        pass
                    number = self._next_number() if self._lacking() <= 0 else None
                    victim = self._victim() if self._drops_oldest else None
                if number is not None:
                    self._allocate(number)
                elif victim is not None:
                    self._remove_unsent(victim, self._measure(victim))
                else:
                    break
            self.sync_names()
        except OSError as error:
            with log.lock:
                if error.errno == errno.ENOSPC and self._remove_acknowledged():
                    return  # Somebody else fills the disk; what is only kept in case gives way.
                log.report(f"no new segment can be made: {error.strerror}")

    def _next_number(self) -> int:
        """There is room again: the number of the segment that is to take it."""
        log = self._log
        self._is_full = False
        if log.segment is not None:
            log.segment.is_reserve = False
        return log.shelf.next_number()

    def _allocate(self, number: int) -> None:
        log = self._log
        descriptor = log.shelf.allocate(number)
        with log.lock:
            log.shelf.note_allocated(number)
            self._next = number, descriptor
            self._names_changed = True
            if number < log.shelf.number_last or self._excess(0) > 0:
                self.close()  # Somebody needed one before this was ready. Numbers only go up.

    def sync_names(self) -> None:
        """Make new and removed names durable, if there are any. Raises OSError.

        The kernel forgets names whose sync has failed, and then says that they are durable: nothing goes on in files
        that may not be there after a power cut.
        """
        if self._names_changed:
            self._names_changed = False
            try:
                sync_folder(self._log.shelf.folder)
            except OSError:
                with self._log.lock:
                    self._names_changed = True
                    self.close()
                    if self._log.segment is not None:
                        self._log.segment.is_suspect = True
                raise

    def _current_number(self) -> int:
        return 0 if self._log.segment is None else self._log.segment.segment.number

    def _oldest_segments(self) -> list[Segment]:
        """The first segment of each stretch: what may be removed next. Of those that no STATE is needed from."""
        heads = [segments[0] for segments in self._log.shelf.by_stretch.values()]
        return sorted((each for each in heads if each.number < self._log.state_number), key=lambda each: each.number)

    def _is_acknowledged(self, segment: Segment) -> bool:
        account = self._log.ledger.stretches[segment.header.stretch_id]
        return self._sequence_last(segment, account) <= account.acknowledged and (
            account is not self._log.stretch or segment.number != self._current_number()
        )

    def _remove_acknowledged(self) -> bool:
        segment = next(filter(self._is_acknowledged, self._oldest_segments()), None)
        if segment is None:
            return False
        self._log.shelf.delete(segment)
        self._names_changed = True
        return True

    def _remove_aside(self) -> bool:
        path = self._log.shelf.oldest_rejected(self._log.shelf.bytes_max // 4)
        if path is None:
            return False
        self._log.shelf.delete_other(path)
        return True

    def _keep_few_stretches(self) -> None:
        log = self._log
        with log.lock:
            settled = [each for each in log.ledger.stretches.values() if each.is_settled and each is not log.stretch]
            for account in settled[: max(0, len(settled) - STRETCHES_KEPT_MAX)]:
                for segment in list(log.shelf.by_stretch.get(account.id, ())):
                    if segment.number < log.state_number:
                        log.shelf.delete(segment)
                        self._names_changed = True

    def _victim(self) -> Segment | None:
        return next((each for each in self._oldest_segments() if each.number != self._current_number()), None)

    def _measure(self, victim: Segment) -> list[_Piece]:
        """What is in a segment. Reads all of it."""
        try:
            items = list(read_segment(victim.path, header=victim.header, on_refusal=ignore))
        except (OSError, Replaced):
            return []
        return [
            _Piece(item.source, item.frames_before + item.frames_count)
            for item in items
            if isinstance(item, Record) and item.kind is Kind.FRAMES
        ]

    def _remove_unsent(self, victim: Segment, pieces: list[_Piece]) -> None:
        """Write down what is lost with a segment, make that durable, delete it. Raises OSError.

        Appends go on meanwhile, unless the caller holds the lock. If it cannot be written down, the STATE that begins
        the next segment says it. Should the process end before, the frames are found missing when they are to be read.
        """
        log = self._log
        with log.lock:
            if log.shelf.segments.get(victim.number) is not victim:
                return  # Somebody else was faster.
            announced = log.segment if self._announce(victim, pieces) else None
            log.shelf.set_aside(victim)
        try:
            if announced is not None:
                announced.sync()
        finally:
            log.shelf.unlink(victim)
            with log.lock:
                log.shelf.forget(victim)
        self._names_changed = True
        self.sync_names()
        with log.lock:
            log.ledger.removing.discard(victim.number)

    def _announce(self, victim: Segment, pieces: list[_Piece]) -> bool:
        """Write down what is lost with a segment. Returns whether that is in the segment being written."""
        log = self._log
        account = log.ledger.stretches[victim.header.stretch_id]
        through = self._sequence_last(victim, account)
        lost = _lost(pieces, account)
        self._is_removing = True
        try:
            value = {
                "stretch": account.id, "through": through, "lost": lost, "reason": "budget",
                "segments": [victim.number],
            }  # fmt: skip
            is_written = log.write_bookkeeping(Kind.REMOVED, value)
            log.ledger.remove(account, through, lost, "budget")
            log.tell_lost({source: {"budget": count} for source, count in lost.items()})
            log.ledger.removing.add(victim.number)
        finally:
            self._is_removing = False
        return is_written

    def _sequence_last(self, segment: Segment, account: StretchAccount) -> int:
        following = self._log.shelf.following(segment)
        return account.sequence_last if following is None else following.header.sequence_first - 1

    def for_rejected(self, size: int) -> None:
        """Make room for a rejected record, at the cost of older ones and of what was sent. Raises OSError."""
        while self._excess(size) > 0:
            if (path := self._log.shelf.oldest_rejected(0)) is not None:
                self._log.shelf.delete_other(path)
            elif not self._remove_acknowledged():
                return

    def close(self) -> None:
        """Give back the segment that was allocated ahead."""
        if self._next is not None:
            (number, descriptor), self._next = self._next, None
            os.close(descriptor)
            with suppress(OSError):  # Then it stays, and is found unused by the next process.
                self._log.shelf.delete_other(self._log.shelf.folder / segment_name(number))


def _lost(pieces: list[_Piece], account: StretchAccount) -> dict[str, int]:
    """Frames of each source that go with the pieces and are nowhere else."""
    lost: dict[str, int] = {}
    for source in sorted({piece.source for piece in pieces}):
        safe = account.passed[source] + account.in_flight(source) + account.ahead[source]
        through = max(piece.through for piece in pieces if piece.source == source)
        if through > safe:
            lost[source] = through - safe
    return lost
