"""What the daemon adds to what its sources say."""

from __future__ import annotations

from pathlib import Path

from ingestd.clock import WallClock
from ingestd.daemon.recording import OVERFLOW_NS, OVERFLOWS_MAX, Recording
from ingestd.journal import Kind
from tests.journals import open_journal, read_all


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
