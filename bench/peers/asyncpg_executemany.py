"""The same by hand with INSERT: asyncpg's executemany, a transaction for each 10,000 rows.

python bench/peers/asyncpg_executemany.py DSN CAPTURE [SOURCE:]DBC…
"""

from __future__ import annotations

import asyncio
import sys
import time

import asyncpg
from plain_table import COLUMNS, TABLE, batches, load, say

INSERT = (
    f"INSERT INTO naive_signals ({', '.join(COLUMNS)})"
    f" VALUES ({', '.join(f'${number}' for number in range(1, len(COLUMNS) + 1))})"
)


async def main(dsn: str, capture: str, databases: list[str]) -> None:
    by_source = load(databases)
    connection = await asyncpg.connect(dsn)
    await connection.execute(TABLE)
    started, count = time.perf_counter(), 0
    for batch in batches(capture, by_source):
        await connection.executemany(INSERT, batch)
        count += len(batch)
    say(count, time.perf_counter() - started)
    await connection.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
