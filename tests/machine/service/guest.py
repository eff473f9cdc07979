"""In the guest: the service as an operator installs it, looked at from all sides; after a power cut, all it recorded.

The first boot ends when the power goes; what it found wrong is kept for the second, which ends with the verdict.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

from guest_machine import (
    CONFIGURATION,
    DSN,
    HTTP,
    INGESTD,
    JOURNAL,
    PYTHON,
    Bus,
    Host,
    as_user,
    check,
    in_frames,
    in_lines,
    journalled,
    log,
    metric,
    metrics,
    run,
    say,
    settle,
    show,
    since,
    sql,
    state,
    stored,
    wait_until,
)

SHARE = Path("/mnt/share")
NETWORK = Path("/etc/systemd/network")
EXAMPLES = Path("/usr/local/share/doc/ingestd")
DROP_IN = Path("/etc/systemd/system/ingestd.service.d/look.conf")
PROBE = Path("/etc/systemd/system/ingestd@probe.service.d/probe.conf")
RECEIVE_BUFFER = 16777216
EXPOSURE_MAX = 2.0
CUT_S = 8
SECOND_BOOT = 1 << 32  # where the numbers of the second boot begin

SOURCES = """
[[can]]
name = "can0"
dbc = ["bus.dbc"]
[[serial]]
name = "imu"
port = "/dev/instruments/imu"
protocol = "lines"
"""
RULE = 'SUBSYSTEM=="tty", ATTRS{idVendor}=="0403", ATTRS{serial}=="FT9XYZ12", SYMLINK+="instruments/imu"\n'
SENDER = "[Match]\nName=can1\n[CAN]\nBitRate=500K\n[Link]\nRequiredForOnline=no\n"
# What the filter would refuse is logged instead.
FILTER_LOGS = """[Service]
SystemCallFilter=
SystemCallErrorNumber=
SystemCallLog=~@system-service setpriority
SystemCallLog=@privileged @resources
SystemCallLog=~setpriority
"""
# mbind: OpenBLAS asks for memory near the processor, and takes what it gets.
REFUSED_FOR_GOOD = {"237"}
MAY = {"a serial line", "a CAN socket", "stepping back"}


def install() -> None:
    """As docs/operations.md says."""
    said = run(INGESTD, "service", "install")
    check("installed, enabled, and not started before it is configured", "enabled, not started" in said, said)
    dsn = CONFIGURATION.with_suffix(".dsn")
    dsn.write_text(f"{DSN}\n")
    (CONFIGURATION.parent / "bus.dbc").write_text((SHARE / "bus.dbc").read_text())
    template = CONFIGURATION.read_text()
    CONFIGURATION.write_text(template.partition("[[can]]")[0] + SOURCES)
    for path in CONFIGURATION.parent.iterdir():
        path.chmod(0o640)
        run("chgrp", "ingestd", path)
    as_user("ingestd", INGESTD, "db", "init", "--dsn", DSN)
    Path("/etc/udev/rules.d/71-instruments.rules").write_text(RULE)
    run("udevadm", "control", "--reload")
    run("useradd", "--create-home", "--groups", "ingestd", "kim")
    run("useradd", "--create-home", "lee")


def bring_up_buses() -> None:
    """With systemd-networkd and the examples that `service install` has left."""
    NETWORK.mkdir(exist_ok=True)
    for name, text in (("80-can0", (EXAMPLES / "80-can0.network").read_text()), ("90-can1", SENDER)):
        (NETWORK / f"{name}.network").write_text(text)
    run("systemctl", "enable", "--quiet", "--now", "systemd-networkd")
    run("systemctl", "disable", "--quiet", "systemd-networkd-wait-online")
    look_at_bus()
    said = log("systemd-networkd")
    check("systemd-networkd knows every key of 80-can0.network", not re.search("(?i)unknown|ignor|fail", said), said)


def look_at_bus() -> None:
    """can0 is as 80-can0.network has it."""
    wait_until(lambda: all("UP" in run("ip", "link", "show", name) for name in ("can0", "can1")), "the buses are up")
    bus = json.loads(run("ip", "-details", "-json", "link", "show", "can0"))[0]["linkinfo"]["info_data"]
    found = (
        bus["bittiming"]["bitrate"],
        bus["bittiming"]["sample_point"],
        bus.get("restart_ms"),
        bus.get("ctrlmode", []),
    )
    wanted = 500_000, "0.875", 100, []
    check(f"can0: bit rate, sample point, restart-ms, modes: {found}", found == wanted, wanted)


def try_fd_example() -> None:
    """On a controller that is none for FD: Debian's kernel has no driver for the one that QEMU has."""
    before = len(log("systemd-networkd"))
    (NETWORK / "80-can1.network").write_text((EXAMPLES / "80-can1-fd.network").read_text())
    run("networkctl", "reload")
    run("networkctl", "reconfigure", "can1", exit_code=None)
    wait_until(lambda: "can1: Failed" in log("systemd-networkd")[before:], "a classic controller refuses FD")
    said = log("systemd-networkd")[before:]
    check("systemd-networkd knows every key of 80-can1-fd.network", not re.search("(?i)unknown|ignor", said), said)
    (NETWORK / "80-can1.network").unlink()
    run("systemctl", "restart", "systemd-networkd")
    look_at_bus()


def start() -> None:
    """By hand, for the first time."""
    run("systemctl", "start", "ingestd")
    said = run(INGESTD, "service", "status", "--json", exit_code=0)
    status = json.loads(said)
    states = {*status["files"].values()}
    check("service status: active, all files in place", (status["ok"], states) == (True, {"in place"}), said)
    look_at_receive_buffer()
    exposure = run("systemd-analyze", "--no-pager", "security", "ingestd.service").splitlines()[-1].strip("→ ")
    check(exposure, float(exposure.split(": ")[1].split()[0]) <= EXPOSURE_MAX, f"more than {EXPOSURE_MAX}")
    wait_until(lambda: "database up" in show("StatusText"), "the database is up")


def look_at_receive_buffer() -> None:
    """As large as a bus asks for."""
    rmem_max = int(Path("/proc/sys/net/core/rmem_max").read_text())
    check("net.core.rmem_max is 16777216", rmem_max == RECEIVE_BUFFER, rmem_max)
    check("no word about the receive buffer in the log", "receive buffer" not in log(), log())


def record_bus(bus: Bus) -> None:
    """Every frame once, decoded."""
    bus.send(1000)
    settle()
    counts = Counter(in_frames([payload for source, _, payload in stored().elements() if source == "can0"]))
    check("1000 frames of the emulated controller are stored, each once", counts == Counter(bus.numbers()), len(counts))
    [(decoded,)] = sql("SELECT count(DISTINCT value_num) FROM signals WHERE channel = 'Counter.Number'")
    check("and decoded", decoded == 1000, decoded)
    said = [line for line in metrics().splitlines() if line.startswith("ingestd_can_")]
    load = next(
        (line.split()[1] for line in said if line.startswith('ingestd_can_bus_load_ratio{source="can0"}')), None
    )
    check(f"the load of the bus is known, of its bit rate: {load}", load is not None and 0 <= float(load) < 1, said)
    active = 'ingestd_can_controller_state{source="can0",state="error-active"} 1.0'
    check("and the state of its controller", active in said, said)


def record_line(host: Host) -> None:
    """Plugged in after the start, pulled out and put back."""
    modules = Path("/proc/modules")
    process = show("MainPID")
    check("the driver is not loaded yet", "ftdi_sio" not in modules.read_text())
    mark = len(log())
    host.ask("plug")
    host.ask("talk")
    wait_until(lambda: "link up source=imu" in since(mark), "plugged in: link up, through char-188")
    check("by the operator's name", Path("/dev/instruments/imu").resolve() == Path("/dev/ttyUSB0"))
    is_flowing()
    host.ask("plug-other")
    other = Path("/sys/bus/usb-serial/devices/ttyUSB1/latency_timer")
    wait_until(
        lambda: other.exists() and other.read_text().strip() == "1", "latency_timer is 1 where nobody has opened"
    )
    is_ignored = "ID_MM_DEVICE_IGNORE=1" in run("udevadm", "info", "/dev/ttyUSB1")
    check("ModemManager is to leave it alone", is_ignored)
    mark = len(log())
    host.ask("hush")
    host.ask("unplug")
    wait_until(lambda: "link down source=imu" in since(mark), "pulled out: link down")
    wait_until(lambda: "imu:" in show("StatusText"), "the status line says so")
    mark = len(log())
    host.ask("plug")
    host.ask("talk")
    wait_until(lambda: "link up source=imu" in since(mark), "put back: link up")
    is_flowing()
    check("without a restart", (show("MainPID"), show("NRestarts")) == (process, "0"))


def is_flowing() -> None:
    """Lines of the instrument arrive in the database."""
    before = metric("frames_committed_total", "imu")
    wait_until(lambda: metric("frames_committed_total", "imu") > before + 10, "its lines arrive in the database")


def look_at_confinement() -> None:
    """The filter is in force; a program in the unit's place may do what it needs, and nothing of the rest."""
    status = Path(f"/proc/{show('MainPID')}/status").read_text()
    check("Seccomp: 2, no new privileges", "Seccomp:\t2" in status and "NoNewPrivs:\t1" in status, status)
    disk, keyboard = Path("/dev/vda").stat().st_rdev, Path("/dev/input/event0").stat().st_rdev
    for name, kind, device in (("disk", "b", disk), ("keyboard", "c", keyboard)):
        run("mknod", "--mode=666", f"/dev/probe-{name}", kind, str(os.major(device)), str(os.minor(device)))
    folder = Path("/opt/open")
    folder.mkdir()
    folder.chmod(0o777)
    program = folder / "probe.py"
    program.write_text((SHARE / "guest_probe.py").read_text())
    outside = json.loads(as_user("ingestd", PYTHON, program))
    (folder / "file").unlink()
    PROBE.parent.mkdir()
    PROBE.write_text(
        f"[Service]\nType=oneshot\nRestart=no\nWatchdogSec=0\nExecReload=\nExecStart=\nExecStart={PYTHON} {program}\n"
    )
    run("systemctl", "daemon-reload")
    run("systemctl", "start", "ingestd@probe")
    inside = json.loads(next(line for line in log("ingestd@probe").splitlines() if line.startswith("{")))
    for what, found in inside.items():
        check(f"{what}: inside {found}, outside {outside[what]}", (found == "may") == (what in MAY), inside)
        if what not in MAY:
            check("  which the unit refuses, and nothing else", outside[what] == "may", outside)


def live(host: Host, bus: Bus) -> None:
    """All that happens to a service, from its start to its end."""
    mark = len(log())
    run("systemctl", "start", "ingestd")
    wait_until(lambda: "link up source=imu" in since(mark), "started: link up")
    host.ask("talk")
    bus.send(200)
    CONFIGURATION.write_text(CONFIGURATION.read_text() + '[[can]]\nname = "can9"\ndbc = ["bus.dbc"]\n')
    run("systemctl", "reload", "ingestd")
    wait_until(lambda: "of 3 sources up" in show("StatusText"), "reloaded, with one more source")
    CONFIGURATION.write_text(CONFIGURATION.read_text().partition('[[can]]\nname = "can9"')[0])
    run("systemctl", "reload", "ingestd")
    with urllib.request.urlopen(f"{HTTP}/ready", timeout=60) as answer:
        check("GET /ready", answer.status == 200)
    for which in ((), ("-c", CONFIGURATION)):
        said = as_user("kim", INGESTD, "sessions", "mark", *which, "by kim")
        check(f"a member of the group marks the session{' by its file' if which else ''}", "marked in" in said, said)
    said = as_user("lee", INGESTD, "sessions", "mark", "--socket", f"{JOURNAL}.sock", "by lee", exit_code=None)
    check("somebody else may not", "may not be asked" in said, said)
    run("systemctl", "restart", "postgresql")
    bus.send(200)
    wait_until(lambda: "database up" in show("StatusText"), "the database was restarted, and is up again")
    is_flowing()
    host.ask("hush")
    settle()
    run("systemctl", "stop", "ingestd")
    check("stopped", (show("ActiveState"), show("Result")) == ("inactive", "success"))
    words = [row for row in since(mark).splitlines() if re.search("EPERM|not permitted|Traceback| error ", row)]
    check("no word of anything refused", not words, words)
    compare(bus)


def compare(bus: Bus) -> None:
    """Books, journal and SQL of a service that has ended."""
    in_sql, in_journal = stored(), journalled()
    books = re.findall(r"books source=(\S+) received=(\d+) committed=(\d+) pending=(\d+) .*balanced=(\w+)", log())
    said = {
        source: (int(received), int(committed), pending, even) for source, received, committed, pending, even in books
    }
    counts = Counter(source for source, _, _ in in_sql.elements())
    check(
        "the books balance, and say what is in SQL", said == {s: (n, n, "0", "True") for s, n in counts.items()}, books
    )
    check("journal and SQL have the same frames", in_sql == in_journal, len(in_sql - in_journal))
    check("each once", max(in_sql.values()) == 1)
    numbers = sorted(in_frames([payload for source, _, payload in in_sql if source == "can0"]))
    numbers = [number for number in numbers if number >= bus.first]
    check(f"all {bus.sent} frames of the bus", numbers == bus.numbers(), f"{len(numbers)}")
    say(f"     {len(in_sql)} frames in all")


def look_for_refused_calls(host: Host, bus: Bus) -> None:
    """The same life with a filter that logs: what would it have refused?"""
    DROP_IN.parent.mkdir()
    DROP_IN.write_text(FILTER_LOGS)
    run("systemctl", "daemon-reload")
    live(host, bus)
    DROP_IN.unlink()
    run("systemctl", "daemon-reload")
    rows = run("journalctl", "--boot", "--no-pager", "--output", "cat", "_TRANSPORT=audit").splitlines()
    numbers = {found[1] for row in rows if "SECCOMP" in row and (found := re.search(r"syscall=(\d+)", row))}
    check(f"calls that the filter refuses, by number: {sorted(numbers)}", numbers == REFUSED_FOR_GOOD, REFUSED_FOR_GOOD)


def measure(bus: Bus) -> None:
    """From exec to the first frame recorded, and to READY=1."""
    state.kept["measured_from"] = bus.sent
    first_s, ready_s, import_s = [], [], []
    for _ in range(3):
        with bus.flowing():
            run("systemctl", "start", "ingestd")
        settle()
        began_s = int(show("ExecMainStartTimestampMonotonic")) / 1e6
        ready_s.append(int(show("ActiveEnterTimestampMonotonic")) / 1e6 - began_s)
        [(first_ns,)] = sql(f"SELECT min(mono_start_ns) FROM frame_chunks WHERE mono_start_ns > {began_s * 1e9:.0f}")
        first_s.append(first_ns / 1e9 - began_s)
        run("systemctl", "stop", "ingestd")
        before_s = time.monotonic()
        subprocess.run([PYTHON, "-c", "import asyncpg, numpy"], check=True)
        import_s.append(time.monotonic() - before_s)
    first, ready, imports = (statistics.median(each) for each in (first_s, ready_s, import_s))
    say(f"     exec to first frame {first:.1f} s, to READY {ready:.1f} s; `import asyncpg, numpy` {imports:.1f} s:")
    say(f"     {first / imports:.1f} and {ready / imports:.1f} times as long")


def until_the_cut(host: Host, bus: Bus) -> None:
    """Record, and say what is synced, until the power goes."""
    run("systemctl", "start", "ingestd")
    wait_until(lambda: "2 of 2 sources up" in show("StatusText"), "both sources are up")
    host.ask("talk")
    is_flowing()
    state.kept |= {"boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(), "sent": bus.sent}
    state.save()
    os.sync()
    host.tell(f"cut {CUT_S}")
    ends_at = time.monotonic() + 120
    with bus.flowing():
        while time.monotonic() < ends_at:
            received = {source: metric("frames_received_total", source) for source in ("can0", "imu")}
            syncs = metric("journal_syncs_total")
            while metric("journal_syncs_total") < syncs + 2:  # What was received before one began is durable after it.
                time.sleep(0.05)
            for source, frames in received.items():
                host.tell(f"synced {source} {frames}")
    sys.exit("guest: the power did not go")


def after_the_cut(host: Host) -> None:
    """Everything is up by itself, and has lost and doubled nothing."""
    check("nothing has failed", "0 loaded" in run("systemctl", "--failed"), run("systemctl", "--failed"))
    wait_until(lambda: show("ActiveState") == "active", "after the power cut the service is up by itself")
    host.ask("plug")
    host.ask("talk")
    wait_until(
        lambda: "2 of 2 sources up" in show("StatusText"), "and both sources, once the instrument has power again"
    )
    check("by the operator's name, whatever its number", Path("/dev/instruments/imu").resolve() == Path("/dev/ttyUSB1"))
    look_at_bus()
    look_at_receive_buffer()
    # By can0 itself, whose driver gives what it has sent to all who listen. QEMU's SJA1000 forgets at a reset where in
    # its FIFO it reads, and not where it writes: from now on it receives what was there before.
    bus = Bus("can0", "tx_packets", SECOND_BOOT)
    bus.send(500)
    is_flowing()
    host.ask("hush")
    settle()
    said = json.loads(host.ask("told"))
    counts = dict(
        sql(
            "SELECT source, sum(frame_count)::int FROM frame_chunks c JOIN sessions s ON s.id = c.session_id"
            f" WHERE time_base LIKE '%{state.kept['boot']}%' GROUP BY 1"
        )
    )
    for source in ("can0", "imu"):
        held = counts.get(source, 0)
        check(f"{source}: {held} frames of before the cut, {said[source]} were said to be synced", held >= said[source])
    run("systemctl", "stop", "ingestd")
    compare(bus)
    payloads = [(source, payload) for source, _, payload in sorted(stored().elements(), key=lambda frame: frame[1])]
    numbers = sorted(in_frames([payload for source, payload in payloads if source == "can0"]))
    # While starts were measured, numbers were sent that nobody was there to record.
    spared, last = range(state.kept["measured_from"], state.kept["sent"]), max(n for n in numbers if n < SECOND_BOOT)
    missing = len(set(range(last + 1)) - set(numbers) - set(spared))
    is_whole = last >= state.kept["sent"] and not missing and len(set(numbers)) == len(numbers)
    check(f"bus: all that was sent to the service until the cut, the last {last}, each once", is_whole, missing)
    lines = Counter(in_lines([payload for source, payload in payloads if source == "imu"]))
    check(f"line: {len(lines)} lines, none twice", max(lines.values()) == 1, lines.most_common(3))
    gaps = sum(after - number > 1 for number, after in zip(sorted(lines), sorted(lines)[1:], strict=False))
    check(f"line: interrupted {gaps} times, at most as often as nobody listened", gaps <= 3, gaps)
    run(INGESTD, "journal", "verify", JOURNAL)
    run(INGESTD, "service", "uninstall")
    check("service uninstall", show("LoadState") == "not-found")


def main() -> None:
    """Until the power goes; in the second boot, to the end."""
    host = Host()
    if "boot" in state.kept:
        after_the_cut(host)
        wrong = state.kept["wrong"]
        say("\n".join(["wrong:", *wrong]) if wrong else "the service is as it should be")
        sys.exit(bool(wrong))
    install()
    bring_up_buses()
    try_fd_example()
    start()
    bus = Bus("can1", "rx_packets", 0)
    record_bus(bus)
    record_line(host)
    look_at_confinement()
    host.ask("hush")
    settle()
    run("systemctl", "stop", "ingestd")
    live(host, bus)
    look_for_refused_calls(host, bus)
    measure(bus)
    until_the_cut(host, bus)


if __name__ == "__main__":
    main()
