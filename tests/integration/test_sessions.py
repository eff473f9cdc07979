"""Sessions and the files imported into them: found, made, joined and listed, whoever else does so meanwhile."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ingestd import imports
from ingestd.errors import StoreError, UsageError
from ingestd.imports import import_file
from ingestd.store.sessions import NewFeed, Session, new_session_id, open_catalogue
from tests.integration.test_import import DBC, fetch, options, small

__all__ = ["small"]  # a fixture


async def test_several_files_into_one_session(migrated: str, small: tuple[Path, Path], tmp_path: Path) -> None:
    """--session NAME puts files together; the session spans them all; a session that was recorded live is refused."""
    log, dbc = small
    later = tmp_path / "later.log"
    later.write_text("(1436509999.000001) can0 100#A00F010000000000\n")
    one = await import_file(later, options((dbc, "auto"), session="day 1"), migrated)
    two = await import_file(log, options((dbc, "auto"), session="day 1"), migrated)
    assert one.session_id == two.session_id
    [row] = await fetch(
        migrated,
        "SELECT created_utc::text, ended_utc::text, jsonb_array_length(config -> 'imports') AS files FROM sessions",
    )
    assert tuple(row) == ("2015-07-10 06:17:32.249713+00", "2015-07-10 06:33:19.000001+00", 2)
    await fetch(migrated, "UPDATE sessions SET time_base = '0e6a9b7c-boot'")
    with pytest.raises(StoreError, match="recorded live"):
        await import_file(small[1].with_name("small.log"), options(session="day 1", again=True), migrated)


async def test_an_ambiguous_session_name_is_refused(migrated: str, small: tuple[Path, Path]) -> None:
    """Two sessions of one name: the error lists their ids, and an id is accepted in place of the name."""
    log, dbc = small
    one = await import_file(log, options((dbc, "auto")), migrated)
    two = await import_file(log, options(again=True), migrated)
    with pytest.raises(UsageError, match=str(one.session_id)):
        await import_file(log, options(session="small.log", store_frames=False, again=True), migrated)
    later = log.with_name("later.log")
    later.write_text("(1436509999.000001) can0 100#A00F010000000000\n")
    assert (await import_file(later, options(session=str(two.session_id)), migrated)).session_id == two.session_id
    with pytest.raises(UsageError, match=r"holds .* already"):
        await import_file(log, options(session=str(two.session_id), store_frames=False, again=True), migrated)


async def test_an_import_that_failed_before_its_first_commit_leaves_no_trace(
    migrated: str, small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun with one DBC and failed at once, it can be imported with another, and no empty session stays behind."""
    log, dbc = small
    other = tmp_path / "other.dbc"
    other.write_text(DBC.replace("0.25", "0.5"))

    async def fail(*arguments: object, **more: object) -> None:
        raise StoreError("it could not be")

    monkeypatch.setattr(imports, "commit", fail)
    for session in (None, "day 1"):
        with pytest.raises(StoreError, match="could not be"):
            await import_file(log, options((other, "auto"), session=session), migrated)
    monkeypatch.undo()
    later = tmp_path / "later.log"
    later.write_text("(1436509999.000001) can0 100#A00F010000000000\n")
    await import_file(later, options((dbc, "auto"), session="day 1"), migrated)
    assert (await import_file(log, options((dbc, "auto")), migrated)).counts.frames == 5
    rows = await fetch(
        migrated, "SELECT name, jsonb_array_length(config -> 'imports') AS n FROM sessions ORDER BY name"
    )
    assert [tuple(row) for row in rows] == [("day 1", 1), ("small.log", 1)]


async def test_files_that_make_one_session_at_once(migrated: str, small: tuple[Path, Path], tmp_path: Path) -> None:
    """Different files imported at the same time into a session that is not there yet meet in one."""
    _, dbc = small
    logs = []
    for number in range(4):
        log = tmp_path / f"{number}.log"
        log.write_text(f"(143650{number}999.000001) can0 100#A00F010000000000\n")
        logs.append(log)
    summaries = await asyncio.gather(
        *(import_file(log, options((dbc, "auto"), session="day"), migrated) for log in logs)
    )
    assert len({summary.session_id for summary in summaries}) == 1


async def test_beginning_and_clearing_away_take_turns(migrated: str) -> None:
    """One file joins a session while what was begun of another is removed from it: every feed has its session."""

    async def begin(sha256: str, feed_id: str, name: str, existing: str | None) -> None:
        feed = NewFeed(feed_id, sha256, "", {}, "x.log", 0, None, "machine", "0")
        session = Session(new_session_id(), name, None, datetime.now(UTC))
        async with open_catalogue(migrated) as catalogue:
            await catalogue.begin(feed, session, existing)

    for number in range(15):
        await begin(f"x{number}", f"x{number}", f"race {number}", f"race {number}")
        await asyncio.gather(
            begin(f"y{number}", f"y{number}", f"race {number}", f"race {number}"),
            begin(f"x{number}", f"x{number}+1", f"own {number}", None),
        )
    orphans = "SELECT FROM feeds f WHERE NOT EXISTS (SELECT FROM sessions WHERE id = f.session_id)"
    assert await fetch(migrated, orphans) == []
    [row] = await fetch(migrated, "SELECT count(*) AS n FROM feeds")
    assert row["n"] == 30


async def test_what_a_session_holds_is_listed(migrated: str, small: tuple[Path, Path]) -> None:
    """Sessions with their files and sizes, the newest first; channels with their ranges, means and spans."""
    log, dbc = small
    later = log.with_name("later.log")
    later.write_text("(1436509999.000001) can0 101#01\n")
    await import_file(log, options((dbc, "auto"), car_id="F1"), migrated)
    await import_file(later, options((dbc, "auto")), migrated)
    async with open_catalogue(migrated) as catalogue:
        newer, older = await catalogue.summaries()
        assert (newer.name, newer.frames, newer.samples, newer.channels) == ("later.log", 1, 0, 0)
        assert (older.name, older.car_id, older.frames, older.samples, older.channels) == ("small.log", "F1", 5, 7, 4)
        assert older.files == [str(log)]
        assert older.ended_utc == datetime(2015, 7, 10, 6, 17, 32, 253713, UTC)
        assert await catalogue.channels(newer.id) == []
        by_name = {(each.source, each.channel): each for each in await catalogue.channels(older.id)}
    assert len(by_name) == 4
    rpm = by_name["can0", "Engine.Rpm"]
    assert (rpm.unit, rpm.samples, rpm.minimum, rpm.maximum, rpm.mean) == ("rpm", 2, 1000, 1000.25, 1000.125)
    assert (rpm.first_utc.microsecond, rpm.last_utc.microsecond) == (249713, 250713)


async def test_what_was_begun_without_a_frame_is_forgotten(migrated: str, small: tuple[Path, Path]) -> None:
    """With its entry in a session that has other files, or with its session; what holds frames stays."""
    summary = await import_file(small[0], options(session="day 1"), migrated)
    async with open_catalogue(migrated) as catalogue:
        for name in ("day 1", "day 2"):
            feed = NewFeed(f"begun for {name}", "begun", "", {}, "x.log", 0, None, "machine", "0")
            await catalogue.begin(feed, Session(new_session_id(), name, None, datetime.now(UTC)), name)
            [begun] = await catalogue.feeds_of_file("begun")  # The one before was removed.
            assert (begun.feed_id, begun.session_name, begun.is_empty) == (feed.feed_id, name, True)
        [row] = await fetch(migrated, "SELECT sha256 FROM feeds WHERE sha256 <> 'begun'")
        for sha256 in ("begun", row["sha256"]):
            await catalogue.forget_empty(sha256)
        [left] = await catalogue.summaries()
        assert (left.id, left.name, left.frames) == (summary.session_id, "day 1", 5)
        assert await catalogue.feeds_of_file("begun") == []
    [row] = await fetch(migrated, "SELECT jsonb_array_length(config -> 'imports') AS files FROM sessions")
    assert row["files"] == 1
