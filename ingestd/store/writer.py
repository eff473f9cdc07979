"""Write feeds into PostgreSQL, exactly once.

The promise rests on one transaction: chunks are copied, and its last statement moves the feed's position from where
this process knows it to be to behind the chunks. Either both are committed or neither is. A commit whose answer never
came is settled by reading the position back: it is the old one or the new one. Anything else means that somebody else
writes this feed, or that this is another or an older database; then nothing more is written.

Limits: one writer for a feed (for files an advisory lock sees to it, for a journal the lock on its folder), one
transaction at a time. After any failure the connection is terminated; `open` makes a new one. Signal groups are
inserted in a transaction of their own, before the chunks that need them: a group without chunks does no harm, and two
writers then cannot wait for each other.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import asyncpg

from ingestd.backoff import Backoff
from ingestd.errors import FeedError
from ingestd.model import CopyData, Event, SignalGroup
from ingestd.store.connection import connect, faults

STALL_SECONDS_MAX = (
    40.0  # A commit without any progress for so long is given up: server or network are treated as gone.
)
PIECE_BYTES = 65_536  # What the kernel takes at once: in larger pieces the server waits for us, 15 % of a COPY.
LOCK_SECONDS_MAX = 10.0  # A killed process's backend notices within this time; a living one keeps the lock.


METADATA = ("name", "car_id", "driver", "track", "notes")  # of a session, for people: what can be edited


@dataclass(frozen=True, slots=True)
class SessionEdit:
    """What a recorder knows of a session at some time; the latest edit of it wins, here or in the database.

    What was edited here before the latest edit there stays as it is there, and so does what was never edited here.
    """

    id: UUID
    time_base: str
    created_utc: datetime
    updated_utc: datetime
    ended_utc: datetime | None = None
    name: str | None = None
    car_id: str | None = None
    driver: str | None = None
    track: str | None = None
    notes: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    edited_utc: Mapping[str, datetime] = field(default_factory=dict)  # by METADATA, where not `updated_utc`


@dataclass(frozen=True, slots=True)
class StampedEvent:
    """An event and what turns its stamp into UTC."""

    event: Event
    utc_offset_ns: int


@dataclass(frozen=True, slots=True)
class FeedBatch:
    """One transaction's worth: what the feed holds from `position_old` up to `position_new`."""

    position_old: int
    position_new: int
    groups: Sequence[SignalGroup]
    copies: Sequence[CopyData]
    decoder_state: dict[str, Any] = field(default_factory=dict)  # what to know to go on from `position_new`
    completed: bool = False  # this is the feed's last batch …
    ended_utc: datetime | None = None  # … and then the session lasts at least until here
    frames_count: int | None = None  # of the feed up to here, where its position does not count frames
    session_id: UUID | None = None  # of `events`
    sessions: Sequence[SessionEdit] = ()
    events: Sequence[StampedEvent] = ()


@dataclass(frozen=True, slots=True)
class Standing:
    """How a feed stands in the database."""

    feed_id: str
    position: int
    machine_id: str
    decoder_state: dict[str, Any]
    is_completed: bool = False


class Writer:
    """The connection that writes one feed at a time."""

    def __init__(self, dsn: str, feed_id: str, *, journal: str | None = None) -> None:
        """`feed_id` may be changed before the first use of the feed: the lock stays on the id given here.

        So imports of one file, whose feed is only known once the database was asked, take turns by its content.
        `journal` names the journal whose feeds these are, and which nobody else living writes: no lock is taken, and
        backends of that name are a dead process's or a broken connection's.
        """
        self.feed_id = feed_id
        self._dsn = dsn
        self._lock_id = feed_id if journal is None else None
        self._name = f"ingestd/{journal or feed_id}"[:63]
        self._connection: asyncpg.Connection | None = None
        self._known_groups: set[int] = set()
        self._opened_before = False

    def __repr__(self) -> str:
        return f"<Writer {self._name}: {'open' if self._connection else 'closed'}>"

    async def open(self) -> None:
        """Connect and take the feed. Raises StoreError, StoreUnavailable, FeedError."""
        self.terminate()
        self._connection = await connect(self._dsn, self._name)
        if self._opened_before or self._lock_id is None:
            await self._end_own_older_backends()
        if self._lock_id is not None:
            await self._lock(self._lock_id)
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

    async def standings(self, feed_ids: Sequence[str]) -> dict[str, Standing]:
        """How those of the feeds stand that the database knows."""
        async with faults(self._dsn, on_failure=self.terminate):
            rows = await self._open().fetch(
                "SELECT feed_id, position, machine_id, decoder_state, completed_utc IS NOT NULL AS is_completed"
                " FROM feeds WHERE feed_id = ANY ($1)",
                feed_ids,
            )
        return {
            row["feed_id"]: Standing(
                row["feed_id"],
                row["position"],
                row["machine_id"],
                json.loads(row["decoder_state"]),
                row["is_completed"],
            )
            for row in rows
        }

    async def begin(self, session: SessionEdit, feed_id: str, position: int, machine_id: str) -> None:
        """Record a journal's feed at `position`, and its session if nobody has; a feed that is there is left alone."""
        async with faults(self._dsn, on_failure=self.terminate):
            connection = self._open()
            await connection.execute("BEGIN")
            await _save_session(connection, session, is_edit=False)
            await connection.execute(
                """
                INSERT INTO feeds (feed_id, kind, session_id, position, machine_id, frames)
                VALUES ($1, 'journal', $2, $3, $4, 0) ON CONFLICT DO NOTHING
                """,
                feed_id, session.id, position, machine_id,
            )  # fmt: skip
            await connection.execute("COMMIT")

    async def takes_writes(self) -> bool:
        """Whether the database takes another write than the one it has just refused: then that one is at fault.

        Raises StoreUnavailable, StoreError if it cannot even be asked.
        """
        await self.open()
        async with faults(self._dsn, on_failure=self.terminate):
            touched: str = await self._open().execute(
                "UPDATE feeds SET position = position WHERE feed_id = $1", self.feed_id
            )
        return touched == "UPDATE 1"

    async def commit(self, batch: FeedBatch) -> None:
        """Copy the batch and move the feed's position, in one transaction.

        Raises FeedError if the position is not `position_old`. After StoreUnavailable the outcome is unknown: open
        again and read the position back. The crash tests in tests/adversity prove that this is enough.
        """
        async with faults(self._dsn, STALL_SECONDS_MAX, on_failure=self.terminate) as deadline:
            connection = self._open()
            await self._add_groups(connection, batch.groups)
            # Not asyncpg's transaction(): its way out waits for a rollback, and so for a peer that may be dead.
            await connection.execute("BEGIN")
            for data in batch.copies:
                if data.rows:
                    await _copy(connection, data, deadline)
            for session in batch.sessions:
                await _save_session(connection, session, is_edit=True)
            if batch.events:
                assert batch.session_id is not None, "events belong to a session"
                await connection.executemany(_ADD_EVENT, [_event_row(batch.session_id, each) for each in batch.events])
            if batch.completed and batch.ended_utc is not None:
                await connection.execute(
                    """
                    UPDATE sessions SET ended_utc = greatest(ended_utc, $2)
                    WHERE id = (SELECT session_id FROM feeds WHERE feed_id = $1)
                    """,
                    self.feed_id,
                    batch.ended_utc,
                )
            moved = await connection.execute(
                """
                UPDATE feeds
                SET position = $3, frames = $6, decoder_state = $5, completed_utc = CASE WHEN $4 THEN now() END
                WHERE feed_id = $1 AND position = $2
                """,
                self.feed_id,
                batch.position_old,
                batch.position_new,
                batch.completed,
                json.dumps(batch.decoder_state),
                batch.position_new if batch.frames_count is None else batch.frames_count,
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
                  AND a.usename = me.usename AND a.client_addr IS NOT DISTINCT FROM me.client_addr
                  AND a.backend_start < me.backend_start
                """
            )

    async def _lock(self, lock_id: str) -> None:
        backoff, deadline = Backoff(0.05, 0.5), time.monotonic() + LOCK_SECONDS_MAX
        while True:
            async with faults(self._dsn, on_failure=self.terminate):
                if await self._open().fetchval(
                    "SELECT pg_try_advisory_lock(hashtextextended('ingestd feed ' || $1, 0))", lock_id
                ):
                    return
            if time.monotonic() > deadline:
                self.terminate()
                raise FeedError(
                    f"feed {lock_id} is being written by another process",
                    "wait for it to end; pg_stat_activity shows it under the name " + self._name,
                )
            await asyncio.sleep(backoff.next_seconds())

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


_ADD_EVENT = """
INSERT INTO events (session_id, source, kind, key, ts_mono_ns, utc_offset_ns, payload)
VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT DO NOTHING
"""
# The configuration is nobody's to edit: that of the latest stamp is in force. When the session began is known to who
# began it, and not to a process that continues it and has not yet looked (whose edits are of second 1), whatever the
# clocks of both say.
_LATEST_EDIT_WINS = """
DO UPDATE SET created_utc = CASE
        WHEN excluded.updated_utc <= to_timestamp(1) THEN sessions.created_utc
        WHEN sessions.updated_utc <= to_timestamp(1) THEN excluded.created_utc
        ELSE least(sessions.created_utc, excluded.created_utc) END,
    name = CASE WHEN $12 > sessions.updated_utc THEN excluded.name ELSE sessions.name END,
    car_id = CASE WHEN $13 > sessions.updated_utc THEN excluded.car_id ELSE sessions.car_id END,
    driver = CASE WHEN $14 > sessions.updated_utc THEN excluded.driver ELSE sessions.driver END,
    track = CASE WHEN $15 > sessions.updated_utc THEN excluded.track ELSE sessions.track END,
    notes = CASE WHEN $16 > sessions.updated_utc THEN excluded.notes ELSE sessions.notes END,
    config = CASE WHEN coalesce((excluded.config ->> 'since_ns')::bigint, 0)
                       >= coalesce((sessions.config ->> 'since_ns')::bigint, 0)
                  THEN excluded.config ELSE sessions.config END,
    updated_utc = greatest(sessions.updated_utc, excluded.updated_utc)
"""


def _event_row(session_id: UUID, stamped: StampedEvent) -> tuple[Any, ...]:
    event = stamped.event
    payload = json.dumps(dict(event.payload))
    return session_id, event.source, event.kind, event.key, event.ts_ns, stamped.utc_offset_ns, payload


async def _save_session(connection: asyncpg.Connection, session: SessionEdit, *, is_edit: bool) -> None:
    stamps = [session.edited_utc.get(name, session.updated_utc) for name in METADATA] if is_edit else []
    await connection.execute(
        "INSERT INTO sessions (id, name, car_id, driver, track, created_utc, ended_utc, notes, time_base, config,"
        " updated_utc) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) ON CONFLICT (id) "
        + (_LATEST_EDIT_WINS if is_edit else "DO NOTHING"),
        session.id, session.name, session.car_id, session.driver, session.track, session.created_utc,
        session.ended_utc, session.notes, session.time_base, json.dumps(dict(session.config)), session.updated_utc,
        *stamps,
    )  # fmt: skip


def _channel_row(group: SignalGroup, position: int) -> tuple[Any, ...]:
    channel = group.channels[position - 1]
    choices = None if channel.choices is None else json.dumps(channel.choices)
    return group.id, position, channel.name, channel.unit, channel.minimum, channel.maximum, choices


async def _copy(connection: asyncpg.Connection, data: CopyData, deadline: asyncio.Timeout) -> None:
    """Send the pieces. Each that goes out puts the deadline off: a slow line may take as long as it needs."""
    loop = asyncio.get_running_loop()

    async def pieces() -> AsyncIterator[bytes]:
        for piece in data.pieces:
            for begin in range(0, len(piece), PIECE_BYTES):
                yield bytes(memoryview(piece)[begin : begin + PIECE_BYTES])
                deadline.reschedule(loop.time() + STALL_SECONDS_MAX)

    await connection.copy_to_table(data.table, source=pieces(), columns=data.columns, format="binary")
    deadline.reschedule(loop.time() + STALL_SECONDS_MAX)


def utc(ns: int) -> datetime:
    """The instant `ns` nanoseconds after 1970, to the microsecond that timestamptz holds; exact, no float."""
    seconds, rest = divmod(ns // 1000, 1_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest)
