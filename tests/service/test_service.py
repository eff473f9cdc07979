"""The unit under real systemd: what operators do to it and what happens to it. Nothing is lost, as the books say."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.books import assert_books, in_metrics
from tests.can_bus.bus import Bus, numbered
from tests.conftest import psql
from tests.recorder import Instrument, lines_of, stored
from tests.service.conftest import drop_in
from tests.service.unit import CONFIGURATION, DSN, STATE, Unit, systemctl, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def send(bus: Bus, count: int, first: int = 0) -> None:
    with bus.sender() as sender:
        sender.send(numbered(count, first=first))


def committed(unit: Unit) -> int:
    """Frames of the line that the database has."""
    said = in_metrics(unit).get("line")
    return 0 if said is None else said.committed


def is_flowing(unit: Unit) -> None:
    """Until the database has more frames of the line than now."""
    before = committed(unit)
    until(lambda: committed(unit) > before, "new frames of the line in the database", unit.log)


def test_it_becomes_ready_records_reloads_and_stops(unit: Unit, line: Instrument, bus: Bus) -> None:
    """Every frame of a bus and a line is stored; a device that is not there keeps nobody from being ready.

    The status line says how it goes. `systemctl reload` waits for the new configuration; one that is refused is a
    failure, and changes nothing. It stops within its time; a configuration that is wrong is not tried again.
    """
    absent = '[[serial]]\nname = "absent"\nport = "/dev/ttyUSB7"\nprotocol = "nmea"\n[[can]]\nname = "can7"\n'
    unit.configure(unit.sources + absent)
    unit.start()
    assert_confined(unit)
    process = unit.process
    line.start()
    send(bus, 5000)
    is_flowing(unit)
    unit.has("StatusText", "2 of 4 sources up (absent:")
    assert all(words in unit.show("StatusText") for words in ("frames/s", "database up", "and 1 more)"))

    unit.configure(unit.sources + '[[can]]\nname = "can9"\n')
    systemctl("reload", unit.name)
    unit.has("StatusText", "2 of 3 sources up (can9:")
    unit.configure(unit.sources + '[[can]]\nname = "can9"\nbitrat = 1\n')
    assert "failed" in systemctl("reload", unit.name, exit_code=1)
    unit.has("StatusText", "configuration: refused")
    unit.configure(unit.sources)
    systemctl("reload", unit.name)
    unit.has("StatusText", "2 of 2 sources up;")
    assert (unit.process, unit.show("ActiveState"), unit.show("NRestarts")) == (process, "active", "0")

    sent = line.stop()
    books = assert_books(unit, dsn_of(), {"line": sent})
    assert books["bus"].received == books["bus"].committed == 5000

    unit.configure(unit.sources.replace("protocol", "protocl"))
    systemctl("start", unit.name, exit_code=1)
    assert (unit.show("ActiveState"), unit.show("ExecMainStatus"), unit.show("NRestarts")) == ("failed", "2", "0")
    assert "protocl" in unit.log()
    assert "Traceback" not in unit.log()


def dsn_of() -> str:
    return DSN.read_text().strip()


def assert_confined(unit: Unit) -> None:
    """No capability, no new privileges, a file system that is read-only but for its state, no core with a password."""
    process = Path(f"/proc/{unit.process}")
    status = dict(each.split(":\t", 1) for each in (process / "status").read_text().splitlines())
    assert {status[name] for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb", "CapInh")} == {"0" * 16}
    assert status["NoNewPrivs"] == "1"
    options = {each.split()[1]: each.split()[3].split(",") for each in (process / "mounts").read_text().splitlines()}
    assert (options["/"][0], options[str(STATE)][0]) == ("ro", "rw")
    assert {"/home", "/root", "/tmp"} <= options.keys()
    assert (process / "limits").read_text().split("core file size")[1].split()[:2] == ["0", "0"]
    owner = process.stat().st_uid
    assert owner != 0
    assert {path.stat().st_uid for path in (STATE, STATE / "journal", STATE / "journal.sock")} == {owner}
    assert (STATE / "journal.sock").stat().st_mode & 0o777 == 0o660
    assert STATE.stat().st_mode & 0o777 == 0o750


def test_it_comes_back_with_everything(unit: Unit, line: Instrument) -> None:
    """It records before the database is there. Killed, and hung, which the watchdog notices, it continues the session.

    Not a frame that it had received is lost. A process that is stopped stands for one that hangs: neither its event
    loop nor anything else of it goes on; the log says where it was.
    """
    drop_in("watchdog", "[Service]\nWatchdogSec=4\n")
    with no_connections(dsn_of()):
        unit.start()
        line.start()
        unit.has("StatusText", "database away (")
        until(lambda: in_metrics(unit)["line"].pending > 100, "backlog", unit.log)
        assert committed(unit) == 0
    unit.has("StatusText", "database up")
    is_flowing(unit)

    process = unit.process
    systemctl("kill", "--signal=KILL", unit.name)
    unit.is_back(process)
    is_flowing(unit)

    process = unit.process
    assert process is not None
    os.kill(process, signal.SIGSTOP)
    unit.says("Watchdog timeout")
    unit.is_back(process)
    is_flowing(unit)
    assert "Fatal Python error: Aborted" in unit.log()

    assert unit.show("NRestarts") == "2"
    sent = line.stop()
    assert_books(unit, dsn_of(), {"line": sent})
    assert psql(dsn_of(), "SELECT count(*) FROM sessions") == "1"
    assert psql(dsn_of(), "SELECT count(*) FROM events WHERE kind = 'gap' AND key = 'down'") == "2"


@contextlib.contextmanager
def no_connections(dsn: str) -> Iterator[None]:
    """The database takes none while inside."""
    name = dsn.partition("?")[0].rpartition("/")[2]
    maintenance = dsn.replace(f"/{name}?", "/postgres?")
    psql(maintenance, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    yield
    psql(maintenance, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


def test_a_disk_that_is_full(unit: Unit, line: Instrument, bus: Bus) -> None:
    """Started on a full disk it waits, however long, and is ready when there is room.

    When the disk is full again it neither dies nor is killed: what is lost is counted, and the status line says why.
    """
    drop_in("watchdog", "[Service]\nWatchdogSec=4\nTimeoutStartSec=6\n")
    STATE.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40M", "tmpfs", STATE], check=True, timeout=60)
    filler = STATE / "filler"
    try:
        unit.configure(unit.sources, '[journal]\nmax_bytes = "64MiB"\n')
        fill(filler)
        systemctl("start", "--no-block", unit.name)
        unit.has("StatusText", "THE JOURNAL TAKES NOTHING (")
        time.sleep(8)  # Longer than it may take to start without a sign of life.
        assert (unit.show("ActiveState"), unit.show("NRestarts")) == ("activating", "0")
        os.truncate(filler, filler.stat().st_size - (18 << 20))  # Room for one segment.
        unit.has("ActiveState", "active")
        line.start()
        is_flowing(unit)

        sent_on_bus = 0
        while not in_metrics(unit)["line"].dropped.get("journal"):
            for _ in range(10):
                send_long(bus, 1000)
                time.sleep(0.05)
            sent_on_bus += 10_000
        unit.has("StatusText", "THE JOURNAL TAKES NOTHING (")
        time.sleep(6)  # Longer than the watchdog waits.
        filler.unlink()
        unit.has("StatusText", "2 of 2 sources up;")
        is_flowing(unit)
        assert (unit.show("ActiveState"), unit.show("NRestarts")) == ("active", "0")
        sent = line.stop()
        books = assert_books(unit, dsn_of(), {"line": sent})
        assert (books["line"].received, set(books["line"].dropped)) == (sent, {"journal"})
        assert books["bus"].received == sent_on_bus
    finally:
        systemctl("stop", unit.name)
        subprocess.run(["umount", STATE], check=True, timeout=60)


def send_long(bus: Bus, count: int) -> None:
    frames = numbered(count)
    frames["length"] = 64
    with bus.sender() as sender:
        sender.send(frames, frame_bytes=72)


def fill(file: Path) -> None:
    """Leave no room on a disk."""
    with file.open("wb", buffering=0) as filling, contextlib.suppress(OSError):
        while True:
            filling.write(bytes(1 << 16))


def test_instances_and_installing(unit: Unit, program: Path, line: Instrument, bus: Bus) -> None:
    """The template records into a journal of its own, beside the service.

    Installing is idempotent and leaves a running service alone; what was changed by hand is kept beside. Taking away
    stops all of them, and leaves what was recorded and configured.
    """
    other = Unit(dsn_of(), line, bus, "ingestd@two.service")
    two = Path("/etc/ingestd/two.toml")
    two.write_text(CONFIGURATION.read_text().replace(lines_of(line), "").replace('"bus"', '"second"'))
    Path("/etc/ingestd/two.dsn").write_text(dsn_of())
    unit.start()
    systemctl("enable", "--now", "--quiet", other.name)
    line.start()
    send(bus, 300)
    counts = "SELECT source, sum(frame_count) FROM frame_chunks WHERE source <> 'line' GROUP BY 1 ORDER BY 1"
    until(lambda: psql(dsn_of(), counts) == "bus|300\nsecond|300", "every frame of both", other.log)
    assert Path("/var/lib/ingestd-two/journal").is_dir()
    process = unit.process

    def service(*arguments: str, exit_code: int = 0) -> str:
        done = subprocess.run([program, "service", *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == exit_code, (done.stdout, done.stderr)
        return done.stdout + done.stderr

    changed = Path("/etc/systemd/system/ingestd.service")
    changed.write_text(changed.read_text() + "# mine\n")
    said = json.loads(service("status", "--json", exit_code=1))
    assert (said["service"]["MainPID"], said["instances"]) == (str(process), {other.name: "active running"})
    assert [path for path, state in said["files"].items() if state != "in place"] == [str(changed)]
    again = service("install")
    assert (again.count("wrote"), "systemctl restart" in again) == (1, True)
    assert Path(f"{changed}.before").read_text().endswith("# mine\n")
    assert unit.process == process

    line.stop()
    until(lambda: sum(said.pending for said in in_metrics(unit).values()) == 0, "end of what is pending", unit.log)
    service("uninstall")
    assert (unit.show("LoadState"), other.show("ActiveState"), unit.process) == ("not-found", "inactive", None)
    assert not changed.exists()
    assert CONFIGURATION.exists()
    changed.symlink_to("/dev/null")
    assert "systemctl unmask ingestd.service" in service("install", exit_code=1)
    changed.unlink()
    home = Path.home() / "ingestd"
    home.touch()
    assert f"could not run {home}" in service("install", "--program", str(home), exit_code=2)
    assert {frame for frame in stored(dsn_of()) if frame[0] != "second"} == set(unit.journalled())
    assert "started: 2 of 2 sources up" in service("install")
