"""What captures of every kind share: batches of interleaved frames, names of sources, damage, the clock.

Limits and invariants:
- Every batch but the last has exactly the frames asked for, so boundaries are the same in every run: a feed's
  position depends on it.
- Damage does not stop reading: it is counted, and the first few are described.
- A capture has at most 65,535 sources, as many as a source index can tell apart.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import tzinfo
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingestd.errors import CaptureError
from ingestd.model import BATCH_FRAMES_MAX, ClockState, FrameBatch, join

SUPPORTED_HINT = "supported: candump text, Vector ASC and BLF, PCAN TRC, CSV of python-can, MF4; text also gzipped"
DAMAGE_DESCRIPTIONS_MAX = 5
SOURCES_MAX = 65_535
CLASSIC_BYTES_MAX = 8
FD_LENGTHS = frozenset((0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 24, 32, 48, 64))  # ISO 11898-1:2015, table 5.
STANDARD_ID_MAX = 0x7FF
EXTENDED_ID_MAX = 0x1FFFFFFF
SECOND_NS = 1_000_000_000
STAMP_NS_MAX = 2**63 - 1
STAMP_SECONDS_MAX = STAMP_NS_MAX // SECOND_NS
ABSOLUTE_NS_MIN = 10**8 * SECOND_NS  # Stamps below (1973-03-03) count from the start of the recording.

Indices = NDArray[np.uint16]
UInt32s = NDArray[np.uint32]
Bools = NDArray[np.bool_]


@dataclass
class Damage:
    """How many lines or records could not be read, and what was wrong with the first few. Grows while reading."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add_line(self, number: int, reason: str) -> None:
        self._add(f"line {number}: {reason}")

    def add_offset(self, offset: int, reason: str) -> None:
        self._add(f"offset {offset}: {reason}")

    def add_record(self, number: int, reason: str) -> None:
        self._add(f"record {number}: {reason}")

    def as_json(self) -> dict[str, Any]:
        """What an import remembers of it."""
        return {"damaged": self.count, "damage": list(self.first)}

    def _add(self, description: str) -> None:
        self.count += 1
        if len(self.first) < DAMAGE_DESCRIPTIONS_MAX:
            self.first.append(description)


@dataclass(frozen=True, slots=True)
class CaptureBatch:
    """Frames of all sources, interleaved, in file order.

    frames        columns as in `FrameBatch`; its `source` is ""
    source_index  uint16[n] into `sources`
    sources       every source seen so far, first seen first
    bytes_read    how far reading is in the file on disk, for a progress bar
    """

    frames: FrameBatch
    source_index: Indices
    sources: tuple[str, ...]
    bytes_read: int

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, rows: slice) -> CaptureBatch:
        """The frames that the slice selects; `sources` and `bytes_read` stay."""
        return CaptureBatch(self.frames[rows], self.source_index[rows], self.sources, self.bytes_read)

    def by_source(self) -> list[FrameBatch]:
        """One batch per source that occurs, in the order of `sources`; wire order is kept inside each."""
        occurring = np.flatnonzero(np.bincount(self.source_index)).tolist()
        if len(occurring) == 1:
            return [replace(self.frames, source=self.sources[occurring[0]])]
        return [self._frames_of(index) for index in occurring]

    def _frames_of(self, index: int) -> FrameBatch:
        rows, frames = np.flatnonzero(self.source_index == index), self.frames
        return FrameBatch(
            self.sources[index],
            frames.ts_ns.take(rows),
            frames.arbitration_id.take(rows),
            frames.flags.take(rows),
            frames.length.take(rows),
            frames.data.take(rows, axis=0),
        )


class Sources:
    """Names found in a file to source indices, first seen first; two names may be mapped to one source."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names
        self._index: dict[str, int] = {}

    def index(self, name: str) -> int:
        """The index of the source that `name` stands for. Raises CaptureError when there are too many."""
        index = self._index.setdefault(self._names.get(name, name), len(self._index))
        if index >= SOURCES_MAX:
            raise CaptureError(f"the capture names more than {SOURCES_MAX} sources", "is it damaged?")
        return index

    def indices(self, channels: NDArray[Any]) -> Indices:
        """Source indices of channel numbers, each named `can<number>`, given out in order of appearance."""
        numbers, first, inverse = np.unique(channels, return_index=True, return_inverse=True)
        table = np.zeros(len(numbers), np.uint16)
        for position in np.argsort(first).tolist():
            table[position] = self.index(f"can{numbers[position]}")
        return table.take(inverse)

    def seen(self) -> tuple[str, ...]:
        return tuple(self._index)


@dataclass(frozen=True, slots=True)
class Options:
    """What the user said about a capture."""

    source_names: Mapping[str, str]
    rate: Fraction | None
    timezone: tzinfo


class Capture(ABC):
    """One capture file. Its clock is known once `open_capture` has returned; its damage once it has been read."""

    kind: str
    has_date = True  # Whether files of the kind have a date in their header, which their stamps are relative to.

    def __init__(self, path: Path, options: Options) -> None:
        self.path = path
        self.size_bytes = path.stat().st_size
        self.damage = Damage()
        self.utc_offset_ns = 0
        self.clock_state = ClockState.UNSET
        self._options = options

    def __repr__(self) -> str:
        return f"<Capture {self.kind} {self.path}>"

    def batches(self, frames_max: int = BATCH_FRAMES_MAX) -> Iterator[CaptureBatch]:
        """All frames from the start, `frames_max` at a time; only the last batch has fewer. Resets `damage`.

        Raises CaptureError when the file vanishes or cannot be read on.
        """
        if frames_max < 1:
            raise ValueError(f"a batch has at least one frame, not {frames_max}")
        self.damage = Damage()
        try:
            yield from _rebatch(self._pieces(), frames_max)
        except OSError as error:
            raise unreadable(self.path, error) from error

    @abstractmethod
    def _pieces(self) -> Iterator[CaptureBatch]:
        """Batches of whatever size reading gives."""

    def probe(self) -> None:
        """Read until the first frame. Raises CaptureError if the file holds nothing but damage.

        Where no header has the date, the first stamp tells what the stamps are: of our time, or relative.
        """
        first = next((piece for piece in self._pieces() if len(piece) > 0), None)
        if first is None and self.damage.count > 0:
            raise CaptureError(
                f"{self.path} holds no frame that can be read as {self.kind}; {self.damage.first[0]}", SUPPORTED_HINT
            )
        if first is not None and not self.has_date and first.frames.ts_ns[0] >= ABSOLUTE_NS_MIN:
            self.clock_state = ClockState.SET
        self.damage = Damage()

    def _set_clock(self, utc_offset_ns: int | None) -> None:
        """The date of the header, or None if there is no valid one."""
        self.utc_offset_ns = utc_offset_ns or 0
        self.clock_state = ClockState.UNSET if utc_offset_ns is None else ClockState.SET


def unreadable(path: Path, error: OSError) -> CaptureError:
    """What to tell the operator when the system does not let us read."""
    return CaptureError(f"{path} cannot be read: {error.strerror or error}", "is the path right, and may you read it?")


def _rebatch(pieces: Iterable[CaptureBatch], frames_max: int) -> Iterator[CaptureBatch]:
    """Batches of exactly `frames_max` frames, but for the last, out of pieces of any size."""
    held: list[CaptureBatch] = []
    count = sources_count = 0
    for piece in pieces:
        begin = 0
        while begin < len(piece):
            part = piece[begin : begin + frames_max - count]
            begin += len(part)
            count += len(part)
            held.append(part)
            if count == frames_max:
                batch = _join(held, sources_count)
                sources_count = len(batch.sources)
                yield batch
                held, count = [], 0
    if held:
        yield _join(held, sources_count)


def _join(parts: list[CaptureBatch], sources_count: int) -> CaptureBatch:
    """One batch, as wide as its longest payload needs, whose sources are those seen up to its end and no further."""
    index = np.concatenate([part.source_index for part in parts])
    seen = max(sources_count, int(index.max()) + 1)
    return CaptureBatch(join([part.frames for part in parts]), index, parts[-1].sources[:seen], parts[-1].bytes_read)
