"""Records to transactions, and what the database's position means, without a database."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from ingestd.decode.can import Counts, Decoded
from ingestd.delivery import transactions
from ingestd.delivery.feeds import Cursor, Finding, is_known, judge
from ingestd.delivery.transactions import FeedState, Prepared, prepare, prepare_end, prepare_rejected
from ingestd.journal import Journal, Record, SessionInfo, Stretch
from ingestd.model import Channel, Clock, ClockState, Event, FrameBatch, Quality, SignalBatch, SignalGroup
from ingestd.store.writer import FeedBatch, Standing

BOOT = "11111111-2222-3333-4444-555555555555"
SESSION = UUID("01900000-0000-7000-8000-000000000001")
CLOCK = Clock(1_000_000, ClockState.SET)
STEPPED = Clock(9_000_000, ClockState.SET)


def frames(source: str, *stamps: int) -> FrameBatch:
    count = len(stamps)
    return FrameBatch(
        source,
        np.array(stamps, np.int64),
        np.arange(count, dtype=np.uint32),
        np.zeros(count, np.uint8),
        np.full(count, 8, np.uint16),
        np.zeros((count, 8), np.uint8),
    )


class Echo:
    """Decodes every frame into its stamp; a frame stamped `poison` makes it raise."""

    poison = 666

    def __init__(self, source: str) -> None:
        self.group = SignalGroup.make(source, "Echo", "", "test", (Channel("Echo.stamp"),))

    def decode(self, batch: FrameBatch) -> Decoded:
        if self.poison in batch.ts_ns:
            raise ValueError("poison")
        signals = SignalBatch(self.group, batch.ts_ns, batch.ts_ns[np.newaxis].astype(np.float64))
        return Decoded([signals], Counts(frames=len(batch), decoded=len(batch), signals=len(batch)))


class Echoes:
    """In place of `pipeline.Decoders`; remembers the batches that it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[int]]] = []

    def of(self, source: str) -> Any:
        echo, asked = Echo(source), self.asked

        class Asked:
            def decode(self, batch: FrameBatch, _: Any) -> Decoded:
                asked.append((source, batch.ts_ns.tolist()))
                return echo.decode(batch)

        return Asked()


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    session = SessionInfo(SESSION, {"name": "drive", "created_utc": "2026-11-25T00:00:00+00:00", "time_base": BOOT})
    return Journal.open(tmp_path, session=session, machine_id="m", boot_id=BOOT, max_bytes=64 << 20)


def records(journal: Journal) -> Sequence[Record]:
    [stretch] = journal.stretches()
    return journal.reader(stretch.id, 0).read(1 << 20).records


def prepared(journal: Journal, decoders: Any, state: FeedState | None = None, lost: Any = None) -> Prepared:
    return prepare(
        records(journal), lost or {}, state or FeedState(), decoders, position=0, completed=False, store_frames=True
    )


def test_records_are_merged_by_source_and_never_over_a_clock_step(journal: Journal) -> None:
    """Many small records of a source are decoded at once, except where the clock's offset changes between them."""
    for stamp in (10, 20, 30):
        journal.append_frames(frames("a", stamp), CLOCK)
        journal.append_frames(frames("b", stamp + 1), CLOCK)
    journal.append_frames(frames("a", 40, 41), STEPPED)
    echoes = Echoes()
    result = prepared(journal, echoes)
    assert echoes.asked == [("a", [10, 20, 30]), ("b", [11, 21, 31]), ("a", [40, 41])]
    assert result.batch.frames_count == 8
    assert result.signals_count == 8
    assert result.oldest_ns == 10
    assert (result.batch.position_old, result.batch.position_new) == (0, 8)  # the session's record, and seven of frames
    assert [session.name for session in result.batch.sessions] == ["drive"]
    assert {copy.table: copy.rows for copy in result.batch.copies[:2]} == {"signal_chunks": 2, "frame_chunks": 2}


def test_the_first_sample_after_a_gap_is_marked(journal: Journal) -> None:
    """Only the first sample of each channel after the gap, also when the gap is the last thing of its transaction."""
    journal.append_frames(frames("a", 10), CLOCK)
    journal.append_event(Event("a", "gap", 15, "overflow", {"frames": 3}), CLOCK, lost={"overflow": 3})
    journal.append_frames(frames("a", 20, 30), CLOCK)
    journal.append_event(Event("a", "link_down", 40), CLOCK)
    result = prepared(journal, Echoes())
    assert [event.event.kind for event in result.batch.events] == ["gap", "link_down"]
    assert result.batch.copies[0].rows == 2
    state = FeedState.load(result.batch.decoder_state)
    assert state.gaps["a"].since_ns is None
    assert not state.gaps["a"].seen
    marked = transactions._mark_after_gap(Echo("a").decode(frames("a", 50, 60)).batches, frames("a", 50, 60), state)
    assert marked[0].quality is not None
    assert marked[0].quality.tolist() == [[Quality.AFTER_GAP, 0]]
    again = transactions._mark_after_gap(Echo("a").decode(frames("a", 70)).batches, frames("a", 70), state)
    assert again[0].quality is None


def test_a_gap_is_forgotten_when_its_channels_had_time_to_come_back(journal: Journal) -> None:
    """A channel that is first heard of more than a minute after the gap is not marked for it."""
    journal.append_event(Event("a", "link_down", 5), CLOCK)
    journal.append_frames(frames("a", 10, 10 + transactions.GAP_MEMORY_NS), CLOCK)
    state = FeedState.load(prepared(journal, Echoes()).batch.decoder_state)
    assert state.gaps["a"].since_ns == 10
    later = frames("a", 11 + transactions.GAP_MEMORY_NS)
    transactions._mark_after_gap(Echo("a").decode(later).batches, later, state)
    assert not state.gaps
    other = SignalBatch(SignalGroup.make("a", "Late", "", "test", (Channel("Late.x"),)), later.ts_ns, np.ones((1, 1)))
    [unmarked] = transactions._mark_after_gap([other], later, state)
    assert unmarked.quality is None


def test_a_frame_that_a_decoder_cannot_bear_costs_only_its_own_signals(journal: Journal) -> None:
    """The others of its batch are decoded, its raw frame is stored, and it is counted as undecoded."""
    journal.append_frames(frames("a", *range(660, 670)), CLOCK)
    result = prepared(journal, Echoes())
    counts = FeedState.load(result.batch.decoder_state).counts["a"]
    assert (counts.frames, counts.decoded, counts.undecoded) == (10, 9, 1)
    assert result.signals_count == 9


def test_sources_under_two_clocks_do_not_cut_each_other(journal: Journal) -> None:
    """Records that alternate between two offsets are two runs, and not one a record; a source's order is kept."""
    for stamp in range(10, 50, 10):
        journal.append_frames(frames("a", stamp), CLOCK)
        journal.append_frames(frames("b", stamp + 1), STEPPED)
    journal.append_frames(frames("a", 50), STEPPED)
    journal.append_frames(frames("a", 60), CLOCK)
    echoes = Echoes()
    prepared(journal, echoes)
    assert echoes.asked == [("a", [10, 20, 30, 40]), ("b", [11, 21, 31, 41]), ("a", [50]), ("a", [60])]


def test_a_gap_that_is_told_late_does_not_mark_what_comes_after_it(journal: Journal) -> None:
    """After a restart `resumed` comes before the first frames; how long nothing was recorded is known only later."""
    journal.append_event(Event("a", "resumed", 100), CLOCK)
    journal.append_frames(frames("a", 100), CLOCK)
    journal.append_event(Event("a", "gap", 20, "down", {"from_ns": 20, "to_ns": 100}), CLOCK)
    journal.append_frames(frames("a", 110), CLOCK)
    echoes = Echoes()
    result = prepared(journal, echoes)
    assert [stamped.event.key for stamped in result.batch.events] == ["down"]
    assert echoes.asked == [("a", [100, 110])]
    assert FeedState.load(result.batch.decoder_state).gaps["a"].since_ns == 100


def test_a_decoder_that_always_fails_is_not_asked_for_ever(journal: Journal) -> None:
    """After some failures the rest of the batch is stored undecoded, with one line of log."""

    class Broken(Echoes):
        def of(self, source: str) -> Any:
            raise ValueError("broken")

    journal.append_frames(frames("a", *range(2000)), CLOCK)
    result = prepared(journal, Broken())
    counts = FeedState.load(result.batch.decoder_state).counts["a"]
    assert (counts.frames, counts.undecoded) == (2000, 2000)


def test_frames_that_the_journal_lost_become_an_event_and_a_gap(journal: Journal) -> None:
    """Damage is told where it is met: an event with the number of frames, and the next samples are marked."""
    journal.append_frames(frames("a", 10), CLOCK)
    result = prepared(journal, Echoes(), lost={"a": {"damage": 7}})
    [stamped] = result.batch.events
    assert (stamped.event.source, stamped.event.kind, stamped.event.key) == ("a", "gap", "damage")
    assert stamped.event.payload["frames"] == 7
    assert result.dropped == {"a": {"damage": 7}}


def gaps_of(prepared: Prepared) -> list[tuple[int, str, dict[str, Any]]]:
    return [(each.event.ts_ns, each.event.key, dict(each.event.payload)) for each in prepared.batch.events]


def test_what_the_journal_has_dropped_is_told_where_it_is_missing(journal: Journal) -> None:
    """Frames that are in the books already: an event between the last frame before and the first behind, and a mark."""
    journal.append_frames(frames("a", 10, 11), CLOCK)
    journal.append_frames(frames("a", 20, 21, 22), CLOCK)
    journal.append_frames(frames("a", 30), CLOCK)
    session, first, _, third = records(journal)
    for acknowledged, reason in (({}, "budget"), ({"a": 6}, "restored")):
        begun = prepare([session, first], {}, FeedState(), Echoes(), position=0, completed=False, store_frames=True)
        assert not begun.batch.events
        state = FeedState.load(begun.batch.decoder_state)
        result = prepare(
            [third], {}, state, Echoes(), position=2, completed=False, store_frames=True, acknowledged=acknowledged
        )
        assert gaps_of(result) == [(11, reason, {"reason": reason, "frames": 3, "from_ns": 11, "to_ns": 30})]
        assert result.dropped == {}
        assert FeedState.load(result.batch.decoder_state).gaps["a"].since_ns == 30
    both = prepare([third], {}, state, Echoes(), position=2, completed=False, store_frames=True, acknowledged={"a": 3})
    assert [(key, payload["frames"]) for _, key, payload in gaps_of(both)] == [("restored", 1), ("budget", 2)]
    mixed = prepare([third], {"a": {"damage": 1}}, state, Echoes(), position=2, completed=False, store_frames=True)
    assert [(key, payload["frames"]) for _, key, payload in gaps_of(mixed)] == [("budget", 2), ("damage", 1)]
    rejected = prepare_rejected(third, {"a": {"damage": 3}}, state, position=2)
    assert [(key, payload["frames"]) for _, key, payload in gaps_of(rejected)] == [("damage", 3)]
    assert rejected.dropped == {"a": {"damage": 3}}


def test_a_stretch_of_which_the_end_is_gone_is_completed(journal: Journal) -> None:
    """Its feed ends where the stretch does, and what is missing is told from the last frame that was stored."""
    journal.append_frames(frames("a", 10, 11), CLOCK)
    journal.append_frames(frames("a", 20, 21, 22), CLOCK)
    session, first, _ = records(journal)
    begun = prepare([session, first], {}, FeedState(), Echoes(), position=0, completed=False, store_frames=True)
    [stretch] = journal.stretches()
    tallies = journal.tallies(stretch.id)
    end = prepare_end(stretch, tallies, {"a": {"damage": 3}}, begun.state, position=2, is_resent=False)
    assert (end.batch.position_old, end.batch.position_new, end.batch.completed) == (2, 3, True)
    assert gaps_of(end) == [(11, "damage", {"reason": "damage", "frames": 3, "from_ns": 11, "to_ns": 22})]
    assert end.batch.events[0].utc_offset_ns == CLOCK.utc_offset_ns
    whole = prepare_end(stretch, tallies, {}, end.state, position=3, is_resent=False)
    assert (whole.batch.position_old, whole.batch.position_new, whole.batch.completed) == (3, 3, True)
    assert not whole.batch.events


def test_the_state_survives_as_json(journal: Journal) -> None:
    """What is committed with the position is all that the next transaction needs."""
    journal.append_frames(frames("a", 10, 20), CLOCK)
    first = prepared(journal, Echoes())
    second = prepared(journal, Echoes(), FeedState.load(first.batch.decoder_state))
    assert second.batch.frames_count == 4
    assert first.batch.frames_count == 2  # and the state that was given is left alone
    rejected = prepare_rejected(records(journal)[1], {}, first.state, position=0)
    assert FeedState.load(rejected.batch.decoder_state).rejected == [2]
    assert rejected.is_rejected
    assert not rejected.batch.copies


def cursor(position: int, *, reading: bool = False, attempt: int | None = None) -> Cursor:
    made = Cursor("s", "s", position, acknowledged=position)
    if reading:
        made.reader = object()  # type: ignore[assignment]
    if attempt is not None:
        made.attempt = Prepared(FeedBatch(position, attempt, (), (), {"attempt": "ours"}), FeedState(), [], {}, None, 0)
    return made


@pytest.mark.parametrize(
    ("at", "position", "machine", "known", "finding"),
    [
        (cursor(5), 5, "m", True, Finding.CONTINUE),
        (cursor(5), 8, "m", True, Finding.CATCH_UP),  # the last commit of a process that was killed
        (cursor(5, reading=True, attempt=8), 8, "m", True, Finding.CATCH_UP),  # our own, whose answer was lost
        (cursor(5, reading=True, attempt=8), 5, "m", True, Finding.CONTINUE),
        (cursor(5, reading=True, attempt=8), 7, "m", True, Finding.CLONED),
        (cursor(5, reading=True), 8, "m", True, Finding.CLONED),
        (cursor(5), 5, "other", True, Finding.CLONED),
        (cursor(5), 3, "m", False, Finding.RESTORED),
        (cursor(5), None, "m", False, Finding.NEW),
        (cursor(0), None, "m", True, Finding.NEW),
        (cursor(5), None, "m", True, Finding.DELETED),
    ],
)
def test_what_the_position_in_the_database_means(
    at: Cursor, position: int | None, machine: str, known: bool, finding: Finding
) -> None:
    """Every case of the table at the top of feeds.py."""
    standing = None if position is None else Standing("s", position, machine, {"attempt": "ours"})
    assert judge(at, standing, "m", known=known) is finding


def test_a_clone_at_the_same_position_is_told_by_its_mark() -> None:
    """Two machines with one id may commit batches that end at the same record; only one of them is ours."""
    at = cursor(5, reading=True, attempt=8)
    assert judge(at, Standing("s", 8, "m", {"attempt": "theirs"}), "m", known=True) is Finding.CLONED


def stretch(name: str, acknowledged: int) -> Stretch:
    return Stretch(name, SESSION, BOOT, "m", name, acknowledged, 9, False, 0)


def test_a_database_is_known_by_what_it_had_last() -> None:
    """It has the feed that was acknowledged last, as far as it was: then what else is missing there was deleted."""
    stretches = [stretch("old", 9), stretch("new", 4), stretch("current", 0)]
    assert is_known({"new": Standing("new", 4, "m", {})}, stretches)
    assert not is_known({"old": Standing("old", 9, "m", {})}, stretches)
    assert not is_known({"new": Standing("new", 3, "m", {})}, stretches)
    assert not is_known({}, [stretch("current", 0)])
