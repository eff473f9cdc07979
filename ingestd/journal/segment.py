"""Segments: the files of a journal, each a header and then records to where the last one ends.

`NNNNNNNN.journal` holds records of a stretch, `rejected-NNNNNNNN.journal` those that PostgreSQL can never take,
`damaged-NNNNNNNN-OFFSET` bytes of a segment that were no record. Numbers only go up. A segment is allocated whole
before it is used, so that a disk that fills up is noticed then and not in the middle of a frame.

Limits: the header takes `HEADER_BYTES`; the id of a machine at most `MACHINE_BYTES_MAX` of UTF-8.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple
from zlib import crc32

from ingestd.errors import IngestdError
from ingestd.journal.record import Kind, Origin, Record, any_set, walk

MAGIC = b"INGESTDJ"
VERSION = 2  # the one that is written
HEADER_BYTES = 256
MACHINE_BYTES_MAX = 64
BLOCK_BYTES = 4096  # in which a disk is asked that refuses to give all at once
NO_STRETCH = bytes(16)  # what files of rejected records have instead of a stretch: they are of any
REFUSED = b"\xff"  # stands for each byte that it does not give: never a record, and not the zeros behind the last one

# magic, CRC-32 of the rest up to ENDED_AT, version, bytes of the machine id,
# segment, stretch id, ordinal in the stretch, boot id, session id, first sequence, machine id
_HEADER = struct.Struct("<8sIHHQ16sI16s16sQ64s")
_CHECKED_FROM = 12
_ENDED = struct.Struct("<4sIQ")  # magic, CRC-32 of the last sequence, last sequence; written in place by a clean end
_ENDED_MAGIC = b"ENDD"
ENDED_AT = HEADER_BYTES - _ENDED.size

_NAME = re.compile(r"(rejected-)?(\d{8,})\.journal")
_ASIDE = re.compile(r"damaged-\d+-\d+")


class Unreadable(IngestdError):
    """A file of the journal's folder is no segment that this version can read; it is left as it is."""


class DamagedHeader(Unreadable):
    """A segment's header is not as it was written, and no record in it says what it said."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the header of {name} is damaged", "its records cannot be told apart; the file is kept")


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """What the first bytes of a segment say."""

    number: int
    stretch: bytes
    ordinal: int  # of the segment in its stretch, from 1
    origin: Origin  # of its first record
    sequence_first: int  # of the first numbered record in it, or of the next one if there is none
    machine_id: str
    ended: bool = False
    version: int = VERSION

    @property
    def stretch_id(self) -> str:
        """The stretch as people and feeds know it."""
        return self.stretch.hex()

    @property
    def seed(self) -> int:
        """What the checksums of its records begin with.

        A disk that has lost a write may give back what lay there before: records of a segment that was deleted, all in
        order but for this.
        """
        return self.number & 0xFFFFFFFF if self.version > 1 else 0

    def pack(self) -> bytes:
        """The bytes of a header, without the mark of a clean end."""
        machine = self.machine_id.encode()
        packed = _HEADER.pack(
            MAGIC, 0, self.version, len(machine), self.number, self.stretch, self.ordinal,
            self.origin.boot, self.origin.session, self.sequence_first, machine,
        ).ljust(ENDED_AT, b"\0")  # fmt: skip
        checksum = crc32(packed[_CHECKED_FROM:])
        return (packed[:8] + struct.pack("<I", checksum) + packed[_CHECKED_FROM:]).ljust(HEADER_BYTES, b"\0")

    @classmethod
    def unpack(cls, data: bytes, name: str) -> SegmentHeader:
        """Raises DamagedHeader, and Unreadable for a version that this program has no reader for."""
        if len(data) < HEADER_BYTES or data[:8] != MAGIC:
            raise DamagedHeader(name)
        _, checksum, version, *_ = _HEADER.unpack_from(data)
        if crc32(data[_CHECKED_FROM:ENDED_AT]) != checksum:  # First of all: a flipped bit makes no other version.
            raise DamagedHeader(name)
        if version not in READERS:
            raise Unreadable(
                f"{name} has format version {version}, this ingestd knows {', '.join(map(str, READERS))}",
                "the file is kept: an ingestd that knows the version can send it",
            )
        return READERS[version](data, name)

    @classmethod
    def _unpack_1(cls, data: bytes, name: str) -> SegmentHeader:
        """Version 1 or 2, its checksum being right."""
        _, _, version, machine_bytes, number, stretch, ordinal, boot, session, first, machine = _HEADER.unpack_from(
            data
        )
        if machine_bytes > MACHINE_BYTES_MAX:
            raise DamagedHeader(name)
        mark, mark_checksum, sequence = _ENDED.unpack_from(data, ENDED_AT)
        ended = mark == _ENDED_MAGIC and crc32(struct.pack("<Q", sequence)) == mark_checksum
        machine_id = machine[:machine_bytes].decode("utf-8", "replace")
        return cls(number, stretch, ordinal, Origin(session, boot), first, machine_id, ended, version)


# One for each version that was ever written. Magic, checksum and version are where they are in all of them.
READERS: dict[int, Callable[[bytes, str], SegmentHeader]] = {1: SegmentHeader._unpack_1, 2: SegmentHeader._unpack_1}


def pack_ended(sequence_last: int) -> bytes:
    """The mark of a clean end, to be written at `ENDED_AT`."""
    return _ENDED.pack(_ENDED_MAGIC, crc32(struct.pack("<Q", sequence_last)), sequence_last)


def segment_name(number: int, *, rejected: bool = False) -> str:
    """The name of a segment's file."""
    return f"{'rejected-' if rejected else ''}{number:08d}.journal"


class Name(NamedTuple):
    """A file in the folder: a segment, a file of rejected records, or (number 0) bytes kept aside."""

    path: Path
    number: int
    rejected: bool
    bytes: int


def list_folder(folder: Path) -> tuple[list[Name], list[str]]:
    """The journal's files, by number, and the names of files that are not its own."""
    ours, foreign = [], []
    for entry in os.scandir(folder):
        try:
            status = entry.stat()
        except OSError as error:
            if not isinstance(error, FileNotFoundError) or entry.is_symlink():
                foreign.append(entry.name)  # A link to nowhere, or the file system does not know any more what it is.
            continue  # Else it was removed since.
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):  # A folder, a pipe that nobody writes to.
            foreign.append(entry.name)
        elif match := _NAME.fullmatch(entry.name):
            ours.append(Name(Path(entry.path), int(match[2]), bool(match[1]), size))
        elif _ASIDE.fullmatch(entry.name):
            ours.append(Name(Path(entry.path), 0, False, size))
        elif entry.name != "lock":
            foreign.append(entry.name)
    return sorted(ours, key=lambda name: name.number), sorted(foreign)


def read_header(path: Path) -> SegmentHeader | None:
    """The header of a segment, or None if it was allocated and never used. Raises Unreadable."""
    try:
        with path.open("rb") as file:
            data = file.read(HEADER_BYTES)
            is_used = any_set(data) or any_set(file.read())
        if not is_used:
            return None
        try:
            header = SegmentHeader.unpack(data, path.name)
        except DamagedHeader:
            header = _rebuild(path)
    except OSError as error:
        raise Unreadable(f"{path} cannot be read: {error.strerror}") from error
    match = _NAME.fullmatch(path.name)
    if match is None or int(match[2]) != header.number:
        raise Unreadable(
            f"{path.name} is a copy of segment {header.number}",
            "it is left alone; give it that name if there is no such file, or move it elsewhere",
        )
    return header


def _rebuild(path: Path) -> SegmentHeader:
    """The header as the STATE record behind it repeats it. Raises DamagedHeader, OSError."""
    for item in read_segment(path, on_refusal=ignore):
        if isinstance(item, Record) and item.kind is Kind.STATE and "segment" in (state := item.json()):
            says = state["segment"]
            stretch = bytes.fromhex(says["stretch"])
            return SegmentHeader(
                says["number"], stretch, says["ordinal"], item.origin, says["sequence_first"], says["machine_id"],
                version=says.get("version", 1),
            )  # fmt: skip
    raise DamagedHeader(path.name)


class Damage(NamedTuple):
    """Bytes of a segment that are no record."""

    path: Path
    offset: int
    data: bytes
    at_end: bool  # nothing that can be read follows: in the last segment of a stretch, what a power cut leaves

    def __str__(self) -> str:
        return f"{self.path.name} at {self.offset}: {len(self.data)} bytes"


class Replaced(Unreadable):
    """In the place of a segment lies another one."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} was replaced by another file", "what was in it is lost; the other file is left alone")


def ignore(_: str) -> None:
    """For `on_refusal`: nobody is to know."""


def read_segment(
    path: Path,
    start: int = HEADER_BYTES,
    end: int | None = None,
    *,
    header: SegmentHeader | None = None,
    on_refusal: Callable[[str], None] | None = None,
) -> Iterator[Record | Damage]:
    """The records of a segment from `start`, and what lies between them. Raises OSError, at once.

    Without `end` the file is read to where its records end. All of it is in memory while its records are. With
    `header`, raises Replaced where another segment has taken the place of the one that began so. With `on_refusal`,
    blocks that the disk cannot read are damage like any other, and it is called with what the disk says.
    """
    with path.open("rb") as file:
        head = _read(file, 0, HEADER_BYTES, on_refusal)
        if header is not None and is_another(head, header):
            raise Replaced(path.name)
        data = _read(file, start, end, on_refusal)
    seed, origin = _marks(path, head, data) if header is None else (header.seed, header.origin)
    return _items(path, start, data, seed, origin)


def _marks(path: Path, head: bytes, data: bytes) -> tuple[int, Origin | None]:
    """The seed of a segment's records and, unless they may be of several, their origin."""
    try:
        header = SegmentHeader.unpack(head, path.name)
    except Unreadable:
        match = _NAME.fullmatch(path.name)
        seed = int(match[2]) & 0xFFFFFFFF if match else 0
        return (seed if any(isinstance(item, Record) for item in walk(data, seed)) else 0), None
    return header.seed, None if header.stretch == NO_STRETCH else header.origin


def _read(file: BinaryIO, start: int, end: int | None, on_refusal: Callable[[str], None] | None) -> bytes:
    try:
        file.seek(start)
        return file.read() if end is None else file.read(end - start)
    except OSError as error:
        if error.errno != errno.EIO or on_refusal is None:
            raise
        on_refusal(error.strerror or str(error))
    size = os.fstat(file.fileno()).st_size
    return _read_around(file.fileno(), start, size if end is None else min(end, size))


def _read_around(descriptor: int, start: int, end: int) -> bytes:
    """The bytes that the disk gives, and REFUSED for those of the blocks that it does not. Raises OSError."""
    data = bytearray()
    while (at := start + len(data)) < end:
        size = min(BLOCK_BYTES - at % BLOCK_BYTES, end - at)
        try:
            block = os.pread(descriptor, size, at)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            block = REFUSED * size
        if not block:
            break  # It was cut meanwhile.
        data += block
    return bytes(data)


def is_another(data: bytes, header: SegmentHeader) -> bool:
    """Whether these are the first bytes of another segment. Where they are damaged nobody knows, and it is ours."""
    try:
        there = SegmentHeader.unpack(data, "")
    except DamagedHeader:
        return False
    except Unreadable:
        return True
    return (there.stretch, there.number) != (header.stretch, header.number)


def _items(path: Path, start: int, data: bytes, seed: int, origin: Origin | None) -> Iterator[Record | Damage]:
    for item in walk(data, seed, origin):
        if isinstance(item, Record):
            yield item
        else:
            at_end, hole = item.end == len(data), data[item.start : item.end]
            yield Damage(path, start + item.start, hole.rstrip(b"\0") if at_end else hole, at_end)


def allocate(path: Path, size: int) -> int:
    """A new file with that many bytes set aside for it, open for writing. Raises OSError; then there is no file."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
    try:
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            os.ftruncate(descriptor, size)  # A file system that cannot: then a full disk shows when it is written.
    except OSError:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        raise
    return descriptor


def is_in_place(descriptor: int, path: Path) -> bool:
    """Whether an open file still has its name; where that cannot be seen, whether it has any."""
    status = os.fstat(descriptor)
    try:
        return os.path.samestat(status, path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return status.st_nlink > 0


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of `data`, however little the kernel takes at a time. Raises OSError."""
    written = os.pwrite(descriptor, data, offset)
    while written < len(data):
        more = os.pwrite(descriptor, memoryview(data)[written:], offset + written)
        if not more:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written += more


def sync_folder(folder: Path) -> None:
    """Make names durable: files made and removed. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
