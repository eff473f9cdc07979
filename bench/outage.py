"""A day without a database: how fast the backlog drains while recording goes on, and whether all of it is there.

    python bench/outage.py [--hours 24] [--rate 1000] [--live-rate 1000] [--lives 3]
                           [--embedded | --dsn DSN] [--journal FOLDER] [--json FILE]

Writes a journal with the frames of --hours, at --rate frames a second over two buses, and with a GPS receiver's
sentences, compressed in time (outage_journal.py); then starts `ingestd run` on it, with a PostgreSQL, while --live-rate
frames a second come in on the first bus (UDP on the loopback interface stands in for it, see live_stand_in.c). Time
runs from the start of the process to the commit of the last frame of the backlog. Afterwards every chunk is compared,
by SHA-256, with what was recorded at that place: exactly once and in order means that all of them are equal.

--journal keeps the journal there and takes it from there the next time. Needs a C compiler.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import pickle
import pty
import shutil
import subprocess
import sys
import tempfile
import time
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from live import compile_stand_in, machine
from live_cost import usage
from live_guest import Daemon, Probe, Sender, family, wait_until
from outage_journal import BUSES, DIGEST, GPS, Backlog, make_cycle, write
from server import fresh, server

from ingestd import demo

BYTES_MAX = 16 << 30  # the journal's budget: a user who wants to bridge a day sets one that holds it
DRAIN_SECONDS_MAX = 3600.0
SAMPLE_SECONDS = 1.0
POLL_SECONDS = 0.05


def say(line: str) -> None:
    print(line, flush=True)


@contextlib.contextmanager
def silent_line(link: Path) -> Iterator[None]:
    """The GPS receiver's port: there, and nobody says anything."""
    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    link.symlink_to(os.ttyname(theirs))
    try:
        yield
    finally:
        os.close(ours)
        os.close(theirs)


class Watch:
    """Looks at SQL and at the processes while the backlog drains."""

    def __init__(self, daemon: Daemon, probe: Probe, backlog: Backlog) -> None:
        self._daemon, self._probe, self._session = daemon, probe, backlog.session_id
        self._total = sum(backlog.frames.values())
        self._seen = 0
        self.lags_ms: list[Any] = []
        self.memory: list[tuple[float, float]] = []  # seconds, MB
        self.first_s = 0.0  # when the first frames of the backlog were there

    def until_drained(self) -> float:
        """Seconds from the daemon's start."""
        sample_at = 0.0
        while True:
            done = self._backlog_frames()
            now_s = (time.monotonic_ns() - self._daemon.started_ns) / 1e9
            self.first_s = self.first_s or (now_s if done else 0.0)
            if done >= self._total:
                return now_s
            if now_s > DRAIN_SECONDS_MAX:
                raise TimeoutError(f"{done:,} of {self._total:,} frames after {now_s:.0f} s")
            self._look_at_live()
            if now_s >= sample_at:
                sample_at = now_s + SAMPLE_SECONDS
                self.memory.append((now_s, self._daemon.memory_mb()))
            time.sleep(POLL_SECONDS)

    def _backlog_frames(self) -> int:
        query = "SELECT coalesce(sum(frames), 0) AS n FROM feeds WHERE session_id = $1"
        return int(self._probe.fetch(query, self._session)[0]["n"])

    def _look_at_live(self) -> None:
        """How long the frames of the new live chunks were under way. Frames of a chunk are evenly spaced."""
        found = self._probe.fetch(
            "SELECT id, mono_start_ns, mono_end_ns, frame_count FROM frame_chunks"
            " WHERE session_id <> $1 AND source = 'can0' AND id > $2",
            self._session, self._seen,
        )  # fmt: skip
        now_ns = time.monotonic_ns()
        for chunk in found:
            stamps = np.linspace(chunk["mono_start_ns"], chunk["mono_end_ns"], chunk["frame_count"])
            self.lags_ms.append((now_ns - stamps) / 1e6)
            self._seen = max(self._seen, chunk["id"])

    def memory_slope_mb_per_minute(self) -> float:
        """After the first fifth: by then everything that is loaded and allocated once is there."""
        later = np.array(self.memory[len(self.memory) // 5 :])
        return float(np.polyfit(later[:, 0] / 60, later[:, 1], 1)[0]) if len(later) > 2 else float("nan")


def check(probe: Probe, backlog: Backlog) -> list[str]:
    """What is not as it was recorded; nothing, if every frame is there once, whole and in order."""
    wrong: list[str] = []
    at = dict.fromkeys(backlog.frames, 0)
    last_id = 0
    while True:
        chunks = probe.fetch(
            f"SELECT id, source, frame_count, {DIGEST} AS digest FROM frame_chunks"
            " WHERE session_id = $1 AND id > $2 ORDER BY id LIMIT 2000",
            backlog.session_id, last_id,
        )  # fmt: skip
        for chunk in chunks:
            source, count = chunk["source"], chunk["frame_count"]
            if backlog.cycle.digest(source, at[source], count) != chunk["digest"] and len(wrong) < 10:
                wrong.append(f"chunk {chunk['id']} of {source} is not frames {at[source]:,} to {at[source] + count:,}")
            at[source] += count
        if not chunks:
            break
        last_id = chunks[-1]["id"]
    wrong += [f"{at[name]:,} of {n:,} frames of {name}" for name, n in backlog.frames.items() if at[name] != n]
    query = "SELECT sum(frame_count::bigint * array_length(value_num, 1)) AS n FROM signal_chunks WHERE session_id = $1"
    signals = int(probe.fetch(query, backlog.session_id)[0]["n"])
    expected = backlog.cycle.signals_count() * backlog.cycles_count
    if signals != expected:
        wrong.append(f"{signals:,} of {expected:,} signals")
    return wrong


def check_live(probe: Probe, backlog: Backlog, sent: int) -> list[str]:
    """The same for the frames that came meanwhile: all of them, and none before one that was received earlier."""
    chunks = probe.fetch(
        "SELECT mono_start_ns, mono_end_ns, frame_count FROM frame_chunks"
        " WHERE session_id <> $1 AND source = 'can0' ORDER BY id", backlog.session_id,
    )  # fmt: skip
    stored = sum(chunk["frame_count"] for chunk in chunks)
    wrong = [] if stored == sent else [f"{stored:,} of {sent:,} live frames"]
    if any(one["mono_end_ns"] > two["mono_start_ns"] for one, two in itertools.pairwise(chunks)):
        wrong.append("live chunks are out of order")
    return wrong


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def run(dsn: str, postgres_pids: list[int], backlog: Backlog, folder: Path, live_rate: int) -> dict[str, Any]:
    """The daemon on the journal in `folder`; what was measured."""
    databases = demo.databases()
    journal_before = folder_bytes(folder / "journal")
    sender = Sender(folder)
    gps = f'[[serial]]\nname = "{GPS}"\nport = "{folder / "gps"}"\nprotocol = "nmea"\n'
    with silent_line(folder / "gps"):
        daemon = Daemon(
            folder, dsn, buses=len(BUSES), dbcs=[databases[bus] for bus in BUSES.values()], settings=gps,
            max_bytes=f"{BYTES_MAX >> 30}GiB",
        )  # fmt: skip
        probe = Probe(dsn)
        try:
            daemon.wait_until_listening()
            if live_rate:
                sender.start(live_rate)
            watch = Watch(daemon, probe, backlog)
            before = usage(postgres_pids or [])[0]
            seconds = watch.until_drained()
            cpu = usage(family(daemon.process.pid))[0] / 1e9
            cpu_postgres = (usage(family(postgres_pids[0]))[0] - before) / 1e9 if postgres_pids else float("nan")
            sent = sender.pause() if live_rate else 0
            peak_mb = daemon.peak_mb()
            wait_until(lambda: probe.stored() >= sent + sum(backlog.frames.values()), "everything is stored", 60, 0.5)
            journal_after = folder_bytes(folder / "journal")
            daemon.stop()
            wrong = check(probe, backlog) + check_live(probe, backlog, sent)
            database = int(probe.fetch("SELECT pg_database_size(current_database()) AS n")[0]["n"])
        finally:
            daemon.kill()
            sender.end()
            probe.close()
    lags = np.concatenate(watch.lags_ms) if watch.lags_ms else np.array([np.nan])
    frames = sum(backlog.frames.values())
    return {
        "frames": frames, "signals": backlog.cycle.signals_count() * backlog.cycles_count, "hours": backlog.hours,
        "rate": frames / backlog.hours / 3600, "live_rate": live_rate, "live_frames": sent, "seconds": seconds,
        "first_s": watch.first_s, "frames_per_second": frames / seconds, "ratio": backlog.hours * 3600 / seconds,
        "lag_p50_ms": float(np.percentile(lags, 50)), "lag_p99_ms": float(np.percentile(lags, 99)),
        "lag_max_ms": float(lags.max()), "wrong": wrong, "peak_rss_mb": peak_mb,
        "slope_mb_per_minute": watch.memory_slope_mb_per_minute(), "memory": watch.memory,
        "journal_before": journal_before,
        "journal_after": journal_after, "database_bytes": database, "cpu_s": cpu, "cpu_postgres_s": cpu_postgres,
    }  # fmt: skip


def report(found: dict[str, Any]) -> None:
    lines = [
        "backlog: {frames:,} frames, {signals:,} signals of {hours:.2f} h at {rate:,.0f} frames/s",
        "drained {seconds:.1f} s after the process was started (first commit after {first_s:.1f} s): "
        "{frames_per_second:,.0f} frames/s, {ratio:.1f}x real time",
        "processor: {cpu_s:.1f} s ours, {cpu_postgres_s:.1f} s PostgreSQL's",
        "live meanwhile, {live_rate:,} frames/s: {live_frames:,} frames; wire to SQL p50 {lag_p50_ms:.0f} ms, "
        "p99 {lag_p99_ms:.0f} ms, most {lag_max_ms:.0f} ms",
        "memory: peak RSS {peak_rss_mb:.0f} MB, slope {slope_mb_per_minute:+.1f} MB a minute",
        "journal: {journal_before:,} bytes before, {journal_after:,} after; database {database_bytes:,} bytes",
    ]
    for line in lines:
        say(line.format(**found))
    say("NOT AS IT WAS RECORDED: " + "; ".join(found["wrong"]) if found["wrong"] else "exactly once and in order: yes")


def backlog_in(folder: Path, kept: Path | None, arguments: argparse.Namespace) -> Backlog:
    """The journal, in `folder`: a copy of the one that was kept, or a new one, to be kept."""
    if kept is not None and kept.exists():
        shutil.copytree(kept / "journal", folder / "journal")
        backlog: Backlog = pickle.loads((kept / "backlog").read_bytes())
        return backlog
    backlog = write(folder / "journal", make_cycle(arguments.rate), arguments.hours, arguments.lives, BYTES_MAX)
    if kept is not None:
        shutil.copytree(folder / "journal", kept / "journal")
        (kept / "backlog").write_bytes(pickle.dumps(backlog))
    return backlog


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hours", type=float, default=24.0, help="of recording without a database; %(default)s")
    parser.add_argument("--rate", type=float, default=1000.0, help="frames/s in it, over both buses; %(default)s")
    parser.add_argument("--live-rate", type=int, default=1000, help="frames/s meanwhile; %(default)s")
    parser.add_argument("--lives", type=int, default=3, help="processes that recorded it; %(default)s")
    parser.add_argument("--dsn", help="a PostgreSQL on which databases may be created")
    parser.add_argument("--embedded", action="store_true", help="the embedded PostgreSQL, though there is another")
    parser.add_argument("--journal", type=Path, help="keep the journal there, or take it from there")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ingestd-bench-") as name:
        folder = Path(name)
        if not os.environ.get("LIVE_STAND_IN"):
            if (library := compile_stand_in(folder)) is None:
                return 1
            return subprocess.run(
                [sys.executable, *sys.argv], env={**os.environ, "LIVE_STAND_IN": str(library)}, check=False
            ).returncode
        say(machine())
        backlog = backlog_in(folder, arguments.journal, arguments)
        say(f"written in {backlog.seconds:.0f} s, {backlog.stretches_count} stretches: {backlog.frames}")
        with server(arguments.dsn, use_embedded=arguments.embedded) as (dsn, what):
            say(what)
            made = asyncio.run(fresh(dsn, "bench_outage"))
            found = run(made, postmaster(dsn), backlog, folder, arguments.live_rate)
    report(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    return bool(found["wrong"])


def postmaster(dsn: str) -> list[int]:
    """The processes of a server on this machine that we may look at."""
    probe = Probe(dsn)
    try:
        path = Path(probe.fetch("SHOW data_directory")[0][0]) / "postmaster.pid"
        return family(int(path.read_text().split()[0])) if path.exists() else []
    finally:
        probe.close()


if __name__ == "__main__":
    sys.exit(main())
