"""How long the panels of the Session dashboard take, over 30 days of a channel at 100 Hz and over less.

    python bench/dashboards.py [--days 30] [--dsn DSN] [--json FILE]

Fills a session as an import or compaction leaves it: the engine at 100 Hz (its speed and its gear), a GPS receiver at
10 Hz, both in full chunks, and between them in the table the chunks of ten other groups, as wide and as many as the
engine's. And, alone, a day of it as the daemon stores it live, a chunk each half second. Then it runs the SQL of every
panel, variable and annotation of grafana/dashboards/session.json as Grafana would for a panel of 1,000 points. The
limit of a panel over all of it is 300 ms. Beside them stands what nothing that reads a row for each bucket of a minute
can be faster than: a plain table of those rows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import numpy as np
from importing import best_ms
from server import fresh, server

from ingestd.chunks import Placement, encode_signals
from ingestd.model import CHUNK_FRAMES_MAX, Channel, ClockState, SignalBatch, SignalGroup

LIMIT_MS = 300
POINTS = 1000
HZ = 100
LIVE_FRAMES = 50  # a chunk, at the default interval of half a second
OTHERS = 10  # groups beside the engine's
OTHER_FRAMES = 1  # of a chunk of theirs: as wide a row as one that points to 4,096 of them
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
STORED, LIVE = UUID(int=30), UUID(int=1)
GEARS = {str(gear): label for gear, label in enumerate(("neutral", "first", "second", "third", "fourth", "fifth"))}

ENGINE = SignalGroup.make(
    "can0", "Engine", "", "bench.dbc", (Channel("Engine.Speed", "rpm"), Channel("Engine.Gear", choices=GEARS))
)
GPS = SignalGroup.make("gps/GN", "RMC", "", "NMEA 0183", (Channel("RMC.lat", "deg"), Channel("RMC.lon", "deg")))
OTHER = [
    SignalGroup.make("can0", f"Other{number}", "", "bench.dbc", tuple(Channel(f"Other{number}.{c}") for c in "AB"))
    for number in range(OTHERS)
]


def stamps(first: int, count: int, hz: int) -> np.ndarray:
    """Of frames number `first` and following."""
    begin_ns = int(BEGIN.timestamp()) * 1_000_000_000
    return begin_ns + np.arange(first, first + count, dtype=np.int64) * (1_000_000_000 // hz)


def engine(first: int, count: int, dice: np.random.Generator) -> SignalBatch:
    """A speed that swings and rustles, in quarters of a revolution, and a gear that follows it."""
    number = np.arange(first, first + count)
    swing = np.abs(np.sin(number / 5000))
    speed = np.round(800 + 4000 * swing + dice.normal(0, 8, count)) * 0.25
    return SignalBatch(ENGINE, stamps(first, count, HZ), np.stack([speed, np.floor(swing * 5.99)]))


def gps(first: int, count: int) -> SignalBatch:
    """Round and round."""
    angle = np.arange(first, first + count) / 600
    return SignalBatch(
        GPS, stamps(first, count, HZ // 10), np.stack([48 + np.sin(angle) / 50, 11 + np.cos(angle) / 30])
    )


def batches(seconds: int, frames: int, others: list[SignalGroup]) -> Iterator[list[SignalBatch]]:
    """A session's, in the order of time; chunks have so many frames."""
    dice = np.random.default_rng(1)
    for chunk, first in enumerate(range(0, seconds * HZ, frames)):
        made = [engine(first, min(frames, seconds * HZ - first), dice)]
        if chunk % 10 == 0:
            made.append(gps(first // 10, min(frames, (seconds * HZ - first) // 10)))
        values = np.full((2, OTHER_FRAMES), float(chunk % 97))
        yield made + [SignalBatch(group, stamps(first, OTHER_FRAMES, HZ), values) for group in others]


async def fill(dsn: str, days: int) -> None:
    """Both sessions."""
    connection = await asyncpg.connect(dsn)
    for group in (ENGINE, GPS, *OTHER):
        await connection.execute(
            "INSERT INTO signal_groups VALUES ($1, $2, $3, $4)", group.id, group.source, group.name, group.origin
        )
        for position, channel in enumerate(group.channels, 1):
            choices = channel.choices and json.dumps(channel.choices)
            row = (group.id, position, channel.name, channel.unit, choices)
            await connection.execute("INSERT INTO channels VALUES ($1, $2, $3, $4, NULL, NULL, $5)", *row)
    for session, length, frames, others in ((STORED, days, CHUNK_FRAMES_MAX, OTHER), (LIVE, 1, LIVE_FRAMES, [])):
        await connection.execute(
            "INSERT INTO sessions (id, name, car_id, created_utc, ended_utc, time_base) VALUES ($1, $2, 'car', $3, $4, 'bench')",
            session, f"{length} days", BEGIN, BEGIN + timedelta(days=length),
        )  # fmt: skip
        waiting: list[SignalBatch] = []
        for made in batches(length * 86_400, frames, others):
            waiting += made
            if len(waiting) >= 500:
                await copy(connection, waiting, session)
                waiting = []
        await copy(connection, waiting, session)
        for hour in range(length * 24):
            await connection.execute(
                "INSERT INTO events (session_id, source, kind, key, ts_mono_ns, utc_offset_ns, payload)"
                " VALUES ($1, 'can0', 'marker', '', $2, 0, '{\"text\": \"lap\"}')",
                session, int(stamps(hour * 3600 * HZ, 1, HZ)[0]),
            )  # fmt: skip
    await connection.execute("VACUUM ANALYZE")
    await connection.close()


async def copy(connection: asyncpg.Connection, made: list[SignalBatch], session: UUID) -> None:
    """Store batches."""
    data = encode_signals(made, Placement(session, 0, ClockState.SET))

    async def pieces() -> Any:
        for piece in data.pieces:
            yield bytes(piece)

    await connection.copy_to_table(data.table, source=pieces(), columns=data.columns, format="binary")
