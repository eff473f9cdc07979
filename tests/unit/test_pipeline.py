"""The one retry loop: what a commit whose answer is lost, and a database that is gone, lead to.

The writer is a stand-in: a connection that breaks exactly between COMMIT and its answer cannot be had on demand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from ingestd import pipeline
from ingestd.chunks import Placement
from ingestd.decode.can import Counts, Decoder
from ingestd.decode.databases import load
from ingestd.decode.nmea import NmeaDecoder
from ingestd.errors import CaptureError, FeedError, StoreUnavailable
from ingestd.model import join
from ingestd.pipeline import Binding, Decoders, FeedItem
from ingestd.store.writer import FeedBatch
from tests import journals
from tests.deliveries import count_database

BATCH = FeedBatch(position_old=10, position_new=20, groups=(), copies=())


class Writer:
    """Holds a position; `faults` says what each commit does: nothing odd, break before it, or after it."""

    def __init__(self, position: int | None, faults: list[str]) -> None:
        self.committed = position
        self.faults = faults
        self.is_open = True
        self.commits = 0

    async def open(self) -> None:
        self.is_open = True

    async def position(self) -> int | None:
        return self.committed

    async def commit(self, batch: FeedBatch) -> None:
        self.commits += 1
        fault = self.faults.pop(0) if self.faults else ""
        if fault != "before":
            assert self.committed == batch.position_old, "committed twice"
            self.committed = batch.position_new
        if fault:
            self.is_open = False
            raise StoreUnavailable("the connection broke")


async def commit(writer: Any, patience_seconds: float = 5.0) -> list[StoreUnavailable]:
    retries: list[StoreUnavailable] = []
    await pipeline.commit(writer, BATCH, patience_seconds=patience_seconds, on_retry=retries.append)
    return retries


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "RETRY_SECONDS_MIN", 0.001)


def test_a_feed_of_several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each transaction begins where the one before it ended; the last one, and no other, completes the feed."""
    monkeypatch.setattr(pipeline, "TRANSACTION_FRAMES", 10)
    items = [FeedItem([journals.frames(first, 10)], first + 10, dict) for first in (0, 10, 20)]
    prepared = list(pipeline.prepare(iter(items), Decoders([]), PLACEMENT, position=100))
    assert [(each.batch.position_old, each.batch.position_new) for each in prepared] == [
        (100, 110), (110, 120), (120, 130)
    ]  # fmt: skip
    assert [each.batch.completed for each in prepared] == [False, False, True]
    assert [(each.counts.frames, each.progress) for each in prepared] == [(10, 10), (20, 20), (30, 30)]


def test_small_batches_share_a_transaction(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as make it worth the wait for the disk; its progress is that of the last one."""
    monkeypatch.setattr(pipeline, "TRANSACTION_FRAMES", 25)
    items = [FeedItem([journals.frames(first, 10)], first + 10, dict) for first in range(0, 50, 10)]
    prepared = list(pipeline.prepare(iter(items), Decoders([]), PLACEMENT))
    assert [(each.batch.position_old, each.batch.position_new, each.progress) for each in prepared] == [
        (0, 30, 30), (30, 50, 50)
    ]  # fmt: skip
    assert [each.batch.completed for each in prepared] == [False, True]
    assert [copy.rows for each in prepared for copy in each.batch.copies] == [0, 1] * 2


@pytest.mark.parametrize(("signals_max", "sizes"), [(30, [10] * 4), (90, [30, 10]), (10_000, [40])])
def test_what_is_held_is_bounded_by_signals(
    monkeypatch: pytest.MonkeyPatch, signals_max: int, sizes: list[int]
) -> None:
    """Before any was decoded the payloads tell how many there may be: 8 bytes are as good as four signals."""
    monkeypatch.setattr(pipeline, "TRANSACTION_SIGNALS", signals_max)
    items = [FeedItem([journals.frames(first, 10)], first + 10, dict) for first in range(0, 40, 10)]
    prepared = list(pipeline.prepare(iter(items), Decoders([]), PLACEMENT))
    assert [each.batch.position_new - each.batch.position_old for each in prepared] == sizes


def test_how_many_signals_are_likely() -> None:
    """What was decoded before tells it, and not less than the payloads do: few were in a quiet beginning."""
    batch = journals.frames(0, 10)
    assert pipeline._likely_signals(batch, Counts()) == 40
    assert pipeline._likely_signals(batch, Counts(frames=100, signals=10)) == 40
    assert pipeline._likely_signals(batch, Counts(frames=100, signals=1000)) == 100


def test_batches_of_a_source_are_joined_in_order() -> None:
    """As wide as the longest payload that is left, padded with zeros."""
    wide, narrow = journals.frames(0, 3), journals.frames(3, 2)
    wider = replace(wide, data=np.pad(wide.data, ((0, 0), (0, 8))))
    joined = join([wider, narrow])
    assert joined.ts_ns.tolist() == [*wide.ts_ns.tolist(), *narrow.ts_ns.tolist()]
    assert joined.data.tolist() == [*wide.data.tolist(), *narrow.data.tolist()]
    padded = np.pad(narrow.data, ((0, 0), (0, 8)), constant_values=7)
    longer = replace(narrow, length=np.array([12, 8], np.uint16), data=padded)
    assert join([wide, longer]).data.tolist() == [*(row + [0] * 8 for row in wide.data.tolist()), *longer.data.tolist()]
    assert join([narrow]) is narrow


PLACEMENT = Placement(UUID(int=1), journals.CLOCK.utc_offset_ns, journals.CLOCK.state)


def test_a_feed_without_raw_frames_counts_them() -> None:
    """Where signals alone are stored, position and counts are those of the frames, and no row of frames is sent."""
    items = [FeedItem([journals.frames(0, 10)], 10, dict)]
    [only] = pipeline.prepare(iter(items), Decoders([]), PLACEMENT, store_frames=False)
    assert [copy.table for copy in only.batch.copies] == ["signal_chunks"]
    assert (only.batch.position_new, only.counts.frames) == (10, 10)


def test_a_stamp_that_no_time_can_have_is_refused() -> None:
    """Nanoseconds of the years behind 2262 would come out as some other time: the source and its date are named."""
    late = replace(PLACEMENT, utc_offset_ns=2**63 - 5)
    with pytest.raises(CaptureError, match="a frame of can0 is stamped 9000 ns from a date") as caught:
        list(pipeline.prepare(iter([FeedItem([journals.frames(0, 10)], 10, dict)]), Decoders([]), late))
    assert "capture's header" in caught.value.hint


@pytest.mark.parametrize("late", [True, False])
def test_what_was_read_before_an_error_is_stored(late: bool) -> None:
    """A frame that cannot be stored, or a file that cannot be read on, takes nothing with it that came before."""
    limit = replace(PLACEMENT, utc_offset_ns=2**63 - 1_000_000) if late else PLACEMENT

    def feed() -> Iterator[FeedItem]:
        for first in (0, 10, 20):
            yield FeedItem([journals.frames(first, 10)], first + 10, dict)
        if not late:
            raise CaptureError("the disk is bad")
        yield FeedItem([journals.frames(5000, 10)], 40, dict)

    prepared = pipeline.prepare(feed(), Decoders([]), limit)
    found = next(prepared)
    assert (found.batch.position_new, found.batch.completed, found.progress) == (30, False, 30)
    with pytest.raises(CaptureError, match="no such time" if late else "the disk is bad"):
        next(prepared)


def test_a_database_for_a_source_that_never_came_is_told(tmp_path: Path) -> None:
    """Its name may be a slip; the sources that came are those that were asked for, of whatever protocol."""
    decoders = Decoders(
        [Binding("can7", count_database(tmp_path)), Binding(None, count_database(tmp_path))], protocols={"gps": "nmea"}
    )
    assert isinstance(decoders.of("gps"), NmeaDecoder)
    assert isinstance(decoders.of("can0"), Decoder)
    assert set(decoders.sources) == {"gps", "can0"}
    assert decoders.warnings == ["count.dbc: no frame of source can7 in the capture"]


async def test_a_commit_whose_answer_is_lost_is_not_repeated() -> None:
    """After COMMIT went through and the connection broke, the position read back says that it is done."""
    writer = Writer(10, ["after"])
    assert len(await commit(writer)) == 1
    assert (writer.committed, writer.commits) == (20, 1)


async def test_a_commit_that_did_not_happen_is_repeated() -> None:
    """A connection that broke before COMMIT leaves the old position: the batch is written again, once."""
    writer = Writer(10, ["before", "before"])
    assert len(await commit(writer)) == 2
    assert (writer.committed, writer.commits) == (20, 3)


async def test_an_empty_feed_is_completed_after_a_lost_connection() -> None:
    """Where old and new position are the same, the position proves nothing: the commit is repeated."""
    writer = Writer(0, ["before"])
    empty = FeedBatch(position_old=0, position_new=0, groups=(), copies=(), completed=True)
    await pipeline.commit(writer, empty, patience_seconds=5.0, on_retry=lambda _: None)  # type: ignore[arg-type]
    assert writer.commits == 2


@pytest.mark.parametrize("position", [None, 0, 15, 30])
async def test_any_other_position_is_refused(position: int | None) -> None:
    """A position that is neither the old nor the new one means another database or another writer."""
    writer = Writer(position, [])
    writer.is_open = False
    with pytest.raises(FeedError, match="expected was 10 or 20"):
        await commit(writer)
    assert writer.commits == 0


async def test_patience_runs_out() -> None:
    """A database that stays away ends the import with its own error, and nothing was written."""
    writer = Writer(10, ["before"] * 10_000)
    with pytest.raises(StoreUnavailable):
        await commit(writer, patience_seconds=0.05)
    assert writer.committed == 10


def test_a_source_may_keep_the_decoder_that_it_had() -> None:
    """Others, of the same databases or none, are new."""
    before = Decoders([], protocols={"gps": "nmea"})
    after = Decoders([], protocols={"gps": "nmea", "other": "nmea"})
    after.keep("gps", before.of("gps"))
    assert after.of("gps") is before.of("gps")
    assert after.of("other") is not before.of("gps")


def test_decoders_for_another_thread(tmp_path: Path) -> None:
    """They decode the same, each with what it remembers of its own; the databases are not read again."""
    (tmp_path / "car.dbc").write_text(
        'VERSION ""\nBU_:\nBO_ 256 Engine: 8 ECU\n SG_ Speed : 0|16@1+ (1,0) [0|0] "" ECU\n'
    )
    decoders = Decoders([Binding(None, load(tmp_path / "car.dbc"))], protocols={"gps": "nmea"})
    of_can, of_gps = decoders.of("can0"), decoders.of("gps")
    other = decoders.anew()
    assert other.of("can0") is not of_can
    assert type(other.of("gps")) is type(of_gps)
    assert other._tables.keys() == decoders._tables.keys()
    (table,), (own,) = decoders._tables.values(), other._tables.values()
    assert table is own
