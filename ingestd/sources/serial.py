"""A serial line: read as bytes come, cut into frames, recorded.

pyserial sets the port up, pyserial-asyncio-fast waits for it on the loop. All bytes of one read carry the time of that
read, all frames that they complete go to the recorder in one batch; a frame is stamped when its first byte came.

There are four ways in which a port has no data for us, each with its words in `status.reason`: it does not exist, it
may not be opened, somebody else has it, or it went away while it was read. Each is told once (a log line, the event
`link_down`, later `link_up`) and tried again with a pause that grows to RETRY_SECONDS_MAX; it shrinks again only when
bytes have come, so a port that opens and fails at once does not keep the machine busy. The path is resolved anew each
time: a link of /dev/serial/by-id leads to the device wherever it was plugged in.

A fifth is a port that gives only garbage, as one does at the wrong baud rate: the event `garbage`, until something
better comes.

Limits: a read takes at most 1,024 bytes, so at 921,600 baud a stamp is at most some 11 ms later than the byte; with
USB adapters their own latency comes on top (1 ms where low latency can be asked for, else 16). What the kernel's
buffer (4,096 bytes) cannot hold while the loop is stalled is lost, and no counter of the kernel's tells.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import grp
import logging
import os
import termios
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import serial
import serial_asyncio_fast

from ingestd.backoff import Backoff
from ingestd.clock import WallClock, mono_ns
from ingestd.model import PAYLOAD_BYTES_MAX, Event, Flag, FrameBatch, Link, Recorder, SerialFlag, SourceStatus

_log = logging.getLogger(__name__)

RETRY_SECONDS_MIN: Final = 0.05
RETRY_SECONDS_MAX: Final = 2.0

# Garbage is a score: every byte of no frame adds one, every byte of a good frame takes many away, and so one sentence
# takes all of it. It has to stay above the minimum for a while.
GARBAGE_NS: Final = 3_000_000_000
GARBAGE_BYTES_MIN: Final = 300
GARBAGE_BYTES_MAX: Final = 500
GOOD_BYTE_WEIGHT: Final = 50

DRAIN_BYTES_MAX: Final = 65_536  # Of a port that goes on talking, no more is read after a stop.
DRAIN_READ_BYTES: Final = 4096

PSEUDO_TERMINALS: Final = range(136, 144)  # Major numbers (Linux, Documentation/admin-guide/devices.txt).

PARITIES: Final = {
    "none": serial.PARITY_NONE,
    "even": serial.PARITY_EVEN,
    "odd": serial.PARITY_ODD,
    "mark": serial.PARITY_MARK,
    "space": serial.PARITY_SPACE,
}
# What opening a port raises. termios.error is none of the OSErrors, and ValueError is a rate the driver cannot do.
_OPEN_ERRORS: Final = (OSError, ValueError, termios.error)

Frames = Sequence[tuple[int, bytes, SerialFlag | Flag, int]]  # when the first byte came, payload, flags, CAN id


class Framer(Protocol):
    """Cuts bytes into frames; those of `ingestd.framing` do."""

    text_expected: bool

    @property
    def counters(self) -> dict[str, int]:
        """Totals by name."""

    def feed(self, data: bytes, at_ns: int) -> Frames:
        """Take bytes that arrived at `at_ns`; return the frames that they complete."""

    def flush(self) -> Frames:
        """The stream ends here: return what can be made of the bytes held."""


class SerialPort:
    """The source of one serial line. `parity` is a word of PARITIES; `options` go to pyserial as they are."""

    def __init__(
        self,
        name: str,
        port: str,
        baudrate: int,
        framer: Framer,
        *,
        parity: str = "none",
        **options: Any,
    ) -> None:
        self.name = name
        self.status = SourceStatus(counters=dict(framer.counters))
        self._port = port
        self._options = {"baudrate": baudrate, "parity": PARITIES[parity], **options}
        self._framer = framer
        self._wall = WallClock()
        self._garbage = _Garbage()
        self._received = False  # since the port was opened last
        self._down_ns: int | None = None  # since when there is no port

    def __repr__(self) -> str:
        return f"<SerialPort {self.name}: {self._port} at {self._options['baudrate']} baud, {self.status.link.value}>"

    async def run(self, recorder: Recorder) -> None:
        """Read until cancelled; see `model.Source`."""
        backoff = Backoff(RETRY_SECONDS_MIN, RETRY_SECONDS_MAX)
        try:
            while True:
                try:
                    port = await self._open()
                except _OPEN_ERRORS as error:
                    self._went_down(recorder, reason(self._port, error))
                else:
                    self._came_up(recorder)
                    why = await self._read(port, recorder)
                    self._record(self._cut(b"", 0), recorder)
                    self._went_down(recorder, why)
                    if self._received:
                        backoff.reset()
                await asyncio.sleep(backoff.next_seconds())
        finally:
            self._record(self._cut(b"", 0), recorder)

    async def _open(self) -> serial.Serial:
        """The port, opened in a thread: some drivers take their time, and a dead USB device takes seconds."""
        opening = asyncio.get_running_loop().run_in_executor(None, _open_port, self._port, self._options)
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_unused)
            raise

    async def _read(self, port: serial.Serial, recorder: Recorder) -> str:
        """Read until the port fails, and say how; when cancelled, read what is there and close it."""
        loop = asyncio.get_running_loop()
        reader = _Reader(lambda data: self._take(data, recorder))
        transport, _ = await serial_asyncio_fast.connection_for_serial(loop, lambda: reader, port)
        try:
            error = await asyncio.shield(reader.closed)
        except asyncio.CancelledError:
            transport.pause_reading()
            if not transport.is_closing():
                self._drain(port, recorder)
                with contextlib.suppress(OSError):
                    fcntl.ioctl(port.fileno(), termios.TIOCNXCL)
                transport.abort()
            await reader.closed
            raise
        return f"{self._port} went away: {error}" if error else f"{self._port} was closed"

    def _drain(self, port: serial.Serial, recorder: Recorder) -> None:
        left = DRAIN_BYTES_MAX
        with contextlib.suppress(serial.SerialException):
            while left > 0 and (data := port.read(DRAIN_READ_BYTES)):
                left -= len(data)
                self._take(data, recorder)

    def _take(self, data: bytes, recorder: Recorder) -> None:
        at_ns = mono_ns()
        self._received = True
        skipped = self._framer.counters["skipped_bytes"]
        frames = self._cut(data, at_ns)
        self._record(frames, recorder)
        bad = self._framer.counters["skipped_bytes"] - skipped
        total = sum(len(payload) for _, payload, _, _ in frames)
        good = sum(len(payload) for _, payload, flags, _ in frames if flags & SerialFlag.TEXT)
        if not self._framer.text_expected:
            good = total
        bad += total - good
        changed = self._garbage.judge(good, bad, at_ns)
        if changed is None:
            return
        self.status.reason = ""
        if changed:
            self.status.reason = f"only garbage at {self._options['baudrate']} baud: check baudrate and protocol"
            recorder.event(Event(self.name, "garbage", at_ns, payload={"reason": self.status.reason}))
            self.status.count("garbage_spells")
            _log.warning("garbage source=%s port=%s reason=%r", self.name, self._port, self.status.reason)
        else:
            _log.info("garbage over source=%s port=%s", self.name, self._port)

    def _cut(self, data: bytes, at_ns: int) -> Frames:
        """The frames that these bytes complete; without bytes, what is left where the stream ends.

        A framer never raises. If a plug-in's does, the bytes are recorded as they came, and nobody else suffers.
        """
        try:
            return self._framer.feed(data, at_ns) if data else self._framer.flush()
        except Exception:
            if not self.status.counters.get("framer_failures"):
                _log.exception("the protocol fails, its bytes are recorded as they are source=%s", self.name)
            self.status.count("framer_failures")
            cut = range(0, len(data), PAYLOAD_BYTES_MAX)
            return [(at_ns, data[at : at + PAYLOAD_BYTES_MAX], SerialFlag.SERIAL, 0) for at in cut]

    def _record(self, frames: Frames, recorder: Recorder) -> None:
        self.status.counters.update(self._framer.counters)
        if frames:
            recorder.frames(columns(self.name, frames), self._wall.now())

    def _came_up(self, recorder: Recorder) -> None:
        self._received = False
        self._garbage = _Garbage()
        self.status.link, self.status.reason = Link.OPEN, ""
        _log.info("link up source=%s port=%s device=%s", self.name, self._port, os.path.realpath(self._port))
        if self._down_ns is None:
            return
        from_ns, to_ns, self._down_ns = self._down_ns, mono_ns(), None
        recorder.event(Event(self.name, "link_up", to_ns))
        payload = {"reason": "link", "from_ns": from_ns, "to_ns": to_ns}
        recorder.event(Event(self.name, "gap", from_ns, "link", payload))

    def _went_down(self, recorder: Recorder, why: str) -> None:
        if why != self.status.reason:
            _log.warning("link down source=%s reason=%r", self.name, why)
        self.status.link, self.status.reason = Link.RETRYING, why
        if self._down_ns is None:
            self._down_ns = mono_ns()
            self.status.count("link_downs")
            recorder.event(Event(self.name, "link_down", self._down_ns, payload={"reason": why}))


class _Reader(asyncio.Protocol):
    """Hands on what the transport reads, and tells when it was closed and why."""

    def __init__(self, take: Callable[[bytes], None]) -> None:
        self._take = take
        self.closed: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self._take(data)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(error)


class _Garbage:
    """Tells a line that gives only garbage from one with a bad sentence now and then."""

    def __init__(self) -> None:
        self._score = 0
        self._since_ns = 0  # when the score left zero
        self._found = False

    def judge(self, good_bytes: int, bad_bytes: int, at_ns: int) -> bool | None:
        """True when garbage is found, False when it is over, None as long as nothing changes."""
        if not self._score:
            self._since_ns = at_ns
        self._score = max(0, min(self._score + bad_bytes, GARBAGE_BYTES_MAX) - GOOD_BYTE_WEIGHT * good_bytes)
        found = self._found and self._score > 0
        found |= self._score >= GARBAGE_BYTES_MIN and at_ns - self._since_ns >= GARBAGE_NS
        changed, self._found = found != self._found, found
        return found if changed else None


def _open_port(path: str, options: Mapping[str, Any]) -> serial.Serial:
    port = serial.Serial(path, exclusive=True, **options)
    try:
        # pyserial's lock keeps out only programs that ask for it, this keeps out all. On a pseudo-terminal, which lives
        # as long as its other end, it would outlive a killed process: the next one could not open the port.
        if os.major(os.fstat(port.fileno()).st_rdev) not in PSEUDO_TERMINALS:
            fcntl.ioctl(port.fileno(), termios.TIOCEXCL)
        try:
            port.set_low_latency_mode(True)
        except (ValueError, OSError, AttributeError) as error:  # AttributeError: not on this operating system
            _log.debug("no low latency mode port=%s reason=%r", path, str(error))
    except BaseException:
        port.close()
        raise
    return port


def _close_unused(opening: asyncio.Future[serial.Serial]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def reason(path: str, error: Exception) -> str:
    """Why a port could not be opened, in words for the operator."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return f"{path} does not exist: plug the device in, or correct the port"
    if number in (errno.EACCES, errno.EPERM):
        return f"{path} may not be opened by this user: {_group_hint(path)}"
    if number in (errno.EBUSY, errno.EAGAIN):
        return f"{path} is in use by another program"
    return f"{path} cannot be opened: {error}"


def _group_hint(path: str) -> str:
    try:
        gid = Path(path).stat().st_gid
        name = grp.getgrgid(gid).gr_name
    except (OSError, KeyError):
        return "grant it read and write access"
    return f"add it to the group {name} (usermod -aG {name} USER) and start again"


def columns(source: str, frames: Frames) -> FrameBatch:
    """Frames of one serial line as a batch, payloads padded with zeros to a multiple of 8."""
    lengths = [len(payload) for _, payload, _, _ in frames]
    width = max(8, -(-max(lengths, default=0) // 8) * 8)
    data = b"".join(payload.ljust(width, b"\0") for _, payload, _, _ in frames)
    return FrameBatch(
        source,
        np.array([ts_ns for ts_ns, _, _, _ in frames], np.int64),
        np.array([arbitration_id for _, _, _, arbitration_id in frames], np.uint32),
        np.array([flags for _, _, flags, _ in frames], np.uint8),
        np.array(lengths, np.uint16),
        np.frombuffer(data, np.uint8).reshape(len(frames), width),
    )
