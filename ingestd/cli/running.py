"""`ingestd run`: the daemon, and what its log looks like.

One line of log per change of state, its facts as key=value, or as JSON for programs. systemd's journal adds the time
itself and takes the priority from a prefix (sd-daemon(3)); anywhere else the line begins with the time, in UTC.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import re
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

_FIELD = re.compile(r"(?:(\w+)=)?(%[-+#0-9.]*[sdrfgx])")  # of a format: the key that a value has, if any
_FACTS = re.compile(r"\w+=\S+(?: \w+=\S+)*")


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
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True,
              help="Lines for people, or JSON objects for programs.")  # fmt: skip
def run_command(path: Path, dsn: str | None, verbose: bool, log_format: str) -> None:
    """Record the buses and serial lines of a configuration FILE, until SIGTERM or Ctrl-C."""
    path = path.absolute()
    load = partial(load_config, path, dsn=dsn)  # Also for a reload.
    config = load()
    set_up_logging(verbose=verbose, as_json=log_format == "json")
    faulthandler.enable()  # A watchdog that gives up on us sends SIGABRT: then the log says where every thread was.
    # Here and not above: no other command needs it.
    from ingestd.daemon import running

    raise click.exceptions.Exit(running.run(config, path, load))


def set_up_logging(*, verbose: bool = False, as_json: bool = False, stream: IO[str] | None = None) -> None:
    """Send the log of this process to stderr."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    for_journal = is_journal(stream)
    handler.setFormatter(JsonLine(for_journal=for_journal) if as_json else LogLine(for_journal=for_journal))
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
        return f"{utc_of(record)} {record.levelname.lower()} {origin}: {super().format(record)}"


class JsonLine(logging.Formatter):
    """A record as one JSON object: `time`, `level`, `part`, `message`, its facts by their keys under `facts`.

    A traceback is in `traceback`. Facts are those that the text would show as key=value.
    """

    def __init__(self, *, for_journal: bool) -> None:
        super().__init__("%(message)s")
        self._for_journal = for_journal

    def format(self, record: logging.LogRecord) -> str:
        """The object, without the line end."""
        said: dict[str, object] = {
            "time": utc_of(record),
            "level": record.levelname.lower(),
            "part": record.name.removeprefix("ingestd."),
            "message": record.getMessage(),
        }
        if facts := facts_of(record):
            said["facts"] = facts
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        prefix = f"<{PRIORITIES.get(record.levelno, 6)}>" if self._for_journal else ""
        return prefix + json.dumps(said, ensure_ascii=False, default=str)


def facts_of(record: logging.LogRecord) -> dict[str, object]:
    """The arguments of a record by the keys that its format gives them: `source=%s frames=%d`.

    One that has none may itself be made of facts: `dropped_budget=3 dropped_overflow=1`.
    """
    values = record.args if isinstance(record.args, tuple) else ()
    keys = [key for key, _ in _FIELD.findall(str(record.msg))]
    if len(keys) != len(values):
        return {}
    facts: dict[str, object] = {}
    for key, value in zip(keys, values, strict=True):
        if key:
            facts[key] = value if isinstance(value, str | int | float | list | dict | None) else str(value)
        elif isinstance(value, str) and _FACTS.fullmatch(value):
            pairs = (each.split("=", 1) for each in value.split())
            facts |= {key: int(text) if text.isdecimal() else text for key, text in pairs}
    return facts


def utc_of(record: logging.LogRecord) -> str:
    """When it was said, to the millisecond."""
    return datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def _is_news(record: logging.LogRecord) -> bool:
    """Not what asyncpg leaves behind when a connection is cut in the middle of a COPY: it has been reported by then."""
    return record.name != "asyncio" or not record.getMessage().startswith("Future exception was never retrieved")
