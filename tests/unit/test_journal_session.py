"""What a journal tells the next process of the session before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ingestd.errors import UsageError
from ingestd.journal import SessionInfo
from tests.journals import BOOT_ID, CLOCK, SEGMENT_BYTES, SESSION, frames, kill, open_journal, open_unrecovered

OTHER = SessionInfo(type(SESSION.id)("01890000-0000-7000-8000-000000000009"), {})


def told(updated: int, **more: Any) -> dict[str, Any]:
    """A SESSION record of that edit."""
    return {"time_base": BOOT_ID, "updated_utc": f"2026-11-25T08:00:{updated:02d}.000000+00:00", **more}


def known(folder: Path) -> dict[str, Any]:
    """What a process that is begun now would know, without its time base."""
    journal = open_unrecovered(folder)
    found = dict(journal.recover().session)
    kill(journal)
    return {name: value for name, value in found.items() if name not in ("time_base", "updated_utc")}


@pytest.mark.parametrize("behind", [0, 3000])
def test_what_was_said_last_is_known(tmp_path: Path, behind: int) -> None:
    """However much was recorded since, through segments, and by processes that died before they knew it themselves."""
    journal = open_journal(tmp_path)
    journal.append_session(told(1, driver="Ada", config={"long": "x" * 1000}))
    journal.append_session(told(2, driver="Kim", config={}))
    for first in range(0, behind, 100):
        journal.append_frames(frames(first, 100, length=64), CLOCK)
    assert journal.bytes_used > behind // 3000 * SEGMENT_BYTES
    kill(journal)
    expected = {"id": SESSION.id.hex, "driver": "Kim"}
    assert known(tmp_path) == expected
    # This one did not look first, and knows only what its configuration says: less than was known.
    journal = open_unrecovered(tmp_path)
    journal.append_session(told(0, driver="of the configuration"))
    kill(journal)
    assert known(tmp_path) == expected
    # This one looks, after it has said the same.
    session = SessionInfo(SESSION.id, told(0, driver="of the configuration"))
    journal = open_unrecovered(tmp_path, session=session)
    assert journal.recover().session["driver"] == "Kim"
    kill(journal)
    assert known(tmp_path) == expected


def test_an_end_says_nothing_of_it(tmp_path: Path) -> None:
    """Nor does another session take over anything; who comes next is told of the newest."""
    journal = open_journal(tmp_path)
    journal.append_session(told(5, driver="Kim"))
    journal.append_session({"ended_utc": "2026-11-25T09:00:00+00:00"})
    kill(journal)
    assert known(tmp_path)["driver"] == "Kim"
    journal = open_journal(tmp_path)
    journal.append_session(told(5, driver="Kim"))
    journal.begin_stretch(SessionInfo(OTHER.id, told(1, driver="Bea")))
    journal.append_frames(frames(0, 10), CLOCK)
    assert journal.stretches()[-1].session_id == OTHER.id
    kill(journal)
    assert known(tmp_path) == {"id": OTHER.id.hex, "driver": "Bea"}


def test_a_budget_is_changed_while_it_records(tmp_path: Path) -> None:
    """The next sync makes it fit, counting what goes; what cannot be a budget is refused, and nothing has changed."""
    journal = open_journal(tmp_path, segments_max=40)
    for first in range(0, 20_000, 100):
        journal.append_frames(frames(first, 100, length=64), CLOCK)
    journal.sync()
    assert journal.bytes_used > 10 * SEGMENT_BYTES
    for max_bytes, when_full in ((SEGMENT_BYTES, "drop-oldest"), (10 * SEGMENT_BYTES, "drop-all")):
        with pytest.raises(UsageError):
            journal.set_budget(max_bytes, when_full)
    journal.sync()
    assert "can0" not in {source for source, books in journal.books().items() if books.dropped}
    journal.set_budget(10 * SEGMENT_BYTES, "drop-oldest")
    journal.sync()
    assert journal.bytes_used <= 10 * SEGMENT_BYTES
    books = journal.books()["can0"]
    assert books.dropped["budget"] > 0
    assert books.balanced
    journal.set_budget(10 * SEGMENT_BYTES, "drop-newest")
    for first in range(20_000, 40_000, 100):
        journal.append_frames(frames(first, 100, length=64), CLOCK)
        journal.sync()
    after = journal.books()["can0"]
    assert after.received == 40_000
    assert after.balanced
    journal.set_budget(64 * SEGMENT_BYTES, "drop-newest")
    journal.sync()
    journal.append_frames(frames(40_000, 100, length=64), CLOCK)
    assert journal.books()["can0"].pending == after.pending + 100
    journal.close(ended=True)
