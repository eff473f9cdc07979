"""On the host: an instrument on a wire that the guest has on USB, hands that plug it in, and one that takes the power.

The guest asks over its serial line, a line a request: `plug`, `plug-other`, `unplug`, `talk`, `hush` and `told` are
answered by `did REQUEST ANSWER`. `synced SOURCE FRAMES` is written down for `told`; `cut SECONDS` resets the
machine after so long.
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

WIRE = Path("../wire")  # the far end of what QEMU has as a USB serial adapter
PAUSE_S = 0.02
ADAPTER: dict[str, Any] = {"driver": "usb-serial", "id": "adapter", "chardev": "wire", "serial": "FT9XYZ12"}
OTHER: dict[str, Any] = {"driver": "usb-serial", "id": "other", "chardev": "nothing", "always-plugged": True}


class Machine:
    """QEMU's control socket."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(os.environ["VM_QMP"])
        self._said = self._socket.makefile("r")
        self._said.readline()
        self.do("qmp_capabilities")

    def do(self, command: str, *, event: str = "", **arguments: Any) -> None:
        """A command, until it is done and the event was told that it brings about."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        awaited = {"return", event} - {""}
        while awaited:
            answer = json.loads(self._said.readline())
            if "error" in answer:
                sys.exit(f"host: {command}: {answer['error']}")
            awaited -= {"return"} if "return" in answer else {answer.get("event")}


class Instrument(threading.Thread):
    """Says numbered lines while it may."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.may_talk = threading.Event()
        self.said = 0

    def run(self) -> None:
        """Lines, as fast as the wire takes them."""
        with socket.socket(socket.AF_UNIX) as wire:
            wire.connect(str(WIRE))
            while self.may_talk.wait():
                wire.sendall(b"n=%d\n" % self.said)
                self.said += 1
                time.sleep(PAUSE_S)


class Host:
    """Does what the guest asks for."""

    def __init__(self) -> None:
        self._machine = Machine()
        self._instrument = Instrument()
        self._instrument.start()
        self._synced: dict[str, int] = {}

    def do(self, request: str, *words: str) -> str | None:
        """The answer, if there is one."""
        match request, words:
            case "plug", ():
                self._machine.do("device_add", **ADAPTER)
            case "plug-other", ():
                self._machine.do("device_add", **OTHER)
            case "unplug", ():
                self._machine.do("device_del", event="DEVICE_DELETED", id=ADAPTER["id"])
            case "talk", ():
                self._instrument.may_talk.set()
            case "hush", ():
                self._instrument.may_talk.clear()
            case "told", ():
                return json.dumps(self._synced)
            case "synced", (source, frames) if frames.isdigit():
                self._synced[source] = max(self._synced.get(source, 0), int(frames))
                return None
            case "cut", (seconds,):
                threading.Timer(float(seconds), self.cut).start()
                return None
            case _:
                return None  # What a cut broke off.
        return str(self._instrument.said)

    def cut(self) -> None:
        """The power goes, the adapter's too: one that talks while the machine boots brings QEMU to a standstill."""
        self._machine.do("system_reset")
        self._instrument.may_talk.clear()
        self._machine.do("device_del", event="DEVICE_DELETED", id=ADAPTER["id"])


def main() -> None:
    """Until the machine is gone."""
    host = Host()
    line = os.open(os.environ["VM_TTYS1"], os.O_RDWR | os.O_NOCTTY)
    tty.setraw(line)
    with os.fdopen(line, "r+b", buffering=0) as guest, contextlib.suppress(OSError):
        held = b""
        while True:
            held += guest.read(4096)
            *requests, held = held.split(b"\n")
            for request in requests:
                words = request.decode(errors="replace").split()
                answer = host.do(*words) if words else None
                if answer is not None:
                    guest.write(f"did {words[0]} {answer}\n".encode())


if __name__ == "__main__":
    main()
