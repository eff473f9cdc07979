"""Connections to PostgreSQL: how they are made, whose a feed is, what becomes of a commit, and looking on meanwhile."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from ingestd import pipeline
from ingestd.errors import FeedError, StoreError, StoreUnavailable
from ingestd.store import writer as writer_module
from ingestd.store.connection import connect, faults
from ingestd.store.privileges import missing_privileges
from ingestd.store.sessions import NewFeed, Session, machine_id, new_session_id, open_catalogue
from ingestd.store.watch import open_watch
from ingestd.store.writer import FeedBatch, Writer
from tests.adversity.conftest import proxy, through
from tests.conftest import as_user, psql
from tests.deliveries import counted, counting, end_connections, make, send, sql, until
from tests.journals import CLOCK, SESSION, frames, open_journal
from tests.torture.proxy import Proxy

__all__ = ["proxy"]  # a fixture of the tests of adversity

NAMED = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'ingestd/test' AND datname = current_database()"


async def begin(dsn: str, feed_id: str) -> None:
    """Record a file's feed, at position 0."""
    feed = NewFeed(feed_id, feed_id, "", {}, "x.log", 0, None, "machine", "0")
    async with open_catalogue(dsn) as catalogue:
        await catalogue.begin(feed, Session(new_session_id(), "x", None, datetime.now(UTC)), None)


async def test_a_connection_is_durable_and_says_who_it_is(migrated: str) -> None:
    """Whatever the database was set to: no commit is acknowledged before it is on the disk."""
    await sql(migrated, "DO $$BEGIN EXECUTE format('ALTER DATABASE %I SET synchronous_commit = off',"
              " current_database()); END$$")  # fmt: skip
    assert await sql(migrated, "SHOW synchronous_commit") == ["off"]
    connection = await connect(migrated, "ingestd/test")
    assert await connection.fetchval("SHOW synchronous_commit") == "on"
    assert await sql(migrated, NAMED) == ["1"]
    connection.terminate()


async def test_an_address_that_cannot_be_parsed(migrated: str) -> None:
    """It is said with what one looks like, and without the password."""
    with pytest.raises(StoreError, match="address of the database cannot be used") as caught:
        await connect("postgresql://u:hush@host:port/x", "ingestd/test")
    assert "postgresql://user@host:5432/name" in caught.value.hint
    assert "hush" not in str(caught.value)


async def test_a_database_without_the_schema_keeps_no_connection(database: str) -> None:
    """What to run is said, and what was opened to find out is closed."""
    with pytest.raises(StoreError, match="has no ingestd schema") as caught:
        await connect(database, "ingestd/test")
    assert caught.value.hint == "run `ingestd db init`"
    await until(lambda: psql(database, NAMED) == "0", "end of the connection")


async def test_a_server_that_does_not_answer_in_time(migrated: str) -> None:
    """A statement has a deadline: then the connection is given up, and the error says that it may pass."""
    connection = await connect(migrated, "ingestd/test")
    with pytest.raises(StoreUnavailable, match=r"did not answer within 0\.2 s"):
        async with faults(migrated, 0.2, on_failure=connection.terminate):
            await connection.execute("SELECT pg_sleep(60)")
    assert connection.is_closed()


async def test_one_writes_a_feed_at_a_time(migrated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A living process keeps its feed, and the second one says where to look; afterwards it is free."""
    monkeypatch.setattr(writer_module, "LOCK_SECONDS_MAX", 0.2)
    first, second = Writer(migrated, "f00d"), Writer(migrated, "f00d")
    await first.open()
    with pytest.raises(FeedError, match="feed f00d is being written by another process") as caught:
        await second.open()
    assert "under the name ingestd/f00d" in caught.value.hint
    assert (repr(first), repr(second)) == ("<Writer ingestd/f00d: open>", "<Writer ingestd/f00d: closed>")
    first.terminate()
    monkeypatch.undo()
    await second.open()
    second.terminate()


async def test_a_file_over_a_network_that_loses_answers(migrated: str, proxy: Proxy) -> None:
    """A commit that went through is not repeated, one that did not is, and the position says which is which."""
    await begin(migrated, "f00d")
    writer = Writer(through(proxy, migrated), "f00d")
    await writer.open()
    again: list[StoreUnavailable] = []
    for position in range(0, 50, 10):
        proxy.lose_answer() if position % 20 else proxy.cut()
        batch = FeedBatch(position, position + 10, (), ())
        await pipeline.commit(writer, batch, patience_seconds=60, on_retry=again.append)
        assert await sql(migrated, "SELECT position FROM feeds") == [str(position + 10)]
    assert proxy.lost_answers == 2
    assert len(again) >= 5
    writer.feed_id = "beef"
    assert await writer.position() is None
    writer.terminate()


async def test_looking_at_a_session_while_it_is_recorded(migrated: str, tmp_path: Path) -> None:
    """Frames since a time; a connection that broke is made anew."""
    journal = open_journal(tmp_path / "journal")
    journal.append_frames(counted(0, 10), CLOCK)
    journal.append_frames(frames(20, 10, "line"), CLOCK)
    delivery = make(journal, migrated)
    delivery.decoders = counting(tmp_path)
    await send(delivery)
    async with open_watch(migrated) as watch:
        assert await watch.frames(SESSION.id, 0) == {"can0": 10, "line": 10}
        assert await watch.frames(SESSION.id, 20_000) == {"line": 10}
        await end_connections(migrated)
        with pytest.raises(StoreUnavailable):
            await watch.frames(SESSION.id, 0)
        assert await watch.frames(new_session_id(), 0) == {}
        watch.close()
    journal.close(ended=False)


@pytest.mark.parametrize("content", [None, "", "0123456789abcdef\n"])
def test_a_machine_has_an_id(monkeypatch: pytest.MonkeyPatch, content: str | None) -> None:
    """Systemd's; where there is none, or a container has left it empty, the network card's address."""

    def read(path: Path, **options: Any) -> str:
        if content is None:
            raise FileNotFoundError(path)
        return content

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr("uuid.getnode", lambda: 0x0242AC110002)
    assert machine_id() == ("0123456789abcdef" if content else "0242ac110002")


async def test_what_a_user_may_not_do_is_named(migrated: str) -> None:
    """As the statements that would help; a user who may do everything lacks nothing."""
    version, _, grants = await missing_privileges(migrated)
    assert psql(migrated, "SHOW server_version") == version
    assert not grants
    role = f"reader_{uuid4().hex}"
    psql(migrated, f"CREATE ROLE {role} LOGIN", f"GRANT SELECT, INSERT ON ALL TABLES IN SCHEMA public TO {role}")
    try:
        _, user, grants = await missing_privileges(as_user(migrated, role))
    finally:
        psql(migrated, f"DROP OWNED BY {role}", f"DROP ROLE {role}")
    assert user == role
    execute = f"GRANT EXECUTE ON FUNCTION forget_empty_imports(text) TO {role}"
    assert grants == [f"GRANT UPDATE ON feeds TO {role}", f"GRANT UPDATE ON sessions TO {role}", execute]
