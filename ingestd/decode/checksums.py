"""Cyclic redundancy checks as firmware has them, of many frames at once.

Source: R. Williams, "A Painless Guide to CRC Error Detection Algorithms", for the six parameters; the names and the
check values in the tests are those of G. Cook's catalogue of parametrised CRC algorithms.
"""

from __future__ import annotations

from functools import cache
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ingestd.model import UInt8s

UInt32s = NDArray[np.uint32]


class Check(NamedTuple):
    """The parameters of one kind. `is_reflected` is of input and output; nobody mixes them."""

    bits: int
    polynomial: int
    initial: int
    is_reflected: bool
    final: int

    @property
    def size(self) -> int:
        """Bytes in a frame."""
        return self.bits // 8


CHECKS: Final = {
    "crc8": Check(8, 0x07, 0, False, 0),  # SMBus
    "crc8-maxim": Check(8, 0x31, 0, True, 0),  # 1-Wire
    "crc8-j1850": Check(8, 0x1D, 0xFF, False, 0xFF),
    "crc8-autosar": Check(8, 0x2F, 0xFF, False, 0xFF),
    "crc16-ccitt": Check(16, 0x1021, 0xFFFF, False, 0),  # also called CCITT-FALSE, IBM-3740
    "crc16-xmodem": Check(16, 0x1021, 0, False, 0),
    "crc16-kermit": Check(16, 0x1021, 0, True, 0),
    "crc16-x25": Check(16, 0x1021, 0xFFFF, True, 0xFFFF),
    "crc16-modbus": Check(16, 0x8005, 0xFFFF, True, 0),
    "crc16-arc": Check(16, 0x8005, 0, True, 0),
    "crc32": Check(32, 0x04C11DB7, 0xFFFFFFFF, True, 0xFFFFFFFF),  # Ethernet, zlib
    "crc32-mpeg2": Check(32, 0x04C11DB7, 0xFFFFFFFF, False, 0),
    "crc32c": Check(32, 0x1EDC6F41, 0xFFFFFFFF, True, 0xFFFFFFFF),
}


def compute(check: Check, data: UInt8s) -> UInt32s:
    """The checksum of each row of uint8[rows, bytes]."""
    table = _table(check)
    crc = np.full(len(data), _reflect(check.initial, check.bits) if check.is_reflected else check.initial, np.uint32)
    mask, shift = np.uint32((1 << check.bits) - 1), np.uint32(check.bits - 8)
    for column in data.T.astype(np.uint32):
        if check.is_reflected:
            crc = (crc >> np.uint32(8)) ^ table[(crc ^ column) & np.uint32(0xFF)]
        else:
            crc = ((crc << np.uint32(8)) & mask) ^ table[((crc >> shift) ^ column) & np.uint32(0xFF)]
    return crc ^ np.uint32(check.final)


@cache
def _table(check: Check) -> UInt32s:
    """What each byte does to the rest."""
    top, mask = 1 << (check.bits - 1), (1 << check.bits) - 1
    reversed_polynomial = _reflect(check.polynomial, check.bits)
    found = []
    for byte in range(256):
        if check.is_reflected:
            crc = byte
            for _ in range(8):
                crc = (crc >> 1) ^ (reversed_polynomial if crc & 1 else 0)
        else:
            crc = byte << (check.bits - 8)
            for _ in range(8):
                crc = ((crc << 1) & mask) ^ (check.polynomial if crc & top else 0)
        found.append(crc)
    return np.array(found, np.uint32)


def _reflect(value: int, bits: int) -> int:
    return int(f"{value:0{bits}b}"[::-1], 2)
