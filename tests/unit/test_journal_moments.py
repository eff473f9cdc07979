"""What one thread or process does at the worst moment of another: done there on purpose, and not waited for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ingestd.journal import Journal, reader, recovery, room
from ingestd.journal.segment import list_folder
from ingestd.model import Books
from tests.journals import (
    CLOCK,
    SEGMENT_BYTES,
    frames,
    kill,
    numbers_of,
    open_journal,
    open_unrecovered,
    send_all,
)


def once(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, before: Callable[[], object]) -> list[str]:
    """Do something before the next call, and only before that one; what was done."""
    call, done = getattr(target, name), list[str]()

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if not done:
            done.append(name)
            before()
        return call(*arguments, **options)

    monkeypatch.setattr(target, name, interrupted)
    return done


class Recording:
    """Frames with numbers that go up, appended to a journal."""

    def __init__(self, journal: Journal) -> None:
        self.journal, self.number = journal, 0

    def append(self) -> None:
        """A hundred more."""
        self.journal.append_frames(frames(self.number, 100), CLOCK)
        self.number += 100

    def until(self, condition: Callable[[], object]) -> None:
        """As many as it takes."""
        while not condition():
            self.append()


def numbers_in(folder: Path) -> list[int]:
    return [name.number for name in list_folder(folder)[0]]


def test_a_segment_is_needed_while_the_next_is_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Appending makes its own and does not wait; the one that came late is given back, for numbers only go up."""
    journal = open_journal(tmp_path)
    recording = Recording(journal)
    recording.append()
    done = once(monkeypatch, os, "posix_fallocate", journal.begin_stretch)
    journal.sync()
    assert done
    assert numbers_in(tmp_path) == [1, 3, 4]
    assert journal.bytes_used == sum(path.stat().st_size for path in tmp_path.glob("*.journal"))
    recording.until(lambda: journal._shelf.number_last > 5)
    assert numbers_of(send_all(journal)) == list(range(recording.number))
    assert [stretch.is_current for stretch in journal.stretches()] == [False, True]


def test_appending_removes_what_is_about_to_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the thread that makes room measures the oldest segment, appending needs the room: it goes, counted once."""
    journal = open_journal(tmp_path, segments_max=5)
    recording = Recording(journal)
    recording.until(lambda: journal.bytes_used == 4 * SEGMENT_BYTES)
    oldest = tmp_path / "00000001.journal"
    done = once(monkeypatch, room, "read_segment", lambda: recording.until(lambda: not oldest.exists()))
    journal.sync()
    assert done
    dropped = journal.books()["can0"].dropped["budget"]
    assert journal.books()["can0"] == Books(recording.number, 0, recording.number - dropped, 0, {"budget": dropped})
    assert journal.bytes_used <= 5 * SEGMENT_BYTES
    assert numbers_of(send_all(journal)) == list(range(dropped, recording.number))
    assert journal.books()["can0"] == Books(recording.number, recording.number - dropped, 0, 0, {"budget": dropped})


def test_what_is_read_is_removed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames that were counted as dropped while a reader read them are not handed out as well."""
    journal = open_journal(tmp_path, segments_max=5)
    recording = Recording(journal)
    recording.until(lambda: journal.bytes_used == 4 * SEGMENT_BYTES)

    def overflow() -> None:
        recording.until(lambda: journal.books()["can0"].dropped)

    done = once(monkeypatch, reader, "read_segment", overflow)
    result = journal.reader(journal.stretches()[0].id, 0).read(20_000)
    assert done
    dropped = journal.books()["can0"].dropped["budget"]
    assert numbers_of(result.records)[0] == dropped > 0
    assert not result.lost
    assert numbers_of(send_all(journal)) == list(range(dropped, recording.number))
    assert journal.books()["can0"].balanced


def test_a_segment_is_replaced_while_a_process_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its header and its records: those of the other are not taken, that is said, and it is left alone."""
    journal, other = open_journal(tmp_path / "journal"), open_journal(tmp_path / "other")
    for each, first in ((journal, 0), (other, 500)):
        each.append_frames(frames(first, 10), CLOCK)
        each.begin_stretch()
        each.append_frames(frames(first + 10, 10), CLOCK)
        kill(each)
    newest, theirs = (tmp_path / name / "00000002.journal" for name in ("journal", "other"))
    done = once(monkeypatch, recovery, "read_segment", lambda: theirs.rename(newest))
    journal = open_unrecovered(tmp_path / "journal")
    (said,) = journal.recover().warnings
    assert done
    assert said.startswith("00000002.journal was replaced by another file")
    assert numbers_of(send_all(journal)) == list(range(10))
    assert journal.books()["can0"] == Books(10, 10, 0, 0)
    assert newest.exists()


def test_a_file_goes_while_the_folder_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there when listing began and is no more is neither the journal's nor foreign."""
    for number in (1, 2, 3):
        (tmp_path / f"{number:08d}.journal").touch()
    scandir = os.scandir

    def removing(folder: Path) -> Iterator[os.DirEntry[str]]:
        entries = list(scandir(folder))
        (folder / "00000002.journal").unlink()
        return iter(entries)

    monkeypatch.setattr(os, "scandir", removing)
    names, foreign = list_folder(tmp_path)
    assert ([name.number for name in names], foreign) == ([1, 3], [])
