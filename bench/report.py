"""Figures to tables: on a terminal, as Markdown, and as JSON for whoever compares two runs.

`results` is what __main__ gathers:

    machine   as in machine.facts        rates    of compare.py, as dicts with signals_per_second
    server    a word on it               stages   of stages.py, as dicts with ns_per_signal
    quick     whether it was the short run
    storage   bytes a sample and a raw frame, peak memory of the import
    import    of importing.py, or None   live     of live.py, or None
    missing   what was not measured, and why

Limits: nothing here measures or rounds what goes into the JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

KEYS = ("machine", "server", "quick", "rates", "stages", "storage", "import", "live", "missing")
KINDS = {"ingestd": "", "peer": "by hand", "capture": "frames only", "limit": "limit"}


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under a header; the first column is to the left, all others are numbers."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    note: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError for a row that does not fit."""
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"{self.title}: {row} has not the columns {self.header}")

    def markdown(self) -> str:
        """For a file."""
        lines = [f"## {self.title}", "", _row(self.header), _row(("---", *["---:"] * (len(self.header) - 1)))]
        lines += [_row(row) for row in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else []), ""])

    def rich(self) -> RichTable:
        """For a terminal."""
        table = RichTable(*self.header[:1], title=self.title, title_justify="left", caption=self.note or None)
        for name in self.header[1:]:
            table.add_column(name, justify="right")
        for row in self.rows:
            table.add_row(*row)
        return table


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def check(results: Mapping[str, Any]) -> None:
    """Raises ValueError if something is not there: a report with holes that nobody notices is worse than none."""
    if absent := [key for key in KEYS if key not in results]:
        raise ValueError(f"the results have no {', '.join(absent)}")
    missing = {entry.partition(":")[0] for entry in results["missing"]}
    for section in ("rates", "stages", "storage", "import", "live"):
        if not results[section] and section not in missing:
            raise ValueError(f"{section} was not measured, and nothing says why")


def tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """What there is to show."""
    if results["rates"]:
        yield rates_table(results["rates"])
    if results["stages"]:
        yield stages_table(results["stages"])
    if results["storage"]:
        yield storage_table(results["storage"], results["import"] or {})
    yield from live_tables((results["live"] or {}).get("here", {}))


def rates_table(rates: list[dict[str, Any]]) -> Table:
    """ingestd, peers, limits."""
    ours, alone = rates[0], next((rate for rate in rates if "--no-frames" in rate["name"]), rates[0])
    rows = []
    for rate in rates:
        like = alone if rate is alone or "signals alone" in rate["name"] else ours
        rows.append((
            rate["name"], KINDS[rate["kind"]], f"{rate['frames']:,}", f"{rate['signals_per_second']:,.0f}",
            f"{rate['frames_per_second']:,.0f}", _ratio(like["signals_per_second"] / rate["signals_per_second"]),
            rate["checked"],
        ))  # fmt: skip
    return Table(
        "ingestd, peers and limits",
        ("", "kind", "frames", "signals/s", "frames/s", "ingestd's rate / this one's", "checked"),
        rows,
        "One input, one server, one run. Peers get the beginning of the same load, the slowest ones less of it, and "
        "are compared by rate. ingestd's time is that of its whole process; it stores the raw frames, too, which no "
        "peer does; without them it is set beside \\copy of the signals alone. What only captures frames is given "
        "the signals that could be decoded from them.",
    )


def _ratio(value: float) -> str:
    return f"{value:,.0f}x" if value >= 20 else f"{value:.1f}x" if value >= 1 else f"{value:.2g}x"


def stages_table(stages: list[dict[str, Any]]) -> Table:
    """Processor time."""
    rows = []
    for stage in stages:
        signals = stage["signals"]
        peer = f"{stage['peer_ns'] / signals:,.0f} ({stage['peer']})" if stage["peer"] else ""
        servers = f"{stage['server_ns'] / signals:,.1f}" if stage["server_ns"] else ""
        rows.append((stage["name"], f"{stage['ns_per_signal']:,.1f}", f"{stage['ns_per_frame']:,.0f}", peer, servers))
    return Table(
        "Processor time of each stage, in nanoseconds",
        ("stage", "a signal", "a frame", "a signal, by a library", "a signal, PostgreSQL"),
        rows,
        "An import takes parse, decode, encode and COPY; the daemon receive, journal, read back, decode, encode and "
        "COPY. Receive is without the system call. The journal's cost is a record's: on a quieter bus, with fewer "
        "frames in each 20 ms, it is more for each frame.",
    )


def storage_table(storage: Mapping[str, float], imported: Mapping[str, Any]) -> Table:
    """Disk and memory."""
    rows = [
        ("bytes a sample, indexes included", f"{storage['bytes_per_sample']:.2f}"),
        ("bytes a raw frame, indexes included", f"{storage['bytes_per_frame']:.2f}"),
        ("peak memory of the import, MB", f"{storage['memory_mb']:.0f}"),
    ]
    if imported:
        whole, of = imported["imports"]["whole"], imported
        by_second = of["by_second_view_ms"] / of["by_second_table_ms"]
        one_number = of["whole_view_ms"] / of["whole_table_ms"]
        rows += [
            ("demo drive: signals/s", f"{of['signals_per_second']:,.0f}"),
            ("demo drive: bytes a sample; a raw frame", f"{of['bytes_per_sample']:.2f}; {of['bytes_per_frame']:.2f}"),
            ("demo drive: time, of psql \\copy's", f"{whole['wall_seconds'] / of['limit_seconds']:.2f}x"),
            ("demo drive: a frame late in the file, of an early one's", f"{of['late_to_early']:.2f}x"),
            ("view signals by second, of a plain table's time", f"{by_second:.2f}x"),
            ("view signals to one number, of a plain table's time", f"{one_number:.2f}x"),
            ("signals_overview of 24 h at 100 Hz, ms", f"{of['overview_ms']:.2f}"),
        ]
    return Table("Storage, memory, queries", ("", "measured"), rows)


def sizing_table(rows: Sequence[Mapping[str, float]]) -> Table:
    """What to provide for a bus, by its load."""
    gigabyte, day = 1e9, 86_400
    return Table(
        "What a bus takes, by its load",
        ("frames/s", "of a core", "by the line", "journal, GB a day", "days in 8 GiB",
         "to PostgreSQL, GB a day (computed)", "in PostgreSQL, GB a day"),
        [
            (
                f"{row['rate']:,.0f}", f"{row['core']:.1%}", f"{row['core_by_line']:.1%}",
                f"{row['journal_bytes_per_second'] * day / gigabyte:.1f}",
                f"{8 * 2**30 / row['journal_bytes_per_second'] / day:.1f}",
                f"{row['network_bytes_per_second'] * day / gigabyte:.1f}",
                f"{row['database_bytes_per_second'] * day / gigabyte:.1f}",
            )
            for row in rows
        ],
        f"A bus with {rows[0]['signals_per_frame']:.1f} signals a frame, raw frames stored, default settings. The line "
        "goes through 1,000 and 8,000 frames/s. To PostgreSQL: without TLS.",
    )  # fmt: skip


def live_tables(here: Mapping[str, Any]) -> Iterator[Table]:
    """The sections of live.py that were run."""
    if "latency" in here:
        rows = [
            (
                row["interval"], f"{row['rate']:,}",
                f"{row['p50_ms']:.0f}", f"{row['p99_ms']:.0f}", f"{row['max_ms']:.0f}",
            )
            for row in here["latency"]
        ]  # fmt: skip
        yield Table("Wire to visible in SQL, in milliseconds", ("batch.interval", "frames/s", "p50", "p99", "most"),
                    rows, "The default is 500 ms.")  # fmt: skip
    if "sizing" in here:
        yield sizing_table(here["sizing"])
    if "start" in here:
        yield Table("From exec to the first frame recorded", ("signal database", "seconds"),
                    [(row["dbc"], f"{row['seconds']:.2f}") for row in here["start"]])  # fmt: skip
    if "cost" in here:
        rows = [
            (
                row["program"], f"{row['rate']:,}", f"{row['frame_us']:.1f}", f"{100 * row['kept']:.1f} %",
                *(f"{row[of] * row['sent_per_second'] * row['kept'] / 1e4:.1f} %" for of in ("frame_us", "user_us")),
            )
            for row in here["cost"]
        ]  # fmt: skip
        header = ("program", "frames/s", "µs a frame", "frames kept", "of a core", "outside the kernel")
        yield Table("Live: processor time, without PostgreSQL's", header, rows)
    if "drain" in here:
        rows = [
            (f"{row['rate']:,}", f"{row['backlog']:,}", f"{row['seconds']:.1f}", f"{row['reconnected_after_s']:.1f}",
             f"{row['drained_per_second']:,.0f}", f"{row['ratio']:.0f}x", f"{row['ratio_with_waiting']:.0f}x")
            for row in here["drain"]
        ]  # fmt: skip
        header = ("frames/s", "backlog, frames", "gone after, s", "of that until the first commit, s",
                  "frames/s drained from then on", "of the rate", "of the rate, with that wait")  # fmt: skip
        note = "Until the first commit: PostgreSQL recovers, and the daemon's next attempt, up to 5 s, is due."
        yield Table("After an outage of the database, while recording goes on", header, rows, note)
    if "memory" in here:
        row = here["memory"]
        yield Table("Memory of the daemon", ("", "measured"), [
            ("frames, as fast as they are taken", f"{row['frames']:,}"), ("peak, MB", f"{row['peak_rss_mb']:.0f}"),
            ("slope, MB for each hour of load", f"{row['slope_mb_per_hour']:+.1f}"),
        ])  # fmt: skip


def write(folder: Path, results: Mapping[str, Any], plots: list[Path]) -> None:
    """results.json and results.md, replacing what is there. Raises ValueError for results with holes."""
    check(results)
    folder.mkdir(parents=True, exist_ok=True)
    known = ", ".join(f"{name} {of}" for name, of in results["machine"].items())
    heading = f"# Benchmark{', the quick one' if results['quick'] else ''}"
    parts = [heading, "", "Written by `make bench`: do not edit.", "", f"{known}. {results['server']}.", ""]
    parts += [f"![{path.stem}]({path.name})" for path in plots]
    parts += ["", *(table.markdown() for table in tables(results))]
    if results["missing"]:
        parts += ["## Not measured", "", *(f"- {entry}" for entry in results["missing"]), ""]
    (folder / "results.md").write_text("\n".join(parts), encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def show(results: Mapping[str, Any]) -> None:
    """On standard output."""
    console = Console(width=None if Console().is_terminal else 160)
    for table in tables(results):
        console.print(table.rich())
    for entry in results["missing"]:
        console.print(f"not measured: {entry}", markup=False)
