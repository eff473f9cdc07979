"""More comes than goes out: the journal's policy decides what is dropped, memory stays bounded, the books say it all.

A few seconds here; INGESTD_TEST_OVERLOAD_SECONDS makes it as long as one likes. CAN at rates that a kernel cannot hold
is in tests/can_bus/test_overload.py.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.books import Said, assert_books, in_metrics, in_status, number_in, settle
from tests.conftest import psql
from tests.recorder import Instrument, Recorder, lines_of, wait_until

SECONDS = float(os.environ.get("INGESTD_TEST_OVERLOAD_SECONDS", "8"))
JOURNAL_BYTES = 512 << 10
FILLER = b"." * 600
NOTHING = Said(0, 0, 0, 0)
MEMORY_BYTES_MAX = 60_000_000  # more than there was when the overload began: a batch, as columns and as rows
# A journal that is full within seconds. The configuration allows none so small.
SMALL_JOURNAL = f"""
from ingestd.daemon import service
opened = service.Journal.open
def small(*arguments, **options):
    return opened(*arguments, **{{**options, "segment_bytes": 65536, "max_bytes": {JOURNAL_BYTES}}})
service.Journal.open = small
"""
# A disk on which every write takes 20 ms and every sync two seconds. Devices that are so slow for real need a kernel of
# our own: tests/can_bus/test_overload.py, tests/disk.
SLOW_DISK = """
import os, time
write, sync = os.pwrite, os.fdatasync
def slow_write(*arguments):
    time.sleep(0.02)
    return write(*arguments)
def slow_sync(*arguments):
    time.sleep(2)
    return sync(*arguments)
os.pwrite, os.fdatasync = slow_write, slow_sync
"""
# A server that takes fifty lines a second.
SLOW_DATABASE = (
    "CREATE FUNCTION take_long() RETURNS trigger LANGUAGE plpgsql AS"
    " $$BEGIN PERFORM pg_sleep(NEW.frame_count * 0.02); RETURN NEW; END$$",
    "CREATE TRIGGER take_long BEFORE INSERT ON frame_chunks FOR EACH ROW EXECUTE FUNCTION take_long()",
)


class Memory:
    """The most memory that a process has had, looked at ten times a second."""

    def __init__(self, pid: int) -> None:
        self._path = Path(f"/proc/{pid}/status")
        self._stop = threading.Event()
        self.first = self.most = self.now()

    def now(self) -> int:
        [line] = [line for line in self._path.read_text().splitlines() if line.startswith("VmRSS")]
        return int(line.split()[1]) << 10

    @contextmanager
    def watched(self) -> Iterator[None]:
        def watch() -> None:
            while not self._stop.wait(0.1):
                self.most = max(self.most, self.now())

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()


def number_in_whole(payload: bytes) -> int | None:
    """The number of a line, unless the device was silenced in the middle of it."""
    return number_in(payload) if payload.endswith(FILLER) else None


def bytes_of(folder: Path) -> int:
    """Of its files, some of which may go while we look."""
    total = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["drop-oldest", "drop-newest"])
def test_a_database_slower_than_the_sources(tmp_path: Path, migrated: str, policy: str) -> None:
    """The journal is full for seconds: its size and the memory are bounded, what was dropped is told to the frame."""
    line = Instrument(tmp_path / "line", filler=FILLER)
    recorder = Recorder(tmp_path, migrated, lines_of(line), journal=f'when_full = "{policy}"', changes=SMALL_JOURNAL)
    try:
        recorder.start()
        recorder.wait_for("the database takes data")
        psql(migrated, *SLOW_DATABASE)
        assert recorder.process is not None
        memory, until = Memory(recorder.process.pid), time.monotonic() + SECONDS
        line.start()
        wait_until(lambda: bool(in_metrics(recorder).get("line", NOTHING).dropped), "first loss", more=recorder.log)
        with memory.watched():
            while time.monotonic() < until:
                assert bytes_of(recorder.journal) <= JOURNAL_BYTES
                assert in_metrics(recorder)["line"].is_balanced
                time.sleep(0.2)
        assert in_metrics(recorder)["line"].pending > 0
        psql(migrated, "DROP TRIGGER take_long ON frame_chunks")
        assert memory.most - memory.first < MEMORY_BYTES_MAX
        sent = line.stop()
        settle(recorder)
        # What was refused while the journal was full becomes an event every ten seconds.
        wait_until(lambda: in_metrics(recorder) == in_status(recorder), "record of what was refused", more=recorder.log)
        books = assert_books(recorder, migrated, {"line": sent}, number=number_in_whole)
        assert books["line"].dropped["budget"] > 0
        assert set(books["line"].dropped) == {"budget"}
        assert books["line"].rejected == 0
    finally:
        recorder.close()
        line.close()


@pytest.mark.slow
def test_a_disk_slower_than_the_sources(tmp_path: Path, migrated: str) -> None:
    """What the port's own buffer holds meanwhile is not lost: all of it is recorded and sent, in little memory."""
    line = Instrument(tmp_path / "line", pause_s=0.0005, filler=FILLER)
    recorder = Recorder(tmp_path, migrated, lines_of(line), changes=SLOW_DISK)
    try:
        recorder.start()
        recorder.wait_for("the database takes data")
        assert recorder.process is not None
        memory, until = Memory(recorder.process.pid), time.monotonic() + SECONDS
        with memory.watched():
            line.start()
            wait_until(lambda: time.monotonic() > until, "end of the overload", SECONDS + 10)
            line.stop()
            settle(recorder)
        books = assert_books(recorder, migrated, {"line": line.sent}, number=number_in_whole)
        assert not books["line"].dropped
        assert books["line"].committed >= line.sent > 100
        assert memory.most - memory.first < MEMORY_BYTES_MAX
    finally:
        recorder.close()
        line.close()
