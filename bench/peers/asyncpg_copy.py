"""What a user would write by hand: python-can reads, cantools decodes, asyncpg copies rows into one plain table.

python bench/peers/asyncpg_copy.py DSN CAPTURE [SOURCE:]DBC…
"""

from __future__ import annotations

import asyncio
import sys
import time

import asyncpg
from plain_table import COLUMNS, TABLE, batches, load, say


async def main(dsn: str, capture: str, databases: list[str]) -> None:
    by_source = load(databases)
    connection = await asyncpg.connect(dsn)
    await connection.execute(TABLE)
    started, count = time.perf_counter(), 0
    for batch in batches(capture, by_source):
        await connection.copy_records_to_table("naive_signals", records=batch, columns=COLUMNS)
        count += len(batch)
    say(count, time.perf_counter() - started)
    await connection.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
