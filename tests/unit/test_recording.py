"""What the daemon adds to what its sources say."""

from __future__ import annotations

from pathlib import Path

from ingestd.clock import WallClock
from ingestd.daemon.recording import EVENTS_KEPT, OVERFLOW_NS, OVERFLOWS_MAX, Recording
from ingestd.journal import Kind
from ingestd.model import Event
from tests.journals import CLOCK, frames, open_journal, read_all


def test_losses_without_end_are_told_now_and_then_and_counted_all(tmp_path: Path) -> None:
    """Some at once, then one for all that came in five seconds, the rest at the end; no frame is counted twice."""
    journal = open_journal(tmp_path)
    now_ns = 10**12
    recording = Recording(journal, WallClock(), now=lambda: now_ns)

    def told() -> list[tuple[int, int, int]]:
        records, _ = read_all(journal, journal.stretches()[-1].id)
        gaps = [record.event().payload for record in records if record.kind is Kind.EVENT]
        return [(gap["frames"], gap["from_ns"], gap["to_ns"]) for gap in gaps]

    for number in range(OVERFLOWS_MAX + 10):
        recording.overflow("can0", 7, now_ns + number, now_ns + number + 5)
    assert told() == [(7, now_ns + number, now_ns + number + 5) for number in range(OVERFLOWS_MAX)]
    recording.overflow("can1", 1, now_ns, now_ns)
    assert len(told()) == OVERFLOWS_MAX + 1, "another source is told at once"

    first_ns = now_ns + OVERFLOWS_MAX
    now_ns += OVERFLOW_NS
    recording.tell_overflows()
    recording.tell_overflows()
    assert told()[OVERFLOWS_MAX + 1 :] == [(70, first_ns, first_ns + 14)]
    recording.overflow("can0", 2, now_ns, now_ns)
    assert journal.books()["can0"].dropped == {"overflow": 7 * (OVERFLOWS_MAX + 10)}
    recording.tell_overflows(at_once=True)
    assert journal.books()["can0"].dropped == {"overflow": 7 * (OVERFLOWS_MAX + 10) + 2}
    assert all(books.balanced for books in journal.books().values())
    journal.close(ended=True)


def test_a_source_that_is_reopened_leaves_a_gap(tmp_path: Path) -> None:
    """From when it was closed to its next frame, in front of that; another source has none, and it is told once."""
    journal = open_journal(tmp_path)
    recording = Recording(journal, WallClock(), now=lambda: 500_000)
    recording.frames(frames(0, 10), CLOCK)
    recording.expect_gap("can0", "reload")
    recording.frames(frames(0, 10, "can1"), CLOCK)
    recording.frames(frames(1000, 10), CLOCK)
    recording.frames(frames(2000, 10), CLOCK)
    records, _ = read_all(journal, journal.stretches()[-1].id)
    kinds = [(record.source, record.kind) for record in records if record.kind is not Kind.SESSION]
    assert kinds == [
        ("can0", Kind.FRAMES), ("can1", Kind.FRAMES),
        ("can0", Kind.EVENT), ("can0", Kind.FRAMES), ("can0", Kind.FRAMES),
    ]  # fmt: skip
    [gap] = [record.event() for record in records if record.kind is Kind.EVENT]
    assert (gap.kind, gap.key, gap.ts_ns) == ("gap", "reload", 500_000)
    assert gap.payload == {"reason": "reload", "from_ns": 500_000, "to_ns": 1_000_000}
    journal.close(ended=True)


def test_a_source_that_is_away_while_another_session_begins(tmp_path: Path) -> None:
    """It leaves no gap there: of that session nothing is missing."""
    journal = open_journal(tmp_path)
    recording = Recording(journal, WallClock(), now=lambda: 500_000)
    recording.frames(frames(0, 10), CLOCK)
    recording.expect_gap("can0", "reload")
    recording.forget_before()
    recording.frames(frames(1000, 10), CLOCK)
    records, _ = read_all(journal, journal.stretches()[-1].id)
    assert not [record for record in records if record.kind is Kind.EVENT]
    journal.close(ended=True)


def test_the_newest_events_stay_in_memory(tmp_path: Path) -> None:
    """Of every kind, numbered in the order of recording; older ones are in the journal alone."""
    journal = open_journal(tmp_path)
    recording = Recording(journal, WallClock(), now=lambda: 500_000)
    recording.expect_gap("can0", "reload")
    recording.frames(frames(1000, 10), CLOCK)
    recording.overflow("can0", 7, 1, 2)
    for number in range(EVENTS_KEPT):
        recording.event(Event("", "marker", number))
        if number == 0:
            kinds = [(told.number, told.event.kind, told.event.key) for told in recording.newest_events]
            assert kinds == [(1, "gap", "reload"), (2, "gap", "overflow"), (3, "marker", "")]
    assert [told.number for told in recording.newest_events] == list(range(3, EVENTS_KEPT + 3))
    records, _ = read_all(journal, journal.stretches()[-1].id)
    assert sum(record.kind is Kind.EVENT for record in records) == EVENTS_KEPT + 2
    journal.close(ended=True)
