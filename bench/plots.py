"""The figures as pictures: who stores how many signals a second, what each stage costs, how late data is in SQL.

Needs matplotlib, which the extra `bench` brings. SVG, with the same bytes for the same figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"ingestd": "#1b6ca8", "peer": "#c8553d", "capture": "#d9a441", "limit": "#8a8f98"}
WORDS = {"ingestd": "ingestd", "peer": "by hand", "capture": "frames only", "limit": "limit"}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "ingestd",
    "svg.fonttype": "none",
}
LIVE_STAGES = ("receive", "journal", "read back")


def draw(folder: Path, results: Mapping[str, Any], kind: str = "svg") -> list[Path]:
    """Every picture that there are figures for; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    latency = ((results["live"] or {}).get("here") or {}).get("latency")
    made = []
    for name, figures, plot in (
        ("rates", results["rates"], rates), ("stages", results["stages"], stages), ("latency", latency, latencies),
    ):  # fmt: skip
        if not figures:
            continue
        with plt.rc_context(STYLE):
            figure, axes = plt.subplots(figsize=(8, 0.36 * len(figures) + 1.2), layout="constrained")
            plot(axes, figures)
            path = folder / f"{name}.{kind}"
            figure.savefig(path, dpi=130, metadata={"Date": None} if kind == "svg" else None)
            plt.close(figure)
            made.append(path)
    return made


def rates(axes: Axes, figures: list[dict[str, Any]]) -> None:
    """Signals a second, on a logarithmic axis."""
    figures = sorted(figures, key=lambda rate: rate["signals_per_second"])
    values = [rate["signals_per_second"] for rate in figures]
    bars = axes.barh([rate["name"] for rate in figures], values, color=[COLOURS[rate["kind"]] for rate in figures])
    axes.bar_label(bars, [_short(value) for value in values], padding=3)
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 3, max(values) * 4)
    axes.set_xlabel("signals/s (logarithmic)")
    axes.set_title("A capture file into PostgreSQL", loc="left")
    kinds = [kind for kind in COLOURS if any(rate["kind"] == kind for rate in figures)]
    patches = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[kind]) for kind in kinds]
    axes.legend(patches, [WORDS[kind] for kind in kinds], frameon=False, loc="lower right")


def stages(axes: Axes, figures: list[dict[str, Any]]) -> None:
    """Processor time of a signal, ours and PostgreSQL's, stage by stage from the wire down."""
    names = [stage["name"] for stage in figures]
    ours = [stage["ns_per_signal"] for stage in figures]
    servers = [stage["server_ns"] / stage["signals"] for stage in figures]
    colours = [COLOURS["peer"] if name in LIVE_STAGES else COLOURS["ingestd"] for name in names]
    axes.barh(names, ours, color=colours)
    bars = axes.barh(names, servers, left=ours, color=COLOURS["limit"])
    axes.bar_label(
        bars, [f"{a:.0f}{f' + {b:.0f}' if b else ''}" for a, b in zip(ours, servers, strict=True)], padding=3
    )
    axes.invert_yaxis()
    axes.set_xlim(0, max(a + b for a, b in zip(ours, servers, strict=True)) * 1.15)
    axes.set_xlabel("nanoseconds of processor time for a signal")
    axes.set_title("What each stage costs", loc="left")
    patches = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[kind]) for kind in ("ingestd", "peer", "limit")]
    axes.legend(patches, ["ingestd", "ingestd, live only", "PostgreSQL"], frameon=False, loc="upper right")


def latencies(axes: Axes, figures: list[dict[str, Any]]) -> None:
    """Wire to SQL at each load."""
    names = [f"{row['rate']:,} frames/s, {row['interval']}" for row in figures]
    for column, word, colour in (
        ("max_ms", "most", COLOURS["limit"]),
        ("p99_ms", "p99", COLOURS["capture"]),
        ("p50_ms", "p50", COLOURS["ingestd"]),
    ):  # fmt: skip
        axes.barh(names, [row[column] for row in figures], color=colour, label=word)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds from the wire to visible in SQL, by batch.interval")
    axes.set_title("How late data is in SQL", loc="left")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _short(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"
