"""What bench/live.py measures with, in the guest and here: buses, a sender, a PostgreSQL, a daemon.

With LIVE_STAND_IN in the environment, a library made of live_stand_in.c, that is what programs have instead of buses.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import numpy as np
from live_sender import BUSES, END, LIMIT, RATE, SENT, STATE_BYTES
from server import server_binaries, temporary_server

from ingestd import demo
from ingestd.store import migrate

PYTHON = sys.executable
HERE = Path(__file__).parent
CHANNELS = ("can0", "can1", "can2", "can3")
DBC = demo.databases()["powertrain"]
WAIT_SECONDS_MAX = 120.0
STAND_IN = os.environ.get("LIVE_STAND_IN", "")
FIRST_PORT = 20000


def free_address() -> str:
    """Where nobody listens: another daemon on the machine must not be taken for ours."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return "127.0.0.1:{1}".format(*found.getsockname())


def dropped_on_the_way() -> int:
    """Packets that the kernel could not even queue for their receivers (Documentation/networking/scaling.rst: the
    second column of softnet_stat): the sender was too fast after it had been held up. Only the daemon counts them."""
    return sum(int(line.split()[1], 16) for line in Path("/proc/net/softnet_stat").read_text().splitlines())


def environment() -> dict[str, str]:
    """For a program that reads from the buses."""
    return {**os.environ, **({"LD_PRELOAD": STAND_IN} if STAND_IN else {})}


def listeners() -> int:
    """How many interfaces somebody receives everything from."""
    if STAND_IN:
        ports = {f":{FIRST_PORT + number:04X}" for number in range(len(CHANNELS))}
        lines = Path("/proc/net/udp").read_text().splitlines()[1:]
        return sum(line.split()[1][8:] in ports for line in lines)
    lines = Path("/proc/net/can/rcvlist_all").read_text().splitlines()
    return sum(line.split()[:1] != [] and line.split()[0] in CHANNELS for line in lines)


def wait_until(condition: Any, what: str, seconds: float = WAIT_SECONDS_MAX, pause_s: float = 0.02) -> None:
    """Poll until something is the case."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        time.sleep(pause_s)


def add_buses() -> None:
    for channel in CHANNELS:
        subprocess.run(["ip", "link", "add", channel, "type", "vcan"], check=True)
        subprocess.run(["ip", "link", "set", channel, "up"], check=True)


class Sender:
    """The process of live_sender.py. It is there all the time and sends when told."""

    def __init__(self, folder: Path) -> None:
        path = folder / "sender"
        path.write_bytes(bytes(STATE_BYTES))
        with path.open("r+b") as file:
            self._state = np.frombuffer(mmap.mmap(file.fileno(), STATE_BYTES), np.int64)
        self._process = subprocess.Popen([PYTHON, str(HERE / "live_sender.py"), str(path), *CHANNELS])
        wait_until(lambda: self._state[SENT + len(CHANNELS)], "the sender is ready")

    def start(self, rate: int, buses: int = 1, *, limit: int = 1 << 62) -> None:
        """Send `rate` frames/s in all, evenly to the first interfaces, and at most `limit` to each."""
        self._state[SENT : SENT + len(CHANNELS)] = 0
        self._dropped = dropped_on_the_way()
        self._state[BUSES], self._state[LIMIT] = buses, limit
        self._state[RATE] = rate // buses

    def raise_limit(self, limit: int) -> None:
        self._state[LIMIT] = limit

    def pause(self) -> int:
        """Stop sending; the number sent since `start`."""
        self._state[RATE] = 0
        time.sleep(0.2)
        dropped = dropped_on_the_way() - self._dropped
        if dropped:
            print(f"  ({dropped:,} of {self.sent:,} frames sent did not fit into the kernel's queue)", flush=True)
        return self.sent

    @property
    def sent(self) -> int:
        return int(self._state[SENT : SENT + len(CHANNELS)].sum())

    def end(self) -> None:
        self._state[END] = 1
        self._process.wait(WAIT_SECONDS_MAX)


class Server:
    """PostgreSQL of the distribution, default settings, which can be stopped and started."""

    def __init__(self, dsn: str, binaries: Path) -> None:
        self.dsn = dsn
        self._data = Path(dsn.partition("host=")[2])
        as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        self._control = [*as_user, str(binaries / "pg_ctl"), "-D", str(self._data), "-w"]
        self._number = 0

    def stop(self) -> None:
        self._run("-m", "fast", "stop")

    def start(self) -> None:
        options = f"-c listen_addresses='' -c unix_socket_directories='{self._data}'"
        self._data.chmod(0o700)  # It refuses to start where others may look in; they may, for the socket in it.
        self._run("-l", f"{self._data}/log", "-o", options, "start")
        self._data.chmod(0o711)

    def _run(self, *arguments: str) -> None:
        subprocess.run([*self._control, *arguments], check=True, stdout=subprocess.DEVNULL, cwd="/")

    def database(self, template: str = "bench_template") -> str:
        """A new database, with our schema or (template1) empty; its DSN."""
        self._number += 1
        name = f"bench_{self._number}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self.dsn_of(name)

    def dsn_of(self, name: str) -> str:
        return f"postgresql://postgres@/{name}?host={self._data}"

    @property
    def pid(self) -> int:
        """The process that started all the others."""
        return int((self._data / "postmaster.pid").read_text().split()[0])

    def version(self) -> str:
        probe = Probe(self.dsn)
        try:
            return "PostgreSQL " + str(probe.fetch("SHOW server_version")[0][0])
        finally:
            probe.close()

    def execute(self, statement: str) -> None:
        async def execute() -> None:
            connection = await asyncpg.connect(self.dsn)
            await connection.execute(statement)
            await connection.close()

        asyncio.run(execute())


@contextlib.contextmanager
def server() -> Iterator[Server]:
    binaries = server_binaries()
    if binaries is None:
        sys.exit("bench/live.py needs the distribution's PostgreSQL: apt-get install postgresql")
    with temporary_server(binaries) as dsn:
        started = Server(dsn, binaries)
        started.execute("CREATE DATABASE bench_template")
        asyncio.run(migrate.upgrade(started.dsn_of("bench_template")))
        yield started


class Probe:
    """A connection to ask SQL over, from a program that is not asynchronous."""

    def __init__(self, dsn: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._connection = self._loop.run_until_complete(asyncpg.connect(dsn))

    def fetch(self, query: str, *arguments: Any) -> list[Any]:
        return self._loop.run_until_complete(self._connection.fetch(query, *arguments))

    def longest_silence(self) -> str:
        """Where frames may be missing, in words."""
        rows = self.fetch("SELECT source, ts_mono_ns FROM frame_chunks ORDER BY source, mono_start_ns")
        found = []
        for source in sorted({row["source"] for row in rows}):
            stamps = np.concatenate([row["ts_mono_ns"] for row in rows if row["source"] == source]).astype(np.int64)
            gaps = np.diff(stamps)
            at = int(gaps.argmax())
            found.append(f"{source} {len(stamps):,}, silent {gaps[at] / 1e6:.0f} ms after {at:,}")
        return "; ".join(found)

    def stored(self) -> int:
        """Frames that anybody can see in SQL now."""
        return int(self.fetch("SELECT coalesce(sum(frame_count), 0) AS n FROM frame_chunks")[0]["n"])

    def close(self) -> None:
        self._loop.run_until_complete(self._connection.close())
        self._loop.close()


@dataclass(frozen=True, slots=True)
class Fates:
    """The last lines of the log, summed over sources."""

    received: int
    committed: int
    pending: int
    dropped: int


class Daemon:
    """`ingestd run`, with the defaults of its configuration except where it keeps its journal and how large that is."""

    def __init__(
        self, folder: Path, dsn: str, *, buses: int = 1, dbc: Path = DBC, dbcs: Sequence[Path] = (),
        settings: str = "", max_bytes: str = "256MiB",
    ) -> None:  # fmt: skip
        """`dbcs`: of each bus, where they differ. `folder` may hold a journal already, in `journal`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.journal = folder / "journal"
        self.log = folder / "log"
        self.dsn = dsn
        self.address, self._buses = free_address(), buses
        config = folder / "ingestd.toml"
        of_each = dbcs or [dbc] * buses
        tables = "\n".join(
            f'[[can]]\nname = "{channel}"\ndbc = ["{file}"]' for channel, file in zip(CHANNELS, of_each, strict=False)
        )
        config.write_text(
            f'[database]\ndsn = "{dsn}"\n[journal]\npath = "{self.journal}"\nmax_bytes = "{max_bytes}"\n'
            f'[http]\nlisten = "{self.address}"\n{settings}\n{tables}\n'
        )
        self.started_ns = time.monotonic_ns()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [PYTHON, "-m", "ingestd", "run", "-c", str(config)], stdout=log, stderr=log, env=environment()
            )

    def wait_until_serving(self) -> None:
        """Until it hears every bus and its HTTP side answers."""
        self.wait_until_listening()
        wait_until(lambda: self.metrics() or self._check(), "the daemon answers", pause_s=0.2)

    def wait_until_listening(self) -> None:
        """Until it hears every bus."""
        wait_until(lambda: listeners() == self._buses or self._check(), "the daemon listens")

    def _check(self) -> None:
        if self.process.poll() is not None:
            raise RuntimeError(f"the daemon ended:\n{self.log.read_text()}")

    def metrics(self) -> dict[str, float]:
        """Its metrics, summed over labels; empty if it does not answer yet."""
        try:
            with urllib.request.urlopen(f"http://{self.address}/metrics", timeout=5) as answer:
                text = answer.read().decode()
        except OSError:
            return {}
        numbers: dict[str, float] = {}
        for line in text.splitlines():
            if not line.startswith("#"):
                name, value = line.rpartition(" ")[::2]
                name = name.partition("{")[0]
                numbers[name] = numbers.get(name, 0.0) + float(value)
        return numbers

    def memory_mb(self) -> float:
        """PSS of the process and its children."""
        return sum(pss_kb(pid) for pid in family(self.process.pid)) / 1024

    def peak_mb(self) -> float:
        """The high-water mark of the process's resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024

    def stop(self) -> Fates:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(WAIT_SECONDS_MAX)
        text = self.log.read_text()
        books = [dict(re.findall(r"(\w+)=(\S+)", line)) for line in text.splitlines() if "books source=" in line]
        if self.process.returncode or not books or any(each["balanced"] != "True" for each in books):
            raise RuntimeError(f"the daemon ended with {self.process.returncode}:\n{text[-4000:]}")
        return Fates(
            *(sum(int(each[name]) for each in books) for name in ("received", "committed", "pending")),
            sum(int(value) for each in books for name, value in each.items() if name.startswith("dropped")),
        )

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def family(pid: int) -> list[int]:
    """A process and all below it."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for member in found:
        found += [child for child, parent in parents.items() if parent == member]
    return found


def pss_kb(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/smaps_rollup").read_text().partition("Pss:")[2].split()[0])
    except (OSError, IndexError):
        return 0


@contextlib.contextmanager
def ext4(folder: Path) -> Iterator[tuple[Path, Path]]:
    """A file system on a block device that counts what is written to it; its mount point and its `stat` in sysfs."""
    drivers = Path(f"/usr/lib/uml/modules/{os.uname().release}/kernel/drivers/block")
    subprocess.run(["insmod", str(drivers / "loop.ko")], check=False, stderr=subprocess.DEVNULL)
    image, mount = folder / "disk", folder / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(1 << 30)
    subprocess.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(image)], check=True)
    found = subprocess.run(["losetup", "-f", "--show", str(image)], check=True, capture_output=True, text=True)
    device = Path(found.stdout.strip())
    subprocess.run(["mount", str(device), str(mount)], check=True)
    try:
        yield mount, Path("/sys/block") / device.name / "stat"
    finally:
        subprocess.run(["umount", str(mount)], check=True)
        subprocess.run(["losetup", "-d", str(device)], check=True)
        image.unlink()
        mount.rmdir()


def written_bytes(stat: Path) -> int:
    """Documentation/block/stat.rst: the seventh field counts sectors of 512 bytes."""
    return 512 * int(stat.read_text().split()[6])
