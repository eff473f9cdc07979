"""Vector BLF: objects in (mostly compressed) containers.

Unlike in python-can whole containers become columns, stamps stay integers, and a bad object costs no more than itself.

Limits: an object or container that claims more than 64 MiB is damage. Objects other than frames and error frames are
skipped, and so are requests to transmit. An object whose size does not lead to another one, and that has one in it,
is damage, and reading goes on in it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ingestd.errors import CaptureError
from ingestd.model import FrameBatch
from ingestd.sources.captures.base import (
    SUPPORTED_HINT,
    Capture,
    CaptureBatch,
    Options,
    Sources,
)
from ingestd.sources.captures.blf_objects import (
    CONTAINER,
    LAYOUTS,
    NO_PLACES,
    OBJECT_BYTES_MAX,
    OBJECT_HEADER,
    PADDING_MAX,
    SIGNATURE,
    ObjectPlaces,
    parse_objects,
    regular_objects,
)
from ingestd.sources.captures.dates import zoned_ns

_SEARCH_BYTES = 1 << 16

_FILE_HEADER = struct.Struct("<4sL32x8H")
_CONTAINER_HEADER_BYTES = 16  # Its first two are the compression.
_STORED, _DEFLATED = b"\0\0", b"\2\0"


class BlfCapture(Capture):
    """Vector BLF. Objects other than frames and error frames are skipped, requests to transmit (TxRq), too."""

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
                yield from self._cut_tail(tail, tail_offset, sources, position)
                tail = b""
                continue
            found, rest = self._objects(tail + data, offset)
            if found:
                yield self._batch(tail + data, found, offset, sources, position)
            tail, tail_offset = rest if whole else b"", offset  # The cut has been counted; it is one damage.
        yield from self._cut_tail(tail, tail_offset, sources, position)

    def _cut_tail(self, tail: bytes, offset: int, sources: Sources, position: int) -> Iterator[CaptureBatch]:
        """The frames behind an object that never ends: it is cut off, or its size is wrong and others hide in it."""
        while tail.strip(b"\0"):
            self.damage.add_offset(offset, "the object is cut off")
            tail = tail[max(tail.find(SIGNATURE, 4), 0) or len(tail) :]
            found, rest = self._objects(tail, offset)
            if found:
                yield self._batch(tail, found, offset, sources, position)
            tail = rest

    def _containers(self) -> Iterator[tuple[int, bytes | None, int, bool]]:
        """Offset, contents (None if they are lost), end and wholeness of each container, and of objects outside any."""
        with self.path.open("rb") as file:
            offset: int | None = self._header()[0]
            while offset is not None:
                file.seek(offset)
                head = file.read(OBJECT_HEADER.size)
                if not head.strip(b"\0") and len(head) < OBJECT_HEADER.size:
                    return
                if len(head) < OBJECT_HEADER.size or not head.startswith(SIGNATURE):
                    if not 0 < head.find(SIGNATURE) <= PADDING_MAX:
                        self.damage.add_offset(offset, "no object where one should be")
                        yield offset, None, offset, False
                    offset = _find(file, SIGNATURE, offset + 1)
                    continue
                size, kind = OBJECT_HEADER.unpack(head)[3:]
                body = file.read(max(size - len(head), 0)) if size <= OBJECT_BYTES_MAX else b""
                if len(head) + len(body) < max(size, 32):
                    yield offset, *self._cut_container(file, offset, kind), False
                    offset = _find(file, SIGNATURE, offset + 4)
                    continue
                followed = SIGNATURE in file.read(PADDING_MAX + len(SIGNATURE))
                data, hidden = self._open(head, body, offset, followed)
                end = offset + (size if hidden < 0 else len(head) + hidden)
                yield offset, data, end, True
                offset = end

    def _open(self, head: bytes, body: bytes, offset: int, followed: bool) -> tuple[bytes | None, int]:
        """The contents of a container or an object outside any, and where behind its head an object begins that can
        be no part of it (-1: nowhere), because the size or the type of this one is wrong: one damage."""
        _, header_size, _, size, kind = OBJECT_HEADER.unpack(head)
        layout = LAYOUTS.get(kind)
        if kind == CONTAINER and body[:2] == _STORED:
            return body[_CONTAINER_HEADER_BYTES:], -1
        if layout and followed and layout.fills(header_size, size):
            return head + body, -1
        data, problem, rest = _inflate(body) if body[:2] == _DEFLATED else (None, "unknown compression", b"")
        if kind == CONTAINER:
            at = rest.find(SIGNATURE)
            if problem or at >= 0:
                self.damage.add_offset(offset, f"the container cannot be unpacked ({problem or 'its size is wrong'})")
            return None if problem else data, -1 if at < 0 else len(body) - len(rest) + at
        if layout is None and data and SIGNATURE in data:
            self.damage.add_offset(offset, "a container whose type is wrong")
            return data, -1
        hidden = body.find(SIGNATURE)
        if hidden >= 0:
            self.damage.add_offset(offset, "an object with others in it: its size or type is wrong")
            return None, hidden
        return head + body, -1

    def _cut_container(self, file: BinaryIO, offset: int, kind: int) -> tuple[bytes | None, int]:
        """What can be had of an object whose size reaches behind the end of the file, or is nonsense, and its end.

        The objects of a container that is not compressed are found by their signatures.
        """
        self.damage.add_offset(offset, "the container is cut off or its size is wrong")
        following = _find(file, SIGNATURE, offset + 4)
        file.seek(offset + OBJECT_HEADER.size)
        # The next one may begin where this one's header should still be.
        body = file.read(OBJECT_BYTES_MAX if following is None else max(following - file.tell(), 0))
        packed = kind == CONTAINER and body[:2] == _DEFLATED
        return _inflate(body)[0] if packed else None, file.tell()

    def _objects(self, data: bytes, offset: int) -> tuple[ObjectPlaces, bytes]:
        """Position and header size of the frame objects by type, and the bytes of an object that is not yet whole.

        One by one only from where they are no regular chain: that is damage, or the last one.
        Objects are padded to 4 bytes, some writers' to 8; anything else between them is damage.
        """
        regular, position = regular_objects(data)
        found: dict[int, list[tuple[int, int]]] = {}
        end = len(data)
        unpack, header_bytes = OBJECT_HEADER.unpack_from, OBJECT_HEADER.size
        while position + header_bytes <= end:
            signature, header_size, _, size, kind = unpack(data, position)
            if signature != SIGNATURE:
                at = data.find(SIGNATURE, position)
                zeros = at < 0 and not data[position:].strip(b"\0")
                if not zeros and not 0 < at - position <= PADDING_MAX:
                    self.damage.add_offset(offset, f"no object at {position} bytes into the container")
                if at < 0:  # So many zeros are kept that they are too many if an object follows.
                    position = max(position, end - (header_bytes if zeros else 3))
                    break
                position = at
                continue
            if not _is_plausible(header_size, size, kind):
                self.damage.add_offset(offset, f"an object of impossible size, {position} bytes into the container")
                at = data.find(SIGNATURE, position + 4)
                if at < 0:
                    position = max(position + 4, end - 3)
                    break
                position = at
                continue
            stop = position + size
            if stop > end:
                break
            layout = LAYOUTS.get(kind)
            followed = data.startswith(SIGNATURE, stop)
            if not followed or (layout and not layout.fills(header_size, size)):
                followed = followed or SIGNATURE in data[stop : stop + PADDING_MAX + len(SIGNATURE)]
                if (not followed or layout) and (hidden := _find_object(data, position + 4, stop)):
                    self.damage.add_offset(offset, f"an object of wrong size, {position} bytes into the container")
                    position = hidden
                    continue
            if kind == CONTAINER:  # The size of the one around it is wrong.
                self.damage.add_offset(offset, f"a container {position} bytes into the container")
            if layout is not None:
                found.setdefault(kind, []).append((position, header_size))
            position = stop
        for kind, places in found.items():
            regular[kind] = np.concatenate((regular.get(kind, NO_PLACES), np.array(places)))
        return regular, data[position:]

    def _batch(self, data: bytes, found: ObjectPlaces, offset: int, sources: Sources, position: int) -> CaptureBatch:
        """The frames of the objects found, in the order they have in `data`."""
        buffer = np.frombuffer(data + bytes(256), np.uint8)  # So that a gather of a whole layout stays inside.
        parts = [parse_objects(buffer, LAYOUTS[kind], places) for kind, places in found.items()]
        at = np.concatenate([places[:, 0] for places in found.values()])
        order = np.argsort(at, kind="stable")
        table = np.concatenate(parts)[order]
        table = table[~table["request"]]
        good = table["good"]
        for _ in range(int(np.count_nonzero(~good))):
            self.damage.add_offset(offset, "a frame with an impossible stamp or length")
        table = table[good]
        frames = FrameBatch(
            "", table["ts_ns"], table["id"], table["flags"], table["length"], np.ascontiguousarray(table["data"])
        )
        channels = np.maximum(table["channel"].astype(np.int64), 1) - 1
        return CaptureBatch(frames, sources.indices(channels), sources.seen(), position)


def _is_plausible(header_size: int, size: int, kind: int) -> bool:
    layout = LAYOUTS.get(kind)
    return OBJECT_HEADER.size <= size <= OBJECT_BYTES_MAX and (layout is None or bool(layout.allows(header_size, size)))


def _find_object(data: bytes, begin: int, end: int) -> int:
    """Where the first object with a plausible header begins; 0 if there is none."""
    while (begin := data.find(SIGNATURE, begin, end)) >= 0:
        if begin + OBJECT_HEADER.size <= len(data):
            _, header_size, _, size, kind = OBJECT_HEADER.unpack_from(data, begin)
            if header_size >= OBJECT_HEADER.size and _is_plausible(header_size, size, kind):
                return begin
        begin += len(SIGNATURE)
    return 0


def _inflate(body: bytes) -> tuple[bytes | None, str, bytes]:
    """What a compressed container holds, as far as it goes, what is wrong with it, if anything is, and what is behind
    the stream."""
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(body[_CONTAINER_HEADER_BYTES:], OBJECT_BYTES_MAX)
    except zlib.error as error:
        return None, str(error), b""
    return data, "" if unpacker.eof else "the stream does not end", unpacker.unused_data


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
