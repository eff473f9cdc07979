"""The rules and a real Prometheus: they are valid, fire when they should, and ask for what the daemon has."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.commands import is_listening
from tests.recorder import Instrument, Recorder, lines_of, wait_until

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "prometheus"

# Of what a pty is not: a CAN controller.
OF_CAN = {"ingestd_can_bus_load_ratio", "ingestd_can_controller_state", "ingestd_source_receive_buffer_bytes"}
METRIC = re.compile(r"\b(?:ingestd|process)_\w+|\bup\b")


@pytest.fixture(scope="module")
def promtool() -> str:
    return program("promtool")


def program(name: str) -> str:
    """The distribution's; where CI runs it has to be there."""
    found = shutil.which(name)
    if found is None:
        message = f"{name} is not installed (Debian, Ubuntu: apt install prometheus)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found


def asked_for() -> dict[str, list[str]]:
    """The metrics in the rules and in the dashboards, with the expressions that ask for them."""
    expressions = re.findall(
        r"expr: (?:\|\n)?((?:.+\n)(?:            .+\n)*)", (FOLDER / "rules/ingestd.yml").read_text()
    )
    for path in sorted((ROOT / "grafana/dashboards").glob("*.json")):
        dashboard = json.loads(path.read_text())
        targets = [target for panel in dashboard["panels"] for target in panel["targets"]]
        expressions += [target["expr"] for target in targets if "expr" in target]
    found: dict[str, list[str]] = {}
    for expression in expressions:
        for name in METRIC.findall(expression):
            found.setdefault(name, []).append(expression)
    assert len(found) > 30
    return found


def test_the_files_are_valid(promtool: str) -> None:
    """What Prometheus reads, as its own tool sees it."""
    subprocess.run([promtool, "check", "config", FOLDER / "prometheus.yml"], check=True, timeout=60)
    subprocess.run([promtool, "check", "rules", *FOLDER.glob("rules/*.yml")], check=True, timeout=60)


def test_every_alert_fires_and_does_not(promtool: str) -> None:
    """By prometheus/tests, which have something to say of every alert."""
    tests = sorted(FOLDER.glob("tests/*.yml"))
    subprocess.run([promtool, "test", "rules", *tests], check=True, timeout=120)
    alerts = re.findall(r"- alert: (\w+)", (FOLDER / "rules/ingestd.yml").read_text())
    fired = set(re.findall(r'ALERTS\{alertname="(\w+)"', "".join(path.read_text() for path in tests)))
    assert len(alerts) >= 11
    assert set(alerts) == fired


class Prometheus:
    """A Prometheus of our own, with the repository's rules, that scrapes one daemon every half second."""

    def __init__(self, executable: str, folder: Path, target: str) -> None:
        config = (FOLDER / "prometheus.yml").read_text()
        config = config.replace("localhost:9464", target).replace("rules/", f"{FOLDER}/rules/")
        config = config.replace("_interval: 5s", "_interval: 500ms").replace("_interval: 15s", "_interval: 1s")
        assert target in config
        (folder / "prometheus.yml").write_text(config)
        with closing(socket.socket()) as taken:  # It cannot be asked which port it has chosen.
            taken.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{taken.getsockname()[1]}"
        self.log = folder / "prometheus.log"
        options = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/prometheus"]
        with self.log.open("wb") as log:
            command = [executable, *options, f"--web.listen-address={self.address}"]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def get(self, path: str, **query: str) -> Any:
        """What its API says."""
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def value(self, expression: str) -> float | None:
        """Of the first series of an expression, now."""
        found = self.get("query", query=expression)["result"]
        return float(found[0]["value"][1]) if found else None

    def is_ready(self) -> bool:
        try:
            return self.value('up{job="ingestd"}') == 1
        except OSError:
            assert self.process.poll() is None, self.log.read_text()
            return False

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)


@pytest.fixture
def recorder(migrated: str, tmp_path: Path) -> Iterator[Recorder]:
    """A daemon that records an instrument, with every frame in the database."""
    instrument = Instrument(tmp_path / "line")
    lines = lines_of(instrument).replace('"lines"', '"keyvalue"')
    recorder = Recorder(tmp_path, migrated, lines, settings='[metrics]\nchannels = ["line/n"]\n')
    try:
        instrument.start()
        recorder.start()
        is_listening(recorder)
        yield recorder
    finally:
        recorder.close()
        instrument.close()


def test_a_prometheus_scrapes_a_daemon(recorder: Recorder, tmp_path: Path) -> None:
    """It gets frames and balanced books; whatever rules and dashboards ask for is there; no alert fires."""
    recorder.wait_for("listening http=")
    found = re.search(r"listening http=(\S+)", recorder.log())
    assert found is not None
    prometheus = Prometheus(program("prometheus"), tmp_path, found[1])
    try:
        wait_until(prometheus.is_ready, "scrape", more=prometheus.log.read_text)
        committed = "sum(rate(ingestd_frames_committed_total[30s]))"
        wait_until(lambda: (prometheus.value(committed) or 0) > 0, "committed frames", more=recorder.log)
        balance = (
            "sum(ingestd_frames_received_total - ingestd_frames_committed_total - ingestd_frames_pending"
            " - ingestd_frames_rejected_total) - sum(ingestd_frames_dropped_total)"
        )
        assert prometheus.value(balance) == 0
        newest = 'ingestd_channel_value{source="line",channel="n"}'
        wait_until(lambda: (prometheus.value(newest) or 0) > 0, "the channel's value", more=recorder.log)
        names = set(prometheus.get("label/__name__/values"))
        counted = {name for name in asked_for() if name.startswith("ingestd_source_") and name.endswith("_total")}
        assert set(asked_for()) <= names | OF_CAN | counted
        page = (ROOT / "docs/metrics.md").read_text()
        assert all(f"`{name}`" in page for name in OF_CAN)
        assert all(f"`{name.removeprefix('ingestd_source_').removesuffix('_total')}`" in page for name in counted)
        assert set(prometheus.get("label/job/values")) == {"ingestd"}
        wait_until(
            lambda: all(
                rule["health"] == "ok" for group in prometheus.get("rules")["groups"] for rule in group["rules"]
            ),
            "evaluated rules",
            more=lambda: json.dumps(prometheus.get("rules"), indent=1),
        )
        assert [alert for alert in prometheus.get("alerts")["alerts"] if alert["state"] == "firing"] == []
    finally:
        prometheus.close()
