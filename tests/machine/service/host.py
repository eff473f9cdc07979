"""On the host: the hand at the USB plug and at the power switch of the guest, and the instrument at the other end.

What the guest wants is a word on its serial line: `plug`, `pull`, `cut`; `synced N` is written down for its next boot.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import tty
from pathlib import Path
from typing import Any

LINES_PAUSE_S = 0.05
DEVICE = {"driver": "usb-serial", "id": "instrument", "chardev": "instrument", "bus": "usb.0"}


def qemu(command: str, **arguments: Any) -> None:
    """Have QEMU do something."""
    with socket.socket(socket.AF_UNIX) as control:
        control.connect(os.environ["VM_QMP"])
        answers = control.makefile("r")
        answers.readline()
        for each, with_these in (("qmp_capabilities", {}), (command, arguments)):
            control.sendall(json.dumps({"execute": each, "arguments": with_these}).encode())
            while "return" not in (answer := json.loads(answers.readline())):
                if "error" in answer:
                    sys.exit(f"host: {command}: {answer['error']['desc']}")


def talk() -> None:
    """Numbered lines, for whoever is plugged in; without a plug they are said to nobody."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect("instrument.sock")
        line.setblocking(False)
        number = 0
        while True:
            with contextlib.suppress(BlockingIOError):
                line.send(b"n=%d\n" % number)
                number += 1
            time.sleep(LINES_PAUSE_S)


def main() -> None:
    """Do as the guest says."""
    threading.Thread(target=talk, daemon=True).start()
    serial = os.open(os.environ["VM_TTYS1"], os.O_RDWR | os.O_NOCTTY)
    tty.setraw(serial)
    held = b""
    while True:
        held += os.read(serial, 4096)
        *lines, held = held.split(b"\n")
        for line in lines:
            word, _, rest = line.strip().decode(errors="replace").partition(" ")
            if word == "plug":
                qemu("device_add", **DEVICE)
            elif word == "pull":
                qemu("device_del", id=DEVICE["id"])
            elif word == "synced" and rest.isdecimal():
                Path("synced").write_text(rest)
            elif word == "cut":
                qemu("system_reset")


if __name__ == "__main__":
    main()
