"""What a database has to hold after a capture, channel by channel, and whether it does.

A synthetic load knows how often each of its signals was sent and what their raw values, the integers in the frame, add
up to. Sums of integers do not depend on the order and have no rounding, so equal means equal.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import asyncpg

OURS = "(SELECT source, channel, value_num AS value FROM signals) AS stored"
STORED = """
SELECT source, channel, count(*) AS count, coalesce(sum(round((value - "offset") / factor))::bigint, 0) AS raw_sum
FROM {table} JOIN unnest($1::text[], $2::text[], $3::float8[], $4::float8[])
    AS expected (source, channel, factor, "offset") USING (source, channel)
GROUP BY 1, 2
"""


@dataclass(frozen=True, slots=True)
class Channel:
    """A signal of a source, named as ingestd names it: message.signal."""

    source: str
    name: str
    factor: float
    offset: float
    count: int
    raw_sum: int


def write(path: Path, channels: Iterable[Channel]) -> None:
    """Keep it beside the capture."""
    path.write_text(json.dumps([asdict(channel) for channel in channels], indent=0) + "\n")


def read(path: Path) -> list[Channel]:
    """What `write` wrote."""
    return [Channel(**row) for row in json.loads(path.read_text())]


def times(channels: Iterable[Channel], loops: int) -> list[Channel]:
    """The same after so many passes through the capture."""
    return [Channel(c.source, c.name, c.factor, c.offset, loops * c.count, loops * c.raw_sum) for c in channels]


async def differences(dsn: str, channels: Iterable[Channel], table: str = OURS) -> list[str]:
    """Where the database holds something else, in words; empty if it holds just this.

    `table` is anything to select source, channel and value from.
    """
    sent = {(channel.source, channel.name): channel for channel in channels if channel.count}
    columns = [(c.source, c.name, c.factor, c.offset) for c in sent.values()]
    connection = await asyncpg.connect(dsn)
    try:
        total = await connection.fetchval(f"SELECT count(*) FROM {table}")
        rows = await connection.fetch(STORED.format(table=table), *map(list, zip(*columns, strict=True)))
    finally:
        await connection.close()
    stored = {(row["source"], row["channel"]): (row["count"], row["raw_sum"]) for row in rows}
    found = [
        f"{source} {name}: (count, sum) is {stored.get((source, name), (0, 0))}, should be {(c.count, c.raw_sum)}"
        for (source, name), c in sent.items()
        if stored.get((source, name), (0, 0)) != (c.count, c.raw_sum)
    ]
    known = sum(count for count, _ in stored.values())
    return found + ([f"{total - known} samples of channels that were not sent"] if total != known else [])
