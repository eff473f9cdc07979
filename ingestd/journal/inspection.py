"""A look at a journal's folder from outside, that changes nothing in it and needs no lock.

It works beside a daemon that writes: what is seen is what lay there at some moment during the look. Where a segment was
deleted meanwhile, or something reads like damage, it is looked at again, because a write may have been under way.

Limits: as much is read as `recovery` reads, and the first record with a time of each stretch; `verification` reads all.
Frames that the daemon could not write yet, and counts in memory, are not in the books seen from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from ingestd.errors import IngestdError, UsageError
from ingestd.journal.holder import LOCK_NAME, holder_of
from ingestd.journal.ledger import StretchAccount
from ingestd.journal.record import RECORD_BYTES_MAX, Kind, Record
from ingestd.journal.recovery import Segment, Stock, take_stock
from ingestd.journal.segment import (
    HEADER_BYTES,
    Damage,
    Name,
    Unreadable,
    ignore,
    list_folder,
    read_header,
    read_segment,
)
from ingestd.model import Books, Clock

LOOKS_MAX = 5  # A daemon that deletes segments faster than that is looked at as it is.
HEAD_BYTES = (64 << 10, 2 * RECORD_BYTES_MAX)  # read of a stretch to find when it begins; then all of the segment


@dataclass(frozen=True, slots=True)
class StretchSight:
    """One stretch. `begun_ns` is the UTC of its first record that is left, None if none has a time."""

    id: str
    session_id: UUID
    session_name: str
    boot_id: str
    machine_id: str
    feed_id: str
    is_newest: bool
    begun_ns: int | None
    begun_clock: Clock | None
    segments: int
    bytes: int
    records: int
    acknowledged: int
    frames: dict[str, int]
    pending: dict[str, int]


@dataclass(frozen=True, slots=True)
class JournalSight:
    """What is in the folder. `damages` are those in what was read."""

    folder: Path
    holder: str | None
    stretches: list[StretchSight]
    books: dict[str, Books]
    damages: list[Damage]
    torn_bytes: int
    rejected: list[Name]
    aside: list[Name]
    segments: int
    bytes: int  # of all files
    unused: int  # segments that are allocated and wait to be used
    warnings: list[str]


def look(folder: Path) -> JournalSight:
    """See what is in a journal. Raises UsageError where there is none, IngestdError where it cannot be read."""
    names, stock = stock_of(folder)
    newest = stock.segments[-1].header.stretch_id if stock.segments else ""
    segments: dict[str, list[Segment]] = {}
    for segment in stock.segments:
        segments.setdefault(segment.header.stretch_id, []).append(segment)
    stretches = [
        _sight(account, segments.get(account.id, []), is_newest=account.id == newest)
        for account in stock.ledger.stretches.values()
        if account.id in segments or not account.is_settled
    ]
    return JournalSight(
        folder,
        holder_of(folder),
        stretches,
        stock.ledger.books(),
        stock.damages,
        stock.torn_bytes,
        [name for name in names if name.rejected],
        [name for name in names if not name.number],
        len(stock.segments),
        sum(name.bytes for name in names),
        len(stock.unused),
        stock.warnings,
    )


def stock_of(folder: Path) -> tuple[list[Name], Stock]:
    """The journal's files and what they amount to. Raises UsageError, IngestdError."""
    _require_journal(folder)
    places: list[tuple[Path, int]] = []
    for _ in range(LOOKS_MAX):
        try:
            names, _ = list_folder(folder)
            stock = take_stock(folder)
        except OSError as error:
            raise _unreadable(folder, error) from error
        before, places = places, [(damage.path, damage.offset) for damage in stock.damages]
        if (not places or places == before) and all(name.path.exists() for name in names):
            break
    return names, stock


def settled_items(path: Path) -> list[Record | Damage]:
    """What a segment holds, read until two readings find the same damage. Raises OSError.

    Pages that are read while they are written can come out of order, and look like damage then.
    """
    places: list[tuple[int, int]] = []
    for _ in range(LOOKS_MAX):
        items = list(read_segment(path, on_refusal=ignore))
        before, places = places, [(item.offset, len(item.data)) for item in items if isinstance(item, Damage)]
        if not places or places == before:
            break
    return items


def recorded(folder: Path, stretch: str, on_damage: Callable[[str], None]) -> Iterator[Record]:
    """The frames, events and sessions in a journal, each once, sent or not.

    `stretch` is how the id of the only wanted one begins. What cannot be read is told and left out.
    Raises UsageError, also for a stretch that is not there, and IngestdError.
    """
    _, stock = stock_of(folder)
    ids = list(dict.fromkeys(segment.header.stretch_id for segment in stock.segments))
    if stretch:
        ids = [_the_one(stretch, ids)]
    through = dict.fromkeys(ids, 0)
    for segment in stock.segments:
        stretch_id = segment.header.stretch_id
        if stretch_id not in through:
            continue
        for item in _readable(segment.path, on_damage, stock.is_torn_end):
            if item.kind.is_numbered and item.sequence > through[stretch_id]:
                through[stretch_id] = item.sequence
                item.stretch_id = stretch_id
                yield item


def rejected(folder: Path, stretch: str, on_damage: Callable[[str], None]) -> Iterator[tuple[Record, str]]:
    """The records that PostgreSQL refused for good, and why. Raises as `recorded` does."""
    names, _ = stock_of(folder)
    known: set[str] = set()
    any_wanted = False
    for name in names:
        if not name.rejected:
            continue
        try:
            read_header(name.path)
        except Unreadable as error:
            on_damage(str(error))
            continue
        note: dict[str, Any] | None = None
        for item in _readable(name.path, on_damage, lambda damage: damage.at_end):
            if item.kind is Kind.REJECTED:
                note = item.json()
                known.add(note["stretch"])
            elif note is not None and item.sequence == note["sequence"]:
                item.stretch_id = note["stretch"]
                if item.stretch_id.startswith(stretch.lower()):
                    any_wanted = True
                    yield item, note["reason"]
                note = None
    if stretch and not any_wanted:
        _the_one(stretch, sorted(known))


def _the_one(stretch: str, ids: list[str]) -> str:
    """The id that begins so. Raises UsageError."""
    found = [each for each in ids if each.startswith(stretch.lower())]
    if len(found) != 1:
        what = f"{len(found)} stretches begin with {stretch}" if found else f"there is no stretch {stretch}"
        raise UsageError(what, f"there are {', '.join(each[:8] for each in found or ids)}" if ids else "")
    return found[0]


def _readable(path: Path, on_damage: Callable[[str], None], is_expected: Callable[[Damage], bool]) -> Iterator[Record]:
    try:
        items = settled_items(path)
    except FileNotFoundError:
        on_damage(f"{path.name} was removed by the process that holds the journal before it could be read")
        return
    except OSError as error:
        on_damage(f"{path.name} cannot be read: {error.strerror}")
        return
    for item in items:
        if isinstance(item, Record):
            yield item
        elif not is_expected(item):
            on_damage(f"{item} are damaged")


def _require_journal(folder: Path) -> None:
    hint = "name the journal's folder, or with -c the configuration it is in"
    try:
        if folder.is_file():
            raise UsageError(f"{folder} is a file, and a journal is a folder", hint)
        names, foreign = list_folder(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"there is no journal in {folder}", hint) from error
    except OSError as error:
        raise _unreadable(folder, error) from error
    if not names and foreign and not (folder / LOCK_NAME).exists():
        raise UsageError(f"{folder} is not a journal: it holds {foreign[0]} and no segment", hint)


def _unreadable(folder: Path, error: OSError) -> IngestdError:
    hint = "it belongs to the user that ingestd runs as" if isinstance(error, PermissionError) else ""
    return IngestdError(f"the journal {folder} cannot be read: {error.strerror}", hint)


def _sight(account: StretchAccount, segments: list[Segment], *, is_newest: bool) -> StretchSight:
    name, begun = _head(segments[0]) if segments else ("", None)
    return StretchSight(
        account.id,
        account.session_id,
        name,
        account.boot_id,
        account.machine_id,
        account.feed_id,
        is_newest,
        begun.ts_ns + begun.clock.utc_offset_ns if begun else None,
        begun.clock if begun else None,
        len(segments),
        sum(segment.bytes for segment in segments),
        account.sequence_last,
        account.acknowledged,
        dict(account.journalled),
        {source: account.pending(source) for source in account.journalled},
    )


def _head(segment: Segment) -> tuple[str, Record | None]:
    """The name of the session, if the segment begins with it, and its first record that has a time."""
    name = ""
    for size in (*HEAD_BYTES, None):
        try:
            items = read_segment(segment.path, end=None if size is None else HEADER_BYTES + size)
        except OSError:
            break
        for item in items:
            if isinstance(item, Damage):
                continue
            if item.kind is Kind.SESSION:
                name = str(item.session().get("name") or name)
            elif item.kind in (Kind.FRAMES, Kind.EVENT) and item.clock.utc_offset_ns:
                return name, item
        if size is not None and segment.bytes <= HEADER_BYTES + size:
            break
    return name, None
