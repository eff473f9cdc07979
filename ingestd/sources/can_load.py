"""How busy a CAN bus is: the bits of the frames that came, and the bits that its rates would have had time for.

Bits are counted as ISO 11898-1 frames them, interframe space included. A classic frame also has a stuff bit wherever
five bits in a row are alike; how many is counted exactly in a few frames at a time, and taken as true for the others.

Limits: of CAN FD frames the fixed stuff bits are counted and those that depend on the data are not; error frames, of
which nobody knows the length, are none of it; neither is what a filter keeps away.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from ingestd.clock import mono_ns
from ingestd.model import Flag, FrameBatch

WINDOW_NS: Final = 1_000_000_000
SAMPLE_FRAMES: Final = 4  # in which stuff bits are counted, in each window
SAMPLE_WEIGHT: Final = 0.1  # of the newest sample
STUFFED_AT_FIRST: Final = 1.08  # until there is one

BASE_BITS, EXTENDED_MORE_BITS = 47, 20  # of a classic frame without data
UNSTUFFED_BITS: Final = 13  # of them: delimiters, acknowledgement, end of frame, interframe space
FD_BASE_BITS, FD_EXTENDED_MORE_BITS = 29, 19  # in which the arbitration's rate holds …
FD_DATA_BITS: Final = 33  # … and the other's: ESI, DLC, stuff count, CRC of 17 bits, fixed stuff bits, delimiter
FD_LONG_MORE_BITS: Final = 5  # of more than 16 bytes: CRC of 21 bits, and one fixed stuff bit more
FD_LONG_BYTES: Final = 16
CRC_15: Final = 0x4599
UNUSUAL: Final = Flag.ERROR.value | Flag.FD.value


class BusLoad:
    """The load of one bus; see `model.Load`. Rates are in bits a second, 0 where nobody knows: then there is none."""

    def __init__(self, bitrate: int = 0, data_bitrate: int = 0) -> None:
        self.bitrate, self.data_bitrate = bitrate, data_bitrate
        self._ratio: float | None = None
        self._bits = self._fast_bits = 0.0
        self._since_ns = mono_ns()
        self._stuffed = STUFFED_AT_FIRST
        self._is_sampled = False

    def add(self, batch: FrameBatch) -> None:
        """Count the bits of frames."""
        if not self.bitrate:
            return
        flags = batch.flags
        if not (flags & UNUSUAL).any():
            self._add_classic(batch)
            return
        is_fd = flags & UNUSUAL == Flag.FD.value
        self._add_classic(batch[flags & UNUSUAL == 0])
        self._add_fd(batch[is_fd])

    def _add_classic(self, batch: FrameBatch) -> None:
        if not len(batch):
            return
        if not self._is_sampled:
            self._sample(batch[:SAMPLE_FRAMES])
        extended = np.count_nonzero(batch.flags & Flag.EXTENDED.value)
        bits = len(batch) * BASE_BITS + extended * EXTENDED_MORE_BITS + 8 * int(batch.length.sum())
        self._bits += self._stuffed * bits

    def _add_fd(self, batch: FrameBatch) -> None:
        length = batch.length.astype(np.int64)
        slow = FD_BASE_BITS + np.where(batch.flags & Flag.EXTENDED.value, FD_EXTENDED_MORE_BITS, 0)
        of_data = FD_DATA_BITS + 8 * length + FD_LONG_MORE_BITS * (length > FD_LONG_BYTES)
        switches = batch.flags & Flag.BITRATE_SWITCH.value != 0
        self._bits += float(slow.sum() + of_data[~switches].sum())
        self._fast_bits += float(of_data[switches].sum())

    def _sample(self, batch: FrameBatch) -> None:
        self._is_sampled = True
        nominal = stuff = 0
        for row in range(len(batch)):
            flags, payload = int(batch.flags[row]), bytes(batch.data[row, : batch.length[row]])
            bits = stuffable_bits(int(batch.arbitration_id[row]), flags, payload)
            nominal += len(bits) + UNSTUFFED_BITS
            stuff += stuff_count(bits)
        self._stuffed += SAMPLE_WEIGHT * (1 + stuff / nominal - self._stuffed)

    def ratio(self, now_ns: int) -> float | None:
        """The load since this was asked last, if that is a second ago, else what it was then; None: not known."""
        if not self.bitrate:
            self._ratio, self._since_ns = None, now_ns
            self._bits = self._fast_bits = 0.0
            return None
        elapsed_ns = now_ns - self._since_ns
        if elapsed_ns >= WINDOW_NS:
            seconds = self._bits / self.bitrate + self._fast_bits / (self.data_bitrate or self.bitrate)
            self._ratio = float(seconds * 1e9 / elapsed_ns)  # Not of numpy: it goes out as JSON.
            self._since_ns = now_ns
            self._bits = self._fast_bits = 0.0
            self._is_sampled = False
        return self._ratio


def stuffable_bits(arbitration_id: int, flags: int, payload: bytes) -> str:
    """The bits of a classic frame from its start to the end of its CRC, as 0 and 1."""
    remote, length = "1" if flags & Flag.REMOTE else "0", f"{len(payload):04b}"
    if flags & Flag.EXTENDED:
        identifier = f"{arbitration_id:029b}"
        head = "0" + identifier[:11] + "11" + identifier[11:] + remote + "00"
    else:
        head = "0" + f"{arbitration_id:011b}" + remote + "00"
    bits = head + length + "".join(f"{byte:08b}" for byte in payload)
    return bits + f"{crc_15(bits):015b}"


def crc_15(bits: str) -> int:
    """The check sequence of a classic frame."""
    crc = 0
    for bit in bits:
        is_odd = (crc >> 14 & 1) ^ (bit == "1")
        crc = crc << 1 & 0x7FFF
        if is_odd:
            crc ^= CRC_15
    return crc


def stuff_count(bits: str) -> int:
    """How many stuff bits go between them: one of the other kind after five that are alike, itself counted."""
    count, run, last = 0, 0, ""
    for bit in bits:
        run = run + 1 if bit == last else 1
        last = bit
        if run == 5:
            count += 1
            last, run = "1" if bit == "0" else "0", 1
    return count
