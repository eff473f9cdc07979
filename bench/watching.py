"""What people who watch, and Prometheus, cost the daemon, while a bus of 8,000 frames/s is recorded.

    python bench/watching.py [--rate 8000] [--seconds 10]

Processor time of the daemon's processes, PostgreSQL's not among them: with nobody who watches, with one page (all
channels twice a second, as the page asks for them), with ten of them, and with nobody again. Watchers are programs that
read what a page does; what a browser does with it is the browser's. Each time every frame has to be recorded: the books
are compared with what was sent.

A scrape is too cheap to be seen every 5 s, so there are 20 a second, and what one takes is reckoned from that. What is
counted for metrics alone as frames come (bits for the load, payload bytes, how late the loop is) is timed by itself.

UDP on the loopback interface stands in for the bus (live_stand_in.c; needs cc, and the distribution's PostgreSQL).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
import timeit
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import machine
import numpy as np
from live import compile_stand_in
from live_cost import usage
from live_guest import Daemon, Sender, family, server

from ingestd.clock import mono_ns
from ingestd.metrics import Histogram
from ingestd.model import FrameBatch
from ingestd.sources.can_link import ask
from ingestd.sources.can_load import BusLoad

WARM_UP_SECONDS = 4.0
READS_A_SECOND = 50
SCRAPE_SECONDS = 5  # prometheus/prometheus.yml
QUESTION = "/api/live?pattern=*&seconds=0.5"


@contextlib.contextmanager
def watchers(address: str, count: int) -> Iterator[list[int]]:
    """So many that read; how many bytes each has read."""
    read, ending = [0] * count, threading.Event()

    def watch(number: int) -> None:
        with urllib.request.urlopen(f"http://{address}{QUESTION}", timeout=20) as answer:
            while not ending.is_set() and (said := answer.read1(1 << 16)):
                read[number] += len(said)

    threads = [threading.Thread(target=watch, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield read
    finally:
        ending.set()
        for thread in threads:
            thread.join()


@contextlib.contextmanager
def scrapes(address: str, a_second: int) -> Iterator[list[int]]:
    """As Prometheus asks, so often; how many there were."""
    count, ending = [0], threading.Event()

    def scrape() -> None:
        while not ending.wait(1 / a_second):
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as answer:
                answer.read()
                count[0] += 1

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield count
    finally:
        ending.set()
        thread.join()


def counting_percent(rate: int) -> float:
    """Processor time of what is counted for metrics alone, in percent of a processor, at so many frames a second."""
    frames = rate // READS_A_SECOND
    batch = FrameBatch(
        "can0", np.arange(frames), np.full(frames, 0x123, np.uint32), np.zeros(frames, np.uint8),
        np.full(frames, 8, np.uint16), np.random.default_rng(1).integers(0, 256, (frames, 8), np.uint8),
    )  # fmt: skip
    load, lag = BusLoad(500_000), Histogram()

    def second() -> None:
        for _ in range(READS_A_SECOND):
            load.add(batch)
            int(batch.length.sum())
        for _ in range(4):
            lag.observe(0.0005)
        ask(1), ask(1)
        load.ratio(mono_ns() + 2_000_000_000)

    return 100 * min(timeit.repeat(second, number=20, repeat=5)) / 20


def measure(rate: int, seconds: float, folder: Path) -> None:
    """One daemon, with watchers who come and go."""
    with server() as postgres:
        sender = Sender(folder)
        daemon = Daemon(folder / "daemon", postgres.database())
        try:
            daemon.wait_until_serving()
            sender.start(rate)
            time.sleep(WARM_UP_SECONDS)
            alone = 0.0
            for count in (0, 1, 10, 0):
                with watchers(daemon.address, count) as read:
                    time.sleep(WARM_UP_SECONDS)
                    begun, at, sent, told = used(daemon), time.monotonic(), sender.sent, sum(read)
                    time.sleep(seconds)
                    passed = time.monotonic() - at
                    percent = 100 * (used(daemon) - begun) / 1e9 / passed
                    frames, kilobytes = (sender.sent - sent) / passed, (sum(read) - told) / passed / 1000
                alone = alone or percent
                more = f", {percent - alone:+.1f} of what it takes alone" if count else ""
                who = {0: "nobody watches", 1: "one page"}.get(count, f"{count} pages")
                cost = f"{percent:5.1f} % of a processor{more}"
                print(f"{who:<15} {frames:,.0f} frames/s  {cost}  {kilobytes:,.0f} kB/s told")
            with scrapes(daemon.address, 20) as count:
                time.sleep(1.0)
                begun, at, scraped = used(daemon), time.monotonic(), count[0]
                time.sleep(seconds)
                percent = 100 * (used(daemon) - begun) / 1e9 / (time.monotonic() - at)
                milliseconds = 10 * (percent - alone) * seconds / (count[0] - scraped)
            counting = counting_percent(rate)
            all_percent = counting + milliseconds / 10 / SCRAPE_SECONDS
            print(f"a scrape takes {milliseconds:.2f} ms; counting {counting:.3f} % of a processor")
            print(f"metrics, scraped every {SCRAPE_SECONDS} s: {all_percent:.3f} % of a processor, ", end="")
            print(f"{100 * all_percent / alone:.1f} % of what the daemon takes")
            sent = sender.pause()
            time.sleep(2.0)
            fates = daemon.stop()
            print(f"sent {sent:,}, received {fates.received:,}, dropped {fates.dropped:,}")
            if fates.received != sent or fates.dropped:
                raise SystemExit("the books are not those of the sender")
        finally:
            daemon.kill()
            sender.end()


def used(daemon: Daemon) -> float:
    """Nanoseconds of processor time."""
    return usage(family(daemon.process.pid))[0]


def main() -> int:
    """Measure, in a process that has the library."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rate", type=int, default=8_000)
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ingestd-bench-") as folder:
        if not os.environ.get("LIVE_STAND_IN"):
            if (library := compile_stand_in(Path(folder))) is None:
                return 1
            environment = {**os.environ, "LIVE_STAND_IN": str(library)}
            return subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode
        print(machine.line())
        measure(arguments.rate, arguments.seconds, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
