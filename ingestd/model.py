"""The values every stage shares: batches of frames, signal groups, batches of signals.

A batch is a set of equal-length columns, never a list of objects. Batches are read-only by convention: a stage makes
new columns and leaves the ones it was given alone.

Limits: a payload holds at most `PAYLOAD_BYTES_MAX` bytes, a signal group at most `GROUP_CHANNELS_MAX` channels, a
stored chunk at most `CHUNK_FRAMES_MAX` frames. The last two are part of the `id` of a sample (see schema.sql).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum, IntFlag
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

PAYLOAD_BYTES_MAX = 1785  # A J1939 transport-protocol message (SAE J1939-21, 5.10); longer than any CAN FD frame.
GROUP_CHANNELS_MAX = 32
CHUNK_FRAMES_MAX = 4096
BATCH_FRAMES_MAX = 64_000  # Decoding more at once stalls the event loop: measured 30 ms for a million, under 4 ms here.

Int64s = NDArray[np.int64]
UInt8s = NDArray[np.uint8]
Float64s = NDArray[np.float64]
Int16s = NDArray[np.int16]

# What the decoder of one source has to know of the frames before: JSON, committed with the feed's position.
Memory = dict[str, Any]


class Flag(IntFlag):
    """What kind of frame it was on the wire; one byte a frame."""

    EXTENDED = 1
    REMOTE = 2
    ERROR = 4
    FD = 8
    BITRATE_SWITCH = 16
    ERROR_STATE = 32
    TRANSMITTED = 64


class SerialFlag(IntFlag):
    """The same byte for a frame of a serial line, whose arbitration id is 0: SERIAL is set in all of them."""

    TEXT = 1  # valid UTF-8 without NUL
    TRUNCATED = 2  # it went on beyond PAYLOAD_BYTES_MAX; the rest was skipped and counted
    FIRST = 4  # a line with nothing before it since the port was opened: its beginning may have been said before that
    SERIAL = 128


class Quality(IntFlag):
    """What to know about a sample before trusting it; 0 is good. The view `signals` adds CLOCK_UNSET."""

    OUT_OF_RANGE = 1
    NOT_AVAILABLE = 2
    ERROR_PATTERN = 4
    SHORT_FRAME = 8
    AFTER_GAP = 16
    CLOCK_UNSET = 32


class ClockState(IntEnum):
    """How far `ts_mono_ns + utc_offset_ns` can be believed."""

    SET = 0
    UNSET = 1
    STEPPED = 2  # the clock was set while the frames waited to be read: their stamps say when at the latest


class Clock(NamedTuple):
    """What turns stamps of CLOCK_MONOTONIC into UTC, and how far the result can be believed."""

    utc_offset_ns: int
    state: ClockState


@dataclass(frozen=True, slots=True)
class FrameBatch:
    """Frames of one source in wire order.

    ts_ns           int64[n]    nanoseconds in the session's time base
    arbitration_id  uint32[n]   11 or 29 bits, without flag bits
    flags           uint8[n]    `Flag`
    length          uint16[n]   payload bytes; 0 for remote frames, whatever their DLC asked for
    data            uint8[n, width]  payloads, zero after `length`; C-contiguous, width a multiple of 8 and at least 8
    """

    source: str
    ts_ns: Int64s
    arbitration_id: NDArray[np.uint32]
    flags: UInt8s
    length: NDArray[np.uint16]
    data: UInt8s

    def __len__(self) -> int:
        return len(self.ts_ns)

    def __repr__(self) -> str:
        return f"<FrameBatch {self.source}: {len(self)} frames>"

    def __getitem__(self, rows: slice | NDArray[np.intp] | NDArray[np.bool_]) -> FrameBatch:
        """The frames that `rows` (a slice, indices or a mask) selects."""
        return FrameBatch(
            self.source,
            self.ts_ns[rows],
            self.arbitration_id[rows],
            self.flags[rows],
            self.length[rows],
            np.ascontiguousarray(self.data[rows]),
        )


def padded_width(length: NDArray[np.uint16]) -> int:
    """Columns of `FrameBatch.data` that payloads of these lengths need."""
    return max(8, -(-int(length.max(initial=0)) // 8) * 8)


def join(batches: Sequence[FrameBatch]) -> FrameBatch:
    """Batches of one source, one after the other, as one that is as wide as its longest payload needs."""
    length = np.concatenate([batch.length for batch in batches])
    width = padded_width(length)
    if len(batches) == 1 and batches[0].data.shape[1] == width:
        return batches[0]
    return FrameBatch(
        batches[0].source,
        np.concatenate([batch.ts_ns for batch in batches]),
        np.concatenate([batch.arbitration_id for batch in batches]),
        np.concatenate([batch.flags for batch in batches]),
        length,
        np.concatenate([_of_width(batch.data, width) for batch in batches]),
    )


def _of_width(data: UInt8s, width: int) -> UInt8s:
    if data.shape[1] >= width:
        return data[:, :width]
    return np.pad(data, ((0, 0), (0, width - data.shape[1])))


@dataclass(frozen=True, slots=True)
class Event:
    """A discrete fact about a source: gap, link up or down, bus off, clock step. `payload` is JSON.

    (source, kind, key, ts_ns) tells events of a session apart: recording one twice is a no-op.
    """

    source: str
    kind: str
    ts_ns: int
    key: str = ""
    payload: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Books:
    """What became of the frames of one source, over the lifetime of a journal: nothing may be missing.

    `pending` is counted from what lies in the journal and not from the other four, so that `balanced` proves something.
    """

    received: int = 0
    committed: int = 0
    pending: int = 0
    rejected: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)  # by reason: overflow, budget, journal, damage

    @property
    def balanced(self) -> bool:
        """Whether every frame received is accounted for, once."""
        return self.received == self.committed + self.pending + self.rejected + sum(self.dropped.values())


class Recorder(Protocol):
    """Where a source puts what it has read. Nothing here raises: what cannot be recorded is counted there.

    All of it is called on the event loop's thread, and a call returns when the kernel has the bytes.
    """

    def frames(self, batch: FrameBatch, clock: Clock) -> None:
        """Record frames of one source, stamped in CLOCK_MONOTONIC nanoseconds, in wire order."""

    def overflow(self, source: str, frames_count: int, from_ns: int, to_ns: int) -> None:
        """Record that so many frames were lost before they could be read, between two instants."""

    def event(self, event: Event) -> None:
        """Record a fact."""


# Of ISO 11898-1 (fault confinement), in the order that the kernel numbers them.
CONTROLLER_STATES = ("error-active", "error-warning", "error-passive", "bus-off")


class Link(Enum):
    """Whether a source has its device."""

    OPENING = "opening"
    OPEN = "open"
    RETRYING = "retrying"


class Load(Protocol):
    """How busy a bus is."""

    def ratio(self, now_ns: int) -> float | None:
        """From 0 to about 1, since this was asked last or at least a second; None where nobody knows the bit rate."""


@dataclass(slots=True)
class SourceStatus:
    """What a source says of itself, for metrics and for people. Grows and changes while it runs.

    `counters` are totals since the process started, by name; a name ends in its unit (`skipped_bytes`, `bus_offs`).
    """

    link: Link = Link.OPENING
    reason: str = ""  # why it has no device, in words for the operator
    counters: dict[str, int] = field(default_factory=dict)
    controller: str = ""  # the state of a CAN controller, one of CONTROLLER_STATES, if it says any
    load: Load | None = None
    buffer_bytes: int | None = None  # what waited in the kernel's receive buffer when that was looked at last …
    buffer_bytes_max: int = 0  # … and what it holds

    def count(self, name: str, more: int = 1) -> None:
        """Add to a counter."""
        self.counters[name] = self.counters.get(name, 0) + more


class Source(Protocol):
    """A device that is read for as long as the daemon runs."""

    name: str
    status: SourceStatus

    async def run(self, recorder: Recorder) -> None:
        """Read until cancelled: then what the kernel still holds is recorded and the device closed.

        A device that is missing, goes away or cannot be opened is waited for, with capped back-off; that is an event
        and a change of `status`, never an exception.
        """


@dataclass(frozen=True, slots=True)
class Channel:
    """One named quantity of a group. `choices` maps the scaled value, as PostgreSQL prints float8, to its label."""

    name: str
    unit: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    choices: dict[str, str] | None = None
    layout: str = ""  # where the bits are and how they are scaled, in one line; part of the group's id


@dataclass(frozen=True, slots=True)
class SignalGroup:
    """Channels that always occur together and so share their stamps; the channel group of MDF.

    `origin` names the file or protocol the definition came from and is not part of the id: the same definition in
    another file is the same group.
    """

    id: int
    source: str
    name: str
    origin: str
    channels: tuple[Channel, ...]

    @staticmethod
    def make(source: str, name: str, page: str, origin: str, channels: tuple[Channel, ...]) -> SignalGroup:
        """A group with its id: the first 8 bytes, as signed big-endian integer, of SHA-256 over canonical JSON.

        The id depends on the definition alone, so a car can make it offline and a changed definition is a new group.
        """
        if not 1 <= len(channels) <= GROUP_CHANNELS_MAX:
            raise ValueError(f"a group has 1 to {GROUP_CHANNELS_MAX} channels, not {len(channels)}")
        definition = {
            "source": source,
            "name": name,
            "page": page,
            "channels": [[c.name, c.layout, c.unit, c.minimum, c.maximum, c.choices] for c in channels],
        }
        canonical = json.dumps(definition, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        digest = hashlib.sha256(canonical.encode("ascii")).digest()
        label = f"{name}[{page}]" if page else name
        return SignalGroup(int.from_bytes(digest[:8], "big", signed=True), source, label, origin, channels)


@dataclass(frozen=True, slots=True)
class SignalBatch:
    """Decoded frames of one group, in wire order.

    ts_ns    int64[frames]
    value    float64[channels, frames], NaN for none
    text     object[channels, frames] of str or None, or None where no sample of the batch has text
    quality  int16[channels, frames] of `Quality`, or None where every sample is good
    """

    group: SignalGroup
    ts_ns: Int64s
    value: Float64s
    text: NDArray[np.object_] | None = None
    quality: Int16s | None = None

    def __len__(self) -> int:
        return len(self.ts_ns)

    def __repr__(self) -> str:
        return f"<SignalBatch {self.group.source} {self.group.name}: {len(self)} frames>"


@dataclass(frozen=True, slots=True)
class CopyData:
    """The complete input of one COPY table (columns) FROM STDIN WITH (FORMAT binary), in pieces."""

    table: str
    columns: tuple[str, ...]
    pieces: tuple[bytearray, ...]
    rows: int

    @property
    def nbytes(self) -> int:
        """Bytes that go over the wire."""
        return sum(map(len, self.pieces))
