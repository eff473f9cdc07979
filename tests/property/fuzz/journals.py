"""Journals whose files were damaged, moved or lost: what is read is what was written, once and in order.

Damages are those of disks and people: bits and bytes changed, pages zeroed or stale, files cut, deleted, copied,
renamed, exchanged. Records that the journal never wrote, with a right checksum, are none: nothing damages so well.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

from hypothesis import strategies as st

from ingestd.errors import IngestdError
from ingestd.journal import Journal, Kind, Record
from ingestd.journal.inspection import look, recorded, rejected
from ingestd.journal.record import merge
from ingestd.journal.recovery import take_stock
from ingestd.journal.segment import HEADER_BYTES
from ingestd.journal.verification import verify
from ingestd.model import Event
from tests.journal_damages import placed
from tests.journals import CLOCK, frames, kill, open_journal, send_all
from tests.property.fuzz.mutations import FAR, MADE_HERE, TOKENS, Corpus
from tests.property.fuzz.target import Strategies, Target, scratch

SOURCES: Final = ("can0", "gps")
PAGE_BYTES: Final = 4096


class Place(NamedTuple):
    """A record of frames: where its bytes are, whose frames it has and which."""

    file: str
    begin: int
    end: int
    source: str
    numbers: frozenset[int]


@dataclass(frozen=True)
class Written:
    """A journal as it was written. `used` says where the records of each file end."""

    files: dict[str, bytes]
    used: dict[str, int]
    places: tuple[Place, ...]
    sent: dict[str, set[int]]  # frames that were acknowledged, or rejected, by source

    def frames(self, source: str) -> set[int]:
        """The numbers of all frames in it."""
        return {number for place in self.places if place.source == source for number in place.numbers}


class Change(NamedTuple):
    """What happens to a file, or with it."""

    what: str
    file: int
    at: int
    more: int
    piece: bytes


def _append(journal: Journal, first: int, count: int, times: int) -> int:
    for _ in range(times):
        journal.append_frames(frames(first, count), CLOCK)
        journal.append_frames(frames(first, count // 2, "gps", length=33), CLOCK)
        first += count
    return first


def _one_stretch(folder: Path) -> dict[str, set[int]]:
    """Several segments of one stretch; killed."""
    journal = open_journal(folder)
    _append(journal, 0, 60, 70)
    kill(journal)
    return {}


def _many_lives(folder: Path) -> dict[str, set[int]]:
    """Stretches of two runs: sent in part, with losses, a rejected record, a clean end; killed in the second run."""
    journal = open_journal(folder)
    number = _append(journal, 0, 30, 20)
    journal.append_event(Event("can0", "gap", 5, "overflow", {"frames": 3}), CLOCK, lost={"overflow": 3})
    sent = list(send_all(journal))
    journal.begin_stretch()
    number = _append(journal, number, 30, 25)
    stretch = journal.stretches()[-1]
    record = next(each for each in journal.reader(stretch.id, 0).read(10_000).records if each.kind is Kind.FRAMES)
    journal.reject(record, "22P05: no such character")
    journal.close(ended=True)
    journal = open_journal(folder)
    _append(journal, number, 30, 10)
    kill(journal)
    return _by_source(sent)


def _budget(folder: Path) -> dict[str, set[int]]:
    """Segments that had to make room."""
    journal = open_journal(folder, segments_max=4)
    _append(journal, 0, 60, 120)
    kill(journal)
    return {}


@cache
def _written() -> dict[str, Written]:
    made = {}
    for write in (_one_stretch, _many_lives, _budget):
        folder = scratch() / write.__name__
        folder.mkdir()
        sent = write(folder)
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "lock"}
        used, places = {}, []
        for name in files:
            found = placed(folder / name) if any(files[name]) else []
            used[name] = found[-1].end if found else 0
            for each in found:
                if each.record.kind is Kind.FRAMES and not name.startswith("rejected"):
                    numbers = frozenset(merge([each.record]).arbitration_id.tolist())
                    places.append(Place(name, each.offset, each.end, each.record.source, numbers))
        made[write.__name__.strip("_")] = Written(files, used, tuple(places), sent)
    return made


def _by_source(records: Iterable[Record]) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {source: set() for source in SOURCES}
    for source, numbers in _numbers(records).items():
        found[source] = set(numbers)
    return found


def _numbers(records: Iterable[Record]) -> dict[str, list[int]]:
    """The numbers of the frames by source, as they come; their stamps and payloads are as they were made."""
    found: dict[str, list[int]] = {}
    for record in records:
        if record.kind is not Kind.FRAMES:
            continue
        batch = record.frames()
        numbers = batch.arbitration_id.tolist()
        expected = frames(numbers[0], len(numbers), record.source, 33 if record.source == "gps" else 8)
        assert (batch.ts_ns == expected.ts_ns).all()
        assert (batch.length == expected.length).all()
        assert (batch.data == expected.data).all()
        found.setdefault(record.source, []).extend(numbers)
    return found


IN_PLACE: Final = ("flip", "overwrite", "zero", "zero page", "stale page")
ANY: Final = (*IN_PLACE, "cut", "end", "insert", "delete", "copy", "rename", "exchange", "empty", "foreign")


def _changes(known: tuple[str, ...]) -> st.SearchStrategy[list[Change]]:
    pieces = st.one_of(st.binary(min_size=1, max_size=12), st.sampled_from(TOKENS))
    places = st.integers(0, FAR)
    return st.lists(st.builds(Change, st.sampled_from(known), st.integers(0, 15), places, places, pieces), max_size=4)


def _in_place(change: Change, data: bytearray, used: int, begin: int) -> tuple[int, int]:
    """Change bytes between `begin` and where the records end; returns from where to where."""
    at = begin + change.at % max(1, used - begin)
    end = min(len(data), at + (1 if change.what == "flip" else len(change.piece)))
    if change.what == "flip":
        data[at] ^= 1 << change.more % 8
    elif change.what == "overwrite":
        data[at:end] = change.piece[: end - at]
    elif change.what == "zero":
        end = min(len(data), at + change.more % 500)
        data[at:end] = bytes(end - at)
    else:
        page = max(at // PAGE_BYTES, 1)
        at, end = page * PAGE_BYTES, min((page + 1) * PAGE_BYTES, len(data))
        stale = 1 + change.more % page
        source = (stale - 1) * PAGE_BYTES + (HEADER_BYTES if stale == 1 else 0)
        old = bytes(data[source : source + max(0, end - at)]) if change.what == "stale page" else b""
        data[at:end] = old.ljust(max(0, end - at), b"\0")
    return at, max(at, end)


def _of_files(change: Change, folder: Path, name: str, names: list[str]) -> None:
    """Something that happens to a file as a whole, or moves what is behind a place."""
    path, other = folder / name, folder / names[change.at % len(names)]
    if not path.exists():
        return
    data = bytearray(path.read_bytes())
    at = change.at % (len(data) + 1)
    if change.what == "cut":
        del data[at : at + change.more % 500]
        path.write_bytes(data)
    elif change.what == "end":
        path.write_bytes(data[:at])
    elif change.what == "insert":
        data[at:at] = change.piece
        path.write_bytes(data)
    elif change.what == "delete":
        path.unlink()
    elif change.what == "copy":
        shutil.copy(path, folder / f"{50 + change.more % 50:08d}.journal")
    elif change.what == "rename":
        path.rename(folder / f"{50 + change.more % 50:08d}.journal")
    elif change.what == "exchange" and other.exists():
        mine, theirs = path.read_bytes(), other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(mine)
    elif change.what == "empty":
        path.write_bytes(b"")
    elif change.what == "foreign":
        (folder / ("00000060.journal", "notes.txt", "damaged-1-1", "rejected-00000061.journal")[at % 4]).write_bytes(
            change.piece * 50
        )


def _damaged(written: Written, changes: list[Change], begin: int) -> tuple[Path, list[tuple[str, int, int]]]:
    """The folder with the changes made, and which bytes were changed in place."""
    folder = scratch() / "journal"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in written.files.items():
        (folder / name).write_bytes(data)
    touched = []
    names = sorted(written.files)
    for change in changes:
        name = names[change.file % len(names)]
        path = folder / name
        if change.what not in IN_PLACE:
            _of_files(change, folder, name, names)
        elif path.exists() and path.stat().st_size > begin:
            content = bytearray(path.read_bytes())
            where = _in_place(change, content, min(written.used[name] or len(content), len(content)), begin)
            path.write_bytes(content)
            touched.append((name, *where))
    return folder, touched


def _draw(known: tuple[str, ...]) -> Strategies:
    return {"name": st.sampled_from(sorted(_written())), "changes": _changes(known)}


def check_outside(name: str, changes: list[Change]) -> None:
    """Looking, verifying and exporting raise nothing; what is read was written, each frame once and in order."""
    written = _written()[name]
    folder, _ = _damaged(written, changes, 0)
    found = _read(folder, written)
    result = verify(folder)
    for finding in result.findings:
        assert str(finding)
        assert finding.records_lost >= 0 <= min(finding.frames_lost.values(), default=0)
    assert +result.frames == +Counter({source: len(numbers) for source, numbers in found.items()})
    look(folder)
    take_stock(folder)
    said: list[str] = []
    with suppress(IngestdError):
        for record, reason in rejected(folder, "", said.append):
            assert _numbers([record])
            assert reason == "22P05: no such character"


def _read(folder: Path, written: Written) -> dict[str, list[int]]:
    said: list[str] = []
    found = _numbers(recorded(folder, "", said.append))
    for source, numbers in found.items():
        assert set(numbers) <= written.frames(source)
        assert all(one < next_ for one, next_ in pairwise(numbers)), "twice, or out of order"
    return found


def check_in_place(name: str, changes: list[Change]) -> None:
    """Records that no changed byte is in are all read: damage costs what is damaged."""
    written = _written()[name]
    folder, touched = _damaged(written, changes, HEADER_BYTES)
    found = _read(folder, written)
    for place in written.places:
        if all(place.file != file or end <= place.begin or place.end <= begin for file, begin, end in touched):
            assert place.numbers <= set(found[place.source]), place


def check_opening(name: str, changes: list[Change]) -> None:
    """It is opened, its books balance, and what is left is sent once; then nothing is pending."""
    written = _written()[name]
    folder, _ = _damaged(written, changes, 0)
    readable = _read(folder, written)
    journal = open_journal(folder)
    try:
        assert all(books.balanced for books in journal.books().values())
        sent = _numbers(send_all(journal))
        for source, numbers in sent.items():
            assert len(set(numbers)) == len(numbers)
            assert set(numbers) <= set(readable[source])
        for source, numbers in readable.items():
            left = set(numbers) - set(sent.get(source, ()))
            assert left <= written.sent.get(source, set()), "not sent"
        for source, books in journal.books().items():
            assert books.balanced, (source, books)
            assert books.pending == 0, (source, books)
    finally:
        kill(journal)
    verify(folder)


def _draw_outside(_: Corpus) -> Strategies:
    return _draw(ANY)


def _draw_in_place(_: Corpus) -> Strategies:
    return _draw(IN_PLACE)


# What failed once: the last frames of a source lost, and not the last of their stretch; an old STATE in a later place.
FOUND: list[dict[str, Any]] = [
    {"name": "many_lives", "changes": [Change("flip", 1, 510_127, 0, b"")]},
    {"name": "budget", "changes": [Change("stale page", 3, 57_344, 0, b"")]},
]
TARGETS = (
    Target("journal_outside", _draw_outside, check_outside, 60, (MADE_HERE,)),
    Target("journal_in_place", _draw_in_place, check_in_place, 60, (MADE_HERE,)),
    Target("journal_opening", _draw_outside, check_opening, 80, (MADE_HERE,), FOUND),
)
