"""Journals for tests: small segments, frames that can be told apart, ways to end that no journal likes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np

from ingestd.journal import Journal, Kind, Record, SessionInfo, merge
from ingestd.model import Clock, ClockState, FrameBatch

SEGMENT_BYTES = 64 << 10
SESSION = SessionInfo(UUID("01890000-0000-7000-8000-000000000001"), {"name": "shakedown"})
BOOT_ID = "0b0b0b0b-0000-4000-8000-000000000002"
CLOCK = Clock(1_700_000_000_000_000_000, ClockState.SET)


def open_journal(folder: Path, segments_max: int = 64, **options: Any) -> Journal:
    """A journal with small segments, its earlier stretches known."""
    journal = open_unrecovered(folder, segments_max, **options)
    journal.recover()
    return journal


def open_unrecovered(folder: Path, segments_max: int = 64, **options: Any) -> Journal:
    """The same before it has looked at what earlier runs left."""
    defaults: dict[str, Any] = {"session": SESSION, "machine_id": "machine-1", "boot_id": BOOT_ID}
    defaults |= {"segment_bytes": SEGMENT_BYTES, "max_bytes": segments_max * SEGMENT_BYTES}
    return Journal.open(folder, **(defaults | options))


def kill(journal: Journal) -> None:
    """What is left of a journal when its process is killed: nothing but the files."""
    log = journal._log
    for segment in [*log.finished, *([log.segment] if log.segment else [])]:
        segment.close()
    if log.room._next is not None:
        os.close(log.room._next[1])
    log.shelf.close()
    os.close(journal._lock_descriptor)
    log.is_closed = True


def frames(first: int, count: int, source: str = "can0", length: int = 8) -> FrameBatch:
    """Frames numbered from `first` on: the number is the arbitration id, a stamp in microseconds and the data."""
    numbers = np.arange(first, first + count)
    width = max(8, -(-length // 8) * 8)
    data = np.zeros((count, width), np.uint8)
    data[:, :length] = (numbers[:, None] + np.arange(length)) % 251
    return FrameBatch(
        source,
        numbers.astype(np.int64) * 1000,
        numbers.astype(np.uint32),
        (numbers % 7).astype(np.uint8),
        np.full(count, length, np.uint16),
        data,
    )


def numbers_of(records: Sequence[Record], source: str = "can0") -> list[int]:
    """The numbers of the frames in records, in order."""
    of_source = [record for record in records if record.kind is Kind.FRAMES and record.source == source]
    return [] if not of_source else merge(of_source).arbitration_id.tolist()


def read_all(journal: Journal, stretch_id: str, after: int = 0) -> tuple[list[Record], dict[str, dict[str, int]]]:
    """Every record of a stretch from a position on, and what is missing between them."""
    reader, records, lost = journal.reader(stretch_id, after), [], {}
    while (result := reader.read(10_000)).records:
        records += result.records
        for source, reasons in result.lost.items():
            for reason, count in reasons.items():
                of_source = lost.setdefault(source, {})
                of_source[reason] = of_source.get(reason, 0) + count
    return records, lost


def send_all(journal: Journal, sent: list[Record] | None = None) -> list[Record]:
    """Read and acknowledge everything there is, as if the database took it; added to what was `sent` before."""
    sent = [] if sent is None else sent
    for stretch in journal.stretches():
        reader, position = journal.reader(stretch.id, stretch.acknowledged), stretch.acknowledged
        while (result := reader.read(10_000)).records:
            committed: dict[str, int] = {}
            for record in result.records:
                committed[record.source] = committed.get(record.source, 0) + record.frames_count
            position = result.records[-1].sequence
            journal.acknowledge(stretch.id, position, committed, {}, result.lost)
            sent += result.records
    return sent
