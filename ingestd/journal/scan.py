"""Looking at a journal from outside: nothing is changed, and a daemon may go on writing it meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ingestd.errors import UsageError
from ingestd.journal.holder import holder_of
from ingestd.journal.ledger import StretchAccount
from ingestd.journal.record import Kind, Record
from ingestd.journal.recovery import Segment, Stock, take_stock
from ingestd.journal.segment import Damage, list_folder, read_segment
from ingestd.model import Books


@dataclass(frozen=True, slots=True)
class StretchStatus:
    """One stretch."""

    account: StretchAccount
    segments: int
    bytes: int
    records: int  # that are still there, by the numbers of the first and the last

    @property
    def frames(self) -> int:
        """Frames it has ever held."""
        return self.account.journalled.total()

    @property
    def pending(self) -> int:
        """Frames that wait."""
        return sum(map(self.account.pending, self.account.journalled))


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that `verify` found: where, what, and frames that are missing because of it, by source."""

    file: str
    offset: int
    what: str
    frames: Mapping[str, int] = field(default_factory=dict)


class JournalView:
    """A folder as it was when `scan` looked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.holder = holder_of(folder)
        self.stock: Stock = take_stock(folder)
        self.rejected = [name for name in list_folder(folder)[0] if name.rejected]
        self.bytes_used = sum(name.bytes for name in list_folder(folder)[0])

    def books(self) -> dict[str, Books]:
        """Where the frames of each source are. What waits in the memory of a daemon to be counted is not in it."""
        return self.stock.ledger.books()

    def segments_of(self, stretch_id: str) -> list[Segment]:
        """The segments of a stretch, in order."""
        return [segment for segment in self.stock.segments if segment.header.stretch_id == stretch_id]

    def stretches(self) -> list[StretchStatus]:
        """All stretches, oldest first."""
        statuses = []
        for account in self.stock.ledger.stretches.values():
            segments = self.segments_of(account.id)
            first = segments[0].header.sequence_first if segments else account.sequence_last + 1
            size = sum(segment.bytes for segment in segments)
            statuses.append(StretchStatus(account, len(segments), size, account.sequence_last + 1 - first))
        return statuses

    def records(self, stretch_id: str | None = None) -> Iterator[Record]:
        """The numbered records of all stretches, or of the one whose id begins so. Damage is gone past.

        Raises UsageError if no stretch's id begins so.
        """
        found = [key for key in self.stock.ledger.stretches if key.startswith(stretch_id or "")]
        if stretch_id is not None and len(found) != 1:
            raise UsageError(f"{len(found)} stretches begin with {stretch_id!r}", "ingestd journal status lists them")
        for key in found:
            sequence = 0
            for segment in self.segments_of(key):
                for item in _read(segment):
                    if isinstance(item, Record) and item.kind.is_numbered and item.sequence > sequence:
                        sequence = item.sequence
                        item.stretch_id = key
                        yield item

    def rejected_records(self) -> Iterator[tuple[Record, dict[str, Any]]]:
        """The rejected records, each once, with what is known of why: `stretch`, `sequence`, `reason`."""
        seen: set[tuple[str, int]] = set()
        for name in self.rejected:
            note: dict[str, Any] = {}
            for item in read_segment(name.path):
                if isinstance(item, Damage):
                    continue
                if item.kind is Kind.REJECTED:
                    note = item.json()
                elif (key := (note.get("stretch", ""), item.sequence)) not in seen:
                    seen.add(key)
                    item.stretch_id = key[0]
                    yield item, note

    def verify(self) -> Iterator[Problem]:
        """Read everything, and tell what is wrong. What a power cut has torn off the end of a stretch is not."""
        for warning in self.stock.warnings:
            yield Problem("", 0, warning)
        for account in self.stock.ledger.stretches.values():
            yield from self._verify_stretch(account)
        for name in self.rejected:
            for item in read_segment(name.path):
                if isinstance(item, Damage):
                    yield Problem(name.path.name, item.offset, f"{len(item.data)} bytes are no record")

    def _verify_stretch(self, account: StretchAccount) -> Iterator[Problem]:
        segments = self.segments_of(account.id)
        removed = account.passed + account.ahead if not segments or segments[0].header.ordinal > 1 else Counter()
        seen: Counter[str] = Counter()
        for segment in segments:
            for item in _read(segment):
                if isinstance(item, Damage):
                    if not self.stock.is_torn_end(item):
                        yield Problem(segment.path.name, item.offset, f"{len(item.data)} bytes are no record")
                    continue
                if not item.kind.is_numbered:
                    continue
                source = item.source
                missing = item.frames_before - max(seen[source], removed[source])
                if missing > 0:
                    what = f"frames are missing before record {item.sequence}"
                    yield Problem(segment.path.name, 0, what, {source: missing})
                seen[source] = max(seen[source], item.frames_before + item.frames_count)
        done = account.passed + account.ahead
        missing_at_end = {
            source: through - max(seen[source], removed[source], 0 if segments else done[source])
            for source, through in account.journalled.items()
        }
        missing_at_end = {source: count for source, count in missing_at_end.items() if count > 0}
        if missing_at_end:
            last = segments[-1].path.name if segments else ""
            yield Problem(last, 0, f"frames are missing at the end of stretch {account.id}", missing_at_end)


def scan(folder: Path) -> JournalView:
    """Look at a journal. Raises UsageError if there is none."""
    if not folder.is_dir():
        raise UsageError(f"there is no journal in {folder}")
    return JournalView(folder)


def _read(segment: Segment) -> Iterator[Record | Damage]:
    try:
        return read_segment(segment.path)
    except FileNotFoundError:
        return iter(())  # A daemon has removed it since.
