"""Bytes of a serial line to frames: no I/O, bounded memory, in step again after garbage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ingestd.framing.base import Framer, SerialFrame
from ingestd.framing.cobs import CobsFramer
from ingestd.framing.lines import LineFramer
from ingestd.framing.nmea import NmeaFramer
from ingestd.framing.ubx import UbxFramer

__all__ = ["FRAMERS", "CobsFramer", "Framer", "LineFramer", "NmeaFramer", "SerialFrame", "UbxFramer"]

# By the name of the protocol in the configuration.
FRAMERS: Final[dict[str, Callable[[], Framer]]] = {
    "nmea": NmeaFramer,
    "lines": LineFramer,
    "keyvalue": LineFramer,
    "json": LineFramer,
    "csv": LineFramer,
    "ubx": UbxFramer,
    "cobs": CobsFramer,
}
