"""Where words go: results to stdout, the rest to stderr; and what commands share: a database, an event loop."""

from __future__ import annotations

import asyncio
import logging
import math
import sys
from collections.abc import Coroutine, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ingestd.config.readers import Place, postgres_dsn
from ingestd.errors import IngestdError, UsageError
from ingestd.store import embedded, migrate

Result = TypeVar("Result")

PIPE_WIDTH = 400  # A pipe has no width: tables must not be cut there.
ROWS_MAX = 50  # of a list whose length nobody knows; --json gives them all

_on_terminal = sys.stdout is not None and sys.stdout.isatty()
# Without markup: units and file names have brackets.
out = Console(width=None if _on_terminal else PIPE_WIDTH, highlight=False, soft_wrap=not _on_terminal, markup=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


def complain(error: IngestdError, prefix: str = "error") -> None:
    """One line on stderr: what happened, and what to do."""
    err.print(f"{prefix}: {error}", style="red")


def warn(message: str) -> None:
    """One line on stderr."""
    err.print(f"warning: {message}", style="yellow")


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
        err.print(f"starting the embedded PostgreSQL in {embedded.data_dir()}")
    dsn = embedded.start()
    if run(migrate.current(dsn)) != migrate.head():
        run(migrate.upgrade(dsn))
    return dsn


def checked_dsn(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    """What has a sign too many in it is refused before any part of a password is taken for a host."""
    if value:
        mistakes: list[str] = []
        postgres_dsn(value, Place("--dsn or INGESTD_DSN", Path(), mistakes))
        if mistakes:
            raise UsageError(mistakes[0])
    return value


dsn_option = click.option(
    "--dsn",
    envvar="INGESTD_DSN",
    callback=checked_dsn,
    metavar="DSN",
    help="PostgreSQL to use, as postgresql://user@host/database. Default: $INGESTD_DSN, else an embedded server.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


class Listing(Table):
    """A table of plain text. The columns named in `whole` are never shortened: where it is narrow, the others are."""

    def __init__(self, *columns: str, title: str | None = None, whole: Sequence[str] = (), header: bool = True) -> None:
        super().__init__(title=None if title is None else Text(title), title_justify="left", show_header=header)
        self._whole = [column in whole for column in columns]
        for column in columns:
            self.add_column(column, no_wrap=True, overflow="ellipsis")

    def add(self, *cells: object) -> None:
        """Add a row. Cells are shown as they are: units and file names have brackets, which rich takes for markup."""
        for column, cell, whole in zip(self.columns, cells, self._whole, strict=True):
            if whole:
                column.min_width = max(column.min_width or 0, len(str(cell)))
        self.add_row(*(Text("" if cell is None else str(cell)) for cell in cells))


def finite(value: float | None) -> float | None:
    """For JSON, which has no infinity and no NaN."""
    return value if value is not None and math.isfinite(value) else None


def share(part: int, whole: int) -> str:
    """A percentage."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def moment(instant: datetime | None) -> str:
    """An instant in UTC, to the millisecond."""
    return "" if instant is None else instant.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
