"""What dm-log-writes wrote down, and what a disk may hold of it when the power goes.

The log is a super block and then entries, each a sector with its header and, behind it, what was written. It is in the
order in which writes were completed, but those without FUA only once a FLUSH came behind them, which then covers them
all. So up to the last FLUSH before a cut everything is on the disk, as is every write with FUA; of the other writes
behind it a disk with a cache may have any, and of each any of its sectors: that is drawn by lot.

Source: the kernel's drivers/md/dm-log-writes.c and Documentation/admin-guide/device-mapper/log-writes.rst.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator, Sequence
from enum import IntFlag
from pathlib import Path
from typing import NamedTuple

from tests.disk.devices import SECTOR_BYTES

MAGIC, VERSION = 0x6A736677736872, 1
END_MARK = "dm-log-writes-end"  # The target's own, when it is removed.
_SUPER = struct.Struct("<3QI")  # magic, version, entries, bytes of a sector
_ENTRY = struct.Struct("<4Q")  # sector, sectors, flags, bytes of the mark behind this header


class Flags(IntFlag):
    """What an entry is."""

    FLUSH = 1
    FUA = 2
    DISCARD = 4
    MARK = 8
    METADATA = 16


class Entry(NamedTuple):
    """One thing that happened to the disk."""

    flags: Flags
    offset: int
    data: bytes
    mark: str


def read_log(path: Path) -> list[Entry]:
    """All entries of a log device that is not written any more."""
    entries = []
    with path.open("rb") as log:
        magic, version, count, sector_bytes = _SUPER.unpack(log.read(_SUPER.size))
        assert (magic, version, sector_bytes) == (MAGIC, VERSION, SECTOR_BYTES)
        at = SECTOR_BYTES
        for _ in range(count):
            header = os.pread(log.fileno(), SECTOR_BYTES, at)
            sector, sectors, number, mark_bytes = _ENTRY.unpack_from(header)
            flags = Flags(number)
            at += SECTOR_BYTES
            data, mark = b"", ""
            if Flags.MARK in flags:
                mark = header[_ENTRY.size : _ENTRY.size + mark_bytes].rstrip(b"\0").decode()
            elif Flags.DISCARD not in flags:  # Its sectors are those discarded; it has no data.
                data = os.pread(log.fileno(), sectors * SECTOR_BYTES, at)
                at += len(data)
            if mark == END_MARK:
                continue
            entries.append(Entry(flags, sector * SECTOR_BYTES, data, mark))
    return entries


class Cut(NamedTuple):
    """The disk after a cut behind so many entries, and the last mark before it. The image lasts until the next cut."""

    entries_count: int
    image: bytearray
    mark: str
    unflushed_count: int  # writes that the disk need not have had


def cuts(base: bytes, entries: Sequence[Entry], at: Sequence[int], rng: random.Random) -> Iterator[Cut]:
    """The disk, which held `base` at first, cut at each of these numbers of entries, in rising order."""
    # Copied into, and not made anew: in a user-mode kernel a page's first use costs more than its copying.
    flushed, image, done, mark = bytearray(base), bytearray(base), 0, ""
    waiting: list[Entry] = []
    for count in at:
        for entry in entries[done:count]:
            if Flags.FLUSH in entry.flags:
                for write in waiting:
                    _write(flushed, write)
                waiting.clear()
            if entry.data:
                waiting.append(entry)
            mark = entry.mark or mark
        done = count
        image[:] = flushed
        survival = rng.choice((0.0, 0.5, 0.9, 1.0))
        for write in waiting:
            if Flags.FUA in write.flags or rng.random() < survival:
                _write(image, write)
            elif rng.random() < survival / 2:
                _write_some(image, write, rng)
        yield Cut(count, image, mark, sum(Flags.FUA not in write.flags for write in waiting))


def _write(image: bytearray, entry: Entry) -> None:
    image[entry.offset : entry.offset + len(entry.data)] = entry.data


def _write_some(image: bytearray, entry: Entry, rng: random.Random) -> None:
    for at in range(0, len(entry.data), SECTOR_BYTES):
        if rng.random() < 0.5:
            image[entry.offset + at : entry.offset + at + SECTOR_BYTES] = entry.data[at : at + SECTOR_BYTES]


def choose(entries: Sequence[Entry], count: int, rng: random.Random) -> list[int]:
    """Where to cut: half of them directly behind a FLUSH, a write with FUA or a mark, the others anywhere."""
    telling = [n + 1 for n, entry in enumerate(entries) if entry.flags & (Flags.FLUSH | Flags.FUA | Flags.MARK)]
    chosen = set(rng.sample(telling, min(count // 2, len(telling))))
    others = sorted(set(range(1, len(entries) + 1)) - chosen)
    return sorted(chosen | set(rng.sample(others, min(count - len(chosen), len(others)))))
