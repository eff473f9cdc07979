"""Lines of text, or of anything else that ends with LF, CR LF or CR: recorded, not interpreted.

- An empty line is no frame; its line end is counted with all others. So CR LF needs no rule of its own.
- A line longer than `PAYLOAD_BYTES_MAX` is cut there, or before the UTF-8 character that does not fit, and flagged
  TRUNCATED; the rest of it is skipped and counted.
- A line that is not UTF-8 or has a NUL in it is recorded like any other, without the flag TEXT.
- The last line of a stream needs no line end. The first is flagged FIRST, unless a line end came before it.
"""

from __future__ import annotations

import re

from ingestd.framing.base import SerialFrame
from ingestd.model import PAYLOAD_BYTES_MAX, SerialFlag

_LINE_END = re.compile(rb"[\r\n]")


class LineFramer:
    """The framer of the protocol `lines`, and of those whose frames are lines of text."""

    text_expected = True

    def __init__(self) -> None:
        self.counters = {
            "received_bytes": 0,
            "frame_bytes": 0,
            "line_end_bytes": 0,
            "skipped_bytes": 0,
            "truncated_frames": 0,
        }
        self._held = bytearray()  # a line that has not ended; it has no line end in it
        self._held_ns = 0
        self._is_first = True  # nobody has seen an end of line before it
        self._skipping = False  # behind what was kept of a line that is too long

    def __repr__(self) -> str:
        return f"<LineFramer: {len(self._held)} bytes held>"

    def feed(self, data: bytes, at_ns: int) -> list[SerialFrame]:
        """Take bytes that arrived at `at_ns`; return the frames that they complete."""
        self.counters["received_bytes"] += len(data)
        frames: list[SerialFrame] = []
        at = 0
        for end in _LINE_END.finditer(data):
            self._append(data[at : end.start()], at_ns, frames)
            at = end.end()
            self.counters["line_end_bytes"] += 1
            self._end_line(frames)
        self._append(data[at:], at_ns, frames)
        return frames

    def flush(self) -> list[SerialFrame]:
        """The stream ends here: its last line needs no line end."""
        frames: list[SerialFrame] = []
        self._end_line(frames)
        self._is_first = True
        return frames

    def _append(self, piece: bytes, at_ns: int, frames: list[SerialFrame]) -> None:
        if self._skipping:
            self.counters["skipped_bytes"] += len(piece)
            return
        if not self._held:
            self._held_ns = at_ns
        self._held += piece
        if len(self._held) > PAYLOAD_BYTES_MAX:
            self._cut(frames)

    def _end_line(self, frames: list[SerialFrame]) -> None:
        if self._held:
            self._emit(bytes(self._held), SerialFlag.SERIAL, frames)
            self._held.clear()
        self._skipping = self._is_first = False

    def _cut(self, frames: list[SerialFrame]) -> None:
        kept = bytes(self._held[:PAYLOAD_BYTES_MAX])
        try:
            kept.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                kept = kept[: error.start]
        self.counters["skipped_bytes"] += len(self._held) - len(kept)
        self.counters["truncated_frames"] += 1
        self._emit(kept, SerialFlag.SERIAL | SerialFlag.TRUNCATED, frames)
        self._held.clear()
        self._skipping = True

    def _emit(self, payload: bytes, flags: SerialFlag, frames: list[SerialFrame]) -> None:
        self.counters["frame_bytes"] += len(payload)
        flags |= SerialFlag.FIRST if self._is_first else 0
        frames.append(SerialFrame(self._held_ns, payload, flags | _text(payload)))


def _text(payload: bytes) -> SerialFlag:
    if b"\0" in payload:
        return SerialFlag(0)
    try:
        payload.decode()
    except UnicodeDecodeError:
        return SerialFlag(0)
    return SerialFlag.TEXT
