"""The decoder of one CAN bus: batches of frames in, batches of signals and counts out.

A frame finds its message by id or by PGN, its page by the values of the message's multiplexors, and with them its
`Layout` (see there). All frames of a batch that share a layout are decoded together.

Rules:
- Several databases: the first that knows an id wins; `warnings` names the others. An exact id wins over a PGN.
- Frames shorter than their message give the signals that lie wholly inside; longer ones are decoded as usual.
- A classic frame of a message of more than 8 bytes is a segment of a transport protocol (ISO-TP, J1939-TP, fast
  packet): decoding it alone would be wrong. It counts as undecoded.
- A multiplexor value that the database does not know leaves the whole frame undecoded, as cantools has it.
- Remote and error frames are counted, not decoded.

Invariant: every frame is counted in exactly one of decoded, unknown, undecoded, remote, error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from ingestd.decode.databases import MessageDefinition, SignalDatabase, SignalDefinition, pgn_of
from ingestd.decode.layout import Layout, Words, channel_of, raw_integers
from ingestd.model import GROUP_CHANNELS_MAX, Flag, FrameBatch, SignalBatch, SignalGroup

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
    page_of: dict[int, int]
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
            pages.setdefault(tuple(child.name for child in selected[value]), []).append(value)
        return _Multiplexor(
            signal,
            {value: number for number, values in enumerate(pages.values()) for value in values},
            tuple(f"{signal.name}={_ranges(values)}" for values in pages.values()),
            tuple(tuple(selected[values[0]]) for values in pages.values()),
        )


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
        self.multiplexors = {m.signal.name: m for m in compiled if m is not None}
        # Databases that load only without strict checks have signals behind their message's end.
        self.bytes_needed = max([definition.length, *((s.end + 7) // 8 for s in definition.signals)])

    def page(self, raw: dict[str, int], bits: int) -> tuple[str, tuple[SignalDefinition, ...]] | None:
        """The signals of a payload of `bits` whose multiplexors have the `raw` values, and a name for the page.

        Multiplexors that are not inside the payload select nothing. None: some selecting value is unknown.
        """
        labels, found, waiting = [], [], list(self.roots)
        while waiting:
            signal = waiting.pop()
            if signal.end > bits:
                continue
            found.append(signal)
            multiplexor = self.multiplexors.get(signal.name)
            if multiplexor is not None:
                number = multiplexor.page_of.get(raw[signal.name])
                if number is None:
                    return None
                labels.append(multiplexor.labels[number])
                waiting.extend(multiplexor.children[number])
        order = {signal.name: position for position, signal in enumerate(self.definition.signals)}
        return " ".join(sorted(labels)), tuple(sorted(found, key=lambda s: order[s.name]))


@dataclass(slots=True)
class _Directory:
    """Which message a frame belongs to: by exact id, else by PGN. Values are message numbers, -1 for none."""

    standard: NDArray[np.int32]
    extended: NDArray[np.uint32] = field(default_factory=lambda: np.empty(0, np.uint32))  # sorted ids …
    extended_message: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))  # … and their messages
    pgn: NDArray[np.uint32] = field(default_factory=lambda: np.empty(0, np.uint32))
    pgn_message: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))

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


class Decoder:
    """Decodes the frames of one source with one or more databases.

    Layouts are made when their first frame comes and then kept: their number is bounded by what the databases define
    (messages x senders x pages x payload lengths).
    """

    def __init__(self, source: str, databases: Sequence[SignalDatabase], *, keep_not_available: bool = False) -> None:
        self.source = source
        self.warnings: list[str] = []
        self._keep_not_available = keep_not_available
        self._messages = [_Message(m) for database in databases for m in database.messages]
        self._directory = self._index()
        self._layouts: list[Layout] = []
        self._numbers: dict[tuple[int, int | None, str, tuple[str, ...], bool], int] = {}
        self._simple = np.array([not m.multiplexors and m.pgn is None for m in self._messages] or [False])
        self._bytes_needed = np.array([m.bytes_needed for m in self._messages] or [0])
        self._length = np.array([m.definition.length for m in self._messages] or [0])
        self._full_layout = np.full(max(1, len(self._messages)), -1, np.int32)

    def __repr__(self) -> str:
        return f"<Decoder {self.source}: {len(self._messages)} messages, {len(self._layouts)} layouts>"

    @property
    def messages(self) -> list[MessageDefinition]:
        """All messages of all databases, in order."""
        return [message.definition for message in self._messages]

    def decode(self, frames: FrameBatch) -> Decoded:
        """Decode a batch. Signal batches come in no particular order of groups; inside a batch wire order is kept."""
        layout, counts = self._assign(frames)
        words: Words = frames.data.view("<u8")
        # A stable sort keeps wire order inside a layout; 16-bit keys make numpy use a radix sort.
        keys = layout.astype(np.int16) if len(self._layouts) < 2**15 else layout
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        starts = np.flatnonzero(np.diff(keys, prepend=keys[:1] - 1)) if len(keys) else np.empty(0, np.intp)
        batches: list[SignalBatch] = []
        for start, end in zip(starts, [*starts[1:], len(keys)], strict=True):
            if (number := int(keys[start])) >= 0:
                rows = order[start:end]
                batches += self._layouts[number].decode(words[rows], frames.ts_ns[rows])
        counts.signals = sum(batch.value.size for batch in batches)
        return Decoded(batches, counts)

    def unknown(self, frames: FrameBatch) -> NDArray[np.bool_]:
        """Which frames carry an id that no database knows."""
        data = (frames.flags & (Flag.REMOTE | Flag.ERROR)) == 0
        return np.asarray(data & (self._directory.find(frames) < 0), np.bool_)

    def _index(self) -> _Directory:
        standard = np.full(STANDARD_IDS + 1, -1, np.int32)
        extended: dict[int, int] = {}
        groups: dict[int, int] = {}
        for number, message in enumerate(self._messages):
            definition = message.definition
            identifier = definition.arbitration_id
            if definition.extended:
                holder = extended.setdefault(identifier, number)
            elif standard[identifier] >= 0:
                holder = int(standard[identifier])
            else:
                holder = standard[identifier] = number
            if holder != number:
                first = self._messages[holder].definition
                self.warnings.append(
                    f"id 0x{identifier:X} is {first.name} in {first.origin} and {definition.name} in "
                    f"{definition.origin}: the first is used"
                )
            if message.pgn is not None:
                groups.setdefault(message.pgn, number)
        return _Directory(
            standard,
            np.array(sorted(extended), np.uint32),
            np.array([extended[key] for key in sorted(extended)], np.int32),
            np.array(sorted(groups), np.uint32),
            np.array([groups[key] for key in sorted(groups)], np.int32),
        )

    def _assign(self, frames: FrameBatch) -> tuple[NDArray[np.int32], Counts]:
        """The layout number of every frame, or why it has none."""
        message = self._directory.find(frames)
        length = frames.length.astype(np.int64)
        layout = np.full(len(frames), UNKNOWN, np.int32)
        remote = (frames.flags & Flag.REMOTE) != 0
        error = (frames.flags & Flag.ERROR) != 0
        known = (message >= 0) & ~remote & ~error
        short = known & (length < self._length[message])
        segment = short & (self._length[message] > CLASSIC_BYTES_MAX) & (length <= CLASSIC_BYTES_MAX)
        segment &= (frames.flags & Flag.FD) == 0
        short &= ~segment

        simple = known & self._simple[message] & (length >= self._bytes_needed[message])
        for number in np.unique(message[simple]):
            if self._full_layout[number] < 0:
                self._full_layout[number] = self._layout_number(int(number), None, {}, None, short=False)
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
        rows = np.flatnonzero(chosen)
        if not len(rows):
            return
        numbers = message[rows].astype(np.int64)
        by_pgn = np.array([m.pgn is not None for m in self._messages])[numbers]
        sender = np.where(by_pgn, frames.arbitration_id[rows] & 0xFF, 0).astype(np.int64)
        length = np.minimum(frames.length[rows].astype(np.int64), self._bytes_needed[numbers])
        kinds, inverse = np.unique((numbers << 32) | (sender << 16) | length, return_inverse=True)
        words: Words = frames.data.view("<u8")
        for kind, kind_number in enumerate(kinds.tolist()):
            number, payload_bytes = kind_number >> 32, kind_number & 0xFFFF
            compiled = self._messages[number]
            address = (kind_number >> 16) & 0xFF if compiled.pgn is not None else None
            short = payload_bytes < compiled.definition.length
            members = rows[inverse == kind]
            inside = [m.signal for m in compiled.multiplexors.values() if m.signal.end <= 8 * payload_bytes]
            if not inside:
                layout[members] = self._layout_number(number, address, {}, 8 * payload_bytes, short=short)
                continue
            raw = np.stack([raw_integers(words[members], signal) for signal in inside])
            values, value_of = _unique_columns(raw)
            pages = [
                self._layout_number(
                    number,
                    address,
                    {s.name: v % 2**64 if s.length == 64 else v for s, v in zip(inside, each, strict=True)},
                    8 * payload_bytes,
                    short=short,
                )
                for each in values.T.tolist()
            ]
            layout[members] = np.array(pages, np.int32)[value_of]

    def _layout_number(
        self, number: int, address: int | None, raw: dict[str, int], bits: int | None, *, short: bool
    ) -> int:
        """The number of the layout for these frames, made if need be; UNDECODED if the page is unknown.

        bits: of the payload, None for a whole message. raw: the values of its multiplexors.
        """
        message = self._messages[number]
        page = message.page(raw, 8 * message.bytes_needed if bits is None else bits)
        if page is None:
            return UNDECODED
        label, signals = page
        key = (number, address, label, tuple(s.name for s in signals), short)
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


def _unique_columns(columns: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
    """The different columns of a matrix, and for every column which of them it is."""
    if len(columns) == 1:
        values, which = np.unique(columns[0], return_inverse=True)
        return values.reshape(1, -1), which
    values, which = np.unique(columns, axis=1, return_inverse=True)
    return values, which.reshape(-1)
