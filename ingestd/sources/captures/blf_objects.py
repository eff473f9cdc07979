"""The frame objects of Vector BLF: where they hold what, and columns out of them.

The layouts are those of Vector's binlog API (binlog_objects.h), as python-can reads them.

Limits: requests to transmit (direction TxRq) are left out silently: they are neither frames nor damage. One with the
bits of the transceiver (NERR, wake-up), which only a frame that was on the bus can have, is a frame.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingestd.model import Flag, Int64s, UInt8s
from ingestd.sources.captures.base import EXTENDED_ID_MAX, FD_LENGTHS, STAMP_NS_MAX, STANDARD_ID_MAX

SIGNATURE = b"LOBJ"
OBJECT_HEADER = struct.Struct("<4sHHLL")  # signature, header size, header version, object size, type
OBJECT_BYTES_MAX = 64 << 20  # Vector's containers have about 128 kB.
CONTAINER = 10
PADDING_MAX = 7  # Bytes between objects; more are damage.

ObjectPlaces = dict[int, Int64s]  # int64[objects, 2]: position and header size of the objects of each type
NO_PLACES: Int64s = np.zeros((0, 2), np.int64)
_HEADER = np.dtype(
    {"names": ["header_size", "size", "kind"], "formats": ["<u2", "<u4", "<u4"], "offsets": [4, 8, 12], "itemsize": 16}
)
_STAMPED_HEADER = np.dtype(
    {"names": ["size", "flags", "stamp"], "formats": ["<u4", "<u4", "<u8"], "offsets": [8, 16, 24], "itemsize": 32}
)
_TEN_MICROSECONDS = 1  # Object flag; otherwise the unit is a nanosecond.
_EXTENDED = 0x80000000
_TX_REQUEST = 2
_EXTRA_BYTES_MAX = 24  # Behind the payload: reserved, or the bit timing of CAN FD. No frame object is as small.
_FRAME_OBJECT_BYTES_MAX = 4096  # A frame object has 48 to some 200 bytes; more is a damaged size.


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a frame object holds what, behind its header. Names of columns that are absent read as zero."""

    body: np.dtype[np.void]
    flag_bits: dict[str, dict[int, int]]  # column → its bit → Flag
    data_offset: int
    data_bytes: int
    is_error: bool = False
    request: tuple[str, int] | None = None  # column and mask of the direction; 2 is a request to transmit

    def allows(self, header_size: Any, size: Any) -> Any:
        """Whether objects of these sizes (integers or columns) have room for what their type has, and little more."""
        room = (header_size >= _STAMPED_HEADER.itemsize) & (header_size + self.data_offset <= size)
        return room & (size <= _FRAME_OBJECT_BYTES_MAX)

    def fills(self, header_size: int, size: int) -> bool:
        """Whether an object of this size has no room for another one behind what its type has."""
        return size <= header_size + self.data_offset + self.data_bytes + _EXTRA_BYTES_MAX


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
_CLASSIC_REQUEST = ("flags", 0x6F)
_CLASSIC = Layout(
    _body(8, channel=(0, "<u2"), flags=(2, "u1"), length=(3, "u1"), id=(4, "<u4")),
    {"flags": _CLASSIC_FLAGS},
    8,
    8,
    request=_CLASSIC_REQUEST,
)
LAYOUTS: dict[int, Layout] = {
    1: _CLASSIC,  # CAN_MESSAGE
    86: _CLASSIC,  # CAN_MESSAGE2
    2: Layout(_body(4, channel=(0, "<u2")), {}, 4, 0, is_error=True),  # CAN_ERROR
    73: Layout(  # CAN_ERROR_EXT
        _body(24, channel=(0, "<u2"), length=(10, "u1"), id=(16, "<u4")), {}, 24, 8, is_error=True
    ),
    100: Layout(  # CAN_FD_MESSAGE
        _body(20, channel=(0, "<u2"), flags=(2, "u1"), id=(4, "<u4"), fd=(13, "u1"), length=(14, "u1")),
        {"flags": _CLASSIC_FLAGS, "fd": {1: int(Flag.FD), 2: int(Flag.BITRATE_SWITCH), 4: int(Flag.ERROR_STATE)}},
        20,
        64,
        request=_CLASSIC_REQUEST,
    ),
    101: Layout(  # CAN_FD_MESSAGE_64
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
        request=("sent", 0xFF),
    ),
    104: Layout(  # CAN_FD_ERROR_64
        _body(44, channel=(0, "u1"), length=(2, "u1"), ext=(10, "u1"), id=(12, "<u4")), {}, 44, 64, is_error=True
    ),
}


TABLE = np.dtype(
    [
        ("ts_ns", np.int64),
        ("id", np.uint32),
        ("flags", np.uint8),
        ("length", np.uint16),
        ("channel", np.uint16),
        ("good", np.bool_),
        ("request", np.bool_),
        ("data", np.uint8, (64,)),
    ]
)


def _gather(buffer: UInt8s, start: Int64s, dtype: np.dtype[np.void]) -> NDArray[np.void]:
    items: NDArray[np.void] = buffer[start[:, None] + np.arange(dtype.itemsize)].view(dtype)[:, 0]
    return items


def regular_objects(data: bytes) -> tuple[ObjectPlaces, int]:
    """The frame objects at the beginning of `data` that are a chain without any doubt, and where the last of them ends.

    No doubt: each object is plausible and leads to the next one, at a multiple of 4, and there is no other signature
    anywhere. The last object is never among them: what it leads to cannot be seen.
    """
    if len(data) < OBJECT_HEADER.size or OBJECT_HEADER.unpack_from(data)[3] > len(data):
        return {}, 0  # At once: whoever waits for the end of a large object asks again with each container.
    words = np.frombuffer(data, "<u4", len(data) // 4)
    at = np.flatnonzero(words == np.frombuffer(SIGNATURE, "<u4")[0]) * 4
    if not len(at) or at[0] or len(at) != data.count(SIGNATURE):
        return {}, 0
    at = at[at + OBJECT_HEADER.size <= len(data)]
    at, following = at[:-1], at[1:]
    header = _gather(np.frombuffer(data, np.uint8), at, _HEADER)
    kind, header_size, size = header["kind"], header["header_size"].astype(np.int64), header["size"].astype(np.int64)
    good = (size >= OBJECT_HEADER.size) & (size <= OBJECT_BYTES_MAX) & (kind != CONTAINER)
    padding = following - at - size
    good &= (padding >= 0) & (padding <= PADDING_MAX)
    places: ObjectPlaces = {}
    for number in set(np.unique(kind).tolist()) & LAYOUTS.keys():
        good &= (kind != number) | LAYOUTS[number].allows(header_size, size)
    count = len(good) if good.all() else int(np.argmin(good))
    for number in set(np.unique(kind[:count]).tolist()) & LAYOUTS.keys():
        rows = np.flatnonzero(kind[:count] == number)
        places[number] = np.stack((at[rows], header_size[rows]), axis=1)
    return places, int(at[count - 1] + size[count - 1]) if count else 0


def parse_objects(buffer: UInt8s, layout: Layout, places: Int64s) -> NDArray[np.void]:
    """Rows of `TABLE` from objects of one type; places[n, 2] are positions and header sizes."""
    header = _gather(buffer, places[:, 0], _STAMPED_HEADER)
    start = places.sum(axis=1)
    body = _gather(buffer, start, layout.body)
    has = layout.body.names or ()
    table = np.zeros(len(places), TABLE)
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
    if layout.request:
        column, mask = layout.request
        table["request"] = (body[column] & mask) == _TX_REQUEST
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
