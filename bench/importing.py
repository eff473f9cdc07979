"""Import a capture as a user does, beside the database's own limit, in one run.

    python bench/importing.py [--seconds 7200] [--dsn DSN] [--json FILE]

Prints throughput, memory, linearity, bytes per sample and query times, each with its ratio to a baseline measured in
the same run. The capture is the demo car's drive, simulated for --seconds of driving. Without --dsn it starts the
distribution's PostgreSQL with default settings (it has lz4), else the embedded one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
from limits import copy_by_psql, make_payload
from server import dsn_of, fresh, server

from ingestd import demo

PYTHON = sys.executable
TURNS = 2  # The faster one counts: the machine disturbed it less.


async def fetch(dsn: str, query: str, *arguments: Any) -> asyncpg.Record:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchrow(query, *arguments)
    finally:
        await connection.close()


def dbc_arguments() -> list[str]:
    """Of the demo drive."""
    return [f"{source}:{path}" for source, path in demo.databases().items()]


def import_as_a_process(dsn: str, capture: Path, databases: Sequence[str], *options: str) -> dict[str, Any]:
    """`ingestd import` in a process of its own: wall time from its start to its end, peak memory, its own summary."""
    command = [PYTHON, "-m", "ingestd", "import", str(capture), "--dsn", dsn, "--json", *options]
    command += [part for dbc in databases for part in ("--dbc", dbc)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with ThreadPoolExecutor(1) as watcher:
        memory = watcher.submit(peak_memory_mb, process.pid)
        assert process.stdout is not None
        with process.stdout:
            output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
    if status:
        sys.exit(f"the import failed: {status}")
    summary = json.loads(output)
    return summary | {
        "wall_seconds": seconds,
        "memory_mb": memory.result(),
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
    }


def peak_memory_mb(pid: int) -> float:
    """The high-water mark of a process's memory, watched until it ends.

    Not wait4's ru_maxrss: that begins with what the parent had in memory when it forked.
    """
    peak_kb = 0
    while True:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return peak_kb / 1024
        marks = [line for line in status.splitlines() if line.startswith("VmHWM:")]
        if not marks:
            return peak_kb / 1024
        peak_kb = int(marks[0].split()[1])
        time.sleep(0.02)


async def sizes(dsn: str) -> tuple[float, float]:
    """Bytes per sample and per raw frame, with indexes and TOAST."""
    row = await fetch(
        dsn,
        """
        SELECT pg_total_relation_size('signal_chunks')
                 / (SELECT sum(frame_count * array_length(value_num, 1)) FROM signal_chunks)::float8 AS sample,
               pg_total_relation_size('frame_chunks') / (SELECT sum(frame_count) FROM frame_chunks)::float8 AS frame
        """,
    )
    return row["sample"], row["frame"]


async def best_ms(work: Callable[[], Awaitable[Any]], times: int = 7) -> float:
    """The fastest of several runs, in milliseconds: the one the machine disturbed least."""
    durations = []
    for _ in range(times):
        started = time.perf_counter()
        await work()
        durations.append(time.perf_counter() - started)
    return 1000 * min(durations)


async def queries(dsn: str) -> dict[str, float]:
    """Times of the `signals` view over one channel beside a plain table, and of an overview over 24 h."""
    connection = await asyncpg.connect(dsn)
    session = await connection.fetchval("SELECT id FROM sessions LIMIT 1")
    channel, source = await connection.fetchrow(
        "SELECT channel, source FROM signals WHERE session_id = $1 GROUP BY 1, 2 ORDER BY count(*) DESC, 1 LIMIT 1",
        session,
    )
    await connection.execute(
        f"""
        CREATE TABLE plain (channel_id integer, ts_mono_ns bigint, value_num double precision);
        INSERT INTO plain SELECT 1, ts_mono_ns, value_num FROM signals
        WHERE session_id = '{session}' AND source = '{source}' AND channel = '{channel}';
        CREATE INDEX ON plain (channel_id, ts_mono_ns) INCLUDE (value_num);
        """
    )
    await connection.execute("VACUUM ANALYZE plain")
    await connection.execute("VACUUM ANALYZE signal_chunks")
    of_view = f"FROM signals WHERE session_id = '{session}' AND source = '{source}' AND channel = '{channel}'"
    of_table = "FROM plain WHERE channel_id = 1"
    aggregates = "count(value_num), avg(value_num), min(value_num), max(value_num)"
    by_second = f"ts_mono_ns / 1000000000, {aggregates}"
    figures = {"rows": await connection.fetchval("SELECT count(*) FROM plain")}
    for name, columns, grouping in (("whole", aggregates, ""), ("by_second", by_second, " GROUP BY 1")):
        view, table = (f"SELECT {columns} {origin}{grouping}" for origin in (of_view, of_table))
        figures[f"{name}_view_ms"] = await best_ms(lambda query=view: connection.fetch(query))
        figures[f"{name}_parallel_table_ms"] = await best_ms(lambda query=table: connection.fetch(query))
        # The plain table is large enough for the planner to use several processes; chunks are few, and it does not.
        await connection.execute("SET max_parallel_workers_per_gather = 0")
        figures[f"{name}_table_ms"] = await best_ms(lambda query=table: connection.fetch(query))
        await connection.execute("RESET max_parallel_workers_per_gather")
    figures["overview_ms"] = await overview_of_a_day(connection)
    await connection.close()
    return figures


async def overview_of_a_day(connection: asyncpg.Connection) -> float:
    """Milliseconds of signals_overview over 24 h of one channel at 100 Hz, 1,000 points."""
    session = UUID(int=24)
    group = await connection.fetchval(
        "SELECT group_id FROM signal_chunks GROUP BY 1 ORDER BY sum(frame_count) DESC LIMIT 1"
    )
    # A day of the same group: its fullest chunk, again and again, 41 s after the other.
    await connection.execute(
        """
        INSERT INTO signal_chunks (session_id, group_id, mono_start_ns, mono_end_ns, utc_offset_ns, clock_state,
            frame_count, ts_mono_ns, value_num, value_min, value_max, value_mean, value_count)
        SELECT $1, group_id, d.t, d.t + 40950000000, 0, 0, frame_count,
            ARRAY(SELECT d.t + i * 10000000::bigint FROM generate_series(0, frame_count - 1) i), value_num, value_min,
            value_max, value_mean, value_count
        FROM (SELECT * FROM signal_chunks WHERE group_id = $2 ORDER BY frame_count DESC LIMIT 1) c
        CROSS JOIN generate_series(0, 86400000000000 - 1, 40960000000::bigint) AS d(t)
        """,
        session,
        group,
    )
    await connection.execute("VACUUM ANALYZE signal_chunks")
    source, channel = await connection.fetchrow(
        "SELECT source, channel FROM signal_groups g JOIN channels ch ON ch.group_id = g.id WHERE g.id = $1 LIMIT 1",
        group,
    )
    query = "SELECT * FROM signals_overview($1, $2, $3, 'epoch', timestamptz 'epoch' + interval '1 day', 1000)"
    assert len(await connection.fetch(query, session, source, channel)) > 900
    return await best_ms(lambda: connection.fetch(query, session, source, channel))


async def run(dsn: str, seconds: int, folder: Path) -> dict[str, Any]:
    """Import the drive, its half and its tenth; then ask SQL."""
    files = {}
    for name, share in (("whole", 1.0), ("half", 0.5), ("tenth", 0.1)):
        files[name] = folder / f"{name}.log"
        demo.write_capture(files[name], seconds * share)
    imports: dict[str, dict[str, Any]] = {}
    for name, path in files.items():
        turns = [import_as_a_process(await fresh(dsn, f"bench_{name}"), path, dbc_arguments()) for _ in range(TURNS)]
        imports[name] = min(turns, key=lambda turn: turn["wall_seconds"])
    whole, half, tenth = imports["whole"], imports["half"], imports["tenth"]
    say(f"capture: {whole['frames']:,} frames, {files['whole'].stat().st_size / 1e6:.0f} MB, "
        f"{whole['signals'] / whole['frames']:.1f} signals a frame")  # fmt: skip
    rate = whole["signals"] / whole["wall_seconds"]
    say(f"import, whole process: {rate:,.0f} signals/s, {whole['frames'] / whole['wall_seconds']:,.0f} frames/s "
        f"({whole['signals']:,} in {whole['wall_seconds']:.2f} s, CPU {whole['cpu_seconds']:.2f} s)")  # fmt: skip
    payload = make_payload(files["whole"], dbc_arguments(), folder)
    limit_bytes, limit_seconds = payload.nbytes, copy_by_psql(await fresh(dsn, "bench_limit"), payload)
    payload.remove()
    ratio = whole["wall_seconds"] / limit_seconds
    say(f"psql \\copy of the same bytes: {whole['signals'] / limit_seconds:,.0f} signals/s "
        f"({limit_bytes / 1e6:.0f} MB in {limit_seconds:.2f} s): the import takes {ratio:.2f}x as long")  # fmt: skip

    # What a frame costs late in the file beside early in it; starting the process is no part of either.
    late = (whole["wall_seconds"] - half["wall_seconds"]) / (whole["frames"] - half["frames"])
    early = (half["wall_seconds"] - tenth["wall_seconds"]) / (half["frames"] - tenth["frames"])
    say(f"a frame in the second half of the file takes {late / early:.2f}x as long as one in the first")
    say(f"peak memory: {whole['memory_mb']:.0f} MB; of a tenth of the file: {tenth['memory_mb']:.0f} MB")
    sample, frame = await sizes(dsn_of(dsn, "bench_whole"))
    say(f"stored: {sample:.2f} B per sample, {frame:.2f} B per raw frame, indexes included")
    times = await queries(dsn_of(dsn, "bench_half"))
    for name, what in (("whole", "aggregated"), ("by_second", "aggregated by second")):
        view, table, parallel = (times[f"{name}_{which}_ms"] for which in ("view", "table", "parallel_table"))
        say(f"one channel, {times['rows']:,} samples, {what}: view {view:.1f} ms; plain table with a covering index, "
            f"one process {table:.1f} ms: {view / table:.2f}x; "
            f"several {parallel:.1f} ms: {view / parallel:.2f}x")  # fmt: skip
    say(f"signals_overview, 24 h at 100 Hz, 1,000 points: {times['overview_ms']:.2f} ms")
    return times | {
        "signals_per_second": rate, "limit_seconds": limit_seconds,
        "late_to_early": late / early, "bytes_per_sample": sample, "bytes_per_frame": frame, "imports": imports,
    }  # fmt: skip


def say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=int, default=7200, help="of driving in the capture")
    parser.add_argument("--dsn", help="a server where databases may be made")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    with server(arguments.dsn) as (dsn, what), tempfile.TemporaryDirectory(prefix="ingestd-bench-") as folder:
        say(f"{what}; Python {platform.python_version()}, {os.cpu_count()} cores, {platform.machine()}")
        result = asyncio.run(run(dsn, arguments.seconds, Path(folder)))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
