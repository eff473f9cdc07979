"""What guest.py stands on: what is checked and said, the host, systemd, SQL, the journal, the bus."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import asyncpg

from ingestd.journal import Kind, Record
from ingestd.journal.record import any_set
from ingestd.journal.segment import list_folder, read_segment

INGESTD = "/opt/ingestd/bin/ingestd"
PYTHON = "/opt/ingestd/bin/python"
CONFIGURATION = Path("/etc/ingestd/ingestd.toml")
JOURNAL = Path("/var/lib/ingestd/journal")
DSN = "postgresql:///telemetry?host=/var/run/postgresql"
HTTP = "http://127.0.0.1:9464"
STATE = Path("/var/lib/machine.json")
SERIAL = Path("/dev/ttyS1")
SECONDS_MAX = 240.0
OUTSTANDING_MAX = 3  # An SJA1000 has room for five frames, and what comes then is lost.

Frame = tuple[str, int, str]  # source, stamp, payload in hexadecimal


def say(text: str) -> None:
    """To whoever watches."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class State:
    """What one boot leaves for the next."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = json.loads(STATE.read_text()) if STATE.exists() else {"wrong": []}

    def save(self) -> None:
        """As far as the disk keeps its word."""
        STATE.write_text(json.dumps(self.kept))
        subprocess.run(["sync", STATE], check=True)


state = State()


def check(what: str, is_so: object, otherwise: object = "") -> None:
    """Say whether it is as it should be, and go on."""
    say(f"{'ok  ' if is_so else 'FAIL'} {what}" + ("" if is_so else f": {otherwise}"))
    if not is_so:
        state.kept["wrong"].append(what)


def comes_true(condition: Callable[[], object]) -> bool:
    """Wait for a condition; whether it came true in time."""
    deadline = time.monotonic() + SECONDS_MAX
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Check that something comes true."""
    check(what, comes_true(condition), f"not within {SECONDS_MAX:g} s")


def run(*command: str | Path, exit_code: int | None = 0) -> str:
    """What a program says, on either output; that it ends with `exit_code` is checked."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS_MAX)
    if exit_code is not None and done.returncode != exit_code:
        check(" ".join(map(str, command)), False, f"exit code {done.returncode}: {done.stdout.strip()[-600:]}")
    return done.stdout.strip()


def as_user(user: str, *command: str | Path, exit_code: int | None = 0) -> str:
    """The same as somebody else."""
    return run("runuser", "-u", user, "--", *command, exit_code=exit_code)


def show(what: str, unit: str = "ingestd") -> str:
    """A property of a unit."""
    return run("systemctl", "show", unit, "--property", what, "--value")


def log(unit: str = "ingestd") -> str:
    """What it has said in this boot."""
    return run("journalctl", "--boot", "--no-pager", "--output", "cat", "--unit", unit)


def since(mark: int) -> str:
    """What the service has said since its log was so long."""
    return log()[mark:]


class Host:
    """The hands on the host."""

    def __init__(self) -> None:
        subprocess.run(["stty", "-F", SERIAL, "raw", "-echo"], check=True)
        self._line: BinaryIO = SERIAL.open("r+b", buffering=0)

    def tell(self, request: str) -> None:
        """Something that has no answer."""
        self._line.write(f"{request}\n".encode())

    def ask(self, request: str) -> str:
        """Something that has one."""
        self.tell(request)
        said = b""
        while f"did {request} " not in said.decode(errors="replace") or not said.endswith(b"\n"):
            said += self._line.read(1)
        return said.decode(errors="replace").rpartition(f"did {request} ")[2].strip()


class Bus:
    """Sends numbered frames, none before there is room for it; `arrived` is the kernel's count of those at can0."""

    def __init__(self, channel: str, arrived: str, first: int) -> None:
        self.first, self.sent = first, 0
        self._arrived = Path(f"/sys/class/net/can0/statistics/{arrived}")
        self._before = int(self._arrived.read_text())
        self._socket = socket.socket(socket.AF_CAN, socket.SOCK_RAW, socket.CAN_RAW)
        self._socket.bind((channel,))

    def send(self, count: int, pause_s: float = 0.0) -> None:
        """So many more."""
        for _ in range(count):
            self._socket.send(struct.pack("=IB3xQ", 0x123, 8, self.first + self.sent))
            self.sent += 1
            while int(self._arrived.read_text()) - self._before <= self.sent - OUTSTANDING_MAX:
                time.sleep(0.001)
            time.sleep(pause_s)

    @contextlib.contextmanager
    def flowing(self) -> Iterator[None]:
        """It sends while inside."""
        over = threading.Event()

        def send() -> None:
            while not over.is_set():
                self.send(1, 0.01)

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        yield
        over.set()
        sender.join()

    def numbers(self) -> list[int]:
        """What it has sent."""
        return list(range(self.first, self.first + self.sent))


def metrics() -> str:
    """All that the service says of itself."""
    with urllib.request.urlopen(f"{HTTP}/metrics", timeout=60) as answer:
        return str(answer.read().decode())


def metric(name: str, source: str = "") -> int:
    """The sum of what it says under a name."""
    labels = f'{{[^}}]*source="{source}"[^}}]*}}' if source else r"(?:{[^}]*})?"
    return int(sum(map(float, re.findall(rf"^ingestd_{name}{labels} (\S+)$", metrics(), re.MULTILINE))))


def settle() -> None:
    """Until a service whose devices are silent has sent all of it; at first it tells no numbers of frames."""
    seen: list[tuple[int, int]] = []

    def is_quiet() -> bool:
        seen.append((metric("frames_received_total"), metric("frames_pending")))
        received, pending = seen[-1]
        return len(seen) > 4 and seen[-4:] == [seen[-1]] * 4 and received > 0 and not pending

    if not comes_true(is_quiet):
        check("all is sent that was recorded", False, seen[-1])


def sql(query: str) -> list[asyncpg.Record]:
    """Rows."""

    async def fetch() -> list[asyncpg.Record]:
        connection = await asyncpg.connect(DSN)
        try:
            rows: list[asyncpg.Record] = await connection.fetch(query)
            return rows
        finally:
            await connection.close()

    return asyncio.run(fetch())


def stored() -> Counter[Frame]:
    """Every frame in SQL."""
    return Counter(
        tuple(row)
        for row in sql(
            "SELECT payload_json ->> 'source', ts_mono_ns, coalesce(payload_json ->> 'data',"
            " encode(convert_to(payload_json ->> 'text', 'UTF8'), 'hex')) FROM frames"
        )
    )


def journalled() -> Counter[Frame]:
    """Every frame in the journal. Damage is wrong, but for the torn end that a cut leaves."""
    found: Counter[Frame] = Counter()
    for path in (name.path for name in list_folder(JOURNAL)[0] if name.number and not name.rejected):
        items = list(read_segment(path))
        if items and not isinstance(items[-1], Record):
            items.pop()
        for record in items:
            if not isinstance(record, Record):
                check("the journal is whole", not any_set(record.data), record)
            elif record.kind is Kind.FRAMES:
                frames = record.frames()
                rows = zip(frames.ts_ns.tolist(), frames.length.tolist(), frames.data, strict=True)
                found.update((frames.source, ts_ns, bytes(data[:length]).hex()) for ts_ns, length, data in rows)
    return found


def in_frames(payloads: list[str]) -> list[int]:
    """The numbers that a bus has carried."""
    return [int.from_bytes(bytes.fromhex(payload), "little") for payload in payloads]


def in_lines(payloads: list[str]) -> list[int]:
    """The numbers that the instrument has said; a line whose beginning or end was cut off has none."""
    found = (re.fullmatch(rb"n=(\d+)\s*", bytes.fromhex(payload)) for payload in payloads)
    return [int(each[1]) for each in found if each is not None]
