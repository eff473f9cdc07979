"""Power cuts at any moment: what was synced is there afterwards, in order and unchanged, and the books balance.

A journal is recorded on a disk that logs every write. The log is then replayed up to many moments, also with a part of
what the disk had not yet been told to flush; each time the file system is mounted, the journal opened as by the next
start of the daemon, read to its end, and recorded on.

POWER_CUTS is how many cuts a scenario gets (a million: all there are), POWER_CUT_SEED another choice of everything.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ingestd.journal import Journal, Kind, Record, Stretch, StretchReader
from ingestd.model import Books, Event
from tests.disk.devices import DISKS, mapped, mounted, run
from tests.disk.write_log import choose, cuts, read_log
from tests.journals import CLOCK, SESSION, frames, open_unrecovered

CUTS = int(os.environ.get("POWER_CUTS", "20"))
SEED = os.environ.get("POWER_CUT_SEED", "1")
SOURCES = ("can0", "gps")
APPEND_FRAMES_MAX = 100
RECORD_FRAMES = 20_000  # more than eight segments hold
LATER = "after the cut"

MAKE = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-b", "4096", "-E", "lazy_itable_init=0,lazy_journal_init=0"),
    "xfs": ("mkfs.xfs", "-q", "-f", "--unsupported"),
}


@dataclass(frozen=True)
class Known:
    """What the world outside of the disk knew at some moment."""

    synced: Counter[str] = field(default_factory=Counter)  # frames of each source that a sync has made durable
    positions: dict[str, int] = field(default_factory=dict)  # how far the database has each stretch
    stored: Counter[str] = field(default_factory=Counter)  # and how many frames of each source


class Database:
    """As much of a database as exactly-once needs: the position moves with the frames, on another machine's disk."""

    def __init__(self) -> None:
        self.positions: dict[str, int] = {}
        self.stored: dict[str, list[int]] = {source: [] for source in (*SOURCES, LATER)}
        self.lock = threading.Lock()

    def as_of(self, known: Known) -> Database:
        """A copy of it as it was at some moment."""
        then = Database()
        then.positions = dict(known.positions)
        then.stored |= {source: numbers[: known.stored[source]] for source, numbers in self.stored.items()}
        return then

    def commit(self, stretch: Stretch, records: list[Record]) -> None:
        """Store the frames of records that come after the position, and move it."""
        with self.lock:
            for record in records:
                assert record.sequence > self.positions.get(stretch.id, 0), "sent twice"
                self.positions[stretch.id] = record.sequence
                if record.kind is Kind.FRAMES:
                    self.stored[record.source] += checked(record)


def checked(record: Record) -> list[int]:
    """The numbers of the frames in a record, every byte of which is as it was made."""
    batch = record.frames()
    numbers: list[int] = batch.arbitration_id.tolist()
    made = frames(numbers[0], len(numbers), record.source)
    for column in ("ts_ns", "arbitration_id", "flags", "length", "data"):
        np.testing.assert_array_equal(getattr(batch, column), getattr(made, column))
    return numbers


def send(journal: Journal, database: Database, told: Callable[[], None], records_max: int) -> None:
    """What `delivery` does: from where the database is, commit, and then acknowledge."""
    for stretch in journal.stretches():
        position = database.positions.get(stretch.id, 0)
        reader = journal.reader(stretch.id, min(position, stretch.acknowledged))
        catch_up(journal, reader, stretch, position)
        for _ in range(records_max):
            result = reader.read(20_000)
            if not result.records:
                break
            database.commit(stretch, result.records)
            told()
            counts = Counter(dict.fromkeys(SOURCES, 0))
            for record in result.records:
                counts[record.source] += record.frames_count
            journal.acknowledge(stretch.id, result.records[-1].sequence, counts, {}, result.lost)


def catch_up(journal: Journal, reader: StretchReader, stretch: Stretch, position: int) -> None:
    """The database has more than the journal has heard of: `Delivery._catch_up`."""
    at = stretch.acknowledged
    while at < position:
        result = reader.read(1)
        if not result.records or result.records[-1].sequence > position:
            break  # The power cut took what the database has.
        for record in result.records:
            at = record.sequence
            journal.acknowledge(stretch.id, at, Counter({record.source: record.frames_count}), {}, result.lost)
    reader.rewind(max(at, position))


class Scenario:
    """A journal that is recorded on a disk, and what is known of it, moment by moment."""

    def __init__(self, mark: Callable[[str], None], *, sends: bool, segments_max: int) -> None:
        self.marks: list[Known] = [Known()]
        self.appended: Counter[str] = Counter()
        # For each mark, how many may have been appended when it had been written, with one append that is not over.
        self._begun: list[Counter[str]] = [Counter(dict.fromkeys(SOURCES, APPEND_FRAMES_MAX))]
        self.sends, self.segments_max = sends, segments_max
        self._mark = mark
        self._lock = threading.Lock()
        self._database = Database()
        self._over = threading.Event()

    def tell(self, synced: Counter[str] | None = None) -> None:
        """Write a mark into the log, and remember what was known then."""
        database = self._database
        with self._lock, database.lock:
            stored = Counter({source: len(numbers) for source, numbers in database.stored.items()})
            self.marks.append(Known(synced or self.marks[-1].synced, dict(database.positions), stored))
            self._mark(str(len(self.marks) - 1))
            self._begun.append(Counter({source: count + APPEND_FRAMES_MAX for source, count in self.appended.items()}))

    def record(self, folder: Path, rng: random.Random) -> None:
        """Record for a while: frames, events, stretches, with a thread that syncs; and send, if that is asked for."""
        journal = open_unrecovered(folder, self.segments_max)
        journal.recover()
        syncing = threading.Thread(target=self._sync, args=(journal,))
        syncing.start()
        while self.appended.total() < RECORD_FRAMES:
            for source in SOURCES:
                count = rng.choice((1, 10, APPEND_FRAMES_MAX))
                journal.append_frames(frames(self.appended[source], count, source), CLOCK)
                self.appended[source] += count
            if rng.random() < 0.1:
                journal.append_event(Event("can0", "marker", self.appended["can0"]), CLOCK)
            if rng.random() < 0.02:
                journal.begin_stretch()
            if self.sends and rng.random() < 0.2:
                send(journal, self._database, self.tell, records_max=3)
            time.sleep(rng.choice((0.0, 0.01)))
        self._over.set()
        syncing.join()
        assert not journal.trouble
        journal.close(ended=False)
        self.tell(Counter(self.appended))

    def _sync(self, journal: Journal) -> None:
        while not self._over.is_set():
            appended = Counter(self.appended)
            journal.sync()
            self.tell(appended)
            time.sleep(0.02)

    def examine(self, folder: Path, mark: str) -> Counter[str]:
        """Open the journal after a cut as the next start does; everything the module promises holds."""
        known, begun = self.marks[int(mark or 0)], self._begun[min(int(mark or 0) + 1, len(self._begun) - 1)]
        database = self._database.as_of(known)
        journal = open_unrecovered(folder, self.segments_max)
        journal.append_frames(frames(0, 5, LATER), CLOCK)  # What is recorded before anybody looks at the past.
        journal.recover()
        for stretch in journal.stretches():
            assert stretch.acknowledged <= known.positions.get(stretch.id, 0)
        journal.append_frames(frames(5, 5, LATER), CLOCK)
        before = journal.books()
        send(journal, database, lambda: None, records_max=10**6)
        books = journal.books()
        assert all(each.balanced for each in (*before.values(), *books.values()))
        for source in SOURCES:
            found = np.array(database.stored[source], np.int64)
            self._check(found, known.synced[source], known.stored[source], begun[source], books.get(source, Books()))
        assert database.stored[LATER] == list(range(10))
        journal.sync()
        assert not journal.trouble
        journal.close(ended=True)
        assert (last_session := Journal.peek(folder)) is not None
        assert last_session.ended
        assert last_session.session_id == SESSION.id
        return sum((Counter(each.dropped) for each in books.values()), Counter())

    def _check(self, found: NDArray[np.int64], synced: int, stored: int, begun: int, books: Books) -> None:
        """Whether the frames of a source that came into the database after a cut are those that had to."""
        assert books.pending == 0
        assert (np.diff(found) > 0).all(), "twice, or out of order"
        is_there = np.zeros(max(self.appended.values()), bool)
        is_there[found] = True
        missing = int(np.count_nonzero(~is_there[:synced]))
        dropped_count = sum(books.dropped.values())
        if self.sends or set(books.dropped) <= {"damage"}:
            assert missing == 0, "synced, and gone"
        assert set(books.dropped) <= {"damage", "budget"}
        assert missing <= dropped_count, "synced, gone, and not counted"
        holes = int(found[-1]) + 1 - len(found) if len(found) else dropped_count
        # What the database had before it was synced, and the cut took from the midst of the journal's unsynced end,
        # counts as damage: the journal cannot know better. So do unsynced frames at the end, of which a later segment
        # tells that is there.
        end = int(found[-1]) + 1 if len(found) else 0
        told_only = max(0, begun - max(end, synced)) if "damage" in books.dropped else 0
        assert dropped_count <= holes + max(0, stored - synced) + told_only, "counted as lost, and there"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file_system", "sends", "segments_max"),
    [("ext4", False, 400), ("ext4", True, 16), ("ext4", False, 8), ("xfs", True, 16)],
    ids=["all is kept", "sent segments go", "unsent segments go", "xfs"],
)
def test_what_was_synced_survives_a_power_cut(
    tmp_path: Path, file_system: str, sends: bool, segments_max: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever moment the power goes at, and whatever of its cache the disk loses with it."""
    rng, (data, log, target) = random.Random(SEED), DISKS
    run(*MAKE[file_system], data)
    with data.open("rb") as disk:
        base = disk.read()
    with mapped("recorded", f"log-writes {data} {log}") as device:
        scenario = Scenario(lambda name: device.message(f"mark {name}"), sends=sends, segments_max=segments_max)
        with mounted(device.path, tmp_path / "disk", file_system) as folder:
            scenario.record(folder / "journal", rng)
    entries = read_log(log)
    dropped: Counter[str] = Counter()
    cuts_count = unflushed_count = 0
    for cut in cuts(base, entries, choose(entries, CUTS, rng), rng):
        with target.open("r+b") as disk:
            disk.write(cut.image)
            disk.flush()
            os.fsync(disk.fileno())
        with mounted(target, tmp_path / "disk", file_system) as folder:
            dropped += scenario.examine(folder / "journal", cut.mark)
        cuts_count += 1
        unflushed_count += cut.unflushed_count > 0
    with capsys.disabled():
        sys.stdout.write(
            f"\n{file_system}: {scenario.appended.total()} frames, {len(entries)} writes and marks, {cuts_count} cuts,"
            f" {unflushed_count} of them with unflushed writes; counted as dropped {dict(dropped)}\n"
        )
    assert cuts_count >= min(CUTS, len(entries)) // 2
    assert unflushed_count
    assert ("budget" in dropped) == (not sends and segments_max < 10)
