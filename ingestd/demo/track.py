"""The closed track the simulated car drives on: position, heading, curvature and the fastest speed at every metre.

A polygon, smoothed periodically, so the line is closed and its curvature has no steps, whatever the corners are.
Limits: flat but for a gentle slope, one lane, metres of a local plane (x east, y north) that is laid on the globe with
a spherical approximation: good to some centimetres over the two kilometres it covers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ingestd.model import Float64s

Complexes = NDArray[np.complex128]

STEP_M: Final = 1.0
FINE_STEP_M: Final = 0.1  # The line is smoothed at this step: between chords of a metre the curvature would jump.
ORIGIN_LATITUDE: Final = 52.4735  # A disused airfield, wide and flat enough for every corner below.
ORIGIN_LONGITUDE: Final = 13.4020
ORIGIN_ALTITUDE_M: Final = 49.0
EARTH_RADIUS_M: Final = 6_371_000.0

LATERAL_ACCELERATION_MAX: Final = 8.4  # m/s²: a sporty road tyre.
BRAKING_ACCELERATION_MAX: Final = 7.0  # m/s², planned; the brakes can do more.
SPEED_MAX: Final = 58.0  # m/s

# Corner points in metres, driven anti-clockwise; the car starts half-way along the first side.
_CORNERS: Final = (
    (-520, -230),
    (480, -230),
    (660, -60),
    (560, 120),
    (330, 60),
    (180, 210),
    (-60, 210),
    (-140, 40),
    (-330, 40),
    (-420, 230),
    (-660, 200),
    (-680, -90),
)
_SMOOTHING_M: Final = 26.0  # Makes a right-angled corner one of about 25 m radius.


@dataclass(frozen=True, slots=True)
class Track:
    """One lap in equal steps of `step_m`; every column is float64[n], and row 0 follows row n-1."""

    step_m: float
    length_m: float
    x_m: Float64s
    y_m: Float64s
    heading_rad: Float64s  # anti-clockwise from east, continuous: the last row is one turn on from the first
    curvature: Float64s  # 1/m, positive to the left
    speed_max: Float64s  # m/s, what the corners and the braking distance before them allow

    def latitude(self, y_m: Float64s) -> Float64s:
        """Degrees north of metres north of the origin."""
        north: Float64s = ORIGIN_LATITUDE + np.degrees(y_m / EARTH_RADIUS_M)
        return north

    def longitude(self, x_m: Float64s) -> Float64s:
        """Degrees east of metres east of the origin."""
        parallel_m = EARTH_RADIUS_M * np.cos(np.radians(ORIGIN_LATITUDE))
        east: Float64s = ORIGIN_LONGITUDE + np.degrees(x_m / parallel_m)
        return east


@lru_cache(maxsize=1)
def closed_track() -> Track:
    """The one track there is."""
    line = _resample(_smooth(_polygon()))
    count = len(line)
    length_m = float(np.abs(np.diff(line, append=line[:1])).sum())
    step_m = length_m / count
    ahead = np.roll(line, -1) - line
    turn = np.angle(ahead / np.roll(ahead, 1))
    heading_rad = np.angle(ahead[0]) + np.concatenate([[0.0], np.cumsum(turn[1:])]) - turn / 2
    curvature = turn / step_m
    return Track(step_m, length_m, line.real, line.imag, heading_rad, curvature, _speed_max(curvature, step_m))


def _polygon() -> Complexes:
    """Points along the sides, as complex numbers, beginning in the middle of the first side."""
    corners = np.array([complex(x, y) for x, y in _CORNERS])
    sides = np.roll(corners, -1) - corners
    points = [
        start + side * np.arange(0, 1, FINE_STEP_M / abs(side)) for start, side in zip(corners, sides, strict=True)
    ]
    return np.roll(np.concatenate(points), -len(points[0]) // 2)


def _smooth(line: Complexes) -> Complexes:
    """The line convolved with a Gaussian, as if it went on for ever: that is what keeps it closed."""
    frequency = np.fft.fftfreq(len(line), FINE_STEP_M)
    gaussian = np.exp(-2 * (np.pi * frequency * _SMOOTHING_M) ** 2)
    return np.fft.ifft(np.fft.fft(line) * gaussian)


def _resample(line: Complexes) -> Complexes:
    """The line again in equal steps: smoothing cuts corners and so moves the points there closer together."""
    closed = np.append(line, line[0])
    along = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(closed)))])
    count = round(along[-1] / STEP_M)
    at = np.arange(count) * (along[-1] / count)
    resampled: Complexes = np.interp(at, along, closed.real) + 1j * np.interp(at, along, closed.imag)
    return resampled


def _speed_max(curvature: Float64s, step_m: float) -> Float64s:
    """The speed each corner bears, lowered where the next corner has to be braked for.

    Braking at a constant rate makes v² + 2·a·s constant, so the limit is a running minimum of that sum from its
    far end; over two laps, since the braking zone of the first corner begins on the lap before.
    """
    corner = np.minimum(LATERAL_ACCELERATION_MAX / np.maximum(np.abs(curvature), 1e-9), SPEED_MAX**2)
    budget = 2 * BRAKING_ACCELERATION_MAX * step_m * np.arange(2 * len(corner))
    reachable = np.minimum.accumulate((np.tile(corner, 2) + budget)[::-1])[::-1] - budget
    speed: Float64s = np.sqrt(reachable[: len(corner)])
    return speed
