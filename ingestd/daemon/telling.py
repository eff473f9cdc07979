"""What is told of a daemon, in numbers: one snapshot for metrics, the status line and the page."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Final

from ingestd import __version__
from ingestd.clock import mono_ns
from ingestd.daemon.live import Live, Value, matches
from ingestd.delivery.status import DeliveryStatus
from ingestd.metrics import (
    LAG_BOUNDS,
    ChannelValue,
    Histogram,
    JournalNumbers,
    Snapshot,
    SourceNumbers,
    StoreNumbers,
)
from ingestd.model import ClockState, SourceStatus

if TYPE_CHECKING:
    from ingestd.daemon.service import Daemon

log = logging.getLogger(__name__)

LAG_PERIOD_SECONDS: Final = 0.25
CHANNELS_MAX: Final = 500  # that a pattern may make metrics of
CHANNEL_SECONDS: Final = 1.0
UNMATCHED_SECONDS: Final = 60.0  # after which it is said that nothing has matched a pattern
CHANNEL_AGE_NS_MAX: Final = 60_000_000_000  # An older value is told no more.


class Following:
    """What has to be followed to be told: how late the event loop is, and channels that are wanted as metrics."""

    def __init__(self, live: Live) -> None:
        self.loop_lag = Histogram(LAG_BOUNDS)
        self._live = live
        self._values: dict[tuple[str, str], Value] = {}
        self._watching: asyncio.Task[None] | None = None

    async def follow_loop(self) -> None:
        """Measure how late the event loop is with what is due, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_PERIOD_SECONDS
            await asyncio.sleep(LAG_PERIOD_SECONDS)
            self.loop_lag.observe(loop.time() - due)

    def follow_channels(self, patterns: Sequence[str]) -> None:
        """Have the values of channels that match one of the patterns, and of no others any more."""
        if self._watching is not None:
            self._watching.cancel()
        self._values, self._watching = {}, None
        if patterns:
            self._watching = asyncio.create_task(self._follow_channels(tuple(patterns), self._values), name="channels")

    async def _follow_channels(self, patterns: tuple[str, ...], values: dict[tuple[str, str], Value]) -> None:
        unmatched, unmatched_due = set(patterns), time.monotonic() + UNMATCHED_SECONDS
        is_full = False
        async with aclosing(self._live.watch("*", CHANNEL_SECONDS)) as watch:
            async for changed in watch:
                for value in changed:
                    key = value.source, value.channel
                    matching = [each for each in patterns if matches(each, *key)]
                    unmatched.difference_update(matching)
                    if not matching or value.number is None:
                        continue
                    if key in values or len(values) < CHANNELS_MAX:
                        values[key] = value
                    elif not is_full:
                        is_full = True
                        log.warning("metrics.channels match more than %d channels: the rest is left out", CHANNELS_MAX)
                if unmatched and time.monotonic() >= unmatched_due:
                    unmatched_due = math.inf
                    said = "nothing has matched metrics.channels yet patterns=%s hint='ingestd tail shows the names'"
                    log.warning(said, sorted(unmatched))

    def channels(self) -> list[ChannelValue]:
        """The values of channels that are wanted."""
        oldest_ns = mono_ns() - CHANNEL_AGE_NS_MAX
        for key in [key for key, value in self._values.items() if value.ts_mono_ns < oldest_ns]:
            del self._values[key]
        return [
            ChannelValue(value.source, value.channel, value.unit or "", value.number)
            for value in self._values.values()
            if value.number is not None
        ]


def snapshot(daemon: Daemon) -> Snapshot:
    """Everything that is told, at this instant."""
    journal, books = daemon.journal, daemon.books()
    status = DeliveryStatus() if daemon.delivery is None else daemon.delivery.status
    statuses = {source.name: source.status for source in daemon.sources}
    pending = any(each.pending for each in books.values())
    return Snapshot(
        version=__version__,
        books=books,
        statuses=statuses,
        sources={name: _source(daemon, name, each, status) for name, each in statuses.items()},
        journal=JournalNumbers(
            writable=journal.writable,
            bytes=journal.bytes_used,
            bytes_max=daemon.config.journal.max_bytes,
            oldest_pending_seconds=time.monotonic() - status.drained_at if pending else 0.0,
            written_bytes=journal.bytes_written,
            syncs=journal.syncs,
            damaged_bytes=journal.damaged_bytes,
            trouble=journal.trouble,
        ),
        store=StoreNumbers(
            up=status.database_up,
            commits=status.commits,
            commit_failures=status.failures,
            rejections=status.rejections,
            reconnects=max(status.connections - 1, 0),
            samples=status.samples,
            copied_bytes=status.copied_bytes,
            commit_seconds=status.commit_seconds,
            wire_to_commit_seconds=status.lag_seconds,
        ),
        trouble={**({"database": status.trouble} if status.trouble else {}), **daemon.trouble},
        recovered=daemon.recovered,
        loop_lag_seconds=daemon.following.loop_lag,
        is_clock_set=daemon.wall_clock.now().state is not ClockState.UNSET,
        channels=daemon.following.channels(),
    )


def _source(daemon: Daemon, name: str, status: SourceStatus, delivered: DeliveryStatus) -> SourceNumbers:
    counts, now_ns = delivered.decoded.get(name), mono_ns()
    newest_ns = max(daemon.recording.newest_ns.get(name, 0), daemon.attendance.began_ns.get(name, now_ns))
    return SourceNumbers(
        last_frame_age_seconds=max(now_ns - newest_ns, 0) / 1e9,
        bus_load=None if status.load is None else status.load.ratio(now_ns),
        decoded=0 if counts is None else counts.decoded,
        undecoded={} if counts is None else {"unknown": counts.unknown, "damaged": counts.undecoded},
        short=0 if counts is None else counts.short,
    )
