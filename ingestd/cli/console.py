"""Where words go: results to stdout, the rest to stderr; and what commands share: a database, an event loop."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Coroutine
from datetime import UTC, datetime
from typing import Any, TypeVar

import click
from rich.console import Console

from ingestd.errors import IngestdError
from ingestd.store import embedded, migrate

Result = TypeVar("Result")

# A pipe has no width: tables must not be cut there.
out = Console(width=None if sys.stdout.isatty() else 160, highlight=False, soft_wrap=not sys.stdout.isatty())
err = Console(stderr=True, highlight=False, soft_wrap=True)


def complain(error: IngestdError, prefix: str = "error") -> None:
    """One line on stderr: what happened, and what to do."""
    err.print(f"{prefix}: {error}", style="red", markup=False)


def warn(message: str) -> None:
    """One line on stderr."""
    err.print(f"warning: {message}", style="yellow", markup=False)


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine on the fastest event loop there is."""
    # When a connection is cut in the middle of a COPY, asyncpg leaves a future behind that nobody asks, and asyncio
    # prints it. What happened has been reported by then.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    if sys.platform == "win32":
        return asyncio.run(work)
    import uvloop

    return uvloop.run(work)


def database(dsn: str | None) -> str:
    """The DSN to use; without one, that of the embedded server, started and with its schema up to date."""
    if dsn:
        return dsn
    if embedded.running() is None:
        err.print(f"starting the embedded PostgreSQL in {embedded.data_dir()}", markup=False)
    dsn = embedded.start()
    run(migrate.upgrade(dsn))
    return dsn


dsn_option = click.option(
    "--dsn",
    envvar="INGESTD_DSN",
    metavar="DSN",
    help="PostgreSQL to use, as postgresql://user@host/database. Default: $INGESTD_DSN, else an embedded server.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def share(part: int, whole: int) -> str:
    """A percentage."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def moment(instant: datetime | None) -> str:
    """An instant in UTC, to the millisecond."""
    return "" if instant is None else instant.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
