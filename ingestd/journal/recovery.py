"""What a folder of segments amounts to, found out by reading as little of it as possible, and changing nothing.

From the newest segment backwards to the first that holds a whole STATE, then forwards from there. Normally that is one
segment, however large the journal. Headers are read of all. Damage is noted and gone past; it never stops anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from pathlib import Path

from ingestd.journal.ledger import Ledger, StretchAccount
from ingestd.journal.record import Kind, Record
from ingestd.journal.segment import (
    HEADER_BYTES,
    Damage,
    Replaced,
    SegmentHeader,
    Unreadable,
    list_folder,
    read_header,
    read_segment,
)


@dataclass(slots=True)
class Segment:
    """A segment in the folder. `end` is where its records end, if that is known better than from its size.

    `refused_at`: since when the disk has refused to read it, by time.monotonic.
    """

    path: Path
    header: SegmentHeader
    bytes: int
    end: int | None = None
    refused_at: float = inf

    @property
    def number(self) -> int:
        """Its number in the folder."""
        return self.header.number


@dataclass(slots=True)
class Stock:
    """What is in a folder and what it amounts to."""

    segments: list[Segment] = field(default_factory=list)
    unused: list[Path] = field(default_factory=list)  # allocated, never written
    removed: list[Path] = field(default_factory=list)  # about to be deleted when the process ended
    ledger: Ledger = field(default_factory=Ledger)
    damages: list[Damage] = field(default_factory=list)  # in what was read
    state_number: int = 0  # of the segment from which on the books are known: older ones are not needed for them
    torn_bytes: int = 0  # behind the last record of a stretch: what a power cut leaves
    warnings: list[str] = field(default_factory=list)

    def last_of(self, stretch_id: str) -> Segment | None:
        """The stretch's last segment."""
        return next((each for each in reversed(self.segments) if each.header.stretch_id == stretch_id), None)

    def is_torn_end(self, damage: Damage) -> bool:
        """Whether these bytes are where writing broke off, and no damage."""
        return damage.at_end and any(
            each.path == damage.path and self.last_of(each.header.stretch_id) is each for each in self.segments
        )


def take_stock(folder: Path, before: int | None = None) -> Stock:
    """Read what is needed of the segments (those with a number less than `before`)."""
    stock = Stock()
    names, foreign = list_folder(folder)
    stock.warnings += [f"{name} is not the journal's; it is left alone" for name in foreign]
    for name in names:
        if not name.number or name.rejected or (before is not None and name.number >= before):
            continue
        try:
            header = read_header(name.path)
        except Unreadable as error:
            stock.warnings.append(str(error))
            continue
        if header is None:
            stock.unused.append(name.path)
        else:
            stock.segments.append(Segment(name.path, header, name.bytes))
    begin, state_at = _newest_state(stock)
    if stock.segments:
        stock.state_number = stock.segments[begin if state_at is not None else -1].number
    for segment in stock.segments[begin:]:
        _apply(stock, segment, state_at if segment is stock.segments[begin] else None)
    known = set(stock.ledger.stretches)
    for segment in stock.segments[:begin]:  # Put here by somebody, or forgotten by damage: its frames count now.
        if segment.header.stretch_id not in known:
            _apply(stock, segment, None)
    stock.removed = [each.path for each in stock.segments if each.number in stock.ledger.removing]
    stock.segments = [each for each in stock.segments if each.number not in stock.ledger.removing]
    for segment in stock.segments:
        _account(stock.ledger, segment.header)  # Also of one in which nothing can be read.
    first_number = {each.header.stretch_id: each.number for each in reversed(stock.segments)}
    accounts = sorted(stock.ledger.stretches.values(), key=lambda account: first_number.get(account.id, 0))
    stock.ledger.stretches = {account.id: account for account in accounts}
    return stock


def _newest_state(stock: Stock) -> tuple[int, int | None]:
    """The index of the segment with the newest whole STATE, and which of its records that begins with."""
    for index in reversed(range(len(stock.segments))):
        found, begin, parts = None, 0, 0
        segment = stock.segments[index]
        items = _items(stock, segment) or []
        stale = _stale(items, segment.header)
        for ordinal, item in enumerate(items):
            if not isinstance(item, Record) or item.kind is not Kind.STATE or ordinal in stale:
                parts = 0
                continue
            state = item.json()
            begin, parts = (ordinal, 1) if state["part"] == 1 else (begin, parts + 1 if parts else 0)
            if parts == state["part"] == state["parts"]:
                found = begin
        if found is not None:
            return index, found
    return 0, None


def _stale(items: list[Record | Damage], header: SegmentHeader) -> set[int]:
    """Which records come behind later ones: an old page in the place of another, that says what is true no more."""
    stale, last = set(), header.sequence_first - 1
    for ordinal, item in enumerate(items):
        if isinstance(item, Damage):
            continue
        if item.sequence < last + item.kind.is_numbered:
            stale.add(ordinal)
        last = max(last, item.sequence)
    return stale


def _items(stock: Stock, segment: Segment) -> list[Record | Damage] | None:
    name = segment.path.name

    def warn(said: str) -> None:
        if (warning := f"{name} can be read in part: {said}") not in stock.warnings:
            stock.warnings.append(warning)

    try:
        return list(read_segment(segment.path, header=segment.header, on_refusal=warn))
    except OSError as error:
        warning = f"{name} cannot be read: {error.strerror}"
    except Replaced as error:
        warning = str(error)
    if warning not in stock.warnings:
        stock.warnings.append(warning)
    return None


def _apply(stock: Stock, segment: Segment, state_at: int | None) -> None:
    """Apply the segment's records, from the STATE at `state_at` on if there is one; others repeat what is known."""
    ledger, end = stock.ledger, HEADER_BYTES
    if (items := _items(stock, segment)) is None:
        return
    in_state, stale = False, _stale(items, segment.header)
    for ordinal, item in enumerate(items):
        if isinstance(item, Damage):
            end += len(item.data)
            if stock.is_torn_end(item):
                stock.torn_bytes += len(item.data)
            else:
                stock.damages.append(item)
            continue
        end += item.size
        if ordinal in stale:
            continue
        in_state = item.kind is Kind.STATE and (ordinal == state_at or in_state)
        if (in_state or item.kind is not Kind.STATE) and ordinal >= (state_at or 0):
            ledger.apply(item, _account(ledger, segment.header))
    segment.end = end


def _account(ledger: Ledger, header: SegmentHeader) -> StretchAccount:
    """The account of the segment's stretch; a new one if it is not known."""
    if header.stretch_id not in ledger.stretches:
        late = header.ordinal > 1
        before = header.sequence_first - 1 if late else 0
        ledger.stretches[header.stretch_id] = StretchAccount(
            header.stretch_id,
            header.origin,
            header.machine_id,
            header.stretch_id,
            acknowledged=before,
            sequence_last=before,
            begins_late=late,
        )
    return ledger.stretches[header.stretch_id]
