"""A simulated car: the databases of its two buses, its drive round a closed track, and the frames it would send.

`vehicle.drive` simulates the car, `simulate.frames` puts its columns on the wire, and the functions here are all that
a command needs. Limits: two buses, one car, one track; a stand-in for hardware that a newcomer does not have, not a
model to tune a car with.
"""

from __future__ import annotations

from pathlib import Path


def databases() -> dict[str, Path]:
    """The DBC file of each bus, by the name of the bus, which is also its interface in the capture."""
    folder = Path(__file__).parent
    return {"powertrain": folder / "powertrain.dbc", "body": folder / "body.dbc"}


def write_capture(path: Path, seconds: float = 120.0) -> int:
    """Write the demo drive as `candump -l` text and say how many frames it holds; the same bytes every time."""
    # Here and not above: it loads cantools, which takes longer than most commands run.
    from ingestd.demo import simulate

    return simulate.write_capture(path, seconds)
