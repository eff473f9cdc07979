"""Vector BLF: objects in (mostly compressed) containers.

The layouts are those of Vector's binlog API (binlog_objects.h), as python-can reads them; here whole containers become
columns, stamps stay integers, and a bad object costs no more than itself.

Limits: an object or container that claims more than 64 MiB is damage. Objects other than frames and error frames are
skipped.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ingestd.errors import CaptureError
from ingestd.model import Flag, FrameBatch, Int64s, UInt8s
from ingestd.sources.captures.base import (
    EXTENDED_ID_MAX,
    FD_LENGTHS,
    STAMP_NS_MAX,
    STANDARD_ID_MAX,
    SUPPORTED_HINT,
    Capture,
    CaptureBatch,
    Options,
    Sources,
)
from ingestd.sources.captures.dates import zoned_ns

OBJECT_BYTES_MAX = 64 << 20  # Vector's containers have about 128 kB.
ObjectPlaces = dict[int, list[tuple[int, int]]]  # position and header size of the objects of each type
_SEARCH_BYTES = 1 << 16

_FILE_HEADER = struct.Struct("<4sL32x8H")
_OBJECT_HEADER = struct.Struct("<4sHHLL")  # signature, header size, header version, object size, type
_CONTAINER = 10
_CONTAINER_HEADER_BYTES = 16  # Its first two are the compression.
_STORED, _DEFLATED = b"\0\0", b"\2\0"
_STAMPED_HEADER = np.dtype(
    {"names": ["size", "flags", "stamp"], "formats": ["<u4", "<u4", "<u8"], "offsets": [8, 16, 24], "itemsize": 32}
)
_TEN_MICROSECONDS = 1  # Object flag; otherwise the unit is a nanosecond.
_EXTENDED = 0x80000000
_FRAME_OBJECT_BYTES_MAX = 4096  # A frame object has 48 to some 200 bytes; more is a damaged size.


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a frame object holds what, behind its header. Names of columns that are absent read as zero."""

    body: np.dtype[np.void]
    flag_bits: dict[str, dict[int, int]]  # column → its bit → Flag
    data_offset: int
    data_bytes: int
    is_error: bool = False

    def allows(self, header_size: int, size: int) -> bool:
        """Whether an object of these sizes has room for what its type has, and is not much larger."""
        room = header_size >= _STAMPED_HEADER.itemsize and header_size + self.data_offset <= size
        return room and size <= _FRAME_OBJECT_BYTES_MAX


def _body(itemsize: int, **columns: tuple[int, str]) -> np.dtype[np.void]:
    return np.dtype(
        {
            "names": list(columns),
            "formats": [kind for _, kind in columns.values()],
            "offsets": [offset for offset, _ in columns.values()],
            "itemsize": itemsize,
        }
    )


_CLASSIC_FLAGS = {0x01: int(Flag.TRANSMITTED), 0x80: int(Flag.REMOTE)}
_CLASSIC = _Layout(
    _body(8, channel=(0, "<u2"), flags=(2, "u1"), length=(3, "u1"), id=(4, "<u4")), {"flags": _CLASSIC_FLAGS}, 8, 8
)
_LAYOUTS: dict[int, _Layout] = {
    1: _CLASSIC,  # CAN_MESSAGE
    86: _CLASSIC,  # CAN_MESSAGE2
    2: _Layout(_body(4, channel=(0, "<u2")), {}, 4, 0, is_error=True),  # CAN_ERROR
    73: _Layout(  # CAN_ERROR_EXT
        _body(24, channel=(0, "<u2"), length=(10, "u1"), id=(16, "<u4")), {}, 24, 8, is_error=True
    ),
    100: _Layout(  # CAN_FD_MESSAGE
        _body(20, channel=(0, "<u2"), flags=(2, "u1"), id=(4, "<u4"), fd=(13, "u1"), length=(14, "u1")),
        {"flags": _CLASSIC_FLAGS, "fd": {1: int(Flag.FD), 2: int(Flag.BITRATE_SWITCH), 4: int(Flag.ERROR_STATE)}},
        20,
        64,
    ),
    101: _Layout(  # CAN_FD_MESSAGE_64
        _body(40, channel=(0, "u1"), length=(2, "u1"), id=(4, "<u4"), fd=(12, "<u4"), sent=(34, "u1"), ext=(35, "u1")),
        {
            "fd": {
                0x0010: int(Flag.REMOTE),
                0x1000: int(Flag.FD),
                0x2000: int(Flag.BITRATE_SWITCH),
                0x4000: int(Flag.ERROR_STATE),
            },
            "sent": {0xFF: int(Flag.TRANSMITTED)},
        },
        40,
        64,
    ),
}


_TABLE = np.dtype(
    [
        ("ts_ns", np.int64),
        ("id", np.uint32),
        ("flags", np.uint8),
        ("length", np.uint16),
        ("channel", np.uint16),
        ("good", np.bool_),
        ("data", np.uint8, (64,)),
    ]
)


class BlfCapture(Capture):
    """Vector BLF. Objects other than frames and error frames are skipped."""

    kind = "blf"

    def __init__(self, path: Path, options: Options) -> None:
        super().__init__(path, options)
        self._set_clock(self._header()[1])

    def _header(self) -> tuple[int, int | None]:
        """Size of the file header and the date of the measurement, None if it has none."""
        with self.path.open("rb") as file:
            raw = file.read(_FILE_HEADER.size)
        if len(raw) < _FILE_HEADER.size or raw[:4] != b"LOGG":
            raise CaptureError(f"{self.path} is not a BLF file, or its header is cut off", SUPPORTED_HINT)
        _, size, year, month, _weekday, day, hour, minute, second, ms = _FILE_HEADER.unpack(raw)
        date_ns = zoned_ns((year, month, day, hour, minute, second), ms * 1_000_000, self._options.timezone)
        return max(size, _FILE_HEADER.size), date_ns

    def _pieces(self) -> Iterator[CaptureBatch]:
        sources = Sources(self._options.source_names)
        tail, tail_offset, position = b"", 0, 0
        for offset, data, position, whole in self._containers():
            if data is None:  # Lost: what was begun before it cannot be finished.
                if tail.strip(b"\0"):
                    self.damage.add_offset(tail_offset, "an object continues in a container that is lost")
                tail = b""
                continue
            found, rest = self._objects(tail + data, offset)
            if found:
                yield self._batch(tail + data, found, offset, sources, position)
            tail, tail_offset = rest if whole else b"", offset  # The cut has been counted; it is one damage.
        while tail.strip(b"\0"):  # The last object is cut off, or its size is wrong and others hide behind it.
            self.damage.add_offset(tail_offset, "the object is cut off")
            tail = tail[max(tail.find(b"LOBJ", 4), 0) or len(tail) :]
            found, rest = self._objects(tail, tail_offset)
            if found:
                yield self._batch(tail, found, tail_offset, sources, position)
            tail = rest

    def _containers(self) -> Iterator[tuple[int, bytes | None, int, bool]]:
        """Offset, contents (None if they are lost), end and wholeness of each container, and of objects outside any."""
        with self.path.open("rb") as file:
            offset = self._header()[0]
            while True:
                file.seek(offset)
                head = file.read(_OBJECT_HEADER.size)
                if not head.strip(b"\0") and len(head) < _OBJECT_HEADER.size:
                    return
                if len(head) < _OBJECT_HEADER.size or head[:4] != b"LOBJ":
                    at = head.find(b"LOBJ")
                    if not 0 < at < 4:  # Up to 3 bytes of padding are right.
                        self.damage.add_offset(offset, "no object where one should be")
                        yield offset, None, offset, False
                    found = _find(file, b"LOBJ", offset + 1)
                    if found is None:
                        return
                    offset = found
                    continue
                size, kind = _OBJECT_HEADER.unpack(head)[3:]
                body = file.read(max(size - len(head), 0)) if size <= OBJECT_BYTES_MAX else b""
                if len(head) + len(body) < max(size, 32):
                    yield offset, *self._cut_container(file, offset, kind), False
                    found = _find(file, b"LOBJ", offset + 4) if kind == _CONTAINER or size < 32 else None
                    if found is None:
                        return
                    offset = found
                    continue
                data = self._unpack(body, offset) if kind == _CONTAINER else head + body
                offset += size
                yield offset - size, data, offset, True

    def _cut_container(self, file: BinaryIO, offset: int, kind: int) -> tuple[bytes | None, int]:
        """What can be had of an object whose size reaches behind the end of the file, or is nonsense, and its end.

        The objects of a container that is not compressed are found by their signatures.
        """
        self.damage.add_offset(offset, "the container is cut off or its size is wrong")
        following = _find(file, b"LOBJ", offset + 4)
        file.seek(offset + _OBJECT_HEADER.size)
        body = file.read(OBJECT_BYTES_MAX if following is None else following - file.tell())
        packed = kind == _CONTAINER and body[:2] == _DEFLATED
        return _inflate(body)[0] if packed else None, file.tell()

    def _unpack(self, body: bytes, offset: int) -> bytes | None:
        """The contents of a whole container; None, and one damage, when they are lost."""
        if body[:2] == _STORED:
            return body[_CONTAINER_HEADER_BYTES:]
        data, problem = _inflate(body) if body[:2] == _DEFLATED else (None, "unknown compression")
        if problem:
            self.damage.add_offset(offset, f"the container cannot be unpacked ({problem})")
            return None
        return data

    def _objects(self, data: bytes, offset: int) -> tuple[ObjectPlaces, bytes]:
        """Position and header size of the frame objects by type, and the bytes of an object that is not yet whole.

        Objects are padded to 4 bytes, some writers' to 8; anything else between them is damage.
        """
        found: ObjectPlaces = {}
        position, end = 0, len(data)
        unpack, header_bytes = _OBJECT_HEADER.unpack_from, _OBJECT_HEADER.size
        while position + header_bytes <= end:
            signature, header_size, _, size, kind = unpack(data, position)
            if signature != b"LOBJ":
                at = data.find(b"LOBJ", position)
                if not 0 < at - position < 8 and data[position : at if at >= 0 else None].strip(b"\0"):
                    self.damage.add_offset(offset, f"no object at {position} bytes into the container")
                if at < 0:
                    return found, data[-3:] if position + 3 < end else data[position:]
                position = at
                continue
            layout = _LAYOUTS.get(kind)
            if not header_bytes <= size <= OBJECT_BYTES_MAX or (layout and not layout.allows(header_size, size)):
                self.damage.add_offset(offset, f"an object of impossible size, {position} bytes into the container")
                position += 4
                continue
            if position + size > end:
                break
            if layout is not None:
                found.setdefault(kind, []).append((position, header_size))
            position += size
        return found, data[position:]

    def _batch(self, data: bytes, found: ObjectPlaces, offset: int, sources: Sources, position: int) -> CaptureBatch:
        """The frames of the objects found, in the order they have in `data`."""
        buffer = np.frombuffer(data + bytes(256), np.uint8)  # So that a gather of a whole layout stays inside.
        parts = [_parse_objects(buffer, _LAYOUTS[kind], np.array(places)) for kind, places in found.items()]
        at = np.concatenate([np.array(places)[:, 0] for places in found.values()])
        order = np.argsort(at, kind="stable")
        table = np.concatenate(parts)[order]
        good = table["good"]
        for _ in range(int(np.count_nonzero(~good))):
            self.damage.add_offset(offset, "a frame with an impossible stamp or length")
        table = table[good]
        frames = FrameBatch(
            "", table["ts_ns"], table["id"], table["flags"], table["length"], np.ascontiguousarray(table["data"])
        )
        channels = np.maximum(table["channel"].astype(np.int64), 1) - 1
        return CaptureBatch(frames, sources.indices(channels), sources.seen(), position)


def _inflate(body: bytes) -> tuple[bytes | None, str]:
    """What a compressed container holds, as far as it goes, and what is wrong with it, if anything is."""
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(body[_CONTAINER_HEADER_BYTES:], OBJECT_BYTES_MAX)
    except zlib.error as error:
        return None, str(error)
    return data, "" if unpacker.eof else "the stream does not end"


def _gather(buffer: UInt8s, start: Int64s, dtype: np.dtype[np.void]) -> NDArray[np.void]:
    items: NDArray[np.void] = buffer[start[:, None] + np.arange(dtype.itemsize)].view(dtype)[:, 0]
    return items


def _parse_objects(buffer: UInt8s, layout: _Layout, places: Int64s) -> NDArray[np.void]:
    """Rows of `_TABLE` from objects of one type; places[n, 2] are positions and header sizes."""
    header = _gather(buffer, places[:, 0], _STAMPED_HEADER)
    start = places.sum(axis=1)
    body = _gather(buffer, start, layout.body)
    has = layout.body.names or ()
    table = np.zeros(len(places), _TABLE)
    number = body["id"] if "id" in has else np.zeros(len(places), np.uint32)
    # Some writers leave the bit out that says so, but an id of more than 11 bits can only be an extended one.
    extended = ((number & np.uint32(_EXTENDED)) != 0) | ((number & np.uint32(EXTENDED_ID_MAX)) > STANDARD_ID_MAX)
    flags = np.where(extended, np.uint8(Flag.EXTENDED), np.uint8(0))
    for column, bits in layout.flag_bits.items():
        for bit, flag in bits.items():
            flags |= np.where((body[column] & bit) != 0, np.uint8(flag), np.uint8(0))
    if layout.is_error:
        flags |= np.uint8(Flag.ERROR)
    length = body["length"].astype(np.uint16) if "length" in has else np.zeros(len(places), np.uint16)
    if layout.data_bytes <= 8:
        length = np.minimum(length, np.uint16(layout.data_bytes))  # DLC 9 to 15 of a classic frame means 8 bytes.
    length[(flags & Flag.REMOTE) != 0] = 0
    unit = np.where(header["flags"] == _TEN_MICROSECONDS, np.uint64(10_000), np.uint64(1))
    table["good"] = (header["stamp"] <= np.uint64(STAMP_NS_MAX) // unit) & np.isin(length, list(FD_LENGTHS))
    table["ts_ns"] = (header["stamp"] * unit).astype(np.int64)
    table["id"] = number & np.uint32(EXTENDED_ID_MAX)
    table["flags"], table["length"], table["channel"] = flags, length, body["channel"]
    # A writer may store fewer bytes than the length says; CANoe takes the others for zero (python-can issue 1905).
    end = header["size"].astype(np.int64)
    if "ext" in has:
        np.copyto(end, body["ext"], where=body["ext"] != 0)
    stored = np.clip(end - places[:, 1] - layout.data_offset, 0, length)
    if layout.data_bytes:
        byte = np.arange(layout.data_bytes)
        data = buffer[np.minimum((start + layout.data_offset)[:, None] + byte, len(buffer) - 1)]
        table["data"][:, : layout.data_bytes] = np.where(byte < stored[:, None], data, 0)
    return table


def _find(file: BinaryIO, signature: bytes, offset: int) -> int | None:
    """Offset of the next signature at or after `offset`, reading in blocks; the file's position is undefined after."""
    file.seek(offset)
    begin, held = offset, b""
    while block := file.read(_SEARCH_BYTES):
        held += block
        if (at := held.find(signature)) >= 0:
            return begin + at
        keep = len(signature) - 1
        begin += len(held) - keep
        held = held[-keep:]
    return None
