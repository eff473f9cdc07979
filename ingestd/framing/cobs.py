"""Frames of Consistent Overhead Byte Stuffing, with a zero behind each.

Source: S. Cheshire and M. Baker, "Consistent Overhead Byte Stuffing", IEEE/ACM Transactions on Networking 7(2), 1999.

- A frame is recorded as it was on the wire, still stuffed, without its zero. Whether its checksum is right is for the
  decoder to say: a wrong configuration must not cost data.
- What cannot be unstuffed is no frame: it is skipped and counted (`bad_frames`), and so is what has no zero behind it
  within `PAYLOAD_BYTES_MAX` bytes, up to the next zero.
- Two zeros in a row have nothing between them. They are counted as line ends.
"""

from __future__ import annotations

from ingestd.framing.base import SerialFrame
from ingestd.model import PAYLOAD_BYTES_MAX, SerialFlag


class CobsFramer:
    """The framer of the protocol `cobs`."""

    text_expected = False

    def __init__(self) -> None:
        self.counters = {
            "received_bytes": 0,
            "frame_bytes": 0,
            "line_end_bytes": 0,
            "skipped_bytes": 0,
            "bad_frames": 0,
        }
        self._held = bytearray()  # a frame that has not ended
        self._held_ns = 0
        self._skipping = False  # behind a frame that is too long

    def __repr__(self) -> str:
        return f"<CobsFramer: {len(self._held)} bytes held>"

    def feed(self, data: bytes, at_ns: int) -> list[SerialFrame]:
        """Take bytes that arrived at `at_ns`; return the frames that they complete."""
        self.counters["received_bytes"] += len(data)
        frames: list[SerialFrame] = []
        at = 0
        while (end := data.find(0, at)) >= 0:
            self._append(data[at:end], at_ns)
            self._end(frames)
            self.counters["line_end_bytes"] += 1
            at = end + 1
        self._append(data[at:], at_ns)
        return frames

    def flush(self) -> list[SerialFrame]:
        """The stream ends here: what has no zero behind it is no frame."""
        self.counters["skipped_bytes"] += len(self._held)
        self._held.clear()
        self._skipping = False
        return []

    def _append(self, piece: bytes, at_ns: int) -> None:
        if not self._held:
            self._held_ns = at_ns
        if not self._skipping:
            self._held += piece
            if len(self._held) <= PAYLOAD_BYTES_MAX:
                return
            self.counters["bad_frames"] += 1
            piece = bytes(self._held)
            self._held.clear()
            self._skipping = True
        self.counters["skipped_bytes"] += len(piece)

    def _end(self, frames: list[SerialFrame]) -> None:
        payload = bytes(self._held)
        self._held.clear()
        self._skipping = False
        if not payload:
            return
        if is_stuffed(payload):
            self.counters["frame_bytes"] += len(payload)
            frames.append(SerialFrame(self._held_ns, payload, SerialFlag.SERIAL))
        else:
            self.counters["bad_frames"] += 1
            self.counters["skipped_bytes"] += len(payload)


def is_stuffed(payload: bytes) -> bool:
    """Whether each code leads to the next, and the last one to the end."""
    at = 0
    while at < len(payload):
        at += payload[at]
    return at == len(payload)
