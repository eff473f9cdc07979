"""A journal while it runs, beside other threads and where others change its files: what it holds, and gives back."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingestd.errors import IngestdError
from ingestd.journal import Journal, Kind, Record, merge
from ingestd.journal.holder import holder_of
from ingestd.model import Books, Event, FrameBatch
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


def descriptors(folder: Path) -> list[str]:
    """The files of the folder that this process has open, deleted ones too."""
    names = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = str(link.readlink())
        except FileNotFoundError:
            continue
        if target.startswith(f"{folder}/"):
            names.append(target.removeprefix(f"{folder}/"))
    return sorted(names)


def fail(error: int) -> Any:
    """A call that fails."""

    def failing(*_: Any, **__: Any) -> None:
        raise OSError(error, os.strerror(error))

    return failing


def test_descriptors_are_given_back(tmp_path: Path) -> None:
    """However many segments are written, read and removed, three files are open: lock, current and next."""
    journal = open_journal(tmp_path, segments_max=6)
    for first in range(0, 30_000, 100):
        journal.append_frames(frames(first, 100), CLOCK)
        if first % 5000 == 0:
            journal.begin_stretch()
            send_all(journal)
        journal.sync()
        assert len(descriptors(tmp_path)) <= 3
    records, _ = read_all(journal, journal.stretches()[-1].id)
    journal.reject(records[-1], "no")
    assert len(descriptors(tmp_path)) <= 4
    journal.close(ended=True)
    assert not descriptors(tmp_path)


def test_descriptors_are_given_back_by_a_disk_at_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fault leaves a segment; none leaves a descriptor."""
    journal = open_journal(tmp_path)
    for call in ("pwrite", "posix_fallocate", "fdatasync", "fsync", "ftruncate"):
        for number in range(5):
            with monkeypatch.context() as patch:
                patch.setattr(os, call, fail(errno.EIO))
                journal._log._retry_at = 0.0
                journal.append_frames(frames(number, 1), CLOCK)
                journal.sync()
            assert len(descriptors(tmp_path)) <= 3, call
    journal.close(ended=False)
    assert not descriptors(tmp_path)


def test_a_folder_that_cannot_be_listed_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal that could not be opened can be opened by the next who tries."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", fail(errno.EIO))
        with pytest.raises(IngestdError, match=os.strerror(errno.EIO)):
            open_journal(tmp_path)
    assert not descriptors(tmp_path)
    assert holder_of(tmp_path) is None


def test_closing_on_a_file_system_that_became_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing raises, everything is given back, and the next process has it all."""
    journal = open_journal(tmp_path)
    journal.append_frames(frames(0, 10), CLOCK)
    journal.sync()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fail(errno.EROFS))
        for call in ("pwrite", "ftruncate", "posix_fallocate"):
            patch.setattr(os, call, fail(errno.EROFS))
        journal.close(ended=True)
    assert not descriptors(tmp_path)
    assert numbers_of(send_all(open_journal(tmp_path))) == list(range(10))


def test_a_closed_journal_is_left_alone(tmp_path: Path) -> None:
    """What a thread or a source still does after the end raises nothing and changes nothing in the folder."""
    journal = open_journal(tmp_path)
    journal.append_frames(frames(0, 10), CLOCK)
    record = read_all(journal, journal.stretches()[0].id)[0][-1]
    kill_me = open_journal(tmp_path / "other")
    kill_me.append_frames(frames(0, 1), CLOCK)
    kill(kill_me)
    unrecovered = open_unrecovered(tmp_path / "other")
    for each in (journal, unrecovered):
        each.close(ended=True)
    before = {path: path.stat().st_size for path in tmp_path.rglob("*")}
    for each in (journal, unrecovered):
        each.append_frames(frames(10, 5), CLOCK)
        each.append_event(Event("can0", "note", 1), CLOCK)
        each.append_session({"late": True})
        each.recover()
        each.sync()
        with pytest.raises(IngestdError, match="closed"):
            each.reject(record, "no")
        each.close(ended=True)
    assert {path: path.stat().st_size for path in tmp_path.rglob("*")} == before
    assert not descriptors(tmp_path)
    assert journal.books()["can0"] == Books(15, 0, 10, 0, {"journal": 5})


def test_the_folder_is_deleted(tmp_path: Path) -> None:
    """It is made anew, held again, and what is gone is counted: as pending until it is missed, then as damage."""
    folder = tmp_path / "journal"
    journal = open_journal(folder)
    journal.append_frames(frames(0, 10), CLOCK)
    journal.sync()
    shutil.rmtree(folder)
    journal.append_frames(frames(10, 10), CLOCK)  # Into a file without a name: nobody knows yet.
    journal.sync()
    assert not journal.writable
    assert "deleted" in journal.trouble
    journal.append_frames(frames(20, 5), CLOCK)  # Into a new file in a new folder.
    assert journal.books()["can0"] == Books(25, 0, 25, 0)
    journal.sync()
    assert journal.writable
    assert "00000001.journal could not be synced" in journal.trouble  # That is said for a while.
    journal._log.trouble_at -= 60.0
    journal.sync()
    assert not journal.trouble
    journal.append_frames(frames(25, 10), CLOCK)
    assert (holder_of(folder) or "").startswith(f"pid {os.getpid()} ")
    with pytest.raises(IngestdError, match="is held by"):
        open_journal(folder)
    kill(journal)

    journal = open_journal(folder)
    assert journal.books()["can0"] == Books(35, 0, 35, 0)
    assert numbers_of(send_all(journal)) == list(range(20, 35))
    assert journal.books()["can0"] == Books(35, 15, 0, 0, {"damage": 20})


def test_the_folder_is_moved_away(tmp_path: Path) -> None:
    """What was open goes on to be written for a moment; with the next sync the journal is where it was, and held."""
    folder, elsewhere = tmp_path / "journal", tmp_path / "elsewhere"
    journal = open_journal(folder)
    journal.append_frames(frames(0, 10), CLOCK)
    journal.sync()
    folder.rename(elsewhere)
    journal.append_frames(frames(10, 10), CLOCK)
    journal.sync()
    assert "deleted or replaced" in journal.trouble
    journal.append_frames(frames(20, 10), CLOCK)
    journal.sync()
    assert journal.writable
    assert holder_of(folder) is not None
    assert holder_of(elsewhere) is None
    assert numbers_of(send_all(journal)) == list(range(20, 30))
    assert journal.books()["can0"] == Books(30, 10, 0, 0, {"damage": 20})
    kill(journal)
    assert numbers_of(send_all(open_journal(elsewhere))) == list(range(20))


def test_another_segment_in_the_place_of_one(tmp_path: Path) -> None:
    """Records of another journal are not taken for ours, although their numbers follow; what they replaced is lost."""
    other = open_journal(tmp_path / "other")
    journal = open_journal(tmp_path / "journal")
    for first in range(0, 5000, 10):
        journal.append_frames(frames(first, 10), CLOCK)
        other.append_frames(frames(first + 50_000, 10), CLOCK)
    reader = journal.reader(journal.stretches()[0].id, 0)
    sent = reader.read(10_000).records
    kill(other)
    for name in ("00000001.journal", "00000002.journal"):
        (tmp_path / "other" / name).rename(tmp_path / "journal" / name)
    while records := (result := reader.read(10_000)).records:
        assert not result.lost or result.lost["can0"]["damage"] > 0
        sent += records
    numbers = numbers_of(sent)
    assert numbers == sorted(numbers)
    assert 0 < len(numbers) < 5000 == numbers[-1] + 1
    assert "00000002.journal was replaced by another file" in "\n".join(journal.notices())
    kill(journal)


def test_a_fault_that_passes_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one segment cannot be written another can: the frames go there."""
    journal = open_journal(tmp_path)
    faulty, pwrite = [True], os.pwrite

    def fails_once(descriptor: int, data: bytes, offset: int) -> int:
        if faulty.pop() if faulty else False:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pwrite(descriptor, data, offset)

    journal.append_frames(frames(0, 10), CLOCK)
    monkeypatch.setattr(os, "pwrite", fails_once)
    journal.append_frames(frames(10, 10), CLOCK)
    assert not faulty
    assert journal.writable
    assert [notice.rpartition(" ")[0] for notice in journal.notices()] == [
        f"the journal {tmp_path} cannot be written: Input/output",
        f"the journal {tmp_path} can be written",
    ]
    assert numbers_of(send_all(journal)) == list(range(20))
    assert journal.books()["can0"] == Books(20, 20, 0, 0)


def test_a_disk_that_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as only syncing fails every frame is accepted and can be sent, without a segment for each attempt."""
    journal = open_journal(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail(errno.EIO))
        for first in range(0, 500, 10):
            journal.append_frames(frames(first, 10), CLOCK)
            journal.sync()
            assert not journal.writable
    assert "cannot be made durable" in journal.trouble
    assert journal._shelf.number_last < 25
    journal.sync()
    assert not journal.writable  # The segment had a fault: who knows what of it is there.
    journal._log._leave_at = 0.0
    journal.sync()
    assert journal.writable
    assert "durable again" in journal.notices()[-1]
    assert numbers_of(send_all(journal)) == list(range(500))
    assert journal.books()["can0"] == Books(500, 500, 0, 0)


def test_the_lock_is_deleted(tmp_path: Path) -> None:
    """With the next sync the journal is held again, unless somebody else has it: that is said, and tried again."""
    journal = open_journal(tmp_path)
    (tmp_path / "lock").unlink()
    assert holder_of(tmp_path) is None
    journal.sync()
    assert holder_of(tmp_path) is not None
    (tmp_path / "lock").unlink()
    usurper = open_unrecovered(tmp_path)
    journal.sync()
    assert f"is held by pid {os.getpid()}" in journal.trouble
    kill(usurper)
    journal.sync()
    assert holder_of(tmp_path) is not None
    kill(journal)
    assert holder_of(tmp_path) is None


def test_what_cannot_be_read_now_is_read_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that passes, like too many open files, is raised and costs nothing; the same reader goes on."""
    journal = open_journal(tmp_path)
    for first in range(0, 12_000, 100):
        journal.append_frames(frames(first, 100), CLOCK)
    reader, read = journal.reader(journal.stretches()[0].id, 0), list[Record]()
    refused = 0
    while len(numbers_of(read)) < 12_000:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", fail(errno.EMFILE))
            try:
                result = reader.read(20_000)
            except IngestdError:
                refused += 1
                patch.undo()
                result = reader.read(20_000)
        assert result.records
        assert not result.lost
        read += result.records
    assert numbers_of(read) == list(range(12_000))
    assert refused > 2


def test_a_segment_that_the_disk_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked again for a while; then its frames are counted as damage, and reading goes on behind it."""
    journal = open_journal(tmp_path)
    while journal._shelf.number_last < 4:
        journal.append_frames(frames(journal._log.stretch.journalled["can0"], 100), CLOCK)
    opening = Path.open

    def broken(path: Path, *arguments: Any) -> Any:
        if path.name == "00000002.journal":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opening(path, *arguments)

    monkeypatch.setattr(Path, "open", broken)
    count = journal.books()["can0"].received
    for _ in range(2):
        with pytest.raises(IngestdError, match=r"00000002\.journal cannot be read now: Input/output error"):
            send_all(journal)
    assert journal.books()["can0"].pending == count - journal.books()["can0"].committed
    monkeypatch.setattr("ingestd.journal.reader.REFUSED_SECONDS", 0.0)
    sent_before = journal.books()["can0"].committed
    lost = count - sent_before - len(numbers_of(send_all(journal)))
    assert lost > 0
    assert "00000002.journal cannot be read: Input/output error" in journal.notices()
    assert journal.books()["can0"] == Books(count, count - lost, 0, 0, {"damage": lost})


@pytest.mark.parametrize("bytes_max", [0, 1])
def test_a_read_makes_progress(tmp_path: Path, bytes_max: int) -> None:
    """However little is asked for, one record is handed out, and a stretch is not taken for read to its end."""
    journal = open_journal(tmp_path)
    journal.append_frames(frames(0, 10), CLOCK)
    journal.begin_stretch()
    first = journal.stretches()[0]
    reader = journal.reader(first.id, 0)
    assert [record.kind for _ in range(2) for record in reader.read(bytes_max).records] == [Kind.SESSION, Kind.FRAMES]
    assert journal.books()["can0"] == Books(10, 0, 10, 0)


def test_a_stretch_begins_while_the_one_before_is_read(tmp_path: Path) -> None:
    """The reader reads its stretch to the end and nothing of the next, which counts its frames from nought."""
    journal = open_journal(tmp_path)
    for first in range(0, 1000, 100):
        journal.append_frames(frames(first, 100), CLOCK)
    old = journal.stretches()[0]
    reader = journal.reader(old.id, 0)
    read = reader.read(3000).records
    journal.begin_stretch()
    journal.append_frames(frames(1000, 100), CLOCK)
    while records := reader.read(3000).records:
        read += records
    assert numbers_of(read) == list(range(1000))
    assert [stretch.is_current for stretch in journal.stretches()] == [False, True]
    journal.acknowledge(old.id, read[-1].sequence, {"can0": 1000})
    assert not reader.read(3000).records
    (_, record), lost = read_all(journal, journal.stretches()[1].id)
    assert (record.sequence, record.frames_before, lost) == (2, 0, {})
    assert journal.books()["can0"] == Books(1100, 1000, 100, 0)


def test_counts_go_on_from_record_to_record(tmp_path: Path) -> None:
    """Each record says how many frames its source had before it, whatever lies between and however often it is read."""
    journal = open_journal(tmp_path)
    for first in range(0, 9000, 90):
        journal.append_frames(frames(first, 50), CLOCK)
        journal.append_event(Event("gps", "note", first), CLOCK)
        journal.append_frames(frames(first, 40, "gps", length=33), CLOCK)
    reader = journal.reader(journal.stretches()[0].id, 0)
    for position in (0, 17, 150, 0):
        reader.rewind(position)
        counts = {"can0": -(-(max(position, 1) - 1) // 3) * 50, "gps": (max(position, 1) - 1) // 3 * 40}
        sequence = position
        while records := reader.read(20_000).records:
            for record in records:
                assert record.sequence == (sequence := sequence + 1)
                if record.source:
                    assert record.frames_before == counts[record.source]
                    counts[record.source] += record.frames_count
        assert counts == {"can0": 5000, "gps": 4000}


def test_small_appends_merge_to_what_they_were_cut_from(tmp_path: Path) -> None:
    """64 frames at a time, with stamps that jump and payloads of all lengths: together they are the same columns."""
    random = np.random.default_rng(5)
    count, width = 6400, 64
    length = random.integers(0, width + 1, count).astype(np.uint16)
    data = random.integers(0, 256, (count, width), np.uint8)
    data[np.arange(width) >= length[:, None]] = 0
    stamps = random.integers(0, 1 << 62, count)
    stamps[100:3000] = np.sort(random.integers(0, 10**9, 2900))
    whole = FrameBatch(
        "can0", stamps, random.integers(0, 1 << 29, count).astype(np.uint32),
        random.integers(0, 256, count).astype(np.uint8), length, data,
    )  # fmt: skip
    journal = open_journal(tmp_path)
    for first in range(0, count, 64):
        journal.append_frames(whole[first : first + 64], CLOCK)
    records, _ = read_all(journal, journal.stretches()[0].id)
    merged = merge([record for record in records if record.kind is Kind.FRAMES])
    for name in ("ts_ns", "arbitration_id", "flags", "length", "data"):
        before, after = getattr(whole, name), getattr(merged, name)
        assert before.dtype == after.dtype
        assert np.array_equal(before, after), name


def stress(journal: Journal, first: int, batches: int) -> None:
    """Append on this thread while another syncs without a pause and a third reads and acknowledges."""
    done, failures = threading.Event(), []

    def syncing() -> None:
        try:
            while not done.is_set():
                journal.sync()
        except BaseException as error:
            failures.append(error)

    def sending() -> None:
        try:
            while not done.is_set():
                send_all(journal)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=syncing), threading.Thread(target=sending)]
    for thread in threads:
        thread.start()
    for number in range(batches):
        journal.append_frames(frames(first + number * 100, 100), CLOCK)
        if number % 100 == 50:
            journal.begin_stretch()
    done.set()
    for thread in threads:
        thread.join()
    assert not failures


def test_appending_syncing_and_sending_at_once(tmp_path: Path) -> None:
    """Three threads at once lose nothing: all is committed, in the books and after reopening."""
    journal = open_journal(tmp_path, segments_max=200)
    stress(journal, 0, 600)
    send_all(journal)
    assert journal.books()["can0"] == Books(60_000, 60_000, 0, 0)
    kill(journal)
    journal = open_journal(tmp_path, segments_max=200)
    assert journal.books()["can0"] == Books(60_000, 60_000, 0, 0)
    assert [numbers for stretch in journal.stretches() for numbers in numbers_of(read_all(journal, stretch.id)[0])] == [
        *range(60_000)
    ]


def test_appending_syncing_and_sending_in_a_full_journal(tmp_path: Path) -> None:
    """Segments that are removed while others read and write them: each frame has one fate, and the sums are right."""
    journal = open_journal(tmp_path, segments_max=5)
    stress(journal, 0, 600)
    send_all(journal)
    books = journal.books()["can0"]
    assert books.balanced
    assert (books.received, books.pending) == (60_000, 0)
    assert set(books.dropped) <= {"budget"}
    assert journal.bytes_used <= 5 * SEGMENT_BYTES
    journal._log.write_losses()
    books = journal.books()["can0"]
    kill(journal)
    assert open_journal(tmp_path, segments_max=5).books()["can0"] == books


HOLDER = """
import sys
from pathlib import Path
from tests.journals import open_journal
journal = open_journal(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_another_process_holds_it(tmp_path: Path) -> None:
    """It is named, by its pid; when it is killed the journal is free at once."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2],
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(IngestdError, match=rf"is held by pid {process.pid} since"):
            open_journal(tmp_path)
        process.kill()
        process.wait()
        assert holder_of(tmp_path) is None
        kill(open_journal(tmp_path))
