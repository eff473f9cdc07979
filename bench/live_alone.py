"""The daemon alone: what it writes, how late it is, how fast it catches up, how soon it starts, its memory."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from live_cost import RATES, usage
from live_guest import (
    DBC,
    PYTHON,
    Daemon,
    Fates,
    Probe,
    Sender,
    Server,
    ext4,
    family,
    wait_until,
    written_bytes,
)

LIVE_RATE = 1_000
SIZING_RATES = (500, 1_000, 2_000, 4_000, 8_000)  # of one bus; 8,000 is full
FITTED = (1_000, 8_000)  # what is between and below them follows from these two
INTERVALS = ("500ms", "50ms")  # batch.interval: the default first


class Bench:
    """What every section needs."""

    def __init__(self, sender: Sender, server: Server, folder: Path, *, quick: bool) -> None:
        self.sender, self.server, self._folder, self.quick = sender, server, folder, quick
        self.seconds = 3.0 if quick else 10.0

    @contextlib.contextmanager
    def daemon(self, *, buses: int = 1, folder: Path | None = None, **settings: Any) -> Iterator[tuple[Daemon, Probe]]:
        """A daemon that answers, and a probe of its database."""
        dsn = self.server.database()
        daemon = Daemon((folder or self._folder) / f"{time.monotonic_ns()}", dsn, buses=buses, **settings)
        try:
            daemon.wait_until_serving()
            probe = Probe(dsn)
            yield daemon, probe
            with contextlib.suppress(Exception):
                probe.close()
        finally:
            daemon.kill()

    def finish(self, daemon: Daemon, probe: Probe, sent: int, seconds: float = 60.0) -> Fates:
        """Let everything that was sent become visible, stop, and compare the books with what was sent."""
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: probe.stored() >= sent, "everything is stored", seconds, 0.2)
        stored, fates = probe.stored(), daemon.stop()
        if fates.received != sent or stored != sent - fates.dropped:
            raise RuntimeError(f"the books: sent {sent:,}, stored {stored:,}, {fates}; {probe.longest_silence()}")
        return fates


def disk(bench: Bench) -> list[dict[str, float]]:
    """Bytes that reach a block device with ext4 on it, per byte appended to the journal, at each rate."""
    rows = []
    for rate, buses in RATES:
        with (
            ext4(Path("/run/bench")) as (mount, stat),
            bench.daemon(buses=buses, folder=mount) as (daemon, probe),
        ):
            bench.sender.start(rate, buses)
            wait_until(lambda probe=probe: probe.stored() > 0, "the first frames are stored")
            time.sleep(1.0)
            os.sync()
            written, before, sent = written_bytes(stat), daemon.metrics(), bench.sender.sent
            time.sleep(2 * bench.seconds)
            after, sent_after = daemon.metrics(), bench.sender.sent
            os.sync()
            written = written_bytes(stat) - written
            bench.finish(daemon, probe, bench.sender.pause())
        more = {name: after[f"ingestd_journal_{name}_total"] - before[f"ingestd_journal_{name}_total"] for name in
                ("written_bytes", "syncs")}  # fmt: skip
        rows.append({
            "rate": rate, "device_bytes": written, "journalled_bytes": more["written_bytes"],
            "ratio": written / more["written_bytes"], "bytes_per_frame": more["written_bytes"] / (sent_after - sent),
            "syncs_per_second": more["syncs"] / 2 / bench.seconds,
        })  # fmt: skip
    return rows


def latency(bench: Bench) -> list[dict[str, Any]]:
    """From the kernel's stamp of a frame to the end of the first SQL query that saw it, for every frame.

    At default settings, and with batches as soon as people ask for them. SQL is asked every 10 ms, so a figure is up to
    that and a query too high.
    """
    rows = []
    for interval, rate, buses in [(interval, *of) for interval in INTERVALS for of in RATES]:
        with bench.daemon(buses=buses, settings=f'[batch]\ninterval = "{interval}"') as (daemon, probe):
            bench.sender.start(rate, buses)
            wait_until(lambda probe=probe: probe.stored() > 0, "the first frames are stored")
            seen = probe.fetch("SELECT max(id) AS id FROM frame_chunks")[0]["id"]
            lags, until = [], time.monotonic() + 1.5 * bench.seconds
            while time.monotonic() < until:
                found = probe.fetch(
                    "SELECT id, mono_start_ns, mono_end_ns, frame_count FROM frame_chunks WHERE id > $1", seen
                )
                now_ns = time.monotonic_ns()
                for chunk in found:
                    # Within a chunk of half a second at a steady rate stamps are evenly spaced.
                    stamps = np.linspace(chunk["mono_start_ns"], chunk["mono_end_ns"], chunk["frame_count"])
                    lags.append((now_ns - stamps) / 1e6)
                    seen = max(seen, chunk["id"])
                time.sleep(0.01)
            bench.finish(daemon, probe, bench.sender.pause())
        p50, p99, most = np.percentile(np.concatenate(lags), [50, 99, 100])
        rows.append(
            {"interval": interval, "rate": rate, "p50_ms": p50, "p99_ms": p99, "max_ms": most, "commits": len(lags)}
        )
    return rows


def drain(bench: Bench) -> list[dict[str, float]]:
    """PostgreSQL stopped while frames come at a rate, then started while they go on coming."""
    rows = []
    for rate, buses in RATES[:2]:
        outage_s = 20.0 if bench.quick else 90.0
        with bench.daemon(buses=buses) as (daemon, probe):
            bench.sender.start(rate, buses)
            wait_until(lambda probe=probe: probe.stored() > 0, "the first frames are stored")
            bench.server.stop()
            before = bench.sender.sent
            time.sleep(outage_s)
            bench.server.start()
            began, backlog = time.monotonic(), bench.sender.sent - before
            probe = Probe(daemon.dsn)  # The other connection ended with the server.
            stored, first = probe.stored(), 0.0
            while bench.sender.sent - (now := probe.stored()) > rate:
                first = first or (time.monotonic() - began if now > stored else 0.0)
                time.sleep(0.05)
                if time.monotonic() > began + 300:
                    raise TimeoutError(f"after 300 s {bench.sender.sent - now:,} frames are not stored yet")
            seconds = time.monotonic() - began
            bench.finish(daemon, probe, bench.sender.pause())
        rows.append({
            "rate": rate, "backlog": backlog, "seconds": seconds, "reconnected_after_s": first,
            "drained_per_second": backlog / max(seconds - first, 1e-3),
            "ratio": backlog / max(seconds - first, 1e-3) / rate, "ratio_with_waiting": backlog / seconds / rate,
        })  # fmt: skip
    return rows


def large_dbc(folder: Path) -> Path:
    """A signal database of 800 kB: a production one if it is there, else one made up."""
    real = Path(__file__).parents[2] / "shared/data/dbc/ford_lincoln_base_pt.dbc"
    if real.exists():
        return real
    messages = []
    for number in range(900):
        signals = "".join(
            f' SG_ Signal{number}_{i} : {8 * i}|8@1+ (0.5,-40) [-40|87.5] "degC" Vector__XXX\n' for i in range(8)
        )
        messages.append(f"BO_ {256 + number} Message{number}: 8 ECM\n{signals}\n")
    made = folder / "large.dbc"
    made.write_text('VERSION ""\n\nNS_ :\n\nBS_:\n\nBU_: ECM\n\n' + "".join(messages))
    return made


def start(bench: Bench) -> list[dict[str, Any]]:
    """Exec to the kernel's stamp of the first frame recorded, beside what Python needs to start with numpy."""
    rows = []
    for name, dbc in (("small", DBC), ("large", large_dbc(Path("/run/bench")))):
        bench.sender.start(LIVE_RATE)
        times = []
        for _ in range(1 if bench.quick else 3):
            with bench.daemon(dbc=dbc) as (daemon, probe):
                wait_until(lambda probe=probe: probe.stored() > 0, "the first frames are stored")
                first_ns = probe.fetch("SELECT min(mono_start_ns) AS ns FROM frame_chunks")[0]["ns"]
                times.append((first_ns - daemon.started_ns) / 1e9)
        bench.sender.pause()
        rows.append({"dbc": name, "seconds": min(times)})
    for what in ("pass", "import numpy"):
        began = time.monotonic()
        subprocess.run([PYTHON, "-c", what], check=True)
        rows.append({"dbc": f"python -c '{what}'", "seconds": time.monotonic() - began})
    return rows


# Without TLS and TCP: what chunks.py makes of a row, an element and a frame.
SENT = """
SELECT (SELECT sum(12 * cardinality(value_num) + 12 * frame_count + 220) FROM signal_chunks)
     + (SELECT sum(23 * frame_count + octet_length(data) + 200) FROM frame_chunks) AS bytes,
       pg_total_relation_size('signal_chunks')::float8
     / (SELECT sum(cardinality(value_num)) FROM signal_chunks) AS sample,
       pg_total_relation_size('frame_chunks')::float8 / (SELECT sum(frame_count) FROM frame_chunks) AS frame,
       (SELECT sum(cardinality(value_num)) FROM signal_chunks)::float8
     / (SELECT sum(frame_count) FROM frame_chunks) AS signals
"""


def sizing(bench: Bench) -> list[dict[str, float]]:
    """What a bus takes of processor, journal, network and database, and how far a straight line tells it."""
    rows: list[dict[str, float]] = []
    for rate in SIZING_RATES:
        with bench.daemon() as (daemon, probe):
            bench.sender.start(rate)
            wait_until(lambda probe=probe: probe.stored() > 0, "the first frames are stored")
            time.sleep(2.0)
            pids = family(daemon.process.pid)
            used, written, at = (
                usage(pids)[0],
                daemon.metrics()["ingestd_journal_written_bytes_total"],
                time.monotonic(),
            )
            time.sleep(3 * bench.seconds)
            used, seconds = usage(pids)[0] - used, time.monotonic() - at
            written = daemon.metrics()["ingestd_journal_written_bytes_total"] - written
            sent = bench.sender.pause()
            bench.finish(daemon, probe, sent)
            stored = probe.fetch(SENT)[0]
        rows.append({
            "rate": rate, "core": used / seconds / 1e9, "journal_bytes_per_second": written / seconds,
            "network_bytes_per_second": float(stored["bytes"]) / sent * rate, "signals_per_frame": stored["signals"],
            "database_bytes_per_second": rate * (stored["frame"] + stored["signals"] * stored["sample"]),
        })  # fmt: skip
    low, high = (next(row for row in rows if row["rate"] == rate) for rate in FITTED)
    for row in rows:
        slope = (high["core"] - low["core"]) / (high["rate"] - low["rate"])
        row["core_by_line"] = low["core"] + slope * (row["rate"] - low["rate"])
    return rows


def memory(bench: Bench) -> dict[str, Any]:
    """The frames of an hour at 1,000 a second, as fast as the daemon keeps up with them; its memory meanwhile."""
    total = (600 if bench.quick else 3600) * LIVE_RATE
    ahead = 20_000  # frames on the way that are not in SQL yet
    samples: list[tuple[int, float]] = []
    with bench.daemon() as (daemon, probe):
        began = time.monotonic()
        bench.sender.start(60_000, limit=ahead)
        sample_at = 0.0
        while (stored := probe.stored()) < total:
            bench.sender.raise_limit(min(stored + ahead, total))
            if time.monotonic() >= sample_at:
                samples.append((stored, daemon.memory_mb()))
                sample_at = time.monotonic() + 1.0
            time.sleep(0.05)
        seconds = time.monotonic() - began
        peak, end = daemon.peak_mb(), daemon.memory_mb()
        bench.finish(daemon, probe, bench.sender.pause())
    # After the first tenth: by then everything that is loaded and allocated once is there.
    later = np.array([sample for sample in samples if sample[0] > total / 10])
    slope = float(np.polyfit(later[:, 0] / LIVE_RATE / 3600, later[:, 1], 1)[0])
    return {
        "frames": total, "seconds": seconds, "peak_rss_mb": peak, "end_pss_mb": end, "slope_mb_per_hour": slope,
        "first_mb": later[0, 1], "samples": samples,
    }  # fmt: skip
