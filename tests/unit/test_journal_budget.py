"""The budget of bytes where it is tight: it is kept, what goes is counted, and recording always goes on.

`bytes_used` is compared with what lies in the folder after every step.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ingestd.journal import Journal, Kind, Record
from ingestd.journal.room import STRETCHES_KEPT_MAX
from ingestd.journal.segment import read_segment, segment_name
from ingestd.journal.verification import verify
from ingestd.model import Books, Event
from tests.bad_blocks import BadBlocks
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


def folder_bytes(folder: Path) -> int:
    """What the journal's files take, as the file system has it."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != "lock")


def within(journal: Journal, folder: Path, segments_max: int) -> bool:
    """Whether the budget is kept, and the journal knows how much it uses."""
    return journal.bytes_used == folder_bytes(folder) <= segments_max * SEGMENT_BYTES


def append(journal: Journal, first: int, batches: int) -> int:
    """Append batches of 100 frames, syncing as the daemon does; the number after the last."""
    for _ in range(batches):
        journal.append_frames(frames(first, 100), CLOCK)
        journal.sync()
        first += 100
    return first


def fail(error: int) -> Any:
    """A call that fails."""

    def failing(*_: Any, **__: Any) -> None:
        raise OSError(error, os.strerror(error))

    return failing


def test_a_budget_that_was_lowered(tmp_path: Path) -> None:
    """The next run removes the oldest until the rest fits, counts what it removed, and records."""
    journal = open_journal(tmp_path, segments_max=40)
    count = append(journal, 0, 600)
    kill(journal)

    journal = open_unrecovered(tmp_path, segments_max=5)
    journal.append_frames(frames(count, 100), CLOCK)  # There is no room, and nothing may be removed yet.
    journal.recover()
    journal.sync()
    assert within(journal, tmp_path, 5)
    assert append(journal, count + 100, 20) == count + 2100
    assert within(journal, tmp_path, 5)
    books = journal.books()["can0"]
    assert books.balanced
    assert books.received == count + 2100
    kill(journal)
    journal = open_journal(tmp_path, segments_max=5)
    assert journal.books()["can0"] == books
    sent = numbers_of(send_all(journal))
    everything = [*range(count), *range(count + 100, count + 2100)]
    assert sent == everything[-len(sent) :]
    assert journal.books()["can0"] == Books(books.received, len(sent), 0, 0, {"budget": books.received - len(sent)})


@pytest.mark.parametrize("policy", ["drop-oldest", "drop-newest"])
def test_a_process_that_is_killed_while_the_journal_is_full(tmp_path: Path, policy: str) -> None:
    """Although no segment is left for the next process, it goes on as soon as there is room."""
    options: dict[str, Any] = {"segments_max": 5, "when_full": policy}
    journal = open_journal(tmp_path, **options)
    count = append(journal, 0, 120)
    for number in range(300):  # The reserve fills, too.
        journal.append_event(Event("can0", "note", number, "", {"text": "x" * 200}), CLOCK)
    assert within(journal, tmp_path, 5)
    journal._log.write_losses()
    before = journal.books()["can0"]
    kill(journal)

    journal = open_journal(tmp_path, **options)
    journal.sync()
    assert within(journal, tmp_path, 5)
    assert journal.books()["can0"].balanced
    assert journal.books()["can0"].received == before.received
    send_all(journal)
    journal.sync()
    journal.append_frames(frames(count, 10), CLOCK)
    assert numbers_of(send_all(journal)) == list(range(count, count + 10))
    assert within(journal, tmp_path, 5)


def test_frames_that_are_refused_become_gaps(tmp_path: Path) -> None:
    """With drop-newest, each stretch of time in which frames were refused is an event with its stamps and its count."""
    journal = open_journal(tmp_path, segments_max=4, when_full="drop-newest")
    offered = append(journal, 0, 100)
    kept = journal.books()["can0"].pending
    journal._log.write_losses()
    sent = send_all(journal)
    gaps = [record.event() for record in sent if record.kind is Kind.EVENT]
    assert numbers_of(sent) == list(range(kept))
    assert sum(gap.payload["frames"] for gap in gaps) == offered - kept > 0
    assert (gaps[0].ts_ns, gaps[-1].payload["to_ns"]) == (kept * 1000, (offered - 1) * 1000)
    assert {(gap.source, gap.kind, gap.payload["reason"]) for gap in gaps} == {("can0", "gap", "budget")}
    assert sum(record.lost().get("budget", 0) for record in sent) == offered - kept
    assert within(journal, tmp_path, 4)


def test_refused_frames_survive_a_crash(tmp_path: Path) -> None:
    """Once they are an event they are in the books of every later process."""
    journal = open_journal(tmp_path, segments_max=4, when_full="drop-newest")
    append(journal, 0, 100)
    journal._log.write_losses()
    books = journal.books()
    assert books["can0"].dropped["budget"] > 0
    kill(journal)
    assert open_journal(tmp_path, segments_max=4, when_full="drop-newest").books() == books


@pytest.mark.parametrize("moment", ["before the file is deleted", "before its name is gone for good"])
def test_killed_while_the_oldest_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Between the record that says so and the file that goes a frame counts once at any moment."""
    journal = open_journal(tmp_path, segments_max=5)
    count = 0
    oldest = tmp_path / segment_name(1)
    content = b""

    class Killed(BaseException):
        """The process ends here."""

    unlink = Path.unlink

    def die(path: Path, missing_ok: bool = False) -> None:
        nonlocal content
        if path == oldest:
            content = path.read_bytes()
            if moment == "before the file is deleted":
                raise Killed
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", die)
    with suppress(Killed):
        while not content:
            journal.append_frames(frames(count, 100), CLOCK)
            count += 100
            journal.sync()
    monkeypatch.undo()
    kill(journal)
    oldest.write_bytes(content)
    removed = [
        item.json()
        for path in tmp_path.glob("*.journal")
        for item in read_segment(path)
        if isinstance(item, Record) and item.kind is Kind.REMOVED
    ]
    assert [value["segments"] for value in removed] == [[1]]
    (lost,) = (value["lost"]["can0"] for value in removed)

    journal = open_journal(tmp_path, segments_max=5)
    assert not oldest.exists()
    assert journal.books()["can0"] == Books(count, 0, count - lost, 0, {"budget": lost})
    assert within(journal, tmp_path, 5)
    assert numbers_of(send_all(journal)) == list(range(lost, count))
    assert journal.books()["can0"] == Books(count, count - lost, 0, 0, {"budget": lost})


def test_removing_does_not_keep_appends_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody holds the lock while the record of a removal is made durable, or while the file is deleted."""
    journal = open_journal(tmp_path, segments_max=5)
    held: list[str] = []

    def watch(name: str, target: Any, call: Any) -> None:
        def watched(*arguments: Any, **options: Any) -> Any:
            if journal._log.lock._is_owned():  # type: ignore[attr-defined]
                held.append(name)
            return call(*arguments, **options)

        monkeypatch.setattr(target, name, watched)

    watch("fdatasync", os, os.fdatasync)
    watch("fsync", os, os.fsync)
    append(journal, 0, 200)
    assert journal.books()["can0"].dropped["budget"] > 0
    assert not held


def test_a_reader_does_not_see_what_is_being_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From when a removal is written down its frames are dropped; they are not handed out as well."""
    journal = open_journal(tmp_path, segments_max=5)
    stretch_id = journal.stretches()[0].id
    fdatasync = os.fdatasync
    seen: list[Any] = []

    def read_meanwhile(descriptor: int) -> None:
        if journal._log.ledger.removing and not seen:
            records, lost = read_all(journal, stretch_id)
            dropped = journal.books()["can0"].dropped["budget"]
            seen.append((numbers_of(records)[0] - dropped, lost))
        fdatasync(descriptor)

    monkeypatch.setattr(os, "fdatasync", read_meanwhile)
    append(journal, 0, 150)
    assert seen == [(0, {})]


def test_rejected_and_damaged_bytes_count(tmp_path: Path) -> None:
    """What is kept aside takes part of the budget, and gives way before anything that can still be sent."""
    journal = open_journal(tmp_path, segments_max=6)
    number = 0
    for _ in range(60):
        number = append(journal, number, 3)
        stretch = journal.stretches()[-1]
        records = journal.reader(stretch.id, stretch.acknowledged).read(1 << 20).records
        for record in records:
            journal.reject(record, "no")
            assert within(journal, tmp_path, 6)
        journal.acknowledge(stretch.id, records[-1].sequence, {}, {"can0": len(numbers_of(records))})
    assert list(tmp_path.glob("rejected-*"))
    assert journal.books()["can0"] == Books(number, 0, 0, number)


def test_damage_is_kept_aside_only_where_there_is_room(tmp_path: Path) -> None:
    """Bytes that nobody can read are counted, but never take the journal over its budget."""
    options: dict[str, Any] = {"segments_max": 4, "when_full": "drop-newest"}
    journal = open_journal(tmp_path, **options)
    append(journal, 0, 100)
    for number in range(300):
        journal.append_event(Event("can0", "note", number, "", {"text": "x" * 200}), CLOCK)
    journal.sync()
    path = tmp_path / segment_name(1)
    data = bytearray(path.read_bytes())
    for offset in range(20_000, 50_000, 1000):
        data[offset] ^= 1
    path.write_bytes(data)
    read_all(journal, journal.stretches()[0].id)
    assert journal.damaged_bytes > 20_000
    assert within(journal, tmp_path, 4)


def test_a_disk_at_fault_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments that could be made and not be written are removed again, and nothing has to give way for them."""
    journal = open_journal(tmp_path, segments_max=5)
    count = append(journal, 0, 20)
    before = len(list(tmp_path.iterdir()))

    def refuse(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refuse)
        for number in range(20):
            journal._log._retry_at = 0.0
            journal.append_frames(frames(count + number, 1), CLOCK)
            journal.sync()
    assert len(list(tmp_path.iterdir())) <= before + 1
    journal._log._retry_at = 0.0
    journal.append_frames(frames(count + 20, 1), CLOCK)
    assert journal.books()["can0"] == Books(count + 21, 0, count + 1, 0, {"journal": 20})


@pytest.mark.parametrize("sent", [True, False], ids=["sent", "unsent"])
@pytest.mark.parametrize("what", ["another segment", "a folder", "nothing", "a bad block"])
def test_the_oldest_is_not_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, sent: bool) -> None:
    """When it is to make room: what others have put there stays, what cannot be read goes, and recording goes on."""
    journal = open_journal(tmp_path / "journal", segments_max=6)
    oldest, count = tmp_path / "journal" / segment_name(1), 0
    while journal.bytes_used < 4 * SEGMENT_BYTES:
        count = append(journal, count, 1)
    if sent:
        send_all(journal)
    there = sum(item.frames_count for item in read_segment(oldest) if isinstance(item, Record))
    if what == "a bad block":
        BadBlocks(monkeypatch, oldest, 0)
    else:
        oldest.unlink()
    if what == "another segment":
        other = open_journal(tmp_path / "other")
        other.append_frames(frames(0, 10), CLOCK)
        kill(other)
        (tmp_path / "other" / segment_name(1)).rename(oldest)
    elif what == "a folder":
        oldest.mkdir()
    for _ in range(40):
        count = append(journal, count, 5)
        if sent:
            send_all(journal)
    assert oldest.exists() == (what in {"another segment", "a folder"})
    assert journal.writable
    rest = numbers_of(send_all(journal))
    assert rest == list(range(count - len(rest), count))
    lost = {} if sent else {"budget": count - len(rest)}
    assert journal.books()["can0"] == Books(count, count - sum(lost.values()), 0, 0, lost)
    assert sent or lost["budget"] >= there


def test_no_file_can_be_opened_when_room_is_to_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can see then whether the oldest is still ours: it stays, that is said, and the next sync tries again."""
    journal = open_journal(tmp_path, segments_max=5)
    count = 0
    while journal.bytes_used < 4 * SEGMENT_BYTES:
        journal.append_frames(frames(count, 100), CLOCK)
        count += 100
    send_all(journal)
    oldest = tmp_path / segment_name(1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail(errno.EMFILE))
        journal.sync()
        assert journal.trouble == "no new segment can be made: Too many open files"
        assert oldest.exists()
    journal.sync()
    assert not oldest.exists()
    assert within(journal, tmp_path, 5)


def test_rejected_records_where_nothing_else_is(tmp_path: Path) -> None:
    """What was sent gives way to them; what was not does not, and they are kept all the same."""
    journal = open_journal(tmp_path, segments_max=5, when_full="drop-newest")
    count = append(journal, 0, 120)
    for number in range(400):  # The reserve fills, too.
        journal.append_event(Event("can0", "note", number, "", {"text": "x" * 200}), CLOCK)
    stretch = journal.stretches()[0]
    before = sorted(tmp_path.glob("0*.journal"))
    records = journal.reader(stretch.id, 0).read(SEGMENT_BYTES + 10_000).records
    refused = [record for record in records if record.kind is Kind.FRAMES]
    for record in refused[:4]:
        journal.reject(record, "no")
    assert journal.bytes_used > 5 * SEGMENT_BYTES
    assert sorted(tmp_path.glob("0*.journal")) == before
    held = numbers_of(records)
    journal.acknowledge(stretch.id, records[-1].sequence, {"can0": len(held) - 500}, {"can0": 500})
    journal.reject(refused[4], "no")
    assert sorted(tmp_path.glob("0*.journal")) == before[1:]
    assert within(journal, tmp_path, 5)
    assert journal.books()["can0"].rejected == verify(tmp_path).rejected_frames["can0"] == 500
    assert numbers_of(read_all(journal, stretch.id, records[-1].sequence)[0])[0] == len(held) < count


def test_the_reserve_is_not_for_frames(tmp_path: Path) -> None:
    """In a full journal that refuses frames events go on into the reserve, and frames beside them are refused still."""
    journal = open_journal(tmp_path, segments_max=4, when_full="drop-newest")
    count = append(journal, 0, 100)
    kept = journal.books()["can0"].pending
    noted = 0
    while not (journal._log.segment and journal._log.segment.is_reserve):
        journal.append_event(Event("can0", "note", noted, "", {"text": "x" * 200}), CLOCK)
        noted += 1
    journal.append_frames(frames(count, 10), CLOCK)
    journal.append_event(Event("can0", "note", noted), CLOCK)
    assert journal.books()["can0"] == Books(count + 10, 0, kept, 0, {"budget": count + 10 - kept})
    records, _ = read_all(journal, journal.stretches()[0].id)
    assert numbers_of(records) == list(range(kept))
    notes = [
        event.ts_ns for record in records if record.kind is Kind.EVENT and (event := record.event()).kind == "note"
    ]
    assert notes == list(range(noted + 1))


def test_nothing_is_removed_before_it_is_known(tmp_path: Path) -> None:
    """Stretches that are done with are many; as long as the books need what earlier runs left all of them stay."""
    journal = open_journal(tmp_path, segments_max=100)
    journal.append_frames(frames(0, 10), CLOCK)
    kill(journal)
    journal = open_unrecovered(tmp_path, segments_max=100)
    for number in range(STRETCHES_KEPT_MAX + 5):
        journal.append_frames(frames(10 + number, 1), CLOCK)
        journal.begin_stretch()
    send_all(journal)
    there = set(tmp_path.glob("0*.journal"))
    journal.sync()
    assert set(tmp_path.glob("0*.journal")) >= there
    journal.recover()
    journal.begin_stretch()  # Its STATE stands for all before it.
    journal.sync()
    assert len(there - set(tmp_path.glob("0*.journal"))) >= 5
    assert numbers_of(send_all(journal)) == list(range(10))
    assert journal.books()["can0"] == Books(15 + STRETCHES_KEPT_MAX, 15 + STRETCHES_KEPT_MAX, 0, 0)
