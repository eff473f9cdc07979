"""Looking at a journal that changes under the look, and verifying one of which parts are gone, sent or refused."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ingestd.errors import IngestdError, UsageError
from ingestd.journal import Record, inspection
from ingestd.journal.inspection import LOOKS_MAX, look, recorded, rejected, settled_items
from ingestd.journal.recovery import Stock, take_stock
from ingestd.journal.segment import HEADER_BYTES, Damage, list_folder, read_segment
from ingestd.journal.verification import verify
from ingestd.model import Books, Clock, ClockState, Event
from tests.journal_damages import FIRST, LAST, MIDDLE, change, held, in_middle, make, placed
from tests.journals import (
    CLOCK,
    frames,
    kill,
    numbers_of,
    open_journal,
    open_unrecovered,
    send_all,
)

UNKNOWN = Clock(0, ClockState.UNSET)
REFUSED = "22P05: no such character"


def refused_twice(folder: Path) -> tuple[list[Record], list[Path]]:
    """Two records of frames that were refused, each in the file of another process; and these files."""
    records: list[Record] = []
    for first in (0, 10):
        journal = open_journal(folder)
        journal.append_frames(frames(first, 10), CLOCK)
        records.append(send_all(journal)[-1])
        journal.reject(records[-1], REFUSED)
        journal.close(ended=True)
    return records, sorted(folder.glob("rejected-*"))


def test_a_holder_that_deletes_faster_than_one_can_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a few looks the journal is shown as it was seen last."""
    journal = open_journal(tmp_path)
    for number in range(LOOKS_MAX + 2):
        journal.append_frames(frames(number, 1), CLOCK)
        journal.begin_stretch()
    kill(journal)
    looks = 0

    def deleting(folder: Path) -> Stock:
        nonlocal looks
        looks += 1
        stock = take_stock(folder)
        list_folder(folder)[0][0].path.unlink()
        return stock

    monkeypatch.setattr(inspection, "take_stock", deleting)
    sight = look(tmp_path)
    assert looks == LOOKS_MAX
    assert sight.segments == 4
    assert [stretch.segments for stretch in sight.stretches[-4:]] == [1] * 4
    assert sight.books["can0"].received == LOOKS_MAX + 2


def test_a_journal_that_is_deleted_while_one_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is an error in words, not the mistake of whoever asked."""
    folder = tmp_path / "journal"
    make(folder)

    def deleting(folder: Path) -> Stock:
        shutil.rmtree(folder)
        return take_stock(folder)

    monkeypatch.setattr(inspection, "take_stock", deleting)
    with pytest.raises(IngestdError, match=f"{folder} cannot be read: No such file or directory") as said:
        look(folder)
    assert not isinstance(said.value, UsageError)


def test_a_segment_that_is_deleted_while_one_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stretch is shown, without the name and the time that stood in it."""
    count = make(tmp_path)

    def deleting(folder: Path) -> Any:
        seen = stock_of(folder)
        (folder / FIRST).unlink()
        return seen

    stock_of = inspection.stock_of
    monkeypatch.setattr(inspection, "stock_of", deleting)
    (stretch,) = look(tmp_path).stretches
    assert (stretch.session_name, stretch.begun_ns, stretch.segments) == ("", None, 4)
    assert stretch.pending == {"can0": count, "gps": count}


def test_when_a_stretch_has_begun(tmp_path: Path) -> None:
    """With the first record that has a time, however far behind the beginning of a large segment; else nobody knows."""
    journal = open_journal(tmp_path, segment_bytes=4 << 20, segments_max=256)
    for at in range(50):
        journal.append_event(Event("can0", "note", at, "", {"text": "x" * 2000}), UNKNOWN)
    (stretch,) = look(tmp_path).stretches
    assert (stretch.session_name, stretch.begun_ns) == ("shakedown", None)
    journal.append_frames(frames(7, 1), CLOCK)
    (stretch,) = look(tmp_path).stretches
    assert (stretch.session_name, stretch.begun_ns) == ("shakedown", CLOCK.utc_offset_ns + 7000)
    assert stretch.begun_clock == CLOCK
    journal.close(ended=True)


def test_a_page_that_is_never_seen_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage that is elsewhere each time is told as it was seen last; reading ends all the same."""
    make(tmp_path)
    path, readings = tmp_path / FIRST, 0

    def ragged(path: Path, **more: Any) -> object:
        nonlocal readings
        readings += 1
        return iter([Damage(path, HEADER_BYTES + readings, b"\x01", False), *read_segment(path, **more)])

    monkeypatch.setattr(inspection, "read_segment", ragged)
    items = settled_items(path)
    assert readings == LOOKS_MAX
    assert [item.offset for item in items if isinstance(item, Damage)] == [HEADER_BYTES + LOOKS_MAX]
    assert len(items) == len(placed(path)) + 1


def test_files_that_change_while_they_are_exported(tmp_path: Path) -> None:
    """One that is removed and one that is no file any more are told; all others come out."""
    count = make(tmp_path)
    gone = held(tmp_path / MIDDLE, tmp_path / LAST)
    told: list[str] = []
    exported = recorded(tmp_path, "", told.append)
    read = [next(exported)]
    (tmp_path / MIDDLE).unlink()
    (tmp_path / LAST).unlink()
    (tmp_path / LAST).mkdir()
    read += exported
    assert told == [
        f"{MIDDLE} was removed by the process that holds the journal before it could be read",
        f"{LAST} cannot be read: Is a directory",
    ]
    for source in ("can0", "gps"):
        assert numbers_of(read, source) == [number for number in range(count) if number not in gone[source]]


def test_refused_records_beside_damaged_ones(tmp_path: Path) -> None:
    """A file whose header is damaged is told, and so is a damaged note: what is whole comes out with its own reason."""
    records, (first, second) = refused_twice(tmp_path)
    told: list[str] = []
    change(first, 20, b"\xff\xff")
    ((record, reason),) = rejected(tmp_path, "", told.append)
    assert (record.pack(), reason) == (records[1].pack(), REFUSED)
    assert len(told) == 1
    assert f"the header of {first.name} is damaged" in told[0]
    note = placed(second)[0]
    note.flip(note.record.size - 3)
    assert list(rejected(tmp_path, "", told.append)) == []
    assert told[-1] == f"{second.name} at {HEADER_BYTES}: {note.record.size} bytes are damaged"


def test_damaged_files_of_refused_records_are_found(tmp_path: Path) -> None:
    """In the middle it is damage, at the end a write that broke off; the frames of what is whole are counted."""
    _, (first, second) = refused_twice(tmp_path)
    note = placed(first)[0]
    note.flip(5)
    broken_off = placed(second)[1]
    os.truncate(second, broken_off.end - 10)
    found = verify(tmp_path)
    assert [(each.file, each.offset, each.bytes) for each in found.findings] == [
        (first.name, HEADER_BYTES, note.record.size)
    ]
    assert found.torn_bytes == broken_off.record.size - 10
    assert found.rejected_frames == {"can0": 10}


def test_a_finding_for_programs(tmp_path: Path) -> None:
    """Everything that is said in words, in JSON; and how far verification is, in bytes."""
    make(tmp_path)
    (target := in_middle(tmp_path)).flip(5)
    progress: list[tuple[int, int]] = []
    (finding,) = verify(tmp_path, lambda *bytes_read: progress.append(bytes_read)).findings
    assert finding.as_json() == {
        "file": MIDDLE,
        "offset": target.offset,
        "bytes": target.record.size,
        "what": f"{target.record.size:,} bytes are no record",
        "stretch": target.record.stretch_id or next(iter(look(tmp_path).stretches)).id,
        "records_lost": 1,
        "frames_lost": {"can0": target.record.frames_count},
    }
    total = sum(path.stat().st_size for path in tmp_path.glob("*.journal"))
    assert progress == sorted(progress)
    assert (len(progress), progress[-1]) == (4, (total, total))


def test_what_was_sent_and_removed_is_not_missed(tmp_path: Path) -> None:
    """A stretch of which no segment is left, and a source of which no record is: all of it was sent."""
    journal = open_journal(tmp_path)
    journal.append_frames(frames(0, 10), CLOCK)
    kill(journal)
    journal = open_unrecovered(tmp_path)  # Until it has recovered no STATE names its sources.
    journal.append_frames(frames(0, 10, "gps"), CLOCK)
    while journal._shelf.number_last < 4:
        journal.append_frames(frames(journal._log.stretch.journalled["can0"], 100), CLOCK)
    count = journal.books()["can0"].pending
    send_all(journal)
    kill(journal)
    journal = open_journal(tmp_path)
    send_all(journal)
    journal.close(ended=True)
    assert look(tmp_path).books == {"can0": Books(count + 10, count + 10, 0, 0), "gps": Books(10, 10, 0, 0)}
    names = [name.path for name in list_folder(tmp_path)[0]]
    assert not verify(tmp_path).findings
    names[0].unlink()
    assert not verify(tmp_path).findings
    names[1].unlink()
    found = verify(tmp_path)
    assert not found.findings
    assert found.frames == Counter({"can0": found.frames["can0"]})
    assert 0 < found.frames["can0"] < count
