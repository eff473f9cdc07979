"""`ingestd db`: schema, migrations, a prompt, the embedded server."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence

import click

from ingestd.cli.console import dsn_option, out, run, warn
from ingestd.errors import UsageError
from ingestd.store import embedded, grants, migrate
from ingestd.store.dsn import without_secrets


@click.group("db")
def db_group() -> None:
    """The database: schema, migrations, a prompt, the embedded server."""


def plain_database(dsn: str | None) -> str:
    """The DSN to use, with the embedded server started but its schema left as it is."""
    return dsn or embedded.start()


@db_group.command("init")
@dsn_option
def db_init(dsn: str | None) -> None:
    """Make the schema in an empty database."""
    dsn = plain_database(dsn)
    run(migrate.upgrade(dsn))
    out.print(f"schema is at {run(migrate.current(dsn))}")


@db_group.command("upgrade")
@click.argument("revision", default="head")
@dsn_option
def db_upgrade(revision: str, dsn: str | None) -> None:
    """Bring the schema to REVISION (default: the newest)."""
    dsn = plain_database(dsn)
    before = run(migrate.current(dsn))
    run(migrate.upgrade(dsn, revision))
    after = run(migrate.current(dsn))
    out.print(f"schema is at {after}")
    if before != after == migrate.head():
        remind(*run(grants.holders(dsn)))


def remind(writers: Sequence[str], readers: Sequence[str]) -> None:
    """New tables and functions belong to the owner alone: name the command that gives them to the others."""
    options = [f"--writer {shlex.quote(role)}" for role in writers] + [
        f"--reader {shlex.quote(role)}" for role in readers
    ]
    if options:
        out.print(f"what is new is the owner's alone; for the other roles run: ingestd db grant {' '.join(options)}")


@db_group.command("downgrade")
@click.argument("revision")
@click.option("--yes", is_flag=True, help="Do not ask.")
@dsn_option
def db_downgrade(revision: str, yes: bool, dsn: str | None) -> None:
    """Take the schema back to REVISION; 'base' removes it with all data."""
    dsn = plain_database(dsn)
    if not yes:
        click.confirm(f"Data that {revision} has no place for will be gone. Go on?", abort=True, err=True)
    run(migrate.downgrade(dsn, revision))
    out.print(f"schema is at {run(migrate.current(dsn)) or 'base: nothing is left'}")


@db_group.command("current")
@dsn_option
def db_current(dsn: str | None) -> None:
    """The revision of the database's schema."""
    out.print(run(migrate.current(plain_database(dsn))) or "no schema: ingestd db init")


@db_group.command("history")
def db_history() -> None:
    """All revisions, newest first."""
    for line in reversed(migrate.history()):
        out.print(f"{line.id}  {line.description}")


@db_group.command("check")
@dsn_option
def db_check(dsn: str | None) -> None:
    """Tell whether the schema is the one this program needs."""
    run(migrate.check(plain_database(dsn)))
    out.print(f"schema is at {migrate.head()}, as it should be")


@db_group.command("grant")
@click.option("--writer", "writers", multiple=True, metavar="ROLE", help="Who runs the daemon, or imports.")
@click.option("--reader", "readers", multiple=True, metavar="ROLE", help="Who asks in SQL: people, Grafana.")
@dsn_option
def db_grant(writers: tuple[str, ...], readers: tuple[str, ...], dsn: str | None) -> None:
    """Give roles exactly what a writer, a reader or both need; what they had beyond it is taken away.

    The DSN is that of the owner of the tables, who made them with `ingestd db init`. The roles exist already. Give the
    same role to both options if it is to write and read.
    """
    if not writers and not readers:
        raise UsageError("there is no role to give anything to", "name one with --writer ROLE or --reader ROLE")
    for done in run(grants.grant(plain_database(dsn), writers, readers)):
        for what in done.taken:
            out.print(f"{done.role}: taken away {what}")
        for what in done.given:
            out.print(f"{done.role}: given {what}")
        if not done.taken and not done.given:
            out.print(f"{done.role}: has what it needs")
        for sentence in done.beyond:
            warn(f"{done.role} {sentence}")


@db_group.command("psql", context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@dsn_option
def db_psql(arguments: tuple[str, ...], dsn: str | None) -> None:
    """Open psql on the database; ARGUMENTS go to psql, as in: ingestd db psql -c 'SELECT …'."""
    # Everybody can see the arguments of a program. Of a key with a passphrase psql asks for that.
    dsn, password = without_secrets(plain_database(dsn))
    environment = os.environ if password is None else {**os.environ, "PGPASSWORD": password}
    command = [str(embedded.psql_path()), dsn, *arguments]
    if sys.platform == "win32":
        raise click.exceptions.Exit(subprocess.call(command, env=environment))
    os.execve(command[0], command, environment)


@db_group.command("stop")
def db_stop() -> None:
    """Stop the embedded server; its data stays.

    Whoever is connected is cut off, and named. A daemon records on, into its journal.
    """
    if connected := embedded.clients():
        names = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in connected.items())
        warn(f"cut off: {names}; a daemon records on into its journal, and sends it once the server runs again"
             " (ingestd db current starts it)")  # fmt: skip
    out.print("the embedded server is stopped" if embedded.stop() else "the embedded server was not running")
