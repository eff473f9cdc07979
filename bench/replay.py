"""Plays a capture of any supported kind as if it came in now, through ingestd or onto a bus.

    python bench/replay.py LOG [--dbc [SOURCE:]FILE]… [--speed 1|10|max] [--loop N]
                           [--onto pipeline|IF|SOURCE=IF,…|udp:HOST:PORT] [--dsn DSN] [--json FILE]

    pipeline          what `ingestd run` runs, in this process, with its defaults: journal, decode, COPY. Only the
                      devices are missing. Into --dsn, else into a server that is gone afterwards
    vcan0             a SocketCAN interface, for all frames; can0=vcan0,can1=vcan1: by source, and no others
    udp:HOST:PORT     datagrams as cannelloni takes them: `cannelloni -I vcan0 -R SENDER -r PORT -l PORT`

A frame leaves when it is due: the start, plus its distance from the first one, divided by the speed (see schedule.py);
never earlier, and how late is said at the end. Frames that are due within a tick leave together: TICK_NS onto a bus, as
a busy adapter would pass them on, PIPELINE_TICK_NS into the pipeline, which is less often than the daemon reads. With
`--speed max` frames leave as they are taken. Into the pipeline they then keep their distances: their stamps run ahead
of the clock. --loop plays the capture again and again, with stamps that go on rising.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from schedule import Schedule, looped
from server import fresh, server
from wires import CanWire, UdpWire, Wire

from ingestd.clock import WallClock
from ingestd.config import Config, load_config
from ingestd.daemon.service import Daemon
from ingestd.errors import IngestdError
from ingestd.model import Books, Link, Recorder, SourceStatus
from ingestd.sources.captures import Capture, CaptureBatch, open_capture
from ingestd.store.sessions import open_catalogue

TICK_NS = 1_000_000
PIPELINE_TICK_NS = 5_000_000
LEAD_NS = 20_000_000  # from the start of playing to the first frame
AHEAD_FRAMES_MAX = 1_000_000
POLL_SECONDS = 0.01
STORE_SECONDS_MAX = 600.0


@dataclass(frozen=True, slots=True)
class Played:
    """What came of it."""

    frames: int
    capture_seconds: float  # that the frames are spread over in the capture
    seconds: float  # that it took to send them
    stored_seconds: float  # … and until all were committed, if they went into the pipeline
    cpu_seconds: float  # of this process
    late_p50_ms: float
    late_p99_ms: float
    late_max_ms: float
    books: dict[str, Books]

    @property
    def is_complete(self) -> bool:
        """Whether all that went into the pipeline is committed, once; what a bus's receivers have, they know."""
        committed = sum(books.committed for books in self.books.values())
        return not self.books or (committed == self.frames and all(books.balanced for books in self.books.values()))

    def lines(self) -> list[str]:
        """In words."""
        rate = self.frames / max(self.seconds, 1e-9)
        said = [
            f"{self.frames:,} frames of {self.capture_seconds:,.1f} s in {self.seconds:.2f} s: {rate:,.0f} frames/s"
        ]
        if self.late_max_ms:
            said.append(
                f"late: p50 {self.late_p50_ms:.2f} ms, p99 {self.late_p99_ms:.2f} ms, at most {self.late_max_ms:.2f} ms"
            )
        if self.books:
            said.append(
                f"all stored after {self.stored_seconds:.2f} s: {self.frames / self.stored_seconds:,.0f} frames/s; "
                f"{1e6 * self.cpu_seconds / self.frames:.2f} µs of processor time a frame in this process"
            )
        return said + [
            f"{source}: received {books.received:,}, stored {books.committed:,}, pending {books.pending:,}, "
            f"rejected {books.rejected:,}, lost {sum(books.dropped.values()):,}"
            for source, books in self.books.items()
        ]


class Clocked:
    """A schedule on CLOCK_MONOTONIC: how long to wait for the next frames, and no longer."""

    def __init__(self, capture: Capture, speed: float | None, loops: int, tick_ns: int) -> None:
        self.began_ns = time.monotonic_ns() + (0 if speed is None else LEAD_NS)
        self.schedule = Schedule(looped(capture, loops), self.began_ns, speed)
        self._tick_ns, self._free_ns = (0 if speed is None else tick_ns), 0

    @property
    def ended(self) -> bool:
        return self.schedule.next_ns is None

    def wait_seconds(self) -> float:
        """Until the next frame is due and the tick is over."""
        due_ns = self.schedule.next_ns or 0
        return max(0, max(due_ns, self._free_ns) - time.monotonic_ns()) / 1e9

    def take(self) -> CaptureBatch | None:
        """What is due now."""
        taken = self.schedule.take(time.monotonic_ns())
        if self._tick_ns:
            self._free_ns = (time.monotonic_ns() // self._tick_ns + 1) * self._tick_ns
        return taken

    def played(
        self, ended_ns: int, stored_ns: int = 0, cpu: float = 0.0, books: dict[str, Books] | None = None
    ) -> Played:
        """The figures."""
        schedule, late = self.schedule, self.schedule.lateness
        return Played(
            schedule.taken_count, schedule.last_ns / 1e9, (ended_ns - self.began_ns) / 1e9,
            max(0, stored_ns - self.began_ns) / 1e9, cpu,
            late.quantile_ms(0.5), late.quantile_ms(0.99), late.max_ns / 1e6, books or {},
        )  # fmt: skip


def onto_wires(clocked: Clocked, wires: Mapping[str | None, Wire]) -> Played:
    """Send onto the wire of each source, or with None as its name, everything onto one."""
    while not clocked.ended:
        if wait := clocked.wait_seconds():
            time.sleep(wait)
        if (taken := clocked.take()) is None:
            continue
        if None in wires:
            wires[None].send(taken.frames)
            continue
        for batch in taken.by_source():
            if batch.source in wires:
                wires[batch.source].send(batch)
    return clocked.played(time.monotonic_ns())


class Feed:
    """A source of the daemon whose device is the replay: it only lends it the recorder."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.status = SourceStatus(Link.OPEN)
        self.recorder: asyncio.Future[Recorder] = asyncio.get_running_loop().create_future()

    async def run(self, recorder: Recorder) -> None:
        """Wait for the end."""
        self.recorder.set_result(recorder)
        await asyncio.Event().wait()


async def onto_pipeline(
    capture: Capture, databases: Sequence[str], speed: float | None, loops: int, dsn: str, folder: Path
) -> Played:
    """Send into the daemon, and wait until everything is committed. `databases` are paths, or SOURCE:PATH."""
    config = configure(folder, dsn, sources_of(capture), databases)
    feeds = [Feed(table.name) for table in config.can]
    daemon = Daemon(config, list(feeds))
    running = asyncio.create_task(daemon.run(), name="daemon")
    try:
        recorder = (await asyncio.gather(*(feed.recorder for feed in feeds)))[0]
        await until(lambda: daemon.recovered and daemon.loaded is not None, daemon, "the daemon is ready")
        cpu, clock = time.process_time(), WallClock()
        clocked = Clocked(capture, speed, loops, PIPELINE_TICK_NS)
        while not clocked.ended and not daemon.stopped.is_set():
            await asyncio.sleep(clocked.wait_seconds())
            if (taken := clocked.take()) is None:
                continue
            now = clock.now()
            for batch in taken.by_source():
                recorder.frames(batch, now)
            if speed is None:
                await until(lambda: pending(daemon) < AHEAD_FRAMES_MAX, daemon, "the database keeps up")
        ended_ns = time.monotonic_ns()
        await until(lambda: pending(daemon) == 0, daemon, "everything is stored")
        books = dict(daemon.books())
        return clocked.played(ended_ns, time.monotonic_ns(), time.process_time() - cpu, books)
    finally:
        daemon.stop("the replay is over")
        await running


def pending(daemon: Daemon) -> int:
    """Frames that are recorded and not committed."""
    return sum(books.pending for books in daemon.books().values())


async def until(condition: Callable[[], bool], daemon: Daemon, what: str) -> None:
    """Poll until something is the case."""
    deadline = time.monotonic() + STORE_SECONDS_MAX
    while not condition():
        if daemon.stopped.is_set() or time.monotonic() > deadline:
            raise RuntimeError(f"the daemon has ended, or it took too long: {what}; {daemon.trouble}")
        await asyncio.sleep(POLL_SECONDS)


def sources_of(capture: Capture) -> list[str]:
    """The sources of a capture, all of which has to be read for that."""
    names: tuple[str, ...] = ()
    for batch in capture.batches():
        names = batch.sources
    return list(names)


def configure(folder: Path, dsn: str, sources: Sequence[str], databases: Sequence[str]) -> Config:
    """What `ingestd run` would read: a bus for each source, and everything else as it is by default."""
    tables = []
    for source in sources:
        files = [path for name, _, path in (each.rpartition(":") for each in databases) if name in ("", source)]
        tables.append(
            f"[[can]]\nname = {json.dumps(source)}\ndbc = {json.dumps([str(Path(f).resolve()) for f in files])}"
        )
    path = folder / "ingestd.toml"
    path.write_text("\n".join(['[journal]\npath = "journal"\n', *tables, ""]))
    return load_config(path, dsn=dsn)


def open_wires(onto: str, stack: ExitStack) -> dict[str | None, Wire]:
    """What --onto names, by source; None is all of them. Raises OSError if there is no such interface or host."""
    wires: dict[str | None, Wire] = {}
    if onto.startswith("udp:"):
        host, _, port = onto.removeprefix("udp:").rpartition(":")
        if not host or not port.isdecimal():
            raise OSError(f"{onto} is not udp:HOST:PORT")
        wires[None] = UdpWire(host.strip("[]"), int(port))
    else:
        for entry in onto.split(","):
            source, _, interface = entry.rpartition("=")
            try:
                wires[source or None] = CanWire(interface)
            except OSError as error:
                if error.errno == errno.EAFNOSUPPORT:
                    raise OSError(f"{interface}: this kernel has no SocketCAN (modprobe can_raw)") from error
                raise
    for wire in wires.values():
        stack.callback(wire.close)
    return wires


def into_database(
    capture: Capture, databases: Sequence[str], speed: float | None, loops: int, dsn: str | None
) -> Played:
    """Onto the pipeline, on an event loop and with the settings that `ingestd run` has."""
    import uvloop

    sys.setswitchinterval(0.001)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ingestd-replay-")))
        if dsn is not None:
            asyncio.run(reached(dsn))
        else:
            maintenance, what = stack.enter_context(server(None))
            print(what, flush=True)
            dsn = asyncio.run(fresh(maintenance, "replay"))
        return uvloop.run(onto_pipeline(capture, databases, speed, loops, dsn, folder))


async def reached(dsn: str) -> None:
    """Raise StoreError if the database cannot be had now: the daemon itself would wait for it."""
    async with open_catalogue(dsn):
        pass


def speed_of(text: str) -> float | None:
    """`max` is None."""
    if text == "max":
        return None
    with suppress(ValueError):
        if 0 < (speed := float(text)) < 1e6:
            return speed
    raise argparse.ArgumentTypeError(f"{text} is neither a factor, such as 1 or 10, nor max")


def loops_of(text: str) -> int:
    """At least one."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is no number of times")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("log", type=Path)
    parser.add_argument("--dbc", action="append", default=[], metavar="[SOURCE:]FILE")
    parser.add_argument("--speed", type=speed_of, default=1.0, help="1, 10, …, max (default 1)")
    parser.add_argument("--onto", default="pipeline", help="pipeline, vcan0, can0=vcan0,can1=vcan1, udp:HOST:PORT")
    parser.add_argument("--loop", type=loops_of, default=1, metavar="N", help="play it N times")
    parser.add_argument("--dsn", help="for the pipeline: a database with ingestd's schema")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    try:
        capture = open_capture(arguments.log)
        if arguments.onto == "pipeline":
            played = into_database(capture, arguments.dbc, arguments.speed, arguments.loop, arguments.dsn)
        else:
            with ExitStack() as stack:
                wires = open_wires(arguments.onto, stack)
                played = onto_wires(Clocked(capture, arguments.speed, arguments.loop, TICK_NS), wires)
    except (IngestdError, OSError) as error:
        sys.exit(f"replay: {error}")
    print("\n".join(played.lines()))
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(played), indent=2, default=dict) + "\n")
    if not played.is_complete:
        sys.exit("replay: not every frame is in the database")


if __name__ == "__main__":
    main()
