"""Faults of the disk and the kernel, one by one: each is said, costs what it must cost, and is over when it is over.

Full disks are made with a limit on the size of files; what no file system here can be made to do is a patched call.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ingestd.errors import IngestdError
from ingestd.journal import Journal, Record, reader
from ingestd.journal.holder import holder_of, take_lock
from ingestd.journal.recovery import take_stock
from ingestd.journal.segment import BLOCK_BYTES, is_in_place
from ingestd.journal.verification import verify
from ingestd.model import Books
from tests.bad_blocks import BadBlocks
from tests.journal_damages import FIRST, LAST, MIDDLE, flip, in_middle, make, numbers, placed
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


def fail(error: int) -> Any:
    """A call that fails."""

    def failing(*_: Any, **__: Any) -> None:
        raise OSError(error, os.strerror(error))

    return failing


@contextlib.contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """The kernel takes no byte beyond: the end of a write, or all of it, is refused as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_lock_that_the_file_system_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel says is said; no descriptor is left over."""
    monkeypatch.setattr(fcntl, "flock", fail(errno.ENOLCK))
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(IngestdError, match=f"{tmp_path} cannot be opened: No locks available"):
        open_journal(tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_lock_on_a_full_disk(tmp_path: Path) -> None:
    """It holds, although who has it cannot be noted."""
    with no_file_larger_than(0):
        descriptor = take_lock(tmp_path)
    assert holder_of(tmp_path) == "another process"
    with pytest.raises(IngestdError, match="is held by another process"):
        open_journal(tmp_path)
    os.close(descriptor)
    assert holder_of(tmp_path) is None


def test_a_file_system_that_cannot_set_bytes_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments are as large there as elsewhere, and are written and read."""
    monkeypatch.setattr(os, "posix_fallocate", fail(errno.EOPNOTSUPP))
    journal = open_journal(tmp_path)
    journal.append_frames(frames(0, 10), CLOCK)
    journal.sync()
    assert {path.stat().st_size for path in tmp_path.glob("*.journal")} == {SEGMENT_BYTES}
    assert numbers_of(send_all(journal)) == list(range(10))
    assert not journal.notices()


def test_a_write_that_the_kernel_takes_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However little it takes at a time, all of it is written; when it takes nothing more, the disk is full."""
    journal = open_journal(tmp_path)
    pwrite, bytes_max = os.pwrite, 7

    def in_parts(descriptor: int, data: bytes, offset: int) -> int:
        return pwrite(descriptor, data[:bytes_max], offset) if bytes_max else 0

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", in_parts)
        journal.append_frames(frames(0, 10), CLOCK)
    assert journal.writable
    taken: list[int] = []

    def half_of_it(descriptor: int, data: bytes, offset: int) -> int:
        taken.append(0 if taken else pwrite(descriptor, data[: len(data) // 2], offset))
        return taken[-1]

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", half_of_it)
        journal.append_frames(frames(10, 10), CLOCK)
    assert "No space left on device" in journal.trouble
    assert journal.books()["can0"] == Books(20, 0, 10, 0, {"journal": 10})
    journal._log._retry_at = 0.0
    journal.append_frames(frames(20, 10), CLOCK)
    assert numbers_of(send_all(journal)) == [*range(10), *range(20, 30)]
    assert journal.books()["can0"] == Books(30, 20, 0, 0, {"journal": 10})


def test_a_record_that_ends_where_the_disk_is_full(tmp_path: Path) -> None:
    """What was written of it counts for nothing: the frames are counted as lost, and nothing is read twice."""
    journal = open_journal(tmp_path)
    journal.append_frames(frames(0, 10), CLOCK)
    (segment,) = tmp_path.glob("0*.journal")
    with no_file_larger_than(placed(segment)[-1].end + 50):
        journal.append_frames(frames(10, 10), CLOCK)
    assert "File too large" in journal.trouble
    assert journal.books()["can0"] == Books(20, 0, 10, 0, {"journal": 10})
    journal._log._retry_at = 0.0
    journal.append_frames(frames(20, 10), CLOCK)
    kill(journal)
    journal = open_journal(tmp_path)
    assert numbers_of(send_all(journal)) == [*range(10), *range(20, 30)]
    assert journal.books()["can0"] == Books(30, 20, 0, 0, {"journal": 10})


def test_a_disk_that_somebody_fills_while_there_is_something_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is only kept to be sent again gives way, one segment at a time, before it is said that there is no room."""
    journal = open_journal(tmp_path)
    for first in range(0, 12_000, 100):
        journal.append_frames(frames(first, 100), CLOCK)
    send_all(journal)
    sent = sorted(tmp_path.glob("0*.journal"))[:-1]
    assert len(sent) > 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", fail(errno.ENOSPC))
        for path in sent:
            journal.sync()
            assert not path.exists()
            assert not journal.trouble
        journal.sync()
        assert journal.trouble == "no new segment can be made: No space left on device"
    journal.append_frames(frames(12_000, 10), CLOCK)
    assert numbers_of(send_all(journal)) == list(range(12_000, 12_010))


def test_starting_where_nothing_can_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed process had allocated stays, counted, and is said; the next start removes what was never used."""
    journal = open_journal(tmp_path)
    journal.append_frames(frames(0, 10), CLOCK)
    journal.sync()
    kill(journal)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fail(errno.EPERM))
        patch.setattr(os, "truncate", fail(errno.EPERM))
        journal = open_unrecovered(tmp_path)
        assert journal.recover().warnings == [
            "00000001.journal cannot be trimmed: Operation not permitted",
            "00000002.journal cannot be removed: Operation not permitted",
        ]
    assert journal.bytes_used == sum(path.stat().st_size for path in tmp_path.glob("*.journal"))
    journal.append_frames(frames(10, 10), CLOCK)
    kill(journal)
    journal = open_unrecovered(tmp_path)
    assert not journal.recover().warnings
    assert not (tmp_path / "00000002.journal").exists()
    assert numbers_of(send_all(journal)) == list(range(20))


def test_starting_where_the_books_cannot_be_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are known all the same, are in the next segment that can be written, and in every later process."""
    journal = open_journal(tmp_path)
    journal.append_frames(frames(0, 10), CLOCK)
    send_all(journal)
    kill(journal)
    journal = open_unrecovered(tmp_path)
    journal.append_frames(frames(10, 5), CLOCK)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail(errno.EIO))
        journal.recover()
    assert journal.trouble == f"the journal {tmp_path} cannot be written: Input/output error"
    assert journal.books()["can0"] == Books(15, 10, 5, 0)
    journal.append_frames(frames(15, 5), CLOCK)
    assert journal.writable
    kill(journal)
    assert open_journal(tmp_path).books()["can0"] == Books(20, 10, 10, 0)


def test_a_rejected_record_that_cannot_be_set_aside(tmp_path: Path) -> None:
    """That is an error, for it must not be counted as rejected; with room on the disk it is set aside."""
    journal = open_journal(tmp_path)
    journal.append_frames(frames(0, 10), CLOCK)
    record = read_all(journal, journal.stretches()[0].id)[0][-1]
    with no_file_larger_than(100), pytest.raises(IngestdError, match="cannot be set aside: File too large"):
        journal.reject(record, "no")
    assert journal.books()["can0"] == Books(10, 0, 10, 0)
    journal.reject(record, "no")
    assert verify(tmp_path).rejected_frames == {"can0": 10}


def test_damage_that_a_full_disk_cannot_keep_aside(tmp_path: Path) -> None:
    """It is counted and said like any other, and no part of it lies about."""
    count = make(tmp_path)
    (target := in_middle(tmp_path)).flip(5)
    journal = open_journal(tmp_path)
    with no_file_larger_than(100):
        records, lost = read_all(journal, journal.stretches()[0].id)
    gone = numbers([target.record])["can0"]
    assert lost == {"can0": {"damage": len(gone)}}
    assert numbers_of(records) == [number for number in range(count) if number not in gone]
    assert journal.damaged_bytes == target.record.size
    assert not list(tmp_path.glob("damaged-*"))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that asks a disk that refuses a second time at once, and not for a minute."""
    monkeypatch.setattr(reader, "REFUSED_SECONDS", 0.0)


def send_in_spite(journal: Journal) -> list[Record]:
    """Send everything, coming back to what cannot be read now."""
    sent: list[Record] = []
    for _ in range(10):
        with contextlib.suppress(IngestdError):
            send_all(journal, sent)
    return sent


@pytest.mark.parametrize("name", [MIDDLE, LAST], ids=["in the middle", "in the newest"])
def test_what_lies_beside_blocks_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, impatient: None, name: str
) -> None:
    """Blocks cost the records that touch them, to the frame, and not their segment; and what the disk says is said."""
    count = make(tmp_path)
    blocks = (3, 5)
    hit = [
        each.record
        for each in placed(tmp_path / name)
        if any(each.offset < (at + 1) * BLOCK_BYTES and each.end > at * BLOCK_BYTES for at in blocks)
    ]
    flip(tmp_path / name, 30)  # The header can only be had by reading what is behind it.
    BadBlocks(monkeypatch, tmp_path / name, *blocks)
    with pytest.raises(OSError, match="Input/output error"), (tmp_path / name).open("rb") as file:
        file.read()
    journal = open_unrecovered(tmp_path)
    said = journal.recover().warnings
    sent = send_in_spite(journal)
    said += journal.notices()
    assert f"{name} can be read in part: Input/output error" in said
    for source, lost in numbers(hit).items():
        assert numbers_of(sent, source) == [number for number in range(count) if number not in lost]
        assert journal.books()[source] == Books(count, count - len(lost), 0, 0, {"damage": len(lost)})


def test_a_disk_that_reads_again_after_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, impatient: None) -> None:
    """When it is asked for the last time it gives everything: nothing is lost, and the next fault is a new one."""
    count = make(tmp_path)
    journal = open_journal(tmp_path)
    disk = BadBlocks(monkeypatch, tmp_path / MIDDLE, 4)
    sent: list[Record] = []
    with pytest.raises(IngestdError, match=f"{MIDDLE} cannot be read now: Input/output error"):
        send_all(journal, sent)
    disk.blocks = ()
    send_all(journal, sent)
    for source in ("can0", "gps"):
        assert numbers_of(sent, source) == list(range(count))
        assert journal.books()[source] == Books(count, count, 0, 0)
    assert not journal.notices()


def test_a_disk_that_goes_away_while_it_is_read_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error other than of a block is none of the block: the newest segment is then not read, and that is said."""
    count = make(tmp_path)
    disk = BadBlocks(monkeypatch, tmp_path / LAST, 4)
    refuse = disk.check

    def goes_away(start: int, end: int) -> None:
        disk.error = errno.ENODEV if end - start <= BLOCK_BYTES else errno.EIO
        refuse(start, end)

    monkeypatch.setattr(disk, "check", goes_away)
    stock = take_stock(tmp_path)
    assert f"{LAST} cannot be read: No such device" in stock.warnings
    disk.blocks = ()
    journal = open_journal(tmp_path)
    assert numbers_of(send_all(journal)) == list(range(count))


def test_a_file_that_is_cut_while_it_is_read_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read before the cut counts, and reading ends there."""
    make(tmp_path)
    path = tmp_path / LAST
    disk = BadBlocks(monkeypatch, path, 2)
    refuse = disk.check

    def cut(start: int, end: int) -> None:
        if start >= 6 * BLOCK_BYTES:
            os.truncate(path, 6 * BLOCK_BYTES)
        refuse(start, end)

    before = [each for each in placed_without(disk, path) if each.end <= 2 * BLOCK_BYTES]
    monkeypatch.setattr(disk, "check", cut)
    (segment,) = (each for each in take_stock(tmp_path).segments if each.path == path)
    assert path.stat().st_size == 6 * BLOCK_BYTES
    assert before[-1].end < (segment.end or 0) <= 6 * BLOCK_BYTES


def placed_without(disk: BadBlocks, path: Path) -> list[Any]:
    """The records of a segment, as they are when the disk reads."""
    blocks, disk.blocks = disk.blocks, ()
    found = placed(path)
    disk.blocks = blocks
    return found


def test_a_segment_that_cannot_be_read_at_all(tmp_path: Path) -> None:
    """It is named with what the disk says, at the start and by `verify`; everything else is sent, and it is kept."""
    count = make(tmp_path)
    unreadable = tmp_path / "00000009.journal"
    unreadable.symlink_to("/proc/self/mem")  # A file whose first bytes give an input/output error.
    assert [(each.file, each.what) for each in verify(tmp_path).findings] == [
        (unreadable.name, "cannot be read: Input/output error")
    ]
    last = Journal.peek(tmp_path)
    assert last is not None
    journal = open_unrecovered(tmp_path)
    assert journal.recover().warnings == [f"{unreadable} cannot be read: Input/output error"]
    assert numbers_of(send_all(journal)) == list(range(count))
    assert unreadable.is_symlink()


def test_a_segment_is_deleted_after_it_was_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sync that finds it gone says nothing of the segment that is being written by then: recording goes on there."""
    journal = open_journal(tmp_path)
    journal.append_frames(frames(0, 10), CLOCK)
    fdatasync, first = os.fdatasync, tmp_path / FIRST

    def leave_and_delete(descriptor: int) -> None:
        fdatasync(descriptor)
        if first.exists():
            journal.begin_stretch()
            first.unlink()

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", leave_and_delete)
        journal.sync()
    assert journal.writable
    journal.append_frames(frames(10, 10), CLOCK)
    assert journal._log.segment is not None
    assert journal._log.segment.segment.path.name == "00000002.journal"
    journal.sync()
    assert "00000001.journal could not be synced" in journal.trouble
    assert numbers_of(send_all(journal)) == list(range(10, 20))
    assert journal.books()["can0"] == Books(20, 10, 0, 0, {"damage": 10})


def test_whether_a_file_has_its_name_where_that_cannot_be_seen(tmp_path: Path) -> None:
    """Then it is taken to be there for as long as it has any name at all."""
    path = tmp_path / "file"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    assert is_in_place(descriptor, path)
    (elsewhere := tmp_path / "elsewhere").hardlink_to(path)
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(OSError, match="Too many levels"):
        path.stat()
    assert is_in_place(descriptor, path)
    elsewhere.unlink()
    assert not is_in_place(descriptor, path)
    os.close(descriptor)
