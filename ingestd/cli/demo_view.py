"""What `ingestd demo` shows while it runs: on a terminal a picture that changes, in a pipe a line now and then."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Final, NamedTuple, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ingestd.daemon.live import Value
from ingestd.metrics import Snapshot
from ingestd.model import Books


class Shown(NamedTuple):
    """A channel in the picture."""

    label: str
    source: str
    channel: str
    digits: int = 0


CHANNELS: Final = (
    Shown("gear", "powertrain", "Transmission.Gear"),
    Shown("engine", "powertrain", "Engine.EngineSpeed"),
    Shown("speed", "powertrain", "Speed.VehicleSpeed", 1),
    Shown("throttle", "powertrain", "Engine.ThrottlePosition"),
    Shown("brake", "powertrain", "Brake.BrakePressure"),
    Shown("steering", "powertrain", "Steering.SteeringAngle"),
    Shown("lateral", "powertrain", "Dynamics.LateralAcceleration", 1),
    Shown("yaw rate", "powertrain", "Dynamics.YawRate", 1),
    Shown("coolant", "powertrain", "Temperatures.CoolantTemperature"),
    Shown("oil", "powertrain", "Temperatures.OilTemperature"),
    Shown("fuel", "powertrain", "Supply.FuelLevel", 1),
    Shown("trip", "body", "Odometer.OdometerTrip", 2),
    Shown("latitude", "gps/GN", "RMC.lat", 5),
    Shown("longitude", "gps/GN", "RMC.lon", 5),
    Shown("course", "gps/GN", "RMC.cog", 1),
    Shown("satellites", "gps/GN", "GGA.numSV"),
)
_CELL_WIDTH: Final = 26
_GAP: Final = 3


@dataclass(frozen=True, slots=True)
class Reading:
    """Everything there is to show at one instant."""

    seconds: float
    sent: Mapping[str, int]
    books: Mapping[str, Books]  # of this run
    snapshot: Snapshot
    lag_seconds: float | None
    latest: Mapping[tuple[str, str], Value]
    notes: list[str]

    def value(self, shown: Shown) -> str:
        """A channel's latest value with its unit, its label if it has one, or a dash."""
        found = self.latest.get((shown.source, shown.channel))
        if found is None or (found.number is None and found.text is None):
            return "-"
        if found.text is not None:
            return found.text
        rounded = round(found.number or 0.0, shown.digits) + 0.0  # There is no minus zero for drivers.
        return f"{rounded:.{shown.digits}f} {found.unit or ''}".rstrip()


class View:
    """The picture or the lines; a context manager."""

    def __init__(self, console: Console, line_seconds: float) -> None:
        self._console = console
        self._line_seconds = line_seconds
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._line_at = time.monotonic() + line_seconds
        self._before: tuple[float, dict[str, int]] = (0.0, {})

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, reading: Reading) -> None:
        """Show a reading; in a pipe only when the last line is old enough."""
        if self._live is not None:
            self._live.update(picture(reading, self._rates(reading), self._console.width), refresh=True)
        elif time.monotonic() >= self._line_at:
            self._line_at += self._line_seconds
            self._console.print(line(reading))

    def _rates(self, reading: Reading) -> dict[str, float]:
        """Frames a second of each source since the last picture."""
        (at, counts), now = self._before, {name: books.received for name, books in reading.books.items()}
        self._before = reading.seconds, now
        passed = max(reading.seconds - at, 1e-3)
        return {name: (count - counts[name]) / passed for name, count in now.items() if name in counts}


def line(reading: Reading) -> str:
    """One line for a log."""
    books = reading.books.values()
    values = ", ".join(f"{shown.label} {reading.value(shown)}" for shown in CHANNELS[:3])
    return (
        f"{reading.seconds:.0f} s  received {sum(each.received for each in books):,}"
        f"  stored {sum(each.committed for each in books):,}  lost {sum(_lost(each) for each in books):,}"
        f"  lag {_lag(reading)}  journal {_size(reading.snapshot.journal.bytes)}  {values}"
    )


def picture(reading: Reading, rates: Mapping[str, float], width: int) -> RenderableType:
    """The car, the books, and how far behind the database is."""
    car = Table.grid(padding=(0, _GAP, 0, 0))
    across = max(1, (width + _GAP) // (_CELL_WIDTH + _GAP))
    across = next(fits for fits in (4, 2, 1) if fits <= across)
    for at in range(0, len(CHANNELS), across):
        cells = CHANNELS[at : at + across]
        car.add_row(*(Text.assemble((f"{shown.label:<10} ", "dim"), f"{reading.value(shown):>15}") for shown in cells))
    books = Table("source")
    for title in ("frames/s", "sent", "received", "stored", "lost"):
        books.add_column(title, justify="right")
    books.add_column("link")
    for name, sent in reading.sent.items():
        status, of_source = reading.snapshot.statuses[name], reading.books[name]
        counts = (sent, of_source.received, of_source.committed, _lost(of_source))
        link = " ".join(filter(None, (status.link.value, status.reason)))
        books.add_row(name, f"{rates.get(name, 0):,.0f}", *(f"{count:,}" for count in counts), Text(link))
    state = f"wire to database {_lag(reading)}   journal {_size(reading.snapshot.journal.bytes)}   Ctrl-C stops"
    head = Text(f"recording for {reading.seconds:.0f} s", style="bold")
    return Group(head, car, books, Text(state), *(Text(note, style="yellow") for note in reading.notes))


def _lost(books: Books) -> int:
    return books.rejected + sum(books.dropped.values())


def _lag(reading: Reading) -> str:
    return "-" if not reading.lag_seconds else f"{reading.lag_seconds * 1000:.0f} ms"


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
