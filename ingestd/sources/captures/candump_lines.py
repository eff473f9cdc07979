"""One line of candump text to a frame: the careful parser, which also knows what to say about a bad line.

It reads what `candump -L` and `-l` write, the console output of candump, the old format `<0x123> [2] 01 02`, remote
and error frames, odd spacing. Some 3 µs a line; the columnar parser in `candump` takes the lines that are as usual.

Limits: stamps are integers from digit to nanosecond, no float is involved; they reach to the year 2262 (int64).

Format: can-utils `lib.c` (sprint_canframe, snprintf_long_canframe) and `candump.c`; error frames: linux/can/error.h.
"""

from __future__ import annotations

import binascii
import re
from datetime import UTC, tzinfo
from typing import NamedTuple

from ingestd.model import Flag
from ingestd.sources.captures.base import (
    CLASSIC_BYTES_MAX,
    EXTENDED_ID_MAX,
    FD_LENGTHS,
    SECOND_NS,
    STAMP_NS_MAX,
    STANDARD_ID_MAX,
)
from ingestd.sources.captures.dates import zoned_ns
from ingestd.sources.captures.text import LINE_BYTES_MAX, LineError

ERROR_FRAME = 0x20000000  # CAN_ERR_FLAG in linux/can.h; candump prints it as part of the eight digits.

_STAMP = rb"\((?P<stamp>[^()]*)\)"
_LOG = re.compile(
    _STAMP + rb"\s+(?P<interface>[!-\"$-~]+)\s+(?P<id>[^\W_]+)#(?P<data>\S*)(?:\s+(?P<direction>[RrTt]))?"
)
_CONSOLE = re.compile(
    rb"(?:" + _STAMP + rb"\s+)?(?P<interface>[!-\"$-~]+)\s+(?:(?P<direction>[RT]X)\s+(?P<brs>[B-])\s+(?P<esi>[E-])\s+)?"
    rb"(?P<id>[0-9A-Fa-f]+)\s+\[(?P<length>\d{1,2})\](?P<rest>.*)",
    re.DOTALL,
)
_OLD = re.compile(rb"<0x(?P<id>[0-9A-Fa-f]+)>\s+\[(?P<length>\d{1,2})\](?P<rest>.*)", re.DOTALL)
PREAMBLE = re.compile(rb"interface = (?P<interface>[!-\"$-~]+), family = \d+.*", re.DOTALL)
_SECONDS = re.compile(rb"(\d{1,10})(?:\.(\d{1,9}))?")
_DATE = re.compile(rb"(\d{4})-(\d\d)-(\d\d) (\d\d):(\d\d):(\d\d)\.(\d{1,9})")
_REMOTE = re.compile(rb"[Rr]([0-9A-Fa-f])?(_[9A-Fa-f])?")
_RAW_DLC = re.compile(rb"([0-9A-Fa-f]{16})_[9A-Fa-f]")


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
    if not text or text.startswith(b"#") or PREAMBLE.fullmatch(text):
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
        year, month, day, hour, minute, second = (int(match[part]) for part in range(1, 7))
        date_ns = zoned_ns((year, month, day, hour, minute, second), int(match[7].ljust(9, b"0")), zone)
        if date_ns is None:
            raise LineError("the date is not one")
        ts_ns = date_ns
    else:
        raise LineError("the time stamp is not seconds with up to 9 decimals")
    if ts_ns > STAMP_NS_MAX:
        raise LineError("the time stamp is out of range")
    return ts_ns


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
        return _check_length(_unhex(text[2:]), fd=True), fd_flags_of(fd_flags)
    if _REMOTE.fullmatch(text):
        return b"", Flag.REMOTE
    if match := _RAW_DLC.fullmatch(text):
        text = match[1]
    return _check_length(_unhex(text), fd=False), 0


def fd_flags_of(digit: int) -> int:
    """The flags digit after `##`: CANFD_BRS and CANFD_ESI of linux/can.h."""
    brs = Flag.BITRATE_SWITCH if digit & 1 else 0
    esi = Flag.ERROR_STATE if digit & 2 else 0
    return Flag.FD | brs | esi


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
        flags |= fd_flags_of((extras.get("brs") == b"B") | (extras.get("esi") == b"E") << 1)
    tokens = rest[:length]
    if len(tokens) < length or any(len(token) != 2 for token in tokens):
        raise LineError(f"fewer than {length} payload bytes")
    if len(rest) > length and not rest[length].startswith((b"'", b"ERRORFRAME")):
        raise LineError(f"more than {length} payload bytes")
    return LineFrame(ts_ns, interface, arbitration_id, flags, _check_length(_unhex(b"".join(tokens)), fd))
