"""How the cost of a sample grows: with the size of a capture, and with the number of channels.

    python bench/growth.py [--largest 9] [--dsn DSN] [--json FILE]

Imports synthetic loads (generate.py) of 10^6 samples to 10^LARGEST, each into a database of its own, and loads of ten
million samples with ten channels to five thousand. The largest takes some 35 GB on the disk while it lasts, and all of
it five minutes; what does not fit is left out and said. What every import has stored is compared with what the load
says, channel by channel: count and sum of the raw values, of the largest the count alone.

The cost of a sample is the whole process, its start left out: that of an import of a thousand frames, measured first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import asyncpg
import generate
import truth
from importing import best_ms, import_as_a_process, sizes
from server import dsn_of, fresh, server

SIGNALS_A_FRAME = 6.5  # of the default load, CAN FD included
DISK_BYTES_A_FRAME = 75 + 55  # the capture's text; signals, raw frames and WAL
CHANNELS = ((1, 2, 5), (2, 10, 5), (2, 50, 5), (4, 125, 5), (8, 125, 5))  # buses, ids of each, signals of a frame
CHANNEL_FRAMES = 2_000_000
VALUES_COMPARED_MAX = 200_000_000  # samples; of more than that only the counts of each channel are compared


@dataclass(frozen=True, slots=True)
class Growth:
    """One import."""

    samples: int
    channels: int
    seconds: float
    cpu_seconds: float  # of our process
    memory_mb: float
    bytes_per_sample: float
    bytes_per_frame: float
    channel_ms: float  # the mean of one channel's last minute
    wall_ns: float  # of a sample, without the start
    cpu_ns: float


async def grow(dsn: str, load: generate.Load, folder: Path, start: tuple[float, float]) -> Growth:
    """Make a load, import it, and look at what came of it. `start`: seconds and processor time of a tiny import."""
    made = generate.generate(folder / "load", load)
    database = await fresh(dsn, "growth")
    done = await asyncio.to_thread(import_as_a_process, database, made.capture, made.dbc_arguments)
    made.capture.unlink()
    wrong = await (truth.differences if made.signals < VALUES_COMPARED_MAX else counts_differ)(database, made.channels)
    if wrong:
        sys.exit(f"stored something else than was sent: {wrong[:3]}")
    sample, frame = await sizes(database)
    seconds, cpu_seconds = done["wall_seconds"], done["cpu_seconds"]
    found = Growth(
        samples=made.signals,
        channels=len(made.channels),
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        memory_mb=done["memory_mb"],
        bytes_per_sample=sample,
        bytes_per_frame=frame,
        channel_ms=await last_minute(database, made.channels[0]),
        wall_ns=1e9 * (seconds - start[0]) / made.signals,
        cpu_ns=1e9 * (cpu_seconds - start[1]) / made.signals,
    )
    connection = await asyncpg.connect(dsn_of(dsn, "postgres"))
    await connection.execute("DROP DATABASE growth WITH (FORCE)")
    await connection.close()
    return found


async def counts_differ(dsn: str, channels: Iterable[truth.Channel]) -> list[str]:
    """Channels of which more or fewer samples are stored than were sent, by what the chunks say of themselves."""
    connection = await asyncpg.connect(dsn)
    rows = await connection.fetch(
        """
        SELECT g.source, c.channel, sum(s.value_count[c.position])::bigint AS count
        FROM signal_chunks s JOIN signal_groups g ON g.id = s.group_id JOIN channels c ON c.group_id = g.id
        GROUP BY 1, 2
        """
    )
    await connection.close()
    stored = {(row["source"], row["channel"]): row["count"] for row in rows}
    return [
        f"{each.source} {each.name}: {stored.get((each.source, each.name), 0)} samples, should be {each.count}"
        for each in channels
        if stored.get((each.source, each.name), 0) != each.count
    ]


async def last_minute(dsn: str, channel: truth.Channel) -> float:
    """Milliseconds of a query for the last minute of a channel."""
    connection = await asyncpg.connect(dsn)
    await connection.execute("VACUUM ANALYZE signal_chunks")
    session = await connection.fetchval("SELECT id FROM sessions")
    end = await connection.fetchval("SELECT ended_utc FROM sessions")
    query = (
        "SELECT avg(value_num) FROM signals_between($1, $2, $3, $4::timestamptz - interval '1 minute', $4::timestamptz)"
    )
    milliseconds = await best_ms(lambda: connection.fetchval(query, session, channel.source, channel.name, end))
    await connection.close()
    return milliseconds


async def run(dsn: str, largest: int, folder: Path) -> dict[str, Any]:
    """All sizes, then all widths."""
    tiny = await grow(dsn, generate.Load(frames=1000), folder, (0.0, 0.0))
    start = tiny.seconds, tiny.cpu_seconds
    print(f"start: {start[0]:.2f} s, {start[1]:.2f} s of processor time")
    print("     samples  channels        s    ns a sample    CPU    memory  B/sample  B/frame  last minute")
    found: dict[str, Any] = {"start": asdict(tiny), "samples": [], "channels": []}

    async def measure(kind: str, load: generate.Load) -> None:
        needed = load.frames * DISK_BYTES_A_FRAME
        if needed > 0.9 * shutil.disk_usage(folder).free:
            print(f"{load.frames:,} frames need {needed / 1e9:.0f} GB of disk, which are not there: left out")
            return
        one = await grow(dsn, load, folder, start)
        found[kind].append(asdict(one))
        print(
            f"{one.samples:12,} {one.channels:9,} {one.seconds:8.1f} {one.wall_ns:14.0f} {one.cpu_ns:6.0f}"
            f" {one.memory_mb:6.0f} MB {one.bytes_per_sample:9.2f} {one.bytes_per_frame:8.2f} {one.channel_ms:9.2f} ms",
            flush=True,
        )

    for power in range(6, largest + 1):
        await measure("samples", generate.Load(frames=int(10**power / SIGNALS_A_FRAME)))
    load = generate.Load(frames=CHANNEL_FRAMES, fd=0.0, multiplexed=0.0)
    for buses, ids, signals in CHANNELS:
        await measure("channels", replace(load, buses=buses, ids=ids, signals=signals))
    return found


def main() -> None:
    """Measure on the distribution's server, or the one given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--largest", type=int, default=9, help="power of ten, in samples")
    parser.add_argument("--dsn", help="a server where databases may be made")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    began = time.monotonic()
    with server(arguments.dsn) as (dsn, what), tempfile.TemporaryDirectory(prefix="ingestd-bench-") as folder:
        print(what)
        result = asyncio.run(run(dsn, arguments.largest, Path(folder)))
    print(f"{time.monotonic() - began:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
