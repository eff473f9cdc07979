"""candump text: the lines that are as usual in columns, the others one by one.

Two parsers read the same language. `candump_columns` takes the lines `candump -L` and `-l` write and is strict:
whatever it is unsure about goes to `candump_lines.parse_line`, and what that does not accept is damage.

Limits and invariants:
- A block holds whole lines. Frames come out in the order of their lines, whichever parser read them.
- Where lines are cut into blocks changes nothing: the same bytes give the same frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, tzinfo
from fractions import Fraction
from pathlib import Path

import numpy as np

from ingestd.errors import CaptureError
from ingestd.model import FrameBatch, Int64s
from ingestd.sources.captures.base import SECOND_NS, Capture, CaptureBatch, Damage, Options, Sources
from ingestd.sources.captures.candump_block import Lines, Rows
from ingestd.sources.captures.candump_columns import Columns, Head, parse_columns
from ingestd.sources.captures.candump_lines import PREAMBLE, parse_line
from ingestd.sources.captures.text import LineError, read_blocks, whole_lines

BLOCK_BYTES = 1 << 20  # 2 MiB parse 4 % faster, 512 KiB 10 % slower.
STAMP_BLOCK_BYTES = 1 << 16  # Read to find out whether there are stamps.
KEPT_BYTES = 16 << 20
INTERFACE_DEFAULT = b"can0"

OnDamage = Callable[[int, str], None]  # line number, reason


@dataclass(frozen=True, slots=True)
class BlockFrames:
    """The frames of a block, in line order; `interface` holds indices into `interfaces`, first seen first."""

    frames: FrameBatch
    interface: Rows
    interfaces: tuple[bytes, ...]


@dataclass
class CandumpParser:
    """Blocks of whole lines in, columns out; remembers line numbers, the default interface and the number of frames.

    With `rate` (frames per second) every frame is stamped by its ordinal and stamps in the text are ignored; without
    it a line that has no stamp is damage.
    """

    on_damage: OnDamage
    rate: Fraction | None = None
    zone: tzinfo = UTC
    lines_count: int = 0
    frames_count: int = 0
    interface_default: bytes = INTERFACE_DEFAULT
    _names: list[bytes] = field(default_factory=list)  # Those seen so far are tried first.

    def parse(self, block: bytes) -> BlockFrames:
        """The frames of `block`, whose last line may lack its newline only at the end of the file."""
        if not block.endswith(b"\n"):
            block += b"\n"
        lines = Lines.find(block, self.lines_count)
        self.lines_count += lines.count
        head = Head.find(lines)
        columns = Columns.make(len(lines.start)) if head is None else parse_columns(lines, head, self._names)
        self._parse_singly(lines, columns)
        return self._finish(columns)

    def _parse_singly(self, lines: Lines, columns: Columns) -> None:
        """Read the lines that have no interface yet with the careful parser."""
        for row in np.flatnonzero(columns.interface < 0).tolist():
            line = lines.text(row)
            try:
                frame = parse_line(line, self.zone)
                if frame is None:
                    if preamble := PREAMBLE.fullmatch(line.strip()):
                        self.interface_default = preamble["interface"]
                    continue
                if frame.ts_ns is None and self.rate is None:
                    raise LineError("no time stamp")
                columns.put(row, frame, self.interface_default)
            except LineError as error:
                self.on_damage(int(lines.number[row]), str(error))

    def _finish(self, columns: Columns) -> BlockFrames:
        frames, interface = columns.frames, columns.interface
        if (interface < 0).any():
            kept = np.flatnonzero(interface >= 0)
            frames, interface = frames[kept], interface[kept]
        if self.rate is not None:
            frames = replace(frames, ts_ns=self._stamps(len(frames), self.rate))
        self.frames_count += len(frames)
        order = np.argsort(columns.first_row)
        names = list(columns.names)
        return BlockFrames(frames, np.argsort(order).take(interface), tuple(names[number] for number in order.tolist()))

    def _stamps(self, count: int, rate: Fraction) -> Int64s:
        """round(ordinal * 1e9 / rate) without a float; halves go up."""
        ordinals = range(self.frames_count, self.frames_count + count)
        top, bottom = 2 * SECOND_NS * rate.denominator, 2 * rate.numerator
        return np.array([(n * top + rate.numerator) // bottom for n in ordinals], dtype=np.int64)


class CandumpCapture(Capture):
    """candump text, without a header: stamps are absolute, or relative, or there are none and a rate is given."""

    kind = "candump"
    has_date = False

    def __init__(self, path: Path, options: Options, block_bytes: int = BLOCK_BYTES) -> None:
        super().__init__(path, options)
        self._block_bytes = block_bytes
        self._rate: Fraction | None = None

    def _pieces(self) -> Iterator[CaptureBatch]:
        _keep_freed_memory()
        sources = Sources(self._options.source_names)
        parser = CandumpParser(self.damage.add_line, self._rate, self._options.timezone)
        for block, position in whole_lines(read_blocks(self.path, self._block_bytes, self.damage)):
            parsed = parser.parse(block)
            table = np.array([sources.index(name.decode("ascii")) for name in parsed.interfaces], np.uint16)
            yield CaptureBatch(parsed.frames, table.take(parsed.interface), sources.seen(), position)

    def probe(self) -> None:
        """The first frame's stamp, or the lack of it, decides what the file's stamps are."""
        if not self._has_stamps():
            self._rate = self._options.rate
            if self._rate is None:
                raise CaptureError(
                    f"{self.path} has no time stamps", "say how fast it was recorded: --rate FRAMES_PER_SECOND"
                )
        super().probe()

    def _has_stamps(self) -> bool:
        for block, _ in whole_lines(read_blocks(self.path, STAMP_BLOCK_BYTES, Damage())):
            for line in block.split(b"\n"):
                try:
                    frame = parse_line(line, self._options.timezone)
                except LineError:
                    continue
                if frame is not None:
                    return frame.ts_ns is not None
        return True  # There is no frame at all; that is for the base class to say.


def _keep_freed_memory() -> None:
    """Let glibc keep the memory of one block's arrays for those of the next: half of the time went into page faults.

    Once an array of this size has been freed, glibc neither maps smaller ones by themselves nor gives less than twice
    this back to the system (mallopt(3), M_MMAP_THRESHOLD). It is never written to, so it costs no memory.
    """
    np.empty(KEPT_BYTES, np.uint8)
