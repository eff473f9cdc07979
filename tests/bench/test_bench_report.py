"""What bench/__main__.py writes: complete, or refused; the same in Markdown, JSON and pictures."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import plots
import pytest
import report
from compare import Rate
from stages import Stage


def results() -> dict[str, Any]:
    """As a run gathers them."""
    rates = [
        Rate("ingestd import", "ingestd", 1000, 5000, 0.001, "the load's", 150.0),
        Rate("by | hand", "peer", 100, 500, 0.01, "ingestd's"),
        Rate("psql \\copy", "limit", 1000, 5000, 0.0005, "1 MB"),
    ]
    stages = [Stage("parse", 1e5, 1000, 5000, "python-can", 3e6), Stage("COPY", 2e5, 1000, 5000, server_ns=3e5)]
    live = {
        "here": {"latency": [{"interval": "500ms", "rate": 1000, "p50_ms": 250.0, "p99_ms": 500.0, "max_ms": 510.0}]}
    }
    return {
        "machine": {"date": "2026-11-25", "processor": "2 cores"},
        "server": "PostgreSQL 15",
        "quick": True,
        "rates": [
            asdict(rate) | {"signals_per_second": rate.signals_per_second, "frames_per_second": rate.frames_per_second}
            for rate in rates
        ],
        "stages": [asdict(s) | {"ns_per_signal": s.ns_per_signal, "ns_per_frame": s.ns_per_frame} for s in stages],
        "storage": {"bytes_per_sample": 3.3, "bytes_per_frame": 15.0, "memory_mb": 150.0},
        "import": None,
        "live": live,
        "missing": ["import: not in the quick run"],
    }


def test_what_is_written_is_what_was_measured(tmp_path: Path) -> None:
    """JSON holds the figures as they are; Markdown every table, with as many cells in each row as in its header."""
    pictures = plots.draw(tmp_path, results())
    report.write(tmp_path, results(), pictures)
    assert json.loads((tmp_path / "results.json").read_text()) == results()
    text = (tmp_path / "results.md").read_text()
    assert "| ingestd import |  | 1,000 | 5,000,000 | 1,000,000 | 1.0x | the load's |" in text
    assert "| by \\| hand | by hand | 100 | 50,000 | 10,000 | 100x | ingestd's |" in text
    assert "| COPY | 40.0 | 200 |  | 60.0 |" in text
    assert "| 1,000 | 250 | 500 | 510 |" in text
    assert "- import: not in the quick run" in text
    for table in text.split("\n## ")[1:]:
        cells = {line.replace("\\|", "").count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(cells) <= 1
    assert [path.name for path in pictures] == ["rates.svg", "stages.svg", "latency.svg"]
    assert all(f"]({path.name})" in text and path.read_text().startswith("<?xml") for path in pictures)


def test_the_same_figures_are_the_same_picture(tmp_path: Path) -> None:
    """A run that changes nothing changes no file."""
    once, again = plots.draw(tmp_path / "once", results()), plots.draw(tmp_path / "again", results())
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]


@pytest.mark.parametrize("section", ["rates", "stages", "storage", "live"])
def test_a_hole_needs_a_reason(tmp_path: Path, section: str) -> None:
    """A section without figures is refused, unless it is said why; then it is left out of tables and pictures."""
    holed = results() | {section: None}
    with pytest.raises(ValueError, match=f"{section} was not measured"):
        report.write(tmp_path, holed, [])
    assert not (tmp_path / "results.json").exists()
    holed["missing"].append(f"{section}: no root")
    report.write(tmp_path, holed, plots.draw(tmp_path, holed))
    assert f"- {section}: no root" in (tmp_path / "results.md").read_text()
    del holed["machine"]
    with pytest.raises(ValueError, match="the results have no machine"):
        report.check(holed)


def test_a_row_that_does_not_fit_is_refused() -> None:
    """Rather than shown under the wrong heading."""
    with pytest.raises(ValueError, match="has not the columns"):
        report.Table("t", ("a", "b"), [("1",)])
