"""A disk that refuses writes for a while: recording goes on, it is said, and every frame is stored or counted."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from uuid import UUID

import pytest

from ingestd.journal import Journal, SessionInfo
from tests.disk.devices import DISKS, mapped, mounted, run
from tests.journals import CLOCK, frames, numbers_of, open_unrecovered, send_all

HEALTHY, BROKEN = f"linear {DISKS[0]} 0", "error"
SECONDS_MAX = 30.0

# Without a journal of its own ext4 goes on after an error; with one it is read-only until it is mounted anew.
MAKE = {
    "goes on by itself": ("mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-E", "lazy_itable_init=0"),
    "is mounted anew": ("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"),
}


class Numbered:
    """Appends frames, each with the next number."""

    def __init__(self) -> None:
        self.count = 0

    def append(self, journal: Journal, count: int = 100) -> None:
        """The next ones, in one record."""
        journal.append_frames(frames(self.count, count), CLOCK)
        self.count += count


@pytest.mark.slow
@pytest.mark.parametrize("file_system", list(MAKE))
def test_a_disk_that_refuses_writes(tmp_path: Path, file_system: str) -> None:
    """What was synced before is there, what comes when the disk is well again too; the rest is there or counted.

    Where a write was refused the disk gives back what lay there before: records of an earlier journal, which are no
    records of this one.
    """
    run(*MAKE[file_system], DISKS[0])
    with mounted(DISKS[0], tmp_path / "disk", "ext4") as folder:
        record_another(folder / "journal")
    run(*MAKE[file_system], DISKS[0])
    sent = Numbered()
    with mapped("faulty", HEALTHY) as device:
        with mounted(device.path, tmp_path / "disk", "ext4") as folder:
            journal = open_unrecovered(folder / "journal")
            journal.recover()
            for _ in range(20):
                sent.append(journal)
                journal.sync()
            synced = sent.count
            device.become(BROKEN)
            for _ in range(20):
                sent.append(journal)
                journal.sync()
            assert journal.trouble
            assert journal.books()["can0"].received == sent.count
            assert journal.books()["can0"].balanced
            device.become(HEALTHY)
            if file_system == "goes on by itself":
                records_until_writable(journal, sent)
                assert journal.books()["can0"].balanced
            journal.close(ended=False)
        with mounted(device.path, tmp_path / "disk", "ext4") as folder:
            journal = open_unrecovered(folder / "journal")
            journal.recover()
            again = sent.count
            sent.append(journal)
            journal.sync()
            assert not journal.trouble
            found = numbers_of(send_all(journal))
            books = journal.books()["can0"]
            journal.close(ended=True)
    assert found == sorted(set(found))
    assert set(found) >= {*range(synced), *range(again, sent.count)}
    if file_system == "goes on by itself":
        assert found[-200:] == list(range(sent.count - 200, sent.count)), "appended and synced since it is well"
        assert books.received == sent.count
        assert books.received == len(found) + sum(books.dropped.values())
    assert books.balanced
    assert books.pending == 0
    assert Counter(books.dropped).keys() <= {"journal", "damage"}


def record_another(folder: Path) -> None:
    """A journal with more records than that of the test will have, in segments with the same numbers."""
    journal = open_unrecovered(folder, session=SessionInfo(UUID(int=7), {}), segments_max=256)
    for number in range(2_000):
        journal.append_frames(frames(number * 100, 100, "earlier"), CLOCK)
        if number % 20 == 0:
            journal.sync()
    journal.close(ended=True)


def records_until_writable(journal: Journal, sent: Numbered) -> None:
    """Go on until the disk takes frames again, and a sync has made them durable."""
    deadline = time.monotonic() + SECONDS_MAX
    while True:
        sent.append(journal)
        journal.sync()
        if journal.writable:
            break
        assert time.monotonic() < deadline, journal.trouble
        time.sleep(0.05)
    sent.append(journal)
    journal.sync()
    assert journal.writable
