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
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Any
from uuid import UUID

from ingestd import __version__
from ingestd.chunks import Placement
from ingestd.decode.can import DECODER_VERSION, Counts
from ingestd.errors import CaptureError, FeedError, StoreUnavailable
from ingestd.model import ClockState
from ingestd.pipeline import Binding, Decoders, FeedItem, Transaction, commit, prefetch, prepare
from ingestd.sources.captures import Capture, open_capture
from ingestd.store.sessions import Catalogue, FeedRow, NewFeed, Session, machine_id, new_session_id, open_catalogue
from ingestd.store.writer import Writer, utc

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
            "decoder": DECODER_VERSION,
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
    signals_now: int  # of them, decoded in this run
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
    """Where an import is; `read_bytes` of `size_bytes` are read; the counts are of this run, and committed."""

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
            yield FeedItem(
                (batch[skipped:] if skipped else batch).by_source(), batch.bytes_read, lambda: capture.damage.as_json()
            )


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal. Raises CaptureError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CaptureError(f"{path}: {error.strerror}", "give the path of a capture file") from error


def _fingerprint(path: Path) -> tuple[int, int, int] | None:
    """What changes when somebody writes to the file; None if it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _text(path: Path | str) -> str:
    """A path as text that PostgreSQL can store: a name that is not UTF-8 gets replacement characters."""
    return os.fsencode(path).decode("utf-8", "replace")


def _choose(feeds: list[FeedRow], options: ImportOptions, path: Path) -> FeedRow | None:
    """The earlier import to go on with or to report; None to start anew. Raises FeedError if there is another."""
    same = [feed for feed in feeds if feed.config_hash == options.config_hash()]
    for feed in same:
        if not feed.completed:
            return feed
    others = [feed for feed in feeds if not feed.is_empty]
    if options.again or not others:
        return None
    if same:
        return same[-1]
    other = others[-1]
    raise FeedError(
        f"{path}: imported {'before' if other.completed else 'in part'} with other signal databases or options, "
        f"as session {other.session_name or ''} {other.session_id}",
        "--again imports it once more, into a session of its own",
    )


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
    fingerprint = _fingerprint(path)
    capture = await asyncio.to_thread(
        open_capture, path, source_names=options.source_names, rate=options.rate, timezone=options.timezone
    )
    async with open_catalogue(dsn) as catalogue:
        sha256 = await asyncio.to_thread(sha256_of, path)
        writer = Writer(dsn, sha256)
        try:
            await writer.open()
            feeds = await catalogue.feeds_of_file(sha256)
            feed = _choose(feeds, options, path)
            if feed is None:
                taken = {each.feed_id for each in feeds if not each.is_empty}
                free = (f"{sha256}+{number}" if number else sha256 for number in itertools.count())
                feed_id = next(candidate for candidate in free if candidate not in taken)
                feed = await _begin(catalogue, capture, options, feed_id, sha256)
            writer.feed_id = feed.feed_id
            if feed.completed:
                return _summary(path, feed, started)
            return await _import(capture, feed, writer, options, fingerprint, started, on_progress, on_retry)
        except CaptureError:
            await catalogue.forget_empty(sha256)
            raise
        finally:
            writer.terminate()


async def _begin(catalogue: Catalogue, capture: Capture, options: ImportOptions, feed_id: str, sha256: str) -> FeedRow:
    """Record the feed at position 0, and its session, which begins with the first batch if the capture has a date."""
    created_utc = datetime.now(UTC)
    first = await asyncio.to_thread(next, capture.batches(), None)
    if capture.clock_state is ClockState.SET and first is not None and len(first):
        created_utc = utc(int(first.frames.ts_ns.min()) + capture.utc_offset_ns)
    status = capture.path.stat()
    try:
        mtime = utc(status.st_mtime_ns)
    except (ValueError, OverflowError):  # File systems hold years that nobody's calendar does.
        mtime = None
    feed = NewFeed(
        feed_id=feed_id,
        sha256=sha256,
        config_hash=options.config_hash(),
        config=options.describe(),
        path=_text(capture.path.resolve()),
        size_bytes=status.st_size,
        mtime=mtime,
        machine_id=machine_id(),
        importer_version=__version__,
    )
    session = Session(new_session_id(), options.session or _text(capture.path.name), options.car_id, created_utc)
    return await catalogue.begin(feed, session, options.session)


async def _import(
    capture: Capture,
    feed: FeedRow,
    writer: Writer,
    options: ImportOptions,
    fingerprint: tuple[int, int, int] | None,
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
    before = Counts(**feed.decoder_state.get("counts", {}))
    last: Transaction | None = None
    async with aclosing(prefetch(transactions)) as prepared:
        async for last in prepared:
            # The feed is the file that was hashed. One that grows or is replaced would be stored under a wrong name,
            # and once more under the right one.
            if _fingerprint(capture.path) != fingerprint:
                raise CaptureError(f"{capture.path} changed while it was read", "import it when it is complete")
            await commit(writer, last.batch, patience_seconds=PATIENCE_SECONDS, on_retry=on_retry)
            done = last.counts
            on_progress(
                Progress(last.progress, capture.size_bytes, done.frames - before.frames, done.signals - before.signals)
            )
    assert last is not None, "prepare gives at least one transaction"
    committed = replace(feed, decoder_state=last.batch.decoder_state)
    summary = _summary(capture.path, committed, started, already_imported=False, signals_before=before.signals)
    return replace(summary, warnings=tuple(_warnings(decoders, options, feed, summary)))


def _warnings(decoders: Decoders, options: ImportOptions, feed: FeedRow, summary: ImportSummary) -> Iterator[str]:
    """What the user may not have meant."""
    yield from decoders.warnings
    for name, source in options.source_names.items():
        if source not in decoders.sources:
            yield f"--map {name}={source}: the file has no interface {name}"
    if options.session not in (None, feed.session_name, str(feed.session_id)):
        yield f"the import was begun in session {feed.session_name} and goes on there, not in {options.session}"
    counts = summary.counts
    if options.bindings and counts.frames and not counts.decoded:
        reason = (
            "they are segments of a transport protocol, or of unknown pages" if counts.undecoded else "no id matches"
        )
        yield f"{summary.file}: no frame was decoded: {reason}; `ingestd check` lists ids and rates"


def _summary(
    path: Path, feed: FeedRow, started: float, *, already_imported: bool = True, signals_before: int = 0
) -> ImportSummary:
    """The summary of a completed feed, from what is committed with it."""
    state = feed.decoder_state
    counts = Counts(**state.get("counts", {}))
    return ImportSummary(
        file=_text(path),
        session_id=feed.session_id,
        session_name=feed.session_name,
        already_imported=already_imported,
        resumed_at=0 if already_imported else feed.position,
        counts=counts,
        chunks=int(state.get("chunks", 0)),
        damaged=int(state.get("damaged", 0)),
        damage=tuple(state.get("damage", ())),
        seconds=time.monotonic() - started,
        signals_now=0 if already_imported else counts.signals - signals_before,
    )
