"""What a scrape gives: every number of a snapshot, once, under the names that dashboards use."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from ingestd.framing import FRAMERS
from ingestd.metrics import ChannelValue, Histogram, JournalNumbers, Snapshot, SourceNumbers, StoreNumbers, render
from ingestd.model import Books, Link, SourceStatus

ROOT = Path(__file__).parents[2]
COUNTED = ("bus_offs", "error_frames", "skipped_bytes", "odd_name")


def a_snapshot() -> Snapshot:
    commits, latency, lag = Histogram([0.1, 1.0]), Histogram([0.5]), Histogram([0.001])
    for seconds in (0.05, 0.1, 0.2, 3.0):
        commits.observe(seconds)
    latency.observe(0.25)
    lag.observe(0.0005)
    return Snapshot(
        version="1.2.3",
        books={
            "can0": Books(received=100, committed=60, pending=20, rejected=5, dropped={"overflow": 10, "budget": 5}),
            "gps": Books(received=7, committed=7),
        },
        statuses={
            "can0": SourceStatus(
                Link.OPEN, counters={"bus_offs": 2, "error_frames": 3}, controller="error-passive", buffer_bytes=4096,
                buffer_bytes_max=32 << 20,
            ),
            "gps": SourceStatus(Link.RETRYING, "unplugged", {"skipped_bytes": 11, "odd-name": 1}),
        },
        journal=JournalNumbers(
            writable=True, bytes=32 << 20, bytes_max=8 << 30, oldest_pending_seconds=1.5, written_bytes=2**53 + 2,
            syncs=9, damaged_bytes=13,
        ),
        store=StoreNumbers(
            up=True, commits=4, commit_failures=1, rejections=2, reconnects=3, samples=900, copied_bytes=7000,
            commit_seconds=commits, wire_to_commit_seconds=latency,
        ),
        sources={
            "can0": SourceNumbers(0.25, 0.5, decoded=50, undecoded={"unknown": 8, "damaged": 2}, short=4),
            "gps": SourceNumbers(12.5),
        },
        loop_lag_seconds=lag,
        is_clock_set=False,
        channels=[ChannelValue("can0", "Engine.Speed", "rpm", 1500.5)],
    )  # fmt: skip


def families(snapshot: Snapshot) -> dict[str, Metric]:
    body, content_type = render(snapshot)
    assert content_type.startswith("text/plain; version=0.0.4")
    parsed = list(text_string_to_metric_families(body.decode()))
    assert len({family.name for family in parsed}) == len(parsed), "a family appears twice"
    return {family.name: family for family in parsed}


def values(snapshot: Snapshot) -> dict[str, float]:
    """Sample name with its labels to value."""
    samples: list[Sample] = [sample for family in families(snapshot).values() for sample in family.samples]
    named = {}
    for sample in samples:
        labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
        key = f"{sample.name}{{{labels}}}" if labels else sample.name
        assert key not in named, "a sample appears twice"
        named[key] = sample.value
    return named


def test_every_number_is_told() -> None:
    """All that a snapshot holds, by name, label and value; nothing of ours beside it."""
    told = {key: value for key, value in values(a_snapshot()).items() if key.startswith("ingestd_")}
    assert told == {
        "ingestd_build_info{version=1.2.3}": 1,
        "ingestd_frames_received_total{source=can0}": 100,
        "ingestd_frames_received_total{source=gps}": 7,
        "ingestd_frames_committed_total{source=can0}": 60,
        "ingestd_frames_committed_total{source=gps}": 7,
        "ingestd_frames_pending{source=can0}": 20,
        "ingestd_frames_pending{source=gps}": 0,
        "ingestd_frames_rejected_total{source=can0}": 5,
        "ingestd_frames_rejected_total{source=gps}": 0,
        "ingestd_frames_dropped_total{reason=overflow,source=can0}": 10,
        "ingestd_frames_dropped_total{reason=budget,source=can0}": 5,
        "ingestd_frames_dropped_total{reason=journal,source=can0}": 0,
        "ingestd_frames_dropped_total{reason=damage,source=can0}": 0,
        "ingestd_frames_dropped_total{reason=overflow,source=gps}": 0,
        "ingestd_frames_dropped_total{reason=budget,source=gps}": 0,
        "ingestd_frames_dropped_total{reason=journal,source=gps}": 0,
        "ingestd_frames_dropped_total{reason=damage,source=gps}": 0,
        "ingestd_source_up{source=can0}": 1,
        "ingestd_source_up{source=gps}": 0,
        "ingestd_source_bus_offs_total{source=can0}": 2,
        "ingestd_source_error_frames_total{source=can0}": 3,
        "ingestd_source_skipped_bytes_total{source=gps}": 11,
        "ingestd_source_odd_name_total{source=gps}": 1,
        "ingestd_source_last_frame_age_seconds{source=can0}": 0.25,
        "ingestd_source_last_frame_age_seconds{source=gps}": 12.5,
        "ingestd_frames_decoded_total{source=can0}": 50,
        "ingestd_frames_decoded_total{source=gps}": 0,
        "ingestd_frames_undecoded_total{reason=unknown,source=can0}": 8,
        "ingestd_frames_undecoded_total{reason=damaged,source=can0}": 2,
        "ingestd_frames_undecoded_total{reason=unknown,source=gps}": 0,
        "ingestd_frames_undecoded_total{reason=damaged,source=gps}": 0,
        "ingestd_frames_short_total{source=can0}": 4,
        "ingestd_frames_short_total{source=gps}": 0,
        "ingestd_can_bus_load_ratio{source=can0}": 0.5,
        "ingestd_can_controller_state{source=can0,state=error-active}": 0,
        "ingestd_can_controller_state{source=can0,state=error-warning}": 0,
        "ingestd_can_controller_state{source=can0,state=error-passive}": 1,
        "ingestd_can_controller_state{source=can0,state=bus-off}": 0,
        "ingestd_source_receive_buffer_bytes{source=can0}": 4096,
        "ingestd_source_receive_buffer_max_bytes{source=can0}": 32 << 20,
        "ingestd_journal_writable": 1,
        "ingestd_journal_bytes": 32 << 20,
        "ingestd_journal_max_bytes": 8 << 30,
        "ingestd_journal_oldest_pending_seconds": 1.5,
        "ingestd_journal_written_bytes_total": 2**53 + 2,
        "ingestd_journal_syncs_total": 9,
        "ingestd_journal_damaged_bytes_total": 13,
        "ingestd_database_up": 1,
        "ingestd_commits_total": 4,
        "ingestd_commit_failures_total": 1,
        "ingestd_copy_rejections_total": 2,
        "ingestd_database_reconnects_total": 3,
        "ingestd_samples_committed_total": 900,
        "ingestd_committed_bytes_total": 7000,
        "ingestd_event_loop_lag_seconds_bucket{le=0.001}": 1,
        "ingestd_event_loop_lag_seconds_bucket{le=+Inf}": 1,
        "ingestd_event_loop_lag_seconds_count": 1,
        "ingestd_event_loop_lag_seconds_sum": 0.0005,
        "ingestd_clock_set": 0,
        "ingestd_channel_value{channel=Engine.Speed,source=can0,unit=rpm}": 1500.5,
        "ingestd_commit_seconds_bucket{le=0.1}": 2,
        "ingestd_commit_seconds_bucket{le=1.0}": 3,
        "ingestd_commit_seconds_bucket{le=+Inf}": 4,
        "ingestd_commit_seconds_count": 4,
        "ingestd_commit_seconds_sum": pytest.approx(3.35),
        "ingestd_wire_to_commit_seconds_bucket{le=0.5}": 1,
        "ingestd_wire_to_commit_seconds_bucket{le=+Inf}": 1,
        "ingestd_wire_to_commit_seconds_count": 1,
        "ingestd_wire_to_commit_seconds_sum": 0.25,
    }


def test_the_books_balance_in_a_scrape() -> None:
    """received = committed + pending + rejected + dropped, for every source, from the scraped text alone."""
    told = values(a_snapshot())
    for source in ("can0", "gps"):
        one = f"{{source={source}}}"
        dropped = sum(v for k, v in told.items() if k.startswith("ingestd_frames_dropped") and f"source={source}" in k)
        kept = sum(told[f"ingestd_frames_{name}{one}"] for name in ("committed_total", "pending", "rejected_total"))
        assert told[f"ingestd_frames_received_total{one}"] == kept + dropped


def test_no_books_before_the_journal_is_looked_through() -> None:
    """Until then they are of this process alone; Prometheus would take what comes next for new losses."""
    told = values(replace(a_snapshot(), recovered=False))
    assert not [name for name in told if name.startswith(("ingestd_frames_received", "ingestd_frames_dropped"))]
    assert told["ingestd_source_up{source=can0}"] == 1


def test_every_family_is_explained_and_typed() -> None:
    """A counter is a counter, and each has a sentence."""
    told = families(a_snapshot())
    for name, family in told.items():
        assert family.documentation.endswith("."), name
    kinds = {name: family.type for name, family in told.items()}
    assert kinds["ingestd_frames_received"] == kinds["ingestd_source_skipped_bytes"] == "counter"
    assert kinds["ingestd_frames_pending"] == kinds["ingestd_journal_bytes"] == "gauge"
    assert kinds["ingestd_commit_seconds"] == "histogram"


def test_the_process_is_told() -> None:
    """Memory and processor time of this very process, in every scrape and without a registry that remembers."""
    for _ in range(2):
        told = values(a_snapshot())
        assert told["process_resident_memory_bytes"] > 1_000_000
        assert told["process_cpu_seconds_total"] > 0


def test_names_that_are_not_plain() -> None:
    """A source may be called anything that a person types: the exposition quotes it."""
    snapshot = a_snapshot()
    name = 'Motor "links" \\ größer'
    odd = Snapshot(snapshot.version, {name: Books(received=1, pending=1)}, {}, snapshot.journal, snapshot.store)
    assert values(odd)[f"ingestd_frames_received_total{{source={name}}}"] == 1


def test_openmetrics_for_who_asks() -> None:
    """Prometheus prefers it."""
    body, content_type = render(a_snapshot(), "application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


def test_a_histogram_sorts_durations() -> None:
    """A bound belongs to its bucket, what is longer than all has one, and no clock makes the sum go down."""
    histogram = Histogram([0.1, 1.0])
    for seconds in (0.0, 0.1, 0.1000001, 1.0, math.inf, -1.0):
        histogram.observe(seconds)
    assert histogram.counts == [3, 2, 1]
    assert histogram.cumulative() == [("0.1", 3.0), ("1.0", 5.0), ("+Inf", 6.0)]
    histogram = Histogram()
    histogram.observe(0.3)
    histogram.observe(-5.0)
    assert histogram.sum == 0.3
    assert repr(histogram) == "<Histogram of 2, sum 0.3>"


def told_families() -> dict[str, Metric]:
    """Of a snapshot with everything in it, ours, without what sources count."""
    found, counted = families(a_snapshot()), {f"ingestd_source_{name}" for name in COUNTED}
    return {name: each for name, each in found.items() if name.startswith("ingestd_") and name not in counted}


def row_of(family: Metric) -> str:
    """As a line of the table in docs/metrics.md."""
    suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
    labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
    kind = "gauge" if family.name == "ingestd_build_info" else family.type
    return f"| `{family.name}{suffix}` | {kind} | {', '.join(labels)} | {family.documentation} |"


def test_the_documentation_has_every_metric_as_it_is() -> None:
    """Its name, type, labels and what it is; and none that is not there."""
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = {line for line in page.splitlines() if line.startswith("| `ingestd_") and "ingestd_source_NAME" not in line}
    wanted = {row_of(family) for family in told_families().values()}
    assert rows == wanted, "\n".join(sorted(wanted - rows))


def test_the_documentation_has_everything_that_sources_count() -> None:
    """Whatever a source or a framer has a counter of."""
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `((?!ingestd_)[a-z_]+)` \|", page, re.MULTILINE))
    files = [*(ROOT / "ingestd" / "sources").rglob("*.py"), *(ROOT / "ingestd" / "daemon").glob("*.py")]
    counted = {name for file in files for name in re.findall(r'\bcount\(\s*"(\w+)"', file.read_text(encoding="utf-8"))}
    counted |= set(re.findall(r'_status\.count, "(\w+)"', (ROOT / "ingestd/sources/canbus.py").read_text()))
    for make in FRAMERS.values():
        counted |= set(make().counters)
    assert documented == counted
