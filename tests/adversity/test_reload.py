"""Another configuration under load: what is the same goes on untouched, what is wrong is refused as a whole."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import pty
import random
import signal
import subprocess
import sys
import termios
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ingestd.store import migrate
from tests.books import assert_books, metric
from tests.commands import assert_every_number_once, ingestd, is_listening
from tests.conftest import psql
from tests.recorder import Instrument, Recorder, lines_of, stored, wait_until
from tests.torture.instruments import DBC, Instruments, number_in

RELOADS = 12
KILLS = 6
EVENTS = "SELECT payload FROM events WHERE kind = 'reload' ORDER BY ts_mono_ns"


def reload(recorder: Recorder, exit_code: int = 0) -> Any:
    """`ingestd reload`, and what has changed."""
    done = ingestd(recorder, "reload", *([] if exit_code else ["--json"]), exit_code=exit_code)
    return done.stderr if exit_code else json.loads(done.stdout)


def rewrite(recorder: Recorder, old: str, new: str) -> None:
    """Change the configuration's file."""
    text = recorder.config.read_text()
    assert old in text
    recorder.config.write_text(text.replace(old, new))


def ready(recorder: Recorder) -> dict[str, Any]:
    """What /ready says."""
    address = recorder.log()[recorder.begun :].rpartition("listening http=")[2].split()[0]
    try:
        with urllib.request.urlopen(f"http://{address}/ready", timeout=20) as answer:
            said: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        said = json.load(error)
        error.close()
    return said


@pytest.fixture
def recorder(tmp_path: Path, migrated: str, instrument: Instrument) -> Iterator[Recorder]:
    """A daemon that records the instrument."""
    daemon = Recorder(tmp_path, migrated, lines_of(instrument))
    daemon.start()
    is_listening(daemon)
    yield daemon
    daemon.close()


@pytest.mark.slow
def test_sources_come_and_go_under_load(
    recorder: Recorder, instrument: Instrument, tmp_path: Path, migrated: str
) -> None:
    """One stays through a dozen reloads, by command and by SIGHUP and both at once: every line of it is stored once.

    The other is begun, reopened and ended meanwhile: what it gave is in the books to the last line.
    """
    process = recorder.process
    assert process is not None
    other = Instrument(tmp_path / "other-instrument")
    other.start()
    alone, both = recorder.config.read_text(), recorder.config.read_text() + lines_of(other, "other")
    try:
        for number in range(RELOADS):
            texts = [both, both + "baudrate = 115200\n", alone]
            recorder.config.write_text(texts[number % 3])
            begun = len(recorder.log())
            if number % 4 == 0:
                process.send_signal(signal.SIGHUP)
            hurried = threading.Thread(target=reload, args=(recorder,))
            if number % 4 == 1:
                hurried.start()
            changes = reload(recorder)
            if number % 4 == 1:
                hurried.join()
            elif number % 4:
                assert changes == {("added", "reopened", "removed")[number % 3]: ["other"]}
            recorder.wait_for("configuration reloaded", after=begun)
            sent = instrument.sent
            wait_until(lambda sent=sent: instrument.sent > sent + 50, "fifty lines")  # type: ignore[misc]
        sent = other.stop()
        assert_books(recorder, migrated, {"line": instrument.stop()})
    finally:
        other.close()
    lines = stored(migrated)
    assert_every_number_once(migrated, "line")
    assert recorder.log().count("link up source=line") == 1
    of_other = [frame for frame in lines if frame[0] == "other"]
    assert 50 < len(of_other) <= sent
    told = [json.loads(line) for line in psql(migrated, EVENTS).splitlines()]
    assert len(told) == RELOADS
    assert [next(iter(each)) for each in told[:3]] == ["added", "reopened", "removed"]
    gaps = psql(migrated, "SELECT count(*) FROM events WHERE source = 'other' AND kind = 'gap' AND key = 'reload'")
    assert int(gaps) == RELOADS // 3 + (RELOADS // 3 - 1), "each that reopened it, and each that brought it back"
    assert psql(migrated, "SELECT count(*) FROM sessions") == "1"
    sources = "SELECT jsonb_array_length(config -> 'file' -> 'serial') FROM sessions"
    assert psql(migrated, sources) == "1", "the session does not have the configuration in force"


@pytest.mark.slow
def test_killed_at_any_moment_of_a_reload(
    recorder: Recorder, instrument: Instrument, tmp_path: Path, migrated: str
) -> None:
    """SIGKILL behind SIGHUP: the next process goes on with the file as it is, and the books still balance."""
    rng = random.Random(5)
    other = Instrument(tmp_path / "other-instrument")
    other.start()
    alone = recorder.config.read_text()
    try:
        for number in range(KILLS):
            recorder.config.write_text(alone + lines_of(other, "other") * (number % 2 == 0))
            assert recorder.process is not None
            recorder.process.send_signal(signal.SIGHUP)
            time.sleep(rng.uniform(0.0, 0.2))  # The moment is what is tried, not how long something takes.
            recorder.kill()
            recorder.start()
            is_listening(recorder)
            sent = instrument.sent
            wait_until(lambda sent=sent: instrument.sent > sent + 50, "fifty lines")  # type: ignore[misc]
        other.stop()
        assert_books(recorder, migrated, {"line": instrument.stop()})
    finally:
        other.close()
    assert psql(migrated, "SELECT count(*) FROM sessions") == "1"


@pytest.mark.slow
def test_a_broken_configuration_is_refused_as_a_whole(
    recorder: Recorder, instrument: Instrument, tmp_path: Path, migrated: str
) -> None:
    """Every mistake is said, in the log, at /ready and to the command, which ends with 2; nothing has changed."""
    good = recorder.config.read_text()
    broken_dbc = tmp_path / "broken.dbc"
    broken_dbc.write_text("BO_ this is no database\n")
    mistakes = {
        good.replace('"100ms"', '"soon"').replace("port = ", "prot = "): ["batch.interval", "serial[0].prot"],
        good.replace('"100ms"', '"200ms"') + f'[[can]]\nname = "can0"\ndbc = ["{broken_dbc}"]\n': ["broken.dbc"],
        good.replace("[http]", '[http]\ntls_certificate = "gone.crt"'): ["http.tls_certificate", "gone.crt"],
        good + "[[": ["not TOML"],
        "": ["there is no source"],
    }
    for text, names in mistakes.items():
        recorder.config.write_text(text)
        begun = len(recorder.log())
        # Where the file itself says nothing of a socket the command finds it by its path.
        socket = ["--socket", str(tmp_path / "journal.sock")]
        command = [sys.executable, "-m", "ingestd", "reload", *socket]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert all(name in done.stderr for name in names), done.stderr
        assert "Traceback" not in done.stderr
        assert "the configuration is refused, the one before stays in force" in done.stderr
        log = recorder.log()[begun:]
        assert "error" in log
        assert "the one before stays in force" in log
        assert all(name in log for name in names), log
        assert "refused" in ready(recorder)["trouble"]["configuration"]
        assert ready(recorder)["ready"] is True
    assert recorder.process is not None
    begun = len(recorder.log())
    recorder.process.send_signal(signal.SIGHUP)
    recorder.wait_for("the one before stays in force", after=begun)
    recorder.config.write_text(good)
    assert reload(recorder) == {}
    assert "configuration" not in ready(recorder)["trouble"]
    assert "link down" not in recorder.log()
    assert psql(migrated, "SELECT count(*) FROM events WHERE kind = 'reload'") == "0"
    assert_books(recorder, migrated, {"line": instrument.stop()})
    assert_every_number_once(migrated)


@pytest.mark.slow
def test_a_file_that_cannot_be_read_is_refused_by_the_daemon(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No TOML, or gone: its daemon is found all the same, says so, and takes commands; that of another file is not."""
    good = recorder.config.read_text()
    recorder.config.write_text(good + "[[")
    begun = len(recorder.log())
    said = reload(recorder, exit_code=2)
    assert "the configuration is refused, the one before stays in force: " in said
    assert said.count("not TOML") == 1
    assert "the configuration is refused, the one before stays in force: " in recorder.log()[begun:]
    assert "not TOML" in ready(recorder)["trouble"]["configuration"]
    marked = ingestd(recorder, "sessions", "mark", "in the pits")
    assert "not TOML" in marked.stderr
    assert "the daemon runs with the file as it was" in marked.stderr
    listed = ingestd(recorder, "sessions", "list", exit_code=2)
    assert "running" in listed.stdout
    assert "this is what the daemon records" in listed.stderr
    # A file beside it that is no better: the daemon that listens there is another's.
    other = tmp_path / "other.toml"
    other.write_text(good + "[[")
    command = [sys.executable, "-m", "ingestd", "reload", "-c", str(other)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "or name the daemon by --socket PATH" in done.stderr
    assert recorder.log()[begun:].count("the configuration is refused") == 1
    recorder.config.unlink()
    monkeypatch.setenv("INGESTD_HOME", str(tmp_path))  # Nothing but the default is left to find it by.
    assert "No such file" in reload(recorder, exit_code=2)
    assert "No such file" in ready(recorder)["trouble"]["configuration"]
    recorder.config.write_text(good)
    assert reload(recorder) == {}
    assert "configuration" not in ready(recorder)["trouble"]


@pytest.mark.slow
def test_another_signal_database(tmp_path: Path, migrated: str) -> None:
    """What is decoded from then on is decoded with it; no device is reopened, and no frame is missing or decoded twice.

    Every number that the bus says is a signal of one definition or of the other, and a database that cannot be parsed
    changes nothing.
    """
    devices = Instruments(tmp_path)
    recorder = Recorder(tmp_path, migrated, devices.configuration())
    count = "SELECT count(*) FROM signals WHERE channel = '{}'"
    dbc = tmp_path / "counter.dbc"

    def has(channel: str, least: int = 100) -> None:
        wait_until(lambda: int(psql(migrated, count.format(channel))) > least, f"samples of {channel}", 120.0)

    try:
        devices.start()
        recorder.start()
        is_listening(recorder)
        has("Counter.Number")
        sha256 = "SELECT value FROM sessions, jsonb_each_text(config -> 'databases')"
        assert psql(migrated, sha256) == hashlib.sha256(DBC.encode()).hexdigest()
        dbc.write_text(DBC.replace("SG_ Number", "SG_ "))
        assert "counter.dbc" in reload(recorder, exit_code=2)
        dbc.write_text(DBC.replace("Number", "Renamed"))
        assert reload(recorder) == {"databases": ["counter.dbc"]}
        has("Counter.Renamed")
        before = psql(migrated, count.format("Counter.Number"))
        has("Counter.Renamed", 300)
        assert psql(migrated, count.format("Counter.Number")) == before
        # The bus is no more recorded: what it has said is decoded as what it was.
        tables = devices.configuration()
        bus = tables[tables.index("[[can]]") :]
        rewrite(recorder, bus, "")
        assert reload(recorder)["removed"] == ["can0"]
        sent = devices.stop()
        assert_books(recorder, migrated, sent, number=number_in)
        frames = [payload for source, _, payload in stored(migrated) if source == "can0"]
        rows = psql(
            migrated,
            "SELECT coalesce(value_text, value_num::bigint::text) FROM signals WHERE source = 'can0'",
        )
        assert sorted(map(int, rows.splitlines())) == sorted(int(payload, 16) for payload in frames)
        assert psql(migrated, "SELECT count(*) FROM events WHERE source = 'can0'") == "0", "it was reopened"
        assert psql(migrated, "SELECT count(*) FROM sessions WHERE config -> 'databases' IS NULL") == "1"
    finally:
        recorder.close()
        devices.close()


@pytest.mark.slow
def test_a_signal_database_that_was_broken_at_the_start(tmp_path: Path, migrated: str) -> None:
    """Nothing is sent before it is in order or no more asked for; a reload need not wait for a look at the file."""
    devices = Instruments(tmp_path)
    recorder = Recorder(tmp_path, migrated, devices.configuration())
    dbc = tmp_path / "counter.dbc"
    dbc.write_text("BO_ this is no database\n")
    try:
        devices.start()
        recorder.start()
        is_listening(recorder)
        recorder.wait_for("nothing is sent until the file is corrected")
        assert "counter.dbc" in reload(recorder, exit_code=2)
        wait_until(lambda: devices.can0.sent > 200, "frames")
        assert not stored(migrated)
        rewrite(recorder, f'dbc = ["{dbc}"]', "")
        assert reload(recorder) == {"databases": ["counter.dbc"]}
        wait_until(lambda: bool(stored(migrated)), "frames in SQL", more=recorder.log)
        assert str(dbc) not in ready(recorder)["trouble"]
        assert_books(recorder, migrated, devices.stop(), number=number_in)
    finally:
        recorder.close()
        devices.close()


@pytest.mark.slow
def test_settings(recorder: Recorder, instrument: Instrument, database: str, tmp_path: Path, migrated: str) -> None:
    """Another database gets everything the journal has; batches, HTTP, the journal's budget and the session follow.

    The journal's folder and the control socket are for a restart, and the answer says so.
    """
    wait_until(lambda: sum(stored(migrated).values()) > 100, "frames in the first database", more=recorder.log)
    rewrite(recorder, '"100ms"', '"50ms"')
    rewrite(recorder, "[batch]", 'max_bytes = "100MiB"\nsync_interval = "50ms"\nwhen_full = "drop-newest"\n[batch]')
    rewrite(recorder, "127.0.0.1:0", "[::1]:0")
    rewrite(recorder, f'path = "{recorder.journal}"', f'path = "{tmp_path / "elsewhere"}"')
    rewrite(recorder, "[http]", '[session]\ndriver = "Kim"\n[http]')
    command = [sys.executable, "-m", "ingestd", "reload", "--json", "--socket", str(tmp_path / "journal.sock")]
    changes = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=120).stdout)
    assert changes["settings"] == [
        "batch.interval", "http.listen", "journal.max_bytes", "journal.sync_interval", "journal.when_full",
        "session.driver",
    ]  # fmt: skip
    assert changes["restart"] == ["journal.path"]
    recorder.wait_for("listening http=[::1]:")
    assert metric(recorder, "ingestd_journal_max_bytes") == 100 * 2**20
    wait_until(lambda: psql(migrated, "SELECT driver FROM sessions") == "Kim", "the driver", more=recorder.log)
    in_force = "SELECT config -> 'file' -> 'journal' ->> 'max_bytes' FROM sessions"
    assert psql(migrated, in_force) == str(100 * 2**20)
    rewrite(recorder, f'path = "{tmp_path / "elsewhere"}"', f'path = "{recorder.journal}"')
    assert reload(recorder) == {}
    first = stored(migrated)
    asyncio.run(migrate.upgrade(database))
    rewrite(recorder, migrated, database)
    assert reload(recorder) == {"settings": ["database.dsn"]}
    sent = instrument.sent
    wait_until(lambda: instrument.sent > sent + 100, "a hundred lines")
    assert_books(recorder, database, {"line": instrument.stop()})
    assert_every_number_once(database)
    assert set(first) <= set(stored(database)), "the second database lacks what the first had"


@pytest.mark.slow
def test_a_terminal_that_is_closed(tmp_path: Path, migrated: str, instrument: Instrument) -> None:
    """For a daemon that was started in it SIGHUP is no reload: it stops as it should, with everything sent."""
    recorder = Recorder(tmp_path, migrated, lines_of(instrument))
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "ingestd", "run", "-c", str(recorder.config)]
    with recorder.log_path.open("ab") as log:
        process = subprocess.Popen(
            command, stdin=slave, stdout=log, stderr=log, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
    os.close(slave)
    try:
        is_listening(recorder)
        wait_until(lambda: instrument.sent > 100, "a hundred lines")
        process.send_signal(signal.SIGHUP)
        recorder.wait_for("configuration reloaded unchanged=True")
        os.close(master)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    log_text = recorder.log()
    assert "its terminal was closed" in log_text
    assert "pending=0" in log_text
