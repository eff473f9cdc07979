"""`ingestd tail` beside a running daemon: live values, whatever the database and whoever reads do."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import reduce
from operator import xor
from pathlib import Path
from typing import Any

import pytest

from ingestd.cli.tail import of_none
from tests.books import in_metrics
from tests.recorder import Instrument, Recorder, wait_until

AWAY = "postgresql://nobody@127.0.0.1:1/telemetry"


def sentence(number: int) -> bytes:
    """NMEA 0183 with a number in it: so many metres."""
    content = b"GPGGA,000001,0000.00,N,00000.00,E,1,08,1.0,%d.0,M,0.0,M,," % number
    return b"$%s*%02X\r\n" % (content, reduce(xor, content))


@pytest.fixture
def gps(tmp_path: Path) -> Iterator[Instrument]:
    device = Instrument(tmp_path / "gps", pause_s=0.005, say=sentence)
    device.start()
    yield device
    device.close()


@pytest.fixture
def daemon(tmp_path: Path, gps: Instrument) -> Iterator[Recorder]:
    """It records a GPS; its database is away."""
    recorder = Recorder(tmp_path, AWAY, f'[[serial]]\nname = "gps"\nport = "{gps.link}"\nprotocol = "nmea"\n')
    recorder.start()
    try:
        recorder.wait_for("listening control")
        yield recorder
    finally:
        recorder.close()


def tail(daemon: Recorder, *arguments: str, **how: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ingestd", "tail", "-c", str(daemon.config), "--every", "0.1", *arguments]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **{"stdout": subprocess.PIPE, **how}
    )


def test_lines_and_json_in_a_pipe(daemon: Recorder) -> None:
    """The newest value of each channel that matches, again and again; the database is not needed."""
    with tail(daemon, "*/gga.alt") as process:
        assert process.stdout is not None
        lines = [process.stdout.readline().split() for _ in range(3)]
        process.terminate()
    assert [line[1:3] for line in lines] == 3 * [["gps/GP", "GGA.alt"]]
    heights = [float(line[3]) for line in lines]
    assert heights == sorted(set(heights))
    assert [line[4] for line in lines] == 3 * ["m"]
    with tail(daemon, "gps/GP/GGA.*", "--json") as process:
        assert process.stdout is not None
        values = [json.loads(process.stdout.readline()) for _ in range(40)]
        process.terminate()
    channels = {value["channel"] for value in values}
    assert {"GGA.lat", "GGA.alt", "GGA.numSV"} <= channels
    assert all(channel.startswith("GGA.") for channel in channels)
    (alt,) = {(value["unit"], value["quality"]) for value in values if value["channel"] == "GGA.alt"}
    assert alt == ("m", 0)
    stamps = [value["ts_mono_ns"] for value in values if value["channel"] == "GGA.alt"]
    assert stamps == sorted(set(stamps))
    wait_until(lambda: "watched no more" in daemon.log(), "end of both", more=daemon.log)
    assert "Traceback" not in daemon.log()


def test_a_reader_who_does_not_read(daemon: Recorder, gps: Instrument) -> None:
    """Capture goes on, every frame is in the journal, and what is read in the end is of now, without a backlog."""
    with tail(daemon, "--json") as process:
        assert process.stdout is not None
        process.stdout.readline()
        before = in_metrics(daemon)["gps"].received
        wait_until(lambda: in_metrics(daemon)["gps"].received >= before + 2000, "frames", more=daemon.log)
        sent = gps.stop()
        heights = []
        for line in process.stdout:
            value = json.loads(line)
            if value["channel"] == "GGA.alt":
                heights.append(value["value_num"])
            if heights and heights[-1] == sent - 1:
                break
        process.terminate()
    assert heights == sorted(set(heights))
    assert len(heights) < sent // 10
    assert in_metrics(daemon)["gps"].dropped == {}


def test_on_a_terminal(daemon: Recorder) -> None:
    """A table in place, with rates."""
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    shown = b""

    def has(*texts: bytes) -> bool:
        nonlocal shown
        with contextlib.suppress(BlockingIOError):
            shown += os.read(master, 65536)
        return all(text in shown for text in texts)

    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    with tail(daemon, stdout=slave, env=environment) as process:
        wait_until(
            lambda: has(b"GGA.alt", b"per second", b"gps/GP", b" m "), "a table", more=lambda: repr(shown[-2000:])
        )
        process.terminate()
    os.close(master)
    os.close(slave)


def test_the_daemon_ends(daemon: Recorder) -> None:
    """So does the tail, with a word; and there is a word where no daemon is."""
    with tail(daemon) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        daemon.stop()
        process.stdout.read()
        assert process.wait(30) == 1
        assert "the daemon" in process.stderr.read()
    assert "Traceback" not in daemon.log()
    with tail(daemon) as process:
        assert process.wait(30) == 1
        assert process.stderr is not None
        assert "no daemon runs here" in process.stderr.read()


def test_nothing_matches(daemon: Recorder) -> None:
    """It is said once, with how many channels there are; and where none has a value, that."""
    with tail(daemon, "GGA.speed") as process:
        assert process.stderr is not None
        said = process.stderr.readline()
        assert re.fullmatch(
            r"warning: no channel matches 'GGA\.speed' so far; there are \d+ channels: ingestd tail shows them all\n",
            said,
        )
        process.terminate()
        assert process.stderr.read() == ""
    assert "no channel has a value so far: the daemon's /ready" in of_none("*", 0)


def test_what_is_wrong_in_the_call(daemon: Recorder) -> None:
    """Exit code 2 and what can be had."""
    with tail(daemon, "--every", "1000") as process:
        assert process.wait(30) == 2
        assert process.stderr is not None
        assert "from 0.05 to 60" in process.stderr.read()
