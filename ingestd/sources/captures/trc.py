"""PCAN trace files, read by python-can; dates, error frames, damage and line numbers are seen to here.

The header counts days from 1899-12-30, as PEAK's description says (PCAN-Trace file formats, `$STARTTIME`); a file
whose converter counted otherwise (mdf4-converters: a day less) is read as it is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import datetime, tzinfo
from decimal import Decimal, InvalidOperation
from pathlib import Path

from can import Message
from can.io import TRCReader
from can.util import dlc2len

from ingestd.errors import CaptureError
from ingestd.sources.captures.base import (
    CLASSIC_BYTES_MAX,
    SECOND_NS,
    STAMP_NS_MAX,
    SUPPORTED_HINT,
    CaptureBatch,
    Damage,
    Options,
)
from ingestd.sources.captures.dates import EPOCH, hour_of_day, local_ns, zoned_ns
from ingestd.sources.captures.python_can_messages import PARSE_ERRORS, check_payload, frame_of
from ingestd.sources.captures.text import LineFeed, LinesCapture

VERSIONS = ("1.0", "1.1", "1.3", "2.0", "2.1")
_VERSION = re.compile(r";\$FILEVERSION=(.*)")
_START = re.compile(
    r";\s*Start time:\s*(?:(?P<day>\d{1,2})\.(?P<month>\d{1,2})\.(?P<year>\d{4})"
    r"|(?P<year_iso>\d{4})-(?P<month_iso>\d{1,2})-(?P<day_iso>\d{1,2})"
    r"|(?P<month_us>\d{1,2})/(?P<day_us>\d{1,2})/(?P<year_us>\d{4}))"
    r"\s+(?P<hour>\d{1,2}):(?P<minute>\d\d):(?P<second>\d\d)(?:\.(?P<ms>\d{3})(?:\.(?P<us>\d{1,3}))?)?"
    r"(?:\s*(?P<half>AM|PM))?",
    re.IGNORECASE,
)
_DAY_NS = 86_400 * SECOND_NS
_DAYS_MAX = STAMP_NS_MAX // _DAY_NS
_ZERO_NS = (datetime(1899, 12, 30, tzinfo=EPOCH.tzinfo) - EPOCH).days * _DAY_NS


def _start_time_ns(days: str, zone: tzinfo) -> int | None:
    """The value of `;$STARTTIME=` in `zone`, rounded to microseconds; None when it is no date."""
    try:
        number = Decimal(days)
        if not 0 < number < _DAYS_MAX:  # Before it becomes a whole number: one of 1e999999 takes minutes.
            return None
        since_zero_ns = round(number * _DAY_NS / 1000) * 1000
    except (InvalidOperation, ValueError, OverflowError):
        return None
    return local_ns(_ZERO_NS + since_zero_ns, zone)


def _start_comment_ns(line: str, zone: tzinfo) -> int | None:
    """The date of `; Start time:`, which is for people, in `zone`; None when it is none."""
    match = _START.match(line)
    if match is None:
        return None
    year, month, day = (
        next(int(match[name + form]) for form in ("", "_iso", "_us") if match[name + form])
        for name in ("year", "month", "day")
    )
    fraction_ns = int(match["ms"] or 0) * 1_000_000 + int(match["us"] or 0) * 1000
    hour = hour_of_day(match["hour"], match["half"])
    return zoned_ns((year, month, day, hour, int(match["minute"]), int(match["second"])), fraction_ns, zone)


class TrcFeed(LineFeed):
    """Reads the date and leaves it out: python-can's reader would stop at one that is not a number."""

    def __init__(self, path: Path, damage: Damage, zone: tzinfo) -> None:
        super().__init__(path, damage)
        self.start_ns: int | None = None
        self.comment_ns: int | None = None
        self._zone = zone

    def prepare(self, line: str) -> Iterable[str]:
        if line.startswith(";$STARTTIME"):
            self.start_ns = _start_time_ns(line.partition("=")[2].strip(), self._zone)
            return ()
        if line.startswith(";") and self.comment_ns is None:
            self.comment_ns = _start_comment_ns(line, self._zone)
        return (line,)


class _Reader(TRCReader):
    """python-can's reader with relative stamps, for which a bad line is damage; error frames are kept."""

    def __init__(self, feed: LineFeed) -> None:
        super().__init__(feed)  # type: ignore[arg-type]
        self._feed = feed

    def _parse_line(self, line: str) -> Message | None:
        if not line or line.startswith(";"):
            return None  # What the header ended with in a file without frames.
        try:
            cols = tuple(line.split(maxsplit=self._num_columns))
            message = self._error_frame(cols) or self._parse_cols(cols)
            if message is None:
                return None
            return check_payload(
                message, dlc2len(message.dlc) if message.is_fd else min(CLASSIC_BYTES_MAX, message.dlc)
            )
        except PARSE_ERRORS as error:
            self._feed.reject(f"not a frame ({error})")
            return None

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

    kind = "trc"

    def __init__(self, path: Path, options: Options) -> None:
        super().__init__(path, options)
        feed = TrcFeed(path, Damage(), options.timezone)
        while (line := feed.readline()) and (line.startswith(";") or not line.strip()):
            if (version := _VERSION.match(line)) and version[1].strip() not in VERSIONS:
                raise CaptureError(f"{path} is a PCAN trace of version {version[1]}", "convert it to version 2.1")
        self._set_clock(feed.comment_ns if feed.start_ns is None else feed.start_ns)

    def _pieces(self) -> Iterator[CaptureBatch]:
        feed = TrcFeed(self.path, self.damage, self._options.timezone)
        try:
            yield from self._collect(feed, _Reader(feed), lambda message: frame_of(message, 1))
        except (ValueError, NotImplementedError) as error:  # The header: lines have been dealt with.
            raise CaptureError(f"{self.path} has no usable TRC header: {error}", SUPPORTED_HINT) from error
