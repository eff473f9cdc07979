"""On the host: write down what the guest says is synced, and take its power away while it records."""

from __future__ import annotations

import json
import os
import random
import socket
import sys
import time
import tty
from pathlib import Path

SECONDS_MIN, SECONDS_MAX = 3.0, 10.0  # of recording before the power goes


def reset() -> None:
    """QEMU's reset button: what the guest had not written to its disk is gone."""
    with socket.socket(socket.AF_UNIX) as control:
        control.connect(os.environ["VM_QMP"])
        answers = control.makefile("r")
        answers.readline()
        for command in ("qmp_capabilities", "system_reset"):
            control.sendall(json.dumps({"execute": command}).encode())
            while "return" not in json.loads(answers.readline()):
                pass


def main() -> None:
    """Lines of the guest are `synced BOOT FRAMES`; the first of a boot says that it records."""
    cuts = int(Path("cuts").read_text())
    cut_at_s, boot_cut = 0.0, -1
    serial = os.open(os.environ["VM_TTYS1"], os.O_RDWR | os.O_NOCTTY)
    tty.setraw(serial)
    os.set_blocking(serial, False)
    held = b""
    with Path("synced").open("a") as synced:
        while True:
            try:
                held += os.read(serial, 4096)
            except BlockingIOError:
                time.sleep(0.01)
            *lines, held = held.split(b"\n")
            for line in lines:
                word, _, rest = line.strip().decode(errors="replace").partition(" ")
                if word != "synced" or len(rest.split()) != 2:
                    continue  # What a cut broke off.
                synced.write(rest + "\n")
                synced.flush()
                boot = int(rest.split()[0])
                if boot_cut < boot < cuts:
                    boot_cut, cut_at_s = boot, time.monotonic() + random.uniform(SECONDS_MIN, SECONDS_MAX)
            if cut_at_s and time.monotonic() > cut_at_s:
                cut_at_s = 0.0
                sys.stdout.write(f"host: the power goes in boot {boot_cut}\n")
                sys.stdout.flush()
                reset()


if __name__ == "__main__":
    main()
