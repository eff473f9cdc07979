"""The dashboard Service, of Prometheus: is it healthy, is anything lost, how far behind is the database."""

from __future__ import annotations

from panels import (
    ALL,
    GREEN,
    LAST,
    PROMETHEUS,
    RED,
    STEPS_SHOWN,
    YELLOW,
    Json,
    dashboard,
    over_time,
    panel,
    promql,
    stat,
    variable,
)


def of(metric: str, *conditions: str) -> str:
    """A metric of the chosen daemons."""
    return metric + "{" + ", ".join(['job="ingestd"', 'instance=~"$instance"', *conditions]) + "}"


def rate(metric: str, *by: str) -> str:
    """A second, of each daemon and what else it is told apart `by`."""
    return f"sum by ({', '.join(['instance', *by])}) (rate({of(metric)}[$__rate_interval]))"


def quantile(share: float, metric: str) -> str:
    """Of a histogram."""
    return f"histogram_quantile({share}, sum by (instance, le) (rate({of(f'{metric}_bucket')}[$__rate_interval])))"


def share_waiting() -> str:
    """Of the journal's limit, what waits for the database: frames that wait, at the bytes a frame took of late."""
    written, received = of("ingestd_journal_written_bytes_total"), of("ingestd_frames_received_total")
    return f"""
        sum by (instance) ({of("ingestd_frames_pending")})
        * on (instance) sum by (instance) (increase({written}[6h]))
        / on (instance) (sum by (instance) (increase({received}[6h])) > 0)
        / on (instance) sum by (instance) ({of("ingestd_journal_max_bytes")})
    """


def unaccounted() -> str:
    """Frames of which the books do not know what became of them."""
    return f"""
        sum by (instance) (abs(
        {of("ingestd_frames_received_total")} - {of("ingestd_frames_committed_total")}
        - {of("ingestd_frames_pending")} - {of("ingestd_frames_rejected_total")}
        - on (instance, source) sum by (instance, source) ({of("ingestd_frames_dropped_total")})))
    """


YES_NO = [("0", "no", RED), ("1", "yes", GREEN)]
NONE_IS_GOOD = [GREEN, (1, RED)]


def health() -> list[tuple[int, Json]]:
    """The first row."""
    return [
        (3, stat("runs", "Whether the daemon answers. If not: systemctl status ingestd.",
                 promql(of("up"), "{{instance}}", instant=True), names=YES_NO, steps=[RED, (1, GREEN)])),
        (3, stat("records", "Whether the journal takes frames. If not, the disk is full or refuses: make room.",
                 promql(of("ingestd_journal_writable"), "{{instance}}", instant=True), names=YES_NO,
                 steps=[RED, (1, GREEN)])),
        (3, stat("database", "Whether PostgreSQL takes what is sent. If not, everything waits in the journal.",
                 promql(of("ingestd_database_up"), "{{instance}}", instant=True),
                 names=[("0", "away", YELLOW), ("1", "up", GREEN)], steps=[YELLOW, (1, GREEN)])),
        (3, stat("sources down", "Sources without their device; they are tried on.",
                 promql(f"sum by (instance) (1 - {of('ingestd_source_up')})", "{{instance}}", instant=True),
                 steps=[GREEN, (1, YELLOW)])),
        (3, stat("clock", "Whether the wall clock is set. If not, what is recorded has quality 32: its date is wrong.",
                 promql(of("ingestd_clock_set"), "{{instance}}", instant=True),
                 names=[("0", "not set", YELLOW), ("1", "set", GREEN)], steps=[YELLOW, (1, GREEN)])),
        (3, stat("lost", "Frames that were lost, over the life of the journal; which and why is below.",
                 promql(f"sum by (instance) ({of('ingestd_frames_dropped_total')})", "{{instance}}", instant=True),
                 steps=NONE_IS_GOOD)),
        (3, stat("rejected", "Frames that PostgreSQL can never take, set aside: ingestd journal export --rejected.",
                 promql(f"sum by (instance) ({of('ingestd_frames_rejected_total')})", "{{instance}}", instant=True),
                 steps=[GREEN, (1, YELLOW)])),
        (3, stat("unaccounted", "received - committed - pending - rejected - dropped. Not 0: a defect, report it.",
                 promql(unaccounted(), "{{instance}}", instant=True), steps=NONE_IS_GOOD)),
    ]  # fmt: skip


def service() -> Json:
    """How the daemon does."""
    source = "{{instance}} {{source}}"
    waiting = [
        (6, panel("gauge", "journal: waiting, of its limit",
                  "What waits for the database, of max_bytes, reckoned from the bytes a frame took in the last six "
                  "hours. When it is full frames are dropped. What the database has already may fill the rest.",
                  promql(share_waiting(), "{{instance}}", instant=True), unit="percentunit", minimum="0",
                  steps=[GREEN, (0.5, YELLOW), (0.8, RED)])),
        (9, over_time("backlog", "Frames that are not yet in the database. Half a second of them is normal.",
                      promql(of("ingestd_frames_pending"), source), unit="short")),
        (9, over_time("oldest frame that waits", "How long ago the database last had everything.",
                      promql(of("ingestd_journal_oldest_pending_seconds"), "{{instance}}"), unit="s",
                      custom=STEPS_SHOWN, steps=[GREEN, (60, YELLOW), (3600, RED)])),
    ]  # fmt: skip
    delivery = [
        (8, over_time("wire to commit", "From the arrival of the oldest frame of a live batch to its commit.",
                      promql(quantile(0.5, "ingestd_wire_to_commit_seconds"), "{{instance}} half"),
                      promql(quantile(0.99, "ingestd_wire_to_commit_seconds"), "{{instance}} 99 %"), unit="s")),
        (8, over_time("commit", "How long a transaction takes.",
                      promql(quantile(0.5, "ingestd_commit_seconds"), "{{instance}} half"),
                      promql(quantile(0.99, "ingestd_commit_seconds"), "{{instance}} 99 %"), unit="s")),
        (8, over_time("transactions", "A second; what failed is kept and sent again.",
                      promql(rate("ingestd_commits_total"), "{{instance}} committed"),
                      promql(rate("ingestd_commit_failures_total"), "{{instance}} failed"),
                      promql(rate("ingestd_copy_rejections_total"), "{{instance}} refused"),
                      promql(rate("ingestd_database_reconnects_total"), "{{instance}} connections"), unit="ops")),
    ]  # fmt: skip
    frames = [
        (8, over_time("frames received", "A second, by source.",
                      promql(rate("ingestd_frames_received_total", "source"), source), unit="cps")),
        (8, over_time("frames lost or rejected",
                      "A second. overflow: the kernel's buffer; budget: the journal was full; journal: the disk "
                      "refused; damage: the journal could not be read.",
                      promql(rate("ingestd_frames_dropped_total", "source", "reason"), f"{source} {{{{reason}}}}"),
                      promql(rate("ingestd_frames_rejected_total", "source"), f"{source} rejected"), unit="cps",
                      custom={"drawStyle": "bars", "fillOpacity": 100})),
        (8, over_time("frames decoded, and not",
                      "A second. unknown: no signal database has the id; damaged: no sense in them; short: cut off, "
                      "and counted among the others as well.",
                      promql(rate("ingestd_frames_decoded_total", "source"), f"{source} decoded"),
                      promql(rate("ingestd_frames_undecoded_total", "source", "reason"), f"{source} {{{{reason}}}}"),
                      promql(rate("ingestd_frames_short_total", "source"), f"{source} short"), unit="cps")),
    ]  # fmt: skip
    state = "ingestd_can_controller_state"
    names = ("error-active", "error-warning", "error-passive", "bus-off")
    number = " or ".join(f"{n} * " + of(state, f'state="{name}"') for n, name in enumerate(names))
    states = [("0", "active", GREEN), ("1", "warning", YELLOW), ("2", "passive", "orange"), ("3", "bus off", RED)]
    buses = [
        (8, over_time("bus load", "Of what the bit rate allows.", promql(of("ingestd_can_bus_load_ratio"), source),
                      unit="percentunit", minimum="0", custom=STEPS_SHOWN,
                      steps=[GREEN, (0.7, YELLOW), (0.9, RED)])),
        (8, panel("state-timeline", "CAN controllers", "passive and bus off: wiring, termination or bit rate.",
                  promql(f"sum by (instance, source) ({number})", source), names=states,
                  steps=[GREEN, (1, YELLOW), (3, RED)], custom={"fillOpacity": 70, "lineWidth": 0},
                  options={"mergeValues": True, "showValue": "auto", "rowHeight": 0.9})),
        (8, panel("bargauge", "since the last frame", "Of each source. Red: silent for a minute.",
                  promql(of("ingestd_source_last_frame_age_seconds"), source, instant=True), unit="s", minimum="0",
                  steps=[GREEN, (10, YELLOW), (60, RED)],
                  options={"orientation": "horizontal", "displayMode": "basic",
                           "reduceOptions": LAST})),
    ]  # fmt: skip
    disk = [
        (8, over_time("journal on the disk",
                      "Up to its limit it keeps what the database has, too: should that be lost, it is sent again.",
                      promql(of("ingestd_journal_bytes"), "{{instance}}"),
                      promql(of("ingestd_journal_max_bytes"), "{{instance}} limit"), unit="bytes", minimum="0")),
        (8, over_time("bytes", "A second: from serial lines and buses, into the journal, into the database.",
                      promql(rate("ingestd_source_received_bytes_total", "source"), source),
                      promql(rate("ingestd_journal_written_bytes_total"), "{{instance}} journal"),
                      promql(rate("ingestd_committed_bytes_total"), "{{instance}} database"), unit="Bps")),
        (8, over_time("samples committed", "A second: signals that are in the database.",
                      promql(rate("ingestd_samples_committed_total"), "{{instance}}"), unit="cps")),
    ]  # fmt: skip
    process = [
        (6, over_time("event loop late by", "99 % of the time by less. More than a quarter of a second: overloaded.",
                      promql(quantile(0.99, "ingestd_event_loop_lag_seconds"), "{{instance}}"), unit="s",
                      custom=STEPS_SHOWN, steps=[GREEN, (0.25, YELLOW)])),
        (6, over_time("processor", "Of one core.", promql(rate("process_cpu_seconds_total"), "{{instance}}"),
                      unit="percentunit", minimum="0")),
        (6, over_time("memory", "Resident. The service may take 1 GiB.",
                      promql(of("process_resident_memory_bytes"), "{{instance}}"), unit="bytes", minimum="0")),
        (6, over_time("receive buffers", "Of the kernel, for each source: how long the daemon may be stalled.",
                      promql(of("ingestd_source_receive_buffer_bytes"), source), unit="bytes", minimum="0")),
    ]  # fmt: skip
    values = [
        (24, over_time("values", "Channels that the configuration shows to Prometheus; all are in Session.",
                       promql(of("ingestd_channel_value"), "{{source}} {{channel}} {{unit}}"))),
    ]  # fmt: skip
    chosen = variable(
        "instance", "daemon", 'label_values(up{job="ingestd"}, instance)', source=PROMETHEUS, multi=True,
        includeAll=True, allValue=".*", current=ALL,
    )  # fmt: skip
    return dashboard(
        "ingestd-service", "ingestd: service", "Is it healthy, is anything lost, how far behind is the database.",
        [health(), waiting, delivery, frames, buses, disk, process, values], variables=[chosen], refresh="10s",
    )  # fmt: skip
