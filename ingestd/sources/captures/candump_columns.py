"""candump lines to columns: numpy over the bytes of a block, all of its lines at once.

    (1436509052.249713) can0 123#11223344       (1436509052.249713) can0 18FEF100##1112233445566778899AABBCC
    head: stamp and name   tail: id and payload

A line's head is found from its start and its tail from its first `#`; each is copied in one go, as a window of fixed
size, out of which the fields are taken as 64-bit words. A word holds eight digits, which are checked and converted
with a handful of operations on the whole column.

Limits and invariants:
- Strict: a line that is not exactly as `candump -L` or `-l` writes it gets no interface, and is for `parse_line`.
- One layout of stamps per block, that of its first good line; names of at most 15 bytes.
- Memory is some 20 times the block, and 60 times at worst, in lines of one byte.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ingestd.model import Flag, FrameBatch, Int64s, UInt8s
from ingestd.sources.captures.base import (
    CLASSIC_BYTES_MAX,
    EXTENDED_ID_MAX,
    FD_LENGTHS,
    SECOND_NS,
    STAMP_NS_MAX,
    STANDARD_ID_MAX,
    Bools,
    UInt32s,
)
from ingestd.sources.captures.candump_block import HASH, SPACE, Lines, Rows, Texts
from ingestd.sources.captures.candump_lines import ERROR_FRAME, LineFrame, fd_flags_of

UInt64s = NDArray[np.uint64]

_LINES_MIN = 24  # Fewer are cheaper to read one by one than to set up a hundred array operations for.
_LINE_BYTES_MIN = 13  # `(0.0) c 123#` and the line end.
_LAYOUT_TRIES_MAX = 100
_NAMES_MAX = 64  # Each name is compared with each line. Lines with further names are read one by one.
_NAME_BYTES_MAX = 15  # IFNAMSIZ - 1 of linux/if.h; with the space behind it, two words.
_HEAD_BYTES = 40  # The longest stamp, `(1436509052.249713000) `, and a name.
_TAIL_BYTES = 25  # Eight digits of an id, `#`, sixteen digits of a payload.
_ID_BYTES = 8
_FD_DIGITS_MAX = 128

_LINE = re.compile(
    rb"\((?P<seconds>\d{1,10})\.(?P<fraction>\d{1,9})\) (?P<interface>[!-\"$-~]+)"
    rb" ([0-9A-Fa-f]{3}|[0-9A-Fa-f]{8})#(#[0-9A-Fa-f])?([0-9A-Fa-f]{2})*( [RT])?\r?"
)

_ZERO_DIGITS = np.uint64(0x3030303030303030)
_STANDARD_DIGITS = np.uint64(0xFFFFFF0000000000)  # The last three bytes of a little-endian word.
_HEX = b"0123456789abcdef"
_INVALID = 0x100
_INVALIDS = np.uint64(0x0100010001000100)


def _hex_pairs() -> NDArray[np.uint16]:
    """The byte that two hex digits, read as a little-endian 16-bit word, stand for; `_INVALID` for all other words."""
    table = np.full(1 << 16, _INVALID, np.uint16)
    digits = [(char, value) for value, digit in enumerate(_HEX) for char in {digit, ord(chr(digit).upper())}]
    for high, high_value in digits:
        for low, low_value in digits:
            table[low << 8 | high] = high_value << 4 | low_value
    return table


def _fd_flags() -> UInt8s:
    """Flags for the character after `##`; 0, which no CAN FD frame has, if it is not a hex digit."""
    table = np.zeros(256, np.uint8)
    for value, digit in enumerate(_HEX):
        table[[digit, ord(chr(digit).upper())]] = fd_flags_of(value)
    return table


_PAIRS = _hex_pairs()
_FD_FLAGS = _fd_flags()
# By the number of payload digits; numbers outside of the tables are those of their last rows.
_CLASSIC_MASK = np.array([b"\xff" * digits for digits in range(17)] + [b""], "S16").view("V16")
_CLASSIC_GOOD = np.isin(np.arange(18), [2 * length for length in range(CLASSIC_BYTES_MAX + 1)])
_FD_GOOD = np.isin(np.arange(_FD_DIGITS_MAX + 2), [2 * length for length in FD_LENGTHS])


@dataclass(slots=True)
class Columns:
    """One row per line of the block, in line order; where `interface` is -1 the frame means nothing."""

    frames: FrameBatch
    interface: Rows  # -1 or the number of the name in `names`
    names: dict[bytes, int] = field(default_factory=dict)
    first_row: list[int] = field(default_factory=list)  # of each name

    @staticmethod
    def make(count: int) -> Columns:
        ts_ns, arbitration_id = np.empty(count, np.int64), np.empty(count, np.uint32)
        flags, length, data = np.empty(count, np.uint8), np.empty(count, np.uint16), np.empty((count, 8), np.uint8)
        return Columns(FrameBatch("", ts_ns, arbitration_id, flags, length, data), np.full(count, -1))

    def name(self, rows: Bools | int, name: bytes, first: int) -> None:
        """Set the interface of rows, the first of which is given, too."""
        number = self.names.setdefault(name, len(self.names))
        if number == len(self.first_row):
            self.first_row.append(first)
        self.first_row[number] = min(first, self.first_row[number])
        self.interface[rows] = number

    def put(self, row: int, frame: LineFrame, interface_default: bytes) -> None:
        """Set the row to what the careful parser found."""
        frames, length = self.frames, len(frame.payload)
        width = frames.data.shape[1]
        if length > width:
            width = max(FD_LENGTHS)
            self.frames = frames = replace(
                frames, data=np.pad(frames.data, ((0, 0), (0, width - frames.data.shape[1])))
            )
        frames.ts_ns[row] = frame.ts_ns or 0
        frames.arbitration_id[row] = frame.arbitration_id
        frames.flags[row] = frame.flags
        frames.length[row] = length
        frames.data[row] = np.frombuffer(frame.payload.ljust(width, b"\0"), np.uint8)
        self.name(row, frame.interface or interface_default, row)


@dataclass(frozen=True, slots=True)
class Head:
    """Where the lines of a block have their stamps, taken from one of them: `(1436509052.249713) `.

    The last eight digits of the seconds and up to eight of the fraction are converted. All before them is compared,
    like the signs: the first two of the ten digits change every three years.
    """

    literal: UInt64s  # the words of a head, zero where something varies
    mask: UInt64s
    prefix_ns: int  # what the digits that are compared are worth
    numbers: tuple[tuple[int, int, int], ...]  # offset, digits and unit in nanoseconds of each number
    name: int  # offset

    @staticmethod
    def find(lines: Lines) -> Head | None:
        """The layout of the first good line; None where the columns are not worth it."""
        count = len(lines.start)
        if count < _LINES_MIN or len(lines.block) < count * _LINE_BYTES_MIN:
            return None
        tries = range(min(count, _LAYOUT_TRIES_MAX))
        match = next((match for row in tries if (match := _LINE.fullmatch(lines.text(row)))), None)
        return None if match is None else Head.of(match["seconds"], len(match["fraction"]))

    @staticmethod
    def of(seconds: bytes, decimals: int) -> Head:
        prefix, digits = seconds[:-8], len(seconds[-8:])
        dot = 1 + len(seconds)
        literal = b"(" + prefix + bytes(digits) + b"." + bytes(decimals) + b") "
        tenths = ((dot + 1, 1, SECOND_NS // 10),) if decimals == 9 else ()  # A word has room for the other eight.
        rest = decimals - len(tenths)
        numbers = ((dot - digits, digits, SECOND_NS), *tenths, (dot + 1 + len(tenths), rest, 10 ** (9 - decimals)))
        words = np.frombuffer(literal.ljust(_HEAD_BYTES, b"\0"), "<u8")
        mask = np.frombuffer(bytes(0xFF if char else 0 for char in literal).ljust(_HEAD_BYTES, b"\0"), "<u8")
        return Head(words, mask, int(prefix or b"0") * 10**8 * SECOND_NS, numbers, len(literal))


def parse_columns(lines: Lines, head: Head, names: list[bytes]) -> Columns:
    """The columns of all lines; those that are not exactly as they should be have no interface.

    `names` are those known so far, which are tried first; the ones found are added.
    """
    standard = lines.buffer[lines.hash - 4] == SPACE
    id_offset = lines.hash - np.where(standard, 3, _ID_BYTES) - lines.start
    head_text = lines.windows(lines.start, _HEAD_BYTES)
    tail_text = lines.windows(lines.hash - _ID_BYTES, _TAIL_BYTES)
    ts_ns, stamp_good = _parse_stamps(head_text, head)
    arbitration_id, flags, id_good = _parse_ids(_word(tail_text, 0), standard)
    length, data, payload_good = _parse_payloads(lines, tail_text, flags)
    if lines.transmitted is not None:
        flags |= lines.transmitted * np.uint8(Flag.TRANSMITTED)
    good = stamp_good & id_good & payload_good & (lines.hash < lines.end)
    columns = Columns(FrameBatch("", ts_ns, arbitration_id, flags, length, data), np.full(len(good), -1))
    words = _word(head_text, head.name), _word(head_text, head.name + 8)
    id_offset -= head.name
    for name, fits in _match_names(lines, words, id_offset, good, names):
        columns.name(fits, name, int(fits.argmax()))
    return columns


def _match_names(
    lines: Lines, words: tuple[UInt64s, UInt64s], name_bytes: Rows, left: Bools, names: list[bytes]
) -> Iterator[tuple[bytes, Bools]]:
    """Each interface with its lines among those that are left: the names known, then those of lines with another."""
    tried = 0
    for _ in range(_NAMES_MAX):
        if not left.any():
            return
        if tried == len(names):
            row = int(left.argmax())
            match = _LINE.fullmatch(lines.text(row))
            if match is None or len(match["interface"]) > _NAME_BYTES_MAX:
                left[row] = False
                continue
            names.append(match["interface"])
        name, tried = names[tried], tried + 1
        text = name + b" "
        wanted = np.frombuffer(text.ljust(16, b"\0"), "<u8")
        mask = np.frombuffer((b"\xff" * len(text)).ljust(16, b"\0"), "<u8")
        fits = left & (name_bytes == len(text))
        for word in range(2):
            fits &= words[word] & mask[word] == wanted[word]
        if fits.any():
            left ^= fits
            yield name, fits


def _word(text: Texts, offset: int) -> UInt64s:
    """The eight bytes at an offset as little-endian words, the first byte the lowest; aligned."""
    dtype = np.dtype({"names": ["word"], "formats": ["<u8"], "offsets": [offset], "itemsize": text.itemsize})
    return np.ascontiguousarray(text.view(dtype)["word"])


def _parse_stamps(text: Texts, head: Head) -> tuple[Int64s, Bools]:
    """Stamps in nanoseconds, and which lines have the signs, digits in between and a stamp in range."""
    words = text.view("<u8").reshape(len(text), -1)
    wrong = np.zeros(len(text), np.uint64)
    for column in np.flatnonzero(head.mask).tolist():
        wrong |= (words[:, column] ^ head.literal[column]) & head.mask[column]
    ts_ns = np.full(len(text), head.prefix_ns, np.uint64)
    for offset, digits, unit_ns in head.numbers:
        number, invalid = _decimal(_word(text, offset), digits)
        ts_ns += number * np.uint64(unit_ns)  # At most 10 + 9 digits: below 2**64.
        wrong |= invalid
    return ts_ns.view(np.int64), (wrong == 0) & (ts_ns <= STAMP_NS_MAX)


def _decimal(word: UInt64s, digits: int) -> tuple[UInt64s, UInt64s]:
    """The numbers that the first `digits` bytes stand for, and words that are not 0 where some are not digits.

    Bytes behind the digits are shifted out, zeros go in before them. Neighbours are joined to pairs, fours and eights
    with multiplications that do all lanes of a word at once; no lane overflows (9*10+9 < 2^8, 99*100+99 < 2^16).
    """
    value = (word ^ _ZERO_DIGITS) << np.uint64(8 * (8 - digits))
    invalid = (value | value + np.uint64(0x7676767676767676)) & np.uint64(0x8080808080808080)
    value = (value * np.uint64(10) + (value >> np.uint64(8))) & np.uint64(0x00FF00FF00FF00FF)
    value = (value * np.uint64(100) + (value >> np.uint64(16))) & np.uint64(0x0000FFFF0000FFFF)
    value = (value * np.uint64(10_000) + (value >> np.uint64(32))) & np.uint64(0xFFFFFFFF)
    return value, invalid


def _parse_ids(text: UInt64s, standard: Bools) -> tuple[UInt32s, UInt8s, Bools]:
    """Ids without flag bits, flags, and which ids are hex digits and in range; `parse_line` says what they mean."""
    text = np.where(standard, text & _STANDARD_DIGITS | _ZERO_DIGITS & ~_STANDARD_DIGITS, text)
    pairs = _PAIRS.take(text.view("<u2"), mode="clip")
    number = pairs.astype(np.uint8).view(">u4").astype(np.uint32)
    limit = np.where(standard, np.uint32(STANDARD_ID_MAX), np.uint32(ERROR_FRAME | EXTENDED_ID_MAX))
    good = (pairs.view("<u8") & _INVALIDS == 0) & (number <= limit)
    flags = ~standard * np.uint8(Flag.EXTENDED)
    error = number > EXTENDED_ID_MAX
    if error.any():
        flags[error] = Flag.ERROR
        number &= np.uint32(EXTENDED_ID_MAX)
    return number, flags, good


def _parse_payloads(lines: Lines, tail: Texts, flags: UInt8s) -> tuple[NDArray[np.uint16], UInt8s, Bools]:
    """Lengths, payloads, and which of them are hex digits in a possible number. Adds the flags of CAN FD."""
    digits = lines.end - lines.hash - 1
    fd = np.flatnonzero(lines.buffer[lines.hash + 1] == HASH)
    fd_digits = digits[fd] - 2
    digits[fd] = 0
    dtype = np.dtype({"names": ["text"], "formats": ["V16"], "offsets": [_ID_BYTES + 1], "itemsize": tail.itemsize})
    text = np.ascontiguousarray(tail.view(dtype)["text"]).view("<u8")
    text ^= _ZERO_DIGITS
    text &= _CLASSIC_MASK.take(digits, mode="clip").view("<u8")
    text ^= _ZERO_DIGITS
    pairs = _PAIRS.take(text.view("<u2"), mode="clip")
    wrong = pairs.view("<u8").reshape(-1, 2)
    good = _CLASSIC_GOOD.take(digits, mode="clip") & ((wrong[:, 0] | wrong[:, 1]) & _INVALIDS == 0)
    data = pairs.astype(np.uint8).reshape(-1, 8)
    length = (digits >> 1).astype(np.uint16)
    if len(fd):
        fd_data, good[fd] = _parse_fd_payloads(lines, lines.hash[fd], fd_digits)
        fd_flags = _FD_FLAGS[lines.buffer[lines.hash[fd] + 2]]
        good[fd] &= fd_flags != 0
        flags[fd] |= fd_flags
        length[fd] = fd_digits >> 1
        wide = np.zeros((len(data), fd_data.shape[1]), np.uint8)
        wide.view("<u8")[:, 0] = data.view("<u8")[:, 0]
        wide[fd] = fd_data
        data = wide
    return length, data, good


def _parse_fd_payloads(lines: Lines, hash_: Rows, digits: Rows) -> tuple[UInt8s, Bools]:
    """CAN FD payloads, as wide as the longest needs, and which are hex digits in a possible number."""
    width = min(max(-(-int(digits.max()) // 16) * 16, 16), _FD_DIGITS_MAX)
    text = lines.windows(hash_ + 3, width).view(np.uint8).reshape(-1, width)
    text = np.where(np.arange(width) < digits[:, None], text, np.uint8(_HEX[0]))
    pairs = _PAIRS.take(text.view("<u2"), mode="clip")
    good = _FD_GOOD.take(digits, mode="clip")
    if pairs.max() >= _INVALID:
        good &= ~(pairs >= _INVALID).any(axis=1)
    return pairs.astype(np.uint8), good
