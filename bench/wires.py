"""Where frames leave for whoever receives them: a SocketCAN interface, or datagrams in cannelloni's format.

Frames keep their order. What the kernel has no room for is offered again until it takes it; what receivers have no room
for is theirs to count.

Sources: linux/can.h, sendmmsg(2); cannelloni, doc/udp_format.md, version 2: frames as in `canfd_frame`, big-endian,
many in a datagram. `cannelloni -I vcan0 -R HOST -r PORT -l PORT` puts them onto a bus at the other end.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import time
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ingestd.model import Flag, FrameBatch
from ingestd.sources.can_socket import BITRATE_SWITCH, CAN_FRAME_BYTES, CANFD_FRAME_BYTES, ERROR_STATE, FRAME

MESSAGES_AT_ONCE = 250  # The kernel's queue between senders and receivers holds 1,000 packets.
NO_ROOM = (errno.ENOBUFS, errno.EAGAIN)
NO_ROOM_SECONDS = 0.001
DATAGRAM_BYTES_MAX = 1400
CANNELLONI_VERSION, CANNELLONI_DATA, CANNELLONI_FD = 2, 0, 0x80


class Wire(Protocol):
    """Something that takes frames."""

    def send(self, frames: FrameBatch) -> None:
        """Send all of them, in order."""

    def close(self) -> None:
        """Let go."""


def can_frames(frames: FrameBatch) -> NDArray[np.void]:
    """The frames as the kernel has them, of dtype FRAME."""
    flags = frames.flags
    made = np.zeros(len(frames), FRAME)
    made["can_id"] = frames.arbitration_id
    for flag, bit in ((Flag.EXTENDED, 1 << 31), (Flag.REMOTE, 1 << 30), (Flag.ERROR, 1 << 29)):
        made["can_id"][flags & flag.value != 0] |= np.uint32(bit)
    made["length"] = frames.length
    made["flags"][flags & Flag.BITRATE_SWITCH.value != 0] |= BITRATE_SWITCH
    made["flags"][flags & Flag.ERROR_STATE.value != 0] |= ERROR_STATE
    width = min(frames.data.shape[1], 64)
    made["data"][:, :width] = frames.data[:, :width]
    return made


class CanWire:
    """A SocketCAN interface: hundreds of frames with one system call."""

    def __init__(self, interface: str) -> None:
        """Raises OSError if there is none of that name."""
        self._socket = socket.socket(socket.AF_CAN, socket.SOCK_RAW, socket.CAN_RAW)
        self._socket.setsockopt(socket.SOL_CAN_RAW, socket.CAN_RAW_FD_FRAMES, 1)
        self._socket.setsockopt(socket.SOL_CAN_RAW, socket.CAN_RAW_FILTER, b"")  # It only sends.
        self._socket.bind((interface,))
        self._sendmmsg = ctypes.CDLL(None, use_errno=True).sendmmsg

    def send(self, frames: FrameBatch) -> None:
        """Send all of them."""
        made = can_frames(frames)
        vectors = np.zeros((len(made), 2), np.uintp)
        vectors[:, 0] = made.ctypes.data + np.arange(len(made), dtype=np.uintp) * FRAME.itemsize
        vectors[:, 1] = np.where(frames.flags & Flag.FD.value, CANFD_FRAME_BYTES, CAN_FRAME_BYTES)
        messages = np.zeros((len(made), 8), np.uintp)  # struct mmsghdr where longs have 64 bits
        messages[:, 2] = vectors.ctypes.data + np.arange(len(made), dtype=np.uintp) * 16
        messages[:, 3] = 1
        sent = 0
        while sent < len(made):
            count = min(len(made) - sent, MESSAGES_AT_ONCE)
            more = self._sendmmsg(self._socket.fileno(), ctypes.c_void_p(messages.ctypes.data + 64 * sent), count, 0)
            if more < 0 and (number := ctypes.get_errno()) not in NO_ROOM:
                raise OSError(number, os.strerror(number))
            if more < 0:
                time.sleep(NO_ROOM_SECONDS)
            sent += max(more, 0)

    def close(self) -> None:
        """Let go of the interface."""
        self._socket.close()


class UdpWire:
    """Datagrams of frames to one receiver."""

    def __init__(self, host: str, port: int) -> None:
        """Raises OSError if the host is not known."""
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        self._address = address
        self._sequence = 0

    def send(self, frames: FrameBatch) -> None:
        """Send all of them."""
        waiting: list[bytes] = []
        size = 0
        for frame in _packed(frames):
            if size + len(frame) > DATAGRAM_BYTES_MAX:
                self._send(waiting)
                waiting, size = [], 0
            waiting.append(frame)
            size += len(frame)
        self._send(waiting)

    def _send(self, packed: list[bytes]) -> None:
        if not packed:
            return
        header = struct.pack(">BBBH", CANNELLONI_VERSION, CANNELLONI_DATA, self._sequence, len(packed))
        self._sequence = (self._sequence + 1) % 256
        self._socket.sendto(header + b"".join(packed), self._address)

    def close(self) -> None:
        """Let go of the socket."""
        self._socket.close()


def _packed(frames: FrameBatch) -> list[bytes]:
    made = can_frames(frames)
    fd = (frames.flags & Flag.FD.value != 0).tolist()
    columns = (made["can_id"].tolist(), made["length"].tolist(), made["flags"].tolist(), map(bytes, made["data"]))
    return [
        (struct.pack(">IBB", can_id, length | CANNELLONI_FD, flags) if is_fd else struct.pack(">IB", can_id, length))
        + data[:length]
        for can_id, length, flags, data, is_fd in zip(*columns, fd, strict=True)
    ]
