"""The journal in one process after the other: appending, reading back, the books, the budget, faults of the disk."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from ingestd.errors import IngestdError, UsageError
from ingestd.journal import Journal, Kind, Record, SessionInfo, merge
from ingestd.journal.holder import holder_of
from ingestd.journal.recovery import take_stock
from ingestd.journal.segment import list_folder, read_segment
from ingestd.model import Books, Clock, ClockState, Event
from tests.journals import (
    BOOT_ID,
    CLOCK,
    SEGMENT_BYTES,
    SESSION,
    frames,
    kill,
    numbers_of,
    open_journal,
    open_unrecovered,
    read_all,
    send_all,
)


def fill(journal: Journal, segments: float, first: int = 0) -> int:
    """Append frames until that many more segments are full, syncing as the daemon does; the number after the last."""
    written = journal.bytes_written
    while journal.bytes_written < written + segments * SEGMENT_BYTES:
        journal.append_frames(frames(first, 100), CLOCK)
        first += 100
        journal.sync()
    return first


def current(journal: Journal) -> str:
    return journal.stretches()[-1].id


def test_what_was_appended_is_read_back(tmp_path: Path) -> None:
    """Frames, events and metadata come back in order, each as it was, with the clock it was recorded under."""
    journal = open_journal(tmp_path)
    stepped = Clock(-5, ClockState.STEPPED)
    journal.append_frames(frames(0, 3, length=5), CLOCK)
    journal.append_event(Event("gps", "link_down", 77, "tty", {"why": "unplugged µ"}), stepped)
    journal.append_frames(frames(3, 2, length=64), stepped)
    journal.append_session({"driver": "J. Behra"})
    records, lost = read_all(journal, current(journal))
    assert [record.kind for record in records] == [
        Kind.SESSION, Kind.FRAMES, Kind.EVENT, Kind.FRAMES, Kind.SESSION,
    ]  # fmt: skip
    assert [record.sequence for record in records] == [1, 2, 3, 4, 5]
    assert records[0].session() == SESSION.fields
    assert records[2].event() == Event("gps", "link_down", 77, "tty", {"why": "unplugged µ"})
    assert records[4].session() == {"driver": "J. Behra"}
    assert [record.clock for record in records[1:4]] == [CLOCK, stepped, stepped]
    assert {(record.session_id, record.boot_id) for record in records} == {(SESSION.id, BOOT_ID)}
    merged = merge([records[1], records[3]])
    for name in ("ts_ns", "arbitration_id", "flags", "length"):
        together = [getattr(frames(0, 3, length=5), name), getattr(frames(3, 2, length=64), name)]
        assert getattr(merged, name).tolist() == np.concatenate(together).tolist()
        assert getattr(merged, name).dtype == together[0].dtype
    assert merged.data.shape == (5, 64)
    assert merged.data[0].tobytes() == frames(0, 1, length=5).data[0].tobytes().ljust(64, b"\0")
    assert merged.data[4].tobytes() == frames(4, 1, length=64).data[0].tobytes()
    assert not lost


def test_lengths_may_differ_within_a_batch(tmp_path: Path) -> None:
    """Payloads are stored without padding and come back zero behind their length, empty ones too."""
    journal = open_journal(tmp_path)
    batch = frames(0, 4)
    batch.length[:] = [0, 8, 3, 1]
    batch.data[np.arange(8) >= batch.length[:, None]] = 0
    journal.append_frames(batch, CLOCK)
    (record,) = read_all(journal, current(journal))[0][1:]
    assert (record.frames().data == batch.data).all()
    assert record.frames().length.tolist() == [0, 8, 3, 1]
    assert len(record.payload) == 4 * 11 + 12


def test_stamps_far_apart_take_several_records(tmp_path: Path) -> None:
    """Stamps that do not fit 32 bits beside their least, and such as jump back, come back as they were."""
    journal = open_journal(tmp_path)
    batch = frames(0, 5)
    batch.ts_ns[:] = [1 << 62, 0, (1 << 32) - 1, 1 << 32, 7]
    journal.append_frames(batch, CLOCK)
    records = read_all(journal, current(journal))[0][1:]
    assert merge(records).ts_ns.tolist() == batch.ts_ns.tolist()
    assert [record.frames_before for record in records] == [0, *np.cumsum([r.frames_count for r in records])[:-1]]


def test_a_large_batch_takes_several_records(tmp_path: Path) -> None:
    """No record outgrows a segment, whatever a source gives at once."""
    journal = open_journal(tmp_path)
    journal.append_frames(frames(0, 20_000), CLOCK)
    records, _ = read_all(journal, current(journal))
    assert numbers_of(records) == list(range(20_000))
    assert max(record.size for record in records) <= SEGMENT_BYTES // 8 + 100


def test_reading_stops_at_a_number_of_bytes_and_goes_on(tmp_path: Path) -> None:
    """A reader hands out what was asked for, then the rest, then what has come since."""
    journal = open_journal(tmp_path)
    for first in range(0, 1000, 100):
        journal.append_frames(frames(first, 100), CLOCK)
    reader = journal.reader(current(journal), 0)
    first = reader.read(5000)
    assert 1 < len(first.records) < 5
    rest = reader.read(1 << 20)
    assert numbers_of([*first.records, *rest.records]) == list(range(1000))
    assert not reader.read(1).records
    journal.append_frames(frames(1000, 1), CLOCK)
    assert numbers_of(reader.read(1).records) == [1000]


def test_a_reader_goes_back(tmp_path: Path) -> None:
    """What was read and not committed is read again from where it began."""
    journal = open_journal(tmp_path)
    fill(journal, 2.5)
    reader = journal.reader(current(journal), 0)
    batches = [reader.read(40_000).records for _ in range(3)]
    reader.rewind(batches[0][-1].sequence)
    again = reader.read(40_000).records
    assert [record.sequence for record in again] == [record.sequence for record in batches[1]]
    assert numbers_of(again) == numbers_of(batches[1])


def test_one_process_has_the_journal(tmp_path: Path) -> None:
    """A second one is told which process has it, and can have it afterwards."""
    journal = open_journal(tmp_path)
    with pytest.raises(IngestdError, match=rf"{tmp_path} is held by pid {os.getpid()} since 20"):
        open_journal(tmp_path)
    assert holder_of(tmp_path) is not None
    journal.close(ended=True)
    assert holder_of(tmp_path) is None
    open_journal(tmp_path).close(ended=True)


def test_a_journal_needs_room(tmp_path: Path) -> None:
    """Four segments at least; less is a mistake in the configuration, and so is an unknown policy."""
    with pytest.raises(UsageError, match="too few"):
        open_journal(tmp_path, segments_max=3)
    with pytest.raises(UsageError, match="policy"):
        open_journal(tmp_path, when_full="drop-everything")


@pytest.mark.parametrize("ended", [True, False])
def test_the_last_session_can_be_known_before_opening(tmp_path: Path, ended: bool) -> None:
    """Who wrote last, in which boot, and whether the session was ended or broke off."""
    assert Journal.peek(tmp_path / "none") is None
    assert Journal.peek(tmp_path) is None
    journal = open_journal(tmp_path)
    journal.append_frames(frames(0, 1), CLOCK)
    journal.close(ended=ended)
    last = Journal.peek(tmp_path)
    assert last is not None
    assert (last.session_id, last.boot_id, last.ended) == (SESSION.id, BOOT_ID, ended)


def test_a_killed_process_leaves_its_books(tmp_path: Path) -> None:
    """Everything that was counted is counted in the next life: committed, rejected, overflown, pending, per source."""
    journal = open_journal(tmp_path)
    journal.append_frames(frames(0, 100), CLOCK)
    journal.append_frames(frames(0, 50, "gps"), CLOCK)
    position = read_all(journal, current(journal))[0][-1].sequence
    journal.acknowledge(current(journal), position, {"can0": 90, "gps": 50}, {"can0": 10})
    journal.append_event(Event("can0", "gap", 5), CLOCK, lost={"overflow": 7})
    journal.append_frames(frames(100, 5), CLOCK)
    books = journal.books()
    assert books["can0"] == Books(112, 90, 5, 10, {"overflow": 7})
    assert books["gps"] == Books(50, 50, 0, 0, {})
    for _ in range(3):
        kill(journal)
        assert take_stock(tmp_path).ledger.books() == books
        journal = open_journal(tmp_path)
        assert journal.books() == books
    assert numbers_of(send_all(journal)) == list(range(100, 105))
    assert journal.books()["can0"] == Books(112, 95, 0, 10, {"overflow": 7})


def test_recovery_reads_one_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much lies in the journal, the books are in the newest segment."""
    journal = open_journal(tmp_path)
    fill(journal, 10)
    books = journal.books()
    kill(journal)
    opened: list[str] = []
    monkeypatch.setattr(
        "ingestd.journal.recovery.read_segment",
        lambda path, **more: (opened.append(path.name), read_segment(path, **more))[1],
    )
    journal = open_journal(tmp_path)
    assert journal.books() == books
    assert len(set(opened)) == 1


def test_capture_begins_before_recovery(tmp_path: Path) -> None:
    """Frames are taken at once; what earlier runs left joins them, in order, when it is known."""
    journal = open_journal(tmp_path)
    journal.append_frames(frames(0, 10), CLOCK)
    kill(journal)
    journal = open_unrecovered(tmp_path)
    journal.append_frames(frames(10, 10), CLOCK)
    assert [stretch.is_current for stretch in journal.stretches()] == [True]
    kill(journal)  # Before it had looked at anything.
    journal = open_unrecovered(tmp_path)
    journal.append_frames(frames(20, 10), CLOCK)
    recovery = journal.recover()
    assert journal.books()["can0"] == Books(30, 0, 30, 0, {})
    assert recovery.last_stamps == {"can0": 19_000}
    assert [stretch.is_current for stretch in journal.stretches()] == [False, False, True]
    assert numbers_of(send_all(journal)) == list(range(30))


def test_stretches_are_feeds_of_their_own(tmp_path: Path) -> None:
    """A new one begins on demand, also for another session; a name given to one is remembered."""
    journal = open_journal(tmp_path)
    journal.append_frames(frames(0, 10), CLOCK)
    other = SessionInfo(UUID(int=7), {"name": "race"})
    journal.begin_stretch(other)
    journal.append_frames(frames(10, 10), CLOCK)
    first, second = journal.stretches()
    assert first.feed_id == first.id != second.id
    journal.assign_feed(first.id, "clone-1", 0)
    kill(journal)
    journal = open_journal(tmp_path)
    assert [stretch.feed_id for stretch in journal.stretches()][:2] == ["clone-1", second.id]
    records, _ = read_all(journal, second.id)
    assert (records[0].sequence, records[0].session_id, records[0].session()) == (1, other.id, other.fields)
    assert records[1].frames_before == 0


def test_acknowledging_counts_what_the_records_hold(tmp_path: Path) -> None:
    """If delivery says it committed more or less than it was given, the books do not balance: that is their purpose."""
    journal = open_journal(tmp_path)
    journal.append_frames(frames(0, 10), CLOCK)
    result = journal.reader(current(journal), 0).read(1 << 20)
    journal.acknowledge(current(journal), result.records[-1].sequence, {"can0": 9})
    assert journal.books()["can0"] == Books(10, 9, 0, 0, {})
    assert not journal.books()["can0"].balanced
    kill(journal)
    assert not open_journal(tmp_path).books()["can0"].balanced


def test_acknowledged_segments_go_first(tmp_path: Path) -> None:
    """While there is room nothing is removed, so that it could be sent again; then only what was acknowledged."""
    journal = open_journal(tmp_path, segments_max=8)
    number = fill(journal, 4)
    send_all(journal)
    assert numbers_of(read_all(journal, current(journal))[0]) == list(range(number))
    begin = number
    number = fill(journal, 4.5, number)
    books = journal.books()["can0"]
    assert books == Books(number, begin, number - begin, 0, {})
    assert journal.bytes_used <= 8 * SEGMENT_BYTES
    kill(journal)
    journal = open_journal(tmp_path, segments_max=8)
    assert journal.books()["can0"] == books
    assert numbers_of(send_all(journal)) == list(range(begin, number))


def test_drop_oldest(tmp_path: Path) -> None:
    """A full journal gives up its oldest frames: counted, and the first record that is left says how many they were."""
    journal = open_journal(tmp_path, segments_max=6)
    number = fill(journal, 12)
    books = journal.books()["can0"]
    dropped = books.dropped["budget"]
    assert books.balanced
    assert 0 < dropped < number
    assert sum(name.bytes for name in list_folder(tmp_path)[0]) <= 6 * SEGMENT_BYTES
    kill(journal)
    journal = open_journal(tmp_path, segments_max=6)
    sent = send_all(journal)
    assert numbers_of(sent) == list(range(dropped, number))
    assert journal.books()["can0"] == Books(number, number - dropped, 0, 0, {"budget": dropped})
    assert next(record for record in sent if record.kind is Kind.FRAMES).frames_before == dropped
    assert not any(record.kind is Kind.EVENT for record in sent), "an event would have to make room itself"


def test_what_is_being_sent_is_not_dropped(tmp_path: Path) -> None:
    """Frames that a reader has handed out may still be committed although their segment had to go."""
    journal = open_journal(tmp_path, segments_max=6)
    number = fill(journal, 2.5)
    result = (reader := journal.reader(current(journal), 0)).read(20_000)
    in_hand = numbers_of(result.records)
    number = fill(journal, 8, number)
    assert journal.books()["can0"].balanced
    journal.acknowledge(current(journal), result.records[-1].sequence, {"can0": len(in_hand)})
    rest: list[int] = []
    while (result := reader.read(1 << 20)).records:
        assert not result.lost  # It was counted when it was removed.
        rest += numbers_of(result.records)
        journal.acknowledge(current(journal), result.records[-1].sequence, {"can0": len(numbers_of(result.records))})
    dropped = journal.books()["can0"].dropped["budget"]
    assert rest == list(range(len(in_hand) + dropped, number))
    assert journal.books()["can0"] == Books(number, number - dropped, 0, 0, {"budget": dropped})


def test_what_was_given_up_after_its_segment_went_is_lost(tmp_path: Path) -> None:
    """If it was not committed after all, the next reader finds that it is no more, and whose fault that is."""
    journal = open_journal(tmp_path, segments_max=6)
    number = fill(journal, 2.5)
    in_hand = len(numbers_of(journal.reader(current(journal), 0).read(20_000).records))
    number = fill(journal, 8, number)
    counted = journal.books()["can0"].dropped["budget"]
    records, lost = read_all(journal, current(journal))
    assert lost == {"can0": {"budget": in_hand}}
    assert numbers_of(records) == list(range(in_hand + counted, number))


def test_drop_newest(tmp_path: Path) -> None:
    """A full journal refuses frames, counts and tells it, and takes them again when what it has was sent."""
    journal = open_journal(tmp_path, segments_max=6, when_full="drop-newest")
    offered = 0
    for _ in range(200):
        journal.append_frames(frames(offered, 100), CLOCK)
        offered += 100
        journal.sync()
    books = journal.books()["can0"]
    assert books.balanced
    assert books.received == offered
    assert 0 < books.dropped["budget"] < offered
    assert journal.writable
    kept = numbers_of(read_all(journal, current(journal))[0])
    assert kept == list(range(len(kept)))
    journal.append_event(Event("can0", "link_down", 1), CLOCK)
    assert read_all(journal, current(journal))[0][-1].event().kind == "link_down"
    send_all(journal)
    journal.sync()
    journal.append_frames(frames(offered, 100), CLOCK)
    assert numbers_of(send_all(journal)) == list(range(offered, offered + 100))
    assert sum(name.bytes for name in list_folder(tmp_path)[0]) <= 6 * SEGMENT_BYTES


class Disk:
    """Calls of `os` that fail while `error` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.error = 0
        for name in names:
            monkeypatch.setattr(f"os.{name}", self._make(getattr(os, name)))

    def _make(self, call: Any) -> Any:
        def failing(*arguments: Any) -> Any:
            if self.error:
                raise OSError(self.error, os.strerror(self.error))
            return call(*arguments)

        return failing


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate"])
def test_a_disk_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, call: str) -> None:
    """Nothing raises; what cannot be written is counted, and told with its stamps when writing works again."""
    disk = Disk(monkeypatch, call)
    journal = open_journal(tmp_path)
    disk.error = error
    journal.begin_stretch()
    for first in range(0, 300, 100):
        journal.append_frames(frames(first, 100), CLOCK)
    journal.append_event(Event("can0", "bus_off", 300_000), CLOCK, lost={"overflow": 4})
    journal.sync()
    assert not journal.writable
    assert os.strerror(error) in journal.trouble
    lost = {"journal": 300, "overflow": 4}
    assert journal.books()["can0"] == Books(304, 0, 0, 0, lost)
    disk.error = 0
    journal._log._retry_at = 0.0
    journal.append_frames(frames(300, 10), CLOCK)
    assert journal.writable
    assert not journal.trouble
    assert journal.books()["can0"] == Books(314, 0, 10, 0, lost)
    kill(journal)
    journal = open_journal(tmp_path)
    assert journal.books()["can0"] == Books(314, 0, 10, 0, lost)
    sent = send_all(journal)
    assert numbers_of(sent) == list(range(300, 310))
    bus_off, gap = (record.event() for record in sent if record.kind is Kind.EVENT)
    assert bus_off.kind == "bus_off"
    assert gap == Event(
        "can0", "gap", 0, "journal", {"reason": "journal", "frames": 300, "from_ns": 0, "to_ns": 299_000}
    )


def test_the_disk_is_not_asked_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a fault there is a pause before the next segment is tried; frames are counted meanwhile."""
    journal = open_journal(tmp_path)
    disk = Disk(monkeypatch, "pwrite")
    disk.error = errno.EIO
    journal.append_frames(frames(0, 1), CLOCK)
    disk.error = 0
    journal._log._retry_at += 1000.0
    journal.append_frames(frames(1, 1), CLOCK)
    assert journal.books()["can0"] == Books(2, 0, 0, 0, {"journal": 2})


def test_a_fault_ends_without_anything_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that syncs finds out that the disk is well again, also on a silent bus."""
    journal = open_journal(tmp_path)
    disk = Disk(monkeypatch, "pwrite")
    disk.error = errno.EIO
    journal.append_frames(frames(0, 1), CLOCK)
    disk.error = 0
    journal._log._retry_at = 0.0
    journal.sync()
    assert journal.writable
    assert [record.event().payload["frames"] for record in send_all(journal) if record.kind is Kind.EVENT] == [1]


def test_acknowledging_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be noted at once is in the books of the next segment, so it is known to the next process."""
    journal = open_journal(tmp_path)
    journal.append_frames(frames(0, 10), CLOCK)
    disk = Disk(monkeypatch, "pwrite")
    disk.error = errno.ENOSPC
    send_all(journal)
    assert journal.books()["can0"] == Books(10, 10, 0, 0, {})
    disk.error = 0
    journal._log._retry_at = 0.0
    journal.append_frames(frames(10, 1), CLOCK)
    kill(journal)
    assert open_journal(tmp_path).books()["can0"] == Books(11, 10, 1, 0, {})


def test_a_sync_that_fails_leaves_the_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed fdatasync nobody knows what is on the disk: nothing more goes into that file."""
    journal = open_journal(tmp_path)
    journal.append_frames(frames(0, 1), CLOCK)
    disk = Disk(monkeypatch, "fdatasync")
    disk.error = errno.EIO
    before = journal._log.segment
    journal.sync()
    assert not journal.writable
    disk.error = 0
    journal._log._retry_at = 0.0
    journal.append_frames(frames(1, 1), CLOCK)
    assert journal._log.segment is not before
    assert numbers_of(send_all(journal)) == [0, 1]


def test_names_that_the_disk_does_not_keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed fsync of the folder the kernel takes its names for durable: none of those files is gone on in."""
    journal = open_journal(tmp_path)
    journal.append_frames(frames(0, 1), CLOCK)
    disk = Disk(monkeypatch, "fsync")
    disk.error = errno.EIO
    journal.sync()
    assert not journal.writable
    there = {path.name for path in tmp_path.glob("*.journal")}
    disk.error = 0
    journal.append_frames(frames(1, 1), CLOCK)
    assert journal._log.segment is not None
    assert journal._log.segment.segment.path.name not in there
    journal.sync()
    assert journal.writable
    assert numbers_of(send_all(journal)) == [0, 1]


def test_a_file_that_was_deleted(tmp_path: Path) -> None:
    """Somebody empties the folder: recording goes on in a new file, and what is gone is counted as damage."""
    journal = open_journal(tmp_path)
    journal.append_frames(frames(0, 10), CLOCK)
    journal.sync()
    for path in tmp_path.glob("*.journal"):
        path.unlink()
    journal.append_frames(frames(10, 10), CLOCK)
    journal.sync()
    journal._log._retry_at = 0.0
    journal.append_frames(frames(20, 10), CLOCK)
    assert numbers_of(send_all(journal)) == list(range(20, 30))
    assert journal.books()["can0"] == Books(30, 10, 0, 0, {"damage": 20})


def test_a_file_that_was_cut(tmp_path: Path) -> None:
    """Somebody empties the segment being written: recording goes on in another, for nobody could read the rest."""
    journal = open_journal(tmp_path)
    journal.append_frames(frames(0, 10), CLOCK)
    journal.sync()
    os.truncate(tmp_path / "00000001.journal", 0)
    journal.append_frames(frames(10, 10), CLOCK)
    journal.sync()
    journal.append_frames(frames(20, 10), CLOCK)
    assert "was cut" in "".join(journal.notices())
    assert journal._log.segment is not None
    assert journal._log.segment.segment.path.name != "00000001.journal"
    assert numbers_of(send_all(journal)) == list(range(10, 30))
    assert journal.books()["can0"] == Books(30, 20, 0, 0, {"damage": 10})
    kill(journal)
    assert open_journal(tmp_path).books()["can0"] == Books(30, 20, 0, 0, {"damage": 10})


def test_an_event_too_large_for_a_segment(tmp_path: Path) -> None:
    """It is recorded without its payload rather than not at all."""
    journal = open_journal(tmp_path)
    journal.append_event(Event("can0", "note", 5, "k", {"text": "x" * SEGMENT_BYTES}), CLOCK)
    event = read_all(journal, current(journal))[0][-1].event()
    assert (event.kind, event.ts_ns, event.key, list(event.payload)) == ("note", 5, "k", ["left_out_bytes"])


def test_rejected_records_are_kept_apart(tmp_path: Path) -> None:
    """As they were, with the reason, each once; counted when they are acknowledged, and never sent again."""
    journal = open_journal(tmp_path)
    journal.append_frames(frames(0, 10), CLOCK)
    record = read_all(journal, current(journal))[0][-1]
    for _ in range(2):
        journal.reject(record, "22P05: untranslatable character")
    journal.acknowledge(current(journal), record.sequence, {}, {"can0": 10})
    kill(journal)
    journal = open_journal(tmp_path)
    assert journal.books()["can0"] == Books(10, 0, 0, 10, {})
    assert not send_all(journal)[1:]
    (path,) = tmp_path.glob("rejected-*.journal")
    note, kept = read_segment(path)
    assert isinstance(note, Record)
    assert isinstance(kept, Record)
    assert kept.pack() == record.pack()
    assert note.json() == {
        "stretch": record.stretch_id, "sequence": record.sequence, "reason": "22P05: untranslatable character",
    }  # fmt: skip


def test_old_rejected_records_make_room(tmp_path: Path) -> None:
    """They count against the budget, and do not push out what can still be sent."""
    journal = open_journal(tmp_path, segments_max=8)
    number = 0
    for _ in range(40):
        journal.append_frames(frames(number, 400), CLOCK)
        number += 400
        records = read_all(journal, current(journal), journal.stretches()[-1].acknowledged)[0]
        for record in records:
            journal.reject(record, "no")
        journal.acknowledge(current(journal), records[-1].sequence, {}, {"can0": len(numbers_of(records))})
        journal.sync()
    assert journal.books()["can0"] == Books(number, 0, 0, number, {})
    assert sum(name.bytes for name in list_folder(tmp_path)[0]) <= 8 * SEGMENT_BYTES


def test_many_short_runs_do_not_pile_up(tmp_path: Path) -> None:
    """A daemon that is restarted again and again leaves small files, and not more than can be looked after."""
    for run in range(80):
        journal = open_journal(tmp_path, segments_max=40)
        journal.append_frames(frames(run, 1), CLOCK)
        send_all(journal)
        journal.sync()
        journal.close(ended=True)
    assert len(list(tmp_path.glob("*.journal"))) < 70
    journal = open_journal(tmp_path, segments_max=40)
    assert journal.books()["can0"] == Books(80, 80, 0, 0, {})


KILLED = """
import sys
from pathlib import Path
from tests.journals import CLOCK, frames, open_journal
journal = open_journal(Path(sys.argv[1]))
number = 0
while True:
    journal.append_frames(frames(number, 7), CLOCK)
    number += 7
    print(number, flush=True)
"""


def test_sigkill(tmp_path: Path) -> None:
    """Every frame whose append returned before the kill is there, and nothing is twice or out of order."""
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as process:
        assert process.stdout is not None
        told = [next(process.stdout) for _ in range(2000)]
        process.send_signal(signal.SIGKILL)
        told += process.stdout.readlines()
    told = [line for line in told if line.endswith("\n")]
    journal = open_journal(tmp_path)
    numbers = numbers_of(send_all(journal))
    assert numbers == list(range(len(numbers)))
    assert len(numbers) >= int(told[-1])
    assert journal.books()["can0"] == Books(len(numbers), len(numbers), 0, 0, {})
