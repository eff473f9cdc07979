"""What PostgreSQL refuses: kept, sent in smaller batches, or set aside, by what its error means; never lost.

A trigger refuses, as a server without memory, an operator's mistake or a value out of range would.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ingestd.delivery import feeds
from ingestd.delivery import sending as sending_module
from ingestd.delivery.sending import FAILURES_MAX
from ingestd.journal import Journal
from ingestd.journal.inspection import rejected
from ingestd.journal.segment import segment_name
from ingestd.model import Books, Event
from tests.deliveries import books, copied, end_connections, events, make, numbers, send, sending, sql, until
from tests.journals import CLOCK, frames, open_journal

THIRTEEN = "NEW.arbitration_id @> ARRAY[13]"
CURE = "DROP FUNCTION refuse CASCADE"


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """Twenty frames, each in a record of its own."""
    opened = open_journal(tmp_path / "journal")
    for number in range(20):
        opened.append_frames(frames(number, 1), CLOCK)
    yield opened
    opened.close(ended=False)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried again at once, where people would wait for seconds."""
    monkeypatch.setattr(feeds, "RETRY_SECONDS_MIN", 0.005)
    monkeypatch.setattr(feeds, "RETRY_SECONDS_MAX", 0.01)


async def refuse(dsn: str, sqlstate: str, condition: str = THIRTEEN, table: str = "frame_chunks") -> None:
    """From now on rows that meet the condition are refused with this error."""
    await sql(
        dsn,
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$BEGIN IF {condition} THEN RAISE EXCEPTION 'not this' USING ERRCODE = '{sqlstate}'; END IF;"
        " RETURN NEW; END$$",
        f"CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION refuse()",
    )


def set_aside(journal: Journal) -> list[tuple[int, str]]:
    """Number of the first frame and reason of every record that was rejected."""
    found = rejected(journal._log.shelf.folder, "", pytest.fail)
    return [(int(record.frames().arbitration_id[0]), reason) for record, reason in found]


@pytest.mark.parametrize("sqlstate", ["22003", "P0001"])
async def test_a_record_that_can_never_go_in_is_set_aside_alone(
    migrated: str, journal: Journal, caplog: pytest.LogCaptureFixture, sqlstate: str
) -> None:
    """Its batch is halved until it is alone; with an error nobody knows only while other writes are taken."""
    await refuse(migrated, sqlstate, "NEW.arbitration_id && ARRAY[13, 17]")
    delivery = make(journal, migrated)
    async with sending(delivery):
        await until(lambda: books(journal).pending == 0, "commit")
        journal.append_frames(frames(20, 1), CLOCK)
        await until(lambda: books(journal).pending == 0, "commit of what comes later")
    assert await numbers(migrated) == [number for number in range(21) if number not in (13, 17)]
    assert [number for number, _ in set_aside(journal)] == [13, 17]
    assert all("not this" in reason for _, reason in set_aside(journal))
    assert books(journal) == Books(21, 19, 0, 2)
    assert caplog.text.count("rejected for good") == 1  # The same about the second is said after a minute.
    assert ("kept in the journal" in caplog.text) is (sqlstate == "P0001")
    assert delivery.status.failures >= (1 if sqlstate == "22003" else FAILURES_MAX)


async def test_what_was_rejected_is_rejected_again_by_an_emptied_database(
    migrated: str, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is set aside once, and counted once, like everything that is sent for the second time."""
    monkeypatch.setattr(sending_module, "BATCH_BYTES_MAX", 200)  # some records
    await refuse(migrated, "22003")
    async with sending(make(journal, migrated)):
        await until(lambda: books(journal).pending == 0, "commit")
        await sql(migrated, "TRUNCATE feeds, sessions, frame_chunks")
        await end_connections(migrated)
        journal.append_frames(frames(20, 1), CLOCK)
        await until(lambda: books(journal).pending == 0, "commit")
    assert await numbers(migrated) == [number for number in range(21) if number != 13]
    assert [number for number, _ in set_aside(journal)] == [13]
    assert books(journal) == Books(21, 20, 0, 1)


@pytest.mark.parametrize("sqlstate", ["42501", "40001", "53100"])
async def test_what_is_nobodys_fault_is_kept(
    migrated: str, journal: Journal, caplog: pytest.LogCaptureFixture, sqlstate: str
) -> None:
    """What passes by itself, or lasts until somebody acts: nothing is rejected, and all goes in when it is over."""
    await refuse(migrated, sqlstate)
    delivery = make(journal, migrated)
    async with sending(delivery):
        await until(lambda: delivery.status.failures > 2 * FAILURES_MAX, "failures")
        assert await numbers(migrated) == []
        assert "not this" in delivery.status.trouble
        assert not delivery.status.database_up
        await sql(migrated, CURE)
        await until(lambda: books(journal).pending == 0, "commit")
        assert delivery.status.database_up
    assert caplog.text.count("kept in the journal") == 1
    assert await numbers(migrated) == list(range(20))
    assert books(journal) == Books(20, 20)


async def test_a_database_that_takes_nothing_at_all_refuses_nobody(migrated: str, journal: Journal) -> None:
    """With an error nobody knows, for every write: not the batch is at fault."""
    await refuse(migrated, "XX000", "NEW.position > 0 OR OLD.position = 0", "feeds")
    delivery = make(journal, migrated)
    async with sending(delivery):
        await until(lambda: delivery.status.failures > 2 * FAILURES_MAX, "failures")
        assert await numbers(migrated) == []
        await sql(migrated, CURE)
        await until(lambda: books(journal).pending == 0, "commit")
    assert set_aside(journal) == []
    assert books(journal) == Books(20, 20)


@pytest.mark.parametrize("sqlstate", ["53200", "57014"])
async def test_what_is_too_much_at_once_goes_in_by_pieces(migrated: str, journal: Journal, sqlstate: str) -> None:
    """A server short of memory, or of time: smaller batches may be spared that."""
    await refuse(migrated, sqlstate, "NEW.frame_count > 5")
    await send(make(journal, migrated))
    assert await numbers(migrated) == list(range(20))
    assert int((await sql(migrated, "SELECT max(frame_count) FROM frame_chunks"))[0]) <= 5
    assert books(journal) == Books(20, 20)


@pytest.mark.parametrize("sqlstate", ["53200", "57014"])
async def test_a_record_that_is_too_much_is_kept(migrated: str, journal: Journal, sqlstate: str) -> None:
    """Alone it cannot become smaller, and the server may have more to give later: it is not rejected."""
    await refuse(migrated, sqlstate)
    delivery = make(journal, migrated)
    async with sending(delivery):
        await until(lambda: books(journal).committed == 13, "commit of what comes before it")
        failures = delivery.status.failures
        await until(lambda: delivery.status.failures > failures + 2 * FAILURES_MAX, "failures")
        assert books(journal) == Books(20, 13, 7)
        await sql(migrated, CURE)
        await until(lambda: books(journal).pending == 0, "commit")
    assert await numbers(migrated) == list(range(20))
    assert books(journal) == Books(20, 20)


async def test_a_stretch_that_has_to_wait_holds_up_no_other(migrated: str, journal: Journal) -> None:
    """An older one is refused again and again: what is recorded now is stored, and the database counts as up."""
    await refuse(migrated, "42501")
    journal.begin_stretch()
    delivery = make(journal, migrated)
    async with sending(delivery):
        await until(lambda: delivery.status.failures > FAILURES_MAX, "failures")
        for first in range(100, 400, 100):
            journal.append_frames(frames(first, 100), CLOCK)
            await until(lambda first=first: books(journal).committed == first, "commit")  # type: ignore[misc]
        assert delivery.status.database_up
        assert books(journal) == Books(320, 300, 20)
        await sql(migrated, CURE)
        await until(lambda: books(journal).pending == 0, "commit of the older one")
    assert await numbers(migrated) == [*range(20), *range(100, 400)]


async def test_a_stretch_that_somebody_deleted_half_sent_goes_on_where_it_was(migrated: str, journal: Journal) -> None:
    """What was stored stays deleted, and what had to wait is stored."""
    await send(make(journal, migrated))
    await refuse(migrated, "42501", "NEW.arbitration_id @> ARRAY[100]")
    journal.append_frames(frames(100, 100), CLOCK)
    journal.begin_stretch()
    old, _ = journal.stretches()
    async with sending(make(journal, migrated)):
        journal.append_frames(frames(300, 1), CLOCK)
        await until(lambda: books(journal) == Books(121, 21, 100), "commit of the newest")
    await sql(migrated, CURE, "TRUNCATE frame_chunks", f"DELETE FROM feeds WHERE feed_id = '{old.feed_id}'")
    await send(make(journal, migrated))
    assert await numbers(migrated) == list(range(100, 200))
    assert books(journal) == Books(121, 121)


async def test_damage_is_told_once_however_often_a_batch_is_halved(migrated: str, journal: Journal) -> None:
    """Frames that are missing among those sent by halves are counted, and told in one event."""
    [path] = journal._log.shelf.folder.glob("*1.journal")
    data = bytearray(path.read_bytes())
    for number in (5, 6):
        data[data.index(frames(number, 1).data.tobytes(), 100)] ^= 0x10
    with path.open("r+b") as file:
        file.write(data)
    await refuse(migrated, "22003")
    await send(make(journal, migrated))
    assert await numbers(migrated) == [number for number in range(20) if number not in (5, 6, 13)]
    assert await events(migrated) == [("gap", "damage", 2)]
    assert books(journal) == Books(20, 17, 0, 1, {"damage": 2})


async def test_a_record_that_cannot_be_set_aside_is_kept(
    migrated: str, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not passed over before its copy is on the disk: said, tried again, and then rejected once."""
    folder = journal._log.shelf.folder
    number = journal._log.shelf.number_last
    for each in range(number + 1, number + 9):
        (folder / segment_name(each, rejected=True)).mkdir()
    await refuse(migrated, "22003")
    async with sending(make(journal, migrated)):
        await until(lambda: books(journal).pending == 0, "commit")
    assert "a rejected record cannot be set aside: File exists" in caplog.text
    assert await numbers(migrated) == [number for number in range(20) if number != 13]
    assert books(journal) == Books(20, 19, 0, 1)
    for entry in folder.iterdir():
        if entry.is_dir():
            entry.rmdir()
    assert [number for number, _ in set_aside(journal)] == [13]


async def test_what_was_rejected_without_a_note_in_the_journal_is_rejected_in_its_books(
    migrated: str, journal: Journal, tmp_path: Path
) -> None:
    """The process died before it could acknowledge: the feed's state in the database says which records they were."""
    before = copied(journal, tmp_path / "before")
    await refuse(migrated, "22003")
    await send(make(journal, migrated))
    again = open_journal(before)
    await send(make(again, migrated))
    assert books(again) == books(journal) == Books(20, 19, 0, 1)
    assert await numbers(migrated) == [number for number in range(20) if number != 13]
    again.close(ended=False)


async def test_a_record_that_cannot_be_made_into_rows_is_set_aside(
    migrated: str, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    """Our own encoder fails: the same, without asking the database. Here a session that ended at no time."""
    journal.append_session({"ended_utc": "yesterday"})
    journal.append_frames(frames(20, 1), CLOCK)
    await send(make(journal, migrated))
    assert await numbers(migrated) == list(range(21))
    assert "rejected for good, 1 records so far" in caplog.text
    assert "it cannot be prepared: ValueError: Invalid isoformat string: 'yesterday'" in caplog.text
    assert books(journal) == Books(21, 21)


async def test_a_text_that_postgresql_cannot_hold_costs_only_itself(migrated: str, journal: Journal) -> None:
    """NUL is JSON, and no text of PostgreSQL's: the event is set aside, the frames around it are stored."""
    journal.append_event(Event("can0", "link_down", 20_000, payload={"said": "\0"}), CLOCK)
    journal.append_event(Event("can0", "link_up", 21_000), CLOCK)
    await send(make(journal, migrated))
    assert await numbers(migrated) == list(range(20))
    assert await events(migrated) == [("link_up", "", 0)]
    [(record, reason)] = rejected(journal._log.shelf.folder, "", pytest.fail)
    assert record.event().payload == {"said": "\0"}
    assert "cannot store this data" in reason


@pytest.mark.parametrize(("report_seconds", "is_repeated"), [(60.0, False), (0.0, True)])
async def test_an_unforeseen_error_keeps_what_is_there(
    migrated: str, journal: Journal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    report_seconds: float, is_repeated: bool,
) -> None:  # fmt: skip
    """Somebody has edited the feed's state: said with where it happened, again after a minute, and all is kept."""
    monkeypatch.setattr(sending_module, "REPORT_SECONDS", report_seconds)
    await send(make(journal, migrated))
    await sql(
        migrated, "CREATE TABLE before AS SELECT * FROM feeds", "UPDATE feeds SET decoder_state = '{\"gaps\": 1}'"
    )
    journal.append_frames(frames(20, 1), CLOCK)
    delivery = make(journal, migrated)
    async with sending(delivery):
        await until(lambda: delivery.status.failures > FAILURES_MAX, "failures")
        assert delivery.status.trouble.startswith("unforeseen: AttributeError")
        assert books(journal) == Books(21, 20, 1)
        await sql(migrated, "UPDATE feeds SET decoder_state = before.decoder_state FROM before")
        await until(lambda: books(journal).pending == 0, "commit")
    assert (caplog.text.count("this is a defect; the journal keeps what is not sent") > 1) is is_repeated
    assert "Traceback" in caplog.text
    assert await numbers(migrated) == list(range(21))
