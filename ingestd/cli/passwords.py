"""`ingestd hash-password`: what `http.users` holds instead of a password."""

from __future__ import annotations

import sys

import click

from ingestd.cli.console import out
from ingestd.errors import UsageError


@click.command("hash-password")
def hash_password_command() -> None:
    """Ask for a password, or read it from a pipe, and print its hash for http.users in the configuration."""
    # Here and not above: no other command needs it.
    from ingestd.daemon.access import hash_of

    if sys.stdin.isatty():
        password = click.prompt("Password", hide_input=True, confirmation_prompt="Again", err=True)
    else:
        password = sys.stdin.readline().rstrip("\r\n")
    if not password:
        raise UsageError("an empty password", "write one, or pipe one in")
    try:
        out.print(hash_of(password), markup=False, highlight=False)
    except ValueError as error:
        raise UsageError(f"this password {error}", "take another one") from error
