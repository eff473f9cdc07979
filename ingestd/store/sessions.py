"""Sessions and the feeds that belong to them: find, make, list, describe.

A session is one recording with one time base: a boot of a machine, or 'capture' for imported files. Its id is made
here, without the database, so that a recorder that is offline can make it too.
"""

from __future__ import annotations

import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg

from ingestd.errors import StoreError, UsageError
from ingestd.store.connection import connect, faults
from ingestd.store.writer import METADATA

CAPTURE_TIME_BASE = "capture"


@dataclass(frozen=True, slots=True)
class Session:
    """A row of `sessions`, as far as importing needs it."""

    id: UUID
    name: str | None
    car_id: str | None
    created_utc: datetime
    time_base: str = CAPTURE_TIME_BASE


@dataclass(frozen=True, slots=True)
class FeedRow:
    """A feed as the database knows it."""

    feed_id: str
    session_id: UUID
    session_name: str | None
    position: int
    config_hash: str
    completed: bool
    decoder_state: dict[str, Any]

    @property
    def is_empty(self) -> bool:
        """Whether it was begun and nothing of it was ever committed."""
        return self.position == 0 and not self.completed


@dataclass(frozen=True, slots=True)
class NewFeed:
    """What is known of a file's feed before the first frame of it is committed."""

    feed_id: str
    sha256: str
    config_hash: str
    config: Mapping[str, Any]  # what decides the stored values, for `sessions.config`
    path: str
    size_bytes: int
    mtime: datetime | None
    machine_id: str
    importer_version: str


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """A session and how much of it is stored."""

    id: UUID
    name: str | None
    car_id: str | None
    created_utc: datetime
    ended_utc: datetime | None
    frames: int
    samples: int
    channels: int
    files: Sequence[str]
    driver: str | None = None
    track: str | None = None
    notes: str | None = None
    updated_utc: datetime | None = None


@dataclass(frozen=True, slots=True)
class ChannelSummary:
    """One channel of a session: samples, time span, and statistics over its good and bad samples alike."""

    source: str
    channel: str
    unit: str | None
    samples: int
    first_utc: datetime
    last_utc: datetime
    minimum: float | None
    maximum: float | None
    mean: float | None


def new_session_id() -> UUID:
    """A UUIDv7 (RFC 9562, 5.7): 48 bits of Unix milliseconds, so that ids sort by age, and 74 random bits."""
    value = (time.time_ns() // 1_000_000) << 80 | 0x7 << 76 | secrets.randbits(12) << 64
    return UUID(int=value | 0b10 << 62 | secrets.randbits(62))


def machine_id() -> str:
    """What tells this machine from others: systemd's machine id, or the network card's address."""
    try:
        return Path("/etc/machine-id").read_text(encoding="ascii").strip() or f"{uuid.getnode():012x}"
    except OSError:
        return f"{uuid.getnode():012x}"


class Catalogue:
    """What the database knows about sessions and feeds. One short-lived connection; use `open_catalogue`."""

    def __init__(self, dsn: str, connection: asyncpg.Connection) -> None:
        self._dsn = dsn
        self._connection = connection

    async def feeds_of_file(self, sha256: str) -> list[FeedRow]:
        """Every import of the file with this content, oldest first."""
        rows = await self._fetch(
            """
            SELECT f.feed_id, f.session_id, s.name, f.position, f.config_hash, f.completed_utc IS NOT NULL AS completed,
                   f.decoder_state
            FROM feeds f LEFT JOIN sessions s ON s.id = f.session_id
            WHERE f.sha256 = $1 ORDER BY f.created_utc, f.feed_id
            """,
            sha256,
        )
        return [
            FeedRow(
                row["feed_id"], row["session_id"], row["name"], row["position"], row["config_hash"], row["completed"],
                json.loads(row["decoder_state"]),
            )
            for row in rows
        ]  # fmt: skip

    async def called(self, name: str) -> list[Session]:
        """The sessions with this name or id, oldest first."""
        rows = await self._fetch(
            "SELECT id, name, car_id, created_utc, time_base FROM sessions WHERE name = $1 OR id::text = lower($1)"
            " ORDER BY created_utc",
            name,
        )
        return [Session(*row.values()) for row in rows]

    async def find(self, name: str) -> Session | None:
        """The session with this name or id, or None. Raises UsageError if several have the name."""
        found = await self.called(name)
        if len(found) > 1:
            ids = ", ".join(str(each.id) for each in found)
            raise UsageError(f"{len(found)} sessions are called {name!r}", f"give the id of one: {ids}")
        return found[0] if found else None

    async def begin(self, feed: NewFeed, session: Session, existing: str | None) -> FeedRow:
        """Record a file's feed at position 0, in the session called `existing` or else in a new `session`.

        One transaction, and one at a time: two files that make the same session meet in it. What was begun of the
        same file before and left without a frame is removed. Raises UsageError if the session holds the file already,
        StoreError if it was recorded live.
        """
        await self._fetch("BEGIN")
        await self._remove_empty(feed.sha256)
        if existing is not None:
            session = await self._join(existing, session, feed)
        await self._fetch(
            """
            INSERT INTO sessions (id, name, car_id, created_utc, time_base, config)
            VALUES ($1, $2, $3, $4, $5, jsonb_build_object('imports', jsonb_build_array($6::jsonb)))
            ON CONFLICT (id) DO UPDATE SET
                created_utc = least(sessions.created_utc, excluded.created_utc),
                config = jsonb_set(sessions.config, '{imports}',
                    coalesce(sessions.config -> 'imports', '[]') || (excluded.config -> 'imports')),
                updated_utc = now()
            """,
            session.id, session.name, session.car_id, session.created_utc, session.time_base,
            json.dumps({"feed_id": feed.feed_id, "sha256": feed.sha256, "path": feed.path, **feed.config}),
        )  # fmt: skip
        await self._fetch(
            """
            INSERT INTO feeds (feed_id, kind, session_id, position, machine_id, config_hash, path, size_bytes, mtime,
                               sha256, importer_version)
            VALUES ($1, 'file', $2, 0, $3, $4, $5, $6, $7, $8, $9)
            """,
            feed.feed_id, session.id, feed.machine_id, feed.config_hash, feed.path, feed.size_bytes, feed.mtime,
            feed.sha256, feed.importer_version,
        )  # fmt: skip
        await self._fetch("COMMIT")
        return FeedRow(feed.feed_id, session.id, session.name, 0, feed.config_hash, False, {})

    async def _join(self, name: str, session: Session, feed: NewFeed) -> Session:
        """The session to put the feed into: the one with this name if there is one, else the new one."""
        found = await self.find(name)
        if found is None:
            return session
        if found.time_base != CAPTURE_TIME_BASE:
            raise StoreError(
                f"session {found.name or found.id} was recorded live: its time is that machine's clock",
                "import the capture into a session of its own",
            )
        if await self._fetch("SELECT FROM feeds WHERE session_id = $1 AND sha256 = $2", found.id, feed.sha256):
            raise UsageError(
                f"session {found.name or found.id} holds {feed.path} already, decoded otherwise",
                "import it into another session",
            )
        return replace(found, created_utc=session.created_utc)  # The insert keeps the earlier of the two.

    async def forget_empty(self, sha256: str) -> None:
        """Remove what was begun of a file and left without a frame. The caller holds the lock on the file."""
        await self._fetch("BEGIN")
        await self._remove_empty(sha256)
        await self._fetch("COMMIT")

    async def _remove_empty(self, sha256: str) -> None:
        """Remove feeds of the file of which nothing was committed, and what was made for them.

        Takes the lock that all who begin or remove take first: otherwise one could remove the session that another
        is about to join. It ends with the transaction.
        """
        await self._fetch("SELECT pg_advisory_xact_lock(hashtextextended('ingestd sessions', 0))")
        await self._fetch("SELECT forget_empty_imports($1)", sha256)

    async def summaries(self) -> list[SessionSummary]:
        """All sessions, newest first."""
        rows = await self._fetch(
            """
            SELECT s.id, s.name, s.car_id, s.created_utc, s.ended_utc,
                   coalesce((SELECT sum(frames) FROM feeds f WHERE f.session_id = s.id), 0)::bigint AS frames,
                   c.samples, c.channels,
                   ARRAY(SELECT path FROM feeds f WHERE f.session_id = s.id AND path IS NOT NULL
                         ORDER BY f.created_utc),
                   s.driver, s.track, s.notes, s.updated_utc
            FROM sessions s CROSS JOIN LATERAL (
                SELECT coalesce(sum(present.frames), 0)::bigint AS samples,
                       count(DISTINCT (g.source, ch.channel)) AS channels
                FROM (SELECT group_id, sum(frame_count) AS frames FROM signal_chunks
                      WHERE session_id = s.id GROUP BY group_id) present
                JOIN signal_groups g ON g.id = present.group_id
                JOIN channels ch ON ch.group_id = g.id
            ) c
            ORDER BY s.created_utc DESC, s.id
            """
        )
        return [SessionSummary(*row.values()) for row in rows]

    async def edit(self, session_id: UUID, changes: Mapping[str, str | None]) -> None:
        """Change metadata of a session, by their columns: METADATA of the writer. The trigger stamps the edit."""
        assert changes.keys() <= set(METADATA), "other columns are not for people"
        columns = ", ".join(f"{name} = ${number}" for number, name in enumerate(changes, 2))
        await self._fetch(f"UPDATE sessions SET {columns} WHERE id = $1", session_id, *changes.values())

    async def channels(self, session_id: UUID) -> list[ChannelSummary]:
        """What a session holds, a row per source and channel, from the chunk summaries where there are some."""
        rows = await self._fetch(
            """
            SELECT g.source, ch.channel, min(ch.unit) AS unit, sum(c.frame_count)::bigint AS samples,
                   timestamptz 'epoch' + min(c.mono_start_ns + c.utc_offset_ns) / 1000 * interval '1 microsecond',
                   timestamptz 'epoch' + max(c.mono_end_ns + c.utc_offset_ns) / 1000 * interval '1 microsecond',
                   min(NULLIF(v.low, 'NaN')), max(NULLIF(v.high, 'NaN')),
                   -- What could add up to more than a float8 holds makes the mean infinite instead of an error.
                   sum(NULLIF(v.mean, 'NaN') * CASE WHEN abs(v.mean) < 1e290 THEN v.count ELSE float8 'Infinity' END)
                       / NULLIF(sum(v.count), 0)
            FROM signal_chunks c
            JOIN signal_groups g ON g.id = c.group_id
            JOIN channels ch ON ch.group_id = g.id
            CROSS JOIN LATERAL (
                SELECT c.value_min[ch.position] AS low, c.value_max[ch.position] AS high,
                       c.value_mean[ch.position] AS mean, c.value_count[ch.position] AS count
            ) v
            WHERE c.session_id = $1
            GROUP BY g.source, ch.channel ORDER BY g.source, ch.channel
            """,
            session_id,
        )
        return [ChannelSummary(*row.values()) for row in rows]

    async def _fetch(self, query: str, *arguments: Any) -> list[asyncpg.Record]:
        async with faults(self._dsn):
            return list(await self._connection.fetch(query, *arguments))


@asynccontextmanager
async def open_catalogue(dsn: str) -> AsyncIterator[Catalogue]:
    """A `Catalogue` over a connection of its own."""
    connection = await connect(dsn, "ingestd/catalogue")
    try:
        yield Catalogue(dsn, connection)
    finally:
        connection.terminate()
