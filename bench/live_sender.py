"""A sender that costs little: the demo car's frames onto SocketCAN interfaces, many with one system call, paced.

    python live_sender.py STATE CHANNEL…

A process of its own, the same for everything that is compared. STATE is a file of int64 that both sides map:

    0  how many interfaces are sent to      3  set to end it
    1  frames/s for each of them, 0: pause  4  frames sent to each interface so far
    2  never more than this many frames to each

With LIVE_STAND_IN in the environment they go to live_stand_in.c instead: as datagrams to port 20000 and so on.

Frames leave every two milliseconds, as those that came over a wire meanwhile. If it is held up, it catches up.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct
import sys
import time
from pathlib import Path

import numpy as np

BUSES, RATE, LIMIT, END, SENT = range(5)
STATE_BYTES = 4096
TICK_NS = 2_000_000
BURST_MAX = 250  # The kernel's queue between sender and receivers holds 1,000 packets.
CYCLE_SECONDS = 20.0  # of driving; then the same frames again
FRAME = np.dtype([("can_id", np.uint32), ("length", np.uint8), ("padding", np.uint8, 3), ("data", np.uint8, 8)])


def frames() -> np.ndarray:
    """What the car's powertrain sends, in wire order: classic frames, some five signals each."""
    from ingestd.demo import simulate
    from ingestd.demo.vehicle import drive

    batch = next(batch for batch in simulate.frames(drive(CYCLE_SECONDS)) if batch.source == "powertrain")
    made = np.zeros(len(batch), FRAME)
    made["can_id"], made["length"], made["data"] = batch.arbitration_id, batch.length, batch.data[:, :8]
    return made


class Burst:
    """sendmmsg of a part of the cycle to one interface."""

    def __init__(self, channel: str, vectors: np.ndarray, messages: np.ndarray) -> None:
        if os.environ.get("LIVE_STAND_IN"):
            messages = messages.copy()
            self._there = np.frombuffer(struct.pack("=HHI8x", socket.AF_INET, *there(channel)), np.uint8)
            messages[:, 0], messages[:, 1] = self._there.ctypes.data, len(self._there)
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        else:
            self._socket = socket.socket(socket.AF_CAN, socket.SOCK_RAW, socket.CAN_RAW)
            self._socket.setsockopt(socket.SOL_CAN_RAW, socket.CAN_RAW_FILTER, b"")
            self._socket.bind((channel,))
        self._vectors, self._messages = vectors, messages
        self._count, self._address = len(messages), messages.ctypes.data
        self._socket.setsockopt(socket.SOL_SOCKET, 32, 16 << 20)  # SO_SNDBUFFORCE
        self._fileno = self._socket.fileno()
        self._sendmmsg = ctypes.CDLL(None, use_errno=True).sendmmsg
        self._sendmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int)

    def send(self, first: int, count: int) -> int:
        """Send up to `count` frames beginning with number `first`; how many were sent."""
        first %= self._count
        sent = self._sendmmsg(self._fileno, self._address + 64 * first, min(count, self._count - first, BURST_MAX), 0)
        if sent < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return int(sent)


def there(channel: str) -> tuple[int, int]:
    """Port and address of an interface's stand-in, in network order."""
    return socket.htons(20000 + int(channel.removeprefix("can"))), socket.htonl(0x7F000001)


def main(state_path: str, channels: list[str]) -> None:
    cycle = frames()
    rows = np.arange(len(cycle), dtype=np.uintp)
    vectors = np.zeros((len(cycle), 2), np.uintp)
    vectors[:, 0], vectors[:, 1] = cycle.ctypes.data + rows * FRAME.itemsize, FRAME.itemsize
    messages = np.zeros((len(cycle), 8), np.uintp)  # struct mmsghdr where longs have 64 bits
    messages[:, 2], messages[:, 3] = vectors.ctypes.data + rows * 16, 1
    bursts = [Burst(channel, vectors, messages) for channel in channels]
    with Path(state_path).open("r+b") as file:
        state = np.frombuffer(mmap.mmap(file.fileno(), STATE_BYTES), np.int64)
    state[RATE] = 0
    state[SENT - 1 + len(channels) + 1] = 1  # Ready.
    rate, began_ns, due_before = 0, 0, 0
    while not state[END]:
        now_ns = time.monotonic_ns()
        if state[RATE] != rate:
            rate, began_ns, due_before = int(state[RATE]), now_ns, 0
        if not rate:
            time.sleep(0.005)
            continue
        due = (now_ns - began_ns) * rate // 1_000_000_000
        more, due_before = due - due_before, due
        for bus in range(int(state[BUSES])):
            sent = int(state[SENT + bus])
            until = min(sent + more, int(state[LIMIT]))
            while sent < until:
                sent += bursts[bus].send(sent, until - sent)
                state[SENT + bus] = sent
        time.sleep(max(TICK_NS - (time.monotonic_ns() - now_ns), 0) / 1e9)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
