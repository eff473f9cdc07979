"""`ingestd check -c FILE`: what `run` would meet, looked at with real devices, a real server and a daemon beside it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from ingestd.daemon import preflight
from ingestd.demo.simulation import Simulation
from tests.conftest import as_user, psql
from tests.integration.test_cli import ingestd
from tests.recorder import Instrument, Recorder, lines_of

SENTENCE = b"$GPGLL,4916.45,N,12311.12,W,225444,A*31\r\n"
DBC = 'VERSION ""\nBU_:\nBO_ 256 Engine: 8 ECU\n SG_ Speed : 0|16@1+ (1,0) [0|0] "rpm" ECU\n'


@pytest.fixture
def gps(tmp_path: Path) -> Iterator[Instrument]:
    device = Instrument(tmp_path / "gps", pause_s=0.02, say=lambda _: SENTENCE)
    device.start()
    yield device
    device.close()


def write(folder: Path, sources: str, settings: str = "[database]\nembedded = true\n", journal: str = "") -> Path:
    """A configuration."""
    path = folder / "car.toml"
    journal = journal or f'path = "{folder}/journal"\nmax_bytes = "64MiB"\n'
    path.write_text(f'{settings}[journal]\n{journal}\n[http]\nlisten = "off"\n{sources}')
    return path


def check(path: Path, *more: str, exit_code: int = 0) -> dict[str, tuple[str, str]]:
    """Level and text by what it is about."""
    told: dict[str, Any] = json.loads(ingestd("check", "-c", path, "--json", *more, exit_code=exit_code).stdout)
    assert told["ready"] == (not exit_code)
    return {each["about"]: (each["level"], each["text"]) for each in told["findings"]}


def serial(port: Path | str, name: str = "gps") -> str:
    return f'[[serial]]\nname = "{name}"\nport = "{port}"\nprotocol = "nmea"\n'


def test_everything_is_well(tmp_path: Path, migrated: str, gps: Instrument) -> None:
    """Each thing is named, the device is heard and understood, and nothing is left behind; exit code 0."""
    path = write(tmp_path, serial(gps.link), settings=f'[database]\ndsn = "{migrated}"\n')
    found = check(path)
    assert {about: level for about, (level, _) in found.items() if about != "clock"} == {
        "journal": "ok", "gps": "ok", "database": "ok",
    }  # fmt: skip
    assert found["clock"][0] in ("ok", "note"), "whether this machine's clock is synchronised is not ours to say"
    assert "100% of them become signals" in found["gps"][1]
    assert "schema up to date, may be written to" in found["database"][1]
    assert not (tmp_path / "journal").exists()
    shown = ingestd("check", "-c", path).stdout
    assert "`run` would record gps\n" in shown
    assert "problem" not in shown
    assert psql(migrated, "SELECT count(*) FROM sessions") == "0"


def test_what_is_not_there(tmp_path: Path) -> None:
    """An absent device and a server that is away are problems, each in the words of the log; `run` waits for both."""
    path = write(tmp_path, f'{serial("/dev/ttyUSB77")}[[can]]\nname = "can77"\n')
    found = check(path, "--dsn", "postgresql://nobody@127.0.0.1:1/telemetry", "--seconds", "0.5", exit_code=1)
    assert found["gps"][0] == found["can77"][0] == found["database"][0] == "problem"
    assert "/dev/ttyUSB77 does not exist: plug the device in" in found["gps"][1]
    assert "no interface can77" in found["can77"][1]
    assert "Connection refused" in found["database"][1]
    assert "waits in the journal" in found["database"][1]
    assert "with the problems above" in ingestd("check", "-c", path, "--seconds", "0.1", exit_code=1).stdout


def test_a_silent_device(tmp_path: Path) -> None:
    """It is open, and that nothing was heard is worth a note."""
    device = Instrument(tmp_path / "gps")
    try:
        assert check(write(tmp_path, serial(device.link)), "--seconds", "0.5")["gps"] == (
            "note", "is open; nothing was heard for 0.5 s",
        )  # fmt: skip
    finally:
        os.close(device._master)
        os.close(device._slave)


def test_a_device_that_is_not_understood(tmp_path: Path) -> None:
    """Rows of a table whose names nobody has said: recorded, and worth a note."""
    device = Instrument(tmp_path / "ecu", pause_s=0.02, say=lambda number: b"%d,2\n" % number)
    device.start()
    try:
        level, text = check(write(tmp_path, serial(device.link).replace("nmea", "csv")))["gps"]
        assert level == "note"
        assert "0% of them become signals: is it the right signal database, or protocol?" in text
    finally:
        device.close()


def test_signal_databases(tmp_path: Path) -> None:
    """How much is in each; one that cannot be parsed is a problem that names its line."""
    (tmp_path / "engine.dbc").write_text(DBC)
    (tmp_path / "broken.dbc").write_text("BO_ 1 nonsense")
    sources = '[[can]]\nname = "can77"\ndbc = ["engine.dbc", "broken.dbc"]\n'
    found = check(write(tmp_path, sources), "--seconds", "0.1", exit_code=1)
    assert found["engine.dbc"] == ("ok", "1 messages, 1 signals")
    assert found["broken.dbc"][0] == "problem"
    assert "broken.dbc, line 1" in found["broken.dbc"][1]
    assert "recorded, and not sent" in found["broken.dbc"][1]


def test_the_journal(tmp_path: Path, gps: Instrument) -> None:
    """Where it would be gone with the power, where there is not enough room for it, where nobody may write."""
    if not os.path.ismount("/dev/shm"):
        pytest.skip("this machine has no /dev/shm")
    of_memory = f'path = "/dev/shm/ingestd-{uuid4().hex}/journal"\nmax_bytes = "64MiB"\n'
    found = check(write(tmp_path, serial(gps.link), journal=of_memory), exit_code=1)
    assert found["journal"][0] == "problem"
    assert "gone when the power is" in found["journal"][1]
    vast = f'path = "{tmp_path}/journal"\nmax_bytes = "1000TiB"\n'
    found = check(write(tmp_path, serial(gps.link), journal=vast))
    assert found["journal"][0] == "note"
    assert "lower max_bytes" in found["journal"][1]
    not_a_disk = 'path = "/proc/ingestd/journal"\nmax_bytes = "64MiB"\n'
    found = check(write(tmp_path, serial(gps.link), journal=not_a_disk), exit_code=1)
    assert "/proc cannot be written to: " in found["journal"][1]


def test_an_address_that_is_taken(tmp_path: Path, gps: Instrument) -> None:
    """A note: recording goes on without."""
    path = write(tmp_path, serial(gps.link))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        path.write_text(path.read_text().replace('"off"', f'"127.0.0.1:{port}"'))
        assert check(path)["http"][0] == "note"
    assert check(path)["http"] == ("ok", f"http://127.0.0.1:{port}/metrics is free")


def test_an_adapter_that_takes_its_time(tmp_path: Path) -> None:
    """It is listened to for as long as any other, from when it is open: python-can's slcan sleeps for two seconds."""
    with Simulation("slcan") as car:
        bus = f'[[can]]\nname = "ecu"\ninterface = "slcan"\nchannel = "{car.places["body"]["channel"]}"\n'
        found = check(write(tmp_path, bus), "--seconds", "0.2")
    assert found["ecu"] == ("note", "is open; nothing was heard for 0.2 s")


def test_a_user_who_may_not_write(tmp_path: Path, migrated: str, gps: Instrument) -> None:
    """The statements that would help are named."""
    role = f"reader_{uuid4().hex}"
    psql(migrated, f"CREATE ROLE {role} LOGIN", f"GRANT SELECT, INSERT ON ALL TABLES IN SCHEMA public TO {role}")
    try:
        found = check(write(tmp_path, serial(gps.link)), "--dsn", as_user(migrated, role), exit_code=1)
        assert found["database"][0] == "problem"
        assert f"GRANT UPDATE ON feeds TO {role}; GRANT UPDATE ON sessions TO {role}" in found["database"][1]
        assert f"as owner: `ingestd db grant --writer {role}`" in found["database"][1]
    finally:
        psql(migrated, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


def test_beside_a_daemon(tmp_path: Path, migrated: str) -> None:
    """Its devices are left alone, and what it holds is said; it records on as if nobody had looked."""
    device = Instrument(tmp_path / "instrument")
    recorder = Recorder(tmp_path, migrated, lines_of(device))
    device.start()
    recorder.start()
    try:
        recorder.wait_for("listening http")
        found = check(recorder.config)
        assert found["journal"][0] == found["devices"][0] == "note"
        assert f"held by pid {recorder.process.pid}" in found["journal"][1]  # type: ignore[union-attr]
        assert found["database"][0] == "ok"
        pid = recorder.process.pid  # type: ignore[union-attr]
        assert found["ingestd run"][0] == "note"
        assert found["ingestd run"][1].startswith(f"would end with exit code 1: pid {pid} since ")
        assert found["ingestd reload"] == ("ok", "would take this file")
        shown = ingestd("check", "-c", recorder.config).stdout
        assert shown.splitlines()[-1].startswith(f"`ingestd run` would end with exit code 1: pid {pid} since ")
        assert shown.endswith(", with this file; `ingestd reload` would take this file\n")
        # What `run` is said to do it does.
        assert f"is held by pid {pid}" in ingestd("run", "-c", recorder.config, exit_code=1).stderr
        good = recorder.config.read_text()
        (tmp_path / "broken.dbc").write_text("BO_ 1 nonsense")
        recorder.config.write_text(good + '[[can]]\nname = "can77"\ndbc = ["broken.dbc"]\n')
        found = check(recorder.config, exit_code=1)
        assert found["ingestd reload"] == ("problem", "would be refused: broken.dbc")
        assert "broken.dbc" in ingestd("reload", "-c", recorder.config, exit_code=2).stderr
        # Another file with the same journal: its daemon would not begin.
        other = tmp_path / "other.toml"
        other.write_text(good)
        found = check(other, exit_code=1)
        assert found["ingestd run"][0] == "problem"
        assert f", with {recorder.config}: give each daemon a journal" in found["ingestd run"][1]
        assert "ingestd reload" not in found
        # The same file, in which the socket was moved: it is found all the same.
        recorder.config.write_text(good + f'[control]\nsocket = "{tmp_path}/moved.sock"\n')
        assert check(recorder.config)["ingestd reload"] == ("ok", "would take this file")
        recorder.config.write_text(good)
        # A journal of its own, and the same control socket.
        settings = f'[database]\ndsn = "{migrated}"\n[control]\nsocket = "{recorder.journal}.sock"\n'
        path = write(tmp_path, '[[can]]\nname = "can77"\n', settings, journal='path = "another"\nmax_bytes = "64MiB"\n')
        found = check(path, "--seconds", "0.1", exit_code=1)
        assert found["control"][0] == "note"
        assert f"the daemon of {recorder.config} listens at " in found["control"][1]
        assert "link down" not in recorder.log()
    finally:
        recorder.close()
        device.close()


def test_what_is_wrong_in_the_call(tmp_path: Path) -> None:
    """Exit code 2, and every mistake of a configuration at once."""
    said = ingestd("check", exit_code=2).stderr
    assert "name a configuration with -c, or a capture with --capture" in said
    path = write(tmp_path, '[[serial]]\nname = "gps"\nprot = "nmea"\n[[can]]\nname = "can0"\nbitrate = 5\n')
    said = ingestd("check", "-c", path, exit_code=2).stderr
    assert 'serial[0].prot: there is no such key (did you mean "port"?)' in said
    assert "serial[0].protocol: is missing" in said
    assert "can[0].bitrate" in said


def test_a_daemon_that_cannot_be_asked() -> None:
    """That it has another file is not claimed."""
    found = preflight._run("pid 7", None, is_reload=False)
    assert (found.level, "whether with this file cannot be asked" in found.text) == ("note", True)
