"""A disk that hangs: the event loop goes on, and the service manager hears nothing until the disk goes on too."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.books import assert_books, in_metrics
from tests.commands import is_listening
from tests.recorder import Instrument, Recorder, lines_of, wait_until

WATCHDOG_SECONDS = 1.0
HANGING = """
import time
from pathlib import Path
from ingestd.journal import Journal

sync = Journal.sync

def hanging(journal):
    while Path({!r}).exists():
        time.sleep(0.01)
    sync(journal)

Journal.sync = hanging
"""


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """What the service manager hears; a daemon that starts finds it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        name = f"ingestd-test-{uuid4().hex}"
        listening.bind(f"\0{name}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        monkeypatch.setenv("WATCHDOG_USEC", str(round(WATCHDOG_SECONDS * 1e6)))
        yield listening


def hears(listening: socket.socket, seconds: float) -> bool:
    """Whether there is a sign of life within that time."""
    listening.settimeout(seconds)
    try:
        while b"WATCHDOG=1" not in listening.recv(4096):
            pass
    except TimeoutError:
        return False
    return True


def forget(listening: socket.socket) -> None:
    """All that was said so far."""
    while hears(listening, WATCHDOG_SECONDS / 10):
        pass


@pytest.mark.slow
def test_a_disk_that_hangs(manager: socket.socket, tmp_path: Path, migrated: str) -> None:
    """No sign of life, so that the manager would start it anew; here none does, and nothing is lost."""
    device, hang = Instrument(tmp_path / "instrument"), tmp_path / "hang"
    device.start()
    daemon = Recorder(tmp_path, migrated, lines_of(device), changes=HANGING.format(str(hang)))
    try:
        daemon.start()
        is_listening(daemon)
        assert hears(manager, 30)
        hang.touch()
        forget(manager)
        assert not hears(manager, 2 * WATCHDOG_SECONDS)
        assert in_metrics(daemon)["line"].received, "the event loop goes on"
        sent = device.sent
        wait_until(lambda: device.sent > sent + 100, "a hundred lines")
        hang.unlink()
        assert hears(manager, 30)
        assert_books(daemon, migrated, {"line": device.stop()})
    finally:
        daemon.close()
        device.close()
