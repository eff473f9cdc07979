"""The golden journal, tests/golden/journal-2: every ingestd writes the same bytes, and reads them as they were meant.

A change of these bytes is a new version of the format: raise `VERSION` or `RECORD_VERSION`, keep reading the old one,
and add another golden journal beside this one. `python -m tests.unit.test_journal_golden FOLDER` writes a journal.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from unittest import mock
from uuid import UUID

import numpy as np
import pytest

from ingestd.journal import Journal, Kind, Record, merge
from ingestd.journal.segment import HEADER_BYTES, read_segment
from ingestd.model import Books, Clock, ClockState, Event, Flag, FrameBatch, SerialFlag
from tests.journals import BOOT_ID, CLOCK, SESSION, numbers_of, open_journal, send_all

GOLDEN = Path(__file__).parents[1] / "golden" / "journal-2"
STRETCHES = [UUID(int=0xA1 << 120), UUID(int=0xB2 << 120)]
UNSET = Clock(-3_600_000_000_000, ClockState.UNSET)
REASON = "22P05: untranslatable character"


def batch(source: str, rows: list[tuple[int, int, int, bytes]], width: int) -> FrameBatch:
    """Frames from stamp, arbitration id, flags and payload."""
    stamps, ids, flags, payloads = zip(*rows, strict=True)
    data = np.frombuffer(b"".join(payload.ljust(width, b"\0") for payload in payloads), np.uint8)
    return FrameBatch(
        source,
        np.array(stamps, np.int64),
        np.array(ids, np.uint32),
        np.array(flags, np.uint8),
        np.array(list(map(len, payloads)), np.uint16),
        data.reshape(len(rows), width),
    )


CLASSIC = batch(
    "can0",
    [
        (1_000_000_000, 0x123, 0, bytes(range(1, 9))),
        (1_000_200_000, 0x18FEF100, Flag.EXTENDED, bytes(range(11, 19))),
        (1_000_100_000, 0x7FF, Flag.TRANSMITTED, bytes(range(21, 29))),
    ],
    8,
)
MIXED = batch(
    "can1",
    [
        (2_000_000_000, 0x321, Flag.FD | Flag.BITRATE_SWITCH, bytes(range(64))),
        (2_000_000_001, 0x322, Flag.REMOTE, b""),
        (6_294_967_296, 0x323, 0, b"\xff\x00"),  # 2^32 ns after the first: too late for a record with it.
    ],
    64,
)
SERIAL = batch("gps", [(3_000_000_000, 0, SerialFlag.SERIAL | SerialFlag.TEXT, b"$GPZDA,1\xc2\xb5")], 16)
LINK_DOWN = Event("gps", "link_down", 4_000_000_000, "tty", {"why": "unplugged µ"})
OVERFLOW = Event("can0", "gap", 4_100_000_000, "overflow", {"reason": "overflow", "frames": 7})


def write(folder: Path) -> None:
    """The journal that is in tests/golden/journal-2, with every kind of record in it."""
    with mock.patch("ingestd.journal.log.uuid4", side_effect=STRETCHES):
        journal = open_journal(folder)
        journal.append_frames(CLASSIC, CLOCK)
        journal.append_frames(MIXED, UNSET)
        journal.append_frames(SERIAL, CLOCK)
        journal.append_event(LINK_DOWN, CLOCK)
        journal.append_event(OVERFLOW, CLOCK, lost={"overflow": 7})
        journal.append_session({"name": "shakedown", "driver": "J. Behra"})
        first = journal.stretches()[0].id
        records = journal.reader(first, 0).read(1 << 20).records
        journal.acknowledge(first, 2, {"can0": 3})
        journal.reject(records[2], REASON)
        journal.acknowledge(first, 3, {}, {"can1": 1})
        journal.assign_feed(first, f"{first}+c10ned", 3)
        nothing = {"stretch": first, "through": 0, "lost": {}, "reason": "budget", "segments": []}
        journal._log.write_bookkeeping(Kind.REMOVED, nothing)
        journal.begin_stretch()
        journal.append_frames(CLASSIC, UNSET)
        journal.sync()
        journal.close(ended=True)
    (folder / "lock").unlink()


def test_the_bytes_that_are_written(tmp_path: Path) -> None:
    """They are what they always were, to the last bit."""
    write(tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    golden = {path.name: path.read_bytes() for path in GOLDEN.iterdir()}
    assert sorted(written) == sorted(golden) == ["00000001.journal", "00000003.journal", "rejected-00000002.journal"]
    for name, data in golden.items():
        assert written[name] == data, name


def test_every_kind_of_record_is_pinned() -> None:
    """A kind that is added belongs into the golden journal, too."""
    items = [item for path in GOLDEN.iterdir() for item in read_segment(path)]
    assert {item.kind for item in items if isinstance(item, Record)} == set(Kind)
    assert all(isinstance(item, Record) for item in items)


def same(left: FrameBatch, right: FrameBatch) -> bool:
    """Whether every column is equal, in type too."""
    columns = ("ts_ns", "arbitration_id", "flags", "length", "data")
    pairs = [(getattr(left, name), getattr(right, name)) for name in columns]
    return left.source == right.source and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def test_what_is_read(tmp_path: Path) -> None:
    """Frames, events, metadata, feeds and books: all as they were when the journal was written."""
    folder = shutil.copytree(GOLDEN, tmp_path / "journal")
    last = Journal.peek(folder)
    assert last is not None
    assert (last.session_id, last.boot_id, last.ended) == (SESSION.id, BOOT_ID, True)

    journal = open_journal(folder)
    first, second, _ = journal.stretches()
    assert [first.id, second.id] == [stretch.hex for stretch in STRETCHES]
    assert (first.feed_id, first.acknowledged, first.last_sequence) == (f"{first.id}+c10ned", 3, 8)
    assert (second.feed_id, second.machine_id) == (second.id, "machine-1")
    assert journal.books() == {
        "can0": Books(13, 3, 3, 0, {"overflow": 7}),
        "can1": Books(3, 0, 2, 1),
        "gps": Books(1, 0, 1, 0),
    }

    records = journal.reader(first.id, 0).read(1 << 20).records
    assert same(records[1].frames(), CLASSIC)
    assert same(merge(records[2:4]), MIXED)
    assert same(records[4].frames(), SERIAL)
    assert [record.clock for record in records[1:5]] == [CLOCK, UNSET, UNSET, CLOCK]
    assert [records[5].event(), records[6].event()] == [LINK_DOWN, OVERFLOW]
    assert records[6].lost() == {"overflow": 7}
    assert records[7].session() == {"name": "shakedown", "driver": "J. Behra"}

    assert numbers_of(send_all(journal)) == CLASSIC.arbitration_id.tolist()
    assert all(books.pending == 0 and books.balanced for books in journal.books().values())
    journal.close(ended=False)


def test_a_rejected_record_is_kept_whole() -> None:
    """Behind the note with the reason stand the bytes of the record itself."""
    note, record = read_segment(GOLDEN / "rejected-00000002.journal")
    assert isinstance(note, Record)
    assert isinstance(record, Record)
    assert note.json() == {"stretch": STRETCHES[0].hex, "sequence": 3, "reason": REASON}
    assert record.pack() == next(
        item.pack()
        for item in read_segment(GOLDEN / "00000001.journal")
        if isinstance(item, Record) and item.kind is Kind.FRAMES and item.source == "can1"
    )


@pytest.mark.parametrize("name", ["00000001.journal", "00000003.journal"])
def test_every_bit_of_a_record_is_checked(tmp_path: Path, name: str) -> None:
    """Whichever byte is changed, the record it is in is not taken for one, and all others are read."""
    data = (GOLDEN / name).read_bytes()
    path = tmp_path / name
    whole = {item.pack() for item in read_segment(GOLDEN / name) if isinstance(item, Record)}
    for offset in range(HEADER_BYTES, len(data), 7):
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :])
        there = {item.pack() for item in read_segment(path) if isinstance(item, Record)}
        assert there < whole, offset
        assert len(there) == len(whole) - 1, offset


if __name__ == "__main__":
    write(Path(sys.argv[1]))
