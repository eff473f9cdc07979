"""What systemd is told: on a real datagram socket, by path and by abstract name."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from ingestd.daemon.notify import Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, str]]:
    """The socket of a service manager, and its name as in NOTIFY_SOCKET."""
    with (
        tempfile.TemporaryDirectory() as folder,  # pytest's own may be longer than the 108 bytes of a socket's name
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening,
    ):
        name = f"@ingestd-test-{uuid4().hex}" if request.param == "abstract" else str(Path(folder) / "notify")
        listening.bind(name.replace("@", "\0", 1))
        listening.settimeout(10)
        yield listening, name


def received(listening: socket.socket) -> str:
    return listening.recv(4096).decode()


def test_the_life_of_a_service(manager: tuple[socket.socket, str]) -> None:
    """Ready, what it does, and stopping: one datagram each; a status is one line whatever it was given."""
    listening, name = manager
    notifier = Notifier({"NOTIFY_SOCKET": name})
    notifier.ready("recording can0, gps")
    assert received(listening) == "READY=1\nSTATUS=recording can0, gps"
    notifier.alive("the database is away\nWATCHDOG=trigger")
    assert received(listening) == "STATUS=the database is away WATCHDOG=trigger"
    notifier.alive("/data/f\udcfcr/car.dbc cannot be read")  # A path in a file system need not be UTF-8.
    assert received(listening) == "STATUS=/data/f?r/car.dbc cannot be read"
    notifier.stopping()
    assert received(listening) == "STOPPING=1"
    assert repr(notifier) == f"<Notifier to {name}>"


def test_signs_of_life(manager: tuple[socket.socket, str]) -> None:
    """For the watchdog if there is one; before the service is ready each asks for more time."""
    listening, name = manager
    watched = Notifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "40000", "WATCHDOG_PID": str(os.getpid())})
    assert (watched.watchdog_seconds, watched.is_listening) == (0.04, True)
    watched.starting("the disk is full", 1.5)
    assert received(listening) == "EXTEND_TIMEOUT_USEC=1500000\nSTATUS=the disk is full"
    watched.alive("2 of 2 sources up")
    assert received(listening) == "WATCHDOG=1\nSTATUS=2 of 2 sources up"
    Notifier({"NOTIFY_SOCKET": name}).alive("2 of 2 sources up")
    assert received(listening) == "STATUS=2 of 2 sources up"


@pytest.mark.parametrize(
    "environment",
    [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}],
)
def test_nobody_asked_for_signs_of_life(environment: dict[str, str]) -> None:
    """There is no watchdog, or it is another process's."""
    assert Notifier(environment).watchdog_seconds is None


def test_without_a_service_manager(caplog: pytest.LogCaptureFixture) -> None:
    """Started from a shell, or under something that speaks vsock: nothing is sent and nothing said."""
    for environment in ({}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1234"}):
        notifier = Notifier(environment)
        notifier.ready()
        notifier.stopping()
        assert repr(notifier) == "<Notifier to nobody>"
        assert not notifier.is_listening
    assert not caplog.records


def test_a_service_manager_that_is_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is said once, not for every sign of life, and the service goes on."""
    notifier = Notifier({"NOTIFY_SOCKET": "/nonexistent/notify"})
    with caplog.at_level(logging.WARNING):
        notifier.ready()
        notifier.alive("recording")
    assert len(caplog.records) == 1
    assert "READY=1" in caplog.text


def test_a_service_manager_that_does_not_read(manager: tuple[socket.socket, str]) -> None:
    """Its queue fills up; sending does not wait for it, or the event loop would."""
    listening, name = manager
    notifier = Notifier({"NOTIFY_SOCKET": name})
    for _ in range(2000):
        notifier.alive("x" * 1000)
    assert received(listening).startswith("STATUS=x")


def test_a_reload_is_told_with_its_beginning_and_its_end(manager: tuple[socket.socket, str]) -> None:
    """systemd waits from the one to the other, and wants to know when it began."""
    listening, name = manager
    notifier = Notifier({"NOTIFY_SOCKET": name})
    before_us = time.monotonic_ns() // 1000
    notifier.reloading()
    notifier.reloaded()  # Nothing of it is told before the service is ready: it would be taken for that.
    notifier.ready()
    assert received(listening) == "READY=1"
    notifier.reloading()
    notifier.reloaded()
    first, _, stamp = received(listening).partition("\nMONOTONIC_USEC=")
    assert first == "RELOADING=1"
    assert before_us <= int(stamp) <= time.monotonic_ns() // 1000
    assert received(listening) == "READY=1"
