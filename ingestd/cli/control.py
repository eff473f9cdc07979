"""`ingestd reload`; and what all commands share that talk to a running daemon: which one it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import click

from ingestd.cli.console import json_option, out, warn
from ingestd.config import find_control_socket, likely_control_socket
from ingestd.daemon.client import ask, runs_with
from ingestd.errors import ConfigError, UsageError


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


def socket_of(config: Path | None, socket: Path | None, *, is_told: bool = True) -> Path:
    """The control socket of the daemon that is meant. Raises UsageError, ConfigError.

    A file that was broken since its daemon began is enough to find it, as long as the daemon says that it is the one;
    that the file is broken is said here unless somebody else will.
    """
    if config is not None and socket is not None:
        raise UsageError("-c and --socket name a daemon each", "leave one of the two out")
    if socket is not None:
        return socket
    try:
        return find_control_socket(config)
    except ConfigError as error:
        assert config is not None
        likely = likely_control_socket(config)
        if not runs_with(likely, config):
            raise ConfigError(
                error.args[0], f"{error.hint or 'correct it'}; or name the daemon by --socket PATH"
            ) from error
        if is_told:
            warn(f"{error.args[0]}; the daemon runs with the file as it was")
        return likely


RELOAD_SECONDS_MAX = 600.0  # Large databases take their time on a small computer.
WORDS = {
    "added": "begun",
    "removed": "ended",
    "reopened": "reopened",
    "databases": "decoded from now on with what has changed in",
    "settings": "in force",
}


@click.command("reload")
@daemon_options
@json_option
def reload_command(config: Path | None, socket: Path | None, as_json: bool) -> None:
    """Have the daemon read its configuration and its signal databases again.

    Sources that are as before are not touched. If anything is wrong, nothing is changed: every mistake is said, and the
    exit code is 2.
    """
    changes = ask(socket_of(config, socket, is_told=False), "POST", "/reload", timeout_seconds=RELOAD_SECONDS_MAX)
    if as_json:
        out.print_json(json.dumps(changes), indent=None)
        return
    for what, words in WORDS.items():
        if what in changes:
            out.print(f"{words}: {', '.join(changes[what])}")
    if not changes:
        out.print("nothing has changed")
    if "restart" in changes:
        warn(f"not before the daemon is started again: {', '.join(changes['restart'])}")
