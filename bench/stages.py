"""What each stage of the path costs by itself, in processor time; beside the library a user would call for it.

    python bench/stages.py [--capture FILE --dbc [SOURCE:]FILE…] [--dsn DSN] [--without-database]

Without --capture it is the demo car's drive. Each stage gets what the one before it made. The run that took least of
three counts: the machine disturbed it least. Processor time is that of this process, all threads; COPY's is given with
the server's own beside it, where the server is ours to look at.

    parse      candump text to columns                             (import)
    receive    what recvmmsg has filled in to columns; without the system call, which only a bus shows: bench/live.py
    journal    records of 20 ms, with their checksums, written; synced every hundred
    read back  the journal, verified, to columns
    decode     columns of frames to columns of signals
    encode     signals and summaries to the bytes of COPY
    encode raw frames to the bytes of COPY
    COPY       these bytes through asyncpg to the server
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import can
import cantools
import numpy as np
from live_meter import run_ns
from server import fresh, server
from wires import can_frames

from ingestd import demo
from ingestd.chunks import Placement, encode_frames, encode_signals
from ingestd.decode.databases import load
from ingestd.imports import feed_items
from ingestd.journal import Journal, SessionInfo, merge
from ingestd.model import Clock, ClockState, CopyData, Flag, FrameBatch
from ingestd.pipeline import Binding, Decoders
from ingestd.sources.can_socket import CAN_FRAME_BYTES, CANFD_FRAME_BYTES, FRAMES_MAX, columns
from ingestd.sources.captures import open_capture
from ingestd.store.connection import connect

LIBRARY_FRAMES = 30_000  # The libraries go frame by frame; their cost does not depend on how many.
READ_NS = 20_000_000  # how often a bus is read
SYNC_READS = 100
BOOT_ID = "0b0b0b0b-0000-4000-8000-000000000001"
PLACEMENT = Placement(UUID(int=1), 0, ClockState.SET)


@dataclass(frozen=True, slots=True)
class Stage:
    """What one stage takes for the whole capture."""

    name: str
    cpu_ns: float
    frames: int
    signals: int
    peer: str = ""  # a library that does the same
    peer_ns: float = 0.0  # … and its processor time for as much
    server_ns: float = 0.0

    @property
    def ns_per_signal(self) -> float:
        return self.cpu_ns / self.signals

    @property
    def ns_per_frame(self) -> float:
        return self.cpu_ns / self.frames


def least(work: Callable[[], Any], times: int = 3) -> tuple[float, Any]:
    """Nanoseconds of processor time of the cheapest of several runs, and what the last one returned."""
    best, result = float("inf"), None
    for _ in range(times):
        started = time.process_time_ns()
        result = work()
        best = min(best, time.process_time_ns() - started)
    return best, result


def with_python_can(capture: Path) -> list[can.Message]:
    """The first messages of a capture."""
    messages = []
    with can.LogReader(capture) as reader:
        for message in reader:
            messages.append(message)
            if len(messages) == LIBRARY_FRAMES:
                break
    return messages


def with_cantools(messages: list[can.Message], databases: dict[str | None, Any]) -> int:
    """Decode them; how many signals that gave."""
    count = 0
    for message in messages:
        database = databases.get(str(message.channel)) or databases.get(None)
        try:
            definition = database.get_message_by_frame_id(message.arbitration_id)
        except KeyError:
            continue
        count += len(definition.decode(bytes(message.data), decode_choices=False, allow_truncated=True))
    return count


def reads_of(batches: Sequence[FrameBatch]) -> list[FrameBatch]:
    """The batches as a bus would have given them: what came within 20 ms."""
    found = []
    for batch in batches:
        ticks = batch.ts_ns // READ_NS
        edges = [0, *(np.flatnonzero(np.diff(ticks)) + 1).tolist(), len(batch)]
        found += [batch[begin:end] for begin, end in pairwise(edges)]
    return found


def receive(batches: Sequence[FrameBatch]) -> Callable[[], None]:
    """Frames as the kernel has them, as many as one call reads, to columns."""
    made = []
    for batch in batches:
        frame_bytes = np.where(batch.flags & Flag.FD.value, CANFD_FRAME_BYTES, CAN_FRAME_BYTES)
        frames = can_frames(batch)
        calls = [slice(at, at + FRAMES_MAX) for at in range(0, len(batch), FRAMES_MAX)]
        made += [(frames[call], frame_bytes[call]) for call in calls]

    def work() -> None:
        for frames, frame_bytes in made:
            columns(frames, frame_bytes)

    return work


def write_journal(folder: Path, reads: Sequence[FrameBatch]) -> None:
    """Records, as the daemon writes them."""
    session = SessionInfo(UUID(int=1), {"name": "stages"})
    journal = Journal.open(folder, session=session, machine_id="bench", boot_id=BOOT_ID, max_bytes=8 << 30)
    try:
        for number, read in enumerate(reads):
            journal.append_frames(read, Clock(0, ClockState.SET))
            if number % SYNC_READS == 0:
                journal.sync()
        journal.sync()
    finally:
        journal.close(ended=False)


def read_journal(folder: Path) -> int:
    """Everything in it, in batches; how many frames."""
    session = SessionInfo(UUID(int=2), {"name": "stages"})
    journal = Journal.open(folder, session=session, machine_id="bench", boot_id=BOOT_ID, max_bytes=8 << 30)
    try:
        journal.recover()
        frames = 0
        for stretch in journal.stretches():
            reader = journal.reader(stretch.id, 0)
            while (result := reader.read(2_000_000)).records:
                by_source: dict[str, list[Any]] = {}
                for record in result.records:
                    if record.frames_count:
                        by_source.setdefault(record.source, []).append(record)
                frames += sum(len(merge(records)) for records in by_source.values())
        return frames
    finally:
        journal.close(ended=False)


async def copy_into(dsn: str, copies: Sequence[CopyData]) -> tuple[float, float]:
    """Nanoseconds of this process and of the server's, for COPY of all that; 0 for a server that is not here."""
    connection = await connect(dsn, "stages")
    backend = Path(f"/proc/{connection.get_server_pid()}")

    def of_server() -> int:
        with contextlib.suppress(OSError):
            return run_ns(backend)
        return 0

    async def pieces_of(copy: CopyData) -> AsyncIterator[bytearray]:
        for piece in copy.pieces:
            yield piece

    try:
        ours, servers = time.process_time_ns(), of_server()
        for copy in copies:
            source = pieces_of(copy)
            await connection.copy_to_table(copy.table, source=source, columns=copy.columns, format="binary")
        return time.process_time_ns() - ours, of_server() - servers
    finally:
        connection.terminate()


def measure(
    capture: Path, sources: Sequence[tuple[str | None, Path]], folder: Path, dsn: str | None
) -> Iterator[Stage]:
    """Every stage; COPY only with a server where databases may be made. Two stages have a library beside them."""
    decoders = Decoders([Binding(source, load(path)) for source, path in sources])
    parse, items = least(lambda: list(feed_items(open_capture(capture))))
    batches = [batch for item in items for batch in item.frames]
    decode, decoded = least(lambda: [decoders.of(batch.source).decode(batch, {}) for batch in batches])
    frames, signals = sum(map(len, batches)), sum(each.counts.signals for each in decoded)

    def stage(name: str, cpu_ns: float, **more: Any) -> Stage:
        return Stage(name, cpu_ns, frames, signals, **more)

    read, messages = least(lambda: with_python_can(capture))
    databases = {source: cantools.database.load_file(path, strict=False) for source, path in sources}
    by_library, library_signals = least(lambda: with_cantools(messages, databases))
    yield stage("parse", parse, peer="python-can", peer_ns=read / len(messages) * frames)
    yield stage("receive", least(receive(batches))[0])
    reads = reads_of(batches)
    folders = (folder / f"journal{number}" for number in range(3))
    yield stage("journal", least(lambda: write_journal(next(folders), reads))[0])
    yield stage("read back", least(lambda: read_journal(folder / "journal0"))[0])
    yield stage("decode", decode, peer="cantools", peer_ns=by_library / library_signals * signals)
    encode, of_signals = least(lambda: [encode_signals(each.batches, PLACEMENT) for each in decoded])
    yield stage("encode", encode)
    encode, of_frames = least(lambda: [encode_frames([batch], PLACEMENT) for batch in batches])
    yield stage("encode raw frames", encode)
    if dsn is not None:
        for name, copies in (("COPY", of_signals), ("COPY raw frames", of_frames)):
            turns = [asyncio.run(copy_into(asyncio.run(fresh(dsn, "stages")), copies)) for _ in range(3)]
            ours, servers = min(turns, key=sum)
            yield stage(name, ours, server_ns=servers)


def show(stages: Sequence[Stage]) -> Iterator[str]:
    """The table."""
    yield f"{'CPU':20}{'ns/signal':>12}{'ns/frame':>12}{'the library':>14}{'ratio':>8}{'the server':>14}"
    for each in stages:
        line = f"{each.name:20}{each.ns_per_signal:12.1f}{each.ns_per_frame:12.0f}"
        if each.peer:
            line += f"{each.peer_ns / each.signals:14.0f}{each.peer_ns / each.cpu_ns:7.0f}x  {each.peer}"
        elif each.server_ns:
            line += f"{'':22}{each.server_ns / each.signals:14.1f}"
        yield line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--capture", type=Path, help="another capture, with --dbc")
    parser.add_argument("--dbc", action="append", default=[], metavar="[SOURCE:]FILE")
    parser.add_argument("--dsn", help="a server where databases may be made")
    parser.add_argument("--without-database", action="store_true", help="no COPY")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ingestd-bench-")))
        dsn = None if arguments.without_database else stack.enter_context(server(arguments.dsn))[0]
        capture, entries = arguments.capture, [entry.rpartition(":") for entry in arguments.dbc]
        sources: list[tuple[str | None, Path]] = [(source or None, Path(path)) for source, _, path in entries]
        if capture is None:
            capture, sources = folder / "demo.log", [*demo.databases().items()]
            demo.write_capture(capture, 600)
        stages = list(measure(capture, sources, folder, dsn))
        print(f"{capture.name}: {stages[0].frames:,} frames, {stages[0].signals:,} signals")
        print("\n".join(show(stages)))


if __name__ == "__main__":
    main()
