"""A recording process that is killed again and again, and disks without room: nothing that was told is lost.

The process says of every append that it has returned, through a pipe that outlives it. One folder goes through all
lives, so each begins with what the one before left: half a segment, one allocated ahead, a lock that nobody holds.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ingestd.journal import Journal
from ingestd.journal.holder import holder_of
from ingestd.model import Books
from tests.journals import CLOCK, SEGMENT_BYTES, frames, numbers_of, open_journal, read_all, send_all

KILLS = 20
SEGMENTS_MAX = 400

RECORDER = """
import os, sys, threading
from pathlib import Path
from tests.journals import CLOCK, frames, open_unrecovered
from ingestd.model import Event

first, batch = int(sys.argv[2]), int(sys.argv[3])
journal = open_unrecovered(Path(sys.argv[1]), segments_max=400)


def tend():
    journal.recover()
    while True:
        journal.sync()


threading.Thread(target=tend, daemon=True).start()
while True:
    journal.append_frames(frames(first, batch), CLOCK)
    first += batch
    os.write(1, b"%d\\n" % first)
    if first % (batch * 10) == 0:
        journal.append_event(Event("can0", "gap", first * 1000), CLOCK, lost={"overflow": 1})
    if first % (batch * 100) == 0:
        journal.begin_stretch()
"""


def record_and_kill(folder: Path, first: int, batch: int, told_min: int) -> int:
    """Let a process record from frame `first` on and kill it; up to which frame it said that it had."""
    with subprocess.Popen(
        [sys.executable, "-c", RECORDER, str(folder), str(first), str(batch)],
        stdout=subprocess.PIPE, cwd=Path(__file__).parents[2],
    ) as process:  # fmt: skip
        assert process.stdout is not None
        told = [process.stdout.readline() for _ in range(told_min)]
        process.kill()
        told += process.stdout.readlines()
    return int([line for line in told if line.endswith(b"\n")][-1])


def everything(journal: Journal) -> list[int]:
    """The numbers of all frames in the journal, sent or not, in order."""
    read = (read_all(journal, stretch.id) for stretch in journal.stretches())
    found = [(numbers_of(records), lost) for records, lost in read]
    assert not any(lost for _, lost in found)
    return [number for numbers, _ in found for number in numbers]


@pytest.mark.slow
def test_killed_while_recording(tmp_path: Path) -> None:
    """Every frame whose append had returned is there, once and in order, and the books say so after every kill."""
    rng = random.Random(20)
    first = committed = 0
    for _ in range(KILLS):
        told = record_and_kill(tmp_path, first, rng.choice([1, 7, 64, 500]), rng.randrange(1, 400))
        assert holder_of(tmp_path) is None
        journal = open_journal(tmp_path, segments_max=SEGMENTS_MAX)
        numbers = everything(journal)
        assert numbers == list(range(len(numbers)))
        assert len(numbers) >= told
        books = journal.books()["can0"]
        overflow = books.dropped.get("overflow", 0)
        dropped = {"overflow": overflow} if overflow else {}
        assert books == Books(len(numbers) + overflow, committed, len(numbers) - committed, 0, dropped)
        if rng.random() < 0.5:
            assert numbers_of(send_all(journal)) == numbers[committed:]
            committed = len(numbers)
        first = len(numbers)
        journal.close(ended=False)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes; only root can make one."""
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("a small file system needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_is_full(small_disk: Path) -> None:
    """Somebody else fills the disk: frames are counted, nothing raises, and there is room again when he is gone."""
    folder = small_disk / "journal"
    journal = open_journal(folder, segments_max=100)
    journal.append_frames(frames(0, 100), CLOCK)
    journal.sync()
    hog = small_disk / "hog"
    with hog.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)) == 4096:
            pass
    offered = 100
    while journal.writable:
        journal.append_frames(frames(offered, 100), CLOCK)
        journal.sync()
        offered += 100
    assert "No space left" in journal.trouble
    journal.append_frames(frames(offered, 100), CLOCK)
    offered += 100
    books = journal.books()["can0"]
    assert books == Books(offered, 0, offered - 200, 0, {"journal": 200})
    assert offered > 2 * SEGMENT_BYTES // 20  # Two segments were there before the disk was full.

    hog.unlink()
    journal._log._retry_at = 0.0
    journal.sync()
    assert journal.writable
    journal.append_frames(frames(offered, 100), CLOCK)
    sent = send_all(journal)
    assert numbers_of(sent) == [*range(offered - 200), *range(offered, offered + 100)]
    assert [record.lost() for record in sent if record.lost()] == [{"journal": 200}]
    books = journal.books()["can0"]
    assert books == Books(offered + 100, offered - 100, 0, 0, {"journal": 200})
    journal.close(ended=False)
    journal = open_journal(folder, segments_max=100)
    assert journal.books()["can0"] == books
    journal.close(ended=True)


def test_a_disk_smaller_than_the_budget(small_disk: Path) -> None:
    """What was sent gives way when the disk is full before the budget is: recording goes on."""
    journal = open_journal(small_disk / "journal", segments_max=1000)
    offered = 0
    for _ in range(300):
        for _ in range(10):
            journal.append_frames(frames(offered, 100), CLOCK)
            offered += 100
        send_all(journal)
        journal.sync()
    assert journal.bytes_written > 4 << 20
    assert journal.writable
    assert journal.books()["can0"] == Books(offered, offered, 0, 0)
    journal.close(ended=True)
