"""What Prometheus is told. prometheus_client is known here alone.

Nothing is counted here: a scrape takes one `Snapshot` of numbers that live elsewhere (the books in the journal, the
counters in the sources) and writes it down, so that no number exists twice and those of one scrape belong together.
The exception is `Histogram`, for durations, which somebody has to sort into buckets as they happen.

The books balance in every scrape, for each source:

    ingestd_frames_received_total = _committed_total + _pending + _rejected_total + sum of _dropped_total{reason}

They are kept in the journal and cover its lifetime; all other totals count from the start of the process.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ingestd.model import CONTROLLER_STATES, Books, Link, SourceStatus

# From a batch on the fastest setting to a server that is about to be given up.
SECONDS_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
LAG_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
# Always there, so that an alert on `increase` sees the first.
DROP_REASONS = ("overflow", "budget", "journal", "damage")
UNDECODED_REASONS = ("unknown", "damaged")


class Histogram:
    """How many durations were how long. One thread at a time."""

    def __init__(self, bounds: Sequence[float] = SECONDS_BOUNDS) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)  # by bound, the last one for what is longer than all
        self.sum = 0.0

    def __repr__(self) -> str:
        return f"<Histogram of {sum(self.counts)}, sum {self.sum:g}>"

    def observe(self, seconds: float) -> None:
        """Count one. A negative duration, which no clock of ours gives, counts as none."""
        seconds = max(seconds, 0.0)
        self.counts[bisect.bisect_left(self.bounds, seconds)] += 1
        self.sum += seconds

    def cumulative(self) -> list[tuple[str, float]]:
        """Prometheus' buckets: how many were at most as long as each bound."""
        total, buckets = 0, []
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        return buckets


@dataclass(frozen=True, slots=True)
class SourceNumbers:
    """How a source is now, and what has become of its frames since the process started."""

    last_frame_age_seconds: float = 0.0
    bus_load: float | None = None  # from 0 to about 1; None: not known
    decoded: int = 0  # frames, as far as they are committed …
    undecoded: Mapping[str, int] = field(default_factory=dict)  # … by UNDECODED_REASONS …
    short: int = 0  # … and those that are shorter than they should be, decoded or not


@dataclass(frozen=True, slots=True)
class ChannelValue:
    """The newest value of a channel that somebody wants to have as a metric."""

    source: str
    channel: str
    unit: str
    value: float


@dataclass(frozen=True, slots=True)
class JournalNumbers:
    """The state of the journal on disk."""

    writable: bool
    bytes: int
    bytes_max: int
    oldest_pending_seconds: float = 0.0  # age of the oldest frame that is not committed; 0 if there is none
    written_bytes: int = 0
    syncs: int = 0
    damaged_bytes: int = 0
    trouble: str = ""  # what is wrong, in words


@dataclass(frozen=True, slots=True)
class StoreNumbers:
    """How writing to PostgreSQL goes."""

    up: bool
    commits: int = 0
    commit_failures: int = 0
    rejections: int = 0
    reconnects: int = 0
    samples: int = 0
    copied_bytes: int = 0
    commit_seconds: Histogram = field(default_factory=Histogram)
    wire_to_commit_seconds: Histogram = field(default_factory=Histogram)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that is told, at one instant."""

    version: str
    books: Mapping[str, Books]
    statuses: Mapping[str, SourceStatus]
    journal: JournalNumbers
    store: StoreNumbers
    trouble: Mapping[str, str] = field(default_factory=dict)  # what is wrong that keeps nobody from recording, in words
    recovered: bool = True  # until then the books are of this process alone
    sources: Mapping[str, SourceNumbers] = field(default_factory=dict)
    loop_lag_seconds: Histogram = field(default_factory=lambda: Histogram(LAG_BOUNDS))
    is_clock_set: bool = True
    channels: Sequence[ChannelValue] = ()


def render(snapshot: Snapshot, accept: str = "") -> tuple[bytes, str]:
    """The exposition and its content type: OpenMetrics if the `accept` header asks for it, else Prometheus' text."""
    registry = CollectorRegistry()
    registry.register(_SnapshotCollector(snapshot))
    ProcessCollector(registry=registry)
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class _SnapshotCollector(Collector):
    """Writes a snapshot down as families of metrics."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterable[Metric]:
        snapshot = self._snapshot
        yield InfoMetricFamily("ingestd_build", "The program.", {"version": snapshot.version})
        if snapshot.recovered:  # Totals that jump from those of this process to those of the journal would look new.
            yield from _books(snapshot.books)
        yield from _sources(snapshot.statuses)
        yield from _frames(snapshot.sources)
        yield from _can(snapshot)
        yield from _journal(snapshot.journal)
        yield from _store(snapshot.store)
        yield _histogram("event_loop_lag_seconds", "How late the event loop was with what was due.",
                         snapshot.loop_lag_seconds)  # fmt: skip
        yield _gauge("clock_set", "1 while the wall clock can be believed.", snapshot.is_clock_set)
        if snapshot.channels:
            values = _gauge("channel_value", "Newest value, of channels in the configuration.", None,
                            "source", "channel", "unit")  # fmt: skip
            for each in snapshot.channels:
                values.add_metric([each.source, each.channel, each.unit], each.value)
            yield values


def _books(books: Mapping[str, Books]) -> Iterator[Metric]:
    received = _counter("frames_received", "Frames that arrived, those the kernel had to drop included.", "source")
    committed = _counter("frames_committed", "Frames that are in the database.", "source")
    pending = _gauge("frames_pending", "Frames that are in the journal and not yet in the database.", None, "source")
    rejected = _counter("frames_rejected", "Frames that the database can never take, set aside.", "source")
    dropped = _counter(
        "frames_dropped",
        "Frames that are lost: overflow (kernel), budget (journal full), journal (disk refused), damage (journal).",
        "source",
        "reason",
    )
    for source, of_source in sorted(books.items()):
        received.add_metric([source], of_source.received)
        committed.add_metric([source], of_source.committed)
        pending.add_metric([source], of_source.pending)
        rejected.add_metric([source], of_source.rejected)
        for reason in sorted({*DROP_REASONS, *of_source.dropped}):
            dropped.add_metric([source, reason], of_source.dropped.get(reason, 0))
    yield from (received, committed, pending, rejected, dropped)


def _sources(statuses: Mapping[str, SourceStatus]) -> Iterator[Metric]:
    up = _gauge("source_up", "1 while the source has its device.", None, "source")
    for source, status in sorted(statuses.items()):
        up.add_metric([source], status.link is Link.OPEN)
    yield up
    for name in sorted({name for status in statuses.values() for name in status.counters}):
        words = name.replace("_", " ")
        family = _counter(
            "source_" + re.sub(r"\W", "_", name, flags=re.ASCII), f"Counted by sources: {words}.", "source"
        )
        for source, status in sorted(statuses.items()):
            if name in status.counters:
                family.add_metric([source], status.counters[name])
        yield family


def _frames(sources: Mapping[str, SourceNumbers]) -> Iterator[Metric]:
    age = _gauge("source_last_frame_age_seconds", "Since the newest frame, or since the start.", None, "source")
    decoded = _counter("frames_decoded", "Frames that gave signals and are in the database.", "source")
    undecoded = _counter(
        "frames_undecoded",
        "Frames in the database that gave none: unknown (no database has them), damaged (no sense in them).",
        "source",
        "reason",
    )
    short = _counter("frames_short", "Frames in the database that are shorter than they should be.", "source")
    for source, numbers in sorted(sources.items()):
        age.add_metric([source], numbers.last_frame_age_seconds)
        decoded.add_metric([source], numbers.decoded)
        for reason in UNDECODED_REASONS:
            undecoded.add_metric([source, reason], numbers.undecoded.get(reason, 0))
        short.add_metric([source], numbers.short)
    yield from (age, decoded, undecoded, short)


def _can(snapshot: Snapshot) -> Iterator[Metric]:
    load = _gauge(
        "can_bus_load_ratio",
        "Part of the time that the bus was busy with recorded frames, from 0 to 1.",
        None,
        "source",
    )
    state = _gauge("can_controller_state", "1 for the state that the controller is in.", None, "source", "state")
    used = _gauge("source_receive_buffer_bytes", "Bytes that wait in the kernel.", None, "source")
    size = _gauge("source_receive_buffer_max_bytes", "Bytes that may wait in the kernel.", None, "source")
    for source, status in sorted(snapshot.statuses.items()):
        if (numbers := snapshot.sources.get(source)) is not None and numbers.bus_load is not None:
            load.add_metric([source], numbers.bus_load)
        for each in CONTROLLER_STATES if status.controller else ():
            state.add_metric([source, each], status.controller == each)
        if status.buffer_bytes is not None:
            used.add_metric([source], status.buffer_bytes)
            size.add_metric([source], status.buffer_bytes_max)
    yield from (load, state, used, size)


def _journal(journal: JournalNumbers) -> Iterator[Metric]:
    yield _gauge("journal_writable", "1 while the journal takes frames and the disk keeps them.", journal.writable)
    yield _gauge("journal_bytes", "Bytes of disk that the journal takes.", journal.bytes)
    yield _gauge("journal_max_bytes", "Bytes of disk that the journal may take.", journal.bytes_max)
    yield _gauge(
        "journal_oldest_pending_seconds",
        "Since the database had everything last, or since the start; 0 while it has.",
        journal.oldest_pending_seconds,
    )
    yield _counter("journal_written_bytes", "Bytes written to the journal.", value=journal.written_bytes)
    yield _counter("journal_syncs", "Times the journal was made durable.", value=journal.syncs)
    yield _counter("journal_damaged_bytes", "Bytes of the journal that could not be read.", value=journal.damaged_bytes)


def _store(store: StoreNumbers) -> Iterator[Metric]:
    yield _gauge("database_up", "1 while PostgreSQL takes what is sent.", store.up)
    yield _counter("commits", "Transactions that were committed.", value=store.commits)
    yield _counter(
        "commit_failures", "Transactions that failed; what was in them is kept.", value=store.commit_failures
    )
    yield _counter("copy_rejections", "Records that the database can never take, set aside.", value=store.rejections)
    yield _counter("database_reconnects", "Connections opened after the first.", value=store.reconnects)
    yield _counter("samples_committed", "Samples that are in the database.", value=store.samples)
    yield _counter("committed_bytes", "Bytes sent with COPY that are in the database.", value=store.copied_bytes)
    yield _histogram("commit_seconds", "How long a transaction took.", store.commit_seconds)
    yield _histogram(
        "wire_to_commit_seconds",
        "From the arrival of the oldest frame of a live batch to its commit.",
        store.wire_to_commit_seconds,
    )


def _gauge(name: str, says: str, value: float | None, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"ingestd_{name}", says, value, labels or None)


def _counter(name: str, says: str, *labels: str, value: float | None = None) -> CounterMetricFamily:
    return CounterMetricFamily(f"ingestd_{name}", says, value, labels or None)


def _histogram(name: str, says: str, histogram: Histogram) -> HistogramMetricFamily:
    return HistogramMetricFamily(f"ingestd_{name}", says, histogram.cumulative(), histogram.sum)
