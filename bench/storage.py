"""How signals could be stored: what each way costs the server, takes on the disk, and makes of a query.

    python bench/storage.py [--frames 1000000] [--dsn DSN] [--json FILE]

Decision 0008 rests on it. Every variant stores the same samples of the demo car in a table of its own, by one COPY; the
backend's processor time is what /proc says of its process. Reading asks for the mean of one channel over everything,
and for ten seconds of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import asyncpg
import numpy as np
from numpy.typing import NDArray
from server import dsn_of, fresh, server

from ingestd import demo
from ingestd.chunks import COPY_HEADER, COPY_TRAILER, FLOAT8, INT2, INT8, _array
from ingestd.decode.databases import load
from ingestd.imports import feed_items
from ingestd.model import SignalBatch
from ingestd.pipeline import Binding, Decoders
from ingestd.sources.captures import open_capture

TICKS = 100  # a second, in /proc/PID/stat


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to store: how many frames a chunk has, how many channels a row, what a value is, how it is compressed."""

    name: str
    frames: int = 4096
    channels: int = 32
    as_integers: bool = False
    compression: str = "lz4"  # or pglz, or none
    settings: Sequence[str] = ()
    table: Sequence[str] = ()  # what to alter of the table


VARIANTS = (
    Variant("as it is: 4,096 frames, lz4"),
    Variant("chunks of 2,048", frames=2048),
    Variant("chunks of 1,024", frames=1024),
    Variant("chunks of 512", frames=512),
    Variant("chunks of 100", frames=100),
    Variant("pglz", compression="pglz"),
    Variant("pglz, chunks of 512", frames=512, compression="pglz"),
    Variant("not compressed", compression="none"),
    Variant("toast_tuple_target 8160, 512", frames=512, table=("SET (toast_tuple_target = 8160)",)),
    Variant(
        "STORAGE MAIN, chunks of 512", frames=512, table=("ALTER ts SET STORAGE MAIN, ALTER value SET STORAGE MAIN",)
    ),
    Variant("a row for each channel", channels=1),
    Variant("at most 4 channels a row", channels=4),
    Variant("raw integers, scaled when read", as_integers=True),
    Variant("synchronous_commit = off", settings=("SET synchronous_commit = off",)),
    Variant("wal_compression = lz4", settings=("SET wal_compression = lz4",)),
)


@dataclass(frozen=True, slots=True)
class Result:
    """What a variant costs; nanoseconds and bytes are for a sample."""

    name: str
    backend_ns: float
    wall_ns: float
    bytes: float
    wal_bytes: float
    mean_ms: float
    window_ms: float


def samples(capture: Path) -> list[SignalBatch]:
    """All of a capture's signals."""
    decoders = Decoders([Binding(source, load(path)) for source, path in demo.databases().items()])
    return [
        batch
        for item in feed_items(open_capture(capture))
        for frames in item.frames
        for batch in decoders.of(frames.source).decode(frames, {}).batches
    ]


def rows(variant: Variant, batches: Sequence[SignalBatch]) -> Iterator[bytes]:
    """The rows of a table (grp, first, last, ts, value) in the binary format of COPY."""
    for batch in batches:
        for first_channel in range(0, len(batch.group.channels), variant.channels):
            group = batch.group.id + first_channel
            for begin in range(0, len(batch), variant.frames):
                ts_ns = batch.ts_ns[begin : begin + variant.frames]
                value = batch.value[first_channel : first_channel + variant.channels, begin : begin + variant.frames]
                head = struct.pack(">hiqiqiq", 5, 8, group, 8, int(ts_ns[0]), 8, int(ts_ns[-1]))
                # What an instrument sends has some 16 bits; the scale would stand in `channels`.
                values = _array(np.rint(value).astype(np.int16), INT2) if variant.as_integers else _array(value, FLOAT8)
                yield b"".join([head, *_array(ts_ns, INT8), *values])


def payload(variant: Variant, batches: Sequence[SignalBatch]) -> list[bytes]:
    """The bytes of one COPY, in pieces as the writer sends them."""
    data = memoryview(b"".join([COPY_HEADER, *rows(variant, batches), COPY_TRAILER]))
    return [bytes(data[at : at + 65_536]) for at in range(0, len(data), 65_536)]


async def measure(dsn: str, variant: Variant, batches: Sequence[SignalBatch]) -> Result:
    """Store, look at the size, and read."""
    pieces, count = payload(variant, batches), sum(batch.value.size for batch in batches)
    connection = await asyncpg.connect(dsn)
    kind = "smallint[]" if variant.as_integers else "double precision[]"
    await connection.execute("DROP TABLE IF EXISTS stored")
    await connection.execute(
        f"CREATE TABLE stored (grp bigint, first bigint, last bigint, ts bigint[], value {kind}); "
        "CREATE INDEX ON stored (grp, last, first)"
    )
    if variant.compression == "none":
        await connection.execute("ALTER TABLE stored ALTER ts SET STORAGE EXTERNAL, ALTER value SET STORAGE EXTERNAL")
    else:
        await connection.execute(f"SET default_toast_compression = {variant.compression}")
    for change in variant.table:
        await connection.execute(f"ALTER TABLE stored {change}")
    for setting in variant.settings:
        await connection.execute(setting)

    async def source() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    await connection.execute("CHECKPOINT")
    wal = await connection.fetchval("SELECT pg_current_wal_insert_lsn()")
    began, used = time.perf_counter(), backend_seconds(connection)
    await connection.copy_to_table("stored", source=source(), format="binary")
    wall, used = time.perf_counter() - began, backend_seconds(connection) - used
    written = await connection.fetchval("SELECT pg_current_wal_insert_lsn() - $1::pg_lsn", wal)
    await connection.execute("VACUUM ANALYZE stored")
    size = await connection.fetchval("SELECT pg_total_relation_size('stored')")
    group, position, first = wanted(batches)
    if variant.channels < 32:
        group, position = (
            group + (position - 1) // variant.channels * variant.channels,
            (position - 1) % variant.channels + 1,
        )
    scaled = "v * 0.5 + 1.0" if variant.as_integers else "v"
    query = (
        f"SELECT avg({scaled}) FROM stored, unnest(ts, value[{position}:{position}]) AS u (t, v) "
        f"WHERE grp = {group} AND last >= {{low}} AND first <= {{high}} AND t BETWEEN {{low}} AND {{high}}"
    )
    whole = await best_ms(connection, query.format(low=0, high=2**62))
    window = await best_ms(connection, query.format(low=first, high=first + 10_000_000_000))
    await connection.execute("DROP TABLE stored")
    await connection.close()
    return Result(
        variant.name, 1e9 * used / count, 1e9 * wall / count, size / count, float(written) / count, whole, window
    )


def wanted(batches: Sequence[SignalBatch]) -> tuple[int, int, int]:
    """A group of many channels, the position of one of them, and an instant in the middle."""
    widest = max(batches, key=lambda batch: (len(batch.group.channels), len(batch)))
    same = [batch for batch in batches if batch.group.id == widest.group.id]
    return widest.group.id, 1 + len(widest.group.channels) // 2, int(same[len(same) // 2].ts_ns[0])


def backend_seconds(connection: asyncpg.Connection) -> float:
    """Processor time of the connection's backend."""
    fields = Path(f"/proc/{connection.get_server_pid()}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


async def best_ms(connection: asyncpg.Connection, query: str) -> float:
    """The fastest of five."""
    found = []
    for _ in range(5):
        began = time.perf_counter()
        await connection.fetchval(query)
        found.append(1e3 * (time.perf_counter() - began))
    return min(found)


async def two_connections(dsn: str, batches: Sequence[SignalBatch]) -> tuple[float, float]:
    """Signals per second of one COPY, and of two at the same time with half of the samples each."""
    count, half = sum(batch.value.size for batch in batches), len(batches) // 2
    parts = [payload(VARIANTS[0], batches[:half]), payload(VARIANTS[0], batches[half:])]

    async def copy(connection: asyncpg.Connection, given: Sequence[list[bytes]]) -> None:
        for pieces in given:

            async def source(pieces: list[bytes] = pieces) -> AsyncIterator[bytes]:
                for piece in pieces:
                    yield piece

            await connection.copy_to_table("stored", source=source(), format="binary")

    rates = []
    for shares in ([parts], [[parts[0]], [parts[1]]]):
        connections = [await asyncpg.connect(dsn) for _ in shares]
        await connections[0].execute(
            "DROP TABLE IF EXISTS stored; CREATE TABLE stored (grp bigint, first bigint, last bigint, ts bigint[],"
            " value double precision[]); CREATE INDEX ON stored (grp, last, first)"
        )
        for connection in connections:
            await connection.execute("SET default_toast_compression = lz4")
        began = time.perf_counter()
        await asyncio.gather(*(copy(*each) for each in zip(connections, shares, strict=True)))
        rates.append(count / (time.perf_counter() - began))
        for connection in connections:
            await connection.close()
    return rates[0], rates[1]


def encoders(batches: Sequence[SignalBatch]) -> dict[str, float]:
    """Nanoseconds a value for ways to make array elements: length, then the value, big-endian."""
    value = np.concatenate([batch.value.ravel() for batch in batches])[:4_000_000]
    element = np.dtype([("length", ">i4"), ("value", ">f8")])

    def strided() -> object:
        elements = np.empty(len(value), element)
        elements["length"] = 8
        elements["value"] = value
        return elements

    def template() -> object:
        words: NDArray[np.uint8] = np.empty((len(value), 12), np.uint8)
        words[:, :4] = (0, 0, 0, 8)
        words[:, 4:] = value.astype(">f8").view(np.uint8).reshape(-1, 8)
        return words

    def packed() -> object:
        return struct.pack(f">{2 * 200_000}d", *np.repeat(value[:200_000], 2).tolist())

    ways: dict[str, tuple[Callable[[], object], int]] = {
        "numpy, two strided assignments (ours)": (strided, len(value)),
        "numpy, bytes side by side": (template, len(value)),
        "struct.pack": (packed, 400_000),
    }
    found = {}
    for name, (way, count) in ways.items():
        times = []
        for _ in range(3):
            began = time.process_time()
            way()
            times.append(time.process_time() - began)
        found[name] = 1e9 * min(times) / count
    return found


async def run(dsn: str, frames: int, folder: Path) -> dict[str, Any]:
    """All of it, a line each."""
    capture = folder / "drive.log"
    demo.write_capture(capture, frames / 664)
    batches = samples(capture)
    print(f"{sum(batch.value.size for batch in batches):,} samples; nanoseconds and bytes are for a sample")
    print(f"{'':34} backend    wall   bytes     WAL   mean of a channel   ten seconds of it")
    database = await fresh(dsn, "bench_storage", schema=False)
    results: list[Result] = []
    for variant in VARIANTS:
        best = min([await measure(database, variant, batches) for _ in range(3)], key=lambda each: each.backend_ns)
        results.append(best)
        print(
            f"{best.name:34} {best.backend_ns:4.0f} ns {best.wall_ns:4.0f} ns {best.bytes:5.2f} B "
            f"{best.wal_bytes:5.2f} B {best.mean_ms:14.2f} ms {best.window_ms:14.2f} ms",
            flush=True,
        )
    one, two = await two_connections(dsn_of(dsn, "bench_storage"), batches)
    print(f"one COPY {one / 1e6:.1f} M samples/s; two at the same time {two / 1e6:.1f} M: {two / one:.2f}x")
    encoding = encoders(batches)
    for name, ns in encoding.items():
        print(f"encoding with {name}: {ns:.1f} ns a value")
    return {"variants": [asdict(result) for result in results], "two_to_one": two / one, "encoding": encoding}


def main() -> None:
    """Measure on the distribution's server, or the one given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--dsn", help="a server where databases may be made")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    with server(arguments.dsn) as (dsn, what), tempfile.TemporaryDirectory(prefix="ingestd-bench-") as folder:
        print(what)
        result = asyncio.run(run(dsn, arguments.frames, Path(folder)))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
