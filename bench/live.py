"""The daemon on live buses, beside what others do with the same frames, in one run.

    python bench/live.py [--quick] [--guest cost,disk] [--here start,cost,…] [--json FILE]

A machine to develop on has seldom a kernel with SocketCAN, so it measures in two places, with the distribution's
PostgreSQL in each:

    guest  real SocketCAN in a user-mode kernel of its own (tests/with_can): one processor, everything on tmpfs. A
           system call costs there a hundred times what it costs elsewhere, which is against programs that need
           several a frame.
    here   at full speed, with UDP on the loopback interface standing in for the buses, by a library that is preloaded
           (live_stand_in.c; needs cc): the same programs, queues, stamps and system calls.

    cost      processor time for a frame, beside candump, python-can and a program by hand, at three rates
    disk      bytes written to a block device per byte journalled (guest)
    latency   from the kernel's stamp to the frame being visible in SQL
    drain     a backlog of a stopped PostgreSQL, while recording goes on
    sizing    what a bus takes of processor, journal, network and database, from 500 to 8,000 frames/s
    start     from exec to the first frame recorded, with a small and a large signal database
    memory    over the frames of an hour, as fast as they are taken

Machines differ: look at the ratios. Needs root and what tests/with_can needs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import machine

HERE = Path(__file__).resolve().parent
SECTIONS = ("start", "cost", "disk", "latency", "drain", "sizing", "memory")
DEFAULT = {"guest": "cost,disk", "here": "start,cost,latency,drain,sizing,memory"}
GUEST_MIB, GUEST_SECONDS = 6144, 3000


def say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    """Measure in each place, in a process of its own, and write down what it found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="3 s for each figure instead of 10, a shorter hour")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    for place, sections in DEFAULT.items():
        parser.add_argument(f"--{place}", default=sections, metavar="SECTIONS", help="'' for none; %(default)s")
    parser.add_argument("--measure", choices=tuple(DEFAULT), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := {*arguments.guest.split(","), *arguments.here.split(",")} - {*SECTIONS, ""}:
        parser.error(f"no sections {', '.join(sorted(unknown))}")
    if arguments.measure:
        return measure(arguments.measure, getattr(arguments, arguments.measure).split(","), quick=arguments.quick)
    say(machine.line())
    figures: dict[str, Any] = {"machine": machine.line()}
    codes = []
    for place in DEFAULT:
        if getattr(arguments, place):
            with tempfile.TemporaryDirectory(prefix="ingestd-bench-") as folder:
                quick = ["--quick"] if arguments.quick else []
                command = [sys.executable, str(HERE / "live.py"), "--measure", place, *quick]
                command += [f"--{place}", getattr(arguments, place)]
                codes.append((in_guest if place == "guest" else in_here)(command, Path(folder)))
                if (found := Path(folder) / "figures.json").exists():
                    figures[place] = json.loads(found.read_text())
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return max(codes, default=0)


def in_guest(command: list[str], out: Path) -> int:
    """Start the guest, and answer what it asks."""
    from live_meter import Answering

    with_can = [sys.executable, str(HERE.parent / "tests/with_can"), "--memory", str(GUEST_MIB)]
    guest = subprocess.Popen([*with_can, "--seconds", str(GUEST_SECONDS), "--out", str(out), "--", *command])
    answering = Answering(out, guest.pid)
    answering.start()
    code = guest.wait()
    answering.stop()
    return code


def in_here(command: list[str], out: Path) -> int:
    """Measure with the library that stands in for SocketCAN."""
    if (library := compile_stand_in(out)) is None:
        return 1
    environment = {**os.environ, "LIVE_STAND_IN": str(library), "WITH_CAN_OUT": str(out)}
    return subprocess.run(command, env=environment, check=False).returncode


def compile_stand_in(out: Path) -> Path | None:
    """Make the library that stands in for SocketCAN; None if that cannot be, which is said."""
    if not (compiler := shutil.which("cc") or shutil.which("gcc")):
        say("no C compiler (apt-get install gcc): nothing is measured outside the guest")
        return None
    library = out / "stand_in.so"
    source = HERE / "live_stand_in.c"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return library


def measure(place: str, sections: list[str], *, quick: bool) -> int:
    """Each section by itself; one that fails does not take the others along."""
    import live_alone
    import live_cost
    import live_guest
    from live_meter import Meter

    out = Path(os.environ["WITH_CAN_OUT"])
    work = Path("/run/bench") if place == "guest" else out / "work"
    work.mkdir()
    if place == "guest":
        live_guest.add_buses()
    sender = live_guest.Sender(work)
    seconds = 3.0 if quick else 10.0
    in_place = live_cost.Bench(sender, work, seconds)
    if place == "guest":
        in_place = live_cost.GuestBench(Meter(out), sender, work, seconds)
    figures: dict[str, Any] = {}
    with live_guest.server() as server:
        say(f"\n{place}: Linux {platform.release()}, {os.cpu_count()} processor(s); {server.version()}")
        alone = live_alone.Bench(sender, server, work, quick=quick)
        functions: dict[str, Callable[[], Any]] = {"cost": lambda: cost(in_place, server)}
        functions |= {name: partial(alone_section, name, alone) for name in SECTIONS if name != "cost"}
        for name in sections:
            try:
                figures[name] = functions[name]()
            except Exception:
                traceback.print_exc()
                sender.pause()
            (out / "figures.json").write_text(json.dumps(figures))
    sender.end()
    return 0 if len(figures) == len(sections) else 1


def cost(in_place: Any, server: Any) -> list[dict[str, Any]]:
    """The table of programs and rates."""
    from live_cost import RATES, programs

    rows = []
    say("\ncost: µs of processor time for a frame; of it in the program's own code; and PostgreSQL's, not in it")
    for rate, buses in RATES:
        say(in_place.nobody(rate, buses))
        costs = {}
        for program in programs(server):
            one = costs[program.name] = in_place.cost(program, server, rate, buses)
            say(
                f"  {one.program:34} {one.frame_us:8.2f}  {one.user_us:8.2f}  {one.postgres_us:8.2f}   "
                f"{100 * one.kept:6.2f} % kept of {one.sent_per_second:,.0f}/s"
            )
            rows.append(asdict(one))
        ours = costs.pop("ingestd run")
        ratios = (f"{ours.frame_us / other.frame_us:.2f}x {name}" for name, other in costs.items())
        say(f"  ingestd run takes {', '.join(ratios)}")
    return rows


LINES = {
    "disk": "{rate:,} frames/s: {ratio:.2f} bytes to the device per byte journalled; "
    "{bytes_per_frame:.1f} bytes a frame journalled, {syncs_per_second:.1f} syncs/s",
    "latency": "{rate:,} frames/s, batches of {interval}: "
    "p50 {p50_ms:.0f} ms, p99 {p99_ms:.0f} ms, most {max_ms:.0f} ms",
    "drain": "{rate:,} frames/s: {backlog:,} frames of backlog gone after {seconds:.1f} s, "
    "{reconnected_after_s:.1f} s of it until the first commit; {drained_per_second:,.0f} frames/s: {ratio:.0f}x, "
    "with the waiting {ratio_with_waiting:.0f}x",
    "sizing": "{rate:,} frames/s: {core:.1%} of a core (by the line {core_by_line:.1%}), journal "
    "{journal_bytes_per_second:,.0f} B/s, to PostgreSQL {network_bytes_per_second:,.0f} B/s, "
    "in it {database_bytes_per_second:,.0f} B/s",
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
