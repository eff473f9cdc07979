"""u-blox binary messages, alone or with NMEA sentences on the same wire.

Source: u-blox 8 / M8 Receiver Description, UBX-13003221, 32.2 "UBX Frame Structure" and 32.4 "UBX Checksum".

- A message is 0xB5 0x62, class, id, the length of its payload (little-endian), the payload, and a Fletcher checksum of
  all between. It is recorded from the first to the last of these bytes.
- 0xB5 is no ASCII, so no sentence goes on behind one. Everything that is no message goes to an `NmeaFramer`.
- What begins like a message and has another checksum is a false start: the search goes on behind its first two bytes.
- A message longer than `PAYLOAD_BYTES_MAX` (RXM-RAWX of more than 55 signals) cannot be recorded: it is skipped and
  counted (`long_messages`).

A sentence behind a false start waits until the message would be complete, at most `PAYLOAD_BYTES_MAX` bytes; its stamp
is right all the same.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import numpy as np

from ingestd.framing.base import SerialFrame
from ingestd.framing.nmea import NmeaFramer
from ingestd.model import PAYLOAD_BYTES_MAX, SerialFlag

SYNC: Final = b"\xb5\x62"
HEADER_BYTES: Final = 6
CHECKSUM_BYTES: Final = 2
_WEIGHTS: Final = np.arange(PAYLOAD_BYTES_MAX, 0, -1, dtype=np.uint32)


class UbxFramer:
    """The framer of the protocol `ubx`."""

    text_expected = False

    def __init__(self) -> None:
        self._nmea = NmeaFramer()
        self._own = {"received_bytes": 0, "frame_bytes": 0, "bad_checksums": 0, "long_messages": 0}
        self._held = bytearray()  # from where a message may have begun
        self._begin = 0  # how many bytes came before it
        self._arrivals: deque[tuple[int, int]] = deque()  # how many bytes had come before, and when the next ones came

    def __repr__(self) -> str:
        return f"<UbxFramer: {len(self._held) + len(self._nmea._held)} bytes held>"

    @property
    def counters(self) -> dict[str, int]:
        """Totals, of messages and sentences together."""
        of_nmea = self._nmea.counters
        return {
            "received_bytes": self._own["received_bytes"],
            "frame_bytes": self._own["frame_bytes"] + of_nmea["frame_bytes"],
            "line_end_bytes": of_nmea["line_end_bytes"],
            "skipped_bytes": of_nmea["skipped_bytes"],
            "bad_checksums": self._own["bad_checksums"] + of_nmea["bad_checksums"],
            "unchecked_sentences": of_nmea["unchecked_sentences"],
            "long_messages": self._own["long_messages"],
        }

    def feed(self, data: bytes, at_ns: int) -> list[SerialFrame]:
        """Take bytes that arrived at `at_ns`; return the messages and sentences that they complete."""
        if data:
            self._arrivals.append((self._begin + len(self._held), at_ns))
        self._own["received_bytes"] += len(data)
        self._held += data
        frames: list[SerialFrame] = []
        while self._find_start(frames):
            length = self._length()
            if length is None or length > len(self._held):
                break
            self._end(length, frames)
        return frames

    def flush(self) -> list[SerialFrame]:
        """The stream ends here: what is not complete is no message; there may be others in it."""
        frames: list[SerialFrame] = []
        while self._find_start(frames, is_end=True):
            length = self._length()
            if length is None or length > len(self._held):
                self._pass_on(len(SYNC), frames)
            else:
                self._end(length, frames)
        frames += self._nmea.flush()
        return frames

    def _find_start(self, frames: list[SerialFrame], *, is_end: bool = False) -> bool:
        """Whether a message may begin in what is held; what comes before it may be sentences."""
        start = self._held.find(SYNC)
        if start < 0:
            half = 0 if is_end else self._held.endswith(SYNC[:1])
            self._pass_on(len(self._held) - half, frames)
            return False
        self._pass_on(start, frames)
        self._nmea.flush()
        return True

    def _length(self) -> int | None:
        """Of the whole message that begins here, as far as it is known; of one that is too long, nothing."""
        if len(self._held) < HEADER_BYTES:
            return None
        length = HEADER_BYTES + int.from_bytes(self._held[4:6], "little") + CHECKSUM_BYTES
        return 0 if length > PAYLOAD_BYTES_MAX else length

    def _end(self, length: int, frames: list[SerialFrame]) -> None:
        """Decide about the message that is there in full, or known to be none of ours."""
        if not length:
            self._own["long_messages"] += 1
            self._pass_on(len(SYNC), frames)
        elif checksum(self._held[2 : length - CHECKSUM_BYTES]) != self._held[length - CHECKSUM_BYTES : length]:
            self._own["bad_checksums"] += 1
            self._pass_on(len(SYNC), frames)
        else:
            frames.append(SerialFrame(self._arrival(0), bytes(self._held[:length]), SerialFlag.SERIAL))
            self._own["frame_bytes"] += length
            self._drop(length)

    def _pass_on(self, count: int, frames: list[SerialFrame]) -> None:
        """Give bytes that belong to no message to the other framer, each with the time at which it came."""
        while count:
            at_ns = self._arrival(0)
            end = self._arrivals[1][0] - self._begin if len(self._arrivals) > 1 else count
            part = min(count, end)
            frames += self._nmea.feed(bytes(self._held[:part]), at_ns)
            self._drop(part)
            count -= part

    def _arrival(self, offset: int) -> int:
        """When the byte at an offset of what is held came; what came before it is forgotten."""
        while len(self._arrivals) > 1 and self._arrivals[1][0] <= self._begin + offset:
            self._arrivals.popleft()
        return self._arrivals[0][1]

    def _drop(self, count: int) -> None:
        del self._held[:count]
        self._begin += count
        if not self._held:
            self._arrivals.clear()


def checksum(content: bytes | bytearray) -> bytes:
    """The Fletcher checksum of everything between the sync characters and the checksum."""
    column = np.frombuffer(content, np.uint8).astype(np.uint32)
    weighted = int(np.dot(column, _WEIGHTS[len(_WEIGHTS) - len(column) :]))
    return bytes((int(column.sum()) & 0xFF, weighted & 0xFF))
