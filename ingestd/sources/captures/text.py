"""What text captures share: blocks of a file that may be gzipped, whole lines of it, and frames read line by line.

Limits and invariants:
- Memory is bounded whatever the file holds: a line longer than any format has is cut short, and is damage.
- A gzip that is cut or broken gives what comes before the place where that shows; several members are one stream.
- A bad line is reported by its number and left out; it never changes what its neighbours become.
"""

from __future__ import annotations

import contextlib
import io
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np

from ingestd.model import Flag, FrameBatch, padded_width
from ingestd.sources.captures.base import (
    CLASSIC_BYTES_MAX,
    EXTENDED_ID_MAX,
    FD_LENGTHS,
    STAMP_NS_MAX,
    STANDARD_ID_MAX,
    Capture,
    CaptureBatch,
    Damage,
    Sources,
)

LINE_BYTES_MAX = 4096  # The longest line candump writes has about 250 bytes; anything longer is not one of its lines.
BLOCK_BYTES = 1 << 16  # For the kinds read line by line, where a block only has to make reading cheap.
FRAMES_MAX = 4096  # Frames collected one by one before they become columns.
GZIP_MAGIC = b"\x1f\x8b"

Item = TypeVar("Item")


class LineError(ValueError):
    """The line is not a frame; the message is the reason, without the line's number."""


class Frame(NamedTuple):
    """One frame of one line."""

    ts_ns: int
    source: str
    arbitration_id: int
    flags: int
    payload: bytes

    def check(self) -> None:
        """Raises LineError when a value is out of range."""
        if not -STAMP_NS_MAX <= self.ts_ns <= STAMP_NS_MAX:
            raise LineError("the time stamp is out of range")
        wide = self.flags & (Flag.EXTENDED | Flag.ERROR)  # Of an error frame it is not known which kind it was.
        if not 0 <= self.arbitration_id <= (EXTENDED_ID_MAX if wide else STANDARD_ID_MAX):
            raise LineError("the arbitration id is out of range")
        length = len(self.payload)
        if (length not in FD_LENGTHS) if self.flags & Flag.FD else (length > CLASSIC_BYTES_MAX):
            raise LineError(f"a payload of {length} bytes")


def read_blocks(path: Path, block_bytes: int, damage: Damage) -> Iterator[tuple[bytes, int]]:
    """Blocks of a file, unpacked if it is gzip, each with the position on disk. A damaged gzip ends early.

    A byte order mark at the beginning is left out.
    """
    with path.open("rb") as file:
        packed = file.read(2) == GZIP_MAGIC
        file.seek(0)
        blocks = _gunzip(file, block_bytes, damage) if packed else _plain(file, block_bytes)
        begin, position = b"", 0
        while len(begin) < len(BOM_UTF8) and (found := next(blocks, None)):
            begin, position = begin + found[0], found[1]
        if begin := begin.removeprefix(BOM_UTF8):
            yield begin, position
        yield from blocks


def _plain(file: BinaryIO, block_bytes: int) -> Iterator[tuple[bytes, int]]:
    while block := file.read(block_bytes):
        yield block, file.tell()


def _gunzip(file: BinaryIO, block_bytes: int, damage: Damage) -> Iterator[tuple[bytes, int]]:
    """Unlike `gzip`, gives what comes before the damage of a cut or broken file."""
    unpacker = zlib.decompressobj(wbits=31)
    packed = file.read(BLOCK_BYTES)
    while packed:
        before = unpacker.copy()  # 40 kB.
        try:
            block = unpacker.decompress(packed, block_bytes)
        except zlib.error as error:
            if block := _before_error(before, packed):
                yield block, file.tell()
            damage.add_offset(file.tell() - len(packed), f"the gzip stream is broken ({error})")
            return
        if block:
            yield block, file.tell()
        packed = unpacker.unconsumed_tail
        if unpacker.eof:
            packed = unpacker.unused_data.lstrip(b"\0") or file.read(BLOCK_BYTES).lstrip(b"\0")
            if packed:
                unpacker = zlib.decompressobj(wbits=31)
        elif not packed:
            packed = file.read(BLOCK_BYTES)
    if not unpacker.eof:
        damage.add_offset(file.tell(), "the gzip stream is cut off")


def _before_error(unpacker: zlib._Decompress, packed: bytes) -> bytes:
    """What `packed` gives up to its error, with which a call that gets all of it gives nothing.

    It is no more than that call was to give, or it would have stopped before the error.
    """
    data = bytearray()
    with contextlib.suppress(zlib.error):
        for at in range(len(packed)):
            data += unpacker.decompress(packed[at : at + 1])
    return bytes(data)


def whole_lines(blocks: Iterable[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    """The same bytes cut at line ends. A line that is too long for any format is cut short, so that memory is bounded;
    what is left of it is still too long and the parser calls it damage."""
    rest = b""
    position = 0
    for block, position in blocks:
        end = block.rfind(b"\n") + 1
        if end == 0:
            rest = (rest + block)[: LINE_BYTES_MAX + 1]
            continue
        yield b"".join((rest, memoryview(block)[:end])), position
        rest = block[end:][: LINE_BYTES_MAX + 1]
    if rest:
        yield rest, position


def decode_text(line: bytes) -> str:
    """Text of either encoding that the writers use, without a byte order mark."""
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError:
        return line.decode("latin-1")


class LineFeed(io.TextIOBase):
    """Lines of a file as a text file that python-can can read, which knows the number of the line it gave last."""

    def __init__(self, path: Path, damage: Damage) -> None:
        self.number = 0
        self.position = 0
        self.damage = damage
        self._lines = self._read(path)

    def prepare(self, line: str) -> Iterable[str]:
        """The lines to give out instead of this one: none, one or several; without line ends."""
        return (line,)

    def _read(self, path: Path) -> Iterator[str]:
        for block, position in whole_lines(read_blocks(path, BLOCK_BYTES, self.damage)):
            self.position = position
            for line in block.removesuffix(b"\n").split(b"\n"):
                self.number += 1
                if len(line) > LINE_BYTES_MAX:
                    self.reject(f"longer than {LINE_BYTES_MAX} bytes")
                    continue
                for text in self.prepare(decode_text(line).strip()):
                    yield text + "\n"

    def readline(self, _size: int = -1, /) -> str:  # type: ignore[override]
        return next(self._lines, "")

    def reject(self, reason: str) -> None:
        """Count the line that was given last as damage."""
        self.damage.add_line(self.number, reason)


class LinesCapture(Capture):
    """A text kind that is read a line at a time."""

    def _collect(
        self, feed: LineFeed, items: Iterable[Item], frame_of: Callable[[Item], Frame]
    ) -> Iterator[CaptureBatch]:
        """Batches of the frames of the items, from the feed; an error of a value is the last line's damage."""
        sources = Sources(self._options.source_names)
        frames: list[Frame] = []
        for item in items:
            try:
                frame = frame_of(item)
                frame.check()
            except (ArithmeticError, ValueError) as error:
                feed.reject(str(error) if isinstance(error, LineError) else f"not a frame ({error})")
                continue
            frames.append(frame)
            if len(frames) == FRAMES_MAX:
                yield _batch(frames, sources, feed.position)
                frames = []
        if frames:
            yield _batch(frames, sources, feed.position)


def _batch(frames: list[Frame], sources: Sources, bytes_read: int) -> CaptureBatch:
    ts_ns, names, arbitration_id, flags, payloads = zip(*frames, strict=True)
    length = np.array([len(payload) for payload in payloads], np.uint16)
    width = padded_width(length)
    joined = b"".join([payload.ljust(width, b"\0") for payload in payloads])
    columns = FrameBatch(
        "",
        np.array(ts_ns, np.int64),
        np.array(arbitration_id, np.uint32),
        np.array(flags, np.uint8),
        length,
        np.frombuffer(joined, np.uint8).reshape(-1, width),
    )
    index = np.array([sources.index(name) for name in names], np.uint16)
    return CaptureBatch(columns, index, sources.seen(), bytes_read)
