"""Serial lines for real: pty pairs, the kernel between, uvloop and asyncio's own loop.

A pty has no baud rate and no USB bus. What it shares with a real port: the driver's interface, hang-up when the other
end goes, names that come and go, locks.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import grp
import inspect
import os
import random
import time
import tty
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path

import pytest
import uvloop

from ingestd.clock import mono_ns
from ingestd.framing import FRAMERS, LineFramer, SerialFrame
from ingestd.model import Clock, Event, FrameBatch, Link
from ingestd.sources.serial import SerialPort, reason

SECONDS_MAX = 20.0


def on_both_loops(test: Callable[..., Coroutine[None, None, None]]) -> Callable[..., None]:
    """The daemon runs on uvloop, a script may run on asyncio's own."""

    @functools.wraps(test)
    def run(loop: Callable[[], asyncio.AbstractEventLoop], **arguments: object) -> None:
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(test(**arguments))
            assert not asyncio.all_tasks(runner.get_loop()), "tasks were left behind"

    signature = inspect.signature(test)
    parameter = inspect.Parameter("loop", inspect.Parameter.KEYWORD_ONLY)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), parameter])  # type: ignore[attr-defined]
    loops = [uvloop.new_event_loop, asyncio.new_event_loop]
    return pytest.mark.parametrize("loop", loops, ids=["uvloop", "asyncio"])(run)


class Recorder:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.payloads: list[bytes] = []
        self.ts_ns: list[int] = []
        self.events: list[Event] = []

    def frames(self, batch: FrameBatch, clock: Clock) -> None:
        assert batch.data.shape[1] % 8 == 0
        self.payloads += [bytes(batch.data[row, : batch.length[row]]) for row in range(len(batch))]
        self.ts_ns += batch.ts_ns.tolist()

    def overflow(self, source: str, frames_count: int, from_ns: int, to_ns: int) -> None:
        raise AssertionError("no kernel counts what a serial line loses")

    def event(self, event: Event) -> None:
        self.events.append(event)

    @property
    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]


class Device:
    """The other end of a pty, behind a link as udev makes them."""

    def __init__(self, link: Path) -> None:
        self.master, slave = os.openpty()
        tty.setraw(slave)
        os.set_blocking(self.master, False)
        self.slave_path = os.ttyname(slave)
        # The name stays as long as the master; nobody but the source shall hold the slave.
        os.close(slave)
        link.unlink(missing_ok=True)
        link.symlink_to(self.slave_path)

    async def send(self, data: bytes) -> None:
        """All of it, as fast as the reader takes it."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self.master, view[:2048]) :]
            except BlockingIOError:
                await asyncio.sleep(0.001)

    def unplug(self) -> None:
        if self.master >= 0:
            os.close(self.master)
            self.master = -1


@pytest.fixture
def link(tmp_path: Path) -> Path:
    return tmp_path / "usb-instrument"


@pytest.fixture
def device(link: Path) -> Iterator[Device]:
    device = Device(link)
    yield device
    device.unplug()


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS_MAX
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {SECONDS_MAX} s"
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def running(
    port: SerialPort, recorder: Recorder, *, link: Link | None = Link.OPEN
) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(port.run(recorder))
    try:
        if link is not None:
            await until(lambda: port.status.link is link, f"link {link}")
        yield task
        assert not task.done(), "a source runs until it is cancelled"
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def make(link: Path, protocol: str = "nmea") -> SerialPort:
    return SerialPort("gps", str(link), 9600, FRAMERS[protocol]())


def framed(data: bytes, protocol: str = "nmea") -> list[bytes]:
    framer = FRAMERS[protocol]()
    return [frame.payload for frame in framer.feed(data, 0) + framer.flush()]


def sentence(number: int) -> bytes:
    body = b"GPTXT,01,01,02,%d" % number
    checksum = 0
    for byte in body:
        checksum ^= byte
    return b"$%b*%02X" % (body, checksum)


def cut(data: bytes, size: Callable[[], int]) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        piece = data[at : at + size()]
        yield piece
        at += len(piece)


@on_both_loops
async def test_every_log_at_full_speed(shared_data: Path, link: Path, device: Device) -> None:
    """What goes through the kernel as fast as it takes it comes out as from the framer alone, log after log."""
    recorder, port = Recorder(), make(link)
    logs = [path.read_bytes() for path in sorted((shared_data / "serial").glob("*.log"))]
    async with running(port, recorder):
        for data in logs:
            await device.send(data + b"\n")
        await until(lambda: port.status.counters["received_bytes"] == sum(map(len, logs)) + len(logs), "all bytes")
    assert recorder.payloads == framed(b"\n".join([*logs, b""]))
    assert len(recorder.payloads) > 14_000
    assert recorder.ts_ns == sorted(recorder.ts_ns)


@pytest.mark.parametrize("size", [1, 7, 0], ids=["byte by byte", "sevens", "lumps"])
@pytest.mark.parametrize("name", ["gpsd_mt3339", "pynmeagps_pygpsdata-mixed", "gpsd_gp-320fw-2019-04-07-coldboot"])
@on_both_loops
async def test_pieces(shared_data: Path, link: Path, device: Device, name: str, size: int) -> None:
    """However the bytes are cut into writes, with pauses for the reader to come between, the frames are the same."""
    data = (shared_data / "serial" / f"{name}.log").read_bytes()
    chance = random.Random(3)
    for protocol in FRAMERS:
        recorder, port = Recorder(), make(link, protocol)
        async with running(port, recorder):
            for piece in cut(data, (lambda: size) if size else (lambda: chance.randint(1, 3000))):
                await device.send(piece)
                await asyncio.sleep(0)
            await until(lambda: port.status.counters["received_bytes"] == len(data), "all bytes")  # noqa: B023
        assert recorder.payloads == framed(data, protocol)


@on_both_loops
async def test_a_frame_is_stamped_when_its_first_byte_came(link: Path, device: Device) -> None:
    """The stamp lies between the writes of the first and the second half of the sentence."""
    recorder, port = Recorder(), make(link)
    async with running(port, recorder):
        before_ns = mono_ns()
        await device.send(sentence(1)[:9])
        await until(lambda: port.status.counters["received_bytes"] == 9, "first half")
        between_ns = mono_ns()
        await device.send(sentence(1)[9:])
        await until(lambda: bool(recorder.payloads), "sentence")
    assert before_ns < recorder.ts_ns[0] < between_ns


@on_both_loops
async def test_unplugged_and_replugged(link: Path, tmp_path: Path) -> None:
    """The link leads to another device afterwards; nothing before or behind the gap is lost, and it is told once."""
    recorder, port = Recorder(), make(link)
    first = Device(link)
    async with running(port, recorder):
        await device_says(first, recorder, 1)
        first.unplug()
        await until(lambda: port.status.link is Link.RETRYING, "loss of the link")
        assert str(link) in port.status.reason
        spare = Device(tmp_path / "spare")  # takes the number that is free now
        second = Device(link)
        assert second.slave_path != first.slave_path
        await until(lambda: port.status.link is Link.OPEN, "link")
        await device_says(second, recorder, 2)
    second.unplug()
    spare.unplug()
    assert recorder.payloads == [sentence(1), sentence(2)]
    assert recorder.kinds == ["link_down", "link_up", "gap"]
    down, up, gap = recorder.events
    assert gap.payload == {"reason": "link", "from_ns": down.ts_ns, "to_ns": up.ts_ns}
    assert recorder.ts_ns[0] < down.ts_ns < up.ts_ns < recorder.ts_ns[1]
    assert port.status.counters["link_downs"] == 1
    assert port.status.reason == ""


@on_both_loops
async def test_a_line_that_the_unplugging_cut(link: Path) -> None:
    """What came of a line before the device went is a frame of its own, not the beginning of the next device's."""
    recorder, port = Recorder(), make(link, "lines")
    first = Device(link)
    async with running(port, recorder):
        await first.send(b"one\ntw")
        await until(lambda: port.status.counters["received_bytes"] == 6, "all bytes")
        first.unplug()
        await until(lambda: port.status.link is Link.RETRYING, "loss of the link")
        second = Device(link)
        await until(lambda: port.status.link is Link.OPEN, "link")
        await second.send(b"three\n")
        await until(lambda: len(recorder.payloads) == 3, "frames")
    second.unplug()
    assert recorder.payloads == [b"one", b"tw", b"three"]


async def device_says(device: Device, recorder: Recorder, number: int) -> None:
    await device.send(sentence(number) + b"\r\n")
    await until(lambda: sentence(number) in recorder.payloads, f"sentence {number}")


@on_both_loops
async def test_missing_at_start(link: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A device that comes later is found within the longest pause; its absence was one event and one line of log."""
    recorder, port = Recorder(), make(link)
    async with running(port, recorder, link=Link.RETRYING):
        assert "does not exist" in port.status.reason
        await asyncio.sleep(0.3)
        device = Device(link)
        appeared = time.monotonic()
        await until(lambda: port.status.link is Link.OPEN, "link")
        assert time.monotonic() - appeared < 2.5
        await device_says(device, recorder, 1)
    device.unplug()
    assert recorder.kinds == ["link_down", "link_up", "gap"]
    assert sum("link down" in message for message in caplog.messages) == 1


@on_both_loops
async def test_a_port_that_hung_up_is_not_tried_in_a_busy_loop(link: Path) -> None:
    """While the other end is closed, opening fails at once; so it is tried seldom and told once."""
    recorder, port = Recorder(), make(link)
    device = Device(link)
    keeper = os.open(device.slave_path, os.O_RDWR | os.O_NOCTTY)  # keeps the slave's name in the kernel's hands
    async with running(port, recorder):
        await device_says(device, recorder, 1)
        device.unplug()
        await until(lambda: port.status.link is Link.RETRYING, "loss of the link")
        cpu = time.process_time()
        await asyncio.sleep(1.0)
        assert time.process_time() - cpu < 0.2
    os.close(keeper)
    assert recorder.kinds == ["link_down"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open everything")
@on_both_loops
async def test_not_permitted(link: Path, device: Device) -> None:
    """The reason names the group that may."""
    os.chmod(device.slave_path, 0)  # noqa: PTH101
    recorder, port = Recorder(), make(link)
    async with running(port, recorder, link=Link.RETRYING):
        assert "usermod -aG" in port.status.reason
        os.chmod(device.slave_path, 0o600)  # noqa: PTH101
        await until(lambda: port.status.link is Link.OPEN, "link")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "may not be opened by this user: add it to the group"),
        (FileNotFoundError(errno.ENOENT, "No such file"), "does not exist"),
        (OSError(errno.EBUSY, "Device or resource busy"), "is in use by another program"),
        (BlockingIOError(errno.EAGAIN, "Could not exclusively lock port"), "is in use by another program"),
        (ValueError("Failed to set custom baud rate (1234567)"), "custom baud rate"),
    ],
)
def test_reasons(device: Device, error: Exception, words: str) -> None:
    """Whoever reads the status knows what to do; the group is that of the device."""
    told = reason(device.slave_path, error)
    assert words in told
    assert device.slave_path in told
    if isinstance(error, PermissionError):
        assert f"usermod -aG {grp.getgrgid(os.stat(device.slave_path).st_gid).gr_name} " in told  # noqa: PTH116


@on_both_loops
async def test_two_cannot_share_a_port(link: Path, device: Device) -> None:
    """The second says that the port is in use, takes no byte from the first, and has its turn when the first ends."""
    first, second = make(link), make(link)
    one, two = Recorder(), Recorder()
    async with running(second, two), running(first, one, link=Link.RETRYING):
        assert "in use" in first.status.reason
        for number in range(20):
            await device_says(device, two, number)
    assert one.payloads == []
    third, three = make(link), Recorder()
    async with running(third, three):
        await device_says(device, three, 21)


@on_both_loops
async def test_garbage(link: Path, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise for a while is one event that names the baud rate; the first good sentence ends it."""
    monkeypatch.setattr("ingestd.sources.serial.GARBAGE_NS", 200_000_000)
    recorder, port = Recorder(), make(link)
    chance = random.Random(5)
    async with running(port, recorder):
        while not recorder.events:
            await device.send(chance.randbytes(200))
            await asyncio.sleep(0.01)
        assert "9600" in port.status.reason
        await device.send(chance.randbytes(5000))
        await device_says(device, recorder, 1)
        await until(lambda: port.status.reason == "", "all clear")
    assert recorder.kinds == ["garbage"]
    assert port.status.link is Link.OPEN


class Failing(LineFramer):
    """A plug-in's framer, which is no good."""

    def feed(self, data: bytes, at_ns: int) -> list[SerialFrame]:
        if b"!" in data:
            raise ValueError("unforeseen")
        return super().feed(data, at_ns)

    def flush(self) -> list[SerialFrame]:
        raise ValueError("unforeseen")


@on_both_loops
async def test_a_framer_that_raises(link: Path, device: Device, caplog: pytest.LogCaptureFixture) -> None:
    """What it was given is recorded as it came, the next bytes are its again, and the source goes on."""
    recorder, port = Recorder(), SerialPort("gps", str(link), 9600, Failing())
    async with running(port, recorder):
        for said in (b"one\n", b"two!\n", b"three!\n", b"four\n"):
            await device.send(said)
            await until(lambda said=said: said.strip() in b" ".join(recorder.payloads), "frame")  # type: ignore[misc]
    assert recorder.payloads == [b"one", b"two!\n", b"three!\n", b"four"]
    assert port.status.counters["framer_failures"] == 3  # the end of the stream, too
    assert caplog.text.count("the protocol fails") == 1


@on_both_loops
async def test_what_the_kernel_holds_is_recorded_when_the_source_stops(link: Path, device: Device) -> None:
    """Bytes that came just before the stop, and a last line without its end, are frames all the same."""
    recorder, port = Recorder(), make(link, "lines")
    async with running(port, recorder):
        # In one breath with the stop, so that the loop cannot read in between.
        assert os.write(device.master, b"one\ntwo\nthr") == 11
    assert recorder.payloads == [b"one", b"two", b"thr"]
    with pytest.raises(OSError, match="Input/output error"):  # Nobody has the other end: the port was closed.
        os.read(device.master, 1)
