"""The car's GPS receiver: what it says on its serial line, as NMEA 0183 sentences.

Ten times a second, on the tenths of UTC: RMC, GGA and VTG with position, speed and course; on the full second GSA and
GSV too. Formats as u-blox's M8 has them (u-blox 8 / M8 Receiver Description, 31.2: NMEA 4.0). A sentence is sent when
the receiver has computed the fix and the line is free, as at 115,200 baud.

Limits: a perfect fix, but for the noise of its speed; satellites that hardly move; no date before 2000.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Final

from ingestd.demo.vehicle import Columns

BAUDRATE: Final = 115_200
FIX_NS: Final = 100_000_000
COMPUTING_NS: Final = 28_000_000  # from the instant of a fix to its first byte
KNOTS: Final = 3600 / 1852
GEOID_M: Final = 39.8  # above the ellipsoid, there

# Elevation, azimuth and signal strength of each satellite at time 0, by talker: GPS has 1-32, GLONASS 65-96.
_SKY: Final[dict[str, dict[int, tuple[float, float, float]]]] = {
    "GP": {
        2: (67, 92, 46),
        5: (41, 278, 43),
        7: (58, 205, 45),
        13: (23, 301, 38),
        15: (12, 332, 33),
        20: (16, 62, 35),
        27: (31, 141, 40),
        30: (74, 248, 47),
    },
    "GL": {
        66: (52, 51, 42),
        67: (38, 128, 40),
        76: (63, 319, 44),
        77: (25, 246, 36),
        82: (17, 27, 33),
        83: (9, 75, 29),
    },
}
_SATELLITES_PER_SENTENCE: Final = 4


class Receiver:
    """A receiver that is on for as long as the drive goes on; `start_utc_ns` is UTC at the drive's time 0."""

    def __init__(self, start_utc_ns: int) -> None:
        self._start_utc_ns = start_utc_ns
        self._fix_ns = -start_utc_ns % FIX_NS
        self._free_ns = 0
        self._samples = 0

    def sentences(self, columns: Columns) -> tuple[list[int], list[bytes]]:
        """The sentences of the next piece of the drive, and when each has been sent, in nanoseconds of the drive."""
        first_sample, rate_hz = self._samples, float(columns["rate_hz"][0])
        self._samples += len(columns["time_s"])
        until_ns = int(self._samples / rate_hz * 1e9)
        sent_ns, sentences = [], []
        while self._fix_ns < until_ns:
            sample = min(max(int(self._fix_ns * rate_hz / 1e9) - first_sample, 0), len(columns["time_s"]) - 1)
            fix = {name: float(column[sample]) for name, column in columns.items()}
            self._free_ns = max(self._free_ns, self._fix_ns + COMPUTING_NS)
            for sentence in _say(fix, self._start_utc_ns + self._fix_ns, self._fix_ns / 1e9):
                self._free_ns += len(sentence) * 10 * 1_000_000_000 // BAUDRATE
                sent_ns.append(self._free_ns)
                sentences.append(sentence)
            self._fix_ns += FIX_NS
        return sent_ns, sentences


def _say(fix: dict[str, float], utc_ns: int, time_s: float) -> Iterator[bytes]:
    """What is said of one fix."""
    utc = datetime.fromtimestamp(utc_ns // 1_000_000_000, UTC) + timedelta(microseconds=utc_ns % 1_000_000_000 // 1000)
    clock = f"{utc:%H%M%S}.{utc.microsecond // 10_000:02d}"
    place = f"{_angle(fix['latitude'], 2, 'NS')},{_angle(fix['longitude'], 3, 'EW')}"
    speed, course = fix["gps_speed"], f"{fix['course_deg'] % 360:.2f}"
    used = _used(int(fix["satellites"]))
    yield _sentence(f"GNRMC,{clock},A,{place},{speed * KNOTS:.3f},{course},{utc:%d%m%y},,,A")
    yield _sentence(f"GNGGA,{clock},{place},1,{len(used):02d},0.71,{fix['altitude_m']:.1f},M,{GEOID_M:.1f},M,,")
    yield _sentence(f"GNVTG,{course},T,,M,{speed * KNOTS:.3f},N,{speed * 3.6:.3f},K,A")
    if utc.microsecond == 0:
        for talker, sky in _SKY.items():
            numbers = [f"{satellite:02d}" for satellite in sky if satellite in used]
            yield _sentence(f"GNGSA,A,3,{','.join(numbers + [''] * (12 - len(numbers)))},1.32,0.71,1.11")
            yield from _in_view(talker, sky, time_s)


def _used(count: int) -> list[int]:
    """The satellites of a solution: the highest ones."""
    every = {satellite: place for sky in _SKY.values() for satellite, place in sky.items()}
    return sorted(every, key=lambda satellite: -every[satellite][0])[:count]


def _in_view(talker: str, sky: dict[int, tuple[float, float, float]], time_s: float) -> Iterator[bytes]:
    """GSV: four satellites a sentence. They move by half a degree a minute; trees and buildings pass by."""
    said = []
    for satellite, (elevation, azimuth, strength) in sky.items():
        azimuth = (azimuth + time_s / 120) % 360
        strength += 3 * math.sin(time_s / 7 + satellite)
        said.append(f"{satellite:02d},{elevation:02.0f},{int(azimuth):03d},{strength:02.0f}")
    pages = [said[at : at + _SATELLITES_PER_SENTENCE] for at in range(0, len(said), _SATELLITES_PER_SENTENCE)]
    for number, page in enumerate(pages, 1):
        yield _sentence(f"{talker}GSV,{len(pages)},{number},{len(said):02d},{','.join(page)}")


def _angle(degrees: float, digits: int, hemispheres: str) -> str:
    """Degrees and minutes as NMEA writes them; counted in units of the last digit, so that no minute is 60."""
    units = round(abs(degrees) * 60 * 100_000)
    whole, rest = divmod(units, 60 * 100_000)
    return f"{whole:0{digits}d}{rest // 100_000:02d}.{rest % 100_000:05d},{hemispheres[degrees < 0]}"


def _sentence(body: str) -> bytes:
    """With dollar, checksum (the exclusive or of what is between `$` and `*`) and line end."""
    checksum = 0
    for byte in body.encode("ascii"):
        checksum ^= byte
    return f"${body}*{checksum:02X}\r\n".encode("ascii")
