"""The journal against a plain list: whatever happens, each frame has one fate, and the books know how many have which.

Every frame has a number of its own. Some are committed, and never twice; those the disk or the budget refused are
counted; the rest can be read back as it was. A power cut may take what was not synced, and nothing else.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ingestd.journal import Journal, Kind, Record, StretchReader, merge
from ingestd.journal.segment import read_segment
from ingestd.model import Books, Event
from tests.journals import CLOCK, SEGMENT_BYTES, frames, kill, open_journal

SOURCES = ("can0", "gps")


class FaultyDisk:
    """`os.pwrite` and `os.fdatasync` that do less than they are asked to, or refuse."""

    def __init__(self) -> None:
        self.refusals = 0
        self.short = False
        self.failed_syncs = 0
        self._pwrite, self._fdatasync = os.pwrite, os.fdatasync

    def pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        """Half of it, a refusal after half of it, or all."""
        if self.refusals:
            self.refusals -= 1
            self._pwrite(descriptor, bytes(data)[: len(data) // 2], offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._pwrite(descriptor, bytes(data)[: max(1, len(data) // 2)] if self.short else data, offset)

    def fdatasync(self, descriptor: int) -> None:
        """A failure, or what it is for."""
        if self.failed_syncs:
            self.failed_syncs -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._fdatasync(descriptor)


class JournalAgainstList(RuleBasedStateMachine):
    """One journal over several lives."""

    journal: Journal

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="journal-"))
        self.disk = FaultyDisk()
        self.patches = [
            mock.patch("os.pwrite", self.disk.pwrite),
            mock.patch("os.fdatasync", self.disk.fdatasync),
        ]
        for patch in self.patches:
            patch.start()
        self.offered: Counter[str] = Counter()
        self.number = 0
        self.committed: dict[str, set[int]] = {source: set() for source in SOURCES}
        self.readers: dict[str, StretchReader] = {}
        self.in_flight: dict[str, tuple[list[Record], dict[str, dict[str, int]]]] = {}

    @initialize(segments=st.integers(4, 7), policy=st.sampled_from(["drop-oldest", "drop-newest"]))
    def begin(self, segments: int, policy: str) -> None:
        """A new folder."""
        self.options: dict[str, Any] = {"segments_max": segments, "when_full": policy}
        self.journal = open_journal(self.folder, **self.options)

    def teardown(self) -> None:
        """Everything that is left is sent in the end; then nothing is pending, and the sums are right."""
        try:
            if hasattr(self, "journal"):
                self.disk.refusals = self.disk.failed_syncs = 0
                self.restart()
                self.send_everything()
                self.journal._log.write_losses()
                for source, books in self.journal.books().items():
                    assert books.pending == 0, (source, books)
                kill(self.journal)
        finally:
            for patch in self.patches:
                patch.stop()
            shutil.rmtree(self.folder)

    def hurry(self) -> None:
        """Pauses after a fault are not waited for."""
        self.journal._log._retry_at = 0.0

    @rule(source=st.sampled_from(SOURCES), count=st.integers(1, 600), length=st.sampled_from([0, 3, 8, 64]))
    def append(self, source: str, count: int, length: int) -> None:
        """Frames arrive."""
        self.hurry()
        self.journal.append_frames(frames(self.number, count, source, length), CLOCK)
        self.number += count
        self.offered[source] += count

    @rule(source=st.sampled_from(SOURCES), lost=st.integers(0, 5))
    def overflow(self, source: str, lost: int) -> None:
        """The kernel says that it dropped some."""
        self.hurry()
        event = Event(source, "gap", self.number * 1000, "overflow", {"frames": lost})
        self.journal.append_event(event, CLOCK, lost={"overflow": lost} if lost else None)
        self.offered[source] += lost

    @rule()
    def sync(self) -> None:
        """What the daemon's thread does all the time."""
        self.hurry()
        self.journal.sync()

    @rule(times=st.integers(1, 3))
    def refuse(self, times: int) -> None:
        """The disk will refuse the next writes."""
        self.disk.refusals = times

    @rule(times=st.integers(1, 2))
    def fail_to_sync(self, times: int) -> None:
        """The disk will fail to sync."""
        self.disk.failed_syncs = times

    @rule(short=st.booleans())
    def write_short(self, short: bool) -> None:
        """The kernel takes less than it is given."""
        self.disk.short = short

    @rule()
    def new_stretch(self) -> None:
        """As after an outage of the database."""
        self.hurry()
        self.journal.begin_stretch()

    @rule(which=st.integers(0, 9), bytes_max=st.integers(1, 100_000))
    def read(self, which: int, bytes_max: int) -> None:
        """Delivery reads a batch of some stretch, if it has none in hand."""
        stretches = self.journal.stretches()
        stretch = stretches[which % len(stretches)]
        if stretch.id in self.in_flight:
            return
        if stretch.id not in self.readers:
            self.readers[stretch.id] = self.journal.reader(stretch.id, stretch.acknowledged)
        result = self.readers[stretch.id].read(bytes_max)
        assert [record.sequence for record in result.records] == sorted({r.sequence for r in result.records})
        if result.records:
            self.in_flight[stretch.id] = result.records, result.lost

    @precondition(lambda self: self.in_flight)
    @rule(which=st.integers(0, 9), is_rejected=st.booleans())
    def commit(self, which: int, is_rejected: bool) -> None:
        """The database took a batch, or never will."""
        self.hurry()
        stretch_id = list(self.in_flight)[which % len(self.in_flight)]
        self.settle(stretch_id, *self.in_flight.pop(stretch_id), is_rejected=is_rejected)

    def settle(
        self, stretch_id: str, records: list[Record], lost: dict[str, dict[str, int]], *, is_rejected: bool = False
    ) -> None:
        """Acknowledge a batch, after looking at what is in it."""
        counts: Counter[str] = Counter()
        for record in records:
            if record.kind is Kind.FRAMES:
                batch = merge([record])
                numbers = batch.arbitration_id.tolist()
                expected = frames(numbers[0], len(numbers), record.source, int(batch.length[0]))
                assert (batch.ts_ns == expected.ts_ns).all()
                assert (batch.data == expected.data).all()
                assert not self.committed[record.source] & set(numbers), "sent twice"
                self.committed[record.source] |= set(numbers)
                counts[record.source] += len(numbers)
        nothing: Counter[str] = Counter()
        committed, rejected = (nothing, counts) if is_rejected else (counts, nothing)
        self.journal.acknowledge(stretch_id, records[-1].sequence, committed, rejected, lost)

    @precondition(lambda self: self.in_flight)
    @rule(which=st.integers(0, 9), anew=st.booleans())
    def give_up(self, which: int, anew: bool) -> None:
        """The database did not take a batch: it is read again, by the same reader or another."""
        stretch_id = list(self.in_flight)[which % len(self.in_flight)]
        del self.in_flight[stretch_id]
        acknowledged = {stretch.id: stretch.acknowledged for stretch in self.journal.stretches()}
        if anew or stretch_id not in acknowledged:
            del self.readers[stretch_id]
        else:
            self.readers[stretch_id].rewind(acknowledged[stretch_id])

    def everything_is_written(self) -> bool:
        """Whether nothing waits in the memory of the process to be written: that would be gone with it."""
        self.hurry()
        self.disk.refusals = self.disk.failed_syncs = 0
        log = self.journal._log
        if log.segment is None:
            log._begin_segment(Kind.STATE)
        log.write_losses()
        return log.segment is not None and not log.losses

    @rule()
    def restart(self) -> None:
        """The process is killed, and another one begins: it knows all that this one knew."""
        if self.everything_is_written():
            before = self.journal.books()
            self.begin_another_life()
            assert self.journal.books() == before

    @rule(keep=st.integers(0, 100_000))
    def power_cut(self, keep: int) -> None:
        """The machine stops: of what was not synced a part is there. All synced before is."""
        if not self.everything_is_written():
            return
        self.journal.sync()
        if (segment := self.journal._log.segment) is None:
            return
        path, synced = segment.segment.path, segment.end
        for count in (40, 5):
            self.append("can0", count, 8)
        if self.journal._log.segment is not segment or self.journal._log.losses:
            return
        end = synced + keep % (segment.end - synced + 1)
        size = path.stat().st_size
        before = self.journal.books()["can0"].received
        kill(self.journal)
        os.truncate(path, end)
        os.truncate(path, size)
        there = sum(r.frames_count for r in read_segment(path, synced) if isinstance(r, Record))
        self.in_flight.clear()
        self.readers.clear()
        self.journal = open_journal(self.folder, **self.options)
        assert self.journal.books().get("can0", Books()).received == before - 45 + there
        self.offered["can0"] += there - 45

    def begin_another_life(self) -> None:
        """Kill and open."""
        kill(self.journal)
        self.in_flight.clear()
        self.readers.clear()
        self.journal = open_journal(self.folder, **self.options)

    def send_everything(self) -> None:
        """Until nothing is left of any stretch."""
        for stretch in self.journal.stretches():
            reader = self.journal.reader(stretch.id, stretch.acknowledged)
            while (result := reader.read(50_000)).records:
                self.settle(stretch.id, result.records, result.lost)

    @invariant()
    def books_balance(self) -> None:
        """All frames offered are in the books, once."""
        if not hasattr(self, "journal"):
            return
        books = self.journal.books()
        for source in SOURCES:
            if self.offered[source]:
                assert books[source].balanced, books[source]
                assert books[source].received == self.offered[source]
                assert books[source].committed + books[source].rejected == len(self.committed[source])
                assert "damage" not in books[source].dropped

    @invariant()
    def budget_is_kept(self) -> None:
        """The folder is never larger than it may be."""
        if hasattr(self, "journal"):
            size = sum(path.stat().st_size for path in self.folder.glob("*.journal"))
            assert size <= self.options["segments_max"] * SEGMENT_BYTES
            assert self.journal.bytes_used >= size


JournalAgainstList.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestJournal = JournalAgainstList.TestCase
