"""CSV as python-can writes it, or with semicolons as mdf4-converters do; read here, to keep stamps decimal."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Iterator
from decimal import Decimal

from ingestd.model import Flag
from ingestd.sources.captures.base import CLASSIC_BYTES_MAX, STAMP_SECONDS_MAX, CaptureBatch
from ingestd.sources.captures.text import Frame, LineError, LineFeed, LinesCapture

_PYTHON_CAN = "timestamp,arbitration_id,extended,remote,error,dlc,data"
_SEMICOLONS = "timestampepoch;buschannel;id;ide;dlc;datalength;dir;edl;brs;databytes"


def _stamp(text: str) -> int:
    """Seconds in decimal to nanoseconds, rounded to microseconds: the writers print floats."""
    try:
        seconds = Decimal(text)
        if abs(seconds) <= STAMP_SECONDS_MAX:  # Before it becomes a whole number: one of 1e999999 takes minutes.
            return round(seconds * 1_000_000) * 1000
    except (ArithmeticError, ValueError) as error:
        raise LineError("the time stamp is not a number") from error
    raise LineError("the time stamp is out of range")


def _numbers(texts: Iterable[str], base: int = 10) -> list[int]:
    try:
        return [int(text, base) for text in texts]
    except ValueError as error:
        raise LineError(f"not a number ({error})") from error


def _python_can_frame(line: str) -> Frame:
    """timestamp, arbitration_id (hex), extended, remote, error, dlc, data (base64); no channel: it is can0."""
    fields = line.split(",")
    if len(fields) != 7:
        raise LineError(f"{len(fields)} columns instead of 7")
    (arbitration_id,) = _numbers(fields[1:2], 16)
    extended, remote, error, dlc = _numbers(fields[2:6])
    flags = Flag.EXTENDED * bool(extended) | Flag.REMOTE * bool(remote)
    if error:
        flags = int(Flag.ERROR)
    try:
        payload = base64.b64decode(fields[6], validate=True)
    except ValueError as bad:  # Of a letter that is not ASCII it is no binascii.Error.
        raise LineError("the payload is not base64") from bad
    if remote:
        payload = b""
    elif len(payload) != dlc:
        raise LineError(f"{len(payload)} payload bytes instead of {dlc}")
    if len(payload) > CLASSIC_BYTES_MAX:
        flags |= Flag.FD  # The format has no column for it.
    return Frame(_stamp(fields[0]), "can0", arbitration_id, flags, payload)


def _semicolon_frame(line: str) -> Frame:
    """TimestampEpoch;BusChannel;ID;IDE;DLC;DataLength;Dir;EDL;BRS;DataBytes of mdf4-converters; ID and bytes in hex."""
    fields = line.split(";")
    if len(fields) != 10:
        raise LineError(f"{len(fields)} columns instead of 10")
    (arbitration_id,) = _numbers(fields[2:3], 16)
    bus, extended, _, length, sent, fd, brs = _numbers([fields[1], *fields[3:9]])
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
    return Frame(_stamp(fields[0]), f"can{max(bus - 1, 0)}", arbitration_id, flags, payload)


class CsvFeed(LineFeed):
    """Keeps headings back; the latest one says what the lines below it are."""

    semicolons = False

    def prepare(self, line: str) -> Iterable[str]:
        heading = line.lower()
        if heading in (_PYTHON_CAN, _SEMICOLONS):
            self.semicolons = heading == _SEMICOLONS
            return ()
        return (line,) if line else ()


class CsvCapture(LinesCapture):
    """CSV in one of the two forms."""

    kind = "csv"
    has_date = False

    def _pieces(self) -> Iterator[CaptureBatch]:
        feed = CsvFeed(self.path, self.damage)
        yield from self._collect(feed, feed, lambda line: self._frame(feed, line.rstrip("\n")))

    def _frame(self, feed: CsvFeed, line: str) -> Frame:
        return _semicolon_frame(line) if feed.semicolons else _python_can_frame(line)
