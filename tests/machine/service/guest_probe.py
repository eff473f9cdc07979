"""What a program may do, each as `may` or the name of the error: run in the unit's place, and outside of it."""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

CLONE_NEWUSER = 0x10000000
LIBC = ctypes.CDLL(None, use_errno=True)


def opened(path: str, flags: int = os.O_RDONLY) -> None:
    """Open something."""
    os.close(os.open(path, flags | os.O_NOCTTY | os.O_NONBLOCK))


def called(name: str, *arguments: int) -> None:
    """A function of the C library."""
    if getattr(LIBC, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)


TRIES: dict[str, Callable[[], object]] = {
    "a disk": lambda: opened("/dev/probe-disk"),
    "a keyboard": lambda: opened("/dev/probe-keyboard"),
    "a serial line": lambda: opened("/dev/ttyS2", os.O_RDWR),
    "memory to write and execute": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC),
    "others' processes": lambda: Path("/proc/1").stat(),
    "homes": lambda: list(Path("/home").iterdir()),
    "a file of the system": lambda: opened("/opt/open/file", os.O_CREAT | os.O_WRONLY),
    "a family of sockets": lambda: socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET).close(),
    "a CAN socket": lambda: socket.socket(socket.AF_CAN, socket.SOCK_RAW, socket.CAN_RAW).close(),
    "a call that is filtered": lambda: os.sched_setaffinity(0, os.sched_getaffinity(0)),
    "stepping back": lambda: os.nice(1),
    "a name space": lambda: called("unshare", CLONE_NEWUSER),
}


def main() -> None:
    """Try all of it."""
    found = {}
    for what, attempt in TRIES.items():
        try:
            attempt()
            found[what] = "may"
        except OSError as error:
            found[what] = errno.errorcode[error.errno or 0]
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
