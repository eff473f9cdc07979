"""The daemon on live buses, beside what others do with the same frames, in one run.

    python bench/live.py [--quick] [--only cost,disk,…] [--json FILE]

Runs as root in a user-mode kernel of its own that has SocketCAN (tests/with_can; one processor, everything on tmpfs),
with the distribution's PostgreSQL in it. A system call costs there a hundred times what it costs elsewhere: read the
ratios, and the column of user code, which runs at full speed. Machines differ: what is printed says on which it ran.

    cost      processor time for a frame, beside candump, python-can and a program by hand, at three rates
    disk      bytes written to a block device per byte journalled
    latency   from the kernel's stamp to the frame being visible in SQL
    drain     a backlog of a stopped PostgreSQL, while recording goes on
    start     from exec to the first frame recorded, with a small and a large signal database
    memory    over the frames of an hour, as fast as they are taken
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SECTIONS = ("start", "cost", "disk", "latency", "drain", "memory")
GUEST_MIB, GUEST_SECONDS = 6144, 3000


def say(line: str) -> None:
    print(line, flush=True)


def machine() -> str:
    """What this was measured on, in a line."""
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    versions = ", ".join(f"{name} {version(name)}" for name in ("numpy", "asyncpg", "uvloop", "python-can", "cantools"))
    return (
        f"{datetime.now(UTC):%Y-%m-%d}; {os.cpu_count()} cores, {model[0].partition(': ')[2] if model else '?'}, "
        f"Linux {platform.release()}; Python {platform.python_version()}, {versions}"
    )


def version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def main() -> int:
    """On this machine: start the guest, answer what it asks, write down what it found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="3 s for each figure instead of 10, a shorter hour")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.only.split(",")) - set(SECTIONS):
        parser.error(f"no sections {', '.join(sorted(unknown))}")
    if arguments.inside:
        return inside(arguments)
    from live_meter import Answering

    say(machine())
    with tempfile.TemporaryDirectory(prefix="ingestd-bench-") as folder:
        out = Path(folder)
        command = [sys.executable, str(HERE.parent / "tests/with_can"), "--memory", str(GUEST_MIB)]
        command += ["--seconds", str(GUEST_SECONDS), "--out", str(out), "--"]
        command += [sys.executable, str(HERE / "live.py"), "--inside", "--only", arguments.only]
        guest = subprocess.Popen([*command, *(["--quick"] if arguments.quick else [])])
        answering = Answering(out, guest.pid)
        answering.start()
        code = guest.wait()
        answering.stop()
        if arguments.json and (out / "figures.json").exists():
            figures = json.loads((out / "figures.json").read_text()) | {"machine": machine()}
            arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return code


def inside(arguments: argparse.Namespace) -> int:
    """In the guest: each section by itself; one that fails does not take the others along."""
    import live_alone
    import live_guest
    from live_cost import Bench
    from live_meter import Meter

    out, work = Path(os.environ["WITH_CAN_OUT"]), Path("/run/bench")
    work.mkdir()
    live_guest.add_buses()
    sender = live_guest.Sender(work)
    bench = Bench(Meter(out), sender, work, 3.0 if arguments.quick else 10.0)
    figures: dict[str, Any] = {}
    with live_guest.server() as server:
        say(f"guest: Linux {platform.release()}, one processor; {server.version()}, default settings, Unix socket")
        alone = live_alone.Bench(sender, server, work, quick=arguments.quick)
        sections: dict[str, Callable[[], Any]] = {"cost": lambda: cost(bench, server)}
        sections |= {name: partial(alone_section, name, alone) for name in SECTIONS if name != "cost"}
        for name in arguments.only.split(","):
            try:
                figures[name] = sections[name]()
            except Exception:
                traceback.print_exc()
                sender.pause()
            (out / "figures.json").write_text(json.dumps(figures))
    sender.end()
    return 0 if len(figures) == len(arguments.only.split(",")) else 1


def cost(bench: Any, server: Any) -> list[dict[str, Any]]:
    """The table of programs and rates."""
    from live_cost import RATES, programs

    rows = []
    say("\ncost: processor time for a frame, µs of the whole guest; of it in the program's address space; PostgreSQL's")
    for rate, buses in RATES:
        nobody_ns, busy_ns = bench.sending_to_nobody(rate, buses)
        say(
            f"{rate:,} frames/s on {buses} bus(es); sending alone takes {nobody_ns / 1000:.1f} µs a frame, "
            f"{busy_ns / 1e7:.0f} % of the guest"
        )
        costs = {}
        for program in programs(server):
            one = bench.cost(program, rate, buses, nobody_ns)
            costs[one.program] = one
            say(
                f"  {one.program:34} {one.frame_us:8.1f}  {one.user_us:8.1f}  {one.postgres_us:8.1f}   "
                f"{100 * one.kept:6.2f} % kept of {one.sent_per_second:,.0f}/s, guest busy {100 * one.busy:.0f} %"
            )
            rows.append(asdict(one))
        ours = costs.get("ingestd run") or one
        for name in ("candump -L", "python-can recv, nothing more", "python-can logger"):
            say(
                f"  ingestd run / {name}: {ours.frame_us / costs[name].frame_us:.2f}x; "
                f"user code alone {ours.user_us / costs[name].user_us:.2f}x"
            )
    return rows


LINES = {
    "disk": "{rate:,} frames/s: {ratio:.2f} bytes to the device per byte journalled; {bytes_per_frame:.1f} bytes journalled "
    "a frame, {syncs_per_second:.1f} syncs/s",
    "latency": "{rate:,} frames/s: p50 {p50_ms:.0f} ms, p99 {p99_ms:.0f} ms, most {max_ms:.0f} ms",
    "drain": "{rate:,} frames/s: {backlog:,} frames of backlog gone after {seconds:.1f} s, {reconnected_after_s:.1f} s of it "
    "until the first commit; {drained_per_second:,.0f} frames/s: {ratio:.0f}x, with the waiting {ratio_with_waiting:.0f}x",
    "start": "{dbc}: {seconds:.2f} s",
    "memory": "{frames:,} frames in {seconds:.0f} s: peak RSS {peak_rss_mb:.0f} MB, PSS with children at the end "
    "{end_pss_mb:.0f} MB, slope {slope_mb_per_hour:+.1f} MB an hour",
}


def alone_section(name: str, bench: Any) -> Any:
    """A section of live_alone, and its lines."""
    import live_alone

    function = getattr(live_alone, name)
    say(f"\n{name}: {function.__doc__.splitlines()[0]}")
    found = function(bench)
    for row in found if isinstance(found, list) else [found]:
        say("  " + LINES[name].format(**row))
    return found


if __name__ == "__main__":
    sys.exit(main())
