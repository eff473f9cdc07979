"""A journal as it is after hours without a database, written through `Journal` as fast as it goes.

What is in it is the demo car's drive over and over: two buses with their DBC files, and a GPS receiver that says NMEA
sentences. The stamps of the buses are drawn together or apart, so that both together give the rate that is asked for;
the receiver says what a receiver says, however busy the buses are. Records are as the sources make them: what a bus
carries in 20 ms, and each sentence by itself. So the work per record is that of a real outage.

Afterwards it knows of every frame, by its ordinal in its source, what it was.
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from ingestd import demo
from ingestd.decode.databases import load
from ingestd.demo import simulate
from ingestd.demo.gps import Receiver
from ingestd.demo.vehicle import drive
from ingestd.journal import Journal, SessionInfo
from ingestd.model import Clock, ClockState, FrameBatch, SerialFlag
from ingestd.pipeline import Binding, Decoders
from ingestd.store.sessions import machine_id, new_session_id

BUSES = {"can0": "powertrain", "can1": "body"}  # the names of the buses here, and in the demo
GPS = "gps"
CYCLE_SECONDS = 600.0  # of driving; then the same frames again
READ_NS = 20_000_000  # how often a bus is read
SYNC_READS = 20_000  # about a segment
BOOT_ID = "0b0b0b0b-0000-4000-8000-000000000024"  # A boot that is over: the machine was switched off since.


@dataclass(frozen=True)
class Cycle:
    """What is sent again and again. Stamps begin at 0 and rise strictly within a source, also into the next cycle."""

    sources: dict[str, FrameBatch]
    length_ns: int

    @property
    def frames_count(self) -> int:
        return sum(map(len, self.sources.values()))

    @cached_property
    def reads(self) -> list[FrameBatch]:
        """The batches of the sources, in the order in which they are read."""
        found: list[tuple[int, FrameBatch]] = []
        for name, batch in self.sources.items():
            ticks = np.arange(len(batch)) if name == GPS else batch.ts_ns // READ_NS
            starts = np.flatnonzero(np.diff(ticks, prepend=-1))
            for begin, end in zip(starts.tolist(), [*starts[1:].tolist(), len(batch)], strict=True):
                read = batch[begin:end]
                found.append((int(read.ts_ns[-1]), read))
        return [read for _, read in sorted(found, key=lambda each: each[0])]

    def signals_count(self) -> int:
        """Signals that its frames give, text included."""
        databases = demo.databases()
        bindings = [Binding(name, load(databases[bus])) for name, bus in BUSES.items()]
        decoders = Decoders(bindings, protocols={GPS: "nmea"})
        return sum(decoders.of(name).decode(batch, {}).counts.signals for name, batch in self.sources.items())

    def digest(self, source: str, first: int, count: int) -> bytes:
        """SHA-256 of what a chunk of these frames has to hold, by their ordinals, as `DIGEST` computes it in SQL."""
        batch = self.sources[source]
        ordinals = np.arange(first, first + count)
        cycles, rows = np.divmod(ordinals, len(batch))
        length, data = batch.length[rows], batch.data[rows]
        parts = [
            _array_send(batch.ts_ns[rows] + cycles * self.length_ns, ">i8", 20),
            _array_send(batch.arbitration_id[rows], ">i4", 23),
            batch.flags[rows].tobytes(),
            length.astype(">u2").tobytes(),
            data[np.arange(data.shape[1]) < length[:, None]].tobytes(),
        ]
        return hashlib.sha256(b"".join(parts)).digest()


DIGEST = "sha256(array_send(ts_mono_ns) || array_send(arbitration_id) || flags || lengths || data)"


def _array_send(values: NDArray[np.generic], element: str, oid: int) -> bytes:
    """As PostgreSQL's array_send writes an array of one dimension without nulls."""
    elements = np.empty(len(values), np.dtype([("length", ">i4"), ("value", element)]))
    elements["length"], elements["value"] = np.dtype(element).itemsize, values
    return struct.pack(">iiiii", 1, 0, oid, len(values), 1) + elements.tobytes()


def make_cycle(rate: float, seconds: float = CYCLE_SECONDS) -> Cycle:
    """The drive, at `rate` frames a second over both buses; the receiver never says more sentences than it does."""
    columns = drive(seconds)
    made = {batch.source: batch for batch in simulate.frames(columns, start_ns=0)}
    sources = {name: replace(made[bus], source=name) for name, bus in BUSES.items()}
    scale = sum(map(len, sources.values())) / seconds / rate
    gps = _sentences(*Receiver(simulate.START_NS).sentences(columns))
    gps = replace(gps, ts_ns=(gps.ts_ns * max(1.0, scale)).astype(np.int64))
    sources = {name: replace(batch, ts_ns=(batch.ts_ns * scale).astype(np.int64)) for name, batch in sources.items()}
    length_ns = int(seconds * scale * 1e9)
    sources[GPS] = gps[: int(np.searchsorted(gps.ts_ns, length_ns))]
    sources = {name: replace(batch, ts_ns=_rising(batch.ts_ns)) for name, batch in sources.items()}
    return Cycle(sources, max(length_ns, *(int(batch.ts_ns[-1]) + 1 for batch in sources.values())))


def _rising(ts_ns: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same stamps, none twice."""
    ordinals = np.arange(len(ts_ns))
    return np.maximum.accumulate(ts_ns - ordinals) + ordinals


def _sentences(sent_ns: list[int], sentences: list[bytes]) -> FrameBatch:
    """As the serial source gives them: without the line's end."""
    lines = [sentence.rstrip(b"\r\n") for sentence in sentences]
    width = -(-max(map(len, lines)) // 8) * 8
    data = np.frombuffer(b"".join(line.ljust(width, b"\0") for line in lines), np.uint8).reshape(len(lines), width)
    flags = np.full(len(lines), SerialFlag.SERIAL | SerialFlag.TEXT, np.uint8)
    length = np.array([len(line) for line in lines], np.uint16)
    return FrameBatch(GPS, np.array(sent_ns, np.int64), np.zeros(len(lines), np.uint32), flags, length, data)


@dataclass(frozen=True)
class Backlog:
    """What was written."""

    cycle: Cycle
    cycles_count: int
    session_id: UUID
    stretches_count: int
    seconds: float  # that writing took

    @property
    def frames(self) -> dict[str, int]:
        return {name: len(batch) * self.cycles_count for name, batch in self.cycle.sources.items()}

    @property
    def hours(self) -> float:
        return self.cycle.length_ns * self.cycles_count / 3.6e12


def write(folder: Path, cycle: Cycle, hours: float, lives: int, max_bytes: int) -> Backlog:
    """Record `hours` of cycles, in so many lives of the recording process, each of which ends as if it were killed."""
    began = time.monotonic()
    cycles_count = max(lives, round(hours * 3.6e12 / cycle.length_ns))
    clock = Clock(time.time_ns() - cycles_count * cycle.length_ns, ClockState.SET)
    session = SessionInfo(new_session_id(), {"name": "an outage", "time_base": BOOT_ID})
    for life in range(lives):
        journal = Journal.open(folder, session=session, machine_id=machine_id(), boot_id=BOOT_ID, max_bytes=max_bytes)
        journal.recover()
        mine = range(cycles_count * life // lives, cycles_count * (life + 1) // lives)
        for number, read in enumerate(_reads(cycle, mine)):
            journal.append_frames(read, clock)
            if number % SYNC_READS == 0:
                journal.sync()
        journal.close(ended=False)
    return Backlog(cycle, cycles_count, session.id, lives, time.monotonic() - began)


def _reads(cycle: Cycle, numbers: range) -> Iterator[FrameBatch]:
    for number in numbers:
        for read in cycle.reads:
            yield replace(read, ts_ns=read.ts_ns + number * cycle.length_ns)
