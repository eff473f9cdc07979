"""Reading a stretch back, from after a position, while it may still be written and its oldest segments removed.

Every record is verified again. What is missing shows in the records that follow: each says how many frames of its
source the stretch held before it. The difference is exactly what was lost, whatever became of the bytes.

What the disk refuses to read it may give when it is asked again: it is asked for `REFUSED_SECONDS`, and only then is it
damage, as far as the blocks go that it still refuses.

Limits: a reader keeps at most one segment in memory. It is for one thread at a time, and one stretch has one reader.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING

from ingestd.errors import IngestdError
from ingestd.journal.ledger import Read, StretchAccount, total_of
from ingestd.journal.record import Record
from ingestd.journal.recovery import Segment
from ingestd.journal.segment import HEADER_BYTES, Damage, Replaced, read_segment

if TYPE_CHECKING:
    from ingestd.journal.log import Log

REFUSED_SECONDS = 60.0


@dataclass(slots=True)
class ReadResult:
    """Records, and frames that are missing before them, by source and reason (`damage`, `budget`).

    Without records: frames that are missing at the end of a stretch, which is settled with this.
    """

    records: list[Record] = field(default_factory=list)
    lost: dict[str, dict[str, int]] = field(default_factory=dict)


class StretchReader:
    """Where in a stretch its sending is. Made by `Journal.reader`."""

    def __init__(self, log: Log, stretch_id: str, after: int) -> None:
        self._log = log
        self._stretch_id = stretch_id
        self._after = after
        self._known_removed = -1
        self._begin(after)

    def __repr__(self) -> str:
        return f"<StretchReader {self._stretch_id[:8]} after {self._after}>"

    def rewind(self, position: int) -> None:
        """Go back: the records after `position` are read again."""
        self._after = position
        self._begin(position)

    def read(self, bytes_max: int) -> ReadResult:
        """The next records: some `bytes_max` of them, at least one if there is any; none means there is none now.

        Raises IngestdError if a segment cannot be read now; then it was as if nobody had asked.
        """
        while True:
            with self._log.lock:
                account = self._log.ledger.stretches.get(self._stretch_id)
                if account is None:
                    return ReadResult()
                if account.removed_through != self._known_removed:
                    self._begin(self._after)
                removed_through, segments = account.removed_through, self._segments()
                has_ended = account is not self._log.stretch
            after = self._after
            try:
                result, reads = self._collect(account, segments, bytes_max)
            except IngestdError:
                self.rewind(after)
                raise
            with self._log.lock:
                if account.removed_through != removed_through:
                    self._after = after  # Some of this was removed and counted meanwhile.
                    continue
                account.reads.extend(read for read in reads if read.sequence > account.read_through)
                account.read_through = max(account.read_through, self._sequence)
                if not result.records and has_ended:
                    result.lost = self._log.settle_end(account, self._expected + self._ahead, self._sequence)
            return result

    def _begin(self, after: int) -> None:
        """Set out from a position: at the last one whose counts are known, if that comes before it."""
        with self._log.lock:
            account = self._log.ledger.stretches.get(self._stretch_id)
            if account is None:
                account = StretchAccount(self._stretch_id, self._log.stretch.origin, "")
            while account.reads and account.reads[-1].sequence > after:
                account.reads.pop()
            self._floor = account.acknowledged
            account.read_through = max(self._floor, min(account.read_through, after))
            self._sequence = min(after, account.read_through)
            unread = total_of(account.reads, ahead=True)
            self._expected = account.passed + total_of(account.reads, ahead=False) + unread
            self._ahead = account.ahead - unread
            self._known_removed = account.removed_through
            self._seen: dict[str, int] = {}
            self._items: Iterator[Record | Damage] = iter(())
            self._number, self._end = 0, 0

    def _note_damage(self, damage: Damage) -> None:
        with self._log.lock:
            if self._log.shelf.note_damage(damage):
                self._log.tell(f"damaged: {damage}")

    def _segments(self) -> list[Segment]:
        return list(self._log.shelf.by_stretch.get(self._stretch_id, ()))

    def _collect(
        self, account: StretchAccount, segments: list[Segment], bytes_max: int
    ) -> tuple[ReadResult, list[Read]]:
        result, size = ReadResult(), 0
        reads: list[Read] = []
        while size < max(1, bytes_max):
            item = next(self._items, None)
            if item is None:
                if self._load(segments):
                    continue
                break
            if isinstance(item, Damage):
                is_last = not segments or item.path == segments[-1].path
                if not (item.at_end and is_last):
                    self._note_damage(item)
                continue
            if not item.kind.is_numbered or item.sequence <= self._sequence:
                continue
            if item.sequence > self._floor:
                self._count(item, account, reads, result.lost)
            self._sequence = item.sequence
            if item.sequence > self._after:
                item.stretch_id = self._stretch_id
                result.records.append(item)
                self._after = item.sequence
                size += item.size
        return result, reads

    def _count(
        self, record: Record, account: StretchAccount, reads: list[Read], lost: dict[str, dict[str, int]]
    ) -> None:
        source = record.source
        missing = record.frames_before - self._expected[source]
        if missing > 0:
            known = min(missing, self._ahead[source])
            if known:
                self._ahead[source] -= known
                reads.append(Read(record.sequence, source, known, True))
            if missing > known:
                was_removed = account.removed_through > self._seen.get(source, self._floor)
                reason = "budget" if was_removed else "damage"
                reasons = lost.setdefault(source, {})
                reasons[reason] = reasons.get(reason, 0) + missing - known
                reads.append(Read(record.sequence, source, missing - known, False))
        if record.frames_count:
            reads.append(Read(record.sequence, source, record.frames_count, False))
        self._expected[source] = record.frames_before + record.frames_count
        self._seen[source] = record.sequence

    def _load(self, segments: list[Segment]) -> bool:
        """Go on with what came to the segment since it was loaded, else with the next one."""
        for index, segment in enumerate(segments):
            end = segment.bytes if segment.end is None else segment.end
            if segment.number < self._number or (segment.number == self._number and end <= self._end):
                continue
            following = segments[index + 1] if index + 1 < len(segments) else None
            passed = following is not None and following.header.sequence_first <= self._sequence + 1
            if passed and segment.number > self._number:
                continue  # All of it comes before the position.
            start = self._end if segment.number == self._number else HEADER_BYTES
            self._number, self._end = segment.number, end
            try:
                self._items = self._read(segment, start, end)
            except FileNotFoundError:
                continue  # Removed since; what is missing shows in the next.
            except Replaced as error:
                self._tell(str(error))
                continue
            return True
        return False

    def _read(self, segment: Segment, start: int, end: int) -> Iterator[Record | Damage]:
        """The records in a part of a segment. Raises FileNotFoundError, Replaced, and IngestdError for "try again"."""
        name, now = segment.path.name, time.monotonic()
        # A disk that takes no writes either is all away, and may come back with all that is on it.
        is_lasting = now >= segment.refused_at + REFUSED_SECONDS and self._log.writable
        on_refusal = (lambda said: self._tell(f"{name} can be read in part: {said}")) if is_lasting else None
        try:
            items = read_segment(segment.path, start, end, header=segment.header, on_refusal=on_refusal)
        except FileNotFoundError:
            raise
        except OSError as error:
            if is_lasting and error.errno == errno.EIO:
                self._tell(f"{name} cannot be read: {error.strerror}")
                return iter(())
            segment.refused_at = min(segment.refused_at, now)
            raise IngestdError(f"{segment.path} cannot be read now: {error.strerror}") from error
        if not is_lasting:
            segment.refused_at = inf
        return items

    def _tell(self, notice: str) -> None:
        with self._log.lock:
            self._log.tell(notice)
