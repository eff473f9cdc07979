"""What the service manager is told, with a recorder that is made up and a manager that is a real socket."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from ingestd.daemon.notify import Notifier
from ingestd.daemon.reporting import report, status_line, unready
from ingestd.metrics import Histogram, JournalNumbers, Snapshot, StoreNumbers
from ingestd.model import Books, Link, SourceStatus

OPEN = SourceStatus(Link.OPEN)


def snapshot(
    *,
    books: dict[str, Books] | None = None,
    statuses: dict[str, SourceStatus] | None = None,
    writable: bool = True,
    journal_trouble: str = "",
    oldest_seconds: float = 0.0,
    up: bool = True,
    trouble: dict[str, str] | None = None,
) -> Snapshot:
    return Snapshot(
        version="1",
        books=books or {},
        statuses={"can0": OPEN} if statuses is None else statuses,
        journal=JournalNumbers(
            writable=writable, bytes=0, bytes_max=0, oldest_pending_seconds=oldest_seconds, written_bytes=0, syncs=0,
            damaged_bytes=0, trouble=journal_trouble,
        ),
        store=StoreNumbers(
            up=up, commits=0, commit_failures=0, commit_seconds=Histogram(), wire_to_commit_seconds=Histogram()
        ),
        trouble=trouble or {},
    )  # fmt: skip


def frames(received: int, committed: int) -> dict[str, Books]:
    return {"can0": Books(received, committed, received - committed)}


def test_a_good_day() -> None:
    """Sources, frames a second, backlog, database."""
    before = snapshot(books=frames(1_000, 1_000))
    assert status_line(before, before, 5) == "1 of 1 sources up; 0 frames/s; no backlog; database up"
    now = snapshot(books=frames(41_600, 41_000), oldest_seconds=0.42)
    assert status_line(now, before, 5) == "1 of 1 sources up; 8,120 frames/s; backlog 600 frames, 0.4 s; database up"


def test_what_earlier_runs_received_is_no_rate() -> None:
    """The books get it at once, when the journal has been looked through."""
    before = replace(snapshot(books=frames(10, 10)), recovered=False)
    now = snapshot(books=frames(1_000_000, 1_000_000))
    assert status_line(now, before, 5) == "1 of 1 sources up; no backlog; database up"


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (
            snapshot(statuses={"can0": OPEN, "gps": SourceStatus(Link.RETRYING, "/dev/gps does not exist")}),
            "1 of 2 sources up (gps: /dev/gps does not exist)",
        ),
        (
            snapshot(statuses={"a": SourceStatus(Link.RETRYING, "is down"), "b": SourceStatus(), "c": SourceStatus()}),
            "0 of 3 sources up (a: is down and 2 more)",
        ),
        (snapshot(statuses={"a": SourceStatus()}), "0 of 1 sources up (a: opening)"),
        (snapshot(up=False, trouble={"database": "no route to host"}), "database away (no route to host)"),
        (snapshot(up=False), "database away"),
        (snapshot(trouble={"car.dbc": "cannot be read"}), "database up; car.dbc: cannot be read"),
        (snapshot(trouble={"car.dbc": "x" * 200}), f"car.dbc: {'x' * 118} …"),
        (snapshot(writable=False, journal_trouble="disk full"), "THE JOURNAL TAKES NOTHING (disk full); 1 of 1"),
        (snapshot(writable=False), "THE JOURNAL TAKES NOTHING (the disk refuses)"),
        (snapshot(books={"can0": Books(received=5)}), "BOOKS NOT BALANCED: can0; 1 of 1"),
        (snapshot(books=frames(9_000, 0), oldest_seconds=119), "backlog 9,000 frames, 119.0 s"),
        (snapshot(books=frames(9_000, 0), oldest_seconds=600), "backlog 9,000 frames, 10 min"),
        (snapshot(books=frames(9_000, 0), oldest_seconds=7_200), "backlog 9,000 frames, 2 h"),
        (snapshot(books=frames(9_000, 0), oldest_seconds=259_200), "backlog 9,000 frames, 3 days"),
    ],
)
def test_whatever_is_wrong_is_in_the_line(now: Snapshot, words: str) -> None:
    """With its reason, and what is worst first."""
    assert words in status_line(now, snapshot(), 5)


def test_ready_is_who_records_or_looks_for_the_device() -> None:
    """A source that has not looked yet keeps the daemon from being ready, and so does a journal that takes nothing."""
    assert unready(snapshot(statuses={"can0": OPEN, "gps": SourceStatus(Link.RETRYING, "is not there")})) == {}
    assert unready(snapshot(statuses={"can0": SourceStatus()})) == {"can0": "the device is being opened"}
    assert unready(snapshot(writable=False)) == {"journal": "the disk does not take frames"}
    assert unready(snapshot(writable=False, journal_trouble="full")) == {"journal": "full"}


@contextmanager
def manager(folder: Path, **environment: str) -> Iterator[tuple[socket.socket, Notifier]]:
    path = os.path.relpath(folder / "notify")  # A socket's name has room for 108 bytes.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(path)
        listening.settimeout(10)
        yield listening, Notifier({"NOTIFY_SOCKET": str((folder / "notify").absolute()), **environment})


async def test_from_starting_to_alive(tmp_path: Path) -> None:
    """Until the journal takes frames it asks for more time; then it is ready, once; then it is alive.

    Each of these is told only after a sign of life has gone all the way: one that hangs is silence.
    """
    states = [snapshot(writable=False), snapshot(writable=False), snapshot(), snapshot()]
    hung, lives = asyncio.Event(), 0

    async def sign_of_life() -> None:
        nonlocal lives
        lives += 1
        if lives == 4:
            hung.set()
            await asyncio.Event().wait()

    with manager(tmp_path, WATCHDOG_USEC="400000") as (listening, notifier):
        reporting = asyncio.create_task(report(notifier, lambda: states[min(lives, 3)], sign_of_life))
        await asyncio.wait_for(hung.wait(), 30)
        said = [listening.recv(4096).decode() for _ in range(3)]
        listening.setblocking(False)
        with pytest.raises(BlockingIOError):
            listening.recv(4096)
        reporting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reporting
    assert said[0].startswith("EXTEND_TIMEOUT_USEC=60000000\nSTATUS=THE JOURNAL TAKES NOTHING")
    assert said[1].startswith("READY=1\nSTATUS=1 of 1 sources up")
    assert said[2].startswith("WATCHDOG=1\nSTATUS=1 of 1 sources up")


async def test_nobody_listens() -> None:
    """Started from a shell: there is nothing to do."""
    await asyncio.wait_for(report(Notifier({}), snapshot, asyncio.Event().wait), 5)
