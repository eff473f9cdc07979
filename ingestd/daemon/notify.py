"""Tell systemd how the service is doing: sd_notify(3), without its library.

Started by anything else there is no NOTIFY_SOCKET, and nothing is sent. A message that cannot be sent is not worth a
frame: it is said once in the log, and the service goes on.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping

log = logging.getLogger(__name__)


class Notifier:
    """The way to the service manager that started this process, if one did and listens."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        name = environment.get("NOTIFY_SOCKET", "")
        # A path, or a name in the abstract namespace, in which "@" stands for NUL. systemd has "vsock:" as well, for
        # virtual machines; it goes to their init, not to a service.
        self._address = "\0" + name[1:] if name.startswith("@") else name if name.startswith("/") else ""
        self._failed = False
        self._is_ready = False
        self.is_listening = bool(self._address)
        self.watchdog_seconds = _watchdog_seconds(environment)

    def __repr__(self) -> str:
        return f"<Notifier to {self._address.replace(chr(0), '@') or 'nobody'}>"

    def ready(self, status: str = "") -> None:
        """The service has started: frames are being recorded."""
        self._is_ready = True
        self._send("READY=1", _status(status))

    def reloading(self) -> None:
        """The configuration is read again; `reloaded` says that this is over. Before it is ready, that is no news."""
        if self._is_ready:
            self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def reloaded(self) -> None:
        """It is ready again, if it was."""
        if self._is_ready:
            self._send("READY=1")

    def stopping(self, status: str = "") -> None:
        """The service is on its way out."""
        self._send("STOPPING=1", _status(status))

    def starting(self, status: str, seconds: float) -> None:
        """It takes longer, but it goes on: give it that many seconds from now."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}", _status(status))

    def alive(self, status: str = "") -> None:
        """A sign of life, for the watchdog if there is one, and one line that `systemctl status` shows."""
        self._send("WATCHDOG=1" if self.watchdog_seconds is not None else "", _status(status))

    def _send(self, *lines: str) -> None:
        message = "\n".join(line for line in lines if line)
        if not self._address or not message:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to_manager:
                to_manager.setblocking(False)
                to_manager.connect(self._address)
                to_manager.send(message.encode(errors="replace"))  # A path in it may be no UTF-8.
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.warning("the service manager cannot be told reason=%r message=%r", error.strerror, message)
            self._failed = True


def _status(text: str) -> str:
    return f"STATUS={' '.join(text.split())}" if text else ""


def _watchdog_seconds(environment: Mapping[str, str]) -> float | None:
    """How long systemd waits for a sign of life of this process; None if it does not."""
    microseconds, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    if not microseconds.isdecimal() or int(microseconds) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(microseconds) / 1e6
