"""candump text to columns, in numpy over the bytes of a block.

Two parsers read the same language. The columnar one takes the lines `candump -L` and `-l` write, groups those that
have one layout (same length, same place of the `#`), and converts each group with a handful of array operations. It
is strict: whatever it is unsure about goes, line by line, to `parse_line`, which also knows the console output of
candump, the old format `<0x123> [2] 01 02`, remote frames, odd spacing, and what to say about a bad line.

Limits and invariants:
- Stamps are integers from digit to nanosecond; no float is involved. They reach to the year 2262 (int64).
- A block holds whole lines. Frames come out in the order of their lines, whatever the grouping.
- Where lines are cut into blocks changes nothing: the same bytes give the same frames.
- A bad line is reported by its number and left out; it never changes what its neighbours become.

Format: can-utils `lib.c` (sprint_canframe, snprintf_long_canframe) and `candump.c`; error frames: linux/can/error.h.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, tzinfo
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ingestd.model import Flag, Int64s, UInt8s

Rows = NDArray[np.intp]
Bools = NDArray[np.bool_]
OnDamage = Callable[[int, str], None]  # line number, reason

LINE_BYTES_MAX = 4096  # The longest line candump writes has about 250 bytes; anything longer is not one of its lines.
INTERFACES_MAX = 65_535  # source_index is 16 bits; a capture with more interfaces than that is rubbish.
CLASSIC_BYTES_MAX = 8
FD_LENGTHS = frozenset((0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 24, 32, 48, 64))  # ISO 11898-1:2015, table 5.
INTERFACE_DEFAULT = b"can0"
STANDARD_ID_MAX = 0x7FF
EXTENDED_ID_MAX = 0x1FFFFFFF
ERROR_FRAME = 0x20000000  # CAN_ERR_FLAG in linux/can.h; candump prints it as part of the eight digits.
STAMP_NS_MAX = 2**63 - 1
SECOND_NS = 1_000_000_000

# A group of lines smaller than this is cheaper to read one by one than to set up some thirty array operations for.
_GROUP_LINES_MIN = 12
_LAYOUTS_PER_GROUP_MAX = 64  # Bounds the work on hostile input; a group has as many layouts as interface names.
_LINE_LENGTH_MAX = 512  # For the columnar parser; with the next limit a line's layout fits in a 16-bit sort key.
_HASH_OFFSET_MAX = 64
_NEWLINE, _RETURN, _HASH, _SPACE, _OPEN, _DOT = b"\n\r# (."

_LAYOUT = re.compile(
    rb"\((?P<seconds>\d{1,10})\.(?P<fraction>\d{1,9})\) (?P<interface>[!-\"$-~]+)"
    rb" (?P<id>[0-9A-Fa-f]{3}|[0-9A-Fa-f]{8})#(?P<fd>#[0-9A-Fa-f])?(?P<data>(?:[0-9A-Fa-f]{2})*)"
)
_STAMP = rb"\((?P<stamp>[^()]*)\)"
_LOG = re.compile(_STAMP + rb"\s+(?P<interface>[!-\"$-~]+)\s+(?P<id>\w+)#(?P<data>\S*)(?:\s+(?P<direction>[RrTt]))?")
_CONSOLE = re.compile(
    rb"(?:" + _STAMP + rb"\s+)?(?P<interface>[!-\"$-~]+)\s+(?:(?P<direction>[RT]X)\s+(?P<brs>[B-])\s+(?P<esi>[E-])\s+)?"
    rb"(?P<id>[0-9A-Fa-f]+)\s+\[(?P<length>\d{1,2})\](?P<rest>.*)",
    re.DOTALL,
)
_OLD = re.compile(rb"<0x(?P<id>[0-9A-Fa-f]+)>\s+\[(?P<length>\d{1,2})\](?P<rest>.*)", re.DOTALL)
_PREAMBLE = re.compile(rb"interface = (?P<interface>[!-\"$-~]+), family = \d+.*", re.DOTALL)
_SECONDS = re.compile(rb"(\d{1,10})(?:\.(\d{1,9}))?")
_DATE = re.compile(rb"(\d{4})-(\d\d)-(\d\d) (\d\d):(\d\d):(\d\d)\.(\d{1,9})")
_REMOTE = re.compile(rb"[Rr]([0-9A-Fa-f])?(_[9A-Fa-f])?")
_RAW_DLC = re.compile(rb"([0-9A-Fa-f]{16})_[9A-Fa-f]")


class LineError(ValueError):
    """The line is not a frame; the message is the reason, without the line's number."""


class LineFrame(NamedTuple):
    """One frame of one line. `ts_ns` is None where the line has no stamp, `interface` where it names none."""

    ts_ns: int | None
    interface: bytes | None
    arbitration_id: int
    flags: int
    payload: bytes


def parse_line(line: bytes, zone: tzinfo = UTC) -> LineFrame | None:
    """The frame of one line in any of candump's formats, or None for a blank line, a comment or the old preamble.

    Dates (`candump -t A`) are in `zone`. Raises LineError with the reason when the line is none of these.
    """
    if len(line) > LINE_BYTES_MAX:
        raise LineError(f"longer than {LINE_BYTES_MAX} bytes")
    text = line.strip()
    if not text or text.startswith(b"#") or _PREAMBLE.fullmatch(text):
        return None
    if match := _LOG.fullmatch(text):
        arbitration_id, flags = _parse_id(match["id"])
        payload, kind = _parse_log_payload(match["data"])
        if match["direction"] in (b"T", b"t"):
            kind |= Flag.TRANSMITTED
        return LineFrame(_parse_stamp(match["stamp"], zone), match["interface"], arbitration_id, flags | kind, payload)
    if match := _CONSOLE.fullmatch(text):
        stamp = None if match["stamp"] is None else _parse_stamp(match["stamp"], zone)
        return _parse_console(match, stamp, match["interface"])
    if match := _OLD.fullmatch(text):
        return _parse_console(match, None, None)
    raise LineError("not a candump line")


def _parse_stamp(text: bytes, zone: tzinfo) -> int:
    if match := _SECONDS.fullmatch(text):
        ts_ns = int(match[1]) * SECOND_NS + int((match[2] or b"0").ljust(9, b"0"))
    elif match := _DATE.fullmatch(text):
        try:
            date = datetime(*(int(match[part]) for part in range(1, 7)), tzinfo=zone)  # type: ignore[misc,arg-type]
        except ValueError as error:
            raise LineError("the date is not one") from error
        ts_ns = date_ns(date) + int(match[7].ljust(9, b"0"))
    else:
        raise LineError("the time stamp is not seconds with up to 9 decimals")
    if ts_ns > STAMP_NS_MAX:
        raise LineError("the time stamp is out of range")
    return ts_ns


def date_ns(date: datetime) -> int:
    """Nanoseconds since 1970 of a date with a zone, exactly."""
    return (date - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) * 1000


def _parse_id(digits: bytes) -> tuple[int, int]:
    """Arbitration id and flags; the number of digits says which kind it is, as candump writes it."""
    try:
        number = int(digits, 16)
    except ValueError as error:
        raise LineError("the arbitration id is not hexadecimal") from error
    if len(digits) == 3 and number <= STANDARD_ID_MAX:
        return number, 0
    if len(digits) == 8 and number <= EXTENDED_ID_MAX:
        return number, Flag.EXTENDED
    if len(digits) == 8 and number & ERROR_FRAME and number <= ERROR_FRAME | EXTENDED_ID_MAX:
        return number & EXTENDED_ID_MAX, Flag.ERROR
    if len(digits) in (3, 8):
        raise LineError("the arbitration id is out of range")
    raise LineError("the arbitration id has neither 3 nor 8 digits")


def _parse_log_payload(text: bytes) -> tuple[bytes, int]:
    if text.startswith(b"#"):
        try:
            fd_flags = int(text[1:2], 16)
        except ValueError as error:
            raise LineError("CAN FD without its flags digit") from error
        return _check_length(_unhex(text[2:]), fd=True), _fd_flags(fd_flags)
    if _REMOTE.fullmatch(text):
        return b"", Flag.REMOTE
    if match := _RAW_DLC.fullmatch(text):
        text = match[1]
    return _check_length(_unhex(text), fd=False), 0


def _fd_flags(fd_flags: int) -> int:
    """The flags digit after `##`: CANFD_BRS and CANFD_ESI of linux/can.h."""
    brs = Flag.BITRATE_SWITCH if fd_flags & 1 else 0
    esi = Flag.ERROR_STATE if fd_flags & 2 else 0
    return Flag.FD | brs | esi


_FD_FLAGS = np.array([_fd_flags(digit) for digit in range(16)], np.uint8)


def _unhex(text: bytes) -> bytes:
    if len(text) % 2:
        raise LineError("an odd number of hex digits")
    try:
        return binascii.unhexlify(text)
    except binascii.Error as error:
        raise LineError("the payload is not hexadecimal") from error


def _check_length(payload: bytes, fd: bool) -> bytes:
    if fd and len(payload) not in FD_LENGTHS:
        raise LineError(f"a CAN FD payload cannot have {len(payload)} bytes")
    if not fd and len(payload) > CLASSIC_BYTES_MAX:
        raise LineError(f"a classic payload of {len(payload)} bytes")
    return payload


def _parse_console(match: re.Match[bytes], ts_ns: int | None, interface: bytes | None) -> LineFrame:
    """`can0  123   [2]  11 22`; two digits in the brackets mean CAN FD. Text after the payload is a remark."""
    arbitration_id, flags = _parse_id(match["id"])
    length, rest = int(match["length"]), match["rest"].split()
    extras = match.groupdict()
    if extras.get("direction") == b"TX":
        flags |= Flag.TRANSMITTED
    if rest[:2] == [b"remote", b"request"]:
        return LineFrame(ts_ns, interface, arbitration_id, flags | Flag.REMOTE, b"")
    fd = len(match["length"]) == 2
    if fd:
        flags |= _fd_flags((extras.get("brs") == b"B") | (extras.get("esi") == b"E") << 1)
    tokens = rest[:length]
    if len(tokens) < length or any(len(token) != 2 for token in tokens):
        raise LineError(f"fewer than {length} payload bytes")
    if len(rest) > length and not rest[length].startswith((b"'", b"ERRORFRAME")):
        raise LineError(f"more than {length} payload bytes")
    return LineFrame(ts_ns, interface, arbitration_id, flags, _check_length(_unhex(b"".join(tokens)), fd))


@dataclass(frozen=True, slots=True)
class Frames:
    """The frames of a block, in line order; columns as in `model.FrameBatch`.

    `interface` holds indices into `interfaces`, which grows from block to block, first seen first.
    """

    ts_ns: Int64s
    arbitration_id: NDArray[np.uint32]
    flags: UInt8s
    length: NDArray[np.uint16]
    data: UInt8s
    interface: NDArray[np.uint16]
    interfaces: tuple[bytes, ...]


@dataclass
class CandumpParser:
    """Blocks of whole lines in, columns out; remembers line numbers, interfaces and the number of frames.

    With `rate` (frames per second) every frame is stamped by its ordinal and stamps in the text are ignored; without
    it a line that has no stamp is damage.
    """

    on_damage: OnDamage
    rate: Fraction | None = None
    zone: tzinfo = UTC
    lines_count: int = 0
    frames_count: int = 0
    interface_default: bytes = INTERFACE_DEFAULT
    _interface_index: dict[bytes, int] = field(default_factory=dict)

    def parse(self, block: bytes) -> Frames:
        """The frames of `block`, whose last line may lack its newline only at the end of the file."""
        if not block.endswith(b"\n"):
            block += b"\n"
        lines = _Lines.find(block, self.lines_count)
        self.lines_count += lines.count
        first_hash, has_double = _first_hash(lines)
        wide = has_double or b"[" in block  # Only these formats have payloads of more than 8 bytes.
        columns = _Columns.make(len(lines.start), max(FD_LENGTHS) if wide else CLASSIC_BYTES_MAX)
        unsure = _parse_groups(lines, first_hash, columns)
        self._parse_singly(lines, unsure, columns)
        return self._finish(columns)

    def _parse_singly(self, lines: _Lines, rows: Rows, columns: _Columns) -> None:
        """The careful path, some 3 µs a line."""
        for row in rows.tolist():
            line = lines.text(row)
            try:
                frame = parse_line(line, self.zone)
                if frame is None:
                    if preamble := _PREAMBLE.fullmatch(line.strip()):
                        self.interface_default = preamble["interface"]
                    continue
                if frame.ts_ns is None and self.rate is None:
                    raise LineError("no time stamp")
                columns.put(row, frame, self.interface_default)
            except LineError as error:
                self.on_damage(int(lines.number[row]), str(error))

    def _finish(self, columns: _Columns) -> Frames:
        local = self._register(columns)
        kept = columns.interface >= 0
        good: Bools | slice = slice(None) if kept.all() else kept
        length = columns.length[good]
        count = len(length)
        width = max(8, -(-int(length.max(initial=0)) // 8) * 8)
        frames = Frames(
            columns.ts_ns[good] if self.rate is None else self._stamps(count, self.rate),
            columns.arbitration_id[good],
            columns.flags[good],
            length,
            np.ascontiguousarray(columns.data[good][:, :width]),
            local[columns.interface[good]],
            tuple(self._interface_index),
        )
        self.frames_count += count
        return frames

    def _register(self, columns: _Columns) -> NDArray[np.uint16]:
        """File-wide indices of the block's interfaces, given out in the order of their first lines."""
        for name in sorted(columns.interface_rows, key=columns.interface_rows.__getitem__):
            if name not in self._interface_index and len(self._interface_index) >= INTERFACES_MAX:
                number = columns.interface_index[name]
                columns.interface[columns.interface == number] = -1
                self.on_damage(self.lines_count, f"more than {INTERFACES_MAX} interface names")
                continue
            self._interface_index.setdefault(name, len(self._interface_index))
        known = [self._interface_index.get(name, 0) for name in columns.interface_index]
        return np.array(known or [0], dtype=np.uint16)

    def _stamps(self, count: int, rate: Fraction) -> Int64s:
        """round(ordinal * 1e9 / rate) without a float; halves go up."""
        ordinals = range(self.frames_count, self.frames_count + count)
        top, bottom = 2 * SECOND_NS * rate.denominator, 2 * rate.numerator
        return np.array([(n * top + rate.numerator) // bottom for n in ordinals], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class _Lines:
    """Where the lines of a block are, without blank lines and comments."""

    block: bytes
    buffer: UInt8s
    start: Rows
    end: Rows  # without line end and direction column
    number: Rows  # 1-based, in the file
    transmitted: Bools | None  # None: no line has a direction column that says so
    count: int  # lines in the block, blank lines and comments included

    @staticmethod
    def find(block: bytes, lines_before: int) -> _Lines:
        buffer = np.frombuffer(block, dtype=np.uint8)
        end = np.flatnonzero(buffer == _NEWLINE)
        count = len(end)
        start = np.empty_like(end)
        start[:1] = 0
        start[1:] = end[:-1] + 1
        number = np.arange(lines_before + 1, lines_before + 1 + count)
        last = buffer[np.maximum(end - 1, 0)]
        if (last == _RETURN).any():
            end = end - ((last == _RETURN) & (end > start))
        kept = (end > start) & (buffer[start] != _HASH)
        if not kept.all():
            start, end, number = start[kept], end[kept], number[kept]
        end, transmitted = _cut_direction(buffer, start, end)
        return _Lines(block, buffer, start, end, number, transmitted, count)

    def text(self, row: int) -> bytes:
        """The whole line, with the direction column that `end` cuts off."""
        begin = int(self.start[row])
        return self.block[begin : self.block.index(b"\n", begin)]


def _cut_direction(buffer: UInt8s, start: Rows, end: Rows) -> tuple[Rows, Bools | None]:
    """Ends without a trailing ` R` or ` T` (candump -x), and which lines were transmitted."""
    last = buffer[np.maximum(end - 1, 0)]
    sent = last == ord("T")
    directed = sent | (last == ord("R"))
    if not directed.any():
        return end, None
    directed &= (end - start > 2) & (buffer[np.maximum(end - 2, 0)] == _SPACE)
    return end - 2 * directed, sent & directed


@dataclass(frozen=True, slots=True)
class _Columns:
    """One row per line of the block, in line order; `interface` is -1 where the line gave no frame."""

    ts_ns: Int64s
    arbitration_id: NDArray[np.uint32]
    flags: UInt8s
    length: NDArray[np.uint16]
    data: UInt8s
    interface: NDArray[np.int32]
    interface_index: dict[bytes, int]
    interface_rows: dict[bytes, int]  # first line of each interface

    @staticmethod
    def make(lines_count: int, width: int) -> _Columns:
        return _Columns(
            np.empty(lines_count, np.int64),
            np.empty(lines_count, np.uint32),
            np.zeros(lines_count, np.uint8),
            np.zeros(lines_count, np.uint16),
            np.zeros((lines_count, width), np.uint8),
            np.full(lines_count, -1, np.int32),
            {},
            {},
        )

    def index_of(self, interface: bytes, row: int) -> int:
        self.interface_rows[interface] = min(row, self.interface_rows.get(interface, row))
        return self.interface_index.setdefault(interface, len(self.interface_index))

    def put(self, row: int, frame: LineFrame, interface_default: bytes) -> None:
        interface = frame.interface or interface_default
        self.interface[row] = self.index_of(interface, row)
        self.ts_ns[row] = frame.ts_ns or 0
        self.arbitration_id[row] = frame.arbitration_id
        self.flags[row] = frame.flags
        self.length[row] = len(frame.payload)
        self.data[row, : len(frame.payload)] = np.frombuffer(frame.payload, np.uint8)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the fields are in the lines of a group, as offsets from the line's start; taken from one of the lines."""

    seconds: int  # digits
    fraction: int  # digits
    middle: bytes  # from `)` to the space before the id: `) can0 `
    interface: bytes
    id_digits: int
    hash_offset: int
    fd: bool
    payload_bytes: int

    @staticmethod
    def of(line: bytes) -> _Layout | None:
        match = _LAYOUT.fullmatch(line)
        if match is None:
            return None
        fd = match["fd"] is not None
        payload_bytes = len(match["data"]) // 2
        if payload_bytes not in FD_LENGTHS or (payload_bytes > CLASSIC_BYTES_MAX and not fd):
            return None
        return _Layout(
            len(match["seconds"]),
            len(match["fraction"]),
            line[match.end("fraction") : match.start("id")],
            match["interface"],
            len(match["id"]),
            match.end("id"),
            fd,
            payload_bytes,
        )


def _parse_groups(lines: _Lines, first_hash: Rows, columns: _Columns) -> Rows:
    """Fill `columns` for the lines that have a known layout; the rows of the other lines, in order."""
    length, hash_offset = lines.end - lines.start, first_hash - lines.start
    known = (length < _LINE_LENGTH_MAX) & (hash_offset < _HASH_OFFSET_MAX) & (first_hash < lines.end)
    known &= hash_offset >= 9  # `(0.0) c 123#`; keeps the look behind the id inside the line, too.
    # Standard and extended ids may share length and hash when the interface names make up for it: they are set apart.
    standard = lines.buffer[np.maximum(first_hash - 4, 0)] == _SPACE
    key = (length << 7 | hash_offset << 1 | standard).astype(np.uint16)
    key[~known] = 0
    order = np.argsort(key, kind="stable")  # A radix sort for 16 bits.
    edges = np.flatnonzero(np.diff(key[order])) + 1
    unsure = []
    for rows in np.split(order, edges):
        if len(rows) < _GROUP_LINES_MIN or key[rows[0]] == 0:
            unsure.append(rows)
        else:
            unsure.append(_parse_group(lines, first_hash, rows, columns))
    return np.sort(np.concatenate(unsure))


def _first_hash(lines: _Lines) -> tuple[Rows, bool]:
    """Position of the first `#` of each line (where it has none, one behind its end), and whether there is a `##`."""
    at = np.flatnonzero(lines.buffer == _HASH)
    single = np.ones(len(at), np.bool_)
    single[1:] = np.diff(at) > 1
    has_double = not single.all()
    if has_double:
        at = at[single]
    if len(at) == len(lines.start) and bool(((at > lines.start) & (at < lines.end)).all()):
        return at, has_double
    at = np.append(at, len(lines.buffer))
    return at[np.searchsorted(at, lines.start)], has_double


def _parse_group(lines: _Lines, first_hash: Rows, rows: Rows, columns: _Columns) -> Rows:
    """Parse rows of equal length and hash offset, layout by layout; the rows that fit none."""
    unsure = []
    for _ in range(_LAYOUTS_PER_GROUP_MAX):
        if len(rows) == 0:
            break
        first = int(rows[0])
        layout = _Layout.of(lines.block[int(lines.start[first]) : int(lines.end[first])])
        if layout is None:
            unsure.append(rows[:1])
            rows = rows[1:]
            continue
        fits = _fits(layout, lines, first_hash, rows)
        if not fits.all():
            fitting, rows = rows[fits], rows[~fits]
        else:
            fitting, rows = rows, rows[:0]
        unsure.append(_convert(layout, lines, first_hash, fitting, columns))
    return np.concatenate([*unsure, rows])


def _fits(layout: _Layout, lines: _Lines, first_hash: Rows, rows: Rows) -> Bools:
    """Which of the rows have every separator and the interface name where `layout` has them; digits come later."""
    start, buffer = lines.start[rows], lines.buffer
    close = layout.seconds + layout.fraction + 2
    middle = _items(lines, start + close, len(layout.middle)).view(f"S{len(layout.middle)}")
    fits: Bools = middle == layout.middle
    fits &= buffer[start] == _OPEN
    fits &= buffer[start + layout.seconds + 1] == _DOT
    second_hash = buffer[np.minimum(first_hash[rows] + 1, len(buffer) - 1)] == _HASH
    fits &= second_hash if layout.fd else ~second_hash
    return fits


def _convert(layout: _Layout, lines: _Lines, first_hash: Rows, rows: Rows, columns: _Columns) -> Rows:
    """Convert the digits of rows that fit `layout`; the rows that turn out to hold something else than digits."""
    start, payload_start = lines.start[rows], first_hash[rows] + 1
    ts_ns, good = _stamps(lines, start, layout)
    arbitration_id, id_good = _hex_number(_window(lines, payload_start - 1 - layout.id_digits, layout.id_digits))
    flags, arbitration_id, range_good = _classify(arbitration_id, layout.id_digits)
    good &= id_good & range_good
    if layout.fd:
        fd_flags, flags_good = _hex_number(_window(lines, payload_start + 1, 1))
        flags |= _FD_FLAGS[fd_flags & 15]
        good &= flags_good
        payload_start = payload_start + 2
    payload, payload_good = _hex_bytes(_window(lines, payload_start, 2 * layout.payload_bytes))
    good &= payload_good
    if lines.transmitted is not None:
        flags |= np.where(lines.transmitted[rows], np.uint8(Flag.TRANSMITTED), np.uint8(0))
    if not good.all():
        bad, rows = rows[~good], rows[good]
        ts_ns, arbitration_id, flags, payload = ts_ns[good], arbitration_id[good], flags[good], payload[good]
    else:
        bad = rows[:0]
    if len(rows) > 0:
        columns.ts_ns[rows] = ts_ns
        columns.arbitration_id[rows] = arbitration_id
        columns.flags[rows] = flags
        columns.length[rows] = layout.payload_bytes
        columns.data[rows, : layout.payload_bytes] = payload
        columns.interface[rows] = columns.index_of(layout.interface, int(rows[0]))
    return bad


def _window(lines: _Lines, start: Rows, width: int) -> UInt8s:
    """The `width` bytes from each start, as uint8[rows, width], contiguous."""
    if width == 0:
        return np.empty((len(start), 0), np.uint8)
    return _items(lines, start, width).view(np.uint8).reshape(len(start), width)


def _items(lines: _Lines, start: Rows, width: int) -> NDArray[np.void]:
    """The `width` bytes from each start as opaque items, which numpy copies in one go: 5 ns, against 1 ns a byte."""
    overlapping: NDArray[np.void] = np.ndarray(
        (len(lines.block) - width + 1,), dtype=f"V{width}", buffer=lines.block, strides=(1,)
    )
    return overlapping[start]


def _stamps(lines: _Lines, start: Rows, layout: _Layout) -> tuple[Int64s, Bools]:
    """Stamps in nanoseconds, and which of them are digits and in range."""
    digits = layout.seconds + layout.fraction
    width = -(-digits // 8) * 8
    fields = {
        "names": ["seconds", "fraction"],
        "formats": [f"V{layout.seconds}", f"V{layout.fraction}"],
        "offsets": [width - digits, width - layout.fraction],
        "itemsize": width,
    }
    text = np.full(len(start) * width, ord("0"), np.uint8)
    joined = text.view(np.dtype(fields))  # type: ignore[call-overload]
    joined["seconds"] = _items(lines, start + 1, layout.seconds)
    joined["fraction"] = _items(lines, start + 2 + layout.seconds, layout.fraction)
    number, good = _decimal_number(text.reshape(len(start), width))
    ts_ns = number * np.uint64(10 ** (9 - layout.fraction))  # At most 10 + 9 digits: below 2**64.
    good &= ts_ns <= STAMP_NS_MAX
    return ts_ns.astype(np.int64), good


def _decimal_number(text: UInt8s) -> tuple[NDArray[np.uint64], Bools]:
    """The numbers of text[rows, 8 k] with at most 19 significant digits, and which rows are digits only.

    Eight digits are one machine word: neighbours are joined to pairs, fours and eights with multiplications that do
    all of a word's lanes at once; no lane overflows into the next (9*10+9 < 2^8, 99*100+99 < 2^16).
    """
    value = text - np.uint8(ord("0"))
    good = np.ones(len(text), np.bool_)
    if value.max(initial=0) > 9:
        good = np.asarray((value <= 9).all(axis=1))
        value[~good] = 0
    word = value.view("<u8")
    word = (word * np.uint64(10) + (word >> np.uint64(8))) & np.uint64(0x00FF00FF00FF00FF)
    word = (word * np.uint64(100) + (word >> np.uint64(16))) & np.uint64(0x0000FFFF0000FFFF)
    word = (word * np.uint64(10_000) + (word >> np.uint64(32))) & np.uint64(0xFFFFFFFF)
    number = word[:, 0]
    for part in range(1, word.shape[1]):
        number = number * np.uint64(100_000_000) + word[:, part]
    return number, good


def _hex_bytes(text: UInt8s) -> tuple[UInt8s, Bools]:
    """uint8[rows, digits / 2] of text[rows, digits], and which rows are hex digits only; the others give zeros."""
    rows, digits = text.shape
    good = np.ones(rows, np.bool_)
    try:
        value = binascii.unhexlify(text)  # type: ignore[arg-type]  # Takes any buffer; 0.4 ns a digit.
    except binascii.Error:
        is_hex = ((text - np.uint8(ord("0"))) < 10) | (((text | np.uint8(0x20)) - np.uint8(ord("a"))) < 6)
        good = np.asarray(is_hex.all(axis=1))
        value = binascii.unhexlify(np.where(good[:, None], text, np.uint8(ord("0"))))  # type: ignore[arg-type]
    return np.frombuffer(value, np.uint8).reshape(rows, digits // 2), good


def _hex_number(text: UInt8s) -> tuple[NDArray[np.uint32], Bools]:
    """The numbers of text[rows, 1, 3 or 8 digits], and which rows are hex digits only."""
    rows, digits = text.shape
    if digits < 8:
        text = np.concatenate((np.full((rows, 8 - digits), ord("0"), np.uint8), text), axis=1)
    value, good = _hex_bytes(text)
    return value.view(">u4")[:, 0].astype(np.uint32), good


def _classify(number: NDArray[np.uint32], id_digits: int) -> tuple[UInt8s, NDArray[np.uint32], Bools]:
    """Flags, arbitration ids without flag bits, and which ids are in range; `_parse_id` for columns."""
    if id_digits == 3:
        return np.zeros(len(number), np.uint8), number, number <= STANDARD_ID_MAX
    is_error = (number & np.uint32(ERROR_FRAME)) != 0
    flags = np.where(is_error, np.uint8(Flag.ERROR), np.uint8(Flag.EXTENDED))
    return flags, number & np.uint32(EXTENDED_ID_MAX), number <= ERROR_FRAME | EXTENDED_ID_MAX
