"""Reading every byte of a journal, to say what is damaged and what that cost.

Each record says how many frames of its source its stretch held before it, and each STATE says so of all sources. Where
that is more than was read, frames are missing, whatever became of their bytes. A loss is named at the first damaged
place since the last record of that source; where there is none, at the record that shows it.

No damage is: a stretch that breaks off (what a power cut leaves; it cannot be told apart from a last record that was
damaged later, unless the writer ended cleanly), space that was allocated and not used, and segments that were removed
because they were sent or to make room. Limits: one segment in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ingestd.journal.inspection import settled_items, stock_of
from ingestd.journal.ledger import StretchAccount
from ingestd.journal.record import Kind, Record
from ingestd.journal.recovery import Stock
from ingestd.journal.segment import (
    ENDED_AT,
    HEADER_BYTES,
    Damage,
    DamagedHeader,
    Name,
    SegmentHeader,
    Unreadable,
    pack_ended,
    read_header,
)

OnProgress = Callable[[int, int], None]  # bytes read, bytes in all


@dataclass(slots=True)
class Finding:
    """A damaged place, and what it cost. `bytes` is 0 where records are missing and nothing is in their place."""

    file: str
    offset: int
    bytes: int
    what: str
    stretch_id: str = ""  # if it is known
    records_lost: int = 0  # numbered ones: frames, events, sessions
    frames_lost: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        frames = [f"{count:,} frames of {source}" for source, count in sorted(self.frames_lost.items())]
        records = [f"{self.records_lost:,} record{'s' * (self.records_lost != 1)}"] if self.records_lost else []
        lost = ", ".join([*records, *frames]) or "nothing that is known"
        return f"{self.file} at {self.offset}: {self.what}; lost: {lost}"

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "file": self.file,
            "offset": self.offset,
            "bytes": self.bytes,
            "what": self.what,
            "stretch": self.stretch_id,
            "records_lost": self.records_lost,
            "frames_lost": dict(self.frames_lost),
        }


@dataclass(slots=True)
class Verification:
    """What reading all of it found."""

    segments: int = 0
    bytes: int = 0
    records: int = 0
    frames: Counter[str] = field(default_factory=Counter)
    rejected_frames: Counter[str] = field(default_factory=Counter)
    torn_bytes: int = 0
    findings: list[Finding] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Walk:
    """How far a stretch was followed. `seen` counts the findings there were when a source was last in order."""

    id: str
    ordinal: int
    sequence: int
    findings_before: int
    begins_late: bool = False  # What its sources had before is not known until a record says it.
    through: dict[str, int] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)
    sequence_seen: int = 0
    last: tuple[str, int] = ("", 0)  # file, and where its records end


def verify(folder: Path, on_progress: OnProgress | None = None) -> Verification:
    """Read everything. Raises UsageError where there is no journal, IngestdError where it cannot be read at all."""
    names, stock = stock_of(folder)
    verifier = _Verifier(stock)
    total, done = sum(name.bytes for name in names), 0
    for name in names:
        if name.number:
            verifier.read(name)
        done += name.bytes
        if on_progress is not None:
            on_progress(done, total)
    verifier.finish(stock_of(folder)[1])
    return verifier.result


class _Verifier:
    def __init__(self, stock: Stock) -> None:
        self.result = Verification()
        self._accounts = stock.ledger.stretches
        self._removed_later = False  # by whoever holds the journal, after its files were listed
        self._walks: dict[str, _Walk] = {}
        self._unused = set(stock.unused)
        self._last_number = {segment.header.stretch_id: segment.number for segment in stock.segments}

    def read(self, name: Name) -> None:
        """Read a file to its end."""
        try:
            header = self._header(name)
            items = settled_items(name.path) if header is not None else []
        except FileNotFoundError:
            self._removed_later = True
            return
        except OSError as error:
            self._find(name, 0, name.bytes, f"cannot be read: {error.strerror}")
            return
        self.result.bytes += name.bytes
        if header is None or name.path in self._unused:
            return  # Or begun meanwhile: the segment before it was then read too early to be followed by it.
        if name.rejected:
            self._count_rejected(name, items)
        else:
            self.result.segments += 1
            self._follow(name, header, items)

    def _header(self, name: Name) -> SegmentHeader | None:
        """The header, None if there is none that can be used; damage to it is noted. Raises OSError."""
        try:
            header = read_header(name.path)
        except DamagedHeader:
            self._find(name, 0, name.bytes, "the header is damaged, and its records cannot be told apart")
            return None
        except Unreadable as error:
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from error
            self.result.warnings.append(str(error))
            return None
        if header is not None:
            try:
                SegmentHeader.unpack(_head(name.path), name.path.name)
            except DamagedHeader:
                self._find(name, 0, HEADER_BYTES, "the header is damaged; a record behind it says the same")
        return header

    def _find(self, name: Name, offset: int, size: int, what: str, stretch_id: str = "") -> None:
        self.result.findings.append(Finding(name.path.name, offset, size, what, stretch_id))

    def _count_rejected(self, name: Name, items: list[Record | Damage]) -> None:
        for item in items:
            if isinstance(item, Record):
                self.result.rejected_frames[item.source] += item.frames_count
            elif item.at_end:
                self.result.torn_bytes += len(item.data)
            else:
                self._find(name, item.offset, len(item.data), f"{len(item.data):,} bytes are no record")

    def _follow(self, name: Name, header: SegmentHeader, items: list[Record | Damage]) -> None:
        """Go on with the segment's stretch, and compare what its records say with what was read."""
        walk = self._enter(name, header)
        breaks_off = self._last_number.get(walk.id) == header.number and not header.ended
        end = HEADER_BYTES
        for item in items:
            if isinstance(item, Damage):
                size = len(item.data)
                if item.at_end and breaks_off:
                    self.result.torn_bytes += size
                else:
                    self._find(name, item.offset, size, f"{size:,} bytes are no record", walk.id)
                end = item.offset + size
                continue
            self.result.records += 1
            self._take(walk, item, (name.path.name, end))
            end += item.size
        walk.last = (name.path.name, end)
        if header.ended and (mark := _head(name.path)[ENDED_AT:]) != pack_ended(walk.sequence):
            self._expect_sequence(walk, int.from_bytes(mark[8:16], "little"), walk.last)

    def _enter(self, name: Name, header: SegmentHeader) -> _Walk:
        """The walk through the stretch, in the new segment; segments before it may be missing."""
        before = header.sequence_first - 1
        walk = self._walks.get(header.stretch_id)
        if walk is None:
            walk = _Walk(header.stretch_id, 0, 0, len(self.result.findings))
            self._walks[walk.id] = walk
        if header.ordinal > walk.ordinal + 1 and self._was_removed(walk.id, before):
            walk.begins_late, walk.sequence = True, before
            walk.through.clear()
        elif header.ordinal > walk.ordinal + 1 and not self._suspects(walk, walk.sequence_seen):
            count = header.ordinal - walk.ordinal - 1
            self._find(name, 0, 0, f"{count} segment{'s' * (count > 1)} before it missing", walk.id)
            if not walk.ordinal and (account := self._accounts.get(walk.id)) is not None:
                walk.sequence = account.acknowledged
                walk.through = dict(account.passed + account.ahead)
        walk.ordinal = header.ordinal
        self._expect_sequence(walk, before, (name.path.name, HEADER_BYTES))
        return walk

    def _was_removed(self, stretch_id: str, through: int) -> bool:
        """Whether the stretch's records up to there are gone because they were sent, or to make room."""
        account = self._accounts.get(stretch_id)
        return self._removed_later or account is None or max(account.acknowledged, account.removed_through) >= through

    def _take(self, walk: _Walk, record: Record, at: tuple[str, int]) -> None:
        if record.kind is Kind.STATE:
            self._expect_sequence(walk, record.sequence, at)
            for stretch in record.json()["stretches"]:
                if stretch["id"] == walk.id:
                    for source, through in stretch["journalled"].items():
                        self._expect(walk, source, through, at)
                    walk.begins_late = False
            return
        if not record.kind.is_numbered:
            self._expect_sequence(walk, record.sequence, at)
            return
        if record.sequence <= walk.sequence:
            return
        self._expect_sequence(walk, record.sequence - 1, at)
        self._expect(walk, record.source, record.frames_before, at)
        walk.sequence = record.sequence
        if record.frames_count:
            walk.through[record.source] += record.frames_count
            self.result.frames[record.source] += record.frames_count

    def _expect_sequence(self, walk: _Walk, through: int, at: tuple[str, int]) -> None:
        """Records up to `through` must have been read."""
        if through > walk.sequence:
            self._blame(walk, walk.sequence_seen, at).records_lost += through - walk.sequence
            walk.sequence = through
        walk.sequence_seen = len(self.result.findings)

    def _expect(self, walk: _Walk, source: str, through: int, at: tuple[str, int]) -> None:
        """So many frames of the source must have been read."""
        expected = walk.through.get(source, through if walk.begins_late else 0)
        if through > expected:
            self._blame(walk, walk.seen.get(source, walk.findings_before), at).frames_lost[source] += through - expected
        walk.through[source] = max(through, expected)
        walk.seen[source] = len(self.result.findings)

    def _suspects(self, walk: _Walk, since: int) -> list[Finding]:
        return [each for each in self.result.findings[since:] if each.stretch_id in ("", walk.id)]

    def _blame(self, walk: _Walk, since: int, at: tuple[str, int]) -> Finding:
        """The finding that explains a loss noticed at a place: the first since all was in order, or a new one."""
        if suspects := self._suspects(walk, since):
            return suspects[0]
        finding = Finding(*at, 0, "records before it missing", walk.id)
        self.result.findings.append(finding)
        return finding

    def finish(self, later: Stock) -> None:
        """Compare with the books what was behind the last record of each stretch, and stretches of which nothing is."""
        for account in self._accounts.values():
            now = later.ledger.stretches.get(account.id)
            if now is None or (self._removed_later and now.is_settled):
                continue  # All of it was sent meanwhile, and removed.
            walk = self._walks.get(account.id)
            if walk is None:
                self._miss(account)
                continue
            was_removed = max(now.acknowledged, now.removed_through) >= account.sequence_last
            if not was_removed:
                self._expect_sequence(walk, account.sequence_last, walk.last)
            for source, through in account.journalled.items():
                if source in walk.through or not was_removed:
                    self._expect(walk, source, through, walk.last)

    def _miss(self, account: StretchAccount) -> None:
        pending = Counter({source: account.pending(source) for source in account.journalled})
        if +pending:
            records = account.sequence_last - account.acknowledged
            what = f"no segment of stretch {account.id[:8]} is there"
            self.result.findings.append(Finding("", 0, 0, what, account.id, records, +pending))


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEADER_BYTES)
