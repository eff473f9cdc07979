"""Any adapter that python-can has a driver for: slcan, PCAN, Kvaser, gs_usb … SocketCAN has a faster path of its own.

python-can's asyncio Notifier reads one message per wake-up and hangs when the interface goes away (python-can#907,
#1865). Here a thread of its own reads the bus with `recv(timeout)`, gathers what comes within a few milliseconds, puts
it into columns and hands the batch to the event loop. A handful of batches may wait there; while the loop is stalled
the thread waits too, so that what bounds memory and may overflow then is the driver's own buffer. Most drivers do not
tell what they drop; nothing is dropped here.

When a frame was received: python-can's stamps are seconds as a float. Rounded to microseconds they are exact, to
nanoseconds nearly all are wrong. Some drivers give the system's wall clock, others the adapter's ticks, and nothing
says which. So for each batch: if every stamp, as wall clock, lies between the last time the driver had nothing for us
and the time it was read, the stamps count, less the offset of the wall clock to CLOCK_MONOTONIC (the offset before the
batch or the one after it, whichever places the frame there). Otherwise all frames of the batch get the time at which
they were read. If the wall clock was set meanwhile and the stamps are not usable, the clock state says so.

Limits: 3 microseconds of CPU a frame here, and what the driver takes on top: 150 in slcan's, which reads its port byte
by byte. An adapter that goes away is noticed when its driver raises. Whether the bus is off is known only where the
driver implements `state`. A driver that never comes back from `recv` keeps its thread; `run` gives it up after
STOP_SECONDS_MAX.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ingestd.backoff import Backoff
from ingestd.clock import OFFSET_TOLERANCE_NS, WallClock, mono_ns, read_offset_ns
from ingestd.model import Clock, ClockState, Event, Flag, Float64s, FrameBatch, Int64s, Link, Recorder, SourceStatus
from ingestd.sources.can_load import BusLoad

if TYPE_CHECKING:
    from can import BusABC, Message

_log = logging.getLogger(__name__)

GATHER_NS: Final = 4_000_000  # How long a first message waits for more.
GATHER_FRAMES_MAX: Final = 4096
IDLE_SECONDS: Final = 0.1  # How long `recv` may wait, and so how late a stop is noticed.
WAITING_BATCHES_MAX: Final = 8  # Handed to the loop and not recorded yet.
DRAIN_NS_MAX: Final = 250_000_000  # A bus that goes on talking is not listened to for longer after a stop.
STOP_SECONDS_MAX: Final = 3.0  # python-can's slcan sleeps for two seconds while it opens.
RETRY_SECONDS_MIN: Final = 0.05
RETRY_SECONDS_MAX: Final = 1.0
STATE_NS: Final = 1_000_000_000  # How often the bus is asked for its state.
MALFORMED_RUN_MAX: Final = 20  # So many in a row are a link that does not work.
STAMP_SECONDS_MAX: Final = 9e9  # The last whole second that int64 nanoseconds hold is 9,223,372,036.

STANDARD_ID_MAX: Final = 0x7FF
EXTENDED_ID_MAX: Final = 0x1FFF_FFFF

# python-can's slcan polls its port a thousand times a second unless told otherwise.
_OPTIONS: Final[dict[str, dict[str, Any]]] = {"slcan": {"timeout": 0.005}}


class CanBus:
    """A CAN bus behind a python-can interface; `options` go to the driver as they are (`bitrate`, `fd`, …).

    Counters: `link_downs`, `bus_offs`, `error_frames`, `malformed_frames` (what the driver could make no sense of).
    """

    def __init__(self, name: str, interface: str, channel: str | int, **options: Any) -> None:
        self.name = name
        self.interface = interface
        self.channel = channel
        self.options = {**_OPTIONS.get(interface, {}), **options}
        rates = (options.get(key) for key in ("bitrate", "data_bitrate"))
        self.load = BusLoad(*(rate if isinstance(rate, int) else 0 for rate in rates))
        self.status = SourceStatus(load=self.load)

    def __repr__(self) -> str:
        return f"<CanBus {self.name}: {self.interface} {self.channel}, {self.status.link.value}>"

    async def run(self, recorder: Recorder) -> None:
        """Read until cancelled; see `model.Source`."""
        reader = _Reader(self, recorder, asyncio.get_running_loop())
        thread = threading.Thread(target=reader.run, name=f"can {self.name}", daemon=True)
        thread.start()
        try:
            await reader.ended.wait()
        finally:
            reader.stop()
            try:
                async with asyncio.timeout(STOP_SECONDS_MAX):
                    await reader.ended.wait()
            except TimeoutError:
                reader.abandon()
                _log.warning("driver does not return source=%s interface=%s", self.name, self.interface)
        if reader.failure is not None:
            raise reader.failure


class _Reader:
    """The thread of a bus: opens, reads, closes, waits, opens again. What it has to say is said on the event loop."""

    def __init__(self, source: CanBus, recorder: Recorder, loop: asyncio.AbstractEventLoop) -> None:
        self.ended = asyncio.Event()
        self.failure: Exception | None = None
        self._source, self._recorder, self._loop = source, recorder, loop
        self._status = source.status
        self._stop, self._abandoned = threading.Event(), threading.Event()
        self._stop_ns = 0
        self._room = threading.Semaphore(WAITING_BATCHES_MAX)
        self._stamps = Stamps()
        self._utc_offset_ns = self._stamps.utc_offset_ns  # of the batch recorded last
        self._read_any = False
        self._malformed_run = 0
        self._state_at_ns: int | None = 0  # when to ask for the state; None: the driver does not know it
        self._bus_off = False

    def stop(self) -> None:
        """Read what the driver still has, then end."""
        self._stop_ns = mono_ns()
        self._stop.set()

    def abandon(self) -> None:
        """Nobody listens any more."""
        self._abandoned.set()

    def run(self) -> None:
        """The thread's work."""
        backoff = Backoff(RETRY_SECONDS_MIN, RETRY_SECONDS_MAX)
        try:
            while not self._stop.is_set():
                reason = self._connection()
                if reason is None:
                    break
                self._tell(self._down, reason, mono_ns())
                if self._read_any:
                    backoff.reset()
                self._stop.wait(backoff.next_seconds())
        except Exception as error:
            self.failure = error
        finally:
            with contextlib.suppress(RuntimeError):  # The loop is closed: nobody waits.
                self._loop.call_soon_threadsafe(self.ended.set)

    def _connection(self) -> str | None:
        """Open the bus and read it until it is time to stop, or say why that came to an end."""
        self._read_any, self._malformed_run, self._state_at_ns, self._bus_off = False, 0, 0, False
        self._stamps.begin()
        bus: BusABC | None = None
        try:
            # Here and not above: it takes a third of a second, and capture on other sources has started by then.
            import can

            bus = can.Bus(self._source.channel, self._source.interface, ignore_config=True, **self._source.options)
            self._tell(self._up, mono_ns())
            while not self._stop.is_set():
                self._gather(bus, IDLE_SECONDS)
                self._look_at_state(bus)
            while mono_ns() < self._stop_ns + DRAIN_NS_MAX and self._gather(bus, 0.0):
                pass
        except Exception as error:
            return str(error) or type(error).__name__
        finally:
            if bus is not None:
                _close(bus)
        return None

    def _gather(self, bus: BusABC, wait_s: float) -> bool:
        """Wait for a message and take what follows within GATHER_NS; False if there was none. Hands over what it took,
        also when the driver raises."""
        messages: list[Message] = []
        read_ns: list[int] = []
        asked_ns = mono_ns()
        until_ns, nothing = asked_ns + int(wait_s * 1e9), False
        try:
            while not nothing and len(messages) < GATHER_FRAMES_MAX:
                message = self._receive(bus, max(until_ns - asked_ns, 0) / 1e9)
                now_ns = mono_ns()
                if message is not None:
                    if not messages:
                        until_ns = now_ns + GATHER_NS
                    messages.append(message)
                    read_ns.append(now_ns)
                elif now_ns >= until_ns:
                    nothing = True
                if now_ns >= until_ns and messages:
                    break
                asked_ns = now_ns
        finally:
            if messages:
                self._hand_over(messages, read_ns)
        if nothing:
            self._stamps.empty(asked_ns)
        return bool(messages)

    def _receive(self, bus: BusABC, wait_s: float) -> Message | None:
        """The next message; None if there was none in time, or what came was no frame, which is counted."""
        try:
            message = bus.recv(wait_s)
            if message is None:
                return None
            if _is_frame(message):
                self._malformed_run = 0
                return message
        except (ValueError, IndexError):  # slcan: a line that was cut or garbled.
            pass
        self._malformed_run += 1
        self._tell(self._status.count, "malformed_frames")
        if self._malformed_run >= MALFORMED_RUN_MAX:
            raise ValueError(f"{self._source.interface} {self._source.channel} sends nothing that is a frame")
        return None

    def _hand_over(self, messages: list[Message], read_ns: list[int]) -> None:
        self._read_any = True
        ts_ns, clock = self._stamps.convert(
            np.fromiter((m.timestamp for m in messages), np.float64, len(messages)), np.array(read_ns, np.int64)
        )
        self._tell(self._record, columns(self._source.name, messages, ts_ns), clock)

    def _look_at_state(self, bus: BusABC) -> None:
        """Tell when the bus goes off, and when it is back."""
        now_ns = mono_ns()
        if self._state_at_ns is None or now_ns < self._state_at_ns:
            return
        self._state_at_ns = now_ns + STATE_NS
        try:
            bus_off = bus.state.name == "ERROR"
        except NotImplementedError:
            self._state_at_ns = None
            return
        if bus_off != self._bus_off:
            self._bus_off = bus_off
            self._tell(self._went_off if bus_off else self._went_on, now_ns)

    def _tell(self, call: Callable[..., None], *arguments: Any) -> None:
        """Have the loop call this, in order; wait while it has too much to do already."""
        while not self._room.acquire(timeout=IDLE_SECONDS):
            if self._abandoned.is_set():
                return
        try:
            self._loop.call_soon_threadsafe(self._on_loop, call, arguments)
        except RuntimeError:  # The loop is closed: nobody listens any more, and nobody will say so.
            self._abandoned.set()
            self._stop.set()

    # From here on everything runs on the event loop.

    def _on_loop(self, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self._room.release()
        if not self._abandoned.is_set():
            call(*arguments)

    def _record(self, batch: FrameBatch, clock: Clock) -> None:
        errors_count = int(np.count_nonzero(batch.flags & Flag.ERROR.value))
        if errors_count:
            self._status.count("error_frames", errors_count)
        self._recorder.frames(batch, clock)
        self._source.load.add(batch)
        self._status.count("received_bytes", int(batch.length.sum()))
        was_ns, self._utc_offset_ns = self._utc_offset_ns, clock.utc_offset_ns
        if was_ns != self._utc_offset_ns:
            offsets = {"from_offset_ns": was_ns, "to_offset_ns": self._utc_offset_ns}
            self._event("clock_step", int(batch.ts_ns[0]), **offsets)
            moved_s = (self._utc_offset_ns - was_ns) / 1e9
            _log.warning("wall clock was set source=%s seconds=%+.3f", self._source.name, moved_s)

    def _up(self, at_ns: int) -> None:
        was, self._status.link, self._status.reason = self._status.link, Link.OPEN, ""
        if was is Link.RETRYING:
            self._event("link_up", at_ns)
            _log.info("link up source=%s", self._source.name)

    def _down(self, reason: str, at_ns: int) -> None:
        was, said = self._status.link, self._status.reason
        self._status.link, self._status.reason = Link.RETRYING, reason
        if was is not Link.RETRYING:
            self._status.count("link_downs")
            self._event("link_down", at_ns, reason=reason)
        if reason != said:
            _log.warning("link down source=%s reason=%r", self._source.name, reason)

    def _went_off(self, at_ns: int) -> None:
        self._status.reason = "bus-off"
        self._status.count("bus_offs")
        self._event("bus_off", at_ns)
        _log.warning("bus off source=%s", self._source.name)

    def _went_on(self, at_ns: int) -> None:
        self._status.reason = ""
        self._event("bus_restarted", at_ns)
        _log.info("bus restarted source=%s", self._source.name)

    def _event(self, kind: str, at_ns: int, **payload: str | int) -> None:
        self._recorder.event(Event(self._source.name, kind, at_ns, payload=payload))


class Stamps:
    """Turns a driver's stamps into CLOCK_MONOTONIC by the rule that this module begins with."""

    def __init__(self, read_offset: Callable[[], int] = read_offset_ns, now: Callable[[], int] = mono_ns) -> None:
        self._read_offset, self._now = read_offset, now
        self._wall = WallClock(read_offset)
        self._offset_ns = 0
        self._since_ns = 0
        self.begin()

    @property
    def utc_offset_ns(self) -> int:
        """The offset that was measured last."""
        return self._wall.now(self._offset_ns).utc_offset_ns

    def begin(self) -> None:
        """The adapter is opened now: nothing was received before."""
        self._offset_ns, self._since_ns = self._read_offset(), self._now()

    def empty(self, at_ns: int) -> None:
        """The driver had nothing for us at that time."""
        self._since_ns = at_ns

    def convert(self, stamp_s: Float64s, read_ns: Int64s) -> tuple[Int64s, Clock]:
        """Nanoseconds of CLOCK_MONOTONIC for the frames of a batch, and the clock to record with them."""
        before_ns, self._offset_ns = self._offset_ns, self._read_offset()
        clock = self._wall.now(self._offset_ns)
        if (np.abs(stamp_s) < STAMP_SECONDS_MAX).all():  # NaN is not.
            wall_ns = np.rint(stamp_s * 1e6).astype(np.int64) * 1000
            after, before = wall_ns - self._offset_ns, wall_ns - before_ns
            fits_after, fits_before = self._fits(after, read_ns), self._fits(before, read_ns)
            if (fits_after | fits_before).all():
                return np.minimum(np.where(fits_after, after, before), read_ns), clock
        stepped = abs(self._offset_ns - before_ns) > OFFSET_TOLERANCE_NS and clock.state is ClockState.SET
        return read_ns, Clock(clock.utc_offset_ns, ClockState.STEPPED) if stepped else clock

    def _fits(self, ts_ns: Int64s, read_ns: Int64s) -> np.ndarray[Any, np.dtype[np.bool_]]:
        return (ts_ns >= self._since_ns - OFFSET_TOLERANCE_NS) & (ts_ns <= read_ns + OFFSET_TOLERANCE_NS)


def columns(source: str, messages: list[Message], ts_ns: Int64s) -> FrameBatch:
    """The frames of python-can's messages."""
    count = len(messages)
    payloads = [b"" if m.is_remote_frame else bytes(m.data) for m in messages]
    length = np.fromiter(map(len, payloads), np.uint16, count)
    width = max(8, -(-int(length.max()) // 8) * 8)
    return FrameBatch(
        source=source,
        ts_ns=ts_ns,
        arbitration_id=np.fromiter((m.arbitration_id for m in messages), np.uint32, count),
        flags=np.fromiter(map(_flags, messages), np.uint8, count),
        length=length,
        data=np.frombuffer(b"".join(p.ljust(width, b"\0") for p in payloads), np.uint8).reshape(count, width),
    )


def _flags(message: Message) -> int:
    """`Flag` as an integer: arithmetic on enumerations would take longer than all the rest."""
    if message.is_error_frame:
        return 4 | 64 * (not message.is_rx)  # python-can says that an error frame without id is extended.
    return (
        1 * message.is_extended_id
        | 2 * message.is_remote_frame
        | 8 * message.is_fd
        | 16 * message.bitrate_switch
        | 32 * message.error_state_indicator
        | 64 * (not message.is_rx)
    )


def _is_frame(message: Message) -> bool:
    """Whether it can have been on a wire. slcan passes lines on that were cut, without looking twice."""
    if message.is_error_frame:
        return 0 <= message.arbitration_id <= EXTENDED_ID_MAX
    id_max = EXTENDED_ID_MAX if message.is_extended_id else STANDARD_ID_MAX
    whole = message.is_remote_frame or len(message.data) == message.dlc
    return whole and 0 <= message.arbitration_id <= id_max


def _close(bus: BusABC) -> None:
    """Let go of the adapter, also one that is gone: a port left open keeps its name from the adapter's next life."""
    try:
        bus.shutdown()
    except Exception as error:
        _log.debug("shutdown failed bus=%s error=%r", bus, error)
        port = getattr(bus, "serialPortOrig", None)  # slcan says goodbye before it closes, and does not close then.
        if port is not None:
            with contextlib.suppress(OSError):
                port.close()
