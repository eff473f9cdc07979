"""Everything that can happen to the files of a journal, and what survives it: tests/journal_damages.py, at the journal.

After each damage a new process begins; it must start, send every frame that can be read, once and in order, know
exactly how many it could not read, of which source, and say where.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ingestd.journal import Journal, Kind
from ingestd.journal.record import HEADER
from ingestd.journal.recovery import take_stock
from ingestd.journal.segment import VERSION
from ingestd.journal.verification import verify
from ingestd.model import Books, Event
from tests.journal_damages import (
    DAMAGES,
    FIRST,
    FOREIGN_SOURCE,
    MIDDLE,
    PAGE,
    SEGMENTS,
    Outcome,
    change,
    flipped_byte_in_every_state,
    flipped_byte_in_payload,
    held,
    make,
    placed,
    write_version,
    zeroed_page,
)
from tests.journals import (
    CLOCK,
    SEGMENT_BYTES,
    frames,
    kill,
    numbers_of,
    open_journal,
    open_unrecovered,
    read_all,
    send_all,
)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage(tmp_path: Path, damage: Callable[[Path], Outcome]) -> None:
    """What can be read is sent, what cannot is counted to the frame and said, and recording goes on."""
    folder = tmp_path / "journal"
    count = make(folder)
    outcome = damage(folder)
    found = verify(folder)
    assert outcome.found is None or outcome.found in [(each.file, each.offset) for each in found.findings]
    assert sum((each.frames_lost for each in found.findings), Counter()) == +Counter(
        {source: len(gone) for source, gone in outcome.lost.items()}
    )
    journal = open_unrecovered(folder)
    said = journal.recover().warnings
    sent = send_all(journal)
    said += journal.notices()
    for source in ("can0", "gps"):
        lost, untold = outcome.lost.get(source, set()), outcome.untold.get(source, set())
        assert numbers_of(sent, source) == [number for number in range(count) if number not in lost | untold]
        dropped = {"damage": len(lost)} if lost else {}
        received = count - len(untold)
        assert journal.books()[source] == Books(received, received - len(lost), 0, 0, dropped)
        if lost:
            assert f"frames lost source={source} frames={len(lost)} reason=damage" in told_in_all(said, source)
    assert numbers_of(sent, FOREIGN_SOURCE) == list(range(outcome.gained))
    for text in outcome.says:
        assert text in "\n".join(said)
    assert outcome.says or not said
    assert len(list(folder.glob("damaged-*"))) == outcome.aside
    assert all((folder / name).exists() or (folder / name).is_symlink() for name in outcome.kept)
    journal.append_frames(frames(count, 5), CLOCK)
    assert numbers_of(send_all(journal)) == list(range(count, count + 5))
    books = journal.books()
    kill(journal)
    assert open_journal(folder).books() == books


def told_in_all(said: Sequence[str], source: str) -> list[str]:
    """What was said to be lost of a source, added up by reason."""
    total: Counter[str] = Counter()
    for text in said:
        if match := re.fullmatch(rf"frames lost source={source} frames=(\d+) reason=(\w+)", text):
            total[match[2]] += int(match[1])
    return [f"frames lost source={source} frames={count} reason={reason}" for reason, count in total.items()]


def test_an_older_journal_is_sent(tmp_path: Path) -> None:
    """All of one that version 1 has written."""
    count = make(tmp_path)
    for path in tmp_path.glob("*.journal"):
        write_version(path, 1)
    journal = open_journal(tmp_path)
    assert numbers_of(send_all(journal)) == list(range(count))
    assert journal.books()["gps"] == Books(count, count, 0, 0)


@pytest.mark.parametrize("damage", [flipped_byte_in_payload, zeroed_page], ids=lambda damage: damage.__name__)
def test_damaged_bytes_are_kept(tmp_path: Path, damage: Callable[[Path], Outcome]) -> None:
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
    first = journal.stretches()[0].id
    reader = journal.reader(first, 0)
    while (result := reader.read(10_000)).records:
        read = Counter(record.source for record in result.records for _ in range(record.frames_count))
        journal.acknowledge(first, result.records[-1].sequence, read)
    send_all(journal)
    assert journal.books()["gps"] == Books(count, count - 20, 0, 0, {"damage": 20})
    assert result.lost == {"gps": {"damage": 20}}
    assert journal.tallies(first)["gps"].journalled == journal.tallies(first)["gps"].passed


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


def test_the_last_frames_of_a_source_are_damaged_and_not_the_last_of_the_stretch(tmp_path: Path) -> None:
    """That they are missing shows when all was sent: then they are dropped and pending no more, before any restart."""
    journal = open_journal(tmp_path)
    for first in (0, 10):
        journal.append_frames(frames(first, 10), CLOCK)
        journal.append_frames(frames(first, 10, "gps"), CLOCK)
    journal.close(ended=True)
    kill(open_journal(tmp_path))  # Its STATE says how many there were.
    of_can0 = [each for each in placed(tmp_path / "00000001.journal") if each.record.source == "can0"]
    of_can0[-1].flip(HEADER.size + 20)
    journal = open_journal(tmp_path)
    assert numbers_of(send_all(journal)) == list(range(10))
    expected = {"can0": Books(20, 10, 0, 0, {"damage": 10}), "gps": Books(20, 20, 0, 0)}
    assert journal.books() == expected
    kill(journal)
    journal = open_journal(tmp_path)
    assert journal.books() == expected
    kill(journal)


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


def test_the_beginning_of_a_stretch_and_every_book_of_it_is_gone(tmp_path: Path) -> None:
    """What came before the first record that is left is nobody's to count: what is left is received, and sent, once."""
    count = make(tmp_path)
    gone = held(tmp_path / FIRST, tmp_path / MIDDLE)
    flipped_byte_in_every_state(tmp_path)
    for name in (FIRST, MIDDLE):
        (tmp_path / name).unlink()
    journal = open_journal(tmp_path)
    for source in ("can0", "gps"):
        there = [number for number in range(count) if number not in gone[source]]
        assert journal.books()[source] == Books(len(there), 0, len(there), 0)
    sent = send_all(journal)
    for source in ("can0", "gps"):
        there = [number for number in range(count) if number not in gone[source]]
        assert numbers_of(sent, source) == there
        assert journal.books()[source] == Books(len(there), len(there), 0, 0)


def test_only_its_settlement_is_left_of_a_stretch(tmp_path: Path) -> None:
    """Its segment is gone and so is every STATE: that its frames were received and sent stands in another stretch."""
    journal = open_journal(tmp_path)
    journal.append_frames(frames(0, 10), CLOCK)
    journal.begin_stretch()
    journal.append_frames(frames(10, 5), CLOCK)
    first = journal.stretches()[0]
    send_all(journal)
    kill(journal)
    (tmp_path / FIRST).unlink()
    flipped_byte_in_every_state(tmp_path)
    for _ in range(2):
        journal = open_journal(tmp_path)
        assert journal.books()["can0"] == Books(15, 15, 0, 0)
        assert numbers_of(send_all(journal)) == []
        assert first.id not in {stretch.id for stretch in journal.stretches() if stretch.bytes}
        kill(journal)


def test_an_old_page_in_the_newest_segment(tmp_path: Path) -> None:
    """Records that stand there a second time are not counted a second time, nor are the losses that events count."""
    journal = open_journal(tmp_path)
    for number in range(0, 6000, 10):
        journal.append_frames(frames(number, 10), CLOCK)
        journal.append_event(Event("can0", "gap", number), CLOCK, lost={"overflow": 1})
        if journal._shelf.number_last == 3 and journal._log.segment.end > SEGMENT_BYTES // 2:  # type: ignore[union-attr]
            break
    count = journal.books()["can0"].pending
    kill(journal)
    newest = tmp_path / "00000003.journal"
    hit = [each.record for each in placed(newest) if each.offset < PAGE.stop and each.end > PAGE.start]
    change(newest, PAGE.start, newest.read_bytes()[4096 : 2 * 4096])
    events = sum(record.kind is Kind.EVENT for record in hit)
    journal = open_journal(tmp_path)
    assert 0 < events < count // 10
    dropped = count // 10 - events
    assert journal.books()["can0"] == Books(count + dropped, 0, count, 0, {"overflow": dropped})
    sent = numbers_of(send_all(journal))
    lost = count - len(sent)
    assert sent == sorted(set(sent))
    assert lost == sum(record.frames_count for record in hit)
    assert journal.books()["can0"] == Books(count + dropped, len(sent), 0, 0, {"overflow": dropped, "damage": lost})


def test_a_newer_version_is_put_in_the_place_of_a_segment(tmp_path: Path) -> None:
    """While the journal runs: it is not taken for ours, is said and is left alone; what it replaced is lost."""
    journal = open_journal(tmp_path)
    for first in range(0, 5000, 100):
        journal.append_frames(frames(first, 100), CLOCK)
    gone = [number for each in placed(tmp_path / FIRST) for number in numbers_of([each.record])]
    write_version(tmp_path / FIRST, VERSION + 1)
    assert numbers_of(send_all(journal)) == list(range(len(gone), 5000))
    assert "00000001.journal was replaced by another file" in "\n".join(journal.notices())
    assert journal.books()["can0"] == Books(5000, 5000 - len(gone), 0, 0, {"damage": len(gone)})
    assert (tmp_path / FIRST).exists()


def test_every_damage_is_documented() -> None:
    """docs/reliability.md has the table of tests/journal_damages.py, in its words."""
    text = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
    for damage in DAMAGES:
        assert f"| {damage.__name__.replace('_', ' ')} | {' '.join((damage.__doc__ or '').split())} |" in text
