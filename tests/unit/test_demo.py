"""The simulated car: its databases load without complaint and its drive is one a car could have made."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import cantools
import numpy as np
import pytest
from cantools.database.can import Database

from ingestd import demo
from ingestd.demo.simulate import START_NS, frames, write_capture
from ingestd.demo.vehicle import FINAL_DRIVE, GEAR_RATIOS, WHEEL_RADIUS_M, drive, lap_length_m
from ingestd.model import Flag

SECONDS = 120
Series = tuple[np.ndarray, np.ndarray]  # seconds, values


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "drive.log"
    write_capture(path, SECONDS)
    return path


@pytest.fixture(scope="module")
def databases() -> dict[str, Database]:
    return {bus: cantools.database.load_file(path) for bus, path in demo.databases().items()}


@pytest.fixture(scope="module")
def decoded(capture: Path, databases: dict[str, Database]) -> dict[str, Series]:
    """Every signal of the capture as cantools reads it, from the text, with nothing of ours in between."""
    series: dict[str, list[tuple[float, float]]] = {}
    for line in capture.read_text(encoding="ascii").splitlines():
        stamp, bus, frame = line.split(" ")
        identifier, _, data = frame.partition("#")
        payload = bytes.fromhex(data[2:] if data.startswith("#") else data)
        values = databases[bus].decode_message(int(identifier, 16), payload, decode_choices=False)
        at_s = float(stamp[1:-1]) - START_NS / 1e9
        for name, value in values.items():
            series.setdefault(name, []).append((at_s, value))
    return {name: tuple(np.array(rows).T) for name, rows in series.items()}


def at(series: Series, seconds: np.ndarray) -> np.ndarray:
    """The latest value at each time."""
    return series[1][np.maximum(np.searchsorted(series[0], seconds, side="right") - 1, 0)]


def test_databases_load_strictly_without_a_warning() -> None:
    """Our own files must be the last to need excuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in demo.databases().values():
            database = cantools.database.load_file(path, strict=True)
            assert all(message.cycle_time for message in database.messages)
            assert all(signal.minimum is not None for message in database.messages for signal in message.signals)


def test_databases_show_every_kind_of_signal(databases: dict[str, Database]) -> None:
    """A newcomer's first import exercises what the decoder can do."""
    messages = [message for database in databases.values() for message in database.messages]
    signals = [signal for message in messages for signal in message.signals]
    assert {signal.byte_order for signal in signals} == {"little_endian", "big_endian"}
    for byte_order in ("little_endian", "big_endian"):
        assert any(signal.is_signed and signal.byte_order == byte_order for signal in signals)
    assert any(signal.is_float for signal in signals)
    assert any(signal.choices for signal in signals)
    assert any(message.is_multiplexed() for message in messages)
    assert any(message.is_fd and message.is_extended_frame for message in messages)
    names = [signal.name for signal in signals if signal.name != "Counter"]
    assert len(names) == len(set(names))


def test_capture_is_identical_every_time(capture: Path, tmp_path: Path) -> None:
    """Importing the demo twice must be importing one file twice."""
    again = tmp_path / "again.log"
    assert demo.write_capture(again) == len(capture.read_bytes().splitlines())
    assert again.read_bytes() == capture.read_bytes()


def test_longer_drive_begins_with_the_shorter_one() -> None:
    """A drive can be extended while it is being played to a live bus."""
    short, long = drive(7), drive(11)
    for name, column in short.items():
        np.testing.assert_array_equal(column, long[name][: len(column)], err_msg=name)


@pytest.mark.parametrize("rate_hz", [10.0, 50.0, 250.0])
def test_drive_hardly_depends_on_the_sampling_rate(rate_hz: float) -> None:
    """The rate is how often one looks, not another car."""
    reference, other = drive(60), drive(60, rate_hz)
    assert len(other["speed"]) == 60 * rate_hz
    assert other["distance_m"][-1] == pytest.approx(reference["distance_m"][-1], rel=0.01)


@pytest.mark.parametrize(("seconds", "rate_hz"), [(0, 100), (-1, 100), (1, 0)])
def test_drive_refuses_no_time(seconds: float, rate_hz: float) -> None:
    """A drive of nothing is a mistake of the caller."""
    with pytest.raises(ValueError, match="takes time"):
        drive(seconds, rate_hz)


def test_frames_are_in_wire_order_and_periodic(databases: dict[str, Database]) -> None:
    """Stamps rise strictly on each bus, cycles hold on average, and the jitter is real but small."""
    for batch in frames(drive(SECONDS)):
        assert (np.diff(batch.ts_ns) > 0).all()
        assert batch.ts_ns[0] >= START_NS
        assert batch.ts_ns[-1] < START_NS + (SECONDS + 0.01) * 1_000_000_000
        assert batch.data.shape[1] % 8 == 0
        assert batch.data.flags.c_contiguous
        for message in databases[batch.source].messages:
            rows = batch.arbitration_id == message.frame_id
            intervals_ms = np.diff(batch.ts_ns[rows]) / 1e6
            assert intervals_ms.mean() == pytest.approx(message.cycle_time, rel=0.001)
            assert 0.01 < intervals_ms.std() < 0.5
            assert (batch.length[rows] == message.length).all()
            assert ((batch.flags[rows] & Flag.FD != 0) == message.is_fd).all()


def test_capture_has_both_buses_and_can_fd(capture: Path) -> None:
    """Two interfaces, both identifier lengths, and CAN FD with the bit rate switch."""
    lines = capture.read_text(encoding="ascii").splitlines()
    assert {line.split(" ")[1] for line in lines} == {"powertrain", "body"}
    assert any(" powertrain 0A0#" in line for line in lines)
    assert any(" body 1C0A0020##1" in line for line in lines)
    stamps = [line.split(" ")[0] for line in lines]
    assert stamps == sorted(stamps)


def test_every_signal_stays_in_its_range(decoded: dict[str, Series], databases: dict[str, Database]) -> None:
    """The demo has no sample of bad quality, and every signal of the databases occurs."""
    for database in databases.values():
        for message in database.messages:
            for signal in message.signals:
                values = decoded[signal.name][1]
                assert values.min() >= signal.minimum, signal.name
                assert values.max() <= signal.maximum, signal.name
                if signal.choices:
                    assert set(values) <= set(signal.choices), signal.name


def test_engine_speed_fits_speed_and_gear(decoded: dict[str, Series]) -> None:
    """With the clutch closed and no change under way the engine is geared to the wheels."""
    seconds, rpm = decoded["EngineSpeed"]
    gear, speed = at(decoded["Gear"], seconds), at(decoded["VehicleSpeed"], seconds) / 3.6
    # The gearbox reports every 20 ms, so a change is on the bus up to that much after the engine felt it.
    changing = sum(at(decoded["ShiftInProgress"], seconds + late_s) for late_s in (-0.03, 0, 0.03))
    locked = (gear > 0) & (changing == 0) & (speed > 8)
    geared = speed / WHEEL_RADIUS_M * np.array(GEAR_RATIOS)[gear.astype(int)] * FINAL_DRIVE * 30 / math.pi
    assert locked.mean() > 0.8
    np.testing.assert_allclose(rpm[locked], geared[locked], rtol=0.03)
    assert set(gear) >= {0, 1, 2, 3, 4, 5}


def test_wheels_agree_with_the_car_and_differ_in_corners(decoded: dict[str, Series]) -> None:
    """The mean of the wheels is the car's speed; the outer wheels are the faster ones."""
    seconds, speed = decoded["VehicleSpeed"]
    left, right = (
        (at(decoded[f"WheelSpeedFront{side}"], seconds) + at(decoded[f"WheelSpeedRear{side}"], seconds)) / 2
        for side in ("Left", "Right")
    )
    moving = speed > 20
    np.testing.assert_allclose((left + right)[moving] / 2, speed[moving], rtol=0.03)
    lateral = at(decoded["LateralAcceleration"], seconds)
    cornering = moving & (np.abs(lateral) > 5)
    assert cornering.sum() > 500
    assert (np.sign(right - left) == np.sign(lateral))[cornering].all()


def test_the_lap_closes(decoded: dict[str, Series]) -> None:
    """Speed and course integrate back to the start line, and there the position is the one the drive began with."""
    assert decoded["OdometerTrip"][1][-1] * 1000 > lap_length_m(), "two minutes are more than a lap"
    seconds, speed = decoded["GpsSpeed"]
    travelled = np.cumsum(speed / 3.6 * np.diff(seconds, append=seconds[-1]))
    lap = int(np.searchsorted(travelled, lap_length_m()))
    course = np.radians(decoded["GpsCourse"][1])
    step_m = speed[:lap] / 3.6 * np.diff(seconds[: lap + 1])
    assert math.hypot((step_m * np.sin(course[:lap])).sum(), (step_m * np.cos(course[:lap])).sum()) < 40
    north_m = np.radians(decoded["Latitude"][1] - decoded["Latitude"][1][0]) * 6_371_000
    east_m = np.radians(decoded["Longitude"][1] - decoded["Longitude"][1][0]) * 6_371_000 * math.cos(math.radians(52.5))
    assert np.hypot(north_m, east_m).max() > 500
    assert math.hypot(north_m[lap], east_m[lap]) < 40


def test_driving_is_physical(decoded: dict[str, Series]) -> None:
    """Accelerations a road car can do, temperatures that rise slowly, and a start from rest with a cranking engine."""
    assert np.abs(decoded["LateralAcceleration"][1]).max() < 11
    assert np.abs(decoded["LongitudinalAcceleration"][1]).max() < 11
    seconds, speed = decoded["VehicleSpeed"]
    assert np.abs(np.diff(speed / 3.6) / np.diff(seconds)).max() < 25, "no jumps, but for stamps that jitter"
    assert 120 < speed.max() < 240
    for name in ("CoolantTemperature", "OilTemperature"):
        values = decoded[name][1]
        assert 20 < values[-1] - values[0] < 90
        assert np.abs(np.diff(values)).max() <= 1
    assert decoded["FuelLevel"][1][0] > decoded["FuelLevel"][1][-1]
    assert list(dict.fromkeys(decoded["EngineState"][1]))[:3] == [0, 1, 2]
    assert decoded["BatteryVoltage"][1].min() < 11
    pressed = at(decoded["BrakePressure"], decoded["ThrottlePosition"][0]) > 20
    assert decoded["ThrottlePosition"][1][pressed].mean() < 5, "one pedal at a time"
