"""Records: what a journal is made of. Each describes itself and could travel alone.

A record is a header, the name of its source and a payload; docs/journal-format.md has every byte. The checksum covers
everything behind it, so a record is either as it was written or not one at all; it begins with a seed, the number of
the segment, so what was written into another one is no record either. Frames are stored in columns.

Limits: a record takes at most `RECORD_BYTES_MAX` bytes, a name of a source 255. The stamps of a record of frames lie
within 2^32 - 1 ns of the least of them; they may repeat and go backwards.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple
from uuid import UUID
from zlib import crc32

import numpy as np

from ingestd.model import PAYLOAD_BYTES_MAX, Clock, ClockState, Event, FrameBatch

MAGIC = b"\xa9JR1"  # No text begins so: 0xA9 continues a character of UTF-8.
RECORD_VERSION = 1
RECORD_BYTES_MAX = 1 << 20
SPAN_NS_MAX = (1 << 32) - 1

# magic, CRC-32 of all that follows, payload bytes, version, kind, clock state, name bytes,
# sequence, session id, boot id, UTC offset, base stamp, frames, frames before
HEADER = struct.Struct("<4sIIBBBBQ16s16sqqIQ")
CHECKED_FROM = 8
NO_CLOCK = Clock(0, ClockState.UNSET)
FRAME_BYTES = 4 + 4 + 1 + 2  # of the columns, without the data


class Kind(IntEnum):
    """What a record holds. The first three are the stretch's own and numbered; the rest is bookkeeping and is not."""

    FRAMES = 1
    EVENT = 2
    SESSION = 3
    SETTLE = 16  # records up to a position are done with, and what became of their frames
    FEED = 17  # the name under which a stretch is sent
    REMOVED = 18  # segments that are about to be deleted although not everything in them was sent
    STATE = 19  # everything the records before it amount to
    REJECTED = 20  # in files of rejected records: whose the next record is, and why it is here

    @property
    def is_numbered(self) -> bool:
        """Whether a record of this kind has a sequence number of its own."""
        return self < Kind.SETTLE


class Origin(NamedTuple):
    """The session and the boot in which a record is written, as 16 bytes each."""

    session: bytes
    boot: bytes

    @property
    def session_id(self) -> UUID:
        """The session."""
        return _uuid(self.session)

    @property
    def boot_id(self) -> str:
        """The boot whose CLOCK_MONOTONIC the stamps are."""
        return _uuid_text(self.boot)


@dataclass(slots=True)
class Record:
    """One record, read and verified. `frames_before` counts its source's frames in the stretch before this record."""

    kind: Kind
    sequence: int  # for bookkeeping: of the numbered record before it
    source: str
    clock: Clock
    ts_ns: int  # the least stamp of its frames; the event's
    frames_count: int
    frames_before: int
    origin: Origin
    payload: memoryview
    size: int  # bytes in the journal
    stretch_id: str = ""  # known where it was read from a stretch

    @property
    def session_id(self) -> UUID:
        """The session it was recorded in."""
        return self.origin.session_id

    @property
    def boot_id(self) -> str:
        """The boot whose CLOCK_MONOTONIC its stamps are."""
        return self.origin.boot_id

    @property
    def last_ns(self) -> int:
        """The greatest stamp."""
        if self.kind is not Kind.FRAMES or not self.frames_count:
            return self.ts_ns
        return self.ts_ns + int(np.frombuffer(self.payload, "<u4", self.frames_count).max())

    def pack(self, seed: int = 0) -> bytes:
        """The bytes it is in a segment whose checksums begin with `seed`."""
        return pack(
            self.kind, self.origin, self.sequence, bytes(self.payload), source=self.source, clock=self.clock,
            ts_ns=self.ts_ns, frames_count=self.frames_count, frames_before=self.frames_before, seed=seed,
        )  # fmt: skip

    def frames(self) -> FrameBatch:
        """The frames of a FRAMES record."""
        return merge([self])

    def json(self) -> dict[str, Any]:
        """The payload of every other kind."""
        value: dict[str, Any] = json.loads(bytes(self.payload))
        return value

    def session(self) -> dict[str, Any]:
        """The metadata that a SESSION record brings."""
        return self.json()

    def event(self) -> Event:
        """The event of an EVENT record."""
        value = self.json()
        return Event(self.source, value["kind"], self.ts_ns, value["key"], value["payload"])

    def lost(self) -> Mapping[str, int]:
        """Frames that an EVENT record counts as received and lost, by reason."""
        if self.kind is not Kind.EVENT:
            return {}
        lost: dict[str, int] = self.json().get("lost", {})
        return lost


_uuid = lru_cache(maxsize=1024)(lambda value: UUID(bytes=value))
_uuid_text = lru_cache(maxsize=1024)(lambda value: str(UUID(bytes=value)))
_name = lru_cache(maxsize=1024)(lambda value: value.decode("utf-8", "replace"))
_kinds: dict[int, Kind] = {int(kind): kind for kind in Kind}
_clock_states = tuple(ClockState)
_clock = lru_cache(maxsize=64)(lambda offset_ns, state: Clock(offset_ns, _clock_states[state]))


def pack(
    kind: Kind,
    origin: Origin,
    sequence: int,
    payload: bytes,
    *,
    source: str = "",
    clock: Clock = NO_CLOCK,
    ts_ns: int = 0,
    frames_count: int = 0,
    frames_before: int = 0,
    seed: int = 0,
) -> bytes:
    """The bytes of a record."""
    name = source.encode()
    behind_checksum = HEADER.pack(
        MAGIC, 0, len(payload), RECORD_VERSION, kind, clock.state, len(name), sequence, origin.session, origin.boot,
        clock.utc_offset_ns, ts_ns, frames_count, frames_before,
    )[CHECKED_FROM:] + name + payload  # fmt: skip
    return MAGIC + crc32(behind_checksum, seed).to_bytes(4, "little") + behind_checksum


def encode_json(value: Mapping[str, Any]) -> bytes:
    """JSON as it stands in payloads: compact, UTF-8."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, default=str).encode("utf-8", "replace")


def encode_event(event: Event, lost: Mapping[str, int] | None) -> bytes:
    """The payload of an EVENT record; source and stamp are in its header."""
    value: dict[str, Any] = {"kind": event.kind, "key": event.key, "payload": dict(event.payload)}
    if lost:
        value["lost"] = dict(lost)
    return encode_json(value)


class EncodedFrames(NamedTuple):
    """What of a batch goes into one record. `first_ns` and `last_ns` are the least and the greatest stamp."""

    first_ns: int
    last_ns: int
    frames_count: int
    payload: bytes


def encode_frames(batch: FrameBatch, record_bytes_max: int) -> Iterator[EncodedFrames]:
    """The records that the batch takes: usually one."""
    count = len(batch)
    first_ns, last_ns = int(batch.ts_ns.min()), int(batch.ts_ns.max())
    shortest, longest = int(batch.length.min()), int(batch.length.max())
    too_large = count > 1 and count * (FRAME_BYTES + longest) > record_bytes_max
    if too_large or last_ns - first_ns > SPAN_NS_MAX:
        yield from encode_frames(batch[: count // 2], record_bytes_max)
        yield from encode_frames(batch[count // 2 :], record_bytes_max)
        return
    if shortest == longest:
        data = batch.data if longest == batch.data.shape[1] else batch.data[:, :longest]
    else:
        data = batch.data[np.arange(batch.data.shape[1], dtype=np.uint16) < batch.length[:, None]]
    columns = (
        (batch.ts_ns - first_ns).astype("<u4").tobytes(),
        batch.arbitration_id.astype("<u4", copy=False).tobytes(),
        batch.flags.tobytes(),
        batch.length.astype("<u2", copy=False).tobytes(),
        data.tobytes(),
    )
    yield EncodedFrames(first_ns, last_ns, count, b"".join(columns))


def merge(records: Sequence[Record]) -> FrameBatch:
    """The frames of FRAMES records of one source, in their order, as one batch."""
    offsets, ids, flags, lengths, data = [], [], [], [], []
    counts = [record.frames_count for record in records]
    for record, count in zip(records, counts, strict=True):
        payload = record.payload
        offsets.append(payload[: 4 * count])
        ids.append(payload[4 * count : 8 * count])
        flags.append(payload[8 * count : 9 * count])
        lengths.append(payload[9 * count : 11 * count])
        data.append(payload[11 * count :])
    base_ns = np.repeat(np.array([record.ts_ns for record in records], np.int64), counts)
    length = np.frombuffer(bytearray().join(lengths), "<u2").astype(np.uint16, copy=False)
    return FrameBatch(
        records[0].source,
        base_ns + np.frombuffer(b"".join(offsets), "<u4"),
        np.frombuffer(bytearray().join(ids), "<u4").astype(np.uint32, copy=False),
        np.frombuffer(bytearray().join(flags), np.uint8),
        length,
        _padded(np.frombuffer(bytearray().join(data), np.uint8), length),
    )


def _padded(packed: np.ndarray[Any, np.dtype[np.uint8]], length: np.ndarray[Any, Any]) -> Any:
    """Payloads without padding to the rows of a batch."""
    longest = int(length.max()) if len(length) else 0
    width = max(8, -(-longest // 8) * 8)
    if packed.size == len(length) * width:
        return packed.reshape(len(length), width)
    data = np.zeros((len(length), width), np.uint8)
    if packed.size == len(length) * longest:
        data[:, :longest] = packed.reshape(len(length), longest)
    else:
        data[np.arange(width, dtype=np.uint16) < length[:, None]] = packed
    return data


class Hole(NamedTuple):
    """Bytes from `start` up to before `end` that are no record."""

    start: int
    end: int


def walk(data: bytes, seed: int = 0, origin: Origin | None = None) -> Iterator[Record | Hole]:
    """The records in `data`, and what lies between and behind them. Zeros to the end are unused space: nothing.

    Records whose checksum did not begin with `seed`, or that are not of the session and the boot of `origin`, are none.
    """
    buffer, position = memoryview(data), 0
    while position < len(data):
        record = _read(buffer, position, seed, origin)
        if record is not None:
            yield record
            position += record.size
            continue
        following = _next_record(data, buffer, position, seed, origin)
        if following is None and not any_set(buffer[position:]):
            return
        end = len(data) if following is None else following
        yield Hole(position, end)
        position = end


def _next_record(data: bytes, buffer: memoryview, position: int, seed: int, origin: Origin | None) -> int | None:
    following = data.find(MAGIC, position + 1)
    while following >= 0 and _read(buffer, following, seed, origin) is None:
        following = data.find(MAGIC, following + 1)
    return None if following < 0 else following


def _read(buffer: memoryview, position: int, seed: int, origin: Origin | None) -> Record | None:
    """The record at `position`, or None if there is none: it is cut off, or a bit of it is not as it was written."""
    if len(buffer) - position < HEADER.size:
        return None
    (magic, checksum, payload_bytes, version, kind, state, name_bytes, sequence, session, boot,
     offset_ns, ts_ns, count, before) = HEADER.unpack_from(buffer, position)  # fmt: skip
    size = HEADER.size + name_bytes + payload_bytes
    if magic != MAGIC or version != RECORD_VERSION or size > min(RECORD_BYTES_MAX, len(buffer) - position):
        return None
    if crc32(buffer[position + CHECKED_FROM : position + size], seed) != checksum:
        return None
    if origin is not None and origin != (session, boot):
        return None
    if kind not in _kinds or state >= len(_clock_states):
        return None
    name_at = position + HEADER.size
    payload_at = name_at + name_bytes
    return Record(
        _kinds[kind], sequence, _name(bytes(buffer[name_at:payload_at])), _clock(offset_ns, state), ts_ns,
        count, before, Origin(session, boot), buffer[payload_at : position + size], size,
    )  # fmt: skip


def any_set(data: memoryview | bytes) -> bool:
    """Whether there is a byte other than zero."""
    return bool(np.frombuffer(data, np.uint8).any())


assert HEADER.size + 255 + FRAME_BYTES + PAYLOAD_BYTES_MAX < RECORD_BYTES_MAX
