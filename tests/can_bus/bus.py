"""A virtual CAN bus under test: made and unmade, written to at C speed, and what a source recorded of it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import itertools
import os
import socket
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ingestd.model import Clock, Event, FrameBatch, Link
from ingestd.sources.can_socket import FRAME, SOL_CAN_RAW
from ingestd.sources.socketcan import SocketCan

SECONDS_MAX = 20.0
_NUMBERS = itertools.count()


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=SECONDS_MAX)


class Bus:
    """A vcan interface of a name that is new. Not made until `add` is called."""

    def __init__(self) -> None:
        self.channel = f"vcan{os.getpid() % 100000}x{next(_NUMBERS)}"

    def add(self, *, up: bool = True) -> None:
        ip("link", "add", self.channel, "type", "vcan")
        ip("link", "set", self.channel, "mtu", "72")
        if up:
            self.up()

    def up(self) -> None:
        ip("link", "set", self.channel, "up")

    def down(self) -> None:
        ip("link", "set", self.channel, "down")

    def delete(self) -> None:
        ip("link", "delete", self.channel)

    def delete_if_there(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self.delete()

    def sender(self) -> Sender:
        return Sender(self.channel)

    def __enter__(self) -> Self:
        self.add()
        return self

    def __exit__(self, *_: object) -> None:
        self.delete_if_there()


class Sender:
    """Writes frames to a bus, hundreds with one system call."""

    def __init__(self, channel: str) -> None:
        self._socket = socket.socket(socket.AF_CAN, socket.SOCK_RAW, socket.CAN_RAW)
        self._socket.setsockopt(SOL_CAN_RAW, socket.CAN_RAW_FD_FRAMES, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, 32, 16 << 20)  # SO_SNDBUFFORCE
        self._socket.setsockopt(SOL_CAN_RAW, socket.CAN_RAW_FILTER, b"")
        self._socket.bind((channel,))
        self._sendmmsg = ctypes.CDLL(None, use_errno=True).sendmmsg

    def __enter__(self) -> Sender:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, frames: NDArray[np.void], frame_bytes: NDArray[np.integer] | int = 16) -> None:
        """Frames of dtype FRAME, each as a classic (16) or an FD frame (72)."""
        frames = np.ascontiguousarray(frames)
        count = len(frames)
        rows = np.arange(count, dtype=np.uintp)
        vectors = np.zeros((count, 2), np.uintp)
        vectors[:, 0] = frames.ctypes.data + rows * FRAME.itemsize
        vectors[:, 1] = frame_bytes
        messages = np.zeros((count, 8), np.uintp)  # struct mmsghdr where longs have 64 bits
        messages[:, 2] = vectors.ctypes.data + rows * 16
        messages[:, 3] = 1
        sent = 0
        while sent < count:
            more = self._sendmmsg(
                self._socket.fileno(), ctypes.c_void_p(messages.ctypes.data + sent * 64), min(count - sent, 1024), 0
            )
            if more < 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            sent += more


def numbered(count: int, *, first: int = 0, can_id: int = 0x123) -> NDArray[np.void]:
    """Classic frames whose payload is their number."""
    frames = np.zeros(count, FRAME)
    frames["can_id"] = can_id
    frames["length"] = 8
    frames["data"][:, :8] = (np.arange(count, dtype="<u8") + first).view(np.uint8).reshape(count, 8)
    return frames


class Recording:
    """What a source recorded, in memory."""

    def __init__(self) -> None:
        self.batches: list[tuple[FrameBatch, Clock]] = []
        self.overflows: list[tuple[int, int, int]] = []
        self.events: list[Event] = []
        self.count = 0

    def frames(self, batch: FrameBatch, clock: Clock) -> None:
        self.batches.append((batch, clock))
        self.count += len(batch)

    def overflow(self, source: str, frames_count: int, from_ns: int, to_ns: int) -> None:
        assert from_ns <= to_ns
        self.overflows.append((frames_count, from_ns, to_ns))

    def event(self, event: Event) -> None:
        self.events.append(event)

    @property
    def lost_count(self) -> int:
        return sum(count for count, _, _ in self.overflows)

    async def has_accounted_for(self, sent: int) -> None:
        """Until every frame sent is recorded, or counted as lost."""
        await until(lambda: self.count + self.lost_count >= sent, f"{sent} frames recorded or counted as lost")

    @property
    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def column(self, name: str) -> NDArray[np.generic]:
        return np.concatenate([getattr(batch, name) for batch, _ in self.batches])

    def data(self) -> NDArray[np.uint8]:
        """Payloads, all 64 wide."""
        return np.concatenate([np.pad(b.data, ((0, 0), (0, 64 - b.data.shape[1]))) for b, _ in self.batches])

    def numbers(self) -> NDArray[np.uint64]:
        return np.ascontiguousarray(self.data()[:, :8]).view("<u8")[:, 0]


@contextlib.asynccontextmanager
async def running(source: SocketCan, recording: Recording) -> AsyncIterator[asyncio.Task[None]]:
    """The source, running; afterwards it has read to the end and closed."""
    task = asyncio.create_task(source.run(recording))
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], bool], what: str, seconds: float = SECONDS_MAX) -> float:
    """Wait for a condition; how many seconds it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + seconds, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(0.005)
    return time.monotonic() - began


async def opened(source: SocketCan) -> None:
    await until(lambda: source.status.link is Link.OPEN, "the source is open")


def has_vcan() -> bool:
    """Whether interfaces can be made here."""
    bus = Bus()
    try:
        bus.add()
    except (OSError, subprocess.CalledProcessError):
        return False
    bus.delete()
    return True


def can_errors(*frames: tuple[int, bytes]) -> NDArray[np.void]:
    """Error frames of these classes and payloads."""
    made = np.zeros(len(frames), FRAME)
    for row, (classes, payload) in enumerate(frames):
        made["can_id"][row] = 0x2000_0000 | classes
        made["length"][row] = 8
        made["data"][row, :8] = struct.unpack("8B", payload.ljust(8, b"\0"))
    return made
