"""The car: two pedals, an engine with a gearbox, drag and grip, driven round the track for as long as one likes.

A `Drive` integrates the few states that depend on each other (speed, pedals, gear, engine speed, temperatures) a step
at a time and derives everything else in columns. The car starts cold-ish and parked on the start line: ignition,
cranking, two seconds of idling, then flying laps for ever, but for a stop on the start line when the tank is nearly
empty, every hour and a half or so.

Limits: a point mass with a perfect line and no tyre model; gears change without a clutch pedal; sensors add Gaussian
noise. A drive is a function of its seed: a longer one begins with exactly the shorter one, and pieces of any lengths
put together are the whole.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ingestd.demo.track import ORIGIN_ALTITUDE_M, Track, closed_track
from ingestd.model import Float64s

SEED: Final = 7
INTEGRATION_HZ_MIN: Final = 100.0  # Gear changes last 150 ms; coarser steps would miss them.

MASS_KG: Final = 1320.0
GRAVITY: Final = 9.81
AIR_DRAG: Final = 0.40  # N per (m/s)²: half of air density x drag coefficient x frontal area.
ROLLING_DRAG: Final = 0.013
WHEEL_RADIUS_M: Final = 0.31
WHEELBASE_M: Final = 2.6
TRACK_WIDTH_M: Final = 1.55
STEERING_RATIO: Final = 15.0
UNDERSTEER: Final = 0.0022  # rad of front wheel per m/s² of lateral acceleration.

GEAR_RATIOS: Final = (0.0, 3.60, 2.19, 1.56, 1.21, 0.97, 0.80)  # Neutral, then first to sixth.
FINAL_DRIVE: Final = 3.9
IDLE_RPM: Final = 850.0
LAUNCH_RPM: Final = 2600.0  # The clutch slips below this in first gear under throttle.
UPSHIFT_RPM: Final = 6700.0
DOWNSHIFT_RPM: Final = 3900.0
LIMITER_RPM: Final = 7200.0
SHIFT_SECONDS: Final = 0.15
TORQUE_NM: Final = (0, 120, 170, 205, 225, 235, 228, 205, 150)  # At 0, 1,000, … 8,000 rpm, full throttle.

IGNITION_SECONDS: Final = 0.4
CRANKING_SECONDS: Final = 1.2
LAUNCH_SECONDS: Final = 3.2

AMBIENT_CELSIUS: Final = 19.0
TANK_LITRES: Final = 52.0
PIT_LITRES: Final = 5.0  # With less than this the car stops on the start line …
FILLED_LITRES: Final = 48.0  # … until it has this,
FILLING_LITRES_PER_SECOND: Final = 2.0
PIT_BRAKING: Final = 4.0  # m/s²: there is time.

ENGINE_OFF, ENGINE_CRANKING, ENGINE_IDLE, ENGINE_RUNNING, ENGINE_LIMITER = range(5)

Columns = dict[str, NDArray[np.float64]]


@dataclass(slots=True)
class _Car:
    """What one step hands to the next."""

    speed: float = 0.0
    distance_m: float = 0.0
    acceleration: float = 0.0
    throttle: float = 0.0
    brake: float = 0.0
    gear: int = 0
    gear_target: int = 0
    shift_left_s: float = 0.0
    engine_rpm: float = 0.0
    engine_state: int = ENGINE_OFF
    torque_nm: float = 0.0
    coolant_celsius: float = 48.0
    oil_celsius: float = 44.0
    fuel_litres: float = 31.0
    fuel_rate: float = 0.0  # l/h
    pitting: bool = False

    def row(self) -> tuple[float, ...]:
        """The states `_RECORDED` names, in its order."""
        return (
            self.speed,
            self.distance_m,
            self.acceleration,
            self.throttle,
            self.brake,
            self.gear,
            self.gear_target,
            self.shift_left_s > 0,
            self.engine_rpm,
            self.engine_state,
            self.torque_nm,
            self.coolant_celsius,
            self.oil_celsius,
            self.fuel_litres,
            self.fuel_rate,
        )


_RECORDED: Final = (
    "speed",
    "distance_m",
    "acceleration",
    "throttle",
    "brake",
    "gear",
    "gear_target",
    "shifting",
    "engine_rpm",
    "engine_state",
    "torque_nm",
    "coolant_celsius",
    "oil_celsius",
    "fuel_litres",
    "fuel_rate",
)


class Drive:
    """A drive without an end, to be had in pieces."""

    def __init__(self, rate_hz: float = 100.0, seed: int = SEED) -> None:
        if rate_hz <= 0:
            raise ValueError(f"a drive takes time: {rate_hz} Hz")
        self._rate_hz = rate_hz
        self._car = _Car()
        self._memory = _Memory(seed)
        self._samples = 0

    def go_on(self, seconds: float) -> Columns:
        """The car's quantities for the next seconds, sampled `rate_hz` times a second; the first piece begins at 0.

        Every column is float64[floor(seconds * rate_hz)] in the unit its name or the DBC gives; `time_s` is the time.
        Enumerations and switches are whole numbers.
        """
        count, first = int(seconds * self._rate_hz), self._samples
        if count <= 0:
            raise ValueError(f"a drive takes time: {seconds} s at {self._rate_hz} Hz")
        track = closed_track()
        steps_per_sample = math.ceil(INTEGRATION_HZ_MIN / self._rate_hz)
        step_s = 1 / (self._rate_hz * steps_per_sample)
        recorded = np.empty((count, len(_RECORDED)))
        speed_max = track.speed_max.tolist()
        for sample in range(count):
            recorded[sample] = self._car.row()
            for step in range(steps_per_sample):
                now_s = ((first + sample) * steps_per_sample + step) * step_s
                _step(self._car, now_s, step_s, speed_max, track.step_m)
        self._samples += count
        columns = {name: np.ascontiguousarray(recorded[:, i]) for i, name in enumerate(_RECORDED)}
        columns["time_s"] = np.arange(first, first + count) / self._rate_hz
        columns["rate_hz"] = np.full(count, self._rate_hz)
        _add_motion(columns, track, self._memory)
        _add_wheels(columns, self._memory)
        _add_engine_bay(columns, self._memory)
        _add_cabin(columns, self._memory)
        columns["satellites"] = (14 - np.arange(first, first + count) // 1700 % 3).astype(np.float64)
        return columns


class _Memory:
    """What the columns of one piece hand to those of the next."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._noise: dict[str, np.random.Generator] = {}
        self._last: dict[str, float] = {}

    def noise(self, name: str, count: int, deviation: float) -> Float64s:
        """Gaussian noise of its own stream for each quantity, so that adding a quantity changes no other."""
        if name not in self._noise:
            self._noise[name] = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        return self._noise[name].standard_normal(count) * deviation

    def total(self, name: str, values: Float64s) -> Float64s:
        """The running sum, from the beginning of the drive."""
        sums: Float64s = np.cumsum(np.concatenate([[self._last.get(name, 0.0)], values]))[1:]
        self._last[name] = float(sums[-1])
        return sums

    def change(self, name: str, values: Float64s) -> Float64s:
        """The difference of each value to the one before it; before the drive it was 0."""
        before, self._last[name] = self._last.get(name, 0.0), float(values[-1])
        return np.diff(values, prepend=before)


def drive(seconds: float, rate_hz: float = 100.0, seed: int = SEED) -> Columns:
    """The first seconds of a drive."""
    return Drive(rate_hz, seed).go_on(seconds)


def lap_length_m() -> float:
    """The distance after which the car is back where it started."""
    return closed_track().length_m


def _step(car: _Car, now_s: float, step_s: float, speed_max: list[float], track_step_m: float) -> None:
    """Advance the car by one step: driver, gearbox, engine, motion, heat."""
    drag = AIR_DRAG * car.speed**2 + (ROLLING_DRAG * MASS_KG * GRAVITY if car.speed > 0.1 else 0.0)
    full_torque = _full_torque(car.engine_rpm)
    ratio = GEAR_RATIOS[car.gear] * FINAL_DRIVE / WHEEL_RADIUS_M  # rad/s of engine per m/s of car
    if now_s < LAUNCH_SECONDS:
        pedal_throttle, pedal_brake = 0.0, 0.35
    else:
        ahead_m = car.distance_m + 0.12 * car.speed  # Drivers look ahead; pedals take a moment.
        target = speed_max[int(ahead_m / track_step_m) % len(speed_max)]
        if car.pitting:
            target = min(target, _pit_speed(car, ahead_m, step_s, len(speed_max) * track_step_m))
        force = MASS_KG * min(max((target - car.speed) / 0.25, -9.0), 9.0) + drag
        drive_force_max = full_torque * ratio
        pedal_throttle = min(max(force / drive_force_max, 0.0), 1.0) if drive_force_max > 0 else float(force > 0)
        pedal_brake = min(max(-force / (MASS_KG * 9.2), 0.0), 1.0)
    car.throttle += _limited(pedal_throttle - car.throttle, 5.0 * step_s)
    car.brake += _limited(pedal_brake - car.brake, 8.0 * step_s)

    _change_gear(car, now_s, step_s)
    _turn_engine(car, now_s, step_s, full_torque)

    pulling = 0.0 if car.shift_left_s > 0 or car.gear == 0 else car.torque_nm * ratio
    car.acceleration = (pulling - drag - car.brake * MASS_KG * 9.2) / MASS_KG
    if car.speed + car.acceleration * step_s < 0:
        car.acceleration, car.speed = -car.speed / step_s, 0.0
    else:
        car.speed += car.acceleration * step_s
    car.distance_m += car.speed * step_s

    power_kw = abs(car.torque_nm) * car.engine_rpm * math.pi / 30_000
    thermostat = min(max((car.coolant_celsius - 84.0) / 8.0, 0.02), 1.0)
    airflow = 0.35 + car.speed / 40.0
    cooling = thermostat * airflow * 0.0125 * (car.coolant_celsius - AMBIENT_CELSIUS)
    car.coolant_celsius += step_s * (0.006 * power_kw + (0.08 if car.engine_rpm else 0.0) - cooling)
    car.oil_celsius += step_s * (0.0075 * power_kw + 0.012 * (car.coolant_celsius - car.oil_celsius))
    car.fuel_rate = 0.0 if not car.engine_rpm else max(0.9, power_kw * 0.34)
    car.fuel_litres -= car.fuel_rate * step_s / 3600
    car.pitting |= car.fuel_litres < PIT_LITRES


def _pit_speed(car: _Car, ahead_m: float, step_s: float, lap_m: float) -> float:
    """The speed from which the car can still stop before the start line; while it stands there, fuel flows."""
    to_line_m = lap_m - ahead_m % lap_m
    target = math.sqrt(2 * PIT_BRAKING * max(to_line_m - 3.0, 0.0))
    if target > 2.0:
        return target
    if car.speed == 0:
        car.fuel_litres += FILLING_LITRES_PER_SECOND * step_s
        car.pitting = car.fuel_litres < FILLED_LITRES
    return -1.0  # On the brake until it stands, and then as well.


def _change_gear(car: _Car, now_s: float, step_s: float) -> None:
    """Finish a running change or begin one; the torque is cut while it lasts."""
    if car.shift_left_s > 0:
        car.shift_left_s = max(car.shift_left_s - step_s, 0.0)
        if car.shift_left_s < step_s / 2:
            car.shift_left_s, car.gear = 0.0, car.gear_target
        return
    if car.gear == 0:
        wanted = 1 if now_s >= LAUNCH_SECONDS - 0.5 else 0
    else:
        wanted = car.gear
        if _wheel_rpm(car.speed, car.gear) > UPSHIFT_RPM and car.gear < 6 and car.throttle > 0.2:
            wanted = car.gear + 1
        elif _wheel_rpm(car.speed, car.gear) < DOWNSHIFT_RPM and car.gear > 1:
            wanted = car.gear - 1
    if wanted != car.gear:
        car.gear_target, car.shift_left_s = wanted, SHIFT_SECONDS


def _turn_engine(car: _Car, now_s: float, step_s: float, full_torque: float) -> None:
    """Engine speed and torque: off, cranking, idling, slipping on the clutch or locked to the wheels."""
    if now_s < IGNITION_SECONDS:
        return
    if now_s < CRANKING_SECONDS:
        car.engine_state, car.engine_rpm = ENGINE_CRANKING, 240.0
        return
    locked_rpm = _wheel_rpm(car.speed, car.gear_target)
    floor_rpm = IDLE_RPM + (LAUNCH_RPM - IDLE_RPM) * min(car.throttle * 2, 1.0) * (car.gear_target == 1)
    rpm = max(locked_rpm, floor_rpm if car.gear_target <= 1 else IDLE_RPM)
    slipping = car.shift_left_s > 0 or rpm > locked_rpm
    car.engine_rpm += (rpm - car.engine_rpm) * (min(step_s / 0.06, 1.0) if slipping else 1.0)
    overrun_nm = -12.0 - 0.004 * car.engine_rpm
    car.torque_nm = overrun_nm + (full_torque - overrun_nm) * car.throttle
    if car.gear == 0 or car.shift_left_s > 0:
        car.torque_nm = 0.0
    elif slipping:
        car.torque_nm = max(car.torque_nm, 0.0)
    if car.engine_rpm > LIMITER_RPM:
        car.engine_state, car.torque_nm = ENGINE_LIMITER, min(car.torque_nm, 0.0)
    else:
        car.engine_state = ENGINE_RUNNING if car.throttle > 0.01 or car.speed > 0.5 else ENGINE_IDLE


def _wheel_rpm(speed: float, gear: int) -> float:
    return speed / WHEEL_RADIUS_M * GEAR_RATIOS[gear] * FINAL_DRIVE * 30 / math.pi


def _full_torque(rpm: float) -> float:
    at = min(max(rpm, IDLE_RPM), 7999.0) / 1000
    below = int(at)
    return TORQUE_NM[below] + (TORQUE_NM[below + 1] - TORQUE_NM[below]) * (at - below)


def _limited(change: float, change_max: float) -> float:
    return min(max(change, -change_max), change_max)


def _add_motion(columns: Columns, track: Track, memory: _Memory) -> None:
    """Where the car is and how it turns: from the distance along the track, which is closed."""
    count, speed = len(columns["speed"]), columns["speed"]
    at = columns["distance_m"] / track.step_m
    row = at.astype(np.int64)
    lap, here, fraction = row // len(track.x_m), row % len(track.x_m), at - row
    after = (here + 1) % len(track.x_m)

    def along(column: Float64s) -> Float64s:
        return column[here] + (column[after] - column[here]) * fraction

    curvature = along(track.curvature)
    columns["curvature"] = curvature
    columns["lap"] = lap.astype(np.float64)
    columns["latitude"] = track.latitude(along(track.y_m))
    columns["longitude"] = track.longitude(along(track.x_m))
    columns["altitude_m"] = ORIGIN_ALTITUDE_M + 1.5 * np.sin(2 * np.pi * at / len(track.x_m))
    heading = track.heading_rad[here] + curvature * fraction * track.step_m
    columns["course_deg"] = np.degrees(np.pi / 2 - heading) % 360
    columns["yaw_rate_deg_s"] = np.degrees(curvature * speed) + memory.noise("yaw", count, 0.06)
    columns["lateral_acceleration"] = curvature * speed**2 + memory.noise("lateral", count, 0.05)
    columns["longitudinal_acceleration"] = columns["acceleration"] + memory.noise("longitudinal", count, 0.05)
    front_wheel = np.arctan(WHEELBASE_M * curvature) + UNDERSTEER * curvature * speed**2
    steering_deg = np.degrees(front_wheel) * STEERING_RATIO * np.minimum(speed / 2, 1)
    columns["steering_deg"] = steering_deg
    columns["steering_rate_deg_s"] = memory.change("steering", steering_deg) * columns["rate_hz"]
    columns["stability_state"] = np.where(np.abs(curvature) * speed**2 > 8.3, 2.0, 1.0)
    columns["standstill"] = (speed == 0).astype(np.float64)


def _add_wheels(columns: Columns, memory: _Memory) -> None:
    """Wheel speeds in m/s: inner wheels travel less, the driven rear ones slip a little. Suspension and tyres too."""
    speed, yaw_rate = columns["speed"], columns["curvature"] * columns["speed"]
    count = len(speed)
    drive_slip = 1 + 0.018 * np.clip(columns["acceleration"] / 5, 0, 1) * columns["throttle"]
    brake_slip = 1 - 0.015 * columns["brake"]
    roll = columns["curvature"] * speed**2 / GRAVITY
    pitch = columns["acceleration"] / GRAVITY
    for name, side, front in (("fl", -1, True), ("fr", 1, True), ("rl", -1, False), ("rr", 1, False)):
        straight = speed + side * yaw_rate * TRACK_WIDTH_M / 2
        rolling = np.hypot(straight, yaw_rate * WHEELBASE_M) if front else straight
        slip = brake_slip if front else brake_slip * drive_slip
        moving = np.minimum(speed, 1.0)  # A standing wheel has no noise.
        columns[f"wheel_{name}"] = np.maximum(rolling * slip + memory.noise(f"wheel_{name}", count, 0.012) * moving, 0)
        bumps = memory.noise(f"bumps_{name}", count, 1.4) * moving
        columns[f"travel_{name}_mm"] = side * 38 * roll + (-22 if front else 22) * pitch + bumps
        load = memory.total(f"load_{name}", np.abs(roll) * (1 + 0.4 * side) + np.abs(pitch)) / columns["rate_hz"]
        columns[f"tyre_{name}_celsius"] = 24 + 46 * (1 - np.exp(-load / 60)) + (2 if front else 0)
        columns[f"tyre_{name}_bar"] = 2.1 * (273 + columns[f"tyre_{name}_celsius"]) / (273 + 24)


def _add_engine_bay(columns: Columns, memory: _Memory) -> None:
    """Pressures, voltages and what the engine computer reports page by page."""
    count, rpm, throttle = len(columns["speed"]), columns["engine_rpm"], columns["throttle"]
    running = columns["engine_state"] >= ENGINE_IDLE
    cranking = columns["engine_state"] == ENGINE_CRANKING
    columns["brake_bar"] = columns["brake"] * 110
    columns["abs_active"] = (columns["brake"] > 0.74).astype(np.float64)
    columns["oil_bar"] = np.where(running, 1.1 + rpm / 1900 - (columns["oil_celsius"] - 44) * 0.006, 0.0)
    volts = np.where(cranking, 10.4, np.where(running, 14.1, 12.5))
    columns["battery_volts"] = volts + memory.noise("battery", count, 0.03)
    columns["gearbox_celsius"] = 0.6 * columns["oil_celsius"] + 0.4 * AMBIENT_CELSIUS + 8
    columns["fuel_percent"] = columns["fuel_litres"] / TANK_LITRES * 100
    columns["intake_celsius"] = AMBIENT_CELSIUS + 6 + 9 * np.exp(-columns["speed"] / 12)
    columns["boost_bar"] = np.where(running, 0.75 * throttle * np.clip(rpm / 3000, 0, 1) - 0.25 * (1 - throttle), 0.0)
    columns["ignition_deg"] = np.where(running, 8 + rpm / 260 - 9 * throttle, 0.0)
    columns["lambda_factor"] = 1.0 - 0.12 * throttle + memory.noise("lambda", count, 0.008)
    for cylinder in range(1, 5):
        wobble = memory.noise(f"exhaust{cylinder}", count, 2.0) + 5 * cylinder
        heat = np.where(running, 330 + 390 * throttle * np.clip(rpm / 6000, 0, 1), AMBIENT_CELSIUS + 20)
        columns[f"exhaust{cylinder}_celsius"] = heat + wobble


def _add_cabin(columns: Columns, memory: _Memory) -> None:
    """What the body's bus carries besides position: lamps, doors, air and the counters of the dashboard."""
    time_s, count = columns["time_s"], len(columns["speed"])
    awake = time_s >= IGNITION_SECONDS
    columns["headlights"] = np.where(awake, 2.0, 1.0)
    columns["brake_lights"] = (columns["brake"] > 0.02).astype(np.float64)
    columns["turn_signal"] = ((time_s > 1.6) & (time_s < 4.6)).astype(np.float64)  # Leaving the kerb to the left.
    columns["door_driver"] = (time_s < 0.9).astype(np.float64)
    columns["locked"] = (columns["speed"] > 4).astype(np.float64)
    columns["cabin_celsius"] = 21 + 5 * np.exp(-time_s / 70)
    columns["fan_level"] = np.clip(np.ceil((columns["cabin_celsius"] - 21) * 1.2), 1, 6)
    columns["ambient_celsius"] = AMBIENT_CELSIUS + memory.noise("ambient", count, 0.02)
    columns["gps_speed"] = np.maximum(columns["speed"] + memory.noise("gps", count, 0.04) * (columns["speed"] > 0), 0)
    columns["odometer_km"] = 48_213.4 + columns["distance_m"] / 1000
    columns["trip_km"] = columns["distance_m"] / 1000
