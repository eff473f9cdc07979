"""The decoder of one CAN bus: batches of frames in, batches of signals and counts out.

A frame finds its message by id or by PGN, its page by the values of the message's multiplexors, and with them its
`Layout` (see there). All frames of a batch that share a layout are decoded together.

Rules:
- Several databases: the first that knows an id wins; `MessageTable.warnings` names the others. An exact id goes before
  a PGN.
- Frames shorter than their message give the signals that lie wholly inside; longer ones are decoded as usual.
- A classic frame of a message of more than 8 bytes is a segment of a transport protocol (ISO-TP, J1939-TP, fast
  packet): decoding it alone would be wrong. It counts as undecoded.
- A multiplexor value that the database does not know leaves the whole frame undecoded, as cantools has it.
- Remote and error frames are counted, not decoded.

Invariant: every frame is counted in exactly one of decoded, unknown, undecoded, remote, error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingestd.decode.databases import MessageDefinition, SignalDatabase, SignalDefinition, pgn_of
from ingestd.decode.layout import Layout, Words, channel_of, raw_integers
from ingestd.model import GROUP_CHANNELS_MAX, Flag, FrameBatch, Int64s, Memory, SerialFlag, SignalBatch, SignalGroup

# Raised when the same frame and database decode otherwise than before: an import begun with another one is not resumed.
DECODER_VERSION = 1

CLASSIC_BYTES_MAX = 8
STANDARD_IDS = 2048

UNKNOWN, UNDECODED, REMOTE, ERROR = -1, -2, -3, -4  # in place of a layout's number


@dataclass(slots=True)
class Counts:
    """What became of frames. `short` and those before it overlap: short frames are decoded ones (or undecoded)."""

    frames: int = 0
    decoded: int = 0
    unknown: int = 0
    undecoded: int = 0
    remote: int = 0
    error: int = 0
    short: int = 0
    signals: int = 0

    def add(self, other: Counts) -> None:
        """Add another batch's counts to these."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


@dataclass(frozen=True, slots=True)
class Decoded:
    """The signals of one frame batch, a batch per group that occurs in it, and what became of the frames."""

    batches: list[SignalBatch]
    counts: Counts


@dataclass(frozen=True, slots=True)
class _Multiplexor:
    """A signal that selects others: which page each of its raw values stands for.

    Values that select the same signals are one page, so that a mirror or counter does not multiply signal groups.
    """

    signal: SignalDefinition
    values: Int64s  # sorted raw values, as `raw_integers` gives them …
    page_of_value: Int64s  # … and the page of each
    labels: tuple[str, ...]
    children: tuple[tuple[SignalDefinition, ...], ...]

    @staticmethod
    def compile(signal: SignalDefinition, signals: Iterable[SignalDefinition]) -> _Multiplexor | None:
        """None if the signal, though called a multiplexor, selects nothing and names no page."""
        selected: dict[int, list[SignalDefinition]] = {value: [] for value in signal.labels or ()}
        for child in signals:
            if child.multiplexor == signal.name:
                for value in child.multiplexor_values or ():
                    selected.setdefault(value, []).append(child)
        if not selected:
            return None
        pages: dict[tuple[str, ...], list[int]] = {}
        for value in sorted(selected):
            pages.setdefault(_identity(selected[value]), []).append(value)
        # Unsigned 64-bit values wrap around in int64, here as there.
        page_of = {
            value - 2**64 if value >= 2**63 else value: number
            for number, values in enumerate(pages.values())
            for value in values
        }
        known = sorted(page_of)
        return _Multiplexor(
            signal,
            np.array(known, np.int64),
            np.array([page_of[value] for value in known], np.int64),
            tuple(f"{signal.name}={_ranges(values)}" for values in pages.values()),
            tuple(tuple(selected[values[0]]) for values in pages.values()),
        )

    def pages(self, words: Words) -> Int64s:
        """The page of every frame, -1 where the value is not known."""
        raw = raw_integers(words, self.signal)
        place = np.minimum(np.searchsorted(self.values, raw), len(self.values) - 1)
        return np.where(self.values[place] == raw, self.page_of_value[place], -1)


def _identity(signals: Iterable[SignalDefinition]) -> tuple[str, ...]:
    """What tells sets of signals apart. Not names alone: pages may use one name for different bits."""
    return tuple(f"{signal.name} {signal.layout}" for signal in signals)


def _ranges(values: list[int]) -> str:
    """Sorted integers in short: [0, 1, 2, 7] is "0-2,7"."""
    ends = [i for i in range(len(values)) if i + 1 == len(values) or values[i + 1] != values[i] + 1]
    starts = [0] + [end + 1 for end in ends[:-1]]
    return ",".join(f"{values[a]}" if a == b else f"{values[a]}-{values[b]}" for a, b in zip(starts, ends, strict=True))


class _Message:
    """A message definition with its multiplexors compiled."""

    def __init__(self, definition: MessageDefinition) -> None:
        self.definition = definition
        self.pgn = pgn_of(definition.arbitration_id) if definition.by_pgn else None
        self.roots = tuple(s for s in definition.signals if s.multiplexor is None)
        compiled = [_Multiplexor.compile(s, definition.signals) for s in definition.signals if s.is_multiplexor]
        # By identity, here and below: one name may be a multiplexor on several pages, at different places.
        self.multiplexors = {id(m.signal): m for m in compiled if m is not None}
        # Databases that load only without strict checks have signals behind their message's end.
        self.bytes_needed = max([definition.length, *((s.end + 7) // 8 for s in definition.signals)])
        self._order = {id(signal): position for position, signal in enumerate(definition.signals)}

    def page(self, pages: Mapping[int, int], bits: int) -> tuple[str, tuple[SignalDefinition, ...]] | None:
        """The signals of a payload of `bits` whose multiplexors select `pages`, and a name for what they are together.

        Multiplexors that are not inside the payload select nothing. None: a value that selects is unknown.
        """
        labels, waiting = [], list(self.roots)
        found: dict[str, SignalDefinition] = {}  # A page's signal goes before one of the same name above it.
        while waiting:
            signal = waiting.pop()
            if signal.end > bits:
                continue
            found[signal.name] = signal
            multiplexor = self.multiplexors.get(id(signal))
            if multiplexor is not None:
                number = pages[id(signal)]
                if number < 0:
                    return None
                labels.append(multiplexor.labels[number])
                waiting.extend(multiplexor.children[number])
        return " ".join(sorted(labels)), tuple(sorted(found.values(), key=lambda s: self._order[id(s)]))


@dataclass(frozen=True, slots=True)
class _Directory:
    """Which message a frame belongs to: by exact id, else by PGN. Values are message numbers, -1 for none."""

    standard: NDArray[np.int32]
    extended: NDArray[np.uint32]  # sorted ids …
    extended_message: NDArray[np.int32]  # … and their messages
    pgn: NDArray[np.uint32]
    pgn_message: NDArray[np.int32]

    def find(self, frames: FrameBatch) -> NDArray[np.int32]:
        """The message number of every frame."""
        extended = (frames.flags & Flag.EXTENDED) != 0
        # The last entry, always -1, is for ids that a damaged capture may hold.
        message = self.standard[np.minimum(frames.arbitration_id, STANDARD_IDS)]
        if extended.any():
            rows = np.flatnonzero(extended)
            ids = frames.arbitration_id[rows]
            found = _look_up(ids, self.extended, self.extended_message)
            if len(self.pgn):
                pgn = (ids >> np.uint32(8)) & np.uint32(0x3FFFF)
                pgn = np.where((pgn >> np.uint32(8)) & np.uint32(0xFF) >= 240, pgn, pgn & np.uint32(0x3FF00))
                found = np.where(found < 0, _look_up(pgn, self.pgn, self.pgn_message), found)
            message[rows] = found
        return message


def _look_up(keys: NDArray[np.uint32], known: NDArray[np.uint32], value: NDArray[np.int32]) -> NDArray[np.int32]:
    """The value of each key, -1 where it is not known. `known` is sorted."""
    if not len(known):
        return np.full(len(keys), -1, np.int32)
    # A bus repeats few ids; looking each up once is several times faster than searching for every frame.
    unique, inverse = np.unique(keys, return_inverse=True)
    place = np.minimum(np.searchsorted(known, unique), len(known) - 1)
    return np.where(known[place] == unique, value[place], np.int32(-1))[inverse]


class MessageTable:
    """All messages of one or more databases and how to find them; the decoders of many sources may share one."""

    def __init__(self, databases: Sequence[SignalDatabase]) -> None:
        self.warnings: list[str] = []
        self.messages = [_Message(m) for database in databases for m in database.messages]
        self.directory = self._index()
        # Columns over the messages; one row where there are none, so that indexing with -1 is allowed.
        self.simple = np.array([not m.multiplexors and m.pgn is None for m in self.messages] or [False])
        self.by_pgn = np.array([m.pgn is not None for m in self.messages] or [False])
        self.bytes_needed = np.array([m.bytes_needed for m in self.messages] or [0])
        self.length = np.array([m.definition.length for m in self.messages] or [0])

    def _index(self) -> _Directory:
        standard: dict[int, int] = {}
        extended: dict[int, int] = {}
        groups: dict[int, int] = {}
        for number, message in enumerate(self.messages):
            definition = message.definition
            ids = extended if definition.extended else standard
            holder = ids.setdefault(definition.arbitration_id, number)
            if holder != number:
                self._warn(f"id 0x{definition.arbitration_id:X}", holder, number, "")
            elif message.pgn is not None:
                holder = groups.setdefault(message.pgn, number)
                if holder != number:
                    self._warn(f"PGN {message.pgn}", holder, number, ", the other only for its exact id")
        table = np.full(STANDARD_IDS + 1, -1, np.int32)
        for identifier, number in standard.items():
            table[identifier] = number
        return _Directory(table, *_columns(extended), *_columns(groups))

    def _warn(self, what: str, first: int, other: int, exception: str) -> None:
        one, two = self.messages[first].definition, self.messages[other].definition
        self.warnings.append(
            f"{what} is {one.name} in {one.origin} and {two.name} in {two.origin}: the first is used{exception}"
        )


def _columns(numbers: dict[int, int]) -> tuple[NDArray[np.uint32], NDArray[np.int32]]:
    """The keys, sorted, and the value of each."""
    keys = sorted(numbers)
    return np.array(keys, np.uint32), np.array([numbers[key] for key in keys], np.int32)


class Decoder:
    """Decodes the frames of one source.

    Layouts are made when their first frame comes and then kept: their number is bounded by what the databases define
    (messages x senders x pages x payload lengths).
    """

    def __init__(self, source: str, table: MessageTable, *, keep_not_available: bool = False) -> None:
        self.source = source
        self._table = table
        self._keep_not_available = keep_not_available
        self._layouts: list[Layout] = []
        # Frames that are alike in this share a layout: message, sender, bytes of payload (None: all), pages.
        self._resolved: dict[tuple[int, int | None, int | None, tuple[int, ...]], int] = {}
        self._numbers: dict[tuple[int, int | None, str, tuple[str, ...], bool], int] = {}
        self._full_layout = np.full(len(table.simple), -1, np.int32)

    def __repr__(self) -> str:
        return f"<Decoder {self.source}: {len(self._table.messages)} messages, {len(self._layouts)} layouts>"

    def decode(self, frames: FrameBatch, _: Memory | None = None) -> Decoded:
        """Decode a batch. Signal batches come in no particular order of groups; inside a batch wire order is kept."""
        layout, counts = self._assign(frames)
        words: Words = frames.data.view("<u8")
        # 16-bit keys make numpy use a radix sort.
        keys = layout.astype(np.int16) if len(self._layouts) < 2**15 else layout
        batches: list[SignalBatch] = []
        for number, rows in _groups(keys):
            if number >= 0:
                batches += self._layouts[number].decode(words[rows], frames.ts_ns[rows])
        counts.signals = sum(batch.value.size for batch in batches)
        return Decoded(batches, counts)

    def unknown(self, frames: FrameBatch) -> NDArray[np.bool_]:
        """Which frames carry an id that no database knows."""
        data = (frames.flags & (Flag.REMOTE | Flag.ERROR)) == 0
        return np.asarray(data & (self._table.directory.find(frames) < 0), np.bool_)

    def _assign(self, frames: FrameBatch) -> tuple[NDArray[np.int32], Counts]:
        """The layout number of every frame, or why it has none."""
        table = self._table
        message = table.directory.find(frames)
        length = frames.length.astype(np.int64)
        layout = np.full(len(frames), UNKNOWN, np.int32)
        can = (frames.flags & SerialFlag.SERIAL) == 0  # Others were recorded when a serial line had this name.
        remote = can & ((frames.flags & Flag.REMOTE) != 0)
        error = can & ((frames.flags & Flag.ERROR) != 0)
        known = can & (message >= 0) & ~remote & ~error
        short = known & (length < table.length[message])
        segment = short & (table.length[message] > CLASSIC_BYTES_MAX) & (length <= CLASSIC_BYTES_MAX)
        segment &= (frames.flags & Flag.FD) == 0
        short &= ~segment

        simple = known & table.simple[message] & (length >= table.bytes_needed[message])
        for number in np.unique(message[simple]):
            if self._full_layout[number] < 0:
                self._full_layout[number] = self._layout_number(int(number))
        layout[simple] = self._full_layout[message[simple]]
        self._assign_others(frames, message, known & ~simple & ~segment, layout)

        layout[segment] = UNDECODED
        layout[remote] = REMOTE
        layout[error] = ERROR
        tally = np.bincount(np.maximum(-layout, 0), minlength=5)
        counts = Counts(
            frames=len(frames),
            decoded=int(tally[0]),
            unknown=int(tally[-UNKNOWN]),
            undecoded=int(tally[-UNDECODED]),
            remote=int(tally[-REMOTE]),
            error=int(tally[-ERROR]),
            short=int(short.sum()),
        )
        return layout, counts

    def _assign_others(
        self, frames: FrameBatch, message: NDArray[np.int32], chosen: NDArray[np.bool_], layout: NDArray[np.int32]
    ) -> None:
        """Fill in `layout` for the chosen frames: multiplexed, matched by PGN, or short ones."""
        table = self._table
        rows = np.flatnonzero(chosen)
        numbers = message[rows].astype(np.int64)
        sender = np.where(table.by_pgn[numbers], frames.arbitration_id[rows] & 0xFF, 0).astype(np.int64)
        length = np.minimum(frames.length[rows].astype(np.int64), table.bytes_needed[numbers])
        words: Words = frames.data.view("<u8")
        for kind, places in _groups((numbers << 32) | (sender << 16) | length):
            number, payload_bytes = kind >> 32, kind & 0xFFFF
            compiled = table.messages[number]
            address = (kind >> 16) & 0xFF if compiled.pgn is not None else None
            members = rows[places]
            inside = [m for m in compiled.multiplexors.values() if m.signal.end <= 8 * payload_bytes]
            # Page numbers and not raw values: what an unselected multiplexor holds is other signals' bits. They are
            # numbered anew after each multiplexor, so that many of them together cannot overflow.
            codes = np.zeros(len(members), np.int64)
            pages_of_code: list[tuple[int, ...]] = [()]
            for multiplexor in inside:
                base = len(multiplexor.labels) + 1
                unique, codes = np.unique(codes * base + multiplexor.pages(words[members]) + 1, return_inverse=True)
                pages_of_code = [(*pages_of_code[code // base], code % base - 1) for code in unique.tolist()]
            for code, chosen_pages in _groups(codes):
                selected = pages_of_code[code]
                layout[members[chosen_pages]] = self._layout_number(number, address, payload_bytes, inside, selected)

    def _layout_number(
        self,
        number: int,
        address: int | None = None,
        payload_bytes: int | None = None,
        inside: Sequence[_Multiplexor] = (),
        pages: tuple[int, ...] = (),
    ) -> int:
        """The number of the layout for such frames, made if need be; UNDECODED if a page is unknown.

        payload_bytes: None for a whole message. pages: of each multiplexor that is inside.
        """
        key = (number, address, payload_bytes, pages)
        if key not in self._resolved:
            self._resolved[key] = self._resolve(number, address, payload_bytes, inside, pages)
        return self._resolved[key]

    def _resolve(
        self,
        number: int,
        address: int | None,
        payload_bytes: int | None,
        inside: Sequence[_Multiplexor],
        pages: tuple[int, ...],
    ) -> int:
        message = self._table.messages[number]
        length = message.bytes_needed if payload_bytes is None else payload_bytes
        page = message.page({id(m.signal): page for m, page in zip(inside, pages, strict=True)}, 8 * length)
        if page is None:
            return UNDECODED
        label, signals = page
        short = length < message.definition.length
        key = (number, address, label, _identity(signals), short)
        if key not in self._numbers:
            self._numbers[key] = len(self._layouts)
            self._layouts.append(self._make_layout(message, address, label, signals, short))
        return self._numbers[key]

    def _make_layout(
        self,
        message: _Message,
        address: int | None,
        page: str,
        signals: tuple[SignalDefinition, ...],
        short: bool,
    ) -> Layout:
        definition = message.definition
        source = self.source if address is None else f"{self.source}/0x{address:02X}"
        channels = [channel_of(definition.name, signal) for signal in signals]
        groups = tuple(
            SignalGroup.make(
                source, definition.name, page, definition.origin, tuple(channels[at : at + GROUP_CHANNELS_MAX])
            )
            for at in range(0, len(channels), GROUP_CHANNELS_MAX)
        )
        return Layout(groups, signals, short=short, pgn=message.pgn, keep_not_available=self._keep_not_available)


def _groups(keys: NDArray[Any]) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Each key that occurs, and the places of it, in order."""
    if not len(keys):
        return
    order = np.argsort(keys, kind="stable")
    in_order = keys[order]
    starts = np.flatnonzero(np.diff(in_order, prepend=in_order[:1] - 1))
    for start, end in zip(starts, [*starts[1:], len(keys)], strict=True):
        yield int(in_order[start]), order[start:end]
