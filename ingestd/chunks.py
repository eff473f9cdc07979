"""Batches to rows of `signal_chunks` and `frame_chunks`, in the binary format of COPY.

A batch is cut into chunks of at most `CHUNK_FRAMES_MAX` frames; columns become PostgreSQL arrays by one strided
assignment each, so that no Python runs per sample. The result is deterministic: the same batch gives the same bytes.

Source: PostgreSQL documentation, COPY, "Binary Format"; arrays as `array_send` writes them: dimensions, has-null flag,
element type, then per dimension its size and lower bound, then per element its length and bytes, big-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from ingestd.model import CHUNK_FRAMES_MAX, ClockState, CopyData, Float64s, FrameBatch, SignalBatch

COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
COPY_TRAILER = struct.pack(">h", -1)
NULL = struct.pack(">i", -1)

# pg_type.oid of the element types; fixed in every PostgreSQL.
INT8, INT2, INT4, TEXT, FLOAT8 = 20, 21, 23, 25, 701

SIGNAL_CHUNK_COLUMNS = (
    "session_id", "group_id", "mono_start_ns", "mono_end_ns", "utc_offset_ns", "clock_state", "frame_count",
    "ts_mono_ns", "value_num", "value_text", "quality", "value_min", "value_max", "value_mean", "value_count",
)  # fmt: skip
FRAME_CHUNK_COLUMNS = (
    "session_id", "source", "mono_start_ns", "mono_end_ns", "utc_offset_ns", "clock_state", "frame_count",
    "ts_mono_ns", "arbitration_id", "flags", "lengths", "data",
)  # fmt: skip

Buffer = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Placement:
    """What all chunks of a batch share: their session and what turns its stamps into UTC."""

    session_id: UUID
    utc_offset_ns: int
    clock_state: ClockState


def encode_signals(batches: Iterable[SignalBatch], placement: Placement, *, summaries: bool = True) -> CopyData:
    """Rows of `signal_chunks`. `summaries` fills min, max, mean and count, for chunks worth them."""
    rows = (_signal_row(batch, chunk, placement, summaries) for batch in batches for chunk in chunk_slices(len(batch)))
    return _copy_data("signal_chunks", SIGNAL_CHUNK_COLUMNS, rows)


def encode_frames(batches: Iterable[FrameBatch], placement: Placement) -> CopyData:
    """Rows of `frame_chunks`: the frames of each batch in wire order."""
    rows = (_frame_row(batch, chunk, placement) for batch in batches for chunk in chunk_slices(len(batch)))
    return _copy_data("frame_chunks", FRAME_CHUNK_COLUMNS, rows)


def chunk_slices(frames_count: int) -> Iterator[slice]:
    """Cut that many frames into the fewest chunks, of nearly equal size."""
    parts = -(-frames_count // CHUNK_FRAMES_MAX)
    for part in range(parts):
        yield slice(frames_count * part // parts, frames_count * (part + 1) // parts)


def _copy_data(table: str, columns: tuple[str, ...], rows: Iterable[list[Buffer]]) -> CopyData:
    """Join rows into pieces of about a megabyte: one join per row is too many, one for all takes the memory twice."""
    pieces: list[bytearray] = []
    waiting: list[Buffer] = [COPY_HEADER]
    waiting_bytes = rows_count = 0
    for row in rows:
        waiting += row
        waiting_bytes += sum(map(len, row))
        rows_count += 1
        if waiting_bytes > 1_000_000:
            pieces.append(bytearray().join(waiting))
            waiting, waiting_bytes = [], 0
    pieces.append(bytearray().join([*waiting, COPY_TRAILER]))
    return CopyData(table, columns, tuple(pieces), rows_count)


def _signal_row(batch: SignalBatch, chunk: slice, placement: Placement, summaries: bool) -> list[Buffer]:
    ts_ns, value = batch.ts_ns[chunk], batch.value[:, chunk]
    frames_count = len(ts_ns)
    row: list[Buffer] = [
        struct.pack(
            ">hi16siqiqiqiqihii",
            len(SIGNAL_CHUNK_COLUMNS),
            16, placement.session_id.bytes,
            8, batch.group.id,
            8, int(ts_ns.min()),
            8, int(ts_ns.max()),
            8, placement.utc_offset_ns,
            2, placement.clock_state,
            4, frames_count,
        ),
        *_array(ts_ns, INT8),
        *_array(value, FLOAT8),
    ]  # fmt: skip
    text = None if batch.text is None else batch.text[:, chunk]
    row += [NULL] if text is None or not text.any() else _text_array(text)
    quality = None if batch.quality is None else batch.quality[:, chunk]
    row += [NULL] if quality is None or not quality.any() else _array(quality, INT2)
    if not summaries:
        return [*row, NULL * 4]
    low, high, mean, count = summarise(value)
    return [*row, *_array(low, FLOAT8), *_array(high, FLOAT8), *_array(mean, FLOAT8), *_array(count, INT4)]


def summarise(value: Float64s) -> tuple[Float64s, Float64s, Float64s, NDArray[np.int32]]:
    """Minimum, maximum, mean (float64[channels]) and count (int32[channels]) of each row, ignoring NaN.

    Where a row has nothing but NaN the first three are NaN and the count is 0.
    """
    channels_count, frames_count = value.shape
    with np.errstate(all="ignore"):
        low, high, mean = value.min(axis=1), value.max(axis=1), value.mean(axis=1)
        count = np.full(channels_count, frames_count, np.int32)
        for row in np.flatnonzero(np.isnan(mean)):
            present = value[row][~np.isnan(value[row])]
            count[row] = len(present)
            if len(present):
                low[row], high[row], mean[row] = present.min(), present.max(), present.mean()
    return low, high, mean, count


def _frame_row(batch: FrameBatch, chunk: slice, placement: Placement) -> list[Buffer]:
    ts_ns, length = batch.ts_ns[chunk], batch.length[chunk]
    source = batch.source.encode()
    data = batch.data[chunk]
    width = data.shape[1]
    # Boolean selection from a matrix goes row by row: it takes the payloads out of their padding, in wire order.
    payload = data if (length == width).all() else data[np.arange(width) < length[:, np.newaxis]]
    flags, lengths = batch.flags[chunk].tobytes(), length.astype(">u2").tobytes()
    return [
        struct.pack(">hi16si", len(FRAME_CHUNK_COLUMNS), 16, placement.session_id.bytes, len(source)),
        source,
        struct.pack(
            ">iqiqiqihii",
            8, int(ts_ns.min()),
            8, int(ts_ns.max()),
            8, placement.utc_offset_ns,
            2, placement.clock_state,
            4, len(ts_ns),
        ),
        *_array(ts_ns, INT8),
        *_array(batch.arbitration_id[chunk], INT4),
        struct.pack(">i", len(flags)),
        flags,
        struct.pack(">i", len(lengths)),
        lengths,
        struct.pack(">i", payload.size),
        payload.tobytes(),
    ]  # fmt: skip


_ELEMENT = {
    INT2: np.dtype([("length", ">i4"), ("value", ">i2")]),
    INT4: np.dtype([("length", ">i4"), ("value", ">i4")]),
    INT8: np.dtype([("length", ">i4"), ("value", ">i8")]),
    FLOAT8: np.dtype([("length", ">i4"), ("value", ">f8")]),
}


def _array_header(shape: Sequence[int], oid: int, has_null: bool, elements_bytes: int) -> bytes:
    dimensions = b"".join(struct.pack(">ii", size, 1) for size in shape)
    return struct.pack(">iiii", 12 + len(dimensions) + elements_bytes, len(shape), has_null, oid) + dimensions


def _array(values: NDArray[np.generic], oid: int) -> list[Buffer]:
    """A field with an array of one or two dimensions, without nulls."""
    elements = np.empty(values.shape, _ELEMENT[oid])
    elements["length"] = _ELEMENT[oid].itemsize - 4
    elements["value"] = values
    return [_array_header(values.shape, oid, False, elements.nbytes), elements.data.cast("B")]


def _text_array(values: NDArray[np.object_]) -> list[Buffer]:
    """A field with an array of text, None for null."""
    encoded = [None if text is None else text.encode() for text in values.ravel().tolist()]
    elements = b"".join(NULL if text is None else struct.pack(">i", len(text)) + text for text in encoded)
    return [_array_header(values.shape, TEXT, any(text is None for text in encoded), len(elements)), elements]
