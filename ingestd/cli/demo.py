"""`ingestd demo`: a simulated car, recorded live by the real daemon, for everybody to look at."""

from __future__ import annotations

from typing import Literal

import click

from ingestd.cli.console import database, dsn_option, out
from ingestd.store import embedded


@click.command("demo")
@click.option("--seconds", type=click.FloatRange(min=0.1), metavar="N", help="Stop after so long instead of at Ctrl-C.")
@click.option(
    "--buses",
    type=click.Choice(["auto", "slcan", "vcan"]),
    default="auto",
    show_default=True,
    help="What the car's CAN buses are: virtual interfaces of the kernel, or slcan adapters on pseudo terminals.",
)
@dsn_option
def demo_command(seconds: float | None, buses: Literal["auto", "slcan", "vcan"], dsn: str | None) -> None:
    """Record a simulated car, live, until Ctrl-C: two CAN buses and a GPS through the real daemon into PostgreSQL.

    Then the books are balanced: what the car sent, what was received, what is stored.
    """
    dsn = database(dsn)
    # Here and not above: it imports all of the daemon.
    from ingestd.cli.demo_run import record_demo

    record_demo(seconds, buses, dsn, embedded.data_dir().parent / "demo")
    if embedded.running() == dsn:
        out.print("The database stays up until `ingestd db stop`.")
