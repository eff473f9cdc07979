"""Looking back into a journal: what was recorded, without any of it counting as sent or missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from ingestd.journal import Journal
from ingestd.journal.segment import list_folder
from tests.journals import CLOCK, frames, numbers_of, open_journal, read_all

RECORDS = 120
FRAMES = 100


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    """A journal of several segments, the last of which is being written."""
    journal = open_journal(tmp_path)
    for number in range(RECORDS):
        journal.append_frames(frames(number * FRAMES, FRAMES), CLOCK)
    assert len(list_folder(tmp_path)[0]) > 3
    return journal


def looked_at(journal: Journal, after: int, through: int) -> list[int]:
    [stretch] = journal.stretches()
    return [record.sequence for record in journal.look_back(stretch.id, after, through)]


@pytest.mark.parametrize(
    ("after", "through"), [(0, RECORDS + 1), (0, 1), (7, 9), (20, 55), (RECORDS, RECORDS + 1), (9, 9)]
)
def test_from_one_position_to_another(journal: Journal, after: int, through: int) -> None:
    """Each record once, in order, from whichever segment; the first is the session's."""
    assert looked_at(journal, after, through) == list(range(after + 1, through + 1))


def test_it_counts_nothing(journal: Journal) -> None:
    """A reader that sends finds everything afterwards, and the books are as before."""
    before = journal.books()
    assert len(looked_at(journal, 0, RECORDS + 1)) == RECORDS + 1
    assert journal.books() == before
    [stretch] = journal.stretches()
    records, lost = read_all(journal, stretch.id)
    assert numbers_of(records) == list(range(RECORDS * FRAMES))
    assert lost == {}


def test_what_cannot_be_read_is_passed_over(journal: Journal, tmp_path: Path) -> None:
    """A segment that is gone, one that another has replaced, one with damage: the rest is there."""
    paths = [name.path for name in list_folder(tmp_path)[0] if name.number]
    whole = looked_at(journal, 0, RECORDS + 1)
    data = bytearray(paths[1].read_bytes())
    data[len(data) // 2] ^= 0xFF
    paths[1].write_bytes(data)
    damaged = looked_at(journal, 0, RECORDS + 1)
    assert set(damaged) < set(whole)
    assert len(damaged) >= len(whole) - 2
    paths[1].unlink()
    gone = looked_at(journal, 0, RECORDS + 1)
    assert set(gone) < set(damaged)
    paths[2].replace(paths[0])
    replaced = looked_at(journal, 0, RECORDS + 1)
    assert set(replaced) < set(gone)
    assert journal.damaged_bytes == 0


def test_a_stretch_that_is_not_there(journal: Journal) -> None:
    """Has no records."""
    assert list(journal.look_back("0" * 32, 0, 100)) == []
