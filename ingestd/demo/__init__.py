"""A simulated car: the databases of its two buses, its drive round a closed track, and what it sends.

`vehicle` drives the car, `simulate` puts its columns onto the buses and `gps` onto a serial line. From there they go
into a capture file (`write_capture`), or in real time to devices that can be recorded from (`simulation`, with its
`player` and `ports`). Limits: two buses, one car, one track; a stand-in for hardware that a newcomer does not have, not
a model to tune a car with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

BUSES: Final = ("powertrain", "body")
GPS: Final = "gps"
DEMO_TRACK: Final = "Airfield"


def databases() -> dict[str, Path]:
    """The DBC file of each bus, by the name of the bus, which is also its interface in the capture."""
    folder = Path(__file__).parent
    return {name: folder / f"{name}.dbc" for name in BUSES}


def write_capture(path: Path, seconds: float = 120.0) -> int:
    """Write the demo drive as `candump -l` text and say how many frames it holds; the same bytes every time."""
    # Here and not above: it loads cantools, which takes longer than most commands run.
    from ingestd.demo import simulate

    return simulate.write_capture(path, seconds)
