"""What receiving, keeping, decoding and storing a frame costs, beside what others do with less.

Every program gets the same frames from the same sender on the same buses, with its own defaults. It is there before the
first frame, so that all it did not keep counts as lost. Its cost is what the whole guest used while it ran, less what
the guest used while the sender sent to nobody (see live_meter), less the user part of PostgreSQL's processes; the
kernel's work for PostgreSQL cannot be told from that for the program and is therefore counted as the program's.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from live_guest import CHANNELS, DBC, HERE, PYTHON, WAIT_SECONDS_MAX, Daemon, Probe, Sender, Server, wait_until
from live_meter import Meter, Reading

RATES = ((1_000, 1), (8_000, 1), (32_000, 4))  # frames/s in all, buses


@dataclass(frozen=True, slots=True)
class Cost:
    """A program at a rate."""

    program: str
    rate: int
    sent_per_second: float
    kept: float  # of the frames sent, 1 is all
    frame_us: float  # of processor time for a frame that was kept
    user_us: float  # of that, in the program's own code
    postgres_us: float  # not in it: PostgreSQL's processes, in user mode
    busy: float  # of the guest's processor, with everything that runs in it


class Program(Protocol):
    """Something that receives frames."""

    name: str
    processes: int  # which it consists of; address spaces beyond them are PostgreSQL's

    def start(self, buses: int, folder: Path) -> None:
        """Begin; returns when it listens."""

    def settled(self) -> bool:
        """Whether what it does once only is behind it, after the first frames."""

    def stop(self, sent: int) -> int:
        """End; how many of the frames sent it kept."""


class Lines:
    """A program that writes a line a frame to a file: one process for all buses, or one for each."""

    def __init__(self, name: str, command: Callable[[list[str], Path], list[str]], *, each_bus: bool) -> None:
        self.name, self.processes = name, 1
        self._command, self._each_bus = command, each_bus

    def start(self, buses: int, folder: Path) -> None:
        channels = list(CHANNELS[:buses])
        groups = [[channel] for channel in channels] if self._each_bus else [channels]
        self.processes = len(groups)
        self._files = [folder / f"{number}.log" for number in range(len(groups))]
        self._running = []
        for group, file in zip(groups, self._files, strict=True):
            with (folder / f"{file.stem}.out").open("wb") as out:
                self._running.append(
                    subprocess.Popen(self._command(group, file), stdout=out, stderr=subprocess.STDOUT, cwd=HERE.parent)
                )
        wait_until(lambda: listeners() == buses, f"{self.name} listens")

    def settled(self) -> bool:
        return True

    def stop(self, sent: int) -> int:  # noqa: ARG002
        time.sleep(0.5)
        for each in self._running:
            each.send_signal(signal.SIGINT)
        for each in self._running:
            each.wait(WAIT_SECONDS_MAX)
        return sum(self._count(file) for file in self._files)

    def _count(self, file: Path) -> int:
        out = file.with_suffix(".out") if self.name == "candump -L" else file
        return sum(line.startswith(b"(") for line in out.read_bytes().splitlines())


class Loop(Lines):
    """A program of live_loops.py, which says at its end how many frames it had."""

    def _count(self, file: Path) -> int:
        return int(file.read_text())


class Ours:
    """The daemon."""

    name = "ingestd run"
    processes = 1

    def __init__(self, server: Server) -> None:
        self._server = server

    def start(self, buses: int, folder: Path) -> None:
        dsn = self._server.database()
        self.daemon = Daemon(folder / "daemon", dsn, buses=buses)
        self.daemon.wait_until_serving()
        self._probe = Probe(dsn)

    def settled(self) -> bool:
        return self._probe.stored() > 0

    def stop(self, sent: int) -> int:
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: self._probe.stored() >= sent, "everything is stored", 30, 0.2)
        self.fates = self.daemon.stop()
        stored = self._probe.stored()
        self._probe.close()
        if self.fates.committed + self.fates.pending + self.fates.dropped < sent or stored < self.fates.committed:
            print(f"  BOOKS: sent {sent:,}, stored {stored:,}, {self.fates}", flush=True)
        return stored


def listeners() -> int:
    """How many interfaces somebody receives everything from."""
    lines = Path("/proc/net/can/rcvlist_all").read_text().splitlines()
    return sum(line.split()[:1] != [] and line.split()[0] in CHANNELS for line in lines)


def programs(server: Server) -> list[Program]:
    """All that are compared, cheapest work first."""
    loops = str(HERE / "live_loops.py")

    def store(channels: list[str], file: Path) -> list[str]:
        return [PYTHON, loops, "store", str(file), server.database("template1"), str(DBC), *channels]

    return [
        Lines("candump -L", lambda channels, _: ["candump", "-L", *channels], each_bus=False),
        Loop("python-can recv, nothing more", lambda c, f: [PYTHON, loops, "receive", str(f), *c], each_bus=True),
        Lines(
            "python-can logger",
            lambda c, f: [PYTHON, "-m", "can.logger", "-i", "socketcan", "-c", c[0], "-f", str(f)],
            each_bus=True,
        ),
        Loop("python-can + cantools + asyncpg", store, each_bus=False),
        Ours(server),
    ]


class Bench:
    """Measures one program after the other."""

    def __init__(self, meter: Meter, sender: Sender, folder: Path, seconds: float) -> None:
        """To be made before PostgreSQL is started: what there is by then is not PostgreSQL's."""
        self._meter, self._sender, self._folder, self._seconds = meter, sender, folder, seconds
        self._not_postgres = set(meter.read().spaces_ns)
        self._warm_up_s = min(3.0, seconds)

    def _window(self) -> tuple[Reading, Reading, int]:
        begin, sent = self._meter.read(), self._sender.sent
        time.sleep(self._seconds)
        return begin, self._meter.read(), self._sender.sent - sent

    def sending_to_nobody(self, rate: int, buses: int) -> tuple[float, float]:
        """Nanoseconds of the guest for a frame, and per second, with no receiver."""
        self._sender.start(rate, buses)
        time.sleep(self._warm_up_s)
        begin, end, sent = self._window()
        self._sender.pause()
        used = end.all_ns - begin.all_ns
        return used / sent, used / (end.at_ns - begin.at_ns) * 1e9

    def cost(self, program: Program, rate: int, buses: int, nobody_ns: float) -> Cost:
        folder = self._folder / f"{time.monotonic_ns()}"
        folder.mkdir()
        before = self._meter.read()
        program.start(buses, folder)
        self._sender.start(rate, buses)
        time.sleep(self._warm_up_s)
        wait_until(program.settled, f"{program.name} has settled", pause_s=0.5)
        time.sleep(1.0)
        begin, end, sent_meanwhile = self._window()
        sent = self._sender.pause()
        kept = program.stop(sent) / sent
        own = set(end.newer_than(before)[: program.processes])
        used = {space: ns - begin.spaces_ns.get(space, 0) for space, ns in end.spaces_ns.items()}
        postgres = sum(ns for space, ns in used.items() if space not in own | self._not_postgres)
        whole = end.all_ns - begin.all_ns
        frames = sent_meanwhile * kept
        return Cost(
            program.name,
            rate,
            sent_meanwhile / ((end.at_ns - begin.at_ns) / 1e9),
            kept,
            (whole - nobody_ns * sent_meanwhile - postgres) / frames / 1000,
            sum(used[space] for space in own) / frames / 1000,
            postgres / frames / 1000,
            whole / (end.at_ns - begin.at_ns),
        )
