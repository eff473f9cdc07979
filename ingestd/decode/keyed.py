"""Lines of named values to signals: key and value (`rpm=3100 t=81.5`), and JSON, one object a line.

The channels of a source are one set of keys, in the order in which they first came. It only grows: a line that lacks a
key has none for it (quality NOT_AVAILABLE), a line with a new key is the first of a new signal group. So keys that come
and go do not multiply groups. Every `GROUP_CHANNELS_MAX` keys make one group; only the last one can grow, and a line
without any of a group's keys is no frame of it.

Which keys have come is the decoder's memory, committed with the feed's position: it is the same groups after a restart.

- Key and value: `=` or `:` between them, with or without blanks; blanks, `,`, `;`, `|` and `&` between pairs; a key
  begins with a letter; a value in double quotes is text, whatever is in it. Words that are no pair are passed over. Of
  a key that comes twice in a line the last counts; and so in JSON.
- JSON: what is nested becomes `a.b`, elements of a list `a.0`; true and false are 1 and 0.
- The field named as the time field becomes seconds since 1970, whatever it counts or spells: a clock reference, as with
  NMEA. No stamp is changed by it.

Limits: `KEYS_MAX` keys of a source; further ones are left to the raw frame, which is said once. What is nested deeper
than `DEPTH_MAX` is not decoded.

Invariants: every frame is counted in exactly one of decoded, unknown (no pair in it, no object), undecoded (no UTF-8,
cut off at either end, no JSON); none raises out of `decode`. The samples depend on the lines and the memory, not on
how the lines are put into batches.
"""

from __future__ import annotations

import json
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np

from ingestd.decode.can import Counts, Decoded
from ingestd.decode.scalars import Scalar, column_of, scalar_of, storable, utc_of
from ingestd.model import GROUP_CHANNELS_MAX, Channel, FrameBatch, Memory, SerialFlag, SignalBatch, SignalGroup

KEYS_MAX: Final = 512
DEPTH_MAX: Final = 16
REMEMBERED_FRAMES: Final = 1000
SPARSE: Final = frozenset({"keyvalue", "json"})  # groups whose channels need not be in each frame

Row = dict[str, Scalar]

log = logging.getLogger(__name__)

_PAIR: Final = re.compile(
    r"""(?<![^\s,;|&])([^\W\d][^\s=:,;|&"]*+)\s*+(?:[=:]\s*+"((?:[^"\\]|\\.)*+)"|=([^\s,;|&"]++)"""
    r"""|[=:]\s*+([^\s=,;|&"]++)(?<!:)|[=:])(?=[\s,;|&]|$)"""
)
_ESCAPED: Final = re.compile(r"\\(.)")


class NotDecodableError(ValueError):
    """The line belongs to the protocol and is damaged."""


def text_of(flags: int, payload: bytes) -> str:
    """The text of a line. Raises NotDecodableError if it is cut off or no text."""
    if flags & SerialFlag.TRUNCATED or b"\0" in payload:
        raise NotDecodableError("cut off, or no text")
    try:
        return payload.decode()
    except UnicodeDecodeError as error:
        raise NotDecodableError(str(error)) from error


class KeyedDecoder(ABC):
    """Decodes the lines of one source whose values have names in the line itself."""

    name: str  # of the protocol, and of the signal groups
    shows_its_beginning: bool  # whether a line can be told from the rest of one
    origin: str
    needs_memory = False  # Without it a line is decoded as well, into another group.

    def __init__(self, source: str, *, time_field: str | None = None) -> None:
        self.source = source
        self._time_field = time_field
        self._groups: dict[tuple[str, ...], SignalGroup] = {}
        self._said_too_many = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.source}: {len(self._groups)} groups>"

    @abstractmethod
    def row(self, text: str) -> Row | None:
        """The values of a line by name; None if it is not one of the protocol's. Raises ValueError, RecursionError."""

    def decode(self, frames: FrameBatch, memory: Memory) -> Decoded:
        """Decode a batch. `memory` has the keys that have come, and is brought up to date."""
        counts = Counts(frames=len(frames))
        keys: list[str] = list(memory.get(self.name, ()))
        known = set(keys)
        batches: list[SignalBatch] = []
        stamps: list[int] = []
        rows: list[Row] = []
        columns = zip(frames.ts_ns.tolist(), frames.flags.tolist(), frames.length.tolist(), frames.data, strict=True)
        for ts_ns, flags, length, data in columns:
            try:
                if flags & SerialFlag.FIRST and not self.shows_its_beginning:
                    raise NotDecodableError("its beginning may be missing")
                row = self.row(text_of(flags, data[:length].tobytes()))
            except (ValueError, RecursionError):
                counts.undecoded += 1
                continue
            if row is None:
                counts.unknown += 1
                continue
            counts.decoded += 1
            if self._time_field in row:
                row[self._time_field] = utc_of(row[self._time_field])
            if not known.issuperset(row):
                new = [key for key in row if key not in known]
                if len(keys) + len(new) > KEYS_MAX:
                    self._say_too_many(new[-1])
                if new := new[: KEYS_MAX - len(keys)]:
                    batches += self._batches(stamps, rows, keys)
                    stamps, rows = [], []
                    keys += new
                    known = set(keys)
            stamps.append(ts_ns)
            rows.append(row)
        batches += self._batches(stamps, rows, keys)
        if keys:
            memory[self.name] = keys
        counts.signals = sum(batch.value.size for batch in batches)
        return Decoded(batches, counts)

    def remember(self, frames: FrameBatch, memory: Memory) -> None:
        """Note the keys of the newest frames; a key that is missed costs a signal group and nothing else."""
        self.decode(frames[-REMEMBERED_FRAMES:], memory)

    def _say_too_many(self, key: str) -> None:
        if not self._said_too_many:
            self._said_too_many = True
            log.warning(
                "more than %d keys: this one and further ones are in the raw frames only source=%s key=%r hint=%r",
                KEYS_MAX, self.source, key[:80], "after a change of the device, give the line another name",
            )  # fmt: skip

    def _batches(self, stamps: list[int], rows: list[Row], keys: Sequence[str]) -> Iterator[SignalBatch]:
        """A batch for each group of keys, of the rows that have any of them."""
        for begin in range(0, len(keys), GROUP_CHANNELS_MAX):
            of_group = tuple(keys[begin : begin + GROUP_CHANNELS_MAX])
            wanted = set(of_group)
            here = [number for number, row in enumerate(rows) if not wanted.isdisjoint(row)]
            if here:
                of_rows = rows if len(here) == len(rows) else [rows[number] for number in here]
                yield self._batch(of_group, np.array(stamps, np.int64)[here], of_rows)

    def _batch(self, keys: tuple[str, ...], ts_ns: Any, rows: list[Row]) -> SignalBatch:
        shape = len(keys), len(rows)
        value, quality = np.empty(shape), np.zeros(shape, np.int16)
        texts: Any = None
        for number, key in enumerate(keys):
            value[number], text, of_key = column_of([row.get(key) for row in rows])
            if of_key is not None:
                quality[number] = of_key
            if text is not None:
                texts = np.full(shape, None, np.object_) if texts is None else texts
                texts[number] = text
        return SignalBatch(self._group(keys), ts_ns, value, texts, quality if quality.any() else None)

    def _group(self, keys: tuple[str, ...]) -> SignalGroup:
        if keys not in self._groups:
            channels = tuple(
                Channel(key, "s", layout="utc") if key == self._time_field else Channel(key, layout=self.name)
                for key in keys
            )
            self._groups[keys] = SignalGroup.make(self.source, self.name, "", self.origin, channels)
        return self._groups[keys]


class KeyValueDecoder(KeyedDecoder):
    """The decoder of the protocol `keyvalue`."""

    name = "keyvalue"
    shows_its_beginning = False
    origin = "key and value"

    def row(self, text: str) -> Row | None:
        """The pairs of a line."""
        return {
            found[1]: scalar_of(found[3] or found[4] or "") if found[2] is None else _ESCAPED.sub(r"\1", found[2])
            for found in _PAIR.finditer(text)
        } or None


class JsonDecoder(KeyedDecoder):
    """The decoder of the protocol `json`."""

    name = "json"
    shows_its_beginning = True
    origin = "JSON"

    def row(self, text: str) -> Row | None:
        """The fields of an object, flat."""
        if not text.lstrip().startswith("{"):
            return None
        found: dict[str, Any] = json.loads(text)
        if dict in (kinds := set(map(type, found.values()))) or list in kinds:
            row: Row = {}
            _flatten(found, "", row, 0)
        else:
            row = found
        if "\\" in text or "" in row:  # Only an escape can spell what cannot be stored.
            row = {storable(key) or "_": value for key, value in row.items()}
        return row


def _flatten(value: Any, name: str, row: Row, depth: int) -> None:
    if depth > DEPTH_MAX:
        raise NotDecodableError("nested too deeply")
    if isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            _flatten(one, f"{name}.{key}" if depth else str(key), row, depth + 1)
    else:
        row[name] = value
