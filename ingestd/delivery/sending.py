"""The task that empties the journal into PostgreSQL, for as long as the daemon runs.

The stretch being recorded goes first, every `interval_s`; while it waits, older ones are sent, the oldest first. Every
batch has one of three fates:

    copied     and acknowledged in the journal, once the commit is known
    kept       for as long as it takes: the database is away or in a state that an operator has to end
    rejected   it can never go in: set aside in the journal, and the rest goes on

A batch that the database refuses while it takes other writes is halved until the record at fault is alone.

Limits: one connection, one transaction at a time, at most one prepared batch per stretch in memory; a batch is read
from at most `BATCH_BYTES_MAX` of journal, less where that gives more than `BATCH_SIGNALS` signals. What one stretch has
to wait for holds up no other: after a live batch an older stretch has its turn, and a stretch that failed waits by
itself. Nothing here waits for ever: every await has a deadline in the store.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

from ingestd.backoff import Backoff
from ingestd.clock import mono_ns
from ingestd.delivery.feeds import (
    BATCH_BYTES_MIN,
    Cursor,
    Finding,
    is_known,
    judge,
    new_feed_id,
    placeholder,
    read_batch,
)
from ingestd.delivery.memory import recall
from ingestd.delivery.status import DeliveryStatus
from ingestd.delivery.transactions import FeedState, Lost, Prepared, prepare, prepare_end, prepare_rejected, with_end
from ingestd.errors import FeedError, IngestdError, StoreError, StoreRejected, StoreUnavailable
from ingestd.journal import Journal, ReadResult, Record, Stretch
from ingestd.model import Event
from ingestd.pipeline import RETRY_SECONDS_MAX, RETRY_SECONDS_MIN, Decoders
from ingestd.store.faults import Cause, classify, sqlstate
from ingestd.store.writer import Standing, Writer

BATCH_BYTES_MAX = 2_000_000  # of journal: some 100,000 classic frames
BATCH_SIGNALS = 1_000_000  # Some 20 MB in columns and as much again as rows.
OUTAGE_SECONDS = 60.0  # After this long without a database a new stretch begins, so that live data need not wait.
FAILURES_MAX = 3  # server errors of one batch, while other writes are taken, before it is halved
POLL_SECONDS = 0.05  # how soon a record is seen that comes after an idle time
IDLE_SECONDS_MAX = 0.25  # how soon an older stretch is seen to need something, or a stop, while the newest waits
REPORT_SECONDS = 60.0  # how often a fault that lasts is said again

QUERY_CANCELED = "57014"
TOO_MUCH = ("53", QUERY_CANCELED)  # What a smaller batch may be spared.

log = logging.getLogger(__name__)


class Delivery:
    """Sends a journal. `run` is the task; `stop` makes it send what is there and then end."""

    def __init__(
        self,
        journal: Journal,
        writer: Writer,
        machine_id: str,
        *,
        record_event: Callable[[Event], None],
        interval_s: float,
        store_frames: bool = True,
        status: DeliveryStatus | None = None,
    ) -> None:
        """`record_event` puts what is noticed here into the journal, and before those who watch.

        `status` is that of the delivery before, into another database: its totals go on.
        """
        self.status = status or DeliveryStatus()
        self.decoders: Decoders | None = None  # nothing is sent before they are there
        self._journal = journal
        self._writer = writer
        self._machine_id = machine_id
        self._record_event = record_event
        self.interval_s = interval_s  # Both may be changed at any time, for the next batch.
        self.store_frames = store_frames
        self._cursors: dict[str, Cursor] = {}
        self._known: bool | None = None  # whether it is the database we know, since the connection was opened
        self._behind: set[str] = set()  # stretches of which it has less than it had, or does not know the end
        self._stopping = self._halting = False
        self._down_since = time.monotonic()  # … or since the last commit
        self._said: dict[str, tuple[str, float]] = {}  # what was said when, by stretch; "" is the database as a whole
        self._backoff = Backoff(RETRY_SECONDS_MIN, RETRY_SECONDS_MAX)  # of connecting

    def __repr__(self) -> str:
        return f"<Delivery {self._writer}: {self.status.commits} commits>"

    @property
    def is_halted(self) -> bool:
        """Whether it was told to leave the rest to another."""
        return self._halting

    async def run(self, recovered: asyncio.Event) -> None:
        """Send until told to stop, and then until nothing is left; or until told to halt.

        `recovered`: the journal knows its older stretches.

        Cancelling it is allowed at any time and leaves the rest in the journal; it cannot be run again after that.
        """
        await recovered.wait()
        live_at, was_live = time.monotonic(), False
        try:
            while not self._halting:
                now = time.monotonic()
                stretch = None
                if self.decoders is not None:
                    stretch = self._next(live_due=self._stopping or now >= live_at, older_first=was_live)
                if stretch is None:
                    if self._stopping and not self._anything_unsent():
                        return
                    was_live = False
                    await asyncio.sleep(min(live_at - now, IDLE_SECONDS_MAX) if live_at > now else POLL_SECONDS)
                    continue
                await self._try(stretch)
                was_live = stretch.is_current
                if was_live and not self._is_urgent(stretch):
                    live_at = max(now + self.interval_s, time.monotonic())
        finally:
            self._writer.terminate()

    def stop(self) -> None:
        """Let `run` end once everything is sent."""
        self._stopping = True

    def halt(self) -> None:
        """Let `run` end with the batch that is under way: what is left is for another delivery."""
        self._halting = True

    def _next(self, *, live_due: bool, older_first: bool) -> Stretch | None:
        """The stretch to send from now: the newest if it is due, else the oldest that has anything and may be tried.

        `older_first`: the newest has just had its turn; however slow the database is, it is not to take all of them.
        """
        now = time.monotonic()
        *older, newest = self._journal.stretches()
        waiting = next((each for each in older if self._is_unsent(each) and self._retry_at(each) <= now), None)
        live = newest if live_due and self._is_unsent(newest) and self._retry_at(newest) <= now else None
        return (waiting or live) if older_first else (live or waiting)

    def _anything_unsent(self) -> bool:
        return any(map(self._is_unsent, self._journal.stretches()))

    def _retry_at(self, stretch: Stretch) -> float:
        cursor = self._cursors.get(stretch.id)
        return 0.0 if cursor is None else cursor.retry_at

    def _is_unsent(self, stretch: Stretch) -> bool:
        cursor = self._cursors.get(stretch.id)
        if cursor is None or not cursor.confirmed:
            # Whether the database still has what it had is only known when it was asked.
            is_asked = self._writer.is_open and self._known is not None
            return not is_asked or stretch.id in self._behind or stretch.last_sequence > stretch.acknowledged
        return not cursor.done and (cursor.attempt is not None or cursor.position < stretch.last_sequence)

    def _is_urgent(self, stretch: Stretch) -> bool:
        """Whether the next batch need not wait for an interval: there was more than went into the last one, or a batch
        was refused and is being halved."""
        cursor = self._cursors.get(stretch.id)
        return cursor is not None and (cursor.records_max is not None or not cursor.attempt_is_all)

    async def _try(self, stretch: Stretch) -> None:
        """Send one batch of a stretch, or find out why not, and see to it that it is tried again, but not at once."""
        try:
            await self._connect()
        except StoreError as error:
            self._say_once("", error)
            await asyncio.sleep(self._backoff.next_seconds())
            return
        cursor = self._cursor(stretch)
        try:
            if not cursor.confirmed:
                await self._confirm(cursor, stretch)
            if cursor.attempt is None and not cursor.done:
                await self._prepare(cursor, stretch)
                if cursor.attempt is not None and not stretch.is_current:
                    cursor.attempt = with_end(cursor.attempt, stretch, self._journal.stretches())
            if cursor.attempt is not None:
                await self._commit(cursor, stretch)
        except IngestdError as error:
            if isinstance(
                error, FeedError
            ):  # Somebody else moved the position: the next comparison says what it means.
                self._writer.terminate()
            self._keep(cursor, error)
        except Exception as error:
            self._writer.terminate()
            if self._keep(cursor, StoreError(f"unforeseen: {type(error).__name__}: {error}")):
                log.exception("this is a defect; the journal keeps what is not sent")

    async def _connect(self) -> None:
        if self._writer.is_open and self._known is not None:
            return
        self._known = None
        for cursor in self._cursors.values():
            cursor.confirmed = cursor.done = False
        await self._writer.open()
        self.status.connections += 1
        stretches = self._journal.stretches()
        self._cursors = {each.id: self._cursors[each.id] for each in stretches if each.id in self._cursors}
        standings = await self._writer.standings([stretch.feed_id for stretch in stretches])
        known = is_known(standings, stretches)
        owed = [each for each in stretches if each.feed_id not in standings and not (known and each.acknowledged)]
        if owed:
            await self._announce(owed)
            standings = await self._writer.standings([stretch.feed_id for stretch in stretches])
        self._behind = {
            stretch.id
            for stretch in stretches
            if (standing := standings.get(stretch.feed_id)) is not None
            and (standing.position < stretch.acknowledged or not (stretch.is_current or standing.is_completed))
        }
        self._known = known
        if not self._said:
            self.status.database_up, self.status.trouble = True, ""
        if "" in self._said and time.monotonic() - self._down_since >= OUTAGE_SECONDS:
            self._down_since = time.monotonic()  # One stretch an outage, should the first commits fail, too.
            if stretches[-1].last_sequence > stretches[-1].acknowledged:
                self._journal.begin_stretch()

    async def _announce(self, stretches: list[Stretch]) -> None:
        """Begin the feeds that the database is to be given, or given again, before anything is sent, the oldest first.

        From then on a row that is missing is one that somebody has deleted: also to the next process, and also in an
        older backup, if that has what the newest stretch had committed.
        """
        for stretch in stretches:
            session = placeholder(stretch.session_id, stretch.boot_id)
            await self._writer.begin(session, stretch.feed_id, 0, self._machine_id)

    def _cursor(self, stretch: Stretch) -> Cursor:
        if stretch.id not in self._cursors:
            self._cursors[stretch.id] = Cursor(
                stretch.id, stretch.feed_id, stretch.acknowledged, acknowledged=stretch.acknowledged
            )
        cursor = self._cursors[stretch.id]
        self._writer.feed_id = cursor.feed_id
        return cursor

    async def _confirm(self, cursor: Cursor, stretch: Stretch) -> None:
        """Compare the cursor with the database, and act on what is found."""
        standing = (await self._writer.standings([cursor.feed_id])).get(cursor.feed_id)
        finding = judge(cursor, standing, self._machine_id, known=bool(self._known))
        log.debug("feed %s: %s", cursor.feed_id, finding.value)
        if finding is Finding.CATCH_UP and cursor.attempt is not None:
            self._settle(cursor, cursor.attempt)
        elif finding is Finding.CATCH_UP:
            assert standing is not None, "there is something to catch up with"
            await self._catch_up(cursor, standing)
        elif finding is Finding.DELETED and cursor.position >= stretch.last_sequence and not stretch.is_current:
            cursor.done = True
        elif finding in (Finding.NEW, Finding.RESTORED, Finding.CLONED, Finding.DELETED):
            await self._begin_again(cursor, stretch, finding, standing.position if standing else 0)
        if standing is not None and finding is not Finding.CLONED and cursor.reader is None:
            cursor.state = FeedState.load(standing.decoder_state)
        if cursor.state.through is None:  # Nothing was committed under this id, or by a version that did not note it.
            tallies = self._journal.tallies(cursor.stretch_id) if cursor.position == cursor.acknowledged else {}
            held = {source: counts.frames for source, counts in cursor.state.counts.items()}
            cursor.state.through = {source: tally.passed for source, tally in tallies.items()} or held
        if cursor.reader is None:
            cursor.reader = self._journal.reader(cursor.stretch_id, cursor.position)
        cursor.confirmed = True

    async def _begin_again(self, cursor: Cursor, stretch: Stretch, finding: Finding, position: int) -> None:
        """Start sending from where the database needs it: anew, from its position, or under another feed id."""
        feed_id = cursor.feed_id
        if finding is Finding.CLONED:
            feed_id, position = new_feed_id(cursor.stretch_id), cursor.position
        elif finding is Finding.DELETED:
            position = cursor.acknowledged
        if finding is not Finding.RESTORED:
            session = placeholder(stretch.session_id, stretch.boot_id)
            await self._writer.begin(session, feed_id, position, self._machine_id)
        if finding is Finding.CLONED:  # In this order: a feed in the database that nobody uses does no harm.
            self._journal.assign_feed(cursor.stretch_id, feed_id, cursor.position)
            cursor.feed_id = self._writer.feed_id = feed_id
            log.warning("the journal was cloned: stretch %s goes on as feed %s", cursor.stretch_id, feed_id)
        cursor.restored_from = position if position < cursor.acknowledged else None
        if finding is not Finding.CLONED:
            cursor.state = FeedState()
        cursor.position, cursor.attempt, cursor.reader = position, None, None

    def _tell_restored(self, cursor: Cursor) -> None:
        """There is something to send again: say so. What the journal has no more nobody can send."""
        position, cursor.restored_from = cursor.restored_from, None
        if position is not None:
            positions = {"from": position, "to": cursor.acknowledged}
            self._record_event(Event("", "database_restored", mono_ns(), cursor.feed_id, positions))
            log.warning("the database lacks what it had: stretch %s is sent again from %d", cursor.stretch_id, position)

    async def _catch_up(self, cursor: Cursor, standing: Standing) -> None:
        """Note in the books what was committed, or rejected, without our hearing of it."""
        reader = self._journal.reader(cursor.stretch_id, cursor.position)
        rejected = set(FeedState.load(standing.decoder_state).rejected)
        while cursor.position < standing.position:
            result = await asyncio.to_thread(reader.read, 1)  # One by one: the loss before a record goes with it.
            if not result.records or result.records[-1].sequence > standing.position:
                break  # A power cut, or damage, took what the database has.
            for record in result.records:
                counts = Counter({record.source: record.frames_count})
                refused = counts if record.sequence in rejected else Counter[str]()
                cursor.position = cursor.acknowledged = record.sequence
                self._journal.acknowledge(cursor.stretch_id, record.sequence, counts - refused, refused, result.lost)
        cursor.position = max(cursor.position, standing.position)

    async def _prepare(self, cursor: Cursor, stretch: Stretch) -> None:
        """Read and decode the next batch."""
        reader, decoders, began = cursor.reader, self.decoders, time.monotonic()
        assert reader is not None
        assert decoders is not None
        if cursor.state.memory is None:
            cursor.state.memory = await recall(
                self._journal, self._writer, stretch, cursor.position, decoders, self._machine_id
            )
        result = ReadResult()
        try:
            result = await asyncio.to_thread(read_batch, reader, cursor.bytes_max, cursor.records_max)
            records = result.records
            if not records:
                self._prepare_end(cursor, stretch, result.lost)
                return
            self._tell_restored(cursor)
            cursor.attempt = await asyncio.to_thread(
                prepare,
                records,
                result.lost,
                cursor.state,
                decoders,
                position=cursor.position,
                completed=not stretch.is_current and records[-1].sequence >= stretch.last_sequence,
                store_frames=self.store_frames,
                acknowledged=self._acknowledged(cursor),
            )
        except Exception as error:
            if not result.records:
                reader.rewind(cursor.position)
                raise
            refused = StoreRejected(f"it cannot be prepared: {type(error).__name__}: {error}")
            self._refuse(cursor, result.records, result.lost, refused)
            return
        cursor.failures, cursor.attempt_at = 0, began
        cursor.attempt_is_all = sum(record.size for record in records) < cursor.bytes_max
        signals_count = cursor.attempt.signals_count
        if signals_count > BATCH_SIGNALS:
            cursor.bytes_max = max(cursor.bytes_max // 2, BATCH_BYTES_MIN)
        elif signals_count < BATCH_SIGNALS // 3:
            cursor.bytes_max = min(cursor.bytes_max * 2, BATCH_BYTES_MAX)

    def _acknowledged(self, cursor: Cursor) -> dict[str, int]:
        """Frames of each source that were acknowledged once, where they are sent again."""
        tallies = self._journal.tallies(cursor.stretch_id) if cursor.is_resent else {}
        return {source: tally.passed for source, tally in tallies.items()}

    def _prepare_end(self, cursor: Cursor, stretch: Stretch, lost: Lost) -> None:
        """There is nothing more to read: if nothing more will come, the feed is complete, whatever is missing of it."""
        if stretch.is_current:
            return
        tallies, is_resent = self._journal.tallies(stretch.id), cursor.is_resent
        cursor.attempt = prepare_end(
            stretch, tallies, lost, cursor.state, position=cursor.position, is_resent=is_resent
        )
        cursor.acknowledged = cursor.attempt.batch.position_new  # The journal has settled what was missing.

    async def _commit(self, cursor: Cursor, stretch: Stretch) -> None:
        attempt = cursor.attempt
        assert attempt is not None
        started = time.monotonic()
        try:
            await self._writer.commit(attempt.batch)
        except StoreError as error:
            if not await self._is_at_fault(cursor, error):
                raise
            self._refuse(cursor, attempt.records, attempt.dropped, error)
            return
        self._settle(cursor, attempt)
        self._committed(cursor)
        if (
            stretch.is_current
            and cursor.attempt_is_all
            and not any(map(self._is_unsent, self._journal.stretches()[:-1]))
        ):
            self.status.drained_at = cursor.attempt_at
        self.status.commits += 1
        self.status.commit_seconds.observe(time.monotonic() - started)
        if stretch.is_current and attempt.oldest_ns is not None:
            self.status.lag_seconds_last = (mono_ns() - attempt.oldest_ns) / 1e9
            self.status.lag_seconds.observe(self.status.lag_seconds_last)

    def _committed(self, cursor: Cursor) -> None:
        """The database takes what we have."""
        self._backoff.reset()
        cursor.backoff.reset()
        cursor.retry_at = 0.0
        self._said.pop(cursor.stretch_id, None)
        if self._said.pop("", None) is not None or not self.status.commits:
            log.info("the database takes data outage_seconds=%.1f", time.monotonic() - self._down_since)
        self._down_since = time.monotonic()
        self.status.database_up, self.status.trouble = True, ""

    def _settle(self, cursor: Cursor, attempt: Prepared) -> None:
        """The attempt is committed: note it in the journal's books, unless it was sent for the second time."""
        position = attempt.batch.position_new
        self.status.note_settled(attempt.signals_count, attempt.batch.copies, attempt.counts)
        if position > cursor.acknowledged:
            counts: Counter[str] = Counter()
            for record in attempt.records:
                if record.sequence > cursor.acknowledged:
                    counts[record.source] += record.frames_count
            nothing: Counter[str] = Counter()
            committed, refused = (nothing, counts) if attempt.is_rejected else (counts, nothing)
            self._journal.acknowledge(cursor.stretch_id, position, committed, refused, attempt.dropped)
            cursor.acknowledged = position
        cursor.position, cursor.state, cursor.attempt = position, attempt.state, None
        if position >= cursor.halving_until:
            cursor.records_max = None
        elif cursor.records_max is not None:
            cursor.records_max *= 2  # The one at fault is past, or comes later: find it as fast as before.
        if attempt.batch.completed:
            cursor.done = True

    async def _is_at_fault(self, cursor: Cursor, error: StoreError) -> bool:
        """Whether this batch itself is what the database cannot take.

        What passes by itself, and what lasts until an operator acts, is nobody's fault; only a large batch may be too
        large for a server that is short of something, and only then is it tried in halves.
        """
        if isinstance(error, StoreRejected):
            return True
        state = sqlstate(error.__cause__) if error.__cause__ is not None else None
        if state is None or error.__cause__ is None or cursor.attempt is None:
            return False
        cause, alone = classify(error.__cause__).cause, len(cursor.attempt.records) == 1
        if cause is Cause.STATE or (cause is Cause.TRANSIENT and (alone or not state.startswith(TOO_MUCH))):
            return False
        cursor.failures += 1
        if state == QUERY_CANCELED:
            return True
        return cursor.failures >= FAILURES_MAX and await self._writer.takes_writes()

    def _refuse(self, cursor: Cursor, records: Sequence[Record], lost: Lost, error: StoreError) -> None:
        """The database, or our own encoder, cannot take these: try half of them. A record that is alone is rejected."""
        self.status.failures += 1
        assert cursor.reader is not None
        cursor.attempt = None
        if len(records) > 1:
            cursor.reader.rewind(cursor.position)
            cursor.records_max = len(records) // 2
            cursor.halving_until = max(cursor.halving_until, records[-1].sequence)
            log.debug("refused as a whole, tried in halves records=%d: %s", len(records), error)
            return
        record = records[0]
        try:
            self._journal.reject(record, str(error))
        except IngestdError:
            cursor.reader.rewind(cursor.position)
            raise
        self.status.rejections += 1
        said, at = self._said.get("rejected", ("", 0.0))
        if str(error) != said or time.monotonic() - at > REPORT_SECONDS:
            self._said["rejected"] = (str(error), time.monotonic())
            log.error(
                "rejected for good, %d records so far stretch=%s record=%d source=%s frames=%d: %s"
                " (`ingestd journal export --rejected`)",
                self.status.rejections, cursor.stretch_id, record.sequence, record.source, record.frames_count, error,
            )  # fmt: skip
        cursor.attempt = prepare_rejected(
            record, lost, cursor.state, position=cursor.position, acknowledged=self._acknowledged(cursor)
        )

    def _keep(self, cursor: Cursor, error: IngestdError) -> bool:
        """Try a stretch again later, for ever; whether this was said now."""
        self.status.failures += 1
        cursor.retry_at = time.monotonic() + cursor.backoff.next_seconds()
        return self._say_once(cursor.stretch_id, error)

    def _say_once(self, about: str, error: IngestdError) -> bool:
        """Say what is wrong with a stretch, or with the database as a whole, unless it was said a moment ago."""
        is_database = isinstance(error, StoreError | FeedError)
        if is_database and about in ("", self._journal.stretches()[-1].id):
            self.status.database_up, self.status.trouble = False, str(error)
        said, at = self._said.get(about, ("", 0.0))
        if str(error) == said and time.monotonic() - at < REPORT_SECONDS:
            return False
        self._said[about] = (str(error), time.monotonic())
        level = logging.WARNING if isinstance(error, StoreUnavailable) else logging.ERROR
        until = "the database takes it" if is_database else "that passes"
        log.log(level, "kept in the journal until %s: %s", until, error)
        return True
