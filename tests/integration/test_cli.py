"""The commands as a user meets them: what they print, where, and how they end. Never a traceback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

import pytest

from ingestd import demo
from ingestd.store import migrate
from tests.conftest import psql

DBC = 'VERSION ""\n\nNS_ :\n\nBS_:\n\nBU_: E\n\nBO_ 256 Engine: 8 E\n SG_ Rpm : 0|16@1+ (0.25,0) [0|8000] "rpm" E\n'
LOG = "(1436509052.249713) can0 100#A00F010000000000\n(1436509052.259713) can0 100#A10F010000000000\n"


def ingestd(*arguments: str | Path, dsn: str | None = None, exit_code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command; asserts how it ended and that no traceback was shown."""
    environment = {key: value for key, value in os.environ.items() if key != "INGESTD_DSN"}
    if dsn is not None:
        environment["INGESTD_DSN"] = dsn
    command = [sys.executable, "-m", "ingestd", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == exit_code, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    path = tmp_path / "drive.log"
    path.write_text(LOG)
    return path


@pytest.fixture
def dbc(tmp_path: Path) -> Path:
    path = tmp_path / "car.dbc"
    path.write_text(DBC)
    return path


def test_from_empty_database_to_sql(database: str, capture: Path, dbc: Path) -> None:
    """db init, import, sessions and psql: the path of a new user, with the results on stdout alone."""
    refused = ingestd("import", capture, "--dbc", dbc, dsn=database, exit_code=1)
    assert "ingestd db init" in refused.stderr
    assert refused.stdout == ""
    assert f"schema is at {migrate.head()}" in ingestd("db", "init", dsn=database).stdout
    assert "as it should be" in ingestd("db", "check", dsn=database).stdout
    assert ingestd("db", "current", dsn=database).stdout.strip() == migrate.head()
    assert "0001" in ingestd("db", "history").stdout
    assert "no sessions yet" in ingestd("sessions", "list", dsn=database).stdout

    done = ingestd("import", capture, "--dbc", dbc, "--car-id", "rig-7", "--json", dsn=database)
    summary = json.loads(done.stdout)
    assert (summary["frames"], summary["decoded_frames"], summary["signals"], summary["chunks"]) == (2, 2, 2, 1)
    assert done.stderr == ""
    again = ingestd("import", capture, "--dbc", dbc, dsn=database).stdout
    assert f"already imported as session drive.log {summary['session_id']}" in again

    [session] = json.loads(ingestd("sessions", "list", "--json", dsn=database).stdout)
    assert (session["id"], session["car_id"], session["frames"]) == (summary["session_id"], "rig-7", 2)
    shown = json.loads(ingestd("sessions", "show", "drive.log", "--json", dsn=database).stdout)
    [channel] = shown["channels"]
    assert (channel["channel"], channel["samples"], channel["mean"]) == ("Engine.Rpm", 2, 1000.125)
    assert "Engine.Rpm" in ingestd("sessions", "show", dsn=database).stdout
    asked = ingestd("db", "psql", "-XAtc", "SELECT sum(value_num) FROM signals", dsn=database).stdout
    assert asked.strip() == "2000.25"
    # What docs/sql.md has to copy can be asked; the capture's frames are all decoded.
    page = (Path(__file__).parents[2] / "docs" / "sql.md").read_text()
    queries = capture.with_name("queries.sql")
    queries.write_text("".join(re.findall(r"```sql\n(.*?)```", page, re.DOTALL)))
    psql = ["db", "psql", "-XAt", "-v", "ON_ERROR_STOP=1", "-f"]
    answers = ingestd(*psql, queries, dsn=database).stdout.splitlines()
    assert [answer.split("|")[:3] for answer in answers] == [
        ["can0", "Engine.Rpm", "1000.25"], [str(capture), "2", "2"],
    ]  # fmt: skip

    ingestd("db", "downgrade", "base", "--yes", dsn=database)
    assert "ingestd db init" in ingestd("sessions", "list", dsn=database, exit_code=1).stderr


def test_one_bad_file_of_many(migrated: str, tmp_path: Path, capture: Path, dbc: Path) -> None:
    """The others are imported, in order; the exit code is 1 and the last line names the bad one."""
    empty, later = tmp_path / "empty.log", tmp_path / "later.log"
    empty.write_text("")
    later.write_text(LOG.replace("1436509052", "1436509099"))
    done = ingestd("import", capture, empty, later, "--dbc", dbc, "--json", dsn=migrated, exit_code=1)
    assert [json.loads(line)["file"] for line in done.stdout.splitlines()] == [str(capture), str(later)]
    assert f"{empty} is empty" in done.stderr
    assert done.stderr.splitlines()[-1].endswith(str(empty))


def test_strict_makes_damage_an_error(migrated: str, capture: Path, dbc: Path) -> None:
    """The good frames are in either way; the bad line is named; only --strict ends with 1."""
    capture.write_text(LOG + "(1436509052.269713) can0 100#A1Z\n")
    done = ingestd("import", capture, "--dbc", dbc, dsn=migrated)
    assert "1 damaged" in done.stderr
    assert "line 3" in done.stderr
    ingestd("import", capture, "--dbc", dbc, "--strict", dsn=migrated, exit_code=1)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (["import"], 2, "FILES"),
        (["import", "{missing}", "--dbc", "{dbc}"], 1, "missing.log"),
        (["import", "{folder}", "--dbc", "{dbc}"], 1, "directory"),
        (["import", "{dbc}", "--dbc", "{dbc}"], 1, "not a capture of a known kind"),
        (["import", "{capture}", "--dbc", "{missing}.dbc"], 2, "No such file"),
        (["import", "{capture}", "--dbc", "{capture}"], 2, "unknown kind of signal database"),
        (["import", "{capture}", "--dbc", "{broken}"], 2, "line 1"),
        (["import", "{capture}", "--dbc", "{dbc}", "--match", "name"], 2, "use auto, id or pgn"),
        (["import", "{capture}", "--dbc", "{dbc}", "--match", "other.dbc=pgn"], 2, "no --dbc has that name"),
        (["import", "{capture}", "--map", "can0"], 2, "NAME=SOURCE"),
        (["import", "{capture}", "--timezone", "Mars/Olympus"], 2, "no such time zone"),
        (["import", "{capture}", "--rate", "0"], 2, "rate"),
        (["sessions", "show", "nothing"], 2, "no session nothing"),
        (["db", "upgrade", "9999"], 1, "9999"),
        (["check", "--capture", "{missing}"], 1, "missing.log"),
    ],
)
def test_mistakes_are_told(
    migrated: str, tmp_path: Path, capture: Path, dbc: Path, arguments: list[str], exit_code: int, said: str
) -> None:
    """Each mistake ends with its exit code and a line that names the thing."""
    broken = tmp_path / "broken.dbc"
    broken.write_text("BO_ nonsense\n")
    places = {"missing": tmp_path / "missing.log", "folder": tmp_path, "dbc": dbc, "capture": capture, "broken": broken}
    done = ingestd(*(each.format(**places) for each in arguments), dsn=migrated, exit_code=exit_code)
    assert said in done.stderr
    assert done.stdout == ""


def test_databases_that_cannot_be_used(migrated: str, capture: Path, dbc: Path) -> None:
    """Nobody there, no such database, nonsense for a DSN: one line, its exit code, no password shown."""
    for dsn, said, exit_code in (
        ("postgresql://me:secret@127.0.0.1:1/telemetry", "cannot be reached at 127.0.0.1:1/telemetry", 1),
        (migrated.replace("ingestd_test_", "absent_"), "does not exist", 1),
        ("nonsense", "looks like postgresql://", 2),
    ):
        done = ingestd("import", capture, "--dbc", dbc, "--dsn", dsn, exit_code=exit_code)
        assert said in done.stderr
        assert "secret" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_user_without_permission(migrated: str, capture: Path, dbc: Path) -> None:
    """A role that may connect but not write is told what is missing, and nothing is half written."""
    role = f"guest_{uuid4().hex[:8]}"
    psql(migrated, f"CREATE ROLE {role} LOGIN", f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
    try:
        dsn = migrated.replace("postgres@", f"{role}@")
        done = ingestd("import", capture, "--dbc", dbc, "--dsn", dsn, exit_code=1)
        assert "no permission" in done.stderr
        assert "ingestd db grant" in done.stderr
        assert psql(migrated, "SELECT count(*) FROM sessions") == "0"
    finally:
        psql(migrated, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


def test_a_wrong_password(migrated: str, capture: Path, dbc: Path) -> None:
    """The server's pg_hba.conf asks this user for a password: a wrong one is called that, and not shown."""
    role = f"locked_{uuid4().hex[:8]}"
    hba = Path(psql(migrated, "SHOW hba_file"))
    before = hba.read_text()
    psql(migrated, f"CREATE ROLE {role} LOGIN PASSWORD 'right'")
    try:
        hba.write_text(f"local all {role} scram-sha-256\n{before}")
        psql(migrated, "SELECT pg_reload_conf()")
        dsn = migrated.replace("postgres@", f"{role}:wr0ng@")
        done = ingestd("import", capture, "--dbc", dbc, "--dsn", dsn, exit_code=1)
        assert "wrong password" in done.stderr
        assert "wr0ng" not in done.stderr
    finally:
        hba.write_text(before)
        psql(migrated, "SELECT pg_reload_conf()", f"DROP ROLE {role}")


def test_a_read_only_database(migrated: str, capture: Path, dbc: Path) -> None:
    """A standby, or a database that only reads: said so."""
    name = psql(migrated, "SELECT current_database()")
    psql(migrated, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    assert "read-only" in ingestd("import", capture, "--dbc", dbc, dsn=migrated, exit_code=1).stderr


def test_check_tells_what_would_decode(tmp_path: Path, capture: Path, dbc: Path) -> None:
    """Share, unknown ids, channels with rates and size per day, without any database; for people and for programs."""
    capture.write_text(LOG + "(1436509052.269713) can0 1FF#00\n")
    result = json.loads(ingestd("check", "--capture", capture, "--dbc", dbc, "--json").stdout)
    assert (result["frames"], result["decoded_frames"], result["seconds"]) == (3, 2, 0.02)
    assert [(each["id"], each["frames"]) for each in result["unknown_ids"]] == [("1FF", 1)]
    assert [(each["channel"], each["per_second"]) for each in result["channels"]] == [("Engine.Rpm", 100.0)]
    assert "66.7 %" in ingestd("check", "--capture", capture, "--dbc", dbc).stdout


def test_check_suggests_matching_by_pgn(shared_data: Path) -> None:
    """A database of extended ids that hardly match by id: the command that helps is named, and helps."""
    arguments = ["check", "--capture", shared_data / "can/boat_garmin_pcan.trc"]
    arguments += ["--dbc", shared_data / "dbc/canboat_nmea2000.dbc"]
    assert "--match canboat_nmea2000.dbc=pgn" in ingestd(*arguments).stderr
    done = ingestd(*arguments, "--match", "canboat_nmea2000.dbc=pgn", "--json")
    assert json.loads(done.stdout)["decoded_frames"] == 12274 - 141
    assert done.stderr == ""


def test_databases_bound_to_sources(migrated: str, capture: Path, dbc: Path) -> None:
    """--map renames, --dbc SOURCE:FILE binds; a source that does not occur is a warning."""
    done = ingestd("import", capture, "--map", "can0=powertrain", "--dbc", f"powertrain:{dbc}", "--json", dsn=migrated)
    assert json.loads(done.stdout)["decoded_frames"] == 2
    assert psql(migrated, "SELECT DISTINCT source FROM signals") == "powertrain"
    done = ingestd("import", capture, "--dbc", f"can9:{dbc}", "--again", "--json", dsn=migrated)
    assert json.loads(done.stdout)["decoded_frames"] == 0
    assert "no frame of source can9" in done.stderr


def test_text_of_files_is_shown_as_it_is(migrated: str, tmp_path: Path) -> None:
    """Brackets in units and file names are no markup."""
    log, dbc = tmp_path / "[bold]x[.log", tmp_path / "odd.dbc"
    log.write_text(LOG)
    dbc.write_text(DBC.replace('"rpm"', '"[/s]"'))
    checked = ingestd("check", "--capture", log, "--dbc", dbc).stdout
    assert "[/s]" in checked
    assert "[bold]x[.log: 2 frames" in checked
    assert "[bold]x[.log" in ingestd("import", log, "--dbc", dbc, dsn=migrated).stdout
    assert "[bold]x[.log: already imported" in ingestd("import", log, "--dbc", dbc, dsn=migrated).stdout
    assert "[bold]y[.log" in ingestd("import", tmp_path / "[bold]y[.log", dsn=migrated, exit_code=1).stderr
    assert "[/s]" in ingestd("sessions", "show", dsn=migrated).stdout


def test_what_is_not_a_regular_file(migrated: str, tmp_path: Path, capture: Path) -> None:
    """A FIFO is refused at once, as a capture and as a database, instead of waiting for somebody to write to it."""
    fifo = tmp_path / "pipe.dbc"
    os.mkfifo(fifo)
    assert "not a regular file" in ingestd("import", fifo, dsn=migrated, exit_code=1).stderr
    assert "not a regular file" in ingestd("import", capture, "--dbc", fifo, dsn=migrated, exit_code=2).stderr


def with_a_keyboard() -> None:
    """A shell has what it runs in the background ignore Ctrl-C, and that is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


SLOW_COMMITS = (  # so that there is time for a keyboard between two of them
    "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS"
    " $$ BEGIN IF OLD.position > 0 THEN PERFORM pg_sleep(2); END IF; RETURN NEW; END $$",
    "CREATE TRIGGER dawdle BEFORE UPDATE ON feeds FOR EACH ROW EXECUTE FUNCTION dawdle()",
)


def test_stopped_by_the_keyboard(migrated: str, tmp_path: Path) -> None:
    """Ctrl-C ends with 130 and says that the same command goes on; it does."""
    big = tmp_path / "big.log"
    frames = demo.write_capture(big, 3600)
    command = [sys.executable, "-m", "ingestd", "import", str(big), "--dsn", migrated]
    psql(migrated, *SLOW_COMMITS)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=with_a_keyboard
    ) as process:
        deadline = time.monotonic() + 60
        while psql(migrated, "SELECT count(*) FROM feeds WHERE position > 0") == "0":
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "the same command goes on" in said
    assert "Traceback" not in said
    psql(migrated, "DROP FUNCTION dawdle CASCADE")
    done = json.loads(ingestd("import", big, "--json", dsn=migrated).stdout)
    assert (done["frames"], done["resumed_at"] > 0) == (frames, True)
    assert psql(migrated, "SELECT sum(frame_count) FROM frame_chunks") == str(frames)


def test_data_that_postgresql_refuses_stops_only_its_file(migrated: str, capture: Path, dbc: Path) -> None:
    """The server's refusal names the file, and the next one is imported."""
    psql(migrated, "ALTER TABLE frame_chunks ADD CHECK (mono_start_ns <> 1436509052249713000)")
    later = capture.with_name("later.log")
    later.write_text(LOG.replace("1436509052", "1436509099"))
    done = ingestd("import", capture, later, "--dbc", dbc, "--json", dsn=migrated, exit_code=1)
    assert [json.loads(line)["file"] for line in done.stdout.splitlines()] == [str(later)]
    assert str(capture) in done.stderr
