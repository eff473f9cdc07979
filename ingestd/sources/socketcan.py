"""A CAN bus by Linux's own interface, SocketCAN: the fast path.

Frames wait in the socket's receive buffer and are fetched a good number at a time: once the first has come, the socket
is left alone for `coalesce_s`, then read until it is empty. While frames keep coming there is no waiting for readiness
at all, only a read at every tick; ticks are multiples of `coalesce_s`, so that several buses wake the process once.

Interfaces come and go: they are looked at every LOOK_S. One that is down keeps its socket, which hears the first frame
when it is up again. One that is deleted or unplugged leaves a socket that stays silent for ever; it is read to the
end, its loss counted, and closed, and the interface is opened anew under its name when it is back.

What the kernel had no room for is counted exactly: after every read the socket is asked for the number it has lost,
and the frames carry the number that was lost when each was queued, which tells where. What never came so far, because
the kernel's queue of packets was full, is in the statistics of the interface, exactly too; with filters it includes
frames that would not have passed them. What the controller itself had no room for comes as error frames; each counts
as one frame lost, the least it can be.

Counters: `error_frames`, `bus_offs`, `link_downs`, `overflow_frames` (the socket's), `interface_dropped_frames`,
`controller_overflows`.
Events: link_down, link_up, clock_step, and the states of the bus (`can_bus_state`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from ingestd.clock import mono_ns, read_offset_ns
from ingestd.model import Event, FrameBatch, Int64s, Link, Recorder, SourceStatus
from ingestd.sources.can_bus_state import BusWatch
from ingestd.sources.can_link import Inquiry
from ingestd.sources.can_load import BusLoad
from ingestd.sources.can_socket import CALLS_MAX, FILTERS_MAX, CanSocket, Frames, dropped_count, has_bus, join, look
from ingestd.sources.kernel_stamps import KernelStamps

_log = logging.getLogger(__name__)

RECEIVE_BUFFER_BYTES: Final = 16 << 20
COALESCE_S: Final = 0.02
LOOK_S: Final = 0.5
FRAME_KERNEL_BYTES: Final = 1024  # What a frame takes of the receive buffer, rounded up.
MARGIN: Final = 8  # So many times what a read finds must fit into the receive buffer.
LAST_CALLS_MAX: Final = 256  # A socket that is to be closed is read to the end, but not after a bus that never pauses.

EVERY_FRAME: Final = ((0, 0),)  # as a socket has it that nobody gave a filter
_NO_STAMPS: Final = np.zeros(0, np.int64)


class SocketCan:
    """A source (see `model.Source`) that reads one SocketCAN interface.

    `filters` are pairs of can_id and can_mask as CAN_RAW_FILTER takes them; none, or more than the kernel takes, let
    every frame pass. Error frames always do.
    """

    def __init__(
        self,
        name: str,
        channel: str,
        *,
        fd: bool = True,
        filters: Sequence[tuple[int, int]] | None = None,
        receive_buffer_bytes: int = RECEIVE_BUFFER_BYTES,
        coalesce_s: float = COALESCE_S,
        read_offset: Callable[[int | None], int] = read_offset_ns,
    ) -> None:
        self.name = name
        self.channel = channel
        self.status = SourceStatus()
        self._fd = fd
        self._filters: Sequence[tuple[int, int]] | None = None
        self._receive_buffer_bytes = receive_buffer_bytes
        self._coalesce_s = coalesce_s
        self._read_offset = read_offset
        self._bus = BusWatch(name, self.status)
        self._load = self.status.load = BusLoad()
        self._inquiry = Inquiry()
        self._socket: CanSocket | None = None
        self._ifindex = 0  # of the interface that the socket is bound to; 0: it is of no use any more
        self._was_away = False  # The kernel said so, though it may be back by the time that it is looked at.
        self._lost = 0  # Frames that the socket has lost, as far as they are counted; modulo 2^32 …
        self._counted_ns = 0  # … which is until then.
        self._dropped = 0  # Frames that the interface has dropped, as far as they are counted …
        self._dropped_ns = 0  # … which is until then.
        self._read_count = 0  # Frames in the last read …
        self._read_at_s = 0.0  # … and when that was, by the loop's clock.
        self.set_filters(filters or ())

    def __repr__(self) -> str:
        return f"<SocketCan {self.name}: {self.channel}, {self.status.link.value}>"

    def set_filters(self, filters: Sequence[tuple[int, int]]) -> None:
        """Record only these from now on; see the class. What signal databases know is known after capture began."""
        if len(filters) > FILTERS_MAX:
            _log.warning("more filters than the kernel takes, so none source=%s count=%d", self.name, len(filters))
            filters = ()
        self._filters = filters or None
        if self._socket is not None:
            with contextlib.suppress(OSError):  # The adapter is going away; the next socket begins with them.
                self._socket.filter(filters or EVERY_FRAME)

    async def run(self, recorder: Recorder) -> None:
        """Read until cancelled; see `model.Source`."""
        loop = asyncio.get_running_loop()
        look_at = loop.time()
        try:
            while True:
                if self._was_away or loop.time() >= look_at:
                    self._look(recorder)
                    look_at = loop.time() + LOOK_S
                if self._socket is None:
                    await asyncio.sleep(LOOK_S)
                    continue
                if not self._read(self._socket, recorder):
                    await _readable(self._socket, LOOK_S)
                elif self.status.link is not Link.OPEN:
                    look_at = loop.time()  # It is back.
                await asyncio.sleep(self._until_tick(loop.time()))
        finally:
            self._close(recorder)

    def _until_tick(self, now_s: float) -> float:
        """Seconds until the next read: at most `coalesce_s`, and less if frames came too fast for that of late."""
        since_s, self._read_at_s = max(now_s - self._read_at_s, 0.001), now_s
        tick_s = self._coalesce_s
        if self._socket and self._read_count:
            frames_max = self._socket.buffer_bytes / FRAME_KERNEL_BYTES / MARGIN
            tick_s = min(tick_s, frames_max / self._read_count * since_s)
        return tick_s - now_s % tick_s

    # Interface

    def _look(self, recorder: Recorder) -> None:
        """See whether the interface is there and up; open, close and report accordingly."""
        try:
            obstacle = self._obstacle(recorder)
        except OSError as error:
            self._close(recorder)
            obstacle = _refusal(self.channel, error)
        was_away, self._was_away = self._was_away, False
        if obstacle or was_away:
            self._down(recorder, obstacle or f"{self.channel} was away for a moment")
        if not obstacle:
            self._up(recorder)
        for event in self._bus.rest(mono_ns()):
            recorder.event(event)
        self._look_at_controller()

    def _look_at_controller(self) -> None:
        """What it does, and how fast; and how full the receive buffer is."""
        can_socket, status = self._socket, self.status
        status.controller, status.buffer_bytes = "", None
        if can_socket is None:
            self._load.bitrate = self._load.data_bitrate = 0
        else:
            controller = self._inquiry.look(self._ifindex)
            # Its error frames tell as well, where nobody may ask; of a bus without one there is nothing to tell.
            if controller.state or (status.link is Link.OPEN and has_bus(self.channel)):
                status.controller = controller.state or self._bus.name
            self._load.bitrate, self._load.data_bitrate = controller.bitrate, controller.data_bitrate
            status.buffer_bytes, status.buffer_bytes_max = can_socket.waiting_bytes(), can_socket.buffer_bytes

    def _obstacle(self, recorder: Recorder) -> str:
        """Why no frames can come, in words for the operator, or nothing; opens the interface where there is one."""
        interface = look(self.channel)
        if self._socket and (interface is None or interface.ifindex != self._ifindex):
            self._close(recorder)
            self._was_away = True
        if interface is None:
            return f"there is no interface {self.channel}: {_how_to_add(self.channel)}"
        if not interface.is_can:
            return f"{self.channel} is not a CAN interface: 'ip link show' lists all, theirs say link/can"
        if self._socket is None:
            self._stamps = KernelStamps(self._read_offset)
            self._socket = CanSocket(
                self.channel, fd=self._fd, filters=self._filters, receive_buffer_bytes=self._receive_buffer_bytes
            )
            self._ifindex = interface.ifindex
            self._lost, self._counted_ns, self._read_count = 0, mono_ns(), 0
            self._dropped, self._dropped_ns = dropped_count(self.channel), self._counted_ns
        self._count_dropped(recorder)
        return "" if interface.up else f"{self.channel} is down: {_how_to_start(self.channel)}"

    def _close(self, recorder: Recorder) -> None:
        """Read what is queued, count what was lost, and close."""
        can_socket, self._socket = self._socket, None
        if can_socket is None:
            return
        try:
            self._read(can_socket, recorder, LAST_CALLS_MAX)
            interface = look(self.channel)
            if interface is not None and interface.ifindex == self._ifindex:
                self._count_dropped(recorder)
        finally:
            can_socket.close()

    def _up(self, recorder: Recorder) -> None:
        status = self.status
        was, status.link = status.link, Link.OPEN
        if was is Link.RETRYING:
            self._event(recorder, "link_up")
        if was is not Link.OPEN:
            _log.info("link up source=%s channel=%s", self.name, self.channel)
            self._bus.reset()
        status.reason = f"{self.channel} is bus-off: {_how_to_restart(self.channel)}" if self._bus.is_off else ""

    def _down(self, recorder: Recorder, reason: str) -> None:
        status = self.status
        was, status.link = status.link, Link.RETRYING
        if was is not Link.RETRYING:
            status.count("link_downs")
            self._event(recorder, "link_down", reason=reason)
        if status.reason != reason:
            status.reason = reason
            _log.warning("link down source=%s reason=%r", self.name, reason)

    # Frames

    def _read(self, can_socket: CanSocket, recorder: Recorder, calls_max: int = CALLS_MAX) -> bool:
        """Record what is queued, and what was lost; whether there was any frame.

        A call that is not filled has left the queue empty, unless the kernel had something else to say, which the next
        call will hear. The last read of a socket goes on until the kernel says that the queue is empty.
        """
        parts: list[Frames] = []
        emptied = False
        for _ in range(calls_max):
            self._stamps.reading()
            try:
                frames, emptied = can_socket.read()
            except OSError as error:
                self._was_away = True
                if error.errno == errno.ENETDOWN:
                    continue  # There may be frames behind it.
                self._ifindex = 0  # Whatever it is, a new socket will do.
                if error.errno in (errno.ENODEV, errno.ENXIO):
                    continue
                _log.warning("read failed source=%s error=%r", self.name, error.strerror)
                break
            if frames is not None:
                parts.append(frames)
            if emptied and (frames is None or calls_max == CALLS_MAX):
                break
        self._read_count = sum(len(part.wall_ns) for part in parts)
        read_ns = self._record(join(parts) if parts else None, emptied, recorder)
        lost = can_socket.lost()
        if lost != self._lost:
            self._count_lost(lost, self._counted_ns, mono_ns(), recorder)
        self._counted_ns = max(self._counted_ns, read_ns)
        return bool(parts)

    def _record(self, frames: Frames | None, emptied: bool, recorder: Recorder) -> int:
        """Record what was read, with its clock; returns when it had been read."""
        stamped = self._stamps.convert(_NO_STAMPS if frames is None else frames.wall_ns, emptied=emptied)
        if frames is not None:
            batch = FrameBatch(self.name, stamped.ts_ns, *frames[2:])
            self._count_lost_between(frames, stamped.ts_ns, recorder)
            for span in stamped.spans:
                recorder.frames(batch if len(stamped.spans) == 1 else batch[span.rows], span.clock)
            self._counted_ns = max(self._counted_ns, int(stamped.ts_ns[-1]))
            self._look_for_errors(batch, recorder)
            self._load.add(batch)
            self.status.count("received_bytes", int(batch.length.sum()))
        if stamped.step is not None:
            self._event(recorder, "clock_step", **stamped.step._asdict())
            moved_s = (stamped.step.to_offset_ns - stamped.step.from_offset_ns) / 1e9
            _log.warning("wall clock was set source=%s seconds=%+.3f", self.name, moved_s)
        return stamped.now_ns

    def _count_lost_between(self, frames: Frames, ts_ns: Int64s, recorder: Recorder) -> None:
        """Count the frames that were lost before one of these was queued, and are not counted yet."""
        last = frames.lost[-1]
        if last == self._lost:
            return
        fresh = np.flatnonzero((frames.lost - np.uint32(self._lost)).view(np.int32) > 0)
        if len(fresh):
            before, until = int(fresh[0]) - 1, int(np.argmax(frames.lost == last))
            from_ns = max(self._counted_ns, int(ts_ns[before])) if before >= 0 else self._counted_ns
            self._count_lost(int(last), from_ns, int(ts_ns[until]), recorder)

    def _count_lost(self, lost: int, from_ns: int, to_ns: int, recorder: Recorder) -> None:
        """Count what was lost since it was counted last. A frame that waited may know less than the socket did then."""
        more = (lost - self._lost) & 0xFFFF_FFFF
        if 0 < more < 1 << 31:
            self._lost = lost
            self.status.count("overflow_frames", more)
            recorder.overflow(self.name, more, from_ns, max(from_ns, to_ns))

    def _count_dropped(self, recorder: Recorder) -> None:
        """Count what the interface has dropped since it was counted last."""
        dropped, now_ns = dropped_count(self.channel), mono_ns()
        if dropped > self._dropped:
            self.status.count("interface_dropped_frames", dropped - self._dropped)
            recorder.overflow(self.name, dropped - self._dropped, self._dropped_ns, now_ns)
        self._dropped, self._dropped_ns = dropped, now_ns

    def _look_for_errors(self, batch: FrameBatch, recorder: Recorder) -> None:
        findings = self._bus.look(batch)
        if findings.overflows_count:
            self.status.count("controller_overflows", findings.overflows_count)
            recorder.overflow(self.name, findings.overflows_count, int(batch.ts_ns[0]), int(batch.ts_ns[-1]))
        for event in findings.events:
            recorder.event(event)
            _log.warning("%s source=%s", event.kind.replace("_", " "), self.name)

    def _event(self, recorder: Recorder, kind: str, **payload: Any) -> None:
        recorder.event(Event(self.name, kind, mono_ns(), payload=payload))


async def _readable(can_socket: CanSocket, seconds_max: float) -> None:
    """Wait until there is something to read."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(can_socket.fileno(), wake)
    timer = loop.call_later(seconds_max, wake)
    try:
        await ready
    finally:
        timer.cancel()
        loop.remove_reader(can_socket.fileno())


def _how_to_add(channel: str) -> str:
    if channel.startswith("vcan"):
        return f"ip link add {channel} type vcan && ip link set {channel} up"
    return "plug its adapter in, or see 'ip link' for what there is"


def _how_to_start(channel: str) -> str:
    bitrate = " type can bitrate 500000" if has_bus(channel) else ""
    return f"ip link set {channel} up{bitrate}"


def _how_to_restart(channel: str) -> str:
    return f"mind bit rate and wiring, then: ip link set {channel} type can restart (restart-ms 100 does so by itself)"


def _refusal(channel: str, error: OSError) -> str:
    if error.errno in (errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT):
        return "this process has no SocketCAN: modprobe can_raw, or allow AF_CAN where address families are restricted"
    return f"cannot open {channel}: {os.strerror(error.errno) if error.errno else error}"
