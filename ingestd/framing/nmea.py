"""NMEA 0183 sentences, from `$` or `!` to the checksum; everything between them is skipped and counted.

Source: NMEA 0183 as gpsd's "NMEA Revealed" has it (https://gpsd.gitlab.io/gpsd/NMEA.html), and the logs the tests read.

- A sentence is `$` or `!`, an address that begins with a letter or digit, printable ASCII, `*` and two hexadecimal
  digits, the exclusive or of all between. It is recorded from the first to the last of these bytes. A checksum is
  enough to end it: the next sentence may follow without a line end.
- CR and LF directly behind a sentence are line ends; anywhere else they are skipped like everything else.
- A sentence without a checksum is skipped and counted (`unchecked_sentences`): nothing would tell it from garbage. A
  device that sends no checksums is recorded with the protocol `lines`.
- `$` is reserved: it always begins a sentence, so what was begun before it was a false start. `!` is text in some
  sentences, so both are tried: the one begun first and the one begun last.
- Longer than `PAYLOAD_BYTES_MAX` is a false start. (The standard says 82, receivers send up to some 400.)
- The tag block of NMEA 4.10 in front of a sentence is skipped.

Between sentences the next `$` or `!` is searched for, inside one the next byte that is not ordinary text: each byte is
looked at once by a regular expression and at most twice by the checksum, whatever comes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import reduce
from operator import xor

from ingestd.framing.base import SerialFrame
from ingestd.model import PAYLOAD_BYTES_MAX, SerialFlag

_START = re.compile(rb"[$!]")
_NOT_TEXT = re.compile(rb"[$!*]|[^ -~]")
_LINE_ENDS = re.compile(rb"[\r\n]*")
_ADDRESS = re.compile(rb"[$!][A-Za-z0-9]{2,}[,*]")  # as far as it tells a sentence from a stray `$`
_DIGITS = re.compile(rb"[0-9A-Fa-f]{2}")
_FEW_DIGITS = re.compile(rb"[0-9A-Fa-f]?")
_CHECKSUM_BYTES = 3  # `*` and two digits


class NmeaFramer:
    """The framer of the protocol `nmea`."""

    text_expected = True

    def __init__(self) -> None:
        self.counters = {
            "received_bytes": 0,
            "frame_bytes": 0,
            "line_end_bytes": 0,
            "skipped_bytes": 0,
            "bad_checksums": 0,
            "unchecked_sentences": 0,
        }
        # A sentence that has begun, from its `$` or `!` on, and how much of it was looked at. Empty where none has.
        self._held = bytearray()
        self._seen = 0
        self._begun_ns = 0
        self._second: int | None = None  # where in it another may begin, with a `!`
        self._second_ns = 0
        self._behind_sentence = False

    def __repr__(self) -> str:
        return f"<NmeaFramer: {len(self._held)} bytes held>"

    def feed(self, data: bytes, at_ns: int) -> list[SerialFrame]:
        """Take bytes that arrived at `at_ns`; return the sentences that they complete."""
        self.counters["received_bytes"] += len(data)
        self._held += data
        frames: list[SerialFrame] = []
        while self._seen or self._find_start(at_ns):
            special = _NOT_TEXT.search(self._held, self._seen)
            at = special.start() if special else len(self._held)
            if at > PAYLOAD_BYTES_MAX - _CHECKSUM_BYTES:
                self._begin_later(at)
            elif special is None:
                self._seen = at
                break
            elif special[0] == b"$":
                self._skip(at)
                self._begin(at_ns)
            elif special[0] == b"!":
                self._second, self._second_ns, self._seen = at, at_ns, at + 1
            elif special[0] == b"*":
                if not self._end(at, frames):
                    self._seen = at
                    break
            else:
                self.counters["unchecked_sentences"] += special[0] in b"\r\n" and any(self._candidates())
                self._skip(at + 1)
        return frames

    def flush(self) -> list[SerialFrame]:
        """The stream ends here: what has no checksum yet is no sentence."""
        self._skip(len(self._held))
        self._behind_sentence = False
        return []

    def _find_start(self, at_ns: int) -> bool:
        """Whether a sentence begins in what is held; what comes before it is skipped."""
        if self._behind_sentence:
            ends = _LINE_ENDS.match(self._held)
            count = ends.end() if ends else 0
            self.counters["line_end_bytes"] += count
            del self._held[:count]
            self._behind_sentence = not self._held
        start = _START.search(self._held)
        self._skip(start.start() if start else len(self._held))
        if start:
            self._begin(at_ns)
        return start is not None

    def _begin(self, at_ns: int) -> None:
        self._seen, self._begun_ns = 1, at_ns

    def _begin_later(self, seen: int) -> None:
        """What was begun first is too long: go on with what was begun after it, if anything was."""
        second, second_ns = self._second, self._second_ns
        self._skip(seen if second is None else second)
        if second is not None:
            self._seen, self._begun_ns = seen - second, second_ns

    def _candidates(self) -> Iterator[tuple[int, int]]:
        """Where a sentence may have begun, and when."""
        if _ADDRESS.match(self._held):
            yield 0, self._begun_ns
        if self._second is not None and _ADDRESS.match(self._held, self._second):
            yield self._second, self._second_ns

    def _end(self, star: int, frames: list[SerialFrame]) -> bool:
        """Decide about the sentence whose `*` is there; False if its digits have yet to come."""
        digits = _DIGITS.match(self._held, star + 1)
        if digits is None:
            if _FEW_DIGITS.fullmatch(self._held, star + 1):
                return False
            self._skip(star + 1)
            return True
        checksum, candidate = int(digits[0], 16), None
        for candidate in self._candidates():
            begin, begun_ns = candidate
            if reduce(xor, self._held[begin + 1 : star]) == checksum:
                self._skip(begin)
                length = digits.end() - begin
                frames.append(SerialFrame(begun_ns, bytes(self._held[:length]), SerialFlag.SERIAL | SerialFlag.TEXT))
                self.counters["frame_bytes"] += length
                self._drop(length)
                self._behind_sentence = True
                return True
        self.counters["bad_checksums"] += candidate is not None
        self._skip(digits.end())
        return True

    def _skip(self, count: int) -> None:
        self.counters["skipped_bytes"] += count
        self._drop(count)

    def _drop(self, count: int) -> None:
        del self._held[:count]
        self._seen, self._second = 0, None
