"""Looking at a session while it is being recorded: the latest values, and how many frames are stored.

One connection of its own, so that a look never waits for a commit; use `open_watch`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import asyncpg

from ingestd.store.connection import connect, faults


@dataclass(frozen=True, slots=True)
class Latest:
    """The newest stored sample of a channel."""

    value_num: float | None
    value_text: str | None
    unit: str | None
    ts_utc: datetime


class Watch:
    """A connection that only looks."""

    def __init__(self, dsn: str, connection: asyncpg.Connection) -> None:
        self._dsn = dsn
        self._connection = connection

    async def latest(self, session_id: UUID) -> dict[tuple[str, str], Latest]:
        """By source and channel. The source of a signal may name its sender too, as in `gps/GN`."""
        async with faults(self._dsn):
            rows = await self._connection.fetch(
                "SELECT source, channel, value_num, value_text, unit, ts_utc FROM latest_signals($1)", session_id
            )
        return {(source, channel): Latest(*rest) for source, channel, *rest in rows}

    async def frames(self, session_id: UUID, from_mono_ns: int) -> dict[str, int]:
        """Stored raw frames by source, of chunks that begin at or after a time."""
        async with faults(self._dsn):
            rows = await self._connection.fetch(
                "SELECT source, sum(frame_count)::bigint FROM frame_chunks"
                " WHERE session_id = $1 AND mono_start_ns >= $2 GROUP BY source",
                session_id,
                from_mono_ns,
            )
        return {row[0]: row[1] for row in rows}


@asynccontextmanager
async def open_watch(dsn: str) -> AsyncIterator[Watch]:
    """Connect. Raises StoreError if there is no schema, StoreUnavailable if there is no server."""
    connection = await connect(dsn, "ingestd/watch")
    try:
        yield Watch(dsn, connection)
    finally:
        connection.terminate()
