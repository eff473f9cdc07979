"""The unit under real systemd: what an operator does to it and what happens to it. Nothing is lost; the books say so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.books import assert_books, in_metrics
from tests.can_bus.bus import Bus, numbered
from tests.conftest import psql
from tests.recorder import Instrument, lines_of, stored, wait_until
from tests.service.conftest import drop_in
from tests.service.unit import CONFIGURATION, STATE, Unit, systemctl

pytestmark = pytest.mark.slow


def send(bus: Bus, count: int, first: int = 0) -> None:
    with bus.sender() as sender:
        sender.send(numbered(count, first=first))


def is_flowing(unit: Unit, more: int = 20) -> None:
    """Until the database has more frames of the line than now."""
    begun = in_metrics(unit)["line"].committed if "line" in in_metrics(unit) else 0
    wait_until(
        lambda: (said := in_metrics(unit).get("line")) is not None and said.committed >= begun + more,
        "new frames of the line in the database", 60, unit.log,
    )  # fmt: skip


def test_it_becomes_ready_records_and_stops(unit: Unit, line: Instrument, bus: Bus) -> None:
    """Every frame of a bus and a line is stored; a device that is not there keeps nobody from being ready.

    The status line says how it goes. It stops within its time, and its last process is a success.
    """
    absent = '[[serial]]\nname = "absent"\nport = "/dev/ttyUSB7"\nprotocol = "nmea"\n[[can]]\nname = "can7"\n'
    unit.configure(unit.sources + absent)
    unit.start()
    assert unit.show("ActiveState") == "active"
    line.start()
    send(bus, 5000)
    is_flowing(unit)
    unit.has("StatusText", "2 of 4 sources up (absent:")
    unit.has("StatusText", "frames/s")
    unit.has("StatusText", "database up")
    before = unit.process
    sent = line.stop()
    stopped_at = time.monotonic()
    books = assert_books(unit, unit_dsn(), {"line": sent})
    assert time.monotonic() - stopped_at < 60
    assert books["bus"].received == books["bus"].committed == 5000
    assert unit.show("NRestarts") == "0", before


def unit_dsn() -> str:
    return Path("/etc/ingestd/dsn").read_text().strip()


def test_it_is_confined(unit: Unit, line: Instrument) -> None:
    """No capability, no new privileges, a file system that is read-only but for its state."""
    unit.start()
    status = dict(each.split(":\t", 1) for each in Path(f"/proc/{unit.process}/status").read_text().splitlines())
    assert {status[name] for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb", "CapInh")} == {"0" * 16}
    assert status["NoNewPrivs"] == "1"
    mounts = Path(f"/proc/{unit.process}/mounts").read_text().splitlines()
    options = {each.split()[1]: each.split()[3].split(",") for each in mounts}
    assert options["/"][0] == "ro"
    assert options[str(STATE)][0] == "rw"
    assert "/home" in options
    assert Path(f"/proc/{unit.process}/limits").read_text().split("core file size")[1].split()[:2] == ["0", "0"]
    owner = Path(f"/proc/{unit.process}").stat().st_uid
    assert owner != 0
    assert {path.stat().st_uid for path in (STATE, STATE / "journal", STATE / "journal.sock")} == {owner}
    assert (STATE / "journal.sock").stat().st_mode & 0o777 == 0o660
    assert STATE.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("blow", ["killed", "hung"])
def test_it_comes_back(unit: Unit, line: Instrument, blow: str) -> None:
    """Killed, or hung, which the watchdog notices: it continues the session, and nothing that it had received is lost.

    A process that is stopped stands for one that hangs: neither its event loop nor anything else of it goes on.
    """
    drop_in("watchdog", "[Service]\nWatchdogSec=4\n" if blow == "hung" else "")
    unit.start()
    line.start()
    is_flowing(unit)
    before = unit.process
    assert before is not None
    if blow == "hung":
        os.kill(before, signal.SIGSTOP)
        unit.wait_for("Watchdog timeout")
    else:
        systemctl("kill", "--signal=KILL", unit.name)
    unit.is_back(before)
    assert unit.show("NRestarts") == "1"
    is_flowing(unit)
    sent = line.stop()
    assert_books(unit, unit_dsn(), {"line": sent})
    assert psql(unit_dsn(), "SELECT count(*) FROM sessions") == "1"
    assert psql(unit_dsn(), "SELECT count(*) FROM events WHERE kind = 'gap' AND key = 'down'") == "1"
    if blow == "hung":
        assert "Fatal Python error: Aborted" in unit.log()
        drop_in("watchdog", "")


def test_reload(unit: Unit, line: Instrument) -> None:
    """`systemctl reload` waits for the new configuration; one that is refused is a failure, and changes nothing."""
    unit.start()
    line.start()
    is_flowing(unit)
    process = unit.process
    unit.configure(unit.sources + '[[can]]\nname = "can9"\n')
    systemctl("reload", unit.name)
    unit.has("StatusText", "2 of 3 sources up (can9:")
    unit.configure(unit.sources + '[[can]]\nname = "can9"\nbitrat = 1\n')
    assert "failed" in systemctl("reload", unit.name, exit_code=1)
    unit.has("StatusText", "configuration: refused")
    unit.configure(unit.sources)
    systemctl("reload", unit.name)
    unit.has("StatusText", "2 of 2 sources up;")
    assert (unit.process, unit.show("ActiveState")) == (process, "active")
    sent = line.stop()
    assert_books(unit, unit_dsn(), {"line": sent})


def test_a_configuration_that_is_wrong_is_not_tried_again(unit: Unit) -> None:
    """The service fails, once, and the log says what to write instead."""
    unit.configure(unit.sources.replace("protocol", "protocl"))
    systemctl("start", unit.name, exit_code=1)
    assert (unit.show("ActiveState"), unit.show("ExecMainStatus"), unit.show("NRestarts")) == ("failed", "2", "0")
    assert "protocl" in unit.log()
    assert "Traceback" not in unit.log()


def test_the_database_comes_later(unit: Unit, line: Instrument) -> None:
    """The service is up and records before the database is; what has waited is stored when it comes."""
    dsn = unit_dsn()
    name = dsn.partition("?")[0].rpartition("/")[2]
    maintenance = dsn.replace(f"/{name}?", "/postgres?")
    psql(maintenance, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    unit.start()
    line.start()
    unit.has("StatusText", "database away (")
    wait_until(lambda: in_metrics(unit)["line"].pending > 100, "backlog", 60, unit.log)
    unit.has("StatusText", "backlog")
    psql(maintenance, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    unit.has("StatusText", "database up")
    is_flowing(unit)
    sent = line.stop()
    books = assert_books(unit, dsn, {"line": sent})
    assert books["line"].received == sent  # Not one that was said before the database came is missing.


def test_a_disk_that_is_full(unit: Unit, line: Instrument, bus: Bus) -> None:
    """It neither dies nor is killed: losses are counted, the status line says why, and all is well when there is room.

    Started on a full disk it waits, however long, and is ready when there is room.
    """
    drop_in("watchdog", "[Service]\nWatchdogSec=4\nTimeoutStartSec=6\n")
    STATE.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96M", "tmpfs", STATE], check=True, timeout=60)
    try:
        unit.configure(unit.sources, '[journal]\nmax_bytes = "80MiB"\n')
        filler = STATE / "filler"
        fill(filler)
        systemctl("start", "--no-block", unit.name)
        unit.has("StatusText", "THE JOURNAL TAKES NOTHING (")
        wait_until(lambda: float(unit.show("ActiveEnterTimestampMonotonic")) == 0, "waiting", 20)
        time.sleep(8)  # Longer than it may take to start without a sign of life.
        assert (unit.show("ActiveState"), unit.show("NRestarts")) == ("activating", "0")
        filler.unlink()
        unit.has("ActiveState", "active")
        line.start()
        is_flowing(unit)
        fill(filler)
        unit.has("StatusText", "THE JOURNAL TAKES NOTHING (")
        numbers = 0
        while not in_metrics(unit).get("line") or not in_metrics(unit)["line"].dropped.get("journal"):
            send(bus, 2000, numbers)
            numbers += 2000
            time.sleep(0.1)
        time.sleep(6)  # Longer than the watchdog waits.
        filler.unlink()
        unit.has("StatusText", "2 of 2 sources up;")
        is_flowing(unit)
        assert (unit.show("ActiveState"), unit.show("NRestarts")) == ("active", "0")
        sent = line.stop()
        books = assert_books(unit, unit_dsn(), {"line": sent})
        assert books["line"].received == sent
        assert books["bus"].received == numbers
        assert set(books["line"].dropped) == {"journal"}
    finally:
        systemctl("stop", unit.name)
        subprocess.run(["umount", STATE], check=True, timeout=60)
        drop_in("watchdog", "")


def fill(file: Path) -> None:
    """Leave no room on a disk."""
    with file.open("wb", buffering=0) as filling:
        try:
            while True:
                filling.write(bytes(1 << 16))
        except OSError:
            pass


def test_several_instances(unit: Unit, line: Instrument, bus: Bus) -> None:
    """The template records into a journal of its own, beside the service."""
    other = Unit(unit_dsn(), line, bus, "ingestd@two.service")
    two = Path("/etc/ingestd/two.toml")
    two.write_text(CONFIGURATION.read_text().replace(lines_of(line), "").replace('"bus"', '"second"'))
    Path("/etc/ingestd/two.dsn").write_text(unit_dsn())
    unit.start()
    systemctl("start", other.name)
    send(bus, 300)
    counts = "SELECT source || ' ' || sum(frame_count) FROM frame_chunks GROUP BY source ORDER BY source"
    wait_until(lambda: psql(unit_dsn(), counts) == "bus 300\nsecond 300", "every frame of both", 60, other.log)
    assert Path("/var/lib/ingestd-two/journal").is_dir()
    other.stop()
    unit.stop()


def test_installing_again_and_taking_away(unit: Unit, program: Path, line: Instrument) -> None:
    """Installing is idempotent and leaves a running service alone; what was changed by hand is kept beside.

    Taking away stops it, and leaves what was recorded and configured.
    """
    unit.start()
    line.start()
    is_flowing(unit)
    process = unit.process

    def service(*arguments: str, exit_code: int = 0) -> str:
        done = subprocess.run([program, "service", *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == exit_code, (done.stdout, done.stderr)
        return done.stdout + done.stderr

    assert "all files are in place" in service("install")
    said = json.loads(service("status", "--json"))
    assert said["ok"], said
    assert said["service"]["MainPID"] == str(process)
    assert "sources up" in service("status")
    changed = Path("/etc/systemd/system/ingestd.service")
    changed.write_text(changed.read_text() + "# mine\n")
    assert "changed" in service("status", exit_code=1)
    assert "systemctl restart" in service("install")
    assert Path(f"{changed}.before").read_text().endswith("# mine\n")
    assert unit.process == process
    sent = line.stop()
    assert_books(unit, unit_dsn(), {"line": sent})
    frames = sum(stored(unit_dsn()).values())
    service("uninstall")
    assert unit.show("LoadState") == "not-found"
    assert not changed.exists()
    assert CONFIGURATION.exists()
    assert sum(unit.journalled().values()) == frames
    assert "started: 2 of 2 sources up" in service("install")
