"""What a user would write by hand: python-can reads, cantools decodes, asyncpg copies rows into one plain table.

Kept deliberately ordinary, with the usual five indexes and batches large enough to be fair (20,000 rows).

    python bench/naive.py DSN CAPTURE [SOURCE:]DBC…
"""

from __future__ import annotations

import asyncio
import sys
import time
from datetime import UTC, datetime

import asyncpg
import can
import cantools

TABLE = """
CREATE TABLE naive_signals (
    id bigserial PRIMARY KEY,
    session_id text NOT NULL,
    source text NOT NULL,
    channel text NOT NULL,
    ts timestamptz NOT NULL,
    ts_ns bigint NOT NULL,
    value double precision,
    unit text
);
CREATE INDEX ON naive_signals (session_id);
CREATE INDEX ON naive_signals (source);
CREATE INDEX ON naive_signals (channel, ts);
CREATE INDEX ON naive_signals (ts);
"""
COLUMNS = ["session_id", "source", "channel", "ts", "ts_ns", "value", "unit"]
ROWS_PER_COPY = 20_000


async def main(dsn: str, capture: str, databases: list[str]) -> None:
    by_source = {}
    for entry in databases:
        source, _, path = entry.rpartition(":")
        by_source[source] = cantools.database.load_file(path)
    connection = await asyncpg.connect(dsn)
    await connection.execute(TABLE)
    started = time.perf_counter()
    rows: list[tuple[object, ...]] = []
    count = 0
    for message in can.LogReader(capture):
        database = by_source.get(str(message.channel)) or by_source.get("")
        try:
            definition = database.get_message_by_frame_id(message.arbitration_id)
        except KeyError:
            continue
        values = definition.decode(bytes(message.data), decode_choices=False, allow_truncated=True)
        ns = round(message.timestamp * 1e6) * 1000
        moment = datetime.fromtimestamp(message.timestamp, UTC)
        for name, value in values.items():
            unit = definition.get_signal_by_name(name).unit
            rows.append(("s1", message.channel, f"{definition.name}.{name}", moment, ns, float(value), unit))
        if len(rows) >= ROWS_PER_COPY:
            await connection.copy_records_to_table("naive_signals", records=rows, columns=COLUMNS)
            count += len(rows)
            rows = []
    await connection.copy_records_to_table("naive_signals", records=rows, columns=COLUMNS)
    count += len(rows)
    print(f"{count} {time.perf_counter() - started:.3f}")
    await connection.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
