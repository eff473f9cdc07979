"""The schema of the database: making it, bringing it up to date, and telling whether it is.

Alembic does the bookkeeping, over asyncpg, configured here alone. Invariants:

- One call is one transaction: a migration that fails half-way leaves nothing, neither do those before it.
- Two processes that migrate the same database take turns (an advisory lock that ends with the transaction).
- The version is kept in a table of our own, so that a database can be shared with an application that uses Alembic too.

A DSN is what asyncpg takes: `postgresql://…`, a Unix socket as `?host=/folder`, PG* variables and the password file.
Every function raises StoreError or StoreUnavailable, with a hint.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg

from ingestd.errors import StoreError
from ingestd.store.dsn import place
from ingestd.store.faults import translate
from ingestd.store.tls import check_files

# Alembic and SQLAlchemy are imported where they are used: it takes 0.3 s, and most commands only check the revision.
if TYPE_CHECKING:
    from alembic.config import Config
    from sqlalchemy import Connection

VERSION_TABLE = "ingestd_version"
# Where somebody else sees it: to_regclass does not tell what this user has no USAGE of from what is not there.
UNSEEN = f"""
SELECT relnamespace::regnamespace::text FROM pg_class
WHERE relname = '{VERSION_TABLE}' AND relkind = 'r' AND NOT pg_table_is_visible(oid)
"""
LOCK_KEY = 0x696E67657374  # "ingest"; any number that nobody else locks.
CONNECT_SECONDS_MAX = 10.0


@dataclass(frozen=True, slots=True)
class Revision:
    """One step of the schema's history."""

    id: str
    description: str


def _shipped(name: str) -> Path:
    """A file of ours: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / name
    return inside if inside.exists() else package.parent / name


def schema_path() -> Path:
    """The whole schema as one commented SQL file."""
    return _shipped("schema.sql")


def _scripts(scripts: Path | None) -> Path:
    return scripts or _shipped("migrations")


def _revisions(scripts: Path | None) -> list[str]:
    """The revisions in order, by the names of their files: 0001_initial.py is revision 0001 (a test keeps it so)."""
    return sorted(path.name.partition("_")[0] for path in (_scripts(scripts) / "versions").glob("[0-9]*_*.py"))


def _config(scripts: Path | None) -> Config:
    from alembic.config import Config

    config = Config()
    # configparser takes a percent sign for the beginning of a reference.
    config.set_main_option("script_location", str(_scripts(scripts)).replace("%", "%%"))
    return config


def head(scripts: Path | None = None) -> str:
    """The revision this release of ingestd works with."""
    revisions = _revisions(scripts)
    if not revisions:
        raise StoreError("this installation of ingestd has no migrations", "install it again")
    return revisions[-1]


def history(scripts: Path | None = None) -> list[Revision]:
    """All revisions, the oldest first."""
    from alembic.script import ScriptDirectory

    walk = ScriptDirectory.from_config(_config(scripts)).walk_revisions()
    return [Revision(script.revision, script.doc) for script in reversed(list(walk))]


async def upgrade(dsn: str, revision: str = "head", *, scripts: Path | None = None) -> None:
    """Bring the schema up to `revision`; nothing happens if it is there. `scripts`: other migrations, for tests."""
    from alembic import command

    await _run(dsn, scripts, lambda config: command.upgrade(config, revision))


async def downgrade(dsn: str, revision: str, *, scripts: Path | None = None) -> None:
    """Take the schema back to `revision` ("base" for nothing at all, "-1" for one step); what it held is lost."""
    from alembic import command

    await _run(dsn, scripts, lambda config: command.downgrade(config, revision))


async def current(dsn: str) -> str | None:
    """The revision of the database, or None if it has no schema of ours."""
    async with _connection(dsn) as connection:
        return await _current(connection)


async def _current(connection: asyncpg.Connection) -> str | None:
    if await connection.fetchval("SELECT to_regclass($1)", VERSION_TABLE) is None:
        return None
    version: str | None = await connection.fetchval(f"SELECT version_num FROM {VERSION_TABLE}")
    return version


async def check(dsn: str, connection: asyncpg.Connection | None = None) -> None:
    """Raise StoreError, naming the command that helps, unless the schema is the one this release works with.

    `connection` is an open one to `dsn`, to spare making another.
    """
    if connection is None:
        async with _connection(dsn) as own:
            await check(dsn, own)
        return
    found, expected = await _current(connection), head()
    if found == expected:
        return
    where = place(dsn)
    if found is None and (schema := await connection.fetchval(UNSEEN)) is not None:
        raise StoreError(
            f"the schema of {where} is in {schema}, where this user does not look or may not",
            "as owner: `ingestd db grant`; and its search_path has to name it: ALTER ROLE … SET search_path",
        )
    if found is None:
        raise StoreError(f"the database {where} has no ingestd schema", "run `ingestd db init`")
    if found in _revisions(None):
        raise StoreError(
            f"the schema of {where} is at revision {found}, older than this ingestd, which needs {expected}",
            "run `ingestd db upgrade`",
        )
    raise StoreError(
        f"the schema of {where} is at revision {found}, which this ingestd does not know: a newer one made it",
        "upgrade ingestd",
    )


@asynccontextmanager
async def _connection(dsn: str) -> AsyncIterator[Any]:
    check_files(dsn)
    try:
        connection = await asyncpg.connect(dsn, timeout=CONNECT_SECONDS_MAX)
        try:
            yield connection
        finally:
            await connection.close(timeout=CONNECT_SECONDS_MAX)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, ValueError, OverflowError) as error:
        raise translate(error, dsn) from error


async def _run(dsn: str, scripts: Path | None, work: Callable[[Config], None]) -> None:
    from alembic.util import CommandError
    from sqlalchemy.exc import SQLAlchemyError
    from sqlalchemy.ext.asyncio import create_async_engine
    from sqlalchemy.pool import NullPool

    check_files(dsn)
    config = _config(scripts)
    config.attributes["version_table"] = VERSION_TABLE

    def within(connection: Connection) -> None:
        config.attributes["connection"] = connection
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK_KEY})")
        work(config)

    # SQLAlchemy would parse the DSN in its own way; asyncpg's is the one that the rest of ingestd uses.
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=lambda: asyncpg.connect(dsn, timeout=CONNECT_SECONDS_MAX),
        poolclass=NullPool,
    )
    try:
        async with engine.begin() as connection:
            await connection.run_sync(within)
    except CommandError as error:
        raise StoreError(
            f"the schema of {place(dsn)} cannot be migrated: {error}", "see `ingestd db history`"
        ) from error
    except (
        SQLAlchemyError,
        asyncpg.PostgresError,
        asyncpg.InterfaceError,
        OSError,
        ValueError,
        OverflowError,
    ) as error:
        raise translate(error, dsn) from error
    finally:
        await engine.dispose()
