"""A disk with blocks that it can no longer read: what is in them is lost and counted, and nothing beside them.

The header of a segment is damaged as well: what it said is to be had from records beside the bad blocks.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ingestd.errors import IngestdError
from ingestd.journal import Journal, Record, reader
from ingestd.journal.inspection import recorded
from ingestd.journal.verification import verify
from ingestd.model import Books
from tests.disk.devices import DISK_BYTES, DISKS, SECTOR_BYTES, mapped, mounted, run
from tests.journal_damages import LAST, MIDDLE, Numbers, flip, held, make, numbers, placed
from tests.journals import CLOCK, frames, kill, numbers_of, open_journal, open_unrecovered, send_all

BLOCK_BYTES = 4096
FIBMAP = 1  # linux/fs.h
MAKE = ("mkfs.ext4", "-q", "-F", "-b", str(BLOCK_BYTES), "-E", "lazy_itable_init=0,lazy_journal_init=0")


def table(bad: set[int]) -> str:
    """The disk as it is, but for blocks that cannot be read."""
    lines, sectors = [], BLOCK_BYTES // SECTOR_BYTES
    at = 0
    for end in [*sorted(block * sectors for block in bad), DISK_BYTES // SECTOR_BYTES]:
        lines += [f"{at} {end - at} linear {DISKS[0]} {at}", f"{end} {sectors} error"]
        at = end + sectors
    return "\n".join(lines[:-1])


def block_of(path: Path, index: int) -> int:
    """Which block of the disk a block of a file is."""
    with path.open("rb") as file:
        return int(struct.unpack("i", fcntl.ioctl(file, FIBMAP, struct.pack("i", index)))[0])


@contextlib.contextmanager
def journal_on_bad_blocks(
    tmp_path: Path, *places: tuple[str, int]
) -> Iterator[tuple[Path, int, Numbers, Callable[[], None]]]:
    """A journal of which blocks (segment, index) cannot be read; its frames, those in the blocks, and what heals it."""
    run(*MAKE, DISKS[0])
    with mapped("bad", table(set())) as device:
        with mounted(device.path, tmp_path / "disk", "ext4") as folder:
            count = make(folder / "journal")
            flip(folder / "journal" / MIDDLE, 30)  # The header can only be had by reading what is behind it.
            run("sync")
            hit = [
                each.record
                for name, index in places
                for each in placed(folder / "journal" / name)
                if each.offset < (index + 1) * BLOCK_BYTES and each.end > index * BLOCK_BYTES
            ]
            bad = {block_of(folder / "journal" / name, index) for name, index in places}
        device.become(table(bad))
        with mounted(device.path, tmp_path / "disk", "ext4") as folder:
            for name, index in places:
                with (folder / "journal" / name).open("rb") as file, pytest.raises(OSError, match="Input/output error"):
                    os.pread(file.fileno(), BLOCK_BYTES, index * BLOCK_BYTES)
            yield folder / "journal", count, numbers(hit), lambda: device.become(table(set()))


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Journal]:
    """The journal, for as long as it takes."""
    journal = open_journal(folder)
    try:
        yield journal
    finally:
        kill(journal)


@pytest.mark.slow
@pytest.mark.parametrize(
    "places",
    [((MIDDLE, 5),), ((MIDDLE, 3), (MIDDLE, 9)), ((MIDDLE, 7), (LAST, 2))],
    ids=["one", "two", "the newest, too"],
)
def test_what_lies_beside_bad_blocks_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: tuple[tuple[str, int], ...]
) -> None:
    """A block costs the records that touch it, to the frame, and not its segment; `verify` and `export` go past it."""
    monkeypatch.setattr(reader, "REFUSED_SECONDS", 0.0)
    with journal_on_bad_blocks(tmp_path, *places) as (folder, count, lost, _):
        told: Counter[str] = sum((each.frames_lost for each in verify(folder).findings), Counter())
        assert told == {source: len(gone) for source, gone in lost.items()}
        exported, sent = list(recorded(folder, "", lambda _: None)), list[Record]()
        with opened(folder) as journal:
            with pytest.raises(IngestdError, match=f"{MIDDLE} cannot be read now: Input/output error"):
                send_all(journal, sent)
            while not all(stretch.acknowledged >= stretch.last_sequence for stretch in journal.stretches()):
                with contextlib.suppress(IngestdError):  # Of the next segment.
                    send_all(journal, sent)
            for source in ("can0", "gps"):
                there = [number for number in range(count) if number not in lost[source]]
                assert numbers_of(sent, source) == numbers_of(exported, source) == there
                assert journal.books()[source] == Books(count, len(there), 0, 0, {"damage": len(lost[source])})
            assert f"{MIDDLE} can be read in part: Input/output error" in journal.notices()
            journal.append_frames(frames(count, 5), CLOCK)
            assert numbers_of(send_all(journal)) == list(range(count, count + 5))


@pytest.mark.slow
def test_a_disk_that_can_read_again(tmp_path: Path) -> None:
    """What it refuses now may be had later: nothing is given up for a fault that passes."""
    sent: list[Record] = []
    with journal_on_bad_blocks(tmp_path, (MIDDLE, 5)) as (folder, count, _, heal), opened(folder) as journal:
        for _ in range(3):
            with pytest.raises(IngestdError, match="cannot be read now: Input/output error"):
                send_all(journal, sent)
        heal()
        send_all(journal, sent)
        for source in ("can0", "gps"):
            assert numbers_of(sent, source) == list(range(count))
            assert journal.books()[source] == Books(count, count, 0, 0)


@pytest.mark.slow
def test_a_segment_that_the_file_system_has_lost(tmp_path: Path) -> None:
    """Its name is there, and nothing more: what was in it is counted, the rest is sent, and recording goes on."""
    run(*MAKE, DISKS[0])
    with mounted(DISKS[0], tmp_path / "disk", "ext4") as folder:
        count = make(folder / "journal")
        lost = held(folder / "journal" / MIDDLE)
    run("debugfs", "-w", "-R", f"clri /journal/{MIDDLE}", DISKS[0])
    with mounted(DISKS[0], tmp_path / "disk", "ext4") as folder:
        with pytest.raises(OSError, match="Structure needs cleaning"):
            (folder / "journal" / MIDDLE).stat()
        assert Journal.peek(folder / "journal") is not None
        journal = open_unrecovered(folder / "journal")
        assert journal.recover().warnings == [f"{MIDDLE} is not the journal's; it is left alone"]
        sent = send_all(journal)
        for source in ("can0", "gps"):
            there = [number for number in range(count) if number not in lost[source]]
            assert numbers_of(sent, source) == there
            assert journal.books()[source] == Books(count, len(there), 0, 0, {"damage": len(lost[source])})
        journal.append_frames(frames(count, 5), CLOCK)
        assert numbers_of(send_all(journal)) == list(range(count, count + 5))
        kill(journal)
