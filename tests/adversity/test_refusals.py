"""PostgreSQL refuses, for whatever reason: everything is kept, the reason is said once, and it goes on by itself.

The daemon is a user without privileges of its own, as it should be in a garage; the refusals are made by the owner.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import pytest

from ingestd.store import embedded, migrate
from tests.books import assert_books, in_metrics, metric
from tests.conftest import on_database, psql
from tests.recorder import Instrument, Recorder, lines_of, stored, wait_until

SHORT_STALL = "import ingestd.store.writer as writer; writer.STALL_SECONDS_MAX = 1.0"


@dataclass(frozen=True, slots=True)
class Case:
    """The database of a test: as its owner sees it, as the daemon does, and another one of the same server."""

    dsn: str
    daemons_dsn: str
    elsewhere: str
    user: str
    template: str

    @property
    def name(self) -> str:
        return urlsplit(self.dsn).path.removeprefix("/")

    def cut(self) -> None:
        """End the daemon's connections: most settings are for new ones alone."""
        psql(
            self.elsewhere,
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            f" WHERE application_name LIKE 'ingestd/%' AND datname = '{self.name}'",
        )

    @contextmanager
    def changed(self, change: str, back: str) -> Iterator[None]:
        """A statement about the database or the role in force, and its opposite behind it."""
        psql(self.elsewhere, change.format(name=self.name, user=self.user))
        self.cut()
        yield
        psql(self.elsewhere, back.format(name=self.name, user=self.user))

    @contextmanager
    def held(self, statement: str) -> Iterator[None]:
        """A transaction of somebody else's, open while inside."""
        arguments = [str(embedded.psql_path()), "-XqAt", "-v", "ON_ERROR_STOP=1", "-d", self.dsn]
        with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"BEGIN;\n{statement};\nSELECT 'it holds';\n")
            process.stdin.flush()
            while "it holds" not in (line := process.stdout.readline()):
                assert line, "the lock was not taken"
            yield
            process.stdin.close()
            assert process.wait(60) == 0


@pytest.fixture
def case(migrated: str, migrated_template: str, postgres_server: str) -> Iterator[Case]:
    user = f"recorder_{uuid4().hex[:8]}"
    psql(migrated, f"CREATE ROLE {user} LOGIN PASSWORD 'first gear'")
    grant(migrated, user)
    parts = urlsplit(migrated)
    as_user = urlunsplit(parts._replace(netloc=f"{user}@{parts.netloc.rpartition('@')[2]}"))
    yield Case(migrated, as_user, on_database(postgres_server, "postgres"), user, migrated_template)
    psql(migrated, f"DROP OWNED BY {user} CASCADE", f"DROP ROLE {user}")


def grant(dsn: str, user: str) -> None:
    psql(dsn, f"GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA public TO {user}")


@contextmanager
def older_schema(case: Case) -> Iterator[None]:
    asyncio.run(migrate.downgrade(case.dsn, "-1"))
    case.cut()
    yield
    asyncio.run(migrate.upgrade(case.dsn))
    grant(case.dsn, case.user)


@contextmanager
def newer_schema(case: Case) -> Iterator[None]:
    psql(case.dsn, f"UPDATE {migrate.VERSION_TABLE} SET version_num = '9999'")
    case.cut()
    yield
    psql(case.dsn, f"UPDATE {migrate.VERSION_TABLE} SET version_num = '{migrate.head()}'")


@contextmanager
def revoked_insert(case: Case) -> Iterator[None]:
    psql(case.dsn, f"REVOKE INSERT ON frame_chunks FROM {case.user}")
    yield
    psql(case.dsn, f"GRANT INSERT ON frame_chunks TO {case.user}")


@contextmanager
def revoked_update(case: Case) -> Iterator[None]:
    psql(case.dsn, f"REVOKE UPDATE ON feeds FROM {case.user}")
    yield
    psql(case.dsn, f"GRANT UPDATE ON feeds TO {case.user}")


def revoked_connect(case: Case) -> AbstractContextManager[None]:
    return case.changed("REVOKE CONNECT ON DATABASE {name} FROM PUBLIC", "GRANT CONNECT ON DATABASE {name} TO PUBLIC")


def read_only(case: Case) -> AbstractContextManager[None]:
    return case.changed(
        "ALTER DATABASE {name} SET default_transaction_read_only = on",
        "ALTER DATABASE {name} RESET default_transaction_read_only",
    )


def no_connections(case: Case) -> AbstractContextManager[None]:
    return case.changed("ALTER ROLE {user} CONNECTION LIMIT 0", "ALTER ROLE {user} CONNECTION LIMIT -1")


@contextmanager
def table_locked(case: Case) -> Iterator[None]:
    with case.held("LOCK TABLE frame_chunks IN ACCESS EXCLUSIVE MODE"):
        yield


@contextmanager
def feed_locked(case: Case) -> Iterator[None]:
    with case.held("SELECT position FROM feeds FOR UPDATE"):
        yield


@contextmanager
def lock_timeout(case: Case) -> Iterator[None]:
    with (
        case.changed("ALTER DATABASE {name} SET lock_timeout = '50ms'", "ALTER DATABASE {name} RESET lock_timeout"),
        case.held("LOCK TABLE frame_chunks IN SHARE MODE"),
    ):
        yield


@contextmanager
def dropped(case: Case) -> Iterator[None]:
    psql(case.elsewhere, f"DROP DATABASE {case.name} WITH (FORCE)")
    yield
    psql(case.elsewhere, f"CREATE DATABASE {case.name} TEMPLATE {case.template}")
    grant(case.dsn, case.user)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A way to refuse, and what the log says of it and of what to do."""

    of: Callable[[Case], AbstractContextManager[None]]
    says: str
    hint: str
    changes: str = ""


REFUSALS = {
    "a schema that is older": Refusal(older_schema, "older than this ingestd", "run `ingestd db upgrade`"),
    "a schema that is newer": Refusal(newer_schema, "a newer one made it", "upgrade ingestd"),
    "no INSERT": Refusal(revoked_insert, "no permission", "ingestd db grant"),
    "no UPDATE": Refusal(revoked_update, "no permission", "ingestd db grant"),
    "no CONNECT": Refusal(revoked_connect, "no permission", "ingestd db grant"),
    "read-only": Refusal(read_only, "is read-only", "is it a standby?"),
    "too many connections": Refusal(no_connections, "has too many connections", "raise max_connections"),
    "a locked table": Refusal(table_locked, "did not answer within 1 s", "", SHORT_STALL),
    "a locked feed": Refusal(feed_locked, "did not answer within 1 s", "", SHORT_STALL),
    "lock_timeout": Refusal(lock_timeout, "is locked", ""),
    "dropped": Refusal(dropped, "does not exist", "create it"),
}


def refused_and_cured(
    recorder: Recorder, instrument: Instrument, dsn: str, refusal: AbstractContextManager[None], says: str, hint: str
) -> None:
    """Record into a database that works, then refuses, then works, and look at everything that can be seen of it."""
    recorder.start()
    wait_until(lambda: len(stored(dsn)) > 20, "first frames", more=recorder.log)
    begun = len(recorder.log())
    with refusal:
        recorder.wait_for(says, after=begun)
        wait_until(lambda: metric(recorder, "ingestd_database_up") == 0, "database_up 0", more=recorder.log)
        received = in_metrics(recorder)["line"].received
        wait_until(lambda: in_metrics(recorder)["line"].received > received + 200, "recording", more=recorder.log)
        assert in_metrics(recorder)["line"].pending > 0
        said = [line for line in recorder.log()[begun:].splitlines() if says in line]
    # Once; PostgreSQL itself may add for a moment that the database is only just gone.
    assert len({line.partition(" ")[2] for line in said}) == len(said) <= 2, recorder.log()[begun:]
    assert hint in said[0]
    wait_until(lambda: metric(recorder, "ingestd_database_up") == 1, "database_up 1", more=recorder.log)
    # A connection that is cut and a database that is gone tell of it in words of their own, once each.
    assert recorder.log()[begun:].count("kept in the journal") <= 4, recorder.log()[begun:]
    instrument.stop()
    books = assert_books(recorder, dsn, {"line": instrument.sent})
    assert books["line"].rejected == 0
    assert not books["line"].dropped
    assert "Traceback" not in recorder.log()


@pytest.mark.slow
@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_what_is_refused_is_kept(tmp_path: Path, case: Case, instrument: Instrument, refusal: Refusal) -> None:
    """Said once with what to do, recording goes on, nothing is rejected, and committing resumes when it is mended."""
    recorder = Recorder(tmp_path, case.daemons_dsn, lines_of(instrument), changes=refusal.changes)
    try:
        refused_and_cured(recorder, instrument, case.dsn, refusal.of(case), refusal.says, refusal.hint)
    finally:
        recorder.close()


@pytest.mark.slow
def test_the_servers_disk_is_full(tmp_path: Path, small_database: tuple[str, Path], instrument: Instrument) -> None:
    """The database's own small disk is filled by somebody else: the same, and all goes in when there is room again."""
    dsn, mount = small_database

    @contextmanager
    def full() -> Iterator[None]:
        with (mount / "somebody else's").open("wb", buffering=0) as file:
            with contextlib.suppress(OSError):  # which is how it ends
                while True:
                    file.write(bytes(1 << 16))
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(1 << 12))
        yield
        (mount / "somebody else's").unlink()

    recorder = Recorder(tmp_path, dsn, lines_of(instrument))
    try:
        refused_and_cured(recorder, instrument, dsn, full(), "disk is full", "free space on the server")
    finally:
        recorder.close()
