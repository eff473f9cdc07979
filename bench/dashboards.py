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
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import numpy as np
from grafana_sql import View
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
CAR = "Kim's car"
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


async def fill(dsn: str, seconds: int, live_seconds: int) -> None:
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
    parts = ((STORED, seconds, CHUNK_FRAMES_MAX, OTHER), (LIVE, live_seconds, LIVE_FRAMES, []))
    for session, length, frames, others in parts:
        await tell(connection, session, length)
        waiting: list[SignalBatch] = []
        for made in batches(length, frames, others):
            waiting += made
            if len(waiting) >= 500:
                await copy(connection, waiting, session)
                waiting = []
        await copy(connection, waiting, session)
    await connection.execute("VACUUM ANALYZE")
    await connection.close()


async def tell(connection: asyncpg.Connection, session: UUID, seconds: int) -> None:
    """The session itself, how many frames it has, twenty markers, and a gap of a hundredth of it."""
    await connection.execute(
        "INSERT INTO sessions (id, name, car_id, created_utc, ended_utc, time_base)"
        " VALUES ($1, $2, $3, $4, $5, 'bench')",
        session, f"{seconds} s", CAR, BEGIN, BEGIN + timedelta(seconds=seconds),
    )  # fmt: skip
    await connection.execute(
        "INSERT INTO feeds (feed_id, kind, session_id, position, machine_id, frames)"
        " VALUES ($1, 'journal', $2, 0, '', $3)",
        str(session), session, seconds * HZ,
    )  # fmt: skip
    happened = [("marker", number * seconds * HZ // 20, {"text": "lap"}) for number in range(20)]
    middle = seconds * HZ // 2
    from_ns, to_ns = (int(stamps(number, 1, HZ)[0]) for number in (middle, middle + seconds * HZ // 100))
    happened.append(("gap", middle, {"reason": "down", "frames": 7, "from_ns": from_ns, "to_ns": to_ns}))
    for kind, number, payload in happened:
        await connection.execute(
            "INSERT INTO events (session_id, source, kind, key, ts_mono_ns, utc_offset_ns, payload)"
            " VALUES ($1, 'can0', $2, '', $3, 0, $4)",
            session, kind, int(stamps(number, 1, HZ)[0]), json.dumps(payload),
        )  # fmt: skip


async def copy(connection: asyncpg.Connection, made: list[SignalBatch], session: UUID) -> None:
    """Store batches."""
    data = encode_signals(made, Placement(session, 0, ClockState.SET))

    async def pieces() -> Any:
        for piece in data.pieces:
            yield bytes(piece)

    await connection.copy_to_table(data.table, source=pieces(), columns=data.columns, format="binary")


@dataclass(frozen=True, slots=True)
class Timing:
    """A query of the dashboard over a window."""

    name: str
    window: str
    interval_ms: int
    rows: int
    milliseconds: float
    of_limit: float


def queries() -> dict[str, str]:
    """Of every panel, variable and annotation of the Session dashboard."""
    dashboard = json.loads((Path(__file__).parents[1] / "grafana/dashboards/session.json").read_text())
    found = {f"variable {each['name']}": each["query"] for each in dashboard["templating"]["list"]}
    found |= {f"annotation {each['name']}": each["target"]["rawSql"] for each in dashboard["annotations"]["list"]}
    return found | {each["title"]: each["targets"][0]["rawSql"] for each in dashboard["panels"]}


def chosen(session: UUID) -> dict[str, str]:
    """What is chosen at the top of it."""
    return {
        "car": CAR, "session": str(session), "channel": "can0 · Engine.Speed", "state": "can0 · Engine.Gear",
        "position": "gps/GN · RMC.lat · RMC.lon",
    }  # fmt: skip


async def measure(dsn: str, days: int) -> list[Timing]:
    """All queries over all of it; the panels that depend on the length of a point also over less, and live chunks."""
    connection = await asyncpg.connect(dsn)
    found = []
    windows = {f"{days} days": days * 86_400, "1 day": 86_400, "8 h": 8 * 3600, "1 h": 3600, "10 s": 10}
    for session, windows_of in ((STORED, windows), (LIVE, {"1 day, live chunks": 86_400})):
        for number, (window, seconds) in enumerate(windows_of.items()):
            view = View(BEGIN, BEGIN + timedelta(seconds=seconds), POINTS, chosen(session))
            for name, query in queries().items():
                if number and "$__interval_ms" not in query:
                    continue
                filled = view.filled(query)
                count = len(await connection.fetch(filled))
                taken = await best_ms(lambda filled=filled: connection.fetch(filled))
                found.append(Timing(name, window, view.interval_ms, count, taken, taken / LIMIT_MS))
    await connection.close()
    return found


async def floor_ms(dsn: str, days: int) -> tuple[float, float]:
    """What is the least: to visit the chunks' rows; and a plain table with a row a minute, made for this question."""
    connection = await asyncpg.connect(dsn)
    visit = "SELECT sum(frame_count) FROM signal_chunks WHERE session_id = $1 AND group_id = $2"
    visited = await best_ms(lambda: connection.fetch(visit, STORED, ENGINE.id))
    await connection.execute(
        "CREATE TABLE minutes AS SELECT * FROM signals_overview($1, 'can0', 'Engine.Speed', $2, $3, $4)",
        STORED, BEGIN, BEGIN + timedelta(days=days), days * 1440,
    )  # fmt: skip
    await connection.execute("VACUUM ANALYZE minutes")
    plain = (
        "SELECT date_bin('45 min', ts_utc, 'epoch'), min(value_min), max(value_max), avg(value_mean)"
        " FROM minutes GROUP BY 1 ORDER BY 1"
    )
    table = await best_ms(lambda: connection.fetch(plain))
    await connection.execute("DROP TABLE minutes")
    await connection.close()
    return visited, table


async def run(dsn: str, days: int) -> dict[str, Any]:
    """Say it, a line a query."""
    print(f"{'':28} {'window':20} {'a point':>12} {'rows':>7} {'time':>10}  of {LIMIT_MS} ms")
    timings = await measure(dsn, days)
    for each in timings:
        print(
            f"{each.name:28} {each.window:20} {each.interval_ms:9,} ms {each.rows:7,} {each.milliseconds:7.1f} ms"
            f"  {each.of_limit:.2f}x"
        )
    visited, table = await floor_ms(dsn, days)
    print(f"to visit the rows of the chunks: {visited:.1f} ms; a plain table, a row a minute: {table:.1f} ms")
    return {"timings": [asdict(each) for each in timings], "visited_ms": visited, "table_ms": table}


async def fill_and_run(dsn: str, days: int) -> dict[str, Any]:
    """In a database of its own."""
    database = await fresh(dsn, "bench_dashboards")
    await fill(database, days * 86_400, 86_400)
    return await run(database, days)


def main() -> None:
    """Measure on the distribution's server, or the one given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--dsn", help="a server where databases may be made")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    with server(arguments.dsn) as (dsn, what):
        print(what)
        result = asyncio.run(fill_and_run(dsn, arguments.days))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
