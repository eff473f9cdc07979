"""ingestd beside what people do instead, and beside what nothing can be faster than: one input, one server, one run.

    python bench/compare.py [--frames 5000000] [--peer-frames 100000] [--dsn DSN]

The input is a synthetic load (generate.py). Peers are slow: they get the beginning of the same load, the slowest of
them a shorter one, and are compared by rate. Each is checked: what a peer has stored is equal to what ingestd stores
of the same frames, row for row (source, channel, stamp, value); and what ingestd stored is what the load says.

ingestd's time is that of the whole process, from its start to its end, with the SHA-256 of the file and the raw frames,
which the peers do not store. A peer's time is from the first message to the last commit, without its start.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import asyncpg
import generate
import limits
import truth
from importing import fetch, import_as_a_process
from server import fresh, server

PEERS = Path(__file__).with_name("peers")
PYTHON = sys.executable
THEIRS = "(SELECT source, channel, ts_ns, value FROM naive_signals) AS stored"
OURS = "(SELECT source, channel, ts_mono_ns AS ts_ns, value_num AS value FROM signals) AS stored"
FINGERPRINT = """
SELECT count(*) AS count, sum(hashtextextended(source || channel || ts_ns || ' ' || value, 0))::text AS hash FROM {}
"""


@dataclass(frozen=True, slots=True)
class Peer:
    """A script of peers/, and which part of the input it gets."""

    name: str
    script: str
    share: float = 1.0  # of the peers' frames
    kind: str = "log"


STORING = (
    Peer("python-can + cantools + asyncpg COPY", "asyncpg_copy.py"),
    Peer("python-can + cantools + asyncpg executemany", "asyncpg_executemany.py", 0.3),
    Peer("python-can + cantools + SQLAlchemy bulk insert", "sqlalchemy_insert.py", 0.3),
    Peer("asammdf bus logging extraction + COPY", "asammdf_copy.py", kind="mf4"),
)
CAPTURING = Peer("python-can Logger to SQLite (captures only)", "sqlite_logger.py", 3.0)
SIGNALS_ALONE = "psql \\copy, of the signals alone"
LIMITS: dict[str, Callable[[str, limits.Payload, Path], float]] = {
    "psql \\copy of ready-made bytes": lambda dsn, payload, _: limits.copy_by_psql(dsn, payload),
    SIGNALS_ALONE: lambda dsn, payload, _: limits.copy_by_psql(dsn, payload),
    "COPY FROM a file on the server": lambda dsn, payload, _: limits.copy_by_server(dsn, payload),
    "write to a file, fdatasync": lambda _, payload, folder: limits.write_file(payload, folder),
    "copy in memory": lambda _, payload, __: limits.copy_in_memory(payload),
}


@dataclass(frozen=True, slots=True)
class Rate:
    """One line of the comparison."""

    name: str
    kind: str  # ingestd, peer, capture or limit
    frames: int
    signals: int
    seconds: float
    checked: str  # what was found equal to what
    memory_mb: float = 0.0  # at most, of ingestd's process

    @property
    def signals_per_second(self) -> float:
        return self.signals / self.seconds

    @property
    def frames_per_second(self) -> float:
        return self.frames / self.seconds


async def fingerprint(dsn: str, table: str) -> tuple[int, str]:
    """Count of samples, and a sum of hashes over all that tells them apart."""
    connection = await asyncpg.connect(dsn)
    try:
        return tuple(await connection.fetchrow(FINGERPRINT.format(table)))
    finally:
        await connection.close()


def run_script(peer: Peer, *arguments: str) -> tuple[int, float]:
    """How many rows it wrote, and in how many seconds."""
    command = [PYTHON, str(PEERS / peer.script), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    said = json.loads(done.stdout)
    return int(said["count"]), float(said["seconds"])


class Slices:
    """The beginnings of a load that peers get, and what ingestd stores of each."""

    def __init__(self, dsn: str, load: generate.Load, folder: Path) -> None:
        self._dsn, self._load, self._folder = dsn, load, folder
        self._made: dict[int, tuple[generate.Made, tuple[int, str]]] = {}

    def of(self, frames: int) -> tuple[generate.Made, tuple[int, str]]:
        """So many frames of it, and the fingerprint of what they give."""
        if frames not in self._made:
            made = generate.generate(self._folder / f"slice{frames}", replace(self._load, frames=frames))
            dsn = asyncio.run(fresh(self._dsn, f"slice_{frames}"))
            import_as_a_process(dsn, made.capture, made.dbc_arguments)
            check(dsn, made)
            self._made[frames] = made, asyncio.run(fingerprint(dsn, OURS))
        return self._made[frames]


def check(dsn: str, made: generate.Made, frames: int | None = None) -> None:
    """End if the database holds other samples than the load says, or another number of raw frames."""
    wrong = asyncio.run(truth.differences(dsn, made.channels))
    row = asyncio.run(fetch(dsn, "SELECT coalesce(sum(frame_count), 0) AS n FROM frame_chunks"))
    if row["n"] != (made.frames if frames is None else frames):
        wrong.append(f"{row['n']:,} raw frames of {made.frames:,}")
    if wrong:
        sys.exit("ingestd stored something else than was generated:\n" + "\n".join(wrong[:10]))


def ours(dsn: str, made: generate.Made, *options: str) -> Rate:
    """`ingestd import` of the whole load, checked against what the load says."""
    database = asyncio.run(fresh(dsn, f"compare_ours{'_alone' * bool(options)}"))
    summary = import_as_a_process(database, made.capture, made.dbc_arguments, *options)
    frames = 0 if "--no-frames" in options else made.frames
    check(database, made, frames)
    checked = "count and sum of each channel" + f"{', number of frames' * bool(frames)}: the load's"
    return Rate(
        " ".join(["ingestd import", *options]), "ingestd", summary["frames"], summary["signals"],
        summary["wall_seconds"], checked, summary["memory_mb"],
    )  # fmt: skip


def storing(dsn: str, peer: Peer, slices: Slices, frames: int) -> Rate:
    """A peer that stores signals, checked against what ingestd stores."""
    made, expected = slices.of(frames)
    capture = made.capture if peer.kind == "log" else generate.convert(made.capture, peer.kind)
    database = asyncio.run(fresh(dsn, "compare_peer", schema=False))
    count, seconds = run_script(peer, database, str(capture), *made.dbc_arguments)
    found = asyncio.run(fingerprint(database, THEIRS))
    if found != expected or count != made.signals:
        sys.exit(f"{peer.name} and ingestd stored different samples: {found} and {expected}")
    return Rate(peer.name, "peer", frames, count, seconds, "every sample: ingestd's")


def capturing(peer: Peer, slices: Slices, frames: int, folder: Path) -> Rate:
    """A peer that stores frames as they are; its rate in signals is what could be decoded from them later."""
    made, _ = slices.of(frames)
    path = folder / "logged.sqlite"
    count, seconds = run_script(peer, str(path), str(made.capture))
    with sqlite3.connect(path) as connection:
        [stored] = connection.execute("SELECT count(*) FROM messages").fetchone()
    connection.close()
    path.unlink()
    if not count == stored == frames:
        sys.exit(f"{peer.name} has {stored} of {frames} frames")
    return Rate(peer.name, "capture", frames, made.signals, seconds, "number of frames")


def limiting(dsn: str, made: generate.Made, folder: Path) -> Iterator[Rate]:
    """The limits, with the bytes that ingestd sends for the whole load."""
    payload = limits.make_payload(made.capture, made.dbc_arguments, folder)
    for name, limit in LIMITS.items():
        given = payload.of("signal_chunks") if name == SIGNALS_ALONE else payload
        database = asyncio.run(fresh(dsn, "compare_limit"))
        try:
            seconds = limit(database, given, folder)
        except subprocess.CalledProcessError:
            print(f"not measured: {name}: the server says no", flush=True)
            continue
        checked = f"{given.nbytes / 1e6:,.0f} MB"
        yield Rate(name, "limit", payload.frames, payload.signals, seconds, checked)
    payload.remove()


def compare(dsn: str, load: generate.Load, peer_frames: int, folder: Path) -> Iterator[Rate]:
    """All of it, ingestd first. Ends the process if somebody stored something else."""
    folder.chmod(0o755)  # The server reads a file in it.
    made = generate.generate(folder / "load", load)
    slices = Slices(dsn, load, folder)
    yield ours(dsn, made)
    yield ours(dsn, made, "--no-frames")
    for peer in STORING:
        yield storing(dsn, peer, slices, int(peer.share * peer_frames))
    yield capturing(CAPTURING, slices, int(CAPTURING.share * peer_frames), folder)
    yield from limiting(dsn, made, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--frames", type=int, default=5_000_000, help="of the load (default %(default)s)")
    parser.add_argument("--peer-frames", type=int, default=100_000, help="for the peers (default %(default)s)")
    parser.add_argument("--dsn", help="a server where databases may be made")
    arguments = parser.parse_args()
    with server(arguments.dsn) as (dsn, what), tempfile.TemporaryDirectory(prefix="ingestd-bench-") as folder:
        print(what, flush=True)
        load = generate.Load(frames=arguments.frames)
        for rate in compare(dsn, load, arguments.peer_frames, Path(folder)):
            print(f"{rate.name:50}{rate.signals_per_second:16,.0f} signals/s   {rate.checked}", flush=True)


if __name__ == "__main__":
    main()
