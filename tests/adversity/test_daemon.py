"""The daemon under blows: afterwards every frame that was journalled is in the database exactly once.

A serial instrument says numbered lines; what the journal holds and what SQL holds are compared frame by frame, by
stamp and by payload. The books that the daemon says at its end have to agree with both.
"""

from __future__ import annotations

import asyncio
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from ingestd.journal.inspection import rejected as rejected_records
from ingestd.store import embedded, migrate
from tests.conftest import psql
from tests.recorder import Instrument, Recorder, frames_of, lines_of, stored, wait_until

BOOKS = re.compile(
    r"books source=(\S+) received=(\d+) committed=(\d+) pending=(\d+) rejected=(\d+) (\S+) balanced=True"
)


@pytest.fixture
def recorder(tmp_path: Path, migrated: str, instrument: Instrument) -> Iterator[Recorder]:
    """A daemon that records the instrument; not started yet."""
    daemon = Recorder(tmp_path, migrated, lines_of(instrument))
    yield daemon
    daemon.close()


def settle(recorder: Recorder, instrument: Instrument) -> dict[str, tuple[int, int, int]]:
    """Let the last lines in, stop the daemon, and read the books that it says: received, committed, rejected."""
    instrument.stop()
    time.sleep(0.3)
    begun = len(recorder.log())
    log = recorder.stop()
    said = {found[1]: tuple(map(int, found.group(2, 3, 4, 5))) for found in BOOKS.finditer(log[begun:])}
    assert said, log
    assert all(pending == 0 for _, _, pending, _ in said.values()), log
    return {source: (received, committed, rejected) for source, (received, committed, _, rejected) in said.items()}


def commits(recorder: Recorder, dsn: str, frames: int) -> None:
    """Wait until SQL holds so many frames more than now."""
    before = sum(stored(dsn).values())
    wait_until(lambda: sum(stored(dsn).values()) >= before + frames, f"{frames} more frames", more=recorder.log)


def assert_exactly_once(recorder: Recorder, dsn: str, books: dict[str, tuple[int, int, int]]) -> None:
    journalled = recorder.journalled()
    assert len(journalled) > 100
    assert max(journalled.values()) == 1
    assert stored(dsn) == journalled
    assert books == {"line": (len(journalled), len(journalled), 0)}


@pytest.mark.slow
def test_killed_again_and_again(recorder: Recorder, instrument: Instrument, migrated: str) -> None:
    """SIGKILL at random moments of capture and of sending; one session, and gaps where nothing was recorded."""
    rng = random.Random(3)
    for _ in range(8):
        begun = len(recorder.log())
        recorder.start()
        recorder.wait_for("link up", after=begun)
        time.sleep(rng.uniform(0.05, 1.0))
        recorder.kill()
    recorder.start()
    commits(recorder, migrated, 50)
    books = settle(recorder, instrument)
    assert_exactly_once(recorder, migrated, books)
    assert psql(migrated, "SELECT count(*), count(ended_utc) FROM sessions") == "1|1"
    gaps = int(psql(migrated, "SELECT count(*) FROM events WHERE kind = 'gap' AND key = 'down'"))
    assert gaps >= 6
    assert int(psql(migrated, "SELECT count(*) FROM feeds")) == 9


@pytest.mark.slow
def test_postgres_away_at_the_start_and_stopped_under_it(
    tmp_path: Path, own_server: Path, instrument: Instrument
) -> None:
    """Started without a database, then it comes, is stopped and started again: nothing is lost or doubled."""
    dsn = embedded.start(own_server)
    embedded.stop(own_server)
    recorder = Recorder(tmp_path, dsn, lines_of(instrument))
    try:
        recorder.start()
        recorder.wait_for("kept in the journal until the database takes it")
        time.sleep(1.0)
        for _ in range(3):
            assert embedded.start(own_server) == dsn
            commits(recorder, dsn, 100)
            embedded.stop(own_server)
            time.sleep(0.7)
        embedded.start(own_server)
        commits(recorder, dsn, 100)
        books = settle(recorder, instrument)
        assert_exactly_once(recorder, dsn, books)
        assert "Traceback" not in recorder.log()
    finally:
        recorder.close()


@pytest.mark.slow
def test_stopped_while_the_database_is_away(tmp_path: Path, own_server: Path, instrument: Instrument) -> None:
    """SIGTERM without a database: the journal keeps what was recorded, and the next start sends it."""
    dsn = embedded.start(own_server)
    embedded.stop(own_server)
    recorder = Recorder(tmp_path, dsn, lines_of(instrument))
    try:
        recorder.start()
        recorder.wait_for("link up")
        time.sleep(1.5)
        said = BOOKS.search(recorder.stop())
        assert said is not None
        assert int(said[4]) == int(said[2]) > 100
        embedded.start(own_server)
        recorder.start()
        commits(recorder, dsn, 100)
        books = settle(recorder, instrument)
        assert_exactly_once(recorder, dsn, books)
        assert psql(dsn, "SELECT count(*), count(ended_utc) FROM sessions") == "2|2"
    finally:
        recorder.close()


@pytest.mark.slow
def test_a_database_without_the_schema_gets_everything_later(
    tmp_path: Path, database: str, instrument: Instrument
) -> None:
    """The daemon says what is missing, keeps what it records, and sends it once `db init` was run."""
    recorder = Recorder(tmp_path, database, lines_of(instrument))
    try:
        recorder.start()
        recorder.wait_for("has no ingestd schema")
        recorder.wait_for("ingestd db init")
        asyncio.run(migrate.upgrade(database))
        commits(recorder, database, 100)
        assert_exactly_once(recorder, database, settle(recorder, instrument))
    finally:
        recorder.close()


@pytest.mark.slow
def test_a_journal_copied_to_another_machine(tmp_path: Path, own_server: Path, instrument: Instrument) -> None:
    """Both machines go on with the journal, and everything that either has recorded is in the database."""
    dsn = embedded.start(own_server)
    one = Recorder(tmp_path, dsn, lines_of(instrument))
    other_folder = tmp_path / "other"
    other_folder.mkdir()
    device = Instrument(other_folder / "instrument")
    other = Recorder(other_folder, dsn, lines_of(device), machine="another")
    try:
        one.start()
        commits(one, dsn, 100)
        embedded.stop(own_server)
        time.sleep(0.5)  # What is recorded now is in both journals and not in the database.
        one.kill()
        shutil.copytree(one.journal, other.journal)
        one.start()
        device.start()
        other.start()
        time.sleep(1.0)
        embedded.start(own_server)
        commits(one, dsn, 200)
        commits(other, dsn, 200)
        settle(one, instrument)
        settle(other, device)
        found, first, second = stored(dsn), one.journalled(), other.journalled()
        assert set(found) == set(first) | set(second)
        shared = set(first) & set(second)
        assert set(first) - shared
        assert set(second) - shared
        assert all(count == 1 for frame, count in found.items() if frame not in shared)
        assert max(found.values()) <= 2
    finally:
        device.close()
        one.close()
        other.close()


@pytest.mark.slow
def test_a_lost_database_is_sent_everything_again(recorder: Recorder, instrument: Instrument, migrated: str) -> None:
    """The database is made anew, empty: what the journal still has is sent again, exactly once, and the books stay."""
    recorder.start()
    commits(recorder, migrated, 100)
    recorder.kill()
    recorder.start()
    commits(recorder, migrated, 100)
    tables = "feeds, sessions, signal_chunks, frame_chunks, signal_groups, events"
    psql(migrated, f"TRUNCATE {tables} CASCADE")
    psql(
        migrated,
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        " WHERE application_name LIKE 'ingestd/%' AND datname = current_database()",
    )
    commits(recorder, migrated, 100)
    books = settle(recorder, instrument)
    assert_exactly_once(recorder, migrated, books)


@pytest.mark.slow
def test_what_postgres_can_never_take_is_set_aside_alone(tmp_path: Path, migrated: str, instrument: Instrument) -> None:
    """Data that the database rejects is halved down to the record at fault; the rest goes in, and the books say it."""
    psql(
        migrated,
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN"
        " IF position('n=200'::bytea IN NEW.data) > 0 THEN RAISE EXCEPTION 'no two hundreds' USING ERRCODE = '22000';"
        " END IF; RETURN NEW; END$$",
        "CREATE TRIGGER refuse BEFORE INSERT ON frame_chunks FOR EACH ROW EXECUTE FUNCTION refuse()",
    )
    recorder = Recorder(tmp_path, migrated, lines_of(instrument))
    try:
        recorder.start()
        wait_until(lambda: instrument.sent > 2100, "two thousand lines")  # The first ones may come before it is open.
        books = settle(recorder, instrument)
        received, committed, rejected = books["line"]
        journalled, found = recorder.journalled(), stored(migrated)
        assert received == len(journalled) == committed + rejected
        assert committed == len(found)
        refused = [frames_of(record) for record, _ in rejected_records(recorder.journal, "", pytest.fail)]
        assert sum(map(len, refused)) == rejected > 0
        assert {frame for frames in refused for frame in frames} == set(journalled) - set(found)
        # A record is what was read at once, so a good line may be in one with a bad line, and only there.
        assert all(any("n=200" in bytes.fromhex(payload).decode() for _, _, payload in frames) for frames in refused)
        assert list(recorder.journal.glob("rejected-*"))
    finally:
        recorder.close()


@pytest.mark.slow
def test_connections_cut_at_any_moment(recorder: Recorder, instrument: Instrument, migrated: str) -> None:
    """Backends terminated again and again, while idle, in COPY and in COMMIT."""
    recorder.start()
    commits(recorder, migrated, 20)
    rng, cut = random.Random(8), 0

    async def terminate() -> int:
        connection = await asyncpg.connect(migrated)
        try:
            return int(
                await connection.fetchval(
                    "SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM pg_stat_activity"
                    " WHERE application_name LIKE 'ingestd/%' AND datname = current_database()"
                )
            )
        finally:
            await connection.close()

    for _ in range(25):
        cut += asyncio.run(terminate())
        time.sleep(rng.uniform(0.0, 0.3))
    assert cut >= 10
    commits(recorder, migrated, 50)
    assert_exactly_once(recorder, migrated, settle(recorder, instrument))


@pytest.mark.slow
def test_a_second_daemon_is_told_who_holds_the_journal(recorder: Recorder, instrument: Instrument) -> None:
    """Two daemons cannot share a journal: the second ends at once with 1 and names the process of the first."""
    recorder.start()
    recorder.wait_for("link up")
    first = recorder.process
    assert first is not None
    recorder.start()
    second = recorder.process
    assert second is not None
    assert second.wait(20) == 1
    assert str(first.pid) in recorder.log()
    assert "Traceback" not in recorder.log()
    recorder.process = first
    assert Counter(recorder.stop().split())["critical"] == 0
