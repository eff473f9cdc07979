"""The source's decisions, with an interface and a socket that do what the test says; nothing here needs a CAN bus."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections import deque

import numpy as np
import pytest

from ingestd.model import Link
from ingestd.sources import socketcan
from ingestd.sources.can_socket import FRAME, Frames, Interface, columns
from ingestd.sources.socketcan import SocketCan
from tests.can_bus.bus import Recording, running, until

OFFSET_NS = 1_800_000_000_000_000_000


class FakeSocket:
    """Gives what the test queued: numbers of frames with what was lost before each, or an error."""

    buffer_bytes = 1 << 20

    def __init__(self) -> None:
        self.queue: deque[list[int] | OSError] = deque()
        self.lost_count = 0
        self.closed = False
        self._readable, self._wake = os.pipe()

    def put(self, *things: list[int] | OSError) -> None:
        self.queue.extend(things)
        os.write(self._wake, b"x")

    def fileno(self) -> int:
        return self._readable

    def read(self) -> tuple[Frames | None, bool]:
        assert not self.closed
        if not self.queue:
            with contextlib.suppress(BlockingIOError):
                os.set_blocking(self._readable, False)
                os.read(self._readable, 100)
            return None, True
        if isinstance(thing := self.queue.popleft(), OSError):
            raise thing
        frames = np.zeros(len(thing), FRAME)
        wall_ns = np.full(len(thing), socketcan.mono_ns() + OFFSET_NS)
        return Frames(wall_ns, np.array(thing, np.uint32), *columns(frames, np.full(len(thing), 16))), not self.queue

    def lost(self) -> int:
        return self.lost_count

    def waiting_bytes(self) -> int:
        return 4096

    def close(self) -> None:
        self.closed = True
        os.close(self._readable)
        os.close(self._wake)


class World:
    """The machine as the source sees it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.interface: Interface | OSError | None = Interface(7, True, True)
        self.refusal: OSError | None = None
        self.looks_count = 0
        self.sockets: list[FakeSocket] = []
        monkeypatch.setattr(socketcan, "look", self._look)
        monkeypatch.setattr(socketcan, "CanSocket", self._open)
        monkeypatch.setattr(socketcan, "LOOK_S", 0.01)
        self.source = SocketCan("engine", "can0", coalesce_s=0.002, read_offset=lambda _: OFFSET_NS)
        self.recording = Recording()

    def _look(self, channel: str) -> Interface | None:
        assert channel == "can0"
        self.looks_count += 1
        if isinstance(self.interface, OSError):
            raise self.interface
        return self.interface

    def _open(self, channel: str, **_: object) -> FakeSocket:
        if self.refusal:
            raise self.refusal
        self.sockets.append(FakeSocket())
        return self.sockets[-1]

    async def is_link(self, link: Link, reason: str = "") -> None:
        status = self.source.status
        await until(lambda: status.link is link and reason in status.reason, f"{link} {reason!r}, not {status}")

    async def has(self, count: int) -> None:
        await until(lambda: self.recording.count == count, f"{count} frames")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


@pytest.mark.parametrize(
    ("interface", "refusal", "reason"),
    [
        (None, None, "there is no interface can0: plug"),
        (Interface(7, False, True), None, "can0 is down: ip link set can0 up"),
        (Interface(7, True, False), None, "can0 is not a CAN interface"),
        (OSError(errno.EPERM, "no"), None, "cannot open can0: Operation not permitted"),
        (Interface(7, True, True), OSError(errno.EACCES, "no"), "cannot open can0: Permission denied"),
        (Interface(7, True, True), OSError(errno.EAFNOSUPPORT, "no"), "modprobe can_raw"),
        (Interface(7, True, True), OSError("AF_CAN address too long"), "AF_CAN address too long"),
    ],
)
async def test_whatever_keeps_the_interface_is_said_once_and_waited_for(
    world: World, interface: Interface | None, refusal: OSError | None, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One event and one line in the log each way; frames come once it is there."""
    caplog.set_level(logging.INFO, "ingestd")
    world.interface, world.refusal = interface, refusal
    async with running(world.source, world.recording):
        await world.is_link(Link.RETRYING, reason)
        await until(lambda: world.looks_count >= 5, "several looks, all alike")
        assert world.recording.kinds == ["link_down"]
        assert reason in world.recording.events[0].payload["reason"]
        world.interface, world.refusal = Interface(7, True, True), None
        await world.is_link(Link.OPEN)
        world.sockets[-1].put([0, 0, 0])
        await world.has(3)
    assert world.recording.kinds == ["link_down", "link_up"]
    assert world.source.status.reason == ""
    assert dict(world.source.status.counters, received_bytes=0) == {"link_downs": 1, "received_bytes": 0}
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert len(world.sockets) == 1


async def test_an_interface_made_anew_gets_a_new_socket(world: World) -> None:
    """The old one is read to the end first, past the errors in between; each has its own count of what was lost."""
    async with running(world.source, world.recording):
        await world.is_link(Link.OPEN)
        old = world.sockets[0]
        world.interface = Interface(8, True, True)
        old.lost_count = 5
        old.put(OSError(errno.ENODEV, "gone"), [0, 0], OSError(errno.ENETDOWN, "down"), [5])
        await until(lambda: len(world.sockets) == 2, "a second socket")
        assert old.closed
        await world.is_link(Link.OPEN)
        world.sockets[1].lost_count = 2
        world.sockets[1].put([0, 2])
        await world.has(5)
    assert world.recording.kinds == ["link_down", "link_up"]
    assert world.recording.lost_count == 7


async def test_an_interface_that_is_down_keeps_its_socket(world: World) -> None:
    """So the first frame after its return is heard; and having been down for a moment is told too."""
    async with running(world.source, world.recording):
        await world.is_link(Link.OPEN)
        world.interface = Interface(7, False, True)
        world.sockets[0].put(OSError(errno.ENETDOWN, "down"), [0])
        await world.is_link(Link.RETRYING, "is down")
        world.interface = Interface(7, True, True)
        await world.is_link(Link.OPEN)
        world.sockets[0].put(OSError(errno.ENETDOWN, "down"))
        await until(lambda: len(world.recording.events) == 4, "four events")
        await world.is_link(Link.OPEN)
    assert world.recording.kinds == ["link_down", "link_up"] * 2
    assert len(world.sockets) == 1
    assert world.recording.count == 1


async def test_a_socket_that_fails_otherwise_is_replaced(world: World) -> None:
    """No error of the kernel ends the source."""
    async with running(world.source, world.recording) as task:
        await world.is_link(Link.OPEN)
        world.sockets[0].put(OSError(errno.ENOBUFS, "no buffers"), [0])
        await until(lambda: len(world.sockets) == 2, "a second socket")
        await world.is_link(Link.OPEN)
        assert not task.done()
    assert world.sockets[0].closed
    assert world.recording.count == 1


async def test_loss_is_counted_once_and_where_it_was(world: World) -> None:
    """By the frames where they tell, by the socket for the rest; frames that waited know less and add nothing."""
    async with running(world.source, world.recording):
        await world.is_link(Link.OPEN)
        can_socket = world.sockets[0]
        can_socket.lost_count = 10
        can_socket.put([0, 0, 3, 3, 4])
        await world.has(5)
        await until(lambda: world.recording.lost_count == 10, "all ten")
        between, behind = world.recording.overflows
        ts_ns = world.recording.column("ts_ns")
        assert between[0] == 4
        assert behind[0] == 6
        assert between[1] <= between[2] == ts_ns[4] <= behind[1] <= behind[2]
        can_socket.put([4, 9, 10, 10])
        await world.has(9)
        assert world.recording.lost_count == 10
        can_socket.lost_count = 11
        await until(lambda: world.recording.lost_count == 11, "one more, though no frame follows")
    assert dict(world.source.status.counters, received_bytes=0) == {"overflow_frames": 11, "received_bytes": 0}


async def test_the_count_of_loss_may_pass_its_32_bits(world: World) -> None:
    """A socket may live for years."""
    async with running(world.source, world.recording):
        await world.is_link(Link.OPEN)
        for lost in (1 << 31) - 1, (1 << 32) - 2:
            world.sockets[0].lost_count = lost
            await until(lambda lost=lost: world.recording.lost_count == lost, str(lost))
        world.sockets[0].lost_count = 1
        world.sockets[0].put([0xFFFF_FFFE, 1])
        await until(lambda: world.recording.lost_count == (1 << 32) + 1, "three more")


async def test_a_source_that_is_stopped_reads_to_the_end(world: World) -> None:
    """Frames and losses that nobody has looked at yet are recorded, and the socket is closed."""
    async with running(world.source, world.recording):
        await world.is_link(Link.OPEN)
        world.sockets[0].lost_count = 4
        world.sockets[0].put([0, 0], [3])
    assert world.recording.count == 3
    assert world.recording.lost_count == 4
    assert world.sockets[0].closed


async def test_a_source_may_be_stopped_while_there_is_no_interface(world: World) -> None:
    """Nothing to read, nothing to close, nothing to complain about."""
    world.interface = None
    async with running(world.source, world.recording):
        await world.is_link(Link.RETRYING)
    assert world.recording.count == 0


async def test_interfaces_of_this_machine() -> None:
    """`lo` is there but no CAN bus; a name of no interface, and names that cannot be one."""
    for channel, reason in (
        ("lo", "not a CAN interface"),
        ("can77", "no interface can77"),
        ("", "no interface"),
        ("a-name-of-16-byte", "no interface"),
        ("nul\0", "no interface"),
    ):
        source = SocketCan("x", channel)
        async with running(source, Recording()):
            await until(lambda source=source: source.status.link is Link.RETRYING, "refused")
        assert reason in source.status.reason


def test_filters_that_the_kernel_cannot_take_are_not_used() -> None:
    """More frames than asked for are better than none."""
    assert SocketCan("x", "can0", filters=[(1, 2)] * 513)._filters is None
    assert SocketCan("x", "can0", filters=[])._filters is None
    assert SocketCan("x", "can0", filters=[(1, 2)])._filters == [(1, 2)]


async def test_a_small_buffer_is_read_more_often(world: World) -> None:
    """However fast frames come, a read finds no more than an eighth of what the buffer holds."""
    source = SocketCan("engine", "can0", coalesce_s=0.02, read_offset=lambda _: OFFSET_NS)
    source._socket = FakeSocket()
    source._socket.buffer_bytes = 425_984  # what the kernel makes of its default limit: some 416 frames
    for rate, longest_s in ((100, 0.02), (2_000, 0.02), (8_000, 52 / 8_000), (16_000, 52 / 16_000)):
        now_s = 100.0
        source._until_tick(now_s)
        for _ in range(10):
            wait_s = source._until_tick(now_s)
            assert wait_s <= longest_s + 1e-6
            now_s += max(wait_s, 0.001)
            source._read_count = int(rate * max(wait_s, 0.001))
    source._socket.close()
