"""What the error frames of a CAN controller say of its state: active, warning, passive, off.

The states and the limits behind them are ISO 11898-1's (fault confinement): warning at 96 errors counted, passive at
128, off at 256. A controller that is off takes no part until it is restarted, by hand or by `restart-ms`.

Limits: a bus whose state never rests would make events without end. `EVENTS_MAX` may follow one another, then one every
`EVENT_NS`; changes in between are counted, and the state at rest is told in any case.

Source: linux/can/error.h. An error frame's arbitration id is the set of its classes, data[1] what is the matter with
the controller, data[6] and data[7] its transmit and receive error counters.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Final, NamedTuple

import numpy as np

from ingestd.model import CONTROLLER_STATES, Event, Flag, FrameBatch, SourceStatus

EVENTS_MAX: Final = 20
EVENT_NS: Final = 5_000_000_000

CONTROLLER, BUS_OFF, RESTARTED, COUNTERS = 0x004, 0x040, 0x100, 0x200
RX_OVERFLOW, WARNING, PASSIVE, ACTIVE = 0x01, 0x04 | 0x08, 0x10 | 0x20, 0x40


class BusState(IntEnum):
    """What a controller last said of itself; the names in lower case are the kinds of events."""

    ERROR_ACTIVE = 1
    ERROR_WARNING = 2
    ERROR_PASSIVE = 3
    BUS_OFF = 4
    BUS_RESTARTED = 5


class Findings(NamedTuple):
    """What a batch says beyond its frames. A controller that overflowed lost at least a frame each time it says so."""

    events: list[Event]
    overflows_count: int


class BusWatch:
    """Follows the state of one controller through its error frames, in `status.counters` and as events."""

    def __init__(self, source: str, status: SourceStatus) -> None:
        self._source, self._status = source, status
        self._paid_until_ns = 0  # Each event pays for EVENT_NS, and some may be on credit.
        self.reset()

    def reset(self) -> None:
        """The interface came up: whatever the state was, it begins anew."""
        self._state = self._told = BusState.ERROR_ACTIVE
        self._since_ns = self._untold_count = 0

    @property
    def name(self) -> str:
        """The state, as `model.CONTROLLER_STATES` calls it; a controller that was restarted is active."""
        return CONTROLLER_STATES[(self._state - 1) % BusState.BUS_OFF]

    @property
    def is_off(self) -> bool:
        """Whether nothing is sent or received until a restart."""
        return self._state is BusState.BUS_OFF

    def look(self, batch: FrameBatch) -> Findings:
        """Count the error frames of a batch and follow the state."""
        rows = np.flatnonzero(batch.flags & Flag.ERROR.value)
        if not len(rows):
            return Findings([], 0)
        self._status.count("error_frames", len(rows))
        classes, data = batch.arbitration_id[rows], batch.data[rows, :8]
        of_controller = np.where(classes & CONTROLLER, data[:, 1], np.uint8(0))
        overflows_count = int(np.count_nonzero(of_controller & RX_OVERFLOW))
        conditions = {
            BusState.BUS_OFF: classes & BUS_OFF,
            BusState.BUS_RESTARTED: classes & RESTARTED,
            BusState.ERROR_PASSIVE: of_controller & PASSIVE,
            BusState.ERROR_WARNING: of_controller & WARNING,
            BusState.ERROR_ACTIVE: of_controller & ACTIVE,
        }
        states = np.select([bits != 0 for bits in conditions.values()], [int(state) for state in conditions], 0)
        telling = np.flatnonzero(states)
        changes = telling[np.diff(states[telling], prepend=int(self._state)) != 0]
        if not len(changes):
            return Findings([], overflows_count)
        if offs_count := int(np.count_nonzero(states[changes] == BusState.BUS_OFF)):
            self._status.count("bus_offs", offs_count)
        events = []
        for row in changes[:EVENTS_MAX].tolist():
            details = {}
            if classes[row] & COUNTERS:
                details = {"tx_errors": int(data[row, 6]), "rx_errors": int(data[row, 7])}
            events += self._tell(BusState(states[row]), int(batch.ts_ns[rows[row]]), details)
        self._untold_count += max(len(changes) - EVENTS_MAX, 0)
        self._state, self._since_ns = BusState(states[changes[-1]]), int(batch.ts_ns[rows[changes[-1]]])
        return Findings(events, overflows_count)

    def rest(self, now_ns: int) -> list[Event]:
        """The state as it is, if that is not what was told last and the rate now allows to tell it."""
        if self._state is self._told or not self._affordable(now_ns):
            return []
        self._untold_count -= 1
        return self._tell(self._state, self._since_ns, {}, now_ns)

    def _tell(self, state: BusState, ts_ns: int, details: dict[str, Any], now_ns: int | None = None) -> list[Event]:
        now_ns = ts_ns if now_ns is None else now_ns
        if not self._affordable(now_ns):
            self._untold_count += 1
            return []
        self._paid_until_ns = max(self._paid_until_ns, now_ns) + EVENT_NS
        if self._untold_count:
            details["untold_changes"] = self._untold_count
        self._told, self._untold_count = state, 0
        return [Event(self._source, state.name.lower(), ts_ns, payload=details)]

    def _affordable(self, now_ns: int) -> bool:
        return self._paid_until_ns - now_ns <= (EVENTS_MAX - 1) * EVENT_NS
