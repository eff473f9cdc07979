"""In the guest: the service as an operator installs it, on CAN hardware and a USB serial line, and after a power cut.

Each thing that is as it should be is a line; the first that is not ends it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

SECONDS_MAX = 300.0
CONFIGURATION = """
[session]
car_id = "machine"
[[can]]
name = "can0"
dbc = ["bus.dbc"]
[[serial]]
name = "imu"
port = "/dev/instruments/imu"
protocol = "keyvalue"
"""
RULE = 'SUBSYSTEM=="tty", ATTRS{idVendor}=="0403", SYMLINK+="instruments/imu"\n'
DSN = "postgresql:///telemetry?host=/var/run/postgresql"
ETC, STATE, SHARE = Path("/etc/ingestd"), Path("/var/lib/ingestd"), Path("/mnt/share")
FRAMES, RATE = 300, 50  # An emulated controller overruns at a few hundred a second; what it loses is counted.
HOST = Path("/dev/ttyS1")


def say(text: str) -> None:
    """To whoever watches."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def call(*command: str, as_user: str = "", ok: bool = True) -> str:
    """What a program says; it has to succeed."""
    if as_user:
        command = ("runuser", "-u", as_user, "--", *command)
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_MAX)
    if ok and done.returncode:
        fail(f"{' '.join(command)} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return (done.stdout + done.stderr).strip()


def fail(text: str) -> None:
    say(f"NOT SO: {text}")
    say(call("journalctl", "-b", "-u", "ingestd", "-o", "cat", "--no-pager", "-n", "60", ok=False))
    sys.exit(1)


def so(is_so: bool, text: str, otherwise: str = "") -> None:
    """A line for what is as it should be."""
    if not is_so:
        fail(f"{text}: {otherwise}" if otherwise else text)
    say(f"ok: {text}")


def until(condition: Callable[[], bool], text: str) -> None:
    """The same for what comes to be."""
    deadline = time.monotonic() + SECONDS_MAX
    while not condition():
        if time.monotonic() > deadline:
            fail(f"{text}, within {SECONDS_MAX:g} s")
        time.sleep(0.2)
    say(f"ok: {text}")


def show(what: str) -> str:
    return call("systemctl", "show", "ingestd", "--property", what, "--value")


def log() -> str:
    return call("journalctl", "-b", "-u", "ingestd", "-o", "cat", "--no-pager")


def metric(name: str, labels: str = "") -> float:
    """The sum of what /metrics says under a name."""
    with contextlib.suppress(OSError), urllib.request.urlopen("http://127.0.0.1:9464/metrics", timeout=60) as answer:
        found = re.findall(rf"^ingestd_{name}(?:{{.*{labels}.*}})? (\S+)$", answer.read().decode(), re.MULTILINE)
        return sum(map(float, found))
    return -1.0


def committed(source: str) -> float:
    return metric("frames_committed_total", f'source="{source}"')


def lost() -> int:
    """What the controller or the kernel had no room for, as the books say."""
    return int(metric("frames_dropped_total", 'source="can0",reason="overflow"'))


def sql(query: str) -> str:
    return call("psql", "-XAtd", "telemetry", "-c", query, as_user="postgres")


def tell_host(word: str) -> None:
    with HOST.open("wb", buffering=0) as line:
        line.write(f"{word}\n".encode())


class Sender(threading.Thread):
    """Numbered frames from the other end of the bus."""

    def __init__(self, count: int, first: int = 0) -> None:
        super().__init__(daemon=True)
        self.count, self.first = count, first

    def run(self) -> None:
        with socket.socket(socket.AF_CAN, socket.SOCK_RAW, socket.CAN_RAW) as bus:
            bus.bind(("can1",))
            for number in range(self.first, self.first + self.count):
                bus.send(struct.pack("=IB3xQ", 0x123, 8, number))
                time.sleep(1 / RATE)


def install() -> None:
    say(call("ingestd", "service", "install"))
    call("createuser", "ingestd", as_user="postgres")
    call("createdb", "--owner", "ingestd", "telemetry", as_user="postgres")
    call("ingestd", "db", "init", "--dsn", DSN, as_user="ingestd")
    (ETC / "ingestd.toml").write_text(CONFIGURATION)
    (ETC / "bus.dbc").write_text((SHARE / "bus.dbc").read_text())
    (ETC / "ingestd.dsn").write_text(f"{DSN}\n")
    (ETC / "ingestd.dsn").chmod(0o600)
    Path("/etc/udev/rules.d/71-instruments.rules").write_text(RULE)
    call("udevadm", "control", "--reload")
    said = call("ingestd", "service", "install")
    so("started: " in said, "the service starts once it is configured", said)


def check_buses() -> None:
    """The examples for systemd-networkd bring a bus up."""
    for name in ("80-can0.network", "80-can1-fd.network"):
        text = Path("/usr/local/share/doc/ingestd", name).read_text().replace("Name=can1", "Name=can7")
        Path("/etc/systemd/network", name).write_text(text)  # can1 is the other end of the bus, and ours.
    call("systemctl", "enable", "--quiet", "--now", "systemd-networkd")
    until(lambda: " UP " in call("ip", "link", "show", "can0").replace(",", " "), "systemd-networkd brings can0 up")
    said = call("journalctl", "-b", "-u", "systemd-networkd", "-o", "cat", "--no-pager")
    so(not re.search(r"(?i)unknown|ignoring|fail", said), "systemd-networkd takes every line of both examples", said)
    [link] = json.loads(call("ip", "-details", "-json", "link", "show", "can0"))
    data = link["linkinfo"]["info_data"]
    found = (data["bittiming"]["bitrate"], float(data["bittiming"]["sample_point"]), data.get("restart_ms"))
    so(found == (500_000, 0.875, 100), f"can0 has bit rate, sample point and restart-ms as written: {found}")
    call("ip", "link", "set", "can1", "up", "type", "can", "bitrate", "500000")
    until(lambda: "link up source=can0" in log(), "the service has found can0")


def check_confined() -> None:
    status = Path(f"/proc/{show('MainPID')}/status").read_text()
    found = dict(line.split(":\t", 1) for line in status.splitlines())
    so(found["Seccomp"] == "2", "seccomp is in force")
    so(
        found["CapEff"] == found["CapBnd"] == "0" * 16 and found["NoNewPrivs"] == "1",
        "no capability, no new privileges",
    )
    so(Path("/proc/sys/net/core/rmem_max").read_text().strip() == "16777216", "net.core.rmem_max is 16 MiB")
    so("receive buffer" not in log(), "the receive buffer is as large as asked for")
    unit = Path("/etc/systemd/system/ingestd.service").read_text()
    policy = [f"--property={line}" for line in unit.splitlines() if line.startswith(("DevicePolicy=", "DeviceAllow="))]
    said = call(
        "systemd-run", "--quiet", "--wait", "--pipe", *policy, "dd", "if=/dev/vda", "of=/dev/null", "count=1", ok=False
    )
    so("not permitted" in said, "under its device policy even root cannot open a disk", said)
    call("systemd-run", "--quiet", "--wait", "--pipe", *policy, "stty", "-F", "/dev/ttyS2")
    so(True, "and can open a serial line")
    say(call("systemd-analyze", "security", "ingestd.service", "--no-pager").splitlines()[-1].strip("→ "))


def check_plug() -> None:
    """A USB serial line whose driver comes after the service; pulled out and put back."""
    process = show("MainPID")
    so("usbserial" not in call("lsmod"), "no driver for USB serial lines is loaded")
    tell_host("plug")
    until(lambda: committed("imu") > 20, "a line that is plugged in is recorded, under the operator's own name for it")
    port = Path("/dev/instruments/imu").resolve().name
    timer = Path(f"/sys/class/tty/{port}/device/latency_timer").read_text().strip()
    so(timer == "1", f"the bridge ({port}) holds nothing back: latency timer {timer} ms")
    downs = log().count("link down source=imu")
    tell_host("pull")
    until(lambda: log().count("link down source=imu") > downs, "pulled out: link down is told")
    before = committed("imu")
    tell_host("plug")
    until(lambda: committed("imu") > before + 20, "put back: recorded again")
    so((show("MainPID"), show("NRestarts")) == (process, "0"), "by the same process")


def check_life() -> None:
    """Decoding, reload, commands, a database that restarts: all under the filters of the unit."""
    Sender(FRAMES).start()
    count = "SELECT count(*) FROM signals WHERE channel = 'Counter.Number'"
    until(
        lambda: int(sql(count)) + lost() >= FRAMES,
        f"{FRAMES} frames from the other end of the bus are decoded and stored",
    )
    call("systemctl", "reload", "ingestd")
    so(show("ActiveState") == "active", "systemctl reload")
    call("useradd", "--groups", "ingestd", "kim")
    call("ingestd", "sessions", "mark", "hello", as_user="kim")
    until(lambda: sql("SELECT count(*) FROM events WHERE kind = 'marker'") == "1", "a member of the group marks")
    said = call("ingestd", "sessions", "mark", "hello", as_user="nobody", ok=False)
    so("ermission" in said, "somebody else may not", said)
    call("systemctl", "restart", "postgresql")
    before = committed("imu")
    until(lambda: committed("imu") > before + 20, "PostgreSQL restarted: recorded and stored on")
    said = call("ingestd", "service", "status")
    so("missing" not in said and "changed" not in said, "ingestd service status: all in place")
    say(show("StatusText"))


def measure_start() -> None:
    """How long from the start of the process to its first frame, beside what Python itself takes."""
    call("systemctl", "stop", "ingestd")
    so(show("Result") == "success", "systemctl stop")
    began = time.monotonic()
    call("/opt/ingestd/bin/python", "-c", "import asyncpg, numpy")
    python_s = time.monotonic() - began
    call("systemctl", "start", "ingestd")
    began_ns = int(show("ExecMainStartTimestampMonotonic")) * 1000
    ready_s = int(show("ActiveEnterTimestampMonotonic")) / 1e6 - began_ns / 1e9
    query = f"SELECT min(mono_start_ns) FROM frame_chunks WHERE mono_start_ns > {began_ns}"
    until(lambda: sql(query) != "", "it records again")
    first_s = (int(sql(query)) - began_ns) / 1e9
    say(f"first frame after {first_s:.2f} s, ready after {ready_s:.2f} s, on an emulated processor")
    say(f"python with numpy and asyncpg takes {python_s:.2f} s there")


def be_cut() -> None:
    """Record until the power goes, and tell what is durable: what was received before a sync, once that has ended."""
    Sender(1_000_000, first=FRAMES).start()
    until(lambda: committed("can0") > FRAMES + 100, "both flow; now the power goes")
    before = committed("can0")
    deadline = time.monotonic() + SECONDS_MAX
    while time.monotonic() < deadline:
        received, syncs = metric("frames_received_total", 'source="can0"'), metric("journal_syncs_total")
        while metric("journal_syncs_total") < syncs + 2:
            time.sleep(0.05)
        tell_host(f"synced {int(received)}")
        if received > before + 500:
            tell_host("cut")
    fail("the power did not go")


def check_after_the_cut() -> None:
    """The service is up by itself, and everything that was durable is stored, once."""
    synced = int((SHARE / "synced").read_text())
    until(lambda: show("ActiveState") == "active", "after the cut the service is up by itself")
    until(lambda: " UP " in call("ip", "link", "show", "can0").replace(",", " "), "and the bus")
    so(Path("/proc/sys/net/core/rmem_max").read_text().strip() == "16777216", "net.core.rmem_max is 16 MiB")
    so("receive buffer" not in log(), "the receive buffer is as large as asked for")
    until(lambda: committed("can0") >= synced and metric("frames_pending") >= 0, "all that was durable is sent")
    overrun = lost()
    call("systemctl", "stop", "ingestd")
    so(show("Result") == "success", "systemctl stop")
    books = re.findall(r"books source=.*", log())
    say("\n".join(books))
    so(len(books) == 2 and all("balanced=True" in line and "pending=0" in line for line in books), "the books balance")
    rows = sql(
        "SELECT encode(data, 'hex') FROM frame_chunks WHERE source = 'can0' ORDER BY mono_start_ns + utc_offset_ns"
    )
    rows = rows.split()
    numbers = [number for row in rows for (number,) in struct.iter_unpack("<Q", bytes.fromhex(row)) if number < 1 << 32]
    so(numbers == sorted(set(numbers)), f"{len(numbers)} frames are stored, each once and in order")
    missing = numbers[-1] + 1 - len(numbers)
    so(not missing or overrun > 0, f"{missing} are missing, and {overrun} overruns were counted", str(numbers))
    so(len(numbers) + missing >= synced > FRAMES, f"{synced} were said to be durable before the cut")
    lines = sql("SELECT payload_json ->> 'text' FROM frames WHERE payload_json ->> 'source' = 'imu'").split()
    said = [line for line in lines if re.fullmatch(r"n=\d+", line)]
    so(len(said) == len(set(said)) > 50, f"{len(said)} lines are stored, each once")
    call("ingestd", "journal", "verify", str(STATE / "journal"))
    so(True, "the journal is whole")
    call("ingestd", "service", "uninstall")
    so(not Path("/etc/systemd/system/ingestd.service").exists(), "ingestd service uninstall")


def main() -> None:
    subprocess.run(["stty", "-F", str(HOST), "raw", "-echo"], check=True)
    if (SHARE / "synced").exists():
        check_after_the_cut()
        say("all is as it should be")
        return
    install()
    check_buses()
    check_confined()
    check_plug()
    check_life()
    measure_start()
    os.sync()
    be_cut()


if __name__ == "__main__":
    main()
