"""Capture files into the database.

A file is a feed of its own: its id is the SHA-256 of its bytes, its position the ordinal of the next frame. Importing
it again therefore finds it done, and importing it after a crash goes on where the last commit left it. The signal
databases and options in force are part of that: the same file with others is refused, because half of it would be
decoded one way and half another.

Limits: one session has one time base, so captures never go into a session that a daemon recorded.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Any
from uuid import UUID

from ingestd import __version__
from ingestd.chunks import Placement
from ingestd.decode.can import Counts
from ingestd.errors import CaptureError, FeedError, StoreUnavailable
from ingestd.model import ClockState
from ingestd.pipeline import Binding, Decoders, FeedItem, Transaction, commit, prefetch, prepare
from ingestd.sources.captures import Capture, open_capture
from ingestd.store.sessions import Catalogue, Session, machine_id, new_session_id, open_catalogue, refuse_boot_session
from ingestd.store.writer import FeedRow, NewFeed, Writer, utc

PATIENCE_SECONDS = 60.0  # how long an import waits for a database that went away under it


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """How files are read and decoded, and where they go. Everything but the last four decides the stored values."""

    bindings: Sequence[Binding] = ()
    source_names: dict[str, str] = field(default_factory=dict)
    rate: float | None = None
    timezone: tzinfo = UTC
    keep_not_available: bool = False
    store_frames: bool = True
    session: str | None = None
    car_id: str | None = None
    again: bool = False

    def describe(self) -> dict[str, Any]:
        """What decides the stored values, as stored in `sessions.config` and hashed into the feed's identity."""
        return {
            "databases": [
                {"file": b.database.name, "sha256": b.database.sha256, "match": b.database.match, "source": b.source}
                for b in self.bindings
            ],
            "sources": dict(sorted(self.source_names.items())),
            "rate": self.rate,
            "timezone": str(self.timezone),
            "keep_not_available": self.keep_not_available,
            "store_frames": self.store_frames,
        }

    def config_hash(self) -> str:
        """SHA-256 of `describe`, without the databases' names: a renamed file is the same database."""
        description = self.describe()
        for database in description["databases"]:
            del database["file"]
        return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class ImportSummary:
    """What one file gave. Counts are of the whole file, also when the import was resumed."""

    file: str
    session_id: UUID
    session_name: str | None
    already_imported: bool
    resumed_at: int
    counts: Counts
    chunks: int
    damaged: int
    damage: tuple[str, ...]
    seconds: float
    warnings: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The stable face for programs."""
        counts = self.counts
        return {
            "file": self.file,
            "session_id": str(self.session_id),
            "session_name": self.session_name,
            "already_imported": self.already_imported,
            "resumed_at": self.resumed_at,
            "frames": counts.frames,
            "decoded_frames": counts.decoded,
            "unknown_frames": counts.unknown,
            "undecoded_frames": counts.undecoded,
            "remote_frames": counts.remote,
            "error_frames": counts.error,
            "short_frames": counts.short,
            "damaged": self.damaged,
            "damage": list(self.damage),
            "signals": counts.signals,
            "chunks": self.chunks,
            "seconds": round(self.seconds, 3),
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True, slots=True)
class Progress:
    """Where an import is; `read_bytes` of `size_bytes` are read and everything counted is committed."""

    read_bytes: int
    size_bytes: int
    frames: int
    signals: int


def feed_items(capture: Capture, position: int = 0) -> Iterator[FeedItem]:
    """The capture's frames from ordinal `position` on. Progress is in bytes read."""
    seen = 0
    for batch in capture.batches():
        skipped = min(max(position - seen, 0), len(batch))
        seen += len(batch)
        if skipped < len(batch):
            notes = {"damaged": capture.damage.count, "damage": list(capture.damage.first)}
            yield FeedItem((batch[skipped:] if skipped else batch).by_source(), batch.bytes_read, notes)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal. Raises CaptureError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CaptureError(f"{path}: {error.strerror}", "give the path of a capture file") from error


def _choose(feeds: list[FeedRow], options: ImportOptions, path: Path) -> FeedRow | None:
    """The earlier import to go on with or to report; None to start anew. Raises FeedError if there is another."""
    same = [feed for feed in feeds if feed.config_hash == options.config_hash()]
    for feed in same:
        if not feed.completed:
            return feed
    if options.again or not feeds:
        return None
    if same:
        return same[-1]
    other = feeds[-1]
    raise FeedError(
        f"{path}: imported {'before' if other.completed else 'in part'} with other signal databases or options, "
        f"as session {other.session_name or ''} {other.session_id}",
        "--again imports it once more, into a session of its own",
    )


async def _session_for(catalogue: Catalogue, options: ImportOptions, path: Path, created_utc: datetime) -> Session:
    if options.session is not None:
        found = await catalogue.find(options.session)
        if found is not None:
            refuse_boot_session(found)
            return Session(found.id, found.name, found.car_id, min(found.created_utc, created_utc))
    return Session(new_session_id(), options.session or path.name, options.car_id, created_utc)


async def import_file(
    path: Path,
    options: ImportOptions,
    dsn: str,
    *,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_retry: Callable[[StoreUnavailable], None] = lambda _: None,
) -> ImportSummary:
    """Import one capture file, or find that it is imported already.

    Raises CaptureError, FeedError, StoreError, UsageError. Whatever was committed before stays; importing the file
    again goes on from there.
    """
    started = time.monotonic()
    capture = await asyncio.to_thread(
        open_capture, path, source_names=options.source_names, rate=options.rate, timezone=options.timezone
    )
    hashing = asyncio.create_task(asyncio.to_thread(sha256_of, path))  # while we connect
    async with open_catalogue(dsn) as catalogue:
        sha256 = await hashing
        feeds = await catalogue.feeds_of_file(sha256)
        feed = _choose(feeds, options, path)
        if feed is not None and feed.completed:
            return _imported_before(path, feed, started)
        feed_id = sha256 if not feeds else f"{sha256}+{len(feeds)}"
        writer = Writer(dsn, feed.feed_id if feed is not None else feed_id)
        try:
            await writer.open()
            if feed is None:
                feed = await _begin(writer, catalogue, capture, options, feed_id, sha256)
            elif (position := await writer.position()) != feed.position:
                raise FeedError(f"{path}: another process has imported it up to {position} meanwhile", "try again")
            return await _import(capture, feed, writer, options, started, on_progress, on_retry)
        finally:
            writer.terminate()


async def _begin(
    writer: Writer, catalogue: Catalogue, capture: Capture, options: ImportOptions, feed_id: str, sha256: str
) -> FeedRow:
    """Make the session, unless it is an existing one, and the feed at position 0."""
    created_utc = datetime.now(UTC)
    first = await asyncio.to_thread(next, capture.batches(), None)
    if capture.clock_state is ClockState.SET and first is not None and len(first):
        created_utc = utc(int(first.frames.ts_ns.min()) + capture.utc_offset_ns)
    session = await _session_for(catalogue, options, capture.path, created_utc)
    await catalogue.add(session, {"file": capture.path.name, "sha256": sha256, **options.describe()})
    status = capture.path.stat()
    new = NewFeed(
        feed_id=feed_id,
        kind="file",
        session_id=session.id,
        machine_id=machine_id(),
        config_hash=options.config_hash(),
        path=str(capture.path.resolve()),
        size_bytes=status.st_size,
        mtime=utc(status.st_mtime_ns),
        sha256=sha256,
        importer_version=__version__,
    )
    await writer.begin(new)
    return FeedRow(feed_id, session.id, session.name, 0, new.config_hash, False, datetime.now(UTC), {})


async def _import(
    capture: Capture,
    feed: FeedRow,
    writer: Writer,
    options: ImportOptions,
    started: float,
    on_progress: Callable[[Progress], None],
    on_retry: Callable[[StoreUnavailable], None],
) -> ImportSummary:
    decoders = Decoders(options.bindings, keep_not_available=options.keep_not_available)
    transactions = prepare(
        feed_items(capture, feed.position),
        decoders,
        Placement(feed.session_id, capture.utc_offset_ns, capture.clock_state),
        position=feed.position,
        state=feed.decoder_state,
        store_frames=options.store_frames,
    )
    last: Transaction | None = None
    async with aclosing(prefetch(transactions)) as prepared:
        async for last in prepared:
            await commit(writer, last.batch, patience_seconds=PATIENCE_SECONDS, on_retry=on_retry)
            on_progress(Progress(last.progress, capture.size_bytes, last.counts.frames, last.counts.signals))
    assert last is not None, "prepare gives at least one transaction"
    warnings = decoders.warnings
    warnings += [f"{b.database.name}: no frame of source {b.source} in the file" for b in decoders.unused]
    return ImportSummary(
        file=str(capture.path),
        session_id=feed.session_id,
        session_name=feed.session_name,
        already_imported=False,
        resumed_at=feed.position,
        counts=last.counts,
        chunks=last.chunks,
        damaged=capture.damage.count,
        damage=tuple(capture.damage.first),
        seconds=time.monotonic() - started,
        warnings=tuple(warnings),
    )


def _imported_before(path: Path, feed: FeedRow, started: float) -> ImportSummary:
    """The summary of a completed feed, as the database has it."""
    state = feed.decoder_state
    return ImportSummary(
        file=str(path),
        session_id=feed.session_id,
        session_name=feed.session_name,
        already_imported=True,
        resumed_at=feed.position,
        counts=Counts(**state.get("counts", {})),
        chunks=int(state.get("chunks", 0)),
        damaged=int(state.get("damaged", 0)),
        damage=tuple(state.get("damage", ())),
        seconds=time.monotonic() - started,
    )
