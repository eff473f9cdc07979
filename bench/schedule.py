"""When the frames of a capture are due, how late they left, and the same capture again with later stamps.

Nothing here waits or sends. Deadlines are absolute: a frame is due at the start plus its own distance from the first
frame, divided by the speed. So what comes late delays nothing after it, and hours later there is no drift.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ingestd.model import FrameBatch
from ingestd.sources.captures import Capture, CaptureBatch

FRAMES_AT_ONCE = 4096
_BINS_PER_OCTAVE = 64


@dataclass(slots=True)
class Lateness:
    """How late frames were, in bins of 1 %: in bounded memory however many there are."""

    max_ns: int = 0
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(40 * _BINS_PER_OCTAVE, np.int64))

    def add(self, late_ns: NDArray[np.int64]) -> None:
        """Note some more; nothing may be early."""
        bins = np.log2(late_ns / 1000 + 1) * _BINS_PER_OCTAVE
        self.counts += np.bincount(bins.astype(np.int64), minlength=len(self.counts))
        self.max_ns = max(self.max_ns, int(late_ns.max()))

    def quantile_ms(self, share: float) -> float:
        """What that share of the frames was not later than."""
        if not (total := int(self.counts.sum())):
            return 0.0
        at = int(np.searchsorted(np.cumsum(self.counts), share * total))
        return float(min(2 ** ((at + 1) / _BINS_PER_OCTAVE) - 1, self.max_ns / 1000) / 1000)


def looped(capture: Capture, loops: int) -> Iterator[CaptureBatch]:
    """The capture so many times, its stamps counted from its first frame on and rising from one pass to the next.

    A pass lasts from the first to the latest stamp and a frame's mean distance more.
    """
    begin_ns, shift_ns = 0, 0
    for loop in range(loops):
        frames, last_ns = 0, 0
        for batch in capture.batches():
            if not len(batch):
                continue
            if not loop and not frames:
                begin_ns = int(batch.frames.ts_ns[0])
            frames += len(batch)
            ts_ns = batch.frames.ts_ns - begin_ns
            last_ns = max(last_ns, int(ts_ns.max()))
            yield replace(batch, frames=replace(batch.frames, ts_ns=ts_ns + shift_ns))
        shift_ns += last_ns + (last_ns // (frames - 1) if frames > 1 else 1_000_000)


class Schedule:
    """The frames of `batches`, whose stamps count from 0, in order, each not before it is due.

    `speed` None is flat out: everything is due at once, and stamps keep their distances. Otherwise stamps are what a
    clock shows when the frame is due. Frames whose stamps go back are due with the one before them.
    """

    def __init__(self, batches: Iterator[CaptureBatch], began_ns: int, speed: float | None) -> None:
        self.lateness = Lateness()
        self.taken_count = 0
        self.last_ns = 0  # the stamp, counted from 0, that was taken last
        self._batches, self._began_ns, self._speed = batches, began_ns, speed
        self._batch: CaptureBatch | None = None
        self._due_ns = np.zeros(0, np.int64)
        self._latest_ns, self._next = 0, 0
        self._advance()

    @property
    def next_ns(self) -> int | None:
        """When the next frame is due; None after the last one."""
        if self._batch is None:
            return None
        return self._began_ns if self._speed is None else int(self._due_ns[self._next])

    def take(self, now_ns: int) -> CaptureBatch | None:
        """Frames that are due, FRAMES_AT_ONCE of them at most, with their new stamps; None if there are none."""
        if self._batch is None:
            return None
        begin, end = self._next, min(self._next + FRAMES_AT_ONCE, len(self._batch))
        if self._speed is not None:
            end = min(end, int(np.searchsorted(self._due_ns, now_ns, "right")))
            if end == begin:
                return None
            self.lateness.add(now_ns - self._due_ns[begin:end])
        taken = self._batch[begin:end]
        self._next = end
        self.taken_count += end - begin
        self.last_ns = int(taken.frames.ts_ns[-1])
        if end == len(self._batch):
            self._advance()
        return replace(taken, frames=replace(taken.frames, ts_ns=self._on_the_clock(taken.frames)))

    def _on_the_clock(self, frames: FrameBatch) -> NDArray[np.int64]:
        return self._began_ns + (frames.ts_ns if self._speed is None else self._scaled(frames.ts_ns, self._speed))

    def _scaled(self, ts_ns: NDArray[np.int64], speed: float) -> NDArray[np.int64]:
        return ts_ns if speed == 1 else (ts_ns / speed).astype(np.int64)

    def _advance(self) -> None:
        self._batch, self._next = next(self._batches, None), 0
        if self._batch is not None and self._speed is not None:
            rising = np.maximum(np.maximum.accumulate(self._batch.frames.ts_ns), self._latest_ns)
            self._latest_ns = int(rising[-1])
            self._due_ns = self._began_ns + self._scaled(rising, self._speed)
