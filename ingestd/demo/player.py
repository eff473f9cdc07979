"""Plays the car in real time, in a process of its own: `python -m ingestd.demo.player COUNTS-FD [auto|slcan|vcan]`.

On standard output one line of JSON says where the sources are, by name: `{"powertrain": {"interface": …, "channel": …},
…, "gps": {"port": …}}`. On standard input one letter is one order: `p` plays, `s` stops playing but leaves the ports as
they are, for what the other side has not read yet; the end of input, which also comes when the parent dies, ends it
all. How far it is can be read at any time in the memory that the file of COUNTS-FD maps: see `Counts`.

The drive is simulated a few seconds ahead in a thread and goes on for ever in bounded memory. Limits: frames leave up
to a tick after they are due, several at once if they are due together, as a USB adapter would pass them on. If the
process is held up, it catches up.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from ingestd.demo import BUSES, GPS
from ingestd.demo.counts import Counts, State
from ingestd.demo.ports import (
    Port,
    SlcanPort,
    SocketPort,
    TerminalPort,
    VirtualInterface,
    slcan_lines,
    socket_frames,
)
from ingestd.model import FrameBatch

PIECE_SECONDS: Final = 4.0
PIECES_AHEAD: Final = 2
PIECE_SECONDS_MAX: Final = 60.0  # Simulating a piece takes some milliseconds; then the thread has died.
TICK_SECONDS: Final = 0.002
IDLE_SECONDS: Final = 0.02
LEAD_NS: Final = 100_000_000  # from the order to the drive's time 0
FLUSH_SECONDS_MAX: Final = 1.0

Encode = Callable[[FrameBatch], list[bytes]]


@dataclass(frozen=True, slots=True)
class Wire:
    """A source's port and how its frames look there; sentences of the receiver need no encoding."""

    port: Port
    where: dict[str, str]
    encode: Encode | None = None


@dataclass(slots=True)
class Piece:
    """What one source sends during a piece of the drive, and when, in nanoseconds since its time 0."""

    due_ns: list[int]
    items: list[bytes]
    next: int = 0


class Player:
    """Three sources, one clock."""

    def __init__(self, wires: dict[str, Wire], counts: Counts) -> None:
        self._wires = wires
        self._counts = counts
        self._ahead: queue.Queue[dict[str, Piece]] = queue.Queue(PIECES_AHEAD)
        self._playing: list[dict[str, Piece]] = []
        self._start_ns: int | None = None

    def run(self, orders: int) -> None:
        """Do what the file descriptor `orders` says, until it ends."""
        self._counts.set_state(State.READY)
        while True:
            playing = self._start_ns is not None
            readable, _, _ = select.select([orders], [], [], TICK_SECONDS if playing else IDLE_SECONDS)
            if readable:
                letters = os.read(orders, 64)
                if not letters:
                    return
                for letter in letters.decode("ascii"):
                    self._obey(letter)
            self._tick()

    def _obey(self, letter: str) -> None:
        if letter == "p" and self._start_ns is None:
            start_ns = time.monotonic_ns() + LEAD_NS
            start_utc_ns = time.time_ns() + LEAD_NS
            threading.Thread(target=self._simulate, args=(start_utc_ns,), name="drive", daemon=True).start()
            self._playing = [self._ahead.get(timeout=PIECE_SECONDS_MAX)]
            self._start_ns = max(start_ns, time.monotonic_ns())
            self._counts.set_state(State.PLAYING)
        elif letter == "s":
            self._start_ns = None
            self._flush()
            self._counts.set_state(State.STOPPED)

    def _flush(self) -> None:
        """Give the kernel what it has not taken yet; what the readers leave there for too long stays behind."""
        deadline, waiting = time.monotonic() + FLUSH_SECONDS_MAX, True
        while waiting and time.monotonic() < deadline:
            waiting = not all([wire.port.push() for wire in self._wires.values()])  # noqa: C419 - each of them
            time.sleep(TICK_SECONDS)
        self._count()

    def _tick(self) -> None:
        """Send what is due, and keep an ear on the ports."""
        for wire in self._wires.values():
            wire.port.push()
        if self._start_ns is not None:
            now_ns = time.monotonic_ns() - self._start_ns
            for name, wire in self._wires.items():
                self._send(name, wire.port, now_ns)
        self._count()

    def _send(self, name: str, port: Port, now_ns: int) -> None:
        """What one source has due; the last frames of a piece are carried after it ends, so two may be in play."""
        for at in range(PIECES_AHEAD):
            if at == len(self._playing):
                self._playing.append(self._ahead.get(timeout=PIECE_SECONDS_MAX))
            piece = self._playing[at][name]
            until = bisect_right(piece.due_ns, now_ns, lo=piece.next)
            port.send(piece.items[piece.next : until])
            piece.next = until
            if until < len(piece.due_ns):
                break
        while len(self._playing) > 1 and all(piece.next == len(piece.due_ns) for piece in self._playing[0].values()):
            del self._playing[0]

    def _count(self) -> None:
        for name, wire in self._wires.items():
            self._counts.set_sent(name, wire.port.sent)

    def _simulate(self, start_utc_ns: int) -> None:
        """The thread that drives ahead."""
        for piece in drive_pieces(self._wires, start_utc_ns):
            self._ahead.put(piece)


def drive_pieces(wires: dict[str, Wire], start_utc_ns: int) -> Iterator[dict[str, Piece]]:
    """The drive in pieces, as each source sends it, without an end."""
    # Here and not above: the ports can be opened while cantools is being loaded, which takes a while.
    from ingestd.demo.gps import Receiver
    from ingestd.demo.simulate import Bus
    from ingestd.demo.vehicle import Drive

    drive, receiver = Drive(), Receiver(start_utc_ns)
    buses = {name: Bus(name, start_ns=0) for name in BUSES}
    while True:
        columns = drive.go_on(PIECE_SECONDS)
        pieces = {GPS: Piece(*receiver.sentences(columns))}
        for name, bus in buses.items():
            batch, encode = bus.carry(columns), wires[name].encode
            assert encode is not None
            pieces[name] = Piece(batch.ts_ns.tolist(), encode(batch))
        yield pieces


@contextlib.contextmanager
def open_wires(kind: str) -> Iterator[dict[str, Wire]]:
    """The ports of all sources: `vcan`, `slcan`, or `auto` for what is there."""
    interfaces: list[VirtualInterface] = []
    wires: dict[str, Wire] = {}
    try:
        try:
            if kind != "slcan":
                for name in BUSES:
                    interfaces.append(VirtualInterface(f"demo-{name}"))  # noqa: PERF401 - the first one counts too
        except OSError:
            if kind == "vcan":
                raise
        for at, name in enumerate(BUSES):
            if len(interfaces) == len(BUSES):
                channel = interfaces[at].name
                where = {"interface": "socketcan", "channel": channel}
                wires[name] = Wire(SocketPort(channel), where, socket_frames)
            else:
                adapter = SlcanPort()
                wires[name] = Wire(adapter, {"interface": "slcan", "channel": adapter.device}, slcan_lines)
        line = TerminalPort()
        wires[GPS] = Wire(line, {"port": line.device})
        yield wires
    finally:
        for wire in wires.values():
            wire.port.close()
        for interface in interfaces:
            interface.remove()


def main(arguments: list[str]) -> None:
    """Be the player."""
    for ignored in (signal.SIGINT, signal.SIGHUP):  # The parent's terminal; the parent decides.
        signal.signal(ignored, signal.SIG_IGN)
    with open_wires(arguments[1] if len(arguments) > 1 else "auto") as wires:
        places: dict[str, Any] = {name: wire.where for name, wire in wires.items()}
        os.write(1, json.dumps(places).encode() + b"\n")
        Player(wires, Counts(int(arguments[0]), list(wires))).run(0)


if __name__ == "__main__":
    main(sys.argv[1:])
