"""The demo: the daemon records the simulated car, and at the end the books are balanced from outside.

The car counts what it sends, the journal what it received, and the database is asked what it holds. All of the daemon
is what `ingestd run` runs, but for the signals and the log of the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import logging.handlers
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ingestd.cli.console import Listing, out, run, warn
from ingestd.cli.demo_view import Reading, View
from ingestd.cli.running import LogLine
from ingestd.config import Config, control_socket, load_config
from ingestd.daemon import control
from ingestd.daemon.api import api_routes
from ingestd.daemon.devices import open_sources
from ingestd.daemon.endpoints import serve
from ingestd.daemon.live import Value
from ingestd.daemon.live_control import live_routes
from ingestd.daemon.page import page_routes
from ingestd.daemon.service import Daemon
from ingestd.daemon.session_control import session_routes
from ingestd.demo import BUSES, DEMO_TRACK, GPS
from ingestd.demo.simulation import BusKind, Simulation
from ingestd.errors import IngestdError
from ingestd.model import Books, Link
from ingestd.store import embedded
from ingestd.store.watch import open_watch

OPEN_SECONDS_MAX = 30.0
ARRIVE_SECONDS_MAX = 10.0
STORE_SECONDS_MAX = 60.0
POLL_SECONDS = 0.02
LOOK_SECONDS = 1.0
LINE_SECONDS = 5.0  # how often a line is printed where nobody sees a live view
NOTES_SHOWN = 3
NOTES_KEPT = 20
LOG_BYTES_MAX = 1 << 20
CONFIG, LOG = "ingestd.toml", "ingestd.log"


@dataclass(frozen=True, slots=True)
class Balance:
    """What became of the frames of a source."""

    source: str
    sent: int
    received: int
    stored: int
    rejected: int
    dropped: int

    @property
    def lost(self) -> int:
        """What never got as far as the journal, or was dropped there."""
        return self.sent - self.received + self.dropped

    @property
    def balanced(self) -> bool:
        """Whether all of it is in the database, once."""
        return self.sent == self.received == self.stored and self.rejected == 0 and self.dropped == 0


def record_demo(seconds: float | None, buses: BusKind, dsn: str, folder: Path) -> None:
    """Record the car for some seconds, or until SIGINT or SIGTERM. Raises IngestdError if the books do not balance."""
    folder.mkdir(parents=True, exist_ok=True)
    notes = _log_to(folder / LOG)
    sys.setswitchinterval(0.001)  # As the daemon has it; see daemon/running.py.
    with Simulation(buses) as simulation:
        config = _configure(folder, simulation, dsn)
        balances = run(_Demo(config, simulation, dsn, notes).run(seconds))
    for note in notes:
        warn(note)
    _print_balances(balances)
    if not all(balance.balanced for balance in balances):
        raise IngestdError("the books do not balance", f"see {folder / LOG}")


def _configure(folder: Path, simulation: Simulation, dsn: str) -> Config:
    """Write the configuration that `ingestd run` would take, and read it."""
    path = folder / CONFIG
    database = "[database]\nembedded = true\n\n" if embedded.running() == dsn else ""
    name = json.dumps(f"demo {datetime.now(UTC):%Y-%m-%d %H:%M:%S}")
    path.write_text(
        "# Written by `ingestd demo`; the devices exist while it runs.\n"
        f'[session]\nname = {name}\ncar_id = "demo-car"\ntrack = "{DEMO_TRACK}"\n\n'
        f'[journal]\npath = "journal"\nmax_bytes = "1GiB"\n\n'
        f"{database}{simulation.configuration()}",
        encoding="utf-8",
    )
    return load_config(path, dsn=dsn)


class _Demo:
    """One run of the daemon on the car."""

    def __init__(self, config: Config, simulation: Simulation, dsn: str, notes: deque[str]) -> None:
        self._config, self._simulation, self._dsn, self._notes = config, simulation, dsn, notes
        self._stop = asyncio.Event()

    async def run(self, seconds: float | None) -> list[Balance]:
        """Record for some seconds, or until somebody wants it to end; then balance the books."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop.set)
        async with open_watch(self._dsn) as watch:
            daemon = Daemon(self._config, open_sources(self._config))
            running = asyncio.create_task(daemon.run(), name="daemon")
            running.add_done_callback(lambda _: self._stop.set())
            try:
                routes = [*page_routes(), *api_routes(daemon)]
                commands = [*session_routes(daemon), *live_routes(daemon)]
                async with (
                    control.serve(control_socket(self._config.control, self._config.journal.path), commands),
                    serve(self._config.http.listen, daemon.snapshot, routes=routes) as endpoints,
                ):
                    # The books are of this process alone until the journal knows what earlier ones left.
                    await self._until(lambda: _all_open(daemon) and daemon.recovered, OPEN_SECONDS_MAX)
                    if not _all_open(daemon) and not self._stop.is_set():
                        raise IngestdError(f"the car's devices cannot be opened: {_reasons(daemon)}")
                    before, first_session = dict(daemon.books()), daemon.session_id
                    from_ns = time.monotonic_ns()
                    await asyncio.to_thread(self._simulation.play)
                    listening = str(endpoints.address) if endpoints is not None and endpoints.address else None
                    self._say_where(daemon, listening)
                    await self._watch(daemon, before, seconds)
                    await self._finish(daemon, running, before)
            finally:
                daemon.stop("the demo is over")
                await running
            stored = await watch.frames(first_session, from_ns)
            return _balances(self._simulation.sent(), before, daemon.books(), stored)

    def _say_where(self, daemon: Daemon, listening: str | None) -> None:
        places = self._simulation.places
        devices = ", ".join(f"{name} on {place.get('channel') or place['port']}" for name, place in places.items())
        out.print(f"car       {devices}")
        out.print(f"page      {f'http://{listening}/' if listening else 'not served: the address is taken'}")
        if listening:
            out.print(f"metrics   http://{listening}/metrics")
        folder = self._config.journal.path.parent
        out.print(f"commands  ingestd tail -c {folder / CONFIG}, and sessions")
        out.print(f"log       {folder / LOG}")
        out.print(f"data      {_psql(self._dsn)}")
        query = f"SELECT channel, value_num, value_text, unit FROM latest_signals('{daemon.session_id}') ORDER BY 1"
        out.print(f"          {query};")

    async def _watch(self, daemon: Daemon, before: Mapping[str, Books], seconds: float | None) -> None:
        """Show how it goes."""
        deadline = None if seconds is None else time.monotonic() + seconds
        began = time.monotonic()
        latest: dict[tuple[str, str], Value] = {}
        watching = asyncio.create_task(_keep_latest(daemon, latest), name="watch")
        try:
            await self._show(daemon, before, began, deadline, latest)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _show(
        self,
        daemon: Daemon,
        before: Mapping[str, Books],
        began: float,
        deadline: float | None,
        latest: Mapping[tuple[str, str], Value],
    ) -> None:
        with View(out, LINE_SECONDS) as view:
            while True:
                left = LOOK_SECONDS if deadline is None else min(LOOK_SECONDS, deadline - time.monotonic())
                if left <= 0:
                    return
                await self._until(lambda: False, left)
                if self._stop.is_set():
                    return
                reading = Reading(
                    seconds=time.monotonic() - began,
                    sent=self._simulation.sent(),
                    books=_since(before, daemon.books()),
                    snapshot=daemon.snapshot(),
                    lag_seconds=daemon.delivery.status.lag_seconds_last if daemon.delivery else None,
                    latest=latest,
                    notes=list(self._notes)[-NOTES_SHOWN:],
                )
                view.show(reading)

    async def _finish(self, daemon: Daemon, running: asyncio.Task[None], before: Mapping[str, Books]) -> None:
        """The car stops, and what it sent arrives and is stored: on a small machine the first batch takes its time."""
        sent = await asyncio.to_thread(self._simulation.stop)

        def arrived() -> bool:
            return all(each.received >= each.sent for each in _balances(sent, before, daemon.books(), {}))

        if not running.done():
            self._stop.clear()  # Now it means a second Ctrl-C, or the end of the daemon: wait no longer.
        await self._until(arrived, ARRIVE_SECONDS_MAX)
        await self._until(lambda: not any(books.pending for books in daemon.books().values()), STORE_SECONDS_MAX)

    async def _until(self, condition: Callable[[], bool], seconds_max: float) -> None:
        """Wait for a condition, for the end of the daemon, or for somebody who wants it all to end."""
        deadline = time.monotonic() + seconds_max
        while not condition() and not self._stop.is_set() and (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), min(left, POLL_SECONDS))


async def _keep_latest(daemon: Daemon, latest: dict[tuple[str, str], Value]) -> None:
    """Keep the newest value of each channel, until cancelled."""
    async with contextlib.aclosing(daemon.live.watch("*", LOOK_SECONDS / 2)) as watch:
        async for values in watch:
            latest.update({(value.source, value.channel): value for value in values})


def _all_open(daemon: Daemon) -> bool:
    return all(source.status.link is Link.OPEN for source in daemon.sources)


def _reasons(daemon: Daemon) -> str:
    return "; ".join(f"{source.name}: {source.status.reason or source.status.link.value}" for source in daemon.sources)


def _balances(
    sent: Mapping[str, int], before: Mapping[str, Books], after: Mapping[str, Books], stored: Mapping[str, int]
) -> list[Balance]:
    """What this run added to the journal's books, beside what the car and the database say."""
    books = _since(before, after)
    return [
        Balance(
            source=source,
            sent=count,
            received=books[source].received,
            stored=stored.get(source, 0),
            rejected=books[source].rejected,
            dropped=sum(books[source].dropped.values()),
        )
        for source, count in sent.items()
    ]


def _since(before: Mapping[str, Books], after: Mapping[str, Books]) -> dict[str, Books]:
    """What was added to the books of each source; pending is what it is."""
    added: dict[str, Books] = {}
    for source in (*BUSES, GPS):
        was, now = before.get(source, Books()), after.get(source, Books())
        added[source] = Books(
            received=now.received - was.received,
            committed=now.committed - was.committed,
            pending=now.pending,
            rejected=now.rejected - was.rejected,
            dropped={reason: count - was.dropped.get(reason, 0) for reason, count in now.dropped.items()},
        )
    return added


def _print_balances(balances: list[Balance]) -> None:
    shown = Listing("source", "sent", "received", "stored", "rejected", "lost", "")
    for each in balances:
        counts = (each.sent, each.received, each.stored, each.rejected, each.lost)
        shown.add(each.source, *(f"{count:,}" for count in counts), "balanced" if each.balanced else "NOT BALANCED")
    out.print(shown)


def _psql(dsn: str) -> str:
    return "ingestd db psql" if embedded.running() == dsn else "your PostgreSQL"


def _log_to(path: Path) -> deque[str]:
    """Send the daemon's log to a file, and what is more than news into a list for whoever watches."""
    notes: deque[str] = deque(maxlen=NOTES_KEPT)
    file = logging.handlers.RotatingFileHandler(path, maxBytes=LOG_BYTES_MAX, backupCount=1, encoding="utf-8")
    file.setFormatter(LogLine(for_journal=False))
    logging.basicConfig(level=logging.INFO, handlers=[file, _Notes(notes)], force=True)
    logging.captureWarnings(True)
    return notes


class _Notes(logging.Handler):
    """Keeps warnings and worse."""

    def __init__(self, notes: deque[str]) -> None:
        super().__init__(logging.WARNING)
        self._notes = notes

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message, without its traceback: that is in the file."""
        self._notes.append(record.getMessage())
