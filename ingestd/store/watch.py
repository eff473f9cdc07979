"""Looking at what is being recorded: how many frames are stored.

One connection of its own, so that a look never waits for a commit; use `open_watch`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import asyncpg

from ingestd.store.connection import connect, faults

LOOK_SECONDS_MAX = 10.0


class Watch:
    """Looks when asked to. A connection that broke is made anew by the next look."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._connection: asyncpg.Connection | None = None

    async def frames(self, session_id: UUID, from_mono_ns: int) -> dict[str, int]:
        """Stored raw frames by source, of chunks that begin at or after a time: of a session, and of those that came
        after it before the computer was started again."""
        rows = await self._fetch(
            "SELECT c.source, sum(c.frame_count)::bigint FROM frame_chunks c JOIN sessions s ON s.id = c.session_id"
            " WHERE s.id >= $1 AND s.time_base = (SELECT time_base FROM sessions WHERE id = $1)"
            " AND c.mono_start_ns >= $2 GROUP BY c.source",
            session_id,
            from_mono_ns,
        )
        return {row[0]: row[1] for row in rows}

    async def connect(self) -> None:
        """Connect now. Raises StoreError if there is no schema, StoreUnavailable if there is no server."""
        self._connection = await connect(self._dsn, "ingestd/watch")

    def close(self) -> None:
        """Look no more."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    async def _fetch(self, query: str, *arguments: Any) -> list[asyncpg.Record]:
        if self._connection is None:
            await self.connect()
        assert self._connection is not None
        async with faults(self._dsn, LOOK_SECONDS_MAX, on_failure=self.close):
            rows: list[asyncpg.Record] = await self._connection.fetch(query, *arguments)
        return rows


@asynccontextmanager
async def open_watch(dsn: str) -> AsyncIterator[Watch]:
    """Connect. Raises StoreError if there is no schema, StoreUnavailable if there is no server."""
    watch = Watch(dsn)
    await watch.connect()
    try:
        yield watch
    finally:
        watch.close()
