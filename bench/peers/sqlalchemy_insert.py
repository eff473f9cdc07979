"""The same by hand with SQLAlchemy: its bulk insert of 10,000 rows at a time, over asyncpg.

python bench/peers/sqlalchemy_insert.py DSN CAPTURE [SOURCE:]DBC…
"""

from __future__ import annotations

import asyncio
import sys
import time

from plain_table import COLUMNS, TABLE, batches, load, say
from sqlalchemy import BigInteger, Column, DateTime, Double, MetaData, Table, Text, insert, text
from sqlalchemy.ext.asyncio import create_async_engine

SIGNALS = Table(
    "naive_signals",
    MetaData(),
    *(Column(name, Text) for name in ("session_id", "source", "channel")),
    Column("ts", DateTime(timezone=True)),
    Column("ts_ns", BigInteger),
    Column("value", Double),
    Column("unit", Text),
)


async def main(dsn: str, capture: str, databases: list[str]) -> None:
    by_source = load(databases)
    engine = create_async_engine(dsn.replace("postgresql://", "postgresql+asyncpg://", 1))
    async with engine.begin() as connection:
        for statement in filter(str.strip, TABLE.split(";")):
            await connection.execute(text(statement))
    started, count = time.perf_counter(), 0
    for batch in batches(capture, by_source):
        async with engine.begin() as connection:
            await connection.execute(insert(SIGNALS), [dict(zip(COLUMNS, row, strict=True)) for row in batch])
        count += len(batch)
    say(count, time.perf_counter() - started)
    await engine.dispose()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
