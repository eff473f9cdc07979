"""Vector ASC, read by python-can; dates, relative stamps, damage and line numbers are seen to here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import tzinfo
from decimal import Decimal
from pathlib import Path
from typing import Any

from can import Message
from can.io import ASCReader
from can.io.asc import ASC_MESSAGE_REGEX
from can.util import dlc2len

from ingestd.sources.captures.base import CLASSIC_BYTES_MAX, SECOND_NS, CaptureBatch, Damage, Options
from ingestd.sources.captures.dates import hour_of_day, zoned_ns
from ingestd.sources.captures.python_can_messages import PARSE_ERRORS, check_payload, frame_of
from ingestd.sources.captures.text import LineFeed, LinesCapture

_DATE = re.compile(r"(?:date|begin\s+triggerblock)(?:\s+\w+\s+(?P<date>.+)|\s|$)", re.IGNORECASE)
_BASE = re.compile(r"base\s+(hex|dec)(?:\s+timestamps\s+(?P<stamps>absolute|relative))?", re.IGNORECASE)
_REMARK = re.compile(
    r"//|previous\s+log\s+file:|(no)?\s*internal\s+events\s+logged|end\s+triggerblock|base\s|$", re.IGNORECASE
)
_STAMPED = re.compile(r"(?P<stamp>\d+\.\d+)\s+(?P<event>.+)")
_FRAME_LIKE = re.compile(r"\d+\s+[0-9A-Fa-f]+x?(\s|$)", re.ASCII)
_TX_REQUEST = re.compile(r"(?:CANFD\s+\d+|\d+\s+\w+)\s+TxRq(?:\s|$)", re.IGNORECASE)
_PREVIOUS = re.compile(r"\d+\.\d+\s+previous\s+log\s+file:", re.IGNORECASE)
_EDL, _RTR = 0x1000, 0x0010  # Bits of the flags behind a CAN FD frame's payload, as in BLF.
_LONG = re.compile(
    r"(?P<id>\w+)\s+(?P<dir>Rx|Tx)\s+d\s+(?P<dlc>\w{1,2})\s+(?P<data>(?:[0-9a-f]{2}(?:\s+|$)){9,64})", re.IGNORECASE
)
_CLOCK = re.compile(
    r"(?P<month>[^\W\d]+)\s+(?P<day>\d+)\s+(?P<hour>\d+):(?P<minute>\d+):(?P<second>\d+)(?P<fraction>\.\d+)?"
    r"(?:\s+(?P<half>am|pm))?\s+(?P<year>\d{4})",
    re.IGNORECASE,
)
_MONTHS = ["", "jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_GERMAN = {"mär": "mar", "mrz": "mar", "mai": "may", "okt": "oct", "dez": "dec"}


def _date_ns(text: str, zone: tzinfo) -> int | None:
    """`Sep 30 10:06:13.191 PM 2017` (months also in German) in `zone`, or None when it is no date."""
    match = _CLOCK.match(text.strip())
    if match is None:
        return None
    name = match["month"][:3].lower()
    name = _GERMAN.get(name, name)
    month = _MONTHS.index(name) if name in _MONTHS else 0
    hour = hour_of_day(match["hour"], match["half"])
    parts = (int(match["year"]), month, int(match["day"]), hour, int(match["minute"]), int(match["second"]))
    return zoned_ns(parts, round(Decimal(match["fraction"] or 0) * SECOND_NS), zone)


class AscFeed(LineFeed):
    """Prepares ASC lines for python-can's reader and keeps what it does not: dates, relative stamps, damage.

    The reader takes the first line that is no header line for one and drops it, which costs a frame where the line
    `internal events logged` is missing (mdf4-converters leave it out); here that line is put in.
    """

    def __init__(self, path: Path, damage: Damage, zone: tzinfo) -> None:
        super().__init__(path, damage)
        self.date_ns: int | None = None  # The latest date applies to the stamps that follow, as in python-can.
        self.in_header = True  # No stamped line was seen yet: the dates are the file's start.
        self._zone = zone
        self._relative = False
        self._elapsed_ns = 0

    def prepare(self, line: str) -> Iterable[str]:
        if self.in_header and (base := _BASE.match(line)):
            self._relative = (base["stamps"] or "").lower() == "relative"
            return (line.lower(),)  # The reader stops at any other spelling of the base.
        if date := _DATE.match(line):
            ns = _date_ns(date["date"] or "", self._zone)
            self.date_ns = self.date_ns if ns is None else ns
            self._elapsed_ns = 0
        elif _PREVIOUS.match(line):  # Of the header, though it has a stamp.
            return ()
        elif stamped := _STAMPED.match(line):
            header = ("internal events logged",) if self.in_header else ()
            self.in_header = False
            return (*header, *self._stamped(stamped["stamp"], stamped["event"]))
        elif not _REMARK.match(line):
            self.reject("not a line of an ASC file")
        return ()

    def _stamped(self, stamp: str, event: str) -> Iterable[str]:
        if _FRAME_LIKE.match(event) and not ASC_MESSAGE_REGEX.match(f"{stamp} {event}"):
            self.reject("a frame that is not whole")
            return ()
        if self._relative:  # Every stamp, of frames or not, counts from the line before it.
            self._elapsed_ns += round(Decimal(stamp) * SECOND_NS)
            stamp = f"{self._elapsed_ns // SECOND_NS}.{self._elapsed_ns % SECOND_NS:09d}"
        # What follows a request to transmit is the frame itself; with both it would be there twice.
        return () if _TX_REQUEST.match(event) else (f"{stamp} {event}",)


class _Reader(ASCReader):
    """python-can's reader, for which a bad frame is damage and not the end of the file."""

    def __init__(self, feed: LineFeed) -> None:
        super().__init__(feed)  # type: ignore[arg-type]
        self._feed = feed

    def _process_classic_can_frame(self, line: str, msg_kwargs: dict[str, Any]) -> Message | None:  # type: ignore[override]
        try:
            message = self._long_frame(line, msg_kwargs) or super()._process_classic_can_frame(line, msg_kwargs)
            return check_payload(message, message.dlc if message.is_fd else min(CLASSIC_BYTES_MAX, message.dlc))
        except PARSE_ERRORS as error:
            self._feed.reject(f"not a frame ({error})")
            return None

    def _process_fd_can_frame(self, line: str, msg_kwargs: dict[str, Any]) -> Message | None:  # type: ignore[override]
        if line.split()[-2:] == ["0", "0"]:
            line += " -"  # The reader wants something behind the length, even when that is 0.
        try:
            message = super()._process_fd_can_frame(line, msg_kwargs)
            if message.dlc == 0:
                message.is_remote_frame = False  # CAN FD has none (ISO 11898-1); the reader guesses from DLC 0.
            if not message.is_error_frame:
                _apply_flags(message, line)
            return check_payload(message, message.dlc)
        except PARSE_ERRORS as error:
            self._feed.reject(f"not a CAN FD frame ({error})")
            return None

    def _long_frame(self, line: str, msg_kwargs: dict[str, Any]) -> Message | None:
        """A line of a classic frame with more than 8 bytes: mdf4-converters write CAN FD frames so, DLC in decimal."""
        match = _LONG.match(line)
        if match is None:
            return None
        data = bytes.fromhex(match["data"])
        numbers = [int(match["dlc"], base) for base in ((10, 16) if match["dlc"].isdecimal() else (16,))]
        if len(data) not in [dlc2len(number) for number in numbers if number < 16]:
            raise ValueError(f"DLC {match['dlc']} with {len(data)} bytes")
        self._extract_can_id(match["id"], msg_kwargs)
        return Message(**msg_kwargs, is_rx=match["dir"].lower() == "rx", is_fd=True, dlc=len(data), data=data)


def _apply_flags(message: Message, line: str) -> None:
    """Make a classic frame of the message if the flags behind its payload say so: CANFD lines hold both kinds.

    The flags of a payload that only CAN FD can have are wrong, and a remote frame stays as python-can reads it.
    """
    fields = line.split()
    begin = (7 if fields[3].isdigit() else 8) + len(message.data)  # Behind the length come payload, duration, bits.
    if message.is_remote_frame or len(message.data) > CLASSIC_BYTES_MAX or len(fields) < begin + 3:
        return
    flags = int(fields[begin + 2], 16)
    if not flags & _EDL:
        message.is_fd = message.bitrate_switch = message.error_state_indicator = False
        message.is_remote_frame = bool(flags & _RTR)


class AscCapture(LinesCapture):
    """Vector ASC, absolute or relative stamps. Chip states, statistics and J1939 events are skipped, as in python-can.

    Requests to transmit (`TxRq`) are skipped, too: they are neither frames nor damage.

    The date that applies is the latest of `date` and `Begin Triggerblock` before the first event; frames behind a
    later one are moved by the difference of the dates.
    """

    kind = "asc"

    def __init__(self, path: Path, options: Options) -> None:
        super().__init__(path, options)
        feed = AscFeed(path, Damage(), options.timezone)
        while feed.in_header and feed.readline():
            pass
        self._set_clock(feed.date_ns)

    def _pieces(self) -> Iterator[CaptureBatch]:
        feed = AscFeed(self.path, self.damage, self._options.timezone)

        def shift_ns() -> int:
            return 0 if feed.date_ns is None else feed.date_ns - self.utc_offset_ns

        yield from self._collect(feed, _Reader(feed), lambda message: frame_of(message, 0, shift_ns()))
