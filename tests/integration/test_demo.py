"""The simulated car as a process with devices, recorded from outside; and the demo, from its command to its books."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import serial

from ingestd import demo
from ingestd.demo.ports import VirtualInterface
from ingestd.demo.simulate import frames
from ingestd.demo.simulation import Simulation
from ingestd.demo.vehicle import drive
from ingestd.errors import IngestdError
from ingestd.model import Clock, Event, FrameBatch, Link
from ingestd.sources.canbus import CanBus
from tests.commands import run_ingestd
from tests.conftest import psql

SECONDS_MAX = 30.0
SLCAN = {"sleep_after_open": 0.0, "bitrate": 500_000}


class Recorded:
    """A recorder that keeps the frames."""

    def __init__(self) -> None:
        self.batches: list[FrameBatch] = []
        self.counts: Counter[str] = Counter()

    def frames(self, batch: FrameBatch, clock: Clock) -> None:
        self.batches.append(batch)
        self.counts[batch.source] += len(batch)

    def overflow(self, source: str, frames_count: int, from_ns: int, to_ns: int) -> None:
        raise AssertionError("nothing is lost")

    def event(self, event: Event) -> None:
        raise AssertionError(f"nothing happens: {event}")

    def rows(self, source: str) -> list[tuple[int, int, bytes]]:
        return [
            (int(batch.arbitration_id[i]), int(batch.flags[i]), batch.data[i, : batch.length[i]].tobytes())
            for batch in self.batches
            if batch.source == source
            for i in range(len(batch))
        ]


async def test_the_car_is_recorded_as_it_drives() -> None:
    """Over slcan and a serial line: all that was sent arrives, in order, value for value, at the time it was due."""
    recorded, said = Recorded(), b""
    with Simulation("slcan") as car:
        buses = [CanBus(name, "slcan", car.places[name]["channel"], **SLCAN) for name in demo.BUSES]
        tasks = [asyncio.create_task(bus.run(recorded)) for bus in buses]
        line = serial.Serial(car.places[demo.GPS]["port"], 115_200, timeout=0)
        async with asyncio.timeout(SECONDS_MAX):
            while not all(bus.status.link is Link.OPEN for bus in buses):  # noqa: ASYNC110 - other threads open them
                await asyncio.sleep(0.01)
            await asyncio.to_thread(car.play)
            while car.sent()["powertrain"] < 3000:  # The second piece of the drive has begun then.
                await asyncio.sleep(0.05)
                said += line.read(65536)
            sent = await asyncio.to_thread(car.stop)
            while any(recorded.counts[bus] < sent[bus] for bus in demo.BUSES) or said.count(b"\n") < sent[demo.GPS]:
                await asyncio.sleep(0.01)
                said += line.read(65536)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        line.close()
    assert dict(recorded.counts) == {bus: sent[bus] for bus in demo.BUSES}
    assert said.count(b"\n") == sent[demo.GPS] > 150
    for due in frames(drive(12), start_ns=0):
        rows = recorded.rows(due.source)
        expected = [
            (int(due.arbitration_id[i]), int(due.flags[i]), due.data[i, : due.length[i]].tobytes())
            for i in range(len(rows))
        ]
        assert rows == expected
        stamps = np.concatenate([batch.ts_ns for batch in recorded.batches if batch.source == due.source])
        late_ms = (stamps - stamps[0] - (due.ts_ns[: len(stamps)] - due.ts_ns[0])) / 1e6
        assert np.median(np.abs(late_ms - np.median(late_ms))) < 20, "it is played in real time"


def test_its_configuration_is_toml_for_both_kinds_of_bus() -> None:
    """Three sources; nothing is sent before it is told to play, and stop says so."""
    with Simulation("slcan") as car:
        tables = tomllib.loads(car.configuration())
        assert [bus["name"] for bus in tables["can"]] == ["powertrain", "body"]
        assert all(Path(bus["channel"]).is_char_device() for bus in tables["can"])
        assert all(Path(file).is_file() for bus in tables["can"] for file in bus["dbc"])
        assert tables["serial"][0]["port"] == car.places["gps"]["port"]
        assert car.stop() == {"powertrain": 0, "body": 0, "gps": 0}
        car.places["body"] = {"interface": "socketcan", "channel": "demo-body"}
        assert tomllib.loads(car.configuration())["can"][1]["channel"] == "demo-body"
        device = Path(tables["serial"][0]["port"])
    assert not device.exists(), "the devices go with the car"


def test_the_car_dies_with_its_parent() -> None:
    """Also when nobody could tell it to: its input ends."""
    program = (
        "import sys, time; from ingestd.demo.simulation import Simulation; car = Simulation('slcan'); car.__enter__();"
        "print(car._process.pid, flush=True); car.play(); print('playing', flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert parent.stdout.readline() == "playing\n"
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + SECONDS_MAX
    while alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_car_that_died_is_an_error() -> None:
    """Whoever plays with it learns of it instead of waiting."""
    with Simulation("slcan") as car:
        assert car._process is not None
        car._process.kill()
        car._process.wait()
        with pytest.raises(IngestdError, match="process"):
            car.play()


@pytest.fixture
def kernel_can() -> None:
    """Skips where the kernel has no virtual CAN or we may not make an interface."""
    try:
        VirtualInterface("demo-probe").remove()
    except OSError as error:
        pytest.skip(f"no virtual CAN: {error}")


def test_the_car_on_interfaces_of_the_kernel(kernel_can: None) -> None:
    """Made, filled and removed; every frame that is counted arrives as it was sent, CAN FD too."""
    with Simulation("vcan") as car:
        readers = {}
        for bus in demo.BUSES:
            assert car.places[bus] == {"interface": "socketcan", "channel": f"demo-{bus}"}
            readers[bus] = socket.socket(socket.AF_CAN, socket.SOCK_RAW, socket.CAN_RAW)
            readers[bus].setsockopt(socket.SOL_CAN_RAW, socket.CAN_RAW_FD_FRAMES, 1)
            readers[bus].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
            readers[bus].bind((f"demo-{bus}",))
            readers[bus].setblocking(False)
        car.play()
        received: dict[str, list[bytes]] = {bus: [] for bus in demo.BUSES}

        def read() -> None:
            for bus, reader in readers.items():
                with contextlib.suppress(BlockingIOError):
                    while True:
                        received[bus].append(reader.recv(72))

        until = time.monotonic() + 5
        while time.monotonic() < until:
            read()
            time.sleep(0.01)
        sent = car.stop()
        read()
        assert {bus: len(rows) for bus, rows in received.items()} == {bus: sent[bus] for bus in demo.BUSES}
        assert sent["powertrain"] > 2000
        for due in frames(drive(10), start_ns=0):
            for row, frame in enumerate(received[due.source]):
                assert int.from_bytes(frame[:4], sys.byteorder) & 0x1FFF_FFFF == due.arbitration_id[row]
                assert frame[4] == due.length[row]
                assert frame[8 : 8 + frame[4]] == due.data[row, : due.length[row]].tobytes()
        for reader in readers.values():
            reader.close()
    assert not Path("/sys/class/net/demo-body").exists()


def run_demo(home: Path, dsn: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "INGESTD_HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-m", "ingestd", "demo", "--dsn", dsn, *arguments],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def balances(output: str) -> dict[str, list[str]]:
    """The last table: the cells of each source."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if "│" in line]
    return {row[0]: row[1:] for row in rows}


def test_demo_records_and_balances(migrated: str, tmp_path: Path) -> None:
    """From the command to SQL: all that the car sent is stored, and the signals are those of its drive."""
    done = run_demo(tmp_path, migrated, "--seconds", "8", "--buses", "slcan")
    assert done.returncode == 0, done.stdout + done.stderr
    books = balances(done.stdout)
    assert set(books) == {"powertrain", "body", "gps"}
    for source, (sent, received, stored, rejected, lost, verdict) in books.items():
        assert sent == received == stored
        assert (rejected, lost, verdict) == ("0", "0", "balanced"), source
        count = psql(migrated, f"SELECT sum(frame_count) FROM frame_chunks WHERE source = '{source}'")
        assert f"{int(count):,}" == stored
    assert int(books["powertrain"][0].replace(",", "")) > 7 * 550
    assert "received" in done.stdout, "a line in between"
    assert "/metrics" in done.stdout or "address is taken" in done.stdout
    assert "latest_signals" in done.stdout
    fast = "SELECT max(value_num) > 30 FROM signals WHERE channel = 'Speed.VehicleSpeed'"
    north = "SELECT bool_and(value_num BETWEEN 52.46 AND 52.49) FROM signals WHERE channel = 'RMC.lat'"
    assert psql(migrated, fast, north).split() == ["t", "t"]


def test_demo_goes_on_from_a_journal_of_one_that_was_killed(migrated: str, tmp_path: Path) -> None:
    """What the first one journalled is stored by the second, whose own books balance all the same."""
    environment = {**os.environ, "INGESTD_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "ingestd", "demo", "--dsn", migrated, "--buses", "slcan"]
    with (tmp_path / "out").open("w") as output:
        first = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    journal = tmp_path / "demo" / "journal"
    deadline = time.monotonic() + SECONDS_MAX
    while "5 s " not in (tmp_path / "out").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    first.kill()
    first.wait()
    assert journal.is_dir()
    done = run_demo(tmp_path, migrated, "--seconds", "3", "--buses", "slcan")
    assert done.returncode == 0, done.stdout + done.stderr
    of_second = sum(int(row[2].replace(",", "")) for row in balances(done.stdout).values())
    stored = int(psql(migrated, "SELECT sum(frame_count) FROM frame_chunks"))
    assert stored > of_second + 1500


def test_demo_ends_at_ctrl_c_and_balances(migrated: str, tmp_path: Path) -> None:
    """SIGINT is the usual end, not a failure. Commands find it meanwhile; frames of all its sessions are counted."""
    environment = {**os.environ, "INGESTD_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "ingestd", "demo", "--dsn", migrated, "--buses", "slcan"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        try:
            for line in running.stdout:
                if line.startswith("5 s"):
                    break
                if line.startswith("commands "):
                    file = tmp_path / "demo/ingestd.toml"
                    assert f"ingestd tail -c {file}" in line
                    run_ingestd("sessions", "start", "-c", file, "--name", "second")
            running.send_signal(signal.SIGINT)
            out, errors = running.communicate(timeout=60)
        finally:
            running.kill()
    assert running.returncode == 0, errors
    assert [row[-1] for row in balances(out).values()] == ["balanced"] * 3
    assert psql(migrated, "SELECT name FROM sessions ORDER BY id DESC LIMIT 1") == "second"


def test_demo_without_a_schema_says_so_at_once(database: str, tmp_path: Path) -> None:
    """A database of one's own has to be prepared; the car is not started for nothing."""
    done = run_demo(tmp_path, database, "--seconds", "1")
    assert done.returncode == 1
    assert "ingestd db init" in done.stderr
