"""In the guest: record numbered frames, say over a serial line what is synced, and in the end look for all of it.

Each boot has a source of its own name, so what the daemon says of that source is of this boot. PostgreSQL runs in every
other boot: what is recorded in those without it has been through more than one cut when it is sent. In the last boot
but one the machine is suspended for a while first; its shared folders need not survive that, and are not used after it.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import asyncpg

INGESTD = "/opt/ingestd/bin/ingestd"
DSN = "postgresql:///ingestd?host=/var/run/postgresql"
STATE, SHARE = Path("/var/lib/machine"), Path("/mnt/share")
JOURNAL, SLEPT = STATE / "journal", STATE / "slept"
SERIAL = Path("/dev/ttyS1")
HTTP = "127.0.0.1:9109"
RATE, TICK_S = 1000, 0.02
RECORD_S, SLEEP_S = 5, 6
SECONDS_MAX = 240.0
CONFIG = """
[database]
dsn = "{dsn}"
[journal]
path = "{journal}"
sync_interval = "100ms"
[http]
listen = "{http}"
[[can]]
name = "boot{boot}"
channel = "vcan0"
"""


def say(text: str) -> None:
    """To whoever watches."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + SECONDS_MAX
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"guest: no {what} within {SECONDS_MAX:g} s")
        time.sleep(0.1)


def next_boot() -> int:
    """Counts the boots, durably."""
    STATE.mkdir(exist_ok=True)
    path = STATE / "boot"
    boot = int(path.read_text()) + 1 if path.exists() else 0
    path.write_text(str(boot))
    os.sync()
    return boot


class Sender(threading.Thread):
    """Numbered frames, at a steady rate."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.sent = 0
        self.over = False

    def run(self) -> None:
        """Send until it is over."""
        with socket.socket(socket.AF_CAN, socket.SOCK_RAW, socket.CAN_RAW) as bus:
            bus.bind(("vcan0",))
            began_s = time.monotonic()
            while not self.over:
                time.sleep(TICK_S)
                for _ in range(self.sent, int((time.monotonic() - began_s) * RATE)):
                    bus.send(struct.pack("=IB3xQ", 0x123, 8, self.sent))
                    self.sent += 1


class Daemon:
    """`ingestd run` of this boot, and what it says of itself."""

    def __init__(self, boot: int) -> None:
        self.source = f"boot{boot}"
        config, self._log = STATE / "ingestd.toml", STATE / f"log{boot}"
        config.write_text(CONFIG.format(dsn=DSN, journal=JOURNAL, http=HTTP, boot=boot))
        with self._log.open("w") as log:
            self._process = subprocess.Popen([INGESTD, "run", "-c", config], stderr=log)
        wait_until(lambda: "link up" in self._log.read_text(), "link")
        wait_until(lambda: "listening" in self._log.read_text(), "metrics")

    def metric(self, name: str, labels: str = "") -> float:
        """The sum of what it says under a name."""
        with urllib.request.urlopen(f"http://{HTTP}/metrics", timeout=60) as answer:
            found = re.findall(rf"^ingestd_{name}(?:{{.*{labels}.*}})? (\S+)$", answer.read().decode(), re.MULTILINE)
        return sum(map(float, found))

    def received(self) -> int:
        """Frames of this boot that are in the journal."""
        source = f'source="{self.source}"'
        assert not self.metric("frames_dropped_total", source)
        return int(self.metric("frames_received_total", source))

    def say_what_is_synced(self, boot: int, line: BinaryIO, seconds: float) -> None:
        """What was received before a sync began is durable when it has ended: two syncs later at the latest."""
        ends_at = time.monotonic() + seconds
        while time.monotonic() < ends_at:
            received, syncs = self.received(), self.metric("journal_syncs_total")
            wait_until(lambda syncs=syncs: self.metric("journal_syncs_total") >= syncs + 2, "sync")  # type: ignore[misc]
            line.write(f"synced {boot} {received}\n".encode())

    def stop(self) -> str:
        """End it when all is sent; its log."""
        wait_until(lambda: self.metric("frames_pending") == 0, "end of sending")
        self._process.send_signal(signal.SIGTERM)
        if self._process.wait(SECONDS_MAX):
            sys.exit("guest: the daemon failed")
        return self._log.read_text()


def suspend(boot: int) -> None:
    """Sleep as a machine does, and note how long CLOCK_MONOTONIC stood still."""
    before_s = time.time() - time.monotonic()
    subprocess.run(["rtcwake", "-m", "mem", "-s", str(SLEEP_S)], check=True, stdout=subprocess.DEVNULL)
    SLEPT.write_text(json.dumps({"boot": boot, "seconds": time.time() - time.monotonic() - before_s}))
    os.sync()


async def wrong_in_database(synced: dict[int, int]) -> list[str]:
    """What is wrong with what the database holds, in words."""
    slept = json.loads(SLEPT.read_text())
    connection = await asyncpg.connect(DSN)
    wrong = []
    for boot, least in synced.items():
        rows = await connection.fetch(
            "SELECT data, ts_mono_ns, utc_offset_ns FROM frame_chunks WHERE source = $1 ORDER BY mono_start_ns",
            f"boot{boot}",
        )
        numbers = [number for row in rows for (number,) in struct.iter_unpack("<Q", row["data"])]
        stamps = [stamp for row in rows for stamp in row["ts_mono_ns"]]
        say(f"boot {boot}: {len(numbers)} frames stored, {least} were said to be synced")
        if numbers != list(range(len(numbers))):
            wrong.append(f"boot {boot}: frames are missing, doubled or out of order")
        if len(numbers) < least or not least:
            wrong.append(f"boot {boot}: synced frames are lost")
        if stamps != sorted(stamps):
            wrong.append(f"boot {boot}: stamps go back")
        if boot == slept["boot"]:
            moved_s = (rows[-1]["utc_offset_ns"] - rows[0]["utc_offset_ns"]) / 1e9
            say(f"boot {boot}: asleep for {slept['seconds']:.3f} s, the offset to UTC moved by {moved_s:.3f} s")
            if abs(moved_s - slept["seconds"]) > 0.1 or slept["seconds"] < SLEEP_S / 2:
                wrong.append(f"boot {boot}: the offset to UTC did not follow the sleep")
    await connection.close()
    return wrong


def main() -> None:
    """Until the power goes; in the last boot, to the end."""
    boot, cuts = next_boot(), int((SHARE / "cuts").read_text())
    has_database = boot % 2 == 1 or boot == cuts
    if has_database:
        subprocess.run(["systemctl", "start", "postgresql"], check=True)
    say(f"boot {boot}, {'with' if has_database else 'without'} PostgreSQL")
    daemon, sender = Daemon(boot), Sender()
    sender.start()
    subprocess.run(["stty", "-F", SERIAL, "raw", "-echo"], check=True)
    if boot == cuts - 1:
        time.sleep(RECORD_S)
        suspend(boot)
        time.sleep(RECORD_S)
    with SERIAL.open("wb", buffering=0) as line:
        daemon.say_what_is_synced(boot, line, RECORD_S if boot == cuts else SECONDS_MAX)
    if boot < cuts:
        sys.exit(f"guest: the power did not go within {SECONDS_MAX:g} s")
    sender.over = True
    sender.join()
    log = daemon.stop()
    say("\n".join(row for row in log.splitlines() if " books " in row or " error " in row))
    synced = dict.fromkeys(range(cuts + 1), 0)
    for said in (SHARE / "synced").read_text().splitlines():
        of_boot, count = map(int, said.split())
        synced[of_boot] = max(synced[of_boot], count)
    wrong = asyncio.run(wrong_in_database(synced))
    if log.count("balanced=True") != cuts + 1:
        wrong.append("the books do not balance")
    if subprocess.run([INGESTD, "journal", "verify", JOURNAL]).returncode:
        wrong.append("the journal is damaged")
    say("\n".join(wrong) or "all that was synced is stored, once")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
