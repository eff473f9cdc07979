"""A process that dies between its first frames and the gap before them leaves the telling to the next one."""

from __future__ import annotations

from pathlib import Path

from ingestd.model import Event
from tests.journals import CLOCK, frames, kill, open_journal, open_unrecovered


def test_a_gap_that_nobody_lived_to_tell(tmp_path: Path) -> None:
    """It is known to the next process, and to the one after that, until one has told it."""
    first = open_journal(tmp_path)
    first.append_frames(frames(0, 10), CLOCK)
    kill(first)
    second = open_unrecovered(tmp_path)
    second.append_event(Event("can0", "resumed", 20_000), CLOCK)
    second.append_frames(frames(20, 10), CLOCK)
    kill(second)
    for _ in range(2):
        third = open_unrecovered(tmp_path)
        recovery = third.recover()
        assert recovery.untold == [("can0", 9_000, 20_000)]
        assert recovery.last_stamps == {"can0": 29_000}
        kill(third)
    fourth = open_journal(tmp_path)
    fourth.append_event(Event("can0", "gap", 9_000, "down", {"from_ns": 9_000, "to_ns": 20_000}), CLOCK)
    kill(fourth)
    assert open_unrecovered(tmp_path).recover().untold == []
