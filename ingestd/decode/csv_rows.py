"""Rows of a table to signals: a line with the names, perhaps one with the units, then numbers.

MegaSquirt (tabs, a row of units), COBB Accessport (units in the names), loggers on an Arduino. The names come once,
when the logger is switched on, and every row after that depends on them: which they are is the decoder's memory,
committed with the feed's position.

- A line without any number may be a header. It becomes the header when a row with numbers and as many cells follows it;
  so neither a greeting nor an error message makes one, nor takes the place of one. A line without numbers directly
  behind it, as wide, is its units. The same line again is nothing new.
- Once there is a header, a line without numbers that is as wide and repeats none of the names is a row of text.
- A row has exactly as many cells as the header (one empty cell more at the end is let pass). Others are not decoded: a
  part of a row would give values to the wrong names.
- `Time (sec)` and `Time [sec]` are the name and its unit. Of a name of more than `NAME_CHARS_MAX` characters what
  stands before the first bracket is kept, names that come twice are numbered (`TPS`, `TPS_2`), a cell without a name is
  `column_3`.
- Tab, semicolon and comma are found by themselves, in this order. Where it is not the comma, `21,5` is a number.
- Configured columns are the header, whatever the lines say; lines that look like one are passed over.
- The first line after a port was opened may lack its beginning. As a row it is not decoded; as the end of the header in
  force it is passed over; any other header is taken as it is: many devices say theirs exactly when they are opened.

Source: RFC 4180 for quotes; a line end within them is none here.

Invariants: every frame is counted in exactly one of decoded (a row), unknown (header, units, anything before them),
undecoded (no UTF-8, cut off at either end, or a row that no header fits); none raises out of `decode`. The samples
depend on the lines and the memory, not on how the lines are put into batches.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ingestd.decode.can import Counts, Decoded
from ingestd.decode.keyed import NotDecodableError, text_of
from ingestd.decode.scalars import EXACT_MAX, column_of, is_number, scalar_of, utc_of
from ingestd.model import (
    GROUP_CHANNELS_MAX,
    Channel,
    Float64s,
    FrameBatch,
    Int16s,
    Memory,
    SerialFlag,
    SignalBatch,
    SignalGroup,
)

NAME: Final = "csv"
ORIGIN: Final = "CSV"
DELIMITERS: Final = {"tab": "\t", "semicolon": ";", "comma": ","}
NAME_CHARS_MAX: Final = 60
UNIT_CHARS_MAX: Final = 16
WAITING_MAX: Final = 4  # headers that have had no row yet; what a device reports between header and row is none
ROWS_BEHIND: Final = 8  # how many rows behind a line of text are looked at for one that makes it the header

_UNIT: Final = re.compile(rf"(.*\S)\s*(?:\(([^()]{{1,{UNIT_CHARS_MAX}}})\)|\[([^\[\]]{{1,{UNIT_CHARS_MAX}}})\])")
_NUMERIC_BYTES: Final = np.frombuffer(b"0123456789+-.", np.uint8)
_BRACKET: Final = re.compile(r"[(\[]")


class Header(NamedTuple):
    """The cells of a header as they were, those of the row of units behind it, and what stands between them."""

    cells: tuple[str, ...]
    units: tuple[str, ...] | None
    delimiter: str

    @staticmethod
    def load(value: Any) -> Header:
        """From JSON."""
        cells, units, delimiter = value
        return Header(tuple(cells), None if units is None else tuple(units), delimiter)

    def as_json(self) -> list[Any]:
        """The form that `load` takes."""
        return [list(self.cells), None if self.units is None else list(self.units), self.delimiter]

    def fits(self, cells: Sequence[str]) -> bool:
        """Whether that many cells are a row of it."""
        extra = len(cells) - len(self.cells)
        return extra == 0 or (extra == 1 and not cells[-1].strip())


class CsvDecoder:
    """Decodes the rows of one source. Groups are made when the first row of a header comes."""

    def __init__(
        self,
        source: str,
        *,
        columns: Sequence[str] = (),
        delimiter: str = "auto",
        units_row: str = "auto",
        time_field: str | None = None,
    ) -> None:
        """`delimiter` is a key of DELIMITERS or "auto", `units_row` is "auto", "always" or "never"."""
        self.source = source
        self._delimiter = DELIMITERS.get(delimiter)
        self._configured = Header(tuple(columns), None, self._delimiter or ",") if columns else None
        self._units_row = units_row
        self._time_field = time_field
        self._groups: dict[Header, tuple[SignalGroup, ...]] = {}

    def __repr__(self) -> str:
        return f"<CsvDecoder {self.source}: {len(self._groups)} headers>"

    def decode(self, frames: FrameBatch, memory: Memory) -> Decoded:
        """Decode a batch. `memory` has the header, and is brought up to date."""
        counts = Counts(frames=len(frames))
        reading = _Reading(memory.get(NAME, {}), self._configured, self._delimiter, self._units_row)
        batches: list[SignalBatch] = []
        stamps: list[int] = []
        rows: list[Sequence[str]] = []
        header = reading.header
        columns = zip(frames.ts_ns.tolist(), frames.flags.tolist(), frames.length.tolist(), frames.data, strict=True)
        for ts_ns, flags, length, data in columns:
            try:
                text = text_of(flags, data[:length].tobytes())
                row = reading.first_row(text) if flags & SerialFlag.FIRST else reading.row(text)
            except NotDecodableError:
                counts.undecoded += 1
                continue
            if row is None:
                counts.unknown += 1
                continue
            if reading.header != header:
                batches += self._batches(header, stamps, rows)
                header, stamps, rows = reading.header, [], []
            if flags & SerialFlag.FIRST:
                counts.undecoded += 1
                continue
            counts.decoded += 1
            stamps.append(ts_ns)
            rows.append(row)
        batches += self._batches(header, stamps, rows)
        if reading.memory:
            memory[NAME] = reading.memory
        counts.signals = sum(batch.value.size for batch in batches)
        return Decoded(batches, counts)

    def remember(self, frames: FrameBatch, memory: Memory) -> None:
        """Note the header: of the lines that begin like a number only those behind one that does not are read."""
        is_text = ~np.isin(frames.data[:, 0], _NUMERIC_BYTES)
        read = is_text.copy()
        for distance in range(1, ROWS_BEHIND + 1):
            read[distance:] |= is_text[:-distance]
        read[:ROWS_BEHIND] = True  # The line before the first may have been a header.
        self.decode(frames[read], memory)

    def _batches(self, header: Header | None, stamps: list[int], rows: list[Sequence[str]]) -> Iterator[SignalBatch]:
        if header is None or not rows:
            return
        ts_ns = np.array(stamps, np.int64)
        cells = list(zip(*rows, strict=False))  # An empty cell more at the end of some is left out.
        start = 0
        for group in self._groups_of(header):
            shape = len(group.channels), len(rows)
            value, quality, texts = np.empty(shape), np.zeros(shape, np.int16), np.full(shape, None, np.object_)
            for number, channel in enumerate(group.channels):
                is_time = channel.name == self._time_field
                value[number], text, of_column = _column(cells[start + number], header.delimiter != ",", is_time)
                if text is not None:
                    texts[number] = text
                if of_column is not None:
                    quality[number] = of_column
            start += len(group.channels)
            has_text = bool(texts.any())
            yield SignalBatch(group, ts_ns, value, texts if has_text else None, quality if quality.any() else None)

    def _groups_of(self, header: Header) -> tuple[SignalGroup, ...]:
        if header not in self._groups:
            channels = [
                Channel(name, "s", layout="utc") if name == self._time_field else Channel(name, unit, layout=NAME)
                for name, unit in names_of(header)
            ]
            self._groups[header] = tuple(
                SignalGroup.make(self.source, NAME, "", ORIGIN, tuple(channels[at : at + GROUP_CHANNELS_MAX]))
                for at in range(0, len(channels), GROUP_CHANNELS_MAX)
            )
        return self._groups[header]


class _Reading:
    """The header as lines change it: the one in force, and those that wait for a first row, the newest last."""

    def __init__(self, known: Any, configured: Header | None, delimiter: str | None, units_row: str) -> None:
        self.header = configured
        if configured is None and "header" in known:
            self.header = Header.load(known["header"])
        self._waiting = [Header.load(each) for each in known.get("waiting", ())]
        self._is_configured = configured is not None
        self._delimiter = delimiter
        self._units_row = units_row

    @property
    def memory(self) -> dict[str, Any]:
        """What to know of the lines so far: JSON."""
        found: dict[str, Any] = {}
        if self.header is not None and not self._is_configured:
            found["header"] = self.header.as_json()
        if self._waiting:
            found["waiting"] = [each.as_json() for each in self._waiting]
        return found

    def row(self, text: str) -> Sequence[str] | None:
        """The cells of a row of `header`; None for a line that is none. Raises NotDecodableError for one of another."""
        is_comment = text.startswith("#")
        if not is_comment and (found := self._row_of_waiting(text)) is not None:
            return found or None
        if self.header is not None and not is_comment and (cells := self._as_row(text, self.header)) is not None:
            self._waiting = []
            return cells
        text = text.lstrip("# ") if is_comment else text
        delimiter = self._delimiter or _delimiter_in(text)
        cells = _split(text, delimiter)
        if any(is_number(cell, decimal_comma=delimiter != ",") for cell in cells):
            if is_comment:
                return None
            raise NotDecodableError("a row that no header fits")
        return self._without_numbers(cells, delimiter)

    def first_row(self, text: str) -> Sequence[str] | None:
        """Like `row`, for a line that may lack its beginning: the end of the header in force says nothing new."""
        if self.header is not None:
            cells, known = _split(text, self.header.delimiter), self.header.cells
            behind = known[-len(cells) :]
            if behind[0].endswith(cells[0].strip()) and tuple(cell.strip() for cell in cells[1:]) == behind[1:]:
                return None
        return self.row(text)

    def _row_of_waiting(self, text: str) -> Sequence[str] | None:
        """The cells of the first row of a header that waits, which is in force from now on; [] for a row of units."""
        for number, waiting in reversed(list(enumerate(self._waiting))):
            cells = self._as_row(text, waiting)
            if cells is None:
                continue
            if self._units_row == "always" and waiting.units is None and not self._is_configured:
                self._waiting[number] = waiting._replace(units=tuple(cells))
                return []
            if not self._is_configured:
                self.header, self._waiting = waiting, []
                return cells
        return None

    def _as_row(self, text: str, header: Header) -> Sequence[str] | None:
        """The cells, if it is a row of the header with a number in it. Configured columns fit any delimiter."""
        delimiter = header.delimiter
        if self._is_configured and self._delimiter is None:
            delimiter = _delimiter_in(text)
            if self.header is not None and delimiter != self.header.delimiter:
                self.header = self.header._replace(delimiter=delimiter)
        cells = _split(text, delimiter)
        if not header.fits(cells):
            return None
        return cells if any(is_number(cell, decimal_comma=delimiter != ",") for cell in cells) else None

    def _without_numbers(self, cells: list[str], delimiter: str) -> Sequence[str] | None:
        """The cells of a row of text; None for a header, units, or anything else, which is taken note of."""
        found = tuple(cell.strip() for cell in cells)
        newest, header = (self._waiting[-1] if self._waiting else None), self.header
        if len(found) > 1 and not found[-1] and not (newest is not None and len(newest.cells) == len(found)):
            found = found[:-1]
        if newest is not None and newest.fits(found):
            if found == newest.cells:
                return None
            if newest.units is None and self._units_row != "never" and len(newest.cells) > 1:
                self._waiting[-1] = newest._replace(units=found[: len(newest.cells)])
                return None
        elif header is not None and header.fits(cells):
            names = {cell.strip() for cell in header.cells} | {name for name, _ in names_of(header)}
            if found == header.units:
                return None
            if names.isdisjoint(found):
                return cells
        if sum(map(bool, found)) * 2 > len(found):
            self._waiting = [*self._waiting, Header(found, None, delimiter)][-WAITING_MAX:]
        return None


def names_of(header: Header) -> list[tuple[str, str | None]]:
    """The name of each channel and its unit."""
    names: dict[str, str | None] = {}
    units = header.units or ()
    for number, cell in enumerate(header.cells, 1):
        cell = cell.strip()
        found = _UNIT.fullmatch(cell)
        name, unit = (found[1], found[2] or found[3]) if found else (cell, None)
        if len(name) > NAME_CHARS_MAX:
            name = (_BRACKET.split(name)[0].strip(" :;,-") or name)[:NAME_CHARS_MAX]
        name = base = name or f"column_{number}"
        times = 1
        while name in names:
            times += 1
            name = f"{base}_{times}"
        names[name] = (units[number - 1] if number <= len(units) else "") or (unit or "").strip() or None
    return list(names.items())


def _delimiter_in(text: str) -> str:
    """The first of tab, semicolon and comma that stands outside of quotes; the comma if none does."""
    for delimiter in DELIMITERS.values():
        if delimiter in text and len(_split(text, delimiter)) > 1:
            return delimiter
    return ","


def _split(text: str, delimiter: str) -> list[str]:
    if '"' not in text:
        return text.split(delimiter)
    return next(csv.reader([text], delimiter=delimiter), [""])


def _column(
    cells: Sequence[str], decimal_comma: bool, is_time: bool
) -> tuple[Float64s, NDArray[np.object_] | None, Int16s | None]:
    """The samples of a column, quickly where all of it is plain numbers."""
    if not is_time:
        try:
            value = np.fromiter(map(float, cells), np.float64, len(cells))
        except ValueError:
            pass
        else:
            joined = "".join(cells)
            if (np.abs(value) < EXACT_MAX).all() and "_" not in joined and joined.isascii():
                return value, None, None
    scalars = [scalar_of(cell, decimal_comma=decimal_comma) for cell in cells]
    return column_of([utc_of(each) for each in scalars] if is_time else scalars)
