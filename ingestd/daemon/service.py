"""The daemon: sources into the journal at once, the journal into PostgreSQL as it can.

The order of starting is the order of what must not be missed: the journal, then the sources, and only then what may
take its time, each in a thread or a process of its own: recovery of the journal, parsing signal databases, connecting.
Stopping is the reverse: sources first, with what the kernel still holds for them; then the database takes what it can
within `GRACE_SECONDS`; the rest stays in the journal for the next start.

Nothing that fails here stops the recording: a database file that cannot be parsed, a port that is taken, a PostgreSQL
that refuses us are said, counted and tried again.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from ingestd import __version__
from ingestd.backoff import Backoff
from ingestd.clock import WallClock, boot_id
from ingestd.config import Can, Config, DatabaseFile, describe
from ingestd.daemon.devices import buses_of, filter_by_databases, protocol_of
from ingestd.daemon.recording import Recording
from ingestd.decode.can import DECODER_VERSION
from ingestd.decode.databases import Match, SignalDatabase
from ingestd.decode.parsing import parse
from ingestd.delivery.sending import Delivery, DeliveryStatus
from ingestd.errors import IngestdError, StoreError
from ingestd.journal import Journal, SessionInfo
from ingestd.metrics import JournalNumbers, Snapshot, StoreNumbers
from ingestd.model import Books, Source
from ingestd.pipeline import Binding, Decoders
from ingestd.store import embedded, migrate
from ingestd.store.sessions import machine_id, new_session_id
from ingestd.store.writer import Writer

GRACE_SECONDS = 10.0  # how long a stop waits for the database
RETRY_SECONDS_MIN, RETRY_SECONDS_MAX = 0.5, 5.0
PARSE_AGAIN_SECONDS = 60.0  # A file that did not change is parsed again then: the reason may be elsewhere.
NOTICE_SECONDS = 60.0  # how often what the journal says is said again
# When a session was edited last, for one that nobody has edited: before anything that people do, whatever our clock
# says; and a process that continues it keeps what the one that began it had to say.
BEGUN_UTC, CONTINUED_UTC = datetime.fromtimestamp(2, UTC), datetime.fromtimestamp(1, UTC)

log = logging.getLogger(__name__)


class Daemon:
    """One run of the recorder."""

    def __init__(self, config: Config, sources: list[Source]) -> None:
        """Open the journal. Raises IngestdError if somebody else holds it or it cannot be made."""
        self.config = config
        self.sources = sources
        self.wall_clock = WallClock()
        self._boot_id, self._machine_id = boot_id(), machine_id()
        self._recovered, self.stopped = asyncio.Event(), asyncio.Event()
        last = Journal.peek(config.journal.path)
        self._continued = last is not None and last.boot_id == self._boot_id and not last.ended
        self.session_id: UUID = last.session_id if last is not None and self._continued else new_session_id()
        self._session = self._describe_session()
        self.journal = Journal.open(
            config.journal.path,
            session=SessionInfo(self.session_id, self._session),
            machine_id=self._machine_id,
            boot_id=self._boot_id,
            max_bytes=config.journal.max_bytes,
            when_full=config.journal.when_full,
        )
        self._folder = config.journal.path.stat()  # It tells this machine's journals apart.
        self.recording = Recording(self.journal, self.wall_clock)
        self.exit_code = 0
        self._noticed: dict[str, float] = {}  # what the journal said, and when it was logged
        self.delivery: Delivery | None = None
        self.trouble: dict[str, str] = {}  # what is wrong that is not a source's or the database's

    def _describe_session(self) -> dict[str, Any]:
        """The SESSION record that begins every stretch."""
        given, now = self.config.session, datetime.now(UTC)
        recorder = given.car_id or socket.gethostname()
        return {
            "name": given.name or f"{recorder} {now:%Y-%m-%d %H:%M:%S}",
            "car_id": given.car_id,
            "driver": given.driver,
            "track": given.track,
            "notes": given.notes,
            "created_utc": now.isoformat(),
            "updated_utc": (CONTINUED_UTC if self._continued else BEGUN_UTC).isoformat(),
            "time_base": self._boot_id,
            "config": {"ingestd": __version__, "decoder": DECODER_VERSION, "file": describe(self.config)},
        }

    @property
    def recovered(self) -> bool:
        """Whether the books know what earlier runs left; until then they are of this process alone."""
        return self._recovered.is_set()

    def stop(self, why: str) -> None:
        """Make `run` end."""
        log.info("stopping: %s", why)
        self.stopped.set()

    async def run(self) -> None:
        """Record until `stop`. Raises nothing that is not a defect."""
        sources = [asyncio.create_task(source.run(self.recording), name=source.name) for source in self.sources]
        await asyncio.sleep(0)
        log.info(
            "recording session=%s continued=%s journal=%s sources=%s",
            self.session_id, self._continued, self.config.journal.path, ",".join(each.name for each in self.sources),
        )  # fmt: skip
        if self._continued:
            self.recording.expect_last_stamps()
        background = [
            asyncio.create_task(self._sync(), name="sync"),
            asyncio.create_task(self._recover(), name="recover"),
        ]
        delivering = asyncio.create_task(self._deliver(), name="deliver")
        try:
            stopping = asyncio.create_task(self.stopped.wait(), name="stop")
            await asyncio.wait([stopping, *sources, *background[:1], delivering], return_when=asyncio.FIRST_COMPLETED)
        finally:
            await self._shut_down(sources, background, delivering)

    async def _shut_down(
        self, sources: list[asyncio.Task[None]], background: list[asyncio.Task[None]], delivering: asyncio.Task[None]
    ) -> None:
        failed = [task for task in [*sources, background[0], delivering] if task.done()]
        for task in failed:
            log.critical("a task of the daemon ended task=%s", task.get_name(), exc_info=task.exception())
        await _end(sources)
        self.recording.tell_overflows(at_once=True)
        self.journal.append_session({"ended_utc": datetime.now(UTC).isoformat()})
        await asyncio.to_thread(self.journal.sync)
        if self.delivery is not None and self.delivery.decoders is not None and self._recovered.is_set():
            self.delivery.stop()
            await asyncio.wait([delivering], timeout=GRACE_SECONDS)
        await _end([delivering, *background])
        self.journal.close(ended=not failed)
        self._say_notices()
        self._say_books()
        self.exit_code = 1 if failed else 0

    def _say_books(self) -> None:
        """The last line: everything that was received, and where it is."""
        for source, books in sorted(self.books().items()):
            dropped = " ".join(f"dropped_{reason}={count}" for reason, count in sorted(books.dropped.items()))
            log.info(
                "books source=%s received=%d committed=%d pending=%d rejected=%d %s balanced=%s",
                source, books.received, books.committed, books.pending, books.rejected, dropped or "dropped=0",
                books.balanced,
            )  # fmt: skip

    async def _sync(self) -> None:
        """Make durable what was written, every `sync_interval`."""
        while True:
            await asyncio.sleep(self.config.journal.sync_interval_seconds)
            self.recording.tell_overflows()
            await asyncio.to_thread(self.journal.sync)
            self._say_notices()

    def _say_notices(self) -> None:
        """Say what the journal has to say; what it says again and again, once in a while."""
        now = time.monotonic()
        self._noticed = {text: at for text, at in self._noticed.items() if at > now - NOTICE_SECONDS}
        for notice in self.journal.notices():
            if notice not in self._noticed:
                log.warning("journal: %s", notice)
                self._noticed[notice] = now

    async def _recover(self) -> None:
        """Look at what earlier runs left, until that succeeds: nothing is sent before it has."""
        backoff = Backoff(RETRY_SECONDS_MIN, RETRY_SECONDS_MAX)
        while True:
            try:
                recovery = await asyncio.to_thread(self.journal.recover)
                break
            except Exception:
                log.exception("the journal cannot be looked through; recording goes on, nothing is sent; tried again")
            await asyncio.sleep(backoff.next_seconds())
        for warning in recovery.warnings:
            log.warning("journal: %s", warning)
        if self._continued:
            self.recording.last_stamps(recovery.last_stamps, recovery.untold)
        self._recovered.set()

    async def _deliver(self) -> None:
        """Find the database and the decoders, then send for good."""
        dsn = await self._dsn()
        writer = Writer(dsn, "", journal=f"{self._machine_id[:12]}-{self._folder.st_dev:x}-{self._folder.st_ino:x}")
        self.delivery = Delivery(
            self.journal,
            writer,
            self._machine_id,
            clock=self.wall_clock.now,
            interval_s=self.config.batch.interval_seconds,
            store_frames=self.config.database.store_frames,
        )
        sending = asyncio.create_task(self.delivery.run(self._recovered), name="send")
        try:
            self.delivery.decoders = await self._load_decoders()
            await sending
        finally:
            await _end([sending])

    async def _dsn(self) -> str:
        """The DSN; the embedded server is started, and its schema brought up to date, if that is what was asked for."""
        backoff = Backoff(RETRY_SECONDS_MIN, RETRY_SECONDS_MAX)
        while self.config.database.dsn is None:
            try:
                dsn = await asyncio.to_thread(embedded.start)
                if await migrate.current(dsn) != migrate.head():
                    await migrate.upgrade(dsn)
                self._cured("database")
                return dsn
            except StoreError as error:
                self._troubled("database", str(error))
                await asyncio.sleep(backoff.next_seconds())
        return self.config.database.dsn

    async def _load_decoders(self) -> Decoders:
        """Parse the signal databases, in another process: it takes seconds, and the loop has frames to read.

        One that cannot be parsed stops the sending and not the recording, and is tried again when it has changed.
        """
        bindings: list[Binding] = []
        buses = buses_of(self.config)
        files: set[tuple[Path, Match]] = {(file.file, _match(file)) for bus in buses for file in bus.dbc}
        loaded: dict[tuple[Path, Match], SignalDatabase] = {}
        for key in sorted(files):
            loaded[key] = await self._load(*key)
            for warning in loaded[key].warnings:
                log.warning("%s", warning)
        for bus in buses:
            databases = [loaded[file.file, _match(file)] for file in bus.dbc]
            bindings += [Binding(bus.name, database) for database in databases]
            if isinstance(bus, Can):
                filter_by_databases(bus, self.sources, databases)
        decoders = Decoders(bindings, protocols={line.name: protocol_of(line) for line in self.config.serial})
        for bus in buses:
            decoders.of(bus.name)
        for warning in decoders.warnings:
            log.warning("%s", warning)
        return decoders

    async def _load(self, path: Path, match: Match) -> SignalDatabase:
        while True:
            tried = _fingerprint(path)
            try:
                database = await parse(path, match)
                self._cured(str(path))
                return database
            except IngestdError as error:
                self._troubled(str(path), f"{error}; recording goes on, nothing is sent until the file is corrected")
            backoff, again_at = Backoff(RETRY_SECONDS_MIN, RETRY_SECONDS_MAX), time.monotonic() + PARSE_AGAIN_SECONDS
            while True:
                await asyncio.sleep(backoff.next_seconds())
                if _fingerprint(path) != tried or time.monotonic() > again_at:
                    break

    def _troubled(self, what: str, message: str) -> None:
        if self.trouble.get(what) != message:
            log.error("%s", message)
        self.trouble[what] = message

    def _cured(self, what: str) -> None:
        if self.trouble.pop(what, None) is not None:
            log.info("in order again: %s", what)

    def books(self) -> Mapping[str, Books]:
        """Where every frame is, of every source that ever gave one."""
        return {source: books for source, books in self.journal.books().items() if books != Books()}

    def snapshot(self) -> Snapshot:
        """Everything that metrics tell, at this instant."""
        journal, status = self.journal, DeliveryStatus() if self.delivery is None else self.delivery.status
        books = self.books()
        pending = any(each.pending for each in books.values())
        return Snapshot(
            version=__version__,
            books=books,
            statuses={source.name: source.status for source in self.sources},
            journal=JournalNumbers(
                writable=journal.writable,
                bytes=journal.bytes_used,
                bytes_max=self.config.journal.max_bytes,
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
                commit_seconds=status.commit_seconds,
                wire_to_commit_seconds=status.lag_seconds,
            ),
            trouble={**({"database": status.trouble} if status.trouble else {}), **self.trouble},
        )


def _match(file: DatabaseFile) -> Match:
    return cast(Match, file.match)  # The configuration has checked it.


def _fingerprint(path: Path) -> tuple[int, int, int] | None:
    """What changes when somebody writes to a file or changes who may read it; None if it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_ctime_ns


async def _end(tasks: list[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they are gone."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
