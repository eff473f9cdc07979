"""What every feed goes through: frames → decode → chunks → PostgreSQL, and the one retry loop.

A feed is an ordered, re-readable stream of frame batches with a position. `prepare` turns it into transactions,
`prefetch` prepares the next one while the database takes this one, `commit` sees a transaction through broken
connections. Nothing here knows whether the feed is a capture file or a journal.

Invariants: transactions are committed in order; the position of the first one not known to be committed is always
known; at most two prepared transactions are in memory.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from ingestd.backoff import Backoff
from ingestd.chunks import Placement, encode_frames, encode_signals
from ingestd.decode.can import Counts, Decoder, MessageTable
from ingestd.decode.databases import SignalDatabase
from ingestd.errors import CaptureError, FeedError, StoreUnavailable
from ingestd.model import ClockState, FrameBatch, Memory, SignalBatch, join
from ingestd.protocols import FrameDecoder, Line, RememberingDecoder, check_memory, new_decoder
from ingestd.store.writer import FeedBatch, Writer, utc

RETRY_SECONDS_MIN = 0.1
RETRY_SECONDS_MAX = 5.0
# Whichever comes first ends a transaction: a commit waits for the disk, and what waits for it is held in memory.
TRANSACTION_FRAMES = 256_000
TRANSACTION_SIGNALS = 2_000_000

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Binding:
    """A signal database and the source it describes; None for every source."""

    source: str | None
    database: SignalDatabase


class Decoders:
    """The decoder of each source, made when its first frame comes.

    `protocols` has the protocol of every serial source, with its options if it has any; all others are CAN buses.
    """

    def __init__(
        self,
        bindings: Sequence[Binding],
        *,
        keep_not_available: bool = False,
        protocols: Mapping[str, Line | str] | None = None,
    ) -> None:
        self._bindings = bindings
        self._keep_not_available = keep_not_available
        given = protocols or {}
        self._lines = {name: Line(each, {}) if isinstance(each, str) else each for name, each in given.items()}
        self._tables: dict[tuple[int, ...], MessageTable] = {}  # by the databases, which many sources share
        self._by_source: dict[str, FrameDecoder] = {}

    def of(self, source: str) -> FrameDecoder:
        """The decoder of `source`: of its protocol, or with the databases bound to it and those bound to all."""
        if source in self._lines and source not in self._by_source:
            decoder = new_decoder(source, self._lines[source])
            if decoder is not None:
                self._by_source[source] = decoder
        if source not in self._by_source:
            databases = [b.database for b in self._bindings if b.source in (None, source)]
            key = tuple(map(id, databases))
            if key not in self._tables:
                self._tables[key] = MessageTable(databases)
            self._by_source[source] = Decoder(source, self._tables[key], keep_not_available=self._keep_not_available)
        return self._by_source[source]

    def anew(self) -> Decoders:
        """The same for another thread: decoders remember layouts, and each is for one thread at a time."""
        other = Decoders(self._bindings, keep_not_available=self._keep_not_available, protocols=self._lines)
        other._tables = dict(self._tables)
        return other

    def keep(self, source: str, decoder: FrameDecoder) -> None:
        """Decode `source` with a decoder that has decoded it before."""
        self._by_source[source] = decoder

    @property
    def remembering(self) -> frozenset[str]:
        """The sources whose decoder has a memory that outlives a stretch of the journal."""
        return frozenset(each for each in self._lines if isinstance(self.of(each), RememberingDecoder))

    @property
    def dependent(self) -> frozenset[str]:
        """Those of which nothing can be read without that memory."""
        return frozenset(each for each in self.remembering if getattr(self.of(each), "needs_memory", True))

    def remember(self, frames: FrameBatch, memory: Memory) -> None:
        """Bring the memory of one of those sources up to date by frames that are decoded elsewhere.

        Raises whatever a plug-in raises, and ValueError for a memory that is no JSON.
        """
        decoder = self.of(frames.source)
        assert isinstance(decoder, RememberingDecoder)
        decoder.remember(frames, memory)
        check_memory(memory)

    @property
    def sources(self) -> Collection[str]:
        """The sources that have occurred."""
        return self._by_source.keys()

    @property
    def warnings(self) -> list[str]:
        """What the databases in use disagree about, and those that were not used: for after the last frame."""
        found = [warning for table in self._tables.values() for warning in table.warnings]
        found += [
            f"{b.database.name}: no frame of source {b.source} in the capture"
            for b in self._bindings
            if b.source is not None and b.source not in self._by_source
        ]
        return list(dict.fromkeys(found))


@dataclass(frozen=True, slots=True)
class FeedItem:
    """One batch of a feed: frames by source, how far the feed was read, in its own unit, and what to keep about it."""

    frames: list[FrameBatch]
    progress: int
    notes: Callable[[], dict[str, Any]]  # goes into the decoder state; asked when all before the next item is read


@dataclass(frozen=True, slots=True)
class Transaction:
    """A prepared batch and how the feed stands once it is committed."""

    batch: FeedBatch
    counts: Counts  # of the whole feed up to here
    chunks: int
    progress: int  # where the feed was read up to, in its own unit


def prepare(
    feed: Iterator[FeedItem],
    decoders: Decoders,
    placement: Placement,
    *,
    position: int = 0,
    state: dict[str, Any] | None = None,
    store_frames: bool = True,
) -> Iterator[Transaction]:
    """Decode and encode what `feed` yields, from `position` on; several items to a transaction, if they are small.

    Frames before `position` must already be left out. `state` is the decoder state committed with it. The last
    transaction completes the feed; a feed without frames gives one empty transaction.
    """
    counts, chunks = Counts(**(state or {}).get("counts", {})), int((state or {}).get("chunks", 0))
    memory: dict[str, Memory] = {}  # Captures are of CAN buses, whose decoders remember nothing.
    clock_set = placement.clock_state is ClockState.SET
    last_ns = int((state or {}).get("last_ns", -(2**63)))
    reading = _read(feed, placement)
    upcoming = next(reading, None)
    while True:
        item, position_old = FeedItem([], 0, dict), position
        waiting: list[FrameBatch] = []
        frames_count = signals_count = 0
        while (
            isinstance(upcoming, FeedItem) and frames_count < TRANSACTION_FRAMES and signals_count < TRANSACTION_SIGNALS
        ):
            item = upcoming
            waiting += item.frames
            frames_count += sum(map(len, item.frames))
            signals_count += sum(_likely_signals(batch, counts) for batch in item.frames)
            upcoming = next(reading, None)
        frames = _by_source(waiting)
        signals: list[SignalBatch] = []
        for batch in frames:
            decoded = decoders.of(batch.source).decode(batch, memory.setdefault(batch.source, {}))
            counts.add(decoded.counts)
            signals += decoded.batches
            last_ns = max(last_ns, int(batch.ts_ns.max()))
            position += len(batch)
        if isinstance(upcoming, CaptureError) and position == position_old:
            raise upcoming  # What was read before it is in a transaction of its own.
        copies = [encode_signals(signals, placement)]
        chunks += copies[0].rows
        if store_frames:
            copies.append(encode_frames(frames, placement))
        yield Transaction(
            FeedBatch(
                position_old=position_old,
                position_new=position,
                groups=[batch.group for batch in signals],
                copies=copies,
                decoder_state={"counts": asdict(counts), "chunks": chunks, "last_ns": last_ns, **item.notes()},
                completed=upcoming is None,
                ended_utc=utc(last_ns + placement.utc_offset_ns) if counts.frames and clock_set else None,
            ),
            Counts(**asdict(counts)),
            chunks,
            item.progress,
        )
        if upcoming is None:
            return


def _likely_signals(batch: FrameBatch, before: Counts) -> int:
    """How many signals frames will give, to bound what is held: as those before them, and not less than their length.

    A signal for two bytes of payload is what is usual. One that is all flags has more, and costs memory for it.
    """
    as_before = len(batch) * before.signals // max(before.frames, 1)
    return max(as_before, int(batch.length.sum(dtype=np.int64)) // 2)


def _by_source(batches: Sequence[FrameBatch]) -> list[FrameBatch]:
    """One batch for each source: what is done once for each kind of frame is done seldom then."""
    found: dict[str, list[FrameBatch]] = {}
    for batch in batches:
        found.setdefault(batch.source, []).append(batch)
    return [join(parts) for parts in found.values()]


def _read(feed: Iterator[FeedItem], placement: Placement) -> Iterator[FeedItem | CaptureError]:
    """The items, and behind the last one what the feed ended with, if that was an error."""
    try:
        for item in feed:
            for batch in item.frames:
                _check_stamps(batch, placement)
            yield item
    except CaptureError as error:
        yield error


def _check_stamps(batch: FrameBatch, placement: Placement) -> None:
    """Raise CaptureError for stamps whose UTC no bigint of nanoseconds holds: the years before 1678 and after 2262."""
    for ts_ns in (int(batch.ts_ns.min()), int(batch.ts_ns.max())):
        if not -(2**63) <= ts_ns + placement.utc_offset_ns < 2**63:
            raise CaptureError(
                f"a frame of {batch.source} is stamped {ts_ns} ns from a date that is {placement.utc_offset_ns} ns "
                "after 1970: no such time can be stored",
                "correct the date in the capture's header",
            )


async def prefetch(items: Iterator[Item]) -> AsyncGenerator[Item, None]:
    """Yield `items`, computing the next one in a thread while the caller works on this one."""
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1, "prepare") as pool:
        upcoming = loop.run_in_executor(pool, next, items, None)
        try:
            while (item := await upcoming) is not None:
                upcoming = loop.run_in_executor(pool, next, items, None)
                yield item
        finally:
            # The caller may have had enough. What becomes of the item in the making is nobody's business then.
            upcoming.add_done_callback(lambda future: future.cancelled() or future.exception())


async def commit(
    writer: Writer, batch: FeedBatch, *, patience_seconds: float, on_retry: Callable[[StoreUnavailable], None]
) -> None:
    """Commit `batch` exactly once, through lost connections, for at most `patience_seconds` without progress.

    Raises StoreUnavailable when patience has run out, StoreError where retrying cannot help, FeedError if the feed
    stands where neither this batch nor the one before it left it.
    """
    backoff, give_up_at = Backoff(RETRY_SECONDS_MIN, RETRY_SECONDS_MAX), time.monotonic() + patience_seconds
    while True:
        try:
            if not writer.is_open:
                await writer.open()
                found = await writer.position()
                if found == batch.position_new != batch.position_old:
                    return  # The commit went through; only its answer was lost.
                if found != batch.position_old:
                    raise FeedError(
                        f"the feed is at {found}, expected was {batch.position_old} or {batch.position_new}",
                        "this is another or an older database, or somebody else writes the same feed",
                    )
            await writer.commit(batch)
            return
        except StoreUnavailable as error:
            pause = backoff.next_seconds()
            if time.monotonic() + pause > give_up_at:
                raise
            on_retry(error)
        await asyncio.sleep(pause)
