"""An import that is killed, or loses its connection, anywhere ends as if nothing had happened.

The importing process runs with small batches of a random size, another one at every start, so that there are many
places to be killed at and positions do not depend on batches. What SQL holds at the end is compared with an
uninterrupted import, and the books with what the capture holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import pickle
import random
import subprocess
import sys
import time
from pathlib import Path

import asyncpg
import pytest

from ingestd import demo, pipeline
from ingestd.decode.databases import load
from ingestd.imports import ImportOptions, import_file
from ingestd.pipeline import Binding
from ingestd.sources.captures import Capture

KILLS = 50
SECONDS_MAX = 240.0

IMPORTER = """
import asyncio, pathlib, pickle, random, sys
from ingestd import pipeline
from ingestd.imports import import_file
from ingestd.sources.captures import Capture

Capture.batches.__defaults__ = (random.randrange(300, 3000),)
pipeline.TRANSACTION_FRAMES = random.randrange(1, 5000)
options = pickle.loads(bytes.fromhex(sys.stdin.readline()))
print("ready", flush=True)
summary = asyncio.run(import_file(pathlib.Path(sys.argv[1]), options, sys.argv[2]))
print("done", summary.counts.frames, summary.counts.signals, flush=True)
"""

Digest = tuple[tuple[object, ...], ...]


@functools.cache
def options() -> ImportOptions:
    return ImportOptions([Binding(source, load(path)) for source, path in demo.databases().items()])


async def digest(dsn: str) -> Digest:
    """Counts and order-independent hashes of everything the views show, apart from ids and the session."""
    connection = await asyncpg.connect(dsn)
    try:
        signals = await connection.fetchrow(
            "SELECT count(*), sum(hashtextextended("
            "  row(source, channel, ts_utc, ts_mono_ns, value_num, value_text, unit, quality)::text, 0)) FROM signals"
        )
        frames = await connection.fetchrow(
            "SELECT count(*), sum(hashtextextended(row(ts_utc, ts_mono_ns, payload_json)::text, 0)) FROM frames"
        )
        books = await connection.fetchrow(
            "SELECT count(*), min(position), bool_and(completed_utc IS NOT NULL), min(decoder_state ->> 'counts')"
            " FROM feeds"
        )
        return tuple(signals), tuple(frames), tuple(books)
    finally:
        await connection.close()


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("capture") / "drive.log"
    demo.write_capture(path, 45)
    return path


@pytest.mark.slow
async def test_killed_anywhere_and_run_again(migrated: str, capture: Path) -> None:
    """At least 50 SIGKILLs at random moments, most of them in the middle of writing: the result is the same."""
    await import_file(capture, options(), migrated)
    expected = await digest(migrated)
    connection = await asyncpg.connect(migrated)
    rng = random.Random(4)
    kills, inside, deadline = 0, 0, time.monotonic() + SECONDS_MAX
    while kills < KILLS:
        assert time.monotonic() < deadline, f"only {kills} kills within {SECONDS_MAX} s"
        await connection.execute("TRUNCATE feeds, sessions, signal_chunks, frame_chunks, signal_groups CASCADE")
        finished = False
        while not finished:
            outcome = await asyncio.to_thread(run_and_kill, capture, migrated, rng.uniform(0.02, 0.6))
            finished = "done" in outcome
            if not finished:
                kills += 1
                position = await connection.fetchval("SELECT min(position) FROM feeds WHERE completed_utc IS NULL")
                inside += bool(position)
        assert await digest(migrated) == expected
    await connection.close()
    assert inside >= KILLS // 2, f"only {inside} of {kills} kills hit an import that had committed something"


def run_and_kill(capture: Path, dsn: str, seconds: float) -> str:
    """Import in a process, which is killed `seconds` after it began; what it said."""
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORTER, str(capture), dsn],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        # Parsed here once: reading the databases takes longer than most of the imports live.
        process.stdin.write(pickle.dumps(options()).hex() + "\n")
        process.stdin.flush()
        began = process.stdout.readline()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.kill()
        said = began + process.stdout.read()
        assert process.wait() in (0, -9), process.stderr.read()
    return said


@pytest.mark.slow
async def test_backends_terminated_under_an_import(
    migrated: str, capture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection terminated again and again by the server, the import goes on and loses or doubles nothing."""
    await import_file(capture, options(), migrated)
    expected = await digest(migrated)
    connection = await asyncpg.connect(migrated)
    await connection.execute("TRUNCATE feeds, sessions, signal_chunks, frame_chunks, signal_groups CASCADE")
    monkeypatch.setattr(Capture.batches, "__defaults__", (100,))
    monkeypatch.setattr(pipeline, "TRANSACTION_FRAMES", 1)
    rng, terminated, retries = random.Random(5), 0, []
    importing = asyncio.create_task(import_file(capture, options(), migrated, on_retry=retries.append))
    while not importing.done():
        await asyncio.sleep(rng.uniform(0.05, 0.2))
        terminated += await connection.fetchval(
            "SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE application_name LIKE 'ingestd/%' AND application_name <> 'ingestd/catalogue'"
            " AND datname = current_database()"
        )
    await importing
    assert await digest(migrated) == expected
    assert terminated >= 3
    assert len(retries) >= 3
    await connection.close()
