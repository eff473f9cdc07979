"""A journal into a real PostgreSQL: what is sent when, and what the position that is found there leads to."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from ingestd.delivery import sending as sending_module
from ingestd.delivery.feeds import BATCH_BYTES_MIN
from ingestd.delivery.sending import POLL_SECONDS
from ingestd.journal import Journal, SessionInfo
from ingestd.model import Books, Clock, ClockState, Event
from ingestd.pipeline import Decoders
from ingestd.store import migrate
from tests.adversity.conftest import proxy, through
from tests.deliveries import (
    books,
    copied,
    counted,
    counting,
    end_connections,
    events,
    make,
    numbers,
    send,
    sending,
    sql,
    until,
)
from tests.journals import BOOT_ID, CLOCK, SESSION, frames, kill, open_journal
from tests.torture.proxy import Proxy

__all__ = ["proxy"]  # a fixture of the tests of adversity


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = open_journal(tmp_path / "journal")
    yield opened
    opened.close(ended=False)


async def values(dsn: str) -> list[int]:
    """The numbers that are stored as signals."""
    return [int(row) for row in await sql(dsn, "SELECT value_num::bigint FROM signals ORDER BY 1")]


def all_committed(journal: Journal) -> bool:
    return all(of.pending == 0 for of in journal.books().values())


async def feeds(dsn: str) -> list[tuple[int, bool]]:
    """Position and completion of every feed, the one that was begun first first."""
    rows = await sql(dsn, "SELECT position, completed_utc IS NOT NULL FROM feeds ORDER BY created_utc, feed_id")
    return [(int(position), completed == "t") for position, completed in (row.split("|") for row in rows)]


async def test_what_is_recorded_is_sent_as_it_comes(
    migrated: str, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    """Frames and events are stored while recording goes on, and the status says how long that took."""
    caplog.set_level("INFO")
    delivery = make(journal, migrated)
    assert not delivery.status.database_up
    async with sending(delivery):
        for first in range(0, 300, 100):
            journal.append_frames(frames(first, 100), CLOCK)
            await until(lambda: all_committed(journal), "commit")
        status = delivery.status
        assert (status.database_up, status.trouble) == (True, "")
        assert status.commits >= 3
        assert sum(status.commit_seconds.counts) == status.commits
        assert repr(delivery).endswith(f": open>: {status.commits} commits>")
        lags, drained_at = sum(status.lag_seconds.counts), status.drained_at
        assert status.lag_seconds_last > 0
        journal.append_event(Event("can0", "link_down", 300_000), CLOCK)
        await until(lambda: journal.stretches()[0].acknowledged == journal.stretches()[0].last_sequence, "commit")
        assert sum(status.lag_seconds.counts) == lags  # There was no frame in it.
        assert status.drained_at > drained_at
    assert await numbers(migrated) == list(range(300))
    assert await events(migrated) == [("link_down", "", 0)]
    assert books(journal) == Books(300, 300)
    assert [record.message.partition(" outage")[0] for record in caplog.records] == ["the database takes data"]


async def test_more_than_a_batch_does_not_wait_for_intervals(migrated: str, journal: Journal) -> None:
    """A backlog of the newest stretch goes on at once, batch after batch: an interval is for what is up to date."""
    count = BATCH_BYTES_MIN // 4
    for first in range(0, count, 1000):
        journal.append_frames(frames(first, min(1000, count - first)), CLOCK)
    delivery = make(journal, migrated, interval_s=3600.0)
    async with sending(delivery):
        await until(lambda: all_committed(journal), "commit of all")
    assert delivery.status.commits > 2
    assert books(journal) == Books(count, count)


async def test_nothing_is_sent_before_the_decoders_are_there(migrated: str, journal: Journal) -> None:
    """Frames stored without their signals could not be decoded any more: they wait, even when told to stop."""
    journal.append_frames(frames(0, 10), CLOCK)
    delivery = make(journal, migrated)
    delivery.decoders = None
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        task = group.create_task(send(delivery))
        await asyncio.sleep(5 * POLL_SECONDS)
        assert not task.done()
        assert await feeds(migrated) == []
        delivery.decoders = Decoders([])
    assert await numbers(migrated) == list(range(10))


async def test_what_earlier_runs_left_is_completed_while_the_newest_goes_on(migrated: str, journal: Journal) -> None:
    """Older stretches are sent too, each into a feed of its own that is complete then; the newest stays open."""
    for first in range(0, 4000, 100):
        if first and first % 1000 == 0:
            journal.append_event(Event("can0", "link_down", first * 1000), CLOCK)
            journal.begin_stretch()
        journal.append_frames(frames(first, 100), CLOCK)
    async with sending(make(journal, migrated, interval_s=0.3)):
        await until(lambda: all_committed(journal), "commit of all")
        journal.append_frames(frames(4000, 100), CLOCK)
        await until(lambda: all_committed(journal), "commit of the newest")
    assert await numbers(migrated) == list(range(4100))
    assert [completed for _, completed in await feeds(migrated)] == [True, True, True, False]
    assert books(journal) == Books(4100, 4100)


async def test_frames_are_kept_in_signals_alone_where_that_was_asked_for(
    migrated: str, journal: Journal, tmp_path: Path
) -> None:
    """`store_frames` off: every frame's signal is there, all are counted as committed, and no raw frame is stored."""
    journal.append_frames(counted(0, 10), CLOCK)
    delivery = make(journal, migrated, store_frames=False)
    delivery.decoders = counting(tmp_path)
    await send(delivery)
    assert await values(migrated) == list(range(10))
    assert await numbers(migrated) == []
    assert books(journal) == Books(10, 10)


async def test_what_is_known_of_a_session_goes_with_its_frames(migrated: str, tmp_path: Path) -> None:
    """Name, driver and end are stored where the journal says them; its end does not undo what people edited since."""
    told = {"name": "drive", "driver": "Ayrton", "time_base": BOOT_ID, "created_utc": "2026-11-25T08:00:00+00:00"}
    journal = open_journal(tmp_path / "journal", session=SessionInfo(SESSION.id, told))
    journal.append_frames(frames(0, 10, "line"), CLOCK)
    await send(make(journal, migrated))
    seen = "SELECT name, driver, time_base, created_utc AT TIME ZONE 'UTC', ended_utc AT TIME ZONE 'UTC' FROM sessions"
    assert await sql(migrated, seen) == [f"drive|Ayrton|{BOOT_ID}|2026-11-25 08:00:00|"]
    await sql(migrated, "UPDATE sessions SET driver = 'Alain', updated_utc = now()")
    journal.append_session({"ended_utc": "2026-11-25T09:00:00+00:00"})
    journal.append_session(told | {"driver": "Nigel", "updated_utc": "2026-11-25T08:30:00+00:00"})
    await send(make(journal, migrated))
    assert await sql(migrated, seen) == [f"drive|Alain|{BOOT_ID}|2026-11-25 08:00:00|2026-11-25 09:00:00"]
    assert await feeds(migrated) == [(4, True)]
    assert books(journal, "line") == Books(10, 10)
    journal.close(ended=True)


async def test_a_session_that_the_power_ended_lasts_until_its_last_frame(migrated: str, tmp_path: Path) -> None:
    """Nobody said its end. One that goes on after a crash has none yet; nor has one of a clock that was never set."""
    ended = "SELECT id::text, ended_utc AT TIME ZONE 'UTC' FROM sessions ORDER BY id"
    set_clock = Clock(1_800_000_000_000_000_000, ClockState.SET)
    lives = [(0, set_clock), (0, set_clock), (1, Clock(0, ClockState.UNSET)), (2, set_clock), (3, set_clock)]
    for life, (number, clock) in enumerate(lives):
        told = {"time_base": str(UUID(int=number)), "created_utc": "2027-01-15T08:00:00+00:00"}
        session = SessionInfo(UUID(int=number + 1), told)
        journal = open_journal(tmp_path / "journal", session=session, boot_id=str(UUID(int=number)))
        journal.append_frames(frames(life * 1_000_000, 10, "line"), clock)
        await send(make(journal, migrated))
        kill(journal)
        if life == 1:
            assert await sql(migrated, ended) == [f"{UUID(int=1)}|"], "it goes on"
    assert await sql(migrated, ended) == [
        f"{UUID(int=1)}|2027-01-15 08:00:01.000009", f"{UUID(int=2)}|", f"{UUID(int=3)}|2027-01-15 08:00:03.000009",
        f"{UUID(int=4)}|",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("signals_max", "size"),
    [
        pytest.param(10_000_000, 2 * BATCH_BYTES_MIN, id="few signals"),
        pytest.param(9_500, BATCH_BYTES_MIN, id="about as many as there should be"),
        pytest.param(10, BATCH_BYTES_MIN // 2, id="too many signals"),
    ],
)
async def test_the_size_of_a_batch_follows_from_its_signals(
    migrated: str, journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals_max: int, size: int
) -> None:
    """The less of the journal gives many signals, the less is read for the next batch; all of it is stored."""
    monkeypatch.setattr(sending_module, "BATCH_SIGNALS", signals_max)
    monkeypatch.setattr(sending_module, "BATCH_BYTES_MIN", BATCH_BYTES_MIN // 2)
    delivery = make(journal, migrated)
    delivery.decoders = counting(tmp_path)
    journal.append_frames(counted(0, 9_000), CLOCK)
    await send(delivery)
    assert [cursor.bytes_max for cursor in delivery._cursors.values()] == [size]
    assert await values(migrated) == list(range(9_000))


@pytest.mark.parametrize(("outage_seconds", "stretches"), [(60.0, 1), (0.0, 2)])
async def test_a_database_that_is_away(
    migrated: str, journal: Journal, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    outage_seconds: float, stretches: int,
) -> None:  # fmt: skip
    """Said once; everything waits; after a long outage live data get a stretch of their own, once."""
    monkeypatch.setattr(sending_module, "OUTAGE_SECONDS", outage_seconds)
    proxy.refuse()
    delivery = make(journal, through(proxy, migrated))
    async with sending(delivery):
        journal.append_frames(frames(0, 100), CLOCK)
        await until(lambda: delivery.status.trouble.startswith("the connection"), "trouble")
        attempts = delivery._backoff
        await until(lambda: attempts.next_seconds() > 1, "several attempts")
        assert not delivery.status.database_up
        assert books(journal) == Books(100, 0, 100)
        proxy.mend()
        await until(lambda: all(each.acknowledged == each.last_sequence for each in journal.stretches()), "commit")
        assert delivery.status.database_up
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "kept in the journal until the database takes it" in caplog.text
    assert await numbers(migrated) == list(range(100))
    assert len(await feeds(migrated)) == len(journal.stretches()) == stretches


async def test_an_outage_with_nothing_new_to_send_begins_no_stretch(
    migrated: str, journal: Journal, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest stretch has nothing that waits, so nothing of it can hold up live data."""
    monkeypatch.setattr(sending_module, "OUTAGE_SECONDS", 0.0)
    journal.append_frames(frames(0, 100), CLOCK)
    await send(make(journal, migrated))
    proxy.refuse()
    delivery = make(journal, through(proxy, migrated))
    async with sending(delivery):
        await until(lambda: "connection" in delivery.status.trouble, "trouble")
        proxy.mend()
        await until(lambda: delivery._writer.is_open and delivery._cursors, "connection")
        assert len(journal.stretches()) == 1
        journal.append_frames(frames(100, 100), CLOCK)
        await until(lambda: all_committed(journal), "commit")
    assert await numbers(migrated) == list(range(200))


async def test_the_answer_to_a_commit_is_lost(migrated: str, journal: Journal, proxy: Proxy) -> None:
    """The position says that it went through: nothing is sent twice, and it is in the books once."""
    delivery = make(journal, through(proxy, migrated))
    async with sending(delivery):
        journal.append_frames(frames(0, 100), CLOCK)
        await until(lambda: all_committed(journal), "commit")
        for first in range(100, 400, 100):
            proxy.lose_answer()
            journal.append_frames(frames(first, 100), CLOCK)
            await until(lambda: all_committed(journal), "commit")
    assert proxy.lost_answers == 3
    assert await numbers(migrated) == list(range(400))
    assert books(journal) == Books(400, 400)


async def test_a_commit_that_the_journal_does_not_know_of(migrated: str, journal: Journal, tmp_path: Path) -> None:
    """The process died between the commit and its note: the next one catches up, and the books are as if it had not."""
    journal.append_frames(frames(0, 100), CLOCK)
    await send(make(journal, migrated))
    for first in range(100, 400, 100):
        journal.append_frames(frames(first, 100), CLOCK)
    before = copied(journal, tmp_path / "before")
    await send(make(journal, migrated))
    again = open_journal(before)
    assert books(again) == Books(400, 100, 300)
    again.append_frames(frames(400, 100), CLOCK)
    await send(make(again, migrated))
    assert await numbers(migrated) == list(range(500))
    assert books(again) == Books(500, 500)
    again.close(ended=False)


async def test_a_journal_of_which_a_power_cut_took_what_the_database_has(
    migrated: str, journal: Journal, tmp_path: Path
) -> None:
    """Frames that are stored and not in the journal any more are nobody's to count; all further ones are stored."""
    journal.append_frames(frames(0, 100), CLOCK)
    before = copied(journal, tmp_path / "before")
    journal.append_frames(frames(100, 100), CLOCK)
    await send(make(journal, migrated))
    again = open_journal(before)
    again.append_frames(frames(200, 100), CLOCK)
    await send(make(again, migrated))
    assert await numbers(migrated) == list(range(300))
    assert books(again) == Books(200, 200)
    assert await feeds(migrated) == [(3, True), (2, False)]
    again.close(ended=False)


async def test_an_emptied_database_is_sent_everything_again(
    migrated: str, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said in an event and in the log; what was counted once is not counted again."""
    async with sending(make(journal, migrated)):
        journal.append_frames(frames(0, 100), CLOCK)
        await until(lambda: all_committed(journal), "commit")
        await sql(migrated, "TRUNCATE feeds, sessions, frame_chunks, events CASCADE")
        await end_connections(migrated)
        journal.append_frames(frames(100, 100), CLOCK)
        await until(lambda: all_committed(journal), "commit")
        await until(lambda: journal.stretches()[0].acknowledged == journal.stretches()[0].last_sequence, "the event")
    assert await numbers(migrated) == list(range(200))
    assert [kind for kind, _, _ in await events(migrated)] == ["database_restored"]
    assert "the database lacks what it had" in caplog.text
    assert books(journal) == Books(200, 200)


@pytest.mark.parametrize("is_known_to_this_process", [True, False])
async def test_an_older_backup_is_sent_what_it_lacks(
    migrated: str, journal: Journal, is_known_to_this_process: bool
) -> None:
    """From its position on, whether the process that notices is the one that had sent it or another."""
    async with sending(make(journal, migrated)):
        journal.append_frames(frames(0, 100), CLOCK)
        await until(lambda: all_committed(journal), "first commit")
        await sql(migrated, "CREATE TABLE backup AS SELECT * FROM feeds")
        for first in range(100, 300, 100):
            journal.append_frames(frames(first, 100), CLOCK)
            await until(lambda: all_committed(journal), "commit")
        restore = (
            "DELETE FROM frame_chunks WHERE mono_start_ns >= 100000",
            "UPDATE feeds f SET position = b.position, decoder_state = b.decoder_state FROM backup b"
            " WHERE b.feed_id = f.feed_id",
        )
        if is_known_to_this_process:
            await sql(migrated, *restore)
            await end_connections(migrated)
            journal.append_frames(frames(300, 100), CLOCK)
            await until(lambda: all_committed(journal), "commit")
    if not is_known_to_this_process:
        await sql(migrated, *restore)
        journal.append_frames(frames(300, 100), CLOCK)
    await send(make(journal, migrated))
    assert await numbers(migrated) == list(range(400))
    assert books(journal) == Books(400, 400)
    assert [kind for kind, _, _ in await events(migrated)] == ["database_restored"]


async def test_what_somebody_has_deleted_stays_deleted(migrated: str, journal: Journal) -> None:
    """In a database that has the newest feed: an old session that is gone is not sent again, nor is the current one."""
    journal.append_frames(frames(0, 100), CLOCK)
    journal.begin_stretch()
    journal.append_frames(frames(100, 100), CLOCK)
    delivery = make(journal, migrated)
    await send(delivery)
    old, new = journal.stretches()
    await sql(migrated, "TRUNCATE frame_chunks", f"DELETE FROM feeds WHERE feed_id = '{old.feed_id}'")
    journal.append_frames(frames(200, 100), CLOCK)
    await send(make(journal, migrated))
    assert await numbers(migrated) == list(range(200, 300))
    assert (await feeds(migrated)) == [(new.last_sequence + 1, False)]
    assert books(journal) == Books(300, 300)


async def test_a_journal_that_was_copied_to_another_machine(
    migrated: str, journal: Journal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Both go on, each with a feed of its own; what both have recorded before the copying is stored once."""
    journal.append_frames(frames(0, 100), CLOCK)
    await send(make(journal, migrated))
    other = open_journal(copied(journal, tmp_path / "other"))
    async with sending(make(journal, migrated)), sending(make(other, migrated, "machine-2")):
        journal.append_frames(frames(100, 100), CLOCK)
        other.append_frames(frames(200, 100), CLOCK)
        await until(lambda: all_committed(journal) and all_committed(other), "commit of both")
        await until(lambda: other.stretches()[0].feed_id != journal.stretches()[0].feed_id, "another feed")
    assert await numbers(migrated) == list(range(300))
    assert (books(journal), books(other)) == (Books(200, 200), Books(200, 200))
    assert "the journal was cloned" in caplog.text
    other.close(ended=False)


async def test_somebody_else_moves_the_position(
    migrated: str, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is written over it: the batch is not stored, and then it is, in a feed that nobody else uses."""
    async with sending(make(journal, migrated)):
        journal.append_frames(frames(0, 100), CLOCK)
        await until(lambda: all_committed(journal), "commit")
        await sql(migrated, "UPDATE feeds SET position = position + 1000")
        journal.append_frames(frames(100, 100), CLOCK)
        await until(lambda: all_committed(journal), "commit")
    assert "somebody else has written it" in caplog.text
    assert await numbers(migrated) == list(range(200))
    assert await feeds(migrated) == [(1002, False), (3, False)]
    assert books(journal) == Books(200, 200)


async def test_the_disk_cannot_be_read_now(
    migrated: str, journal: Journal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Too many open files, say: it is said once, and what could not be read is sent when it can."""
    delivery = make(journal, migrated)
    opening = Path.open

    def refused(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.suffix == ".journal":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return opening(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refused)
    async with sending(delivery):
        journal.append_frames(frames(0, 100), CLOCK)
        await until(lambda: delivery.status.failures >= 2, "failures")
        assert (delivery.status.database_up, delivery.status.trouble) == (True, "")  # It is not the database's.
        monkeypatch.undo()
        await until(lambda: all_committed(journal), "commit")
    [said] = [record.message for record in caplog.records if "Too many open files" in record.message]
    assert said.startswith("kept in the journal until that passes: ")
    assert await numbers(migrated) == list(range(100))
    assert books(journal) == Books(100, 100)


async def test_a_stretch_whose_end_is_damaged_is_completed(migrated: str, journal: Journal) -> None:
    """What cannot be read of its end is counted as damage, told in an event, and holds nothing up."""
    for first in range(0, 300, 100):
        journal.append_frames(frames(first, 100), CLOCK)
    end = journal.stretches()[0].bytes
    journal.begin_stretch()
    journal.append_frames(frames(300, 100), CLOCK)
    [path] = (journal._log.shelf.folder).glob("*1.journal")
    with path.open("r+b") as file:
        file.seek(end - 500)  # in the middle of the last record
        file.write(b"damage")
    await send(make(journal, migrated))
    assert await numbers(migrated) == [*range(200), *range(300, 400)]
    assert await events(migrated) == [("gap", "damage", 100)]
    assert await feeds(migrated) == [(4, True), (2, False)]
    assert books(journal) == Books(400, 300, dropped={"damage": 100})


async def test_a_feed_whose_completion_nobody_told_is_completed(migrated: str, journal: Journal) -> None:
    """Every record of it was committed while it was recorded: the next comparison finds that the end is not known."""
    journal.append_frames(frames(0, 100), CLOCK)
    await send(make(journal, migrated))
    journal.begin_stretch()
    journal.append_frames(frames(100, 100), CLOCK)
    await send(make(journal, migrated))
    assert await feeds(migrated) == [(2, True), (2, False)]
    assert await numbers(migrated) == list(range(200))
    assert books(journal) == Books(200, 200)


async def test_a_feed_that_is_deleted_during_an_outage_stays_deleted(
    migrated: str, journal: Journal, proxy: Proxy
) -> None:
    """All of it was stored: it is not sent again, though the reconnect is on its behalf; the newest goes on."""
    journal.append_frames(frames(0, 100), CLOCK)
    journal.begin_stretch()
    old = journal.stretches()[0]
    delivery = make(journal, through(proxy, migrated), interval_s=2.0)
    async with sending(delivery):
        journal.append_frames(frames(100, 100), CLOCK)
        await until(lambda: all_committed(journal), "commit")
        await sql(migrated, "TRUNCATE frame_chunks", f"DELETE FROM feeds WHERE feed_id = '{old.feed_id}'")
        proxy.refuse()
        journal.append_frames(frames(200, 100), CLOCK)
        await until(lambda: delivery._said.get(""), "outage")
        proxy.mend()  # before the newest stretch has its next turn
        await until(lambda: all_committed(journal), "commit")
        journal.append_frames(frames(300, 100), CLOCK)
        await until(lambda: all_committed(journal), "commit")
    assert await numbers(migrated) == list(range(200, 400))
    assert len(await feeds(migrated)) == 1
    assert books(journal) == Books(400, 400)


async def test_another_delivery_takes_over(migrated: str, database: str, journal: Journal) -> None:
    """One that is told to halt leaves the rest to the next, which may go elsewhere, and whose totals go on."""
    journal.append_frames(frames(0, 100), CLOCK)
    first = make(journal, migrated)
    async with sending(first):
        await until(lambda: all_committed(journal), "the first frames")
        first.halt()
        await until(lambda: not first._writer.is_open, "the end of the first")
    assert first.is_halted
    journal.append_frames(frames(100, 100), CLOCK)
    await migrate.upgrade(database)
    second = make(journal, database, status=first.status)
    await send(second)
    assert not second.is_halted
    assert await numbers(database) == list(range(200))
    assert await numbers(migrated) == list(range(100))
    assert second.status.commits >= 2
    assert books(journal) == Books(200, 200)


async def test_of_two_edits_of_a_session_the_later_wins(migrated: str, tmp_path: Path) -> None:
    """Key by key, by the time of each here and of the last there, in whatever order they arrive; never undone later.

    An edit by hand has its time from the database; the configuration in force is that of the latest stamp.
    """

    def told(config: int, **edited: tuple[str | None, int]) -> dict[str, Any]:
        stamps = {name: f"2026-11-25T08:00:{at:02d}+00:00" for name, (_, at) in edited.items()}
        values = {name: value for name, (value, _) in edited.items()}
        return values | {
            "time_base": BOOT_ID, "created_utc": "2026-11-25T08:00:00+00:00", "updated_utc": max(stamps.values()),
            "edited_utc": stamps, "config": {"since_ns": config},
        }  # fmt: skip

    first, second = told(7, driver=("Ada", 2), track=("Spa", 2)), told(9, driver=("Kim", 5), track=("Spa", 2))
    journal = open_journal(tmp_path / "journal", session=SessionInfo(SESSION.id, second))
    await send(make(journal, migrated))
    journal.append_session(first)  # As an older stretch has it, that is sent later.
    await send(make(journal, migrated))
    seen = "SELECT driver, track, notes, config ->> 'since_ns' FROM sessions"
    assert await sql(migrated, seen) == ["Kim|Spa||9"]
    await sql(migrated, "UPDATE sessions SET notes = 'by hand', driver = driver")
    for edit in (told(10, driver=("Bea", 6), track=("Monza", 7)), second):
        journal.append_session(edit)
        await send(make(journal, migrated))
    assert await sql(migrated, seen) == ["Kim|Spa|by hand|10"], "an edit of before has undone one by hand"
    edited = told(11, driver=("Kim", 5), track=("Spa", 2), notes=(None, 2))
    edited["edited_utc"]["track"] = edited["updated_utc"] = "2999-01-01T00:00:00+00:00"
    journal.append_session(edited | {"track": None})
    await send(make(journal, migrated))
    assert await sql(migrated, seen) == ["Kim||by hand|11"]
    # Also behind a clock that was years ahead.
    await sql(migrated, "UPDATE sessions SET track = 'Imola'")
    journal.append_session(edited | {"track": "Pau"})
    await send(make(journal, migrated))
    assert await sql(migrated, seen) == ["Kim|Imola|by hand|11"]
    journal.close(ended=True)
