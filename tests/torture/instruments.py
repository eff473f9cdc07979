"""Three devices that number what they say: lines of text, CAN frames over slcan, positions of a GPS receiver.

Each on a pseudo terminal; the number can be read back from the payload of a frame and from the signals decoded of it.
"""

from __future__ import annotations

from pathlib import Path

from tests.books import number_in as number_in_line
from tests.recorder import Instrument

DBC = 'VERSION ""\nNS_:\nBS_:\nBU_:\nBO_ 291 Counter: 8 X\n SG_ Number : 7|64@0+ (1,0) [0|0] "" X\n'
UNITS_PER_DEGREE = 600_000  # NMEA says minutes to four digits.


def slcan(number: int) -> bytes:
    """A frame of id 123 (hexadecimal) whose eight bytes are the number in decimal digits, as an adapter says it."""
    return b"t1238%016d\r" % number


def position(number: int) -> bytes:
    """A sentence whose latitude is the number in ten thousandths of a minute."""
    degrees, units = divmod(number, UNITS_PER_DEGREE)
    text = b"GPGLL,%02d%02d.%04d,N,01100.0000,E,120000.00,A,A" % (degrees, *divmod(units, 10_000))
    checksum = 0
    for byte in text:
        checksum ^= byte
    return b"$%s*%02X\r\n" % (text, checksum)


def number_in(payload: bytes) -> int | None:
    """The number in a frame of any of them; None in what the end of a line has left that was cut."""
    if payload.startswith(b"$GPGLL,"):
        return int(payload[7:9]) * UNITS_PER_DEGREE + int(payload[9:11]) * 10_000 + int(payload[12:16])
    if len(payload) == 8 and not payload.startswith(b"n="):
        return int(payload.hex())
    return number_in_line(payload)


class Instruments:
    """The three, and how a daemon reads them."""

    def __init__(self, folder: Path) -> None:
        self.line = Instrument(folder / "line")
        self.can0 = Instrument(folder / "can0", say=slcan)
        self.gps = Instrument(folder / "gps", pause_s=0.01, say=position)
        self.all = {"line": self.line, "can0": self.can0, "gps": self.gps}
        self._dbc = folder / "counter.dbc"
        self._dbc.write_text(DBC)

    def start(self) -> None:
        for instrument in self.all.values():
            instrument.start()

    def stop(self) -> dict[str, int]:
        """Silence, and how much each has said."""
        return {name: instrument.stop() for name, instrument in self.all.items()}

    def close(self) -> None:
        for instrument in self.all.values():
            instrument.close()

    def configuration(self) -> str:
        """The tables of the sources."""
        return (
            f'[[serial]]\nname = "line"\nport = "{self.line.link}"\nprotocol = "lines"\n'
            f'[[serial]]\nname = "gps"\nport = "{self.gps.link}"\nprotocol = "nmea"\n'
            f'[[can]]\nname = "can0"\ninterface = "slcan"\nchannel = "{self.can0.link}"\nbitrate = 500000\n'
            f'dbc = ["{self._dbc}"]\noptions = {{ sleep_after_open = 0.0 }}\n'
        )
