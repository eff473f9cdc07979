"""What a framer is: bytes in, frames out, no I/O.

Invariants of every framer, whatever the bytes are and however they are cut:
- The same bytes give the same frames.
- received_bytes = frame_bytes + line_end_bytes + skipped_bytes + the bytes held. `flush` leaves none held.
- Work grows linearly with the bytes; what is held is at most `PAYLOAD_BYTES_MAX` and a few bytes.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from ingestd.model import Flag, SerialFlag


class SerialFrame(NamedTuple):
    """One line, sentence or message as it was on the wire, without its line end; or a CAN frame that a gateway sends.

    A gateway's frame has `Flag` in `flags`, never SERIAL, and the arbitration id without flag bits.
    """

    ts_ns: int  # when its first byte arrived
    payload: bytes
    flags: SerialFlag | Flag
    arbitration_id: int = 0


class Framer(Protocol):
    """Cuts the bytes of one serial line into frames. Totals in it are since it was made.

    `text_expected`: a serial frame that is no text is as good as garbage. False where frames prove themselves.
    """

    text_expected: bool

    @property
    def counters(self) -> dict[str, int]:
        """Totals by name, a name ending in its unit; those of the second invariant are among them."""

    def feed(self, data: bytes, at_ns: int) -> list[SerialFrame]:
        """Take bytes that arrived at `at_ns`; return the frames that they complete."""

    def flush(self) -> list[SerialFrame]:
        """The stream ends here: return what can be made of the bytes held, count the rest, begin anew."""
