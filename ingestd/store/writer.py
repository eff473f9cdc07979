"""Write one feed into PostgreSQL, exactly once.

The promise rests on one transaction: chunks are copied, and its last statement moves the feed's position from where
this process knows it to be to behind the chunks. Either both are committed or neither is. A commit whose answer never
came is settled by reading the position back: it is the old one or the new one. Anything else means that somebody else
writes this feed, or that this is another or an older database; then nothing more is written.

Limits: one writer for a feed (an advisory lock sees to it), one transaction at a time. After any failure the
connection is terminated; `open` makes a new one. Signal groups are inserted in a transaction of their own, before the
chunks that need them: a group without chunks does no harm, and two writers then cannot wait for each other.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import asyncpg

from ingestd.errors import FeedError
from ingestd.model import CopyData, SignalGroup
from ingestd.store.connection import connect, faults

COMMIT_SECONDS_MAX = 300.0  # One batch: a few megabytes. A server that takes longer is treated as gone.
LOCK_SECONDS_MAX = 10.0  # A killed process's backend notices within this time; a living one keeps the lock.


@dataclass(frozen=True, slots=True)
class FeedBatch:
    """One transaction's worth: the frames from `position_old` up to before `position_new` of the feed."""

    position_old: int
    position_new: int
    groups: Sequence[SignalGroup]
    copies: Sequence[CopyData]
    decoder_state: dict[str, Any] = field(default_factory=dict)  # what to know to go on from `position_new`
    completed: bool = False  # this is the feed's last batch …
    ended_utc: datetime | None = None  # … and then the session lasts at least until here


class Writer:
    """The connection that writes one feed."""

    def __init__(self, dsn: str, feed_id: str) -> None:
        """`feed_id` may be changed before the first use of the feed: the lock stays on the id given here.

        So imports of one file, whose feed is only known once the database was asked, take turns by its content.
        """
        self.feed_id = feed_id
        self._dsn = dsn
        self._lock_id = feed_id
        self._name = f"ingestd/{feed_id}"[:63]
        self._connection: asyncpg.Connection | None = None
        self._known_groups: set[int] = set()
        self._opened_before = False

    def __repr__(self) -> str:
        return f"<Writer {self._name}: {'open' if self._connection else 'closed'}>"

    async def open(self) -> None:
        """Connect and take the feed. Raises StoreError, StoreUnavailable, FeedError."""
        self.terminate()
        self._connection = await connect(self._dsn, self._name)
        if self._opened_before:
            await self._end_own_older_backends()
        await self._lock()
        self._opened_before = True
        self._known_groups.clear()  # It may be another database than before.

    @property
    def is_open(self) -> bool:
        """Whether there is a connection that has not failed."""
        return self._connection is not None

    def terminate(self) -> None:
        """End the connection at once, without a word to the server. Safe to call at any time."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    async def position(self) -> int | None:
        """How far the feed is committed, or None if the database does not know it."""
        async with faults(self._dsn, on_failure=self.terminate):
            position = await self._open().fetchval("SELECT position FROM feeds WHERE feed_id = $1", self.feed_id)
        return None if position is None else int(position)

    async def commit(self, batch: FeedBatch) -> None:
        """Copy the batch and move the feed's position, in one transaction.

        Raises FeedError if the position is not `position_old`. After StoreUnavailable the outcome is unknown: open
        again and read the position back. The crash tests in tests/adversity prove that this is enough.
        """
        async with faults(self._dsn, COMMIT_SECONDS_MAX, on_failure=self.terminate):
            connection = self._open()
            await self._add_groups(connection, batch.groups)
            # Not asyncpg's transaction(): its way out waits for a rollback, and so for a peer that may be dead.
            await connection.execute("BEGIN")
            for data in batch.copies:
                if data.rows:
                    await _copy(connection, data)
            if batch.completed:
                await connection.execute(
                    """
                    UPDATE sessions SET ended_utc = greatest(ended_utc, $2), updated_utc = now()
                    WHERE id = (SELECT session_id FROM feeds WHERE feed_id = $1)
                    """,
                    self.feed_id,
                    batch.ended_utc,
                )
            moved = await connection.execute(
                """
                UPDATE feeds
                SET position = $3, frames = $3, decoder_state = $5, completed_utc = CASE WHEN $4 THEN now() END
                WHERE feed_id = $1 AND position = $2
                """,
                self.feed_id,
                batch.position_old,
                batch.position_new,
                batch.completed,
                json.dumps(batch.decoder_state),
            )
            if moved != "UPDATE 1":
                raise FeedError(
                    f"feed {self.feed_id} is no longer at {batch.position_old}: somebody else has written it",
                    "nothing of this batch was written; import the file again to see where it stands",
                )
            await connection.execute("COMMIT")

    def _open(self) -> asyncpg.Connection:
        assert self._connection is not None, "open() comes first"
        return self._connection

    async def _end_own_older_backends(self) -> None:
        """After a reconnect: a backend of the broken connection may still hold the feed's row."""
        async with faults(self._dsn, on_failure=self.terminate):
            await self._open().execute(
                """
                SELECT pg_terminate_backend(a.pid)
                FROM pg_stat_activity a JOIN pg_stat_activity me ON me.pid = pg_backend_pid()
                WHERE a.application_name = me.application_name AND a.datname = me.datname
                  AND a.usename = me.usename AND a.backend_start < me.backend_start
                """
            )

    async def _lock(self) -> None:
        deadline = time.monotonic() + LOCK_SECONDS_MAX
        while True:
            async with faults(self._dsn, on_failure=self.terminate):
                if await self._open().fetchval(
                    "SELECT pg_try_advisory_lock(hashtextextended('ingestd feed ' || $1, 0))", self._lock_id
                ):
                    return
            if time.monotonic() > deadline:
                self.terminate()
                raise FeedError(
                    f"feed {self._lock_id} is being written by another process",
                    "wait for it to end; pg_stat_activity shows it under the name " + self._name,
                )
            await asyncio.sleep(0.1)

    async def _add_groups(self, connection: asyncpg.Connection, groups: Iterable[SignalGroup]) -> None:
        missing = sorted((g for g in groups if g.id not in self._known_groups), key=lambda g: g.id)
        if not missing:
            return
        await connection.execute("BEGIN")
        await connection.executemany(
            "INSERT INTO signal_groups (id, source, name, origin) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING",
            [(group.id, group.source, group.name, group.origin) for group in missing],
        )
        await connection.executemany(
            """
            INSERT INTO channels (group_id, position, channel, unit, minimum, maximum, choices)
            VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT DO NOTHING
            """,
            [_channel_row(group, position) for group in missing for position in range(1, len(group.channels) + 1)],
        )
        await connection.execute("COMMIT")
        self._known_groups.update(group.id for group in missing)


def _channel_row(group: SignalGroup, position: int) -> tuple[Any, ...]:
    channel = group.channels[position - 1]
    choices = None if channel.choices is None else json.dumps(channel.choices)
    return group.id, position, channel.name, channel.unit, channel.minimum, channel.maximum, choices


async def _copy(connection: asyncpg.Connection, data: CopyData) -> None:
    async def pieces() -> AsyncIterator[bytearray]:
        for piece in data.pieces:
            yield piece

    await connection.copy_to_table(
        data.table, source=pieces(), columns=data.columns, format="binary", timeout=COMMIT_SECONDS_MAX
    )


def utc(ns: int) -> datetime:
    """The instant `ns` nanoseconds after 1970, to the microsecond that timestamptz holds; exact, no float."""
    seconds, rest = divmod(ns // 1000, 1_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest)
