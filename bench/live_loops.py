"""What a user would write by hand, live: python-can receives; and then, or not, cantools decodes and asyncpg copies.

    python live_loops.py receive OUT CHANNEL       python-can's `recv`, and nothing done with what it gives
    python live_loops.py store OUT DSN DBC CHANNEL…  python-can's Notifier, cantools, asyncpg: rows into one plain table

As ordinary as bench/peers/asyncpg_copy.py, with its table and its five indexes; rows are copied when there are 20,000
of them, or twice a second. On SIGINT it ends and writes to OUT how many frames it had. OUT is there, empty, once it
listens.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import can

ROWS_PER_COPY = 20_000
COPY_SECONDS = 0.5


def receive(out: Path, channel: str) -> None:
    bus = can.Bus(interface="socketcan", channel=channel)
    count = 0
    out.touch()
    try:
        while True:
            if bus.recv(1) is not None:
                count += 1
    except KeyboardInterrupt:
        out.write_text(str(count))
        bus.shutdown()


async def store(out: Path, dsn: str, dbc: str, channels: list[str]) -> None:
    import asyncpg
    import cantools
    from peers.plain_table import COLUMNS, TABLE

    database = cantools.database.load_file(dbc)
    connection = await asyncpg.connect(dsn)
    await connection.execute(TABLE)
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    loop.add_signal_handler(signal.SIGINT, task.cancel)
    buses = [can.Bus(interface="socketcan", channel=channel) for channel in channels]
    reader = can.AsyncBufferedReader()
    notifier = can.Notifier(buses, [reader], loop=loop)
    out.touch()  # noqa: ASYNC240
    rows: list[tuple[object, ...]] = []
    count, copy_at = 0, time.monotonic() + COPY_SECONDS
    try:
        while True:
            message = await reader.get_message()
            count += 1
            definition = database.get_message_by_frame_id(message.arbitration_id)
            values = definition.decode(bytes(message.data), decode_choices=False, allow_truncated=True)
            ns = round(message.timestamp * 1e6) * 1000
            moment = datetime.fromtimestamp(message.timestamp, UTC)
            for name, value in values.items():
                unit = definition.get_signal_by_name(name).unit
                rows.append(("s1", message.channel, f"{definition.name}.{name}", moment, ns, float(value), unit))
            if len(rows) >= ROWS_PER_COPY or time.monotonic() >= copy_at:
                await connection.copy_records_to_table("naive_signals", records=rows, columns=COLUMNS)
                rows, copy_at = [], time.monotonic() + COPY_SECONDS
    except asyncio.CancelledError:
        out.write_text(str(count))  # noqa: ASYNC240
    notifier.stop()
    connection.terminate()


if __name__ == "__main__":
    what, where, *rest = sys.argv[1:]
    if what == "receive":
        receive(Path(where), rest[0])
    else:
        asyncio.run(store(Path(where), rest[0], rest[1], rest[2:]))
