"""Records of a stretch to one transaction: merged by source, decoded, encoded, with the feed's state behind them.

What has to be remembered from one transaction to the next is in `FeedState`, which is committed with the position; the
process itself remembers nothing that matters. No chunk spans two clock offsets, because records of different ones are
merged apart.

Limits: a source that decodes badly costs its own signals only: frames that make a decoder raise are stored as raw
frames and counted as undecoded.
"""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from ingestd.chunks import Placement, encode_frames, encode_signals
from ingestd.clock import CLOCK_SET_NS_MIN
from ingestd.decode.can import Counts, Decoded
from ingestd.journal import Kind, Record, Stretch, Tally, merge
from ingestd.model import (
    BATCH_FRAMES_MAX,
    Clock,
    CopyData,
    Event,
    FrameBatch,
    Memory,
    Quality,
    SignalBatch,
    SignalGroup,
)
from ingestd.pipeline import Decoders
from ingestd.protocols import check_memory
from ingestd.store.writer import FeedBatch, SessionEdit, StampedEvent, utc

GAP_EVENTS = frozenset({"gap", "link_down", "resumed"})  # After these the first sample of every channel is marked.
TOLD_LATE = frozenset({"down"})  # A gap that is told later than it is: `resumed` marks it.
GAP_MEMORY_NS = 60_000_000_000  # A channel that is silent for longer after a gap is not marked any more.
REJECTED_REMEMBERED_MAX = 1000
DECODER_FAILURES_MAX = 16  # in one batch; what is left of it is stored undecoded

Lost = Mapping[str, Mapping[str, int]]  # frames by source and reason

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Gap:
    """A source after a gap: its first stamp since, if there is one, and which groups have had their first sample."""

    since_ns: int | None = None
    seen: set[int] = field(default_factory=set)


@dataclass(slots=True)
class FeedState:
    """What goes into `feeds.decoder_state`: totals of the feed by source, and gaps that are still fresh.

    `through` and `last` are what the journal's records up to the position say of each source: how many frames there
    were, and of the last one its stamp and what makes it UTC. So the next record tells what is missing before it,
    whatever became of it. None: not known.

    `memory` is what the decoder of each source remembers; None: to be inherited from the stretch before.
    """

    counts: dict[str, Counts] = field(default_factory=dict)
    rejected: list[int] = field(default_factory=list)  # the newest records that were
    gaps: dict[str, Gap] = field(default_factory=dict)
    through: dict[str, int] | None = None
    last: dict[str, tuple[int, int]] = field(default_factory=dict)
    memory: dict[str, Memory] | None = None

    @staticmethod
    def load(state: Mapping[str, Any]) -> FeedState:
        """From the JSON committed with the position."""
        return FeedState(
            {source: Counts(**counts) for source, counts in state.get("counts", {}).items()},
            list(state.get("rejected", ())),
            {source: Gap(since_ns, set(seen)) for source, (since_ns, seen) in state.get("gaps", {}).items()},
            dict(state["through"]) if state.get("through") is not None else None,
            {source: (ts_ns, utc_offset_ns) for source, (ts_ns, utc_offset_ns) in state.get("last", {}).items()},
            deepcopy(state.get("memory")),
        )

    def as_json(self) -> dict[str, Any]:
        """The form that `load` takes."""
        return {
            "counts": {source: asdict(counts) for source, counts in self.counts.items()},
            "rejected": self.rejected[-REJECTED_REMEMBERED_MAX:],
            "gaps": {source: [gap.since_ns, sorted(gap.seen)] for source, gap in self.gaps.items()},
            "through": self.through,
            "last": self.last,
            "memory": self.memory,
        }

    def known_through(self, source: str) -> int:
        """How many frames of a source the journal's records have held up to the position."""
        return 0 if self.through is None else self.through.get(source, 0)

    def note(self, record: Record) -> int:
        """The position is behind `record` from now on; how many frames of its source were missing before it."""
        self.through = {} if self.through is None else self.through
        missing = record.frames_before - self.known_through(record.source)
        self.through[record.source] = max(
            self.through.get(record.source, 0), record.frames_before + record.frames_count
        )
        if record.frames_count:
            self.last[record.source] = record.last_ns, record.clock.utc_offset_ns
        return missing

    @property
    def frames_count(self) -> int:
        """Frames of the feed that are committed."""
        return sum(counts.frames for counts in self.counts.values())


@dataclass(frozen=True, slots=True)
class Prepared:
    """A transaction ready to be committed, and what it settles in the journal's books."""

    batch: FeedBatch
    state: FeedState  # after it
    records: Sequence[Record]
    dropped: Mapping[str, Mapping[str, int]]  # frames of a source that the journal no longer had, by reason
    oldest_ns: int | None  # the least stamp in it, to tell how long a frame was under way
    signals_count: int
    counts: Mapping[str, Counts] = field(default_factory=dict)  # what became of the frames of each source
    is_rejected: bool = False  # only the position moves


@dataclass(frozen=True, slots=True)
class _Hole:
    """Frames of a source that are missing before a record, and how many of them a database has had that was lost."""

    record: Record
    from_ns: int | None  # the stamp of the last frame before
    frames_count: int
    restored_count: int


@dataclass(slots=True)
class _Piece:
    """Records of frames of one source without a gap between them, and whether there was one before the first."""

    after_gap: bool = False
    records: list[Record] = field(default_factory=list)


@dataclass(slots=True)
class _Run:
    """Records under one clock, by source; a source's records in their order."""

    clock: Clock
    pieces: dict[str, list[_Piece]] = field(default_factory=dict)


def prepare(
    records: Sequence[Record],
    lost: Lost,
    state: FeedState,
    decoders: Decoders,
    *,
    position: int,
    completed: bool,
    store_frames: bool,
    acknowledged: Mapping[str, int] | None = None,
) -> Prepared:
    """The transaction that commits `records`, the next ones after `position` of the feed whose state is `state`.

    `lost` are frames that are missing before or among them and are to be counted with it. `acknowledged`, where records
    are sent again: how many frames of each source were in the database once, or counted. `state` is left as it is. Runs
    for as long as decoding takes: call it in a thread.
    """
    state = FeedState.load(state.as_json())
    state.memory = {} if state.memory is None else state.memory
    runs, events, sessions = _sort(records, _gaps(records, lost, state, acknowledged or {}))
    copies: list[CopyData] = []
    groups: dict[int, SignalGroup] = {}
    signals_count, oldest_ns = 0, None
    counts: dict[str, Counts] = {}
    for run in runs:
        placement = Placement(records[0].session_id, run.clock.utc_offset_ns, run.clock.state)
        frames: list[FrameBatch] = []
        signals: list[SignalBatch] = []
        for batch in _batches(run, state):  # One by one: it opens the gaps that decoding closes.
            frames.append(batch)
            decoded = _decode(decoders, batch, state.memory)
            signals += _mark_after_gap(decoded.batches, batch, state)
            for totals in (state.counts, counts):
                totals.setdefault(batch.source, Counts()).add(decoded.counts)
            signals_count += decoded.counts.signals
            least_ns = int(batch.ts_ns.min())
            oldest_ns = least_ns if oldest_ns is None else min(oldest_ns, least_ns)
        groups.update((batch.group.id, batch.group) for batch in signals)
        copies.append(encode_signals(signals, placement))
        if store_frames:
            copies.append(encode_frames(frames, placement))
    ended = [record.session()["ended_utc"] for record in sessions if record.session().get("ended_utc")]
    transaction = FeedBatch(
        position_old=position,
        position_new=records[-1].sequence,
        groups=list(groups.values()),
        copies=copies,
        decoder_state=_with_token(state),
        completed=completed or bool(ended),
        ended_utc=datetime.fromisoformat(ended[-1]) if ended else None,
        frames_count=state.frames_count,
        session_id=records[0].session_id,
        sessions=[session_edit(each.session_id, each.session()) for each in sessions if "time_base" in each.session()],
        events=events,
    )
    return Prepared(transaction, state, records, lost, oldest_ns, signals_count, counts)


def prepare_rejected(
    record: Record,
    lost: Lost,
    state: FeedState,
    *,
    position: int,
    acknowledged: Mapping[str, int] | None = None,
) -> Prepared:
    """The transaction that moves the position past a record that PostgreSQL can never take; nothing of it is stored."""
    state = FeedState.load(state.as_json())
    gaps = _gaps([record], lost, state, acknowledged or {})
    for source in {event.source for events in gaps.values() for event in events}:
        state.gaps[source] = Gap()
    state.rejected.append(record.sequence)
    batch = FeedBatch(
        position, record.sequence, (), (), _with_token(state), frames_count=state.frames_count,
        session_id=record.session_id, events=[_stamped(gap, record) for gap in gaps.get(record.sequence, ())],
    )  # fmt: skip
    return Prepared(batch, state, [record], lost, None, 0, is_rejected=True)


def prepare_end(
    stretch: Stretch,
    tallies: Mapping[str, Tally],
    lost: Lost,
    state: FeedState,
    *,
    position: int,
    is_resent: bool,
) -> Prepared:
    """The transaction that completes the feed of a stretch that has ended, of which nothing more can be read.

    `lost` is what is missing at its end and was counted when that was found.
    """
    state = FeedState.load(state.as_json())
    through = state.through or {}
    events: list[StampedEvent] = []
    for source, tally in tallies.items():
        missing = tally.journalled - through.get(source, 0)
        if missing > 0:
            at_ns, utc_offset_ns = state.last.get(source, (tally.last_ns, 0))
            told = lost.get(source, {})
            parts = _parts({"restored" if is_resent else "budget": missing - sum(told.values())}, told)
            events += [
                StampedEvent(_gap(source, reason, count, at_ns, tally.last_ns), utc_offset_ns)
                for reason, count in parts.items()
            ]
            _say_if_gone(source, parts)
    state.through = {source: tally.journalled for source, tally in tallies.items()}
    batch = FeedBatch(
        position, max(position, stretch.last_sequence), (), (), _with_token(state), completed=True,
        frames_count=state.frames_count, session_id=stretch.session_id, events=events,
    )  # fmt: skip
    return Prepared(batch, state, (), {}, None, 0)


def with_end(prepared: Prepared, stretch: Stretch, stretches: Sequence[Stretch]) -> Prepared:
    """The same, where it completes a stretch of a session that is not recorded any more and that nobody ended, as when
    the power goes: the session lasts at least until that last frame, if the clock was set."""
    batch = prepared.batch
    is_recorded = any(each.is_current and each.session_id == stretch.session_id for each in stretches)
    last_ns = max((ts_ns + utc_offset_ns for ts_ns, utc_offset_ns in prepared.state.last.values()), default=0)
    if not batch.completed or batch.ended_utc is not None or is_recorded or last_ns < CLOCK_SET_NS_MIN:
        return prepared
    return replace(prepared, batch=replace(batch, ended_utc=utc(last_ns)))


def _with_token(state: FeedState) -> dict[str, Any]:
    """The state with a mark that tells this attempt from one of a clone that ends at the same position."""
    return {**state.as_json(), "attempt": secrets.token_hex(8)}


def session_edit(session_id: Any, fields: Mapping[str, Any]) -> SessionEdit:
    """A SESSION record as a row of `sessions`. Instants are ISO 8601 in it.

    One that only ends the session has nothing but `ended_utc`: it must not undo what people edited meanwhile.
    """

    def moment(name: str) -> datetime | None:
        return datetime.fromisoformat(fields[name]) if fields.get(name) else None

    return SessionEdit(
        id=session_id,
        time_base=fields.get("time_base", ""),
        created_utc=moment("created_utc") or datetime.now(UTC),
        updated_utc=moment("updated_utc") or datetime.now(UTC),
        name=fields.get("name"),
        car_id=fields.get("car_id"),
        driver=fields.get("driver"),
        track=fields.get("track"),
        notes=fields.get("notes"),
        config=fields.get("config") or {},
        edited_utc={name: datetime.fromisoformat(at) for name, at in fields.get("edited_utc", {}).items()},
    )


def _sort(
    records: Sequence[Record], gaps: Mapping[int, Sequence[Event]]
) -> tuple[list[_Run], list[StampedEvent], list[Record]]:
    """Records by what they hold; frames by clock, then source, then gap. `gaps`: see `_gaps`."""
    runs: list[_Run] = []
    latest: dict[str, int] = {}  # the run in which a source is
    events: list[StampedEvent] = []
    sessions: list[Record] = []
    for record in records:
        if record.kind is Kind.SESSION:
            sessions.append(record)
            continue
        begin = latest.get(record.source, 0)
        number = next((n for n in range(begin, len(runs)) if runs[n].clock == record.clock), len(runs))
        if number == len(runs):
            runs.append(_Run(record.clock))
        latest[record.source] = number
        pieces = runs[number].pieces.setdefault(record.source, [])
        if record.sequence in gaps:
            events += [_stamped(gap, record) for gap in gaps[record.sequence]]
            pieces.append(_Piece(after_gap=True))
        if record.kind is Kind.FRAMES:
            if not pieces:
                pieces.append(_Piece())
            pieces[-1].records.append(record)
            continue
        event = record.event()
        if event.kind != "resumed":
            events.append(StampedEvent(event, record.clock.utc_offset_ns))
        if event.kind in GAP_EVENTS and event.key not in TOLD_LATE:
            pieces.append(_Piece(after_gap=True))
    return runs, events, sessions


def _stamped(event: Event, record: Record) -> StampedEvent:
    return StampedEvent(event, record.clock.utc_offset_ns)


def _gaps(
    records: Sequence[Record], lost: Lost, state: FeedState, acknowledged: Mapping[str, int]
) -> dict[int, list[Event]]:
    """What is missing before which record, by its number. `state` is brought behind the records."""
    holes: dict[str, list[_Hole]] = {}
    for record in records:
        if record.kind is Kind.SESSION:
            continue
        from_ns, _ = state.last.get(record.source, (None, 0))
        was_there = state.known_through(record.source)
        missing = state.note(record)
        if missing > 0 or (record.source in lost and record.source not in holes):
            restored = min(record.frames_before, acknowledged.get(record.source, 0)) - was_there
            hole = _Hole(record, from_ns, max(missing, 0), min(max(restored, 0), max(missing, 0)))
            holes.setdefault(record.source, []).append(hole)
    found: dict[int, list[Event]] = {}
    for source, of_source in holes.items():
        told = lost.get(source, {})
        unsaid = sum(hole.frames_count - hole.restored_count for hole in of_source) - sum(told.values())
        parts = _parts({"budget": unsaid}, told)
        for hole in of_source:
            here = _parts({"restored": hole.restored_count}, {})
            is_last = hole is of_source[-1]
            here |= _take(parts, sum(parts.values()) if is_last else hole.frames_count - hole.restored_count)
            found.setdefault(hole.record.sequence, []).extend(
                _gap(source, reason, count, hole.from_ns, hole.record.ts_ns) for reason, count in here.items()
            )
            _say_if_gone(source, here)
    return {sequence: gaps for sequence, gaps in found.items() if gaps}


def _parts(unsaid: Mapping[str, int], lost: Mapping[str, int]) -> dict[str, int]:
    """Missing frames by reason. What was counted before comes first: the oldest is removed first, or was sent once."""
    parts = Counter({reason: max(count, 0) for reason, count in unsaid.items()})
    parts.update(lost)
    return {reason: count for reason, count in parts.items() if count}


def _take(parts: dict[str, int], count: int) -> dict[str, int]:
    """So many of the parts, the first ones first; they are taken away."""
    taken: dict[str, int] = {}
    for reason in list(parts):
        if part := min(count, parts[reason]):
            taken[reason] = part
            parts[reason] -= part
            count -= part
    return taken


def _gap(source: str, reason: str, frames_count: int, from_ns: int | None, to_ns: int) -> Event:
    """Frames that were received and are nowhere any more."""
    payload: dict[str, Any] = {"reason": reason, "frames": frames_count}
    if from_ns is not None:
        payload |= {"from_ns": from_ns, "to_ns": max(from_ns, to_ns)}
    return Event(source, "gap", to_ns if from_ns is None else from_ns, reason, payload)


def _say_if_gone(source: str, parts: Mapping[str, int]) -> None:
    if count := parts.get("restored"):
        log.warning("neither the database nor the journal has them any more source=%s frames=%d", source, count)


def _batches(run: _Run, state: FeedState) -> Iterator[FrameBatch]:
    """The frames of a run, a source after the other, in batches short enough to be decoded in one go.

    Opens the source's gap in `state` when its frames come.
    """
    for source, pieces in run.pieces.items():
        for piece in pieces:
            if piece.after_gap:
                state.gaps[source] = Gap()
            if piece.records:
                frames = merge(piece.records)
                for begin in range(0, len(frames), BATCH_FRAMES_MAX):
                    yield frames[begin : begin + BATCH_FRAMES_MAX]


def _decode(
    decoders: Decoders, frames: FrameBatch, memory: dict[str, Memory], failures: list[str] | None = None
) -> Decoded:
    """Decode, and where that raises, halve: one frame that a decoder cannot bear costs only its own signals.

    What a decoder has noted before it raised is forgotten with it.
    """
    top, failures = failures is None, failures if failures is not None else []
    decoded = Decoded([], Counts(frames=len(frames), undecoded=len(frames)))
    if len(failures) < DECODER_FAILURES_MAX:
        try:
            noted = deepcopy(memory.get(frames.source, {}))
            done = decoders.of(frames.source).decode(frames, noted)
            check_memory(noted)
            if noted:
                memory[frames.source] = noted
            return done
        except Exception as error:
            if len(frames) == 1:
                failures.append(f"{type(error).__name__}: {error}")
            else:
                half = len(frames) // 2
                halves = [_decode(decoders, part, memory, failures) for part in (frames[:half], frames[half:])]
                decoded = Decoded([batch for each in halves for batch in each.batches], Counts())
                for each in halves:
                    decoded.counts.add(each.counts)
    if top and failures:
        log.error(
            "frames make the decoder fail: stored undecoded source=%s frames=%d error=%r",
            frames.source, decoded.counts.undecoded, failures[0],
        )  # fmt: skip
    return decoded


def _mark_after_gap(batches: list[SignalBatch], frames: FrameBatch, state: FeedState) -> list[SignalBatch]:
    """The batches, with the first sample of each group marked that had none since the source's gap."""
    gap = state.gaps.get(frames.source)
    if gap is None:
        return batches
    marked = []
    for batch in batches:
        if batch.group.id not in gap.seen:
            gap.seen.add(batch.group.id)
            quality = np.zeros(batch.value.shape, np.int16) if batch.quality is None else batch.quality.copy()
            quality[:, 0] |= np.int16(Quality.AFTER_GAP)
            batch = replace(batch, quality=quality)
        marked.append(batch)
    gap.since_ns = int(frames.ts_ns.min()) if gap.since_ns is None else gap.since_ns
    if int(frames.ts_ns.max()) - gap.since_ns > GAP_MEMORY_NS:
        del state.gaps[frames.source]
    return marked
