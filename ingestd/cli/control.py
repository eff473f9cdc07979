"""What commands share that talk to a running daemon: which one, and `ingestd reload`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from ingestd.config import find_control_socket
from ingestd.errors import UsageError


def daemon_options(command: Callable[..., None]) -> Callable[..., None]:
    """-c and --socket: which daemon."""
    configuration = click.option(
        "-c", "--config", "config", type=click.Path(path_type=Path), metavar="FILE",
        help="The configuration of the daemon. Default: the one with the default journal.",
    )  # fmt: skip
    socket = click.option(
        "--socket", "socket", type=click.Path(path_type=Path), metavar="PATH",
        help="Its control socket, for who may not read the configuration.",
    )  # fmt: skip
    return configuration(socket(command))


def socket_of(config: Path | None, socket: Path | None) -> Path:
    """The control socket of the daemon that is meant. Raises UsageError, ConfigError."""
    if config is not None and socket is not None:
        raise UsageError("-c and --socket name a daemon each", "leave one of the two out")
    return socket or find_control_socket(config)
