"""What the kernel knows of a CAN controller, its bit rates and its state, asked for by rtnetlink(7).

The answer may take seconds: the kernel waits for links that are being changed, and a driver may ask its adapter. So it
is asked in a thread, one for all buses, and what is known is what was answered last.

Limits: a virtual bus (vcan) has neither, and a sandbox may forbid the question: then nothing is known.

Sources: linux/rtnetlink.h, linux/if_link.h, linux/can/netlink.h.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ClassVar, Final, NamedTuple

from ingestd.model import CONTROLLER_STATES

RTM_NEWLINK, RTM_GETLINK, NLM_F_REQUEST = 16, 18, 1
IFLA_LINKINFO, IFLA_INFO_DATA = 18, 2
IFLA_CAN_BITTIMING, IFLA_CAN_STATE, IFLA_CAN_DATA_BITTIMING = 1, 4, 9
ATTRIBUTE_MASK: Final = 0x3FFF  # The upper two bits of a type are flags.
ANSWER_BYTES_MAX: Final = 65_536

_HEADER: Final = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_INTERFACE: Final = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change


class Controller(NamedTuple):
    """Bits a second, 0 where they are not known, and one of `model.CONTROLLER_STATES`, or nothing."""

    bitrate: int = 0
    data_bitrate: int = 0
    state: str = ""


class Inquiry:
    """What is known of the controller behind one interface at a time."""

    _thread: ClassVar = ThreadPoolExecutor(1, thread_name_prefix="can link")

    def __init__(self) -> None:
        self._ifindex = 0
        self._known = Controller()
        self._asked: tuple[int, Future[Controller]] | None = None  # of which interface, and what will be answered

    def __repr__(self) -> str:
        return f"<Inquiry {self._ifindex}: {self._known}>"

    def look(self, ifindex: int) -> Controller:
        """What was answered last, if that was of this interface; ask anew unless an answer is owed. Returns at once."""
        if ifindex != self._ifindex:
            self._ifindex, self._known = ifindex, Controller()
        if self._asked is not None and self._asked[1].done():
            of, answer = self._asked
            self._asked = None
            if of == ifindex:
                self._known = answer.result()
        if self._asked is None:
            self._asked = ifindex, self._thread.submit(ask, ifindex)
        return self._known


def ask(ifindex: int) -> Controller:
    """What there is to know of the controller behind an interface now; for a thread."""
    request = _HEADER.pack(_HEADER.size + _INTERFACE.size, RTM_GETLINK, NLM_F_REQUEST, 1, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as kernel:
            kernel.setblocking(False)  # The answer is there once the question was put, which is what takes its time.
            kernel.send(request + _INTERFACE.pack(0, 0, ifindex, 0, 0))
            return understand(kernel.recv(ANSWER_BYTES_MAX))
    except (OSError, struct.error):
        return Controller()


def understand(answer: bytes) -> Controller:
    """The controller that RTM_NEWLINK tells of. Raises struct.error if it is cut."""
    length, kind, *_ = _HEADER.unpack_from(answer)
    if kind != RTM_NEWLINK:
        return Controller()
    found = Controller()
    for outer, info in _attributes(answer[_HEADER.size + _INTERFACE.size : length]):
        for inner, data in _attributes(info) if outer == IFLA_LINKINFO else ():
            for what, value in _attributes(data) if inner == IFLA_INFO_DATA else ():
                first = struct.unpack_from("=I", value)[0] if len(value) >= 4 else 0  # struct can_bittiming.bitrate
                if what == IFLA_CAN_BITTIMING:
                    found = found._replace(bitrate=first)
                elif what == IFLA_CAN_DATA_BITTIMING:
                    found = found._replace(data_bitrate=first)
                elif what == IFLA_CAN_STATE and first < len(CONTROLLER_STATES):
                    found = found._replace(state=CONTROLLER_STATES[first])
    return found


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and value of each struct rtattr."""
    at = 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        if length < 4:
            return
        yield kind & ATTRIBUTE_MASK, data[at + 4 : at + length]
        at += -(-length // 4) * 4
