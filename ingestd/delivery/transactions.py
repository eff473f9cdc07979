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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from ingestd.chunks import Placement, encode_frames, encode_signals
from ingestd.decode.can import Counts, Decoded
from ingestd.journal import Kind, Record, merge
from ingestd.model import BATCH_FRAMES_MAX, Clock, CopyData, Event, FrameBatch, Quality, SignalBatch, SignalGroup
from ingestd.pipeline import Decoders
from ingestd.store.writer import FeedBatch, SessionEdit, StampedEvent

GAP_EVENTS = frozenset({"gap", "link_down", "resumed"})  # After these the first sample of every channel is marked.
TOLD_LATE = frozenset(
    {"down", "budget"}
)  # Gaps that are told later than they are: `resumed`, or the reader, marks them.
GAP_MEMORY_NS = 60_000_000_000  # A channel that is silent for longer after a gap is not marked any more.
REJECTED_REMEMBERED_MAX = 1000
DECODER_FAILURES_MAX = 16  # in one batch; what is left of it is stored undecoded

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Gap:
    """A source after a gap: its first stamp since, if there is one, and which groups have had their first sample."""

    since_ns: int | None = None
    seen: set[int] = field(default_factory=set)


@dataclass(slots=True)
class FeedState:
    """What goes into `feeds.decoder_state`: totals of the feed by source, and gaps that are still fresh."""

    counts: dict[str, Counts] = field(default_factory=dict)
    rejected: list[int] = field(default_factory=list)  # the newest records that were
    gaps: dict[str, Gap] = field(default_factory=dict)

    @staticmethod
    def load(state: Mapping[str, Any]) -> FeedState:
        """From the JSON committed with the position."""
        return FeedState(
            {source: Counts(**counts) for source, counts in state.get("counts", {}).items()},
            list(state.get("rejected", ())),
            {source: Gap(since_ns, set(seen)) for source, (since_ns, seen) in state.get("gaps", {}).items()},
        )

    def as_json(self) -> dict[str, Any]:
        """The form that `load` takes."""
        return {
            "counts": {source: asdict(counts) for source, counts in self.counts.items()},
            "rejected": self.rejected[-REJECTED_REMEMBERED_MAX:],
            "gaps": {source: [gap.since_ns, sorted(gap.seen)] for source, gap in self.gaps.items()},
        }

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
    is_rejected: bool = False  # only the position moves


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
    lost: Mapping[str, Mapping[str, int]],
    state: FeedState,
    decoders: Decoders,
    *,
    position: int,
    completed: bool,
    store_frames: bool,
) -> Prepared:
    """The transaction that commits `records`, the next ones after `position` of the feed whose state is `state`.

    `lost` are frames that are missing before or among them. `state` is left as it is. Runs for as long as decoding
    takes: call it in a thread.
    """
    state = FeedState.load(state.as_json())
    runs, events, sessions = _sort(records, lost)
    copies: list[CopyData] = []
    groups: dict[int, SignalGroup] = {}
    signals_count, oldest_ns = 0, None
    for run in runs:
        placement = Placement(records[0].session_id, run.clock.utc_offset_ns, run.clock.state)
        frames: list[FrameBatch] = []
        signals: list[SignalBatch] = []
        for batch in _batches(run, state):  # One by one: it opens the gaps that decoding closes.
            frames.append(batch)
            decoded = _decode(decoders, batch)
            signals += _mark_after_gap(decoded.batches, batch, state)
            state.counts.setdefault(batch.source, Counts()).add(decoded.counts)
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
    return Prepared(transaction, state, records, lost, oldest_ns, signals_count)


def prepare_rejected(record: Record, state: FeedState, *, position: int, completed: bool) -> Prepared:
    """The transaction that moves the position past a record that PostgreSQL can never take, and stores nothing."""
    state = FeedState.load(state.as_json())
    state.rejected.append(record.sequence)
    batch = FeedBatch(position, record.sequence, (), (), _with_token(state), completed, frames_count=state.frames_count)
    return Prepared(batch, state, [record], {}, None, 0, is_rejected=True)


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
    )


def _sort(
    records: Sequence[Record], lost: Mapping[str, Mapping[str, int]]
) -> tuple[list[_Run], list[StampedEvent], list[Record]]:
    """Records by what they hold; frames by clock, then source, then gap."""
    runs: list[_Run] = []
    latest: dict[str, int] = {}  # the run in which a source is
    events: list[StampedEvent] = []
    sessions: list[Record] = []
    revealing = _revealing(records, lost)
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
        if revealing.get(record.source) == record.sequence:
            for reason, frames_count in lost[record.source].items():
                gap = Event(record.source, "gap", record.ts_ns, reason, {"reason": reason, "frames": frames_count})
                events.append(StampedEvent(gap, record.clock.utc_offset_ns))
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


def _revealing(records: Sequence[Record], lost: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Of each source that lost frames, the record whose count of the frames before it says so."""
    found: dict[str, int] = {}
    expected: dict[str, int] = {}
    for record in records:
        if record.source not in lost or record.kind is Kind.SESSION:
            continue
        if record.source not in found or record.frames_before > expected.get(record.source, record.frames_before):
            found[record.source] = record.sequence
        expected[record.source] = record.frames_before + record.frames_count
    return found


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


def _decode(decoders: Decoders, frames: FrameBatch, failures: list[str] | None = None) -> Decoded:
    """Decode, and where that raises, halve: one frame that a decoder cannot bear costs only its own signals."""
    top, failures = failures is None, failures if failures is not None else []
    decoded = Decoded([], Counts(frames=len(frames), undecoded=len(frames)))
    if len(failures) < DECODER_FAILURES_MAX:
        try:
            return decoders.of(frames.source).decode(frames)
        except Exception as error:
            if len(frames) == 1:
                failures.append(f"{type(error).__name__}: {error}")
            else:
                half = len(frames) // 2
                halves = [_decode(decoders, frames[:half], failures), _decode(decoders, frames[half:], failures)]
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
