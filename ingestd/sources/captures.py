"""Capture files to frame batches: candump text, Vector ASC and BLF, PCAN TRC, CSV and MF4.

`open_capture` finds out by content what a file is; the `Capture` it returns gives batches of all sources interleaved,
in file order. Damage does not stop it: a bad line or record is counted, the first few are described, the rest goes on.

Limits and invariants:
- Every batch but the last has exactly the frames asked for, so boundaries are the same in every run: a feed's
  position depends on it.
- Memory is bounded whatever the file's size, except for MF4, whose channel groups are merged in memory.
- Stamps are integers. candump, CSV and BLF stamps are read as such (BLF: 10 µs or 1 ns units; CSV is rounded to
  microseconds, because its writers print floats). ASC and TRC go through python-can and MF4 through asammdf, which
  hand out float seconds: they are rounded to microseconds. Relative to the file's start a float64 resolves better
  than a nanosecond for months, so that what was written in microseconds comes back exactly.
- ASC, TRC, BLF and MF4 hold stamps relative to a date in their header: the stamp stays relative and the date becomes
  `utc_offset_ns`. A date without a zone is in the `timezone` given. TRC counts days from 1899-12-30, as PEAK's
  description says; a file whose converter counted otherwise (mdf4-converters: a day less) is read as it is written.
- A source is the interface's name. Where a file only has channel numbers, channel 1 is `can0` (ASC, BLF, TRC, CSV);
  MF4 of CANedge calls its channels CAN1 and CAN2, and so do we: bus 1 is `can1`.
"""

from __future__ import annotations

import base64
import binascii
import io
import logging
import math
import re
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, tzinfo
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from can import Message
from can.io import ASCReader, TRCReader
from can.io.asc import ASC_MESSAGE_REGEX
from can.util import dlc2len
from numpy.typing import NDArray

from ingestd.errors import CaptureError, UsageError
from ingestd.model import BATCH_FRAMES_MAX, ClockState, Flag, FrameBatch, Int64s, UInt8s
from ingestd.sources.candump import (
    EXTENDED_ID_MAX,
    FD_LENGTHS,
    LINE_BYTES_MAX,
    SECOND_NS,
    STAMP_NS_MAX,
    STANDARD_ID_MAX,
    CandumpParser,
    LineError,
    date_ns,
    parse_line,
)

KINDS = ("candump", "asc", "blf", "trc", "csv", "mf4")
SUPPORTED_HINT = "supported: candump text, Vector ASC and BLF, PCAN TRC, CSV of python-can, MF4; text also gzipped"
BLOCK_BYTES = (
    2 << 20
)  # Of the sizes tried, 1 to 4 MiB parse fastest; memory is some fifty times this at worst, in lines of one byte.
LINE_BLOCK_BYTES = 1 << 16  # For the kinds read line by line, where a block only has to make reading cheap.
HEAD_BYTES = 1 << 16  # What detection looks at.
ROWS_MAX = 4096  # Frames collected one by one before they become columns.
DAMAGE_DESCRIPTIONS_MAX = 5
ABSOLUTE_NS_MIN = 10**8 * SECOND_NS  # Stamps below (1973-03-03) count from the start of the recording.
RATE_MIN, RATE_MAX = 1e-3, 1e9
OBJECT_BYTES_MAX = 64 << 20  # A BLF object or container that claims more is damage; Vector's have about 128 kB.

Indices = NDArray[np.uint16]


@dataclass
class Damage:
    """How many lines or records could not be read, and what was wrong with the first few. Grows while reading."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str, reason: str) -> None:
        self.count += 1
        if len(self.first) < DAMAGE_DESCRIPTIONS_MAX:
            self.first.append(f"{where}: {reason}")

    def add_line(self, number: int, reason: str) -> None:
        self.add(f"line {number}", reason)

    def add_offset(self, offset: int, reason: str) -> None:
        self.add(f"offset {offset}", reason)

    def clear(self) -> None:
        self.count = 0
        self.first.clear()


@dataclass(frozen=True, slots=True)
class CaptureBatch:
    """Frames of all sources, interleaved, in file order.

    frames        columns as in `FrameBatch`; its `source` is ""
    source_index  uint16[n] into `sources`
    sources       every source seen so far, first seen first
    bytes_read    how far reading is in the file on disk, for a progress bar
    """

    frames: FrameBatch
    source_index: Indices
    sources: tuple[str, ...]
    bytes_read: int

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, rows: slice) -> CaptureBatch:
        """The frames that the slice selects; `sources` and `bytes_read` stay."""
        return CaptureBatch(self.frames[rows], self.source_index[rows], self.sources, self.bytes_read)

    def by_source(self) -> list[FrameBatch]:
        """One batch per source that occurs, in the order of `sources`; wire order is kept inside each."""
        occurring = np.flatnonzero(np.bincount(self.source_index, minlength=1))
        if len(self) == 0:
            return []
        if len(occurring) == 1:
            return [replace(self.frames, source=self.sources[int(occurring[0])])]
        return [replace(self.frames[self.source_index == i], source=self.sources[i]) for i in occurring.tolist()]


class Sources:
    """Names found in a file to source indices, first seen first; two names may be mapped to one source."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names
        self._index: dict[str, int] = {}

    def index(self, name: str) -> int:
        return self._index.setdefault(self._names.get(name, name), len(self._index))

    def indices(self, channels: NDArray[Any], prefix: str = "can") -> Indices:
        """Source indices of channel numbers, each named `<prefix><number>`, given out in order of appearance."""
        numbers, first, inverse = np.unique(channels, return_index=True, return_inverse=True)
        table = np.zeros(len(numbers), np.uint16)
        for position in np.argsort(first).tolist():
            table[position] = self.index(f"{prefix}{numbers[position]}")
        indices: Indices = table[inverse]
        return indices

    def seen(self) -> tuple[str, ...]:
        return tuple(self._index)


class Capture(ABC):
    """One capture file. Its clock is known once `open_capture` has returned; its damage once it has been read."""

    kind: str

    def __init__(self, path: Path, options: Options) -> None:
        self.path = path
        self.size_bytes = path.stat().st_size
        self.damage = Damage()
        self.utc_offset_ns = 0
        self.clock_state = ClockState.UNSET
        self._options = options

    def __repr__(self) -> str:
        return f"<Capture {self.kind} {self.path}>"

    def batches(self, frames_max: int = BATCH_FRAMES_MAX) -> Iterator[CaptureBatch]:
        """All frames from the start, `frames_max` at a time; only the last batch has fewer. Resets `damage`.

        Raises CaptureError when the file vanishes or cannot be read on.
        """
        if frames_max < 1:
            raise ValueError(f"a batch has at least one frame, not {frames_max}")
        self.damage.clear()
        try:
            yield from _rebatch(self._pieces(), frames_max)
        except OSError as error:
            raise _unreadable(self.path, error) from error

    @abstractmethod
    def _pieces(self) -> Iterator[CaptureBatch]:
        """Batches of whatever size reading gives."""

    def _set_clock(self, utc_offset_ns: int | None) -> None:
        """The date of the header, or None if there is no valid one."""
        self.utc_offset_ns = utc_offset_ns or 0
        self.clock_state = ClockState.UNSET if utc_offset_ns is None else ClockState.SET

    def _set_clock_by_stamp(self, ts_ns: int) -> None:
        """For kinds without header: absolute stamps are the time itself."""
        self.clock_state = ClockState.SET if ts_ns >= ABSOLUTE_NS_MIN else ClockState.UNSET

    def _probe(self) -> None:
        """Read until the first frame. Raises CaptureError if the file holds nothing but damage."""
        for piece in self._pieces():
            if len(piece) > 0:
                break
        else:
            if self.damage.count > 0:
                raise CaptureError(
                    f"{self.path} holds no frame that can be read as {self.kind}; {self.damage.first[0]}",
                    SUPPORTED_HINT,
                )
        self.damage.clear()


@dataclass(frozen=True, slots=True)
class Options:
    """What the user said about a capture."""

    source_names: Mapping[str, str]
    rate: Fraction | None
    timezone: tzinfo


def open_capture(
    path: Path | str,
    *,
    source_names: Mapping[str, str] | None = None,
    rate: float | None = None,
    timezone: tzinfo = UTC,
) -> Capture:
    """The capture at `path`, whatever its kind: found by content first, by the name's extension second.

    `source_names` renames interfaces of the file; `rate` is frames per second for captures without stamps;
    `timezone` is the zone of dates that have none. Raises CaptureError for anything that is not a readable capture,
    UsageError for an impossible rate.
    """
    path = Path(path)
    if rate is not None and not (math.isfinite(rate) and RATE_MIN <= rate <= RATE_MAX):
        raise UsageError(f"a rate of {rate} frames per second is impossible", f"{RATE_MIN:g} to {RATE_MAX:g}")
    options = Options(source_names or {}, None if rate is None else Fraction(rate), timezone)
    try:
        if path.is_dir():
            raise CaptureError(f"{path} is a directory, not a capture", "name the files in it")
        kind = _detect(path)
        capture = _CAPTURES[kind](path, options)
        capture._probe()
    except OSError as error:
        raise _unreadable(path, error) from error
    return capture


def _unreadable(path: Path, error: OSError) -> CaptureError:
    return CaptureError(f"{path} cannot be read: {error.strerror or error}", "is the path right, and may you read it?")


# What a file is.

_CANDUMP, _ASC, _TRC, _CSV, _BLF, _MF4 = "candump", "asc", "trc", "csv", "blf", "mf4"
_MAGIC = {b"LOGG": _BLF, b"MDF ": _MF4, b"UnFi": _MF4}
_EXTENSIONS = {
    ".log": _CANDUMP,
    ".candump": _CANDUMP,
    ".asc": _ASC,
    ".trc": _TRC,
    ".csv": _CSV,
    ".blf": _BLF,
    ".mf4": _MF4,
    ".mdf": _MF4,
}
_PYTHON_CAN_CSV = "timestamp,arbitration_id,extended,remote,error,dlc,data"
_SEMICOLON_CSV = "timestampepoch;buschannel;id;ide;dlc;datalength;dir;edl;brs;databytes"
_SIGNS = (
    (_ASC, re.compile(r"date\s+\w+\s+\w+\s+\d|base\s+(hex|dec)\b|begin\s+triggerblock\b", re.IGNORECASE)),
    (_ASC, ASC_MESSAGE_REGEX),
    (_TRC, re.compile(r";\$(FILEVERSION|STARTTIME|COLUMNS)=|;\s*(PCAN|Start time:)|\d+\)\s+\d+(\.\d+)?\s+\S")),
    (_CSV, re.compile(f"{_PYTHON_CAN_CSV}|{_SEMICOLON_CSV}", re.IGNORECASE)),
)


def _detect(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not head:
        raise CaptureError(f"{path} is empty", SUPPORTED_HINT)
    name = path
    if head.startswith(_GZIP_MAGIC):
        name = path.with_suffix("")
        head = next((data for data, _ in _read_blocks(path, HEAD_BYTES, Damage())), b"")
        if head[:4] in _MAGIC:
            raise CaptureError(f"{path} is a gzipped {_MAGIC[head[:4]]} file", "unpack it with gunzip first")
    kind = _MAGIC.get(head[:4]) or _detect_text(head) or _EXTENSIONS.get(name.suffix.lower())
    if kind is None:
        raise CaptureError(f"{path} is not a capture of a known kind", SUPPORTED_HINT)
    return kind


def _detect_text(head: bytes) -> str | None:
    for line in head.splitlines():
        text = _decode(line).strip()
        for kind, sign in _SIGNS:
            if sign.match(text):
                return kind
        try:
            if parse_line(line) is not None:
                return _CANDUMP
        except LineError:
            pass
    return None


# Bytes to blocks and lines.

_GZIP_MAGIC = b"\x1f\x8b"


def _read_blocks(path: Path, block_bytes: int, damage: Damage) -> Iterator[tuple[bytes, int]]:
    """Blocks of a file, unpacked if it is gzip, each with the position on disk. A damaged gzip ends early."""
    with path.open("rb") as file:
        packed = file.read(2) == _GZIP_MAGIC
        file.seek(0)
        if packed:
            yield from _gunzip(file, block_bytes, damage)
            return
        while block := file.read(block_bytes):
            yield block, file.tell()


def _gunzip(file: BinaryIO, block_bytes: int, damage: Damage) -> Iterator[tuple[bytes, int]]:
    """Unlike `gzip`, gives what comes before the damage of a cut or broken file. Several members are one stream."""
    unpacker = zlib.decompressobj(wbits=31)
    packed = file.read(LINE_BLOCK_BYTES)
    while packed:
        try:
            block = unpacker.decompress(packed, block_bytes)
        except zlib.error as error:
            damage.add_offset(file.tell() - len(packed), f"the gzip stream is broken ({error})")
            return
        if block:
            yield block, file.tell()
        packed = unpacker.unconsumed_tail
        if unpacker.eof:
            packed = unpacker.unused_data.lstrip(b"\0") or file.read(LINE_BLOCK_BYTES).lstrip(b"\0")
            if packed:
                unpacker = zlib.decompressobj(wbits=31)
        elif not packed:
            packed = file.read(LINE_BLOCK_BYTES)
    if not unpacker.eof:
        damage.add_offset(file.tell(), "the gzip stream is cut off")


def _whole_lines(blocks: Iterable[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    """The same bytes cut at line ends. A line that is too long for any format is cut short, so that memory is bounded;
    what is left of it is still too long and the parser calls it damage."""
    rest = b""
    position = 0
    for block, position in blocks:
        end = block.rfind(b"\n") + 1
        if end == 0:
            rest = (rest + block)[: LINE_BYTES_MAX + 1]
            continue
        yield rest + block[:end], position
        rest = block[end:][: LINE_BYTES_MAX + 1]
    if rest:
        yield rest, position


def _decode(line: bytes) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError:
        return line.decode("latin-1")


class _LineFeed(io.TextIOBase):
    """Lines of a file as a text file that python-can can read, which knows the number of the line it gave last.

    `prepare` sees every line first and gives the lines to hand out instead of it: none, one or several.
    """

    def __init__(self, path: Path, damage: Damage, prepare: Callable[[str], Iterable[str]]) -> None:
        self.number = 0
        self.position = 0
        self.damage = damage
        self._prepare = prepare
        self._lines = self._read(path)

    def _read(self, path: Path) -> Iterator[str]:
        for block, position in _whole_lines(_read_blocks(path, LINE_BLOCK_BYTES, self.damage)):
            self.position = position
            for line in block.removesuffix(b"\n").split(b"\n"):
                self.number += 1
                if len(line) > LINE_BYTES_MAX:
                    self.reject(f"longer than {LINE_BYTES_MAX} bytes")
                    continue
                yield from self._prepare(_decode(line).strip())

    def readline(self, _size: int = -1, /) -> str:  # type: ignore[override]
        return next(self._lines, "")

    def reject(self, reason: str) -> None:
        """Count the line that was given last as damage."""
        self.damage.add_line(self.number, reason)


def _empty_batch(sources: tuple[str, ...] = (), bytes_read: int = 0) -> CaptureBatch:
    return _Rows().take(sources, bytes_read)


def _rebatch(pieces: Iterable[CaptureBatch], frames_max: int) -> Iterator[CaptureBatch]:
    """Batches of exactly `frames_max` frames, but for the last, out of pieces of any size."""
    held: list[CaptureBatch] = []
    count = sources_count = 0
    for piece in pieces:
        begin = 0
        while begin < len(piece):
            part = piece[begin : begin + frames_max - count]
            begin += len(part)
            count += len(part)
            held.append(part)
            if count == frames_max:
                batch = _join(held, sources_count)
                sources_count = len(batch.sources)
                yield batch
                held, count = [], 0
    if held:
        yield _join(held, sources_count)


def _join(parts: list[CaptureBatch], sources_count: int) -> CaptureBatch:
    """One batch, as wide as its longest payload needs, whose sources are those seen up to its end and no further."""
    length = np.concatenate([part.frames.length for part in parts])
    width = max(8, -(-int(length.max(initial=0)) // 8) * 8)
    data = np.zeros((len(length), width), np.uint8)
    begin = 0
    for part in parts:
        shared = min(width, part.frames.data.shape[1])
        data[begin : begin + len(part), :shared] = part.frames.data[:, :shared]
        begin += len(part)
    index = np.concatenate([part.source_index for part in parts])
    frames = FrameBatch(
        "",
        np.concatenate([part.frames.ts_ns for part in parts]),
        np.concatenate([part.frames.arbitration_id for part in parts]),
        np.concatenate([part.frames.flags for part in parts]),
        length,
        data,
    )
    seen = max(sources_count, int(index.max(initial=0)) + 1)
    return CaptureBatch(frames, index, parts[-1].sources[:seen], parts[-1].bytes_read)


class _Rows:
    """Frames collected one at a time, for the kinds whose reader gives them so; columns as soon as there are enough."""

    def __init__(self) -> None:
        self.ts_ns: list[int] = []
        self.arbitration_id: list[int] = []
        self.flags: list[int] = []
        self.payload: list[bytes] = []
        self.source_index: list[int] = []

    def __len__(self) -> int:
        return len(self.ts_ns)

    def add(self, ts_ns: int, arbitration_id: int, flags: int, payload: bytes, sources: Sources, name: str) -> None:
        """Raises LineError, and adds nothing, when a value is out of range."""
        if not -STAMP_NS_MAX <= ts_ns <= STAMP_NS_MAX:
            raise LineError("the time stamp is out of range")
        if not 0 <= arbitration_id <= (EXTENDED_ID_MAX if flags & Flag.EXTENDED else STANDARD_ID_MAX):
            raise LineError("the arbitration id is out of range")
        if (len(payload) not in FD_LENGTHS) if flags & Flag.FD else (len(payload) > 8):
            raise LineError(f"a payload of {len(payload)} bytes")
        self.source_index.append(sources.index(name))
        self.ts_ns.append(ts_ns)
        self.arbitration_id.append(arbitration_id)
        self.flags.append(flags)
        self.payload.append(payload)

    def take(self, sources: tuple[str, ...], bytes_read: int) -> CaptureBatch:
        """The frames so far as columns; starts anew."""
        length = np.array([len(payload) for payload in self.payload], np.uint16)
        width = max(8, -(-int(length.max(initial=0)) // 8) * 8)
        joined = b"".join([payload.ljust(width, b"\0") for payload in self.payload])
        frames = FrameBatch(
            "",
            np.array(self.ts_ns, np.int64),
            np.array(self.arbitration_id, np.uint32),
            np.array(self.flags, np.uint8),
            length,
            np.frombuffer(joined, np.uint8).reshape(-1, width),
        )
        batch = CaptureBatch(frames, np.array(self.source_index, np.uint16), sources, bytes_read)
        self.__init__()  # type: ignore[misc]
        return batch


# candump.


class CandumpCapture(Capture):
    """candump text; the parsing is in `candump`."""

    kind = _CANDUMP

    def __init__(self, path: Path, options: Options, block_bytes: int = BLOCK_BYTES) -> None:
        super().__init__(path, options)
        self._block_bytes = block_bytes
        self._rate: Fraction | None = None

    def _pieces(self) -> Iterator[CaptureBatch]:
        sources = Sources(self._options.source_names)
        parser = CandumpParser(self.damage.add_line, self._rate, self._options.timezone)
        for block, position in _whole_lines(_read_blocks(self.path, self._block_bytes, self.damage)):
            parsed = parser.parse(block)
            names = [sources.index(name.decode("ascii")) for name in parsed.interfaces] or [0]
            frames = FrameBatch("", parsed.ts_ns, parsed.arbitration_id, parsed.flags, parsed.length, parsed.data)
            yield CaptureBatch(frames, np.array(names, np.uint16)[parsed.interface], sources.seen(), position)

    def _probe(self) -> None:
        """The first frame's stamp, or the lack of it, decides what the file's stamps are."""
        if self._has_stamps():
            for piece in self._pieces():
                if len(piece) > 0:
                    self._set_clock_by_stamp(int(piece.frames.ts_ns[0]))
                    break
        elif self._options.rate is None:
            raise CaptureError(
                f"{self.path} has no time stamps", "say how fast it was recorded: --rate FRAMES_PER_SECOND"
            )
        else:
            self._rate = self._options.rate
        super()._probe()

    def _has_stamps(self) -> bool:
        for block, _ in _whole_lines(_read_blocks(self.path, LINE_BLOCK_BYTES, Damage())):
            for line in block.split(b"\n"):
                try:
                    frame = parse_line(line, self._options.timezone)
                except LineError:
                    continue
                if frame is not None:
                    return frame.ts_ns is not None
        return True  # There is no frame at all; that is for `_probe` to say.


# ASC and TRC: python-can reads the lines, the classes below see to dates, damage and line numbers.


def _flags_of(message: Message) -> int:
    return (
        Flag.EXTENDED * message.is_extended_id
        | Flag.REMOTE * message.is_remote_frame
        | Flag.FD * message.is_fd
        | Flag.BITRATE_SWITCH * message.bitrate_switch
        | Flag.ERROR_STATE * message.error_state_indicator
        | Flag.TRANSMITTED * (not message.is_rx)
    )


def _add_message(rows: _Rows, message: Message, shift_ns: int, sources: Sources, channel_first: int) -> None:
    """Raises LineError when the message cannot be a frame."""
    if not math.isfinite(message.timestamp) or abs(message.timestamp) > STAMP_NS_MAX / SECOND_NS:
        raise LineError("the time stamp is out of range")
    flags = _flags_of(message)
    if message.is_error_frame:
        flags = flags & ~Flag.EXTENDED | Flag.ERROR  # python-can's default for a frame without id is extended.
    payload = b"" if message.is_remote_frame else bytes(message.data)
    channel = message.channel if isinstance(message.channel, int) else channel_first
    name = f"can{max(channel - channel_first, 0)}"
    rows.add(round(message.timestamp * 1e6) * 1000 + shift_ns, message.arbitration_id, flags, payload, sources, name)


class LinesCapture(Capture):
    """A text kind that is read a line at a time."""

    def _feed(self, prepare: Callable[[str], Iterable[str]]) -> _LineFeed:
        return _LineFeed(self.path, self.damage, prepare)

    def _collect(self, feed: _LineFeed, adders: Iterable[Callable[[_Rows, Sources], None]]) -> Iterator[CaptureBatch]:
        """Call each adder right after the line it comes from was read; a LineError is the damage of that line."""
        sources, rows = Sources(self._options.source_names), _Rows()
        for add in adders:
            try:
                add(rows, sources)
            except LineError as error:
                feed.reject(str(error))
            if len(rows) >= ROWS_MAX:
                yield rows.take(sources.seen(), feed.position)
        yield rows.take(sources.seen(), feed.position)


# Everything a malformed line has been seen to raise inside python-can's parsers.
_PARSE_ERRORS = (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError)

_ASC_DATE = re.compile(r"date\s+\w+\s+(?P<date>.+)", re.IGNORECASE)
_ASC_TRIGGER = re.compile(r"begin\s+triggerblock(?:\s+\w+\s+(?P<date>.+))?", re.IGNORECASE)
_ASC_BASE = re.compile(r"base\s+(hex|dec)(?:\s+timestamps\s+(?P<stamps>absolute|relative))?", re.IGNORECASE)
_ASC_EVENTS = re.compile(r"(no)?\s*internal\s+events\s+logged", re.IGNORECASE)
_ASC_REMARK = re.compile(r"//|end\s+triggerblock|begin\s+triggerblock|date\s|base\s|$", re.IGNORECASE)
_ASC_STAMPED = re.compile(r"(?P<stamp>\d+\.\d+)\s+(?P<event>.+)")
_ASC_FRAME_LIKE = re.compile(r"\d+\s+[0-9A-Fa-f]+x?(\s|$)", re.ASCII)
_ASC_LONG = re.compile(
    r"(?P<id>\w+)\s+(?P<dir>Rx|Tx)\s+d\s+(?P<dlc>\w{1,2})\s+(?P<data>(?:[0-9a-f]{2}(?:\s+|$)){9,64})", re.IGNORECASE
)
_ASC_CLOCK = re.compile(
    r"(?P<month>[^\W\d]+)\s+(?P<day>\d+)\s+(?P<hour>\d+):(?P<minute>\d+):(?P<second>\d+)(?P<fraction>\.\d+)?"
    r"(?:\s+(?P<half>am|pm))?\s+(?P<year>\d{4})",
    re.IGNORECASE,
)
_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_MONTHS_GERMAN = {"mär": 3, "mrz": 3, "mai": 5, "okt": 10, "dez": 12}


def _asc_date_ns(text: str, zone: tzinfo) -> int | None:
    """`Sep 30 10:06:13.191 PM 2017` (months also in German) in `zone`, or None when it is no date."""
    match = _ASC_CLOCK.match(text.strip())
    if match is None:
        return None
    name = match["month"][:3].lower()
    month = _MONTHS.index(name) + 1 if name in _MONTHS else _MONTHS_GERMAN.get(name, 0)
    hour = int(match["hour"])
    if match["half"]:
        hour = hour % 12 + (12 if match["half"].lower() == "pm" else 0)
    fraction_ns = round(Decimal(match["fraction"] or 0) * SECOND_NS)
    return _zoned_ns(
        (int(match["year"]), month, int(match["day"]), hour, int(match["minute"]), int(match["second"])),
        fraction_ns,
        zone,
    )


def _zoned_ns(parts: tuple[int, int, int, int, int, int], fraction_ns: int, zone: tzinfo) -> int | None:
    """Nanoseconds since 1970 of year, month, day, hour, minute, second in `zone`; None when that is no date."""
    try:
        ns = date_ns(datetime(*parts, tzinfo=zone)) + fraction_ns
    except (ValueError, OverflowError):
        return None
    return ns if abs(ns) <= STAMP_NS_MAX else None


class _AscText:
    """Prepares ASC lines for python-can's reader and keeps what it does not: dates, relative stamps, damage.

    The reader takes the first line that is no header line for one and drops it, which costs a frame where the line
    `internal events logged` is missing (mdf4-converters leave it out); here that line is put in.
    """

    def __init__(self, zone: tzinfo) -> None:
        self.feed: _LineFeed | None = None
        self.date_ns: int | None = None
        self.started = False  # A stamped line was seen: the dates before it are the file's start.
        self._zone = zone
        self._relative = False
        self._elapsed_ns = 0
        self._in_header = True

    def prepare(self, line: str) -> Iterator[str]:
        if self._in_header:
            if match := _ASC_BASE.match(line):
                self._relative = (match["stamps"] or "").lower() == "relative"
                yield line + "\n"
                return
            if match := _ASC_DATE.match(line):
                self._date(match)
                return
            if _ASC_EVENTS.match(line) or line.startswith("//") or not line:
                return
        if trigger := _ASC_TRIGGER.match(line):
            self._date(trigger)
            self._elapsed_ns = 0
        elif match := _ASC_STAMPED.match(line):
            if self._in_header:
                self._in_header = False
                yield "internal events logged\n"
            self.started = True
            yield from self._stamped(match)
        elif not _ASC_REMARK.match(line) and not _ASC_EVENTS.match(line):
            self._reject("not a line of an ASC file")

    def _date(self, match: re.Match[str]) -> None:
        """The latest date applies to the stamps that follow, as in python-can."""
        ns = _asc_date_ns(match["date"] or "", self._zone)
        if ns is not None:
            self.date_ns = ns

    def _stamped(self, match: re.Match[str]) -> Iterator[str]:
        event = match["event"]
        if not ASC_MESSAGE_REGEX.match(f"{match['stamp']} {event}") and _ASC_FRAME_LIKE.match(event):
            self._reject("a frame that is not whole")
            return
        stamp = match["stamp"]
        if self._relative:  # Every stamp, of frames or not, counts from the line before it.
            self._elapsed_ns += round(Decimal(stamp) * SECOND_NS)
            stamp = f"{self._elapsed_ns // SECOND_NS}.{self._elapsed_ns % SECOND_NS:09d}"
        yield f"{stamp} {event}\n"

    def _reject(self, reason: str) -> None:
        if self.feed is not None:
            self.feed.reject(reason)


class _AscReader(ASCReader):
    """python-can's reader, for which a bad frame is damage and not the end of the file."""

    def __init__(self, feed: _LineFeed) -> None:
        super().__init__(feed)  # type: ignore[arg-type]
        self._feed = feed

    def _process_classic_can_frame(self, line: str, msg_kwargs: dict[str, Any]) -> Message | None:  # type: ignore[override]
        try:
            message = self._long_frame(line, msg_kwargs) or super()._process_classic_can_frame(line, msg_kwargs)
        except _PARSE_ERRORS as error:
            self._feed.reject(f"not a frame ({error})")
            return None
        complete = min(8, message.dlc) if not message.is_fd else message.dlc
        return self._checked(message, complete)

    def _process_fd_can_frame(self, line: str, msg_kwargs: dict[str, Any]) -> Message | None:  # type: ignore[override]
        if line.split()[-2:] == ["0", "0"]:
            line += " -"  # The reader wants something behind the length, even when that is 0.
        try:
            message = super()._process_fd_can_frame(line, msg_kwargs)
        except _PARSE_ERRORS as error:
            self._feed.reject(f"not a CAN FD frame ({error})")
            return None
        if message.is_remote_frame and message.dlc == 0:
            message.is_remote_frame = False  # CAN FD has no remote frames (ISO 11898-1); the reader guesses from DLC 0.
        return self._checked(message, message.dlc)

    def _long_frame(self, line: str, msg_kwargs: dict[str, Any]) -> Message | None:
        """A line of a classic frame with more than 8 bytes: mdf4-converters write CAN FD frames so, DLC in decimal."""
        match = _ASC_LONG.match(line)
        if match is None:
            return None
        data = bytes.fromhex(match["data"])
        if len(data) not in {dlc2len(int(match["dlc"], base)) for base in (10, 16) if _is_number(match["dlc"], base)}:
            raise ValueError(f"DLC {match['dlc']} with {len(data)} bytes")
        self._extract_can_id(match["id"], msg_kwargs)
        return Message(**msg_kwargs, is_rx=match["dir"].lower() == "rx", is_fd=True, dlc=len(data), data=data)

    def _checked(self, message: Message, complete: int) -> Message | None:
        if not message.is_remote_frame and not message.is_error_frame and len(message.data) != complete:
            self._feed.reject(f"{len(message.data)} payload bytes instead of {complete}")
            return None
        return message


def _is_number(text: str, base: int) -> bool:
    try:
        return int(text, base) < 16
    except ValueError:
        return False


class AscCapture(LinesCapture):
    """Vector ASC, absolute or relative stamps. Chip states, statistics and J1939 events are skipped, as in python-can.

    The date that applies is the latest of `date` and `Begin Triggerblock` before the first event; a later trigger
    block's frames are moved by the difference of the dates.
    """

    kind = _ASC

    def __init__(self, path: Path, options: Options) -> None:
        super().__init__(path, options)
        text = _AscText(options.timezone)
        feed = _LineFeed(path, Damage(), text.prepare)
        while not text.started and feed.readline():
            pass
        self._set_clock(text.date_ns)

    def _pieces(self) -> Iterator[CaptureBatch]:
        text = _AscText(self._options.timezone)
        feed = text.feed = self._feed(text.prepare)

        def adders() -> Iterator[Callable[[_Rows, Sources], None]]:
            for message in _AscReader(feed):
                shift_ns = 0 if text.date_ns is None else text.date_ns - self.utc_offset_ns
                yield lambda rows, sources, m=message, s=shift_ns: _add_message(rows, m, s, sources, 0)  # type: ignore[misc]

        yield from self._collect(feed, adders())


_TRC_START = re.compile(r";\s*Start time:\s*(?P<date>.+)", re.IGNORECASE)
_TRC_DATES = (
    re.compile(r"(?P<day>\d{1,2})\.(?P<month>\d{1,2})\.(?P<year>\d{4})"),
    re.compile(r"(?P<year>\d{4})-(?P<month>\d{1,2})-(?P<day>\d{1,2})"),
    re.compile(r"(?P<month>\d{1,2})/(?P<day>\d{1,2})/(?P<year>\d{4})"),
)
_TRC_CLOCK = re.compile(
    r"\s+(?P<hour>\d{1,2}):(?P<minute>\d\d):(?P<second>\d\d)(?:\.(?P<ms>\d{3})(?:\.(?P<us>\d{1,3}))?)?(?:\s*(?P<half>AM|PM))?",
    re.IGNORECASE,
)
_TRC_EPOCH = (1899, 12, 30, 0, 0, 0)
_DAY_NS = 86_400 * SECOND_NS


def _trc_date_ns(line: str, zone: tzinfo) -> int | None:
    """The date of a header line in `zone`, or None: `;$STARTTIME=` counts days, `; Start time:` is for people."""
    if line.startswith(";$STARTTIME="):
        try:
            since_epoch_ns = round(Decimal(line.partition("=")[2].strip()) * _DAY_NS / 1000) * 1000
        except (InvalidOperation, ValueError, OverflowError):
            return None
        start_ns = _zoned_ns(_TRC_EPOCH, 0, UTC)
        if start_ns is None or not 0 < since_epoch_ns < STAMP_NS_MAX:
            return None
        naive = start_ns + since_epoch_ns
        date = np.datetime64(naive // SECOND_NS, "s").item()
        parts = (date.year, date.month, date.day, date.hour, date.minute, date.second)
        return _zoned_ns(parts, naive % SECOND_NS, zone)
    start = _TRC_START.match(line)
    for pattern in _TRC_DATES if start else ():
        day = pattern.match(start["date"])  # type: ignore[index]
        clock = _TRC_CLOCK.match(start["date"], day.end()) if day else None  # type: ignore[index]
        if day and clock:
            hour = int(clock["hour"])
            if clock["half"]:
                hour = hour % 12 + (12 if clock["half"].lower() == "pm" else 0)
            fraction_ns = int(clock["ms"] or 0) * 1_000_000 + int((clock["us"] or "0").ljust(1, "0")) * 1000
            date_parts = (int(day["year"]), int(day["month"]), int(day["day"]))
            return _zoned_ns((*date_parts, hour, int(clock["minute"]), int(clock["second"])), fraction_ns, zone)
    return None


class _TrcReader(TRCReader):
    """python-can's reader with relative stamps, for which a bad line is damage; error frames are kept."""

    def __init__(self, feed: _LineFeed) -> None:
        super().__init__(feed)  # type: ignore[arg-type]
        self._feed = feed

    def _extract_header(self) -> str:
        line = super()._extract_header()
        self._start_time = 0.0  # The date goes into the offset; added to a float it would cost a digit.
        return line

    def _parse_line(self, line: str) -> Message | None:
        if not line or line.startswith(";"):
            return None  # What the header ended with in a file without frames.
        try:
            cols = tuple(line.split(maxsplit=self._num_columns))
            message = self._error_frame(cols) or self._parse_cols(cols)
        except _PARSE_ERRORS as error:
            self._feed.reject(f"not a frame ({error})")
            return None
        if message is not None and not message.is_remote_frame and not message.is_error_frame:
            complete = dlc2len(message.dlc) if message.is_fd else message.dlc
            if len(message.data) != complete:
                self._feed.reject(f"{len(message.data)} payload bytes instead of {complete}")
                return None
        return message

    def _error_frame(self, cols: tuple[str, ...]) -> Message | None:
        """Type `ER` of version 2, `Error` of version 1; python-can skips them."""
        if self.columns and cols[self.columns["T"]] == "ER":
            bus = cols[self.columns["B"]] if "B" in self.columns else "1"
            return Message(is_error_frame=True, timestamp=float(cols[self.columns["O"]]) / 1000, channel=int(bus))
        if not self.columns and "Error" in cols[2:4]:
            bus = cols[2] if cols[3] == "Error" else "1"
            return Message(is_error_frame=True, timestamp=float(cols[1]) / 1000, channel=int(bus))
        return None


class TrcCapture(LinesCapture):
    """PCAN trace, versions 1.0, 1.1, 1.3, 2.0 and 2.1. Warnings and status are skipped, as in python-can."""

    kind = _TRC

    def __init__(self, path: Path, options: Options) -> None:
        super().__init__(path, options)
        dates: dict[bool, int | None] = {}

        def look(line: str) -> Iterator[str]:
            date = _trc_date_ns(line, options.timezone)
            if date is not None:
                dates.setdefault(line.startswith(";$"), date)
            yield line + "\n"

        feed = _LineFeed(path, Damage(), look)
        while (line := feed.readline()) and (line.startswith(";") or not line.strip()):
            version = re.match(r";\$FILEVERSION=(.*)", line)
            number = version[1].strip() if version else "1.0"
            if number not in ("1.0", "1.1", "1.3", "2.0", "2.1"):
                raise CaptureError(f"{path} is a PCAN trace of version {number}", "convert it to version 2.1")
        self._set_clock(dates.get(True, dates.get(False)))

    def _pieces(self) -> Iterator[CaptureBatch]:
        # The date has been read; the reader would stop at one that is not a number.
        feed = self._feed(lambda line: () if line.startswith(";$STARTTIME") else (line + "\n",))

        def adders() -> Iterator[Callable[[_Rows, Sources], None]]:
            for message in _TrcReader(feed):
                yield lambda rows, sources, m=message: _add_message(rows, m, 0, sources, 1)  # type: ignore[misc]

        try:
            yield from self._collect(feed, adders())
        except (ValueError, NotImplementedError) as error:  # The header: lines have been dealt with.
            raise CaptureError(f"{self.path} has no usable TRC header: {error}", SUPPORTED_HINT) from error


# CSV.


def _csv_stamp(text: str) -> int:
    """Seconds in decimal to nanoseconds, rounded to microseconds: the writers print floats."""
    try:
        return round(Decimal(text) * 1_000_000) * 1000
    except (InvalidOperation, ValueError, OverflowError) as error:
        raise LineError("the time stamp is not a number") from error


def _csv_numbers(texts: Iterable[str], base: int = 10) -> list[int]:
    try:
        return [int(text, base) for text in texts]
    except ValueError as error:
        raise LineError(f"not a number ({error})") from error


def _add_python_can_row(rows: _Rows, sources: Sources, fields: list[str]) -> None:
    """timestamp, arbitration_id (hex), extended, remote, error, dlc, data (base64); no channel: it is can0."""
    if len(fields) != 7:
        raise LineError(f"{len(fields)} columns instead of 7")
    (arbitration_id,) = _csv_numbers(fields[1:2], 16)
    extended, remote, error, dlc = _csv_numbers(fields[2:6])
    flags = Flag.EXTENDED * bool(extended) | Flag.REMOTE * bool(remote)
    if error:
        flags = int(Flag.ERROR)
    try:
        payload = base64.b64decode(fields[6], validate=True)
    except binascii.Error as bad:
        raise LineError("the payload is not base64") from bad
    if remote:
        payload = b""
    elif len(payload) != dlc:
        raise LineError(f"{len(payload)} payload bytes instead of {dlc}")
    if len(payload) > 8:
        flags |= Flag.FD  # The format has no column for it.
    rows.add(_csv_stamp(fields[0]), arbitration_id, flags, payload, sources, "can0")


def _add_semicolon_row(rows: _Rows, sources: Sources, fields: list[str]) -> None:
    """TimestampEpoch;BusChannel;ID;IDE;DLC;DataLength;Dir;EDL;BRS;DataBytes of mdf4-converters; ID and bytes in hex."""
    if len(fields) != 10:
        raise LineError(f"{len(fields)} columns instead of 10")
    (arbitration_id,) = _csv_numbers(fields[2:3], 16)
    bus, extended, _, length, sent, fd, brs = _csv_numbers([fields[1], *fields[3:9]])
    flags = (
        Flag.EXTENDED * bool(extended)
        | Flag.TRANSMITTED * bool(sent)
        | Flag.FD * bool(fd)
        | Flag.BITRATE_SWITCH * bool(brs)
    )
    try:
        payload = binascii.unhexlify(fields[9])
    except ValueError as bad:
        raise LineError("the payload is not hexadecimal") from bad
    if len(payload) != length:
        raise LineError(f"{len(payload)} payload bytes instead of {length}")
    rows.add(_csv_stamp(fields[0]), arbitration_id, flags, payload, sources, f"can{max(bus - 1, 0)}")


class CsvCapture(LinesCapture):
    """CSV as python-can writes it, or with semicolons as mdf4-converters do; read here, to keep stamps decimal."""

    kind = _CSV

    def _pieces(self) -> Iterator[CaptureBatch]:
        feed = self._feed(lambda line: (line + "\n",))

        def adders() -> Iterator[Callable[[_Rows, Sources], None]]:
            separator, add_row = ",", _add_python_can_row
            while line := feed.readline():
                text = line.strip()
                if text.lower() == _SEMICOLON_CSV:
                    separator, add_row = ";", _add_semicolon_row
                elif text and text.lower() != _PYTHON_CAN_CSV:
                    yield lambda rows, sources, s=separator, a=add_row, t=text: a(rows, sources, t.split(s))  # type: ignore[misc]

        yield from self._collect(feed, adders())

    def _probe(self) -> None:
        super()._probe()
        for piece in self._pieces():
            if len(piece) > 0:
                self._set_clock_by_stamp(int(piece.frames.ts_ns[0]))
                break
        self.damage.clear()


# BLF: objects in (mostly compressed) containers. The layouts are those of Vector's binlog API, as python-can reads
# them; here whole containers become columns, stamps stay integers, and a bad object costs no more than itself.

_FILE_HEADER = struct.Struct("<4sL32x8H")
_OBJECT_HEADER = struct.Struct("<4sHHLL")  # signature, header size, header version, object size, type
_CONTAINER_HEADER = struct.Struct("<H14x")  # compression
_CONTAINER = 10
_STORED, _DEFLATED = 0, 2
_STAMPED_HEADER = np.dtype(
    {"names": ["size", "flags", "stamp"], "formats": ["<u4", "<u4", "<u8"], "offsets": [8, 16, 24], "itemsize": 32}
)
_TEN_MICROSECONDS = 1  # Object flag; otherwise the unit is a nanosecond.
_BLF_EXTENDED = 0x80000000


@dataclass(frozen=True, slots=True)
class _ObjectLayout:
    """Where a frame object holds what, behind its header. Names of columns that are absent read as zero."""

    body: np.dtype[np.void]
    flag_bits: dict[str, dict[int, int]]  # column → its bit → Flag
    data_offset: int
    data_bytes: int
    is_error: bool = False


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
_CLASSIC = _ObjectLayout(
    _body(8, channel=(0, "<u2"), flags=(2, "u1"), length=(3, "u1"), id=(4, "<u4")), {"flags": _CLASSIC_FLAGS}, 8, 8
)
_LAYOUTS: dict[int, _ObjectLayout] = {
    1: _CLASSIC,  # CAN_MESSAGE
    86: _CLASSIC,  # CAN_MESSAGE2
    2: _ObjectLayout(_body(4, channel=(0, "<u2")), {}, 4, 0, is_error=True),  # CAN_ERROR
    73: _ObjectLayout(  # CAN_ERROR_EXT
        _body(24, channel=(0, "<u2"), length=(10, "u1"), id=(16, "<u4")), {}, 24, 8, is_error=True
    ),
    100: _ObjectLayout(  # CAN_FD_MESSAGE
        _body(20, channel=(0, "<u2"), flags=(2, "u1"), id=(4, "<u4"), fd=(13, "u1"), length=(14, "u1")),
        {"flags": _CLASSIC_FLAGS, "fd": {1: int(Flag.FD), 2: int(Flag.BITRATE_SWITCH), 4: int(Flag.ERROR_STATE)}},
        20,
        64,
    ),
    101: _ObjectLayout(  # CAN_FD_MESSAGE_64
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
_FRAME_OBJECT_BYTES_MAX = 4096  # A frame object has 48 to some 200 bytes; more is a damaged size.


class BlfCapture(Capture):
    """Vector BLF. Objects other than frames and error frames are skipped."""

    kind = _BLF

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
        date_ns_ = _zoned_ns((year, month, day, hour, minute, second), ms * 1_000_000, self._options.timezone)
        return max(size, _FILE_HEADER.size), date_ns_

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
            yield self._columns(tail + data, found, offset, sources, position)
            tail, tail_offset = rest if whole else b"", offset  # The cut has been counted; it is one damage.
        while tail.strip(b"\0"):  # The last object is cut off, or its size is wrong and others hide behind it.
            self.damage.add_offset(tail_offset, "the object is cut off")
            tail = tail[max(tail.find(b"LOBJ", 4), 0) or len(tail) :]
            found, rest = self._objects(tail, tail_offset)
            yield self._columns(tail, found, tail_offset, sources, position)
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
        """What can be had of an object whose size reaches behind the end of the file, or is nonsense."""
        self.damage.add_offset(offset, "the container is cut off or its size is wrong")
        following = _find(file, b"LOBJ", offset + 4)
        file.seek(offset + _OBJECT_HEADER.size)
        body = file.read(OBJECT_BYTES_MAX if following is None else following - file.tell())
        end = file.tell()
        if kind != _CONTAINER or len(body) < _CONTAINER_HEADER.size:
            return None, end
        if _CONTAINER_HEADER.unpack_from(body)[0] != _DEFLATED:
            return None, end  # Its objects are found by their signatures.
        try:
            data = zlib.decompressobj().decompress(body[_CONTAINER_HEADER.size :], OBJECT_BYTES_MAX)
        except zlib.error:
            return None, end
        return data, end

    def _unpack(self, body: bytes, offset: int) -> bytes | None:
        method = _CONTAINER_HEADER.unpack_from(body)[0] if len(body) >= _CONTAINER_HEADER.size else None
        packed = body[_CONTAINER_HEADER.size :]
        if method == _STORED:
            return packed
        try:
            if method != _DEFLATED:
                raise zlib.error(f"unknown compression {method}")
            unpacker = zlib.decompressobj()
            data = unpacker.decompress(packed, OBJECT_BYTES_MAX)
            if not unpacker.eof:
                raise zlib.error("the stream does not end")
        except zlib.error as error:
            self.damage.add_offset(offset, f"the container cannot be unpacked ({error})")
            return None
        return data

    def _objects(self, data: bytes, offset: int) -> tuple[dict[int, list[tuple[int, int]]], bytes]:
        """Position and header size of the frame objects by type, and the bytes of an object that is not yet whole.

        Objects are padded to 4 bytes, some writers' to 8; anything else between them is damage.
        """
        found: dict[int, list[tuple[int, int]]] = {}
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
            size_max = OBJECT_BYTES_MAX if layout is None else _FRAME_OBJECT_BYTES_MAX
            if (
                size < header_bytes
                or size > size_max
                or (layout is not None and not _plausible(layout, header_size, size))
            ):
                self.damage.add_offset(offset, f"an object of impossible size, {position} bytes into the container")
                position += 4
                continue
            if position + size > end:
                break
            if layout is not None:
                found.setdefault(kind, []).append((position, header_size))
            position += size
        return found, data[position:]

    def _columns(
        self, data: bytes, found: dict[int, list[tuple[int, int]]], offset: int, sources: Sources, position: int
    ) -> CaptureBatch:
        """The frames of the objects found, in the order they have in `data`."""
        if not found:
            return _empty_batch(sources.seen(), position)
        buffer = np.frombuffer(data + bytes(256), np.uint8)  # So that a gather of a whole layout stays inside.
        parts = [_read_objects(buffer, _LAYOUTS[kind], np.array(places)) for kind, places in found.items()]
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


def _plausible(layout: _ObjectLayout | None, header_size: int, size: int) -> bool:
    """Whether a frame object has room for what its type has; other objects are only skipped."""
    if layout is None:
        return True
    return header_size >= _STAMPED_HEADER.itemsize and header_size + layout.data_offset <= size


def _gather(buffer: UInt8s, start: Int64s, dtype: np.dtype[np.void]) -> NDArray[np.void]:
    items: NDArray[np.void] = buffer[start[:, None] + np.arange(dtype.itemsize)].view(dtype)[:, 0]
    return items


def _read_objects(buffer: UInt8s, layout: _ObjectLayout, places: Int64s) -> NDArray[np.void]:
    """Rows of `_TABLE` from objects of one type; places[n, 2] are positions and header sizes."""
    header = _gather(buffer, places[:, 0], _STAMPED_HEADER)
    start = places.sum(axis=1)
    body = _gather(buffer, start, layout.body)
    has = layout.body.names or ()
    table = np.zeros(len(places), _TABLE)
    number = body["id"] if "id" in has else np.zeros(len(places), np.uint32)
    # Some writers leave the bit out that says so, but an id of more than 11 bits can only be an extended one.
    extended = ((number & np.uint32(_BLF_EXTENDED)) != 0) | ((number & np.uint32(EXTENDED_ID_MAX)) > STANDARD_ID_MAX)
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
    while block := file.read(LINE_BLOCK_BYTES):
        held += block
        if (at := held.find(signature)) >= 0:
            return begin + at
        keep = len(signature) - 1
        begin += len(held) - keep
        held = held[-keep:]
    return None


# MF4.


class Mf4Capture(Capture):
    """MDF 4 with bus logging (ASAM MDF bus logging, as CANedge writes it), read by asammdf.

    Frames of all channel groups are merged by time, those of one stamp in the order of their groups. All of them are
    in memory at once: some 100 bytes a frame.
    """

    kind = _MF4

    def __init__(self, path: Path, options: Options) -> None:
        super().__init__(path, options)
        self._table, date = self._load()
        self._set_clock(date)

    def _pieces(self) -> Iterator[CaptureBatch]:
        table = self._table
        sources = Sources(self._options.source_names)
        width = table["data"].shape[1] if len(table["data"]) else 8
        frames = FrameBatch(
            "",
            table["ts_ns"],
            table["id"],
            table["flags"],
            table["length"],
            table["data"].reshape(-1, width),
        )
        yield CaptureBatch(frames, sources.indices(table["channel"]), sources.seen(), self.size_bytes)

    def _load(self) -> tuple[dict[str, NDArray[Any]], int | None]:
        with self.path.open("rb") as file:
            version = file.read(16)[8:].decode("ascii", "replace").strip(" \0")
        if version[:1] != "4":
            raise CaptureError(f"{self.path} is MDF {version}, without bus frames", "convert it to MF4")
        try:
            mdf = _open_mdf(self.path)
            try:
                groups = [group for index in range(len(mdf.groups)) for group in self._group(mdf, index)]
                return _merge(groups), self._date(mdf.header)
            finally:
                mdf.close()
        except (CaptureError, OSError, MemoryError):
            raise
        except Exception as error:  # asammdf lets through whatever a damaged file makes its code raise.
            raise CaptureError(f"{self.path} is damaged or not an MF4 file: {error}", "try asammdf's repair") from error

    def _date(self, header: Any) -> int | None:
        """The start of the measurement; where it is local time without a zone, in the zone of the options."""
        if header.abs_time <= 0:
            return None
        if not header.time_flags & 1:
            return int(header.abs_time)
        local = np.datetime64(int(header.abs_time) // SECOND_NS, "s").item()
        parts = (local.year, local.month, local.day, local.hour, local.minute, local.second)
        return _zoned_ns(parts, int(header.abs_time) % SECOND_NS, self._options.timezone)

    def _group(self, mdf: Any, index: int) -> Iterator[dict[str, NDArray[Any]]]:
        """The columns of a channel group, if it holds CAN frames of any sort."""
        names = {channel.name for channel in mdf.groups[index].channels}
        for event, flag in (("CAN_DataFrame", 0), ("CAN_RemoteFrame", Flag.REMOTE), ("CAN_ErrorFrame", Flag.ERROR)):
            if event in names and mdf.groups[index].channel_group.cycles_nr > 0:
                signal = mdf.get(event, index, raw=False)
                yield _mf4_columns(signal, event, int(flag))


def _open_mdf(path: Path) -> Any:
    """asammdf's object of an MDF 4 file, to be closed."""
    try:
        import asammdf  # An extra, and a second to import.
        from asammdf.blocks.mdf_v4 import MDF4
    except ImportError as error:
        raise CaptureError(f"{path} is MF4, which needs asammdf", "pip install 'ingestd[mf4]'") from error
    logging.getLogger(asammdf.__name__).setLevel(logging.CRITICAL)  # It logs what it also raises.

    class QuietMDF4(MDF4):
        def __del__(self) -> None:
            """A file too damaged to open leaves an object without a header, whose finaliser would print an error."""
            if hasattr(self, "header") and hasattr(self, "_file"):
                super().__del__()
            elif hasattr(self, "_tempfile"):
                self._tempfile.close()

    return QuietMDF4(path, original_name=path, __internal__=True)  # As asammdf's own class MDF makes it.


def _mf4_columns(signal: Any, event: str, kind: int) -> dict[str, NDArray[Any]]:
    samples, count = signal.samples, len(signal.timestamps)

    def column(name: str) -> NDArray[Any]:
        name = f"{event}.{name}"
        return samples[name] if name in samples.dtype.names else np.zeros(count, np.uint8)

    number = column("ID").astype(np.uint32)
    has_ide = f"{event}.IDE" in samples.dtype.names
    extended = column("IDE") != 0 if has_ide else (number >> 31 != 0) | (number & EXTENDED_ID_MAX > STANDARD_ID_MAX)
    direction = column("Dir")
    sent = direction == b"Tx" if direction.dtype.kind == "S" else direction.astype(np.int64) == 1
    flags = np.full(count, kind, np.uint8)
    for name, flag in (("EDL", Flag.FD), ("BRS", Flag.BITRATE_SWITCH), ("ESI", Flag.ERROR_STATE)):
        flags |= np.where(column(name) != 0, np.uint8(flag), np.uint8(0))
    flags |= np.where(extended, np.uint8(Flag.EXTENDED), np.uint8(0))
    flags |= np.where(sent, np.uint8(Flag.TRANSMITTED), np.uint8(0))
    data = column("DataBytes")
    data = data.reshape(count, -1) if data.ndim == 2 else np.zeros((count, 8), np.uint8)
    length = np.minimum(column("DataLength").astype(np.uint16), min(data.shape[1], 64))
    if kind & Flag.REMOTE:
        length[:] = 0
    width = max(8, -(-int(length.max(initial=0)) // 8) * 8)
    padded = np.zeros((count, width), np.uint8)
    shared = min(width, data.shape[1])
    padded[:, :shared] = np.where(np.arange(shared) < length[:, None], data[:, :shared], 0)
    return {
        "stamp": signal.timestamps,
        "ts_ns": np.round(signal.timestamps * 1e6).astype(np.int64) * 1000,
        "id": number & np.uint32(EXTENDED_ID_MAX),
        "flags": flags,
        "length": length,
        "data": padded,
        "channel": column("BusChannel").astype(np.int64),
    }


def _merge(groups: list[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """One table by time; frames of one stamp keep the order of the groups."""
    if not groups:
        empty, none = _empty_batch().frames, np.zeros(0, np.int64)
        columns: dict[str, NDArray[Any]] = {"stamp": none, "ts_ns": none, "channel": none, "id": empty.arbitration_id}
        groups = [columns | {"flags": empty.flags, "length": empty.length, "data": empty.data}]
    width = max(group["data"].shape[1] for group in groups)
    for group in groups:
        group["data"] = np.pad(group["data"], ((0, 0), (0, width - group["data"].shape[1])))
    table = {name: np.concatenate([group[name] for group in groups]) for name in groups[0]}
    order = np.argsort(table.pop("stamp"), kind="stable")
    return {name: column[order] for name, column in table.items()}


_CAPTURES: dict[str, type[Capture]] = {
    capture.kind: capture for capture in (CandumpCapture, AscCapture, BlfCapture, TrcCapture, CsvCapture, Mf4Capture)
}
