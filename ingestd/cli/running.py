"""`ingestd run`: the daemon, and what its log looks like.

One line of log per change of state, its facts as key=value. systemd's journal adds the time itself and takes the
priority from a prefix (sd-daemon(3)); anywhere else the line begins with the time, in UTC.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO

import click

from ingestd.config import load_config

# Priorities of syslog(3).
PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}


@click.command("run")
@click.option(
    "-c",
    "--config",
    "path",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The configuration; docs/configuration.md has every key.",
)
@click.option("--dsn", metavar="DSN", help="PostgreSQL to use. Default: $INGESTD_DSN, else as the configuration says.")
@click.option("-v", "--verbose", is_flag=True, help="Log what is done for each batch, too.")
def run_command(path: Path, dsn: str | None, verbose: bool) -> None:
    """Record the buses and serial lines of a configuration FILE, until SIGTERM or Ctrl-C."""
    path = path.absolute()
    load = partial(load_config, path, dsn=dsn)  # Also for a reload.
    config = load()
    set_up_logging(verbose=verbose)
    faulthandler.enable()  # A watchdog that gives up on us sends SIGABRT: then the log says where every thread was.
    # Here and not above: no other command needs it.
    from ingestd.daemon import running

    raise click.exceptions.Exit(running.run(config, path, load))


def set_up_logging(*, verbose: bool = False, stream: IO[str] | None = None) -> None:
    """Send the log of this process to stderr."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LogLine(for_journal=is_journal(stream)))
    handler.addFilter(_is_news)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("ingestd").setLevel(logging.DEBUG if verbose else logging.INFO)
    logging.captureWarnings(True)


def is_journal(stream: IO[str], environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the stream goes to systemd's journal: it says which device and inode that is (systemd.exec(5))."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class LogLine(logging.Formatter):
    """A record as a line; a traceback as several, each of which says how grave it is."""

    def __init__(self, *, for_journal: bool) -> None:
        super().__init__("%(message)s")
        self._for_journal = for_journal

    def format(self, record: logging.LogRecord) -> str:
        """The text of the record, without the line end."""
        origin = record.name.removeprefix("ingestd.")
        if self._for_journal:
            prefix = f"<{PRIORITIES.get(record.levelno, 6)}>"
            return "\n".join(prefix + line for line in f"{origin}: {super().format(record)}".splitlines())
        at = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3]
        return f"{at}Z {record.levelname.lower()} {origin}: {super().format(record)}"


def _is_news(record: logging.LogRecord) -> bool:
    """Not what asyncpg leaves behind when a connection is cut in the middle of a COPY: it has been reported by then."""
    return record.name != "asyncio" or not record.getMessage().startswith("Future exception was never retrieved")
