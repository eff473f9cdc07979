"""A journal being sent into a real PostgreSQL in the process of the test, so that it can look at every step."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import numpy as np

from ingestd.decode.databases import SignalDatabase, load
from ingestd.delivery.sending import Delivery
from ingestd.journal import Journal
from ingestd.model import Books, FrameBatch
from ingestd.pipeline import Binding, Decoders
from ingestd.store.writer import Writer
from tests.conftest import psql
from tests.journals import CLOCK, frames

SECONDS_MAX = 60.0


def make(journal: Journal, dsn: str, machine_id: str = "machine-1", **options: Any) -> Delivery:
    """The delivery of a journal, with decoders that know no message."""
    writer = Writer(dsn, "", journal=f"test-{uuid4().hex[:8]}")
    delivery = Delivery(
        journal, writer, machine_id,
        record_event=lambda event: journal.append_event(event, CLOCK), **({"interval_s": 0.02} | options),
    )  # fmt: skip
    delivery.decoders = Decoders([], protocols={"line": "lines"})
    return delivery


async def send(delivery: Delivery) -> None:
    """Send what there is, to the end."""
    recovered = asyncio.Event()
    recovered.set()
    delivery.stop()
    await asyncio.wait_for(delivery.run(recovered), SECONDS_MAX)


@contextlib.asynccontextmanager
async def sending(delivery: Delivery) -> AsyncIterator[Delivery]:
    """Send in the background; what goes wrong there, and is nobody's to catch, fails the test."""
    recovered = asyncio.Event()
    recovered.set()
    task = asyncio.create_task(delivery.run(recovered))
    try:
        yield delivery
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def counted(first: int, count: int) -> FrameBatch:
    """Frames of one message, whose signal is their number."""
    numbers = np.arange(first, first + count, dtype="<u4")
    data = np.zeros((count, 8), np.uint8)
    data[:, :4] = numbers.view(np.uint8).reshape(count, 4)
    return replace(
        frames(first, count),
        arbitration_id=np.full(count, 256, np.uint32),
        flags=numbers.astype(np.uint8) * 0,
        data=data,
    )


def count_database(folder: Path) -> SignalDatabase:
    """The signal database of that message."""
    path = folder / "count.dbc"
    path.write_text('VERSION ""\n\nBU_: ECU\n\nBO_ 256 Count: 8 ECU\n SG_ Number : 0|32@1+ (1,0) [0|0] "" ECU\n')
    return load(path)


def counting(folder: Path) -> Decoders:
    """What decodes it."""
    return Decoders([Binding(None, count_database(folder))])


async def until(condition: Callable[[], Any], what: str) -> None:
    """Wait for something that the delivery, or the journal, says."""
    deadline = time.monotonic() + SECONDS_MAX
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {SECONDS_MAX} s"
        await asyncio.sleep(0.01)


async def sql(dsn: str, *statements: str) -> list[str]:
    """What statements print, line by line; a delivery that holds a lock goes on meanwhile."""
    return (await asyncio.to_thread(psql, dsn, *statements)).splitlines()


async def numbers(dsn: str, source: str = "can0") -> list[int]:
    """The numbers of the frames that are stored, in ascending order; whatever is stored twice is in it twice."""
    connection = await asyncpg.connect(dsn)
    try:
        rows = await connection.fetch(
            "SELECT unnest(arbitration_id) AS number FROM frame_chunks WHERE source = $1 ORDER BY 1", source
        )
    finally:
        await connection.close()
    return [row["number"] for row in rows]


async def events(dsn: str) -> list[tuple[str, str, int]]:
    """Kind, key and number of frames of the events that are stored, in the order of their stamps."""
    rows = await sql(
        dsn, "SELECT kind, key, coalesce(payload ->> 'frames', '0') FROM events ORDER BY ts_mono_ns, kind, key"
    )
    return [(kind, key, int(count)) for kind, key, count in (row.split("|") for row in rows)]


def books(journal: Journal, source: str = "can0") -> Books:
    """The books of a source, which balance."""
    found = journal.books()[source]
    assert found.balanced, found
    return found


def copied(journal: Journal, folder: Path) -> Path:
    """What the folder of a journal holds now, elsewhere."""
    return Path(shutil.copytree(journal._log.shelf.folder, folder, ignore=shutil.ignore_patterns("lock")))


async def end_connections(dsn: str) -> None:
    """End every connection of a delivery, as a restart of the server does."""
    await sql(
        dsn,
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        " WHERE application_name LIKE 'ingestd/%' AND datname = current_database()",
    )
