"""Block devices of a kernel of our own: disks made of memory, and device-mapper targets over them.

A target is what makes a disk misbehave: `log-writes` remembers every write, `error` refuses them, `delay` dawdles.
Source: the kernel's Documentation/admin-guide/device-mapper, and include/uapi/linux/dm-ioctl.h for `message`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

SECTOR_BYTES = 512
DISK_BYTES = 48 << 20  # of each disk; memory is taken for what was written
DISKS = (Path("/dev/ram0"), Path("/dev/ram1"), Path("/dev/ram2"))
MODULES = (
    "drivers/block/brd",
    "drivers/md/dm-mod",
    "drivers/md/dm-log-writes",
    "drivers/md/dm-delay",
    "crypto/crc32_generic",
    "fs/f2fs/f2fs",
)

MNT_DETACH = 2  # sys/mount.h
_CONTROL = Path("/dev/mapper/control")
_HEADER = struct.Struct("=3I 2I I i 3I Q 128s 129s 7s")  # struct dm_ioctl
_VERSION = 4, 0, 0
_TARGET_MSG = 3 << 30 | _HEADER.size << 16 | 0xFD << 8 | 14  # _IOWR(DM_IOCTL, DM_TARGET_MSG_CMD, struct dm_ioctl)


def run(*command: str | Path, given: str = "") -> str:
    """Run a command that must succeed, and return what it prints."""
    done = subprocess.run(list(map(str, command)), input=given, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stderr}"
    return done.stdout


def load_modules() -> None:
    """What the kernel has for all this; a module that is there already is left alone."""
    folder = Path("/usr/lib/uml/modules") / os.uname().release / "kernel"
    for module in MODULES:
        if not Path("/sys/module", Path(module).name.replace("-", "_")).exists():
            options = [f"rd_nr={len(DISKS)}", f"rd_size={DISK_BYTES >> 10}"] if module == "drivers/block/brd" else []
            run("insmod", folder / f"{module}.ko", *options)


class Mapped:
    """A device of the device mapper, as large as a disk. `target` is its kind and arguments, or a table of several."""

    def __init__(self, name: str, target: str) -> None:
        self._name = name
        run("dmsetup", "create", name, "--noudevsync", given=self._table(target))
        minor = run("dmsetup", "info", "-c", "--noheadings", "-o", "minor", name).strip()
        self.path = Path(f"/dev/dm-{minor}")

    def _table(self, target: str) -> str:
        return target if target[0].isdigit() else f"0 {DISK_BYTES // SECTOR_BYTES} {target}"

    def become(self, target: str) -> None:
        """Be another target from now on, without waiting for what a file system has not yet written."""
        run("dmsetup", "load", self._name, given=self._table(target))
        run("dmsetup", "suspend", "--noflush", "--nolockfs", self._name)
        run("dmsetup", "resume", "--noudevsync", self._name)

    def message(self, text: str) -> None:
        """What `dmsetup message NAME 0 TEXT` does, a hundred times as fast."""
        message = struct.pack("=Q", 0) + text.encode() + b"\0"
        size = _HEADER.size + len(message)
        name = self._name.encode()
        header = _HEADER.pack(*_VERSION, size, _HEADER.size, 0, 0, 0, 0, 0, 0, name, b"", b"")
        with _CONTROL.open("rb") as control:
            fcntl.ioctl(control, _TARGET_MSG, bytearray(header + message))

    def remove(self) -> None:
        """Be no more; what is under it stays."""
        run("dmsetup", "remove", "--noudevsync", "--retry", self._name)


@contextlib.contextmanager
def mapped(name: str, target: str) -> Iterator[Mapped]:
    """A mapped device while inside."""
    device = Mapped(name, target)
    try:
        yield device
    finally:
        device.remove()


@contextlib.contextmanager
def mounted(device: Path, folder: Path, file_system: str) -> Iterator[Path]:
    """The file system on a device, mounted at a folder while inside. By system call: programs take a while to start."""
    folder.mkdir(exist_ok=True)
    at = os.fsencode(folder)
    _call("mount", os.fsencode(device), at, file_system.encode(), ctypes.c_ulong(0), None)
    try:
        yield folder
    except BaseException:
        _call("umount2", at, MNT_DETACH)  # A test that failed has left files open.
        raise
    _call("umount2", at, 0)


def _call(name: str, *arguments: object) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
