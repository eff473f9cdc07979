"""What a user of asammdf would write: its bus logging extraction, a data frame for each group, COPY as CSV.

    python bench/peers/asammdf_copy.py DSN MF4 [SOURCE:]DBC…

It reads the same frames as MF4, where can0 is bus 1; converting them is not timed.
"""

from __future__ import annotations

import asyncio
import io
import re
import sys
import time

import asyncpg
import numpy as np
import pandas
from asammdf import MDF
from plain_table import COLUMNS, TABLE, say

MESSAGE = re.compile(r"CAN(\d+) - message (\S+)")  # in the comment of an extracted group


async def main(dsn: str, capture: str, databases: list[str]) -> None:
    files = []
    for entry in databases:
        source, _, path = entry.rpartition(":")
        files.append((source, path))
    connection = await asyncpg.connect(dsn)
    await connection.execute(TABLE)
    started, count = time.perf_counter(), 0
    with MDF(capture) as log:
        start_us = round(log.header.start_time.timestamp() * 1e6)
        for source, path in files:
            bus = int(source.removeprefix("can")) + 1
            extracted = log.extract_bus_logging({"CAN": [(path, bus)]}, ignore_value2text_conversion=True)
            for index, group in enumerate(extracted.groups):
                found = MESSAGE.search(group.channel_group.comment)
                assert found is not None, group.channel_group.comment
                frame = extracted.get_group(index, ignore_value2text_conversions=True, time_from_zero=False)
                count += await copy(connection, frame, source, found[2], start_us)
            extracted.close()
    say(count, time.perf_counter() - started)
    await connection.close()


async def copy(
    connection: asyncpg.Connection, frame: pandas.DataFrame, source: str, message: str, start_us: int
) -> int:
    """The frame's cells as rows."""
    us = start_us + np.rint(frame.index.to_numpy() * 1e6).astype(np.int64)
    frame = frame.rename(columns=lambda name: f"{message}.{name}")
    frame.insert(0, "ts_ns", us * 1000)
    long = frame.melt("ts_ns", var_name="channel")
    long["ts"] = pandas.to_datetime(long["ts_ns"], utc=True)
    long["session_id"], long["source"], long["unit"] = "s1", source, ""
    text = io.BytesIO()
    long.to_csv(text, columns=COLUMNS, header=False, index=False)
    text.seek(0)
    await connection.copy_to_table("naive_signals", source=text, columns=COLUMNS, format="csv")
    return len(long)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
