"""The limits of a journal, and what it is asked that it does not know: nothing raises, and nothing is miscounted."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from ingestd.errors import UsageError
from ingestd.journal import Journal, Kind
from ingestd.journal.losses import EVENTS_MAX
from ingestd.journal.segment import MACHINE_BYTES_MAX
from ingestd.model import Books, Event
from tests.journals import (
    BOOT_ID,
    CLOCK,
    SEGMENT_BYTES,
    SESSION,
    frames,
    kill,
    numbers_of,
    open_journal,
    open_unrecovered,
    read_all,
    send_all,
)


def refuse(*_: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_id_of_a_machine_is_of_limited_length(tmp_path: Path) -> None:
    """In bytes of UTF-8: one too many is a mistake, and the longest comes back whole."""
    longest = "µ" * (MACHINE_BYTES_MAX // 2)
    with pytest.raises(UsageError, match=f"at most {MACHINE_BYTES_MAX} bytes"):
        open_journal(tmp_path, machine_id=f"{longest}x")
    assert not list(tmp_path.iterdir())
    kill(open_journal(tmp_path, machine_id=longest))
    assert open_journal(tmp_path).stretches()[0].machine_id == longest


def test_the_last_session_is_known_beside_a_segment_that_waits(tmp_path: Path) -> None:
    """What a killed process had allocated and not used says nothing of it: the segment before does."""
    journal = open_journal(tmp_path)
    journal.append_frames(frames(0, 1), CLOCK)
    journal.sync()
    kill(journal)
    assert len(list(tmp_path.glob("0*.journal"))) == 2
    last = Journal.peek(tmp_path)
    assert last is not None
    assert (last.session_id, last.boot_id, last.ended) == (SESSION.id, BOOT_ID, False)


def test_a_stretch_that_nobody_knows(tmp_path: Path) -> None:
    """It has no frames and nothing to read, and what is said of it changes nothing."""
    journal = open_journal(tmp_path)
    journal.append_frames(frames(0, 10), CLOCK)
    (stretch,), written = journal.stretches(), journal.bytes_written
    assert journal.tallies("beef") == {}
    reader = journal.reader("beef", 5)
    assert (reader.read(1 << 20).records, repr(reader)) == ([], "<StretchReader beef after 5>")
    journal.acknowledge("beef", 7, {"can0": 10})
    journal.assign_feed("beef", "other", 0)
    assert (journal.stretches(), journal.bytes_written) == ([stretch], written)
    assert journal.books()["can0"] == Books(10, 0, 10, 0)


def test_a_position_that_was_acknowledged_before(tmp_path: Path) -> None:
    """The positions of a stretch only go up: what is said of an earlier one again is not counted again."""
    journal = open_journal(tmp_path)
    for first in (0, 10):
        journal.append_frames(frames(first, 10), CLOCK)
    send_all(journal)
    (stretch,), written = journal.stretches(), journal.bytes_written
    journal.acknowledge(stretch.id, 2, {"can0": 10})
    assert (journal.stretches(), journal.bytes_written) == ([stretch], written)
    assert journal.books()["can0"] == Books(20, 20, 0, 0)


def test_a_reader_may_begin_behind_what_is_acknowledged(tmp_path: Path) -> None:
    """What lies between is not handed out and not taken for lost; it is in the books when its end is acknowledged."""
    journal = open_journal(tmp_path)
    for first in range(0, 60, 10):
        journal.append_frames(frames(first, 10), CLOCK)
    (stretch,) = journal.stretches()
    result = journal.reader(stretch.id, 4).read(1 << 20)
    assert [record.sequence for record in result.records] == [5, 6, 7]
    assert numbers_of(result.records) == list(range(30, 60))
    assert not result.lost
    journal.acknowledge(stretch.id, 7, {"can0": 60})
    assert journal.books()["can0"] == Books(60, 60, 0, 0)


def test_no_frames_are_no_record(tmp_path: Path) -> None:
    """A batch with nothing in it writes nothing, and makes no source."""
    journal = open_journal(tmp_path)
    written = journal.bytes_written
    journal.append_frames(frames(0, 0), CLOCK)
    assert journal.bytes_written == written
    assert journal.books() == {}


def test_metadata_that_no_segment_can_take(tmp_path: Path) -> None:
    """It is left out and that is said; what is recorded beside it, and in the next segments, is not touched by it."""
    journal = open_journal(tmp_path)
    journal.append_session({"note": "x" * SEGMENT_BYTES})
    assert journal.trouble.endswith("bytes is too large for the journal: left out")
    journal.append_frames(frames(0, 10), CLOCK)
    journal.begin_stretch()
    journal.append_frames(frames(10, 10), CLOCK)
    journal.append_session({"note": "short"})
    assert journal.writable
    sent = send_all(journal)
    assert numbers_of(sent) == list(range(20))
    assert [record.session() for record in sent if record.kind is Kind.SESSION] == [SESSION.fields, {"note": "short"}]


def test_more_events_than_can_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest wait for the disk; of the others the frames that they count are kept, and become one gap."""
    journal = open_journal(tmp_path)
    count = EVENTS_MAX + 44
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refuse)
        for number in range(count):
            journal.append_event(Event("can0", "bus_off", number), CLOCK, lost={"overflow": 2})
        assert journal.books()["can0"] == Books(2 * count, 0, 0, 0, {"overflow": 2 * count})
    journal._log._retry_at = 0.0
    journal.sync()
    events = [record.event() for record in send_all(journal) if record.kind is Kind.EVENT]
    assert [event.ts_ns for event in events if event.kind == "bus_off"] == list(range(44, count))
    told = {"reason": "overflow", "frames": 88, "from_ns": 0, "to_ns": 43}
    assert [event for event in events if event.kind == "gap"] == [Event("can0", "gap", 0, "overflow", told)]
    kill(journal)
    assert open_journal(tmp_path).books()["can0"] == Books(2 * count, 0, 0, 0, {"overflow": 2 * count})


def test_losses_before_the_books_are_known(tmp_path: Path) -> None:
    """What is lost while a new process has not yet read what earlier ones left is added to what they lost."""
    journal = open_journal(tmp_path)
    journal.append_event(Event("can0", "gap", 5), CLOCK, lost={"overflow": 7})
    kill(journal)
    journal = open_unrecovered(tmp_path)
    journal.append_event(Event("can0", "gap", 6), CLOCK, lost={"overflow": 2, "down": 1})
    journal.append_event(Event("gps", "gap", 6), CLOCK, lost={"overflow": 4})
    journal.recover()
    expected = {"can0": Books(10, 0, 0, 0, {"overflow": 9, "down": 1}), "gps": Books(4, 0, 0, 0, {"overflow": 4})}
    assert journal.books() == expected
    kill(journal)
    assert open_journal(tmp_path).books() == expected


def test_books_that_outgrow_a_segment(tmp_path: Path) -> None:
    """They are not written down any more, and are known all the same: from an older STATE, and all that followed it."""
    journal = open_journal(tmp_path)
    sources = [f"{'long' * 20}{number}" for number in range(20)]
    for _ in range(20):
        for source in sources:
            journal.append_frames(frames(0, 1, source), CLOCK)
        journal.begin_stretch()
        journal.sync()
    state_number = journal._log.state_number
    assert 1 < state_number < journal._log.segment.segment.number  # type: ignore[union-attr]
    books = {source: Books(20, 0, 20, 0) for source in sources}
    kill(journal)
    journal = open_journal(tmp_path)
    assert journal.books() == books
    assert len(journal.stretches()) == 22
    journal.append_frames(frames(0, 1, "can0"), CLOCK)
    assert numbers_of(send_all(journal), sources[0]) == [0] * 20
    assert journal.books()[sources[0]] == Books(20, 20, 0, 0)


def test_a_journal_says_what_it_is(tmp_path: Path) -> None:
    """In a traceback, say: where it lies, and how much is in it."""
    journal = open_journal(tmp_path)
    journal.begin_stretch()
    assert repr(journal) == f"<Journal {tmp_path}: 2 stretches, {2 * SEGMENT_BYTES} bytes>"
    assert read_all(journal, journal.stretches()[0].id)[1] == {}
