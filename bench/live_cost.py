"""What receiving, keeping, decoding and storing a frame costs, beside what others do with less.

Every program gets the same frames from the same sender on the same buses, with its own defaults. It is there before the
first frame, so that all it did not keep counts as lost. Here, its cost is the processor time of its processes. In the
guest it is what the whole guest used while it ran, less what the guest used while the sender sent to nobody (see
live_meter), less the user part of PostgreSQL's processes; the kernel's work for PostgreSQL cannot be told from that
for the program and is therefore counted as the program's.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from live_guest import (
    CHANNELS,
    DBC,
    HERE,
    PYTHON,
    WAIT_SECONDS_MAX,
    Daemon,
    Probe,
    Sender,
    Server,
    environment,
    family,
    listeners,
    wait_until,
)
from live_meter import TICKS, Meter, Reading, run_ns

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
    postgres_us: float  # not in it: PostgreSQL's processes


class Program(Protocol):
    """Something that receives frames."""

    name: str
    processes: int  # which it consists of; address spaces beyond them are PostgreSQL's

    def start(self, buses: int, folder: Path) -> None:
        """Begin; returns when it listens."""

    def pids(self) -> list[int]:
        """All its processes."""

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
                    subprocess.Popen(
                        self._command(group, file),
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        cwd=HERE.parent,
                        env=environment(),
                    )
                )
        wait_until(lambda: listeners() == buses, f"{self.name} listens")

    def pids(self) -> list[int]:
        return [each.pid for each in self._running]

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

    def pids(self) -> list[int]:
        return family(self.daemon.process.pid)

    def settled(self) -> bool:
        return self._probe.stored() > 0

    def stop(self, sent: int) -> int:
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: self._probe.stored() >= sent, "everything is stored", 30, 0.2)
        self.fates = self.daemon.stop()
        stored = self._probe.stored()
        if self.fates.received != sent or stored != sent - self.fates.dropped:
            silence = self._probe.longest_silence()
            raise RuntimeError(f"the books: sent {sent:,}, stored {stored:,}, {self.fates}; {silence}")
        self._probe.close()
        return stored


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
    """Measures one program after the other, here: a process's own time, as the kernel counts it."""

    def __init__(self, sender: Sender, folder: Path, seconds: float) -> None:
        self._sender, self._folder, self._seconds = sender, folder, seconds
        self._warm_up_s = min(3.0, seconds)

    def nobody(self, rate: int, buses: int) -> str:
        """Measure what sending takes when there is no receiver; says so."""
        return f"{rate:,} frames/s on {buses} bus(es)"

    def cost(self, program: Program, server: Server, rate: int, buses: int) -> Cost:
        """Run a program at a rate."""
        folder = self._folder / f"{time.monotonic_ns()}"
        folder.mkdir()
        self._before_start()
        program.start(buses, folder)
        self._sender.start(rate, buses)
        time.sleep(self._warm_up_s)
        wait_until(program.settled, f"{program.name} has settled", pause_s=0.5)
        time.sleep(1.0)
        begin, at, sent = self._read(program, server), time.monotonic(), self._sender.sent
        time.sleep(self._seconds)
        end, seconds, sent_meanwhile = self._read(program, server), time.monotonic() - at, self._sender.sent - sent
        sent = self._sender.pause()
        kept = program.stop(sent) / sent
        all_ns, own_ns, postgres_ns = self._used(begin, end, program, sent_meanwhile)
        frames = sent_meanwhile * kept
        return Cost(
            program.name, rate, sent_meanwhile / seconds, kept,
            *(ns / frames / 1000 for ns in (all_ns, own_ns, postgres_ns)),
        )  # fmt: skip

    def _before_start(self) -> None:
        pass

    def _read(self, program: Program, server: Server) -> Any:
        return [usage(program.pids()), usage(family(server.pid))]

    def _used(self, begin: Any, end: Any, program: Program, sent: int) -> tuple[float, float, float]:  # noqa: ARG002
        """Nanoseconds: in all, in user mode; and PostgreSQL's."""
        own, user, postgres = end[0][0] - begin[0][0], end[0][1] - begin[0][1], end[1][0] - begin[1][0]
        return own, user, postgres


def usage(pids: list[int]) -> tuple[float, float]:
    """Nanoseconds that these processes have used; and of them in user mode, as ticks tell."""
    total, user, system = 0, 0, 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            user, system = user + int(fields[11]), system + int(fields[12])
            total += run_ns(Path(f"/proc/{pid}"))
    return total, user * 1e9 / TICKS


class GuestBench(Bench):
    """The same in the guest, by what the host counts."""

    def __init__(self, meter: Meter, sender: Sender, folder: Path, seconds: float) -> None:
        """To be made before PostgreSQL is started: what there is by then is not PostgreSQL's."""
        super().__init__(sender, folder, seconds)
        self._meter = meter
        self._not_postgres = set(meter.read().spaces_ns)
        self._nobody_ns = 0.0

    def nobody(self, rate: int, buses: int) -> str:
        self._sender.start(rate, buses)
        time.sleep(self._warm_up_s)
        begin, sent = self._meter.read(), self._sender.sent
        time.sleep(self._seconds)
        end, sent = self._meter.read(), self._sender.sent - sent
        self._sender.pause()
        self._nobody_ns = (end.all_ns - begin.all_ns) / sent
        return f"{super().nobody(rate, buses)}; sending alone takes {self._nobody_ns / 1000:.1f} µs a frame"

    def _before_start(self) -> None:
        self._before = self._meter.read()

    def _read(self, program: Program, server: Server) -> Reading:  # noqa: ARG002
        return self._meter.read()

    def _used(self, begin: Reading, end: Reading, program: Program, sent: int) -> tuple[float, float, float]:
        own = set(end.newer_than(self._before)[: program.processes])
        used = {space: ns - begin.spaces_ns.get(space, 0) for space, ns in end.spaces_ns.items()}
        postgres = sum(ns for space, ns in used.items() if space not in own | self._not_postgres)
        all_ns = end.all_ns - begin.all_ns - postgres - self._nobody_ns * sent
        return all_ns, sum(used[space] for space in own), postgres
