"""Everything that can happen to the files of a journal, by name, and what survives it.

Each case damages a journal of one stretch of several full segments. Afterwards a new process begins; it must start,
send every frame that can be read, once and in order, and know exactly how many it could not read, of which source.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import pytest

from ingestd.journal import Journal, Kind, Record
from ingestd.journal.record import HEADER
from ingestd.journal.recovery import take_stock
from ingestd.journal.segment import ENDED_AT, HEADER_BYTES, read_segment
from ingestd.model import Books, Event
from tests.journals import CLOCK, SEGMENT_BYTES, frames, kill, numbers_of, open_journal, read_all, send_all

SEGMENTS = 4
MIDDLE = "00000002.journal"


@dataclass(frozen=True)
class Placed:
    """A record and where it is."""

    path: Path
    offset: int
    record: Record

    def flip(self, offset: int) -> None:
        """Change one bit of the byte at `offset` of the record."""
        change(self.path, self.offset + offset, bytes([self.path.read_bytes()[self.offset + offset] ^ 0x10]))


def change(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def write_version(path: Path, version: int) -> None:
    """Make the header that of another version, its checksum being right."""
    data = bytearray(path.read_bytes())
    data[12:14] = version.to_bytes(2, "little")
    data[8:12] = crc32(data[12:ENDED_AT]).to_bytes(4, "little")
    path.write_bytes(data)


def make(folder: Path) -> int:
    """Two sources, several segments; the process is killed. Returns the number of frames of each source."""
    journal, number = open_journal(folder), 0
    while len(list(folder.glob("*.journal"))) < SEGMENTS or journal._log.segment.room > SEGMENT_BYTES // 2:  # type: ignore[union-attr]
        journal.append_frames(frames(number, 20), CLOCK)
        journal.append_frames(frames(number, 20, "gps", length=33), CLOCK)
        number += 20
    kill(journal)
    return number


def placed(path: Path) -> list[Placed]:
    found, offset = [], HEADER_BYTES
    for item in read_segment(path):
        assert isinstance(item, Record)
        found.append(Placed(path, offset, item))
        offset += item.size
    return found


def in_middle(folder: Path) -> Placed:
    """A record of can0 in the middle of a segment in the middle."""
    of_can0 = [each for each in placed(folder / MIDDLE) if each.record.source == "can0"]
    return of_can0[len(of_can0) // 2]


Lost = dict[str, set[int]]


def lost_of(records: list[Record]) -> Lost:
    return {source: set(numbers_of(records, source)) for source in ("can0", "gps")}


def flipped_magic(folder: Path) -> Lost:
    (target := in_middle(folder)).flip(0)
    return lost_of([target.record])


def flipped_checksum(folder: Path) -> Lost:
    (target := in_middle(folder)).flip(5)
    return lost_of([target.record])


def flipped_length(folder: Path) -> Lost:
    (target := in_middle(folder)).flip(10)  # Now it seems to go on for a megabyte.
    return lost_of([target.record])


def flipped_kind(folder: Path) -> Lost:
    (target := in_middle(folder)).flip(13)
    return lost_of([target.record])


def flipped_frames_before(folder: Path) -> Lost:
    (target := in_middle(folder)).flip(HEADER.size - 3)
    return lost_of([target.record])


def flipped_name(folder: Path) -> Lost:
    (target := in_middle(folder)).flip(HEADER.size)
    return lost_of([target.record])


def flipped_payload(folder: Path) -> Lost:
    (target := in_middle(folder)).flip(target.record.size - 1)
    return lost_of([target.record])


def zeroed_page(folder: Path) -> Lost:
    """As a file system leaves a page that it lost."""
    begin, end = 5 * 4096, 6 * 4096
    hit = [p.record for p in placed(folder / MIDDLE) if p.offset < end and p.offset + p.record.size > begin]
    change(folder / MIDDLE, begin, bytes(4096))
    assert len(hit) > 2
    return lost_of(hit)


def overwritten_with_records(folder: Path) -> Lost:
    """Good records in the wrong place: a stale page of the same file. They are not taken for new ones."""
    data = (folder / MIDDLE).read_bytes()
    begin, end = 5 * 4096, 6 * 4096
    hit = [p.record for p in placed(folder / MIDDLE) if p.offset < end and p.offset + p.record.size > begin]
    change(folder / MIDDLE, begin, data[4096 : 2 * 4096])
    return lost_of(hit)


def truncated_segment(folder: Path) -> Lost:
    hit = [p.record for p in placed(folder / MIDDLE) if p.offset + p.record.size > SEGMENT_BYTES // 2]
    os.truncate(folder / MIDDLE, SEGMENT_BYTES // 2)
    return lost_of(hit)


def missing_segment_in_the_middle(folder: Path) -> Lost:
    hit = [p.record for p in placed(folder / MIDDLE)]
    (folder / MIDDLE).unlink()
    return lost_of(hit)


def missing_first_segments(folder: Path) -> Lost:
    hit = [p.record for name in ("00000001.journal", MIDDLE) for p in placed(folder / name)]
    for name in ("00000001.journal", MIDDLE):
        (folder / name).unlink()
    return lost_of(hit)


def damaged_header(folder: Path) -> Lost:
    """The STATE behind it says everything that it said."""
    change(folder / MIDDLE, 0, bytes(HEADER_BYTES))
    return {}


def damaged_first_page(folder: Path) -> Lost:
    """Without header and STATE nobody knows whose records these are: the file is left alone."""
    hit = [p.record for p in placed(folder / MIDDLE)]
    change(folder / MIDDLE, 0, b"\xff" * 4096)
    return lost_of(hit)


def newer_version(folder: Path) -> Lost:
    """A file for a newer ingestd is left to it, and said to be one."""
    hit = [p.record for p in placed(folder / MIDDLE)]
    write_version(folder / MIDDLE, 2)
    return lost_of(hit)


def duplicated_segment(folder: Path) -> Lost:
    """A copy under another number is not sent a second time."""
    shutil.copy(folder / MIDDLE, folder / "00000099.journal")
    return {}


def foreign_segment(folder: Path) -> Lost:
    """A segment of another journal under a number of ours, and files that are none at all."""
    other = open_journal(folder.parent / "other")
    other.append_frames(frames(0, 100), CLOCK)
    kill(other)
    shutil.copy(folder.parent / "other" / "00000001.journal", folder / "00000050.journal")
    (folder / "notes.txt").write_text("do not touch")
    (folder / "00000051.journal").write_bytes(b"")
    (folder / "00000052.journal").write_text("not one of ours")
    return {}


def newest_state_is_damaged(folder: Path) -> Lost:
    """The one before it, and what followed, says the same."""
    newest = max(folder.glob("*.journal"))
    state = next(each for each in placed(newest) if each.record.kind is Kind.STATE)
    state.flip(HEADER.size + 5)
    return {}


def every_state_is_damaged(folder: Path) -> Lost:
    """Then all of the records say it."""
    for path in folder.glob("*.journal"):
        for each in placed(path):
            if each.record.kind is Kind.STATE:
                each.flip(HEADER.size + 5)
    return {}


CASES: list[Callable[[Path], Lost]] = [
    flipped_magic, flipped_checksum, flipped_length, flipped_kind, flipped_frames_before, flipped_name,
    flipped_payload, zeroed_page, overwritten_with_records, truncated_segment, missing_segment_in_the_middle,
    missing_first_segments, damaged_header, damaged_first_page, newer_version, duplicated_segment, foreign_segment,
    newest_state_is_damaged, every_state_is_damaged,
]  # fmt: skip


@pytest.mark.parametrize("damage", CASES, ids=lambda damage: damage.__name__)
def test_damage(tmp_path: Path, damage: Callable[[Path], Lost]) -> None:
    """What can be read is sent, what cannot is counted to the frame, and recording goes on."""
    folder = tmp_path / "journal"
    count = make(folder)
    lost = damage(folder)
    journal = open_journal(folder)
    sent = send_all(journal)
    for source in ("can0", "gps"):
        gone = lost.get(source, set())
        assert numbers_of(sent, source) == [number for number in range(count) if number not in gone]
        dropped = {"damage": len(gone)} if gone else {}
        assert journal.books()[source] == Books(count, count - len(gone), 0, 0, dropped)
    journal.append_frames(frames(count, 5), CLOCK)
    assert numbers_of(send_all(journal)) == list(range(count, count + 5))
    books = journal.books()
    kill(journal)
    assert open_journal(folder).books() == books


@pytest.mark.parametrize("damage", [flipped_payload, zeroed_page], ids=lambda damage: damage.__name__)
def test_damaged_bytes_are_kept(tmp_path: Path, damage: Callable[[Path], Lost]) -> None:
    """An operator can look at what could not be read, also after its segment is gone."""
    make(tmp_path)
    damage(tmp_path)
    damaged = (tmp_path / MIDDLE).read_bytes()
    journal = open_journal(tmp_path)
    send_all(journal)
    (kept,) = tmp_path.glob("damaged-*")
    offset = int(kept.name.rpartition("-")[2])
    assert damaged[offset:].startswith(kept.read_bytes())
    assert journal.damaged_bytes == len(kept.read_bytes())
    send_all(journal)
    assert journal.damaged_bytes == len(kept.read_bytes())  # Met again, and not counted again.


@pytest.mark.parametrize("cut", [1, HEADER.size - 1, HEADER.size + 1, -1])
def test_torn_last_record(tmp_path: Path, cut: int) -> None:
    """Where a power cut stopped the last write is no damage: what was whole is there, and the rest was never there."""
    count = make(tmp_path)
    newest = max((path for path in tmp_path.glob("*.journal") if placed(path)), key=lambda path: path.name)
    last = placed(newest)[-1]
    size = newest.stat().st_size
    os.truncate(newest, last.offset + cut % last.record.size)
    os.truncate(newest, size)  # Allocated, but not written.
    journal = open_journal(tmp_path)
    assert last.record.source == "gps"
    assert numbers_of(send_all(journal), "gps") == list(range(count - 20))
    assert journal.books()["gps"] == Books(count - 20, count - 20, 0, 0, {})
    assert journal.books()["can0"] == Books(count, count, 0, 0, {})
    assert journal.damaged_bytes == 0


def test_a_tail_that_is_lost_later_is_damage(tmp_path: Path) -> None:
    """If the books know of records behind the last one that can be read, these are counted and told."""
    count = make(tmp_path)
    journal = open_journal(tmp_path)
    journal.append_frames(frames(count, 10), CLOCK)
    kill(journal)
    newest_of_first = sorted(path for path in tmp_path.glob("*.journal"))[-2]
    last = placed(newest_of_first)[-1]
    os.truncate(newest_of_first, last.offset)
    journal = open_journal(tmp_path)
    sent = send_all(journal)
    sent += send_all(journal)
    assert journal.books()["gps"] == Books(count, count - 20, 0, 0, {"damage": 20})
    gaps = [record for record in sent if record.kind is Kind.EVENT]
    assert [(gap.source, gap.event().payload["reason"], gap.event().payload["frames"]) for gap in gaps] == [
        ("gps", "damage", 20)
    ]


def test_a_removal_that_was_interrupted(tmp_path: Path) -> None:
    """A segment that was announced to go, and whose process died before it went, is deleted and not sent."""
    make(tmp_path)
    journal = open_journal(tmp_path, segments_max=SEGMENTS + 2)
    journal.begin_stretch()
    oldest = tmp_path / "00000001.journal"
    there = oldest.read_bytes()
    journal.sync()
    assert not oldest.exists()
    books = journal.books()
    kill(journal)
    oldest.write_bytes(there)  # The unlinking had not reached the disk.
    journal = open_journal(tmp_path, segments_max=SEGMENTS + 4)
    assert journal.books() == books
    assert not oldest.exists()
    send_all(journal)
    assert all(of.pending == 0 and of.balanced for of in journal.books().values())


def test_garbage_is_no_journal(tmp_path: Path) -> None:
    """A folder of nonsense is recorded into all the same; what lies there is named and left alone."""
    for number in range(5):
        (tmp_path / f"{number:08d}.journal").write_bytes(os.urandom(1000 * number))
    assert len(take_stock(tmp_path).warnings) == 4
    assert Journal.peek(tmp_path) is None
    journal = open_journal(tmp_path)
    journal.append_frames(frames(0, 5), CLOCK)
    assert numbers_of(send_all(journal)) == list(range(5))


@pytest.mark.parametrize("number", [1, 50], ids=["older", "newest"])
def test_a_segment_of_another_machine(tmp_path: Path, number: int) -> None:
    """Moved here under its own number it is a stretch of that machine: sent as such, and counted from then on."""
    other = tmp_path / "other"
    other.mkdir()
    (other / f"{number - 1:08d}.journal").touch()
    journal = open_journal(other, machine_id="machine-2")
    journal.begin_stretch()
    journal.append_frames(frames(5000, 100), CLOCK)
    journal.append_frames(frames(0, 5, "lidar"), CLOCK)
    moved = journal._log.segment.segment.path.name  # type: ignore[union-attr]
    kill(journal)

    folder = tmp_path / "journal"
    folder.mkdir()
    (folder / "00000020.journal").touch()
    journal = open_journal(folder)
    journal.append_frames(frames(0, 100), CLOCK)
    send_all(journal)
    journal.append_frames(frames(100, 50), CLOCK)
    kill(journal)
    shutil.copy(other / moved, folder / moved)

    journal = open_journal(folder)
    assert journal.books() == {"can0": Books(250, 100, 150, 0), "lidar": Books(5, 0, 5, 0)}
    foreign = next(stretch for stretch in journal.stretches() if stretch.machine_id == "machine-2")
    assert foreign.acknowledged == 0
    sent = send_all(journal)
    assert sorted(numbers_of(sent)) == [*range(100, 150), *range(5000, 5100)]
    assert numbers_of(sent, "lidar") == list(range(5))
    assert journal.books() == {"can0": Books(250, 250, 0, 0), "lidar": Books(5, 5, 0, 0)}


def test_frames_that_only_an_event_behind_them_tells_of(tmp_path: Path) -> None:
    """The last frames of a source are damaged, and all that follows is an event: it says how many there were."""
    journal = open_journal(tmp_path)
    journal.append_frames(frames(0, 10), CLOCK)
    journal.append_frames(frames(10, 20), CLOCK)
    journal.append_event(Event("can0", "link_down", 40_000), CLOCK)
    [stretch] = journal.stretches()
    last = [record for record in read_all(journal, stretch.id)[0] if record.kind is Kind.FRAMES][-1]
    kill(journal)
    path = next(tmp_path.glob("0*.journal"))
    content = bytearray(path.read_bytes())
    place = content.find(bytes(last.payload))
    content[place] ^= 1
    path.write_bytes(content)
    journal = open_journal(tmp_path)
    assert journal.books()["can0"].received == 30
    records, lost = read_all(journal, stretch.id)
    assert numbers_of(records) == list(range(10))
    assert lost == {"can0": {"damage": 20}}
    journal.acknowledge(stretch.id, records[-1].sequence, {"can0": 10}, {}, lost)
    books = journal.books()["can0"]
    assert (books.received, books.committed, books.pending, books.dropped) == (30, 10, 0, {"damage": 20})
    assert books.balanced
    journal.close(ended=True)


@pytest.mark.parametrize("synced_count", [20, 0], ids=["some are there", "none is there"])
def test_frames_that_only_their_settlement_tells_of(tmp_path: Path, synced_count: int) -> None:
    """Sent before they were synced, and a power cut took them and left the record that says so: received and sent."""
    journal = open_journal(tmp_path)
    if synced_count:
        journal.append_frames(frames(0, synced_count), CLOCK)
    journal.append_frames(frames(synced_count, 7), CLOCK)
    last = [record for record in send_all(journal) if record.kind is Kind.FRAMES][-1]
    kill(journal)
    path = next(tmp_path.glob("0*.journal"))
    start = path.read_bytes().index(bytes(last.payload)) - len(last.source) - HEADER.size
    change(path, start, bytes(last.size))  # as on a disk that never had these sectors
    books = {"can0": Books(synced_count + 7, synced_count + 7, 0, 0)}
    for _ in range(2):
        journal = open_journal(tmp_path)
        assert journal.books() == books
        assert numbers_of(send_all(journal)) == []
        assert journal.books() == books
        kill(journal)
