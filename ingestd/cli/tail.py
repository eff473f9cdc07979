"""`ingestd tail`: live values from the running daemon, in place on a terminal, as lines in a pipe."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import click
from rich.console import Group
from rich.live import Live
from rich.text import Text

from ingestd.cli.console import Listing, out, warn
from ingestd.cli.control import daemon_options, socket_of
from ingestd.daemon.client import ask, asking
from ingestd.errors import IngestdError

RATE_SECONDS: Final = 5.0  # over which samples a second are counted

NONE_SECONDS: Final = 3.0  # after which somebody who sees nothing is told so

Key = tuple[str, str]


class Board:
    """What is shown on a terminal: the newest value of each channel, and how often it comes."""

    def __init__(self) -> None:
        self._values: dict[Key, dict[str, Any]] = {}
        self._counts: dict[Key, deque[tuple[float, int]]] = {}

    def take(self, value: dict[str, Any], now: float) -> None:
        """A channel has changed."""
        key = value["source"], value["channel"]
        self._values[key] = value
        counts = self._counts.setdefault(key, deque())
        counts.append((now, value["samples"]))
        while len(counts) > 2 and counts[1][0] < now - RATE_SECONDS:
            counts.popleft()

    def rate(self, key: Key) -> float:
        """Samples a second."""
        (begun, first), (now, last) = self._counts[key][0], self._counts[key][-1]
        return (last - first) / (now - begun) if now > begun else math.nan

    def shown(self, rows_max: int, now_mono_ns: int) -> Group:
        """The picture: as many channels as there are rows for."""
        table = Listing("source", "channel", "value", "unit", "per second", "age", whole=["channel", "value"])
        for key in sorted(self._values)[:rows_max]:
            value, rate = self._values[key], self.rate(key)
            age = max(0.0, (now_mono_ns - value["ts_mono_ns"]) / 1e9)
            cells = [*key, in_words(value), value["unit"], "" if math.isnan(rate) else f"{rate:,.1f}", f"{age:.1f} s"]
            table.add(*cells)
        more = len(self._values) - rows_max
        below = f"… and {more:,} more channels: name some, as in  ingestd tail 'can0/Engine.*'" if more > 0 else ""
        return Group(table, Text(below))


def in_words(value: dict[str, Any]) -> str:
    """A value for people: its number, and its label if it has one."""
    number, text = value["value_num"], value["value_text"]
    if number is None:
        return text if text is not None else "none"
    return f"{number:.10g}" if text is None else f"{number:.10g} {text}"


def line(value: dict[str, Any]) -> str:
    """A value as a line: when, of what, how much."""
    words = [value["ts_utc"], value["source"], value["channel"], in_words(value), value["unit"] or ""]
    return " ".join(words).rstrip() + ("" if not value["quality"] else f" quality={value['quality']}")


@click.command("tail")
@click.argument("pattern", default="*")
@daemon_options
@click.option(
    "--every", "seconds", default=0.5, show_default=True, help="Seconds between two looks at the same channel."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, for programs.")
def tail_command(pattern: str, config: Path | None, socket: Path | None, seconds: float, as_json: bool) -> None:
    """Show live values of the running daemon, until Ctrl-C; the newest of each channel, not each sample.

    PATTERN is a part of `source/channel`, or with * and ? all of it: Speed, 'can0/Engine.*'.
    """  # fmt: skip
    where = socket_of(config, socket)
    with contextlib.suppress(KeyboardInterrupt):
        show(told_if_none(follow(where, pattern, seconds), where, pattern), as_json=as_json)


def show(values: Iterator[dict[str, Any] | None], *, as_json: bool) -> None:
    """In place on a terminal, as lines in a pipe."""
    if as_json or not out.is_terminal:
        for value in values:
            if value is not None:
                click.echo(json.dumps(value, ensure_ascii=False) if as_json else line(value))
        return
    board = Board()
    with Live(console=out, auto_refresh=False, transient=False) as picture:
        for value in values:
            if value is not None:
                board.take(value, time.monotonic())
            else:
                picture.update(board.shown(max(1, out.height - 6), time.monotonic_ns()), refresh=True)


def told_if_none(
    values: Iterator[dict[str, Any] | None], socket: Path, pattern: str
) -> Iterator[dict[str, Any] | None]:
    """The same values; once, on stderr, that there are none, if that goes on for a while."""
    is_waiting, begun = True, time.monotonic()
    for value in values:
        if value is not None:
            is_waiting = False
        elif is_waiting and time.monotonic() > begun + NONE_SECONDS:
            is_waiting = False
            # Another version of the daemon may not know.
            with contextlib.suppress(IngestdError):
                warn(of_none(pattern, ask(socket, "GET", "/tail/channels")["channels"]))
        yield value


def of_none(pattern: str, channels: int) -> str:
    """That nothing matches, and what to do."""
    if not channels:
        return "no channel has a value so far: the daemon's /ready and /metrics tell what is heard, and what is decoded"
    there_are = "there is 1 channel" if channels == 1 else f"there are {channels:,} channels"
    return f"no channel matches {pattern!r} so far; {there_are}: ingestd tail shows them all"


def follow(socket: Path, pattern: str, seconds: float) -> Iterator[dict[str, Any] | None]:
    """Values as the daemon tells them; None where it has told all that is new. Raises IngestdError, also at its end."""
    target = "/tail?" + urlencode({"pattern": pattern, "seconds": seconds})
    with asking(socket, "GET", target) as answer:
        for told in answer:
            yield json.loads(told) if told.strip() else None
    raise IngestdError("the daemon has ended", "its log says why")
