"""Sessions begun, ended and edited while the daemon records: no frame is lost over it, and the latest edit wins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ingestd.store import embedded
from tests.books import assert_books
from tests.commands import assert_every_number_once, ingestd, is_listening, run_ingestd, sessions
from tests.conftest import psql
from tests.recorder import Instrument, Recorder, lines_of, wait_until

ROWS = "SELECT coalesce(json_agg(to_jsonb(s) - 'config' ORDER BY created_utc), '[]') FROM sessions s"


def rows(dsn: str) -> list[dict[str, Any]]:
    """The table, in the order of their beginning."""
    found: list[dict[str, Any]] = json.loads(psql(dsn, ROWS))
    return found


@pytest.fixture
def recorder(tmp_path: Path, migrated: str, instrument: Instrument) -> Iterator[Recorder]:
    """A daemon that records the instrument."""
    daemon = Recorder(tmp_path, migrated, lines_of(instrument), settings='[session]\ncar_id = "rig-7"\n')
    daemon.start()
    is_listening(daemon)
    yield daemon
    daemon.close()


@pytest.mark.slow
def test_begun_and_ended_under_load(recorder: Recorder, instrument: Instrument, migrated: str) -> None:
    """Each frame is in the session that was recorded then, each once; no device is opened anew; the books balance."""
    [first] = sessions(recorder, "list")
    assert (first["running"], first["car_id"], first["name"][:5]) == (True, "rig-7", "rig-7")
    for lap in range(3):
        begun = sessions(recorder, "start", "--name", f"lap {lap}", "--driver", "Kim", "--track", "Nürburgring")
        sent = instrument.sent
        wait_until(lambda sent=sent: instrument.sent > sent + 100, "a hundred lines")  # type: ignore[misc]
        sessions(recorder, "mark", f"apex {lap}")
    stopped = sessions(recorder, "stop")
    assert stopped["ended"]["id"] == begun["session"]["id"]
    unnamed = stopped["session"]
    assert (unnamed["car_id"], unnamed["driver"], unnamed["track"]) == ("rig-7", None, None)
    said = ingestd(recorder, "sessions", "stop").stdout
    assert "recording goes on in rig-7" in said
    sent = instrument.sent
    wait_until(lambda: instrument.sent > sent + 100, "a hundred lines")
    assert_books(recorder, migrated, {"line": instrument.stop()})
    assert_every_number_once(migrated)
    assert recorder.log().count("link up") == 1
    found = rows(migrated)
    assert [row["name"] for row in found][1:4] == ["lap 0", "lap 1", "lap 2"]
    assert [row["driver"] for row in found] == [None, "Kim", "Kim", "Kim", None, None]
    assert all(row["ended_utc"] for row in found)
    assert [row["ended_utc"] for row in found] == sorted(row["ended_utc"] for row in found)
    # What was recorded in a session lies between its beginning and its end, of another session there is nothing.
    spans = psql(
        migrated,
        "SELECT count(*), bool_and(utc_time(c.mono_start_ns + c.utc_offset_ns) >= s.created_utc - interval '100 ms'"
        " AND utc_time(c.mono_end_ns + c.utc_offset_ns) <= s.ended_utc + interval '100 ms')"
        " FROM frame_chunks c JOIN sessions s ON s.id = c.session_id",
    )
    assert spans.endswith("|t"), spans
    markers = psql(
        migrated,
        "SELECT s.name, e.payload ->> 'text' FROM events e JOIN sessions s ON s.id = e.session_id"
        " WHERE e.kind = 'marker' ORDER BY e.ts_mono_ns",
    )
    assert markers.splitlines() == ["lap 0|apex 0", "lap 1|apex 1", "lap 2|apex 2"]


@pytest.mark.slow
def test_without_a_database_and_killed_right_behind(tmp_path: Path, own_server: Path, instrument: Instrument) -> None:
    """Start, edit and stop work while the database is away; a SIGKILL behind each takes nothing of them."""
    dsn = embedded.start(own_server)
    embedded.stop(own_server)
    recorder = Recorder(tmp_path, dsn, lines_of(instrument))
    try:
        recorder.start()
        is_listening(recorder)
        sessions(recorder, "edit", "driver=Ada", "notes=cold")
        recorder.kill()
        recorder.start()
        is_listening(recorder)
        # The process that goes on knows what the one before was told, also to show it without a database.
        listed = ingestd(recorder, "sessions", "list", "--json", exit_code=1)
        [first] = json.loads(listed.stdout)
        assert (first["driver"], first["notes"], first["running"]) == ("Ada", "cold", True)
        assert "the database is away" in listed.stderr
        sessions(recorder, "edit", "track=Spa", "notes=")
        started = sessions(recorder, "start", "--name", "race", "--driver", "Kim")
        recorder.kill()
        recorder.start()
        is_listening(recorder)
        went_on = sessions(recorder, "edit", "running", "car=rig-8")
        assert went_on["session"]["id"] == started["session"]["id"]
        assert (went_on["session"]["name"], went_on["session"]["driver"]) == ("race", "Kim")
        # Without a database: what the daemon records is shown and taken by its name.
        shown = ingestd(recorder, "sessions", "show", "running", exit_code=1)
        assert shown.stdout.splitlines()[:3] == [
            f"session race {started['session']['id']}", "  car     rig-8", "  driver  Kim",
        ]  # fmt: skip
        assert "in the database" not in shown.stdout
        assert "the database is away; this is what the daemon records" in shown.stderr
        # By its socket alone nobody but the daemon knows the database: no other is asked, and none is started.
        socket = recorder.journal.with_name(f"{recorder.journal.name}.sock")
        by_socket = run_ingestd("sessions", "show", "running", "--socket", socket, "--json", exit_code=2)
        told = json.loads(by_socket.stdout)
        assert (told["name"], told["frames"], told["channels"]) == ("race", None, None)
        assert "only the daemon knows which database is meant" in by_socket.stderr
        assert "starting the embedded" not in by_socket.stderr
        taken = ingestd(recorder, "sessions", "edit", "race", "car=rig-8")
        assert "whether other sessions are called race cannot be known, the running one is taken" in taken.stderr
        stopped = sessions(recorder, "stop")
        recorder.kill()
        recorder.start()
        is_listening(recorder)
        assert ingestd(recorder, "sessions", "list", exit_code=1).stdout.count(stopped["session"]["id"]) == 1
        embedded.start(own_server)
        wait_until(lambda: len(rows(dsn)) == 3, "all sessions", more=recorder.log)
        assert_books(recorder, dsn, {"line": instrument.stop()}, seconds=120.0)
        one, race, last = rows(dsn)
        assert (one["driver"], one["track"], one["notes"], one["id"]) == ("Ada", "Spa", None, first["id"])
        assert (race["name"], race["driver"], race["car_id"]) == ("race", "Kim", "rig-8")
        assert (last["id"], last["driver"]) == (stopped["session"]["id"], None)
        assert all(row["ended_utc"] for row in (one, race, last))
    finally:
        recorder.close()


@pytest.mark.slow
def test_the_latest_edit_wins(recorder: Recorder, instrument: Instrument, migrated: str) -> None:
    """Here and in the database by turns: of two edits the later one; what only one has edited stays as it is."""

    def row(number: int = 0) -> dict[str, Any]:
        found = rows(migrated)
        return found[number] if found else {}

    sessions(recorder, "edit", "driver=Ada", "track=Spa")
    wait_until(lambda: row().get("driver") == "Ada", "the first edit in SQL", more=recorder.log)
    psql(migrated, "UPDATE sessions SET driver = 'Kim', notes = 'by hand'")  # Nobody thinks of updated_utc.
    sessions(recorder, "edit", "track=Monza")
    wait_until(lambda: row().get("track") == "Monza", "the edit of the track in SQL", more=recorder.log)
    assert (row()["driver"], row()["notes"]) == ("Kim", "by hand"), "an edit of the track has undone another"
    sessions(recorder, "edit", "driver=Bea")
    wait_until(lambda: row().get("driver") == "Bea", "the last edit in SQL", more=recorder.log)
    [listed] = sessions(recorder, "list")
    assert (listed["driver"], listed["track"], listed["notes"]) == ("Bea", "Monza", "by hand")
    # What is no more recorded is edited in the database, by name, whatever the journal still has to say of it.
    sessions(recorder, "edit", "name=first")
    sessions(recorder, "start", "--name", "second")
    wait_until(lambda: bool(row().get("ended_utc")), "the end of the first", more=recorder.log)
    edited = sessions(recorder, "edit", "first", "notes=by command", "car=")
    assert (edited["session"]["name"], edited["session"]["id"]) == ("first", listed["id"])
    wait_until(lambda: len(rows(migrated)) == 2, "the second", more=recorder.log)
    refused = ingestd(recorder, "sessions", "edit", "third", "notes=x", exit_code=2)
    assert "no session third" in refused.stderr
    assert_ambiguity_is_refused(recorder, migrated, listed["id"])
    # The database is lost as far as the last minutes go: everything is sent again, and the edits are not undone.
    psql(migrated, "UPDATE feeds SET position = 0")
    recorder.kill()
    recorder.start()
    is_listening(recorder)
    assert_books_again(recorder, migrated, instrument)
    first, second = rows(migrated)
    assert (first["notes"], first["car_id"], first["driver"]) == ("by command", None, "Bea")
    assert (second["name"], second["car_id"]) == ("second", "rig-7")


def assert_ambiguity_is_refused(recorder: Recorder, dsn: str, ended: str) -> None:
    """Two sessions of a name, one of them running: neither is taken, and each can be named by the id that is said."""
    running = sessions(recorder, "edit", "name=first")["session"]["id"]
    for command in (["edit", "first", "notes=x"], ["show", "first"]):
        refused = ingestd(recorder, "sessions", *command, exit_code=2)
        assert "2 sessions are called 'first'" in refused.stderr
        assert f"{ended}, {running} (running)" in refused.stderr
    told = ingestd(recorder, "sessions", "edit", running.upper(), "name=second", "driver=Kim", "track=")
    assert told.stdout == f"session second ({running}) edited: name: second, driver: Kim, track: none\n"
    sessions(recorder, "edit", "running", "driver=")
    told = ingestd(recorder, "sessions", "edit", "first", "notes=by command")
    assert told.stdout == f"session first ({ended}) edited: notes: by command\n"
    assert psql(dsn, f"SELECT notes FROM sessions WHERE id = '{ended}'") == "by command"
    # What people have said is shown, of the running one before the database knows it.
    shown = ingestd(recorder, "sessions", "show", "first").stdout.splitlines()
    assert shown[:4] == [f"session first {ended}", "  driver  Bea", "  track   Monza", "  notes   by command"]
    sessions(recorder, "edit", "notes=wet")
    shown = ingestd(recorder, "sessions", "show", "running").stdout.splitlines()
    assert shown[:3] == [f"session second {running}", "  car     rig-7", "  notes   wet"]
    assert shown[-1].endswith("UTC, running")
    header = ingestd(recorder, "sessions", "list").stdout.splitlines()[1]
    assert [cell.strip() for cell in header.strip("┃ ").split("┃")][-4:] == ["car", "driver", "track", "notes"]
    sessions(recorder, "edit", "notes=")


def assert_books_again(recorder: Recorder, dsn: str, instrument: Instrument) -> None:
    """What was sent a second time is there twice by our own doing: only that all came through is looked at."""
    instrument.stop()
    wait_until(
        lambda: psql(dsn, "SELECT count(*) FROM feeds WHERE position = 0") == "0", "everything again", more=recorder.log
    )
    recorder.stop()


@pytest.mark.slow
def test_two_daemons_on_one_machine(recorder: Recorder, tmp_path: Path, migrated: str) -> None:
    """Each is found by its own configuration, and hears nothing of what the other is told."""
    folder = tmp_path / "other"
    folder.mkdir()
    device = Instrument(folder / "instrument")
    device.start()
    other = Recorder(folder, migrated, lines_of(device, "other"), settings='[session]\ncar_id = "boat"\n')
    try:
        other.start()
        is_listening(other)
        sessions(other, "edit", "driver=Ada")
        sessions(recorder, "start", "--name", "of the rig")
        running = {
            each["id"]: (each["name"], each["driver"])
            for daemon in (recorder, other)
            for each in sessions(daemon, "list")
            if each["running"]
        }
        assert len(running) == 2
        assert ("of the rig", None) in running.values()
        assert any(name.startswith("boat") and driver == "Ada" for name, driver in running.values())
        assert (tmp_path / "journal.sock").is_socket()
        assert (folder / "journal.sock").is_socket()
        recorder.stop()
        psql(migrated, "DELETE FROM sessions WHERE name = 'of the rig'")  # As if it had not come yet.
        for command in (["show", "of the rig"], ["edit", "of the rig", "driver=Kim"]):
            refused = ingestd(recorder, "sessions", *command, exit_code=1)
            assert "session of the rig has ended, and the database does not have it yet" in refused.stderr
        assert not (tmp_path / "journal.sock").exists()
        refused = ingestd(recorder, "sessions", "start", exit_code=1)
        assert "nobody listens" in refused.stderr
        assert "nobody listens" in ingestd(recorder, "sessions", "show", "running", exit_code=1).stderr
        assert sessions(other, "mark", "still there")["session"]["driver"] == "Ada"
        other.stop()
    finally:
        other.close()
        device.close()
