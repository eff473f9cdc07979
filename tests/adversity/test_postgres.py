"""A server that is killed, comes back empty, or comes back older: what the journal has is there again, exactly once."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest

from ingestd.journal import Kind
from ingestd.store import embedded, migrate
from tests.books import assert_books, in_metrics, journal_records, removed_segments, settle
from tests.conftest import on_database, psql
from tests.recorder import Instrument, Recorder, lines_of, stored, wait_until

TABLES = "feeds, sessions, signal_chunks, frame_chunks, signal_groups, events"
# The daemon dies of its first commit: acknowledged, and nothing more.
DIES_AFTER_COMMIT = """
import os, signal
from ingestd.journal import Journal
acknowledge = Journal.acknowledge
def dies(*arguments):
    acknowledge(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
Journal.acknowledge = dies
"""
# A journal that is full within a second. The configuration allows none so small.
SMALL_JOURNAL = """
from ingestd.daemon import service
opened = service.Journal.open
def small(*arguments, **options):
    return opened(*arguments, **{**options, "segment_bytes": 65536, "max_bytes": 8 * 65536})
service.Journal.open = small
"""


@pytest.fixture
def recorder(tmp_path: Path, migrated: str, instrument: Instrument) -> Iterator[Recorder]:
    daemon = Recorder(tmp_path, migrated, lines_of(instrument))
    yield daemon
    daemon.close()


def record(recorder: Recorder, dsn: str, frames: int = 100) -> None:
    """Wait until SQL holds so many frames more than now."""
    before = sum(stored(dsn).values())
    wait_until(lambda: sum(stored(dsn).values()) >= before + frames, f"{frames} more frames", more=recorder.log)


@pytest.mark.slow
def test_killed_while_an_empty_database_is_filled_again(
    recorder: Recorder, instrument: Instrument, migrated: str
) -> None:
    """Older stretches are not taken for deleted ones by a process that finds the newest in the database already."""
    for _ in range(3):
        recorder.start()
        record(recorder, migrated)
        recorder.kill()
    had = sum(stored(migrated).values())
    psql(migrated, f"TRUNCATE {TABLES} CASCADE")
    recorder.changes = DIES_AFTER_COMMIT
    for _ in range(2):
        recorder.start()
        assert recorder.process is not None
        assert recorder.process.wait(60) == -signal.SIGKILL
        recorder.process = None
    assert 0 < sum(stored(migrated).values()) < had
    recorder.changes = ""
    recorder.start()
    record(recorder, migrated)
    assert_books(recorder, migrated, {"line": instrument.stop()})


@pytest.mark.slow
def test_failover_to_an_empty_server(tmp_path: Path, own_server: Path) -> None:
    """Every frame in segments at hand is there again, once; those that are gone are told: where, and how many."""
    line = Instrument(tmp_path / "line", filler=b"." * 600)
    dsn = embedded.start(own_server)
    recorder = Recorder(tmp_path, dsn, lines_of(line), changes=SMALL_JOURNAL)
    try:
        recorder.start()
        line.start()
        recorder.wait_for("the database takes data")
        wait_until(lambda: removed_segments(recorder) > 3, "segments that had to make room", more=recorder.log)
        record(recorder, dsn)
        embedded.stop(own_server)
        shutil.rmtree(own_server)
        assert embedded.start(own_server) == dsn
        asyncio.run(migrate.upgrade(dsn))
        record(recorder, dsn)
        line.stop()
        settle(recorder)
        books = in_metrics(recorder)["line"]
        recorder.stop()
        assert books.is_balanced
        assert not books.pending
        found, at_hand = stored(dsn), recorder.journalled()
        assert max(found.values()) == max(at_hand.values()) == 1
        assert set(at_hand) <= set(found)
        gone = "SELECT coalesce(sum((payload ->> 'frames')::int), 0) FROM events WHERE kind = 'gap' AND key = '{}'"
        restored, budget = (int(psql(dsn, gone.format(key))) for key in ("restored", "budget"))
        assert restored > 0
        assert budget == books.dropped.get("budget", 0), "what came while there was no server, and found no room"
        assert restored + budget == books.received - len(found)
        assert "the database lacks what it had" in recorder.log()
        assert "neither the database nor the journal has them any more source=line" in recorder.log()
    finally:
        recorder.close()
        line.close()


@pytest.mark.slow
def test_a_restored_backup(recorder: Recorder, instrument: Instrument, migrated: str, postgres_server: str) -> None:
    """What a backup has is not doubled; what it lacks is sent again, whole stretches and the end of one; it is said."""
    name = urlsplit(migrated).path.removeprefix("/")
    elsewhere = on_database(postgres_server, "postgres")
    end_all = f"SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = '{name}'"
    closed, opened = (f"ALTER DATABASE {name} ALLOW_CONNECTIONS {allowed}" for allowed in ("false", "true"))
    try:
        for number in range(3):
            recorder.start()
            record(recorder, migrated)
            if number == 1:  # In the middle of the second stretch, while it is recorded.
                psql(elsewhere, closed, end_all, f"CREATE DATABASE {name}_backup TEMPLATE {name}", opened)
                record(recorder, migrated)
            recorder.kill()
        had = sum(stored(migrated).values())
        psql(elsewhere, f"DROP DATABASE {name} WITH (FORCE)", f"ALTER DATABASE {name}_backup RENAME TO {name}", opened)
        assert 100 <= sum(stored(migrated).values()) <= had - 200
        recorder.start()
        record(recorder, migrated, 200)
        assert_books(recorder, migrated, {"line": instrument.stop()})
        restored = [record.event() for record in journal_records(recorder.journal, Kind.EVENT)]
        feeds = {event.key for event in restored if event.kind == "database_restored"}
        assert len(feeds) == 2, "the second stretch and the third, and not the first, which was whole"
    finally:
        psql(elsewhere, f"DROP DATABASE IF EXISTS {name}_backup WITH (FORCE)")


@pytest.mark.slow
def test_a_server_that_commits_asynchronously_is_killed(
    tmp_path: Path, own_server: Path, instrument: Instrument
) -> None:
    """What was acknowledged is durable whatever the server says by default: all of it dies, and nothing is lost."""
    dsn = embedded.start(own_server)
    psql(dsn, "ALTER SYSTEM SET synchronous_commit = off", "ALTER SYSTEM SET wal_writer_delay = '10s'",
         "SELECT pg_reload_conf()")  # fmt: skip
    recorder = Recorder(tmp_path, dsn, lines_of(instrument))
    try:
        recorder.start()
        for _ in range(4):
            record(recorder, dsn, 50)
            kill_server(own_server)
            assert embedded.start(own_server) == dsn
        record(recorder, dsn, 50)
        assert_books(recorder, dsn, {"line": instrument.stop()})
        assert "the database lacks what it had" not in recorder.log()
        assert asyncio.run(default_of(dsn)) == "off"
    finally:
        recorder.close()


def kill_server(folder: Path) -> None:
    """SIGKILL for every process of it, and wait until all are gone."""
    server = int((folder / "postmaster.pid").read_text().split()[0])
    said = subprocess.run(["ps", "-o", "pid=", "--ppid", str(server)], check=False, capture_output=True, text=True)
    for pid in [server, *map(int, said.stdout.split())]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        wait_until(lambda pid=pid: not _is_alive(pid), f"end of process {pid}")  # type: ignore[misc]


def _is_alive(pid: int) -> bool:
    """A zombie is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def default_of(dsn: str) -> str:
    connection = await asyncpg.connect(dsn)
    try:
        return str(await connection.fetchval("SHOW synchronous_commit"))
    finally:
        await connection.close()
