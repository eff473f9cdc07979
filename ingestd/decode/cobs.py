"""COBS frames of one configured struct to signals, all frames of a batch at once.

A frame is unstuffed, its checksum compared, and its bytes are the struct, packed, without gaps. The checksum is behind
the struct, of all bytes before it.

- A number is the value in the frame times the factor plus the offset, in float64; a whole number of 64 bits beyond 2^53
  without either has its exact digits as text.
- NaN is none with the quality NOT_AVAILABLE, infinity none with OUT_OF_RANGE.

Invariants: every frame is counted in exactly one of decoded and undecoded (another length, or another checksum); none
raises out of `decode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ingestd.decode.can import Counts, Decoded
from ingestd.decode.checksums import CHECKS, compute
from ingestd.model import (
    GROUP_CHANNELS_MAX,
    Channel,
    FrameBatch,
    Memory,
    Quality,
    SignalBatch,
    SignalGroup,
    UInt8s,
)
from ingestd.struct_fields import StructField

NAME: Final = "cobs"
ORIGIN: Final = "COBS"
EXACT_MAX: Final = 2**53
SIMPLE_BYTES_MAX: Final = 253  # As many bytes have exactly one more when they are stuffed.


class CobsDecoder:
    """Decodes the frames of one source of the protocol `cobs`."""

    def __init__(
        self,
        source: str,
        *,
        fields: Sequence[str],
        byte_order: str = "little",
        crc: str = "none",
        crc_byte_order: str | None = None,
    ) -> None:
        """`fields` as `StructField.parse` takes them, `crc` is a key of CHECKS or "none"."""
        self.source = source
        self._check = CHECKS.get(crc)
        self._crc_type = ("<" if (crc_byte_order or byte_order) == "little" else ">") + "u"
        parsed = [StructField.parse(each) for each in fields]
        self._size = sum(field.size for field in parsed)
        order = "<" if byte_order == "little" else ">"
        self._columns: list[tuple[StructField, str, int]] = []  # with numpy's name of the type, and where it begins
        channels: list[Channel] = []
        begin = 0
        for field in parsed:
            size = field.size // field.repeats
            for number, name in enumerate(field.names):
                at = begin + number * size
                self._columns.append((field, f"{order}{field.kind[0]}{size}", at))
                layout = f"{order}{field.kind}@{at}*{field.factor or 1:g}+{field.offset or 0:g}"
                channels.append(Channel(name, field.unit, layout=layout))
            begin += field.size
        self._groups = [
            SignalGroup.make(source, NAME, "", ORIGIN, tuple(channels[at : at + GROUP_CHANNELS_MAX]))
            for at in range(0, len(channels), GROUP_CHANNELS_MAX)
        ]

    def __repr__(self) -> str:
        return f"<CobsDecoder {self.source}: {self._size} bytes, {len(self._columns)} channels>"

    def decode(self, frames: FrameBatch, _: Memory | None = None) -> Decoded:
        """Decode a batch; wire order is kept."""
        counts = Counts(frames=len(frames))
        content, whole = self._unstuffed(frames)
        if self._check is not None and len(content):
            data = np.ascontiguousarray(content[:, self._size :])
            said = data.view(self._crc_type + str(self._check.size))[:, 0].astype(np.uint32)
            right = compute(self._check, content[:, : self._size]) == said
            content, whole = content[right], whole[right]
        counts.decoded = len(whole)
        counts.undecoded = len(frames) - len(whole)
        batches = list(self._batches(content, frames.ts_ns[whole])) if len(whole) else []
        counts.signals = sum(batch.value.size for batch in batches)
        return Decoded(batches, counts)

    def _unstuffed(self, frames: FrameBatch) -> tuple[UInt8s, NDArray[np.intp]]:
        """uint8[n, struct and checksum] of the frames that have this length, and which ones they are."""
        size = self._size + (0 if self._check is None else self._check.size)
        if size > SIMPLE_BYTES_MAX:
            found = [(n, unstuffed(row[:length].tobytes())) for n, (row, length) in enumerate(_rows(frames))]
            found = [(n, content) for n, content in found if content is not None and len(content) == size]
            rows = np.array([n for n, _ in found], np.intp)
            joined = b"".join(content for _, content in found if content is not None)
            return np.frombuffer(joined, np.uint8).reshape(len(rows), size), rows
        rows = np.flatnonzero(frames.length == size + 1)
        stuffed = np.ascontiguousarray(frames.data[rows, : size + 1])
        content = stuffed.copy()
        at = np.zeros(len(rows), np.intp)
        active = np.arange(len(rows))
        while len(active):  # From code to code, all frames at once; as often as the one with the most zeros has codes.
            code = stuffed[active, at[active]]
            content[active, at[active]] = 0
            at[active] += np.where(code, code, size + 2)
            active = active[at[active] <= size]
        good = at == size + 1
        return np.ascontiguousarray(content[good, 1:]), rows[good]

    def _batches(self, content: UInt8s, ts_ns: NDArray[np.int64]) -> list[SignalBatch]:
        found, start = [], 0
        for group in self._groups:
            shape = len(group.channels), len(ts_ns)
            value, quality, texts = np.empty(shape), np.zeros(shape, np.int16), np.full(shape, None, np.object_)
            columns = self._columns[start : start + len(group.channels)]
            for number, (field, dtype, at) in enumerate(columns):
                raw = np.ascontiguousarray(content[:, at : at + int(dtype[2:])]).view(dtype)[:, 0]
                column = raw.astype(np.float64)
                if field.factor is None and field.offset is None:
                    for row in np.flatnonzero(np.abs(column) >= EXACT_MAX) if dtype[1] != "f" else ():
                        if abs(int(raw[row])) > EXACT_MAX:
                            texts[number, row] = str(int(raw[row]))
                with np.errstate(over="ignore", invalid="ignore"):
                    column = column if field.factor is None else column * field.factor
                    column = column if field.offset is None else column + field.offset
                quality[number, np.isnan(column)] = Quality.NOT_AVAILABLE
                quality[number, np.isinf(column)] = Quality.OUT_OF_RANGE
                value[number] = np.where(np.isfinite(column), column, np.nan)
            start += len(group.channels)
            text = texts if texts.any() else None
            found.append(SignalBatch(group, ts_ns, value, text, quality if quality.any() else None))
        return found


def _rows(frames: FrameBatch) -> list[tuple[UInt8s, int]]:
    return list(zip(frames.data, frames.length.tolist(), strict=True))


def unstuffed(payload: bytes) -> bytes | None:
    """The content of one frame; None if it is none."""
    content, at = bytearray(), 0
    while at < len(payload):
        code = payload[at]
        if not code or at + code > len(payload):
            return None
        content += payload[at + 1 : at + code]
        at += code
        if code < 0xFF and at < len(payload):
            content.append(0)
    return bytes(content)
