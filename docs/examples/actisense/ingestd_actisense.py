"""NMEA 2000 through an Actisense NGT-1, or a gateway that speaks like one (Yacht Devices YDNU-02), for ingestd."""

import re

from ingestd.framing import SerialFrame
from ingestd.model import Flag
from ingestd.protocols import SerialProtocol

BODY = re.compile(rb"(?:[^\x10]|\x10\x10)*+")  # between DLE STX and DLE ETX, each DLE in it twice
RECEIVED, HEADER, BYTES_MAX = 0x93, 13, 600  # a message of the bus; what comes before its data; with all DLEs doubled


class ActisenseFramer:
    """DLE STX, command, length, priority, PGN (3), destination, source, clock (4), data length, data, sum, DLE ETX."""

    text_expected = False  # A frame proves itself by its sum.

    def __init__(self) -> None:
        names = ("received_bytes", "frame_bytes", "line_end_bytes", "skipped_bytes", "bad_checksums", "other_messages")
        self.counters = dict.fromkeys(names, 0)
        self._held, self._held_ns = b"", 0

    def feed(self, data: bytes, at_ns: int) -> list[SerialFrame]:
        """Take bytes that arrived at `at_ns`; return the frames that they complete."""
        self.counters["received_bytes"] += len(data)
        begun_ns, before, at, frames = self._held_ns if self._held else at_ns, len(self._held), 0, []
        held = self._held + data
        while (start := held.find(b"\x10\x02", at)) >= 0:
            body = BODY.match(held, start + 2)
            assert body is not None  # It may be empty.
            if body.end() + 2 > len(held) and body.end() - start < BYTES_MAX:
                break  # The rest has yet to come.
            self._skip(start - at)
            at = body.end() + 2 if held[body.end() : body.end() + 2] == b"\x10\x03" else start + 2
            frame = self._frame(body[0].replace(b"\x10\x10", b"\x10"), begun_ns if start < before else at_ns)
            if frame is not None and at > start + 2:
                frames.append(frame)
                self.counters["frame_bytes"] += at - start
            else:
                self._skip(at - start)
        keep = start if start >= 0 else len(held) - held.endswith(b"\x10", at)
        self._skip(keep - at)
        self._held, self._held_ns = held[keep:], begun_ns if keep < before else at_ns
        return frames

    def flush(self) -> list[SerialFrame]:
        """The stream ends here: what has no end is no message."""
        self._skip(len(self._held))
        self._held = b""
        return []

    def _skip(self, count: int) -> None:
        self.counters["skipped_bytes"] += count

    def _frame(self, body: bytes, ts_ns: int) -> SerialFrame | None:
        """The CAN frame that a message is; None for a damaged one, and for the gateway's own."""
        is_whole = len(body) > HEADER and sum(body) & 0xFF == 0
        is_of_bus = is_whole and body[0] == RECEIVED and len(body) == HEADER + body[HEADER - 1] + 1
        self.counters["bad_checksums"] += not is_whole
        self.counters["other_messages"] += is_whole and not is_of_bus
        if not is_of_bus:
            return None
        priority, pgn, destination, source = body[2], int.from_bytes(body[3:6], "little"), body[6], body[7]
        if pgn >> 8 & 0xFF < 240:  # PDU1: the destination is part of the id (SAE J1939-21, 5.2).
            pgn |= destination
        return SerialFrame(ts_ns, body[HEADER:-1], Flag.EXTENDED, priority << 26 | pgn << 8 | source)


actisense = SerialProtocol(ActisenseFramer)
