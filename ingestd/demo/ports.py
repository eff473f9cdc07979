"""The far ends of the car's wires: where its frames and sentences leave for whoever records them.

A CAN bus is a virtual interface of the kernel, where the kernel has those and we may make one; else a pseudo terminal
whose far end is an adapter that speaks slcan (Lawicel's protocol, with CANable's letters for CAN FD, which python-can's
driver reads). A serial line is a pseudo terminal. Nothing here waits: what the kernel does not take now is kept, to a
bound, and offered again; beyond that, and while nobody listens, it is not sent and not counted as sent.
"""

from __future__ import annotations

import errno
import os
import pty
import shutil
import socket
import struct
import subprocess
import tty
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Final, Protocol

from ingestd.model import Flag, FrameBatch

BACKLOG_MAX: Final = 2000  # Frames or sentences that wait for the kernel: some seconds' worth.
_WRITE_ITEMS_MAX: Final = 64
_DLC: Final = {length: dlc for dlc, length in enumerate((*range(9), 12, 16, 20, 24, 32, 48, 64))}

_CANFD_MTU: Final = 72
_UP: Final = 1  # IFF_UP of linux/if.h
_EXTENDED: Final = 0x8000_0000  # CAN_EFF_FLAG
_BITRATE_SWITCH: Final = 0x01  # CANFD_BRS
_IN_USE: Final = (errno.ENOBUFS, errno.EAGAIN)


class Port(Protocol):
    """Where one source sends."""

    sent: int  # frames or sentences that the kernel has taken, whole

    def send(self, items: Sequence[bytes]) -> None:
        """Send in order, as far as the kernel takes it."""

    def push(self) -> bool:
        """Offer what it has not taken yet, and look who listens; False if something is still waiting."""

    def close(self) -> None:
        """Pull the plug."""


class TerminalPort:
    """A pseudo terminal. `device` is what a program opens as if it were a serial port."""

    def __init__(self) -> None:
        self._master, slave = pty.openpty()
        self.device = os.ttyname(slave)
        tty.setraw(slave)
        os.close(slave)  # Now reading the far end tells whether anybody has it open.
        os.set_blocking(self._master, False)
        self._waiting: deque[bytes] = deque()
        self.sent = 0

    def send(self, items: Sequence[bytes]) -> None:
        """Send in order; without anybody at the other end it goes nowhere."""
        if self._listening():
            self._waiting.extend(items[: BACKLOG_MAX - len(self._waiting)])
            self._write()

    def push(self) -> bool:
        """Offer what waits."""
        if not self._listening():
            self._waiting.clear()
        self._write()
        return not self._waiting

    def close(self) -> None:
        """Pull the plug."""
        os.close(self._master)

    def _listening(self) -> bool:
        return self._hear() is not None

    def _hear(self) -> bytes | None:
        """What the other end wrote; None if nobody has it open."""
        try:
            return os.read(self._master, 4096)
        except BlockingIOError:
            return b""
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return None

    def _write(self) -> None:
        while self._waiting:
            try:
                taken = os.write(self._master, b"".join(islice(self._waiting, _WRITE_ITEMS_MAX)))
            except BlockingIOError:
                return
            while taken:
                item = self._waiting.popleft()
                if taken < len(item):
                    self._waiting.appendleft(item[taken:])
                    return
                taken -= len(item)
                self.sent += 1


class SlcanPort(TerminalPort):
    """An adapter: it passes frames on between the commands `O` and `C`."""

    def __init__(self) -> None:
        super().__init__()
        self._open = False
        self._command = b""

    def _listening(self) -> bool:
        heard = self._hear()
        if heard is None:
            self._open, self._command = False, b""
            return False
        *commands, self._command = (self._command + heard).split(b"\r")
        for command in commands:
            if command in (b"O", b"L", b"C"):
                self._open = command != b"C"
        return self._open


class SocketPort:
    """A virtual CAN interface of the kernel."""

    def __init__(self, interface: str) -> None:
        self._socket = socket.socket(socket.AF_CAN, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.CAN_RAW)
        self._socket.setsockopt(socket.SOL_CAN_RAW, socket.CAN_RAW_FD_FRAMES, 1)
        self._socket.setsockopt(socket.SOL_CAN_RAW, socket.CAN_RAW_FILTER, b"")  # It only sends.
        self._socket.bind((interface,))
        self._waiting: deque[bytes] = deque()
        self.sent = 0

    def send(self, items: Sequence[bytes]) -> None:
        """Send in order."""
        self._waiting.extend(items[: BACKLOG_MAX - len(self._waiting)])
        self.push()

    def push(self) -> bool:
        """Offer what waits. While the interface is down, frames go nowhere."""
        while self._waiting:
            try:
                self._socket.send(self._waiting[0])
            except OSError as error:
                if error.errno in _IN_USE:
                    return False
                self._waiting.clear()
                return True
            self._waiting.popleft()
            self.sent += 1
        return True

    def close(self) -> None:
        """Let go of the interface."""
        self._socket.close()


def slcan_lines(batch: FrameBatch) -> list[bytes]:
    """A letter for the kind, three or eight digits of id, one of DLC, the payload, and a carriage return."""
    lines = []
    for arbitration_id, flags, length, data in _rows(batch):
        extended, fd = flags & Flag.EXTENDED.value, flags & Flag.FD.value
        letter = ("B" if flags & Flag.BITRATE_SWITCH.value else "D") if fd else "T"
        identifier = f"{letter}{arbitration_id:08X}" if extended else f"{letter.lower()}{arbitration_id:03X}"
        lines.append(f"{identifier}{_DLC[length]:X}{data[:length].hex().upper()}\r".encode("ascii"))
    return lines


def socket_frames(batch: FrameBatch) -> list[bytes]:
    """struct can_frame or canfd_frame of linux/can.h."""
    frames = []
    for arbitration_id, flags, length, data in _rows(batch):
        identifier = arbitration_id | (_EXTENDED if flags & Flag.EXTENDED.value else 0)
        fd_flags = _BITRATE_SWITCH if flags & Flag.BITRATE_SWITCH.value else 0
        payload = data[:length].ljust(64 if flags & Flag.FD.value else 8, b"\0")
        frames.append(struct.pack("=IBB2x", identifier, length, fd_flags) + payload)
    return frames


def _rows(batch: FrameBatch) -> Iterator[tuple[int, int, int, bytes]]:
    return zip(
        batch.arbitration_id.tolist(),
        batch.flags.tolist(),
        batch.length.tolist(),
        map(bytes, batch.data),
        strict=True,
    )


class VirtualInterface:
    """A vcan interface of the kernel, made if it is not there; `made` says whether it is ours to remove."""

    def __init__(self, name: str) -> None:
        """Raises OSError where the kernel, our permissions or the interface that is there do not allow it."""
        self.name = name
        self.made = False
        settings = Path("/sys/class/net") / name
        if not settings.exists():
            _ip("link", "add", "dev", name, "type", "vcan")
            self.made = True
            try:
                _ip("link", "set", name, "mtu", str(_CANFD_MTU), "up")
            except OSError:
                self.remove()
                raise
        elif not int((settings / "flags").read_text(), 16) & _UP or int((settings / "mtu").read_text()) < _CANFD_MTU:
            raise OSError(f"{name} is there, but down or without CAN FD")

    def remove(self) -> None:
        """Remove it if we made it."""
        if self.made:
            _ip("link", "delete", self.name)


def _ip(*arguments: str) -> None:
    program = shutil.which("ip") or shutil.which("ip", path="/usr/sbin:/sbin")
    if program is None:
        raise OSError("there is no `ip`")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=10, check=False)
    if done.returncode:
        raise OSError(done.stderr.strip())
