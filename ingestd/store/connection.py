"""Connect to PostgreSQL the way a recorder must: bounded in time, durable, and visible by name.

Invariants of a connection made here: it says who it is (`application_name`), a dead peer is noticed within half a
minute, a transaction that was left open is ended by the server, commits are durable even where a role or server says
otherwise, and long values are compressed with lz4 where the server has it.

The caller ends it with `terminate()`, never `close()`: closing waits for the peer, and the peer may be dead.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import asyncpg

from ingestd.errors import StoreUnavailable
from ingestd.store.faults import translate
from ingestd.store.migrate import check
from ingestd.store.tls import check_files

CONNECT_SECONDS_MAX = 10.0
STATEMENT_SECONDS_MAX = 60.0

SETTINGS = {
    "synchronous_commit": "on",
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "idle_in_transaction_session_timeout": "30s",
}

# What asyncpg raises. InternalClientError is a connection that was cut in the middle of an operation (met in the tests
# that terminate backends: "cannot switch to state …").
DRIVER_ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)

# pglz, the default, costs three times the server's time; not every server is built with lz4.
PREFER_LZ4 = """
SELECT set_config('default_toast_compression', 'lz4', false)
FROM pg_settings WHERE name = 'default_toast_compression' AND 'lz4' = ANY (enumvals)
"""


async def connect(dsn: str, name: str) -> asyncpg.Connection:
    """Open a connection called `name` in pg_stat_activity (63 bytes at most).

    Raises StoreUnavailable, or StoreError if the database refuses us or its schema is not the one we need.
    """
    async with faults(dsn, CONNECT_SECONDS_MAX):
        check_files(dsn)
        try:
            connection = await asyncpg.connect(
                dsn, timeout=CONNECT_SECONDS_MAX, server_settings={"application_name": name, **SETTINGS}
            )
        except (ValueError, OverflowError) as error:  # a DSN that asyncpg cannot parse; a port beyond 65535
            raise translate(error, dsn) from error
        try:
            await connection.execute(PREFER_LZ4)
            await check(dsn, connection)
        except BaseException:
            connection.terminate()
            raise
        return connection


@asynccontextmanager
async def faults(
    dsn: str, seconds_max: float = STATEMENT_SECONDS_MAX, on_failure: Callable[[], None] | None = None
) -> AsyncIterator[asyncio.Timeout]:
    """Give what is awaited inside a deadline and translate what goes wrong into the errors of this project.

    The deadline is yielded: what makes progress may put it off.
    """
    try:
        async with asyncio.timeout(seconds_max) as deadline:
            yield deadline
    except BaseException as error:
        if on_failure is not None:
            on_failure()
        if isinstance(error, TimeoutError):
            raise StoreUnavailable(f"PostgreSQL did not answer within {seconds_max:g} s") from error
        if isinstance(error, DRIVER_ERRORS):
            raise translate(error, dsn) from error
        raise
