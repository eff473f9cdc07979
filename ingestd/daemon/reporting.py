"""What the service manager is told: that the daemon is ready, that it is alive, and in one line how it goes.

Ready means that every source has its device or looks for it, and that the journal takes frames and the disk keeps them.
Until then each sign of life asks for more time, so that a disk that is full at the start does not make a service that
is started again and again.

A sign of life comes from the event loop and has gone through the journal and its sync: what a frame needs to be safe.
If one of them hangs there is none, and the manager starts the daemon anew. A disk that refuses, a bus that is
silent and a database that is away are no reason to be killed: they are in the line.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from ingestd.daemon.notify import Notifier
from ingestd.metrics import Snapshot
from ingestd.model import Link

PERIOD_SECONDS_MAX = 5.0  # how old the line may be
PERIOD_SECONDS_MIN = 0.05  # at the start, when readiness is near
SIGNS_OF_LIFE = 4  # in the time that the manager waits for one
START_SECONDS = 60.0  # that a sign of life asks for until the daemon is ready
REASON_CHARACTERS_MAX = 120


def unready(snapshot: Snapshot) -> dict[str, str]:
    """What keeps the daemon from recording, with the reason; empty when it is ready.

    A source that looks for its device is ready: that is not the daemon's fault, and it will be there when it returns.
    """
    reasons = {
        source: status.reason or "the device is being opened"
        for source, status in snapshot.statuses.items()
        if status.link is Link.OPENING
    }
    if not snapshot.journal.writable:
        reasons["journal"] = snapshot.journal.trouble or "the disk does not take frames"
    return reasons


def status_line(now: Snapshot, before: Snapshot, seconds: float) -> str:
    """How it goes, for people: sources, frames a second since `before`, backlog, database, and what else is wrong."""
    said = [_sources(now)]
    if now.recovered == before.recovered:  # Else the books have just got what earlier runs received.
        received = _received(now) - _received(before)
        said.append(f"{max(received, 0) / seconds:,.0f} frames/s")
    pending = sum(books.pending for books in now.books.values())
    said.append(
        f"backlog {pending:,} frames, {_duration(now.journal.oldest_pending_seconds)}" if pending else "no backlog"
    )
    trouble = dict(now.trouble)
    database = trouble.pop("database", "")
    said.append(
        "database up" if now.store.up else f"database away ({_short(database)})" if database else "database away"
    )
    if not now.journal.writable:
        said.insert(0, f"THE JOURNAL TAKES NOTHING ({_short(now.journal.trouble or 'the disk refuses')})")
    if unbalanced := sorted(source for source, books in now.books.items() if not books.balanced):
        said.insert(0, f"BOOKS NOT BALANCED: {', '.join(unbalanced)}")
    said += [f"{what}: {_short(reason)}" for what, reason in sorted(trouble.items())]
    return "; ".join(said)


def _received(snapshot: Snapshot) -> int:
    return sum(books.received for books in snapshot.books.values())


def _sources(now: Snapshot) -> str:
    away = {name: status for name, status in sorted(now.statuses.items()) if status.link is not Link.OPEN}
    said = f"{len(now.statuses) - len(away)} of {len(now.statuses)} sources up"
    if not away:
        return said
    name, status = next(iter(away.items()))
    others = f" and {len(away) - 1} more" if len(away) > 1 else ""
    return f"{said} ({name}: {_short(status.reason or status.link.value)}{others})"


def _short(reason: str) -> str:
    return reason if len(reason) <= REASON_CHARACTERS_MAX else reason[: REASON_CHARACTERS_MAX - 2].rstrip() + " …"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.1f} s"


async def report(
    notifier: Notifier, snapshot: Callable[[], Snapshot], sign_of_life: Callable[[], Awaitable[None]]
) -> None:
    """Tell the service manager, until cancelled; if there is none, return at once.

    `sign_of_life` returns when the event loop, the journal and its sync have got through once more.
    """
    if not notifier.is_listening:
        return
    is_ready, before, at = False, snapshot(), time.monotonic()
    period = PERIOD_SECONDS_MIN
    while True:
        await asyncio.sleep(period)
        await sign_of_life()
        now, now_at = snapshot(), time.monotonic()
        line = status_line(now, before, now_at - at)
        if not is_ready and not unready(now):
            is_ready = True
            notifier.ready(line)
        elif is_ready:
            notifier.alive(line)
        else:
            notifier.starting(line, START_SECONDS)
        before, at = now, now_at
        period_max = min(PERIOD_SECONDS_MAX, (notifier.watchdog_seconds or START_SECONDS) / SIGNS_OF_LIFE)
        period = min(2 * period, period_max)
