"""All benchmarks with one command: `make bench`, ten minutes on two quiet cores; `python bench --quick`, one minute.

    python bench [--quick] [--out docs/bench] [--sections compare,stages,import,live] [--dsn DSN] [--flame]

    compare  ingestd, what people do instead, and what nothing can be faster than (compare.py)
    stages   processor time of each stage (stages.py)
    import   the demo car's drive: linearity, memory, queries (importing.py); not in the quick run
    live     the daemon on buses (live.py): latency and start; in the full run cost, drain and memory, too

Prints its tables and writes them, with machine, versions and date, as results.md and results.json; draws its plots.
What cannot be measured here (live needs root, a C compiler and the distribution's PostgreSQL) is named with the reason.
Ends with an error if anybody stored something else than was sent. --flame adds a flame graph of an import, by py-spy,
as build/bench/flame.svg.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import compare
import generate
import importing
import machine
import plots
import report
import stages
from server import dsn_of, server

HERE = Path(__file__).parent
SECTIONS = ("compare", "stages", "import", "live")
FULL_OUT, QUICK_OUT = HERE.parent / "docs" / "bench", HERE.parent / "build" / "bench"
LIVE = {True: "start,latency", False: "start,latency,cost,drain,sizing,memory"}


class Run:
    """One run: its sizes, and what it has found so far."""

    def __init__(self, *, quick: bool, folder: Path) -> None:
        self.quick, self.folder = quick, folder
        self.load = generate.Load(frames=2_000_000 if quick else 10_000_000)
        self.peer_frames = 10_000 if quick else 150_000
        self.stage_frames = 300_000 if quick else 1_000_000
        self.driving_seconds = 7200
        self.failed = False
        self.results: dict[str, Any] = {
            "machine": machine.facts(), "server": "", "quick": quick, "rates": [], "stages": [], "storage": {},
            "import": None, "live": None, "missing": [],
        }  # fmt: skip

    def miss(self, section: str, why: str) -> None:
        """Note that a section has no figures."""
        self.results["missing"].append(f"{section}: {why}")

    def compare(self, dsn: str) -> None:
        """ingestd, peers, limits; and what ingestd's part takes on the disk."""
        for rate in compare.compare(dsn, self.load, self.peer_frames, self.folder):
            print(f"  {rate.name}: {rate.signals_per_second:,.0f} signals/s", flush=True)
            figures = {"signals_per_second": rate.signals_per_second, "frames_per_second": rate.frames_per_second}
            self.results["rates"].append(asdict(rate) | figures)
            if rate.name == "ingestd import":
                sample, frame = asyncio.run(importing.sizes(dsn_of(dsn, "compare_ours")))
                storage = {"bytes_per_sample": sample, "bytes_per_frame": frame, "memory_mb": rate.memory_mb}
                self.results["storage"] = storage

    def stages(self, dsn: str) -> None:
        """Of the beginning of the same load."""
        load = generate.Load(frames=self.stage_frames)
        made = generate.generate(self.folder / "stages", load)
        found = list(stages.measure(made.capture, [*made.databases.items()], self.folder, dsn))
        figures = [
            asdict(each) | {"ns_per_signal": each.ns_per_signal, "ns_per_frame": each.ns_per_frame} for each in found
        ]
        self.results["stages"] = figures

    def imports(self, dsn: str) -> None:
        """The demo drive."""
        self.results["import"] = asyncio.run(importing.run(dsn, self.driving_seconds, self.folder))

    def live(self) -> None:
        """In a process of its own, which starts its own server."""
        out = self.folder / "live.json"
        command = [sys.executable, str(HERE / "live.py"), "--quick", "--guest", "", "--here", LIVE[self.quick]]
        code = subprocess.run([*command, "--json", str(out)], check=False).returncode
        self.results["live"] = found = json.loads(out.read_text()) if out.exists() else None
        if not (found or {}).get("here"):
            self.results["live"] = None
        if code:
            self.failed = True
            self.miss("live", f"bench/live.py ended with {code}, and part of it is missing; see what it says above")

    def flame(self, out: Path) -> None:
        """Where an import spends its time, as py-spy sees it: with paths of this machine, so not for docs/."""
        beside = Path(sys.executable).with_name("py-spy")
        program = str(beside) if beside.exists() else shutil.which("py-spy")
        if program is None:
            self.miss("flame", "py-spy is not installed: pip install py-spy")
            return
        made = generate.generate(self.folder / "flame", self.load)
        databases = [part for entry in made.dbc_arguments for part in ("--dbc", entry)]
        with server(None) as (dsn, _):
            database = asyncio.run(importing.fresh(dsn, "flame"))
            command = [program, "record", "--rate", "200", "--threads", "--output", str(out), "--"]
            command += [sys.executable, "-m", "ingestd", "import", str(made.capture), "--dsn", database, *databases]
            if subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode:
                self.miss("flame", "py-spy could not look into the process: is it allowed to?")


def measure(run: Run, sections: list[str], dsn: str | None) -> None:
    """The sections asked for, one after the other; the database is started once for all but the last."""
    names = {"compare": "rates", "stages": "stages", "import": "import", "live": "live"}
    for section in SECTIONS:
        if section not in sections:
            why = "not in the quick run" if run.quick and section == "import" else "not asked for"
            run.miss(names[section], why)
    if "compare" not in sections:
        run.miss("storage", "measured with compare")
    if {*sections} - {"live"}:
        with server(dsn) as (maintenance, what):
            run.results["server"] = what
            for section, work in (("compare", run.compare), ("stages", run.stages), ("import", run.imports)):
                if section in sections:
                    started = time.monotonic()
                    print(f"\n{section} …", flush=True)
                    work(maintenance)
                    print(f"  {time.monotonic() - started:.0f} s", flush=True)
    if "live" in sections:
        print("\nlive …", flush=True)
        run.live()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a minute instead of ten")
    parser.add_argument("--out", type=Path, help="default: docs/bench, with --quick build/bench")
    parser.add_argument("--sections", help="of compare,stages,import,live")
    parser.add_argument("--dsn", help="a server where databases may be made; live has its own all the same")
    parser.add_argument("--flame", action="store_true", help="a flame graph of an import, if py-spy is there")
    arguments = parser.parse_args()
    default = [section for section in SECTIONS if not (arguments.quick and section == "import")]
    sections = arguments.sections.split(",") if arguments.sections else default
    if unknown := {*sections} - {*SECTIONS}:
        parser.error(f"no sections {', '.join(sorted(unknown))}")
    out = arguments.out or (QUICK_OUT if arguments.quick else FULL_OUT)
    out.mkdir(parents=True, exist_ok=True)
    print(machine.line(), flush=True)
    with tempfile.TemporaryDirectory(prefix="ingestd-bench-") as folder:
        run = Run(quick=arguments.quick, folder=Path(folder))
        measure(run, sections, arguments.dsn)
        if arguments.flame:
            QUICK_OUT.mkdir(parents=True, exist_ok=True)
            run.flame(QUICK_OUT / "flame.svg")
    print()
    report.show(run.results)
    report.write(out, run.results, plots.draw(out, run.results))
    print(f"\nwritten: {out / 'results.md'}, {out / 'results.json'} and the plots beside them")
    sys.exit(run.failed)


if __name__ == "__main__":
    main()
