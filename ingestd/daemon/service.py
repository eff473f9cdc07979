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
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from ingestd.backoff import Backoff
from ingestd.clock import WallClock, boot_id, mono_ns
from ingestd.config import Config, Database
from ingestd.daemon.attendance import Attendance
from ingestd.daemon.decoding import Loaded, load_at_start
from ingestd.daemon.devices import filter_by_databases
from ingestd.daemon.live import Live
from ingestd.daemon.recording import Recording
from ingestd.daemon.session import RunningSession, checked_text
from ingestd.daemon.telling import Following, snapshot
from ingestd.delivery.sending import Delivery
from ingestd.errors import ConfigError, IngestdError, StoreError
from ingestd.journal import Journal, SessionInfo
from ingestd.metrics import Snapshot
from ingestd.model import Books, Event, Source
from ingestd.store import embedded, migrate
from ingestd.store.sessions import machine_id
from ingestd.store.writer import Writer

GRACE_SECONDS = 10.0  # how long a stop waits for the database
RETRY_SECONDS_MIN, RETRY_SECONDS_MAX = 0.5, 5.0
NOTICE_SECONDS = 60.0  # how often what the journal says is said again
RECOVERY_SECONDS_MAX = 30.0  # how long a command waits until it is known what earlier runs left
REFUSED = "the configuration is refused, the one before stays in force"

log = logging.getLogger(__name__)


class Daemon:
    """One run of the recorder."""

    def __init__(self, config: Config, sources: list[Source]) -> None:
        """Open the journal. Raises IngestdError if somebody else holds it or it cannot be made."""
        self.config = config
        self.wall_clock = WallClock()
        self._boot_id, self._machine_id = boot_id(), machine_id()
        self._recovered, self.stopped = asyncio.Event(), asyncio.Event()
        self._synced = asyncio.Event()  # since somebody looked
        last = Journal.peek(config.journal.path)
        self._continued = last is not None and last.boot_id == self._boot_id and not last.ended
        continues = last.session_id if last is not None and self._continued else None
        self.session = RunningSession.begin(config, self._boot_id, continues=continues)
        self.journal = Journal.open(
            config.journal.path,
            session=SessionInfo(self.session.id, self.session.record),
            machine_id=self._machine_id,
            boot_id=self._boot_id,
            max_bytes=config.journal.max_bytes,
            when_full=config.journal.when_full,
        )
        self._folder = config.journal.path.stat()  # It tells this machine's journals apart.
        self.live = Live(lambda: None if self.loaded is None else self.loaded.decoders)
        self.following = Following(self.live)
        self.recording = Recording(self.journal, self.wall_clock, on_frames=self.live.frames)
        self.attendance = Attendance(sources, self.recording, self._failed_task)
        self.loaded: Loaded | None = None  # the signal databases in force
        self.exit_code = 0
        self._failed: list[asyncio.Task[Any]] = []
        self._loading: asyncio.Task[None] | None = None
        self._noticed: dict[str, float] = {}  # what the journal said, and when it was logged
        self.delivery: Delivery | None = None
        self.trouble: dict[str, str] = {}  # what is wrong that is not a source's or the database's

    @property
    def session_id(self) -> UUID:
        """Of the session that is being recorded."""
        return self.session.id

    @property
    def sources(self) -> list[Source]:
        """Those that are running."""
        return list(self.attendance.sources.values())

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
        self.attendance.begin_all()
        await asyncio.sleep(0)
        log.info(
            "recording session=%s continued=%s journal=%s sources=%s",
            self.session_id, self._continued, self.config.journal.path, ",".join(each.name for each in self.sources),
        )  # fmt: skip
        if self._continued:
            self.recording.expect_last_stamps()
        following = asyncio.create_task(self.following.follow_loop(), name="lag")
        self.following.follow_channels(self.config.metrics.channels)
        syncing = self.watched(asyncio.create_task(self._sync(), name="sync"))
        recovering = asyncio.create_task(self._recover(), name="recover")
        delivering = self.watched(asyncio.create_task(self._deliver(), name="deliver"))
        self._loading = asyncio.create_task(self._load(), name="load")
        self._loading.add_done_callback(self._loading_ended)
        try:
            await self.stopped.wait()
        finally:
            await self._shut_down([syncing, following, recovering, self._loading], delivering)

    def watched(self, task: asyncio.Task[None]) -> asyncio.Task[None]:
        """The same task, which is to run for as long as the daemon does; if it ends, so does the daemon."""
        task.add_done_callback(lambda task: None if self.stopped.is_set() else self._failed_task(task))
        return task

    def _loading_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._failed_task(task)

    def _failed_task(self, task: asyncio.Task[None]) -> None:
        """What runs for as long as the daemon has ended: then so does the daemon, to be started again."""
        self._failed.append(task)
        self.stopped.set()

    async def _shut_down(self, background: list[asyncio.Task[None]], delivering: asyncio.Task[None]) -> None:
        for task in self._failed:
            error = None if task.cancelled() else task.exception()
            log.critical("a task of the daemon ended task=%s", task.get_name(), exc_info=error)
        self.following.follow_channels(())
        await self.attendance.end_all()
        self.recording.tell_overflows(at_once=True)
        self.journal.append_session({"ended_utc": datetime.now(UTC).isoformat()})
        await asyncio.to_thread(self.journal.sync)
        if self.delivery is not None and self.delivery.decoders is not None and self._recovered.is_set():
            self.delivery.stop()
            await asyncio.wait([delivering], timeout=GRACE_SECONDS)
        await _end([delivering, *background])
        self.journal.close(ended=not self._failed)
        self._say_notices()
        self._say_books()
        self.exit_code = 1 if self._failed else 0

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
        """Make durable what was written, every `sync_interval`, in a thread that nothing else can keep busy."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, thread_name_prefix="sync") as thread:
            while True:
                self.recording.tell_overflows()
                await loop.run_in_executor(thread, self.journal.sync)
                self._synced.set()
                self._say_notices()
                await asyncio.sleep(self.config.journal.sync_interval_seconds)

    async def sign_of_life(self) -> None:
        """Return once the event loop and the journal's sync have got through, whether the disk takes it or not."""
        await self._synced.wait()
        self._synced.clear()

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
            if recovery.session.get("id") == self.session_id.hex:
                self.session.inherit(recovery.session)
                self.journal.append_session(self.session.record)
        self._recovered.set()

    async def _deliver(self) -> None:
        """Find the database and send for good: anew whenever a reload has named another one."""
        journal = f"{self._machine_id[:12]}-{self._folder.st_dev:x}-{self._folder.st_ino:x}"
        while True:
            dsn = await self._dsn()
            self.delivery = Delivery(
                self.journal,
                Writer(dsn, "", journal=journal),
                self._machine_id,
                record_event=self.recording.event,
                interval_s=self.config.batch.interval_seconds,
                store_frames=self.config.database.store_frames,
                status=None if self.delivery is None else self.delivery.status,
            )
            self.delivery.decoders = None if self.loaded is None else self.loaded.decoders
            if self.stopped.is_set():
                self.delivery.stop()
            await self.delivery.run(self._recovered)
            if not self.delivery.is_halted:
                return

    async def _dsn(self) -> str:
        """The DSN; the embedded server is started, and its schema brought up to date, if that is what was asked for."""
        backoff = Backoff(RETRY_SECONDS_MIN, RETRY_SECONDS_MAX)
        while self.config.database.dsn is None:
            try:
                dsn = await asyncio.to_thread(embedded.start)
                if await migrate.current(dsn) != migrate.head():
                    await migrate.upgrade(dsn)
                self._cured("database")
                if self.config.database.dsn is None:  # No reload came in between.
                    return dsn
            except StoreError as error:
                self._troubled("database", str(error))
                await asyncio.sleep(backoff.next_seconds())
        self._cured("database")
        return self.config.database.dsn

    async def _load(self) -> None:
        try:
            loaded = await load_at_start(self.config, self._troubled, self._cured)
        except ConfigError as error:  # of a plug-in's decoder
            self._troubled("configuration", f"{error}; recording goes on, nothing is sent until it is corrected")
            return
        self.decode_with(loaded)
        if loaded.hashes:
            self.session.configure(self.config, loaded.hashes)
            self.journal.append_session(self.session.record)

    def decode_with(self, loaded: Loaded) -> None:
        """Decode with these databases whatever is decoded from now on."""
        if self._loading is not None and self._loading is not asyncio.current_task():
            self._loading.cancel()  # A reload was quicker.
        for path in [each for each in self.trouble if each not in ("database", "configuration")]:
            self._cured(path)
        self.loaded = loaded
        if self.delivery is not None:
            self.delivery.decoders = loaded.decoders
        for bus in loaded.config.can:
            filter_by_databases(bus, self.sources, loaded.of(bus))

    def redirect(self, before: Database) -> None:
        """The configuration may name another database, or want its batches otherwise."""
        delivery, config = self.delivery, self.config
        if delivery is None:
            return
        delivery.interval_s, delivery.store_frames = config.batch.interval_seconds, config.database.store_frames
        if (before.dsn, before.embedded) != (config.database.dsn, config.database.embedded):
            delivery.halt()

    async def begin_session(self, given: Mapping[str, Any]) -> RunningSession:
        """End the session and begin another; the one that has ended. Raises UsageError, IngestdError.

        Between two records of the journal: no source notices, and no frame is in neither of them.
        """
        await self.session_known()
        begun, ended = RunningSession.begin(self.config, self._boot_id, given), self.session
        begun.config = ended.config | {"since_ns": mono_ns()}
        self.journal.append_session({"ended_utc": datetime.now(UTC).isoformat()})
        self.recording.forget_before()
        self.journal.begin_stretch(SessionInfo(begun.id, begun.record))
        self.session = begun
        log.info("session ended=%s begun=%s name=%r", ended.id, begun.id, begun.metadata["name"])
        await asyncio.to_thread(self.journal.sync)
        return ended

    async def edit_session(self, changes: Mapping[str, Any]) -> None:
        """Change the metadata of the session that is being recorded. Raises UsageError, IngestdError."""
        await self.session_known()
        self.session.edit(changes)
        self.journal.append_session(self.session.record)
        log.info("session edited=%s keys=%s", self.session_id, ",".join(sorted(changes)))
        await asyncio.to_thread(self.journal.sync)

    async def mark(self, text: str) -> None:
        """Record a marker at this instant. Raises UsageError."""
        self.recording.event(Event("", "marker", mono_ns(), payload={"text": checked_text("the marker", text)}))
        await asyncio.to_thread(self.journal.sync)

    async def session_known(self) -> None:
        """Until the session is known as the process before left it. Raises IngestdError if that takes too long."""
        try:
            async with asyncio.timeout(RECOVERY_SECONDS_MAX):
                await self._recovered.wait()
        except TimeoutError as error:
            raise IngestdError("the journal is still being looked through", "try again in a while") from error
        if self.stopped.is_set():
            raise IngestdError("the daemon is stopping", "its session ends with it")

    def refused(self, error: IngestdError) -> None:
        """A configuration cannot be used: the one before stays in force."""
        log.error("%s: %s", REFUSED, error)
        self.trouble["configuration"] = f"refused, the one before is in force: {error}"

    def accepted(self) -> None:
        """The configuration in the file is in force."""
        self.trouble.pop("configuration", None)

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
        return snapshot(self)


async def _end(tasks: list[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they are gone."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
