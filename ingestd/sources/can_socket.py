"""A raw CAN socket, read in batches: the frames of a queue, in columns, with the kernel's stamps and counts of loss.

`recvmmsg` writes frames, lengths and control messages into arrays that are made once; columns are cut out of them with
a few array operations, however many frames there are. No Python object is made per frame.

Limits: `FRAMES_MAX` frames a call, `CALLS_MAX` calls a read. CAN XL is not asked for. Linux only; the constants are
those of all architectures that share asm-generic/socket.h (x86, Arm, RISC-V, PowerPC: all but MIPS, SPARC, PA-RISC).

Sources: linux/can.h, linux/can/raw.h, linux/can/error.h, asm-generic/socket.h; recvmmsg(2), cmsg(3), netdevice(7).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ingestd.model import Flag, Int64s, UInt8s
from ingestd.sources.kernel_stamps import NO_STAMP

_log = logging.getLogger(__name__)

FRAMES_MAX: Final = 512
CALLS_MAX: Final = 32
FILTERS_MAX: Final = 512  # CAN_RAW_FILTER_MAX

CAN_FRAME_BYTES, CANFD_FRAME_BYTES = 16, 72
BITRATE_SWITCH, ERROR_STATE = 0x01, 0x02  # CANFD_BRS and CANFD_ESI, in the flags of a CAN FD frame.
ERROR_CLASSES_ALL = 0x1FFF_FFFF

SOL_SOCKET, SO_RCVBUFFORCE, SO_RXQ_OVFL, SO_MEMINFO, SO_TIMESTAMPNS_OLD, SO_TIMESTAMPNS = 1, 33, 40, 55, 35, 64
MEMINFO_BYTES, MEMINFO_DROPS = 36, 8
SOL_CAN_RAW, CAN_RAW_FILTER, CAN_RAW_ERR_FILTER, CAN_RAW_FD_FRAMES = 101, 1, 2, 5
MSG_DONTWAIT = 0x40

SIOCGIFFLAGS, SIOCGIFHWADDR, SIOCGIFINDEX = 0x8913, 0x8927, 0x8933
IFF_UP, ARPHRD_CAN, NAME_BYTES_MAX = 1, 280, 15

FRAME: Final = np.dtype(
    [("can_id", np.uint32), ("length", np.uint8), ("flags", np.uint8), ("reserved", np.uint16), ("data", np.uint8, 64)]
)

# The three upper bits of a can_id are EFF, RTR and ERR; what they say of the frame, and which bits then are its id.
_FLAGS_OF_TOP: Final = np.array(
    [Flag.ERROR if top & 1 else Flag.EXTENDED * (top >> 2) | Flag.REMOTE * (top >> 1 & 1) for top in range(8)],
    np.uint8,
)
_ID_MASK_OF_TOP: Final = np.array([0x1FFF_FFFF if top & 5 else 0x7FF for top in range(8)], np.uint32)
# Row n keeps n bytes of a payload.
_KEEP: Final = np.where(np.arange(64) < np.arange(65)[:, None], 0xFF, 0).astype(np.uint8)


class _MessageHeader(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_size_t),
        ("name_bytes", ctypes.c_uint32),
        ("vector", ctypes.c_size_t),
        ("vector_count", ctypes.c_size_t),
        ("control", ctypes.c_size_t),
        ("control_bytes", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Message(ctypes.Structure):
    """struct mmsghdr."""

    _fields_ = (("header", _MessageHeader), ("frame_bytes", ctypes.c_uint32))


class Interface(NamedTuple):
    """A network interface as it is now."""

    ifindex: int
    up: bool
    is_can: bool


class Frames(NamedTuple):
    """Frames in the order they were queued: the columns of `model.FrameBatch`, but stamps in wall clock (NO_STAMP where
    there is none), and how many frames the socket had lost when each was queued, modulo 2^32."""

    wall_ns: Int64s
    lost: NDArray[np.uint32]
    arbitration_id: NDArray[np.uint32]
    flags: UInt8s
    length: NDArray[np.uint16]
    data: UInt8s


class ControlLayout:
    """Where stamp and count of loss are among the control messages of a frame.

    Usually there is the stamp alone, or the stamp and then the count; those are read in columns. Whatever differs is
    walked. `long_bytes` is the size of a C long, `stamp` the option by which the kernel was asked for stamps.
    """

    CONTROL_BYTES: Final = 128

    def __init__(self, long_bytes: int = ctypes.sizeof(ctypes.c_size_t), stamp: int = SO_TIMESTAMPNS) -> None:
        self._long = "Q" if long_bytes == 8 else "I"
        self._header_bytes = long_bytes + 8
        self._align = long_bytes
        self._stamp_kind = stamp
        # SO_TIMESTAMPNS is 64 bits everywhere; what came before it has two longs.
        self._stamp = "qq" if stamp == SO_TIMESTAMPNS or long_bytes == 8 else "ii"
        stamp_bytes = struct.calcsize("=" + self._stamp)
        self._stamp_space = self._space(stamp_bytes)
        self._both_space = self._stamp_space + self._space(4)
        self._stamp_length, self._count_length = self._header_bytes + stamp_bytes, self._header_bytes + 4
        second = self._stamp_space
        number, half = f"=u{long_bytes}", f"=i{stamp_bytes // 2}"
        fields: dict[str, tuple[str, int]] = {
            "stamp_length": (number, 0),
            "stamp_kind": ("=u8", long_bytes),
            "seconds": (half, self._header_bytes),
            "nanoseconds": (half, self._header_bytes + stamp_bytes // 2),
            "count_length": (number, second),
            "count_kind": ("=u8", second + long_bytes),
            "count": ("=u4", second + self._header_bytes),
        }
        self._dtype = np.dtype({
            "names": list(fields),
            "formats": [kind for kind, _ in fields.values()],
            "offsets": [offset for _, offset in fields.values()],
            "itemsize": self.CONTROL_BYTES,
        })  # fmt: skip
        # Level and type lie side by side: one comparison for both.
        self._stamp_mark, self._count_mark = _mark(stamp), _mark(SO_RXQ_OVFL)

    def _space(self, data_bytes: int) -> int:
        return self._header_bytes + -(-data_bytes // self._align) * self._align

    def parse(self, control: UInt8s, used_bytes: NDArray[Any]) -> tuple[Int64s, NDArray[np.uint32]]:
        """Stamps, NO_STAMP for none, and counts, 0 for none.

        `control` is uint8[frames, CONTROL_BYTES], C-contiguous; `used_bytes` of each row are meant.
        """
        columns = control.view(self._dtype)[:, 0]
        first = (columns["stamp_length"] == self._stamp_length) & (columns["stamp_kind"] == self._stamp_mark)
        wall_ns = columns["seconds"].astype(np.int64) * 1_000_000_000 + columns["nanoseconds"]
        usual = first & (used_bytes == self._stamp_space)
        if usual.all():
            return wall_ns, np.zeros(len(wall_ns), np.uint32)
        both = first & (used_bytes == self._both_space)
        both &= (columns["count_length"] == self._count_length) & (columns["count_kind"] == self._count_mark)
        count = np.where(both, columns["count"], np.uint32(0))
        for row in np.flatnonzero(~(usual | both)).tolist():
            wall_ns[row], count[row] = self._walk(control[row, : int(used_bytes[row])].tobytes())
        return wall_ns, count

    def _walk(self, control: bytes) -> tuple[int, int]:
        stamp, count, at = NO_STAMP, 0, 0
        while at + self._header_bytes <= len(control):
            length, level, kind = struct.unpack_from(f"={self._long}ii", control, at)
            data = control[at + self._header_bytes : at + length]
            if level == SOL_SOCKET and kind == self._stamp_kind and len(data) == struct.calcsize("=" + self._stamp):
                seconds, nanoseconds = struct.unpack("=" + self._stamp, data)
                stamp = seconds * 1_000_000_000 + nanoseconds
            elif level == SOL_SOCKET and kind == SO_RXQ_OVFL and len(data) == 4:
                count = int.from_bytes(data, sys.byteorder)
            if length < self._header_bytes:
                break
            at += self._space(length - self._header_bytes)
        return stamp, count


def _mark(kind: int) -> int:
    mark: int = struct.unpack("=Q", struct.pack("=ii", SOL_SOCKET, kind))[0]
    return mark


def columns(frames: NDArray[Any], frame_bytes: NDArray[Any]) -> tuple[NDArray[Any], UInt8s, NDArray[Any], UInt8s]:
    """Arbitration ids, flags, lengths and payloads of `frames` (`FRAME`[n]), each read as so many bytes."""
    can_id = frames["can_id"]
    top = can_id >> 29
    flags = _FLAGS_OF_TOP[top]
    length = frames["length"].astype(np.uint16)
    fd = frame_bytes == CANFD_FRAME_BYTES
    width = 8
    if fd.any():
        width = 64
        wire = frames["flags"]
        fd_flags = (
            Flag.FD + (wire & BITRATE_SWITCH) * Flag.BITRATE_SWITCH + (wire & ERROR_STATE) * (Flag.ERROR_STATE >> 1)
        )
        flags |= np.where(fd, fd_flags, 0).astype(np.uint8)
        np.minimum(length, np.where(fd, 64, 8), out=length, casting="unsafe")
    else:
        np.minimum(length, 8, out=length)
    length[(flags & Flag.REMOTE.value) != 0] = 0
    data = frames["data"][:, :width] & _KEEP[length, :width]
    return can_id & _ID_MASK_OF_TOP[top], flags, length, data


def look(channel: str) -> Interface | None:
    """The interface of that name, or None if there is none. Raises OSError when it cannot be asked for."""
    name = os.fsencode(channel)
    if not 0 < len(name) <= NAME_BYTES_MAX or b"\0" in name:
        return None
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as any_socket:
        try:
            index, flags, hardware = (
                fcntl.ioctl(any_socket, request, struct.pack("16s24x", name))[16:]
                for request in (SIOCGIFINDEX, SIOCGIFFLAGS, SIOCGIFHWADDR)
            )
        except OSError as error:
            if error.errno in (errno.ENODEV, errno.ENXIO):
                return None
            raise
    (flag_bits,) = struct.unpack_from("=H", flags)
    (family,) = struct.unpack_from("=H", hardware)
    return Interface(struct.unpack_from("=i", index)[0], bool(flag_bits & IFF_UP), family == ARPHRD_CAN)


def has_bus(channel: str) -> bool:
    """Whether there is hardware behind an interface, which needs a bit rate; not so with vcan, vxcan and slcan."""
    return Path("/sys/class/net", channel, "device").exists()


def dropped_count(channel: str) -> int:
    """Frames that the kernel dropped between interface and sockets, since the interface exists; 0 if it does not.

    Its queue of packets for all interfaces (net.core.netdev_max_backlog) was full, or a driver had no memory. No socket
    is told.
    """
    try:
        return int(Path(f"/sys/class/net/{channel}/statistics/rx_dropped").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


class CanSocket:
    """A raw socket on one interface. Raises OSError wherever the kernel says no."""

    def __init__(
        self, channel: str, *, fd: bool, filters: Sequence[tuple[int, int]] | None, receive_buffer_bytes: int
    ) -> None:
        self._messages_used = 0
        self._socket = socket.socket(29, socket.SOCK_RAW, 1)  # AF_CAN, CAN_RAW
        try:
            self._layout = self._prepare(fd, filters)
            self.buffer_bytes = self._enlarge(channel, receive_buffer_bytes)
            self._make_arrays()
            self._socket.bind((channel,))
        except BaseException:
            self._socket.close()
            raise

    def _prepare(self, fd: bool, filters: Sequence[tuple[int, int]] | None) -> ControlLayout:
        option = self._socket.setsockopt
        if fd:
            option(SOL_CAN_RAW, CAN_RAW_FD_FRAMES, 1)
        option(SOL_CAN_RAW, CAN_RAW_ERR_FILTER, ERROR_CLASSES_ALL)
        if filters:
            self.filter(filters)
        option(SOL_SOCKET, SO_RXQ_OVFL, 1)
        try:
            option(SOL_SOCKET, SO_TIMESTAMPNS, 1)
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT:
                raise
            option(SOL_SOCKET, SO_TIMESTAMPNS_OLD, 1)  # Linux before 5.1
            return ControlLayout(stamp=SO_TIMESTAMPNS_OLD)
        return ControlLayout()

    def filter(self, filters: Sequence[tuple[int, int]]) -> None:
        """Let only these frames pass, and error frames; what is queued stays."""
        pairs = b"".join(struct.pack("=II", *pair) for pair in filters)
        self._socket.setsockopt(SOL_CAN_RAW, CAN_RAW_FILTER, pairs)

    def _enlarge(self, channel: str, wanted_bytes: int) -> int:
        """Set the receive buffer; the kernel doubles what it is asked for, for its own use."""
        try:
            self._socket.setsockopt(SOL_SOCKET, SO_RCVBUFFORCE, wanted_bytes)
        except OSError:
            self._socket.setsockopt(SOL_SOCKET, socket.SO_RCVBUF, wanted_bytes)
        granted_bytes = self._socket.getsockopt(SOL_SOCKET, socket.SO_RCVBUF)
        if granted_bytes < 2 * wanted_bytes:
            _log.warning(
                "receive buffer smaller than asked for channel=%s bytes=%d wanted_bytes=%d"
                " hint='sysctl -w net.core.rmem_max=%d, or run with CAP_NET_ADMIN'",
                channel, granted_bytes // 2, wanted_bytes, wanted_bytes,
            )  # fmt: skip
        return granted_bytes

    def _make_arrays(self) -> None:
        self._recvmmsg = ctypes.CDLL(None, use_errno=True).recvmmsg
        self._recvmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p)
        self._frames = np.zeros(FRAMES_MAX, FRAME)
        self._control = np.zeros((FRAMES_MAX, ControlLayout.CONTROL_BYTES), np.uint8)
        vectors = self._vectors = np.zeros((FRAMES_MAX, 2), np.uintp)
        rows = np.arange(FRAMES_MAX, dtype=np.uintp)
        vectors[:, 0] = self._frames.ctypes.data + rows * FRAME.itemsize
        vectors[:, 1] = FRAME.itemsize
        messages = self._messages = np.zeros(FRAMES_MAX, np.dtype(_Message))
        header = messages["header"]
        header["vector"] = vectors.ctypes.data + rows * vectors.itemsize * 2
        header["vector_count"] = 1
        header["control"] = self._control.ctypes.data + rows * ControlLayout.CONTROL_BYTES
        self._control_bytes = header["control_bytes"]
        self._control_bytes[:] = ControlLayout.CONTROL_BYTES
        self._frame_bytes = messages["frame_bytes"]
        self._address = messages.ctypes.data

    def __repr__(self) -> str:
        return f"<CanSocket {self._socket.fileno()}>"

    def fileno(self) -> int:
        """For the event loop."""
        return self._socket.fileno()

    def read(self) -> tuple[Frames | None, bool]:
        """Up to FRAMES_MAX frames, and whether the queue is empty now.

        Raises OSError for what the kernel has to say in between (ENETDOWN, ENODEV); there may be frames behind it.
        """
        # Each row is as long as its frame needed it to be last time, which may be too short now.
        self._control_bytes[: self._messages_used] = ControlLayout.CONTROL_BYTES
        count = self._recvmmsg(self._socket.fileno(), self._address, FRAMES_MAX, MSG_DONTWAIT, None)
        self._messages_used = max(count, 0)
        if count < 0:
            number = ctypes.get_errno()
            if number in (errno.EAGAIN, errno.EINTR):
                return None, number == errno.EAGAIN
            raise OSError(number, os.strerror(number))
        wall_ns, lost = self._layout.parse(self._control[:count], self._control_bytes[:count])
        frames = Frames(wall_ns, lost, *columns(self._frames[:count], self._frame_bytes[:count]))
        return frames, count < FRAMES_MAX

    def lost(self) -> int:
        """How many frames this socket has lost because its buffer was full, modulo 2^32, without waiting for the next
        frame to tell."""
        info = self._socket.getsockopt(SOL_SOCKET, SO_MEMINFO, MEMINFO_BYTES)
        return int.from_bytes(info[4 * MEMINFO_DROPS :][:4], sys.byteorder)

    def waiting_bytes(self) -> int:
        """How much of the receive buffer is in use now."""
        info = self._socket.getsockopt(SOL_SOCKET, SO_MEMINFO, MEMINFO_BYTES)
        return int.from_bytes(info[:4], sys.byteorder)

    def close(self) -> None:
        """Let go of the interface. What is queued is lost."""
        self._socket.close()


def join(parts: Sequence[Frames]) -> Frames:
    """The frames of several reads as one."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.data.shape[1] for part in parts)
    data = [np.pad(part.data, ((0, 0), (0, width - part.data.shape[1]))) for part in parts]
    columns_but_data = [np.concatenate(column) for column in list(zip(*parts, strict=True))[:-1]]
    return Frames._make([*columns_but_data, np.concatenate(data)])
