"""Where the lines of a block of candump text are, without blank lines and comments."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ingestd.model import UInt8s
from ingestd.sources.captures.base import Bools

Rows = NDArray[np.intp]
Texts = NDArray[np.void]  # Equally long pieces of text, one item each, which numpy copies in one go.

HASH, SPACE = b"# "
_NEWLINE, _RETURN = b"\n\r"
_PADDING = bytes(160)  # So that no window reaches past the end.


@dataclass(frozen=True, slots=True)
class Lines:
    """Where the lines of a block are, without blank lines and comments."""

    block: bytes
    buffer: UInt8s  # the block and `_PADDING`
    start: Rows
    hash: Rows  # the first `#`; in a line without one, the newline
    end: Rows  # without line end and direction column
    number: Rows  # 1-based, in the file
    transmitted: Bools | None  # None: no line has a direction column
    count: int  # lines in the block, blank lines and comments included

    @staticmethod
    def find(block: bytes, lines_before: int) -> Lines:
        buffer = np.frombuffer(block + _PADDING, np.uint8)
        text = buffer[: len(block)]
        mark = np.flatnonzero((text == _NEWLINE) | (text == HASH))
        last = np.flatnonzero(buffer[mark] == _NEWLINE)
        newline = mark[last]
        count = len(newline)
        start, hash_ = _behind(newline), mark[_behind(last)]
        number = np.arange(lines_before + 1, lines_before + 1 + count)
        before = buffer[newline - 1]
        end = newline - (before == _RETURN) if (before == _RETURN).any() else newline
        kept = (end > start) & (hash_ > start)
        if not kept.all():
            start, hash_, end, number = start[kept], hash_[kept], end[kept], number[kept]
        end, transmitted = _cut_direction(buffer, end)
        return Lines(block, buffer, start, hash_, end, number, transmitted, count)

    def text(self, row: int) -> bytes:
        """The whole line, with the direction column that `end` cuts off."""
        begin = int(self.start[row])
        return self.block[begin : self.block.index(b"\n", begin)]

    def windows(self, at: Rows, width: int) -> Texts:
        """The `width` bytes at each place: 5 ns each, whatever the width."""
        shape = (len(self.buffer) - width + 1,)
        overlapping: Texts = np.ndarray(shape, f"V{width}", self.buffer, strides=(1,))
        return overlapping[at]


def _behind(end: Rows) -> Rows:
    """Where pieces start that end where the ones before them end."""
    start = np.empty_like(end)
    start[:1] = 0
    np.add(end[:-1], 1, out=start[1:])
    return start


def _cut_direction(buffer: UInt8s, end: Rows) -> tuple[Rows, Bools | None]:
    """Ends without a trailing ` R` or ` T` (candump -x), and which lines were transmitted."""
    last = buffer[end - 1]
    sent = last == ord("T")
    directed = sent | (last == ord("R"))
    if not directed.any():
        return end, None
    directed &= buffer[end - 2] == SPACE
    return end - 2 * directed, sent & directed
