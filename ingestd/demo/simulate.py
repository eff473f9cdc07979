"""Puts the simulated car's quantities on its two buses, and its buses into a capture file.

A `Bus` packs the columns of a `vehicle.Drive`, piece by piece, with the layouts of the DBC files, so the files are the
only description of a frame; cycle times are theirs too. Every message keeps its own phase and some jitter, and a frame
waits until the bus is free, so stamps rise strictly on each bus as they would on a wire. `write_capture` writes
candump's log format.

Limits: frames queue in the order they become ready, not by identifier; no error frames, no remote frames, no loss.
The capture has microsecond stamps, as candump's has. It is the same byte for byte whenever it is made anew with the
same versions of Python's and numpy's arithmetic, so importing it twice is importing the same file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import cantools
import numpy as np
from cantools.database.can import Database, Message, Signal
from numpy.typing import NDArray

from ingestd.demo import databases
from ingestd.demo.vehicle import SEED, Columns, drive
from ingestd.model import Flag, Float64s, FrameBatch, Int64s, UInt8s

START_NS: Final = 1_789_219_800_000_000_000  # 2026-09-12T13:30:00Z, a Saturday at the track.

_NOMINAL_BITS_PER_SECOND: Final = 500_000
_DATA_BITS_PER_SECOND: Final = 2_000_000
_JITTER_NS: Final = 60_000.0  # How late a control unit's task starts, typically.

_KMH: Final = 3.6
# What each signal of the DBC files carries: a column of the drive and the factor to the signal's unit.
_CARRIED: Final[dict[str, tuple[str, float]]] = {
    "EngineSpeed": ("engine_rpm", 1.0),
    "ThrottlePosition": ("throttle", 100.0),
    "AcceleratorPedal": ("throttle", 100.0),
    "EngineTorque": ("torque_nm", 1.0),
    "EngineState": ("engine_state", 1.0),
    "VehicleSpeed": ("speed", _KMH),
    "Standstill": ("standstill", 1.0),
    "SteeringAngle": ("steering_deg", 1.0),
    "SteeringRate": ("steering_rate_deg_s", 1.0),
    "WheelSpeedFrontLeft": ("wheel_fl", _KMH),
    "WheelSpeedFrontRight": ("wheel_fr", _KMH),
    "WheelSpeedRearLeft": ("wheel_rl", _KMH),
    "WheelSpeedRearRight": ("wheel_rr", _KMH),
    "YawRate": ("yaw_rate_deg_s", 1.0),
    "LateralAcceleration": ("lateral_acceleration", 1.0),
    "LongitudinalAcceleration": ("longitudinal_acceleration", 1.0),
    "StabilityControl": ("stability_state", 1.0),
    "BrakePressure": ("brake_bar", 1.0),
    "BrakePedalPressed": ("brake_lights", 1.0),
    "AntiLockActive": ("abs_active", 1.0),
    "Gear": ("gear", 1.0),
    "GearTarget": ("gear_target", 1.0),
    "ShiftInProgress": ("shifting", 1.0),
    "GearboxTemperature": ("gearbox_celsius", 1.0),
    "CoolantTemperature": ("coolant_celsius", 1.0),
    "OilTemperature": ("oil_celsius", 1.0),
    "IntakeAirTemperature": ("intake_celsius", 1.0),
    "OilPressure": ("oil_bar", 1.0),
    "BatteryVoltage": ("battery_volts", 1.0),
    "FuelLevel": ("fuel_percent", 1.0),
    "FuelRate": ("fuel_rate", 1.0),
    "RunTime": ("time_s", 1.0),
    "Uptime": ("time_s", 1.0),
    "BoostPressure": ("boost_bar", 1.0),
    "IgnitionAngle": ("ignition_deg", 1.0),
    "ExhaustTemperature1": ("exhaust1_celsius", 1.0),
    "ExhaustTemperature2": ("exhaust2_celsius", 1.0),
    "ExhaustTemperature3": ("exhaust3_celsius", 1.0),
    "ExhaustTemperature4": ("exhaust4_celsius", 1.0),
    "Lambda": ("lambda_factor", 1.0),
    "Headlights": ("headlights", 1.0),
    "BrakeLights": ("brake_lights", 1.0),
    "TurnSignal": ("turn_signal", 1.0),
    "DoorDriver": ("door_driver", 1.0),
    "CentralLocking": ("locked", 1.0),
    "CabinTemperature": ("cabin_celsius", 1.0),
    "AmbientTemperature": ("ambient_celsius", 1.0),
    "FanLevel": ("fan_level", 1.0),
    "Latitude": ("latitude", 1.0),
    "Longitude": ("longitude", 1.0),
    "GpsSpeed": ("gps_speed", _KMH),
    "GpsCourse": ("course_deg", 1.0),
    "GpsAltitude": ("altitude_m", 1.0),
    "GpsSatellites": ("satellites", 1.0),
    "OdometerTotal": ("odometer_km", 1.0),
    "OdometerTrip": ("trip_km", 1.0),
    "SuspensionTravelFrontLeft": ("travel_fl_mm", 1.0),
    "SuspensionTravelFrontRight": ("travel_fr_mm", 1.0),
    "SuspensionTravelRearLeft": ("travel_rl_mm", 1.0),
    "SuspensionTravelRearRight": ("travel_rr_mm", 1.0),
    "TyrePressureFrontLeft": ("tyre_fl_bar", 1.0),
    "TyrePressureFrontRight": ("tyre_fr_bar", 1.0),
    "TyrePressureRearLeft": ("tyre_rl_bar", 1.0),
    "TyrePressureRearRight": ("tyre_rr_bar", 1.0),
    "TyreTemperatureFrontLeft": ("tyre_fl_celsius", 1.0),
    "TyreTemperatureFrontRight": ("tyre_fr_celsius", 1.0),
    "TyreTemperatureRearLeft": ("tyre_rl_celsius", 1.0),
    "TyreTemperatureRearRight": ("tyre_rr_celsius", 1.0),
}
_CONSTANT: Final[dict[str, float]] = {
    "TroubleCodes": 0,
    "SoftwareVersion": 1042,
    "OperatingMode": 1,
    "DoorPassenger": 0,
    "DoorRearLeft": 0,
    "DoorRearRight": 0,
    "Tailgate": 0,
    "SetTemperature": 21,
    "GpsFix": 3,
    "SuspensionMode": 1,
}


def frames(columns: Columns, start_ns: int = START_NS, seed: int = SEED) -> list[FrameBatch]:
    """The frames of a drive, one batch per bus, in wire order; `start_ns` is the stamp of time 0.

    The stamps of a batch rise strictly. A value is the drive's latest sample before its frame became ready, kept inside
    the range its DBC states.
    """
    return [Bus(bus, start_ns, seed).carry(columns) for bus in databases()]


def write_capture(path: Path, seconds: float = 120.0, start_ns: int = START_NS, seed: int = SEED) -> int:
    """Write a drive as `candump -l` text to `path`, replacing it, and say how many frames it holds.

    The buses are the interfaces `powertrain` and `body`. Raises OSError where the file cannot be written.
    """
    batches = frames(drive(seconds, seed=seed), start_ns, seed)
    lines = [line for batch in batches for line in _candump_lines(batch)]
    order = np.argsort(np.concatenate([batch.ts_ns for batch in batches]), kind="stable")
    path.write_bytes("".join([lines[i] for i in order.tolist()]).encode("ascii"))
    return len(lines)


def _database(bus: str) -> Database:
    database = cantools.database.load_file(databases()[bus])
    assert isinstance(database, Database)
    return database


class Bus:
    """One bus, for as long as the drive goes on: the frames of its pieces together are those of the whole."""

    def __init__(self, name: str, start_ns: int = START_NS, seed: int = SEED) -> None:
        self.name = name
        self._start_ns = start_ns
        messages = _database(name).messages
        self._tasks = [_Task(message, i / len(messages), seed) for i, message in enumerate(messages)]
        self._width = max(8, -(-max(message.length for message in messages) // 8) * 8)
        self._samples = 0
        self._free_ns = 0  # when the last frame had been carried

    def carry(self, columns: Columns) -> FrameBatch:
        """The frames that become ready during the next piece of the drive, in wire order."""
        first_sample, rate_hz = self._samples, float(columns["rate_hz"][0])
        self._samples += len(columns["time_s"])
        until_ns = int(self._samples / rate_hz * 1e9)
        ready, data = [], []
        for task in self._tasks:
            at_ns, first = task.ready(until_ns)
            sample = np.clip((at_ns * rate_hz / 1e9).astype(np.int64) - first_sample, 0, len(columns["time_s"]) - 1)
            ready.append(at_ns)
            data.append(_payloads(task.message, columns, sample, first + np.arange(len(at_ns)), self._width))
        ready_ns = np.concatenate(ready)
        order = np.argsort(ready_ns, kind="stable")
        task_of = np.repeat(np.arange(len(self._tasks)), [len(at_ns) for at_ns in ready])[order]

        def each(values: list[int], dtype: type[np.generic]) -> NDArray[Any]:
            return np.array(values, dtype)[task_of]

        messages = [task.message for task in self._tasks]
        duration_ns = each([_duration_ns(message) for message in messages], np.int64)
        carried_ns = self._carried_ns(ready_ns[order], duration_ns)
        return FrameBatch(
            source=self.name,
            ts_ns=self._start_ns + carried_ns,
            arbitration_id=each([message.frame_id for message in messages], np.uint32),
            flags=each([int(_flags(message)) for message in messages], np.uint8),
            length=each([message.length for message in messages], np.uint16),
            data=np.concatenate(data)[order],
        )

    def _carried_ns(self, ready_ns: Int64s, duration_ns: Int64s) -> Int64s:
        """When each frame has been received: it waits for those before it, as on a wire.

        end[i] = max(ready[i], end[i-1]) + duration[i]; less the running sum of durations that is a running maximum.
        """
        total = np.cumsum(duration_ns)
        begins = np.concatenate([[self._free_ns], ready_ns - (total - duration_ns)])
        ends: Int64s = np.maximum.accumulate(begins)[1:] + total
        self._free_ns = int(ends[-1]) if len(ends) else self._free_ns
        return ends


class _Task:
    """What sends one message: its cycle, its phase within the cycle, and a control unit that starts it a bit late."""

    def __init__(self, message: Message, phase: float, seed: int) -> None:
        self.message = message
        self._cycle_ns = int((message.cycle_time or 1000) * 1_000_000)
        self._next_ns = int(phase * self._cycle_ns)
        self._lateness = np.random.default_rng([seed, message.frame_id])
        self._waiting = np.zeros(0, np.int64)  # planned in an earlier piece, and late enough to be ready in a later one
        self._sent = 0

    def ready(self, until_ns: int) -> tuple[Int64s, int]:
        """When the next frames are handed to the bus, up to a time, and how many there were before."""
        nominal = np.arange(self._next_ns, until_ns, self._cycle_ns, dtype=np.int64)
        self._next_ns += self._cycle_ns * len(nominal)
        late = self._lateness.gamma(2.0, _JITTER_NS / 2, len(nominal))
        ready_ns = np.concatenate([self._waiting, nominal + np.minimum(late, self._cycle_ns / 4).astype(np.int64)])
        now, first = ready_ns < until_ns, self._sent
        self._waiting = ready_ns[~now]
        self._sent += int(np.count_nonzero(now))
        return ready_ns[now], first


def _duration_ns(message: Message) -> int:
    """Time on the wire with a typical number of stuff bits (ISO 11898-1, 10.4 and 10.5)."""
    arbitration = 67 if message.is_extended_frame else 47
    if message.is_fd:
        seconds = 49 / _NOMINAL_BITS_PER_SECOND + (8 * message.length + 35) * 1.1 / _DATA_BITS_PER_SECOND
    else:
        seconds = (arbitration + 8 * message.length) * 1.1 / _NOMINAL_BITS_PER_SECOND
    return int(seconds * 1e9)


def _flags(message: Message) -> Flag:
    flags = Flag.EXTENDED if message.is_extended_frame else Flag(0)
    return flags | (Flag.FD | Flag.BITRATE_SWITCH if message.is_fd else Flag(0))


def _payloads(message: Message, columns: Columns, sample: Int64s, count: Int64s, width: int) -> UInt8s:
    """uint8[frames, width]: the message's signals at these samples, bit by bit; multiplexed pages take turns."""
    data = np.zeros((len(count), width), np.uint8)
    pages = [page for s in message.signals for page in s.multiplexer_ids or []]
    page = count % (max(pages, default=0) + 1)
    for signal in message.signals:
        if signal.is_multiplexer:
            value = page.astype(np.float64)
        elif signal.name == "Counter":
            value = (count % 16).astype(np.float64)
        elif signal.name in _CONSTANT:
            value = np.full(len(count), _CONSTANT[signal.name])
        else:
            column, factor = _CARRIED[signal.name]
            value = columns[column][sample] * factor
        here = np.isin(page, signal.multiplexer_ids) if signal.multiplexer_ids else np.ones(len(count), np.bool_)
        raw = _raw(signal, value)
        for i, (byte, bit) in enumerate(_bits(signal)):
            data[here, byte] |= ((raw[here] >> np.uint64(i)) & np.uint64(1)).astype(np.uint8) << np.uint8(bit)
    return data


def _raw(signal: Signal, value: Float64s) -> NDArray[np.uint64]:
    """The signal's bits, right-aligned; anything above its length is not for the wire."""
    value = np.clip(value, signal.minimum, signal.maximum)
    if signal.is_float:
        return value.astype(np.float32).view(np.uint32).astype(np.uint64)
    return np.rint((value - signal.offset) / signal.scale).astype(np.int64).view(np.uint64)


def _bits(signal: Signal) -> list[tuple[int, int]]:
    """Byte and bit of every bit of the signal, least significant first.

    A DBC numbers bits from the least significant of byte 0; a big-endian signal starts at its most significant bit and
    goes on at the top of the next byte.
    """
    if signal.byte_order == "little_endian":
        return [divmod(signal.start + i, 8) for i in range(signal.length)]
    first = 8 * (signal.start // 8) + 7 - signal.start % 8
    return [((first + i) // 8, 7 - (first + i) % 8) for i in reversed(range(signal.length))]


def _candump_lines(batch: FrameBatch) -> list[str]:
    """`(seconds) interface id#data`; `##` and a digit of flags for CAN FD, eight digits of id for extended frames."""
    hexadecimal, digits = batch.data.tobytes().hex().upper(), 2 * batch.data.shape[1]
    lines = []
    fields = (batch.ts_ns // 1000, batch.arbitration_id, batch.flags, batch.length)
    for i, (at_us, arbitration_id, flags, length) in enumerate(zip(*(f.tolist() for f in fields), strict=True)):
        identifier = f"{arbitration_id:08X}" if flags & Flag.EXTENDED.value else f"{arbitration_id:03X}"
        mark = ("##1" if flags & Flag.BITRATE_SWITCH.value else "##0") if flags & Flag.FD.value else "#"
        data = hexadecimal[i * digits : i * digits + 2 * length]
        lines.append(f"({at_us // 1_000_000}.{at_us % 1_000_000:06d}) {batch.source} {identifier}{mark}{data}\n")
    return lines
